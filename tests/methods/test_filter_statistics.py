"""KR, our reading: its losses, both variants, and the record of the teacher's filters in a store."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from lessons import CPU, ON_CPU, TinyNet, digits, precomputed
from pairs import batch_of, published_pair
from reference import array, close, drawn, tensor

from kcdcache import settings as settings_
from kcdcache.errors import CorruptionError, MismatchError, SettingsError
from kcdcache.files.records import sealed_json
from kcdcache.methods import run_loss
from kcdcache.methods.filter_statistics import FilterStatistics, PooledDistributions, recoded_divergence
from kcdcache.networks import registry as networks_registry
from kcdcache.networks import taps
from kcdcache.networks.input_transform import InputTransform
from kcdcache.networks.registry import tap_shapes
from kcdcache.settings import MethodSettings, OptimizerSettings, PrecomputeSettings, TrainSettings
from kcdcache.store import check, identity
from kcdcache.teacher import precompute, repair
from kcdcache.teacher.fields import filter_quantiles
from kcdcache.teacher.teacher import filter_profiles, freeze
from kcdcache.training import distill
from kcdcache.training.learner import Learner
from kcdcache.training.optimizer import make_optimizer

# quantiles of the norms of filters


@pytest.mark.parametrize("filters", [1, 2, 5, 64, 100])
def test_quantiles_of_filter_norms_equal_a_plain_reference(filters):
    weight = drawn(filters, filters, 3, 3, 3)
    for count in (64, 3):
        close(filter_quantiles(tensor(weight), count), reference.quantiles(weight, count))


def test_profiles_are_differentiable_also_where_a_filter_is_zero():
    weight = tensor(drawn(3, 6, 2, 3, 3))
    weight[2] = 0
    weight.requires_grad_()
    filter_quantiles(weight, 64).sum().backward()
    assert torch.isfinite(weight.grad).all()
    assert (weight.grad.flatten(1).abs().sum(1) > 0).sum() == 5


# the divergence that is recoded by a threshold


def logs(seed, rows=5, bins=7, scale=1.0):
    return torch.log_softmax(tensor(drawn(seed, rows, bins, scale=scale)), -1)


def test_the_gradients_support_shrinks_as_the_threshold_grows_and_only_within_it():
    student, teacher = logs(5, rows=40).requires_grad_(), logs(6, rows=40)
    before = torch.ones(40, 7, dtype=torch.bool)
    for threshold in (0.0, 0.05, 0.2, 0.5, 1.0, 3.0, 100.0):
        (gradient,) = torch.autograd.grad(recoded_divergence(student, teacher, threshold).sum(), student)
        support = gradient != 0
        assert not (support & ~before).any()
        assert torch.equal(support, (student - teacher).abs() > threshold)
        before = support
    assert not before.any()


# the terms


def network_of(name, seed=0):
    return networks_registry.build(name, 10, seed)


def pair_of(theirs, ours, profiles=None, **settings):
    chosen = MethodSettings(**settings)
    return published_pair(
        theirs, ours, classes=10, side=16, image=(3, 16, 16), settings=chosen, teacher_filters=profiles
    )


def seen_by(network, term):
    """What a student of that network shows a term, through the learner itself."""
    pupil = Learner(
        network=network, transform=InputTransform((0.5,) * 3, (0.25,) * 3), device=CPU,
        loss=run_loss.Loss(run_loss.weights_of(MethodSettings(method="kr")), {"kr": term}),
        optimizer=make_optimizer(network.parameters(), OptimizerSettings()),
    )  # fmt: skip
    return pupil.outputs(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(3)))


def batch(**knowledge):
    return batch_of(range(4), [0] * 4, **knowledge)


def loss_on_weights(ours, theirs, names=("resnet20", "resnet8"), **settings):
    term = FilterStatistics(pair_of(*names, filter_profiles(theirs), **settings))
    return term(seen_by(ours, term), batch())


def reference_profiles(network):
    """Quantiles of filter norms over the modules of each stage."""
    found = {}
    for stage in ("stage1", "stage2", "stage3"):
        modules = network.get_submodule(f"layer{stage[-1]}").modules()
        layers = [reference.quantiles(array(m.weight), 64) for m in modules if isinstance(m, torch.nn.Conv2d)]
        found[stage] = np.mean(layers, axis=0)
    return found


def test_the_loss_on_weights_equals_a_plain_reference_and_is_the_same_for_every_sample():
    ours, theirs = network_of("resnet8", 1), network_of("resnet20", 2)
    found = loss_on_weights(ours, theirs, kr_lambda=0.0, kr_temperature=0.3)
    student, known = (np.array([*reference_profiles(network).values()]) for network in (ours, theirs))
    expected = reference.logits(student, known, 0.3).sum() / 0.3**2
    assert array(found).tolist() == pytest.approx([expected] * 4, rel=1e-3)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("wrn_40_2", "wrn_16_1"), ("vgg13", "vgg8"), ("resnet8x4", "ShuffleV2"), ("resnet20", "MobileNetV2")],
)
def test_narrower_and_other_students_learn_from_both_variants(theirs, ours):
    network = network_of(ours)
    loss_on_weights(network, network_of(theirs, 1), (theirs, ours)).mean().backward()
    moved = [weight for layers in taps.filters(network).values() for weight in layers if weight.grad is not None]
    assert sum(float(weight.grad.abs().sum()) for weight in moved) > 0
    term = PooledDistributions(pair_of(theirs, ours))
    shapes = tap_shapes(theirs, 10, 3, 16, 16)
    seen, given = seen_by(network, term), batch(**{f"pooled_{tap}": torch.rand(4, s[0]) for tap, s in shapes.items()})
    loss, expected = term(seen, given), np.zeros(4)
    for tap, (_, field), connector in zip(term.taps, term._places, term._connectors, strict=True):
        sides = connector(seen[tap].mean((2, 3))), given.knowledge[f"pooled:{field}"]
        own, known = (reference.log_softmax(array(x), axis=1) for x in sides)
        expected += reference.recoded(own, known, term._threshold)
    close(loss, expected, rtol=1e-3)
    loss.mean().backward()


def test_its_weight_falls_linearly_or_stays():
    falls, stays = (FilterStatistics(pair_of("resnet8", "resnet8", kr_schedule=s)) for s in ("linear", "constant"))
    assert [falls.weights_at(epoch, 4) for epoch in range(4)] == [(1, 1), (1, 0.75), (1, 0.5), (1, 0.25)]
    assert stays.weights_at(3, 4) == (1, 1)


def test_pooled_channels_go_through_a_trained_map_only_where_widths_differ():
    equal, narrower = (PooledDistributions(pair_of(name, "resnet8")) for name in ("resnet20", "resnet8x4"))
    assert [p.shape for p in equal.parameters()] == []
    assert [tuple(p.shape) for p in narrower.parameters()] == [(64, 16), (128, 32), (256, 64)]


def test_a_network_whose_stages_are_unknown_has_no_filters_to_group():
    with pytest.raises(SettingsError, match="the stages of TinyNet are not known, so its filters have no groups"):
        taps.filters(TinyNet())


# the record beside a store's fields


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    data = digits(60, 20)
    transform = InputTransform(data.mean, data.std)
    network = freeze(network_of("resnet14", 1), transform, "resnet14", data.classes, CPU)
    return SimpleNamespace(root=tmp_path_factory.mktemp("kr"), data=data, network=network)


def store_of(world, name, *fields):
    held = precomputed(world.root / name, world.data, world.network, views=1, fields=fields or ("logits",))
    return held, held.path / identity.PARAMETERS_FILE


def test_a_store_keeps_about_a_thousand_bytes_of_numbers_per_teacher(world):
    held, file = store_of(world, "kept", "parameters")
    found, known = identity.read_parameters(held.path, held.knowledge), reference_profiles(world.network.module)
    for stage, numbers in known.items():
        assert np.allclose(found[stage], numbers, rtol=1e-5)
    assert 4 * sum(len(found[stage]) for stage in known) == 768
    assert tuple(held.fields) == ("logits",)
    assert held.kept == ("logits", "parameters")
    assert file.stat().st_size < 8192


def test_the_record_is_added_to_a_store_that_is_there_and_written_the_same_again(world):
    held, file = store_of(world, "grown")
    assert identity.read_parameters(held.path, held.knowledge) is None
    before = {path: path.read_bytes() for path in held.path.rglob("*") if path.is_file()}
    store_of(world, "grown", "parameters")
    first = file.read_bytes()
    store_of(world, "grown", "logits", "parameters")
    assert file.read_bytes() == first
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_without_the_record_says_how_to_add_it(world):
    material = distill.Material(data=world.data, knowledge=store_of(world, "plain")[0])
    settings = TrainSettings(student="resnet8", method="kd+kr", epochs=2, stages=1)
    message = "reads logits, parameters; the store lacks parameters and holds logits. Add"
    with pytest.raises(MismatchError, match=message):
        distill.run(settings, material, out=world.root / "no", machine=ON_CPU)
    assert not (world.root / "no").exists()


def test_a_run_learns_with_it_through_a_condensation(world):
    settings = TrainSettings(
        student="resnet8", method="kd+kr", epochs=2, stages=2, keep=0.5, batch_size=20, mix_target="requery"
    )
    held, _ = store_of(world, "kept", "parameters")
    material = distill.Material(data=world.data, knowledge=held, teacher=world.network)
    assert distill.run(settings, material, out=world.root / "run", machine=ON_CPU).finished
    record = json.loads((world.root / "run" / "run.json").read_text())
    assert "kr_lambda" not in record["settings"]
    recorded = settings_.recorded(TrainSettings(kr_lambda=0.3))
    assert (recorded["kr_lambda"], "kr_temperature" in recorded) == (0.3, False)


DAMAGE = {
    "a changed number": (lambda data: data.replace(b'"quantiles":64', b'"quantiles":65'), "was changed"),
    "half of it": (lambda data: data[: len(data) // 2], "is not JSON|not a whole|JSON"),
    "nothing": (lambda data: b"", "JSON"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_the_record_is_found_and_mended(world, damage):
    change, message = DAMAGE[damage]
    held, file = store_of(world, f"damaged-{len(damage)}", "parameters")
    sound = file.read_bytes()
    file.write_bytes(change(sound))
    with pytest.raises(CorruptionError, match=message):
        identity.read_parameters(held.path, held.knowledge)
    assert str(file) in "".join(check.verify(held.path).problems)
    with pytest.raises(SettingsError, match="give --teacher and --data to make it again"):
        repair.repair(held.path, None)
    assert repair.repair(held.path, repair.Means(data=world.data, network=world.network)) == ["_kcd/parameters.json"]
    assert file.read_bytes() == sound
    assert not check.verify(held.path).problems


def test_the_record_of_another_teacher_is_refused_and_its_numbers_are_compared_with_the_teachers(world):
    held, _ = store_of(world, "kept", "parameters")
    known = held.knowledge
    other = replace(known, teacher=replace(known.teacher, weights="b" * 64))
    with pytest.raises(MismatchError, match=r"is of weights '[0-9a-f]+', the store's are bbbb"):
        identity.read_parameters(held.path, other)
    own = filter_profiles(world.network.module)
    assert identity.parameters_problem(held.path, known, own) is None
    own["stage2"][5] *= 1.01
    assert "holds other numbers than this teacher's" in identity.parameters_problem(held.path, known, own)


def test_records_of_other_numbers_are_refused(world):
    held, file = store_of(world, "odd", "parameters")
    for numbers in ([0.5] * 63, [-1.0] * 64, [1] * 64, ["1"] * 64, None):
        document = {"weights": held.knowledge.teacher.weights, "quantiles": 64, "stages": {"stage1": numbers}}
        file.write_bytes(sealed_json(document))
        with pytest.raises(CorruptionError, match=r"damaged or was changed: stages\.stage1|was changed: its content"):
            identity.read_parameters(held.path, held.knowledge)


def test_for_asks_precompute_for_the_record_and_a_dry_run_writes_none(world):
    settings = PrecomputeSettings(augment="none", views=1, min_accuracy=0, fields=("parameters",))
    precompute.run(settings, world.data, world.network, world.root / "dry", dry_run=True)
    assert not (world.root / "dry").exists()
    chosen = MethodSettings(method="kd+kr+kr_activations")
    found = run_loss.reads(chosen, "resnet8", store_of(world, "plain")[0].knowledge, world.data)
    assert found == ("logits", "pooled:stage1", "pooled:stage2", "pooled:stage3", "parameters")


def test_pooled_fields_are_the_means_of_the_teachers_maps(world):
    held, _ = store_of(world, "pooled", "logits", "pooled", "maps")
    for stage in ("stage1", "stage2", "stage3"):
        pooled, maps = (held.read(f"{kind}:{stage}", 0, np.arange(60)) for kind in ("pooled", "maps"))
        assert np.allclose(pooled, maps.mean((2, 3)), atol=1e-5)
