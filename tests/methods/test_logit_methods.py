"""The methods on logits and labels: ce, kd, and those that take the divergence apart or weigh it, dkd and eakd."""

from dataclasses import replace

import pytest
import reference
import torch
from pairs import CLASSES, batch_of, knowledge_of, pair_of, term_of
from reference import array, close, drawn, tensor

from kcdcache.errors import SettingsError
from kcdcache.methods.base import hard_term
from kcdcache.methods.logits import decoupled
from kcdcache.methods.losses import logit_divergence
from kcdcache.methods.run_loss import basic, weights_of
from kcdcache.settings import MethodSettings

LABELS = torch.tensor([0, 2, 5, 5, 1])


def networks(seed, classes=6, rows=5):
    """Logits of a student and a teacher."""
    return tensor(drawn(seed, rows, classes, scale=3)), tensor(drawn(seed + 1, rows, classes, scale=3))


# ce and kd


def sheet(**changes):
    """Three plain points, one mixed with epsilon 0, two mixed."""
    given = {
        "labels": torch.tensor([0, 1, 2, 3, 4, 0]),
        "partner_labels": torch.tensor([0, 1, 2, 0, 0, 3]),
        "epsilon": torch.tensor([0, 0, 0, 0, 0.2, 0.3]),
        "mixed": torch.tensor([False, False, False, True, True, True]),
        "probabilities": torch.softmax(tensor(drawn(1, 6, 5)) / 4, dim=1),
    }
    return replace(batch_of(range(6), given["labels"]), **(given | changes))


def resolved(smoothing=0.0, **settings):
    return weights_of(MethodSettings(**settings), smoothing)


def hard(logits, batch, weights):
    return hard_term(logits, batch, weights.mix_label, weights.smoothing)


def test_methods_have_the_weights_of_their_papers_and_releases():
    papers = {
        "kd": (0.1, 0.9, 4.0, {"kd": 0.0}), "ce": (1.0, 0.0, 1.0, {"ce": 0.0}), "sskd": (0.1, 0.9, 4.0, {"sskd": 1.0}),
        "bss": (1.0, 0.0, 3.0, {"bss": 1.0}), "dkd": (1.0, 0.0, 4.0, {"dkd": 1.0}),
        "eakd": (0.1, 0.0, 4.0, {"eakd": 0.9}), "crd": (1.0, 0.0, 4.0, {"crd": 0.8}),
        "crd+kd": (1.0, 1.0, 4.0, {"crd": 0.8, "kd": 0.0}), "fitnet": (1.0, 0.0, 4.0, {"fitnet": 100}),
        "sp": (1.0, 0.0, 4.0, {"sp": 3000}), "vid": (1.0, 0.0, 4.0, {"vid": 1}), "rkd": (1.0, 0.0, 4.0, {"rkd": 1}),
        "pkt": (1.0, 0.0, 4.0, {"pkt": 30000}), "fsp": (1.0, 0.0, 4.0, {"fsp": 1}),
        "reviewkd": (1.0, 0.0, 4.0, {"reviewkd": 5}), "dml": (1.0, 0.0, 1.0, {"dml": 1.0}),
        "one": (1.0, 0.0, 3.0, {"one": 1.0}),
    }  # fmt: skip
    for name, expected in papers.items():
        weights = weights_of(MethodSettings(method=name))
        assert (weights.gamma, weights.alpha, weights.temperature, weights.parts) == expected, name
    settings = MethodSettings()
    assert (settings.crd_negatives, settings.crd_bank) == (16384, "whole")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("kd+kdd", "unknown method 'kdd'; did you mean 'kd'"),
        ("contrast", "unknown method 'contrast'; known: at, "),
        ("kd at", r"unknown method 'kd at'; .*, or several such as kd\+at or kd\*0\.5\+at\*1000"),
        ("kd+at+kd", "names 'kd' twice"),
        ("kd+at*", "the weight of at should be a number of at least 0, found ''"),
        ("at*-1", "the weight of at should be a number of at least 0, found '-1'"),
        ("at*inf", "the weight of at should be a number of at least 0, found 'inf'"),
        ("ce*2", "ce has no term of its own to weigh; --gamma weighs the labels"),
    ],
)
def test_methods_and_weights_that_cannot_be_are_refused(method, message):
    with pytest.raises(SettingsError, match=message):
        weights_of(MethodSettings(method=method))


def test_weights_may_stand_in_the_method_and_beta_is_for_one_term():
    joined = weights_of(MethodSettings(method=" kd*0.5 + at*2e2+pkt"))
    assert (joined.gamma, joined.alpha, joined.parts) == (1, 0.5, {"kd": 0, "at": 200, "pkt": 30000})
    assert weights_of(MethodSettings(method="kd+at", beta=3)).parts == {"kd": 0, "at": 3}
    for method, count in (("at+pkt", 2), ("kd", 0)):
        with pytest.raises(SettingsError, match=f"--beta is the weight of one method's own term, .* has {count}"):
            weights_of(MethodSettings(method=method, beta=3))


def test_settings_win_over_the_methods_defaults_and_zero_counts_as_given():
    default = resolved(0.05)
    assert (default.gamma, default.alpha, default.temperature, default.smoothing) == (0.1, 0.9, 4.0, 0.05)
    given = resolved(gamma=0, alpha=0, temperature=2, mix_label="mix")
    assert (given.gamma, given.alpha, given.temperature, given.mix_label) == (0, 0, 2, "mix")


@pytest.mark.parametrize("mix_label", ["keep", "mix"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_kd_equals_a_slow_reference_per_sample_whose_kept_label_ignores_the_partner(mix_label, smoothing):
    logits, batch = drawn(0, 6, 5, scale=3), sheet()
    share = array(batch.epsilon) if mix_label == "mix" else 0
    own, partner = (reference.hard(logits, y.numpy(), smoothing) for y in (batch.labels, batch.partner_labels))
    expected = 0.3 * ((1 - share) * own + share * partner)
    expected += 0.6 * reference.soft(logits, array(batch.probabilities), 3)
    weights = resolved(smoothing, mix_label=mix_label, gamma=0.3, alpha=0.6, temperature=3)
    close(basic(tensor(logits), batch, weights), expected, atol=1e-5)


def test_kd_without_a_soft_share_is_ce_and_smoothing_is_in_the_hard_term_only():
    logits, weights = tensor(drawn(0, 6, 5)), resolved(gamma=1, alpha=0)
    for batch in (sheet(), sheet(probabilities=None)):
        assert torch.equal(basic(logits, batch, weights), hard(logits, sheet(), weights))
    plain, smooth = (resolved(smoothing, gamma=0) for smoothing in (0.0, 0.3))
    assert torch.equal(basic(logits, sheet(), plain), basic(logits, sheet(), smooth))
    assert not torch.allclose(hard(logits, sheet(), plain), hard(logits, sheet(), smooth))


# dkd: target class and other classes apart


def test_two_classes_leave_nothing_among_the_rest():
    assert torch.equal(decoupled(*networks(8, 2), LABELS.clamp_max(1), 0.0, 1.0, 4.0), torch.zeros(5))


def test_a_sure_teacher_far_beyond_the_usual_mask_still_teaches_the_rest():
    """The released mask of -1000 lets a label's logit of 1e4 through; here the rest does not see it at all."""
    teacher, student = tensor([[1e4, 1.0, 2.0, 3.0]]), tensor([[-1e4, 3.0, 1.0, 0.0]])
    expected = reference.logits(array(student[:, 1:]), array(teacher[:, 1:]))
    close(decoupled(student, teacher, torch.tensor([0]), 0.0, 1.0, 1.0), expected)


def test_dkd_warms_up_over_twenty_epochs():
    term = term_of("dkd", pair_of([2, 0, 1, 3]))
    for epoch, share in ((0, 0.05), (9, 0.5), (19, 1.0), (20, 1.0), (239, 1.0)):
        assert term.weights_at(epoch, 240) == (1.0, pytest.approx(share))


# eakd: the divergence weighed by both networks' entropies


def test_the_gradient_is_that_of_the_divergence_under_a_constant_weight():
    student, teacher = networks(2)
    plain = student.clone().requires_grad_()
    batch, term = batch_of(range(5), LABELS, logits=teacher), term_of("eakd", pair_of([2, 0, 1, 3]))
    term({"logits": student.requires_grad_()}, batch).sum().backward()
    logit_divergence(plain, teacher, 4.0).sum().backward()
    weights = tensor(reference.entropy_weights(array(student), array(teacher), 3.0))
    torch.testing.assert_close(student.grad, plain.grad * weights[:, None])


TERMS = {
    "dkd": lambda student, teacher, t: reference.decoupled(student, teacher, LABELS[:4] % CLASSES, 1, 8, t),
    # entropies are at 3 whatever the temperature
    "eakd": lambda student, teacher, t: reference.entropy_weighted(student, teacher, t, 3.0),
}


@pytest.mark.parametrize(("temperature", "given"), [(4.0, {}), (2.0, {"temperature": 2.0})])
@pytest.mark.parametrize("name", TERMS)
def test_terms_on_logits_equal_a_slow_reference(name, temperature, given):
    student, teacher = drawn(0, 4, CLASSES, scale=3), tensor(drawn(1, 4, CLASSES, scale=3))
    batch = batch_of(range(4), LABELS[:4] % CLASSES, logits=teacher)
    found = term_of(name, pair_of([2, 0, 1, 3], **given))({"logits": tensor(student)}, batch)
    expected = TERMS[name](student, knowledge_of(batch)["logits"], temperature)
    close(found, expected, rtol=1e-4, atol=1e-5)
