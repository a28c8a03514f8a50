"""Several processes fill one store: any split, with kills, ends in the bytes that one process writes."""

import random
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
from commands import words
from killing import finished, succeeds
from pupils import leftovers, same_files
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
    assert "6 parts are left to the other shards" in log.read_text()
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


NO_SHARD = r"the environment has {'.*'}, which names no shard of 0 to N - 1 .*; give --shard I/N"


def slurm(number, count, least):
    return dict(
        zip([f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN")], (number, count, least), strict=True)
    )


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Shard(0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Shard(0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, Shard(2, 4)),
        (slurm("7", "3", "5"), Shard(2, 3)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Shard(1, 2)),
        ({"WORLD_SIZE": "4"}, Shard(0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "9"}, Shard(1, 2)),
        ({"RANK": "4", "WORLD_SIZE": "4"}, None),
        ({"RANK": "one", "WORLD_SIZE": "2"}, None),
        (slurm("8", "3", "4"), None),
    ],
)
def test_the_shard_is_this_processs_place_under_a_launcher(variables, expected):
    with nullcontext() if expected else pytest.raises(SettingsError, match=NO_SHARD):
        assert shard_of(variables) == expected


@pytest.mark.parametrize("text", ["", "1", "2/2", "-1/2", "0/0", "a/b", "0/2/3", "1/1234567"])
def test_a_shard_is_a_shard(text):
    with pytest.raises(SettingsError, match="--shard takes I/N with 0 <= I < N"):
        parse_shard(text)


def test_processes_of_a_launcher_share_a_store_without_being_told(start, place, tmp_path):
    path, given = tmp_path / "store", precompute(place, tmp_path / "store")
    logs = [tmp_path / f"log{rank}" for rank in range(2)]
    all_succeed([start(given, log, RANK=str(rank), WORLD_SIZE="2") for rank, log in enumerate(logs)], logs)
    assert all(f"shard {rank}/2, from RANK and WORLD_SIZE" in logs[rank].read_text() for rank in range(2))
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
