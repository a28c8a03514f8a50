"""An independent reader of Zarr (tensorstore, in C++) finds in our stores what we find, and refuses the same damage."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from damaging import flip
from stores import creating, finish, form, grown, knowledge, many_chunks, plan_of, small_parts

from kcdcache.errors import CorruptionError
from kcdcache.store import reader
from kcdcache.store.plan import all_chunks, array_document

ts = pytest.importorskip("tensorstore", reason="tensorstore (test-only) cannot be imported here", exc_type=ImportError)

ENCODINGS, COMPRESSIONS = ("float16", "float32", "top:3"), ("none", "zstd")


def open_there(root, name):
    files = {"driver": "file", "path": str(root / name)}
    spec = {"driver": "zarr3", "kvstore": files, "fill_missing_data_reads": False}
    return ts.open(spec, read=True).result()


def read_there(root, name):
    return np.asarray(open_there(root, name).read().result())


def read_here(opened, array):
    if array.field is None:
        return getattr(opened, array.name)
    rows = np.arange(opened.count)
    return np.stack([opened.load(view, rows, [array.field])[array.name] for view in range(opened.views)])


def same(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


@pytest.fixture(params=COMPRESSIONS)
def compression(request):
    return request.param


@pytest.fixture(params=ENCODINGS)
def path(tmp_path, request, compression):
    """A store of several parts and chunks, some of them padded, that grew by a field and a view."""
    with creating(tmp_path / "s", small_parts(150, 2, 64, 32, request.param, compression)) as writing:
        finish(writing)
    grown(tmp_path / "s", views=3, fields=[form("penultimate", "float32")])
    return tmp_path / "s"


def test_every_array_is_the_same_bits_to_it_to_zarr_and_to_us(path):
    opened = reader.open(path)
    assert len(opened.plan.arrays) >= 4
    for array in opened.plan.arrays:
        here = read_here(opened, array)
        assert here.any()
        assert same(read_there(path, array.name), here)
        assert same(np.asarray(zarr.open_array(path / array.name, mode="r")[...]), here)


def test_a_store_as_precompute_plans_it_reads_the_same(tmp_path, compression):
    plan = plan_of(3000, 2, compression=compression)
    with creating(tmp_path / "s", plan, knowledge(3000)) as writing:
        finish(writing)
    opened = reader.open(tmp_path / "s")
    for array in plan.arrays:
        assert same(read_there(tmp_path / "s", array.name), read_here(opened, array))


def test_rows_in_any_order_are_the_same(path):
    opened, index = reader.open(path), np.random.default_rng(0).permutation(150)[:40]
    array = open_there(path, "logits")
    there = np.asarray(array[1, index.tolist()].read().result())
    assert same(there, opened.load(1, np.arange(150), ["logits"])["logits"][index])


def test_its_metadata_says_what_ours_does(path):
    for array in reader.open(path).plan.arrays:
        found = open_there(path, array.name)
        document = array_document(reader.open(path).plan, array)
        assert list(found.shape) == document["shape"]
        assert found.dtype.name == document["data_type"]
        assert list(found.chunk_layout.read_chunk.shape) == document["chunk_grid"]["configuration"]["chunk_shape"]


@pytest.mark.parametrize("place", ["first", "middle", "checksum"])
def test_a_flipped_bit_is_an_error_to_it_too(path, place):
    for chunk in all_chunks(reader.open(path).plan)[::5]:
        file = path / chunk.key
        data = file.read_bytes()
        bit = {"first": 0, "middle": 4 * len(data), "checksum": 8 * len(data) - 1}[place]
        file.write_bytes(flip(data, bit))
        with pytest.raises(ValueError, match=re.escape(chunk.key) + r"|CRC-32C checksum"):
            read_there(path, chunk.array.name)
        file.write_bytes(data)


def shrink(file):
    file.write_bytes(file.read_bytes()[:-3])


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b""), shrink])
def test_missing_emptied_and_cut_chunks_are_errors_to_it_too(tmp_path, damage):
    path = many_chunks(tmp_path / "s")
    damage(path / "logits/c.1.2.0")
    with pytest.raises((ValueError, OSError), match=r"logits|c\.1\.2\.0|checksum|size|bytes"):
        read_there(path, "logits")


def test_only_the_log_knows_that_two_chunks_were_swapped(tmp_path):
    path = many_chunks(tmp_path / "s")
    before = read_there(path, "logits")
    shutil.copy(path / "logits/c.1.2.0", path / "logits/c.1.1.0")
    assert not same(read_there(path, "logits"), before)
    with pytest.raises(CorruptionError, match=r"logits/c.1.1.0 .* is not what was written"):
        reader.open(path).load(1, np.arange(150), ["logits"])
