"""Sets made by row groups are those made in memory, to the byte; values that change meanwhile are refused."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from condensing import COUNT, OPTIONS, labels, some_values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kcdcache.condensation import manifest, summary, value_files
from kcdcache.condensation.manifest import Samples
from kcdcache.errors import CorruptionError, MismatchError, NonFiniteError
from kcdcache.files import parquet, records
from kcdcache.settings import CondenseSettings

DOCUMENT = {"knowledge_id": "k", "student": "s", "epoch": 1}


def written(path, found, group):
    """Our values file, of row groups of so many rows."""
    value_files.write(path, found, labels(len(found.visits)), DOCUMENT)
    regroup(path, pq.read_table(path), group)
    return path


def regroup(path, table, rows):
    with pq.ParquetWriter(path, table.schema.remove_metadata(), store_schema=False) as writer:
        writer.write_table(table.replace_schema_metadata(), row_group_size=rows)
        writer.add_key_value_metadata(table.schema.metadata)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("drafts")


def both(path, found, option, keep, excluded=(), **more):
    """The set made in memory, and the one made by row groups, as files."""
    count, given = len(found.visits), {"stage": 2, "keep": keep, **more}
    samples = Samples("k", count, labels(count), 5, "d", np.array(excluded, np.int64))
    whole = summary.condense(found, option, samples, **given)
    for name in "ms":
        path.with_name(name).unlink(missing_ok=True)
    manifest.write(path.with_name("m"), whole)
    with value_files.opened(path, count, held=0) as source:
        assert isinstance(source, value_files.OwnFile)
        draft = summary.plan(source, option, samples, **given).draft(source)
        draft.write(path.with_name("s"))
    assert draft.summary() == manifest.summary(whole)
    return path.with_name("m"), path.with_name("s")


@given(
    st.fixed_dictionaries(OPTIONS), st.integers(0, 99), st.integers(1, COUNT), st.integers(1, 40), st.booleans(),
    st.sets(st.integers(0, COUNT - 1), max_size=5),
)  # fmt: skip
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_row_groups_make_the_same_bytes_as_memory_under_all_settings(
    place, options, seed, group, size, second, excluded
):
    found = some_values(seed)
    path = written(place / "values.parquet", found, group)
    previous = manifest.full(Samples("k", COUNT)) if second else None
    one, two = both(path, found, CondenseSettings(**options), size / COUNT, sorted(excluded), previous=previous)
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("group", "count"), [(7, COUNT), pytest.param(2**20, 3 * 2**20, marks=pytest.mark.slow)], ids=["small", "full"]
)
def test_sets_of_several_row_groups_have_the_same_bytes_too(place, monkeypatch, group, count):
    monkeypatch.setattr(parquet, "ROWS", min(group, 2**20))
    found = some_values(3, count)
    one, two = both(written(place / "values.parquet", found, group), found, CondenseSettings(), 0.6)
    assert pq.ParquetFile(two).metadata.num_row_groups == -(-(count * 6 // 10) // group)
    assert one.read_bytes() == two.read_bytes()
    assert manifest.read(two).digest == manifest.read_head(two).digest


def test_values_changed_while_they_are_condensed_are_refused(place):
    count = 50_000  # more than what is read ahead
    path = written(place / "values.parquet", some_values(5, count), 10_000)
    with value_files.opened(path, count, held=0) as source:
        plan = summary.plan(source, CondenseSettings(), Samples("k", count), stage=1, keep=0.5)
        other = written(place / "other.parquet", some_values(6, count), 10_000).read_bytes()
        with open(path, "r+b") as stream:  # not replaced, which an open file would not see, but overwritten
            stream.write(other)
        with pytest.raises(CorruptionError, match=r"values\.parquet"):
            plan.draft(source).summary()


@pytest.mark.parametrize(
    ("row", "visits", "value", "error", "text"),
    [
        (70, -1, 0, MismatchError, "row 70: 'visits' is -1, expected 0 or more"),
        (65, 1, math.nan, NonFiniteError, "row 65: 'value' is nan, expected a finite float32"),
        (33, 0, math.nan, NonFiniteError, "row 33: 'value' is nan"),
        (90, 1, math.inf, NonFiniteError, "row 90: 'value' is inf"),
    ],
)
@pytest.mark.parametrize("held", [0, COUNT])
def test_a_bad_row_of_our_own_file_is_named_however_it_is_read(place, held, row, visits, value, error, text):
    columns = {"index": np.arange(COUNT), "visits": np.ones(COUNT, np.int32), "value": np.ones(COUNT, np.float32)}
    columns["visits"][row], columns["value"][row] = visits, value
    content = DOCUMENT | {"format_version": 0, "count": COUNT}
    content["digest"] = parquet.digest(records.canonical_json(content), columns)
    table = pa.table(columns).replace_schema_metadata({value_files.METADATA_KEY: records.canonical_json(content)})
    regroup(place / "bad.parquet", table, 20)
    with pytest.raises(error, match=text), value_files.opened(place / "bad.parquet", COUNT, held=held):
        pass
