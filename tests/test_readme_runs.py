"""The README's commands, read from it and run as written on a few tiny images: only names and sizes differ."""

import json
import shlex

import numpy as np
import pytest
from test_readme import COMMANDS

from kcdcache.cli import main
from kcdcache.runs.state import read_metrics
from kcdcache.store import reader

CHAIN = [line for line in COMMANDS if line.split()[1] != "run"]
SMALL = {
    "fit": ["--epochs", "1", "--augment", "crop", "--padding", "2"],
    "precompute": ["--augment", "crop", "--padding", "2", "--min-accuracy", "0"],
    "train": ["--epochs", "6", "--threads", "1"],
}
"""command -> flags that make it small; CIFAR's own views are its usual ones, arrays have none"""
NAMES = {
    "cifar100": "arrays:tiny.npz", "wrn_40_2": "resnet14", "wrn_16_2": "resnet8", "resnet8x4": "resnet8", "40": "2",
    "auto": "0/1",
}  # fmt: skip
"""word of the README -> a smaller one: data, networks, views, and the place of a task in an array"""


def tiny(file):
    """Images of 3 classes, each brighter in a channel of its own."""
    random, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 48), ("test", 12)):
        labels = np.arange(count) % 3
        images = random.integers(0, 128, (count, 8, 8, 3), np.uint8)
        images[np.arange(count), :, :, labels] += 100
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    np.savez(file, **arrays)


def as_here(line):
    """The words of a README line, with names and sizes of here."""
    name, *words = shlex.split(line, comments=True)[1:]
    return [name, *(NAMES.get(word, word) for word in words), *SMALL.get(name, [])]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The folder after all commands, and line -> what it told."""
    folder, told = tmp_path_factory.mktemp("readme"), {}
    tiny(folder / "tiny.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in CHAIN:
            with open("told.json", "w") as stream:
                patch.setattr("sys.stdout", stream)
                assert main._outcome([*as_here(line), "--json", "-q"]) == 0, line
            told[line] = json.loads((folder / "told.json").read_text())
    return folder, told


def line_with(*words):
    return next(line for line in CHAIN if all(word in line.split() for word in words))


def test_a_whole_store_gains_in_every_view_what_crd_and_at_read(chain):
    folder, told = chain
    before, after = told[line_with("precompute", "--views")], told[line_with("precompute", "--for")]
    assert list(before["fields"]) == ["logits"]
    attention = [f"attention:stage{stage}:{side}x{side}" for stage, side in ((1, 8), (2, 4), (3, 2))]
    assert sorted(after["fields"]) == sorted(["logits", "penultimate", *attention])
    assert before["views"] == after["views"] == 2
    rows = reader.open(folder / "runs" / "store").load(1, np.arange(48), list(after["fields"]))
    assert all(np.isfinite(values).all() for values in rows.values())


def test_crd_and_kd_train_from_that_store_without_the_teacher(chain):
    folder, told = chain
    found = told[line_with("train", "crd+kd")]
    assert (found["finished"], found["method"], found["teacher_forwards"]) == (True, "crd+kd", 0)
    assert found["kept"] == 33  # of 48 with --keep 0.7
    assert [np.isfinite(row.loss) for row in read_metrics(folder / "runs" / "crd")] == [True] * 6


def test_a_condensed_set_teaches_another_student(chain):
    folder, told = chain
    found = told[line_with("train", "--manifest")]
    assert {row.kept for row in read_metrics(folder / "runs" / "reuse")} == {33}
    assert found["student_samples"] == 6 * 33
    assert (folder / "half.parquet").is_file()
