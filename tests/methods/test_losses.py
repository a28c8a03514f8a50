"""Every loss equals its slow reference in float64 and keeps the laws of losses, over one table of them all."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from reference import array, close, drawn, tensor

from kcdcache.methods import contrast, extra_images, feature_maps, filter_statistics, losses, relations
from kcdcache.methods.logits import decoupled, entropy_weights
from kcdcache.methods.losses import entropy
from kcdcache.teacher import fields

MAP, CODE, LOGITS, VIEWS, SCORES = (3, 4, 4), (6,), (5,), (4, 6), (8,)
VARIANCES = np.array([-3.0, 0.0, 2.0])
PEAK = np.log(40.0)
HALVES = [torch.float16, torch.bfloat16]


class Case(NamedTuple):
    """One loss as a function of (student, teacher, labels, *settings), and its float64 reference in the same form."""

    loss: object
    reference: object
    shape: tuple
    settings: tuple = ((),)
    """of the laws the first; equal to the reference at all"""
    also: tuple = ()
    """further (batch, student's shape, teacher's shape) at which it equals the reference"""
    zero: bool = True
    """at equality, and not negative elsewhere"""
    slope: bool = True
    """whether the gradient is the reference's slope"""


def over(loss):
    """The loss without labels."""
    return lambda student, teacher, labels, *settings: loss(student, teacher, *settings)


def case(loss, slow, shape, *settings, **more):
    return Case(over(loss), over(slow), shape, settings or ((),), **more)


def attended(student, teacher, side=None):
    return feature_maps.squared_error(fields.attention(student, side), fields.attention(teacher, side))


def flows(student, teacher):
    student = student.float()  # which stands for two maps here
    return feature_maps.squared_error(fields.fsp_matrix(student, student), fields.fsp_matrix(teacher, teacher))


def rotations(module):
    """The loss on four images as the first, upright, and three that are turned."""
    return lambda s, t, *settings: module.rotation_similarity(s[:, 1:], s[:, 0], t[:, 1:], t[:, 0], *settings)


def entropy_weighted(student, teacher, temperature, weight_temperature):
    weights = entropy_weights(student, teacher, weight_temperature)
    return weights * losses.logit_divergence(student, teacher, temperature)


def recoded(student, teacher, threshold):
    ours, theirs = (x.float().log_softmax(1) for x in (student, teacher))
    return filter_statistics.recoded_divergence(ours, theirs, threshold)


def recoded_slowly(student, teacher, threshold):
    ours, theirs = (reference.log_softmax(x, axis=1) for x in (student, teacher))
    return reference.recoded(ours, theirs, threshold)


def scored(loss):
    """The loss of scores whose first is the positive's; the teacher has no part in them."""
    return lambda s, t, *settings: loss(s[:, 0], s[:, 1:], *settings)


SIDES = tuple((3, (4, *side), (4, *side)) for side in ((8, 8), (5, 5), (3, 6), (2, 2), (1, 1)))
BATCHES = tuple((batch, (6,), (9,)) for batch in (1, 2, 7))

CASES = {
    "hint": case(feature_maps.squared_error, reference.error, MAP, also=((3, (7,), (7,)),)),
    "attention": case(
        attended,
        lambda s, t, side=None: reference.error(*(reference.attention(x, side) for x in (s, t))),
        MAP, (), ((2, 2),), ((3, 2),), ((1, 1),), also=((3, (5, 8, 8), (9, 8, 8)),),
    ),
    "fsp": case(flows, lambda s, t: reference.error(reference.flow(s, s), reference.flow(t, t)), MAP),
    "variational": case(
        lambda s, t, raw=VARIANCES: feature_maps.variational(s, t, tensor(raw)),
        lambda s, t, raw=VARIANCES: reference.variational(s, t, raw),
        MAP, zero=False,
    ),
    "hierarchical": case(feature_maps.hierarchical_context, reference.context, MAP, also=SIDES),
    "similarity": case(
        relations.similarity_preserving, reference.similarity, CODE, also=(*BATCHES, (5, (3, 4, 4), (2, 3, 3)))
    ),
    "distance": case(relations.distance_wise, reference.distance, CODE, also=BATCHES),
    "angle": case(relations.angle_wise, reference.angle, CODE, also=BATCHES),
    "probabilistic": case(relations.probabilistic, reference.probabilistic, CODE, also=BATCHES),
    "nce": case(
        scored(lambda p, n, count, z: contrast.nce(p, n, count, torch.tensor(z))),
        scored(lambda p, n, count, z: reference.nce(p, n, count, math.exp(z))),
        SCORES, (50, PEAK), (50000, math.log(300.0)), zero=False,
    ),
    "sinkhorn": case(
        contrast.sinkhorn_distance, reference.sinkhorn, CODE, (0.1, 10), (0.05, 1), (0.1, 5), (1.0, 50),
        also=((1, CODE, CODE), (2, CODE, CODE)), zero=False, slope=False,  # its plan is a constant to the gradient
    ),
    "decoupled": Case(
        decoupled, reference.decoupled, LOGITS,
        ((1.0, 8.0, 3.0), (1.0, 8.0, 4.0), (1.0, 0.0, 1.0), (0.0, 1.0, 2.0)),
    ),
    "entropy weighted": case(
        entropy_weighted, reference.entropy_weighted, LOGITS, (4.0, 3.0), (1.0, 3.0), (2.0, 0.5),
        also=((5, (2,), (2,)), (5, (100,), (100,))), slope=False,  # its weight is a constant to the gradient
    ),
    "rotations": case(
        rotations(extra_images), rotations(reference), VIEWS, (0.5, 0.75), (0.5, 0.0), (0.5, 1.0),
        also=((5, VIEWS, (4, 9)),),
    ),
    "rotated": Case(
        extra_images.rotated_divergence, reference.rotated_divergence, (3, 5), ((4.0, 1.0), (4.0, 0.0), (4.0, 0.75))
    ),
    "boundary": Case(
        lambda s, t, y, *settings: extra_images.boundary_divergence(s, t, *weighted(s, y, *settings)),
        lambda s, t, y, *settings: reference.boundary(s, t, *weighted(s, y, *settings)),
        LOGITS, ((3.0,), (3.0, 0.0), (3.0, 0.5)),
    ),
    "recoded": case(recoded, recoded_slowly, LOGITS, (0.0,), (0.05,), (1.0,)),
    "entropy": case(lambda s, t: entropy(s), lambda s, t: reference.entropy(s), LOGITS, zero=False),
    "hard": Case(
        lambda s, t, y, smoothing: losses.cross_entropy(s, y, smoothing),
        lambda s, t, y, smoothing: reference.hard(s, y, smoothing),
        LOGITS, ((0.1,), (0.0,), (0.5,)), zero=False,
    ),
    "logits": case(losses.logit_divergence, reference.logits, LOGITS, (4.0,), (0.5,), (1.0,), (3.0,)),
}  # fmt: skip
ALL = list(CASES)


def weighted(logits, labels, temperature, step=None):
    """Weights of boundary samples: of all but class 0, or multiples of a step, and the temperature."""
    weights = (labels > 0) * 1.0 if step is None else labels * step
    return weights, temperature


def labels_of(batch):
    return torch.arange(batch) % 5


def spread(seed, batch, shape):
    return tensor(drawn(seed, batch, *shape))


def drawn_pair(name, seed, batch=6):
    """The case's loss at its first settings, and tensors for it."""
    found, labels = CASES[name], labels_of(batch)
    student, teacher = (spread(seed + more, batch, found.shape) for more in (0, 1))
    return lambda s, t, y=labels: found.loss(s, t, y, *found.settings[0]), student, teacher


@pytest.mark.parametrize("name", ALL)
def test_a_loss_equals_its_float64_reference(name):
    found = CASES[name]
    scale = 3 if found.shape in (LOGITS, (3, 5)) else 1
    for chosen, (batch, *shapes) in itertools.product(found.settings, [(6, found.shape, found.shape), *found.also]):
        student, teacher = (drawn(s, batch, *shape, scale=scale) for s, shape in enumerate(shapes))
        labels = labels_of(batch) % shapes[0][-1]
        expected = found.reference(student, teacher, labels.numpy(), *chosen)
        close(found.loss(tensor(student), tensor(teacher), labels, *chosen), expected)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("name", ALL)
def test_a_loss_is_one_float32_value_per_sample_whatever_the_input_and_autocast(name, dtype):
    loss, *pair = drawn_pair(name, 0)
    student, teacher = (x.to(dtype) for x in pair)
    found = loss(student, teacher)
    assert (found.shape, found.dtype) == ((6,), torch.float32)
    assert torch.equal(found, loss(student.float(), teacher.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(student, teacher)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, found)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ALL)
def test_the_gradient_in_half_precision_is_that_in_float32_rounded_once(name, dtype):
    loss, student, teacher = drawn_pair(name, 13)
    half = student.to(dtype).requires_grad_()
    single = half.detach().float().requires_grad_()
    for leaf in (half, single):
        loss(leaf, teacher).sum().backward()
    assert torch.equal(half.grad, single.grad.to(dtype))


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_is_the_slope_of_the_reference_and_flows_into_the_student_alone(name):
    loss, student, teacher = drawn_pair(name, 6)
    student.requires_grad_()
    teacher.requires_grad_()
    loss(student, teacher).mean().backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    found = CASES[name]
    if found.slope:
        at, along, fixed = array(student), drawn(8, *student.shape), array(teacher)
        ahead, behind = (
            found.reference(at + h * along, fixed, labels_of(6).numpy(), *found.settings[0]).mean()
            for h in (1e-5, -1e-5)
        )
        expected = (ahead - behind) / 2e-5
        np.testing.assert_allclose((student.grad.numpy() * along).sum(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in ALL if CASES[name].zero])
def test_a_distance_is_zero_at_equality_and_positive_elsewhere(name):
    loss, student, teacher = drawn_pair(name, 9)
    torch.testing.assert_close(loss(student, student.clone()), torch.zeros(6), atol=2e-6, rtol=0)
    apart = loss(student, teacher)
    assert apart.min() >= 0
    assert apart.mean() > 1e-3


EXTREMES = {
    "large": lambda batch, shape: 1e4 * spread(0, batch, shape).clamp(-1, 1).sign(),
    "mixed": lambda batch, shape: 1e4 * spread(1, batch, shape).clamp(-1, 1),
    "all large": lambda batch, shape: torch.full((batch, *shape), 1e4),
    "zeros": lambda batch, shape: torch.zeros(batch, *shape),
    "equal rows": lambda batch, shape: spread(2, 1, shape).expand(batch, *shape).clone(),
    "spike": lambda batch, shape: torch.zeros(batch, *shape).index_fill(len(shape), torch.tensor([0]), 1e4),
    "tiny": lambda batch, shape: 1e-7 * spread(3, batch, shape),
}


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("name", ALL)
def test_extreme_inputs_leave_losses_and_gradients_finite(name, dtype, batch):
    loss, shape = drawn_pair(name, 0, batch)[0], CASES[name].shape
    for one, other in itertools.product(EXTREMES, ["large", "mixed", "zeros", "equal rows"]):
        student, teacher = (EXTREMES[key](batch, shape).to(dtype) for key in (one, other))
        beyond_float16 = dtype == torch.float16 and (name == "fsp" or one == "tiny")  # the true gradient is, that is
        leaf = (student.float() if beyond_float16 else student).requires_grad_()
        found = loss(leaf, teacher)
        found.mean().backward()
        assert torch.isfinite(found).all(), (one, other)
        assert torch.isfinite(leaf.grad).all(), (one, other)


def test_extreme_flow_matrices_have_gradients_that_bfloat16_holds():
    student = (1e4 * spread(0, 4, MAP).sign()).to(torch.bfloat16).requires_grad_()
    flows(student, -student.detach().flip(1)).mean().backward()
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() > torch.finfo(torch.float16).max


@pytest.mark.parametrize("raw", [-1e4, 0.0, 1e4])
def test_extreme_variances_stay_finite(raw):
    raw = torch.full((3,), raw, requires_grad=True)
    mean = EXTREMES["large"](2, MAP).requires_grad_()
    feature_maps.variational(mean, -mean.detach(), raw).mean().backward()
    assert torch.isfinite(raw.grad).all()
    assert torch.isfinite(mean.grad).all()


# entropy


def logits_within(limit):
    shapes = array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6)
    return arrays(np.float32, shapes, elements=st.floats(-limit, limit, width=32))


@settings(max_examples=30)
@given(logits_within(1e4))
def test_entropy_equals_a_float64_reference(z):
    close(entropy(torch.from_numpy(z)), reference.entropy(z.astype(np.float64)), atol=2e-6)


@settings(max_examples=50)
@given(logits_within(float(np.finfo(np.float32).max)))
def test_entropy_lies_in_zero_to_log_classes_for_all_finite_logits(z):
    found = entropy(torch.from_numpy(z)).numpy()
    assert np.all((found >= 0) & (found <= np.float32(math.log(z.shape[1]))))


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 100, 1000])
def test_entropy_of_nearly_equal_logits_never_exceeds_log_classes(classes):
    z = torch.randn(200, classes, generator=torch.Generator().manual_seed(classes)) * 1e-6
    assert float(entropy(z).max()) <= np.float32(math.log(classes))
    torch.testing.assert_close(entropy(torch.zeros(1, classes)), torch.tensor([math.log(classes)]))


def test_a_class_ruled_out_by_minus_infinity_has_no_part_in_the_entropy():
    z = torch.tensor([[1.0, 2.0, 0.5]])
    torch.testing.assert_close(entropy(torch.cat([z, torch.full((1, 1), -math.inf)], dim=1)), entropy(z))
