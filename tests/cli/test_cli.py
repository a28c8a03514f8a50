"""The command line: help, options made from settings, results, exit codes, and what nothing may print."""

import contextlib
import json
import os
import pickle
import pty
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import HEAVY, alone, failure, outcome
from killing import environment, finished
from pupils import lines
from stores import content
from test_config import REQUIRED

import kcdcache
from kcdcache import progress, settings
from kcdcache.cli import console, main
from kcdcache.cli.options import BASIC, shown

DATA = "digits?train=200&test=100"
CROPS = {"augment": "crop", "padding": 2}
WRITING = ("fit", "precompute", "train", "condense", "export")


def words(place, name, **more):
    """A writing command with what the folder `place` has for it."""
    run, store = place / "run", {"store": place / "store"}
    given = {
        "fit": {"data": DATA, "model": "resnet8", "out": place / "teacher", "epochs": 1, **CROPS},
        "precompute": {"data": DATA, "teacher": place / "teacher", "views": 2, "min_accuracy": 0, **store, **CROPS},
        "train": {"data": DATA, "student": "resnet8", "out": run, "epochs": 2, "stages": 2, "keep": 0.5, **store},
        "condense": {"values": run / "values.parquet", "keep": 0.4, "out": place / "set.parquet", **store},
        "export": {"manifest": run / "stages/1/manifest.parquet", "out": place / "exported", "data": DATA, **store},
    }
    return [name, *lines(given[name] | more)]


def tree(folder):
    return {path: None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


WRONG = [
    ("--student resnt8", "unknown network 'resnt8'; did you mean 'resnet8'?"),
    ("--student resnet8 --peer resnt8", "unknown network 'resnt8'; did you mean 'resnet8'?"),
    ("--student resnet8 --method kd+fitnett", "unknown method 'fitnett'; did you mean 'fitnet'?"),
    ("--student resnet8 --data digts", "unknown data 'digts' in 'digts'; did you mean 'digits'?"),
    ("--student resnet8 --data digits?trian=3", "unknown option 'trian' in data spec"),
    ("--student resnet8 --epochs 7 --stages 2", "epochs must be a multiple of stages"),
    ("--student resnet8 --keep 1.5", "setting 'keep' in the command line: Input should be less than"),
    ("--student resnet8 --precision half", "'half' is not one of 'float32', 'bfloat16'"),
    ("", "--student is missing"),
]
WRONG_COMMANDS = [
    *((f"train --data digits --store s --out o {rest}", message) for rest, message in WRONG),
    ("train --data digits --out o --student resnet8", "train needs knowledge: --store"),
    ("fit --data digits --model vgg9 --out o", "unknown network 'vgg9'"),
    ("precompute --data digits --store s", "--teacher is missing"),
    ("precompute --data digits --store s --teacher t --encoding top16", "unknown encoding"),
    ("precompute --data digits --store s --teacher t --fields map", "unknown field 'map'"),
    ("precompute --data digits --store s --teacher none", "no saved network at none"),
    ("methods --student wrn_16", "unknown network 'wrn_16'; did you mean 'wrn_16_2'?"),
    ("verify s --sample 0", "--sample takes a share above 0"),
    ("run nowhere.toml", "no recipe at nowhere.toml"),
    ("report a b", "--out is missing: several folders"),
]
ASKING = f"""
import contextlib, io, json, sys
from kcdcache.cli import main
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main._outcome(words)
    print(json.dumps([code, out.getvalue(), err.getvalue(), [name for name in {HEAVY} if name in sys.modules]]))
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """What a process of its own says to --help, then to each wrong command, at last to `fit`, and what it has loaded.

    Entries are (exit code, stdout, stderr, heavy modules loaded until then); also the folder that `fit` wrote to.
    """
    place = tmp_path_factory.mktemp("chain")
    every = [["--help"], *(text.split() for text, _ in WRONG_COMMANDS), [*words(place, "fit"), "--json"]]
    (place / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", ASKING, json.dumps(every)], capture_output=True, text=True, check=True,
        cwd=place / "empty", env=environment(),
    )  # fmt: skip
    return place, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def whole(asked):
    """A folder in which every writing command has been run once."""
    place, _ = asked
    for name in WRITING[1:]:
        assert main._outcome([*words(place, name), "--quiet"]) == 0
    return place


@pytest.fixture
def chain(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "chain"))


# help


def test_help_answers_without_the_heavy_libraries(asked):
    code, out, err, loaded = asked[1][0]
    assert (code, err, loaded) == (0, "", [])
    assert [name for name in main.COMMANDS if f"\n  {name} " in out] == list(main.COMMANDS)


def test_help_of_train_stands_in_sections_and_offers_choices(capsys):
    out = " ".join(outcome(capsys, "train", "--help-all")[1].split())
    headings = ["Input and output: --store", "Sampling of the condensed set in each epoch: --sampling"]
    assert [heading in out for heading in headings] == [True, True]
    assert "--preset [paper|release]" in out
    assert out.index("Other options: --dry-run") > max(map(out.index, headings))  # what is not of the method comes last


@pytest.mark.parametrize("command", BASIC)
def test_the_short_help_shows_a_first_use_and_says_how_many_options_there_are_more(capsys, command):
    out, fields = outcome(capsys, command, "--help")[1], settings.fields(main.COMMANDS[command].takes)
    places = [
        out.split("Main options:")[1].index(f"\n  --{name.rstrip('_').replace('_', '-')}") for name in BASIC[command]
    ]
    assert places == sorted(places)
    assert f"{len(fields) - len(BASIC[command])} more options: {command} --help-all" in out.replace("kcdcache ", "")
    assert all(told in out for told in ("photos/train/CLASS/IMAGE", "?train=4000", "wrn_16_1", "timm:NAME"))
    assert len(out.split("Main options:")[1].splitlines()) < 50
    complete = outcome(capsys, command, "--help-all")[1]
    assert all(f"--{name.rstrip('_').replace('_', '-')}" in complete for name in fields)


def test_without_a_command_the_help_is_shown_and_the_version_is_the_packages(capsys):
    assert outcome(capsys) == outcome(capsys, "--help")
    assert outcome(capsys, "--version") == (0, f"kcdcache, version {kcdcache.__version__}\n", "")


@pytest.mark.parametrize("command", main.COMMANDS)
def test_options_are_the_fields_of_the_settings_and_help_gives_text_default_and_examples(capsys, command):
    code, out, _ = outcome(capsys, command, "--help")
    assert (code, main.COMMANDS[command].summary in " ".join(out.split())) == (0, True)
    assert f"Examples:\n    kcdcache {command}" in out
    fields = settings.fields(main.COMMANDS[command].takes)
    parameters = {parameter.name: parameter for parameter in main.build(command).params}
    assert parameters.keys() - {"as_json", "config", "debug", "quiet", "dry_run", "help_all"} == fields.keys()
    for name, field in fields.items():
        if isinstance(parameters[name], click.Option):
            assert " ".join(parameters[name].help.split()).startswith(" ".join(field.description.split()))
            if not field.is_required() and field.default not in (None, ""):
                assert parameters[name].help.endswith(f"  [default: {shown(field.default)}]")
        assert parameters[name].required == field.is_required()


def test_defaults_are_shown_as_they_are_typed():
    assert [shown(value) for value in (True, False, (0.5, 0.75), ("logits",), 4, "kd")] == [
        "on", "off", "0.5,0.75", "logits", "4", "kd",
    ]  # fmt: skip


# usage and settings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "no command 'trian'; did you mean 'train'?"),
        (["zzz"], "no command 'zzz'; known: condense, diff, evaluate, export"),
        (["train", "--kep", "1"], r"No such option '--kep'. (Did you mean one of"),
        (["condense", "--values", "v"], "Missing option '--store'"),
        (["fit", "--device", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["inspect"], "Missing argument 'PATH'"),
        (["inspect", "a", "b"], "Got unexpected extra argument (b)"),
    ],
)
def test_wrong_usage_ends_with_2_and_what_was_meant(capsys, words, message):
    code, err = failure(capsys, *words)
    assert code == 2
    assert message in err


def sample_of(annotation):
    """Return plain values a field of this type accepts."""
    kinds = [annotation, *get_args(annotation)]
    if annotation is bool:
        return [True, False]
    inner = [get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple]
    if words := [word for kind in inner if get_origin(kind) is Literal for word in get_args(kind)]:
        return [words, words[:1], []]
    if get_origin(annotation) is tuple and Ellipsis not in get_args(annotation):
        return [[0.25, 0.5]]
    if any(get_origin(kind) is tuple for kind in kinds):
        return [["a", "b"], ["a"], []] if "str" in str(annotation) else [[0.25, 0.5], [0.5], []]
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    return (
        choices
        or {int: [3], float: [0.25], str: ["resnet8"], Path: ["some/where"]}[
            next(kind for kind in kinds if kind in (int, float, str, Path))
        ]
    )


def from_flags(command, given):
    flags = []
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        else:
            flags += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    takes, found = main.COMMANDS[command].takes, main.build(command).make_context(command, flags).params
    return settings.make(takes, {name: found[name] for name in settings.fields(takes) if found[name] is not None})


@pytest.mark.parametrize("command", WRITING)
def test_a_flag_and_a_toml_key_give_equal_settings(command):
    takes = main.COMMANDS[command].takes
    for name, field in settings.fields(takes).items():
        for value in sample_of(field.annotation):
            given = REQUIRED[takes] | {name.rstrip("_"): value}
            toml = settings.make(takes, given)
            assert from_flags(command, given) == toml
            held = settings.values_of(toml)[name]
            plain = list(held) if isinstance(held, tuple) else held
            assert (str(plain) if isinstance(plain, Path) else plain) == value


@pytest.mark.parametrize("number", range(len(WRONG_COMMANDS)), ids=[text for text, _ in WRONG_COMMANDS])
def test_a_wrong_value_or_name_is_told_before_anything_heavy_is_loaded(asked, number):
    code, out, err, loaded = asked[1][1 + number]
    assert code in (2, 10)
    assert (out, loaded) == ("", [])
    assert WRONG_COMMANDS[number][1] in err
    assert list((asked[0] / "empty").iterdir()) == []


def test_a_run_loads_only_what_it_needs_and_tells_its_progress_on_stderr_unless_quiet(asked, start, tmp_path):
    code, out, err, loaded = asked[1][-1]
    assert (code, json.loads(out)["kind"], loaded) == (0, "fit", ["torch"])  # neither torchvision nor scipy nor sklearn
    assert [line.startswith("epoch 1 of 1: loss ") for line in err.splitlines() if "loss" in line] == [True]
    assert finished(start, [*words(tmp_path, "fit"), "--json", "--quiet"], tmp_path / "log") == 0
    assert json.loads((tmp_path / "log").read_text())["kind"] == "fit"


# results


@pytest.mark.parametrize("command", WRITING)
def test_a_finished_command_run_again_says_so_in_one_object_and_changes_nothing(capsys, caplog, chain, command):
    caplog.set_level("INFO")
    before = content(chain)
    code, out, _ = outcome(capsys, *words(chain, command), "--json")
    assert (code, out.count("\n")) == (0, 1)
    assert json.loads(out)["schema_version"] == console.SCHEMA_VERSION
    assert "already finished" in caplog.text or json.loads(out)["already"]
    assert content(chain) == before


@pytest.mark.parametrize("command", [*WRITING, "run"])
def test_a_dry_run_changes_nothing(capsys, chain, tmp_path, command):
    before, elsewhere = tree(tmp_path), {"store" if command == "precompute" else "out": tmp_path / "new"}
    for more in ({}, elsewhere):
        line = ["run", *lines(more)] if command == "run" else words(chain, command, **more)
        code, out, _ = outcome(capsys, *line, "--dry-run", "--json")
        assert (code, json.loads(out)["would"]) == (0, command)
    assert tree(tmp_path) == before


# condense stands alone


def test_condense_needs_neither_torch_nor_zarr(chain):
    done = alone(*words(chain, "condense", out=chain / "alone.parquet"), "--json")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "loaded:")
    assert json.loads(done.stdout)["values_from"] == "kcdcache"
    assert (chain / "alone.parquet").read_bytes() == (chain / "set.parquet").read_bytes()


def test_condense_is_refused_under_torchrun(capsys, chain, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    code, err = failure(capsys, *words(chain, "condense", out=chain / "m.parquet"))
    assert code == 2
    assert "condense is work for one process, and torchrun has started 2: run `kcdcache condense` without" in err
    assert not (chain / "m.parquet").exists()


# exit codes, each with its message


def untouched(place):
    pass


def with_another_store(place):
    assert main._outcome(words(place, "precompute", store=place / "other", view_seed=1)) == 0


def without_numbers(place):
    pq.write_table(pa.table({"index": [0, 1], "value": [0.5, float("nan")]}), place / "theirs.parquet")


def unsealed(place):
    (place / "store/_kcd/commit.0.json").unlink()


FAILURES = [
    (1, untouched, lambda p: words(p, "condense", out=p / "set.parquet/m.parquet"), r"set\.parquet"),
    (2, untouched, lambda p: words(p, "train", learning_rate=0.2), r"learning_rate = 0.05, requested now: 0.2; give"),
    (4, with_another_store, lambda p: words(p, "condense", store=p / "other", out=p / "m"),
     r"error: the values in .* were measured on knowledge \w{64}, the store at .* holds \w{64}"),
    (5, without_numbers, lambda p: words(p, "condense", values=p / "theirs.parquet"), "row 1: 'value' is nan"),
    (6, untouched, lambda p: words(p, "condense", keep=0.3), "set.parquet holds another manifest; manifests are never"),
    (9, unsealed, lambda p: words(p, "train", out=p / "new"),
     r"is not finished: it has no commit record; run the same `kcdcache precompute` again"),
    (10, untouched, lambda p: ["inspect", p / "nowhere"], "nothing at .*nowhere"),
    (10, untouched, lambda p: words(p, "train", store=p / "nowhere"), "no knowledge store at .*nowhere"),
    (10, untouched, lambda p: words(p, "train", manifest=p / "nowhere", out=p / "new"), "no file at .*nowhere"),
]  # fmt: skip


@pytest.mark.parametrize(("exit_code", "prepare", "line", "message"), FAILURES)
def test_a_failure_ends_with_its_code_and_message(capsys, chain, exit_code, prepare, line, message):
    prepare(chain)
    capsys.readouterr()
    code, err = failure(capsys, *line(chain))
    assert code == exit_code
    assert re.search(message, err)


def test_debug_shows_where_an_error_came_from(capsys, tmp_path):
    code, _, err = outcome(capsys, "inspect", tmp_path / "nowhere", "--debug")
    assert code == 10
    assert "Traceback (most recent call last)" in err
    assert "show.py" in err


def test_control_characters_from_files_are_shown_not_sent(capsys, tmp_path):
    code, err = failure(capsys, "inspect", tmp_path / "a\x1b[31mred\x07")
    assert (code, "a\\x1b[31mred\\x07" in err, "\x1b" in err) == (10, True, False)
    record = tmp_path / "model.json"
    record.write_text(json.dumps({"knowledge_id": "k", "a\x1b]0;b": {"c\x1b": "d\x1b"}}))
    record.with_suffix(".safetensors").write_bytes(b"")
    code, out, _ = outcome(capsys, "inspect", record)
    assert (code, "a\\x1b]0;b:\n  c\\x1b: d\\x1b" in out, "\x1b" in out) == (0, True, False)


def test_numbers_are_rounded_for_people_but_not_what_is_given_back():
    told = console.readable({"loss": 1.23456789, "keep": 0.9396926207, "K_0": 3, "rows": [{"share": 0.1234567}]})
    assert told.splitlines() == ["loss: 1.23457", "keep: 0.9396926207", "K_0 (dropped): 3", "rows:", "  share=0.123457"]


# a terminal gets bars and fitted tables, everything else plain lines


TALKING = """
import logging, os
from kcdcache.cli import console
from kcdcache.commands import TextTable
with console.telling(quiet=False) as progress:
    for done in (1, 2, 3):
        logging.getLogger("kcdcache").info("stage %d\\x1b[2J", done)
        progress("epoch", done, 3, "loss 1\\x1b[2J")
        progress("precompute", done, 3, "view 0")
table = TextTable(["name", "n"], [["a\\x1b[31m[red]", "1"]], left=1, above=["above"])
console.show({"table": table, "note": "the end"})
"""


def talked(terminal):
    """Return what a command that talks writes to both its streams, on a terminal or into a pipe."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    with open(ours, "rb", buffering=0) as read:
        done = subprocess.Popen(
            [sys.executable, "-c", TALKING], stdout=theirs, stderr=theirs, env=environment(TERM="xterm")
        )
        os.close(theirs)
        found = b""
        with contextlib.suppress(OSError):  # of a terminal that nobody writes to any more
            while block := read.read(4096):
                found += block
        assert done.wait() == 0
    return found.decode()


def test_off_a_terminal_progress_logs_and_tables_are_plain_lines():
    told = [re.sub(r", \d+ s left", "", line) for line in talked(terminal=False).splitlines()]
    assert told == [
        "stage 1\\x1b[2J", "epoch 1 of 3: loss 1\\x1b[2J", "stage 2\\x1b[2J", "epoch 2 of 3: loss 1\\x1b[2J",
        "stage 3\\x1b[2J", "epoch 3 of 3: loss 1\\x1b[2J", "precompute: 3 of 3 (view 0)", "above", "name         n",
        "a\\x1b[31m[red]  1", "", "the end",
    ]  # fmt: skip


def test_on_a_terminal_there_are_bars_and_a_fitted_table_and_no_plain_lines():
    found = talked(terminal=True)
    assert not re.search(r"epoch \d of|precompute: ", found)
    assert "name         n" not in found
    assert re.search(r"epoch .*━.*3/3.*/s.*0:00:00.*loss 1\\x1b\[2J", found)
    assert all(text in found for text in ("stage 2\\x1b[2J", "above", "a\\x1b[31m[red]", "the end"))
    assert "\x1b[2J" not in found


def test_a_bar_moves_within_an_epoch_and_tells_its_speed_and_a_resumed_ones_is_that_of_now(capsys):
    bars = console.LiveProgress()
    for done in (7.0, 7.25, 7.5):
        progress.inside(bars)("epoch", done, 10)
    bars("epoch", 8, 10, "loss 1")
    (task,) = bars._bars.tasks
    assert (task.completed, task.total, task.fields["remark"]) == (8, 10, "loss 1")
    assert sum(sample.completed for sample in task._progress) == 1  # not the 7 of before
    bars.stop()
    assert progress.inside(console.PlainProgress()) is progress.inside(progress.silent) is None


def test_in_another_process_bars_are_lines():
    assert type(pickle.loads(pickle.dumps(console.LiveProgress()))) is console.PlainProgress


# without what a shell gives


def without(closed, words):
    """Python text that runs a command for a user without home or entry in passwd, and without some standard streams."""
    return f"""
import os, pwd
def getpwuid(number):
    raise KeyError(f"getpwuid(): uid not found: {{number}}")
pwd.getpwuid = getpwuid
for name in ("HOME", "XDG_CACHE_HOME", "KCDCACHE_CACHE", "USER", "LOGNAME"):
    os.environ.pop(name, None)
for number in {closed}:
    os.close(number)
from kcdcache.cli import main
main.main({[str(word) for word in words]!r})
"""


SLOW = pytest.mark.slow


@pytest.mark.parametrize("closed", [pytest.param((0,), marks=SLOW), pytest.param((2,), marks=SLOW), (0, 2), (0, 1, 2)])
def test_closed_streams_and_no_home_are_no_obstacle(whole, start, tmp_path, closed):
    """A file of ours would get the number of a closed stream, and messages would end in it."""
    for name, result in (("fit", "teacher"), ("precompute", "store"), ("train", "run")):
        more = {"store" if name == "precompute" else "out": tmp_path / result}
        assert finished(start, without(closed, [*words(whole, name, **more), "--threads", 1]), tmp_path / "log") == 0
    assert not re.search("internal error|Traceback|Errno", (tmp_path / "log").read_text())
    assert ("test accuracy" in (tmp_path / "log").read_text()) == (1 not in closed)
    assert main._outcome(["verify", str(tmp_path / "store"), "--read-data"]) == 0
    assert main._outcome(["verify", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    "streams", ["<&- 2>&-", *(pytest.param(one, marks=SLOW) for one in ("<&-", "2>&-", "<&- >&- 2>&-"))]
)
def test_a_real_command_with_closed_streams(whole, streams):
    asked = f"{sys.executable} -m kcdcache inspect {whole / 'store'} {streams}"
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("knowledge_id" in done.stdout) == (">&- 2" not in streams)


@pytest.mark.parametrize(
    ("redirected", "code"),
    [
        ("2>&1 >/dev/null | true", 0),
        pytest.param("2>/dev/full", 0, marks=SLOW),
        pytest.param("| true", 141, marks=SLOW),
        (">/dev/full", 7),
    ],
)
def test_who_no_longer_reads_ends_no_work(whole, tmp_path, redirected, code):
    """Progress that nobody reads is not told, a result that nobody reads ends quietly, one that is lost does not."""
    asked = [sys.executable, "-m", "kcdcache", *map(str, words(whole, "fit", out=tmp_path / "run")), "--threads", "1"]
    line = f"{shlex.join(asked)} {redirected}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "run" / "summary.json").exists()
    assert not re.search("internal error|Errno|Exception ignored", done.stderr)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            "fit --data cifar100 --model resnet8 --out o",
            "~/.cache/kcdcache is in the home folder, and this user has none",
        ),
        ("fit --data folder:~/images --model resnet8 --out o", "~/images is in the home folder"),
        ("inspect s3://bucket/run", "s3://bucket needs a cache on this machine, and this user has no home folder"),
    ],
)
def test_where_the_home_would_matter_it_is_named(start, tmp_path, asked, said):
    assert finished(start, without((), asked.split()), tmp_path / "log", limits={"folder": str(tmp_path)}) == 2
    told = (tmp_path / "log").read_text()
    assert f"error: {said}" in told
    assert "set HOME, or give a path without ~" in told or "set KCDCACHE_CACHE to a folder" in told
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize("where", ["a file", "read-only"])
def test_a_cache_that_cannot_be_written_is_named(start, tmp_path, where):
    cache = tmp_path / "cache"
    if where == "a file":
        cache.write_text("")
    else:
        cache = Path("/proc/cache")
    given = {"KCDCACHE_CACHE": str(cache), "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "c"}
    assert finished(start, ["inspect", "s3://bucket/run"], tmp_path / "log", **given) == 2
    said = (tmp_path / "log").read_text()
    assert f"error: s3://bucket needs a cache on this machine, and {cache} cannot be written (" in said
    assert "set KCDCACHE_CACHE to a folder that can" in said
    assert "Errno" not in said
