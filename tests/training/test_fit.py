"""Training on hard labels: a teacher or a plain baseline, as accurate as it should be."""

import json

import pytest
from lessons import CPU, ON_CPU, precomputed
from pupils import digits, everything, loaded, plainly_taught, same_tensors
from safetensors.torch import load_file

from kcdcache.data.datasets import load
from kcdcache.errors import SettingsError
from kcdcache.runs.state import read_metrics
from kcdcache.settings import FitSettings, TrainSettings
from kcdcache.training import distill, evaluation, fit
from kcdcache.views import rules

CROPS = {"augment": "crop", "padding": 2}
RECIPE = CROPS | {"epochs": 4, "batch_size": 32}
SMALL = digits(120, 40)


def fitted(out, model="lessons:TinyNet", data=SMALL, **changes):
    return fit.run(FitSettings(**(RECIPE | changes)), data=data, model=model, out=out).document()


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
        SettingsError, match=r"holds a run with learning_rate = 0.05, asked for now: 0.1; .* another --out"
    ):
        fitted(tmp_path / "run", learning_rate=0.1, evaluate_every=3)
    with pytest.raises(SettingsError, match="holds a run with model = 'lessons:TinyNet', asked for now: 'resnet8'"):
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
