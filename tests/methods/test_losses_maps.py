import math

import numpy as np
import pytest
import torch

from kcdcache.errors import MismatchError
from kcdcache.methods.feature_maps import attention_transfer, fsp, hierarchical_context, hint, variational
from kcdcache.teacher.fields import attention, fsp_matrix

VARIANCES = np.array([-3.0, 0.0, 2.0])


def drawn(seed, *shape, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape)


def tensor(array):
    return torch.from_numpy(np.asarray(array)).float()


def close(found, expected):
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def pooled(features, height, width):
    """Average over the cells floor(i H / h) to ceil((i + 1) H / h), one at a time."""
    H, W = features.shape[2:]
    out = np.zeros((*features.shape[:2], height, width))
    for i in range(height):
        for j in range(width):
            rows = slice(i * H // height, -(-(i + 1) * H // height))
            columns = slice(j * W // width, -(-(j + 1) * W // width))
            out[:, :, i, j] = features[:, :, rows, columns].mean(axis=(2, 3))
    return out


def reference_attention(features, side=None):
    rows = []
    for sample in features if side is None else pooled(features, *side):
        positions = [(i, j) for i in range(sample.shape[1]) for j in range(sample.shape[2])]
        q = [sum(channel[i, j] ** 2 for channel in sample) / len(sample) for i, j in positions]
        size = math.sqrt(sum(value**2 for value in q))
        rows.append([value / size if size else 0.0 for value in q])
    return np.array(rows)


def reference_error(student, target):
    return np.array(
        [
            sum((a - b) ** 2 for a, b in zip(s.flat, t.flat, strict=True)) / s.size
            for s, t in zip(student, target, strict=True)
        ]
    )


def reference_matrix(bottom, top):
    side = np.minimum(bottom.shape[2:], top.shape[2:])
    bottom, top = pooled(bottom, *side), pooled(top, *side)
    out = np.zeros((len(bottom), bottom.shape[1], top.shape[1]))
    for n, i, j in np.ndindex(*out.shape):
        out[n, i, j] = (bottom[n, i] * top[n, j]).mean()
    return out


def reference_variational(mean, target, raw=VARIANCES):
    rows = []
    for mu, t in zip(mean, target, strict=True):
        variance = [math.log1p(math.exp(a)) + 1e-5 for a in raw]
        terms = [
            0.5 * ((mu[c, i, j] - t[c, i, j]) ** 2 / variance[c] + math.log(variance[c]))
            for c, i, j in np.ndindex(*mu.shape)
        ]
        rows.append(sum(terms) / len(terms))
    return np.array(rows)


def reference_context(student, target):
    parts = [(1.0, reference_error(student, target))]
    for side in (4, 2, 1):
        if side < min(student.shape[2:]):
            parts.append((parts[-1][0] / 2, reference_error(pooled(student, side, side), pooled(target, side, side))))
    return sum(weight * error for weight, error in parts) / sum(weight for weight, _ in parts)


@pytest.mark.parametrize("side", [None, (4, 4), (2, 2), (3, 5), (1, 1)])
def test_attention_equals_a_float64_reference(side):
    features = drawn(0, 3, 5, 8, 8)
    close(attention(tensor(features), side), reference_attention(features, side))


def test_attention_ignores_scale_and_the_order_of_channels_and_has_length_one():
    features = tensor(drawn(1, 3, 5, 4, 4))
    found = attention(features)
    torch.testing.assert_close(attention(features[:, [3, 1, 0, 4, 2]] * -7), found)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    assert (found >= 0).all()


def test_attention_pools_the_features_and_not_the_map():
    features = torch.tensor([[[[3.0, -3.0, 0.0, 2.0]]]])
    torch.testing.assert_close(attention(features, (1, 2)), torch.tensor([[0.0, 1.0]]))


def test_attention_of_a_zero_map_is_zero():
    assert torch.equal(attention(torch.zeros(2, 3, 2, 2)), torch.zeros(2, 4))


def test_attention_transfer_equals_a_float64_reference():
    student, target = drawn(2, 4, 5, 6, 6), drawn(3, 4, 9, 12, 12)
    found = attention_transfer(attention(tensor(student)), attention(tensor(target), (6, 6)))
    close(found, reference_error(reference_attention(student), reference_attention(target, (6, 6))))


@pytest.mark.parametrize("sides", [((8, 8), (8, 8)), ((8, 8), (4, 4)), ((3, 3), (6, 6)), ((4, 6), (8, 4))])
def test_flow_matrix_equals_a_float64_reference(sides):
    bottom, top = drawn(4, 2, 3, *sides[0]), drawn(5, 2, 4, *sides[1])
    close(fsp_matrix(tensor(bottom), tensor(top)), reference_matrix(bottom, top))


def test_flow_matrix_ignores_the_order_of_positions_and_is_linear_in_each_map():
    bottom, top = tensor(drawn(6, 2, 3, 4, 4)), tensor(drawn(7, 2, 5, 4, 4))
    found = fsp_matrix(bottom, top)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    moved = fsp_matrix(*(f.flatten(2)[:, :, order].view_as(f) for f in (bottom, top)))
    torch.testing.assert_close(moved, found)
    torch.testing.assert_close(fsp_matrix(bottom * 2, top * -3), found * -6)
    torch.testing.assert_close(fsp_matrix(top, bottom), found.mT)


@pytest.mark.parametrize(
    ("loss", "shape"), [(hint, (3, 4, 5, 5)), (hint, (3, 7)), (fsp, (3, 4, 5)), (attention_transfer, (3, 9))]
)
def test_squared_errors_equal_a_float64_reference_and_grow_with_the_square_of_scale(loss, shape):
    student, target = drawn(8, *shape), drawn(9, *shape)
    found = loss(tensor(student), tensor(target))
    close(found, reference_error(student, target))
    torch.testing.assert_close(loss(tensor(student) * 3, tensor(target) * 3), found * 9)


def test_variational_equals_a_float64_reference():
    mean, target = drawn(10, 4, 3, 5, 5), drawn(11, 4, 3, 5, 5)
    close(variational(tensor(mean), tensor(target), tensor(VARIANCES)), reference_variational(mean, target))


def test_variational_is_least_where_mean_and_variance_fit_the_target():
    """The best mean is the target, the best variance the squared error per channel: both gradients vanish there."""
    target = torch.zeros(2, 2, 4, 4)
    mean = torch.cat([torch.full((2, 1, 4, 4), 0.5), torch.full((2, 1, 4, 4), 2.0)], dim=1)
    best = torch.tensor([0.25, 4.0]) - 1e-5
    raw = torch.log(torch.expm1(best)).requires_grad_()
    variational(mean, target, raw).mean().backward()
    torch.testing.assert_close(raw.grad, torch.zeros(2), atol=1e-6, rtol=0)
    at = target.clone().requires_grad_()
    variational(at, target, raw.detach()).mean().backward()
    assert torch.equal(at.grad, torch.zeros_like(at))


@pytest.mark.parametrize("side", [(8, 8), (5, 5), (4, 4), (3, 6), (2, 2), (1, 1)])
def test_hierarchical_context_equals_a_float64_reference(side):
    student, target = drawn(12, 3, 4, *side), drawn(13, 3, 4, *side)
    close(hierarchical_context(tensor(student), tensor(target)), reference_context(student, target))


def test_hierarchical_context_of_one_position_is_the_hint():
    student, target = tensor(drawn(14, 3, 4, 1, 1)), tensor(drawn(15, 3, 4, 1, 1))
    assert torch.equal(hierarchical_context(student, target), hint(student, target))


def test_hierarchical_context_of_a_constant_difference_is_its_square():
    student = tensor(drawn(16, 3, 4, 8, 8))
    torch.testing.assert_close(hierarchical_context(student, student + 2), torch.full((3,), 4.0))


@pytest.mark.parametrize("loss", [hint, hierarchical_context])
@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 3, 1, 4), (2, 3, 4, 5)])
def test_a_map_that_would_only_broadcast_is_refused(loss, shape):
    with pytest.raises(
        MismatchError, match=r"expected the student's features in the teacher's shape \(.*found \(2, 3, 4, 4\)"
    ):
        getattr(loss, "__wrapped__", loss)(torch.zeros(2, 3, 4, 4), torch.zeros(*shape))
