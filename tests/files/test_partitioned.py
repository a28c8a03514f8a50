"""Tables in parts: the same content and digest as one file, read by all that reads one, and refused where not whole."""

import glob
import json
import os
import shutil
from itertools import chain
from pathlib import Path

import duckdb
import lessons
import numpy as np
import polars
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from condensing import COUNT, condensed, labels, prepared, some_values, theirs
from hypothesis import given, settings
from hypothesis import strategies as st
from pupils import SCHOOL, command, executed, leftovers, school
from stores import content

from kcdcache.commands import verify
from kcdcache.condensation import manifest, value_files, values
from kcdcache.errors import (
    CorruptionError,
    LockedError,
    MismatchError,
    NotFoundError,
    UnfinishedError,
)
from kcdcache.files import atomic, parquet, records
from kcdcache.files.parquet import SEAL
from kcdcache.report import show


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("partitioned"))


@pytest.fixture
def place(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "place"))


# ---- the format


@given(st.integers(1, 10**12), st.integers(1, 10**9))
@settings(max_examples=100)
def test_parts_are_ranges_of_one_size_that_cover_all_samples_once(count, size):
    if -(-count // size) > 1000:
        size = -(-count // 1000)
    spans = parquet.spans(count, size)
    assert [span.first for span in spans] == [size * number for number in range(len(spans))]
    assert [span.stop for span in spans] == [*(span.first for span in spans[1:]), count]
    assert all(0 < span.stop - span.first <= size for span in spans)


@pytest.mark.parametrize(
    "read",
    [
        lambda pattern: ds.dataset(glob.glob(pattern)).to_table(),
        lambda pattern: duckdb.sql(f"SELECT * FROM '{pattern}'").to_arrow_table(),
        lambda pattern: polars.read_parquet(pattern).to_arrow(),
    ],
    ids=["pyarrow", "duckdb", "polars"],
)
@pytest.mark.parametrize("name", ["values", "before"])
def test_other_tools_read_one_file_and_parts_alike(place, name, read):
    wanted = pq.read_table(place / f"{name}.parquet").to_pylist()
    for pattern in (f"{name}.parquet", f"{name}.parts/part-*.parquet"):
        rows = read(str(place / pattern)).to_pylist()
        assert sorted(rows, key=lambda row: row["index"]) == wanted


def test_the_record_names_every_part_its_samples_and_the_digest_of_the_single_file(place):
    for one, many in (("values.parquet", "values.parts"), ("before.parquet", "before.parts")):
        record = json.loads((place / many / SEAL).read_text())
        assert record["document"]["digest"] == show.id_of(place / one) == show.id_of(place / many)
        spans = parquet.spans(COUNT, record["partition_rows"])
        assert sorted(file.name for file in (place / many).iterdir()) == [SEAL, *(span.name for span in spans)]
        for span, part in zip(spans, record["parts"], strict=True):
            file = place / many / span.name
            assert (part["bytes"], part["sha256"]) == (file.stat().st_size, atomic.sha256_file(file))
            index = pq.read_table(file)["index"].to_pylist()
            assert index == [i for i in range(span.first, span.stop) if "values" in many or i % 5]
            assert part["rows"] == len(index)


RANGES = ((0, 150), (0, 1), (31, 33), (32, 64), (149, 150), (60, 60), (10, 140), (150, 160))


@pytest.mark.parametrize("group", [None, 1, 7, 100])
def test_any_range_of_rows_is_cut_out_of_the_parts_or_row_groups_that_have_it(place, group):
    path = place / "values.parts"
    if group is not None:
        path = place / "one.parquet"
        pq.write_table(pa.table({"index": np.arange(150)}), path, row_group_size=group)
    with parquet.opened(path) as reader:
        for start, stop in RANGES:
            found = [table["index"].to_pylist() for table in reader.groups(["index"], start, stop)]
            assert [*chain(*found)] == list(range(150))[start:stop]
            assert all(found)


def test_parts_without_the_rows_stay_closed(place):
    file = place / "values.parts/part-00002-of-00005.parquet"
    file.write_bytes(bytes(file.stat().st_size))
    with parquet.opened(place / "values.parts") as reader:
        assert sum(map(len, reader.groups(["index"], 0, 64))) == 64
        with pytest.raises(CorruptionError, match=r"part-00002-of-00005\.parquet is not what was written: its SHA-256"):
            list(reader.groups(["index"], 0, 65))


# ---- everything that takes a file takes a folder


def test_inspect_verify_and_diff_tell_the_same_of_both_forms(place):
    for name in ("values", "before"):
        one, many = (show.inspect(place / f"{name}.{form}") for form in ("parquet", "parts"))
        assert {**one, "path": 0} == {**many, "path": 0}  # digests and all
        assert verify.verify(place / f"{name}.parts")["problems"] == 0
    found = executed("diff", {"a": place / "before.parquet", "b": place / "before.parts"})
    assert found["identical"]


def test_a_student_learns_from_a_set_in_parts_as_from_one_file(tmp_path):
    place = school(tmp_path / "school")
    chosen = lessons.condensed(place.knowledge, keep=0.6)
    given = SCHOOL | {"stages": 1, "epochs": 1}
    for name, rows in (("one.parquet", None), ("many.parquet", 50)):
        manifest.write(tmp_path / name, chosen, partition_rows=rows)
        out = tmp_path / name.removesuffix(".parquet")
        told = command(place, "train", out=out, manifest=tmp_path / name, **given)
        assert told["kept"] == 120
        wanted = {"manifest": tmp_path / name, "store": place.knowledge.path, "out": tmp_path / "export"}
        planned = executed("export", wanted, dry_run=True)
        assert planned["kept"] == 120
    assert (tmp_path / "many.parquet").is_dir()
    assert (tmp_path / "one/student.safetensors").read_bytes() == (tmp_path / "many/student.safetensors").read_bytes()


# ---- what is refused


def changed(folder, change):
    """Change a sealed record and seal it again."""
    record = records.read_sealed_object(folder / SEAL)
    change(record)
    (folder / SEAL).write_bytes(records.sealed_json(record))


@pytest.mark.parametrize("name", ["values", "before"])
@pytest.mark.parametrize(
    ("damage", "error", "text"),
    [
        (lambda f: (f / SEAL).unlink(), UnfinishedError, rf"has parts but no {SEAL}, which is written last"),
        (lambda f: (f / SEAL).write_text("{}"), CorruptionError, "should have the key"),
        (lambda f: sorted(f.glob("part*"))[1].unlink(), CorruptionError, r"part-00001.* is missing"),
        (lambda f: sorted(f.glob("part*"))[1].write_bytes(b"x"), CorruptionError, r"part-00001.* has \d+ bytes"),
        (lambda f: flip(sorted(f.glob("part*"))[1]), CorruptionError, r"part-00001.* is not what was written"),
        (lambda f: swap(f), CorruptionError, r"part-0000[01].* (has|is not what was written)"),
        (lambda f: changed(f, lambda r: r.update(format_version=9)), MismatchError, "has format 9.*upgrade kcdcache"),
        (lambda f: changed(f, lambda r: r.update(partition_rows=0)), CorruptionError, "partition_rows: .* found 0"),
        (lambda f: changed(f, lambda r: r["parts"].pop()), CorruptionError, "it lists . parts, expected"),
        (lambda f: changed(f, lambda r: r.update(samples="all")), CorruptionError, "samples: .* found 'all'"),
        (lambda f: changed(f, lambda r: r["parts"][0].update(rows=99)), CorruptionError, "part-00000.* has 99 rows"),
        (lambda f: changed(f, lambda r: r["parts"][0].pop("rows")), CorruptionError, "is damaged"),
    ],
    ids=range(12),
)  # fmt: skip
def test_a_folder_that_is_not_whole_is_refused(place, name, damage, error, text):
    folder = place / f"{name}.parts"
    damage(folder)
    for look in (
        lambda: show.inspect(folder),
        lambda: value_files.read(folder, COUNT) if name == "values" else manifest.read(folder),
        lambda: condensed(place, place / "out", {"values": "values.parts", "previous": "before.parts"}),
    ):
        with pytest.raises(error, match=text):
            look()
    assert not (place / "out").exists()


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def swap(folder):
    one, two = sorted(folder.glob("part*"))[:2]
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["document"].update(digest="0" * 64), lambda r: r.update(fingerprint="0" * 64),
        lambda r: r["parts"][4].update(rows=21),
    ],
    ids=["digest", "fingerprint", "rows"],
)  # fmt: skip
def test_a_record_that_tells_other_digests_or_rows_than_the_parts_have_is_refused(place, change):
    changed(place / "values.parts", change)
    with pytest.raises(CorruptionError, match=r"not match its digest|its record says|has 22 rows"):
        value_files.read(place / "values.parts", COUNT)


def test_a_single_part_is_no_values_and_no_manifest(place):
    for name in ("values", "before"):
        part = next(iter(sorted((place / f"{name}.parts").glob("part*"))))
        for look in (lambda p=part: show.inspect(p), lambda p=part: value_files.read(p, COUNT)):
            with pytest.raises(MismatchError, match=rf"one of several parts .*; give their folder, .*{name}.parts"):
                look()
    with pytest.raises(MismatchError, match="one of several parts of a set; give their folder"):
        value_files.read(place / "values.parts" / "part*.parquet", COUNT)


def test_a_folder_is_never_written_over_anything(place):
    found = manifest.read(place / "before.parquet")
    for name in ("before.parts", "values.parquet"):
        before = content(place / name)
        with pytest.raises(LockedError, match="exists already"):
            manifest.write(place / name, found, partition_rows=9)
        assert content(place / name) == before
    assert not leftovers(place)


# ---- condensing


def test_the_form_changes_the_files_and_not_the_set(place):
    case = {"values": "values.parts", "previous": "before.parts"}
    told = [condensed(place, place / f"{rows}", case | {"partition_rows": rows})["digest"] for rows in (7, 150)]
    assert len({*told, *(manifest.read(place / name).digest for name in ("7", "150"))}) == 1
    assert ((place / "7").is_dir(), (place / "150").is_file()) == (True, True)


def test_the_same_again_says_so_and_another_set_is_never_overwritten(place):
    case = {"values": "values.parts", "partition_rows": 40}
    assert condensed(place, place / "out", case)["already"] is False
    before = content(place / "out")
    for rows in (40, 200):
        assert condensed(place, place / "out", case | {"partition_rows": rows})["already"] is True
        with pytest.raises(LockedError, match="out holds another manifest; manifests are never overwritten"):
            condensed(place, place / "out", case | {"keep": 0.5, "partition_rows": rows})
    assert content(place / "out") == before
    assert not leftovers(place)


# ---- values of other tools


def test_files_that_leave_samples_out_are_unseen_there_in_every_way_to_read_them(place, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS", 10)
    (place / "few").mkdir()
    for number, index in enumerate((np.arange(60, 90, 2), np.array([3, 4, 40]), np.arange(120, 130))):
        pq.write_table(pa.table({"index": index, "value": index / 7}), place / f"few/{number}.parquet")
    expected = value_files.read(place / "few", COUNT)
    assert expected.values.visits.sum() == 28
    with value_files.streamed(place / "few/*.parquet", COUNT) as source:
        assert source.document is None
        blocks = list(source.blocks())
        assert [block.first for block in blocks] == sorted({block.first for block in blocks})
        found = values.Values(*(np.concatenate(columns) for columns in zip(
            *((block.values.visits, block.values.value) for block in blocks), strict=True)))  # fmt: skip
        assert np.array_equal(found.visits, expected.values.visits)
        assert np.array_equal(found.value, expected.values.value)
        assert source.fingerprint() == values.fingerprint(expected.values)


def test_overlapping_files_and_bad_rows_are_refused_streamed_and_held(place):
    theirs(place / "twice", some_values(), labels(), [80, 70])
    shutil.copy(place / "twice/9.parquet", place / "twice/7.parquet")
    with pytest.raises(MismatchError, match=r"twice holds 230 rows or more, expected at most 150"):
        condensed(place, place / "out", {"values": "twice"})
    with pytest.raises(MismatchError, match="two of the files begin with index 0"):
        streamed(place / "twice")
    pq.write_table(pa.table({"index": [5, 6], "value": [1.0, 2.0]}), place / "twice/7.parquet")
    with pytest.raises(MismatchError, match=r"9\.parquet has index 19, but another file begins with 5"):
        streamed(place / "twice")
    pq.write_table(pa.table({"index": [0, 150], "value": [1.0, 2.0]}), place / "bad.parquet")
    with pytest.raises(MismatchError, match=r"row 1: 'index' is 150, expected .* in \[0, 150\)"):
        streamed(place / "bad.parquet")
    with pytest.raises(NotFoundError, match="no parquet files at"):
        condensed(place, place / "out", {"values": "nothing/*.parquet"})


def streamed(path):
    with value_files.streamed(path, COUNT) as source:
        return list(source.blocks())


# ---- what the killed leave


def test_only_folders_of_the_dead_are_deleted(tmp_path):
    ours, dead = os.getpid(), 2**22 + 1  # larger than any process number
    for process in (ours, dead):
        (tmp_path / f"set.tmp-{process}-1").mkdir()
    with atomic.locked(tmp_path / f"set.tmp-{dead}-2" / atomic.LOCK):  # on another machine
        atomic.remove_orphans(tmp_path / "set")
        assert {path.name for path in tmp_path.iterdir()} == {f"set.tmp-{ours}-1", f"set.tmp-{dead}-2"}
    atomic.remove_orphans(tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == [f"set.tmp-{ours}-1"]
