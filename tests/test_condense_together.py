"""Condensing by several real processes under torchrun (gloo): the bytes of one alone, also after one was killed."""

import dataclasses
import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from killing import nursery, succeeds
from pupils import leftovers
from spreading import cases, condensed, content, identify, labels, launched, prepared, some_values
from stores import knowledge

from kcdcache import values

CASES = 16


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


LARGE = 3_000_000
"""samples enough for a process to be at work when it is killed"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Values of many samples, in parts, for a store that is only an identity."""
    root = tmp_path_factory.mktemp("large")
    who = dataclasses.replace(knowledge(), data=dataclasses.replace(knowledge().data, count=LARGE))
    identify(root / "store", who)
    document = {"knowledge_id": who.knowledge_id, "student": "s", "epoch": 1}
    values.write(root / "values", some_values(1, LARGE), labels(LARGE), document, partition_rows=400_000)
    return root


def command(place, out):
    given = {"values": place / "values", "store": place / "store", "keep": 0.5, "out": out, "partition-rows": 500_000}
    return ["condense", *(f"--{key}={value}" for key, value in given.items())]


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_worker_killed_at_work_leaves_no_set_and_the_same_command_makes_the_same_bytes(large, tmp_path, victim):
    log, out = tmp_path / "log", tmp_path / "out"
    whole = large / "whole"
    if not whole.exists():
        with nursery() as start:
            succeeds(start, command(large, whole), log)
    process = launched(2, ["-m", "kcdcache", *command(large, out)], log)
    while not list(tmp_path.glob("out.tmp-*/set/part-*")):
        assert process.poll() is None, log.read_text()
    os.kill(sorted(children(process.pid))[victim], signal.SIGKILL)
    assert process.wait(120) != 0
    assert not out.exists()
    assert leftovers(tmp_path)
    again = launched(2, ["-m", "kcdcache", *command(large, out)], log)
    assert again.wait(120) == 0, log.read_text()
    assert content(out) == content(whole)
    assert not leftovers(tmp_path)


def children(parent):
    found = []
    for path in (entry for entry in os.scandir("/proc") if entry.name.isdecimal()):
        with suppress(OSError):  # it has ended
            if int(Path(path.path, "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.name))
    return found


def test_values_of_another_tool_and_one_result_are_told_by_the_first_process_alone(place, tmp_path):
    given = {"values": place / "theirs", "store": place / "store", "keep": 0.5, "out": tmp_path / "set"}
    words = ["-m", "kcdcache", "condense", *(f"--{key}={value}" for key, value in given.items()), "--json"]
    process = launched(2, words, tmp_path / "log")
    assert process.wait(120) == 0, (tmp_path / "log").read_text()
    told = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    assert len(told) == 1
    found = json.loads(told[0])
    assert (found["values_from"], found["shares"], found["kept"]) == ("another tool", 2, 75)
    assert found["digest"] == condensed(place, tmp_path / "alone", {"values": "theirs", "keep": 0.5})["digest"]
