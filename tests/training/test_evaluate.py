import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lessons import CPU, TinyNet, digits
from torch import nn

from kcdcache.methods.losses import cross_entropy
from kcdcache.networks.input_transform import InputTransform
from kcdcache.settings import ViewSettings
from kcdcache.training import evaluation
from kcdcache.views import rules

UNSCALED = InputTransform((0.0,) * 3, (1.0,) * 3)


@pytest.fixture(scope="module")
def split():
    return digits(20, 30).test


@pytest.fixture
def network():
    torch.manual_seed(3)
    return TinyNet()


def plain_rule():
    return rules.plain(rules.rule_from(ViewSettings(augment="crop", padding=2), (16, 16)))


def some_logits(count, classes, seed, spread=3.0):
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(seed)) * spread


def reference_calibration_error(logits, labels, bins):
    """Sum over bins of |bin| / n times |accuracy - mean confidence|, with bin b holding [b, b+1) / bins."""
    members = [[] for _ in range(bins)]
    for row, label in zip(logits.double(), labels, strict=True):
        p = torch.softmax(row, 0)
        confidence = float(p.max())
        members[min(int(confidence * bins), bins - 1)].append((confidence, float(p.argmax() == label)))
    gaps = [abs(np.mean([r for _, r in bin]) - np.mean([c for c, _ in bin])) * len(bin) for bin in members if bin]
    return sum(gaps) / len(labels)


@given(st.integers(1, 60), st.integers(2, 8), st.integers(1, 20), st.integers(0, 999), st.sampled_from([0.1, 3, 50]))
def test_calibration_error_equals_a_slow_reference(count, classes, bins, seed, spread):
    logits = some_logits(count, classes, seed, spread)
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, classes, count))
    found = evaluation.calibration_error(logits, labels, bins)
    assert found == pytest.approx(reference_calibration_error(logits, labels, bins), abs=1e-9)
    assert 0 <= found <= 1


def test_calibration_error_by_hand():
    sure, unsure = torch.tensor([100.0, 0.0]), torch.tensor([0.0, 0.0])
    labels = torch.tensor([0, 1, 0, 1])
    assert evaluation.calibration_error(torch.stack([sure] * 4), labels) == pytest.approx(0.5)
    assert evaluation.calibration_error(torch.stack([unsure] * 4), labels) == pytest.approx(0)


def test_accuracy_and_agreement_count_samples():
    logits, labels = torch.eye(4)[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 3])
    assert evaluation.accuracy(logits, labels) == 0.75
    assert evaluation.agreement(logits, 9 * torch.eye(4)[[0, 1, 3, 3]]) == 0.5


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_network_as_it_was(network, split, training):
    network.train(training)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    evaluation.measure(network, UNSCALED, split, plain_rule(), CPU)
    assert network.training == training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_failed_measurement_restores_the_training_mode(split):
    wrong = nn.Sequential(nn.Flatten(), nn.Linear(5, 2)).train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        evaluation.predict(wrong, UNSCALED, split, plain_rule(), CPU)
    assert wrong.training


def test_predictions_are_those_of_single_plain_images_in_eval_mode(network, split, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 7)
    transform = InputTransform((0.3, 0.2, 0.1), (0.5, 0.4, 0.3))
    found = evaluation.predict(network.train(), transform, split, plain_rule(), CPU)
    network.eval()
    for i in range(len(split)):
        pixels = torch.from_numpy(split.images(np.array([i]))).permute(0, 3, 1, 2) / 255
        torch.testing.assert_close(found[i : i + 1], network(transform(pixels)), atol=1e-5, rtol=1e-5)


def test_measurements_are_those_of_the_predictions(network, split):
    logits = evaluation.predict(network, UNSCALED, split, plain_rule(), CPU)
    labels = torch.from_numpy(split.labels)
    assert evaluation.measure(network, UNSCALED, split, plain_rule(), CPU) == {
        "test_accuracy": evaluation.accuracy(logits, labels),
        "test_loss": pytest.approx(float(cross_entropy(logits, labels).mean())),
        "test_calibration_error": evaluation.calibration_error(logits, labels),
    }
