"""Sets made by row groups are those made in memory; rules hold block by block."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from condensing import OPTIONS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import knowledge, make

from kcdcache import settings as kcdcache_settings
from kcdcache.commands import condense as condense_command
from kcdcache.condense import manifest, summary, value_files, values
from kcdcache.errors import CorruptionError, MismatchError, NonFiniteError
from kcdcache.files import parquet, records

COUNT = 90
DOCUMENT = {"knowledge_id": "k", "student": "s", "epoch": 1}


def some_values(seed=0, count=COUNT):
    random = np.random.default_rng(seed)
    visits = random.integers(0, 4, count).astype(np.int32)
    return values.Values(visits, np.where(visits > 0, random.integers(0, 20, count), 0).astype(np.float32))


def written(path, found, group=None):
    """Our values file, of row groups of so many rows."""
    value_files.write(path, found, np.arange(len(found.visits)) % 3, DOCUMENT)
    if group is not None:
        regroup(path, pq.read_table(path), group)
    return path


def regroup(path, table, rows):
    """Write a table of ours by row groups of so many rows."""
    with pq.ParquetWriter(path, table.schema.remove_metadata(), store_schema=False) as writer:
        writer.write_table(table.replace_schema_metadata(), row_group_size=rows)
        writer.add_key_value_metadata(table.schema.metadata)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("streamed")


def both(path, found, option, keep, previous=None, excluded=()):
    """(the bytes of the set made in memory, those of the set made by row groups of values )."""
    count, common = len(found.visits), {"stage": 2, "keep": keep, "previous": previous}
    samples = manifest.Samples("k", count, np.arange(count) % 3, 5, "d", np.array(excluded, np.int64))
    whole = summary.condense(found, option, samples, **common)
    path.with_name("m").unlink(missing_ok=True)
    path.with_name("s").unlink(missing_ok=True)
    with value_files.opened(path, count, held=0) as source:
        assert isinstance(source, value_files.OwnFile)
        draft = summary.plan(source, option, samples, **common).draft(source)
        draft.write(path.with_name("s"))
    manifest.write(path.with_name("m"), whole)
    assert draft.summary() == manifest.summary(whole)
    return path.with_name("m"), path.with_name("s")


@given(
    st.fixed_dictionaries(OPTIONS), st.integers(0, 99), st.integers(1, COUNT), st.integers(1, 40), st.booleans(),
    st.sets(st.integers(0, COUNT - 1), max_size=5),
)  # fmt: skip
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_row_groups_make_the_same_bytes_as_memory_under_all_settings(
    place, options, seed, group, size, second, excluded
):
    found, option = some_values(seed), kcdcache_settings.CondenseSettings(**options)
    path = written(place / "values.parquet", found, group)
    previous = manifest.full(manifest.Samples("k", COUNT)) if second else None
    one, two = both(path, found, option, size / COUNT, previous, excluded=sorted(excluded))
    assert one.read_bytes() == two.read_bytes()


def test_small_groups_of_the_set_hold_the_same_rows_and_digest(place, monkeypatch):
    found = some_values(3)
    path = written(place / "values.parquet", found, 7)
    monkeypatch.setattr(parquet, "ROWS", 5)
    one, two = both(path, found, kcdcache_settings.CondenseSettings(), 0.6)
    assert pq.ParquetFile(two).metadata.num_row_groups == 11
    assert manifest.read(one).digest == manifest.read(two).digest == manifest.read_head(two).digest


@pytest.mark.slow
def test_more_than_one_full_row_group_makes_the_same_bytes(place):
    found = some_values(4, 3 * 2**20)
    one, two = both(written(place / "values.parquet", found), found, kcdcache_settings.CondenseSettings(), 0.8)
    assert pq.ParquetFile(two).metadata.num_row_groups == 3
    assert one.read_bytes() == two.read_bytes()


def condensed(folder, held, dry_run=False, count=150):
    """What the command tells, and the bytes of its set, where files of more than `held` samples are streamed."""
    make(folder / "store")
    document = DOCUMENT | {"knowledge_id": knowledge().knowledge_id}
    value_files.write(folder / "values.parquet", some_values(1, 150), np.arange(150) % 2, document)
    out = folder / "m.parquet"
    command = {"values": folder / "values.parquet", "store": folder / "store", "keep": 0.5, "out": out}
    given = kcdcache_settings.make(kcdcache_settings.CondenseCommand, command)
    told = condense_command.run(given, dry_run=dry_run, held=held)
    return told, out.read_bytes() if out.exists() else b""


def test_the_command_makes_the_same_file_from_a_file_too_large_to_hold(tmp_path):
    (_, held), (_, streamed_) = condensed(tmp_path / "a", 150), condensed(tmp_path / "b", 149)
    assert held == streamed_ != b""


def test_a_dry_run_tells_memory_temporary_bytes_and_time(tmp_path):
    told, written_ = condensed(tmp_path, 0, dry_run=True)
    assert written_ == b""
    assert (told["temporary_bytes"], told["kept"]) == (round(75 * condense_command.BYTES_A_ROW), 75)
    given = {"values": tmp_path, "store": tmp_path, "keep": 0.5, "out": tmp_path}
    huge = condense_command.estimate(
        kcdcache_settings.make(kcdcache_settings.CondenseCommand, given | {"memory_gb": 16}), 10**9
    )
    assert 9 * 10**9 < huge["memory_bytes"] < 10**10
    assert huge["temporary_bytes"] > 10.5 * 0.5 * 10**9


def test_values_changed_while_they_are_condensed_are_refused(place):
    count = 50_000  # more than what is read ahead
    path = written(place / "values.parquet", some_values(5, count), 10_000)
    with value_files.opened(path, count, held=0) as source:
        samples = manifest.Samples("k", count, classes=3)
        plan = summary.plan(source, kcdcache_settings.CondenseSettings(), samples, stage=1, keep=0.5)
        other = written(place / "other.parquet", some_values(6, count), 10_000).read_bytes()
        with open(path, "r+b") as stream:  # not replaced, which an open file would not see, but overwritten
            stream.write(other)
        with pytest.raises(CorruptionError, match=r"values\.parquet"):
            plan.draft(source).summary()


@pytest.mark.parametrize(
    ("row", "visits", "value", "error", "text"),
    [(70, -1, 0, MismatchError, "row 70: 'visits' is -1"), (65, 1, math.nan, NonFiniteError, "row 65: 'value' is nan")],
)
def test_a_bad_row_of_a_late_row_group_is_named(place, row, visits, value, error, text):
    columns = {"index": np.arange(COUNT), "visits": np.ones(COUNT, np.int32), "value": np.ones(COUNT, np.float32)}
    columns["visits"][row], columns["value"][row] = visits, value
    content = DOCUMENT | {"format_version": 0, "count": COUNT}
    content["digest"] = parquet.digest(records.canonical_json(content), columns)
    table = pa.table(columns).replace_schema_metadata({value_files.METADATA_KEY: records.canonical_json(content)})
    regroup(place / "bad.parquet", table, 20)
    with pytest.raises(error, match=text), value_files.opened(place / "bad.parquet", COUNT, held=0):
        pass


# ---- rules, block by block


def valid():
    found = summary.condense(
        some_values(7), kcdcache_settings.CondenseSettings(), manifest.Samples("k", COUNT), stage=1, keep=0.6
    )
    return {name: column.copy() for name, column in found.columns().items()}


def check_blocks(columns, rows):
    checks = manifest.Checks(COUNT)
    for block in parquet.regrouped([columns], rows):
        checks.add(block)
    checks.end()


BREAKS = {
    "index": lambda c: c["index"].__setitem__(20, c["index"][19]),
    "order": lambda c: c["index"].__setitem__(slice(19, 21), c["index"][[20, 19]]),
    "range": lambda c: c["index"].__setitem__(-1, COUNT),
    "rank twice": lambda c: c["rank"].__setitem__(50, c["rank"][3]),
    "rank range": lambda c: c["rank"].__setitem__(50, -1),
    "partner twice": lambda c: c["partner"].__setitem__(np.flatnonzero(c["mixed"])[[0, -1]], lost(c)),
    "kept partner, later": lambda c: c["partner"].__setitem__(np.flatnonzero(c["mixed"])[0], c["index"][-1]),
    "kept partner, earlier": lambda c: c["partner"].__setitem__(np.flatnonzero(c["mixed"])[-1], c["index"][0]),
    "share": lambda c: c["epsilon"].__setitem__(5, 2),
    "weight": lambda c: c["weight"].__setitem__(53, 0),
    "visits": lambda c: c["visits"].__setitem__(53, -1),
}


def lost(columns):
    return int(np.setdiff1d(np.arange(COUNT), columns["index"])[0])


@pytest.mark.parametrize("rows", [1, 7, 20, 1000])
def test_valid_rows_pass_in_blocks_of_any_size(rows):
    check_blocks(valid(), rows)


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("name", BREAKS)
def test_what_breaks_a_rule_of_the_whole_breaks_it_in_blocks(name, rows):
    columns = valid()
    BREAKS[name](columns)
    with pytest.raises(MismatchError, match="expected"):
        check_blocks(columns, rows)
