"""What holds for every method in METHODS: a method that lacks it cannot be added."""

import copy
import json
import random
import signal
from dataclasses import replace
from itertools import chain, islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from killing import finished, succeeds
from lessons import CPU, condensed, digits, opinionated, precomputed
from pupils import BrokenOffError, distilled, leftovers, lines, promised, same_files, same_tensors, stop_after
from safetensors import safe_open

from kcdcache.methods import run_loss
from kcdcache.methods.catalogue import METHODS
from kcdcache.networks import registry as networks_registry
from kcdcache.networks.input_transform import InputTransform
from kcdcache.settings import MethodSettings, OptimizerSettings
from kcdcache.store import reader
from kcdcache.store.identity import per_sample, read_parameters
from kcdcache.teacher import fields, teacher
from kcdcache.training import batches, learner, loop
from kcdcache.training.batches import Mixing, connect
from kcdcache.views import rules

TRAIN, BATCH, STUDENT, TEACHER = 60, 24, "resnet8", "resnet14"
RECIPE = OptimizerSettings(epochs=4, batch_size=BATCH, learning_rate=0.01)
SMALL = {"crd_negatives": 16}
"""settings that keep a method small here"""
CACHED = [name for name, method in METHODS.items() if not method.live]
WITH_TERM = [name for name, method in METHODS.items() if method.term is not None]
STATES = {
    "modules": ["fitnet", "vid", "reviewkd"],
    "memories": ["crd", "wcord"],
    "modules that learn in turn": ["sskd"],
    "peers": ["dml"],
    "branches": ["one"],
}
"""methods with tensors of their own in a checkpoint, by kind of tensor; of the others, and of all but the first of a
kind, runs are broken off where slow tests run"""


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
            for name in run_loss.reads(settings_of(method), STUDENT, bare.knowledge, self.data)
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
        world, rule = self._world, self._world.stores["float32"].knowledge.views
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
    kept = np.arange(TRAIN) if kept is None else kept
    identity = world.stores["float32"].knowledge
    known = read_parameters(world.stores["float32"].path, identity)
    loss = run_loss.make_loss(
        run_loss.weights_of(chosen),
        lambda: run_loss.pair_of(chosen, STUDENT, identity, world.data, kept, 0, known),
    )
    return learner.new_learner(STUDENT, world.data, RECIPE, loss, CPU)


def counting_epoch(loss):
    """The first of 240 epochs in which every own term has weight."""
    terms = terms_of(loss).values()
    return next(e for e in range(240) if all(term.weights_at(e, 240)[1] > 0 for term in terms))


def terms_of(loss):
    return next(iter(loss.children()))


def connected(world, pupil, held, chosen):
    """A source of batches with what the method reads."""
    mixing = Mixing(temperature=pupil.loss.weights.temperature)
    return connect(world.data, held, chosen, fields=pupil.loss.fields, mixing=mixing)


def first_batch(world, pupil, chosen=None, size=BATCH):
    held = world.stores["float32"]
    with connected(world, pupil, held, chosen or world.manifest) as source:
        return next(batches.iterate(source, 0, batch_size=size, seed=3))


def trained(pupil):
    """All that its optimizer trains."""
    return [parameter for group in pupil.optimizer.param_groups for parameter in group["params"]]


def seen_by(pupil, batch):
    """The student's values of a batch, and of what the method shows it further."""
    extra = pupil.loss.extra(batch)
    return pupil.outputs(batch.pixels if extra is None else torch.cat([batch.pixels, extra.detach()]))


def loss_on(pupil, batch):
    return pupil.loss(seen_by(pupil, batch), batch)


def at_work(loss):
    """Begin an epoch in which the method's own terms count."""
    loss.begin(counting_epoch(loss), 240)


def taught(world, name, encoding=None, steps=None, size=BATCH):
    """Tensors and losses after an epoch of steps from the store of that encoding, or with the teacher in the loop."""
    held = world.stores[encoding or "float32"]
    chosen = replace(world.manifest, knowledge_id=held.knowledge_id)
    pupil = pupil_of(world, name, world.manifest.index)
    names, losses = pupil.loss.fields, []
    torch.manual_seed(5)
    pupil.network.train()
    at_work(pupil.loss)
    with connected(world, pupil, held, chosen) as source:
        if encoding is None and names:
            source = replace(source, targets=Live(world, names))
        for batch in islice(batches.iterate(source, 1, batch_size=size, seed=3), steps):
            loss = loss_on(pupil, batch)
            assert loss.shape == (len(batch.labels),)
            pupil.optimizer.zero_grad()
            loss.mean().backward()
            pupil.optimizer.step()
            losses.append(float(loss.detach().mean()))
    return {name: value for name, value in pupil.tensors().items() if name != "rng"}, losses


@pytest.mark.parametrize("name", CACHED)
def test_an_epoch_from_the_store_equals_one_with_the_live_teacher(world, name):
    live, live_losses = taught(world, name)
    exact, losses = taught(world, name, "float32")
    assert losses == live_losses
    assert same_tensors(live, exact)
    _, rounded = taught(world, name, "float16", steps=1)
    assert rounded[0] == pytest.approx(live_losses[0], rel=5e-3, abs=5e-4)


@pytest.mark.parametrize("name", ["reviewkd", "one", "crd", "rkd", "sskd"])
def test_a_last_sample_is_learned_from_with_the_batch_before(world, name):
    """By itself it would have no batch statistics in reviewkd and no relations in rkd."""
    assert len(world.manifest) == 36
    _, losses = taught(world, name, "float32", size=7)
    assert len(losses) == 5
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("name", WITH_TERM)
def test_twenty_steps_on_a_batch_of_real_digits_reduce_its_own_loss(world, name):
    pupil = pupil_of(world, name, gamma=0, alpha=0)
    batch = first_batch(world, pupil, condensed(world.stores["float32"], keep=1.0))
    torch.manual_seed(5)
    at_work(pupil.loss)
    for group in pupil.optimizer.param_groups:
        group["lr"] = 0.002  # the batch comes again and again: small steps, so that none is too far
    own = []
    for _ in range(21):
        loss = loss_on(pupil, batch).mean()
        own.append(float(loss.detach()))
        pupil.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained(pupil), 5.0)
        pupil.optimizer.step()
    assert np.isfinite(own).all()
    assert np.mean(own[-3:]) < np.mean(own[:3])


@pytest.mark.parametrize("name", METHODS)
def test_gradient_flows_into_the_student_and_all_of_its_own_modules_and_not_into_the_cache(world, name):
    pupil = pupil_of(world, name)
    batch = first_batch(world, pupil)
    given = [value.requires_grad_() for value in batch.knowledge.values()]
    for epoch in (counting_epoch(pupil.loss), 239):  # sskd's modules learn one after the other
        pupil.loss.begin(epoch, 240)
        loss_on(pupil, batch).mean().backward()
    assert all(value.grad is None for value in given)
    reached = [parameter.grad is not None and bool(parameter.grad.any()) for parameter in trained(pupil)]
    assert sum(reached) > len(reached) / 2
    assert all(p.grad.any() for p in pupil.loss.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", [name for name in WITH_TERM if name not in ("sskd", "bss")])
def test_a_term_joins_one_that_shows_further_images_whose_rows_change_nothing_for_it(world, name):
    pupil = pupil_of(world, f"bss+{name}")
    batch = first_batch(world, pupil)
    at_work(pupil.loss)
    seen = seen_by(pupil, batch)
    other = {
        tap: values if tap.startswith("filters:") else torch.cat([values[:BATCH], 2 * values[BATCH:]])
        for tap, values in seen.items()
    }
    assert torch.isfinite(pupil.loss(seen, batch)).all()
    pupil.loss.weights = replace(pupil.loss.weights, parts=pupil.loss.weights.parts | {"bss": 0.0})
    found = []
    for given in (seen, other):
        torch.manual_seed(0)
        found.append(copy.deepcopy(pupil.loss)(given, batch))
    assert torch.equal(*found)
    assert found[0].shape == (BATCH,)


@pytest.mark.parametrize("name", METHODS)
def test_one_sample_and_values_of_half_precision_and_huge_size_give_no_nan(world, name):
    """The last batch may have one sample; the student's values may come from bfloat16 autocast and be very large."""
    cases = ((BATCH, 100, "bfloat16"), (1, 1, "float32"))
    for size, scale, precision in cases[:1] if name == "reviewkd" else cases:  # it normalises maps of one position
        pupil = pupil_of(world, name)
        batch = first_batch(world, pupil, size=size)
        at_work(pupil.loss)
        with loop.forward_precision(CPU, precision):
            seen = seen_by(pupil, batch)
        loss = pupil.loss({key: value * scale for key, value in seen.items()}, batch)
        assert torch.isfinite(loss).all()
        loss.mean().backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in trained(pupil))


def test_every_field_of_every_method_is_in_the_store_and_live_methods_read_none(world):
    stored = per_sample(world.fields)
    assert set(stored) <= set(reader.open(world.stores["float32"].path).fields)
    assert {name.partition(":")[0] for name in stored} == {example.partition(":")[0] for example in fields.EXAMPLES}
    for name in METHODS.keys() - CACHED:
        pupil = pupil_of(world, name)
        assert pupil.loss.fields == ()


# broken off and killed

QUICK = [names[0] for names in STATES.values()]
RUN = {"student": STUDENT, "stages": 2, **SMALL}
KILLED = RUN | {"epochs": 2, "batch_size": 30, "keep": 0.6, "threads": 1, "checkpoint_seconds": 0}
"""a condensation between two epochs of two batches, and a checkpoint after every batch"""
MOST = 200
"""steps of writing that a run has at least"""


def test_methods_with_state_are_those_whose_modules_have_tensors(world):
    assert {name for name in WITH_TERM if pupil_of(world, name).loss.state_dict()} == {*chain(*STATES.values())}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in METHODS]
)
def test_a_run_through_a_condensation_is_killed_and_resumed_to_the_same_bytes(world, tmp_path, name):
    school = SimpleNamespace(data=world.data, network=world.network, knowledge=world.stores["float32"])
    given = RUN | {"epochs": 4, "batch_size": 32, "keep": 0.5, "preset": None, "method": name}
    distilled(school, tmp_path / "whole", **given)
    for steps in (1, 2):  # killed after the first and after the third epoch, inside either stage
        with pytest.raises(BrokenOffError):
            distilled(school, tmp_path / "cut", run={"progress": stop_after(steps)}, **given)
    distilled(school, tmp_path / "cut", **given)
    assert same_files(tmp_path / "whole", tmp_path / "cut")
    assert promised(sorted((tmp_path / "whole" / "stages").iterdir())[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_TERM)
def test_killed_inside_an_epoch_and_run_again_gives_the_same_bytes(world, start, tmp_path, name):
    """A process dies at a step of writing a checkpoint, when memories, peers, branches and draws are half way."""
    given = {"data": f"digits?train={TRAIN}&test=40", "store": world.stores["float32"].path, "method": name}
    words, log = ["train", *lines(given | KILLED)], tmp_path / "log"
    succeeds(start, [*words, "--out", tmp_path / "whole"], log)
    inside = []
    for point in random.Random(name).sample(range(10, MOST), 4):
        path = tmp_path / str(point)
        again = [*words, "--out", path]
        assert finished(start, again, log, KCDCACHE_CRASHPOINT=str(point)) == -signal.SIGKILL
        inside.append(half_way(path))
        succeeds(start, again, log)
        assert same_files(tmp_path / "whole", path)
        assert not leftovers(path)
    assert any(inside)


def half_way(path):
    """Whether the run's checkpoint is inside an epoch."""
    pointer = path / "checkpoint" / "latest.json"
    if not pointer.exists():
        return False
    with safe_open(pointer.with_name(json.loads(pointer.read_text())["file"]), "pt") as held:
        return json.loads(held.metadata()["kcdcache"])["step"] > 0
