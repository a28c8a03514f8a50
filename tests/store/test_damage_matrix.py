"""Damage of every kind to every kind of file: an error that names the place, or nothing read differs. Never silence.

`python tests/store/test_damage_matrix.py` counts all of it and writes pipelines/results/damage.json.
"""

import json
import math
import platform
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from damaging import (
    DAMAGE,
    TENTH,
    files_of,
    flip,
    place_of,
    put,
    read_checkpoint,
    read_manifest,
    read_run,
    read_store,
    sibling,
    swap,
)
from lessons import condensed
from pupils import distilled, school
from stores import creating, finish, form, grown, make, plan_of, small_parts

from kcdcache.commands import verify as verify_
from kcdcache.condensation import manifest
from kcdcache.errors import KcdcacheError, UnfinishedError
from kcdcache.runs import check as runs_check
from kcdcache.store import check as store_check
from kcdcache.store import reader

SEED = 7
FLIPS = {
    "float16, grown": 100,
    "float16, zstd": 60,
    "float32": 60,
    "top:3": 40,
    "top:3, zstd": 30,
    "manifest": 400,
    "checkpoint": 200,
    "run, interrupted": 15,
    "run, finished": 15,
}
"""what is damaged -> random single-bit flips: 920 together"""
RESULT = Path(__file__).parents[2] / "pipelines/results/damage.json"
UNREAD = ("_kcd/lock", "_kcd/environment.json", ".lock", "timing.jsonl")
"""files that hold no knowledge: who writes, where it was made, clock times"""


class Subject(NamedTuple):
    """Something written by kcdcache: its files, how all of it is read, and how it is verified."""

    root: Path
    files: tuple[str, ...]
    """those to damage, by their name in the folder"""
    read: Callable[[], Any]
    verify: Callable[[], tuple[str, ...]]
    """what `kcdcache verify` finds, errors raised aside"""
    place: Callable[[str], str] = str
    """how a complaint about one of its files names it"""
    sealed: bool = True
    """whether `verify` finds even changes of bytes that mean nothing, as those of a parquet file's writer"""
    undone: Mapping[str, Any] = {}
    """file whose loss cannot be told from a crash before it was written -> what is read then (an error if None)"""


def subjects(root):
    """name -> subject: stores of every encoding and both compressions, a manifest, runs with their checkpoints."""
    stores = {
        "float16, zstd": make(root / "zstd", small_parts(150, 2, 64, 32, compression="zstd")),
        "float32": make(root / "float32", plan_of(1500, 2, "float32")),
        "top:3": make(root / "top", small_parts(150, 2, 64, 32, "top:3")),
        "top:3, zstd": make(root / "top zstd", plan_of(1500, 1, "top:3", compression="zstd")),
    }
    single = {name: a_store(path, {"_kcd/commit.0.json": None}) for name, path in stores.items()}
    return {"float16, grown": grown_store(root / "grown")} | single | {"manifest": a_manifest(root)} | runs_of(root)


def filled(root):
    """Files with any bytes to damage."""
    return [name for name in files_of(root) if (root / name).stat().st_size]


def a_store(root, undone):
    plan = reader.open(root).plan
    return Subject(
        root, filled(root), lambda: read_store(root), lambda: store_check.verify(root).problems,
        lambda name: place_of(plan, name), undone=undone,
    )  # fmt: skip


def grown_store(path):
    """A float16 store of 150 samples, of which the teacher failed on sample 40; grown by a field, then by a view."""
    with creating(path, small_parts(150, 2, 64, 32)) as writing:
        finish(writing, skipped=40)
    grown(path, fields=[form("penultimate")])
    before = read_store(path)
    grown(path, views=3)
    return a_store(path, {"_kcd/commit.2.json": before})


def a_manifest(root):
    file = root / "manifest/set.parquet"
    file.parent.mkdir()
    manifest.write(file, condensed(reader.open(root / "float32"), 0.6))

    def verify():
        verify_.verify(file)
        return ()

    return Subject(file.parent, (file.name,), lambda: read_manifest(file), verify, sealed=False)


def runs_of(root):
    """A run broken off in its second stage, the same finished, and the checkpoint of the first by itself."""
    place = school(root)
    distilled(place, root / "run", run={"until": 3})
    shutil.copytree(root / "run", root / "interrupted")
    distilled(place, root / "run")
    held = Path(shutil.copytree(root / "interrupted", root / "held"))
    files = tuple(name for name in files_of(held) if name.startswith("checkpoint/"))
    checkpoint = Subject(
        held, files, lambda: read_checkpoint(held), lambda: runs_check.check(held).problems,
        undone={"checkpoint/latest.json": None},
    )  # fmt: skip
    made = {"run, interrupted": a_run(root / "interrupted"), "run, finished": a_run(root / "run")}
    return {"checkpoint": checkpoint} | made


def a_run(path):
    names = files_of(path)
    sound = read_run(path, names)
    undone = {"checkpoint/latest.json": sound | {"checkpoint": None}, "summary.json": None, "student.json": None}
    return Subject(
        path, filled(path), lambda: read_run(path, names), lambda: runs_check.check(path).problems, undone=undone
    )


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return subjects(tmp_path_factory.mktemp("damage"))


def consequence(subject, sound, names):
    """Return what damage to files leads to: 'error' (which names one of them), 'harmless', or 'undone'."""
    complaint, found, unfinished = None, None, False
    try:
        found = subject.read()
    except KcdcacheError as error:
        complaint, unfinished = str(error), isinstance(error, UnfinishedError)
    if unfinished:
        assert names[0] in subject.undone, f"damage to {names[0]} is taken for unfinished work: {complaint}"
        return "undone"
    if complaint:
        assert named(subject, names, complaint), f"an error about {names[0]} does not say so: {complaint}"
        return "error"
    if found == sound:
        return "harmless"
    undone = names[0] in subject.undone and found == subject.undone[names[0]]
    assert undone, f"damage to {names[0]} of {subject.root} is silent"
    return "undone"


def named(subject, names, complaint):
    missing = [f"{Path(name).parent} holds" for name in names if f"but not {Path(name).name}" in complaint]
    return any(place in complaint for place in [*map(subject.place, names), *missing])


def complaint_of_verify(subject):
    try:
        return "\n".join(subject.verify())
    except KcdcacheError as error:
        return str(error)


def suffer(subject, sound, names, damage):
    """Damage files, look, put everything back; return what it led to."""
    before = {name: (subject.root / name).read_bytes() for name in names}
    try:
        damage()
        if all(same(subject.root / name, data) for name, data in before.items()):
            return "unchanged"
        led_to = consequence(subject, sound, names)
        if led_to == "error" or (led_to == "harmless" and subject.sealed and names[0] not in UNREAD):
            complaint = complaint_of_verify(subject)
            assert named(subject, names, complaint), f"verify does not name {names[0]} of {subject.root}: {complaint}"
        return led_to
    finally:
        for name, data in before.items():
            put(subject.root / name, data)


def same(file, data):
    return file.is_file() and file.read_bytes() == data


def flips(subject, count, seed):
    """Count what random single-bit flips lead to; every file has its turn before any has its second."""
    sound, rng, counted = subject.read(), random.Random(seed), Counter()
    order = rng.sample(subject.files, len(subject.files))
    for trial in range(count):
        name = order[trial % len(order)]
        change = partial(change_one, subject.root / name, flip, rng, 8)
        counted[suffer(subject, sound, [name], change)] += 1
    return counted


def matrix(subject, seed, share=1.0):
    """Count what every damage to every file leads to, or a share of all that: name of the damage -> counts."""
    sound, rng = subject.read(), random.Random(seed)
    counted = {kind: Counter() for kind in [*DAMAGE, "swapped"]}
    every = [(name, kind) for name in subject.files for kind in counted]
    some = every if share == 1 else rng.sample(every, min(len(every), max(8, round(share * len(every)))))
    for name, kind in some:
        names, damage = [name], partial(change_one, subject.root / name, DAMAGE.get(kind), rng)
        if kind == "swapped":
            names.append(sibling(subject.root, name))
            damage = partial(swap, subject.root, *names)
        if names[-1] is not None:
            counted[kind][suffer(subject, sound, names, damage)] += 1
    return counted


def change_one(file, change, rng, places=1):
    data = file.read_bytes()
    put(file, change(data, rng.randrange(places * len(data))))


@pytest.mark.parametrize("share", TENTH)
@pytest.mark.parametrize("name", FLIPS)
def test_no_flipped_bit_is_silent(places, name, share):
    count = math.ceil(share * FLIPS[name])
    counted = flips(places[name], count, SEED)
    assert counted.total() == count
    assert counted["error"] >= int(0.7 * count)
    assert not counted["undone"] + counted["unchanged"]


@pytest.mark.parametrize("share", TENTH)
@pytest.mark.parametrize("name", FLIPS)
def test_no_damage_of_the_matrix_is_silent(places, name, share):
    counted = matrix(places[name], SEED, share)
    assert total([counted])["error"] > 0
    assert counted["swapped"].total() == counted["swapped"]["error"]
    assert share < 1 or all(counts["error"] for kind, counts in counted.items() if kind != "swapped")


def table(root):
    """All counts, with what they depend on."""
    made = subjects(root)
    flipped = {name: flips(made[name], count, SEED) for name, count in FLIPS.items()}
    damaged = {name: matrix(subject, SEED) for name, subject in made.items()}
    return {
        "seed": SEED,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("kcdcache", "torch", "zarr", "pyarrow", "numpy")},
        "meaning": {
            "error": "refused, and the message names the file (of a chunk also samples and view)",
            "harmless": "all that is read is equal",
            "undone": "the file written last is lost: taken for unfinished, or the state before it is read",
            "silent": "anything read differs without an error: the script fails",
        },
        "all": {"flips": dict(sum(flipped.values(), Counter())), "matrix": dict(total(damaged.values()))},
        "flips": {name: dict(counts) for name, counts in flipped.items()},
        "matrix": {name: {kind: dict(counts) for kind, counts in kinds.items()} for name, kinds in damaged.items()},
    }


def total(matrices):
    return sum((counts for kinds in matrices for counts in kinds.values()), Counter())


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        RESULT.write_text(json.dumps(table(Path(folder)), indent=2) + "\n")
    sys.exit(0)
