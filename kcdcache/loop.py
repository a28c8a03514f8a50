"""The training loop: optimizer, learning rate, steps, values, exact resume; knows neither data nor methods."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kcdcache import rng, signals
from kcdcache.batches import Batch
from kcdcache.config import OptimizerSettings
from kcdcache.errors import NonFiniteError
from kcdcache.learner import Learner
from kcdcache.runs import RunFolder, add_timing, load_checkpoint, save_checkpoint, write_metrics

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int, str], None]
"""Called with what is being done, how much is done, how much there is, and a remark."""


def silent(what: str, done: int, total: int, remark: str) -> None:
    """Report no progress."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be learned, as the loop sees it."""

    batches: Callable[[int, int], Iterator[Batch]]
    """(epoch, first step) -> that epoch's remaining batches"""
    loss: Callable[[Tensor, Batch], Tensor]
    """(logits, batch) -> loss per sample"""
    evaluate: Callable[[], dict[str, float]]
    """measurements of the network on held-out data"""
    details: Callable[[int], dict[str, Any]]
    """epoch -> further entries of its metrics row"""
    clock: Sequence[float] | None = None
    """position on the learning-rate axis at the start of each epoch, in epochs; the epoch's number if None"""


def learning_rate(settings: OptimizerSettings, position: float) -> float:
    """Return the learning rate at a position in [0, epochs), the number of epochs behind.

    >>> settings = OptimizerSettings(epochs=240)
    >>> [round(learning_rate(settings, epoch), 6) for epoch in (0, 149, 150, 180, 239)]
    [0.05, 0.05, 0.005, 0.0005, 5e-05]
    """
    if position < settings.warmup_epochs:
        return settings.learning_rate * (position + 1) / (settings.warmup_epochs + 1)
    share = position / settings.epochs
    if settings.decay == "cosine":
        return settings.learning_rate * (1 + math.cos(math.pi * share)) / 2
    # a milestone of 0.625 of 24 epochs is epoch 15 exactly; the slack absorbs the share's rounding
    drops = sum(share >= milestone - 1e-9 for milestone in settings.milestones) if settings.decay == "milestones" else 0
    return settings.learning_rate * settings.decay_factor**drops


def run(
    learner: Learner, task: Task, settings: OptimizerSettings, folder: RunFolder, stop: int, progress: Progress
) -> None:
    """Train until `stop` epochs are finished, writing checkpoints and metrics into the run's folder.

    Raises:
        NonFiniteError: the loss of an epoch is not a number; the last checkpoint is from before that epoch.
    """
    resume(learner, folder)
    with exact_arithmetic():
        _run_until(learner, task, settings, folder, stop, progress)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Make float32 mean float32 on a GPU (no TF32) and its convolutions repeatable; changes nothing on a CPU."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul


def _run_until(
    learner: Learner, task: Task, settings: OptimizerSettings, folder: RunFolder, stop: int, progress: Progress
) -> None:
    guard = _Guard(settings.checkpoint_seconds)
    while learner.epoch < stop:
        began = time.perf_counter()
        _run_epoch(learner, task, settings, folder, guard)
        row = _finish_epoch(learner, task, settings)
        save_checkpoint(folder, learner.tensors(), learner.state())
        write_metrics(folder, learner.rows)
        seconds = round(time.perf_counter() - began, 4)
        add_timing(folder, {"epoch": row["epoch"], "seconds": seconds, "samples": row["samples"]})
        progress("train", learner.epoch, settings.epochs, _told(row))
        guard.reset()


def resume(learner: Learner, folder: RunFolder) -> None:
    """Take up the run's checkpoint, if there is one."""
    if (found := load_checkpoint(folder)) is not None:
        learner.restore(*found)
        write_metrics(folder, learner.rows)


class _Guard:
    """Says when a checkpoint inside an epoch is due."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.reset()

    def reset(self) -> None:
        self._last = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self._last >= self._seconds


def _run_epoch(learner: Learner, task: Task, settings: OptimizerSettings, folder: RunFolder, guard: _Guard) -> None:
    position = learner.epoch if task.clock is None else task.clock[learner.epoch]
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate(settings, position)
    if learner.step == 0:
        learner.sums = {}
        _seed_torch(settings.seed, learner.epoch)  # networks with dropout draw from torch's own generator
    learner.network.train()
    for batch in task.batches(learner.epoch, learner.step):
        _take_step(learner, task, batch, settings.precision)
        learner.step += 1
        learner.samples += len(batch.index)
        if guard.due() or signals.requested():
            _require_finite(learner)
            save_checkpoint(folder, learner.tensors(), learner.state())
            guard.reset()
        if signals.requested():
            signals.stop(f"epoch {learner.epoch}, step {learner.step} is in the checkpoint of {folder.path}")


def _take_step(learner: Learner, task: Task, batch: Batch, precision: str) -> None:
    with forward_precision(learner.device, precision):
        logits = learner.network(learner.transform(batch.pixels))
    loss = task.loss(logits, batch)
    learner.optimizer.zero_grad(set_to_none=True)
    (loss * batch.weight).mean().backward()
    learner.optimizer.step()
    with torch.no_grad():
        if learner.record is not None:
            learner.record.observe(logits, batch.index, batch.mixed)
        _add_up(learner.sums, logits, loss, batch)


def forward_precision(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the context a forward pass runs in: bfloat16 autocast, or nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def _add_up(sums: dict[str, Tensor], logits: Tensor, loss: Tensor, batch: Batch) -> None:
    """Accumulate on the device: reading a number per step would stall it."""
    guess = logits.argmax(1)
    parts = {"loss": loss.double().sum(), "train_accuracy": (guess == batch.labels).sum().double()}
    if batch.probabilities is not None:
        parts["agreement"] = (guess == batch.probabilities.argmax(1)).sum().double()
    for name, value in parts.items():
        sums[name] = sums[name] + value if name in sums else value


def _finish_epoch(learner: Learner, task: Task, settings: OptimizerSettings) -> dict[str, Any]:
    before = learner.rows[-1]["samples_so_far"] if learner.rows else 0
    count = learner.samples - before
    _require_finite(learner)
    means = {name: float(value) / count for name, value in learner.sums.items()}
    last = learner.epoch + 1 == settings.epochs
    measured = task.evaluate() if last or (learner.epoch + 1) % settings.evaluate_every == 0 else {}
    row = {
        "epoch": learner.epoch,
        "learning_rate": learner.optimizer.param_groups[0]["lr"],
        "samples": count,
        "samples_so_far": learner.samples,
        **means,
        **measured,
        **task.details(learner.epoch),
    }
    logger.info("epoch %d of %d: %s", learner.epoch + 1, settings.epochs, _told(row))
    learner.rows.append(row)
    learner.epoch, learner.step, learner.sums = learner.epoch + 1, 0, {}
    return row


def _require_finite(learner: Learner) -> None:
    """Refuse to checkpoint a diverged network: resuming from it could not mend it."""
    loss = float(learner.sums["loss"])
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the training loss is {loss} in epoch {learner.epoch}, step {learner.step}; lower --learning-rate, "
            "or look for bad images; the last checkpoint is from before that"
        )


def _told(row: dict[str, Any]) -> str:
    measured = f", test accuracy {row['test_accuracy']:.4f}" if "test_accuracy" in row else ""
    return f"loss {row['loss']:.4f}{measured}, {row['samples']:,} samples"


def _seed_torch(seed: int, epoch: int) -> None:
    high, low, *_ = rng.words(seed, epoch, rng.STEP)
    torch.manual_seed((int(high) << 31) ^ int(low))
