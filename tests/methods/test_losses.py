import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from kcdcache.methods.losses import cross_entropy, entropy, soft_divergence

FAR = torch.tensor([[1e4, -1e4, 0.0], [0.0, -105.0, -300.0], [-1e4, -1e4, -1e4], [1e4, 1e4 - 1, 0.0]])


def logits_within(limit):
    shapes = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6)
    return arrays(np.float32, shapes, elements=st.floats(-limit, limit, width=32))


def probabilities(row, temperature=1.0):
    """Softmax in float64, one number at a time."""
    top = max(row)
    powers = [math.exp((z - top) / temperature) for z in row]
    return [power / sum(powers) for power in powers]


def reference_entropy(row):
    return -sum(p * math.log(p) for p in probabilities(row) if p > 0)


def reference_divergence(row, target, temperature):
    """T^2 KL(target || softmax(row / T)) with the logarithm of softmax written out."""
    top = max(row) / temperature
    log_sum = top + math.log(sum(math.exp(z / temperature - top) for z in row))
    terms = [p * (math.log(p) - (z / temperature - log_sum)) for p, z in zip(target, row, strict=True) if p > 0]
    return temperature**2 * sum(terms)


@given(logits_within(1e4))
def test_entropy_equals_a_float64_reference(z):
    expected = [reference_entropy(row) for row in z.astype(np.float64).tolist()]
    np.testing.assert_allclose(entropy(torch.from_numpy(z)), expected, rtol=1e-5, atol=2e-6)


@settings(max_examples=300)
@given(logits_within(float(np.finfo(np.float32).max)))
def test_entropy_lies_in_zero_to_log_classes_for_all_finite_logits(z):
    found = entropy(torch.from_numpy(z)).numpy()
    assert np.all((found >= 0) & (found <= np.float32(math.log(z.shape[1]))))


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 100, 1000])
def test_entropy_of_nearly_equal_logits_never_exceeds_log_classes(classes):
    z = torch.randn(200, classes, generator=torch.Generator().manual_seed(classes)) * 1e-6
    assert float(entropy(z).max()) <= np.float32(math.log(classes))
    torch.testing.assert_close(entropy(torch.zeros(1, classes)), torch.tensor([math.log(classes)]))


def test_entropy_stays_finite_where_the_reference_code_gives_nan():
    p = torch.softmax(FAR, dim=1)
    assert torch.isnan(-(p * torch.log(p)).sum(1))[:2].all()
    expected = [reference_entropy(row) for row in FAR.tolist()]
    torch.testing.assert_close(entropy(FAR), torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_a_class_ruled_out_by_minus_infinity_has_no_part_in_the_entropy():
    z = torch.tensor([[1.0, 2.0, 0.5]])
    masked = torch.cat([z, torch.full((1, 1), -math.inf)], dim=1)
    torch.testing.assert_close(entropy(masked), entropy(z))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 100.0, 6e4])
def test_low_precision_logits_give_finite_float32_losses(dtype, scale):
    z = (torch.linspace(-1, 1, 40).view(4, 10) * scale).to(dtype)
    labels, target = torch.tensor([0, 3, 5, 9]), torch.softmax(z.float().flip(1), dim=1)
    for found in (entropy(z), cross_entropy(z, labels), soft_divergence(z, target, 4.0)):
        assert found.dtype == torch.float32
        assert torch.isfinite(found).all()
    assert torch.equal(entropy(z), entropy(z.float()))


@given(logits_within(50), st.floats(-100, 100, width=32), st.randoms())
def test_entropy_ignores_a_shift_and_the_order_of_classes(z, shift, random):
    order = random.sample(range(z.shape[1]), z.shape[1])
    moved = torch.from_numpy(z[:, order]) + shift
    torch.testing.assert_close(entropy(moved), entropy(torch.from_numpy(z)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_spreads_the_smoothed_share_evenly(smoothing):
    z = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.tensor([0, 6, 3, 3, 1])
    expected = []
    for row, label in zip(z.tolist(), labels.tolist(), strict=True):
        share = [smoothing / 7 + (1 - smoothing) * (c == label) for c in range(7)]
        expected.append(-sum(q * math.log(p) for q, p in zip(share, probabilities(row), strict=True)))
    torch.testing.assert_close(cross_entropy(z, labels, smoothing), torch.tensor(expected))


@given(logits_within(1e4), st.sampled_from([0.5, 1.0, 4.0, 20.0]), st.integers(0, 99))
def test_divergence_equals_a_float64_reference(z, temperature, seed):
    other = np.random.default_rng(seed).normal(0, 3, z.shape)
    target = np.array([probabilities(row, temperature) for row in other.tolist()], np.float32)
    rows = zip(z.astype(np.float64).tolist(), target.astype(np.float64).tolist(), strict=True)
    expected = [reference_divergence(row, p, temperature) for row, p in rows]
    found = soft_divergence(torch.from_numpy(z), torch.from_numpy(target), temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5 * temperature**2)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_is_zero_where_student_and_teacher_agree(temperature):
    z = torch.cat([torch.randn(50, 10, generator=torch.Generator().manual_seed(0)) * 5, torch.full((1, 10), 7.0)])
    same = soft_divergence(z, torch.softmax(z / temperature, dim=1), temperature)
    torch.testing.assert_close(same, torch.zeros(51), atol=1e-5, rtol=0)
    assert torch.all(soft_divergence(z, torch.softmax(-z / temperature, dim=1), temperature)[:50] > 0.01)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_of_the_divergence_is_t_times_the_difference_of_probabilities(temperature):
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    target = torch.softmax(torch.randn(4, 6, generator=torch.Generator().manual_seed(2)), dim=1)
    soft_divergence(z, target, temperature).sum().backward()
    student = torch.tensor([probabilities(row, temperature) for row in z.tolist()])
    torch.testing.assert_close(z.grad, temperature * (student - target))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_extreme_logits_and_one_hot_targets_leave_losses_and_gradients_finite(temperature):
    z = FAR.clone().requires_grad_()
    target = torch.eye(3)[torch.tensor([1, 2, 0, 2])]
    loss = soft_divergence(z, target, temperature) + cross_entropy(z, torch.tensor([1, 2, 0, 2]))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(z.grad).all()
