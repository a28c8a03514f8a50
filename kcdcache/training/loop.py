"""The training loop: steps, learning rate, value record, metrics, checkpoints and exact resume."""

import logging
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kcdcache import interrupt, rng
from kcdcache.errors import InterruptedRunError, NonFiniteError, SettingsError, require_known
from kcdcache.files.records import Rate
from kcdcache.methods.base import Batch
from kcdcache.networks.input_transform import enough_memory
from kcdcache.progress import EPOCH, Progress, inside, silent
from kcdcache.runs.folder import RunFolder
from kcdcache.runs.logs import TERM, Logs
from kcdcache.runs.state import MetricsRow, add_timing, load_checkpoint, save_checkpoint, write_metrics
from kcdcache.settings import Precision
from kcdcache.training import evaluation
from kcdcache.training.batches import HostBatches, Source
from kcdcache.training.device_batches import DeviceBatches, hold, obstacle
from kcdcache.training.learner import Learner
from kcdcache.training.optimizer import clip, learning_rate
from kcdcache.training.processes import ALONE, LEAST, Group
from kcdcache.training.sampling import Sampler
from kcdcache.views import prefetch, rules

logger = logging.getLogger(__name__)

SAVE, STOP = 1, 2
"""what processes agree on after a step: the largest wins"""
ELSEWHERE = "other settings need another --out once the run has a checkpoint"
EVERY_SECONDS = 0.2
"""between reports inside an epoch: counts of this process, which wait for no device"""
WARM_UP = 3
"""steps before the first recording, in which libraries and optimizers allocate lasting memory"""


def batches_of(
    source: Source, sampler: Sampler, device: torch.device, group: Group = ALONE
) -> HostBatches | DeviceBatches:
    """Return a run's batches, made on the device if its `resident` says so, else on the host.

    Raises SettingsError if resident = on and the device cannot hold the data.
    """
    settings = sampler.optimizer
    if group.world == 1 and prefetch.wanted(settings.resident, obstacle(source, device), device):
        return DeviceBatches(source, sampler, device)
    return HostBatches(source=source, sampler=sampler, device=device, workers=settings.workers, group=group)


class Loop:
    """Trains a learner on a source's points in a run's folder."""

    def __init__(
        self,
        learner: Learner,
        source: Source,
        sampler: Sampler,
        folder: RunFolder,
        *,
        details: Callable[[int], dict[str, Any]] = lambda epoch: {},
        clock: Sequence[float] | None = None,
        progress: Progress = silent,
    ) -> None:
        """Restore the run's checkpoint, if there is one.

        `details` maps an epoch to more entries of its metrics row. `clock` has the position on the learning-rate axis
        at the start of each epoch, in epochs; None for the epoch's number.
        """
        settings = sampler.optimizer
        self.learner, self.settings, self.folder, self._source = learner, settings, folder, source
        if (found := load_checkpoint(folder)) is not None:
            learner.restore(*found)
        self._logs = Logs(folder, settings.log if learner.group.first else (), len(source.data.train))
        if found is not None and learner.group.first:
            write_metrics(folder, learner.rows)
            self._logs.write(learner.rows)
        learner.group.wait()
        self.batches = batches_of(source, sampler, learner.device, learner.group)
        self._test, rule = source.data.test, rules.plain(source.rule)
        held = hold(self._test, rule, learner.device) if isinstance(self.batches, DeviceBatches) else None
        self._test_views = partial(evaluation.first_views, self._test, rule, learner.device, settings.workers, held)
        self._details, self._clock, self._progress, self._inside = details, clock, progress, inside(progress)
        self._totals = _Totals(learner.device)
        self._forward: Callable[[Batch], tuple[Tensor, Tensor]] = _Forward(learner, settings.precision)
        if learner.group.world > 1:
            # methods may leave a module of theirs out of a step
            self._forward = DistributedDataParallel(self._forward, find_unused_parameters=True)
        self._replay: Replay | None = None
        if isinstance(self.batches, DeviceBatches) and settings.graphs:
            batch = partial(self.batches.batch, settings.batch_size)
            self._replay = Replay(lambda: self.step(batch()), learner.device)
        self._saved = self._told = time.monotonic()

    def run(self, stop: int) -> None:
        """Train until `stop` epochs are finished, writing checkpoints and metrics.

        Raises:
            NonFiniteError: the loss is not finite; the last checkpoint is from before that.
            InterruptedRunError: a signal asked to stop; the checkpoint has everything up to there.
            KcdcacheError: memory ran out.
        """
        learner, size, first = self.learner, self.settings.batch_size, self.learner.epoch
        remedy = f"lower --batch-size ({size} now); {ELSEWHERE}"
        interrupt.begin()
        with closing(self._logs), exact_arithmetic(), enough_memory(remedy), _enough_samples(size):
            while learner.epoch < stop:
                began = time.perf_counter()
                timed = partial(self._timed, began, learner.epoch, learner.samples, learner.epoch == first)
                try:
                    row = self._epoch()
                except InterruptedRunError:
                    timed()
                    raise
                rate = timed()
                if learner.group.first:
                    self._progress(EPOCH, learner.epoch, self.settings.epochs, f"{_line(row)}, {rate} images/s")

    def step(self, batch: Batch) -> None:
        """Take one step: forward pass, loss, gradient, update, and the record of each sample's value."""
        learner = self.learner
        logits, loss = self._forward(batch)
        learner.optimizer.zero_grad(set_to_none=True)
        weighted = loss * batch.weight
        if batch.shared is None:
            weighted.mean().backward()
        else:  # gradients are averaged over processes, not over samples
            share = 0.0 if batch.idle else learner.group.world / batch.shared
            (weighted.sum() * share).backward()
        clip(learner.optimizer, self.settings.clip_norm)
        learner.optimizer.step()
        if learner.average is not None:
            learner.average.update()
        with torch.no_grad():
            if learner.record is not None and not batch.idle:
                learner.record.observe(logits, loss, batch.index, batch.mixed)
            self._totals.add(_counted(logits, loss, batch, learner.loss.parts))

    def _epoch(self) -> MetricsRow:
        """Train to the end of the epoch; return its row of metrics."""
        learner = self.learner
        self._begin_epoch()
        for count in self._steps():
            learner.step += 1
            learner.samples += count
            now = time.monotonic()
            if self._inside is not None and now - self._told >= EVERY_SECONDS:
                self._told = now
                share = min(learner.taken / len(self._source.manifest), 1.0)  # a sampling may take fewer
                self._inside(EPOCH, learner.epoch + share, self.settings.epochs)
            due = now - self._saved >= self.settings.checkpoint_seconds
            wish = learner.group.most(STOP if interrupt.requested() else SAVE if due else 0)
            if wish:
                self._save_inside()
            if wish == STOP:
                interrupt.stop(
                    f"epoch {learner.epoch + 1}, step {learner.step} is in the checkpoint of {self.folder.path}"
                )
        row = self._end_epoch()
        self._saved = time.monotonic()
        if learner.group.first:
            save_checkpoint(self.folder, learner.tensors(), learner.state())
            write_metrics(self.folder, learner.rows)
            self._logs.write(learner.rows)
        return row

    def _begin_epoch(self) -> None:
        learner = self.learner
        position = learner.epoch if self._clock is None else self._clock[learner.epoch]
        for group in learner.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, position)
        if learner.step == 0:
            learner.sums = {}
            if learner.record is not None:
                learner.record.begin_epoch()
            # networks with dropout draw from torch's own generator
            high, low, *_ = rng.words(self.settings.seed, learner.epoch, rng.STEP, draw=learner.group.rank)
            torch.manual_seed((int(high) << 31) ^ int(low))
        self._choose_terms()
        learner.network.train()
        learner.loss.begin(learner.epoch, self.settings.epochs)
        learner.sums = self._totals.begin(learner.sums, learner.step)

    def _choose_terms(self) -> None:
        """Sum the loss's terms if a log has them, but not over the rest of an epoch that began without."""
        learner = self.learner
        known = [name for name in learner.sums if name.startswith(TERM)]
        learner.loss.tells = bool(self.settings.log) and (learner.step == 0 or bool(known))
        if not learner.loss.tells:
            learner.loss.parts = {}
            learner.sums = {name: value for name, value in learner.sums.items() if name not in known}

    def _steps(self) -> Iterator[int]:
        """Take the epoch's remaining steps, replayed if possible; yield the number of samples of each."""
        learner, batches = self.learner, self.batches
        if self._replay is None or not isinstance(batches, DeviceBatches):
            for batch in batches.epoch(learner.epoch, learner.taken):
                self.step(batch)
                yield batch.shared or len(batch.index)
            return
        for size in batches.begin(learner.epoch, learner.taken):
            if size == self.settings.batch_size:
                self._replay((learner.optimizer.param_groups[0]["lr"], learner.loss.tells))
            else:
                self.step(batches.batch(size))
            yield size

    def _save_inside(self) -> None:
        """Write a checkpoint of all processes inside an epoch."""
        learner = self.learner
        self._require_finite()
        if learner.record is not None:
            learner.record.join(learner.group)
        shared = learner.of_processes()
        if learner.group.first:
            save_checkpoint(self.folder, learner.tensors() | shared, learner.state())
        self._saved = time.monotonic()

    def _end_epoch(self) -> MetricsRow:
        learner, settings = self.learner, self.settings
        count = learner.taken
        self._require_finite()
        if learner.record is not None:
            learner.record.join(learner.group)
        # sorted: in a resumed process they are in the order of the checkpoint
        found: dict[str, Any] = {
            name: float(learner.group.total(learner.sums[name])) / count for name in sorted(learner.sums)
        }
        terms = {name.removeprefix(TERM): found.pop(name) for name in [*found] if name.startswith(TERM)}
        if terms:
            found["terms"] = terms
        due = learner.epoch + 1 == settings.epochs or (learner.epoch + 1) % settings.evaluate_every == 0
        if due and learner.group.first:  # batch statistics differ between processes; the first one's are kept
            found |= self._measured(learner.network)
            if learner.average is not None:
                averaged = self._measured(learner.average.network)
                found |= {f"ema_{name}": value for name, value in averaged.items()}
        row = MetricsRow(
            epoch=learner.epoch,
            learning_rate=learner.optimizer.param_groups[0]["lr"],
            samples=count,
            samples_so_far=learner.samples,
            view=self._source.view_of(learner.epoch),
            **found | self._details(learner.epoch),
        )
        if self._progress is silent:  # else the line is the progress function's
            logger.info("epoch %d of %d: %s", learner.epoch + 1, settings.epochs, _line(row))
        learner.rows.append(row)
        learner.epoch, learner.step, learner.sums = learner.epoch + 1, 0, {}
        return row

    def _measured(self, network: nn.Module) -> dict[str, float]:
        logits = evaluation.predict(network, self.learner.transform, self._test_views())
        return evaluation.measure(logits, self._test.labels)

    def _require_finite(self) -> None:
        """Raise NonFiniteError if the network has diverged, with the samples of the first step without finite loss."""
        learner, group = self.learner, self.learner.group
        loss, where = float(group.total(learner.sums["loss"])), f"in epoch {learner.epoch + 1}, step {learner.step}"
        remedy = f"lower --learning-rate, or look for bad images; {ELSEWHERE} (the last is from before that)"
        if not math.isfinite(loss):
            step = -group.most(-self._totals.finite_steps())
            batch = next(self.batches.epoch(learner.epoch, step * self.settings.batch_size))
            index = sorted(group.joined(batch.index[:0] if batch.idle else batch.index).tolist())
            shown = ", ".join(map(str, index[:16])) + (", ..." if len(index) > 16 else "")
            raise NonFiniteError(
                f"the training loss is {loss} {where}; {remedy}; the first such loss was that of step {step} (the "
                f"first is 0), of these {len(index)} samples: {shown}"
            )
        if not all(bool(torch.isfinite(weight).all()) for weight in learner.network.parameters()):
            raise NonFiniteError(f"the network's weights are not finite any more {where}; {remedy}")

    def _timed(self, began: float, epoch: int, before: int, warm_up: bool) -> Rate:
        """Write the time and samples of an epoch or its part before a stop; return images per second."""
        seconds, samples = time.perf_counter() - began, self.learner.samples - before
        if self.learner.group.first:
            row = {"epoch": epoch, "seconds": round(seconds, 4), "samples": samples}
            add_timing(self.folder, row | ({"warm_up": True} if warm_up else {}))
        return Rate(n=1, mean=samples / seconds, std=None)


class _Forward(nn.Module):
    """The student's forward pass and loss over a batch as one module, which DistributedDataParallel needs."""

    def __init__(self, learner: Learner, precision: str) -> None:
        super().__init__()
        self.network, self.loss = learner.network, learner.loss
        self._learner, self._precision = learner, precision

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits and loss per sample."""
        extra = self.loss.extra(batch)
        shown = batch.pixels if extra is None else torch.cat([batch.pixels, extra])
        with forward_precision(self._learner.device, self._precision):
            outputs = self._learner.outputs(shown)
        return outputs["logits"][: len(batch.labels)], self.loss(outputs, batch)


class _Totals:
    """An epoch's sums, kept on the device at fixed addresses, as reading a number each step would stall it."""

    def __init__(self, device: torch.device) -> None:
        self._sums: dict[str, Tensor] = {}
        self._finite = torch.zeros((), dtype=torch.int64, device=device)
        self._first_step = 0

    def begin(self, sums: dict[str, Tensor], first_step: int) -> dict[str, Tensor]:
        """Continue from the given sums, none at an epoch's start; return the tensors that hold the sums from now on."""
        for name, held in self._sums.items():
            held.copy_(sums[name]) if name in sums else held.zero_()
        self._sums = sums | self._sums
        self._finite.zero_()
        self._first_step = first_step
        return self._sums

    def add(self, parts: dict[str, Tensor]) -> None:
        """Add a step's numbers, and count steps with a finite loss without waiting for the device."""
        for name, value in parts.items():
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value.double()
        self._finite += torch.isfinite(self._sums["loss"])

    def finite_steps(self) -> int:
        """Return the number of the epoch's first step without finite loss."""
        return self._first_step + int(self._finite)


class Replay:
    """Work of fixed shapes at fixed addresses, recorded as a CUDA graph and replayed; on a CPU, simply called.

    It is recorded again when the key changes (the numbers that a recording holds as constants). The work must not wait
    for the device, and must read and write the same memory each time.
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
        """Work on the stream that will record, as CUDA requires, in order with the work before and after."""
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


@contextmanager
def _enough_samples(batch_size: int) -> Iterator[None]:
    """Raise SettingsError where torch refuses batch statistics of one value, which only small full batches lead to."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel"):
            raise
        raise SettingsError(
            f"--batch-size {batch_size} is too small for the batch statistics of this network or method: some are of "
            f"one sample's map of 1x1 (torch: {error}); give at least {LEAST} for each process; {ELSEWHERE}"
        ) from None


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Use full float32 (no TF32) and repeatable convolutions on a GPU; no effect on a CPU."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul


def forward_precision(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the context of a forward pass: bfloat16 autocast, or none for float32."""
    require_known("precision", precision, get_args(Precision))
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def _counted(logits: Tensor, loss: Tensor, batch: Batch, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what is summed over an epoch's samples; same names in all processes, zeros in an idle one."""
    rows, guess = slice(0 if batch.idle else None), logits.argmax(1)
    parts = {"loss": loss[rows].double().sum(), "train_accuracy": (guess == batch.labels)[rows].sum()}
    parts |= {f"{TERM}{name}": value[rows].double().sum() for name, value in terms.items()}
    if batch.probabilities is not None:
        parts["agreement"] = (guess == batch.probabilities.argmax(1))[rows].sum()
    return parts


def _line(row: MetricsRow) -> str:
    """Return a row of metrics as text."""
    stage = "" if row.stage is None else f"stage {row.stage}, "
    measured = "" if row.test_accuracy is None else f", test accuracy {row.test_accuracy:.4f}"
    return f"{stage}loss {row.loss:.4f}{measured}, {row.samples:,} samples, {row.samples_so_far:,} in all"
