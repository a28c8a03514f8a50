"""One form of message for wrong settings and wrong paths: what was given, what is allowed, and what to type."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from kcdcache.cli import main

NEVER = re.compile(r"pydantic|Errno|KeyError|Traceback|internal error|0x[0-9a-f]{6}|<class|PosixPath|type=")
"""what no message shows"""
CODES = (1, 2, 3, 4, 8, 10)
DATA = ("--data", "images.npz?channels=3")
VIEWS = ("--augment", "none")


def tiny(file):
    """Write images of 3 classes, each brighter in a channel of its own."""
    random, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 48), ("test", 12)):
        labels = np.arange(count) % 3
        images = random.integers(0, 128, (count, 8, 8, 3), np.uint8)
        images[np.arange(count), :, :, labels] += 100
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    np.savez(file, **arrays)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with one thing of every kind."""
    folder = tmp_path_factory.mktemp("kinds")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny("images.npz")
        (folder / "text.txt").write_text("hello\n")
        shutil.copy("text.txt", "text.parquet")
        (folder / "empty").mkdir()
        for line in (
            ["fit", *DATA, *VIEWS, "--model", "resnet8", "--epochs", "1", "--out", "teacher"],
            ["precompute", *DATA, *VIEWS, "--teacher", "teacher", "--store", "store", "--min-accuracy", "0"],
            ["train", *DATA, "--store", "store", "--student", "resnet8", "--epochs", "2", "--out", "run"],
            ["condense", "--run", "run", "--store", "store", "--keep", "0.5", "--out", "half.parquet"],
        ):
            assert main._outcome([*line, "-q"]) == 0, line
    return folder


PATHS = [
    (["train", *DATA, "--store", "half.parquet", "--student", "resnet8"], r"half\.parquet \(found a file of parquet\)"),
    (["train", *DATA, "--store", "teacher", "--student", "resnet8"], r"store at teacher \(found a run\).*precompute"),
    (["train", *DATA, "--store", "nowhere", "--student", "resnet8"], r"nowhere \(found nothing there\)"),
    (["train", *DATA, "--store", "store", "--student", "resnet8", "--manifest", "text.parquet"], r"text\.parquet"),
    (["train", *DATA, "--store", "store", "--student", "resnet8", "--manifest", "store"], r"store.*\(found a store\)"),
    (["train", *DATA, "--store", "store", "--student", "resnet8", "--manifest", "run/values.parquet"],
     r"values\.parquet.*kcdcache condense"),
    (["train", "--data", "store", "--store", "store", "--student", "resnet8"], r"store is no data.*train/CLASS/IMAGE"),
    (["train", "--data", "text.txt", "--store", "store", "--student", "resnet8"], r"text\.txt is no data.*\.npz"),
    (["train", "--condensed", "store", "--student", "resnet8"], r"no exported set at store.*kcdcache export"),
    (["precompute", *DATA, "--teacher", "store"], r"no saved network in store \(found a store\).*--weights"),
    (["precompute", *DATA, "--teacher", "resnet8", "--weights", "run/values.parquet"], r"values\.parquet"),
    (["precompute", *DATA, "--teacher", "resnet8", "--weights", "text.txt"], r"text\.txt"),
    (["precompute", *DATA, "--teacher", "teacher", "--store", "half.parquet"], r"half\.parquet.*give another path"),
    (["condense", "--store", "store", "--keep", "0.5", "--run", "store"], r"--run store: no run; give a folder"),
    (["condense", "--store", "store", "--keep", "0.5", "--run", "teacher"], r"teacher: a run without values"),
    (["condense", "--store", "store", "--keep", "0.5", "--values", "half.parquet"], r"is a manifest, expected values"),
    (["export", "--store", "store", "--manifest", "teacher"], r"is a `fit` and has no condensed set.*`train`"),
    (["evaluate", "store", *DATA], r"no saved network in store \(found a store\)"),
    (["report", "store"], r"store is no run and holds none; give"),
    (["fit", "--data", "empty", "--model", "resnet8"], r"empty is no data.*train/CLASS/IMAGE"),
]  # fmt: skip
TRAIN = ["train", *DATA, "--store", "store", "--student", "resnet8"]
SETTINGS = [
    ([*TRAIN, "--keep", "1.5"], r"keep.*less than or equal to 1.*1\.5"),
    ([*TRAIN, "--keep", "half"], r"keep.*number.*half"),
    ([*TRAIN, "--epochs", "0"], r"epochs.*greater than or equal to 1"),
    ([*TRAIN, "--epochs", "2.5"], r"epochs.*integer.*2\.5"),
    ([*TRAIN, "--epochs", "10", "--stages", "4"], r"10 epochs in 4 stages: give --epochs 8"),
    ([*TRAIN, "--epochs", "13"], r"13 epochs.*--epochs 12 or 14"),
    ([*TRAIN, "--method", "kdd"], r"kdd.*did you mean 'kd'"),
    ([*TRAIN, "--method", "kd*zero"], r"zero"),
    ([*TRAIN, "--temperature", "-1"], r"temperature.*greater than 0"),
    ([*TRAIN, "--milestones", "0.5,2"], r"milestones.*less than 1"),
    ([*TRAIN, "--mix", "convx"], r"'convx' is not one of 'convex', 'additive_clip'"),
    ([*TRAIN, "--optimizer", "adam"], r"'adam' is not one of 'sgd', 'adamw'"),
    ([*TRAIN, "--sampling", "rs2"], r"'rs2' is not one of"),
    ([*TRAIN, "--seed", "-1"], r"seed.*greater than or equal to 0"),
    (["train", *DATA, "--store", "store", "--student", "resnet9"], r"unknown network 'resnet9'; did you mean"),
    (["train", *DATA, "--store", "store"], r"--student is missing"),
    (["train", "--store", "store", "--student", "resnet8"], r"--data is missing"),
    (["train", "--data", "cifr10", "--store", "store", "--student", "resnet8"], r"'cifr10'.*did you mean 'cifar10'"),
    (["train", "--data", "digits?trian=4", "--store", "s", "--student", "resnet8"], r"'trian'.*did you mean 'train'"),
    (["precompute", *DATA, "--teacher", "teacher", "--encoding", "float8"], r"unknown encoding 'float8'.*float"),
    (
        ["precompute", *DATA, "--teacher", "teacher", "--fields", "logit"],
        r"'logit'; did you mean 'logits'",
    ),
    (["precompute", *DATA], r"--teacher is missing"),
    (["condense", "--store", "store", "--keep", "0.5"], r"--run with a run folder is missing, or --values"),
    (["condense", "--store", "store", "--keep", "0.5", "--run", "run", "--stage", "1"], r"--stage does nothing beside"),
]


def told(capsys, words):
    """Run a command that fails; return its exit code and message. What it would write is `new`."""
    place = {"precompute": "--store", "evaluate": None, "report": None}.get(words[0], "--out")
    more = [place, "new"] if place and place not in words[1:] else []
    code = main._outcome([*words, *more, "-q"])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize(("words", "expected"), PATHS + SETTINGS, ids=lambda value: None)
def test_a_wrong_setting_or_path_is_one_message_that_says_what_to_type(made, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(made)
    code, text = told(capsys, words)
    assert code in CODES
    assert re.search(expected, text, re.S), text
    assert not NEVER.search(text), text
    assert len(re.findall(r"^[Ee]rror:", text, re.M)) == 1
    assert not (made / "new").exists()


def test_the_folder_of_a_run_is_its_condensed_set(made, monkeypatch):
    monkeypatch.chdir(made)
    line = [*TRAIN, "--manifest", "run", "--epochs", "2", "--stages", "1", "--out", "reuse", "-q"]
    assert main._outcome(line) == 0
    assert (made / "reuse/given.parquet").read_bytes() == (made / "run/stages/2/manifest.parquet").read_bytes()


PAGE = (Path(__file__).parents[2] / "docs/pages/guides/command-line.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()]


def test_the_guides_commands_run_and_end_with_the_next_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny("images.npz")
    shown = []
    for line in LINES:
        assert main._outcome(shlex.split(line, comments=True)[1:]) == 0, line
        shown.append(capsys.readouterr().out)
    followed = [text.rstrip().splitlines()[-1] for text in shown if "next: " in text]
    assert [line.split()[:3] for line in followed] == [
        ["next:", "kcdcache", name] for name in ("precompute", "train", "train", "train", "train")
    ]
    assert "--teacher runs/teacher" in followed[0]
    assert "--manifest half.parquet" in followed[3]
