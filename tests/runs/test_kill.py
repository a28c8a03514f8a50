"""Kill -9 at random moments, then run again: the same bytes as if nothing had happened.

Most commands run in forks of one process that has imported everything and computed nothing, which start in
milliseconds; a few run as users start them.
"""

import random
import signal

import pytest
from killing import Cold, finished, killed, nursery, succeeds, survived
from pupils import SPEC, digits, distilled, leftovers, lines, loaded, same_files, saved_teacher

from kcdcache.errors import LockedError, UnfinishedError
from kcdcache.runs import state
from kcdcache.store import reader

CROPS = {"augment": "crop", "padding": 2}
STORE = CROPS | {"views": 24, "batch_size": 64, "min_accuracy": 0, "fields": "logits,penultimate"}
TRAIN = {"student": "resnet8", "epochs": 6, "stages": 3, "batch_size": 32, "keep": 0.6, "threads": 1}
FIT = CROPS | {"model": "resnet8", "epochs": 6, "batch_size": 32, "threads": 1}
PARTS, STEPS = ("v*.json", "*"), ("latest.json", "metrics.jsonl", "*")
"""what commands write while they work; kills are aimed at the moments after"""


@pytest.fixture(scope="module")
def start():
    with nursery() as starting:
        yield starting


@pytest.fixture(scope="module")
def place(tmp_path_factory, start):
    """A teacher and its store, made by commands nobody killed."""
    root = tmp_path_factory.mktemp("place")
    saved_teacher(root / "teacher", digits(200, 60))
    succeeds(start, precompute(root, root / "store"), root / "log")
    return root


def precompute(root, path, **changes):
    given = {"data": SPEC, "teacher": root / "teacher", "store": path} | STORE | changes
    return ["precompute", *lines(given)]


def fit(root, path, **changes):
    return ["fit", *lines({"data": SPEC, "out": path} | FIT | changes)]


def train(root, path, **changes):
    given = {"data": SPEC, "teacher": root / "teacher", "store": root / "store", "out": path} | TRAIN | changes
    return ["train", *lines(given)]


REQUERY = {"mix_target": "requery"}
CASES = {
    "precompute": (precompute, {}, PARTS),
    "fit": (fit, {"checkpoint_seconds": 0}, STEPS),
    "train": (train, {"checkpoint_seconds": 0}, STEPS),
    "train with checkpoints after epochs only": (train, {"checkpoint_seconds": 60}, STEPS),
    "train asking the teacher again": (train, REQUERY | {"checkpoint_seconds": 0}, (*STEPS, *PARTS)),
}
"""name -> command, its settings, and what it writes while it works"""


@pytest.fixture(scope="module")
def wholes(place, start):
    """name of a case -> what it makes when nobody kills it."""
    made = {}

    def whole(name):
        if name not in made:
            command, changes, _ = CASES[name]
            made[name] = place / f"whole {len(made)}"
            succeeds(start, command(place, made[name], **changes), place / "log")
        return made[name]

    return whole


def survives(place, start, wholes, path, name, kills, longest, seed):
    command, changes, patterns = CASES[name]
    words = command(place, path, **changes)
    hits = survived(start, words, path.parent / "log", path, random.Random(seed), kills, longest, patterns)
    assert same_files(wholes(name), path)
    assert not leftovers(path)
    return hits


@pytest.mark.parametrize("name", CASES)
def test_killed_and_run_again_gives_the_same_bytes(place, start, wholes, tmp_path, name):
    longest = 0.03 if name == "precompute" else 0.25  # a part takes hundredths of a second, a step more
    assert survives(place, start, wholes, tmp_path / "it", name, kills=6, longest=longest, seed=1) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_fifty_kills_change_no_byte(place, start, wholes, tmp_path, name):
    hits = 0
    for seed in range(2, 60):
        hits += survives(place, start, wholes, tmp_path / str(seed), name, kills=8, longest=0.3, seed=seed)
        if hits >= 50:
            return
    pytest.fail(f"only {hits} kills hit")


def test_a_killed_growth_gives_the_same_bytes(place, start, tmp_path):
    before, after = {"views": 3, "fields": "logits"}, {"views": 24}
    for name in ("cut", "whole"):
        succeeds(start, precompute(place, tmp_path / name, **before), tmp_path / "log")
    succeeds(start, precompute(place, tmp_path / "whole", **after), tmp_path / "log")
    words = precompute(place, tmp_path / "cut", **after)
    assert survived(start, words, tmp_path / "log", tmp_path / "cut", random.Random(3), 6, 0.03, PARTS) >= 1
    assert same_files(tmp_path / "whole", tmp_path / "cut")
    assert not leftovers(tmp_path)


def test_a_killed_store_is_not_readable_before_it_is_finished(place, start, tmp_path):
    words = precompute(place, tmp_path / "store")
    assert killed(start, words, tmp_path / "log", tmp_path / "store", "v00002*.json", 0)
    with pytest.raises(UnfinishedError, match="run the same `kcdcache precompute` again"):
        reader.open(tmp_path / "store")


def test_stages_by_hand_survive_kills(place, start, wholes, tmp_path):
    """Killed inside the stage that a manifest was given for, the same command with that manifest continues."""
    run, log = tmp_path / "run", tmp_path / "log"
    succeeds(start, train(place, run, checkpoint_seconds=0, until=2), log)
    made = tmp_path / "made.parquet"
    condense = {"values": run / "values.parquet", "store": place / "store", "keep": 0.6 ** (1 / 3), "out": made}
    given = ["condense", *lines(condense | {"previous": run / "stages" / "0" / "manifest.parquet"})]
    succeeds(start, given, log)
    words = train(place, run, checkpoint_seconds=0, until=4, manifest=made)
    assert survived(start, words, log, run, random.Random(4), 4, 0.1, ("latest.json",)) >= 1
    succeeds(start, train(place, run, checkpoint_seconds=0), log)
    assert same_files(wholes("train"), run)


def test_the_real_command_line_survives_kills(place, start, wholes, tmp_path):
    """As users start it: one process each, killed once while its work is under way, then run again."""
    for name, pattern in (("precompute", "v00003*.json"), ("train asking the teacher again", "latest.json")):
        command, changes, _ = CASES[name]
        words, log = command(place, tmp_path / name, **changes), tmp_path / "log"
        assert killed(Cold, words, log, tmp_path / name, pattern, random.Random(5).uniform(0, 0.1))
        succeeds(Cold, words, log)
        assert same_files(wholes(name), tmp_path / name)
        assert not leftovers(tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["precompute", "fit", "train asking the teacher again"])
def test_the_real_command_line_survives_several_kills(place, wholes, tmp_path, name):
    assert survives(place, Cold, wholes, tmp_path / "it", name, kills=4, longest=0.1, seed=7) >= 2


def test_a_second_process_is_refused_while_the_first_trains(place, start, tmp_path):
    words = train(place, tmp_path / "run", epochs=300)
    first = start(words, tmp_path / "log")
    while not first.ended(0.01) and not (tmp_path / "run" / "metrics.jsonl").exists():
        pass
    try:
        code = finished(Cold, words, tmp_path / "second")
    finally:
        first.kill()
    assert first.code == -signal.SIGKILL
    assert code == LockedError.exit_code
    assert "is being written by process" in (tmp_path / "second").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_asked_for_ends_cleanly_and_resumes(place, start, wholes, tmp_path, number):
    words = train(place, tmp_path / "run", checkpoint_seconds=60)
    process = start(words, tmp_path / "log")
    while not process.ended(0.005) and not (tmp_path / "run" / "metrics.jsonl").exists():
        pass
    process.signal(number)
    assert process.ended(60)
    assert process.code == 128 + number
    assert "the same command resumes" in (tmp_path / "log").read_text()
    succeeds(start, words, tmp_path / "log")
    assert same_files(wholes("train"), tmp_path / "run")


def crashes(place, start, path, name, points):
    """Kill a command at each of some steps of its write protocol, running it anew in between."""
    command, changes, _ = CASES[name]
    words, hits = command(place, path, **changes), 0
    for point in points:
        code = finished(start, words, path.parent / "log", KCDCACHE_CRASHPOINT=str(point))
        if code == 0:
            break
        assert code == -signal.SIGKILL, (path.parent / "log").read_text()
        hits += 1
    succeeds(start, words, path.parent / "log")
    return hits


@pytest.mark.parametrize("name", ["precompute", "train asking the teacher again"])
def test_killed_between_any_two_steps_of_writing_gives_the_same_bytes(place, start, wholes, tmp_path, name):
    points = random.Random(6).sample(range(1, 60), 8)
    assert crashes(place, start, tmp_path / "it", name, points) >= 4
    assert same_files(wholes(name), tmp_path / "it")
    assert not leftovers(tmp_path)


SHORT = {
    "precompute": {"views": 2},
    "fit": {"epochs": 1},
    "train asking the teacher again": {"epochs": 2, "stages": 2, "batch_size": 128, "checkpoint_seconds": 60},
}
"""settings that make a command's work small, and its writing all there is"""


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_killed_at_any_step_of_writing_gives_the_same_bytes(place, start, tmp_path, name):
    """Every step of the write protocol from the first to the last, each time from a fresh start."""
    command, log, changes = CASES[name][0], tmp_path / "log", CASES[name][1] | SHORT[name]
    succeeds(start, command(place, tmp_path / "whole", **changes), log)
    for point in range(1, 1000):
        path = tmp_path / str(point)
        if finished(start, command(place, path, **changes), log, KCDCACHE_CRASHPOINT=str(point)) == 0:
            assert point > 50
            return
        succeeds(start, command(place, path, **changes), log)
        assert same_files(tmp_path / "whole", path)
        assert not leftovers(path)


def test_what_survived_is_what_this_process_makes(place, wholes, tmp_path):
    """Forks, processes of their own and this one agree."""
    dataset = digits(200, 60)
    options = {**TRAIN, "checkpoint_seconds": 0}
    threads = options.pop("threads")
    made = distilled(
        Here(dataset, loaded(place / "teacher", dataset), place / "store"),
        tmp_path / "run", run={"threads": threads}, cost_exponent=0.03, **options,
    )  # fmt: skip
    assert made["finished"]
    assert same_files(wholes("train"), tmp_path / "run")
    assert state.read_summary(tmp_path / "run") == made


class Here:
    """What `distilled` needs of a school."""

    def __init__(self, data, network, path):
        self.data, self.network, self.knowledge = data, network, reader.open(path)
