"""The terms on feature maps and on relations: fitnet, sp, vid, fsp, reviewkd, rkd, pkt."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lessons import CPU, digits, precomputed
from plain import PLAIN, plain

from kcdcache.errors import SettingsError
from kcdcache.methods import registry as methods_registry
from kcdcache.methods.base import Pair
from kcdcache.methods.registry import METHODS
from kcdcache.networks import registry as networks_registry
from kcdcache.networks import taps
from kcdcache.networks.input_transform import InputTransform
from kcdcache.networks.registry import tap_shapes
from kcdcache.settings import MethodSettings
from kcdcache.teacher import fields, teacher

NAMES = ("fitnet", "sp", "vid", "fsp", "reviewkd", "rkd", "pkt")
BATCH = 4

PUBLISHED = (
    ("wrn_40_2", "wrn_16_2"), ("wrn_40_2", "wrn_40_1"), ("resnet56", "resnet20"), ("resnet110", "resnet32"),
    ("resnet32x4", "resnet8x4"), ("vgg13", "vgg8"), ("vgg13", "MobileNetV2"), ("ResNet50", "MobileNetV2"),
    ("ResNet50", "vgg8"), ("resnet32x4", "ShuffleV1"), ("resnet32x4", "ShuffleV2"), ("wrn_40_2", "ShuffleV1"),
)  # fmt: skip
EQUAL_CHANNELS = {"wrn_16_2", "resnet20", "resnet32", "resnet8x4"}
"""students as wide as their published teacher; vgg8 is too, after vgg13 alone"""

OURS = {"stage0": (3, 8, 8), "stage1": (3, 8, 8), "stage2": (4, 4, 4), "stage3": (5, 2, 2), "penultimate": (5,)}
THEIRS = {"stage0": (3, 9, 9), "stage1": (6, 9, 9), "stage2": (2, 8, 8), "stage3": (7, 3, 3), "penultimate": (9,)}
"""taps of small made-up networks whose maps differ in every way"""


def shaped(stages):
    before = {f"{tap}.pre": shape for tap, shape in stages.items() if tap in ("stage1", "stage2", "stage3", "stage4")}
    return {**stages, **before, "logits": (10,)}


def pair_between(theirs, ours, names=("T", "S")):
    return Pair(
        teacher=names[0], student=names[1], teacher_taps=theirs, student_taps=ours, image=(3, 32, 32),
        labels=np.arange(20) % 10, kept=np.arange(20), settings=MethodSettings(), seed=0,
    )  # fmt: skip


def pair_of(theirs, ours):
    return pair_between(*(tap_shapes(name, 100, 3, 32, 32) for name in (theirs, ours)), (theirs, ours))


def small_pair(theirs=THEIRS, ours=OURS):
    return pair_between(shaped(theirs), shaped(ours))


def term_of(name, pair, seed=0):
    """The term with weights, normalisation's too, far from those it starts with."""
    torch.manual_seed(seed)
    term = METHODS[name].term(pair)
    with torch.no_grad():
        for parameter in term.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return term


def lesson_of(pair, names, rows=BATCH):
    """A lesson with random teacher's values of these fields."""
    knowledge = {}
    for name in names:
        field = fields.parse(name)
        knowledge[name] = field.derive(*(torch.randn(rows, *pair.teacher_shape(tap)) for tap in field.taps))
    zeros = torch.zeros(rows, dtype=torch.int64)
    return SimpleNamespace(
        index=torch.arange(rows), pixels=torch.zeros(rows, 3, 2, 2), labels=zeros, partner_labels=zeros,
        epsilon=torch.zeros(rows), mixed=zeros.bool(), probabilities=None, knowledge=knowledge,
    )  # fmt: skip


def seen_of(pair, names, rows=BATCH):
    return {tap: torch.randn(rows, *pair.student_shape(tap)) for tap in (*names, "logits")}


def fitting(name, theirs=THEIRS, ours=OURS):
    """A pair that the method accepts: for fsp the student has the teacher's channels, and its own sizes."""
    if name == "fsp":
        ours = {tap: (theirs[tap][0], *shape[1:]) for tap, shape in ours.items()}
    return small_pair(theirs, ours)


def check(name, pair):
    term = term_of(name, pair)
    seen, lesson = seen_of(pair, term.taps), lesson_of(pair, term.fields)
    expected = PLAIN[name](*(term, *({k: plain(v) for k, v in given.items()} for given in (seen, lesson.knowledge))))
    np.testing.assert_allclose(plain(term(seen, lesson)), expected, rtol=2e-4, atol=2e-6)
    assert np.abs(expected).min() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_equals_a_plain_recomputation(name):
    check(name, fitting(name))
    check(name, fitting(name, OURS, OURS))


@pytest.mark.parametrize("name", ["vid", "fsp", "reviewkd", "sp"])
def test_the_loss_equals_a_plain_recomputation_with_a_larger_student(name):
    check(name, fitting(name, {**OURS, "stage1": (6, 5, 5)}, {**THEIRS, "stage3": (4, 8, 8)}))


@pytest.mark.parametrize(
    ("ours", "theirs", "layer"), [(8, 4, "Conv2d"), (4, 8, "ConvTranspose2d"), (6, 4, "Conv2d"), (5, 5, "Conv2d")]
)
def test_the_hints_regressor_halves_doubles_or_cuts(ours, theirs, layer):
    pair = small_pair({**THEIRS, "stage2": (2, theirs, theirs)}, {**OURS, "stage2": (3, ours, ours)})
    assert type(term_of("fitnet", pair).regressor[0]).__name__ == layer
    check("fitnet", pair)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_further_images_change_nothing(name):
    pair = fitting(name)
    term = term_of(name, pair)
    seen, lesson = seen_of(pair, term.taps), lesson_of(pair, term.fields)
    more = {tap: torch.cat([values, 9 * torch.ones_like(values)]) for tap, values in seen.items()}
    assert torch.equal(term(more, lesson), term(seen, lesson))


def loss_and_gradients(name, pair, layout):
    """As in training, the student's maps have one layout in memory, the teacher's perhaps another."""
    term = term_of(name, pair)
    seen, lesson = seen_of(pair, term.taps), lesson_of(pair, term.fields)
    lasting = {
        tap: laid_out(values, torch.channels_last).requires_grad_() for tap, values in seen.items() if tap in term.taps
    }
    lesson.knowledge = {name: laid_out(values, layout) for name, values in lesson.knowledge.items()}
    loss = term(lasting, lesson)
    loss.mean().backward()
    return [loss, *(values.grad for values in (*lasting.values(), *term.parameters()))]


def laid_out(values, layout):
    return values.contiguous(memory_format=layout) if values.ndim == 4 else values


@pytest.mark.parametrize("name", NAMES)
def test_how_the_teachers_values_lie_in_memory_changes_no_bit(name):
    pair = fitting(name, {**THEIRS, "stage1": (16, 17, 17), "stage2": (16, 8, 8)}, {**OURS, "stage2": (16, 4, 4)})
    found = (loss_and_gradients(name, pair, layout) for layout in (torch.contiguous_format, torch.channels_last))
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_term_takes_batches_of_any_size_and_keeps_all_its_state_in_its_tensors(name):
    pair = fitting(name)
    term, again = term_of(name, pair), term_of(name, pair, seed=1)
    for rows in (5, 2):
        term(seen_of(pair, term.taps, rows), lesson_of(pair, term.fields, rows))
    again.load_state_dict(term.state_dict())
    seen, lesson = seen_of(pair, term.taps), lesson_of(pair, term.fields)
    assert torch.equal(again.eval()(seen, lesson), term.eval()(seen, lesson))


def test_the_variance_starts_at_five():
    term = METHODS["vid"].term(small_pair())
    assert [tuple(raw.shape) for raw in term.raw_variances] == [(6,), (2,), (7,)]
    for raw in term.raw_variances:
        torch.testing.assert_close(torch.nn.functional.softplus(raw) + 1e-5, torch.full_like(raw, 5.0))


# ---- which values of which stages


def test_the_fields_of_each_method_are_those_of_its_paper():
    expected = {
        "fitnet": ("maps:stage2",),
        "sp": ("maps:stage3",),
        "vid": ("maps:stage1", "maps:stage2", "maps:stage3"),
        "fsp": ("fsp:stage0:stage1", "fsp:stage1:stage2", "fsp:stage2:stage3"),
        "reviewkd": ("penultimate", "maps:stage3.pre", "maps:stage2.pre", "maps:stage1.pre"),
        "rkd": ("penultimate",),
        "pkt": ("penultimate",),
    }
    pair = pair_of("wrn_40_2", "wrn_16_2")
    assert {name: METHODS[name].term(pair).fields for name in NAMES} == expected


def test_a_store_is_asked_for_the_same_fields(tmp_path):
    data = digits(12, 10)
    network = teacher.freeze(
        networks_registry.build("wrn_40_2", 10, 1), InputTransform(data.mean, data.std), "wrn_40_2", data.classes, CPU
    )
    knowledge = precomputed(tmp_path / "store", data, network, views=1).knowledge
    pair = pair_of("wrn_40_2", "wrn_16_2")
    for name in NAMES:
        found = methods_registry.reads(MethodSettings(method=name), "wrn_16_2", knowledge, data)
        assert found == METHODS[name].term(pair).fields


def test_of_unequal_numbers_of_stages_the_last_ones_are_matched():
    taller = {**THEIRS, "stage4": (5, 2, 2)}
    pair = small_pair(taller, {**OURS, "stage3": (5, 2, 2)})
    assert METHODS["vid"].term(pair).fields == ("maps:stage2", "maps:stage3", "maps:stage4")
    assert METHODS["sp"].term(pair).fields == ("maps:stage4",)
    widths = {**OURS, "stage1": (2, 8, 8), "stage2": (7, 4, 4)}
    assert METHODS["fsp"].term(small_pair(taller, widths)).fields == ("fsp:stage2:stage3", "fsp:stage3:stage4")
    fitnet = METHODS["fitnet"].term(small_pair(taller, {**OURS, "stage2": (4, 6, 6)}))
    assert (fitnet.taps, fitnet.fields) == (("stage2",), ("maps:stage3",))
    review = METHODS["reviewkd"].term(pair)
    assert review.taps == ("penultimate", "stage3", "stage2", "stage1")
    assert review.fields == ("penultimate", "maps:stage4.pre", "maps:stage3.pre", "maps:stage2.pre")


# ---- the published pairs


def may_construct(name, theirs, ours):
    return name != "fsp" or ours in EQUAL_CHANNELS or (theirs, ours) == ("vgg13", "vgg8")


@pytest.mark.parametrize(("theirs", "ours"), PUBLISHED)
def test_every_published_pair_has_every_method_or_a_message(theirs, ours):
    pair = pair_of(theirs, ours)
    for name in NAMES:
        if may_construct(name, theirs, ours):
            with torch.device("meta"):
                term = METHODS[name].term(pair)
            assert set(term.taps) <= set(pair.student_taps)
            assert all(fields.parse(field).name == field for field in term.fields)
        else:
            with pytest.raises(SettingsError, match="fsp needs equal numbers of channels"):
                METHODS[name].term(pair)


def gradients_of(name, theirs, ours):
    """A step's gradients: those of the student, and those of the term's own parameters."""
    pair = pair_of(theirs, ours)
    torch.manual_seed(3)
    term, student = METHODS[name].term(pair), networks_registry.build(ours, 100, 0).train()
    lesson = lesson_of(pair, term.fields)
    seen = taps.run(student, torch.randn(BATCH, 3, 32, 32), ["logits", *term.taps])
    loss = term(seen, lesson)
    assert loss.shape == (BATCH,)
    loss.mean().backward()
    found = ([p.grad for p in module.parameters() if p.grad is not None] for module in (student, term))
    return term, *found


PAIRS = (("wrn_40_2", "wrn_16_2"), ("resnet56", "resnet20"), ("vgg13", "MobileNetV2"))


@pytest.mark.parametrize(
    ("name", "theirs", "ours"), [(name, *pair) for name in NAMES for pair in PAIRS if may_construct(name, *pair)]
)
def test_finite_gradients_reach_the_student_and_all_of_its_own_modules(name, theirs, ours):
    term, student, own = gradients_of(name, theirs, ours)
    assert len(own) == len(list(term.parameters()))
    assert bool(own) == (name in ("fitnet", "vid", "reviewkd"))
    assert all(torch.isfinite(grad).all() for grad in student + own)
    assert sum(bool(grad.any()) for grad in student) > len(student) / 2
    assert all(grad.any() for grad in own)


def test_the_modules_of_the_published_pair_with_unlike_sizes_have_its_shapes():
    pair = pair_of("ResNet50", "MobileNetV2")
    review = METHODS["reviewkd"].term(pair)
    assert [tuple(fusion.narrow[0].weight.shape[:2]) for fusion in review.fusions] == [
        (512, 1280), (512, 160), (512, 48), (512, 16), (512, 12),
    ]  # fmt: skip
    assert [len(fusion.answer[0].weight) for fusion in review.fusions] == [2048, 2048, 1024, 512, 256]
    hint = METHODS["fitnet"].term(pair).regressor[0]
    assert (type(hint), tuple(hint.weight.shape)) == (torch.nn.ConvTranspose2d, (16, 512, 4, 4))
    assert [name for name, _ in METHODS["vid"].term(pair).means[0].named_parameters()] == [
        f"{n}.weight" for n in (0, 2, 4)
    ]
    widths = [[tuple(layer.weight.shape[:2]) for layer in mean[::2]] for mean in METHODS["vid"].term(pair).means]
    assert widths[0] == [(256, 12), (256, 256), (256, 256)]


# ---- schedules, weights, refusals


def test_weights_and_recipes_are_those_of_the_papers():
    betas = {"fitnet": 100, "sp": 3000, "vid": 1, "rkd": 1, "pkt": 30000, "fsp": 1, "reviewkd": 5}
    assert {name: METHODS[name].beta for name in NAMES} == betas
    assert {(METHODS[name].gamma, METHODS[name].alpha) for name in NAMES} == {(1, 0)}
    recipe = {"learning_rate": 0.1, "batch_size": 128, "nesterov": True}
    assert methods_registry.recipe(MethodSettings(method="reviewkd"), "wrn_16_2") == recipe
    assert all(METHODS[name].recipe == {} for name in NAMES if name != "reviewkd")


def test_fsp_teaches_alone_in_the_first_eighth_and_not_at_all_later():
    weights_at = METHODS["fsp"].term(fitting("fsp")).weights_at
    assert [weights_at(epoch, 240) for epoch in (0, 29, 30, 239)] == [(0, 1), (0, 1), (1, 0), (1, 0)]
    assert [sum(weights_at(e, n)[1] for e in range(n)) for n in (1, 2, 7, 8, 15, 16)] == [0, 1, 1, 1, 1, 2]


def test_reviewkd_grows_over_twenty_epochs():
    weights_at = METHODS["reviewkd"].term(small_pair()).weights_at
    assert [weights_at(epoch, 240) for epoch in (0, 5, 20, 239)] == [(1, 0), (1, 0.25), (1, 1), (1, 1)]


@pytest.mark.parametrize("name", sorted({*NAMES} - {"fsp", "reviewkd"}))
def test_the_others_count_from_the_first_epoch_on(name):
    assert METHODS[name].term(small_pair()).weights_at(0, 240) == (1, 1)


def test_unequal_channels_are_refused_with_both_shapes():
    expected = r"'stage1' of the teacher 'T' has shape \(6, 9, 9\), 'stage1' of the student 'S' has \(3, 8, 8\)"
    with pytest.raises(SettingsError, match=expected):
        METHODS["fsp"].term(small_pair())


@pytest.mark.parametrize("side", [5, 7, 12])
def test_a_hint_much_larger_than_the_students_map_is_refused(side):
    pair = small_pair({**THEIRS, "stage2": (2, side, side)})
    with pytest.raises(
        SettingsError, match=rf"\(4, 4, 4\) should be no smaller than the teacher's of shape \(2, {side}"
    ):
        METHODS["fitnet"].term(pair)


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_of_whom_only_logits_are_known_is_refused(name):
    missing = "reads 'penultimate', which the teacher 'T'" if name in ("rkd", "pkt") else "stages are not known"
    with pytest.raises(SettingsError, match=missing):
        METHODS[name].term(pair_between({"logits": (10,)}, shaped(OURS)))


@pytest.mark.parametrize("name", ["rkd", "pkt", "reviewkd"])
def test_a_student_without_a_classifiers_input_is_refused(name):
    ours = {tap: shape for tap, shape in shaped(OURS).items() if tap != "penultimate"}
    with pytest.raises(SettingsError, match="reads 'penultimate', which the student 'S'"):
        METHODS[name].term(pair_between(shaped(THEIRS), ours))
