"""The README's promises: its loop, its commands and its table of rooms are true."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from killing import environment
from test_architecture import ROOMS

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
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
SHELL = "\n".join(text for kind, text in BLOCKS if kind == "sh").replace("\\\n", " ")
COMMANDS = [line for line in SHELL.splitlines() if line.startswith("kcdcache ")]


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
    code = as_here(next(text for kind, text in BLOCKS if kind == "python" and ("METHODS[" not in text) == own), folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {})
    return printed.getvalue()


def test_own_training_loop_gives_the_losses_of_train(trained):
    losses = [float(line.split()[1]) for line in printed_by(trained, own=True).splitlines()]
    assert losses == pytest.approx([row.loss for row in read_metrics(trained / "run")], rel=1e-6)


def test_torchs_loader_gets_each_epochs_own_views_in_workers_that_stay(trained, tmp_path):
    code = as_here(next(text for kind, text in BLOCKS if "DataLoader(" in text), trained)
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
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| [^|]* \| ([\d,]+) \|$", README, re.M)
    assert {name: int(size.replace(",", "")) for name, size in rows} == {row["method"]: row["bytes"] for row in told}


def test_readme_tells_of_every_sampling():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", README[README.index("| sampling |") :], re.M)[: len(SAMPLING)]
    assert rows == [(name, scheme.about) for name, scheme in SAMPLING.items()]


def test_own_training_loop_is_about_25_lines():
    code = next(text for kind, text in BLOCKS if kind == "python" and "METHODS[" not in text)
    assert len([line for line in code.splitlines() if line.strip()]) <= 30


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line):
    words = shlex.split(line, comments=True)[1:]
    command = main.build(words[0])
    with click.Context(command, info_name=words[0]) as context:
        command.parse_args(context, words[1:])


def test_readme_names_every_command():
    assert {line.split()[1] for line in COMMANDS} == set(main.COMMANDS)


def test_the_table_of_rooms_has_every_room_in_the_order_of_its_test():
    assert re.findall(r"^\| `(\w+)/` \|", README, re.M) == ROOMS[1:]


RESULTS = ROOT / "pipelines" / "results"


def test_the_quoted_table_is_that_of_the_result_file():
    assert (RESULTS / "digits" / "table.txt").read_text() in README


@pytest.mark.parametrize("name", [path.parent.name for path in sorted(RESULTS.glob("*_small/results.json"))])
def test_quoted_accuracies_are_those_of_the_result_files(name):
    rows = [row for row in json.loads((RESULTS / name / "results.json").read_text())["rows"] if "accuracy_last" in row]
    for row in rows:
        spread = f" ± {100 * row['accuracy_last_std']:.2f}" if row["n"] > 1 else ""
        assert f"{100 * row['accuracy_last']:.2f}{spread}" in README or row["step"] == "teacher", row["step"]


FAULTS = re.findall(r"^\| ([CKMOPS]\d+) .*\| ([^|]*) \|[^|]*\|$", README, re.M)


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
