"""README and pages keep their word: tables equal the code, commands parse, what is named exists, pages are short."""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from killing import environment
from test_architecture import ROOMS

from kcdcache import errors
from kcdcache.cli import main
from kcdcache.datasets import datasets
from kcdcache.methods.catalogue import METHODS
from kcdcache.networks import registry
from kcdcache.networks.catalogue import NETWORKS
from kcdcache.networks.input_transform import InputTransform
from kcdcache.networks.taps import TAPS
from kcdcache.runs.state import read_metrics
from kcdcache.settings import MethodsCommand, PrecomputeSettings, TrainSettings, make
from kcdcache.store import reader
from kcdcache.teacher import precompute, teacher
from kcdcache.training import distill
from kcdcache.training.sampling import SAMPLING

ROOT = Path(__file__).resolve().parent.parent
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "docs/pages").rglob("*.md"))}
"""path of a page -> its text"""
README = (ROOT / "README.md").read_text()
TEXTS = {"README.md": README, **PAGES}


class Block(NamedTuple):
    """A fenced block, and the comment on the line before it: `not run: WHY`, `run by: TEST` or `save as: FILE`."""

    page: str
    kind: str
    text: str
    mark: str


def blocks_of(page):
    found = re.findall(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w+)\n(.*?)^```$", TEXTS[page], re.S | re.M)
    return [Block(page, kind, text, mark) for mark, kind, text in found]


def lines_of(block):
    """Return the commands of a block of shell, continued lines joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def page(name):
    return PAGES[f"docs/pages/{name}.md"]


BLOCKS = [block for name in TEXTS for block in blocks_of(name)]
SHELL = [line.split(" > ")[0] for block in BLOCKS if block.kind in ("sh", "bash") for line in lines_of(block)]
COMMANDS = [
    line for line in SHELL if line.startswith("kcdcache ") and "--config " not in line
]  # of files that are made


FEW = "digits?train=300&test=60"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three epochs of KD from a store, as `kcdcache train` does them."""
    folder, digits = tmp_path_factory.mktemp("readme"), datasets.load(FEW)
    transform = InputTransform(digits.mean, digits.std)
    network = teacher.freeze(registry.build("resnet8", 10, seed=7), transform, "resnet8", digits.classes, "cpu")
    rules = {"augment": "crop", "padding": 2, "views": 3, "min_accuracy": 0.0}
    precompute.run(make(PrecomputeSettings, rules), digits, network, folder / "store")
    settings = {"student": "resnet8", "epochs": 3, "stages": 1, "keep": 1.0, "milestones": ()}
    material = distill.Material(data=digits, knowledge=reader.open(folder / "store"))
    distill.run(make(TrainSettings, settings), material, out=folder / "run")
    return folder


def as_here(code, folder):
    """A block with the few digits and places of these tests."""
    code = code.replace('load("digits?train=320")', f'load("{FEW}")')
    for there, here in {"digits/kd-seed0": "run", "digits/store": "store", "shallow": "shallow"}.items():
        code = code.replace(f"runs/{there}", str(folder / here))
    return code


def printed_by(folder, own):
    """What a block of Python prints on a few digits: the one that adds a method, or the own training loop."""
    found = [block.text for block in BLOCKS if block.mark.startswith("run by: tests/test_readme.py::")]
    code = as_here(next(text for text in found if ("METHODS[" not in text) == own), folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {})
    return printed.getvalue()


def test_own_training_loop_gives_the_losses_of_train(trained):
    losses = [float(line.split()[1]) for line in printed_by(trained, own=True).splitlines()]
    assert losses == pytest.approx([row.loss for row in read_metrics(trained / "run")], rel=1e-6)


def test_torchs_loader_gets_each_epochs_own_views_in_workers_that_stay(trained, tmp_path):
    code = as_here(next(block.text for block in BLOCKS if "DataLoader(points" in block.text), trained)
    (tmp_path / "script.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [[str(epoch), "300"] for epoch in range(3)]
    assert len({line[2] for line in lines}) == 3


def test_a_method_and_a_network_are_added_as_the_readme_shows(trained):
    before = dict(METHODS), dict(NETWORKS), dict(TAPS)
    try:
        printed = printed_by(trained, own=False)
    finally:
        for table, held in zip((METHODS, NETWORKS, TAPS), before, strict=True):
            table.clear()
            table.update(held)
    assert 0.05 < float(printed) <= 1
    rows = read_metrics(trained / "shallow")
    assert [row.kept for row in rows] == [300, 212]


def test_the_table_of_methods_is_the_catalogue():
    told = main.COMMANDS["methods"](MethodsCommand())["methods"]
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| [^|]* \| ([\d,]+) \|$", page("reference/methods"), re.M)
    assert {name: int(size.replace(",", "")) for name, size in rows} == {row["method"]: row["bytes"] for row in told}


def test_the_table_of_samplings_is_the_codes():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page("understanding/sampling"), re.M)
    assert rows == [(name, scheme.about) for name, scheme in SAMPLING.items()]


def test_own_training_loop_is_about_25_lines():
    code = next(block.text for block in blocks_of("docs/pages/guides/own-loop.md") if block.kind == "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 30


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line):
    words = shlex.split(line, comments=True)[1:]
    command = main.build(words[0])
    with click.Context(command, info_name=words[0]) as context:
        command.parse_args(context, words[1:])


def test_every_command_is_shown_and_none_that_is_not():
    assert {line.split()[1] for line in COMMANDS} == set(main.COMMANDS)
    listed = re.findall(r"^\| \[(\w+)\]\(commands/\w+\.md\) \|", page("reference/commands"), re.M)
    assert listed == list(main.COMMANDS)


def test_the_table_of_rooms_has_every_room_in_the_order_of_its_test():
    assert re.findall(r"^\| `(\w+)/` \|", page("design"), re.M) == ROOMS[1:]


RESULTS = ROOT / "pipelines" / "results"
ALL = "\n".join(TEXTS.values())


def test_the_quoted_table_is_that_of_the_result_file():
    table = (RESULTS / "digits" / "table.txt").read_text()
    assert [table in README, table in page("results/index")] == [True, True]


@pytest.mark.parametrize("name", [path.parent.name for path in sorted(RESULTS.glob("*_small/results.json"))])
def test_quoted_accuracies_are_those_of_the_result_files(name):
    rows = [row for row in json.loads((RESULTS / name / "results.json").read_text())["rows"] if "accuracy_last" in row]
    for row in rows:
        spread = f" ± {100 * row['accuracy_last_std']:.2f}" if row["n"] > 1 else ""
        assert f"{100 * row['accuracy_last']:.2f}{spread}" in ALL or row["step"] == "teacher", row["step"]


FAULTS = re.findall(r"^\| ([CKMOPS]\d+) .*\| ([^|]*) \|[^|]*\|$", page("reliability"), re.M)


def test_every_fault_of_the_list_has_its_row():
    wanted = [
        f"{kind}{n}"
        for kind, last in (("C", 11), ("K", 10), ("M", 9), ("P", 6), ("O", 6), ("S", 11))
        for n in range(1, last + 1)
    ]
    assert [name for name, _ in FAULTS] == wanted


def test_the_tests_that_faults_name_exist():
    files = {path.stem: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    named = {name: re.findall(r"(test_\w+)::(test_\w+)", tests) for name, tests in FAULTS}
    assert [name for name, tests in FAULTS if not named[name] and tests != "none"] == []
    missing = [f"{name}: {file}::{test}" for name, found in named.items() for file, test in found
               if f"\ndef {test}(" not in files.get(file, "")]  # fmt: skip
    assert missing == []


# ---- the documentation as a whole


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_short_enough_to_read(name):
    lines, most = TEXTS[name].splitlines(), 250 if name == "README.md" else 200
    assert (len(lines) <= most, len(TEXTS[name].encode()) <= 15_000) == (True, True), (len(lines), len(TEXTS[name]))
    plain = re.sub(r"^(```).*?^```$", "", TEXTS[name], flags=re.S | re.M).splitlines()
    assert [line for line in plain if len(line) > 140 and not line.startswith(("|", "!", "<!--"))] == []


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    targets = re.findall(r"\]\(([^)#\s]+)", re.sub(r"^(```).*?^```$", "", TEXTS[name], flags=re.S | re.M))
    here = (ROOT / name).parent
    commands = {(ROOT / f"docs/pages/reference/commands/{command}.md") for command in main.COMMANDS}
    missing = [t for t in targets if not (here / t).exists() and (here / t).resolve() not in commands]
    assert [target for target in missing if not target.startswith("https://")] == []


@pytest.mark.parametrize("name", TEXTS)
def test_files_of_the_project_that_are_named_exist(name):
    named = re.findall(r"`((?:pipelines|tests|kcdcache|docs|notebooks)/[\w./-]+)`", TEXTS[name])
    named += [f"pipelines/{recipe}" for recipe in re.findall(r"`(\w+\.toml)`", TEXTS[name])]
    known = {"pipelines/config.toml", "pipelines/recipe.toml"}
    assert [path for path in named if not (ROOT / path).exists() and path not in known] == []


def test_blocks_are_run_or_say_why_not():
    marks = [block.mark for block in BLOCKS if block.kind in ("sh", "python", "toml") and block.mark]
    assert [mark for mark in marks if not re.match(r"(not run|run by|save as): \S", mark)] == []
    named = [mark.removeprefix("run by: ").split("::") for mark in marks if mark.startswith("run by: ")]
    assert [test for file, test in named if f"def {test}(" not in (ROOT / file).read_text()] == []


def test_exit_codes_are_those_of_the_errors():
    rows = re.findall(r"^\| (\d+)[^|]* \| `(\w+)` \|", page("reference/exit-codes"), re.M)
    kinds: list[type[errors.KcdcacheError]] = [errors.KcdcacheError, *errors.KcdcacheError.__subclasses__()]
    assert {(int(code), name) for code, name in rows} == {(kind.exit_code, kind.__name__) for kind in kinds}


def test_networks_are_those_of_the_catalogue():
    rows = page("reference/networks").split("## Teachers")[0]
    assert set(re.findall(r"`(\w+)`", rows)) == set(NETWORKS)


@pytest.mark.parametrize("name", main.COMMANDS)
def test_a_commands_page_has_all_its_settings(name, hooks):
    text = hooks.command_page(name)
    command = main.build(name)
    assert [
        flag for option in command.params for flag in option.opts if flag.startswith("-") and f"`{flag}`" not in text
    ] == []
    assert len(text.splitlines()) <= 200


@pytest.fixture(scope="module")
def hooks():
    specification = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site_hooks.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_site_builds_without_a_warning_and_loads_nothing(tmp_path):
    command = ["mkdocs", "build", "--quiet", "--strict", "-f", ROOT / "docs/mkdocs.yml", "-d", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env={**environment(), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, [line for line in done.stderr.splitlines() if "WARNING" in line]) == (0, [])
    pages = "\n".join(path.read_text() for path in tmp_path.rglob("*.html"))
    assert re.findall(r"(?:src|href)=\"https?://[^\"]*\.(?:js|css|woff2?|png)", pages) == []
    assert (tmp_path / "reference/commands/train.html").exists()
