import math

import numpy as np
import pytest
import torch
from test_losses import probabilities
from test_losses_decoupled import divergence
from test_losses_maps import close, drawn, tensor
from test_losses_relations import dot, unit

from kcdcache.methods.self_supervision import rotated_divergence, rotation_similarity, rotation_task, selected

LABELS = np.array([0, 3, 2, 2, 4])


def reference_selected(scores, truth, share):
    """Sort all rows by the truth's rank, then its probability; keep the correct ones and the best of the wrong."""
    keys = []
    for row, own in zip(scores.tolist(), truth, strict=True):
        order = sorted(range(len(row)), key=lambda c, row=row: (-row[c], c))
        keys.append((order.index(own), -probabilities(row)[own]))
    wrong = [i for i, key in enumerate(keys) if key[0] > 0]
    best = sorted(wrong, key=lambda i: (*keys[i], i))[: int(len(wrong) * share)]
    return [key[0] == 0 or i in best for i, key in enumerate(keys)]


def reference_anchors(student, teacher, truth, views, temperature, share):
    """Losses of kept anchors, added up per sample, so that their mean over samples is the mean over kept anchors."""
    kept = reference_selected(teacher, truth, share)
    batch = len(kept) // views
    losses = np.zeros(batch)
    for row, keep in enumerate(kept):
        p, q = probabilities(list(teacher[row]), temperature), probabilities(list(student[row]), temperature)
        losses[row // views] += keep * temperature**2 * divergence(p, q)
    return losses * batch / max(sum(kept), 1)


def similarities(rotated, plain):
    anchors = rotated.reshape(-1, rotated.shape[2]).tolist()
    return np.array([[dot(unit(a), unit(b)) for b in plain.tolist()] for a in anchors])


def reference_rotation_similarity(rotated, plain, teacher_rotated, teacher_plain, temperature, share):
    batch, views = rotated.shape[:2]
    tables = similarities(rotated, plain), similarities(teacher_rotated, teacher_plain)
    return reference_anchors(*tables, np.repeat(np.arange(batch), views), views, temperature, share)


def reference_rotated_divergence(student, teacher, labels, temperature, share):
    views = student.shape[1]
    flat = [z.reshape(-1, z.shape[2]) for z in (student, teacher)]
    return reference_anchors(*flat, np.repeat(labels, views), views, temperature, share)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.75, 1.0])
def test_rotation_similarity_equals_a_float64_reference(share):
    arrays = drawn(0, 5, 3, 4), drawn(1, 5, 4), drawn(2, 5, 3, 6), drawn(3, 5, 6)
    assert any(reference_selected(similarities(*arrays[2:]), np.repeat(np.arange(5), 3), share))
    found = rotation_similarity(*map(tensor, arrays), 0.5, share)
    close(found, reference_rotation_similarity(*arrays, 0.5, share))


@pytest.mark.parametrize("share", [0.0, 0.75, 1.0])
def test_rotated_divergence_equals_a_float64_reference(share):
    student, teacher = drawn(4, 5, 3, 6, scale=3), drawn(5, 5, 3, 6, scale=3)
    found = rotated_divergence(tensor(student), tensor(teacher), torch.from_numpy(LABELS), 4.0, share)
    close(found, reference_rotated_divergence(student, teacher, LABELS, 4.0, share))


def test_rotation_task_is_the_cross_entropy_over_own_and_other_plain_views():
    rotated, plain = drawn(6, 4, 3, 5), drawn(7, 4, 5)
    rows = [-math.log(probabilities(list(row))[i // 3]) for i, row in enumerate(similarities(rotated, plain))]
    close(rotation_task(tensor(rotated), tensor(plain)), np.array(rows).reshape(4, 3).mean(axis=1))


def test_rotation_task_trains_both_sides_of_the_head():
    rotated, plain = tensor(drawn(6, 4, 3, 5)).requires_grad_(), tensor(drawn(7, 4, 5)).requires_grad_()
    rotation_task(rotated, plain).sum().backward()
    assert rotated.grad.abs().min() > 0
    assert plain.grad.abs().min() > 0


def test_similarities_ignore_length_and_rotation_of_the_projections():
    rotated, plain, others, base = (tensor(drawn(s, *shape)) for s, shape in enumerate([(5, 3, 4), (5, 4)] * 2))
    turn = tensor(np.linalg.qr(drawn(9, 4, 4))[0])
    found = rotation_similarity(rotated, plain, others, base, 0.5, 0.75)
    moved = rotation_similarity(rotated @ turn * 3, plain @ turn / 2, others * 7, base, 0.5, 0.75)
    torch.testing.assert_close(moved, found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_selection_equals_a_reference_that_sorts(seed, share):
    scores = np.random.default_rng(seed).integers(0, 4, (12, 5)).astype(float)  # many ties
    truth = np.random.default_rng(seed + 100).integers(0, 5, 12)
    found = selected(tensor(scores), torch.from_numpy(truth), share)
    assert found.tolist() == reference_selected(scores, truth, share)


def test_selection_keeps_what_is_right_and_three_quarters_of_the_wrong_by_rank():
    scores = tensor([[9, 1, 0], [1, 9, 0], [1, 9, 8], [9, 8, 7], [5, 4, 3], [3, 4, 5]])
    truth = torch.tensor([0, 0, 0, 2, 1, 2])  # ranks 0, 1, 2, 2, 1, 0
    assert selected(scores, truth, 0.75).tolist() == [True, True, False, True, True, True]
    assert selected(scores, truth, 0.25).tolist() == [True, False, False, False, True, True]
    assert selected(scores, truth, 0.0).tolist() == [True, False, False, False, False, True]


def test_no_anchor_kept_gives_zero_and_not_nan():
    student = tensor(drawn(10, 1, 1, 3)).requires_grad_()
    found = rotated_divergence(student, tensor([[[1, 2, 3]]]), torch.tensor([0]), 4.0, 0.75)
    found.sum().backward()
    assert torch.equal(found, torch.zeros(1))
    assert torch.equal(student.grad, torch.zeros(1, 1, 3))
