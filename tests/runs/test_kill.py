"""Kill -9 at random moments, then run again: the same bytes as if nothing had happened.

Most commands run in forks of one process that has imported everything and computed nothing, which start in
milliseconds; a few run as users start them.
"""

import random
import signal
from types import SimpleNamespace

import pytest
from commands import words
from killing import Cold, finished, succeeds, survived
from lessons import on_cpu
from pupils import digits, distilled, leftovers, loaded, same_files

from kcdcache.cli import main
from kcdcache.errors import LockedError
from kcdcache.runs import state
from kcdcache.store import reader

PARTS, STEPS = ("v*.json", "*"), ("latest.json", "metrics.jsonl", "*")
"""what commands write while they work; kills are aimed at the moments after"""
LONG = {"epochs": 2, "batch_size": 64}
TRAIN = LONG | {"mix_target": "linear_prob", "checkpoint_seconds": 0}
AGAIN = "train asking the teacher again"
CASES = {
    "precompute": ({"views": 6}, PARTS),
    "fit": (LONG | {"checkpoint_seconds": 0}, STEPS),
    AGAIN: (TRAIN | {"mix_target": "requery"}, (*STEPS, *PARTS)),
    "train": (TRAIN, STEPS),
    "train with checkpoints after epochs only": (TRAIN | {"checkpoint_seconds": 60}, STEPS),
}
"""command, and what distinguishes it -> its settings, and what it writes while it works"""


def command(here, name, path, **changes):
    return words(here.root, name.split()[0], path, **CASES[name][0] | changes)


@pytest.fixture(scope="module")
def wholes(here):
    """name of a case -> what it makes when nobody kills it."""
    made = {}

    def whole(name):
        if name not in made:
            made[name] = here.root / f"whole {name}"
            succeeds(here.start, command(here, name, made[name]), here.root / "log")
        return made[name]

    return whole


def same(whole, path):
    assert same_files(whole, path)
    assert not leftovers(path)
    return True


def survives(here, start, wholes, path, name, kills, seed):
    longest = 0.03 if name == "precompute" else 0.15  # a part takes hundredths of a second, a step more
    given = command(here, name, path), path.parent / "log", path, random.Random(seed), kills, longest, CASES[name][1]
    hits = survived(start, *given)
    assert same(wholes(name), path)
    return hits


@pytest.mark.parametrize("name", ["precompute", "fit", AGAIN])
def test_killed_and_run_again_gives_the_same_bytes(here, start, wholes, tmp_path, name):
    """Killed at two steps of the write protocol, then at a random moment, running anew in between."""
    for point in random.Random(6).sample(range(1, 40), 2):
        code = finished(start, command(here, name, tmp_path / "it"), tmp_path / "log", KCDCACHE_CRASHPOINT=str(point))
        assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
    survives(here, start, wholes, tmp_path / "it", name, kills=1, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_fifty_times_at_random_moments_gives_the_same_bytes(here, start, wholes, tmp_path, name):
    hits = 0
    for seed in range(1, 60):
        hits += survives(here, start, wholes, tmp_path / str(seed), name, kills=4, seed=seed)
        if hits >= 50:
            return
    pytest.fail(f"only {hits} kills hit")


def test_a_killed_growth_gives_the_same_bytes(here, start, tmp_path):
    for name, views in (("cut", 2), ("whole", 2), ("whole", 6)):
        changes = {"views": views, "fields": "logits"} if views == 2 else {}
        succeeds(start, command(here, "precompute", tmp_path / name, **changes), tmp_path / "log")
    grow = command(here, "precompute", tmp_path / "cut")
    assert survived(start, grow, tmp_path / "log", tmp_path / "cut", random.Random(3), 2, 0.03, PARTS) >= 1
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_stages_by_hand_survive_kills(here, start, wholes, tmp_path):
    """Killed inside the stage that a manifest was given for, the same command with that manifest continues."""
    run, log, made = tmp_path / "run", tmp_path / "log", tmp_path / "made.parquet"
    first = {"values": run / "values.parquet", "previous": run / "stages/0/manifest.parquet", "keep": 0.6**0.5}
    succeeds(start, command(here, "train", run, until=1), log)
    succeeds(start, words(here.root, "condense", made, **first), log)
    by_hand = command(here, "train", run, until=2, manifest=made)
    assert survived(start, by_hand, log, run, random.Random(4), 1, 0.1, ("latest.json",)) >= 1
    succeeds(start, command(here, "train", run), log)
    assert same_files(wholes("train"), run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["precompute", "fit", AGAIN])
def test_the_real_command_line_survives_kills(here, wholes, tmp_path, name):
    """As users start it: one process each (in the other tests a fork)."""
    assert survives(here, Cold, wholes, tmp_path / "it", name, kills=4, seed=7) >= 2


def test_a_second_process_is_refused_while_the_first_trains(here, start, tmp_path, capsys):
    given = command(here, "train", tmp_path / "run", epochs=300)
    first = start(given, tmp_path / "log")
    while not first.ended(0.01) and not (tmp_path / "run" / "metrics.jsonl").exists():
        pass
    try:
        code = main._outcome([str(word) for word in given])
    finally:
        first.kill()
    assert (first.code, code) == (-signal.SIGKILL, LockedError.exit_code)
    assert "is being written by process" in capsys.readouterr().err


SHORT = {"precompute": {"views": 2}, "fit": {"epochs": 1}, AGAIN: {"epochs": 2, "batch_size": 128}}
"""settings that make a command's work small, and its writing all there is"""


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_killed_at_any_step_of_writing_gives_the_same_bytes(here, start, tmp_path, name):
    """Every step of the write protocol from the first to the last, each time from a fresh start."""
    log, changes = tmp_path / "log", {"checkpoint_seconds": 60} | SHORT[name]
    succeeds(start, command(here, name, tmp_path / "whole", **changes), log)
    for point in range(1, 1000):
        path = tmp_path / str(point)
        if finished(start, command(here, name, path, **changes), log, KCDCACHE_CRASHPOINT=str(point)) == 0:
            assert point > 50
            return
        succeeds(start, command(here, name, path, **changes), log)
        assert same(tmp_path / "whole", path)


def test_what_survived_is_what_this_process_makes(here, wholes, tmp_path):
    """Forks, processes of their own and this one agree."""
    dataset = digits(200, 60)
    network, knowledge = loaded(here.root / "teacher", dataset), reader.open(here.root / "precompute")
    place = SimpleNamespace(data=dataset, network=network, knowledge=knowledge)
    given = TRAIN | {"student": "lessons:TinyNet", "stages": 2, "keep": 0.6, "cost_exponent": 0.03}
    made = distilled(place, tmp_path / "run", run={"machine": on_cpu(threads=1)}, **given)
    assert made["finished"]
    assert same_files(wholes("train"), tmp_path / "run")
    assert state.read_summary(tmp_path / "run").document() == made
