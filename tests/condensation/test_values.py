import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kcdcache.condensation import manifest, value_files, values
from kcdcache.condensation.values import Values
from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, NonFiniteError, NotFoundError, SettingsError

DOCUMENT = {"knowledge_id": "k" * 64, "student": "resnet8", "epoch": 4}
NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32)


def make(visits: list[int], value: list[float]) -> Values:
    return Values(np.array(visits, np.int32), np.array(value, np.float32))


def observed(history: list[float], record: str, decay: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    visits, mean = np.zeros(1, np.int32), np.zeros(1, np.float32)
    for value in history:
        visits, mean = values.observe(visits, mean, np.array([value], np.float32), record, decay)
    return visits, mean


def equal(left: Values, right: Values) -> bool:
    return np.array_equal(left.visits, right.visits) and np.array_equal(left.value, right.value)


def foreign(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


HISTORY = st.lists(st.floats(0, 5, width=32), min_size=1, max_size=60)


@given(HISTORY)
@settings(max_examples=25, deadline=None)
def test_value_is_the_mean_of_all_observations(history: list[float]) -> None:
    visits, mean = observed(history, "mean")
    assert visits[0] == len(history)
    assert mean[0] == pytest.approx(math.fsum(history) / len(history), rel=1e-5, abs=1e-6)


def test_value_can_be_the_last_observation_or_a_moving_average_from_the_first_on() -> None:
    assert observed([3.0, 1.0, 2.0], "last")[1][0] == 2.0
    assert observed([3.0], "ema")[1][0] == 3.0
    assert observed([3.0, 1.0, 2.0], "ema", 0.75)[1][0] == pytest.approx(0.75 * (0.75 * 3 + 0.25 * 1) + 0.25 * 2)
    with pytest.raises(SettingsError, match="unknown record 'median'; known: mean, last, ema"):
        observed([1.0], "median")


@pytest.mark.parametrize("record", ["mean", "last", "ema"])
def test_arrays_and_tensors_give_the_same_bits_and_stay_as_they_are(record: str) -> None:
    random = np.random.default_rng(0)
    visits = random.integers(0, 50, 200).astype(np.int32)
    mean, value = random.random((2, 200), dtype=np.float32)
    before = [array.copy() for array in (visits, mean, value)]
    numpy_result = values.observe(visits, mean, value, record)
    assert all(np.array_equal(*pair) for pair in zip(before, (visits, mean, value), strict=True))  # no input changed
    torch_result = values.observe(torch.from_numpy(visits), torch.from_numpy(mean), torch.from_numpy(value), record)
    assert [array.dtype for array in numpy_result] == [np.int32, np.float32]
    for left, right in zip(numpy_result, torch_result, strict=True):
        assert np.array_equal(left, right.numpy())


@given(st.lists(st.tuples(st.integers(0, 10**6), NUMBERS), min_size=1), st.floats(0, 1), st.booleans())
@settings(max_examples=25, deadline=None)
def test_score_is_value_times_visits_to_alpha_and_unseen_samples_come_first_or_last(
    rows: list[tuple[int, float]], alpha: float, first: bool
) -> None:
    found = values.score(make([f for f, _ in rows], [v for _, v in rows]), alpha, "first" if first else "last")
    for (visits, value), score in zip(rows, found, strict=True):
        expected = np.float32(float(np.float32(value)) * visits**alpha) if visits else np.inf if first else -np.inf
        assert score == pytest.approx(expected, rel=3e-7)
        assert not np.signbit(score) or score < 0
    with pytest.raises(SettingsError, match="unknown policy 'middle' for unseen samples; known: first, last"):
        values.score(make([0], [0]), alpha, "middle")


def test_score_names_the_first_value_that_is_not_finite() -> None:
    with pytest.raises(NonFiniteError, match="the value of index 1 is nan"):
        values.score(make([0, 1, 1], [np.nan, np.nan, np.inf]), 0.03, "first")
    with pytest.raises(NonFiniteError, match=r"the value of index 0 is 3.*e\+38"):
        values.score(make([9], [3e38]), 1.0, "first")


@given(st.lists(st.tuples(st.integers(1, 2**31 - 1), NUMBERS, st.integers(0, 999)), min_size=1), st.booleans())
@settings(max_examples=15, deadline=None)
def test_reading_gives_back_what_was_written(tmp_path_factory, rows: list[tuple[int, float, int]], labelled) -> None:
    path = tmp_path_factory.mktemp("values") / "values.parquet"
    known = make([f for f, _, _ in rows], [v for _, v, _ in rows])
    labels = np.array([label for _, _, label in rows]) if labelled else None
    value_files.write(path, known, labels, DOCUMENT)
    found = value_files.read(path, len(rows))
    assert equal(found.values, known)
    assert (found.labels is None) != labelled
    assert labels is None or np.array_equal(found.labels, labels)
    assert {key: found.document[key] for key in DOCUMENT} == DOCUMENT
    assert found.fingerprint() == values.fingerprint(known)
    again = path.with_name("again")
    value_files.write(again, found.values, found.labels, {key: DOCUMENT[key] for key in reversed(DOCUMENT)})
    assert again.read_bytes() == path.read_bytes()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    known = make([1, 2, 0, 4], [0.5, 0.25, 0.0, 1.5])
    value_files.write(tmp_path / "values.parquet", known, np.array([0, 1, 0, 1]), DOCUMENT)
    return tmp_path / "values.parquet"


def test_no_damaged_byte_gives_wrong_values(written: Path) -> None:
    data, good = written.read_bytes(), value_files.read(written, 4)
    for position in range(0, len(data), 19):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        written.write_bytes(damaged)
        try:
            found = value_files.read(written, 4)
        except KcdcacheError:
            continue
        assert found.document is None or (equal(found.values, good.values) and found.document == good.document)
        assert equal(found.values, good.values)


def with_document(table: pa.Table, text: bytes) -> pa.Table:
    return table.replace_schema_metadata({"kcdcache.values": text})


def newer(table: pa.Table) -> pa.Table:
    document = {**json.loads(table.schema.metadata[b"kcdcache.values"]), "format_version": 9}
    return with_document(table, json.dumps(document).encode())


@pytest.mark.parametrize(
    ("edit", "error", "text"),
    [
        (lambda table: table.set_column(2, "value", pa.array([9.0] * 4, pa.float32())), CorruptionError, "its digest"),
        (lambda table: table.take([1, 0, 2, 3]), CorruptionError, "does not match its digest"),
        (lambda table: table.append_column("extra", pa.array([1, 2, 3, 4])), CorruptionError, "look at 'extra'"),
        (lambda table: with_document(table, b"[]"), CorruptionError, r"metadata 'kcdcache\.values'"),
        (newer, MismatchError, "has format 9, this kcdcache reads 0"),
    ],
)
def test_what_was_edited_in_our_file_is_refused(written: Path, edit, error: type, text: str) -> None:
    table = pq.read_table(written)
    edited = edit(table)
    pq.write_table(edited.replace_schema_metadata(edited.schema.metadata or table.schema.metadata), written)
    with pytest.raises(error, match=text):
        value_files.read(written, 4)


def test_values_of_another_count_cut_short_or_missing_are_refused(written: Path) -> None:
    with pytest.raises(MismatchError, match="holds values of 4 samples, expected 5"):
        value_files.read(written, 5)
    with pytest.raises(MismatchError, match="holds 4 rows, expected at most 3"):
        value_files.read(written, 3)
    written.write_bytes(written.read_bytes()[:-20])
    with pytest.raises(CorruptionError, match=r"values\.parquet is not an undamaged parquet file"):
        value_files.read(written, 4)
    with pytest.raises(NotFoundError, match=r"no file at .*nothing\.parquet"):
        value_files.read(written.with_name("nothing.parquet"), 4)


def test_only_finite_values_matching_labels_and_whole_documents_are_written(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="need 'student' in their document"):
        value_files.write(tmp_path / "v", values.start(1), None, {"knowledge_id": "k", "epoch": 1})
    with pytest.raises(NonFiniteError, match="the value of index 1 is inf"):
        value_files.write(tmp_path / "v", make([1, 1], [0, np.inf]), None, DOCUMENT)
    with pytest.raises(MismatchError, match="3 labels for 2 values"):
        value_files.write(tmp_path / "v", values.start(2), np.arange(3), DOCUMENT)
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("kind", [pa.uint8(), pa.int16(), pa.int64(), pa.uint64(), pa.float64()])
def test_file_of_another_tool_is_accepted_in_any_order_and_type(tmp_path: Path, kind: pa.DataType) -> None:
    index, visits = pa.array([3, 0, 2], kind), pa.array([7, 1, 0], kind)
    path = foreign(tmp_path / "f", index=index, value=pa.array([0.5, 2.0, 8.0]), visits=visits, name=["a", "b", "c"])
    found = value_files.read(path, 5)
    assert equal(found.values, make([1, 0, 0, 7, 0], [2.0, 0, 0, 0.5, 0]))
    assert (found.document, found.labels) == (None, None)
    assert found.fingerprint() == values.fingerprint(found.values)
    short = value_files.read(foreign(tmp_path / "g", index=[1, 0], value=[3, 4], label=[7, 8]), 2)
    assert equal(short.values, make([1, 1], [4, 3]))
    assert short.labels.tolist() == [8, 7]


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"index": [0, 1, 0, 1], "value": [1.0] * 4}, MismatchError, "row 2: index 0 occurs again"),
        ({"index": [0, 5], "value": [1.0] * 2}, MismatchError, r"row 1: 'index' is 5, .*\[0, 5\)"),
        ({"index": [0.0, 0.5], "value": [1.0] * 2}, MismatchError, "row 1: 'index' is 0.5"),
        ({"index": [0, None], "value": [1.0] * 2}, MismatchError, "row 1: 'index' is empty"),
        ({"index": [0, 1], "value": [1.0, None]}, MismatchError, "row 1: 'value' is empty"),
        ({"index": ["a"], "value": [1.0]}, MismatchError, "column 'index' should hold numbers, found string"),
        ({"index": [0, 1], "value": [1.0, math.nan]}, NonFiniteError, "row 1: 'value' is nan"),
        ({"index": [0, 1], "value": [1.0, 1e300]}, NonFiniteError, r"row 1: 'value' is 1e\+300"),
        ({"index": [0], "value": [1.0], "visits": [-1]}, MismatchError, "row 0: 'visits' is -1"),
        ({"index": [0], "score": [1.0]}, MismatchError, "has no column 'value', .*found: index, score"),
    ],
)
def test_unusable_rows_of_another_tool_are_named(tmp_path: Path, columns: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        value_files.read(foreign(tmp_path / "f", **columns), 5)


def test_a_manifest_is_not_taken_for_values_not_even_without_its_record(tmp_path: Path) -> None:
    file = tmp_path / "m.parquet"
    manifest.write(file, manifest.full(manifest.Samples("k", 4)))
    with pytest.raises(MismatchError, match="is a manifest, expected values; give the run's values"):
        value_files.read(file, 4)
    pq.write_table(pq.read_table(file).replace_schema_metadata(), file)
    with pytest.raises(CorruptionError, match="has a manifest's columns, but lost its record"):
        value_files.read(file, 4)
