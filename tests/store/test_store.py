from pathlib import Path

import numpy as np
import pytest
from damaging import put
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import CLASSES, form, grown, knowledge, make, small_parts, values

from kcdcache.errors import CorruptionError, SettingsError
from kcdcache.store import check, identity, reader


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 90), st.sampled_from(["float16", "float32", "top:3", "top:7"]), st.sampled_from(["none", "zstd"]))
def test_what_is_written_is_read_whatever_the_size(tmp_path_factory, count, text, compression):
    plan = small_parts(count, 2, 32, 8, text, compression)
    opened = reader.open(make(tmp_path_factory.mktemp("any") / "store", plan))
    for view in range(2):
        expected = plan.encodings["logits"].encode(values("logits", view, count))
        found = opened.load(view, np.arange(count), ["logits"])
        assert all(found[name].tobytes() == rows.tobytes() for name, rows in expected.items())
        assert {name: rows.dtype for name, rows in found.items()} == {n: r.dtype for n, r in expected.items()}
    np.testing.assert_array_equal(opened.labels, np.arange(count) % CLASSES)
    np.testing.assert_array_equal(opened.sample_digest, np.arange(count, dtype=np.uint64) ** 3)


def test_an_open_store_tells_what_it_holds(sealed):
    opened = reader.open(sealed)
    assert (opened.count, opened.views, opened.path) == (150, 2, sealed)
    assert opened.fields == {"logits": form()}
    assert opened.knowledge == identity.read_store_identity(sealed)
    assert opened.knowledge_id == knowledge().knowledge_id
    assert opened.plan.layout_id == small_parts(150, 2, 64, 32).layout_id
    assert opened.row_bytes(["logits"]) == 2 * CLASSES + 4
    assert opened.measurements(1) == {"samples": 150, "correct": 6}


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_wanted_rows_come_in_order_and_only_their_chunks_are_read(sealed, threads):
    opened = reader.open(sealed)
    rows = np.array([0, 5, 31, 33, 149])
    found = opened.load(1, rows, ["logits"], threads=threads)
    expected = form().encode(values("logits", 1))
    assert all(np.array_equal(found[name], expected[name][rows]) for name in expected)
    assert opened.rows_read == 5
    assert opened.bytes_read == 3 * (32 * (2 * CLASSES + 4) + 8) == opened.chunk_bytes(rows, ["logits"])
    assert opened.load(0, rows[:0], ["logits"], threads=threads)["logits"].shape == (0, CLASSES)
    assert opened.bytes_read == 3 * (32 * (2 * CLASSES + 4) + 8)


def test_decoded_values_come_in_any_order_with_duplicates(sealed):
    index = np.array([149, 3, 3, 77])
    found = reader.open(sealed).read("logits", 0, index)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, values("logits", 0).numpy()[index], atol=0.02)


def test_the_caller_may_bring_the_memory(sealed, tmp_path):
    def allocate(shape, dtype):
        return np.memmap(tmp_path / f"{dtype}", dtype=dtype, mode="w+", shape=shape)

    found = reader.open(sealed).load(0, np.arange(10, 20), ["logits"], allocate=allocate)
    assert isinstance(found["logits"], np.memmap)
    np.testing.assert_array_equal(found["logits"], form().encode(values("logits", 0))["logits"][10:20])


@pytest.mark.parametrize(
    ("view", "rows", "field", "message"),
    [
        (2, [1], "logits", r"no view 2 in .*; it holds views 0\.\.1"),
        (0, [150], "logits", r"rows should increase strictly within 0\.\.149"),
        (0, [-1], "logits", "rows should increase strictly"),
        (0, [4, 4], "logits", "rows should increase strictly"),
        (0, [1], "penultimate", "no field 'penultimate' in .*; it holds logits"),
    ],
)
def test_what_a_store_does_not_hold_is_refused(sealed, view, rows, field, message):
    with pytest.raises(SettingsError, match=message):
        reader.open(sealed).load(view, np.array(rows), [field])


RECORDS = {
    "_kcd/identity.json": "was changed: its content does not match its knowledge_id",
    "_kcd/plan.0.json": "plan.0.json is not the file that commit.0.json sealed",
    "_kcd/log/0/v00001-p00002.json": "v00001-p00002.json is not the file that commit.0.json sealed",
    "_kcd/commit.0.json": "was changed: its content does not match its digest",
}
"""record -> what is said of it if edited"""


def test_edited_and_lost_records_are_damage(damaged):
    for file, said in RECORDS.items():
        whole = (damaged / file).read_bytes()
        put(damaged / file, whole.replace(b"aa", b"ab", 1) if b"aa" in whole else whole.replace(b"2", b"1", 1))
        with pytest.raises(CorruptionError, match=said):
            reader.open(damaged)
        assert any(Path(file).name in problem for problem in check.verify(damaged, share=0).problems)
        put(damaged / file, whole)
    grown(damaged, views=3)
    for file in (*RECORDS, "zarr.json", "logits/zarr.json"):
        whole = (damaged / file).read_bytes()
        put(damaged / file, None)
        with pytest.raises(
            CorruptionError, match=rf"no file at .*{file}|{file} is missing|holds commit.1.json but not"
        ):
            reader.open(damaged)
        put(damaged / file, whole)
    assert reader.open(damaged).views == 3
