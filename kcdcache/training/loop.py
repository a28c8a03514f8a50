"""A step of fixed shapes at fixed addresses, recorded once and replayed: on a GPU as one CUDA graph."""

import logging
import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kcdcache import interrupt, rng
from kcdcache.errors import InterruptedRunError, NonFiniteError
from kcdcache.networks.input_transform import enough_memory
from kcdcache.progress import Progress
from kcdcache.runs.folder import RunFolder
from kcdcache.runs.state import add_timing, load_checkpoint, save_checkpoint, write_metrics
from kcdcache.settings import OptimizerSettings
from kcdcache.training.batches import Batch
from kcdcache.training.device_batches import Feed
from kcdcache.training.learner import Learner

WARM_UP = 3
"""runs before the first recording: libraries and optimizers allocate what lasts during their first ones"""


class Replay:
    """Work that is recorded and replayed while its key stays the same: numbers that a recording holds as constants.

    The work must not wait for the device, and must read and write the same memory each time. On a CPU nothing is
    recorded: the work is called.
    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work = work
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._runs = 0
        self._key: Hashable = None
        self._recorded: Callable[[], None] | None = None

    def __call__(self, key: Hashable) -> None:
        """Do the work once."""
        if self._runs < WARM_UP:
            self._runs += 1
            self._run_aside()
            return
        if self._recorded is None or key != self._key:
            self._recorded = None  # frees its memory before the next one takes as much
            self._key, self._recorded = key, self._record()
        self._recorded()

    def _run_aside(self) -> None:
        """Work on the stream that will record, as CUDA asks for, in order with the work before and after."""
        if self._stream is None:
            self._work()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            self._work()
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _record(self) -> Callable[[], None]:
        if self._stream is None:
            return self._work
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._work()
        replay: Callable[[], None] = graph.replay
        return replay


logger = logging.getLogger(__name__)

SAVE, STOP = 1, 2
"""what processes agree on after a step, the larger wish winning"""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be learned, as the loop sees it."""

    batches: Callable[[int, int], Iterator[Batch]]
    """(epoch, first step) -> that epoch's remaining batches"""
    loss: Callable[[dict[str, Tensor], Batch], Tensor]
    """(what the student gives for the batch, batch) -> loss per sample"""
    evaluate: Callable[[], dict[str, float]]
    """measurements of the network on held-out data"""
    details: Callable[[int], dict[str, Any]]
    """epoch -> further entries of its metrics row"""
    feed: Feed | None = None
    """what makes the batches, where they are made on the device"""
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
        KcdcacheError: memory ran out; says what to lower.
    """
    resume(learner, folder)
    remedy = f"lower --batch-size ({settings.batch_size} now), with another --out: a run keeps the one it began with"
    with exact_arithmetic(), enough_memory(remedy):
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
    steps = _Steps(learner, task, settings)
    warm_up = True
    while learner.epoch < stop:
        with _timed(learner, folder, warm_up):
            _run_epoch(learner, task, settings, folder, guard, steps)
            row = _finish_epoch(learner, task, settings, steps.totals)
            guard.reset()
            if learner.group.first:
                save_checkpoint(folder, learner.tensors(), learner.state())
                write_metrics(folder, learner.rows)
        warm_up = False
        if learner.group.first:
            progress("train", learner.epoch, settings.epochs, _told(row))


@contextmanager
def _timed(learner: Learner, folder: RunFolder, warm_up: bool) -> Iterator[None]:
    """Log the clock time and the samples of an epoch, or of what was done of it before it was asked to stop.

    What comes first after a start is marked: data are read that later are fetched ahead, and memory is taken.
    """
    epoch, before, began = learner.epoch, learner.samples, time.perf_counter()
    try:
        yield
    except InterruptedRunError:
        _log_time(learner, folder, epoch, learner.samples - before, began, warm_up)
        raise
    _log_time(learner, folder, epoch, learner.samples - before, began, warm_up)


def _log_time(learner: Learner, folder: RunFolder, epoch: int, samples: int, began: float, warm_up: bool) -> None:
    if learner.group.first:
        row = {"epoch": epoch, "seconds": round(time.perf_counter() - began, 4), "samples": samples}
        add_timing(folder, row | ({"warm_up": True} if warm_up else {}))


def resume(learner: Learner, folder: RunFolder) -> None:
    """Take up the run's checkpoint, if there is one."""
    if (found := load_checkpoint(folder)) is not None:
        learner.restore(*found)
        if learner.group.first:
            write_metrics(folder, learner.rows)
    learner.group.wait()


class _Guard:
    """Says when a checkpoint inside an epoch is due."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.reset()

    def reset(self) -> None:
        self._last = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self._last >= self._seconds


class _Totals:
    """An epoch's sums on the device, at the same addresses in every epoch; reading a number a step would stall it."""

    def __init__(self, device: torch.device) -> None:
        self._sums: dict[str, Tensor] = {}
        self._finite = torch.zeros((), dtype=torch.int64, device=device)
        self._first_step = 0

    def begin(self, sums: dict[str, Tensor], first_step: int) -> dict[str, Tensor]:
        """Continue from the sums behind, none at an epoch's start; return the tensors that will hold them."""
        for name, held in self._sums.items():
            held.copy_(sums[name]) if name in sums else held.zero_()
        self._sums = sums | self._sums
        self._finite.zero_()
        self._first_step = first_step
        return self._sums

    def add(self, **parts: Tensor) -> None:
        """Add a step's numbers, and note without asking the device whether the loss so far is one."""
        for name, value in parts.items():
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value.double()
        self._finite += torch.isfinite(self._sums["loss"])

    def finite_steps(self) -> int:
        """Return the number of steps of the epoch before the first whose loss is no number."""
        return self._first_step + int(self._finite)


class _Steps:
    """Takes training steps: one by one, or recorded and replayed where batches are made on the device."""

    def __init__(self, learner: Learner, task: Task, settings: OptimizerSettings) -> None:
        self._learner, self._task, self._settings = learner, task, settings
        self.totals = _Totals(learner.device)
        self._seen: Callable[[Batch], tuple[Tensor, Tensor]] = _Pass(learner, task, settings.precision)
        if learner.group.world > 1:
            # methods may leave a module of theirs out of a step
            self._seen = DistributedDataParallel(self._seen, find_unused_parameters=True)
        self._replay: Replay | None = None
        if task.feed is not None and settings.graphs:
            self._replay = Replay(lambda: self._fed(settings.batch_size), learner.device)

    def take(self) -> Iterator[int]:
        """Take the epoch's remaining steps; yield the number of samples of each."""
        learner, feed = self._learner, self._task.feed
        learner.sums = self.totals.begin(learner.sums, learner.step)
        if feed is None or self._replay is None:
            for batch in self._task.batches(learner.epoch, learner.step):
                self._one(batch)
                yield batch.shared or len(batch.index)
            return
        feed.begin(learner.epoch, learner.step)
        for size in feed.sizes(learner.step):
            if size == self._settings.batch_size:
                self._replay(learner.optimizer.param_groups[0]["lr"])
            else:
                self._fed(size)
            yield size

    def _fed(self, size: int) -> None:
        assert self._task.feed is not None
        self._one(self._task.feed.batch(size))

    def _one(self, batch: Batch) -> None:
        _take_step(self._learner, self._seen, batch, self.totals)


class _Pass(nn.Module):
    """A forward pass of the student and its method over a batch, as one module, so that processes can share it."""

    def __init__(self, learner: Learner, task: Task, precision: str) -> None:
        super().__init__()
        self.network, self.head = learner.network, learner.head
        self._learner, self._loss, self._precision = learner, task.loss, precision

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits and loss per sample."""
        extra = self.head.extra(batch) if self.head is not None else None
        shown = batch.pixels if extra is None else torch.cat([batch.pixels, extra])
        with forward_precision(self._learner.device, self._precision):
            seen = self._learner.see(shown)
        loss = self._loss(seen, batch)
        return seen["logits"][: len(batch.labels)], loss


def _run_epoch(
    learner: Learner, task: Task, settings: OptimizerSettings, folder: RunFolder, guard: _Guard, steps: _Steps
) -> None:
    position = learner.epoch if task.clock is None else task.clock[learner.epoch]
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate(settings, position)
    if learner.step == 0:
        learner.sums = {}
        if learner.record is not None:
            learner.record.begin_epoch()
        # networks with dropout draw from torch's own generator
        _seed_torch(settings.seed, learner.epoch, learner.group.rank)
    learner.network.train()
    if learner.head is not None:
        learner.head.begin(learner.epoch, settings.epochs)
    for count in steps.take():
        learner.step += 1
        learner.samples += count
        wish = STOP if interrupt.requested() else SAVE if guard.due() else 0
        wish = learner.group.most(wish)
        if wish:
            _require_finite(learner, task, steps.totals)
            _save_inside(learner, folder)
            guard.reset()
        if wish == STOP:
            interrupt.stop(f"epoch {learner.epoch}, step {learner.step} is in the checkpoint of {folder.path}")


def _save_inside(learner: Learner, folder: RunFolder) -> None:
    """Write a checkpoint inside an epoch, of what all processes did."""
    if learner.record is not None:
        learner.record.settle(learner.group)
    told = learner.told()
    if learner.group.first:
        save_checkpoint(folder, learner.tensors() | told, learner.state())


def _take_step(
    learner: Learner, forward: Callable[[Batch], tuple[Tensor, Tensor]], batch: Batch, totals: _Totals
) -> None:
    logits, loss = forward(batch)
    learner.optimizer.zero_grad(set_to_none=True)
    weighted = loss * batch.weight
    if batch.shared is None:
        weighted.mean().backward()
    else:  # gradients are averaged over processes: of sums over all samples of the step, by their number
        share = 0.0 if batch.idle else learner.group.world / batch.shared
        (weighted.sum() * share).backward()
    learner.optimizer.step()
    with torch.no_grad():
        if learner.record is not None and not batch.idle:
            learner.record.observe(logits, loss, batch.index, batch.mixed)
        counted = _counted(logits, loss, batch)
        # all processes have the same sums, which they add up by name
        totals.add(**({name: torch.zeros_like(value) for name, value in counted.items()} if batch.idle else counted))


def forward_precision(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the context a forward pass runs in: bfloat16 autocast, or nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def _counted(logits: Tensor, loss: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Return what is summed over an epoch's samples."""
    guess = logits.argmax(1)
    parts = {"loss": loss.double().sum(), "train_accuracy": (guess == batch.labels).sum()}
    if batch.probabilities is not None:
        parts["agreement"] = (guess == batch.probabilities.argmax(1)).sum()
    return parts


def _finish_epoch(learner: Learner, task: Task, settings: OptimizerSettings, totals: _Totals) -> dict[str, Any]:
    before = learner.rows[-1]["samples_so_far"] if learner.rows else 0
    count = learner.samples - before
    _require_finite(learner, task, totals)
    if learner.record is not None:
        learner.record.settle(learner.group)
    # a resumed process has them in the order in which it read them, which is not that of the others
    means = {name: float(learner.group.total(learner.sums[name])) / count for name in sorted(learner.sums)}
    due = learner.epoch + 1 == settings.epochs or (learner.epoch + 1) % settings.evaluate_every == 0
    # batch statistics are each process's own, and those of the first are kept
    measured = task.evaluate() if due and learner.group.first else {}
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


def _require_finite(learner: Learner, task: Task, totals: _Totals) -> None:
    """Refuse to checkpoint a diverged network: resuming from it could not mend it."""
    loss = float(learner.group.total(learner.sums["loss"]))
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the training loss is {loss} in epoch {learner.epoch}, step {learner.step}; lower --learning-rate, "
            f"or look for bad images; the last checkpoint is from before that{_first_bad(learner, task, totals)}"
        )


def _first_bad(learner: Learner, task: Task, totals: _Totals) -> str:
    """Tell the batch whose loss was the first that is no number: drawn again, since its address is all that is kept."""
    step = -learner.group.most(-totals.finite_steps())
    batch = next(task.batches(learner.epoch, step))
    index = sorted(learner.group.joined(batch.index[:0] if batch.idle else batch.index).tolist())
    shown = ", ".join(map(str, index[:16])) + (", ..." if len(index) > 16 else "")
    return f"; the first such loss was that of step {step} (the first is 0), of these {len(index)} samples: {shown}"


def _told(row: dict[str, Any]) -> str:
    stage = f"stage {row['stage']}, " if "stage" in row else ""
    measured = f", test accuracy {row['test_accuracy']:.4f}" if "test_accuracy" in row else ""
    return f"{stage}loss {row['loss']:.4f}{measured}, {row['samples']:,} samples, {row['samples_so_far']:,} in all"


def _seed_torch(seed: int, epoch: int, rank: int) -> None:
    high, low, *_ = rng.words(seed, epoch, rng.STEP, draw=rank)
    torch.manual_seed((int(high) << 31) ^ int(low))
