"""The loop: exact resume wherever it was stopped, metrics that are means, values that are those of what was seen."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lessons import CPU, TinyNet, condensed, digits, precomputed, teacher_of
from torch import nn

from kcdcache.errors import MismatchError, NonFiniteError
from kcdcache.methods import run_loss
from kcdcache.methods.losses import entropy
from kcdcache.runs.folder import RunFolder
from kcdcache.runs.state import load_checkpoint
from kcdcache.settings import MethodSettings, OptimizerSettings
from kcdcache.training import batches, learner, loop
from kcdcache.training.learner import ValueRecord
from kcdcache.training.loop import Loop
from kcdcache.training.sampling import Sampler

STUDENT = "lessons:TinyNet"
EPOCHS, STEPS = 3, 5
KD = run_loss.weights_of(MethodSettings())


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


def pupil_of(world, chosen, student=STUDENT, device=CPU, **recording):
    record = ValueRecord(len(world.data.train), MethodSettings(record_decay=0.75, **recording), device)
    return learner.new_learner(student, world.data, chosen, run_loss.Loss(KD, {}), device, record)


def train(world, path, chosen=None, stop=EPOCHS, *, stop_at=None, log=None, clock=None, source=None, **more):
    """Distillation from the store; `stop_at` = (epoch, step) raises there, `log` collects what each step showed."""
    path.mkdir(exist_ok=True)
    chosen, source = chosen or settings_of(), source or world.source
    pupil = pupil_of(world, chosen, **more)

    def seen(loss, given, found):
        if (pupil.epoch, pupil.step) == stop_at:
            raise StoppedError
        if log is not None:
            batch, logits = given[1], given[0]["logits"].detach()
            log.extend(zip(batch.index.tolist(), entropy(logits).tolist(), found.tolist(), logits.argmax(1).tolist(),
                           batch.labels.tolist(), batch.probabilities.argmax(1).tolist(), strict=True))  # fmt: skip

    pupil.loss.register_forward_hook(seen)
    sampler = Sampler(manifest=source.manifest, optimizer=chosen)
    Loop(pupil, source, sampler, RunFolder(path=path), clock=clock).run(stop)
    return pupil


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(path, pupil, expected_path, expected):
    assert (path / "metrics.jsonl").read_bytes() == (expected_path / "metrics.jsonl").read_bytes()
    assert pupil.state().document() == expected.state().document()
    found, wanted = pupil.tensors(), expected.tensors()
    assert set(found) == set(wanted)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("uninterrupted")
    return path, train(world, path)


def test_the_clock_places_epochs_on_the_learning_rates_axis(world, tmp_path):
    train(world, tmp_path, clock=(0.0, 1.9, 2.7))
    assert [row["learning_rate"] for row in metrics(tmp_path)] == pytest.approx([0.02, 0.002, 0.00002])
    train(world, tmp_path / "warm", settings_of(warmup_epochs=2, decay="cosine"), clock=(0.0, 1.5, 2.25))
    falling = 0.02 * (1 + math.cos(math.pi * 0.75)) / 2  # at 2.25 of 3 epochs
    assert [row["learning_rate"] for row in metrics(tmp_path / "warm")] == pytest.approx(
        [0.02 / 3, 0.02 * 2.5 / 3, falling]
    )


def test_a_run_stopped_at_every_step_is_the_uninterrupted_one(world, uninterrupted, tmp_path):
    chosen = settings_of(checkpoint_seconds=0)
    for epoch in range(EPOCHS):
        for step in range(STEPS):
            with pytest.raises(StoppedError):
                train(world, tmp_path, chosen, stop_at=(epoch, step))
    assert_same_run(tmp_path, train(world, tmp_path, chosen), *uninterrupted)


def test_a_run_with_adamw_continues_exactly_too(world, tmp_path):
    chosen = settings_of(checkpoint_seconds=0, learning_rate=0.003, optimizer="adamw", clip_norm=1.0, ema_decay=0.95)
    expected = train(world, tmp_path / "whole", chosen)
    for stop_at in ((0, 3), (1, 0), (1, 4)):
        with pytest.raises(StoppedError):
            train(world, tmp_path / "cut", chosen, stop_at=stop_at)
    assert_same_run(tmp_path / "cut", train(world, tmp_path / "cut", chosen), tmp_path / "whole", expected)


def test_without_checkpoints_inside_it_an_epoch_is_repeated_exactly(world, uninterrupted, tmp_path):
    with pytest.raises(StoppedError):
        train(world, tmp_path, stop_at=(1, 4))
    assert len(metrics(tmp_path)) == 1
    assert_same_run(tmp_path, train(world, tmp_path), *uninterrupted)


def test_a_run_may_change_between_batches_of_host_and_device_inside_an_epoch(world, uninterrupted, tmp_path):
    device, host = (settings_of(checkpoint_seconds=0, resident=way) for way in ("on", "off"))
    for chosen, stop_at in ((device, (0, 4)), (host, (1, 3)), (device, (2, 1))):
        with pytest.raises(StoppedError):
            train(world, tmp_path, chosen, stop_at=stop_at)
    assert_same_run(tmp_path, train(world, tmp_path, host), *uninterrupted)


def test_a_checkpoint_without_the_optimizers_state_is_refused(world):
    pupil = pupil_of(world, settings_of())
    with pytest.raises(MismatchError, match="of an older kcdcache; start a new run with another --out"):
        pupil.restore(pupil.tensors(), pupil.state().model_copy(update={"optimizer": None}))


def test_a_row_of_metrics_is_the_mean_over_the_epochs_samples(world, tmp_path):
    log, count = [], len(world.manifest)
    train(world, tmp_path, log=log)
    assert len(log) == EPOCHS * count
    for epoch, row in enumerate(metrics(tmp_path)):
        _, _, loss, guess, label, taught = zip(*log[epoch * count : (epoch + 1) * count], strict=True)
        assert row["loss"] == pytest.approx(np.mean(loss), rel=1e-6)
        assert row["train_accuracy"] == pytest.approx(np.mean(np.equal(guess, label)))
        assert row["agreement"] == pytest.approx(np.mean(np.equal(guess, taught)))
        assert (row["epoch"], row["view"]) == (epoch, epoch % 2)
        assert (row["samples"], row["samples_so_far"]) == (count, count * (epoch + 1))


def test_the_test_split_is_measured_every_few_epochs_and_at_the_end_and_training_learns(world, tmp_path):
    train(world, tmp_path, settings_of(epochs=8, evaluate_every=3, learning_rate=0.05), stop=8)
    rows = metrics(tmp_path)
    assert [row["epoch"] for row in rows if "test_accuracy" in row] == [2, 5, 7]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


def test_a_samples_weight_multiplies_its_loss(world, tmp_path):
    """Twice the weight at half the rate is the same step, to the bit: both only move the exponent."""
    heavy = replace(world.manifest, weight=np.full(len(world.manifest), 2, np.float32))
    light = train(world, tmp_path / "light", settings_of(weight_decay=0, learning_rate=0.02))
    half = settings_of(weight_decay=0, learning_rate=0.01)
    other = train(world, tmp_path / "heavy", half, source=replace(world.source, manifest=heavy))
    for name, value in light.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[name]), name


@pytest.mark.parametrize(("checkpoint_seconds", "steps"), [(1e9, 5), (0, 2)])
def test_a_diverged_loss_stops_the_run_names_the_batch_and_keeps_the_last_good_checkpoint(
    world, tmp_path, checkpoint_seconds, steps
):
    told = []
    message = (
        rf"loss is (nan|inf) in epoch 1, step {steps}; lower --learning-rate, or look for bad images; .*first such "
        r"loss was that of step 1 .*, of these 14 samples: \d+, \d+"
    )
    for way in ("on", "off"):
        wild = settings_of(learning_rate=1e30, checkpoint_seconds=checkpoint_seconds, resident=way)
        with pytest.raises(NonFiniteError, match=message) as error:
            train(world, tmp_path / way, wild)
        told.append(str(error.value))
        assert not (tmp_path / way / "metrics.jsonl").exists()
        held = load_checkpoint(RunFolder(path=tmp_path / way))
        assert (held is None) == (checkpoint_seconds > 0)
        assert held is None or torch.isfinite(held[0]["sum.loss"])
    assert told[0] == told[1]


def test_bfloat16_trains_and_is_repeatable(world, tmp_path):
    runs_of = [train(world, tmp_path / name, settings_of(precision="bfloat16")) for name in "ab"]
    assert_same_run(tmp_path / "a", runs_of[0], tmp_path / "b", runs_of[1])
    rows = metrics(tmp_path / "a")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert torch.isfinite(runs_of[0].record.value).all()


REFERENCES = {
    "mean": lambda seen: sum(seen) / len(seen),
    "last": lambda seen: seen[-1],
    "ema": lambda seen: seen[0] if len(seen) == 1 else 0.75 * REFERENCES["ema"](seen[:-1]) + 0.25 * seen[-1],
}


@pytest.mark.parametrize(
    "given", [{"record": name} for name in REFERENCES] + [{"record_mixed": False}, {"observed": "loss"}], ids=str
)
def test_a_value_is_that_of_all_that_was_seen_of_a_sample(world, tmp_path, given):
    log, seen = [], {}
    record = train(world, tmp_path, log=log, **given).record
    mixed = set(world.manifest.index[world.manifest.mixed].tolist())
    for index, value, loss, *_ in log:
        if index not in mixed or given.get("record_mixed", True):
            seen.setdefault(index, []).append(loss if "observed" in given else value)
    assert set(seen) == set(world.manifest.index.tolist()) - (set() if given.get("record_mixed", True) else mixed)
    for index in range(len(world.data.train)):
        assert int(record.visits[index]) == len(seen.get(index, []))
        expected = REFERENCES[given.get("record", "mean")](seen[index]) if index in seen else 0
        assert float(record.value[index]) == pytest.approx(expected, abs=2e-6)


def test_work_is_done_once_a_call_before_and_after_it_is_recorded():
    calls = []
    replay = loop.Replay(lambda: calls.append(len(calls)), CPU)
    for key in (0.1, 0.1, 0.1, 0.1, 0.2, 0.1):
        replay(key)
    assert calls == list(range(6))


class CalmNet(TinyNet):
    """Without dropout, whose random numbers a compiler draws differently."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.dropout = nn.Identity()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and g++ is not there")
def test_a_compiled_student_learns_what_an_eager_one_does(world, tmp_path):
    """Within rounding: the compiler fuses operations. Evaluation and checkpoints see the same weights."""
    for flag in (False, True):
        train(world, tmp_path / str(flag), settings_of(resident="on", compile=flag), student="test_loop:CalmNet")
    eager, compiled = ([row["loss"] for row in metrics(tmp_path / str(flag))] for flag in (False, True))
    assert compiled == pytest.approx(eager, rel=1e-3)
    held = load_checkpoint(RunFolder(path=tmp_path / "True"))
    assert not [name for name in held[0] if "_orig_mod" in name]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here: CUDA graphs are exercised only on one")
@pytest.mark.parametrize("more", [{}, {"optimizer": "adamw", "clip_norm": 0.5, "ema_decay": 0.9, "log": ("csv",)}])
def test_a_gpu_replays_the_steps_it_would_take_one_by_one(world, tmp_path, more):
    one, other = (
        train(world, tmp_path / str(flag), settings_of(graphs=flag, **more), device=torch.device("cuda")).tensors()
        for flag in (True, False)
    )
    for name, value in other.items():
        if not name.startswith("rng"):
            torch.testing.assert_close(one[name], value, atol=1e-4, rtol=1e-4)
