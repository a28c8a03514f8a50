import math

import numpy as np
import pytest
import torch
from test_losses import probabilities, reference_divergence, reference_entropy
from test_losses_maps import close, drawn, tensor

from kcdcache.methods.logits import entropy_weighted, entropy_weights
from kcdcache.methods.losses import logit_divergence


def reference_weights(student, teacher, temperature):
    rows = []
    for s, t in zip(student, teacher, strict=True):
        ours, theirs = (reference_entropy([z / temperature for z in row]) for row in (s, t))
        rows.append((theirs + theirs * ours / math.log(len(s))) / 2)
    return np.array(rows)


def reference_weighted(student, teacher, temperature, weight_temperature):
    pairs = zip(student.tolist(), teacher.tolist(), strict=True)
    each = [reference_divergence(s, probabilities(t, temperature), temperature) for s, t in pairs]
    return reference_weights(student.tolist(), teacher.tolist(), weight_temperature) * np.array(each)


@pytest.mark.parametrize(("temperature", "weight_temperature"), [(4.0, 3.0), (1.0, 3.0), (2.0, 0.5)])
@pytest.mark.parametrize("classes", [2, 6, 100])
def test_the_weighted_divergence_equals_a_float64_reference(temperature, weight_temperature, classes):
    student, teacher = drawn(0, 5, classes, scale=3), drawn(1, 5, classes, scale=3)
    found = entropy_weighted(tensor(student), tensor(teacher), temperature, weight_temperature)
    close(found, reference_weighted(student, teacher, temperature, weight_temperature))


def test_the_gradient_is_that_of_the_divergence_under_a_constant_weight():
    student, teacher = tensor(drawn(2, 5, 6, scale=3)).requires_grad_(), tensor(drawn(3, 5, 6, scale=3))
    entropy_weighted(student, teacher, 4.0, 3.0).sum().backward()
    plain = student.detach().clone().requires_grad_()
    logit_divergence(plain, teacher, 4.0).sum().backward()
    weights = reference_weights(student.tolist(), teacher.tolist(), 3.0)
    torch.testing.assert_close(student.grad, plain.grad * tensor(weights)[:, None])


def test_weights_run_from_nothing_for_a_sure_teacher_to_log_classes_for_two_undecided():
    sure, undecided = torch.tensor([[1e4, 0.0, 0.0, 0.0]]), torch.zeros(1, 4)
    assert float(entropy_weights(undecided, sure, 3.0)) == 0
    close(entropy_weights(sure, undecided, 3.0), [math.log(4) / 2])
    close(entropy_weights(undecided, undecided, 3.0), [math.log(4)])


def test_weights_ignore_a_shift_and_the_order_of_classes_and_know_temperature_by_its_ratio():
    student, teacher = tensor(drawn(4, 5, 6, scale=3)), tensor(drawn(5, 5, 6, scale=3))
    found, order = entropy_weights(student, teacher, 3.0), torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(entropy_weights(student + 5, teacher - 3, 3.0), found)
    torch.testing.assert_close(entropy_weights(student[:, order], teacher[:, torch.flip(order, [0])], 3.0), found)
    torch.testing.assert_close(entropy_weights(2 * student, 2 * teacher, 6.0), found)


def test_a_less_sure_network_never_weighs_less():
    student, teacher = tensor(drawn(6, 50, 6, scale=3)), tensor(drawn(7, 50, 6, scale=3))
    found = entropy_weights(student, teacher, 3.0)
    assert (entropy_weights(student / 2, teacher, 3.0) > found).all()
    assert (entropy_weights(student, teacher / 2, 3.0) > found).all()
