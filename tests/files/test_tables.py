import contextlib
import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kcdcache.errors import CorruptionError, MismatchError
from kcdcache.files import parquet

COLUMNS = st.dictionaries(
    st.sampled_from("abc"),
    arrays.arrays(
        st.sampled_from([np.dtype(kind) for kind in ("int64", "int32", "float32", "uint64")]),
        5,
        elements={"allow_nan": False, "min_value": 0, "max_value": 100},
    ),
    min_size=1,
)


def written(path, **columns):
    table = pa.table(columns or {"index": [0, 1, 2], "value": [0.5, 1.5, None]})
    path.write_bytes(parquet.encode(table))
    return table


def slow_digest(header, columns):
    content = len(header).to_bytes(8, "little") + header
    for name, column in columns.items():
        letters = {"i": "i", "u": "u", "f": "f"}[column.dtype.kind]
        content += f"{name}:<{letters}{column.dtype.itemsize};".replace(";", f":{len(column)};").encode()
        numbers = b"".join(np.array(number, column.dtype.newbyteorder("<")).tobytes() for number in column)
        content += hashlib.sha256(numbers).digest()
    return hashlib.sha256(content).hexdigest()


@given(st.binary(max_size=9), COLUMNS)
def test_the_digest_is_that_of_names_types_lengths_and_bytes(header, columns):
    assert parquet.digest(header, columns) == slow_digest(header, columns)


def test_the_digest_does_not_depend_on_byte_order_or_stride():
    column = np.arange(10, dtype=np.int64)
    doubled = np.repeat(column, 2)[::2]
    expected = parquet.digest(b"", {"a": column})
    assert parquet.digest(b"", {"a": column.astype(">i8")}) == parquet.digest(b"", {"a": doubled}) == expected


def test_a_table_reads_back_texts_as_a_dictionary(tmp_path):
    part = pa.array(["a", "b", "a"]).cast(pa.dictionary(pa.int32(), pa.string()))
    table = written(tmp_path / "t.parquet", index=[0, 1, 2], part=part, value=[0.5, 1.5, None])
    assert parquet.read(tmp_path / "t.parquet").equals(table)


def test_numbers_are_in_no_encoding_that_other_readers_refuse(tmp_path):
    kinds = {"a": np.int32, "b": np.int64, "c": np.uint64, "d": np.float32}
    written(tmp_path / "t.parquet", **{name: np.arange(9, dtype=kind) for name, kind in kinds.items()})
    group = pq.read_metadata(tmp_path / "t.parquet").row_group(0)
    found = {group.column(place).path_in_schema: group.column(place).encodings for place in range(4)}
    assert {name for name, known in found.items() if "DELTA_BINARY_PACKED" in known} == {"a", "b", "c"}
    assert not any("BYTE_STREAM_SPLIT" in known for known in found.values())


def test_any_flipped_byte_of_the_pages_is_found(tmp_path):
    path = tmp_path / "t.parquet"
    written(path, index=np.arange(300), value=np.random.default_rng(0).random(300, np.float32))
    whole = path.read_bytes()
    length = int.from_bytes(whole[-8:-4], "little")
    pages = np.random.default_rng(1).integers(40, len(whole) - 8 - length, 100)
    right, found = parquet.read(path), 0
    for place in pages:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with contextlib.suppress(CorruptionError):
            assert parquet.read(path).equals(right)  # a byte of a page's header that no reader looks at
            found -= 1
        found += 1
    assert found > 90


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"hello" * 50])
def test_what_is_no_parquet_is_corruption(tmp_path, data):
    (tmp_path / "t.parquet").write_bytes(data)
    with pytest.raises(CorruptionError, match=r"t.parquet is not an undamaged parquet file: .*; write it again"):
        parquet.read(tmp_path / "t.parquet")


def test_too_many_rows_are_refused(tmp_path):
    written(tmp_path / "t.parquet", index=np.arange(5))
    assert parquet.read(tmp_path / "t.parquet", most_rows=5).num_rows == 5
    with pytest.raises(MismatchError, match=r"t.parquet holds 5 rows, expected at most 4"):
        parquet.read(tmp_path / "t.parquet", most_rows=4)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "is damaged"), ("[1]", "should be a JSON object"), (b"\xff", "is damaged")]
)
def test_the_document_is_the_object_under_the_key(tmp_path, text, said):
    schema = pa.schema([("a", pa.int64())], {"key": '{"a": 1}', "odd": text})
    assert parquet.document(schema, "key", tmp_path) == {"a": 1}
    assert parquet.document(schema, "other", tmp_path) is None
    with pytest.raises(CorruptionError, match=rf"its metadata 'odd' {said}"):
        parquet.document(schema, "odd", tmp_path)


@pytest.mark.parametrize(
    ("columns", "odd"),
    [
        ({"index": pa.array([1]), "value": pa.array([1.0])}, "value"),
        ({"index": pa.array([1])}, "value"),
        ({"index": pa.array([1]), "value": pa.array([1.0], pa.float32()), "x": pa.array([1])}, "x"),
        ({"value": pa.array([1.0], pa.float32()), "index": pa.array([1])}, "value"),
    ],
)
def test_other_columns_than_expected_are_refused_by_name(tmp_path, columns, odd):
    expected = pa.schema([("index", pa.int64()), ("value", pa.float32())])
    parquet.require_schema(expected, expected, tmp_path)
    said = rf"expected the columns index int64, value float, found .*look at '{odd}'"
    with pytest.raises(CorruptionError, match=said):
        parquet.require_schema(pa.table(columns).schema, expected, tmp_path)
