"""Commands under the real torchrun: what its processes write and tell, and one of them killed in each stage.

Each launch imports torch in every process, so that all but one of these tests are slow.
"""

import json
import signal
import subprocess
import sys

import pytest
from killing import environment
from pupils import SPEC, digits, lines, loaded, precomputed, same_files, saved_teacher
from ranks import PATH, launched, ran, stopped

TINY = "lessons:TinyNet"
LONG = {"epochs": 24, "batch_size": 33, "threads": 1, "checkpoint_seconds": 0}
SIGNALS = (signal.SIGTERM, signal.SIGKILL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("torchrun")
    data = digits(200, 60)
    precomputed(root / "store", data, loaded(saved_teacher(root / "teacher", data), data), views=3)
    return root


def training(place, out, **changes):
    given = {"data": SPEC, "store": place / "store", "student": TINY, "out": out, "stages": 2, "keep": 0.6}
    return ["train", *lines(given | LONG | changes)]


def fitting(place, out, **changes):
    return ["fit", *lines({"data": SPEC, "model": TINY, "out": out} | LONG | changes)]


def filling(place, out, **changes):
    given = {"data": "digits", "teacher": place / "teacher", "store": out, "augment": "crop", "padding": 2,
             "views": 25, "batch_size": 16, "min_accuracy": 0, "threads": 1}  # fmt: skip
    return ["precompute", *lines(given | changes)]


def epochs(run):
    return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0


def parts(store):
    return len(list(store.glob("_kcd/log/0/v*.json")))


def test_two_processes_train_one_network_and_the_first_tells_of_it(place, tmp_path):
    ran(2, [*fitting(place, tmp_path / "run", epochs=2), "--json", "--quiet"], tmp_path / "log")
    told = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    assert len(told) == 1
    assert json.loads(told[0])["epochs"] == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["environment"]["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("stage", [training, fitting])
@pytest.mark.parametrize("world", [2, 4])
def test_training_that_lost_a_process_ends_and_resumes_to_the_same_bytes(place, tmp_path, stage, number, world):
    words, log = stage(place, tmp_path / "run"), tmp_path / "log"
    stopped(launched(world, words, log), log, lambda: epochs(tmp_path / "run") >= 3, number)
    assert epochs(tmp_path / "run") < LONG["epochs"]
    ran(world, words, log)
    ran(world, stage(place, tmp_path / "whole"), log)
    assert same_files(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("world", [2, 4])
def test_a_store_that_lost_a_process_is_filled_to_the_same_bytes(place, tmp_path, number, world):
    words, log = filling(place, tmp_path / "store"), tmp_path / "log"
    stopped(launched(world, words, log), log, lambda: parts(tmp_path / "store") >= 3, number)
    assert parts(tmp_path / "store") < 25
    ran(world, words, log)
    ran(1, filling(place, tmp_path / "whole"), log)
    assert same_files(tmp_path / "store", tmp_path / "whole")


@pytest.mark.slow
def test_one_process_under_torchrun_is_one_without(place, tmp_path):
    ran(1, training(place, tmp_path / "one", epochs=4), tmp_path / "log")
    words = [sys.executable, "-m", "kcdcache", *training(place, tmp_path / "other", epochs=4)]
    alone = subprocess.run(words, capture_output=True, check=False, env=environment(PYTHONPATH=PATH))
    assert alone.returncode == 0, alone.stderr.decode()
    assert same_files(tmp_path / "one", tmp_path / "other")
