"""The methods that train further networks with the student, dml and one; and what the network itself is given."""

import math

import numpy as np
import pytest
import reference
import torch
from lessons import CPU, digits
from pairs import CLASSES, batch_of, pair_of, term_of
from pupils import same_tensors, weights_of
from reference import array, close

from kcdcache.errors import SettingsError
from kcdcache.methods import run_loss
from kcdcache.methods.base import Term
from kcdcache.networks import registry as networks_registry
from kcdcache.networks.registry import tap_shapes
from kcdcache.networks.taps import run
from kcdcache.settings import MethodSettings, OptimizerSettings
from kcdcache.training import learner

LABELS = [2, 0, 1]
STAGES = {"dml": ("input", (3, 8, 8)), "one": ("stage2", (32, 4, 4))}
"""the value of the student that each reads beside its logits"""
MIXES = {"partner_labels": [2, 3, 3], "epsilon": [0.0, 0.3, 0.2], "mixed": [False, True, True]}
LABELLED = [{}, {"smoothing": 0.2}, {"mix_label": "mix"}, {"smoothing": 0.2, "mix_label": "mix"}]


def pair(student="resnet8", **settings):
    return pair_of([0, 1, 2, 3], student=student, ours=tap_shapes(student, CLASSES, 3, 8, 8), **settings)


def shown(name, rows=3):
    """Values of a student, and a batch about them."""
    torch.manual_seed(0)
    tap, shape = STAGES[name]
    seen = {"logits": torch.randn(rows, CLASSES) * 2, tap: torch.randn(rows, *shape)}
    batch = batch_of(range(rows), LABELS[:rows])
    vars(batch).update({key: torch.tensor(value[:rows]) for key, value in MIXES.items()})
    return {key: value.requires_grad_() for key, value in seen.items()}, batch


def labelled(logits, smoothing=0.0, mix_label="keep"):
    """Cross-entropy with the labels that the student itself is given."""
    share = np.array(MIXES["epsilon"]) if mix_label == "mix" else 0
    own, partner = (reference.hard(logits, labels, smoothing) for labels in (LABELS, MIXES["partner_labels"]))
    return (1 - share) * own + share * partner


# dml


@pytest.mark.parametrize("given", LABELLED)
def test_dml_equals_a_slow_reference(given):
    term, (seen, batch) = term_of("dml", pair(**given)), shown("dml")
    student, peer = array(seen["logits"]), array(term.peer(seen["input"]))
    expected = reference.logits(student, peer) + labelled(peer, **given) + reference.logits(peer, student)
    close(term(seen, batch), expected, rtol=1e-4, atol=1e-5)


def test_dml_holds_each_target_constant():
    term, (seen, batch) = term_of("dml", pair()), shown("dml")
    again = networks_registry.build("resnet8", CLASSES)
    again.load_state_dict(term_of("dml", pair()).peer.state_dict())
    peer = again.train()(seen["input"].detach())
    term(seen, batch).mean().backward()
    # of KL(p || softmax(z)), p constant, the gradient is softmax(z) - p; were p no constant, there would be more
    ours, theirs = seen["logits"].detach().softmax(1), peer.detach().softmax(1)
    torch.testing.assert_close(seen["logits"].grad, (ours - theirs) / 3, rtol=1e-4, atol=1e-6)
    slope = ((theirs - torch.eye(CLASSES)[batch.labels]) + (theirs - ours)) / 3  # of CE(peer) + KL(student || peer)
    own = torch.autograd.grad((peer * slope).sum(), list(again.parameters()))
    for parameter, expected in zip(term.peer.parameters(), own, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5)


def test_the_peer_is_the_students_kind_with_weights_of_its_own_unless_another_is_named():
    peer, student = term_of("dml", pair()).peer, networks_registry.build("resnet8", CLASSES, 0)
    assert type(peer) is type(student)
    assert not torch.equal(peer.conv1.weight, student.conv1.weight)
    assert same_tensors(weights_of(peer), weights_of(term_of("dml", pair()).peer))
    assert not torch.equal(peer.conv1.weight, term_of("dml", pair(), seed=1).peer.conv1.weight)
    assert type(term_of("dml", pair(peer="wrn_16_1")).peer) is type(networks_registry.build("wrn_16_1", CLASSES))
    with pytest.raises(SettingsError, match="unknown network 'resnet9'; did you mean 'resnet"):
        term_of("dml", pair(peer="resnet9"))


# one


def by_hand(network, values):
    """The last stage and classifier of a branch, layer by layer."""
    *blocks, _, _, classifier = network
    for block in blocks:
        values = block(values)
    return classifier(values.mean(dim=(2, 3)))


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1"])
@pytest.mark.parametrize(("epoch", "given"), [*zip((0, 40, 80, 200), LABELLED, strict=True)])
def test_one_equals_a_slow_reference(name, epoch, given):
    term, (seen, batch) = term_of("one", pair(name, **given)), shown("one")
    assert term.taps == ("stage2",)
    assert term.weights_at(epoch, 300) == (1.0, 1.0)
    found = term(seen, batch)
    shared = seen["stage2"].detach()
    rows = [array(seen["logits"]), *(array(by_hand(branch, shared)) for branch in term.branches)]
    raw = array(shared).mean(axis=(2, 3)) @ array(term.gate.linear.weight).T + array(term.gate.linear.bias)
    gates = reference.softmax(reference.relu((raw - raw.mean(axis=0)) / np.sqrt(raw.var(axis=0) + 1e-5)), axis=1)
    ensemble = sum(gates[:, [k]] * row for k, row in enumerate(rows))
    ramp = math.exp(-5 * (1 - min(1, epoch / 80)) ** 2)
    expected = sum(labelled(row, **given) for row in (rows[1], rows[2], ensemble))
    expected += ramp * sum(reference.logits(row, ensemble, 3) for row in rows)
    close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_ensemble_is_constant_to_its_divergences():
    term, (seen, batch) = term_of("one", pair()), shown("one")
    term.weights_at(200, 300)
    term._ramp.fill_(0)
    without = torch.autograd.grad(term(seen, batch).mean(), list(term.gate.parameters()))
    term._ramp.fill_(1)
    term(seen, batch).mean().backward()
    for parameter, slope in zip(term.gate.parameters(), without, strict=True):
        torch.testing.assert_close(parameter.grad, slope, rtol=1e-4, atol=1e-6)
    assert seen["logits"].grad.any()
    assert seen["stage2"].grad.any()


def test_gates_of_a_batch_of_one_sample_leave_their_statistics_alone():
    term, before = term_of("one", pair()), term_of("one", pair()).gate.norm.running_mean
    assert torch.isfinite(term(*shown("one", rows=1))).all()
    assert torch.equal(before, term.gate.norm.running_mean)


def test_branches_start_apart_and_follow_the_seed():
    term, again, other = (term_of("one", pair(), seed) for seed in (0, 0, 1))
    first, second = (weights_of(branch) for branch in term.branches)
    assert set(first) == set(second)
    assert not any(torch.equal(first[name], second[name]) for name in first if "conv" in name)
    assert same_tensors(weights_of(term), weights_of(again))
    assert not torch.equal(term.gate.linear.weight, other.gate.linear.weight)


ENDS = {
    "resnet20": ("layer3", "fc"), "wrn_16_2": ("block3", "bn1", "fc"), "ResNet50": ("layer4", "linear"),
    "torchvision:resnet18": ("layer4", "fc"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (number > 1)) for number, name in enumerate(ENDS)]
)
def test_a_branch_is_the_students_own_end(name):
    network = networks_registry.build(name, CLASSES)
    term = term_of("one", pair(name))
    found = run(network.eval(), torch.randn(2, 3, 8, 8), [term.taps[0], "logits"])
    branch = term.branches[0].eval()
    ends = [value for key, value in network.state_dict().items() if key.split(".")[0] in ENDS[name]]
    branch.load_state_dict(dict(zip(branch.state_dict(), ends, strict=True)))
    torch.testing.assert_close(branch(found[term.taps[0]]), found["logits"])


@pytest.mark.parametrize("name", ["vgg8", "ShuffleV1", "lessons:TinyNet"])
def test_other_families_cannot_branch_off(name):
    with pytest.raises(SettingsError, match=f"'{name}' does not have; take a student of the resnet or wrn families"):
        term_of("one", pair_of([0, 1], student=name))


# what the network is given


class Curious(Term):
    def __init__(self, taps):
        super().__init__()
        self.taps = taps


@pytest.mark.parametrize("taps", [("input",), ("stage1", "input", "penultimate")])
def test_the_tap_input_is_what_the_network_is_given(taps):
    weights = run_loss.weights_of(MethodSettings(method="ce"))
    loss = run_loss.Loss(weights, {"a": Curious(taps)})
    pupil = learner.new_learner("resnet8", digits(), OptimizerSettings(), loss, CPU)
    pixels, given = torch.rand(3, 3, 16, 16), []
    pupil.network.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].clone()))
    seen = pupil.outputs(pixels)
    assert set(seen) == {"logits", *taps}
    assert torch.equal(seen["input"], pupil.transform(pixels))
    assert len(given) == 1
    assert torch.equal(seen["input"], given[0])
    pupil.loss = run_loss.Loss(weights, {})
    assert set(pupil.outputs(pixels)) == {"logits"}
