"""`evaluate`: a network's scores against slow references, the accuracy that its run recorded, and what is refused."""

import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import failure, outcome
from lessons import CPU, TinyNet
from pupils import SPEC, lines
from torch import nn

from kcdcache.commands.evaluate import evaluate
from kcdcache.datasets import datasets
from kcdcache.errors import MismatchError, NonFiniteError, SettingsError
from kcdcache.networks.input_transform import InputTransform
from kcdcache.networks.weights import load_network
from kcdcache.store import reader
from kcdcache.training import evaluation
from kcdcache.views import rules

FIT = {
    "data": SPEC, "model": "lessons:TinyNet", "epochs": 2, "batch_size": 64, "threads": 1, "ema_decay": 0.9,
    "augment": "crop", "padding": 2,
}  # fmt: skip
STORE = {"views": 1, "min_accuracy": 0, "augment": "crop", "padding": 2, "data": SPEC}
TRAIN = {"data": SPEC, "student": "lessons:TinyNet", "epochs": 2, "stages": 1, "batch_size": 64, "threads": 1}


def done(capsys, *words):
    code, out, err = outcome(capsys, *words)
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    from kcdcache.cli import main

    root = tmp_path_factory.mktemp("evaluated")
    asked = (
        ["fit", *lines(FIT | {"out": root / "teacher"})],
        [
            "precompute",
            *lines(STORE | {"teacher": "lessons:TinyNet", "weights": root / "teacher", "store": root / "s"}),
        ],
        ["train", *lines(TRAIN | {"store": root / "s", "out": root / "student"})],
    )
    for words in asked:
        assert main._outcome([*map(str, words), "--quiet"]) == 0
    return root


@pytest.fixture(scope="module")
def data():
    return datasets.load(SPEC)


def network_of(place):
    module = TinyNet()
    module.load_state_dict(load_network(place / "teacher")[1])
    return module.eval()


def plain_logits(module, data, split, rule="none"):
    """Logits of the images one by one."""
    found = []
    transform = InputTransform(data.mean, data.std)
    for position in range(len(split)):
        index = np.array([position])
        pixels = torch.from_numpy(split.images(index)).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            found.append(module(transform(pixels))[0].double().tolist())
    return found


def softmax(row):
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def slow_scores(logits, labels):
    """top-1, top-5, loss and ECE, sample by sample."""
    rows = [(row, softmax(row), label) for row, label in zip(logits, labels, strict=True)]
    ranks = [sum(value > row[label] for value in row) for row, _, label in rows]
    bins = {}
    for (_, p, _), rank in zip(rows, ranks, strict=True):
        bins.setdefault(min(int(max(p) * 15), 14), []).append((max(p), rank == 0))
    gaps = [abs(sum(c - r for c, r in found)) for found in bins.values()]
    losses = [-math.log(p[label]) for _, p, label in rows]
    n = len(rows)
    return sum(rank < 1 for rank in ranks) / n, sum(rank < 5 for rank in ranks) / n, sum(losses) / n, sum(gaps) / n


@pytest.mark.parametrize("name", ["test", "train"])
def test_scores_equal_a_slow_reference(place, data, name):
    found = evaluate(network_of(place), data, batch_size=17, device="cpu").splits[name]
    split = getattr(data, name)
    logits = plain_logits(network_of(place), data, split)
    expected = slow_scores(logits, split.labels.tolist())
    assert (found.top1, found.top5, found.loss, found.calibration_error) == pytest.approx(expected, abs=1e-5)
    right = [row.index(max(row)) == label for row, label in zip(logits, split.labels, strict=True)]
    for label, accuracy in enumerate(found.class_accuracy):
        own = [ok for ok, given in zip(right, split.labels, strict=True) if given == label]
        assert accuracy == pytest.approx(sum(own) / len(own))


def test_agreement_equals_a_slow_reference(place, data):
    student = network_of(place)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    found = evaluate(student, data, store=place / "s", splits=("test",), device="cpu").agreement
    knowledge, transform = reader.open(place / "s"), InputTransform(data.mean, data.std)
    same, total = [], []
    for sample in range(len(data.train)):
        index = np.array([sample])
        view = knowledge.knowledge.views
        pixels = rules.show(view, data.train.images(index), rules.parameters(view, index, 0), CPU)
        with torch.no_grad():
            ours = student(transform(pixels))[0].double().tolist()
        theirs = knowledge.read("logits", 0, index)[0].tolist()
        same.append(ours.index(max(ours)) == theirs.index(max(theirs)))
        pairs = zip(softmax(theirs), softmax(ours), strict=True)
        total.append(sum(p * math.log(p / q) for p, q in pairs))
    assert found.images == len(same)
    assert (found.top1, found.kl) == pytest.approx((sum(same) / len(same), sum(total) / len(total)), abs=1e-5)
    assert found.kl > 1e-4


@pytest.mark.parametrize("run", ["teacher", "student"])
def test_a_runs_accuracy_is_the_one_that_it_recorded(place, capsys, run):
    spec = ["lessons:TinyNet", "--weights", place / run]
    found = json.loads(done(capsys, "evaluate", *spec, "--data", SPEC, "--threads", 1, "--json", "--quiet"))
    summary = json.loads((place / run / "summary.json").read_text())
    assert found["splits"]["test"]["top1"] == summary["accuracy_last"]
    assert found["splits"]["test"]["calibration_error"] == summary["calibration_error"]
    assert found["parameters"] == sum(value.numel() for value in TinyNet().parameters())
    assert len(found["splits"]["test"]["worst_classes"]) == 5
    if run == "teacher":
        assert found["ema"]["splits"]["test"]["top1"] == summary["accuracy_ema"]


def test_the_table_names_splits_estimator_and_worst_classes(place, capsys):
    spec = ["lessons:TinyNet", "--weights", place / "student", "--store", place / "s"]
    out = done(capsys, "evaluate", *spec, "--data", SPEC, "--quiet")
    assert "parameters" in out
    for text in ("top-5", "15 equal-width bins", "lowest accuracy per class on train", "same class, mean KL"):
        assert text in out
    assert repr(evaluate(TinyNet(), SPEC, splits=("test",))).startswith("TinyNet: TinyNet, ")


def test_five_classes_or_fewer_have_no_top5():
    labels = np.array([0, 1, 2])
    found = evaluation.score(nn.Flatten(), InputTransform((0.0,), (1.0,)), [torch.eye(3)[:, None, None]], labels, 3)
    assert (found.top1, found.top5) == (1, None)
    assert found.class_accuracy == (1, 1, 1)


class Fixed(nn.Module):
    """Gives the same row for every image."""

    def __init__(self, row):
        super().__init__()
        self.row = nn.Parameter(torch.tensor(row))

    def forward(self, images):
        return self.row.expand(len(images), -1)


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ([0.0] * 9, MismatchError, r"outputs of shape \(60, 9\) for 60 images of 10 classes; expected is one logit"),
        ([math.nan] * 10, NonFiniteError, "outputs for image 0 are not finite"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(data, row, error, message):
    with pytest.raises(error, match=message):
        evaluate(Fixed(row), data, device="cpu")


def test_probabilities_are_told(data, caplog):
    evaluate(Fixed([0.1] * 10), data, splits=("test",), device="cpu")
    assert "its outputs are probabilities; accuracy holds, but loss and ECE expect logits" in caplog.text


def test_unknown_splits_are_refused(data, capsys):
    with pytest.raises(SettingsError, match="unknown split 'val'; known: test, train"):
        evaluate(TinyNet(), data, splits=("val",))
    code, told = failure(capsys, "evaluate", "x", "--data", SPEC, "--splits", "val")
    assert (code, "splits.0" in told) == (2, True)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """The folder of a small network that can be built from its record."""
    from kcdcache.cli import main

    root = tmp_path_factory.mktemp("zoo") / "run"
    asked = {"data": "digits?train=60&test=20", "model": "resnet8", "epochs": 1, "out": root}
    assert main._outcome(["fit", *lines(asked), "--quiet"]) == 0
    return root


def test_a_run_folder_and_its_saved_network_give_the_same(zoo, capsys):
    asked = ("--data", "digits?train=60&test=20", "--json", "--quiet")
    first, second = (json.loads(done(capsys, "evaluate", where, *asked)) for where in (zoo, zoo / "model.json"))
    assert first["splits"]["train"]["top1"] == second["splits"]["train"]["top1"]
    assert first["splits"]["test"]["top1"] == json.loads((zoo / "summary.json").read_text())["accuracy_last"]


def archive(path, classes, channels=3, swapped=False):
    generator = np.random.default_rng(0)
    names = [str(number) for number in range(classes)]
    np.savez(
        path,
        train_images=generator.integers(0, 255, (20, 16, 16, channels), dtype=np.uint8),
        train_labels=np.arange(20) % classes, test_labels=np.arange(20) % classes,
        test_images=generator.integers(0, 255, (20, 16, 16, channels), dtype=np.uint8),
        classes=np.array(names[::-1] if swapped else names),
    )  # fmt: skip
    return f"arrays:{path}"


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"classes": 4}, "classes"),
        ({"classes": 10, "channels": 1}, "sees 3 channels, the images have 1"),
        ({"classes": 10, "swapped": True}, "classes[0]: '9' against '0'"),
    ],
)
def test_data_that_do_not_fit_the_network_are_refused(zoo, tmp_path, capsys, made, message):
    code, told = failure(capsys, "evaluate", zoo, "--data", archive(tmp_path / "set.npz", **made), "--quiet")
    assert code == 4
    assert message in told


def test_another_datas_store_and_missing_networks_are_refused(place, zoo, tmp_path, capsys):
    code, told = failure(capsys, "evaluate", zoo, "--data", "digits", "--store", place / "s", "--quiet")
    assert (code, "differ" in told) == (4, True)
    code, told = failure(capsys, "evaluate", tmp_path, "--data", "digits")
    assert (code, "no saved network in" in told) == (10, True)
    code, told = failure(capsys, "evaluate", "resnet8", "--data", "digits")
    assert (code, "needs its weights" in told) == (2, True)


def test_the_guides_commands_and_code_run(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).resolve().parents[2] / "docs/pages/guides/evaluate.md").read_text()
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```sh\n(.*?)```", page, re.S)
    commands = [shlex.split(line)[1:] for block in blocks for line in block.splitlines()]
    assert [words[0] for words in commands].count("evaluate") == 3
    for words in commands:
        done(capsys, *words, "--quiet")
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], {})
    assert "lowest accuracy per class on test" in capsys.readouterr().out
