"""The methods that contrast a sample with others over a memory, crd and wcord, and their losses."""

import math
from collections import Counter

import numpy as np
import pytest
import reference
import torch
from pairs import OURS, THEIRS, batch_of, pair_of, term_of
from reference import array, close, drawn, tensor, units

from kcdcache.errors import SettingsError
from kcdcache.methods.contrast import (
    ENTROPY,
    ITERATIONS,
    SIZE,
    Memory,
    Others,
    ball,
    log_partition,
    sinkhorn_distance,
)

LABELS = [2, 0, 1, 0, 3, 2, 2, 1]
INDEX, K = [6, 1, 4], 5
NAMES = ("crd", "wcord")


# the losses


def test_partition_is_count_times_the_mean_of_the_exponentials():
    scores = drawn(6, 4, 9, scale=3)
    expected = math.log(500 * sum(math.exp(score) for score in scores.flat) / 36)
    close(log_partition(tensor(scores), 500), expected)
    close(log_partition(tensor(scores) + 1000, 500), expected + 1000)
    assert not log_partition(tensor(scores).requires_grad_(), 500).requires_grad


def test_sinkhorn_gradient_is_that_of_the_regularised_cost():
    """Envelope theorem: along v, the derivative of <P, C> + epsilon sum P log P at its optimum."""
    student, teacher, along = drawn(14, 4, 3), drawn(15, 4, 3), drawn(16, 4, 3)

    def regularised(x):
        plan, cost = reference.plan(x, teacher, 0.2, 300)
        return (plan * cost).sum() + 0.2 * (plan * np.log(plan)).sum()

    leaf = tensor(student).requires_grad_()
    sinkhorn_distance(leaf, tensor(teacher), 0.2, 300).mean().backward()
    slope = (regularised(student + 1e-4 * along) - regularised(student - 1e-4 * along)) / 2e-4
    np.testing.assert_allclose((leaf.grad.numpy() * along).sum(), slope, rtol=1e-3)


# whom a sample is contrasted with


def allowed(label, members):
    """Other classes' samples, sorted by class, then by number: what a rank counts."""
    return [i for wanted in range(4) if wanted != label for i in members if LABELS[i] == wanted]


def next_draws(labels, members=range(8), number=K):
    """The next draws, from the same raw numbers by a list of what may be drawn."""
    state = torch.get_rng_state()
    raw = torch.randint(2**62, (len(labels), number)).tolist()
    torch.set_rng_state(state)
    lists = [allowed(label, members) for label in labels]
    return [[there[number % len(there)] for number in row] for row, there in zip(raw, lists, strict=True)]


def crd_pair(kept=None, **settings):
    """A pair that contrasts with all samples, or with those that are kept."""
    return pair_of(LABELS, kept, crd_negatives=K, crd_bank="whole" if kept is None else "kept", **settings)


@pytest.mark.parametrize("bank", ["whole", "kept"])
def test_draws_are_uniform_over_other_classes(bank):
    kept = [0, 1, 3, 5, 7]
    torch.manual_seed(0)
    found = Others(pair_of(LABELS, kept, crd_bank=bank)).draw(torch.arange(4), 20_000)
    for label, row in enumerate(found.tolist()):
        there = [i for i in (range(8) if bank == "whole" else kept) if LABELS[i] != label]
        counts, share = Counter(row), 1 / len(there)
        assert sorted(counts) == there
        slack = 5 * math.sqrt(20_000 * share * (1 - share))
        assert all(abs(count - 20_000 * share) < slack for count in counts.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_set_of_one_class_and_a_teacher_without_penultimate_values_are_refused(name):
    with pytest.raises(SettingsError, match=r"all 3 samples are of class 2; keep more.*crd_bank = 'whole'"):
        term_of(name, crd_pair([0, 5, 6]))
    term_of(name, pair_of(LABELS, [0, 5, 6]))
    pair = pair_of(LABELS)
    pair.teacher_taps.pop("penultimate")
    with pytest.raises(SettingsError, match="reads 'penultimate', which the teacher 'T' does not have"):
        term_of(name, pair)


# the memory


def test_the_memory_starts_uniform_and_other_rows_stay():
    torch.manual_seed(0)
    memory = Memory(500)
    bound = 1 / math.sqrt(SIZE / 3)
    for bank in (memory.student, memory.teacher):
        assert bank.shape == (500, 128)
        assert bank.abs().max() <= bound
        assert abs(float(bank.var()) - bound**2 / 3) < 0.02 * bound**2
    assert not torch.equal(memory.student, memory.teacher)
    before = memory.student.clone()
    memory.update(torch.tensor([7]), torch.ones(1, SIZE), torch.ones(1, SIZE), normalised=False)
    assert torch.equal(memory.student[7], 0.5 * before[7] + 0.5)
    before[7] = memory.student[7]
    assert torch.equal(memory.student, before)


def test_the_memory_of_a_later_stage_keeps_every_sample():
    term, later = term_of("crd", crd_pair(range(8))), term_of("crd", crd_pair([0, 1, 2]), seed=4)
    later.load_state_dict(term.state_dict())
    assert later.memory.student.shape == (8, SIZE)
    torch.manual_seed(0)
    assert set(later.others.draw(torch.tensor([0, 1]), 50).flatten().tolist()) == {0, 1, 2}


# the terms


def step_of(seed=0, index=INDEX):
    torch.manual_seed(seed)
    seen = {"penultimate": torch.randn(len(index), OURS).requires_grad_()}
    return seen, batch_of(index, [LABELS[i] for i in index], penultimate=torch.randn(len(index), THEIRS))


def embedded(layer, values):
    return units(array(values) @ array(layer.weight).T + (0 if layer.bias is None else array(layer.bias)))


def reference_crd(term, seen, batch, chosen, log_z):
    """One step in float64, one pair at a time; returns losses, both log Z and the memory's next rows."""
    ours = embedded(term.student, seen["penultimate"])
    theirs = embedded(term.teacher, batch.knowledge["penultimate"])
    student, teacher = (array(bank).copy() for bank in (term.memory.student, term.memory.teacher))
    losses, made, index = np.zeros(3), [], batch.index.tolist()
    for way, (anchors, bank) in enumerate(((ours, teacher), (theirs, student))):
        rows = zip(anchors, index, chosen, strict=True)
        score = np.array([[anchor @ bank[i] / 0.07 for i in [own, *others]] for anchor, own, others in rows])
        made.append(math.log(8 * np.exp(score).mean()) if log_z is None else log_z[way])
        losses += reference.nce(score[:, 0], score[:, 1:], 8, math.exp(made[way]))
    for bank, new in ((student, ours), (teacher, theirs)):
        for i, row in zip(index, new, strict=True):
            bank[i] = units(0.5 * bank[i] + 0.5 * row)
    return losses, made, student, teacher


@pytest.mark.parametrize("kept", [None, [1, 3, 4, 6, 7]])
def test_crd_and_its_memory_equal_a_slow_reference_over_three_steps(kept):
    term, log_z = term_of("crd", crd_pair(kept)), None
    for step, index in enumerate((INDEX, [3, 6, 7], INDEX)):
        seen, batch = step_of(step, index)
        chosen = next_draws(batch.labels.tolist(), range(8) if kept is None else kept)
        losses, log_z, student, teacher = reference_crd(term, seen, batch, chosen, log_z)
        close(term(seen, batch), losses, rtol=1e-4)
        close(term.memory.student, student)
        close(term.memory.teacher, teacher)


def test_the_gradient_is_that_of_the_memory_before_the_step():
    """Finite differences of the student's values, with the memory and the draws put back each time."""
    term, (seen, batch) = term_of("crd", crd_pair()), step_of()
    memory = {key: value.clone() for key, value in term.state_dict().items() if key.startswith("memory")}

    def loss(values):
        term.load_state_dict(memory, strict=False)
        torch.manual_seed(3)
        return term({"penultimate": values}, batch).mean()

    loss(seen["penultimate"]).backward()  # log Z is that of this first step
    way, start = torch.randn(3, OURS), seen["penultimate"].detach()
    slope = (loss(start + 1e-2 * way) - loss(start - 1e-2 * way)) / 2e-2
    torch.testing.assert_close(slope.detach(), (way * seen["penultimate"].grad).sum(), rtol=2e-2, atol=1e-3)


def settled(term):
    """The critic after so many power iterations that its norms are exact, held there."""
    for _ in range(500):
        _ = term.student.weight, term.teacher.weight
    return term.eval()


def test_wcord_equals_a_slow_reference():
    term, (seen, batch) = settled(term_of("wcord", crd_pair())), step_of()
    seen["penultimate"] = seen["penultimate"].detach() * 3  # beyond the unit ball, others inside it
    layers = (array(part.parametrizations.weight.original) for part in (term.student, term.teacher))
    values = (array(seen["penultimate"]), array(batch.knowledge["penultimate"]))
    student, teacher = (rows @ (w / np.linalg.norm(w, 2)).T for w, rows in zip(layers, values, strict=True))
    ours, theirs = (rows / np.maximum(1, np.linalg.norm(rows, axis=1, keepdims=True)) for rows in (student, teacher))
    chosen = next_draws(batch.labels.tolist())
    banks = array(term.memory.teacher).copy(), array(term.memory.student).copy()
    expected = 0.05 * reference.sinkhorn(student, teacher, ENTROPY, ITERATIONS)
    for a in range(3):
        apart = [anchors[a] @ bank[i] for anchors, bank in zip((ours, theirs), banks, strict=True) for i in chosen[a]]
        expected[a] += 0.8 * (sum(apart) / len(apart) - ours[a] @ theirs[a]) / math.sqrt(2)
    close(term(seen, batch), expected, rtol=1e-4)
    close(term.memory.student[INDEX], 0.5 * banks[1][INDEX] + 0.5 * ours)
    close(term.memory.teacher[INDEX], 0.5 * banks[0][INDEX] + 0.5 * theirs)


def test_the_critic_of_wcord_is_1_lipschitz():
    term = settled(term_of("wcord", crd_pair()))
    torch.manual_seed(1)
    left, right = ((torch.randn(300, OURS) * scale, torch.randn(300, THEIRS) * scale) for scale in (1, 2))
    near = tuple(part + 1e-2 * torch.randn_like(part) for part in left)

    def critic(pair):
        return (ball(term.student(pair[0])) * ball(term.teacher(pair[1]))).sum(dim=1) / math.sqrt(2)

    for other in (right, near):
        apart = sum((a - b).square().sum(dim=1) for a, b in zip(left, other, strict=True)).sqrt()
        assert ((critic(left) - critic(other)).abs() <= apart * (1 + 1e-4)).all()
