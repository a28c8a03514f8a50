import numpy as np
import pytest
import torch
from test_losses_maps import close, drawn, tensor
from test_losses_mutual import reference_logits

from kcdcache.methods.boundary import base_weights, boundary_divergence


def reference_boundary(student, teacher, weights, temperature):
    rows = reference_logits(student, teacher, temperature) / temperature**2
    total = sum(weights)
    return np.array(
        [row * weight * len(rows) / total if total else 0.0 for row, weight in zip(rows, weights, strict=True)]
    )


def reference_weights(student, teacher, labels, most):
    scores = []
    for i, label in enumerate(labels):
        if student[i].argmax() == label == teacher[i].argmax():
            others = [c for c in range(student.shape[1]) if c != label]
            scores.append((-sum((student[i, c] - teacher[i, c]) ** 2 for c in others), i))
    chosen = {i for _, i in sorted(scores)[:most]}
    return [float(i in chosen) for i in range(len(labels))]


def softmax(logits):
    powers = np.exp(logits)
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("weights", [[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0.5, 2, 0, 1, 0]])
def test_boundary_divergence_equals_a_float64_reference(weights):
    student, teacher = drawn(0, 5, 6, scale=3), drawn(1, 5, 6, scale=3)
    found = boundary_divergence(tensor(student), tensor(teacher), tensor(weights), 3.0)
    close(found, reference_boundary(student, teacher, weights, 3.0))


def test_the_mean_is_the_mean_over_the_base_samples():
    student, teacher = tensor(drawn(2, 6, 4)), tensor(drawn(3, 6, 4))
    mask = torch.tensor([True, False, False, True, True, False])
    alone = boundary_divergence(student[mask], teacher[mask], torch.ones(3), 3.0)
    torch.testing.assert_close(boundary_divergence(student, teacher, mask, 3.0).mean(), alone.mean())


def test_samples_without_weight_get_no_gradient():
    student = tensor(drawn(4, 3, 4)).requires_grad_()
    boundary_divergence(student, tensor(drawn(5, 3, 4)), torch.tensor([1.0, 0.0, 1.0]), 3.0).mean().backward()
    assert (student.grad[[0, 2]] != 0).all()
    assert torch.equal(student.grad[1], torch.zeros(4))


@pytest.mark.parametrize("most", [0, 1, 5, 64])
@pytest.mark.parametrize("seed", range(4))
def test_base_samples_equal_those_of_a_reference_that_sorts(seed, most):
    teacher = drawn(seed, 40, 3, scale=2)
    student = teacher + drawn(seed + 100, 40, 3)
    labels = teacher.argmax(axis=1)
    labels[:8] = 0
    arrays = softmax(student), softmax(teacher)
    found = base_weights(tensor(arrays[0]), tensor(arrays[1]), torch.from_numpy(labels), most)
    assert found.tolist() == reference_weights(*arrays, labels, most)
    assert found.sum() == min(most, sum(reference_weights(*arrays, labels, 40)))


def test_base_samples_are_ranked_without_the_labels_own_probability():
    teacher = tensor([[0.90, 0.10, 0.00], [0.60, 0.20, 0.20]])
    student = tensor([[0.60, 0.20, 0.20], [0.60, 0.39, 0.01]])
    labels = torch.tensor([0, 0])
    assert base_weights(student, teacher, labels, 1).tolist() == [0.0, 1.0]  # with the label the first would win


def test_base_samples_must_be_right_for_both_networks():
    right, wrong = [0.6, 0.4], [0.4, 0.6]
    found = base_weights(tensor([right, wrong, right]), tensor([right, right, wrong]), torch.zeros(3, dtype=torch.long))
    assert found.tolist() == [1.0, 0.0, 0.0]
