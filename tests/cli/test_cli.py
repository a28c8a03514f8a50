"""The command line: help, options made from settings, results, exit codes, and what nothing may print."""

import contextlib
import json
import os
import pickle
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import ENVIRONMENT, alone, failure, outcome
from stores import content

import kcdcache
from kcdcache import settings
from kcdcache.cli import console, help, main
from kcdcache.cli.options import shown
from kcdcache.condense import manifest
from kcdcache.files.atomic import locked

DATA = "digits?train=200&test=100"


def fit(place, **more):
    return arguments(
        "fit", data=DATA, model="resnet8", out=place / "teacher", augment="crop", padding=2, epochs=1, **more
    )


def precompute(place, **more):
    given = {"data": DATA, "teacher": place / "teacher", "store": place / "store", "augment": "crop", "padding": 2}
    return arguments("precompute", **(given | {"views": 2, "min_accuracy": 0} | more))


def train(place, **more):
    given = {"data": DATA, "store": place / "store", "student": "resnet8", "out": place / "run"}
    return arguments("train", **(given | {"epochs": 2, "stages": 2, "keep": 0.5} | more))


def condense(place, **more):
    given = {
        "values": place / "run/values.parquet",
        "store": place / "store",
        "keep": 0.4,
        "out": place / "set.parquet",
    }
    return arguments("condense", **(given | more))


def export(place, **more):
    given = {"manifest": place / "run/stages/1/manifest.parquet", "store": place / "store", "out": place / "exported"}
    return arguments("export", **(given | {"data": DATA} | more))


WRITING = {"fit": fit, "precompute": precompute, "train": train, "condense": condense, "export": export}


def arguments(command, **options):
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [command, *words]


def tree(folder):
    return {path: None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which every writing command has been run once."""
    place = tmp_path_factory.mktemp("chain")
    for command in WRITING.values():
        assert main._outcome([*command(place), "--quiet"]) == 0
    return place


@pytest.fixture
def chain(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "chain"))


# help


def test_help_answers_without_the_heavy_libraries():
    done = alone("--help")
    assert (done.returncode, done.stderr) == (0, "loaded:\n")
    assert [name for name in help.SUMMARIES if f"\n  {name} " in done.stdout] == list(help.SUMMARIES)


def test_help_of_train_stands_in_sections_and_offers_choices(capsys):
    out = " ".join(outcome(capsys, "train", "--help")[1].split())
    headings = ["What goes in and out: --store", "Which points of the current set an epoch visits: --sampling"]
    assert [heading in out for heading in headings] == [True, True]
    assert "--preset [paper|release]" in out
    assert out.index("Options: --dry-run") > max(map(out.index, headings))  # what is not of the method comes last


def test_without_a_command_the_help_is_shown(capsys):
    assert outcome(capsys)[0] == 0
    assert outcome(capsys)[1:] == outcome(capsys, "--help")[1:]


def test_the_version_is_the_packages(capsys):
    assert outcome(capsys, "--version") == (0, f"kcdcache, version {kcdcache.__version__}\n", "")


@pytest.mark.parametrize("command", help.SUMMARIES)
def test_options_are_the_fields_of_the_settings_and_help_gives_text_default_and_examples(capsys, command):
    code, out, _ = outcome(capsys, command, "--help")
    assert (code, help.SUMMARIES[command].split()[0] in out) == (0, True)
    assert f"Examples:\n    kcdcache {command}" in out
    fields = settings.fields(main.COMMANDS[command].takes)
    parameters = {parameter.name: parameter for parameter in main.build(command).params}
    assert parameters.keys() - {"as_json", "debug", "quiet", "dry_run"} == fields.keys()
    for name, field in fields.items():
        if isinstance(parameters[name], click.Option):
            assert " ".join(parameters[name].help.split()).startswith(" ".join(field.description.split()))
            if not field.is_required() and field.default is not None:
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
        (["zzz"], "no command 'zzz'; known: run, fit, precompute"),
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
    if any(get_origin(kind) is tuple for kind in kinds):
        return [["a", "b"], ["a"], []] if "str" in str(annotation) else [[0.25, 0.5], [0.5], []]
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    return (
        choices
        or {int: [3], float: [0.25], str: ["resnet8"], Path: ["some/where"]}[
            next(kind for kind in kinds if kind in (int, float, str, Path))
        ]
    )


REQUIRED = {
    "fit": {"data": "digits", "model": "resnet8", "out": "o"},
    "precompute": {"data": "digits", "store": "s"},
    "train": {"data": "digits", "store": "s", "out": "o"},
    "condense": {"values": "v", "store": "s", "keep": 0.5, "out": "o"},
    "export": {"manifest": "m", "store": "s", "out": "o"},
}


def from_flags(command, name, value):
    flag = f"--{name.rstrip('_').replace('_', '-')}"
    words = [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    if isinstance(value, bool):
        words = [flag if value else f"--no-{flag[2:]}"]
    others = {key: given for key, given in REQUIRED[command].items() if key != name}
    context = main.build(command).make_context(command, [*arguments(command, **others)[1:], *words])
    takes = main.COMMANDS[command].takes
    known = settings.fields(takes)
    given = {key: found for key, found in context.params.items() if found is not None and key in known}
    return settings.make(takes, given)


@pytest.mark.parametrize("command", REQUIRED)
def test_a_flag_and_a_toml_key_give_equal_settings(command):
    for name, field in settings.fields(main.COMMANDS[command].takes).items():
        for value in sample_of(field.annotation):
            toml = settings.make(main.COMMANDS[command].takes, REQUIRED[command] | {name.rstrip("_"): value})
            assert from_flags(command, name, value) == toml
            held = dict(toml)
            for part in [part for part in held.values() if isinstance(part, settings.Settings)]:
                held |= dict(part)
            plain = list(held[name]) if isinstance(held[name], tuple) else held[name]
            assert (str(plain) if isinstance(plain, Path) else plain) == value


WRONG = [
    (["--student", "resnt8"], "unknown network 'resnt8'; did you mean 'resnet8'?"),
    (["--student", "resnet8", "--peer", "resnt8"], "unknown network 'resnt8'; did you mean 'resnet8'?"),
    (["--student", "resnet8", "--method", "kd+fitnett"], "unknown method 'fitnett'; did you mean 'fitnet'?"),
    (["--student", "resnet8", "--data", "digts"], "unknown data 'digts' in 'digts'; did you mean 'digits'?"),
    (["--student", "resnet8", "--data", "digits?trian=3"], "unknown option 'trian' in data spec"),
    (["--student", "resnet8", "--epochs", "7", "--stages", "2"], "epochs must be a multiple of stages"),
    (["--student", "resnet8", "--keep", "1.5"], "setting 'keep' in the command line: Input should be less than"),
    (["--student", "resnet8", "--precision", "half"], "'half' is not one of 'float32', 'bfloat16'"),
    ([], "--student is missing"),
]
WRONG_COMMANDS = [
    *((["train", "--data", "digits", "--store", "s", "--out", "o", *words], message) for words, message in WRONG),
    (["train", "--data", "digits", "--out", "o", "--student", "resnet8"], "train needs knowledge: --store"),
    (["fit", "--data", "digits", "--model", "vgg9", "--out", "o"], "unknown network 'vgg9'"),
    (["precompute", "--data", "digits", "--store", "s"], "--teacher is missing"),
    (["precompute", "--data", "digits", "--store", "s", "--teacher", "t", "--encoding", "top16"], "unknown encoding"),
    (["precompute", "--data", "digits", "--store", "s", "--teacher", "t", "--fields", "map"], "unknown field 'map'"),
    (["precompute", "--data", "digits", "--store", "s", "--teacher", "none"], "no saved network at none"),
    (["methods", "--student", "wrn_16"], "unknown network 'wrn_16'; did you mean 'wrn_16_2'?"),
    (["verify", "s", "--sample", "0"], "--sample takes a share above 0"),
    (["run", "nowhere.toml"], "no recipe at nowhere.toml"),
    (["report", "a", "b"], "--out is missing: of several folders"),
]


@pytest.mark.parametrize(("words", "message"), WRONG_COMMANDS)
def test_a_wrong_value_or_name_is_told_before_anything_heavy_is_loaded(words, message, tmp_path):
    done = alone(*words, before=f"import os; os.chdir({str(tmp_path)!r})")
    assert done.returncode in (2, 10)
    assert message in done.stderr
    assert done.stderr.endswith("loaded:\n")
    assert list(tmp_path.iterdir()) == []


def test_the_heavy_libraries_are_seen_where_they_are_loaded(tmp_path):
    done = alone(*fit(tmp_path), "--dry-run")
    assert done.stderr.endswith("loaded: torch\n")  # and neither torchvision, scipy, sklearn nor matplotlib


# results


@pytest.mark.parametrize("command", WRITING)
def test_json_is_one_object_and_nothing_else(capsys, chain, command):
    code, out, _ = outcome(capsys, *WRITING[command](chain), "--json")
    assert (code, out.count("\n")) == (0, 1)
    assert json.loads(out)["schema_version"] == console.SCHEMA_VERSION


@pytest.mark.parametrize(
    "path", ["store", "run", "teacher", "set.parquet", "run/values.parquet", "teacher/model.json", "exported"]
)
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_everything_that_is_written_can_be_inspected_and_verified(capsys, finished, command, path):
    code, out, err = outcome(capsys, command, finished / path, "--json")
    found = json.loads(out)
    assert (code, err, found["schema_version"]) == (0, "", 0)
    kinds = {"store": "store", "run": "run", "teacher": "run", "set.parquet": "manifest", "model.json": "network"}
    kinds["exported"] = "condensed"
    assert found["kind"] == kinds.get(Path(path).name, "values")


def test_the_readable_form_has_a_line_per_entry(capsys, finished):
    _, out, _ = outcome(capsys, "inspect", finished / "store")
    assert "\nsamples: 200\n" in out
    assert "\nfields:\n  logits: float16\n" in out


@pytest.mark.parametrize("command", WRITING)
def test_a_dry_run_changes_nothing(capsys, chain, tmp_path, command):
    elsewhere = "store" if command == "precompute" else "out"
    before = tree(tmp_path)
    for more in ({}, {elsewhere: tmp_path / "new"}):
        words = WRITING[command](chain)
        where = words.index(f"--{elsewhere}") + 1
        words[where] = str(more.get(elsewhere, words[where]))
        code, out, _ = outcome(capsys, *words, "--dry-run", "--json")
        assert (code, json.loads(out)["would"]) == (0, command)
    assert tree(tmp_path) == before


def test_a_dry_run_of_a_recipe_changes_nothing(capsys, tmp_path):
    code, out, _ = outcome(capsys, "run", "--out", tmp_path / "new", "--dry-run", "--json")
    assert (code, json.loads(out)["would"]) == (0, "run")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("command", WRITING)
def test_a_finished_command_run_again_says_so_and_changes_nothing(capsys, caplog, chain, command):
    caplog.set_level("INFO")
    before = content(chain)
    code, out, _ = outcome(capsys, *WRITING[command](chain))
    assert code == 0
    assert "finished already" in caplog.text or "already: True" in out
    assert content(chain) == before


def test_progress_goes_to_stderr_and_quiet_silences_it(tmp_path):
    loud = alone(*fit(tmp_path), "--json")
    assert json.loads(loud.stdout)["kind"] == "fit"
    assert "epoch 1 of 1: loss " in loud.stderr
    assert "train: 1 of 1 (" in loud.stderr
    quiet = alone(*fit(tmp_path / "other"), "--json", "--quiet")
    assert quiet.stderr == "loaded: torch\n"


# condense stands alone


def test_condense_needs_neither_torch_nor_zarr(chain):
    done = alone(*condense(chain, out=chain / "alone.parquet"), "--json")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "loaded:")
    assert json.loads(done.stdout)["values_from"] == "kcdcache"
    assert (chain / "alone.parquet").read_bytes() == (chain / "set.parquet").read_bytes()


def test_condense_is_refused_under_torchrun(capsys, chain, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, err = failure(capsys, *condense(chain, out=chain / "m.parquet"))
    assert code == 2
    assert "condense is work for one process, and torchrun has started 2: run `kcdcache condense` without" in err
    assert not (chain / "m.parquet").exists()


def test_condense_takes_another_tools_values_and_says_so(chain):
    order = np.random.default_rng(0).permutation(200)
    pq.write_table(pa.table({"index": order, "value": order / 200}), chain / "theirs.parquet")
    done = alone(*condense(chain, values=chain / "theirs.parquet", out=chain / "m.parquet", keep=0.25))
    assert done.returncode == 0
    assert "\nvalues_from: another tool\n" in done.stdout
    made = manifest.read(chain / "m.parquet")
    assert made.index.tolist() == list(range(150, 200))
    assert (made.visits == 1).all()


# exit codes, each with its message


def untouched(place):
    pass


def damaged(place):
    chunk = next(path for path in (place / "store/logits").glob("c.*"))
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)


def with_another_store(place):
    assert main._outcome(precompute(place, store=place / "other", view_seed=1)) == 0


def without_numbers(place):
    pq.write_table(pa.table({"index": [0, 1], "value": [0.5, float("nan")]}), place / "theirs.parquet")


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def with_evil_weights(place):
    torch.save({"conv1.weight": Evil()}, place / "evil.pth", pickle_module=pickle)


def unsealed(place):
    (place / "store/_kcd/commit.0.json").unlink()


UNFINISHED = r"is not finished: it has no commit record; run the same `kcdcache precompute` again"
FAILURES = [
    (1, untouched, lambda p: condense(p, out=p / "set.parquet/m.parquet"), r"set\.parquet"),
    (2, untouched, lambda p: train(p, learning_rate=0.2), r"run with learning_rate = 0.05, asked for now: 0.2; give"),
    (3, damaged, lambda p: ["verify", p / "store", "--read-data"], r"(?s)1 problems\n.*logits/c\."),
    (4, with_another_store, lambda p: condense(p, store=p / "other", out=p / "m"),
     r"error: the values in .* were measured on knowledge \w{64}, the store at .* holds \w{64}"),
    (4, untouched, lambda p: train(p, data="digits?train=100&test=100", out=p / "new"), "in count: 200 against 100"),
    (5, without_numbers, lambda p: condense(p, values=p / "theirs.parquet"), "row 1: 'value' is nan, expected a fini"),
    (6, untouched, lambda p: condense(p, keep=0.3), "set.parquet holds another manifest; manifests are never overwri"),
    (8, with_evil_weights, lambda p: precompute(p, teacher="resnet8", weights=p / "evil.pth", store=p / "new"),
     "holds Python objects besides tensors and plain values"),
    (9, unsealed, lambda p: ["verify", p / "store"], UNFINISHED),
    (9, unsealed, lambda p: train(p, out=p / "new"), UNFINISHED),
    (10, untouched, lambda p: ["inspect", p / "nowhere"], "nothing at .*nowhere"),
    (10, untouched, lambda p: ["verify", p / "nowhere"], "nothing at .*nowhere"),
    (10, untouched, lambda p: condense(p, values=p / "nowhere"), "no file at .*nowhere"),
    (10, untouched, lambda p: condense(p, previous=p / "nowhere"), "no file at .*nowhere"),
    (10, untouched, lambda p: condense(p, store=p / "nowhere"), "no knowledge store at .*nowhere"),
    (10, untouched, lambda p: train(p, store=p / "nowhere"), "no knowledge store at .*nowhere"),
    (10, untouched, lambda p: train(p, manifest=p / "nowhere", out=p / "new"), "no file at .*nowhere"),
]  # fmt: skip


@pytest.mark.parametrize(("exit_code", "prepare", "words", "message"), FAILURES)
def test_a_failure_ends_with_its_code_and_message(capsys, chain, exit_code, prepare, words, message):
    prepare(chain)
    capsys.readouterr()
    code, err = failure(capsys, *words(chain))
    assert code == exit_code
    assert re.search(message, err)


def test_6_a_run_another_process_trains(capsys, chain):
    (chain / "run/summary.json").unlink()
    with locked(chain / "run/.lock"):
        code, err = failure(capsys, *train(chain))
    assert (code, f"is being written by process {os.getpid()} on " in err) == (6, True)


def test_7_a_full_disk(chain):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))"
    done = alone(*condense(chain, out=chain / "m.parquet"), before=limit)
    assert done.returncode == 7
    assert f"error: no space left to write {chain}/m.parquet: free some and run the same command again" in done.stderr
    assert not (chain / "m.parquet").exists()


def test_debug_shows_where_an_error_came_from(capsys, tmp_path):
    code, _, err = outcome(capsys, "inspect", tmp_path / "nowhere", "--debug")
    assert code == 10
    assert "Traceback (most recent call last)" in err
    assert "show.py" in err


# names from files must not steer the terminal


def test_control_characters_in_messages_are_shown_not_sent(capsys, tmp_path):
    code, err = failure(capsys, "inspect", tmp_path / "a\x1b[31mred\x07")
    assert code == 10
    assert "a\\x1b[31mred\\x07" in err
    assert "\x1b" not in err


def test_control_characters_in_results_are_shown_not_sent(capsys, tmp_path):
    document = json.dumps({"knowledge_id": "k", "a\x1b]0;b": {"c\x1b": "d\x1b"}})
    record = tmp_path / "model.json"
    record.write_text(document)
    record.with_suffix(".safetensors").write_bytes(b"")
    code, out, _ = outcome(capsys, "inspect", record)
    assert code == 0
    assert "\x1b" not in out
    assert "a\\x1b]0;b:\n  c\\x1b: d\\x1b" in out


def test_numbers_are_rounded_for_people_but_not_what_is_given_back():
    told = console.readable({"loss": 1.23456789, "keep": 0.9396926207, "K_0": 3, "rows": [{"share": 0.1234567}]})
    assert told.splitlines() == ["loss: 1.23457", "keep: 0.9396926207", "K_0 (dropped): 3", "rows:", "  share=0.123457"]


def test_control_characters_in_a_recipe_are_shown_not_sent():
    text = console.readable({"table": "t\x1b[2J\nrow", "files": "f\x1b"})
    assert text == "t\\x1b[2J\nrow\n\nfiles: f\\x1b"


def test_control_characters_in_log_lines_are_shown_not_sent(tmp_path):
    step = '[[step]]\nname = "a"\ntitle = "\\u001b[2Jfit"\nrun = "fit"\nmodel = "resnet8"\n'
    text = 'title = "t"\ndata = "folder:nowhere"\n' + step
    (tmp_path / "recipe.toml").write_text(text)
    done = alone("run", tmp_path / "recipe.toml", "--out", tmp_path / "out")
    assert done.returncode == 10
    assert done.stderr.startswith("\\x1b[2Jfit\n")
    assert "\x1b" not in done.stderr


# a terminal gets bars and fitted tables, everything else plain lines


TALKING = """
import logging, os
from kcdcache.cli import console
from kcdcache.commands.tables import TextTable
with console.telling(quiet=False) as progress:
    for done in (1, 2, 3):
        logging.getLogger("kcdcache").info("epoch %d\\x1b[2J", done)
        progress("train", done, 3, "loss 1\\x1b[2J")
table = TextTable(["name", "n"], [["a\\x1b[31m[red]", "1"]], left=1, above=["above"])
console.show({"table": table, "note": "the end"})
"""


def talked(terminal):
    """Return what a command that talks writes to both its streams, on a terminal or into a pipe."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    with open(ours, "rb", buffering=0) as read:
        done = subprocess.Popen(
            [sys.executable, "-c", TALKING], stdout=theirs, stderr=theirs, env=ENVIRONMENT | {"TERM": "xterm"}
        )
        os.close(theirs)
        found = b""
        with contextlib.suppress(OSError):  # of a terminal that nobody writes to any more
            while block := read.read(4096):
                found += block
        assert done.wait() == 0
    return found.decode()


def test_off_a_terminal_progress_logs_and_tables_are_plain_lines():
    assert talked(terminal=False).splitlines() == [
        "epoch 1\\x1b[2J", "train: 1 of 3 (loss 1\\x1b[2J)", "epoch 2\\x1b[2J", "epoch 3\\x1b[2J",
        "train: 3 of 3 (loss 1\\x1b[2J)", "above", "name         n", "a\\x1b[31m[red]  1", "", "the end",
    ]  # fmt: skip


def test_on_a_terminal_there_are_bars_and_a_fitted_table_and_no_plain_lines():
    found = talked(terminal=True)
    assert "train: " not in found
    assert "name         n" not in found
    assert re.search(r"train .*━.*3/3.*loss 1\\x1b\[2J", found)
    assert all(text in found for text in ("epoch 2\\x1b[2J", "above", "a\\x1b[31m[red]", "the end"))
    assert "\x1b[2J" not in found


def test_in_another_process_bars_are_lines():
    assert type(pickle.loads(pickle.dumps(console.LiveProgress()))) is console.PlainProgress
