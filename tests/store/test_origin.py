"""What a store tells of where it came from: corrupted labels, the teacher's data; and who passes it on."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from lessons import CPU, ON_CPU, precomputed, teacher_of
from pupils import executed, same_files
from torch import nn

from kcdcache.datasets import datasets
from kcdcache.errors import CorruptionError, MismatchError, SettingsError
from kcdcache.files.records import sealed_json
from kcdcache.networks.input_transform import InputTransform
from kcdcache.report import show
from kcdcache.settings import FitSettings, PrecomputeSettings, TrainSettings
from kcdcache.store import check, identity
from kcdcache.teacher import precompute, teacher
from kcdcache.training import distill, fit

NOISY = "digits?train=120&test=30&noise=0.4"
CLEAN = "digits?train=120&test=30"


def knowing(dataset, learned_from):
    return replace(teacher_of(dataset), data=learned_from)


def origin(corruption, teacher_data):
    return identity.Origin(corruption=corruption, teacher_data=teacher_data)


def test_a_store_tells_what_was_done_and_what_its_teacher_learned_from(tmp_path):
    dataset = datasets.load(NOISY)
    same, other = dataset.identity().digest, datasets.load(CLEAN).identity().digest
    for name, learned_from, expected in (("same", same, "same"), ("other", other, "other"), ("none", None, None)):
        knowledge = precomputed(tmp_path / name, dataset, knowing(dataset, learned_from), views=1)
        found = identity.read_origin(knowledge.path)
        assert found.teacher_data == learned_from
        assert found.corruption["corruption"] == {"noise": 0.4, "noise_seed": 12345, "redraw": True}
        assert found.corruption["mislabelled"] == int((dataset.train.labels != dataset.train.clean_labels).sum()) > 20
        told = show.inspect(knowledge.path)
        assert told["mislabelled"] == found.corruption["mislabelled"]
        assert told.get("teacher_data") == expected
    (knowledge.path / identity.ORIGIN_FILE).unlink()
    assert identity.read_origin(knowledge.path) is None
    assert identity.corruption_of(knowledge.path) == {}
    clean = datasets.load(CLEAN)
    knowledge = precomputed(tmp_path / "clean", clean, teacher_of(clean), views=1)
    assert identity.read_origin(knowledge.path) == origin({}, None)
    assert not {"corruption", "mislabelled", "teacher_data"} & show.inspect(knowledge.path).keys()


def test_what_is_known_is_not_forgotten_and_what_is_not_is_completed(tmp_path):
    (tmp_path / "_kcd").mkdir()
    first, known, later = origin({"a": 1}, None), origin({"a": 1}, "d"), origin({"b": 2}, "e")
    for written, expected in ((first, first), (known, known), (first, known), (later, known)):
        identity.write_origin(tmp_path, written)
        assert identity.read_origin(tmp_path) == expected


def test_a_damaged_record_is_refused_by_readers_and_told_by_verify(tmp_path):
    dataset = datasets.load(NOISY)
    file = precomputed(tmp_path, dataset, teacher_of(dataset), views=1).path / identity.ORIGIN_FILE
    whole = file.read_bytes()
    no_object = sealed_json({"corruption": ["noise"], "teacher_data": None})
    for damaged in (whole.replace(b'"noise":0.4', b'"noise":0.1'), no_object, whole[:-7]):
        file.write_bytes(damaged)
        with pytest.raises(CorruptionError, match=re.escape(str(file))):
            identity.read_origin(tmp_path)
        (problem,) = check.verify(tmp_path, share=0).problems
        assert str(file) in problem


def test_the_teachers_data_are_known_from_its_folder(tmp_path):
    dataset = datasets.load(CLEAN)
    wanted = FitSettings(epochs=1, augment="crop", padding=2)
    fit.run(wanted, data=dataset, model="resnet8", out=tmp_path / "fit", machine=ON_CPU)
    given = {"weights_path": None, "classes": dataset.classes, "mean": dataset.mean, "std": dataset.std, "size": None,
             "device": CPU, "precision": "float32"}  # fmt: skip
    assert teacher.load(str(tmp_path / "fit"), **given).data == dataset.identity().digest
    weights = tmp_path / "fit" / "model.safetensors"
    assert teacher.load("resnet8", **{**given, "weights_path": weights}).data is None


def test_a_run_tells_it_measured_or_not_and_is_measured_later_when_asked(tmp_path):
    dataset = datasets.load(NOISY)
    network = knowing(dataset, "0" * 64)
    knowledge = precomputed(tmp_path / "store", dataset, network, views=1)
    given = {"student": "lessons:TinyNet", "epochs": 2, "stages": 1, "keep": 1.0}
    settings = [TrainSettings(**given, fidelity=name) for name in ("off", "auto")]
    plain, asked = (distill.Material(data=dataset, knowledge=knowledge, teacher=t) for t in (None, network))
    first = distill.run(settings[0], plain, out=tmp_path / "run", machine=ON_CPU)
    assert (first.teacher_data, first.corruption.noise) == ("other", 0.4)
    assert "accuracy_train" not in first.model_fields_set
    assert distill.run(settings[0], asked, out=tmp_path / "run", machine=ON_CPU) == first
    second = distill.run(settings[1], plain, out=tmp_path / "run", machine=ON_CPU)
    assert {"accuracy_train", "memorised", "sets"} <= second.model_fields_set
    assert "agreement_test" not in second.model_fields_set
    third = distill.run(settings[1], asked, out=tmp_path / "run", machine=ON_CPU)
    assert "agreement_test" in third.model_fields_set
    assert all(getattr(third, name) == getattr(second, name) for name in second.model_fields_set)
    assert distill.run(settings[1], plain, out=tmp_path / "run", machine=ON_CPU) == third
    assert show.inspect(tmp_path / "run")["finished"]


def test_an_exported_set_and_its_runs_tell_of_wrong_labels(tmp_path):
    dataset, student = datasets.load(NOISY), {"student": "lessons:TinyNet", "device": "cpu"}
    store = precomputed(tmp_path / "store", dataset, teacher_of(dataset), views=1).path
    given = {"data": NOISY, "store": store, "epochs": 2, "stages": 2, "keep": 0.5, "k0": "stage_slice"}
    executed("train", student | given | {"out": tmp_path / "run"})
    exported = {"manifest": tmp_path / "run", "store": store, "data": NOISY, "out": tmp_path / "set"}
    executed("export", exported | {"with_images": True})
    wrong = int((dataset.train.labels != dataset.train.clean_labels).sum())
    card = (tmp_path / "set" / "README.md").read_text()
    assert "## Corrupted on purpose" in card
    assert f"{wrong} of all its samples have a wrong label" in card
    assert show.inspect(tmp_path / "set")["mislabelled"] == wrong
    again = student | {"condensed": tmp_path / "set", "data": f"condensed:{tmp_path / 'set'}", "epochs": 1}
    told = executed("train", again | {"out": tmp_path / "of"})
    assert (told["mislabelled"], told["corruption"]["noise"]) == (wrong, 0.4)
    file = tmp_path / "set" / "store" / identity.ORIGIN_FILE
    file.write_bytes(file.read_bytes().replace(b'"noise":0.4', b'"noise":0.1'))
    with pytest.raises(CorruptionError, match="origin"):
        executed("train", again | {"out": tmp_path / "no"})


class Perfect(nn.Module):
    """Names the true class of digits, which the first pixel of each image tells."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(1, 1)

    def forward(self, x):
        number = (x[:, 0, 0, 0] * 16).round().long()
        return nn.functional.one_hot(number.clamp(0, 9), 10).float() * 9


@pytest.mark.parametrize("redraw", [True, False])
def test_a_teacher_is_judged_by_true_labels(tmp_path, redraw):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 200)
    images = np.zeros((200, 8, 8, 1), np.uint8)
    images[:, 0, 0, 0] = np.round(labels * 255 / 16)
    file = tmp_path / "d.npz"
    np.savez(file, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    dataset = datasets.load(f"arrays:{file}?noise=0.9&redraw={'true' if redraw else 'false'}")
    right = (dataset.train.labels == dataset.train.clean_labels).mean()
    assert right < 0.3
    network = teacher.freeze(Perfect(), InputTransform((0.0,), (1.0,)), "x:Perfect", dataset.classes, CPU)
    settings = PrecomputeSettings(augment="none", views=1, fields=("logits",))
    found = precompute.run(settings, dataset, network, tmp_path / "store")
    assert found["teacher_accuracy"] == [1.0]
    upside_down = replace(network, module=Wrong())
    with pytest.raises(MismatchError, match=r"the teacher is right on 0\.00% of the first 200 samples"):
        precompute.run(settings, dataset, upside_down, tmp_path / "other")


class Wrong(Perfect):
    def forward(self, x):
        return -super().forward(x)


@pytest.fixture
def half_right(tmp_path):
    """Data of two parts, of which `Perfect` knows the first, and what a command would do there."""
    count = 20_000
    labels = np.arange(count) % 10
    images = np.zeros((count, 2, 2, 1), np.uint8)
    images[:, 0, 0, 0] = np.round((labels + (np.arange(count) > count // 2)) % 10 * 255 / 16)
    np.savez(
        tmp_path / "d.npz", train_images=images, train_labels=labels, test_images=images[:9], test_labels=labels[:9]
    )
    dataset = datasets.load(f"arrays:{tmp_path / 'd.npz'}")

    def fill(path, least, std=1.0):
        transform = InputTransform((0.0,), (std,))
        torch.manual_seed(0)
        network = teacher.freeze(Perfect(), transform, "x:Perfect", dataset.classes, CPU)
        settings = PrecomputeSettings(augment="none", views=1, fields=("logits",), min_accuracy=least)
        return precompute.run(settings, dataset, network, path)

    return fill


def logged(path):
    return sorted(file.name for file in path.glob("_kcd/log/0/v*.json"))


def test_a_store_refused_in_its_first_view_is_begun_anew_by_other_settings(half_right, tmp_path):
    """Although a part of it is logged; what it would have sealed leaves nothing behind, and files of others stay."""
    with pytest.raises(
        MismatchError, match=r"right on 5\d\.\d\d% of the first 20000 samples of view 0, expected at least 90"
    ):
        half_right(tmp_path / "store", 0.9)
    assert len(logged(tmp_path / "store")) == 1
    (tmp_path / "store" / "notes.txt").write_text("mine")
    for path in ("store", "fresh"):
        assert half_right(tmp_path / path, 0.1, std=0.999)["views"] == 1
    assert (tmp_path / "store" / "notes.txt").read_text() == "mine"
    (tmp_path / "store" / "notes.txt").unlink()
    assert same_files(tmp_path / "store", tmp_path / "fresh")


def test_a_store_refused_goes_on_with_a_lower_demand_and_then_is_nobody_elses(half_right, tmp_path):
    path = tmp_path / "store"
    with pytest.raises(MismatchError, match="expected at least 90"):
        half_right(path, 0.9)
    (first,) = (path / "_kcd/log/0").glob("v*.json")
    before = first.stat().st_mtime_ns
    half_right(path, 0.1)
    assert first.stat().st_mtime_ns == before
    assert not (path / "_kcd/refused").exists()
    with pytest.raises(MismatchError, match=r"differ in teacher\.transform"):
        half_right(path, 0.1, std=0.999)


def test_parameters_that_cannot_be_told_are_refused_before_the_teacher_runs(tmp_path):
    dataset = datasets.load(CLEAN)
    module = torch.nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    network = teacher.freeze(module, InputTransform(dataset.mean, dataset.std), "x:Flat", dataset.classes, CPU)
    asked = {"augment": "crop", "padding": 2, "views": 1, "min_accuracy": 0, "fields": ("logits", "parameters")}
    settings = PrecomputeSettings(**asked)
    for dry_run in (True, False):
        with pytest.raises(SettingsError, match="so its filters have no groups"):
            precompute.run(settings, dataset, network, tmp_path / "store", dry_run=dry_run)
    assert not (tmp_path / "store").exists()
