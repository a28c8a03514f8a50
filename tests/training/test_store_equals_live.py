"""The key law: a student that learns from the store learns what it would with the teacher in the loop.

The live side is a plain loop written here, with the teacher of the store behind the same `Targets` interface.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lessons import CPU, TRAIN, condensed, digits, precomputed, teacher_of
from torch.nn import functional

from kcdcache import rng, settings
from kcdcache.condensation import manifest
from kcdcache.methods import run_loss
from kcdcache.runs import folder
from kcdcache.settings import OptimizerSettings
from kcdcache.store import reader
from kcdcache.teacher import teacher
from kcdcache.training import batches, learner, requery
from kcdcache.training.batches import Mixing, connect
from kcdcache.training.loop import Loop
from kcdcache.training.sampling import Sampler
from kcdcache.views import rules

FIELDS = ("logits",)
VIEWS, EPOCHS, BATCH, SEED = 2, 4, 28, 11
WEIGHTS = run_loss.weights_of(settings.MethodSettings())
TEMPERATURE = WEIGHTS.temperature
RECIPE = OptimizerSettings(epochs=EPOCHS, batch_size=BATCH, seed=SEED, learning_rate=0.02, checkpoint_seconds=1e9)
ENCODINGS = ("float16", "top:4", "top:10")


def run_teacher(world, view, index):
    """The teacher's logits on these samples' own view, as one batch."""
    rule = world.knowledge.knowledge.views
    pixels = rules.apply(rule, torch.from_numpy(world.data.train.images(index)), rules.parameters(rule, index, view))
    return teacher.outputs(world.network, pixels, FIELDS)


class LiveInFixedBatches:
    """A teacher that sees all samples of the epoch's view before the epoch, in the batches the store was made in."""

    def __init__(self, world):
        self._world, self.forwards = world, 0

    def prepare(self, view, following):
        starts = range(0, TRAIN, self._world.knowledge.plan.batch_size)
        groups = [np.arange(start, min(start + starts.step, TRAIN)) for start in starts]
        self._logits = torch.cat([run_teacher(self._world, view, group)["logits"] for group in groups])
        self.forwards += TRAIN

    def gather(self, index, temperature, device):
        return {"logits": self._logits[torch.from_numpy(index)]}


class LiveOnOwnBatches:
    """A teacher that sees each of the student's batches, as it comes."""

    def __init__(self, world):
        self._world, self.sizes = world, []

    def prepare(self, view, following):
        self._view = view

    def gather(self, index, temperature, device):
        self.sizes.append(len(index))
        return run_teacher(self._world, self._view, index)


class LiveOnMixes(LiveOnOwnBatches):
    """A teacher that sees the mixed images of a batch's K_Aug points."""

    def __init__(self, world, source):
        super().__init__(world)
        self._source = source

    def gather(self, index, temperature, device):
        self.sizes.append(len(index))
        rows = np.searchsorted(self._source.manifest.index, index)
        return teacher.outputs(self._world.network, batches.mixed_views(self._source, rows, self._view, device), FIELDS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Digits, a teacher and its float32 store, made in teacher batches that do not divide the samples."""
    dataset, root = digits(), tmp_path_factory.mktemp("world")
    network = teacher_of(dataset)
    knowledge = precomputed(root / "float32", dataset, network, views=VIEWS, batch_size=64)
    chosen = condensed(knowledge)
    assert TRAIN % 64
    assert len(chosen) % BATCH
    assert chosen.mixed.sum() > 30
    return SimpleNamespace(root=root, data=dataset, network=network, knowledge=knowledge, manifest=chosen)


@pytest.fixture(scope="module")
def coarser(world):
    """Encoding -> a store of the same teacher in that encoding."""
    made = {}
    for text in ENCODINGS:
        made[text] = precomputed(world.root / text, world.data, world.network, views=VIEWS, encoding=text)
    return made


def connected(world, knowledge=None, chosen=None, target="linear_prob", requeried=None):
    held = world.knowledge if knowledge is None else knowledge
    found = replace(world.manifest if chosen is None else chosen, knowledge_id=held.knowledge_id)
    mixing = Mixing(target=target, temperature=TEMPERATURE)
    return connect(world.data, held, found, fields=FIELDS, mixing=mixing, requeried=requeried)


def new_pupil(world):
    return learner.new_learner("resnet8", world.data, RECIPE, run_loss.Loss(WEIGHTS, {}), CPU)


def epoch_of(source, epoch):
    return batches.iterate(source, epoch, batch_size=BATCH, seed=SEED)


def taught_by_the_package(world, source, path):
    """The student as `train` teaches it; returns its weights and the mean loss of every epoch."""
    pupil = new_pupil(world)
    path.mkdir()
    sampler = Sampler(manifest=source.manifest, optimizer=RECIPE)
    Loop(pupil, source, sampler, folder.RunFolder(path=path)).run(EPOCHS)
    return pupil.network.state_dict(), [row.loss for row in pupil.rows]


def live_epoch_of(world, epoch):
    """The whole set's epoch without `batches`: order, views, teacher in the loop, its softened output."""
    rule, order = world.knowledge.knowledge.views, rng.epoch_order(SEED, epoch, np.arange(TRAIN))
    live = LiveInFixedBatches(world)
    live.prepare(epoch % VIEWS, None)
    for index in np.split(order, range(BATCH, TRAIN, BATCH)):
        images = torch.from_numpy(world.data.train.images(index))
        yield SimpleNamespace(
            pixels=rules.apply(rule, images, rules.parameters(rule, index, epoch % VIEWS)),
            labels=torch.from_numpy(world.data.train.labels[index]),
            probabilities=torch.softmax(live.gather(index, TEMPERATURE, CPU)["logits"] / TEMPERATURE, dim=1),
        )


def taught_by_a_plain_loop(world, source, stop=EPOCHS, lessons=epoch_of):
    """The same student with Hinton's loss and SGD written out, and targets from wherever `source` has them."""
    pupil = new_pupil(world)
    network, optimizer, epochs = pupil.network.train(), pupil.optimizer, []
    drops = [epoch / EPOCHS >= share for epoch in range(EPOCHS) for share in (0.625, 0.75, 0.875)]
    for epoch in range(stop):
        for group in optimizer.param_groups:
            group["lr"] = RECIPE.learning_rate * 0.1 ** sum(drops[3 * epoch : 3 * epoch + 3])
        losses = []
        for batch in lessons(source, epoch):
            logits = network(pupil.transform(batch.pixels))
            hard = functional.cross_entropy(logits, batch.labels, reduction="none")
            log_student = functional.log_softmax(logits / TEMPERATURE, dim=1)
            soft = functional.kl_div(log_student, batch.probabilities, reduction="none").sum(1) * TEMPERATURE**2
            loss = 0.1 * hard + 0.9 * soft
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            losses.append(loss.detach())
        epochs.append(float(torch.cat(losses).double().mean()))
    return network.state_dict(), epochs


def differing(left, right):
    assert set(left) == set(right)
    return [name for name, value in left.items() if not torch.equal(value, right[name])]


def largest_difference(left, right):
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


@pytest.mark.parametrize("target", ["linear_prob", "linear_logit"])
def test_float32_from_the_store_equals_a_live_teacher_bit_for_bit(world, tmp_path, target):
    with connected(world, target=target) as source:
        weights, losses = taught_by_the_package(world, source, tmp_path / "run")
        live = LiveInFixedBatches(world)
        expected, expected_losses = taught_by_a_plain_loop(world, replace(source, targets=live))
    assert differing(weights, expected) == []
    assert losses == pytest.approx(expected_losses, rel=1e-12)
    assert live.forwards == TRAIN * EPOCHS
    assert differing(weights, new_pupil(world).network.state_dict())


def test_the_whole_set_from_the_store_equals_a_live_teacher_bit_for_bit(world, tmp_path):
    whole = manifest.full(manifest.Samples(world.knowledge.knowledge_id, TRAIN))
    with connected(world, chosen=whole) as source:
        weights, losses = taught_by_the_package(world, source, tmp_path / "run")
    expected, expected_losses = taught_by_a_plain_loop(world, world, lessons=live_epoch_of)
    assert differing(weights, expected) == []
    assert losses == pytest.approx(expected_losses, rel=1e-12)


def test_a_teacher_on_other_views_teaches_something_else(world, tmp_path):
    """The law can fail: targets of the wrong view, as offline distillation with fresh augmentation has them."""

    class OnTheOtherView(LiveInFixedBatches):
        def prepare(self, view, following):
            super().prepare((view + 1) % VIEWS, None)

    with connected(world) as source:
        weights, losses = taught_by_a_plain_loop(world, source)
        other, other_losses = taught_by_a_plain_loop(world, replace(source, targets=OnTheOtherView(world)))
    assert largest_difference(weights, other) > 1e-3
    assert max(abs(a - b) for a, b in zip(losses, other_losses, strict=True)) > 1e-3


def test_a_live_teacher_on_the_students_own_batches_agrees_within_1e_5(world):
    """Compared: targets of every batch, mean loss of every epoch, and all weights after an epoch on each view."""
    with connected(world) as source:
        live = replace(source, targets=LiveOnOwnBatches(world))
        for epoch in range(VIEWS):
            for stored, now in zip(epoch_of(source, epoch), epoch_of(live, epoch), strict=True):
                torch.testing.assert_close(stored.probabilities, now.probabilities, atol=1e-5, rtol=0)
        weights, losses = taught_by_a_plain_loop(world, source, VIEWS)
        expected, expected_losses = taught_by_a_plain_loop(world, live, VIEWS)
    assert len(world.manifest) % BATCH in live.targets.sizes
    np.testing.assert_allclose(losses, expected_losses, atol=1e-5)
    assert largest_difference(weights, expected) < 1e-5


def test_requeried_mixes_equal_a_live_teacher_on_the_mixed_images(world, tmp_path):
    """Within 1e-5: the teacher saw the mixes in the order of the set, the live one in the order of the batch."""
    mixes = requery.Mixes(manifest=world.manifest, fields=FIELDS, views=range(VIEWS))
    requery.write(tmp_path / "mixes", mixes, world.knowledge, world.data, world.network)
    with connected(world, target="requery", requeried=reader.open(tmp_path / "mixes")) as source:
        live = replace(source, targets=LiveOnOwnBatches(world), requeried=LiveOnMixes(world, source))
        weights, losses = taught_by_a_plain_loop(world, source, VIEWS)
        expected, expected_losses = taught_by_a_plain_loop(world, live, VIEWS)
    assert sum(live.requeried.sizes) == VIEWS * world.manifest.mixed.sum()
    np.testing.assert_allclose(losses, expected_losses, atol=1e-5)
    assert largest_difference(weights, expected) < 1e-5


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_losses_with_other_encodings_differ_as_their_targets_do(world, coarser, encoding):
    """At equal student logits: |loss - live loss| <= alpha T^2 (|H(p) - H(q)| + |p - q|_1 max |log s|), at most."""
    pupil = new_pupil(world)
    plain = replace(world.manifest, **manifest.plain(world.manifest.index))
    with connected(world, coarser[encoding], plain) as source:
        live = replace(source, targets=LiveInFixedBatches(world))
        for stored, now in zip(epoch_of(source, 1), epoch_of(live, 1), strict=True):
            with torch.no_grad():
                logits = pupil.network(pupil.transform(stored.pixels))
            found, expected = (run_loss.basic(logits, batch, WEIGHTS).double() for batch in (stored, now))
            p, q = now.probabilities.double(), stored.probabilities.double()
            entropies = [-(x * x.clamp_min(1e-300).log()).sum(1) for x in (p, q)]
            steepest = torch.log_softmax(logits.double() / TEMPERATURE, 1).abs().amax(1)
            allowed = (entropies[0] - entropies[1]).abs() + (p - q).abs().sum(1) * steepest
            assert torch.all((found - expected).abs() <= 0.9 * TEMPERATURE**2 * allowed + 1e-5)
