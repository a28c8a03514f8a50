"""The methods on feature maps and on relations within a batch: at, fitnet, vid, fsp, reviewkd, sp, rkd, pkt."""

from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
from pairs import knowledge_of, pair_between, published_pair, random_batch, term_of
from reference import array, close, drawn, tensor

from kcdcache.errors import MismatchError, SettingsError
from kcdcache.methods.catalogue import METHODS
from kcdcache.methods.feature_maps import hierarchical_context, squared_error
from kcdcache.methods.relations import angle_wise, distance_wise, probabilistic, similarity_preserving
from kcdcache.teacher import fields

NAMES = ("fitnet", "sp", "vid", "fsp", "reviewkd", "rkd", "pkt")
RELATIONS = [similarity_preserving, distance_wise, angle_wise, probabilistic]


# the losses on maps


@pytest.mark.parametrize("loss", [squared_error, hierarchical_context])
@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 3, 1, 4), (2, 3, 4, 5)])
def test_a_map_that_would_only_broadcast_is_refused(loss, shape):
    message = r"expected the student's features in the teacher's shape \(.*found \(2, 3, 4, 4\)"
    with pytest.raises(MismatchError, match=message):
        getattr(loss, "__wrapped__", loss)(torch.zeros(2, 3, 4, 4), torch.zeros(*shape))


# the losses on relations


def test_opposite_rows_have_no_infinite_divergence():
    student, teacher = np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    expected = reference.probabilistic(student, teacher)
    assert 1 < expected.max() < 10
    close(probabilistic(tensor(student), tensor(teacher)), expected)


def test_equal_samples_take_no_part_in_the_mean_distance():
    student = np.array([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    assert reference.distances(student)[0][2] == 1.0
    close(distance_wise(tensor(student), tensor(drawn(14, 3, 4))), reference.distance(student, drawn(14, 3, 4)))


def test_near_neighbours_far_from_the_origin_keep_their_distances():
    """|a|^2 + |b|^2 - 2ab would leave nothing of a distance of 1 at 4096."""
    student, teacher = 4096 + np.array([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0], [3.0, 3.0]]), drawn(15, 4, 3)
    close(distance_wise(tensor(student), tensor(teacher)), reference.distance(student, teacher))


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("loss", RELATIONS[:3])
def test_equal_rows_and_rows_of_zeros_pass_no_nan_on_their_way_and_no_gradient_where_there_is_no_direction(loss, value):
    student = torch.full((4, 3), value, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        loss(student, tensor(drawn(16, 4, 3))).sum().backward()
    assert value or torch.equal(student.grad, torch.zeros(4, 3))


# the terms, with plain recomputations: each takes the term, whose weights it uses, and both sides' values by name


def plain_fitnet(term, ours, theirs):
    layer, norm, _ = term.regressor
    found = reference.relu(reference.normalised(reference.convolved(ours["stage2"], layer), norm))
    return reference.error(found, theirs["maps:stage2"])


def plain_vid(term, ours, theirs):
    total = 0
    for tap, module, raw in zip(("stage1", "stage2", "stage3"), term.means, term.raw_variances, strict=True):
        own, target = reference.smaller(ours[tap], theirs[f"maps:{tap}"])
        for layer in (module[0], module[2]):
            own = reference.relu(reference.convolved(own, layer))
        total += reference.variational(reference.convolved(own, module[4]), target, array(raw))
    return total


def plain_fsp(term, ours, theirs):
    stages = pairwise(("stage0", "stage1", "stage2", "stage3"))
    return sum(reference.error(reference.flow(ours[a], ours[b]), theirs[f"fsp:{a}:{b}"]) for a, b in stages)


def plain_reviewkd(term, ours, theirs):
    """As the paper draws it: from the vector before the classifier, a 1x1 map, down to the first stage."""
    levels = [("penultimate", "penultimate"), *((tap, f"maps:{tap}.pre") for tap in ("stage3", "stage2", "stage1"))]
    total, above = 0, None
    for (tap, name), fusion in zip(levels, term.fusions, strict=True):
        own, wanted = (x.reshape(*x.shape[:2], *(x.shape[2:] or (1, 1))) for x in (ours[tap], theirs[name]))
        fused = reference.normalised(reference.convolved(own, fusion.narrow[0]), fusion.narrow[1])
        if above is not None:
            above = reference.nearest(above, fused.shape[2])
            shares = reference.convolved(np.concatenate([fused, above], 1), fusion.attend[0])
            shares = 1 / (1 + np.exp(-shares))
            fused = fused * shares[:, :1] + above * shares[:, 1:]
        above = reference.nearest(fused, wanted.shape[2])
        answer = reference.normalised(reference.convolved(above, fusion.answer[0]), fusion.answer[1])
        total += reference.context(answer, wanted)
    return total


def vectors(loss):
    return lambda term, ours, theirs: loss(ours["penultimate"], theirs["penultimate"])


PLAIN = {
    "fitnet": plain_fitnet, "vid": plain_vid, "fsp": plain_fsp, "reviewkd": plain_reviewkd,
    "sp": lambda term, ours, theirs: reference.similarity(ours["stage3"], theirs["maps:stage3"]),
    "rkd": vectors(lambda s, t: 25 * reference.distance(s, t) + 50 * reference.angle(s, t)),
    "pkt": vectors(reference.probabilistic),
}  # fmt: skip

OURS = {"stage0": (3, 8, 8), "stage1": (3, 8, 8), "stage2": (4, 4, 4), "stage3": (5, 2, 2), "penultimate": (5,)}
THEIRS = {"stage0": (3, 9, 9), "stage1": (6, 9, 9), "stage2": (2, 8, 8), "stage3": (7, 3, 3), "penultimate": (9,)}
"""taps of small made-up networks whose maps differ in every way"""
WIDER = {**THEIRS, "stage1": (16, 17, 17), "stage2": (16, 8, 8)}


def shaped(stages):
    before = {f"{tap}.pre": shape for tap, shape in stages.items() if tap in ("stage1", "stage2", "stage3", "stage4")}
    return {**stages, **before, "logits": (10,)}


def small_pair(theirs=THEIRS, ours=OURS):
    return pair_between(shaped(theirs), shaped(ours))


def fitting(name, theirs=THEIRS, ours=OURS):
    """A pair that the method accepts: for fsp the student has the teacher's channels, and its own sizes."""
    if name == "fsp":
        ours = {tap: (theirs[tap][0], *shape[1:]) for tap, shape in ours.items()}
    return small_pair(theirs, ours)


def made(name, pair=None, rows=4):
    """A term far from its start, a student's values and a batch."""
    pair = pair or fitting(name)
    term = term_of(name, pair, moved=0.3)
    return term, *values_for(term, pair, rows)


def values_for(term, pair, rows=4):
    seen = {tap: torch.randn(rows, *pair.student_shape(tap)) for tap in (*term.taps, "logits")}
    return seen, random_batch(pair, term.fields, rows)


def check(name, pair):
    term, seen, batch = made(name, pair)
    expected = PLAIN[name](term, {tap: array(value) for tap, value in seen.items()}, knowledge_of(batch))
    close(term(seen, batch), expected, rtol=2e-4, atol=2e-6)
    assert np.abs(expected).min() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_equals_a_plain_recomputation(name):
    check(name, fitting(name))
    check(name, fitting(name, OURS, OURS))
    check(name, fitting(name, {**OURS, "stage1": (6, 5, 5)}, {**THEIRS, "stage3": (4, 8, 8)}))  # a larger student


@pytest.mark.parametrize(
    ("ours", "theirs", "layer"), [(8, 4, "Conv2d"), (4, 8, "ConvTranspose2d"), (6, 4, "Conv2d"), (5, 5, "Conv2d")]
)
def test_the_hints_regressor_halves_doubles_or_cuts(ours, theirs, layer):
    pair = small_pair({**THEIRS, "stage2": (2, theirs, theirs)}, {**OURS, "stage2": (3, ours, ours)})
    assert type(term_of("fitnet", pair).regressor[0]).__name__ == layer
    check("fitnet", pair)


def laid_out(values, layout):
    return values.contiguous(memory_format=layout) if values.ndim == 4 else values


def loss_and_gradients(name, pair, layout):
    """As in training, the student's maps have one layout in memory, the teacher's perhaps another."""
    term, seen, batch = made(name, pair)
    seen = {tap: laid_out(seen[tap], torch.channels_last).requires_grad_() for tap in term.taps}
    batch.knowledge.update({name: laid_out(values, layout) for name, values in batch.knowledge.items()})
    loss = term(seen, batch)
    loss.mean().backward()
    return [loss, *(values.grad for values in (*seen.values(), *term.parameters()))]


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_of_the_teachers_values_changes_no_bit(name):
    pair = fitting(name, WIDER, {**OURS, "stage2": (16, 4, 4)})
    found = (loss_and_gradients(name, pair, layout) for layout in (torch.contiguous_format, torch.channels_last))
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


def test_the_variance_starts_at_five():
    term = METHODS["vid"].term(small_pair())
    assert [tuple(raw.shape) for raw in term.raw_variances] == [(6,), (2,), (7,)]
    for raw in term.raw_variances:
        torch.testing.assert_close(torch.nn.functional.softplus(raw) + 1e-5, torch.full_like(raw, 5.0))


# which values of which stages


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
    pair = published_pair("wrn_40_2", "wrn_16_2")
    assert {name: METHODS[name].term(pair).fields for name in expected} == expected


def test_of_unequal_numbers_of_stages_the_last_ones_are_matched():
    taller = {**THEIRS, "stage4": (5, 2, 2)}
    pair = small_pair(taller, OURS)
    assert METHODS["vid"].term(pair).fields == ("maps:stage2", "maps:stage3", "maps:stage4")
    assert METHODS["sp"].term(pair).fields == ("maps:stage4",)
    widths = {**OURS, "stage1": (2, 8, 8), "stage2": (7, 4, 4)}
    assert METHODS["fsp"].term(small_pair(taller, widths)).fields == ("fsp:stage2:stage3", "fsp:stage3:stage4")
    fitnet = METHODS["fitnet"].term(small_pair(taller, {**OURS, "stage2": (4, 6, 6)}))
    assert (fitnet.taps, fitnet.fields) == (("stage2",), ("maps:stage3",))
    review = METHODS["reviewkd"].term(pair)
    assert review.taps == ("penultimate", "stage3", "stage2", "stage1")
    assert review.fields == ("penultimate", "maps:stage4.pre", "maps:stage3.pre", "maps:stage2.pre")


# the published pairs

AS_WIDE = (
    ("wrn_40_2", "wrn_16_2"), ("resnet56", "resnet20"), ("resnet110", "resnet32"), ("resnet32x4", "resnet8x4"),
    ("vgg13", "vgg8"),
)  # fmt: skip
NARROWER = (
    ("wrn_40_2", "wrn_40_1"), ("vgg13", "MobileNetV2"), ("ResNet50", "MobileNetV2"), ("ResNet50", "vgg8"),
    ("resnet32x4", "ShuffleV1"), ("resnet32x4", "ShuffleV2"), ("wrn_40_2", "ShuffleV1"),
)  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours"), AS_WIDE + NARROWER)
def test_every_published_pair_has_every_method_or_a_message(theirs, ours):
    pair = published_pair(theirs, ours)
    for name in NAMES:
        if name == "fsp" and (theirs, ours) in NARROWER:
            with pytest.raises(SettingsError, match="fsp needs equal numbers of channels"):
                METHODS[name].term(pair)
            continue
        with torch.device("meta"):
            term = METHODS[name].term(pair)
        assert set(term.taps) <= set(pair.student_taps)
        assert all(fields.parse(field).name == field for field in term.fields)


def test_the_modules_of_the_published_pair_with_unlike_sizes_have_its_shapes():
    pair = published_pair("ResNet50", "MobileNetV2")
    review = METHODS["reviewkd"].term(pair)
    shapes = [tuple(fusion.narrow[0].weight.shape[:2]) for fusion in review.fusions]
    assert shapes == [(512, 1280), (512, 160), (512, 48), (512, 16), (512, 12)]
    assert [len(fusion.answer[0].weight) for fusion in review.fusions] == [2048, 2048, 1024, 512, 256]
    regressor = METHODS["fitnet"].term(pair).regressor[0]
    assert (type(regressor), tuple(regressor.weight.shape)) == (torch.nn.ConvTranspose2d, (16, 512, 4, 4))
    mean = METHODS["vid"].term(pair).means[0]
    assert [name for name, _ in mean.named_parameters()] == [f"{n}.weight" for n in (0, 2, 4)]
    assert [tuple(layer.weight.shape[:2]) for layer in mean[::2]] == [(256, 12), (256, 256), (256, 256)]


# schedules, refusals


def test_schedules_are_those_of_the_papers():
    weights_at = {name: METHODS[name].term(fitting(name)).weights_at for name in NAMES}
    # fsp teaches alone in the first eighth and not at all later, reviewkd grows over twenty epochs
    assert [weights_at["fsp"](epoch, 240) for epoch in (0, 29, 30, 239)] == [(0, 1), (0, 1), (1, 0), (1, 0)]
    assert [sum(weights_at["fsp"](e, n)[1] for e in range(n)) for n in (1, 2, 7, 8, 15, 16)] == [0, 1, 1, 1, 1, 2]
    growing = [weights_at["reviewkd"](epoch, 240) for epoch in (0, 5, 20, 239)]
    assert growing == [(1, 0), (1, 0.25), (1, 1), (1, 1)]
    assert all(weights_at[name](0, 240) == (1, 1) for name in {*NAMES} - {"fsp", "reviewkd"})


def lacking(pair, side, *taps):
    for tap in taps:
        getattr(pair, side).pop(tap)
    return pair


STAGES = [tap for tap in shaped(THEIRS) if tap != "logits"]
REFUSED = [
    ("fsp", small_pair,
     r"'stage1' of the teacher 'T' has shape \(6, 9, 9\), 'stage1' of the student 'S' has \(3, 8, 8\)"),
    ("fitnet", lambda: small_pair({**THEIRS, "stage2": (2, 7, 7)}),
     r"\(4, 4, 4\) should be no smaller than the teacher's of shape \(2, 7, 7\)"),
    *(
        (name, lambda: lacking(small_pair(), "teacher_taps", *STAGES),
         "reads 'penultimate', which the teacher 'T'" if name in ("rkd", "pkt") else "stages are not known")
        for name in NAMES
    ),
    *(
        (name, lambda: lacking(small_pair(), "student_taps", "penultimate"),
         "reads 'penultimate', which the student 'S'")
        for name in ("rkd", "pkt", "reviewkd")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "pair", "message"), REFUSED)
def test_pairs_that_a_method_cannot_teach_are_refused_with_both_shapes_or_what_is_missing(name, pair, message):
    with pytest.raises(SettingsError, match=message):
        METHODS[name].term(pair())
