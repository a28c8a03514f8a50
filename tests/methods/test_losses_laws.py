"""The laws every distillation loss keeps, held over one table of them all."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from test_losses_boundary import reference_boundary
from test_losses_contrast import reference_nce
from test_losses_decoupled import reference_decoupled
from test_losses_maps import (
    VARIANCES,
    drawn,
    reference_attention,
    reference_context,
    reference_error,
    reference_matrix,
    reference_variational,
    tensor,
)
from test_losses_mutual import reference_logits
from test_losses_relations import reference_angle, reference_distance, reference_probabilistic, reference_similarity
from test_losses_selfsupervision import reference_rotated_divergence, reference_rotation_similarity

from kcdcache.methods import boundary, contrast, feature_maps, logits, losses, online, relations, self_supervision
from kcdcache.teacher import fields

MAP, CODE, LOGITS, VIEWS, SCORES = (3, 4, 4), (6,), (5,), (4, 6), (8,)
HALVES = [torch.float16, torch.bfloat16]
PEAK = np.log(40.0)


class Case(NamedTuple):
    """One loss as a function of (student, teacher, labels), and its float64 reference in the same form."""

    loss: object
    reference: object
    shape: tuple
    zero: bool = True  # at equality, and not negative elsewhere


def attended(student, teacher, labels):
    return feature_maps.attention_transfer(fields.attention(student), fields.attention(teacher))


def flows(student, teacher, labels):
    student = student.float()  # which stands for two maps here
    return feature_maps.fsp(fields.fsp_matrix(student, student), fields.fsp_matrix(teacher, teacher))


def rotations(student, teacher, labels):
    return self_supervision.rotation_similarity(student[:, 1:], student[:, 0], teacher[:, 1:], teacher[:, 0], 0.5, 0.75)


def over(loss, *settings):
    """The loss without labels."""
    return lambda student, teacher, labels: loss(student, teacher, *settings)


def labelled(loss, *settings):
    return lambda student, teacher, labels: loss(student, teacher, labels, *settings)


CASES = {
    "hint": Case(over(feature_maps.hint), over(reference_error), MAP),
    "attention": Case(attended, lambda s, t, y: reference_error(reference_attention(s), reference_attention(t)), MAP),
    "fsp": Case(flows, lambda s, t, y: reference_error(reference_matrix(s, s), reference_matrix(t, t)), MAP),
    "variational": Case(
        over(feature_maps.variational, tensor(VARIANCES)), over(reference_variational), MAP, zero=False
    ),
    "hierarchical": Case(over(feature_maps.hierarchical_context), over(reference_context), MAP),
    "similarity": Case(over(relations.similarity_preserving), over(reference_similarity), CODE),
    "distance": Case(over(relations.distance_wise), over(reference_distance), CODE),
    "angle": Case(over(relations.angle_wise), over(reference_angle), CODE),
    "probabilistic": Case(over(relations.probabilistic), over(reference_probabilistic), CODE),
    "nce": Case(
        lambda s, t, y: contrast.nce(s[:, 0], s[:, 1:], 50, torch.tensor(PEAK)),
        lambda s, t, y: reference_nce(s[:, 0], s[:, 1:], 50, 40.0),
        SCORES,
        zero=False,
    ),
    "dual": Case(
        lambda s, t, y: contrast.dual_contrast(s[:, 0], s[:, 1:]),
        lambda s, t, y: s[:, 1:].mean(axis=1) - s[:, 0],
        SCORES,
        zero=False,
    ),
    "sinkhorn": Case(over(contrast.sinkhorn_distance, 0.1, 10), None, CODE, zero=False),
    "decoupled": Case(labelled(logits.decoupled, 1.0, 8.0, 3.0), labelled(reference_decoupled, 1.0, 8.0, 3.0), LOGITS),
    # the weight is a constant to the gradient, so the reference's slope is another
    "entropy weighted": Case(over(logits.entropy_weighted, 4.0, 3.0), None, LOGITS),
    "rotations": Case(
        rotations,
        lambda s, t, y: reference_rotation_similarity(s[:, 1:], s[:, 0], t[:, 1:], t[:, 0], 0.5, 0.75),
        VIEWS,
    ),
    "rotated": Case(
        labelled(self_supervision.rotated_divergence, 4.0, 1.0),
        labelled(reference_rotated_divergence, 4.0, 1.0),
        (3, 5),
    ),
    "boundary": Case(
        lambda s, t, y: boundary.boundary_divergence(s, t, (y > 0).float(), 3.0),
        lambda s, t, y: reference_boundary(s, t, (y > 0) * 1.0, 3.0),
        LOGITS,
    ),
    "mutual": Case(over(online.mutual), over(reference_logits, 1.0), LOGITS),
    "ensemble": Case(over(online.ensemble_divergence, 3.0), over(reference_logits, 3.0), LOGITS),
    "logits": Case(over(losses.logit_divergence, 4.0), over(reference_logits, 4.0), LOGITS),
}
ALL = list(CASES)
ZERO = [name for name in ALL if CASES[name].zero]


def labels_of(batch):
    return torch.arange(batch) % 5


def spread(seed, batch, shape):
    return tensor(drawn(seed, batch, *shape))


EXTREMES = {
    "large": lambda batch, shape: 1e4 * spread(0, batch, shape).clamp(-1, 1).sign(),
    "mixed": lambda batch, shape: 1e4 * spread(1, batch, shape).clamp(-1, 1),
    "all large": lambda batch, shape: torch.full((batch, *shape), 1e4),
    "zeros": lambda batch, shape: torch.zeros(batch, *shape),
    "equal rows": lambda batch, shape: spread(2, 1, shape).expand(batch, *shape).clone(),
    "spike": lambda batch, shape: torch.zeros(batch, *shape).index_fill(len(shape), torch.tensor([0]), 1e4),
    "tiny": lambda batch, shape: 1e-7 * spread(3, batch, shape),
}


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("name", ALL)
def test_a_loss_is_one_float32_value_per_sample_whatever_the_input(name, dtype):
    case = CASES[name]
    student, teacher = (spread(seed, 6, case.shape).to(dtype) for seed in (0, 1))
    found = case.loss(student, teacher, labels_of(6))
    assert found.shape == (6,)
    assert found.dtype == torch.float32
    assert torch.equal(found, case.loss(student.float(), teacher.float(), labels_of(6)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ALL)
def test_the_gradient_in_half_precision_is_that_in_float32_rounded_once(name, dtype):
    case, teacher = CASES[name], spread(13, 6, CASES[name].shape)
    half = spread(14, 6, case.shape).to(dtype).requires_grad_()
    single = half.detach().float().requires_grad_()
    for leaf in (half, single):
        case.loss(leaf, teacher, labels_of(6)).sum().backward()
    assert torch.equal(half.grad, single.grad.to(dtype))


@pytest.mark.parametrize("name", ALL)
def test_rows_follow_the_order_of_the_batch(name):
    case, order = CASES[name], torch.tensor([4, 2, 0, 5, 1, 3])
    student, teacher, labels = spread(2, 6, case.shape), spread(3, 6, case.shape), labels_of(6)
    moved = case.loss(student[order], teacher[order], labels[order])
    torch.testing.assert_close(moved, case.loss(student, teacher, labels)[order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_gradient_flows_into_the_student_alone(name):
    case = CASES[name]
    student, teacher = (spread(seed, 6, case.shape).requires_grad_() for seed in (4, 5))
    case.loss(student, teacher, labels_of(6)).mean().backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("name", [name for name in ALL if CASES[name].reference])
def test_gradient_is_the_slope_of_the_float64_reference(name):
    case, labels = CASES[name], labels_of(6)
    student, teacher, along = (drawn(seed, 6, *case.shape) for seed in (6, 7, 8))
    leaf = tensor(student).requires_grad_()
    case.loss(leaf, tensor(teacher), labels).mean().backward()
    ahead, behind = (case.reference(student + h * along, teacher, labels.numpy()).mean() for h in (1e-5, -1e-5))
    np.testing.assert_allclose((leaf.grad.numpy() * along).sum(), (ahead - behind) / 2e-5, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ZERO)
def test_a_distance_is_zero_at_equality_and_positive_elsewhere(name):
    case = CASES[name]
    student, teacher = spread(9, 6, case.shape), spread(10, 6, case.shape)
    same = case.loss(student, student.clone(), labels_of(6))
    torch.testing.assert_close(same, torch.zeros(6), atol=2e-6, rtol=0)
    apart = case.loss(student, teacher, labels_of(6))
    assert apart.min() >= 0
    assert apart.mean() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_autocast_does_not_reach_into_a_loss(name):
    case = CASES[name]
    student, teacher = (spread(seed, 6, case.shape) for seed in (11, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = case.loss(student, teacher, labels_of(6))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, case.loss(student, teacher, labels_of(6)))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("name", ALL)
def test_extreme_inputs_leave_losses_and_gradients_finite(name, dtype, batch):
    case = CASES[name]
    for one, other in itertools.product(EXTREMES, ["large", "mixed", "zeros", "equal rows"]):
        student, teacher = (EXTREMES[key](batch, case.shape).to(dtype) for key in (one, other))
        beyond_float16 = dtype == torch.float16 and (name == "fsp" or one == "tiny")  # the true gradient is, that is
        leaf = (student.float() if beyond_float16 else student).requires_grad_()
        loss = case.loss(leaf, teacher, labels_of(batch))
        loss.mean().backward()
        assert torch.isfinite(loss).all(), (one, other)
        assert torch.isfinite(leaf.grad).all(), (one, other)


def test_extreme_flow_matrices_have_gradients_that_bfloat16_holds():
    student = (1e4 * spread(0, 4, MAP).sign()).to(torch.bfloat16).requires_grad_()
    flows(student, -student.detach().flip(1), None).mean().backward()
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() > torch.finfo(torch.float16).max


@pytest.mark.parametrize("raw", [-1e4, 0.0, 1e4])
def test_extreme_variances_stay_finite(raw):
    raw = torch.full((3,), raw, requires_grad=True)
    mean = EXTREMES["large"](2, MAP).requires_grad_()
    feature_maps.variational(mean, -mean.detach(), raw).mean().backward()
    assert torch.isfinite(raw.grad).all()
    assert torch.isfinite(mean.grad).all()
