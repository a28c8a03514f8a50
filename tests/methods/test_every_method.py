"""What holds for every method in METHODS: a method that lacks it cannot be added."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lessons import CPU, condensed, digits, opinionated, precomputed
from pupils import BrokenOffError, distilled, promised, same_files, same_tensors, stop_after

from kcdcache.methods import registry as methods_registry
from kcdcache.methods.registry import METHODS
from kcdcache.networks import registry as networks_registry
from kcdcache.networks.input_transform import InputTransform
from kcdcache.settings import MethodSettings, OptimizerSettings
from kcdcache.store import reader
from kcdcache.store.identity import per_sample, read_parameters
from kcdcache.teacher import fields, teacher
from kcdcache.training import batches, learner, loop
from kcdcache.training.batches import Mixing, connect
from kcdcache.views import rules

TRAIN, BATCH, STUDENT, TEACHER = 120, 24, "resnet8", "resnet14"
RECIPE = OptimizerSettings(epochs=4, batch_size=BATCH, learning_rate=0.01)
SMALL = {"crd_negatives": 16}
"""settings that keep a method small here"""
CACHED = [name for name, method in METHODS.items() if not method.live]
WITH_TERM = [name for name, method in METHODS.items() if method.term is not None]


class World:
    """Digits, a teacher with the student's widths, and stores of everything that any method reads."""

    def __init__(self, root):
        self.data = digits(TRAIN, 40)
        module = opinionated(networks_registry.build(TEACHER, 10, 1))
        transform = InputTransform(self.data.mean, self.data.std)
        self.network = teacher.freeze(module, transform, TEACHER, self.data.classes, CPU)
        bare = precomputed(root / "bare", self.data, self.network, views=1)
        wanted = dict.fromkeys(
            name
            for method in CACHED
            for name in methods_registry.reads(settings_of(method), STUDENT, bare.knowledge, self.data)
        )
        self.root, self.fields = root, ("logits", *(name for name in wanted if name != "logits"))
        self.stores = {
            encoding: precomputed(
                root / encoding, self.data, self.network, views=2, encoding=encoding, fields=self.fields
            )
            for encoding in ("float32", "float16")
        }
        self.manifest = condensed(self.stores["float32"])
        assert self.manifest.mixed.sum() > 10


def settings_of(name, **changes):
    return MethodSettings(method=name, **(SMALL | changes))


class Live:
    """The teacher in the loop, on the batches in which the store was made; no encoding, no file."""

    def __init__(self, world, names):
        self._world, self._names = world, names

    def prepare(self, view, following):
        world, rule = self._world, rules.rule_of(self._world.stores["float32"].knowledge.views)
        size = world.stores["float32"].plan.batch_size
        found = []
        for start in range(0, TRAIN, size):
            index = np.arange(start, min(start + size, TRAIN))
            shown = torch.from_numpy(world.data.train.images(index))
            pixels = rules.apply(rule, shown, rules.parameters(rule, index, view))
            # the logits are asked for too, as precompute does, so that the passes are the same
            found.append(teacher.outputs(world.network, pixels, ["logits", *self._names]))
        self._rows = {name: torch.cat([part[name] for part in found]) for name in self._names}

    def gather(self, index, temperature, device):
        return {name: rows[torch.from_numpy(index)] for name, rows in self._rows.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def pupil_of(world, name, kept=None, **changes):
    """A student with the method's own modules, at the start of the first epoch in which its term counts."""
    chosen = settings_of(name, **changes)
    choice = methods_registry.choose(chosen)
    kept = np.arange(TRAIN) if kept is None else kept
    identity = world.stores["float32"].knowledge
    known = read_parameters(world.stores["float32"].path, identity)
    head = methods_registry.make_head(
        choice, lambda: methods_registry.pair_of(chosen, STUDENT, identity, world.data, kept, 0, known)
    )
    return learner.new_learner(STUDENT, world.data, RECIPE, CPU, head=head), choice


def counting_epoch(head):
    """The first of 240 epochs in which every own term has weight."""
    terms = next(iter(head.children())).values()
    return next(e for e in range(240) if all(term.weights_at(e, 240)[1] > 0 for term in terms))


def connected(world, pupil, choice, held, chosen):
    """A source of batches with what the method reads."""
    names, mixing = methods_registry.needed_fields(choice, pupil.head), Mixing(temperature=choice.weights.temperature)
    return connect(world.data, held, chosen, fields=names, mixing=mixing)


def first_batch(world, pupil, choice, chosen=None):
    held = world.stores["float32"]
    with connected(world, pupil, choice, held, chosen or world.manifest) as source:
        return next(batches.iterate(source, 0, batch_size=BATCH, seed=3))


def seen_by(pupil, batch):
    """The student's values of a batch, and of what the method shows it further."""
    extra = None if pupil.head is None else pupil.head.extra(batch)
    return pupil.see(batch.pixels if extra is None else torch.cat([batch.pixels, extra.detach()]))


def stepped(world, name, lessons, epoch):
    """Weights, modules and losses of a student after an epoch of steps on these lessons."""
    pupil, choice = pupil_of(world, name, world.manifest.index)
    loss_of = methods_registry.loss_of(choice.weights, pupil.head)
    torch.manual_seed(5)
    pupil.network.train()
    losses = []
    if pupil.head is not None:
        pupil.head.begin(epoch, 240)
    for batch in lessons:
        loss = loss_of(seen_by(pupil, batch), batch)
        assert loss.shape == (len(batch.labels),)
        pupil.optimizer.zero_grad()
        loss.mean().backward()
        pupil.optimizer.step()
        losses.append(float(loss.detach().mean()))
    return {name: value for name, value in pupil.tensors().items() if name != "rng"}, losses


def taught(world, name, encoding=None):
    """An epoch from the store of that encoding, or with the teacher in the loop."""
    held = world.stores[encoding or "float32"]
    chosen = replace(world.manifest, knowledge_id=held.knowledge_id)
    pupil, choice = pupil_of(world, name)
    names = methods_registry.needed_fields(choice, pupil.head)
    epoch = counting_epoch(pupil.head) if pupil.head is not None else 0
    with connected(world, pupil, choice, held, chosen) as source:
        if encoding is None and names:
            source = replace(source, targets=Live(world, names))
        return stepped(world, name, batches.iterate(source, 1, batch_size=BATCH, seed=3), epoch)


@pytest.mark.parametrize("name", CACHED)
def test_an_epoch_from_the_store_equals_one_with_the_live_teacher(world, name):
    live, live_losses = taught(world, name)
    exact, losses = taught(world, name, "float32")
    assert losses == live_losses
    assert same_tensors(live, exact)
    _, rounded = taught(world, name, "float16")
    assert rounded[0] == pytest.approx(live_losses[0], rel=5e-3, abs=5e-4)


@pytest.mark.parametrize("name", WITH_TERM)
def test_twenty_steps_on_a_batch_of_real_digits_reduce_its_own_loss(world, name):
    pupil, choice = pupil_of(world, name)
    batch = first_batch(world, pupil, choice, condensed(world.stores["float32"], keep=1.0))
    torch.manual_seed(5)
    pupil.head.begin(counting_epoch(pupil.head), 240)
    for group in pupil.optimizer.param_groups:
        group["lr"] = 0.002  # the batch comes again and again: small steps, so that none is too far
    own = []
    for _ in range(21):
        loss = pupil.head.weighted(torch.zeros(BATCH), seen_by(pupil, batch), batch).mean()
        own.append(float(loss.detach()))
        pupil.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([parameter for _, parameter in pupil.parameters()], 5.0)
        pupil.optimizer.step()
    assert np.isfinite(own).all()
    assert np.mean(own[-3:]) < np.mean(own[:3])


@pytest.mark.parametrize("name", METHODS)
def test_gradient_flows_into_the_student_and_its_own_modules_alone(world, name):
    pupil, choice = pupil_of(world, name)
    batch = first_batch(world, pupil, choice)
    given = {key: value.requires_grad_() for key, value in batch.knowledge.items()}
    if pupil.head is not None:
        pupil.head.begin(counting_epoch(pupil.head), 240)
    methods_registry.loss_of(choice.weights, pupil.head)(seen_by(pupil, batch), batch).mean().backward()
    assert all(value.grad is None or name == "crd" for value in given.values())
    reached = [parameter.grad is not None and bool(parameter.grad.any()) for _, parameter in pupil.parameters()]
    assert sum(reached) > len(reached) / 2


@pytest.mark.parametrize("name", [name for name in WITH_TERM if name not in ("sskd", "bss")])
def test_methods_join_one_that_shows_the_student_further_images(world, name):
    """The rows of those images follow the batch's, and concern no other method."""
    losses = {}
    for text in (name, f"bss+{name}"):
        pupil, choice = pupil_of(world, text)
        batch = first_batch(world, pupil, choice)
        pupil.head.begin(counting_epoch(pupil.head), 240)
        losses[text] = methods_registry.loss_of(choice.weights, pupil.head)(seen_by(pupil, batch), batch)
    assert losses[name].shape == losses[f"bss+{name}"].shape == (BATCH,)
    assert torch.isfinite(losses[f"bss+{name}"]).all()


@pytest.fixture(scope="module")
def place(world):
    """What `distilled` of tests/pupils wants, with this world's store."""
    held = world.stores["float32"]
    return type("Place", (), {"data": world.data, "network": world.network, "knowledge": held, "root": world.root})


RUN = {"student": STUDENT, "epochs": 4, "stages": 2, "batch_size": 32, "keep": 0.5, "preset": None, **SMALL}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_through_a_condensation_is_killed_and_resumed_to_the_same_bytes(place, tmp_path, name):
    distilled(place, tmp_path / "whole", method=name, **RUN)
    for steps in (1, 2):  # killed after the first and after the third epoch, inside either stage
        with pytest.raises(BrokenOffError):
            distilled(place, tmp_path / "cut", method=name, run={"progress": stop_after(steps)}, **RUN)
    distilled(place, tmp_path / "cut", method=name, **RUN)
    assert same_files(tmp_path / "whole", tmp_path / "cut")
    last = sorted((tmp_path / "whole" / "stages").iterdir())[-1]
    assert promised(last)


@pytest.mark.parametrize("name", METHODS)
def test_values_of_half_precision_and_huge_size_give_no_nan(world, name):
    """The student's values may come from bfloat16 autocast and be very large."""
    pupil, choice = pupil_of(world, name)
    batch = first_batch(world, pupil, choice)
    if pupil.head is not None:
        pupil.head.begin(counting_epoch(pupil.head), 240)
    with loop.forward_precision(CPU, "bfloat16"):
        seen = seen_by(pupil, batch)
    loss = methods_registry.loss_of(choice.weights, pupil.head)(
        {key: value * 100 for key, value in seen.items()}, batch
    )
    assert torch.isfinite(loss).all()
    loss.mean().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for _, p in pupil.parameters())


def test_every_field_of_every_method_is_in_the_store(world):
    stored = per_sample(world.fields)
    assert set(stored) <= set(reader.open(world.stores["float32"].path).fields)
    assert {name.partition(":")[0] for name in stored} == set(fields.KINDS)
