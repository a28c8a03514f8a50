import itertools
import math

import numpy as np
import pytest
import torch
from test_losses_maps import close, drawn, tensor
from test_losses_relations import dot, unit

from kcdcache.methods.contrast import dual_contrast, log_partition, nce, sinkhorn_distance


def reference_nce(positive, negatives, count, z):
    """CRD's loss as released, number by number."""
    rows, noise, tiny = [], negatives.shape[1] / count, 1e-7
    for own, others in zip(positive, negatives, strict=True):
        x = math.exp(own) / z
        loss = -math.log(x / (x + noise + tiny))
        for other in others:
            loss -= math.log(noise / (math.exp(other) / z + noise + tiny))
        rows.append(loss)
    return np.array(rows)


def costs(student, teacher):
    return np.array([[1 - dot(unit(s), unit(t)) for t in teacher.tolist()] for s in student.tolist()])


def reference_sinkhorn(student, teacher, epsilon, iterations):
    """Scaling of exp(-C / epsilon), columns first, rows last."""
    cost, b = costs(student, teacher), len(student)
    kernel, left = np.exp(-cost / epsilon), np.ones(b)
    for _ in range(iterations):
        right = np.array([1 / b / sum(kernel[i, j] * left[i] for i in range(b)) for j in range(b)])
        left = np.array([1 / b / sum(kernel[i, j] * right[j] for j in range(b)) for i in range(b)])
    plan = left[:, None] * kernel * right[None, :]
    return b * (plan * cost).sum(axis=1), plan


@pytest.mark.parametrize("count", [50, 50000])
def test_nce_equals_the_released_form_in_float64(count):
    positive, negatives = drawn(0, 5, scale=4), drawn(1, 5, 20, scale=4)
    found = nce(tensor(positive), tensor(negatives), count, torch.tensor(math.log(300.0)))
    close(found, reference_nce(positive, negatives, count, 300.0))


def test_nce_sees_scores_only_relative_to_the_normalising_constant():
    positive, negatives = tensor(drawn(2, 5)), tensor(drawn(3, 5, 8))
    shifted = nce(positive + 3, negatives + 3, 100, torch.tensor(5.0))
    torch.testing.assert_close(shifted, nce(positive, negatives, 100, torch.tensor(2.0)))


def test_nce_falls_with_the_positive_and_rises_with_each_negative():
    positive, negatives = tensor(drawn(4, 5)).requires_grad_(), tensor(drawn(5, 5, 8)).requires_grad_()
    nce(positive, negatives, 100, torch.tensor(2.0)).sum().backward()
    assert (positive.grad < 0).all()
    assert (negatives.grad > 0).all()


def test_partition_is_count_times_the_mean_of_the_exponentials():
    scores = drawn(6, 4, 9, scale=3)
    expected = math.log(500 * sum(math.exp(score) for score in scores.flat) / 36)
    close(log_partition(tensor(scores), 500), expected)
    close(log_partition(tensor(scores) + 1000, 500), expected + 1000)
    assert not log_partition(tensor(scores).requires_grad_(), 500).requires_grad


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 1), (0.1, 5), (1.0, 50)])
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_sinkhorn_equals_a_float64_reference(epsilon, iterations, batch):
    student, teacher = drawn(7, batch, 4), drawn(8, batch, 4)
    found = sinkhorn_distance(tensor(student), tensor(teacher), epsilon, iterations)
    close(found, reference_sinkhorn(student, teacher, epsilon, iterations)[0])


def test_sinkhorn_at_small_epsilon_is_the_best_assignment():
    student, teacher = drawn(9, 5, 3), drawn(10, 5, 3)
    cost = costs(student, teacher)
    best = min(sum(cost[i, order[i]] for i in range(5)) / 5 for order in itertools.permutations(range(5)))
    found = sinkhorn_distance(tensor(student), tensor(teacher), 0.002, 2000).mean()
    np.testing.assert_allclose(found, best, rtol=1e-3)


def test_sinkhorn_ignores_the_order_of_the_teacher_and_the_length_of_rows():
    student, teacher = tensor(drawn(11, 6, 4)), tensor(drawn(12, 6, 4))
    found = sinkhorn_distance(student, teacher, 0.1, 20)
    moved = sinkhorn_distance(student * 7, teacher.flip(0) / 3, 0.1, 20)
    torch.testing.assert_close(moved, found, rtol=1e-4, atol=1e-6)


def test_sinkhorn_of_equal_batches_vanishes_with_epsilon():
    student = tensor(drawn(13, 6, 4))
    losses = [sinkhorn_distance(student, student, epsilon, 100).mean() for epsilon in (1.0, 0.1, 0.01)]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 1e-4


def test_sinkhorn_gradient_is_that_of_the_regularised_cost():
    """Envelope theorem: along v, the derivative of <P, C> + epsilon sum P log P at its optimum."""
    student, teacher, along = drawn(14, 4, 3), drawn(15, 4, 3), drawn(16, 4, 3)

    def regularised(x):
        rows, plan = reference_sinkhorn(x, teacher, 0.2, 300)
        return rows.mean() + 0.2 * (plan * np.log(plan)).sum()

    leaf = tensor(student).requires_grad_()
    sinkhorn_distance(leaf, tensor(teacher), 0.2, 300).mean().backward()
    slope = (regularised(student + 1e-4 * along) - regularised(student - 1e-4 * along)) / 2e-4
    np.testing.assert_allclose((leaf.grad.numpy() * along).sum(), slope, rtol=1e-3)


def test_dual_contrast_is_the_mean_of_negatives_less_the_positive():
    positive, negatives = drawn(17, 5), drawn(18, 5, 7)
    expected = [sum(others) / 7 - own for own, others in zip(positive, negatives, strict=True)]
    close(dual_contrast(tensor(positive), tensor(negatives)), expected)


def test_dual_contrast_ignores_a_constant_added_to_the_critic():
    positive, negatives = tensor(drawn(19, 5)), tensor(drawn(20, 5, 7))
    torch.testing.assert_close(
        dual_contrast(positive + 9, negatives + 9), dual_contrast(positive, negatives), atol=1e-5, rtol=1e-5
    )


def test_scores_train_both_embeddings():
    """CRD and the critic pass gradient into whatever made the scores, the teacher's embedding included."""
    student, teacher = tensor(drawn(21, 4, 3)).requires_grad_(), tensor(drawn(22, 4, 3)).requires_grad_()
    scores = student @ teacher.T
    (nce(scores.diagonal(), scores, 100, torch.tensor(1.0)) + dual_contrast(scores.diagonal(), scores)).sum().backward()
    assert student.grad.abs().min() > 0
    assert teacher.grad.abs().min() > 0
