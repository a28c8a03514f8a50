"""Processes at the same time: condensers racing for one file, readers while others write, kills under their eyes."""

import fcntl
import json
import shutil
import threading
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from commands import words
from killing import finished, succeeds
from pupils import leftovers

from kcdcache.condensation import manifest, value_files
from kcdcache.errors import LockedError, NotFoundError, UnfinishedError
from kcdcache.report import show
from kcdcache.store import identity, reader

RACERS = 6
WORK = [
    *(f"stages/{stage}/manifest.parquet" for stage in (0, 3)),
    "values.parquet",
    "files.json",
    "student.safetensors",
]
TRAIN = {"student": "lessons:TinyNet", "epochs": 6, "stages": 3, "batch_size": 32, "mix_target": "linear_prob"}


@pytest.fixture(scope="module")
def place(here):
    """The common place, and in it a run of a tiny student."""
    succeeds(here.start, train(here.root, here.root / "run"), here.root / "log")
    return here.root


def precompute(root, path):
    return words(root, "precompute", path, views=8)


def train(root, path):
    return words(root, "train", path, **TRAIN)


def condense(root, path, keep=0.5):
    return words(root, "condense", path, values=root / "run/values.parquet", keep=keep)


# ---- several writers of one file


RACER = "import fcntl; from kcdcache.cli.main import main; fcntl.flock(open({!r}), fcntl.LOCK_SH); main({!r})"


def fired(start, commands, log):
    """Exit codes of commands that are let go at the same moment."""
    with open(f"{log}.gate", "w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        texts = [RACER.format(gate.name, list(map(str, words))) for words in commands]
        racers = [start(text, f"{log}{number}") for number, text in enumerate(texts)]
    assert all(racer.ended(60) for racer in racers)
    return [racer.code for racer in racers]


@pytest.fixture(scope="module")
def alone(place, start):
    """A function: keep -> the bytes of the set that one undisturbed condenser makes."""

    @cache
    def made(keep):
        succeeds(start, condense(place, place / f"alone {keep}.parquet", keep), place / "log")
        return (place / f"alone {keep}.parquet").read_bytes()

    return made


def test_of_condensers_racing_for_one_file_exactly_one_wins(place, alone, start, tmp_path):
    for race, racers in enumerate((2, RACERS)):
        keeps, out = [round(0.3 + 0.05 * number, 2) for number in range(racers)], tmp_path / f"{race}.parquet"
        codes = fired(start, [condense(place, out, keep) for keep in keeps], tmp_path / f"{race}.racer")
        assert sorted(codes) == [0] + [LockedError.exit_code] * (racers - 1)
        assert out.read_bytes() == alone(keeps[codes.index(0)])
        told = [(tmp_path / f"{race}.racer{number}").read_text() for number in range(racers)]
        assert sum("holds another manifest; manifests are never overwritten" in text for text in told) == racers - 1
    assert not leftovers(tmp_path)


# ---- a reader during the writing


class Looking(threading.Thread):
    """Looks again and again until it is told to stop; keeps everything different that it saw, in order."""

    def __init__(self, look):
        super().__init__()
        self.look, self.seen, self.looks, self.unexpected = look, [], 0, None
        self._over = threading.Event()

    def run(self):
        while not self._over.is_set():
            try:
                found = self.look()
            except (NotFoundError, UnfinishedError) as error:
                found = type(error).__name__
            except BaseException as error:  # told by the test's own thread
                self.unexpected = error
                return
            self.looks += 1
            if not self.seen or self.seen[-1] != found:
                self.seen.append(found)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *reason):
        self._over.set()
        self.join()
        if self.unexpected is not None:
            raise self.unexpected

    def until(self, final):
        while self.seen[-1:] != [final] and self.is_alive():
            pass


def watched(start, words, log, look, final):
    """What a reader sees while a command runs to its end, until it has seen the final state."""
    with Looking(look) as looking:
        succeeds(start, words, log)
        looking.until(final)
    return looking.seen


def look_at_run(path):
    """Return what stands in a run: its manifests, the epoch of its values, what `inspect` tells."""
    if not (path / "run.json").exists():  # a folder in which only the lock lies is nothing yet
        raise NotFoundError
    told = show.inspect(path)
    sets = [manifest.read(path / f"stages/{stage['stage']}/manifest.parquet").digest for stage in told["stages"]]
    assert sets[: len(told["stages"])] == [stage["digest"] for stage in told["stages"]]
    if not (path / "values.parquet").exists():
        return told["finished"], told["epochs_done"], tuple(sets), None
    found = value_files.read(path / "values.parquet", 200)
    values = found.document["epoch"], int(found.values.visits.sum()), found.values.value.tobytes()
    return told["finished"], told["epochs_done"], tuple(sets), values


def test_a_reader_of_a_run_that_is_trained_sees_whole_states_only(place, start, tmp_path):
    final = look_at_run(place / "run")
    run, log = tmp_path / "run", tmp_path / "log"
    seen = watched(start, train(place, run), log, lambda: look_at_run(run), final)
    states = [state for state in seen if isinstance(state, tuple)]
    assert len(states) >= 3
    for before, after in pairwise(states):
        assert before[1] <= after[1]
        assert after[2][: len(before[2])] == before[2]
    assert all(state[2] == final[2][: len(state[2])] for state in states)
    rows = [json.loads(line) for line in (place / "run/metrics.jsonl").read_bytes().splitlines()]
    visits = {0: 200} | {row["epoch"] + 1: row["samples_so_far"] for row in rows}
    assert all(state[3] is None or state[3][1] == visits[state[3][0]] for state in states)


def look_at_store(path):
    if not (path / identity.IDENTITY_FILE).exists():
        raise NotFoundError
    told = show.inspect(path)
    try:
        opened = reader.open(path)
    except UnfinishedError as error:
        return told["parts"]["done"] if "run the same" in str(error) and not told["sealed"] else str(error)
    rows = opened.load(opened.views - 1, np.arange(opened.count), ("logits",))
    return "sealed", {name: array.tobytes() for name, array in rows.items()}


def test_a_reader_of_a_store_that_is_written_sees_none_or_all_of_it(place, start, tmp_path):
    log, whole, path = tmp_path / "log", tmp_path / "whole", tmp_path / "store"
    succeeds(start, precompute(place, whole), log)
    seen = watched(start, precompute(place, path), log, lambda: look_at_store(path), look_at_store(whole))
    assert {state for state in seen if isinstance(state, str)} <= {"NotFoundError", "UnfinishedError"}  # no plan yet
    counts = [state for state in seen if isinstance(state, int)]
    assert counts == sorted(counts) != []
    assert [state for state in seen if isinstance(state, tuple)] == [look_at_store(whole)]


# ---- killed while somebody looks


def test_condense_killed_at_any_step_leaves_nothing_or_the_whole_set(place, alone, start, tmp_path):
    whole, steps = alone(0.5), 0
    digest = manifest.read(place / "alone 0.5.parquet").digest
    for point in range(1, 100):
        folder = tmp_path / str(point)
        out = folder / "set.parquet"
        folder.mkdir()
        with Looking(lambda path=out: (manifest.read(path).digest, show.inspect(path)["kept"])) as looking:
            code = finished(start, condense(place, out), tmp_path / "log", KCDCACHE_CRASHPOINT=str(point))
            stands = out.exists()
            succeeds(start, condense(place, out), tmp_path / "log")
            looking.until((digest, 100))
        assert looking.seen in (["NotFoundError", (digest, 100)], [(digest, 100)])
        assert out.read_bytes() == whole
        assert not leftovers(folder)
        if code == 0:
            break
        steps += stands
    assert (point, steps) == (6, 2)  # of its five steps the last two come after the name is there


# ---- a run killed between a file and its record


@pytest.mark.parametrize("point", [15, *(pytest.param(n, marks=pytest.mark.slow) for n in (9, 13, 14, 16, 19))])
def test_a_run_killed_around_a_files_record_resumes_to_the_same_bytes(place, start, tmp_path, point):
    """At steps around the first manifest of a run: announced, written, recorded."""
    run = tmp_path / "run"
    assert finished(start, train(place, run), tmp_path / "log", KCDCACHE_CRASHPOINT=str(point)) != 0
    pending = json.loads((run / "files.json").read_bytes())["pending"] if (run / "files.json").exists() else []
    there = {name for name in pending if (run / name).exists()}
    assert ("stages/0/manifest.parquet" in there) == (14 <= point <= 18)
    assert all(manifest.read(run / name).digest == manifest.read(place / "run" / name).digest for name in there)
    if point == 15:  # another file in the place of one whose record was cut off is made again
        shutil.copy(place / "run/stages/1/manifest.parquet", run / "stages/0/manifest.parquet")
    succeeds(start, train(place, run), tmp_path / "log")
    for name in WORK:
        assert (run / name).read_bytes() == (place / "run" / name).read_bytes()
    assert not leftovers(run)
