"""A network in training: weights, loss, optimizer, values and counters, with everything a resumed run needs."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from kcdcache.condensation import values
from kcdcache.datasets.datasets import Dataset
from kcdcache.datasets.images import Split
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.files import run_files
from kcdcache.methods.losses import entropy
from kcdcache.methods.run_loss import Loss
from kcdcache.networks import registry, taps, weights
from kcdcache.networks.input_transform import InputTransform
from kcdcache.runs.folder import RunFolder
from kcdcache.runs.state import Checkpoint, MetricsRow
from kcdcache.settings import MethodSettings, OptimizerSettings, ViewRule
from kcdcache.teacher.fields import aggregated
from kcdcache.training.optimizer import Average, flattened, make_optimizer, restore
from kcdcache.training.processes import ALONE, Group

logger = logging.getLogger(__name__)

INPUT = "input"
"""tap of the network's input: the transformed pixels"""


class ValueRecord:
    """The values of all samples while a student learns, on its device; see `condensation.values`."""

    def __init__(self, count: int, settings: MethodSettings, device: torch.device, *, starts: bool = False) -> None:
        """Start without visits; with `starts`, keep the values at each epoch's start, for schemes that need them."""
        self.visits = torch.zeros(count, dtype=torch.int32, device=device)
        self.value = torch.zeros(count, dtype=torch.float32, device=device)
        self.start: dict[str, Tensor] | None = {} if starts else None
        self.pending: list[tuple[Tensor, Tensor, Tensor]] | None = None
        """with several processes, what this one observed since the last `join`: index, observation, mixed"""
        self._settings = settings
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Keep the values at the epoch's start if needed."""
        if self.start is not None:
            self.start = {"visits": self.visits.clone(), "value": self.value.clone()}

    def at_start(self) -> values.Values | None:
        """Return the values at the epoch's start, or None if they are not kept."""
        return None if self.start is None else values.Values(**{k: v.cpu().numpy() for k, v in self.start.items()})

    def now(self) -> values.Values:
        """Return the current values."""
        return values.Values(visits=self.visits.cpu().numpy(), value=self.value.cpu().numpy())

    def observe(
        self,
        logits: Float[Tensor, "batch classes"],
        loss: Float[Tensor, " batch"],
        index: Int64[Tensor, " batch"],
        mixed: Bool[Tensor, " batch"],
    ) -> None:
        """Add a step's observation of each sample, without extra forward pass or host sync (Eq. 7, 12)."""
        observed = entropy(logits) if self._settings.observed == "entropy" else loss.float()
        if self.pending is None:
            self._fold(index, observed, mixed)
        else:
            self.pending.append((index, observed, mixed))

    def join(self, group: Group) -> None:
        """Add the observations of all processes to each; the values are those of one process that observed all."""
        if self.pending is None:
            return
        nothing = (self.visits[:0].long(), self.value[:0], self.visits[:0].bool())
        index, observed, mixed = (torch.cat(parts) for parts in zip(nothing, *self.pending, strict=True))
        self._fold(group.joined(index), group.joined(observed.float()), group.joined(mixed.byte()).bool())
        self.pending.clear()

    def _fold(self, index: Tensor, observed: Tensor, mixed: Tensor) -> None:
        settings, before = self._settings, (self.visits[index], self.value[index])
        after = values.observe(*before, observed, settings.record, settings.record_decay)
        for held, old, new in zip((self.visits, self.value), before, after, strict=True):
            held[index] = new if settings.record_mixed else torch.where(mixed, old, new)


@dataclass(kw_only=True)
class Learner:
    """A network in training: everything that changes from step to step."""

    network: nn.Module
    transform: InputTransform
    loss: Loss
    """may have modules to train of its own"""
    optimizer: torch.optim.Optimizer
    device: torch.device
    record: ValueRecord | None = None
    epoch: int = 0
    """finished epochs"""
    step: int = 0
    """finished steps of the current epoch"""
    samples: int = 0
    """samples forwarded so far; a mixed point counts once"""
    rows: list[MetricsRow] = field(default_factory=list)
    """of finished epochs"""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """running sums of the current epoch, float64 on the device"""
    compiled: Callable[[Tensor], Tensor] | None = None
    """the network compiled by torch, with the same weights"""
    group: Group = ALONE
    average: Average | None = None
    """moving average of the weights, kept by the first process"""

    @property
    def taken(self) -> int:
        """Samples of the current epoch forwarded so far."""
        return self.samples - (self.rows[-1].samples_so_far if self.rows else 0)

    def outputs(self, pixels: Float[Tensor, "batch channels h w"]) -> dict[str, Float[Tensor, "..."]]:
        """Return the logits of pixels in [0, 1], and in float32 the taps that the loss reads.

        `filters:STAGE` is not a value per sample but the profile of the stage's filters.
        """
        inputs, wanted = self.transform(pixels), self.loss.taps
        given = {INPUT: inputs} if INPUT in wanted else {}
        if any(name.startswith(taps.FILTERS) for name in wanted):
            profiles = {f"{taps.FILTERS}{stage}": layers for stage, layers in taps.filters(self.network).items()}
            given |= {name: aggregated(profiles[name]) for name in wanted if name in profiles}
        if inner := [name for name in wanted if name not in given]:
            found = taps.run(self.network, inputs, list(dict.fromkeys(("logits", *inner))))
            return given | {name: value if name == "logits" else value.float() for name, value in found.items()}
        network = self.network if self.compiled is None else self.compiled
        return given | {"logits": network(inputs)}

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of a checkpoint."""
        found = _named("network.", self.network.state_dict()) | _named("loss.", self.loss.state_dict())
        found |= _named("optimizer.", flattened(self.optimizer)[0]) | _named("sum.", self.sums)
        if self.record is not None:
            found |= {"record.visits": self.record.visits, "record.value": self.record.value}
            found |= _named("start.", self.record.start or {})
        if self.average is not None:
            found |= _named("average.", self.average.state_dict())
        return found | self._generators()

    def of_processes(self) -> dict[str, Tensor]:
        """Return the generators' states and the sums so far of all processes, one row per process."""
        own = {f"sum.{name}": value.view(1) for name, value in self.sums.items()} | self._generators()
        # sorted: tensors read from a file have another order in each process
        return {name: self.group.joined(own[name]).view(-1, len(own[name])) for name in sorted(own)}

    def state(self) -> Checkpoint:
        """Return the rest of a checkpoint."""
        rest = flattened(self.optimizer)[1]
        return Checkpoint(epoch=self.epoch, step=self.step, samples=self.samples, rows=self.rows, optimizer=rest)

    def restore(self, tensors: Mapping[str, Tensor], state: Checkpoint) -> None:
        """Restore a checkpoint; raises MismatchError for an older kcdcache's, which lacks the optimizer's state."""
        if state.optimizer is None:
            raise MismatchError("the run's checkpoint is of an older kcdcache; start a new run with another --out")
        self.network.load_state_dict(_section(tensors, "network."))
        self.loss.load_state_dict(_section(tensors, "loss."))
        restore(self.optimizer, _section(tensors, "optimizer."), state.optimizer)
        if self.average is not None:
            self.average.load_state_dict(_section(tensors, "average."))
        self.sums = {name: self._own_sum(rows).to(self.device) for name, rows in _section(tensors, "sum.").items()}
        if (record := self.record) is not None:
            record.visits, record.value = (tensors[f"record.{name}"].to(self.device) for name in ("visits", "value"))
            if record.start is not None:
                record.start = {name: value.to(self.device) for name, value in _section(tensors, "start.").items()}
        self._draw_on(tensors)
        self.epoch, self.step, self.samples = state.epoch, state.step, state.samples
        self.rows = list(state.rows)

    def _own_sum(self, rows: Tensor) -> Tensor:
        """Return this process's part of a sum; if the number of processes changed, the first one gets all of it."""
        if rows.numel() == self.group.world:
            return rows.view(-1)[self.group.rank]
        return rows.sum() if self.group.first else torch.zeros_like(rows.sum())

    def _generators(self) -> dict[str, Tensor]:
        """Return the states of the random generators, which dropout uses."""
        device = {"rng_device": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        return {"rng": torch.get_rng_state(), **device}

    def _draw_on(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore this process's random generators; a process that is new starts its own sequence."""
        rows = tensors["rng"].view(-1, len(torch.get_rng_state()))
        place = self.group.rank if self.group.rank < len(rows) else 0
        torch.set_rng_state(rows[place].clone())
        if place != self.group.rank:
            torch.manual_seed(int(torch.randint(2**62, ())) + self.group.rank)
        elif "rng_device" in tensors and self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["rng_device"].view(len(rows), -1)[place].clone(), self.device)


def new_learner(
    model: str,
    data: Dataset,
    settings: OptimizerSettings,
    loss: Loss,
    device: torch.device,
    record: ValueRecord | None = None,
    group: Group = ALONE,
) -> Learner:
    """Return an untrained network on the device; its initial weights depend on the seed alone.

    Raises SettingsError if the network is unknown, or settings do not fit the method or several processes.
    """
    if settings.compile and loss.taps:
        raise SettingsError("--compile works with methods that read the student's logits alone; leave it out")
    _require_shareable(settings, device, loss, group)
    network = registry.build(model, len(data.classes), settings.seed, channels=len(data.mean))
    if isinstance([*network.modules()][-1], nn.Softmax):
        logger.warning(
            "%s ends in a softmax: if its outputs are probabilities, return the input of the softmax instead", model
        )
    network = network.to(device).to(memory_format=torch.channels_last)  # 1.4-4.5 times faster on CPU
    if settings.sync_bn:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    if record is not None and group.world > 1:
        record.pending = []
    loss = loss.to(device)
    return Learner(
        network=network,
        transform=InputTransform(mean=data.mean, std=data.std),
        loss=loss,
        optimizer=make_optimizer([*network.parameters(), *loss.parameters()], settings),
        device=device,
        record=record,
        compiled=torch.compile(network, dynamic=False) if settings.compile else None,
        group=group,
        average=None if settings.ema_decay is None or not group.first else Average(network, settings.ema_decay),
    )


def save(learner: Learner, folder: RunFolder, name: str, model: str, data: Dataset, extra: dict[str, Any]) -> None:
    """Write the network as NAME.safetensors and NAME.json into the run's folder, averaged weights into `ema` there."""
    record = weights.NetworkRecord(
        **extra, architecture=model, classes=data.classes, channels=len(data.mean), transform=learner.transform
    )
    weights.save_network(folder.path, name, learner.network, record)
    if learner.average is not None:
        weights.save_network(folder.averaged, name, learner.average.network, record)


def size_of_views(rule: ViewRule, split: Split) -> dict[str, list[int]]:
    """Return the entry of a network's record for views of another size than the images; empty otherwise."""
    return {} if rule.size == split.image_size else {"view_size": list(rule.size)}


def files_of(learner: Learner, folder: RunFolder, name: str) -> dict[str, run_files.Facts]:
    """Return what `save` writes, as a run's record of its files has it."""
    places = [folder.path] if learner.average is None else [folder.path, folder.averaged]
    made = [place / f"{name}.{kind}" for place in places for kind in ("safetensors", "json")]
    return {folder.name_of(path): run_files.Facts() for path in made}


def _require_shareable(settings: OptimizerSettings, device: torch.device, loss: Loss, group: Group) -> None:
    if settings.sync_bn and (group.world == 1 or device.type != "cuda"):
        raise SettingsError(
            "--sync-bn joins the batch statistics of several processes on GPUs (torchrun, --device cuda)"
        )
    if group.world == 1:
        return
    if settings.batch_size < group.world:
        raise SettingsError(
            f"--batch-size {settings.batch_size} leaves some of {group.world} processes without a sample; "
            "raise it, or start fewer"
        )
    if settings.compile:
        raise SettingsError("--compile is for one process; leave it out under torchrun")
    if settings.resident == "on":
        raise SettingsError("--resident on is for one process; leave it out under torchrun")
    if loss.alone:
        raise SettingsError(
            f"{loss.alone} keeps a memory of all samples, which processes do not share; train it in one process"
        )


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def _section(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
