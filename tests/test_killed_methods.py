"""Kill -9 in the middle of an epoch, for every method with a term of its own: run again, it makes the same bytes.

test_every_method.py breaks runs off between epochs in one process. Here processes die at a step of writing a
checkpoint, with moving averages, peers, branches and random draws half way through an epoch and a stage.
"""

import random
import signal

import pytest
from killing import finished, nursery, succeeds
from lessons import precomputed
from pupils import SPEC, digits, leftovers, lines, loaded, same_files, saved_teacher

from kcdcache import methods
from kcdcache.catalogue import METHODS
from kcdcache.config import MethodSettings

STUDENT = "resnet8"
RUN = {
    "student": STUDENT, "epochs": 2, "stages": 2, "batch_size": 100, "keep": 0.6, "threads": 1,
    "checkpoint_seconds": 0, "crd_negatives": 16,
}  # fmt: skip
"""two epochs of two batches, a condensation between them, a checkpoint after every batch"""
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
        field for name in METHODS for field in methods.reads(MethodSettings(method=name), STUDENT, bare.knowledge, data)
    )
    precomputed(root / "store", data, network, views=2, fields=tuple(wanted))
    return root


@pytest.mark.parametrize("name", WITH_TERM)
def test_x(place, start, tmp_path, name):
    import time
    words = lambda path: ["train", *lines({"data": SPEC, "store": place / "store", "out": path, "method": name} | RUN)]
    t=time.time()
    succeeds(start, words(tmp_path / "whole"), tmp_path / "log")
    print(name, time.time()-t)
    if name=="at":
        for point in range(1, 400, 1):
            path=tmp_path/f"c{point}"
            t=time.time()
            code=finished(start, words(path), tmp_path/"log", KCDCACHE_CRASHPOINT=str(point))
            print(point, code, round(time.time()-t,2), sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())[-12:])
            if code==0: break
