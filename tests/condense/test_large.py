"""Sets planned by DuckDB are those made in memory, to the byte, for every option; what it lacks is told."""

import shutil
from pathlib import Path

import pytest
from condensing import cases, condensed, content, prepared
from pupils import leftovers

FEW = {"memory_gb": 1e-6}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("large"))


@pytest.fixture
def place(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "place"))


@pytest.mark.parametrize("case", cases(24, seed=5), ids=str)
def test_duckdb_makes_the_bytes_that_memory_does(place, case):
    told = [condensed(place, place / name, case | more) for name, more in (("memory", {}), ("large", FEW))]
    assert told[0]["digest"] == told[1]["digest"]
    assert content(place / "memory") == content(place / "large")
    assert not leftovers(place)
