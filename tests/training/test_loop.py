import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lessons import CPU, condensed, digits, precomputed, teacher_of

from kcdcache import progress
from kcdcache.errors import NonFiniteError
from kcdcache.methods import registry
from kcdcache.methods.losses import entropy
from kcdcache.runs import state
from kcdcache.runs.folder import RunFolder
from kcdcache.settings import MethodSettings, OptimizerSettings
from kcdcache.training import batches, evaluation, learner, loop
from kcdcache.views import rules

STUDENT = "lessons:TinyNet"
EPOCHS, STEPS = 3, 5
KD = registry.choose(MethodSettings()).weights


class StoppedError(Exception):
    """What ends a run in the middle."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Digits, a store of two views and a condensed set, open for batches: five steps an epoch, the last one ragged."""
    dataset = digits(110, 30)
    knowledge = precomputed(tmp_path_factory.mktemp("world") / "store", dataset, teacher_of(dataset), views=2)
    chosen = condensed(knowledge)
    mixing = batches.Mixing(temperature=KD.temperature)
    with batches.connect(dataset, knowledge, chosen, mixing=mixing) as source:
        yield SimpleNamespace(data=dataset, source=source, manifest=chosen)


def settings_of(**changes):
    given = {"epochs": EPOCHS, "batch_size": 14, "checkpoint_seconds": 1e9, "learning_rate": 0.02, "seed": 3}
    return OptimizerSettings(**(given | changes))


def recording(record, mixed_too, decay=0.9):
    return MethodSettings(record=record, record_mixed=mixed_too, record_decay=decay)


def new_pupil(world, chosen, record="mean", mixed_too=True):
    kept = learner.new_record(len(world.data.train), CPU, recording(record, mixed_too, 0.75))
    return learner.new_learner(STUDENT, world.data, chosen, CPU, kept)


def task_of(world, pupil, chosen, *, stop_at=None, log=None, clock=None, source=None):
    """Distillation from the store; `stop_at` = (epoch, step) raises there, `log` collects (index, entropy, loss)."""

    def parts(epoch, start):
        found = batches.iterate(source or world.source, epoch, batch_size=14, seed=chosen.seed, start=start)
        for step, batch in enumerate(found, start):
            if (epoch, step) == stop_at:
                raise StoppedError
            yield batch

    def loss(seen, batch):
        logits = seen["logits"]
        found = registry.basic(logits, batch, KD)
        if log is not None:
            log.extend(zip(batch.index.tolist(), entropy(logits.detach()).tolist(), found.tolist(), strict=True))
        return found

    plain = rules.plain(world.source.rule)
    return loop.Task(
        batches=parts,
        loss=loss,
        evaluate=lambda: evaluation.measure(pupil.network, pupil.transform, world.data.test, plain, CPU),
        details=lambda epoch: {"view": epoch % 2},
        clock=clock,
    )


def train(world, path, chosen=None, stop=EPOCHS, record="mean", mixed_too=True, **task):
    path.mkdir(exist_ok=True)
    chosen = chosen or settings_of()
    pupil = new_pupil(world, chosen, record, mixed_too)
    folder = RunFolder(path=path)
    loop.run(pupil, task_of(world, pupil, chosen, **task), chosen, folder, stop, progress.silent)
    return pupil


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(path, pupil, expected_path, expected):
    assert (path / "metrics.jsonl").read_bytes() == (expected_path / "metrics.jsonl").read_bytes()
    assert pupil.state() == expected.state()
    found, wanted = pupil.tensors(), expected.tensors()
    assert set(found) == set(wanted)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("uninterrupted")
    return path, train(world, path)


def rates(chosen, positions):
    return [loop.learning_rate(chosen, position) for position in positions]


def test_the_cifar_recipe_drops_at_150_180_and_210_of_240_epochs():
    drops = {0: 0.05, 149: 0.05, 150: 5e-3, 179: 5e-3, 180: 5e-4, 209: 5e-4, 210: 5e-5, 239: 5e-5}
    assert rates(OptimizerSettings(), drops) == pytest.approx(list(drops.values()), rel=1e-9)


@given(st.integers(1, 1000), st.lists(st.floats(0.01, 0.99), max_size=4), st.floats(0.01, 1))
def test_milestones_count_shares_of_all_epochs(epochs, milestones, factor):
    chosen = OptimizerSettings(epochs=epochs, milestones=tuple(milestones), decay_factor=factor)
    for epoch in {0, epochs // 3, epochs // 2, epochs - 1}:
        passed = [m for m in milestones if epoch >= m * epochs - 1e-6 * epochs]
        if all(abs(epoch - m * epochs) > 1e-5 * epochs for m in milestones):
            assert loop.learning_rate(chosen, epoch) == pytest.approx(0.05 * factor ** len(passed))


@pytest.mark.parametrize("epochs", [8, 24, 40, 56, 240, 1000])
def test_a_milestone_that_falls_on_an_epoch_is_that_epoch(epochs):
    chosen = OptimizerSettings(epochs=epochs)
    for drop, milestone in enumerate((0.625, 0.75, 0.875)):
        epoch = round(milestone * epochs)
        assert rates(chosen, (epoch - 1, epoch)) == pytest.approx([0.05 * 0.1**drop, 0.05 * 0.1 ** (drop + 1)])


def test_cosine_falls_from_the_whole_rate_through_half_of_it():
    chosen = OptimizerSettings(epochs=100, decay="cosine", learning_rate=0.4)
    assert rates(chosen, (0, 25, 50, 100)) == pytest.approx([0.4, 0.2 * (1 + math.sqrt(0.5)), 0.2, 0.0])
    falling = rates(chosen, range(100))
    assert falling == sorted(falling, reverse=True)


def test_warm_up_rises_linearly_to_the_rate_and_constant_stays():
    chosen = OptimizerSettings(epochs=10, decay="constant", learning_rate=0.6, warmup_epochs=2)
    assert rates(chosen, (0, 1, 2, 9)) == pytest.approx([0.2, 0.4, 0.6, 0.6])


def test_the_clock_places_epochs_on_the_learning_rates_axis(world, tmp_path):
    train(world, tmp_path, clock=(0.0, 1.9, 2.7))
    assert [row["learning_rate"] for row in metrics(tmp_path)] == pytest.approx([0.02, 0.002, 0.00002])


@pytest.mark.parametrize("stop_at", [(0, 0), (0, 3), (1, 0), (1, 4), (2, 2)])
def test_a_run_stopped_inside_an_epoch_continues_exactly(world, uninterrupted, tmp_path, stop_at):
    chosen = settings_of(checkpoint_seconds=0)
    with pytest.raises(StoppedError):
        train(world, tmp_path, chosen, stop_at=stop_at)
    again = train(world, tmp_path, chosen)
    assert_same_run(tmp_path, again, *uninterrupted)


def test_a_run_stopped_at_every_step_is_the_uninterrupted_one(world, uninterrupted, tmp_path):
    chosen = settings_of(checkpoint_seconds=0)
    for epoch in range(EPOCHS):
        for step in range(STEPS):
            with pytest.raises(StoppedError):
                train(world, tmp_path, chosen, stop_at=(epoch, step))
    assert_same_run(tmp_path, train(world, tmp_path, chosen), *uninterrupted)


def test_without_checkpoints_inside_it_an_epoch_is_repeated_exactly(world, uninterrupted, tmp_path):
    with pytest.raises(StoppedError):
        train(world, tmp_path, stop_at=(1, 4))
    assert len(metrics(tmp_path)) == 1
    assert_same_run(tmp_path, train(world, tmp_path), *uninterrupted)


def test_stopping_between_epochs_changes_nothing(world, uninterrupted, tmp_path):
    for stop in (1, 2, 2, 3, 3):
        pupil = train(world, tmp_path, stop=stop)
        assert pupil.epoch == len(metrics(tmp_path)) == stop
    assert_same_run(tmp_path, pupil, *uninterrupted)


def test_the_seed_decides_weights_and_order(world, tmp_path, uninterrupted):
    other = train(world, tmp_path, settings_of(seed=4))
    same = uninterrupted[1].network.state_dict()
    assert all(not torch.equal(other.network.state_dict()[name], same[name]) for name in ("conv.weight", "fc.weight"))


def test_a_row_of_metrics_is_the_mean_over_the_epochs_samples(world, tmp_path):
    log = []
    train(world, tmp_path, log=log)
    count = len(world.manifest)
    for epoch, row in enumerate(metrics(tmp_path)):
        losses = [loss for _, _, loss in log[epoch * count : (epoch + 1) * count]]
        assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
        assert (row["epoch"], row["view"]) == (epoch, epoch % 2)
        assert (row["samples"], row["samples_so_far"]) == (count, count * (epoch + 1))
        assert 0 <= row["agreement"] <= 1


def test_accuracies_count_the_samples_of_the_epoch(world, tmp_path):
    """A network that does not learn gives the same numbers step by step or at once."""
    frozen = settings_of(epochs=1, learning_rate=1e-30, weight_decay=0, momentum=0)
    guesses = []

    def watched(seen, batch):
        logits = seen["logits"]
        guesses.append((logits.argmax(1), batch.labels, batch.probabilities.argmax(1)))
        return registry.basic(logits, batch, KD)

    pupil = new_pupil(world, frozen)
    task = replace(task_of(world, pupil, frozen), loss=watched)
    loop.run(pupil, task, frozen, RunFolder(path=tmp_path), 1, progress.silent)
    guess, label, taught = (torch.cat(part) for part in zip(*guesses, strict=True))
    row = metrics(tmp_path)[0]
    assert row["train_accuracy"] == pytest.approx(float((guess == label).double().mean()))
    assert row["agreement"] == pytest.approx(float((guess == taught).double().mean()))


def test_the_test_split_is_measured_every_few_epochs_and_at_the_end(world, tmp_path):
    train(world, tmp_path, settings_of(epochs=5, evaluate_every=2), stop=5)
    assert ["test_accuracy" in row for row in metrics(tmp_path)] == [False, True, False, True, True]


def test_training_learns(world, tmp_path):
    train(world, tmp_path, settings_of(epochs=12, learning_rate=0.05), stop=12)
    losses = [row["loss"] for row in metrics(tmp_path)]
    assert losses[-1] < 0.6 * losses[0]


def test_a_samples_weight_multiplies_its_loss(world, tmp_path):
    """Twice the weight at half the rate is the same step, to the bit: both only move the exponent."""
    heavy = replace(world.manifest, weight=np.full(len(world.manifest), 2, np.float32))
    light = train(world, tmp_path / "light", settings_of(weight_decay=0, learning_rate=0.02))
    half = settings_of(weight_decay=0, learning_rate=0.01)
    other = train(world, tmp_path / "heavy", half, source=replace(world.source, manifest=heavy))
    for name, value in light.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[name]), name


@pytest.mark.parametrize(("checkpoint_seconds", "steps"), [(1e9, 5), (0, 2)])
def test_a_diverged_loss_stops_the_run_and_keeps_the_last_good_checkpoint(world, tmp_path, checkpoint_seconds, steps):
    wild = settings_of(learning_rate=1e30, checkpoint_seconds=checkpoint_seconds)
    message = rf"loss is (nan|inf) in epoch 0, step {steps}; lower --learning-rate, or look for bad images"
    with pytest.raises(NonFiniteError, match=message):
        train(world, tmp_path, wild)
    assert not (tmp_path / "metrics.jsonl").exists()
    held = state.load_checkpoint(RunFolder(path=tmp_path))
    assert (held is None) == (checkpoint_seconds > 0)
    assert held is None or torch.isfinite(held[0]["sum.loss"])


def test_bfloat16_trains_and_is_repeatable(world, tmp_path):
    runs_of = [train(world, tmp_path / name, settings_of(precision="bfloat16")) for name in "ab"]
    assert_same_run(tmp_path / "a", runs_of[0], tmp_path / "b", runs_of[1])
    rows = metrics(tmp_path / "a")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert torch.isfinite(runs_of[0].record.value).all()


def observations(log):
    found = {}
    for index, value, _ in log:
        found.setdefault(index, []).append(value)
    return found


REFERENCES = {
    "mean": lambda seen: sum(seen) / len(seen),
    "last": lambda seen: seen[-1],
    "ema": lambda seen: seen[0] if len(seen) == 1 else 0.75 * REFERENCES["ema"](seen[:-1]) + 0.25 * seen[-1],
}


@pytest.mark.parametrize("record", list(REFERENCES))
def test_a_value_is_the_mean_of_all_logged_entropies(world, tmp_path, record):
    log = []
    pupil = train(world, tmp_path, record=record, log=log)
    seen = observations(log)
    assert set(seen) == set(world.manifest.index.tolist())
    for index in range(len(world.data.train)):
        assert int(pupil.record.visits[index]) == len(seen.get(index, []))
        expected = REFERENCES[record](seen[index]) if index in seen else 0
        assert float(pupil.record.value[index]) == pytest.approx(expected, abs=2e-6)


def test_mixed_points_leave_no_value_where_they_are_not_recorded(world, tmp_path):
    log = []
    pupil = train(world, tmp_path, mixed_too=False, log=log)
    seen, mixed = observations(log), set(world.manifest.index[world.manifest.mixed].tolist())
    assert mixed
    for index in range(len(world.data.train)):
        counted = [] if index in mixed else seen.get(index, [])
        assert int(pupil.record.visits[index]) == len(counted)
        assert float(pupil.record.value[index]) == pytest.approx(np.mean(counted) if counted else 0, abs=2e-6)


@settings(max_examples=40)
@given(st.data(), st.booleans())
def test_a_record_of_any_batches_is_the_mean_per_sample(data, mixed_too):
    count, logged = 12, {}
    record = learner.new_record(count, CPU, recording("mean", mixed_too))
    for number in range(data.draw(st.integers(0, 6))):
        index = data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True))
        mixed = data.draw(st.lists(st.booleans(), min_size=len(index), max_size=len(index)))
        logits = torch.randn(len(index), 5, generator=torch.Generator().manual_seed(number)) * 4
        record.observe(logits, logits[:, 0], torch.tensor(index), torch.tensor(mixed))
        for i, value, aside in zip(index, entropy(logits).tolist(), mixed, strict=True):
            if mixed_too or not aside:
                logged.setdefault(i, []).append(value)
    assert record.visits.tolist() == [len(logged.get(i, [])) for i in range(count)]
    expected = [np.mean(logged[i]) if i in logged else 0 for i in range(count)]
    np.testing.assert_allclose(record.value, expected, atol=2e-6)


def test_observing_costs_no_gradient_and_leaves_the_logits_alone():
    record = learner.new_record(4, CPU, MethodSettings())
    logits = torch.randn(2, 5, requires_grad=True)
    before = logits.detach().clone()
    with torch.no_grad():
        record.observe(logits, logits[:, 0], torch.tensor([3, 1]), torch.tensor([False, True]))
    assert torch.equal(logits, before)
    assert not record.value.requires_grad
    assert record.visits.tolist() == [0, 1, 0, 1]
