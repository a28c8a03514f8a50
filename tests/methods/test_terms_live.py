"""The terms that train further networks with the student: dml and one; and what the network itself is given."""

import math

import pytest
import torch
from lessons import CPU, digits
from pairs import CLASSES, divergence, lesson_of, pair_of, rows_of, softmax, term_of
from pupils import same_tensors, weights_of

from kcdcache.errors import SettingsError
from kcdcache.methods import registry as methods_registry
from kcdcache.methods.base import Term
from kcdcache.networks import registry as networks_registry
from kcdcache.networks.registry import tap_shapes
from kcdcache.settings import MethodSettings, OptimizerSettings
from kcdcache.training import learner

LABELS = [2, 0, 1]


def pair(student="resnet8", **settings):
    return pair_of([0, 1, 2, 3], student=student, ours=tap_shapes(student, CLASSES, 3, 8, 8), **settings)


def hard(row, label):
    return -math.log(softmax(row)[label])


def shown(stage=None, shape=(), rows=3):
    torch.manual_seed(0)
    seen = {"logits": (torch.randn(rows + 2, CLASSES) * 2).requires_grad_()}
    name, value = ("input", torch.randn(rows + 2, 3, 8, 8)) if stage is None else (stage, torch.randn(rows + 2, *shape))
    return seen | {name: value.requires_grad_()}, lesson_of(range(rows), LABELS[:rows])


def test_dml_equals_a_slow_reference_and_holds_each_target_constant():
    term, (seen, lesson) = term_of("dml", pair()), shown()
    found = term(seen, lesson)
    again = networks_registry.build("resnet8", CLASSES)
    again.load_state_dict(term_of("dml", pair()).peer.state_dict())
    again.train()
    peer = again(seen["input"].detach()[:3])
    expected = []
    for s, p, label in zip(rows_of(seen["logits"]), rows_of(peer), LABELS, strict=False):
        expected.append(divergence(softmax(p), softmax(s)) + hard(p, label) + divergence(softmax(s), softmax(p)))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    found.mean().backward()
    # of KL(p || softmax(z)), p constant, the gradient is softmax(z) - p; were p no constant, there would be more
    wanted = (seen["logits"].detach()[:3].softmax(1) - peer.detach().softmax(1)) / 3
    torch.testing.assert_close(seen["logits"].grad[:3], wanted, rtol=1e-4, atol=1e-6)
    assert not seen["logits"].grad[3:].any()
    own = torch.autograd.grad((peer * _peers_slope(peer, seen, lesson)).sum(), list(again.parameters()))
    for parameter, slope in zip(term.peer.parameters(), own, strict=True):
        torch.testing.assert_close(parameter.grad, slope, rtol=1e-3, atol=1e-5)


def _peers_slope(peer, seen, lesson):
    """Gradient of CE(peer) + KL(student || peer) with respect to the peer's logits, for the mean over three."""
    found, student = peer.detach().softmax(1), seen["logits"].detach()[:3].softmax(1)
    return ((found - torch.eye(CLASSES)[lesson.labels]) + (found - student)) / 3


@pytest.mark.parametrize(("name", "stage", "shape"), [("dml", None, ()), ("one", "stage2", (32, 4, 4))])
@pytest.mark.parametrize("mix_label", ["keep", "mix"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_what_learns_beside_the_student_is_given_the_students_labels(name, stage, shape, mix_label, smoothing):
    term, plain = (term_of(name, pair(**given)) for given in ({"smoothing": smoothing, "mix_label": mix_label}, {}))
    seen, lesson = shown(stage, shape)
    mixes = {"partner_labels": [2, 3, 3], "epsilon": [0.0, 0.3, 0.2], "mixed": [False, True, True]}
    vars(lesson).update({key: torch.tensor(value) for key, value in mixes.items()})
    outputs = term.peer(seen["input"][:3])[None] if name == "dml" else _of_the_ensemble(term, seen, stage)
    expected = torch.zeros(3)
    for output in outputs:
        for i, row in enumerate(rows_of(output)):
            share = mixes["epsilon"][i] if mix_label == "mix" else 0
            given = (1 - share) * smoothed(row, LABELS[i], smoothing)
            given += share * smoothed(row, mixes["partner_labels"][i], smoothing)
            expected[i] += given - hard(row, LABELS[i])
    torch.testing.assert_close(term(seen, lesson) - plain(seen, lesson), expected, rtol=1e-4, atol=1e-5)
    assert expected.any() == (smoothing > 0 or mix_label == "mix")


def smoothed(row, label, share):
    return (1 - share) * hard(row, label) + share * sum(hard(row, c) for c in range(CLASSES)) / CLASSES


def _of_the_ensemble(term, seen, stage):
    """The logits of the two branches and of the ensemble."""
    shared = seen[stage][:3]
    branches = [branch(shared) for branch in term.branches]
    gates = term.gate(shared.mean(dim=(2, 3)))
    rows = [seen["logits"][:3], *branches]
    return [*branches, sum(gates[:, k, None] * row for k, row in enumerate(rows))]


def test_the_peer_is_the_students_kind_with_weights_of_its_own_unless_another_is_named():
    term = term_of("dml", pair())
    student = networks_registry.build("resnet8", CLASSES, 0)
    assert type(term.peer) is type(student)
    assert not torch.equal(term.peer.conv1.weight, student.conv1.weight)
    assert same_tensors(weights_of(term.peer), weights_of(term_of("dml", pair()).peer))
    assert not torch.equal(term.peer.conv1.weight, term_of("dml", pair(), seed=1).peer.conv1.weight)
    other = term_of("dml", pair(peer="wrn_16_1")).peer
    assert type(other) is type(networks_registry.build("wrn_16_1", CLASSES))
    with pytest.raises(SettingsError, match="unknown network 'resnet9'; did you mean 'resnet"):
        term_of("dml", pair(peer="resnet9"))


def by_hand(network, values):
    """The last stage and classifier of a branch, layer by layer."""
    *blocks, _, _, classifier = network
    for block in blocks:
        values = block(values)
    return classifier(values.mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("name", "stage", "shape"), [("resnet8", "stage2", (32, 4, 4)), ("wrn_16_1", "stage2", (32, 4, 4))]
)
@pytest.mark.parametrize("epoch", [0, 39, 79, 200])
def test_one_equals_a_slow_reference(name, stage, shape, epoch):
    term, (seen, lesson) = term_of("one", pair(name)), shown(stage, shape)
    assert term.taps == (stage,)
    assert term.weights_at(epoch, 240) == (1.0, 1.0)
    found = term(seen, lesson)
    shared = seen[stage].detach()[:3]
    with torch.no_grad():
        branches = [rows_of(by_hand(branch, shared)) for branch in term.branches]
        raw = shared.double().mean(dim=(2, 3)) @ term.gate.linear.weight.double().T + term.gate.linear.bias.double()
        spread = ((raw - raw.mean(dim=0)) ** 2).mean(dim=0)
        gates = [softmax(row) for row in ((raw - raw.mean(dim=0)) / (spread + 1e-5).sqrt()).tolist()]
    ramp, expected = math.exp(-5 * (1 - min(1, (epoch + 1) / 80)) ** 2), []
    for i, label in enumerate(LABELS):
        rows = [rows_of(seen["logits"])[i], branches[0][i], branches[1][i]]
        ensemble = [sum(g * row[c] for g, row in zip(gates[i], rows, strict=True)) for c in range(CLASSES)]
        soft = sum(9 * divergence(softmax(ensemble, 3), softmax(row, 3)) for row in rows)
        expected.append(hard(rows[1], label) + hard(rows[2], label) + hard(ensemble, label) + ramp * soft)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_the_ensemble_is_constant_to_its_divergences():
    term, (seen, lesson) = term_of("one", pair()), shown("stage2", (32, 4, 4))
    term.weights_at(200, 240)
    term._ramp.fill_(0)
    without = torch.autograd.grad(term(seen, lesson).mean(), list(term.gate.parameters()))
    term._ramp.fill_(1)
    loss = term(seen, lesson).mean()
    loss.backward()
    for parameter, slope in zip(term.gate.parameters(), without, strict=True):
        torch.testing.assert_close(parameter.grad, slope, rtol=1e-4, atol=1e-6)
    assert seen["logits"].grad[:3].any()
    assert seen["stage2"].grad[:3].any()
    assert not seen["stage2"].grad[3:].any()


def test_branches_start_apart_and_follow_the_seed():
    term, again, other = (term_of("one", pair(), seed) for seed in (0, 0, 1))
    first, second = (weights_of(branch) for branch in term.branches)
    assert set(first) == set(second)
    assert not any(torch.equal(first[name], second[name]) for name in first if "conv" in name)
    assert same_tensors(weights_of(term), weights_of(again))
    assert not torch.equal(term.gate.linear.weight, other.gate.linear.weight)


@pytest.mark.parametrize("name", ["resnet20", "resnet8x4", "wrn_16_2", "ResNet50", "torchvision:resnet18"])
def test_a_branch_is_the_students_own_end(name):
    network = networks_registry.build(name, CLASSES)
    term = term_of("one", pair(name))
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 8, 8)
    taps = learner.taps.run(network.eval(), pixels, [term.taps[0], "logits"])
    branch = term.branches[0].eval()
    ends = [value for key, value in network.state_dict().items() if key.split(".")[0] in _end_of(name)]
    branch.load_state_dict(dict(zip(branch.state_dict(), ends, strict=True)))
    torch.testing.assert_close(branch(taps[term.taps[0]]), taps["logits"])


def _end_of(name):
    if name.startswith("wrn"):
        return "block3", "bn1", "fc"
    return ("layer3", "fc") if name.startswith("resnet") else ("layer4", "fc", "linear")


@pytest.mark.parametrize("name", ["vgg8", "MobileNetV2", "ShuffleV1", "lessons:TinyNet"])
def test_other_families_cannot_branch_off(name):
    with pytest.raises(SettingsError, match=f"'{name}' does not have; take a student of the resnet or wrn families"):
        term_of("one", pair_of([0, 1], student=name))


@pytest.mark.parametrize(("method", "stage"), [("dml", None), ("one", "stage2")])
def test_a_batch_of_one_sample_is_served(method, stage):
    seen, lesson = shown(stage, (32, 4, 4), rows=1)
    term = term_of(method, pair())
    before = weights_of(term)
    assert torch.isfinite(term(seen, lesson)).all()
    assert "gate.norm.running_mean" not in before or torch.equal(
        before["gate.norm.running_mean"], term.gate.norm.running_mean
    )


@pytest.mark.parametrize("method", ["dml", "one"])
def test_live_methods_read_no_field_and_say_so(method):
    assert methods_registry.METHODS[method].live
    choice = methods_registry.choose(MethodSettings(method=method))
    assert (choice.weights.gamma, choice.weights.alpha, choice.parts) == (1.0, 0.0, {method: 1.0})
    head = methods_registry.make_head(choice, pair)
    assert methods_registry.needed_fields(choice, head) == ()


class Curious(Term):
    def __init__(self, taps):
        super().__init__()
        self.taps = taps


@pytest.mark.parametrize("taps", [("input",), ("input", "stage1"), ("stage1", "input", "penultimate")])
def test_the_tap_input_is_what_the_network_is_given(taps):
    data = digits()
    pupil = learner.new_learner(
        "resnet8", data, OptimizerSettings(), CPU, head=methods_registry.Head({"a": (1.0, Curious(taps))})
    )
    pixels = torch.rand(3, 3, 16, 16)
    given = []
    pupil.network.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].clone()))
    seen = pupil.see(pixels)
    assert set(seen) == {"logits", *taps}
    assert torch.equal(seen["input"], pupil.transform(pixels))
    assert len(given) == 1
    assert torch.equal(seen["input"], given[0])
    pupil.head = None
    assert set(pupil.see(pixels)) == {"logits"}
