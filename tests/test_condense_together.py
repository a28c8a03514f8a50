"""Condensing by several real processes under torchrun (gloo): the bytes of one alone, also after one was killed."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from pupils import leftovers
from spreading import cases, condensed, content, launched, prepared

from kcdcache import manifest

CASES = 48


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = prepared(tmp_path_factory.mktemp("together"))
    (root / "cases.json").write_text(json.dumps(cases(CASES)))
    return root


@pytest.fixture(scope="module")
def alone(place):
    """Every case in one process and in memory, in the form it asks for."""
    for number, case in enumerate(cases(CASES)):
        condensed(place, place / "alone" / str(number), case | {"memory_gb": 8})
    return place / "alone"


@pytest.mark.parametrize(("world", "rows"), [(2, 11), (4, 2**20), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_any_number_of_processes_makes_the_bytes_of_one_in_memory(place, alone, world, rows):
    worker, folder = Path(__file__).with_name("spreading.py"), place / f"world{world}"
    process = launched(world, [worker, place, folder, rows], place / f"{world}.log")
    assert process.wait(300) == 0, (place / f"{world}.log").read_text()
    for number, case in enumerate(cases(CASES)):
        assert content(folder / str(number)) == content(alone / str(number)), case
    assert not leftovers(folder)


def words(place, out, **more):
    given = {"values": place / "values.parts", "store": place / "store", "keep": 0.5, "out": out, **more}
    return ["-m", "kcdcache", "condense", *(f"--{key.replace('_', '-')}={value}" for key, value in given.items())]
