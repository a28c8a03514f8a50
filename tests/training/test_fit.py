"""Training on hard labels: a teacher or a plain baseline, as accurate as it should be."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
from lessons import CPU, ON_CPU, Pooled, precomputed
from pupils import digits, everything, loaded, plainly_taught, same_tensors
from safetensors.torch import load_file

from kcdcache import interrupt
from kcdcache.datasets.datasets import load
from kcdcache.datasets.images import Split
from kcdcache.errors import InterruptedRunError, SettingsError
from kcdcache.runs.state import read_metrics
from kcdcache.settings import FitSettings, TrainSettings
from kcdcache.training import distill, evaluation, fit
from kcdcache.views import rules

CROPS = {"augment": "crop", "padding": 2}
RECIPE = CROPS | {"epochs": 4, "batch_size": 32}
SMALL = digits(120, 40)


def fitted(out, model="lessons:TinyNet", data=SMALL, **changes):
    return fit.run(FitSettings(**(RECIPE | changes)), data=data, model=model, out=out).document()


BELL = []
"""steps until the student asks the process to stop, if any"""


class Ringing(Pooled):
    """A student during whose forward pass the user presses Ctrl-C, once."""

    def forward(self, pixels):
        if BELL and self.training:
            BELL[0] -= 1
            if BELL[0] == 0:
                BELL.clear()
                signal.raise_signal(signal.SIGINT)
        return super().forward(pixels)


def test_fit_is_plain_training_bit_for_bit(tmp_path):
    fitted(tmp_path / "run", model="resnet8")
    found = load_file(tmp_path / "run" / "model.safetensors")
    assert same_tensors(found, plainly_taught(SMALL, epochs=4, views=25)[0].state_dict())


def test_a_baseline_uses_every_view_of_a_sample_before_any_twice(tmp_path):
    fitted(tmp_path / "run", epochs=12, padding=1, evaluate_every=12)
    assert [row.view for row in read_metrics(tmp_path / "run")] == [*range(9), 0, 1, 2]


def test_a_finished_fit_says_what_was_forwarded_changes_no_byte_and_is_no_run_of_other_settings(tmp_path):
    first = fitted(tmp_path / "run", evaluate_every=3)
    assert [row.epoch for row in read_metrics(tmp_path / "run") if row.test_accuracy is not None] == [2, 3]
    assert (first["relative_cost"], first["student_samples"], first["epochs"]) == (1, 480, 4)
    assert (first["teacher_forwards"], first["count"]) == (0, 120)
    before = everything(tmp_path / "run")
    assert fitted(tmp_path / "run", evaluate_every=3) == first
    assert everything(tmp_path / "run") == before
    with pytest.raises(
        SettingsError, match=r"holds a run with learning_rate = 0.05, requested now: 0.1; .* another --out"
    ):
        fitted(tmp_path / "run", learning_rate=0.1, evaluate_every=3)
    with pytest.raises(SettingsError, match="holds a run with model = 'lessons:TinyNet', requested now: 'resnet8'"):
        fitted(tmp_path / "run", model="resnet8", evaluate_every=3)


def test_the_saved_network_is_a_teacher_of_the_accuracy_it_claims(tmp_path):
    summary = fitted(tmp_path / "run", model="resnet8", epochs=2)
    network = loaded(tmp_path / "run", SMALL)
    rule = rules.plain(rules.rule_from(FitSettings(**RECIPE), (16, 16)))
    logits = evaluation.predict(network.module, network.transform, evaluation.first_views(SMALL.test, rule, CPU))
    measured = evaluation.measure(logits, SMALL.test.labels)
    assert measured["test_accuracy"] == summary["accuracy_last"] == read_metrics(tmp_path / "run")[-1].test_accuracy
    assert summary["calibration_error"] == measured["test_calibration_error"]
    assert json.loads((tmp_path / "run" / "model.json").read_bytes())["accuracy"] == summary["accuracy_last"]


@pytest.mark.parametrize("change", [{"label_smoothing": 0.1}, {"nesterov": True}])
def test_options_change_what_is_learned_and_still_learn(tmp_path, change):
    fitted(tmp_path / "plain")
    fitted(tmp_path / "other", **change)
    plain, other = (read_metrics(tmp_path / name) for name in ("plain", "other"))
    assert plain[-1].loss != other[-1].loss
    assert other[-1].loss < 0.9 * other[0].loss


ONE = replace(SMALL, train=Split(SMALL.train.labels[:1], SMALL.train.source.taken(np.arange(1))))
ONE_OVER = {"batch_size": 17, "epochs": 2}
"""leaves one of 120 samples to the last batch"""


@pytest.mark.parametrize("resident", ["off", "on"])
def test_a_last_batch_of_one_sample_joins_the_one_before(tmp_path, resident):
    """By itself it would have no batch statistics."""
    told = fitted(tmp_path / "run", "lessons:Pooled", resident=resident, **ONE_OVER)
    assert [row.samples for row in read_metrics(tmp_path / "run")] == [120, 120]
    assert (told["relative_cost"], told["student_samples"]) == (1, 240)


def test_a_run_stopped_at_any_step_before_a_joined_batch_or_after_it_goes_on_to_the_same_bytes(tmp_path):
    fitted(tmp_path / "whole", "lessons:Pooled", **ONE_OVER)
    for step in (5, 6, 7):
        folder, BELL[:] = tmp_path / str(step), [step]
        with interrupt.listening(), pytest.raises(InterruptedRunError, match=f"epoch 1, step {step} is in the check"):
            fitted(folder, "test_fit:Ringing", **ONE_OVER)
        with interrupt.listening():
            fitted(folder, "test_fit:Ringing", **ONE_OVER)
        assert same_tensors(*(load_file(run / "model.safetensors") for run in (folder, tmp_path / "whole")))
        assert [row.samples for row in read_metrics(folder)] == [120, 120]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ONE}, "a set of 1 sample to train on: batch statistics need at least 2"),
        ({"batch_size": 1, "model": "lessons:Pooled"}, "--batch-size 1 is too small for the batch statistics of this"),
    ],
)
def test_what_has_no_batch_statistics_is_refused(tmp_path, changes, message):
    with pytest.raises(SettingsError, match=message):
        fitted(tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_batch_size_of_one_trains_a_network_that_has_statistics_of_it(tmp_path):
    fitted(tmp_path / "run", batch_size=1, epochs=1, data=digits(21, 10))
    assert [row.samples for row in read_metrics(tmp_path / "run")] == [21]


@pytest.mark.slow
def test_teacher_and_students_reach_what_such_networks_should(tmp_path):
    """As in the embedded recipe: all of digits, a resnet20, and resnet8 distilled with all and with 70 % kept."""
    data = load("digits")
    summary = fitted(
        tmp_path / "teacher", model="resnet20", data=data, epochs=18, batch_size=64, learning_rate=0.1, evaluate_every=6
    )
    assert summary["accuracy_last"] > 0.97
    knowledge = precomputed(tmp_path / "store", data, loaded(tmp_path / "teacher", data), views=18, encoding="float16")
    for keep in (1.0, 0.7):
        settings = TrainSettings(student="resnet8", epochs=18, stages=6, keep=keep, evaluate_every=6)
        material = distill.Material(data=data, knowledge=knowledge)
        found = distill.run(settings, material, out=tmp_path / f"student {keep}", machine=ON_CPU)
        assert found.accuracy_last > 0.95
