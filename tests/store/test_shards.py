"""Several processes fill one store: any split, with kills, ends in the bytes that one process writes."""

import random
import re
import shlex
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
from commands import words
from killing import finished, succeeds
from pupils import leftovers, lines, same_files
from stores import content, creating, knowledge, make, plan_of, small_parts, write_part

from kcdcache.errors import LockedError, MismatchError, NotFoundError, SettingsError, UnfinishedError
from kcdcache.store import check, reader, writer
from kcdcache.store.log import FOLDER, commit_path
from kcdcache.store.writer import Shard, parse_shard, shard_of

PLAN = small_parts(150, 2, 64, 32)
"""6 parts"""


@pytest.fixture(scope="module")
def place(here):
    """The common place, and in it a store of 12 views that one process made."""
    succeeds(here.start, precompute(here.root, here.root / "store"), here.root / "log")
    return here.root


def precompute(root, path, **changes):
    return words(root, "precompute", path, **{"views": 12, "fields": "logits", "threads": 1} | changes)


def started(start, place, path, total, **changes):
    """One process per shard, all running."""
    asked = [precompute(place, path, shard=f"{number}/{total}", **changes) for number in range(total)]
    logs = [path.parent / f"log{number}" for number in range(total)]
    return [start(*given) for given in zip(asked, logs, strict=True)], logs


def all_succeed(processes, logs):
    for process, log in zip(processes, logs, strict=True):
        assert process.ended(120)
        assert process.code == 0, log.read_text()


def is_whole(place, path):
    assert same_files(place / "store", path)
    assert not leftovers(path)
    assert not list(path.rglob("lock.*"))
    assert check.verify(path).problems == ()
    return True


@pytest.mark.parametrize("wanted", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_shards_run_again_in_any_split_make_the_same_bytes(start, place, tmp_path, wanted):
    draw, kills = random.Random(9), 0
    for turn in range(60):
        path = tmp_path / f"store{turn}"
        for total in draw.sample([3, 2, 3], 3):
            processes, logs = started(start, place, path, total)
            for process in draw.sample(processes, draw.randrange(1, total + 1)):
                if not process.ended(draw.uniform(0, 0.2)):
                    process.kill()
            for process, log in zip(processes, logs, strict=True):
                assert process.ended(120)
                assert process.code in (0, -signal.SIGKILL), log.read_text()
                kills += process.code != 0
        all_succeed(*started(start, place, path, 2))
        assert is_whole(place, path)
        if kills >= wanted:
            return
    pytest.fail(f"only {kills} kills hit")


def test_a_shard_that_dies_leaves_its_parts_to_one_process(start, place, tmp_path):
    given, log = precompute(place, tmp_path / "store", shard="1/2"), tmp_path / "log"
    assert finished(start, given, log) == 0
    assert "6 parts are left for the other shards" in log.read_text()
    with pytest.raises(UnfinishedError, match="no commit record"):
        reader.open(tmp_path / "store")
    succeeds(start, precompute(place, tmp_path / "store"), log)
    assert is_whole(place, tmp_path / "store")


def test_a_store_grows_in_shards(start, place, tmp_path):
    whole, parted, log = tmp_path / "whole", tmp_path / "parted", tmp_path / "log"
    for path, views in ((whole, 4), (whole, 12), (parted, 4)):
        succeeds(start, precompute(place, path, views=views), log)
    all_succeed(*started(start, place, parted, 3))
    assert same_files(whole, parted)


def in_shard(path, number, total):
    return creating(path, PLAN, shard=Shard(number, total))


def test_shards_hold_disjoint_parts_that_are_all(tmp_path):
    with in_shard(tmp_path / "s", 0, 2) as left, in_shard(tmp_path / "s", 1, 2) as right:
        assert sorted(left.pending() + right.pending()) == sorted(left.parts)
        assert not set(left.pending()) & set(right.pending())
        for part in left.pending():
            write_part(left, part)
        assert left.seal_last() == 3
        with pytest.raises(UnfinishedError, match=r"3 of 6 parts of .* are not written yet"):
            left.seal()
        for part in right.pending():
            write_part(right, part)
        assert right.seal_last() == left.seal_last() == 0
    assert content(tmp_path / "s") == content(make(tmp_path / "one", PLAN))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((0, 1), (0, 1), r"is being written by process \d+ on"),
        ((0, 2), (0, 2), r"shard 0/2 of .* is being written by process \d+ on"),
        ((0, 2), (0, 1), r"is being written by process \d+ on"),
        ((0, 1), (1, 2), r"is being written by process \d+ on"),
        ((0, 2), (1, 3), r"in another number of shards \(lock.0-2, by process \d+ on .*give the same number"),
    ],
)
def test_two_processes_never_hold_the_same_parts(tmp_path, first, second, message):
    with in_shard(tmp_path / "s", *first), pytest.raises(LockedError, match=message), in_shard(tmp_path / "s", *second):
        pass


def test_a_shard_of_another_teacher_is_refused_even_before_the_first_part(tmp_path):
    other = creating(tmp_path / "s", PLAN, knowledge(weights="bb"), shard=Shard(1, 2))
    with in_shard(tmp_path / "s", 0, 2), pytest.raises(MismatchError, match=r"differ in teacher\.weights"), other:
        pass


def test_leftovers_of_the_dead_are_removed_by_who_is_alone(tmp_path):
    with in_shard(tmp_path / "s", 0, 2) as left:
        dead = tmp_path / "s" / "logits" / "c.0.0.0.tmp-1-1"
        dead.write_bytes(b"half")
        with in_shard(tmp_path / "s", 1, 2):
            assert dead.exists()  # it might be the first one's
        assert left.pending()
    assert not dead.exists()


NO_PLACE = r"the environment has {'.*'}, which names no place of 0 to N - 1 of (srun|a SLURM array|torchrun); "
NO_LAUNCHER = "--shard auto takes the place that torchrun, srun or a SLURM array gives a process, and none did"


def torchrun(rank, world):
    return {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def array(number, count, least, **more):
    told = {"ID": number, "COUNT": count, "MIN": least} | more
    return {f"SLURM_ARRAY_TASK_{name}": value for name, value in told.items()}


BATCH = {"SLURM_JOB_ID": "9", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
"""of a batch script, outside any step of srun"""
SRUN = BATCH | {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
WHOLE = Shard(0, 1)


@pytest.mark.parametrize(
    ("variables", "unasked", "auto"),
    [
        ({}, WHOLE, NO_LAUNCHER),
        (BATCH, WHOLE, r"\(SLURM_PROCID without SLURM_STEP_ID is that of the batch script itself: put srun before"),
        (SRUN, WHOLE, Shard(1, 2)),
        (BATCH | {"SLURM_PROCID": "3", "SLURM_STEP_ID": "0"}, WHOLE, Shard(3, 4)),
        (array("7", "3", "5"), WHOLE, Shard(2, 3)),
        (BATCH | array("9", "3", "5", STEP="2", MAX="9"), WHOLE, Shard(2, 3)),
        (array("8", "3", "4"), WHOLE, NO_PLACE + "give --shard I/N"),
        (array("2", "3", "1", STEP="1", MAX="7"), WHOLE, NO_PLACE),  # an array of 1, 2 and 7
        (SRUN | array("0", "2", "0"), WHOLE, r"srun made this process 1 of 2, in task 0 of 2 of a SLURM array"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"} | array("1", "2", "0"), WHOLE, Shard(1, 2)),
        ({"RANK": "1"}, WHOLE, NO_LAUNCHER),
        ({"RANK": "1", "WORLD_SIZE": "4"}, WHOLE, NO_LAUNCHER),
        ({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "here"}, WHOLE, NO_LAUNCHER),
        (torchrun("2", "4"), Shard(2, 4), Shard(2, 4)),
        (torchrun("0", "1"), WHOLE, WHOLE),
        (torchrun("1", "2") | SRUN | array("0", "9", "0"), Shard(1, 2), Shard(1, 2)),
        (torchrun("4", "4"), NO_PLACE + "start the command with `torchrun", NO_PLACE),
        (torchrun("one", "2"), NO_PLACE, NO_PLACE),
    ],
)
def test_a_shard_is_taken_from_torchrun_or_where_it_is_asked_for(variables, unasked, auto):
    for text, expected in ((None, unasked), ("auto", auto)):
        refused = pytest.raises(SettingsError, match=expected) if isinstance(expected, str) else nullcontext()
        with refused:
            assert shard_of(text, variables) == expected


def test_what_is_not_used_is_said(caplog):
    caplog.set_level("INFO")
    for variables, said in (
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "n"},
         "works alone: RANK=0, WORLD_SIZE=2, MASTER_ADDR=n is set, but not LOCAL_RANK"),
        (array("1", "8", "0"), "this is number 1 of 8 of a SLURM array; --shard auto writes its share only"),
        (SRUN, "this is number 1 of 2 of srun; --shard auto"),
        (BATCH, ""), ({"RANK": "1"}, ""), (array("8", "3", "4"), ""),
    ):  # fmt: skip
        caplog.clear()
        assert shard_of(None, variables) == WHOLE
        assert said in caplog.text
        assert bool(said) == bool(caplog.text)


@pytest.mark.parametrize("variables", [BATCH, array("2", "3", "0"), {"RANK": "1"}, {"WORLD_SIZE": "2", "RANK": "1"}])
def test_a_command_that_a_launcher_only_happens_to_surround_writes_the_whole_store(start, place, tmp_path, variables):
    assert finished(start, precompute(place, tmp_path / "store"), tmp_path / "log", **variables) == 0
    assert is_whole(place, tmp_path / "store")


@pytest.mark.parametrize("variables", [{}, BATCH, {"RANK": "1"}])
def test_a_place_that_nobody_gave_is_refused_and_writes_nothing(start, place, tmp_path, variables):
    given, log = precompute(place, tmp_path / "store", shard="auto"), tmp_path / "log"
    assert finished(start, given, log, **variables) == 2
    assert f"error: {NO_LAUNCHER}" in log.read_text()
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("variables", [SRUN, array("4", "2", "3"), torchrun("1", "2"), None])
def test_the_last_line_of_a_shard_names_the_command_that_ends_the_store(start, place, tmp_path, variables):
    """In a task of srun, of an array, under torchrun, and as asked for."""
    path, log = tmp_path / "the store", tmp_path / "log"
    given = precompute(place, path, shard="1/2" if variables is None else "auto")
    assert finished(start, given, log, **variables or {}) == 0
    last = log.read_text().splitlines()[-1]
    assert last.startswith(
        "unsealed: 6 parts are left for the other shards, the last of which seals the store; one proc"
    )
    command = shlex.split(re.search(r"one process finishes it with `(.*)`$", last)[1])
    assert command[:2] == ["kcdcache", "precompute"]
    succeeds(start, command[1:], log)
    assert is_whole(place, path)


@pytest.mark.parametrize("name", ["run", "export", "report", "condense", "precompute"])
def test_work_for_one_process_is_refused_under_torchrun(start, place, tmp_path, name):
    """And, for requeries and imports, a shard is: it would do nothing."""
    given = {
        "run": ["run", "--out", tmp_path / "new"], "report": ["report", place],
        "export": ["export", *lines({"manifest": place, "store": place, "out": tmp_path / "new"})],
        "condense": ["condense", *lines({"values": place, "store": place, "keep": 0.5, "out": tmp_path / "new"})],
        "precompute": precompute(place, tmp_path / "new", manifest=place / "m"),
    }[name]  # fmt: skip
    log = tmp_path / "log"
    assert finished(start, given, log, **torchrun("0", "2")) == 2
    assert re.search(
        rf"error: {name}( --manifest)? is work for one process, and torchrun has started 2", log.read_text()
    )
    if name == "precompute":
        assert finished(start, [*given, "--shard", "0/2"], log) == 2
        assert "--shard does nothing beside --manifest, which is work for one process" in log.read_text()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "0/0", "a/b", "0/2/3", "1/1234567"])
def test_a_shard_is_a_shard(text):
    with pytest.raises(SettingsError, match="--shard takes I/N with 0 <= I < N"):
        parse_shard(text)


def test_processes_of_torchrun_share_a_store_without_being_told(start, place, tmp_path):
    path, given = tmp_path / "store", precompute(place, tmp_path / "store")
    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    all_succeed([start(given, log, **torchrun(str(rank), "2")) for rank, log in enumerate(logs)], logs)
    assert all(f"shard {rank}/2, from torchrun" in logs[rank].read_text() for rank in range(2))
    assert is_whole(place, path)


@pytest.fixture
def unsealed(place, tmp_path):
    path = Path(shutil.copytree(place / "store", tmp_path / "store"))
    assert writer.seal(path) is False
    commit_path(path, 0).unlink()
    with pytest.raises(UnfinishedError, match="is not finished"):
        reader.open(path)
    return path


def test_seal_ends_what_the_last_process_did_not(place, unsealed, tmp_path):
    assert writer.seal(unsealed) is True
    assert is_whole(place, unsealed)
    grown = make(tmp_path / "grown", plan_of(views=1))
    half = writer.grow(grown, knowledge(), views=2, shard=Shard(0, 2))
    with half as growing, writer.grow(grown, knowledge(), views=2, shard=Shard(1, 2)) as other:
        for part in growing.pending() + other.pending():
            write_part(growing, part)
        third = writer.grow(grown, knowledge(), views=2, shard=Shard(0, 3))
        with pytest.raises(LockedError, match="another number of shards"), third:
            pass
    assert reader.open(grown).views == 1
    assert writer.seal(grown) is True
    assert reader.open(grown).views == 2


def test_seal_refuses_a_store_with_parts_missing_and_names_what_is_no_store(unsealed):
    next((unsealed / FOLDER / "log/0").glob("v*.json")).unlink()
    with pytest.raises(UnfinishedError, match=r"1 of \d+ parts of .* are not written yet"):
        writer.seal(unsealed)
    assert not commit_path(unsealed, 0).exists()
    (unsealed / "_kcd/plan.0.json").unlink()  # killed between the identity and the plan
    with pytest.raises(NotFoundError, match=r"no file at .*plan\.0\.json"):
        writer.seal(unsealed)
    with pytest.raises(NotFoundError, match="no knowledge store at"):
        writer.seal(unsealed / "nothing")
