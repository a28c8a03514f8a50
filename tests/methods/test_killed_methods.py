"""Kill -9 in the middle of an epoch, for every method with a term of its own: run again, it makes the same bytes.

tests/test_every_method.py breaks runs off between epochs, in one process. Here processes die at a step of writing a
checkpoint inside an epoch, when memories, peers, branches and random draws are half way.
"""

import json
import random
import signal

import pytest
from killing import finished, nursery, succeeds
from lessons import precomputed
from pupils import SPEC, digits, leftovers, lines, loaded, same_files, saved_teacher
from safetensors import safe_open

from kcdcache.methods import registry
from kcdcache.methods.registry import METHODS
from kcdcache.settings import MethodSettings

STUDENT = "resnet8"
RUN = {
    "student": STUDENT, "epochs": 2, "stages": 2, "batch_size": 100, "keep": 0.6, "threads": 1,
    "checkpoint_seconds": 0, "crd_negatives": 16,
}  # fmt: skip
"""a condensation between two epochs of two batches, and a checkpoint after every batch"""
MOST, UNTIL_NEXT = 200, 8
"""steps of writing that a run has at least, and at least from one checkpoint's last to the next one's"""
WITH_TERM = [name for name, method in METHODS.items() if method.term is not None]


@pytest.fixture(scope="module")
def start():
    with nursery() as starting:
        yield starting


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher, and a store of everything that any method reads of it."""
    root, data = tmp_path_factory.mktemp("place"), digits(200, 60)
    network = loaded(saved_teacher(root / "teacher", data), data)
    bare = precomputed(root / "bare", data, network, views=1)
    wanted = dict.fromkeys(
        field
        for name in METHODS
        for field in registry.reads(MethodSettings(method=name), STUDENT, bare.knowledge, data)
    )
    precomputed(root / "store", data, network, views=2, fields=tuple(wanted))
    return root


@pytest.fixture(scope="module")
def moments(place, start, tmp_path_factory):
    """In each epoch, the first step of writing at which the checkpoint inside it stands; the same for all methods."""
    root = tmp_path_factory.mktemp("moments")

    def first(position):
        low, high = 1, MOST
        while low < high:
            middle = (low + high) // 2
            path = root / f"{position} {middle}"
            assert cut(place, start, "dkd", path, middle) == -signal.SIGKILL
            low, high = (low, middle) if reached(path) >= position else (middle + 1, high)
        return low

    return {epoch: first((epoch, 1)) for epoch in range(RUN["epochs"])}


def words(place, name, path):
    return ["train", *lines({"data": SPEC, "store": place / "store", "out": path, "method": name} | RUN)]


def cut(place, start, name, path, point):
    """Train with a method until a step of writing; return how the process ended."""
    return finished(start, words(place, name, path), place / "log", KCDCACHE_CRASHPOINT=str(point))


def reached(path):
    """The epoch and the batch in it that a run's checkpoint is after."""
    pointer = path / "checkpoint" / "latest.json"
    if not pointer.exists():
        return 0, 0
    with safe_open(pointer.with_name(json.loads(pointer.read_text())["file"]), "pt") as held:
        record = json.loads(held.metadata()["kcdcache"])
    return record["epoch"], record["step"]


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_TERM)
def test_killed_inside_an_epoch_and_run_again_gives_the_same_bytes(place, start, moments, tmp_path, name):
    succeeds(start, words(place, name, tmp_path / "whole"), place / "log")
    draw = random.Random(name)
    for epoch, first in moments.items():
        path = tmp_path / str(epoch)
        assert cut(place, start, name, path, first + draw.randrange(UNTIL_NEXT)) == -signal.SIGKILL
        assert reached(path) == (epoch, 1)
        succeeds(start, words(place, name, path), place / "log")
        assert same_files(tmp_path / "whole", path)
        assert not leftovers(path)
