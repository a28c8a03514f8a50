"""The terms on rotated images, on boundary images and on logits taken apart or weighed: sskd, bss, dkd, eakd."""

import math

import pytest
import torch
from pairs import CLASSES, OURS, THEIRS, divergence, lesson_of, pair_of, rows_of, softmax, term_of

from kcdcache.errors import SettingsError
from kcdcache.methods import registry
from kcdcache.settings import MethodSettings

LABELS = [2, 0, 1, 3]
PAIR = pair_of([2, 0, 1, 3, 1, 1])


def rotations(seed=0, rows=4):
    torch.manual_seed(seed)
    seen = {"logits": torch.randn(4 * rows, CLASSES) * 2, "penultimate": torch.randn(4 * rows, OURS)}
    lesson = lesson_of(
        range(rows), LABELS[:rows],
        rotations_logits=torch.randn(rows, 4, CLASSES) * 2, rotations_penultimate=torch.randn(rows, 4, THEIRS),
    )  # fmt: skip
    return {name: value.requires_grad_() for name, value in seen.items()}, lesson


def projected(module, values):
    first, _, last = module
    hidden = (values @ first.weight.double().T + first.bias.double()).clamp_min(0)
    return hidden @ last.weight.double().T + last.bias.double()


def cosine(left, right):
    return float(left @ right / (left.norm() * right.norm()))


def kept_anchors(scores, truths, share):
    """Those that score their truth highest, and of the others the share with its best rank."""
    right = [a for a, (row, truth) in enumerate(zip(scores, truths, strict=True)) if max(row) == row[truth]]
    wrong = [a for a in range(len(scores)) if a not in right]
    order = sorted(
        wrong, key=lambda a: (sum(s > scores[a][truths[a]] for s in scores[a]), -softmax(scores[a])[truths[a]])
    )
    return right + order[: math.floor(share * len(wrong))]


def divergences(student, teacher, truths, temperature, share):
    """T^2 KL per anchor that is kept, summed and divided by their number."""
    kept = kept_anchors(teacher, truths, share)
    each = [divergence(softmax(teacher[a], temperature), softmax(student[a], temperature)) for a in kept]
    return temperature**2 * sum(each) / max(1, len(each))


def similar(projections, order):
    """Cosines of every turned image of every sample with every upright one; order(row, turn) -> projection."""
    return [[cosine(order(i, turn), order(j, 0)) for j in range(4)] for i in range(4) for turn in (1, 2, 3)]


@torch.no_grad()
def reference_sskd(term, seen, lesson, preparing):
    """The mean over the batch in float64; the student's rows are turn by turn, the teacher's sample by sample."""
    logits = rows_of(seen["logits"])
    theirs = rows_of(lesson.knowledge["rotations:logits"])
    student = [logits[4 * turn + i] for i in range(4) for turn in (1, 2, 3)]
    teacher = [theirs[i][turn] for i in range(4) for turn in (1, 2, 3)]
    found = 2.7 * divergences(student, teacher, [LABELS[i] for i in range(4) for _ in range(3)], 4.0, 1.0)
    features = projected(term.teacher, lesson.knowledge["rotations:penultimate"].double())
    wanted = similar(features, lambda i, turn: features[i][turn])
    own = [i for i in range(4) for _ in range(3)]
    if preparing:
        return found + sum(-math.log(softmax(row)[truth]) for row, truth in zip(wanted, own, strict=True)) / 12
    ours = projected(term.student, seen["penultimate"].double())
    return found + 10 * divergences(similar(ours, lambda i, turn: ours[4 * turn + i]), wanted, own, 0.5, 0.75)


@pytest.mark.parametrize("epoch", [0, 59, 60, 239])
@pytest.mark.parametrize("seed", [0, 1])
def test_sskd_equals_a_slow_reference_before_and_after_the_teachers_projection_is_ready(epoch, seed):
    term, (seen, lesson) = term_of("sskd", PAIR), rotations(seed)
    assert term.weights_at(epoch, 240) == (1.0, 1.0)
    found = term(seen, lesson)
    assert found.shape == (4,)
    assert float(found.detach().mean()) == pytest.approx(reference_sskd(term, seen, lesson, epoch < 60), rel=1e-5)


def test_the_student_sees_each_image_turned_once_twice_and_three_times():
    pixels = torch.rand(2, 3, 4, 4)
    found = term_of("sskd", PAIR).extra(lesson_of([0, 1], [2, 0], pixels))
    assert found.shape == (6, 3, 4, 4)
    for place in range(6):
        for y in range(4):
            for x in range(4):
                old = [(x, 3 - y), (3 - y, 3 - x), (3 - x, y)][place // 2]
                assert torch.equal(found[place, :, y, x], pixels[place % 2, :, old[0], old[1]])


def test_images_that_are_not_square_cannot_be_turned():
    with pytest.raises(SettingsError, match="rotations need square views, found 4x6"):
        term_of("sskd", PAIR).extra(lesson_of([0], [2], torch.rand(1, 3, 4, 6)))


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


def test_the_teachers_projection_stands_still_across_a_resume():
    whole = term_of("sskd", PAIR)
    held = trained(whole, range(4), 4)
    again = term_of("sskd", PAIR, seed=5)
    again.load_state_dict({key: value.clone() for key, value in whole.state_dict().items()})
    assert same(trained(again, [2], 4)[0], held[1])


def test_the_projection_learns_to_find_the_upright_image():
    term = term_of("sskd", PAIR)
    losses = []

    def task():
        features = term.apprentice(rotations(0)[1].knowledge["rotations:penultimate"]).detach()
        rows = [[cosine(features[i][turn], features[j][0]) for j in range(4)] for i in range(4) for turn in (1, 2, 3)]
        return sum(-math.log(softmax(row)[a // 3]) for a, row in enumerate(rows))

    for epochs in ([], range(6)):
        trained(term, epochs, 240)
        losses.append(task())
    assert losses[1] < losses[0]


def test_sskd_sends_no_gradient_into_the_cache_and_both_projections_theirs():
    term, (seen, lesson) = term_of("sskd", PAIR), rotations()
    for value in lesson.knowledge.values():
        value.requires_grad_()
    for epoch, learns in ((0, term.apprentice), (200, term.student)):
        term.zero_grad()
        term.weights_at(epoch, 240)
        term(seen, lesson).mean().backward()
        assert all(parameter.grad.any() for parameter in learns.parameters())
    assert not any(parameter.grad.any() for parameter in term.apprentice.parameters())
    assert all(value.grad is None for value in lesson.knowledge.values())
    assert seen["logits"].grad[4:].abs().max() > 0
    assert not seen["logits"].grad[:4].any()


def test_sskd_weighs_labels_and_logits_as_its_release():
    choice = registry.choose(MethodSettings(method="sskd"))
    assert (choice.weights.gamma, choice.weights.alpha, choice.weights.temperature) == (0.1, 0.9, 4.0)
    assert choice.parts == {"sskd": 1.0}


def boundaries(seed=0, rows=4):
    torch.manual_seed(seed)
    seen = {"logits": (torch.randn(2 * rows, CLASSES) * 2).requires_grad_()}
    lesson = lesson_of(
        range(rows), LABELS[:rows], logits=torch.randn(rows, CLASSES) * 2,
        boundary_images=torch.rand(rows, 3, 8, 8), boundary_logits=torch.randn(rows, CLASSES) * 2,
    )  # fmt: skip
    with torch.no_grad():  # some are of the base, some not
        for row, ours, theirs in ((0, 9, 9), (1, -9, 9), (2, 9, 9), (3, 9, -9)):
            seen["logits"][row, LABELS[row]] += ours
            lesson.knowledge["logits"][row, LABELS[row]] += theirs
    return seen, lesson


@pytest.mark.parametrize(("temperature", "given"), [(3.0, {}), (1.5, {"temperature": 1.5})])
@pytest.mark.parametrize("epoch", [1, 6, 8])
def test_bss_equals_a_slow_reference(epoch, temperature, given):
    term, (seen, lesson) = term_of("bss", pair_of([2, 0, 1, 3], **given)), boundaries()
    term.weights_at(epoch - 1, 8)
    student, teacher = rows_of(seen["logits"]), rows_of(lesson.knowledge["logits"])
    beside = rows_of(lesson.knowledge["boundary:logits"])
    base = [i for i in range(4) if all(row[LABELS[i]] == max(row) for row in (student[i], teacher[i]))]
    assert base == [0, 2]
    plain = [
        divergence(softmax(t, temperature), softmax(s, temperature)) for s, t in zip(student[:4], teacher, strict=True)
    ]
    attacked = [divergence(softmax(beside[i], temperature), softmax(student[4 + i], temperature)) for i in base]
    expected = (3 * (1 - epoch / 8) + 1) * sum(plain) / 4 + max(0, 2 - 8 / 3 * epoch / 8) * sum(attacked) / 2
    assert float(term(seen, lesson).detach().mean()) == pytest.approx(expected, rel=1e-5)
    term(seen, lesson).mean().backward()
    reached = seen["logits"].grad[4:].abs().sum(dim=1) > 0
    assert reached.tolist() == [epoch < 6 and i in base for i in range(4)]


def test_bss_attacks_the_64_base_samples_that_differ_most():
    count = 70
    term, label = term_of("bss", pair_of([0, 1] * 35)), torch.zeros(count, dtype=torch.int64)
    logits = torch.zeros(2 * count, CLASSES)
    logits[:, 0] = 2 + 0.01 * torch.arange(2 * count)
    teacher = torch.tensor([[9.0, 0, 0, 0]]).repeat(count, 1)
    lesson = lesson_of(range(count), label, logits=teacher, boundary_logits=teacher[:, [1, 0, 2, 3]])
    term.weights_at(0, 8)
    seen = {"logits": logits.requires_grad_()}
    term(seen, lesson).mean().backward()
    reached = seen["logits"].grad[count:].abs().sum(dim=1) > 0
    assert reached.tolist() == [i < 64 for i in range(count)]


def test_bss_shows_the_cached_boundary_images():
    _, lesson = boundaries()
    assert torch.equal(term_of("bss", PAIR).extra(lesson), lesson.knowledge["boundary:images"])
    choice = registry.choose(MethodSettings(method="bss"))
    assert (choice.weights.gamma, choice.weights.alpha, choice.weights.temperature) == (1.0, 0.0, 3.0)


def logits_only(seed=0):
    torch.manual_seed(seed)
    return {"logits": torch.randn(6, CLASSES) * 3}, lesson_of(range(4), LABELS, logits=torch.randn(4, CLASSES) * 3)


@pytest.mark.parametrize(("temperature", "given"), [(4.0, {}), (2.0, {"temperature": 2.0})])
def test_dkd_equals_a_slow_reference(temperature, given):
    term, (seen, lesson) = term_of("dkd", pair_of([2, 0, 1, 3], **given)), logits_only()
    expected = []
    for row, label, wanted in zip(rows_of(seen["logits"]), LABELS, rows_of(lesson.knowledge["logits"]), strict=False):
        student, teacher = softmax(row, temperature), softmax(wanted, temperature)
        binary = [[p[label], 1 - p[label]] for p in (teacher, student)]
        rest = [[p[c] / (1 - p[label]) for c in range(CLASSES) if c != label] for p in (teacher, student)]
        expected.append(temperature**2 * (divergence(*binary) + 8 * divergence(*rest)))
    torch.testing.assert_close(term(seen, lesson), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_dkd_warms_up_over_twenty_epochs():
    term = term_of("dkd", PAIR)
    for epoch, share in ((0, 0.05), (9, 0.5), (19, 1.0), (20, 1.0), (239, 1.0)):
        assert term.weights_at(epoch, 240) == (1.0, pytest.approx(share))
    choice = registry.choose(MethodSettings(method="dkd"))
    assert (choice.weights.gamma, choice.weights.alpha, choice.weights.temperature) == (1.0, 0.0, 4.0)


@pytest.mark.parametrize(("temperature", "given"), [(4.0, {}), (2.0, {"temperature": 2.0})])
def test_eakd_equals_a_slow_reference_with_entropies_at_3_whatever_the_temperature(temperature, given):
    term, (seen, lesson) = term_of("eakd", pair_of([2, 0, 1, 3], **given)), logits_only()
    expected = []
    for row, wanted in zip(rows_of(seen["logits"]), rows_of(lesson.knowledge["logits"]), strict=False):
        theirs, ours = (-sum(p * math.log(p) for p in softmax(z, 3.0)) for z in (wanted, row))
        weight = (theirs + theirs * ours / math.log(CLASSES)) / 2
        expected.append(weight * temperature**2 * divergence(softmax(wanted, temperature), softmax(row, temperature)))
    torch.testing.assert_close(term(seen, lesson), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_eakd_has_its_authors_weights_and_no_other_soft_term():
    choice = registry.choose(MethodSettings(method="eakd"))
    assert (choice.weights.gamma, choice.weights.alpha, choice.weights.temperature) == (0.1, 0.0, 4.0)
    assert choice.terms == {"eakd": 0.9}
