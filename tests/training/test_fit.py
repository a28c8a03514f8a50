"""Training on hard labels: a teacher or a plain baseline, resumed exactly, as accurate as it should be."""

import json

import numpy as np
import pytest
import torch
from lessons import precomputed
from pupils import BrokenOffError, command, digits, everything, loaded, same_files, same_tensors, school, stop_after
from safetensors.torch import load_file

from kcdcache import rng
from kcdcache.data.datasets import load
from kcdcache.errors import NonFiniteError, SettingsError
from kcdcache.networks import registry
from kcdcache.progress import silent
from kcdcache.runs.state import read_metrics
from kcdcache.settings import FitSettings, TrainSettings
from kcdcache.training import distill, evaluation, fit
from kcdcache.views import rules

CROPS = {"augment": "crop", "padding": 2}
RECIPE = CROPS | {"epochs": 4, "batch_size": 32}
SMALL = digits(120, 40)


def fitted(out, model="lessons:TinyNet", data=SMALL, progress=silent, **changes):
    return fit.run(FitSettings(**(RECIPE | changes)), data=data, model=model, out=out, progress=progress)


def plain_training(data, epochs, batch, views):
    """Cross-entropy as a textbook writes it."""
    network = registry.build("resnet8", 10, 0).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scale = torch.tensor([1 / std for std in data.std]).view(1, 3, 1, 1)
    shift = torch.tensor([-mean / std for mean, std in zip(data.mean, data.std, strict=True)]).view(1, 3, 1, 1)
    everyone = np.arange(len(data.train))
    padded = np.pad(data.train.images(everyone), ((0, 0), (2, 2), (2, 2), (0, 0)))
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.1 ** sum(epoch >= share * epochs for share in (0.625, 0.75, 0.875))
        order = rng.epoch_order(0, epoch, everyone)
        down, right = rng.permuted(0, order, epoch % views, 5, 5)
        for start in range(0, len(order), batch):
            chosen = range(start, min(start + batch, len(order)))
            crops = np.stack([padded[order[i], down[i] : down[i] + 16, right[i] : right[i] + 16] for i in chosen])
            pixels = torch.from_numpy(crops).permute(0, 3, 1, 2).float() * float(np.float32(1 / 255))
            labels = torch.from_numpy(data.train.labels[order[chosen]])
            optimizer.zero_grad()
            logits = network(pixels * scale + shift)
            torch.nn.functional.cross_entropy(logits, labels, reduction="none").mean().backward()
            optimizer.step()
    return network


def test_fit_is_plain_training_bit_for_bit(tmp_path):
    fitted(tmp_path / "run", model="resnet8")
    found = load_file(tmp_path / "run" / "model.safetensors")
    assert same_tensors(found, plain_training(SMALL, 4, 32, 25).state_dict())


def test_a_baseline_uses_every_view_of_a_sample_before_any_twice(tmp_path):
    fitted(tmp_path / "run", epochs=12, padding=1, evaluate_every=12)
    assert [row.view for row in read_metrics(tmp_path / "run")] == [*range(9), 0, 1, 2]


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("decay", ["milestones", "cosine"])
def test_broken_off_and_resumed_gives_the_same_bytes(tmp_path, epochs, decay):
    fitted(tmp_path / "whole", decay=decay)
    with pytest.raises(BrokenOffError):
        fitted(tmp_path / "cut", decay=decay, progress=stop_after(epochs))
    fitted(tmp_path / "cut", decay=decay)
    assert same_files(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_fit_changes_no_byte(tmp_path):
    first = fitted(tmp_path / "run")
    before = everything(tmp_path / "run")
    assert fitted(tmp_path / "run") == first
    assert everything(tmp_path / "run") == before


def test_other_settings_or_another_network_are_refused(tmp_path):
    fitted(tmp_path / "run")
    with pytest.raises(
        SettingsError, match=r"holds a run with learning_rate = 0.05, asked for now: 0.1; .* another --out"
    ):
        fitted(tmp_path / "run", learning_rate=0.1)
    with pytest.raises(SettingsError, match="holds a run with model = 'lessons:TinyNet', asked for now: 'resnet8'"):
        fitted(tmp_path / "run", model="resnet8")


def test_the_saved_network_is_a_teacher_of_the_accuracy_it_claims(tmp_path):
    summary = fitted(tmp_path / "run", model="resnet8", epochs=2)
    network = loaded(tmp_path / "run", SMALL)
    rule = rules.plain(rules.rule_from(FitSettings(**RECIPE), (16, 16)))
    measured = evaluation.measure(network.module, network.transform, SMALL.test, rule, network.device)
    assert measured["test_accuracy"] == summary["accuracy_last"] == read_metrics(tmp_path / "run")[-1].test_accuracy
    assert summary["calibration_error"] == measured["test_calibration_error"]
    assert json.loads((tmp_path / "run" / "model.json").read_bytes())["accuracy"] == summary["accuracy_last"]


def test_the_summary_counts_what_was_forwarded(tmp_path):
    summary = fitted(tmp_path / "run")
    assert (summary["relative_cost"], summary["student_samples"], summary["epochs"]) == (1, 480, 4)
    assert (summary["teacher_forwards"], summary["count"]) == (0, 120)


def test_a_diverged_fit_says_so_and_what_was_before_it_is_kept(tmp_path):
    with pytest.raises(
        NonFiniteError, match=r"the training loss is (nan|inf) in epoch 0, step \d+; lower --learning-rate"
    ):
        fitted(tmp_path / "run", model="resnet8", learning_rate=1e18)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "checkpoint" / "latest.json").exists()


def test_the_epochs_measured_are_those_asked_for(tmp_path):
    fitted(tmp_path / "run", evaluate_every=3)
    assert [row.epoch for row in read_metrics(tmp_path / "run") if row.test_accuracy is not None] == [2, 3]


def test_a_dry_run_trains_nothing(tmp_path):
    place = school(tmp_path, views=1)
    told = command(place, "fit", model="resnet8", out=tmp_path / "run", dry_run=True, **RECIPE)
    assert (told["samples"], told["steps"]) == (200, 28)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"precision": "bfloat16"}, {"label_smoothing": 0.1}, {"nesterov": True}])
def test_options_change_what_is_learned_and_still_learn(tmp_path, change):
    fitted(tmp_path / "plain", epochs=8)
    fitted(tmp_path / "other", epochs=8, **change)
    plain, other = (read_metrics(tmp_path / name) for name in ("plain", "other"))
    assert plain[-1].loss != other[-1].loss
    assert other[-1].loss < 0.7 * other[0].loss


def test_a_few_epochs_teach_digits(tmp_path):
    data = digits(600, 200)
    summary = fitted(tmp_path / "run", model="resnet8", data=data, epochs=6, batch_size=64, learning_rate=0.1)
    assert summary["accuracy_last"] > 0.85


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
        found = distill.run(settings, material, out=tmp_path / f"student {keep}", device="cpu")
        assert found["accuracy_last"] > 0.95
