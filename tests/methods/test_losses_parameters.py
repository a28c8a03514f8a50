import math

import numpy as np
import pytest
import torch
from test_losses_maps import close, drawn, tensor

from kcdcache.methods.filter_statistics import recoded_divergence, soft_threshold
from kcdcache.teacher.fields import aggregated, filter_quantiles, pooled


def reference_quantiles(weight, count):
    norms = sorted(math.sqrt(sum(w * w for w in filt)) for filt in weight.reshape(len(weight), -1).tolist())
    found = []
    for number in range(count):
        place = number * (len(norms) - 1) / (count - 1)
        low = min(int(place), len(norms) - 1)
        high = min(low + 1, len(norms) - 1)
        found.append(norms[low] + (place - low) * (norms[high] - norms[low]))
    return found


def reference_recoded(student, teacher, threshold):
    rows = []
    for ours, theirs in zip(student, teacher, strict=True):
        total = 0.0
        for s, t in zip(ours, theirs, strict=True):
            rest = math.copysign(max(abs(s - t) - threshold, 0.0), s - t)
            total += math.exp(t) * (math.exp(rest) - 1 - rest)
        rows.append(total)
    return rows


def logs(seed, rows=5, bins=7, scale=1.0):
    return torch.log_softmax(tensor(drawn(seed, rows, bins, scale=scale)), -1)


@pytest.mark.parametrize("filters", [1, 2, 5, 64, 100])
def test_quantiles_of_filter_norms_equal_a_plain_reference(filters):
    weight = drawn(filters, filters, 3, 3, 3)
    close(filter_quantiles(tensor(weight), 64), reference_quantiles(weight, 64))
    close(filter_quantiles(tensor(weight), 3), reference_quantiles(weight, 3))


def test_quantiles_ignore_the_order_of_filters_and_of_what_is_inside_them():
    weight = tensor(drawn(0, 12, 3, 3, 3))
    found = filter_quantiles(weight, 9)
    torch.testing.assert_close(filter_quantiles(weight.flip(0), 9), found)
    torch.testing.assert_close(filter_quantiles(weight.flip(1, 2), 9), found)
    torch.testing.assert_close(filter_quantiles(3 * weight, 9), 3 * found)
    assert (found.diff() >= 0).all()


def test_repeating_a_group_of_layers_leaves_its_profile_as_it_is():
    layers = [tensor(drawn(seed, count, 2, 3, 3)) for seed, count in ((1, 4), (2, 9))]
    close(aggregated(layers, 5), np.mean([reference_quantiles(x.double().numpy(), 5) for x in layers], axis=0))
    torch.testing.assert_close(aggregated(layers * 3, 5), aggregated(layers, 5))


def test_profiles_are_differentiable_also_where_a_filter_is_zero():
    weight = tensor(drawn(3, 6, 2, 3, 3))
    weight[2] = 0
    weight.requires_grad_()
    filter_quantiles(weight, 64).sum().backward()
    assert torch.isfinite(weight.grad).all()
    assert (weight.grad.flatten(1).abs().sum(1) > 0).sum() == 5


@pytest.mark.parametrize("scale", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 1.0])
def test_the_recoded_divergence_equals_a_float64_reference(threshold, scale):
    student, teacher = logs(0, scale=scale), logs(1, scale=scale)
    expected = reference_recoded(student.double().tolist(), teacher.double().tolist(), threshold)
    torch.testing.assert_close(
        recoded_divergence(student, teacher, threshold),
        torch.tensor(expected, dtype=torch.float32),
        rtol=1e-3,
        atol=1e-9,
    )


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_without_a_threshold_it_is_the_divergence_and_so_the_cross_entropy_with_its_gradient(scale):
    student, teacher = logs(2, scale=scale).requires_grad_(), logs(3, scale=scale)
    found = recoded_divergence(student, teacher)
    plain = (teacher.exp() * (teacher - student)).sum(-1)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    torch.testing.assert_close(gradient, student.detach().exp() - teacher.exp(), rtol=1e-4, atol=1e-6)


def test_equal_distributions_cost_nothing_and_have_no_gradient():
    student = logs(4).requires_grad_()
    for threshold in (0.0, 0.1):
        found = recoded_divergence(student, student.detach(), threshold)
        assert found.tolist() == [0.0] * 5
        assert torch.autograd.grad(found.sum(), student)[0].abs().sum() == 0


def test_the_gradients_support_shrinks_as_the_threshold_grows_and_only_within_it():
    student, teacher = logs(5, rows=40).requires_grad_(), logs(6, rows=40)
    before = torch.ones(40, 7, dtype=torch.bool)
    for threshold in (0.0, 0.05, 0.2, 0.5, 1.0, 3.0, 100.0):
        (gradient,) = torch.autograd.grad(recoded_divergence(student, teacher, threshold).sum(), student)
        support = gradient != 0
        assert not (support & ~before).any()
        assert torch.equal(support, (student - teacher).abs() > threshold)
        before = support
    assert not before.any()


def test_the_penalty_never_exceeds_plain_matching_and_falls_with_the_threshold():
    student, teacher = logs(7, rows=50, scale=3), logs(8, rows=50, scale=3)
    found = torch.stack([recoded_divergence(student, teacher, threshold) for threshold in (0, 0.1, 0.5, 2, 9)])
    assert (found.diff(dim=0) <= 1e-6).all()
    assert (found >= 0).all()


def test_probabilities_that_underflow_give_numbers():
    student = torch.log_softmax(torch.tensor([[0.0, 400.0, 0.0]]), -1).requires_grad_()
    teacher = torch.log_softmax(torch.tensor([[400.0, 0.0, 0.0]]), -1)
    found = recoded_divergence(student, teacher, 0.1)
    assert math.isclose(float(found.detach()), 399.9, rel_tol=0.01)
    assert torch.isfinite(torch.autograd.grad(found.sum(), student)[0]).all()


def test_soft_thresholding_shrinks_towards_zero():
    found = soft_threshold(torch.tensor([-2.0, -0.5, 0.0, 0.5, 3.0]), 0.5)
    assert found.tolist() == [-1.5, 0.0, 0.0, 0.0, 2.5]


def test_pooling_is_the_mean_over_places():
    maps = drawn(9, 3, 4, 2, 5)
    close(pooled(tensor(maps)), maps.mean((2, 3)))
