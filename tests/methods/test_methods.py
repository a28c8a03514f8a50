import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kcdcache.errors import SettingsError
from kcdcache.methods.base import hard_term
from kcdcache.methods.registry import METHODS, basic, choose, method_named
from kcdcache.settings import MethodSettings


@dataclass(frozen=True)
class Sheet:
    index: Tensor
    pixels: Tensor
    labels: Tensor
    partner_labels: Tensor
    epsilon: Tensor
    mixed: Tensor
    probabilities: Tensor | None
    knowledge: dict[str, Tensor]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def sheet():
    """Three plain points, one mixed with epsilon 0, two mixed."""
    return Sheet(
        index=torch.arange(6),
        pixels=torch.zeros(6, 3, 4, 4),
        labels=torch.tensor([0, 1, 2, 3, 4, 0]),
        partner_labels=torch.tensor([0, 1, 2, 0, 0, 3]),
        epsilon=torch.tensor([0, 0, 0, 0, 0.2, 0.3]),
        mixed=torch.tensor([False, False, False, True, True, True]),
        probabilities=torch.softmax(random(6, 5, seed=1) / 4, dim=1),
        knowledge={},
    )


def hard(logits, sheet, weights):
    return hard_term(logits, sheet, weights.mix_label, weights.smoothing)


def log_softmax(row):
    top = max(row)
    log_sum = top + math.log(sum(math.exp(z - top) for z in row))
    return [z - log_sum for z in row]


def reference_kd(logits, sheet, gamma, alpha, temperature, mix):
    """gamma CE + alpha T^2 KL, one sample and one class at a time."""
    out = []
    for i, row in enumerate(logits.tolist()):
        eps = float(sheet.epsilon[i]) if mix else 0.0
        hard = -(1 - eps) * log_softmax(row)[sheet.labels[i]] - eps * log_softmax(row)[sheet.partner_labels[i]]
        student = log_softmax([z / temperature for z in row])
        target = sheet.probabilities[i].tolist()
        soft = sum(p * (math.log(p) - q) for p, q in zip(target, student, strict=True))
        out.append(gamma * hard + alpha * temperature**2 * soft)
    return torch.tensor(out)


def test_defaults_are_those_of_the_papers():
    kd, ce = METHODS["kd"], METHODS["ce"]
    assert (kd.gamma, kd.alpha, kd.temperature) == (0.1, 0.9, 4.0)
    assert (ce.gamma, ce.alpha) == (1.0, 0.0)


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(SettingsError, match="unknown method 'kdd'; did you mean 'kd'"):
        method_named("kdd")
    with pytest.raises(SettingsError, match="unknown method 'contrast'; known: at, "):
        choose(MethodSettings(method="contrast"))


def test_settings_win_over_the_methods_defaults_and_zero_counts_as_given():
    default = choose(MethodSettings(), 0.05).weights
    assert (default.gamma, default.alpha, default.temperature, default.smoothing) == (0.1, 0.9, 4.0, 0.05)
    given = choose(MethodSettings(gamma=0, alpha=0, temperature=2, mix_label="mix"), 0.0).weights
    assert (given.gamma, given.alpha, given.temperature, given.mix_label) == (0, 0, 2, "mix")


@pytest.mark.parametrize("mix_label", ["keep", "mix"])
def test_kd_equals_a_slow_reference_per_sample(sheet, mix_label):
    logits = random(6, 5) * 3
    weights = choose(MethodSettings(mix_label=mix_label, gamma=0.3, alpha=0.6, temperature=3), 0.0).weights
    expected = reference_kd(logits, sheet, 0.3, 0.6, 3, mix_label == "mix")
    torch.testing.assert_close(basic(logits, sheet, weights), expected, atol=1e-5, rtol=1e-5)


def test_kd_without_a_soft_share_is_ce(sheet):
    logits = random(6, 5)
    weights = choose(MethodSettings(gamma=1, alpha=0), 0.0).weights
    assert torch.equal(basic(logits, sheet, weights), hard(logits, sheet, weights))
    blind = replace(sheet, probabilities=None)
    assert torch.equal(basic(logits, blind, weights), hard(logits, sheet, weights))


def test_the_kept_label_ignores_the_partner(sheet):
    logits, weights = random(6, 5), choose(MethodSettings(mix_label="keep"), 0.0).weights
    other = replace(sheet, partner_labels=sheet.partner_labels.flip(0), epsilon=torch.full((6,), 0.9))
    assert torch.equal(hard(logits, sheet, weights), hard(logits, other, weights))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_mixed_label_counts_the_partner_by_epsilon(sheet, smoothing):
    logits = random(6, 5) * 2
    kept = hard(logits, sheet, choose(MethodSettings(), smoothing).weights)
    swapped = replace(sheet, labels=sheet.partner_labels)
    partner = hard(logits, swapped, choose(MethodSettings(), smoothing).weights)
    found = hard(logits, sheet, choose(MethodSettings(mix_label="mix"), smoothing).weights)
    assert torch.equal(found[:4], kept[:4])
    torch.testing.assert_close(
        found[4:], torch.stack([0.8 * kept[4] + 0.2 * partner[4], 0.7 * kept[5] + 0.3 * partner[5]])
    )
    assert not torch.allclose(found[4:], kept[4:])


def test_label_smoothing_is_in_the_hard_term_only(sheet):
    logits = random(6, 5)
    plain, smooth = (choose(MethodSettings(gamma=0), smoothing).weights for smoothing in (0.0, 0.3))
    assert torch.equal(basic(logits, sheet, plain), basic(logits, sheet, smooth))
    found = [hard(logits, sheet, weights) for weights in (plain, smooth)]
    assert not torch.allclose(*found)
