"""What batches are made from, how points are mixed, and batches made on the host."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import get_worker_info

from kcdcache.condensation.manifest import Manifest, require_knowledge
from kcdcache.datasets.datasets import Dataset
from kcdcache.errors import MismatchError, SettingsError, require_same
from kcdcache.methods.base import Batch
from kcdcache.settings import Mix, MixTarget, OptimizerSettings, Settings
from kcdcache.store.check import check_data
from kcdcache.store.reader import Store
from kcdcache.store.rows import PlannedRows, StoredTargets, Targets
from kcdcache.teacher import fields
from kcdcache.training.processes import ALONE, Group, Share, batch_sizes, deal
from kcdcache.training.sampling import Points, Sampler
from kcdcache.views import prefetch, rules
from kcdcache.views.mixing import mix_pixels, mix_probabilities

CPU = torch.device("cpu")
MEMORY_BYTES = 8 * 2**30


class Mixing(Settings):
    """How a K_Aug point is made; see settings.MethodSettings."""

    mix: Mix = "convex"
    target: MixTarget = "linear_prob"
    temperature: float = Field(default=1.0, gt=0)


DEFAULT_MIXING = Mixing()


@dataclass(frozen=True, kw_only=True)
class Source:
    """What an epoch's batches are made from."""

    data: Dataset
    rule: rules.ViewRule
    views: int | None
    """number V of cached views; epoch e uses view e mod V; None for an endless rule"""
    manifest: Manifest
    targets: Targets | None = None
    """teacher outputs on single samples; None without distillation"""
    requeried: Targets | None = None
    """teacher outputs on mixed points (mix_target = requery)"""
    mixing: Mixing = DEFAULT_MIXING
    stop: int | None = None
    """first epoch that does not use this source, so that nothing is loaded for it; None if unknown"""

    def view_of(self, epoch: int) -> int:
        """Return the number of an epoch's view."""
        return epoch if self.views is None else epoch % self.views

    @property
    def stored(self) -> list[StoredTargets]:
        """The targets that come from a store."""
        return [targets for targets in (self.targets, self.requeried) if isinstance(targets, StoredTargets)]

    @property
    def mixer(self) -> "Mixer":
        """The mixer of its points."""
        own, asked = (None if targets is None else targets.gather for targets in (self.targets, self.requeried))
        return Mixer(self.mixing, own, asked)

    def prepare(self, epoch: int, mine: Points | None = None, later: Points | None = None) -> None:
        """Load the teacher outputs an epoch needs, and start loading the next epoch's in the background.

        With several processes, only those of the points `mine`, and of `later` in the next epoch (None: unknown).
        """
        known = epoch + 1 != self.stop and (mine is None or later is not None)
        following = self.view_of(epoch + 1) if known else None
        asked = self.requeried is not None
        for targets, needed in ((self.targets, lambda one: needed_rows(one, asked)), (self.requeried, Points.mixed)):
            if targets is not None:
                parts = () if mine is None else (needed(mine), None if later is None else needed(later))
                targets.prepare(self.view_of(epoch), following, *parts)


@contextmanager
def connect(
    data: Dataset,
    knowledge: Store,
    manifest: Manifest,
    *,
    fields: Sequence[str] = ("logits",),
    mixing: Mixing = DEFAULT_MIXING,
    requeried: Store | None = None,
    memory_bytes: float = MEMORY_BYTES,
    folder: Path | None = None,
    cached_views: int | None = None,
) -> Iterator[Source]:
    """Yield the source of a manifest's batches: its images and views, and the teacher's fields for them.

    Reads only the rows the manifest needs, one view at a time. `requeried` is a store of the teacher's outputs on the
    manifest's mixes. Rows above `memory_bytes` are kept in unlinked memory-mapped files in `folder` (default: the
    system's temporary folder). `cached_views` limits the number of views used. Raises MismatchError if data, manifest
    and store were not made for each other, or a field is missing.
    """
    check_data(knowledge, data)
    if knowledge.knowledge.mixes is not None:
        raise MismatchError(f"{knowledge.path} holds outputs on a manifest's mixes, not on the data's own samples")
    require_knowledge(manifest, knowledge.knowledge_id)
    rule = knowledge.knowledge.views
    held_views = knowledge.views if cached_views is None else min(cached_views, knowledge.views)
    plain = Source(data=data, rule=rule, views=held_views, manifest=manifest, mixing=mixing)
    if not fields:
        yield plain
        return
    if mixing.target == "requery" and requeried is None and manifest.mixed.any():
        raise SettingsError(
            "Mixing(target='requery') takes the teacher's outputs on the mixes from a store of their own: give it to "
            "`connect` as `requeried` (`kcdcache precompute --manifest` makes one), or choose another target: "
            "linear_prob, linear_logit or keep"
        )
    memory: dict[str, Any] = {"memory_bytes": memory_bytes, "folder": folder or Path(tempfile.gettempdir())}
    again = None if requeried is None else _targets_of_mixes(requeried, manifest, mixing.mix, fields, memory)
    rows = needed_rows(manifest, requeried is not None)
    with StoredTargets(knowledge, rows, fields, **memory) as targets, again or nullcontext():
        yield replace(plain, targets=targets, requeried=again)


def needed_rows(chosen: Manifest | Points, requeried: bool = False) -> Int64[np.ndarray, " rows"]:
    """Return the samples whose knowledge some points need, ascending; not the partners' if requeried."""
    partners = chosen.partner[chosen.partner >= 0]
    return np.union1d(chosen.index, partners[:0] if requeried else partners)


def _targets_of_mixes(
    mixes: Store, manifest: Manifest, mix: str, fields: Sequence[str], memory: Mapping[str, Any]
) -> StoredTargets:
    """Return the targets of the mixed points: row j of the store is the j-th K_Aug point by index."""
    held = mixes.knowledge.mixes or {}
    names = (f"the mixes of the store at {mixes.path}", "those requested")
    remedy = "make them with `kcdcache precompute --manifest` for this manifest and mix"
    asked = {"manifest": manifest.digest, "mix": mix}
    require_same({key: held.get(key) for key in asked}, asked, names, remedy)
    index, slots = manifest.index[manifest.mixed], {view: slot for slot, view in enumerate(held["views"])}
    rows = np.arange(len(index))
    return StoredTargets(mixes, index, fields, rows=rows, slots=slots, count=manifest.count, **memory)


Gather = Callable[[Any, float, torch.device], Mapping[str, Tensor]]
"""samples, temperature, device -> the teacher's fields for these samples in the current view"""


class Mixer(NamedTuple):
    """Adds targets to batches and mixes partners into their points, on the host or on a device."""

    mixing: Mixing
    own: Gather | None
    """the teacher's fields of single samples; None without distillation"""
    asked: Gather | None
    """the teacher's fields of the mixes; None unless requeried"""

    def softened(self, knowledge: Mapping[str, Tensor]) -> Float32[Tensor, "rows classes"] | None:
        """Return the teacher's probabilities at the temperature, or None without logits."""
        return (knowledge["logits"] / self.mixing.temperature).softmax(1) if "logits" in knowledge else None

    def mixed(
        self, plain: Batch, rows: Int64[Tensor, " some"] | None, pixels: Float32[Tensor, "some c h w"],
        index: Any, partner: Any,
    ) -> Batch:  # fmt: skip
        """Mix partners into a batch of unmixed points, in place where possible, and return it.

        `rows` are the points that have a partner; with None every point has one, an unmixed point itself, so that
        shapes are fixed. `pixels` are the partners' views; `index` and `partner` are passed to `own` and `asked`.
        """
        part = slice(None) if rows is None else rows
        epsilon, own = plain.epsilon[part], {name: values[part] for name, values in plain.knowledge.items()}
        soft, knowledge = self._targets(own, epsilon, index, partner)
        pixels = mix_pixels(plain.pixels[part], pixels, epsilon, self.mixing.mix)
        known = self.softened(plain.knowledge)
        return replace(
            plain,
            # a share of 0 leaves the bits of pixels as they are
            pixels=pixels if rows is None else _put(plain, rows, plain.pixels, pixels),
            probabilities=known if soft is None or known is None else _put(plain, rows, known, soft),
            knowledge={
                name: _put(plain, rows, values, knowledge[name]) if name in knowledge else values
                for name, values in plain.knowledge.items()
            },
        )

    def _targets(
        self, own: Mapping[str, Tensor], epsilon: Float32[Tensor, " some"], index: Any, partner: Any
    ) -> tuple[Float32[Tensor, "some classes"] | None, Mapping[str, Tensor]]:
        """Return the probabilities and fields of the mixed points where they are not the kept points' own."""
        mixing, device, soft = self.mixing, epsilon.device, None
        if self.asked is not None:
            found = self.asked(index, mixing.temperature, device)
            return self.softened(found), found
        if self.own is None or mixing.target == "keep":
            return None, {}
        other = self.own(partner, mixing.temperature, device)
        if "logits" in own:
            soft = mix_probabilities(own["logits"], other["logits"], epsilon, mixing.target, mixing.temperature)
        return soft, {name: fields.mix(name, own[name], other[name], epsilon) for name in own}


def _put(
    plain: Batch, rows: Tensor | None, own: Shaped[Tensor, "batch ..."], new: Shaped[Tensor, "some ..."]
) -> Shaped[Tensor, "batch ..."]:
    """Return `own` with the values of mixed points put in; changes `own` where `rows` are given."""
    if rows is None:
        return torch.where(plain.mixed.view(-1, *[1] * (own.ndim - 1)), new, own)
    own[rows] = new
    return own


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan(Points):
    """The points of an epoch with the parameters of their views and their partners' views."""

    parameters: Int64[np.ndarray, "n k"]
    partner_parameters: Int64[np.ndarray, "n k"]

    def asked(self) -> Iterator[prefetch.Asked]:
        """Yield the views it needs: those of its samples, then those of partners if there are any."""
        yield prefetch.Asked(self.index, self.parameters)
        if len(where := np.flatnonzero(self.partner >= 0)):
            yield prefetch.Asked(self.partner[where], self.partner_parameters[where])


def plan_epoch(source: Source, epoch: int, points: Points) -> Plan:
    """Return the points of an epoch with the parameters of its view."""
    view, partner = source.view_of(epoch), points.partner
    parameters = rules.parameters(source.rule, points.index, view)
    partner_parameters = np.zeros_like(parameters)
    partner_parameters[partner >= 0] = rules.parameters(source.rule, partner[partner >= 0], view)
    return Plan(**vars(points), parameters=parameters, partner_parameters=partner_parameters)


@dataclass(frozen=True, kw_only=True)
class HostBatches:
    """Batches made on the host, one after the other, and copied to the device."""

    source: Source
    sampler: Sampler
    device: torch.device = CPU
    workers: int | None = None
    """threads that make views ahead; see `prefetch.shown`"""
    group: Group = ALONE
    """processes that share every batch; each loads only its own rows unless there is one view"""

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Yield an epoch's batches after its first `start` points, cut as in `processes.batch_sizes`.

        Loads the next epoch's rows meanwhile.
        """
        source = self.source
        points, parts = self._mine(number, start)
        plan = plan_epoch(source, number, points)
        if self.group.world == 1 or source.views == 1:
            source.prepare(number)
        else:
            foreseen = number + 1 != source.stop and not self.sampler.scheme.values
            source.prepare(number, points, self._mine(number + 1)[0] if foreseen else None)
        planned = source.targets.plan(points.index) if isinstance(source.targets, StoredTargets) else None
        parts = parts[-(-start // self.sampler.optimizer.batch_size) :]
        asked = (one for part in parts for one in plan.part(part.mine).asked())
        with closing(prefetch.shown(source.data.train, source.rule, asked, self.device, self.workers)) as shown:
            for part in parts:
                rows = None if planned is None else (planned, part.mine)
                batch = make_batch(source, plan.part(part.mine), self.device, rows, shown)
                yield batch if self.group.world == 1 else replace(batch, shared=part.shared, idle=part.idle)

    def _mine(self, epoch: int, start: int = 0) -> tuple[Points, list[Share]]:
        """Return this process's points of an epoch, and its share of each batch."""
        points = self.sampler.points(epoch)
        size = self.sampler.optimizer.batch_size
        mine, parts = deal(len(points), size, self.group.rank, self.group.world, start)
        return points.part(mine), parts


def iterate(
    source: Source,
    epoch: int,
    *,
    batch_size: int,
    seed: int = 0,
    device: torch.device = CPU,
    start: int = 0,
    workers: int | None = None,
) -> Iterator[Batch]:
    """Yield the batches of one epoch over all points of the manifest, from number `start` on.

    The last one may be smaller, or have one point more: a single point left over joins the batch before.
    """
    chosen = OptimizerSettings(batch_size=batch_size, seed=seed)
    sampler = Sampler(manifest=source.manifest, optimizer=chosen)
    made = HostBatches(source=source, sampler=sampler, device=device, workers=workers)
    return made.epoch(epoch, sum(batch_sizes(len(source.manifest), batch_size)[:start]))


def make_batch(
    source: Source,
    plan: Plan,
    device: torch.device = CPU,
    planned: tuple[PlannedRows, slice] | None = None,
    shown: Iterator[Tensor] | None = None,
) -> Batch:
    """Return the points of a plan as a batch on the device.

    `planned` are the teacher's rows of the epoch and the batch's slice of them; `shown` yields the views.
    """
    mixer, temperature, labels = source.mixer, source.mixing.temperature, source.data.train.labels
    views = shown or (rules.show(source.rule, source.data.train.images(i), p, device) for i, p in plan.asked())
    own: Mapping[str, Tensor] = {}
    if planned is not None:
        own = planned[0].gather(planned[1], temperature, device)
    elif mixer.own is not None:
        own = mixer.own(plan.index, temperature, device)
    is_mixed = plan.partner >= 0
    plain = Batch(
        index=torch.from_numpy(plan.index).to(device),
        pixels=next(views),
        labels=torch.from_numpy(labels[plan.index]).to(device),
        partner_labels=torch.from_numpy(labels[np.where(is_mixed, plan.partner, plan.index)]).to(device),
        mixed=torch.from_numpy(is_mixed).to(device),
        epsilon=torch.from_numpy(plan.epsilon).to(device),
        weight=torch.from_numpy(plan.weight).to(device),
        knowledge=own,
    )
    if not is_mixed.any():
        return replace(plain, probabilities=mixer.softened(own))
    where = np.flatnonzero(is_mixed)
    return mixer.mixed(plain, torch.from_numpy(where).to(device), next(views), plan.index[where], plan.partner[where])


def mixed_views(
    source: Source, rows: Int64[np.ndarray, " batch"], view: int, device: torch.device
) -> Float32[Tensor, "batch c h w"]:
    """Return the mixed images of some of the manifest's K_Aug rows in one view, as the student sees them."""
    images, kept, dropped = source.data.train, source.manifest.index[rows], source.manifest.partner[rows]
    pixels, others = (
        rules.show(source.rule, images.images(index), rules.parameters(source.rule, index, view), device)
        for index in (kept, dropped)
    )
    epsilon = torch.from_numpy(source.manifest.epsilon[rows]).to(device)
    return mix_pixels(pixels, others, epsilon, source.mixing.mix)


class KnowledgePoints(TorchDataset[dict[str, Any]]):
    """A map-style data set of a manifest's points for torch's DataLoader.

    Item i is the epoch's i-th point as a dict of `Batch`'s fields without the batch axis. Do not shuffle; call
    `set_epoch` before each epoch instead, which also reaches workers that stay (`persistent_workers`). A worker that
    was spawned, or stays for another epoch, reads the rows of the epoch's view itself.
    """

    def __init__(self, source: Source, *, seed: int = 0) -> None:
        self._source = source
        self._sampler = Sampler(manifest=source.manifest, optimizer=OptimizerSettings(seed=seed))
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._made: tuple[int, Plan] | None = None
        """the epoch that this process has prepared, and its plan"""
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch, which sets order and view, here and in all workers; not while one is being read."""
        if epoch < 0:
            raise SettingsError(f"set_epoch takes the number of an epoch, from 0 on; found {epoch}")
        self._epoch.fill_(epoch)
        self._plan()

    def _plan(self) -> Plan:
        """Return the plan of the epoch, with the teacher's rows loaded."""
        epoch = int(self._epoch)
        if self._made is None or self._made[0] != epoch:
            self._made = epoch, plan_epoch(self._source, epoch, self._sampler.points(epoch))
        # a worker loads nothing ahead: each would hold two views
        source = self._source if get_worker_info() is None else replace(self._source, stop=epoch + 1)
        source.prepare(epoch)  # at once unless another view is current: a source may have other readers
        return self._made[1]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_made": None}

    def __len__(self) -> int:
        return len(self._source.manifest)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Return several items with one gather; torch's DataLoader calls this."""
        batch = make_batch(self._source, self._plan().part(np.asarray(numbers)))
        rows = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
        rows |= {f"teacher_{name}": value for name, value in batch.knowledge.items()}
        return [{name: value[row] for name, value in rows.items()} for row in range(len(numbers))]
