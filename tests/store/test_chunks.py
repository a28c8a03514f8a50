"""Chunk files: what is written is what zarr writes, and a file of any other byte is never read as rows."""

import json

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import plan_of
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from kcdcache.files.atomic import sha256_bytes
from kcdcache.store import chunks
from kcdcache.store.log import FileRecord
from kcdcache.store.plan import ArrayPlan, array_document

ROWS, WIDTH = 50, 6
ARRAY = ArrayPlan("a", (WIDTH,), "float16", ROWS, "a")
VALUES = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float16)
CONTENT = {kind: chunks.encoded(ARRAY, VALUES, kind) for kind in ("none", "zstd")}
KINDS = pytest.mark.parametrize("kind", CONTENT)


def record_of(data):
    return FileRecord("c.0.0", len(data), sha256_bytes(data), int.from_bytes(data[-4:], "little"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("chunks")
    for kind, content in CONTENT.items():
        (root / kind).write_bytes(content)
    return root


def copied(path, kind, wanted, target=None, record=None):
    """Whether a file was what was written, and the rows copied out of it."""
    wanted = np.array(wanted, np.int64)
    target = np.zeros((len(wanted), WIDTH), np.float16) if target is None else target
    record = record or record_of(CONTENT[kind])
    return chunks.copy_rows(path, record, ARRAY, kind, wanted, target, np.empty(record.bytes, np.uint8)), target


@KINDS
@settings(max_examples=15)
@given(wanted=st.sets(st.integers(0, ROWS - 1)) | st.just(set(range(ROWS))))
def test_any_rows_are_the_files(files, kind, wanted):
    sound, found = copied(files / kind, kind, sorted(wanted))
    assert sound
    assert np.array_equal(found, VALUES[sorted(wanted)])


@KINDS
@pytest.mark.parametrize("wanted", [range(ROWS), [0], []])
def test_a_flipped_byte_shows_whichever_rows_are_wanted(tmp_path, kind, wanted):
    path = tmp_path / "c.0.0"
    for place in [*range(0, len(CONTENT[kind]), 3), *range(-5, 0)]:
        damaged = bytearray(CONTENT[kind])
        damaged[place] ^= 16
        path.write_bytes(damaged)
        assert not copied(path, kind, wanted)[0], f"byte {place}"


OTHERS = {
    "empty": b"",
    "cut": CONTENT["none"][:-1],
    "extended": CONTENT["none"] + b"\0",
    "half": CONTENT["none"][:300],
    "shifted": CONTENT["none"][12:],
    "other rows": chunks.encoded(ARRAY, VALUES[::-1], "none"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("wanted", [range(ROWS), [3]])
def test_another_file_shows_even_if_it_is_sound(tmp_path, name, wanted):
    (tmp_path / "c").write_bytes(OTHERS[name])
    assert not copied(tmp_path / "c", "none", wanted)[0]


@KINDS
def test_rows_next_to_the_target_are_left_alone(files, kind):
    around = np.full((ROWS + 2, WIDTH), 7, np.float16)
    assert copied(files / kind, kind, range(ROWS), target=around[1:-1])[0]
    assert np.array_equal(around[1:-1], VALUES)
    assert (around[[0, -1]] == 7).all()


@pytest.mark.parametrize("text", ["float16", "float32", "top:3"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_documents_and_chunks_are_those_zarr_writes(tmp_path, compression, text):
    """Of a store of 50 samples and 2 views, in padded chunks of 32 rows."""
    plan = plan_of(50, 2, text, compression=compression)
    for array in plan.arrays:
        array = ArrayPlan(array.name, array.row_shape, array.dtype, 32, array.field)
        document = array_document(plan, array)
        theirs = zarr.create_array(
            tmp_path / array.name,
            shape=tuple(document["shape"]),
            chunks=tuple(document["chunk_grid"]["configuration"]["chunk_shape"]),
            dtype=array.dtype,
            fill_value=float("nan") if array.dtype.startswith("float") else 0,
            serializer=BytesCodec(endian="little"),
            compressors=[*([ZstdCodec(level=1)] if compression == "zstd" else []), Crc32cCodec()],
            filters=None,
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=document["dimension_names"],
        )
        assert json.loads((tmp_path / array.name / "zarr.json").read_text()) == document
        rows = np.random.default_rng(1).normal(0, 99, (50, *array.row_shape)).astype(array.dtype)
        theirs[...] = np.broadcast_to(rows, theirs.shape)
        place = ".".join("1" if name == "sample" else "0" for name in document["dimension_names"])
        written = (tmp_path / array.name / f"c.{place}").read_bytes()
        assert chunks.encoded(array, rows[32:], compression) == written


def test_axes_of_one_name_have_one_length_in_all_arrays_of_a_store():
    """As xarray asks of a data set."""
    plan, lengths = plan_of(50, 2), {}
    for array in plan.arrays:
        document = array_document(plan, array)
        for name, length in zip(document["dimension_names"], document["shape"], strict=True):
            assert lengths.setdefault(name, length) == length
    assert lengths == {"view": 2, "sample": 50, "class": 7}
