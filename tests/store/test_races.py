"""Processes at the same time: condensers racing for one file, readers while others write, kills under their eyes."""

import json
import os
import shutil
import subprocess
import sys
import threading
from itertools import pairwise

import numpy as np
import pytest
from killing import ROOT, environment, finished, nursery, succeeds
from pupils import SPEC, digits, leftovers, lines, saved_teacher

from kcdcache.condense import manifest, value_files
from kcdcache.errors import LockedError, NotFoundError, UnfinishedError
from kcdcache.report import show
from kcdcache.store import identity, reader

STORE = {"augment": "crop", "padding": 2, "views": 8, "batch_size": 64, "min_accuracy": 0}
TRAIN = {"student": "lessons:TinyNet", "epochs": 6, "stages": 3, "batch_size": 32, "keep": 0.6, "threads": 1}
RACERS = 8


@pytest.fixture(scope="module")
def start():
    with nursery() as starting:
        yield starting


@pytest.fixture(scope="module")
def place(tmp_path_factory, start):
    """A teacher, its store, and a run with values, made by commands that nobody disturbed."""
    root = tmp_path_factory.mktemp("place")
    saved_teacher(root / "teacher", digits(200, 60))
    succeeds(start, precompute(root, root / "store"), root / "log")
    succeeds(start, train(root, root / "run"), root / "log")
    return root


def precompute(root, path):
    return ["precompute", *lines({"data": SPEC, "teacher": root / "teacher", "store": path} | STORE)]


def train(root, path):
    return ["train", *lines({"data": SPEC, "store": root / "store", "out": path} | TRAIN)]


def condense(root, path, keep=0.5):
    given = {"values": root / "run/values.parquet", "store": root / "store", "keep": keep, "out": path}
    return ["condense", *lines(given)]


# ---- several writers of one file


VOLLEY = """
import json, os, sys
from kcdcache import cli, condenser, steps
for line in sys.stdin:
    gate, release = os.pipe()
    children = []
    for number, words in enumerate(json.loads(line)["commands"]):
        child = os.fork()
        if child == 0:
            os.close(release)
            log = os.open(json.loads(line)["log"] + str(number), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            os.read(gate, 1)
            code = 1
            try:
                cli.main(words)
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    os.close(gate)
    os.close(release)  # the shot: all of them read its end
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""
"""a process that forks one child per command, lets all of them go at once, and tells their exit codes"""


@pytest.fixture(scope="module")
def volley():
    """A function that runs commands at the same moment: (commands, log) -> their exit codes."""
    shooter = subprocess.Popen(
        [sys.executable, "-c", VOLLEY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")])),
    )

    def fire(commands, log):
        shooter.stdin.write(json.dumps({"commands": commands, "log": str(log)}) + "\n")
        shooter.stdin.flush()
        return json.loads(shooter.stdout.readline())

    yield fire
    shooter.stdin.close()
    assert shooter.wait(60) == 0
    shooter.stdout.close()


@pytest.mark.parametrize("racers", [2, RACERS])
def test_of_condensers_racing_for_one_file_exactly_one_wins(place, volley, start, tmp_path, racers):
    keeps = [round(0.3 + 0.05 * number, 2) for number in range(racers)]
    alone = {}
    for keep in keeps:
        succeeds(start, condense(place, tmp_path / f"alone {keep}.parquet", keep), tmp_path / "log")
        alone[keep] = (tmp_path / f"alone {keep}.parquet").read_bytes()
    for race in range(3):
        out = tmp_path / f"{race}.parquet"
        codes = volley([condense(place, out, keep) for keep in keeps], tmp_path / "racer")
        assert sorted(codes) == [0] + [LockedError.exit_code] * (racers - 1)
        winner = keeps[codes.index(0)]
        assert out.read_bytes() == alone[winner]
        for number in range(racers):
            if codes[number]:
                told = (tmp_path / f"racer{number}").read_text()
                assert "holds another manifest; manifests are never overwritten" in told
    assert not leftovers(tmp_path)


def test_condensers_racing_to_the_same_set_all_succeed(place, volley, tmp_path):
    for race in range(3):
        out = tmp_path / f"{race}.parquet"
        assert volley([condense(place, out)] * RACERS, tmp_path / "racer") == [0] * RACERS
        told = [(tmp_path / f"racer{number}").read_text() for number in range(RACERS)]
        assert len({text.splitlines()[0] for text in told}) <= 2  # the one that wrote it, and those who found it there
        assert len(manifest.read(out)) == 100
    assert not leftovers(tmp_path)


def test_of_trainings_racing_for_one_folder_exactly_one_goes_on(place, volley, tmp_path):
    codes = volley([train(place, tmp_path / "run")] * 4, tmp_path / "racer")
    # who comes when the winner has ended finds a finished run
    assert codes.count(0) >= 1
    assert set(codes) <= {0, LockedError.exit_code}
    for name in ("values.parquet", "files.json", "stages/3/manifest.parquet", "student.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (place / "run" / name).read_bytes()


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


def test_a_manifest_appears_whole(place, start, tmp_path):
    succeeds(start, condense(place, tmp_path / "alone.parquet"), tmp_path / "log")
    whole = manifest.read(tmp_path / "alone.parquet").digest
    for turn in range(4):
        out = tmp_path / f"{turn}.parquet"
        with Looking(lambda path=out: (manifest.read(path).digest, show.inspect(path)["kept"])) as looking:
            succeeds(start, condense(place, out), tmp_path / "log")
            while len(looking.seen) < 2 and looking.is_alive():
                pass
        assert looking.seen == ["NotFoundError", (whole, 100)]


def look_at_run(path):
    """Return what stands in a run: its manifests, the epoch of its values, what `inspect` tells."""
    if not (path / "run.json").exists():  # a folder in which only the lock lies is nothing yet
        raise NotFoundError
    told = show.inspect(path)
    sets = [manifest.read(path / f"stages/{stage['stage']}/manifest.parquet").digest for stage in told["stages"]]
    assert sets[: len(told["stages"])] == [stage["digest"] for stage in told["stages"]]
    found = value_files.read(path / "values.parquet", 200) if (path / "values.parquet").exists() else None
    return told["finished"], told["epochs_done"], tuple(sets), found and (found.document["epoch"], total(found))


def total(found):
    return int(found.values.visits.sum()), float(found.values.value.astype(np.float64).sum())


def test_a_reader_of_a_run_that_is_trained_sees_whole_states_only(place, start, tmp_path):
    final = look_at_run(place / "run")
    with Looking(lambda: look_at_run(tmp_path / "run")) as looking:
        succeeds(start, train(place, tmp_path / "run"), tmp_path / "log")
        while looking.seen[-1:] != [final] and looking.is_alive():
            pass
    states = [state for state in looking.seen if isinstance(state, tuple)]
    assert len(states) >= 3
    for before, after in pairwise(states):
        assert before[1] <= after[1]
        assert after[2][: len(before[2])] == before[2]
    assert all(state[2] == final[2][: len(state[2])] for state in states)
    ends = {0: 200, **epochs_of(place / "run")}
    assert all(state[3] is None or state[3][1][0] == ends[state[3][0]] for state in states)


def epochs_of(run):
    """Return end of a stage -> visits in all until then."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    return {row["epoch"] + 1: row["samples_so_far"] for row in rows}


def look_at_store(path):
    if not (path / identity.IDENTITY_FILE).exists():
        raise NotFoundError
    told = show.inspect(path)
    if not told["sealed"]:
        with pytest.raises(UnfinishedError, match="run the same"):
            raise_if_unsealed(path)
        return told["parts"]["done"]
    opened = reader.open(path)
    rows = opened.load(opened.views - 1, np.arange(opened.count), ("logits",))
    return "sealed", {name: array.tobytes() for name, array in rows.items()}


def raise_if_unsealed(path):
    """It may have been sealed since it was inspected."""
    reader.open(path)
    raise UnfinishedError("run the same")


def test_a_reader_of_a_store_that_is_written_sees_none_or_all_of_it(place, start, tmp_path):
    final = look_at_store(place / "store")
    with Looking(lambda: look_at_store(tmp_path / "store")) as looking:
        succeeds(start, precompute(place, tmp_path / "store"), tmp_path / "log")
        while looking.seen[-1:] != [final] and looking.is_alive():
            pass
    counts = [state for state in looking.seen if isinstance(state, int)]
    assert counts == sorted(counts)
    assert counts
    assert [state for state in looking.seen if isinstance(state, tuple)] == [final]


# ---- killed while somebody looks


def test_condense_killed_at_any_step_leaves_nothing_or_the_whole_set(place, start, tmp_path):
    succeeds(start, condense(place, tmp_path / "alone.parquet"), tmp_path / "log")
    whole = (tmp_path / "alone.parquet").read_bytes()
    digest = manifest.read(tmp_path / "alone.parquet").digest
    steps = 0
    for point in range(1, 100):
        folder = tmp_path / str(point)
        out = folder / "set.parquet"
        folder.mkdir()
        with Looking(lambda path=out: manifest.read(path).digest) as looking:
            code = finished(start, condense(place, out), tmp_path / "log", KCDCACHE_CRASHPOINT=str(point))
            stands = out.exists()
            succeeds(start, condense(place, out), tmp_path / "log")
            while looking.seen[-1:] != [digest] and looking.is_alive():
                pass
        assert set(looking.seen) <= {"NotFoundError", digest}
        assert out.read_bytes() == whole
        assert not leftovers(folder)
        if code == 0:
            break
        steps += stands
    assert (point, steps) == (6, 2)  # of its five steps the last two come after the name is there


def test_another_set_is_not_taken_for_the_one_a_kill_left(place, start, tmp_path):
    out = tmp_path / "set.parquet"
    for point in (3, 5):
        finished(start, condense(place, out, 0.4), tmp_path / "log", KCDCACHE_CRASHPOINT=str(point))
    assert manifest.read(out).keep == 0.4
    assert finished(start, condense(place, out, 0.5), tmp_path / "log") == LockedError.exit_code
    assert manifest.read(out).keep == 0.4


# ---- a run killed between a file and its record


def state_of(run):
    """Return the announced files of a run that lie there without a record."""
    file = run / "files.json"
    pending = json.loads(file.read_bytes())["pending"] if file.exists() else []
    return {name for name in pending if (run / name).exists()}


POINTS = (9, 13, 14, 15, 16, 19)
"""steps around the first manifest of a run: announced, written, recorded"""


@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_around_a_files_record_resumes_to_the_same_bytes(place, start, tmp_path, point):
    run = tmp_path / "run"
    assert finished(start, train(place, run), tmp_path / "log", KCDCACHE_CRASHPOINT=str(point)) != 0
    written = "stages/0/manifest.parquet" in state_of(run)
    assert written == (14 <= point <= 18)
    for name in state_of(run):
        assert manifest.read(run / name).digest == manifest.read(place / "run" / name).digest
    succeeds(start, train(place, run), tmp_path / "log")
    for name in ("files.json", "values.parquet", "stages/0/manifest.parquet", "stages/3/manifest.parquet"):
        assert (run / name).read_bytes() == (place / "run" / name).read_bytes()
    assert not leftovers(run)


def test_another_file_in_the_place_of_a_cut_short_one_is_made_again(place, start, tmp_path):
    run = tmp_path / "run"
    finished(start, train(place, run), tmp_path / "log", KCDCACHE_CRASHPOINT="15")
    assert state_of(run) == {"stages/0/manifest.parquet"}
    shutil.copy(place / "run/stages/1/manifest.parquet", run / "stages/0/manifest.parquet")
    succeeds(start, train(place, run), tmp_path / "log")
    name = "stages/0/manifest.parquet"
    assert (run / name).read_bytes() == (place / "run" / name).read_bytes()
