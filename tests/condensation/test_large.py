"""Sets planned by DuckDB are those made in memory, to the byte, for every option; what it lacks is told."""

import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from condensing import COUNT, cases, condensed, prepared, some_values
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import finished, succeeds
from pupils import leftovers
from stores import content
from test_condense import OPTIONS

from kcdcache.condensation import large, manifest, summary, value_files, values
from kcdcache.condensation.manifest import Samples
from kcdcache.errors import CorruptionError, MismatchError, NonFiniteError, SettingsError
from kcdcache.settings import CondenseSettings

FEW = {"memory_gb": 1e-6}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("large"))


@pytest.fixture
def place(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "place"))


@pytest.mark.parametrize("number", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_the_command_makes_the_bytes_that_memory_does(place, number):
    for name, case in enumerate(cases(number, seed=number)):
        told = [condensed(place, place / f"{name}-{len(more)}", case | more) for more in ({}, FEW)]
        assert told[0] == told[1] | {"out": told[0]["out"]}, case
        assert content(place / f"{name}-0") == content(place / f"{name}-1"), case
    assert not leftovers(place)


@given(
    st.fixed_dictionaries(OPTIONS), st.sampled_from([0.1, 0.5, 0.8]), st.sets(st.integers(0, 29), max_size=5),
    st.sets(st.integers(0, 29), max_size=4), st.integers(1, 4),
)  # fmt: skip
@settings(max_examples=6)
def test_every_option_gives_the_rows_of_memory(tmp_path_factory, options, keep, skipped, gone, classes):
    option, excluded = CondenseSettings(**options), np.array(sorted(skipped), np.int64)
    source = value_files.Held(some_values(3, 30), np.arange(30) * 7 % classes)
    previous = manifest.full(Samples("k", 30, excluded=np.array(sorted(gone), np.int64)))
    path = tmp_path_factory.mktemp("options") / "before.parquet"
    manifest.write(path, previous)
    common = {"samples": Samples("k", 30, excluded=excluded), "stage": 2, "keep": keep}
    more = {"folder": path.parent / "spill", "memory_bytes": 1}
    more |= {"previous": path, "before": manifest.read_head(path)}
    try:
        held = summary.plan(source, option, previous=previous, **common)
    except SettingsError as error:
        with pytest.raises(SettingsError, match=str(error)[:20]), large.planned(source, option, **common, **more):
            pass
        return
    with large.planned(source, option, **common, **more) as plan:
        for block in source.blocks():
            found, expected = plan.columns(block), held.columns(block)
            assert found.keys() == expected.keys()
            assert all((found[name] == expected[name]).all() for name in found)
            assert [column.dtype for column in found.values()] == [column.dtype for column in expected.values()]
        assert plan.draft(source).summary() == held.draft(source).summary()


SPILLING = {"samples": Samples("k", 500_000), "stage": 1, "keep": 0.6, "memory_bytes": 1}
"""that it spills with 20 MB is seen where the disk is full"""


def many():
    random = np.random.default_rng(0)
    visits, value = random.integers(1, 5, 500_000), random.integers(0, 50, 500_000)
    found = values.Values(visits.astype(np.int32), value.astype(np.float32))
    return value_files.Held(found, random.integers(0, 10, 500_000))


def test_what_memory_does_not_hold_spills_and_the_rows_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(large, "LEAST_BYTES", 2 * 10**7)
    source, option = many(), CondenseSettings(stratify=True)
    held = summary.plan(source, option, Samples("k", 500_000), stage=1, keep=0.6)
    with large.planned(source, option, **SPILLING, folder=tmp_path / "spill") as plan:
        blocks = [(plan.columns(block), held.columns(block)) for block in source.blocks()]
    assert sum(len(found["index"]) for found, _ in blocks) == 300_000
    assert all((found[name] == expected[name]).all() for found, expected in blocks for name in found)


def test_too_little_memory_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(large, "LEAST_BYTES", 5 * 10**6)
    planned = large.planned(many(), CondenseSettings(stratify=True), **SPILLING, folder=tmp_path / "spill")
    with pytest.raises(SettingsError, match=r"condensing takes more than 0\.005 GB here; give more with --memory-gb"):
        planned.__enter__()


def test_ctrl_c_stops_it_while_duckdb_works(tmp_path):
    common = {"samples": Samples("k", COUNT), "stage": 1, "keep": 0.5, "folder": tmp_path / "spill", "memory_bytes": 1}
    planned = large.planned(value_files.Held(some_values()), CondenseSettings(), **common)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever ran in this process before
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt), planned as plan:
            work(plan.connection)
    finally:
        signal.signal(signal.SIGINT, before)


def work(connection):
    for _ in range(1000):  # one long query may be over before DuckDB looks for signals
        connection.execute("SELECT sum(range % 7) FROM range(20000000)")


FULL = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from kcdcache.errors import NoSpaceError
from test_large import SPILLING, CondenseSettings, Path, large, many
large.LEAST_BYTES = 2 * 10**7
try:
    with large.planned(many(), CondenseSettings(stratify=True), **SPILLING, folder=Path({{!r}})):
        print("planned")
except NoSpaceError as error:
    print(error)
"""


def test_a_full_disk_is_told(start, tmp_path):
    spill, log = str(tmp_path / "spill"), tmp_path / "log"
    assert finished(start, FULL.format(spill), log, limits={"file": 10**6}) == 0
    assert log.read_text().startswith(f"no space left for files of {spill}: free some")


def words(place, out):
    given = {"values": place / "values.parts", "store": place / "store", "keep": 0.5, "out": out}
    given |= {"memory-gb": 1e-6, "partition-rows": 70}
    return ["condense", *(f"--{key}={value}" for key, value in given.items())]


WITHOUT = """
import sys
sys.modules["duckdb"] = None
from pathlib import Path
from condensing import condensed
from kcdcache.cli.main import main
place = Path({!r})
print(condensed(place, place / "held", {{"values": "values.parts"}})["kept"])
main({!r})
"""


def test_without_duckdb_memory_serves_and_beyond_it_says_what_to_install(start, place):
    code = finished(start, WITHOUT.format(str(place), words(place, place / "out")), place / "log")
    said = (place / "log").read_text()
    assert (code, "90" in said.splitlines()) == (2, True), said
    assert 'needs the extra `large`: pip install "kcdcache[large]"; or give more memory' in said
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("case", "error", "text"),
    [
        ({"keep": 0.001}, SettingsError, r"keep 0\.001 of 150 samples keeps none"),
        ({"keep": 0.9, "previous": "before.parts", "candidates": "current"}, SettingsError, "but only 120 compete"),
        ({"previous": "other.parts"}, MismatchError, "made for knowledge kk, the store holds"),
        ({"values": "bad.parquet"}, NonFiniteError, "'value' is nan"),
        ({"values": "bad.parquet", "ranking": "random"}, NonFiniteError, "row 1: 'value' is nan"),
        ({"stratify": True, "values": "bad.parquet"}, SettingsError, "stratify needs the label of every sample"),
    ],
)
def test_it_refuses_what_memory_refuses_and_leaves_nothing(place, case, error, text):
    manifest.write(place / "other.parts", manifest.full(Samples("kk", COUNT)), partition_rows=40)
    pq.write_table(pa.table({"index": [0, 1], "value": [1.0, np.nan]}), place / "bad.parquet")
    with pytest.raises(error, match=text):
        condensed(place, place / "out", {"values": "values.parts", **FEW, **case})
    assert not (place / "out").exists()
    assert not leftovers(place)


def test_a_previous_set_that_was_changed_meanwhile_is_refused(place):
    source = value_files.Held(some_values())
    head = manifest.read_head(place / "before.parquet")
    more = {"samples": Samples("k", COUNT), "stage": 1, "keep": 0.1, "folder": place / "spill", "memory_bytes": 1}
    with (
        pytest.raises(CorruptionError, match="was changed meanwhile"),
        large.planned(
            source, CondenseSettings(candidates="current"), previous=place / "before.parquet",
            before=head._replace(digest="0"), **more,
        ),
    ):  # fmt: skip
        pass


@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_step_it_leaves_nothing_or_the_whole_set_and_runs_again(start, place, stride):
    """The set is a folder of parts: of more steps than a file."""
    succeeds(start, words(place, place / "whole"), place / "log")
    for step in range(1, 100, stride):
        out = place / f"out{step}"
        if finished(start, words(place, out), place / "log", KCDCACHE_CRASHPOINT=str(step)) == 0:
            break
        assert not out.exists() or content(out) == content(place / "whole")
        succeeds(start, words(place, out), place / "log")
        assert content(out) == content(place / "whole")
        assert not leftovers(place)
    assert step > 15
