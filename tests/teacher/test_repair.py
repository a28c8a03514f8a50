"""A damaged store is made again, byte for byte, and only what is bad is computed."""

import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from damaging import DAMAGE, flip, put, swap
from lessons import precomputed
from pupils import TRAIN as COUNT
from pupils import BrokenOffError, digits, everything, loaded, saved_teacher, school, stop_after

from kcdcache.commands import verify
from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, SettingsError, UnfinishedError
from kcdcache.store import check
from kcdcache.teacher import repair

FILES = [
    *(f"_kcd/{name}.json" for name in ("identity", "plan.0", "plan.1", "commit.0", "commit.1")),
    *(f"_kcd/log/{name}.json" for name in ("0/samples", "0/v00001-p00000", "1/v00000-p00000")),
    *("zarr.json", "labels/zarr.json", "logits/zarr.json", "labels/c.0", "sample_digest/c.0"),
    *("logits/c.1.0.0", "logits_rowmax/c.0.0", "penultimate/c.2.0.0"),
]
"""one file of each kind, of a store that grew once"""
HOWS = [*DAMAGE, "linked"]
PAIRS = [
    pytest.param(file, how, marks=() if (row + column) % 8 == 0 else pytest.mark.slow)
    for row, file in enumerate(FILES)
    for column, how in enumerate(HOWS)
]
"""an eighth of them by default: every file, every damage"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher and two stores: one in float16 that grew by a field, one compressed in top:4."""
    root = tmp_path_factory.mktemp("repair")
    made = school(root, encoding="float16")
    given = {"encoding": "float16", "fields": ("logits", "penultimate")}
    precomputed(made.knowledge.path, made.data, made.network, **given)
    made.packed = precomputed(root / "packed", made.data, made.network, encoding="top:4", views=2, compression="zstd")
    return made


@pytest.fixture
def damaged(place, tmp_path):
    return Path(shutil.copytree(place.knowledge.path, tmp_path / "store"))


def means(place):
    return repair.Means(data=place.data, network=place.network)


@pytest.mark.parametrize(("file", "how"), PAIRS)
def test_whatever_is_bad_is_found_and_made_again_to_the_same_bytes(place, damaged, file, how):
    whole, target = everything(damaged), damaged / file
    put(target, DAMAGE.get(how, DAMAGE["deleted"])(whole[file], len(whole[file]) // 2))
    if how == "linked":
        target.symlink_to(place.knowledge.path / file)
    if (file, how) == ("_kcd/commit.1.json", "deleted"):
        return  # a store whose last commit is gone is an unfinished one
    bad = [file] if how != "linked" or not file.endswith(".json") else []
    assert all(Path(name).name in complaints(damaged) for name in bad)
    assert repair.repair(damaged, means(place)) == bad
    assert everything(damaged) == whole
    assert check.verify(damaged).problems == ()


def complaints(path):
    try:
        return "\n".join(check.verify(path).problems)
    except KcdcacheError as error:
        return str(error)


def test_swapped_chunks_and_much_at_once_are_put_right(place, damaged):
    whole = everything(damaged)
    for left, right in (("logits/c.0.0.0", "logits/c.1.0.0"), ("logits_rowmax/c.0.0", "logits_rowmax/c.2.0")):
        swap(damaged, left, right)
    assert len(check.verify(damaged).problems) == 4
    assert len(repair.repair(damaged, means(place))) == 4
    assert everything(damaged) == whole
    for array in ("logits", "labels"):
        shutil.rmtree(damaged / array)
    shutil.rmtree(damaged / "_kcd" / "log" / "1")
    (damaged / "_kcd/identity.json").unlink()
    (damaged / "_kcd/plan.1.json").write_text("{}")
    repair.repair(damaged, means(place))
    assert everything(damaged) == whole


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def test_random_damage_of_a_compressed_store_is_undone(place, tmp_path, seed):
    path = Path(shutil.copytree(place.packed.path, tmp_path / "store"))
    whole, draw = everything(path), random.Random(seed)
    names = [name for name in whole if not re.search(r"lock|environment.json|timing.jsonl|commit", name)]
    for name in draw.sample(names, 3):
        put(path / name, draw.choice(list(DAMAGE.values()))(whole[name], draw.randrange(len(whole[name]))))
    repair.repair(path, means(place))
    assert everything(path) == whole


RECORDS = ["_kcd/identity.json", "_kcd/plan.0.json", "logits/zarr.json"]


@pytest.mark.parametrize("names", [[], RECORDS], ids=["a sound store", "records"])
def test_what_is_computed_nowhere_needs_no_teacher(damaged, names):
    whole = everything(damaged)
    for name in names:
        put(damaged / name, b"{}")
    assert sorted(repair.repair(damaged, None)) == names
    assert everything(damaged) == whole


COMMIT, RECORD = "_kcd/commit.1.json", "_kcd/log/1/v00000-p00000.json"
BEYOND = [
    (["logits/c.0.0.0"], SettingsError, r"v00000-p00000 of .* is damaged: give --teacher and --data"),
    (["_kcd/plan.1.json", COMMIT], CorruptionError, r"commit.1.json is damaged, and so is what it could be made from"),
    ([COMMIT, RECORD], CorruptionError, r"commit.1.json is damaged, and so .*v00000-p00000.json"),
    (["_kcd/commit.0.json", COMMIT], UnfinishedError, "run the same `kcdcache precompute` again"),
]
"""bad files, and why nobody makes them again without a teacher; the last is unfinished, not damaged"""


@pytest.mark.parametrize(("names", "error", "said"), BEYOND, ids=lambda value: str(value)[:30])
def test_what_cannot_be_made_again_is_refused(damaged, names, error, said):
    for name in names:
        gone = error in (SettingsError, UnfinishedError)
        put(damaged / name, None if gone else flip((damaged / name).read_bytes(), 999))
    with pytest.raises(error, match=said):
        repair.repair(damaged, None)


def lying(place):
    """Other libraries give other last bits under the same identity; a weight moved by little stands for them."""
    network = loaded(place.teacher, place.data)
    with torch.no_grad():
        network.module.fc.weight[0] += 1e-3
    return replace(network, identity=place.network.identity)


OTHERS = {
    r"differ in teacher.weights.*give the teacher and data it was made with": lambda place, folder: repair.Means(
        data=place.data, network=loaded(saved_teacher(folder / "other", place.data, seed=3), place.data)
    ),
    "differ in data": lambda place, folder: repair.Means(data=digits(COUNT - 1, 60), network=place.network),
    r"computed here is not what was written.*repair there, or precompute a new store": lambda place, folder: (
        repair.Means(data=place.data, network=lying(place))
    ),
}


@pytest.mark.parametrize("said", OTHERS, ids=["another teacher", "other data", "another machine"])
def test_other_means_than_the_stores_change_nothing(place, damaged, tmp_path, said):
    put(damaged / "logits/c.0.0.0", b"")
    before = everything(damaged)
    with pytest.raises(MismatchError, match=said):
        repair.repair(damaged, OTHERS[said](place, tmp_path))
    assert everything(damaged) == before


def test_a_store_may_be_damaged_while_it_grows(place, damaged):
    whole = everything(damaged)
    given = {"encoding": "float16", "fields": ("logits", "penultimate"), "views": 9}
    with pytest.raises(BrokenOffError):
        precomputed(damaged, place.data, place.network, stop_after(4), **given)
    (damaged / "logits/c.1.0.0").unlink()
    assert repair.repair(damaged, means(place)) == ["logits/c.1.0.0"]
    assert (damaged / "logits/c.1.0.0").read_bytes() == whole["logits/c.1.0.0"]
    assert precomputed(damaged, place.data, place.network, **given).views == 9
    assert check.verify(damaged).problems == ()


def test_other_seeds_read_other_files(place, damaged):
    put(damaged / "logits/c.1.0.0", flip((damaged / "logits/c.1.0.0").read_bytes(), 999))
    hits = [bool(check.verify(damaged, share=0.5, seed=seed).problems) for seed in range(12)]
    assert any(hits)
    assert not all(hits)


@pytest.mark.parametrize("text", ["0", "0%", "-1", "101%", "half", "nan", ""])
def test_a_share_is_a_share(text):
    with pytest.raises(SettingsError, match="--sample takes a share above 0 and at most 100%"):
        verify.parse_share(text)
