"""An independent reader of Zarr (tensorstore, in C++) finds in our stores what we find."""

import warnings

import numpy as np
import pytest
import zarr
from stores import form, grown, make, small_parts

from kcdcache.store import reader
from kcdcache.store.plan import array_document

ts = pytest.importorskip("tensorstore", reason="tensorstore (test-only) cannot be imported here", exc_type=ImportError)


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


FORMS = [("float16", "none"), ("float32", "zstd"), ("top:3", "none"), ("top:3", "zstd")]


@pytest.fixture(scope="module", params=FORMS, ids=str)
def path(tmp_path_factory, request):
    """A store of several parts and chunks, some of them padded, that grew by a field and a view."""
    root = make(tmp_path_factory.mktemp("stores") / "s", small_parts(150, 2, 64, 32, *request.param))
    grown(root, views=3, fields=[form("penultimate", "float32")])
    return root


def test_every_array_is_the_same_bits_to_it_to_zarr_and_to_us(path):
    opened = reader.open(path)
    assert len(opened.plan.arrays) >= 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr warns of our _kcd folder, which is no array
        listed = sorted(zarr.open_group(path, mode="r").array_keys())
    assert listed == sorted(array.name for array in opened.plan.arrays)
    for array in opened.plan.arrays:
        here = read_here(opened, array)
        assert here.any()
        assert same(read_there(path, array.name), here)
        assert same(np.asarray(zarr.open_array(path / array.name, mode="r")[...]), here)
        found, document = open_there(path, array.name), array_document(opened.plan, array)
        assert (list(found.shape), found.dtype.name) == (document["shape"], document["data_type"])
        assert list(found.chunk_layout.read_chunk.shape) == document["chunk_grid"]["configuration"]["chunk_shape"]
    index = np.random.default_rng(0).permutation(150)[:40]
    there = np.asarray(open_there(path, "logits")[1, index.tolist()].read().result())
    assert same(there, opened.load(1, np.arange(150), ["logits"])["logits"][index])
