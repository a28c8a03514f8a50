"""The terms that contrast a sample with others over a memory: crd and wcord."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from pairs import OURS, THEIRS, lesson_of, pair_of, term_of

from kcdcache.errors import SettingsError
from kcdcache.methods import registry
from kcdcache.methods.contrast import ENTROPY, ITERATIONS, SIZE, Memory, Others, ball
from kcdcache.settings import MethodSettings

LABELS = [2, 0, 1, 0, 3, 2, 2, 1]
INDEX, K = [6, 1, 4], 5
NAMES = ("crd", "wcord")


def allowed(label, members):
    """Other classes' samples, sorted by class, then by number: what a rank counts."""
    return [i for wanted in range(4) if wanted != label for i in members if LABELS[i] == wanted]


def drawn(labels, members=range(8), number=K):
    """The next draws, from the same raw numbers by a list of what may be drawn."""
    state = torch.get_rng_state()
    raw = torch.randint(2**62, (len(labels), number)).tolist()
    torch.set_rng_state(state)
    lists = [allowed(label, members) for label in labels]
    return [[there[number % len(there)] for number in row] for row, there in zip(raw, lists, strict=True)]


def step_of(seed=0, index=INDEX):
    torch.manual_seed(seed)
    seen = {"penultimate": torch.randn(len(index) + 2, OURS).requires_grad_()}  # rows of extra images follow
    return seen, lesson_of(index, [LABELS[i] for i in index], penultimate=torch.randn(len(index), THEIRS))


def embedded(layer, values):
    weight, x = (part.detach().double().numpy() for part in (layer.weight, values))
    return x @ weight.T + (0 if layer.bias is None else layer.bias.detach().double().numpy())


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("kept", [None, [0, 1, 3, 5, 7]])
@pytest.mark.parametrize("label", range(4))
def test_every_rank_is_another_sample_of_another_class(label, kept):
    members = range(8) if kept is None else kept
    others = Others(pair_of(LABELS, kept, crd_bank="whole" if kept is None else "kept"))
    count = sum(LABELS[i] != label for i in members)
    found = others.ranked(torch.arange(count)[None], torch.tensor([label]))[0].tolist()
    assert found == allowed(label, members)
    assert sorted(found) == [i for i in members if LABELS[i] != label]


@pytest.mark.parametrize("bank", ["whole", "kept"])
def test_draws_are_uniform_over_other_classes(bank):
    kept = [0, 1, 3, 5, 7]
    others = Others(pair_of(LABELS, kept, crd_bank=bank))
    torch.manual_seed(0)
    found = others.draw(torch.arange(4), 20_000)
    for label, row in enumerate(found.tolist()):
        there = [i for i in (range(8) if bank == "whole" else kept) if LABELS[i] != label]
        counts, share = Counter(row), 1 / len(there)
        assert sorted(counts) == there
        slack = 5 * math.sqrt(20_000 * share * (1 - share))
        assert all(abs(count - 20_000 * share) < slack for count in counts.values())


def test_anchors_draw_apart_from_each_other():
    torch.manual_seed(0)
    found = Others(pair_of(LABELS)).draw(torch.tensor([0, 0, 0]), 30)
    assert len({tuple(row) for row in found.tolist()}) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_set_of_one_class_has_no_negatives(name):
    with pytest.raises(SettingsError, match=r"all 3 samples are of class 2; keep more.*crd_bank = 'whole'"):
        term_of(name, pair_of(LABELS, [0, 5, 6], crd_bank="kept"))
    term_of(name, pair_of(LABELS, [0, 5, 6]))


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_without_penultimate_values_is_refused(name):
    pair = pair_of(LABELS)
    pair.teacher_taps.pop("penultimate")
    with pytest.raises(SettingsError, match="reads 'penultimate', which the teacher 'T' does not have"):
        term_of(name, pair)


def reference_crd(term, seen, lesson, chosen, log_z):
    """One step in float64, one pair at a time; returns losses, both log Z and the memory's next rows."""
    ours = unit(embedded(term.student, seen["penultimate"][:3]))
    theirs = unit(embedded(term.teacher, lesson.knowledge["penultimate"]))
    student, teacher = (bank.double().numpy().copy() for bank in (term.memory.student, term.memory.teacher))
    losses, made = np.zeros(3), []
    for way, (anchors, bank) in enumerate(((ours, teacher), (theirs, student))):
        score = [
            [float(anchors[a] @ bank[i]) / 0.07 for i in [int(lesson.index[a]), *chosen[a]]] for a in range(len(chosen))
        ]
        every = [math.exp(s) for row in score for s in row]
        made.append(math.log(8 * sum(every) / len(every)) if log_z is None else log_z[way])
        for a, row in enumerate(score):
            x = [math.exp(s) / math.exp(made[way]) for s in row]
            noise = K / 8
            losses[a] -= math.log(x[0] / (x[0] + noise + 1e-7))
            losses[a] -= sum(math.log(noise / (v + noise + 1e-7)) for v in x[1:])
    for bank, new in ((student, ours), (teacher, theirs)):
        for a, i in enumerate(lesson.index.tolist()):
            mixed = 0.5 * bank[i] + 0.5 * new[a]
            bank[i] = mixed / np.linalg.norm(mixed)
    return losses, made, student, teacher


@pytest.mark.parametrize("kept", [None, [1, 3, 4, 6, 7]])
def test_crd_and_its_memory_equal_a_slow_reference_over_three_steps(kept):
    pair = pair_of(LABELS, kept, crd_negatives=K, crd_bank="whole" if kept is None else "kept")
    term, log_z = term_of("crd", pair), None
    for step, index in enumerate((INDEX, [3, 6, 7], INDEX)):
        seen, lesson = step_of(step, index)
        chosen = drawn(lesson.labels.tolist(), range(8) if kept is None else kept)
        losses, log_z, student, teacher = reference_crd(term, seen, lesson, chosen, log_z)
        found = term(seen, lesson)
        np.testing.assert_allclose(found.detach().numpy(), losses, rtol=1e-4)
        np.testing.assert_allclose(term.memory.student.numpy(), student, atol=1e-6)
        np.testing.assert_allclose(term.memory.teacher.numpy(), teacher, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_the_student_and_both_embeddings_alone(name):
    term = term_of(name, pair_of(LABELS, crd_negatives=K))
    seen, lesson = step_of()
    lesson.knowledge["penultimate"].requires_grad_()
    term(seen, lesson).mean().backward()
    assert lesson.knowledge["penultimate"].grad is None
    assert seen["penultimate"].grad[:3].abs().min(dim=1).values.max() > 0
    assert not seen["penultimate"].grad[3:].any()
    assert all(parameter.grad.any() for parameter in term.parameters())
    assert not any(buffer.requires_grad for buffer in term.buffers())


def test_the_gradient_is_that_of_the_memory_before_the_step():
    """Finite differences of the student's values, with the memory and the draws put back each time."""
    term = term_of("crd", pair_of(LABELS, crd_negatives=K))
    seen, lesson = step_of()
    memory = {key: value.clone() for key, value in term.state_dict().items() if key.startswith("memory")}

    def loss(values):
        term.load_state_dict(memory, strict=False)
        torch.manual_seed(3)
        return term({"penultimate": values}, lesson).mean()

    loss(seen["penultimate"]).backward()  # log Z is that of this first step
    way, start = torch.randn(3, OURS), seen["penultimate"].detach()[:3]
    slope = (loss(start + 1e-2 * way) - loss(start - 1e-2 * way)) / 2e-2
    expected = (way * seen["penultimate"].grad[:3]).sum()
    torch.testing.assert_close(slope.detach(), expected, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_term_made_again_and_loaded_goes_on_to_the_bit(name):
    pair = pair_of(LABELS, crd_negatives=K)
    term = term_of(name, pair)
    term(*step_of(0))
    again = term_of(name, pair, seed=9)
    again.load_state_dict({key: value.clone() for key, value in term.state_dict().items()})
    for step in (1, 2):
        assert torch.equal(term(*step_of(step)), again(*step_of(step)))


def test_log_z_is_that_of_the_first_step_for_good():
    pair = pair_of(LABELS, crd_negatives=K)
    term = term_of("crd", pair)
    term(*step_of(0))
    first = term._log_z.clone()
    assert first.isfinite().all()
    assert first.abs().min() > 0
    for step in (1, 2):
        term(*step_of(step, [0, 2, 5]))
    assert torch.equal(term._log_z, first)


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
    memory.update(torch.tensor([7]), torch.ones(1, SIZE), torch.ones(1, SIZE))
    assert torch.equal(memory.student[7], 0.5 * before[7] + 0.5)
    before[7] = memory.student[7]
    assert torch.equal(memory.student, before)


def test_the_memory_of_a_later_stage_keeps_every_sample():
    term = term_of("crd", pair_of(LABELS, crd_negatives=K, crd_bank="kept"))
    later = term_of("crd", pair_of(LABELS, [0, 1, 2], crd_negatives=K, crd_bank="kept"), seed=4)
    later.load_state_dict(term.state_dict())
    assert later.memory.student.shape == (8, SIZE)
    torch.manual_seed(0)
    assert set(later.others.draw(torch.tensor([0, 1]), 50).flatten().tolist()) == {0, 1, 2}


def test_a_last_batch_of_one_sample_is_served():
    for name in NAMES:
        seen, lesson = step_of(index=[4])
        assert torch.isfinite(term_of(name, pair_of(LABELS, crd_negatives=K))(seen, lesson)).all()


def test_crd_learns_while_its_memory_stands_still():
    term = term_of("crd", pair_of(LABELS, crd_negatives=64))
    seen, lesson = step_of()
    memory = {key: value.clone() for key, value in term.state_dict().items() if key.startswith("memory")}
    optimizer = torch.optim.SGD(term.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        term.load_state_dict(memory, strict=False)
        torch.manual_seed(0)
        loss = term(seen, lesson).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def settled(term):
    """The critic after so many power iterations that its norms are exact, held there."""
    for _ in range(500):
        _ = term.student.weight, term.teacher.weight
    return term.eval()


def transported(left, right):
    """<P, C> row by row times the number of rows, P balanced by scaling rows and columns in turn."""
    cost = 1 - unit(left) @ unit(right).T
    kernel, count = np.exp(-cost / ENTROPY), len(left)
    rows = np.ones(count)
    for _ in range(ITERATIONS):
        columns = 1 / count / (kernel.T @ rows)
        rows = 1 / count / (kernel @ columns)
    return count * (rows[:, None] * kernel * columns[None] * cost).sum(axis=1)


def test_wcord_equals_a_slow_reference():
    term = settled(term_of("wcord", pair_of(LABELS, crd_negatives=K)))
    seen, lesson = step_of()
    seen["penultimate"] = seen["penultimate"].detach() * 3  # beyond the unit ball, others inside it
    originals = [
        part.parametrizations.weight.original.detach().double().numpy() for part in (term.student, term.teacher)
    ]
    student, teacher = (
        values.double().numpy() @ (weight / np.linalg.norm(weight, 2)).T
        for weight, values in zip(originals, (seen["penultimate"][:3], lesson.knowledge["penultimate"]), strict=True)
    )
    ours, theirs = (rows / np.maximum(1, np.linalg.norm(rows, axis=1, keepdims=True)) for rows in (student, teacher))
    chosen = drawn(lesson.labels.tolist())
    banks = term.memory.teacher.double().numpy().copy(), term.memory.student.double().numpy().copy()
    expected = 0.05 * transported(student, teacher)
    for a in range(3):
        apart = [anchors[a] @ bank[i] for anchors, bank in zip((ours, theirs), banks, strict=True) for i in chosen[a]]
        expected[a] += 0.8 * (sum(apart) / len(apart) - ours[a] @ theirs[a]) / math.sqrt(2)
    np.testing.assert_allclose(term(seen, lesson).numpy(force=True), expected, rtol=1e-4, atol=1e-6)
    for a, i in enumerate(INDEX):
        np.testing.assert_allclose(term.memory.student[i].numpy(), 0.5 * banks[1][i] + 0.5 * ours[a], atol=1e-6)
        np.testing.assert_allclose(term.memory.teacher[i].numpy(), 0.5 * banks[0][i] + 0.5 * theirs[a], atol=1e-6)


def test_the_critic_of_wcord_is_1_lipschitz():
    term = settled(term_of("wcord", pair_of(LABELS, crd_negatives=K)))
    torch.manual_seed(1)
    left, right = ((torch.randn(300, OURS) * scale, torch.randn(300, THEIRS) * scale) for scale in (1, 2))
    near = tuple(part + 1e-2 * torch.randn_like(part) for part in left)

    def critic(pair):
        return (ball(term.student(pair[0])) * ball(term.teacher(pair[1]))).sum(dim=1) / math.sqrt(2)

    for other in (right, near):
        apart = sum((a - b).square().sum(dim=1) for a, b in zip(left, other, strict=True)).sqrt()
        assert ((critic(left) - critic(other)).abs() <= apart * (1 + 1e-4)).all()


def test_ball_leaves_its_inside_and_shortens_the_rest():
    found = ball(torch.tensor([[0.3, 0.4], [0.0, 0.0], [30.0, 40.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.3, 0.4], [0.0, 0.0], [0.6, 0.8]]))


def test_crd_with_kd_has_the_weights_of_repdistiller():
    choice = registry.choose(MethodSettings(method="crd+kd"))
    assert (choice.weights.gamma, choice.weights.alpha, choice.weights.temperature) == (1.0, 1.0, 4.0)
    assert choice.parts == {"crd": 0.8, "kd": 0.0}
    alone = registry.choose(MethodSettings(method="crd"))
    assert (alone.weights.gamma, alone.weights.alpha, alone.parts) == (1.0, 0.0, {"crd": 0.8})
    settings = MethodSettings()
    assert (settings.crd_negatives, settings.crd_bank) == (16384, "whole")
