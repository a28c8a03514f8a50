"""KR, our reading: what both variants demand of networks, and the record of the teacher's filters in a store."""

import json
from dataclasses import replace

import numpy as np
import pairs
import pytest
import torch
from lessons import CPU, TinyNet, digits, precomputed
from pairs import divergence, rows_of, softmax

from kcdcache.errors import CorruptionError, MismatchError, SettingsError
from kcdcache.files.atomic import sealed_json
from kcdcache.methods import registry as methods_registry
from kcdcache.methods.base import Pair
from kcdcache.methods.filter_statistics import FilterStatistics, PooledDistributions
from kcdcache.networks import registry as networks_registry
from kcdcache.networks import taps
from kcdcache.networks.input_transform import InputTransform
from kcdcache.networks.registry import tap_shapes
from kcdcache.settings import MethodSettings, OptimizerSettings, PrecomputeSettings, TrainSettings, recorded
from kcdcache.store import check, identity, reader
from kcdcache.teacher import precompute, repair, teacher
from kcdcache.training import distill
from kcdcache.training.learner import Learner, make_optimizer

TRANSFORM = InputTransform((0.5,) * 3, (0.25,) * 3)


def network_of(name, seed=0):
    return networks_registry.build(name, 10, seed)


def pair_of(theirs, ours, profiles=None, **settings):
    return Pair(
        teacher=theirs, student=ours, teacher_taps=tap_shapes(theirs, 10, 3, 16, 16), image=(3, 16, 16),
        student_taps=tap_shapes(ours, 10, 3, 16, 16), labels=np.zeros(4, np.int64), kept=np.arange(4), seed=0,
        settings=MethodSettings(**settings), teacher_filters=profiles,
    )  # fmt: skip


def lesson_of(rows=4, **knowledge):
    given = {name.replace(":", "_"): value for name, value in knowledge.items()}
    return pairs.lesson_of(range(rows), [0] * rows, **given)


def seen_by(network, term, rows=4, seed=3):
    """What a student of that network shows a term, through the learner itself."""
    head = methods_registry.Head({"kr": (1.0, term)})
    pupil = Learner(
        network=network, transform=TRANSFORM, device=CPU, head=head,
        optimizer=make_optimizer(network, OptimizerSettings(), head),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    return pupil.see(torch.rand(rows, 3, 16, 16, generator=generator))


def loss_on_weights(ours, theirs, names=("resnet20", "resnet8"), **settings):
    term = FilterStatistics(pair_of(*names, teacher.filter_profiles(theirs), **settings))
    return term(seen_by(ours, term), lesson_of())


def reference_profiles(network):
    """Quantiles of filter norms by plain loops over the modules of each stage."""
    found = {}
    for stage in ("stage1", "stage2", "stage3"):
        layers = []
        for module in network.get_submodule(f"layer{stage[-1]}").modules():
            if isinstance(module, torch.nn.Conv2d):
                norms = np.sort(np.sqrt((module.weight.detach().double().numpy() ** 2).sum((1, 2, 3))))
                layers.append(np.interp(np.linspace(0, len(norms) - 1, 64), np.arange(len(norms)), norms))
        found[stage] = np.mean(layers, axis=0)
    return found


def test_the_loss_on_weights_equals_a_plain_reference_and_is_the_same_for_every_sample():
    ours, theirs = network_of("resnet8", 1), network_of("resnet20", 2)
    found = loss_on_weights(ours, theirs, kr_lambda=0.0, kr_temperature=0.3)
    student, known = reference_profiles(ours), reference_profiles(theirs)
    expected = sum(
        divergence(softmax(known[stage].tolist(), 0.3), softmax(student[stage].tolist(), 0.3)) for stage in known
    )
    assert found.shape == (4,)
    assert rows_of(found) == pytest.approx([expected] * 4, rel=1e-3)


def test_identical_networks_cost_nothing_in_either_variant():
    network = network_of("resnet8")
    assert rows_of(loss_on_weights(network, network, ("resnet8", "resnet8"), kr_lambda=0.0)) == [0.0] * 4
    term = PooledDistributions(pair_of("resnet8", "resnet8", kr_lambda=0.0))
    seen = seen_by(network, term)
    known = {f"pooled:{stage}": seen[stage].detach().mean((2, 3)) for stage in term.taps}
    assert rows_of(term(seen, lesson_of(**known))) == pytest.approx([0.0] * 4, abs=1e-12)


def test_permuting_either_networks_filters_changes_nothing():
    ours, theirs = network_of("resnet8", 1), network_of("resnet20", 2)
    plain = loss_on_weights(ours, theirs)
    with torch.no_grad():
        for weight in (w for network in (ours, theirs) for layers in taps.filters(network).values() for w in layers):
            weight.copy_(weight.flip(0))
    torch.testing.assert_close(loss_on_weights(ours, theirs), plain)
    assert float(plain[0].detach()) > 0


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("wrn_40_2", "wrn_16_1"), ("resnet32x4", "resnet8"), ("vgg13", "vgg8"), ("resnet56", "ShuffleV2"),
     ("ResNet50", "MobileNetV2")],
)  # fmt: skip
def test_narrower_and_other_students_learn_from_both_variants(theirs, ours):
    network = network_of(ours)
    found = loss_on_weights(network, network_of(theirs, 1), (theirs, ours))
    found.mean().backward()
    moved = [weight for layers in taps.filters(network).values() for weight in layers if weight.grad is not None]
    assert sum(float(weight.grad.abs().sum()) for weight in moved) > 0
    term = PooledDistributions(pair_of(theirs, ours))
    known = {name: torch.rand(4, shape[0]) for name, shape in _pooled_shapes(theirs).items()}
    loss = term(seen_by(network, term), lesson_of(**known))
    assert loss.shape == (4,)
    assert torch.isfinite(loss).all()
    loss.mean().backward()


def _pooled_shapes(name):
    return {f"pooled:{stage}": shape for stage, shape in tap_shapes(name, 10, 3, 16, 16).items()}


def test_a_larger_lambda_costs_less_until_nothing_is_left():
    ours, theirs = network_of("resnet8", 1), network_of("resnet20", 2)
    found = [
        float(loss_on_weights(ours, theirs, kr_lambda=threshold)[0].detach()) for threshold in (0.0, 0.1, 0.5, 50.0)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[1] > 0
    assert found[-1] == 0


def test_its_weight_falls_linearly_or_stays():
    falls, stays = (
        FilterStatistics(pair_of("resnet8", "resnet8", kr_schedule=name)) for name in ("linear", "constant")
    )
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


class World:
    def __init__(self, root):
        self.root, self.data = root, digits(60, 20)
        module = network_of("resnet14", 1)
        self.network = teacher.freeze(
            module, InputTransform(self.data.mean, self.data.std), "resnet14", self.data.classes, CPU
        )

    def store(self, name, fields=("logits",)):
        return precomputed(self.root / name, self.data, self.network, views=1, fields=fields)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("kr"))


def kept_by(world, name="kept"):
    held = world.store(name, ("parameters",))
    return held, held.path / identity.PARAMETERS_FILE


def test_a_store_keeps_about_a_thousand_bytes_of_numbers_per_teacher(world):
    held, file = kept_by(world)
    found = identity.read_parameters(held.path, held.knowledge)
    known = reference_profiles(world.network.module)
    for stage, numbers in known.items():
        assert np.allclose(found[stage], numbers, rtol=1e-5)
    assert 4 * sum(len(found[stage]) for stage in known) == 768
    assert tuple(held.fields) == ("logits",)
    assert identity.held(held) == ("logits", "parameters")
    assert file.stat().st_size < 8192


def test_the_record_is_added_to_a_store_that_is_there_and_written_the_same_again(world):
    held = world.store("grown")
    assert identity.read_parameters(held.path, held.knowledge) is None
    before = {path: path.read_bytes() for path in held.path.rglob("*") if path.is_file()}
    file = held.path / identity.PARAMETERS_FILE
    world.store("grown", ("parameters",))
    first = file.read_bytes()
    world.store("grown", ("logits", "parameters"))
    assert file.read_bytes() == first
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_without_the_record_says_how_to_add_it(world):
    held = world.store("plain")
    settings = TrainSettings(student="resnet8", method="kd+kr", epochs=2, stages=1)
    with pytest.raises(
        MismatchError, match=r"reads logits, parameters; the store lacks parameters and holds logits. Add"
    ):
        distill.run(settings, distill.Material(data=world.data, knowledge=held), out=world.root / "no", device="cpu")
    assert not (world.root / "no").exists()


@pytest.mark.parametrize("method", ["kr", "kd+kr"])
def test_a_run_learns_with_it_through_a_condensation(world, method):
    held, _ = kept_by(world)
    settings = TrainSettings(
        student="resnet8", method=method, epochs=2, stages=2, keep=0.5, batch_size=20, mix_target="requery"
    )
    material = distill.Material(data=world.data, knowledge=held, teacher=world.network)
    found = distill.run(settings, material, out=world.root / method, device="cpu")
    assert found["finished"]
    record = json.loads((world.root / method / "run.json").read_text())
    assert "kr_lambda" not in record["settings"]


def test_settings_of_kr_are_recorded_where_they_are_not_the_usual_ones():
    assert recorded(TrainSettings(kr_lambda=0.3))["kr_lambda"] == 0.3
    assert "kr_temperature" not in recorded(TrainSettings(kr_lambda=0.3))


DAMAGE = {
    "a changed number": (lambda data: data.replace(b'"quantiles":64', b'"quantiles":65'), "was changed"),
    "half of it": (lambda data: data[: len(data) // 2], "is not JSON|not a whole|JSON"),
    "nothing": (lambda data: b"", "JSON"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_the_record_is_found_and_mended(world, tmp_path, damage):
    change, message = DAMAGE[damage]
    held, file = kept_by(world, f"damaged-{len(damage)}")
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
    held, _ = kept_by(world, "other")
    known = held.knowledge
    other = replace(known, teacher=replace(known.teacher, weights="b" * 64))
    with pytest.raises(MismatchError, match=r"is of weights '[0-9a-f]+', the store's are bbbb"):
        identity.read_parameters(held.path, other)
    own = teacher.filter_profiles(world.network.module)
    assert identity.parameters_problem(held.path, known, own) is None
    own["stage2"][5] *= 1.01
    assert "holds other numbers than this teacher's" in identity.parameters_problem(held.path, known, own)


@pytest.mark.parametrize("numbers", [[0.5] * 63, [-1.0] * 64, [1] * 64, ["1"] * 64, None])
def test_records_of_other_numbers_are_refused(world, numbers):
    held, file = kept_by(world, "odd")
    document = {"weights": held.knowledge.teacher.weights, "quantiles": 64, "stages": {"stage1": numbers}}
    file.write_bytes(sealed_json(document))
    with pytest.raises(CorruptionError, match="should hold 64 numbers of at least 0 per stage"):
        identity.read_parameters(held.path, held.knowledge)
    file.unlink()


def test_for_asks_precompute_for_the_record_and_a_dry_run_writes_none(world):
    settings = PrecomputeSettings(augment="none", views=1, min_accuracy=0, fields=("parameters",))
    precompute.run(settings, world.data, world.network, world.root / "dry", dry_run=True)
    assert not (world.root / "dry").exists()
    found = methods_registry.reads(
        MethodSettings(method="kd+kr+kr_activations"), "resnet8", world.store("plain").knowledge, world.data
    )
    assert found == ("logits", "pooled:stage1", "pooled:stage2", "pooled:stage3", "parameters")


def test_pooled_fields_are_the_means_of_the_teachers_maps(world):
    held = world.store("pooled", ("logits", "pooled", "maps"))
    index = np.arange(60)
    for stage in ("stage1", "stage2", "stage3"):
        maps = held.read(f"maps:{stage}", 0, index)
        assert np.allclose(held.read(f"pooled:{stage}", 0, index), maps.mean((2, 3)), atol=1e-5)
    assert isinstance(held, reader.Store)
