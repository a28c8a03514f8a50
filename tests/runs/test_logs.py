"""Logs for other tools: the same rows as the run's metrics, once each, whenever it was stopped and resumed."""

import csv
import json
import os
import random
import signal
import sys

import pytest
from commands import failure
from killing import finished, succeeds
from pupils import SPEC, distilled, lines, same_files, school
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kcdcache.runs.state import read_metrics

RUN = {"student": "lessons:TinyNet", "epochs": 4, "stages": 2, "batch_size": 50, "keep": 0.6, "threads": 1,
       "checkpoint_seconds": 0}  # fmt: skip

SETTINGS = {name: value for name, value in RUN.items() if name != "threads"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return school(tmp_path_factory.mktemp("logs"), fields=("logits", "penultimate"))


def words(place, out, *more):
    return ["train", *lines({"data": SPEC, "store": place.knowledge.path, "out": out} | RUN), *more]


def table(run):
    with (run / "metrics.csv").open(newline="") as stream:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(stream)]


def events(run):
    """(name, epoch) -> the values that TensorBoard shows there."""
    read = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    found = {}
    for name in read.Tags()["scalars"]:
        for event in read.Scalars(name):
            found.setdefault((name, event.step), []).append(event.value)
    return found


@pytest.fixture(scope="module")
def logged(place):
    """A run of four epochs by two methods and averaged weights, with both logs."""
    changes = SETTINGS | {"method": "kd+rkd", "ema_decay": 0.9, "log": ("csv", "tensorboard")}
    distilled(place, place.root / "logged", **changes)
    return place.root / "logged"


def test_the_csv_holds_every_epoch_of_the_metrics_and_terms_that_add_up_to_the_loss(logged):
    found, rows = table(logged), read_metrics(logged)
    assert [row["epoch"] for row in found] == [1, 2, 3, 4]
    for one, row in zip(found, rows, strict=True):
        assert one["keep"] == row.kept / 200
        assert sum(one[f"loss_{name}"] for name in ("hard", "soft", "rkd")) == pytest.approx(one["loss"], rel=1e-6)
        own = {
            name: getattr(row, name) for name in one if not name.startswith("loss_") and name not in ("epoch", "keep")
        }
        assert {name: one[name] for name in own} == own
        assert own.keys() >= {"learning_rate", "samples", "samples_so_far", "test_accuracy", "ema_test_accuracy"}
    assert [row["stage"] for row in found] == [0, 0, 1, 1]


def test_tensorboard_shows_the_numbers_of_the_csv(logged):
    shown = events(logged)
    held = {(name, int(row["epoch"])): row[name] for row in table(logged) for name in row if name != "epoch"}
    assert shown.keys() == held.keys()
    for place, values in shown.items():
        assert values == [pytest.approx(held[place], rel=1e-6)]


def test_logs_change_nothing_else(place, logged, tmp_path):
    distilled(place, tmp_path / "plain", **SETTINGS | {"method": "kd+rkd", "ema_decay": 0.9})
    for name in ("student.safetensors", "values.parquet", "stages/2/manifest.parquet", "ema/student.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (logged / name).read_bytes()
    assert not {"metrics.csv", "tensorboard"} & set(os.listdir(tmp_path / "plain"))


def test_killed_and_resumed_the_csv_is_the_undisturbed_ones_and_no_event_is_there_twice(start, place, tmp_path):
    succeeds(start, words(place, tmp_path / "whole", "--log", "csv"), tmp_path / "log")
    given = words(place, tmp_path / "cut", "--log", "csv,tensorboard")
    for first in (36, 170):
        point = str(first + random.Random(first).randrange(8))
        assert finished(start, given, tmp_path / "log", KCDCACHE_CRASHPOINT=point) == -signal.SIGKILL
    succeeds(start, given, tmp_path / "log")
    for folder in (tmp_path / "cut" / "tensorboard").iterdir():
        assert folder.name.startswith("events.out.tfevents")
    shown = events(tmp_path / "cut")
    assert {step for _, step in shown} == {1, 2, 3, 4}
    assert {len(values) for values in shown.values()} == {1}
    for folder in (tmp_path / "cut" / "tensorboard").iterdir():
        folder.unlink()
    (tmp_path / "cut" / "tensorboard").rmdir()
    assert same_files(tmp_path / "whole", tmp_path / "cut")


def test_a_log_asked_for_inside_an_epoch_has_its_terms_from_the_next_one_on(start, place, tmp_path):
    code = finished(start, words(place, tmp_path / "run"), tmp_path / "log", KCDCACHE_CRASHPOINT="40")
    assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
    succeeds(start, words(place, tmp_path / "run", "--log", "csv"), tmp_path / "log")
    assert ["loss_hard" in row for row in table(tmp_path / "run")] == [False, True, True, True]
    assert "terms" not in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])


def test_without_the_extra_the_message_names_it(capsys, place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    code, told = failure(capsys, *words(place, tmp_path / "run", "--log", "tensorboard"))
    assert code == 2
    assert 'pip install "kcdcache[tensorboard]"; or give --log csv' in told
    code, told = failure(capsys, *words(place, tmp_path / "run", "--log", "wandb"))
    assert "log" in told
    assert "tensorboard" in told
