"""The methods that show the student further images: rotated ones, sskd, and ones beside a boundary, bss."""

import numpy as np
import pytest
import reference
import torch
from pairs import CLASSES, OURS, THEIRS, batch_of, knowledge_of, pair_of, term_of
from reference import array, close, drawn, tensor

from kcdcache.errors import SettingsError
from kcdcache.methods.extra_images import (
    base_weights,
    rotated_divergence,
    rotation_task,
    selected,
)

LABELS = [2, 0, 1, 3]
PAIR = pair_of([2, 0, 1, 3, 1, 1])


# the losses on rotated images


def test_rotation_task_is_the_cross_entropy_over_own_and_other_plain_views_and_trains_both():
    rotated, plain = tensor(drawn(6, 4, 3, 5)).requires_grad_(), tensor(drawn(7, 4, 5)).requires_grad_()
    found = rotation_task(rotated, plain)
    close(found, reference.rotation_task(array(rotated), array(plain)))
    found.sum().backward()
    assert rotated.grad.abs().min() > 0
    assert plain.grad.abs().min() > 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
def test_selection_equals_a_reference_that_sorts(share):
    for seed in range(5):
        scores = np.random.default_rng(seed).integers(0, 4, (12, 5)).astype(float)  # many ties
        truth = np.random.default_rng(seed + 100).integers(0, 5, 12)
        found = selected(tensor(scores), torch.from_numpy(truth), share)
        assert found.tolist() == reference.selected(scores, truth, share)


def test_no_anchor_kept_gives_zero_and_not_nan():
    student = tensor(drawn(10, 1, 1, 3)).requires_grad_()
    found = rotated_divergence(student, tensor([[[1, 2, 3]]]), torch.tensor([0]), 4.0, 0.75)
    found.sum().backward()
    assert torch.equal(found, torch.zeros(1))
    assert torch.equal(student.grad, torch.zeros(1, 1, 3))


# sskd


def rotations(seed=0):
    torch.manual_seed(seed)
    seen = {"logits": torch.randn(16, CLASSES) * 2, "penultimate": torch.randn(16, OURS)}
    batch = batch_of(
        range(4), LABELS,
        rotations_logits=torch.randn(4, 4, CLASSES) * 2, rotations_penultimate=torch.randn(4, 4, THEIRS),
    )  # fmt: skip
    return {name: value.requires_grad_() for name, value in seen.items()}, batch


def projected(module, values):
    first, _, last = module
    hidden = reference.relu(values @ array(first.weight).T + array(first.bias))
    return hidden @ array(last.weight).T + array(last.bias)


def by_sample(values):
    """The student's rows are turn by turn; sample by sample as the teacher's."""
    return array(values).reshape(4, 4, -1).swapaxes(0, 1)


def apart(views):
    """Turned and upright images of each sample."""
    return views[:, 1:], views[:, 0]


def reference_sskd(term, seen, batch, preparing):
    knowledge = knowledge_of(batch)
    logits = by_sample(seen["logits"])[:, 1:], knowledge["rotations:logits"][:, 1:]
    found = 2.7 * reference.rotated_divergence(*logits, LABELS, 4.0, 1.0)
    theirs = apart(projected(term.teacher, knowledge["rotations:penultimate"]))
    if preparing:
        return found + reference.rotation_task(*theirs)
    ours = apart(projected(term.student, by_sample(seen["penultimate"])))
    return found + 10 * reference.rotation_similarity(*ours, *theirs, 0.5, 0.75)


@pytest.mark.parametrize("epoch", [0, 59, 60, 239])
@pytest.mark.parametrize("seed", [0, 1])
def test_sskd_equals_a_slow_reference_before_and_after_the_teachers_projection_is_ready(epoch, seed):
    term, (seen, batch) = term_of("sskd", PAIR), rotations(seed)
    assert term.weights_at(epoch, 240) == (1.0, 1.0)
    found = term(seen, batch)
    close(found, reference_sskd(term, seen, batch, epoch < 60), rtol=1e-4, atol=1e-5)


def test_the_student_sees_each_image_turned_once_twice_and_three_times():
    pixels = torch.rand(2, 3, 4, 4)
    found = term_of("sskd", PAIR).extra(batch_of([0, 1], [2, 0], pixels))
    assert found.shape == (6, 3, 4, 4)
    for place, y, x in np.ndindex(6, 4, 4):
        old = [(x, 3 - y), (3 - y, 3 - x), (3 - x, y)][place // 2]
        assert torch.equal(found[place, :, y, x], pixels[place % 2, :, old[0], old[1]])


def test_images_that_are_not_square_cannot_be_turned():
    with pytest.raises(SettingsError, match="rotations need square views, found 4x6"):
        term_of("sskd", PAIR).extra(batch_of([0], [2], torch.rand(1, 3, 4, 6)))


def trained(term, epochs, total, rate=0.05):
    """Steps as the loop takes them, with weight decay and momentum; the teacher's projection after every epoch."""
    optimizer = torch.optim.SGD(term.parameters(), lr=rate, momentum=0.9, weight_decay=5e-2)
    held = []
    for epoch in epochs:
        term.weights_at(epoch, total)
        for step in range(5):
            optimizer.zero_grad()
            term(*rotations(step)).mean().backward()
            optimizer.step()
        held.append([value.clone() for value in term.teacher.parameters()])
    return held


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_the_teachers_projection_learns_in_the_first_quarter_and_then_stands_still():
    term = term_of("sskd", PAIR)
    held = trained(term, range(8), 8)
    assert not same(held[0], held[1])
    assert all(same(held[2], later) for later in held[3:])
    assert not any(parameter.requires_grad for parameter in term.teacher.parameters())


# the loss on boundary images


@pytest.mark.parametrize("most", [0, 1, 5, 64])
def test_base_samples_equal_those_of_a_reference_that_sorts(most):
    for seed in range(4):
        logits = drawn(seed, 40, 3, scale=2)
        labels = logits.argmax(axis=1)
        labels[:8] = 0
        student, teacher = (reference.softmax(z, axis=1) for z in (logits + drawn(seed + 100, 40, 3), logits))
        found = base_weights(tensor(student), tensor(teacher), torch.from_numpy(labels), most)
        assert found.tolist() == reference.base_weights(student, teacher, labels, most)
        assert found.sum() == min(most, sum(reference.base_weights(student, teacher, labels, 40)))


# bss


def boundaries(seed=0):
    torch.manual_seed(seed)
    seen = {"logits": (torch.randn(8, CLASSES) * 2).requires_grad_()}
    batch = batch_of(
        range(4), LABELS, logits=torch.randn(4, CLASSES) * 2,
        boundary_images=torch.rand(4, 3, 8, 8), boundary_logits=torch.randn(4, CLASSES) * 2,
    )  # fmt: skip
    with torch.no_grad():  # some are of the base, some not
        for row, ours, theirs in ((0, 9, 9), (1, -9, 9), (2, 9, 9), (3, 9, -9)):
            seen["logits"][row, LABELS[row]] += ours
            batch.knowledge["logits"][row, LABELS[row]] += theirs
    return seen, batch


@pytest.mark.parametrize(("temperature", "given"), [(3.0, {}), (1.5, {"temperature": 1.5})])
@pytest.mark.parametrize("epoch", [1, 6, 8])
def test_bss_equals_a_slow_reference(epoch, temperature, given):
    term, (seen, batch) = term_of("bss", pair_of(LABELS, **given)), boundaries()
    term.weights_at(epoch - 1, 8)
    student, knowledge = array(seen["logits"]), knowledge_of(batch)
    plain = reference.logits(student[:4], knowledge["logits"], temperature) / temperature**2
    beside = reference.boundary(student[4:], knowledge["boundary:logits"], [1, 0, 1, 0], temperature)
    expected = (3 * (1 - epoch / 8) + 1) * plain.mean() + max(0, 2 - 8 / 3 * epoch / 8) * beside.mean()
    found = term(seen, batch).mean()
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)
    found.backward()
    reached = seen["logits"].grad[4:].abs().sum(dim=1) > 0
    assert reached.tolist() == [epoch < 6 and i in (0, 2) for i in range(4)]


def test_bss_attacks_the_64_base_samples_that_differ_most():
    count = 70
    term, label = term_of("bss", pair_of([0, 1] * 35)), torch.zeros(count, dtype=torch.int64)
    logits = torch.zeros(2 * count, CLASSES)
    logits[:, 0] = 2 + 0.01 * torch.arange(2 * count)
    teacher = torch.tensor([[9.0, 0, 0, 0]]).repeat(count, 1)
    batch = batch_of(range(count), label, logits=teacher, boundary_logits=teacher[:, [1, 0, 2, 3]])
    term.weights_at(0, 8)
    term({"logits": logits.requires_grad_()}, batch).mean().backward()
    reached = logits.grad[count:].abs().sum(dim=1) > 0
    assert reached.tolist() == [i < 64 for i in range(count)]


def test_bss_shows_the_cached_boundary_images():
    _, batch = boundaries()
    assert torch.equal(term_of("bss", PAIR).extra(batch), batch.knowledge["boundary:images"])
