import math

import numpy as np
import pytest
import torch
from test_losses import probabilities
from test_losses_maps import close, drawn, tensor

from kcdcache.methods.logits import decoupled
from kcdcache.methods.losses import soft_divergence

LABELS = torch.tensor([0, 2, 5, 5, 1])


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def parts(student, teacher, label, temperature):
    """TCKD and NCKD of one sample, from probabilities."""
    p, q = (probabilities(list(z), temperature) for z in (teacher, student))
    target = divergence([p[label], 1 - p[label]], [q[label], 1 - q[label]])
    rest = [[v / (1 - r[label]) for c, v in enumerate(r) if c != label] for r in (p, q)]
    return target, divergence(*rest)


def reference_decoupled(student, teacher, labels, alpha, beta, temperature):
    rows = []
    for s, t, label in zip(student, teacher, labels, strict=True):
        target, rest = parts(s, t, label, temperature)
        rows.append(temperature**2 * (alpha * target + beta * rest))
    return np.array(rows)


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (1.0, 0.0, 1.0), (0.0, 1.0, 2.0)])
def test_decoupled_equals_a_float64_reference(alpha, beta, temperature):
    student, teacher = drawn(0, 5, 6, scale=3), drawn(1, 5, 6, scale=3)
    found = decoupled(tensor(student), tensor(teacher), LABELS, alpha, beta, temperature)
    close(found, reference_decoupled(student, teacher, LABELS.tolist(), alpha, beta, temperature))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_parts_weighted_by_the_teachers_doubt_are_plain_distillation(temperature):
    student, teacher = tensor(drawn(2, 5, 6, scale=3)), tensor(drawn(3, 5, 6, scale=3))
    p = torch.softmax(teacher / temperature, dim=1)
    doubt = 1 - p.gather(1, LABELS.unsqueeze(1)).squeeze(1)
    target = decoupled(student, teacher, LABELS, 1.0, 0.0, temperature)
    rest = decoupled(student, teacher, LABELS, 0.0, 1.0, temperature)
    torch.testing.assert_close(target + doubt * rest, soft_divergence(student, p, temperature), rtol=1e-4, atol=1e-5)


def test_a_mask_of_minus_a_thousand_gives_the_same_where_it_is_safe():
    student, teacher = tensor(drawn(4, 5, 6)), tensor(drawn(5, 5, 6))
    hidden = 1000.0 * torch.nn.functional.one_hot(LABELS, 6)
    expected = soft_divergence(student - hidden * 2, torch.softmax(teacher / 2 - hidden, dim=1), 2.0)
    torch.testing.assert_close(decoupled(student, teacher, LABELS, 0.0, 1.0, 2.0), expected)


def test_decoupled_ignores_a_shift_and_moves_with_the_order_of_classes():
    student, teacher = tensor(drawn(6, 5, 6)), tensor(drawn(7, 5, 6))
    found = decoupled(student, teacher, LABELS, 1.0, 8.0, 4.0)
    torch.testing.assert_close(decoupled(student + 5, teacher - 3, LABELS, 1.0, 8.0, 4.0), found, rtol=1e-4, atol=1e-5)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = decoupled(student[:, order], teacher[:, order], torch.argsort(order)[LABELS], 1.0, 8.0, 4.0)
    torch.testing.assert_close(moved, found, rtol=1e-5, atol=1e-5)


def test_two_classes_leave_nothing_among_the_rest():
    student, teacher = tensor(drawn(8, 5, 2)), tensor(drawn(9, 5, 2))
    assert torch.equal(decoupled(student, teacher, LABELS.clamp_max(1), 0.0, 1.0, 4.0), torch.zeros(5))


def test_a_sure_teacher_far_beyond_the_usual_mask_still_teaches_the_rest():
    """The released mask of -1000 lets a label's logit of 1e4 through; here the rest does not see it at all."""
    teacher = tensor([[1e4, 1.0, 2.0, 3.0]])
    student = tensor([[-1e4, 3.0, 1.0, 0.0]])
    found = decoupled(student, teacher, torch.tensor([0]), 0.0, 1.0, 1.0)
    close(found, [divergence(probabilities([1.0, 2.0, 3.0]), probabilities([3.0, 1.0, 0.0]))])
