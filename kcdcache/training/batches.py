"""Manifest + data + views + store -> device batches: order, views, mixing, teacher targets."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from kcdcache.condense.manifest import Manifest, require_knowledge
from kcdcache.data.datasets import Dataset
from kcdcache.errors import MismatchError, require_same
from kcdcache.store.check import check_data
from kcdcache.store.reader import Store
from kcdcache.store.rows import PlannedRows, StoredTargets, Targets
from kcdcache.teacher import fields
from kcdcache.training import processes, sampling
from kcdcache.training.sampling import Draw
from kcdcache.views import prefetch, rules
from kcdcache.views.mixing import mix_pixels, mix_probabilities


def mixed_targets(
    mixes: Store, manifest: Manifest, mix: str, fields: Sequence[str], *, memory_bytes: float, folder: Path
) -> StoredTargets:
    """Return the targets of the mixed points: row j of their store is the j-th K_Aug point by index.

    Raises:
        MismatchError: the store holds the outputs on other mixes, or lacks a field.
    """
    held = {key: (mixes.knowledge.mixes or {}).get(key) for key in ("manifest", "mix")}
    names = (f"the mixes of the store at {mixes.path}", "those asked for")
    remedy = "make them with `kcdcache precompute --manifest` for this manifest and mix"
    require_same(held, {"manifest": manifest.digest, "mix": mix}, names, remedy)
    numbers = (mixes.knowledge.mixes or {})["views"]
    index = manifest.index[manifest.mixed]
    return StoredTargets(
        mixes,
        index,
        fields,
        memory_bytes=memory_bytes,
        folder=folder,
        rows=np.arange(len(index)),
        slots={view: slot for slot, view in enumerate(numbers)},
        count=manifest.count,
    )


CPU = torch.device("cpu")
MEMORY_BYTES = 8 * 2**30


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How a point of K_Aug is made; see config.MethodSettings."""

    mix: str = "convex"
    target: str = "linear_prob"
    temperature: float = 1.0
    """T at which probabilities are made and mixed"""


DEFAULT_MIXING = Mixing()


@dataclass(frozen=True, kw_only=True)
class Source:
    """What an epoch's batches are made from."""

    data: Dataset
    rule: rules.ViewRule
    views: int | None
    """number of cached views V; epoch e uses view e mod V; None for an endless rule"""
    manifest: Manifest
    targets: Targets | None = None
    """teacher outputs of single points, or None when nothing is distilled"""
    requeried: Targets | None = None
    """teacher outputs of mixed points (mix_target = requery)"""
    mixing: Mixing = DEFAULT_MIXING
    stop: int | None = None
    """first epoch that will not use this source, for which nothing is fetched ahead; None if that is not known"""

    def view_of(self, epoch: int) -> int:
        """Return the number of the view that an epoch uses."""
        return epoch if self.views is None else epoch % self.views

    def prepare(self, epoch: int, mine: Draw | None = None, later: Draw | None = None) -> None:
        """Load the teacher outputs an epoch needs, and start loading the next epoch's in the background.

        Only those of the points `mine`, and in the next epoch of `later` (nothing if it is not given), where one of
        several processes needs no more.
        """
        known = epoch + 1 != self.stop and (mine is None or later is not None)
        following = self.view_of(epoch + 1) if known else None
        own = Draw.samples if self.requeried is None else Draw.visited
        for targets, needed in ((self.targets, own), (self.requeried, Draw.mixed)):
            if targets is not None:
                parts = () if mine is None else (needed(mine), None if later is None else needed(later))
                targets.prepare(self.view_of(epoch), following, *parts)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's samples on the device, K_Aug points already mixed."""

    index: Int64[Tensor, " batch"]
    pixels: Float32[Tensor, "batch channels height width"]
    """in [0, 1], channels_last; each network applies its own input transform"""
    labels: Int64[Tensor, " batch"]
    partner_labels: Int64[Tensor, " batch"]
    """label of the point mixed in; the own label where nothing is"""
    mixed: Bool[Tensor, " batch"]
    epsilon: Float32[Tensor, " batch"]
    """share of the partner, 0 for K_1H"""
    weight: Float32[Tensor, " batch"]
    probabilities: Float32[Tensor, "batch classes"] | None
    """teacher probabilities at the distillation temperature, mixed as the target rule says"""
    knowledge: Mapping[str, Tensor]
    """the teacher's fields as float32, mixed as `fields.mix` says"""
    shared: int | None = None
    """number of samples of this step in all processes together; None if it is all here"""
    idle: bool = False
    """whether this process has no sample of the step, and this one stands in for it without counting"""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One epoch's samples in order, with everything that integers decide, computed once on the host."""

    view: int
    index: Int64[np.ndarray, " n"]
    partner: Int64[np.ndarray, " n"]
    epsilon: Float32[np.ndarray, " n"]
    weight: Float32[np.ndarray, " n"]
    parameters: Int64[np.ndarray, "n k"]
    partner_parameters: Int64[np.ndarray, "n k"]


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
    """Yield what batches are made from: a manifest's images and views with the teacher's fields for them.

    Only the rows the manifest needs are read, one view at a time. `requeried` is a store of the teacher's outputs on
    the manifest's mixes. Above `memory_bytes` the rows lie in unlinked memory-mapped files in `folder` (the system's
    temporary folder unless given). `cached_views` uses only the first so many views.

    Raises:
        MismatchError: data, manifest and store were not made for each other, or a field is missing.
    """
    check_data(knowledge, data)
    if knowledge.knowledge.mixes is not None:
        raise MismatchError(f"{knowledge.path} holds outputs on a manifest's mixes, not on the data's own samples")
    require_knowledge(manifest, knowledge.knowledge_id)
    rule = rules.rule_of(knowledge.knowledge.views)
    held_views = knowledge.views if cached_views is None else min(cached_views, knowledge.views)
    plain = Source(data=data, rule=rule, views=held_views, manifest=manifest, mixing=mixing)
    if not fields:
        yield plain
        return
    place = Path(tempfile.gettempdir()) if folder is None else folder
    rows = needed_rows(manifest, requeried is not None)
    with ExitStack() as held:
        targets = held.enter_context(StoredTargets(knowledge, rows, fields, memory_bytes=memory_bytes, folder=place))
        again = None
        if requeried is not None:
            found = mixed_targets(requeried, manifest, mixing.mix, fields, memory_bytes=memory_bytes, folder=place)
            again = held.enter_context(found)
        yield replace(plain, targets=targets, requeried=again)


def plan_epoch(source: Source, epoch: int, seed: int, drawn: Draw | None = None) -> Epoch:
    """Return the samples, partners and view parameters of one epoch; a pure function of its arguments.

    `drawn` are the points it visits; all of the manifest, in the epoch's order, unless given.
    """
    chosen = sampling.everything(source.manifest, seed, epoch) if drawn is None else drawn
    view = source.view_of(epoch)
    parameters = rules.parameters(source.rule, chosen.index, view)
    partner_parameters = np.zeros_like(parameters)
    mixed = chosen.partner >= 0
    partner_parameters[mixed] = rules.parameters(source.rule, chosen.partner[mixed], view)
    return Epoch(view=view, parameters=parameters, partner_parameters=partner_parameters, **vars(chosen))


def iterate(
    source: Source,
    epoch: int,
    *,
    batch_size: int,
    seed: int = 0,
    device: torch.device = CPU,
    start: int = 0,
    drawn: Draw | None = None,
    workers: int | None = None,
    rank: int = 0,
    world: int = 1,
    later: Draw | None = None,
) -> Iterator[Batch]:
    """Yield the batches of one epoch; the last may be smaller; the same arguments yield the same bytes.

    Arguments:
        start: number of the first batch, to continue inside an epoch.
        drawn: the points it visits, as for `plan_epoch`.
        workers: threads that make views ahead where that pays, as for `prefetch.shown`.
        rank, world: yield only points rank, rank + world, ... of each batch, as one of so many processes; the teacher's
            outputs of these alone are loaded, unless all epochs have the same view.
        later: this one of several processes' points of the next epoch, to be fetched ahead, if they are known.
    """
    every = sampling.everything(source.manifest, seed, epoch) if drawn is None else drawn
    mine, parts = processes.deal(len(every.index), batch_size, rank, world)
    own = every.part(mine)
    plan = plan_epoch(source, epoch, seed, own)
    if world == 1 or source.views == 1:
        source.prepare(epoch)
    else:
        source.prepare(epoch, own, later)
    planned = source.targets.plan(plan.index) if isinstance(source.targets, StoredTargets) else None
    parts = parts[start:]
    asked = (one for part in parts for one in _asked(plan, part.mine))
    with ExitStack() as held:
        shown = None
        if prefetch.pays(source.data.train, source.rule):
            shown = held.enter_context(closing(prefetch.shown(source.data.train, source.rule, asked, device, workers)))
        for part in parts:
            batch = make_batch(source, plan, part.mine, device, planned, shown)
            yield batch if world == 1 else replace(batch, shared=part.shared, idle=part.idle)


def make_batch(
    source: Source,
    plan: Epoch,
    part: slice,
    device: torch.device,
    planned: PlannedRows | None = None,
    shown: Iterator[Tensor] | None = None,
) -> Batch:
    """Return one slice of an epoch as a batch on the device.

    `planned` are the teacher's rows of its samples, `shown` gives their views, then those of partners if there are any.
    """
    index, partner = plan.index[part], plan.partner[part]
    where = np.flatnonzero(partner >= 0)
    labels = source.data.train.labels
    epsilon = torch.from_numpy(plan.epsilon[part]).to(device)
    seen = shown or (_view(source, *one, device) for one in _asked(plan, part))
    pixels = next(seen)
    if len(where):
        other = next(seen)
        spot = torch.from_numpy(where).to(device)
        pixels[spot] = mix_pixels(pixels[spot], other, epsilon[spot], source.mixing.mix)
    if planned is not None:
        own = planned.gather(part, source.mixing.temperature, device)
    else:
        own = {} if source.targets is None else source.targets.gather(index, source.mixing.temperature, device)
    probabilities, knowledge = _taught(source, own, index, partner, where, epsilon, device)
    return Batch(
        index=torch.from_numpy(index).to(device),
        pixels=pixels,
        labels=torch.from_numpy(labels[index]).to(device),
        partner_labels=torch.from_numpy(labels[np.where(partner >= 0, partner, index)]).to(device),
        mixed=torch.from_numpy(partner >= 0).to(device),
        epsilon=epsilon,
        weight=torch.from_numpy(plan.weight[part]).to(device),
        probabilities=probabilities,
        knowledge=knowledge,
    )


def mixed_views(
    source: Source, rows: Int64[np.ndarray, " batch"], view: int, device: torch.device
) -> Float32[Tensor, "batch c h w"]:
    """Return the mixed images of the manifest's given K_Aug rows in one view, as the student will see them."""
    index, partner = source.manifest.index[rows], source.manifest.partner[rows]
    kept = _view(source, index, rules.parameters(source.rule, index, view), device)
    dropped = _view(source, partner, rules.parameters(source.rule, partner, view), device)
    epsilon = torch.from_numpy(source.manifest.epsilon[rows]).to(device)
    return mix_pixels(kept, dropped, epsilon, source.mixing.mix)


def needed_rows(manifest: Manifest, requeried: bool = False) -> Int64[np.ndarray, " rows"]:
    """Return the samples whose knowledge a stage reads: kept and partners, ascending, each once.

    Where the teacher was asked again about the mixes, no partner's own knowledge is needed.
    """
    if requeried:
        return manifest.index
    needed = np.zeros(manifest.count, bool)
    needed[manifest.index] = True
    needed[manifest.partner[manifest.mixed]] = True
    return np.flatnonzero(needed)


class KnowledgePoints(TorchDataset[dict[str, Any]]):
    """A map-style data set of a manifest's points for one epoch, for use with torch's DataLoader.

    Item i is the i-th point in the epoch's order as a dict of `Batch`'s fields without the batch axis; leave shuffling
    to it. Call `set_epoch` before each epoch: it selects the order and the view.
    """

    def __init__(self, source: Source, *, seed: int = 0) -> None:
        self._source, self._seed = source, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, drawn: Draw | None = None) -> None:
        """Select the epoch whose order and view the items have, and its points, as for `plan_epoch`."""
        self._plan = plan_epoch(self._source, epoch, self._seed, drawn)
        self._source.prepare(epoch)

    def __len__(self) -> int:
        return len(self._plan.index)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Return several items with one gather; torch's DataLoader calls this when it exists."""
        plan, chosen = self._plan, np.asarray(numbers)
        picked = Epoch(view=plan.view, **{key: value[chosen] for key, value in vars(plan).items() if key != "view"})
        batch = make_batch(self._source, picked, slice(None), CPU)
        return [_item(batch, row) for row in range(len(numbers))]


def _item(batch: Batch, row: int) -> dict[str, Any]:
    item = {name: value[row] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return item | {f"teacher_{name}": value[row] for name, value in batch.knowledge.items()}


def _asked(plan: Epoch, part: slice) -> Iterator[prefetch.Asked]:
    """Yield which views a slice of an epoch shows: those of its samples, then those of partners if there are any."""
    yield prefetch.Asked(plan.index[part], plan.parameters[part])
    partner = plan.partner[part]
    if len(where := np.flatnonzero(partner >= 0)):
        yield prefetch.Asked(partner[where], plan.partner_parameters[part][where])


def _view(source: Source, index: np.ndarray, parameters: np.ndarray, device: torch.device) -> Tensor:
    return rules.show(source.rule, source.data.train.images(index), parameters, device)


def _taught(
    source: Source,
    own: dict[str, Tensor],
    index: np.ndarray,
    partner: np.ndarray,
    where: np.ndarray,
    epsilon: Tensor,
    device: torch.device,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Return the target probabilities and all fields of a batch, mixed where a point has a partner.

    `own` are the fields of the points themselves, which this may change.
    """
    if source.targets is None:
        return None, {}
    temperature = source.mixing.temperature
    probabilities = (own["logits"] / temperature).softmax(1) if "logits" in own else None
    if not len(where):
        return probabilities, own
    spot = torch.from_numpy(where).to(device)
    if source.requeried is not None:
        seen = source.requeried.gather(index[where], temperature, device)
        if probabilities is not None:
            probabilities[spot] = (seen["logits"] / temperature).softmax(1)
        return probabilities, {name: _put(own[name], spot, seen[name]) for name in own}
    return _mixed_in(source, own, probabilities, partner[where], where, epsilon[spot], device)


def _mixed_in(
    source: Source,
    own: dict[str, Tensor],
    probabilities: Tensor | None,
    partner: np.ndarray,
    where: np.ndarray,
    share: Tensor,
    device: torch.device,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Mix the outputs on partners into those of some points of a batch."""
    assert source.targets is not None
    rule, temperature = source.mixing.target, source.mixing.temperature
    spot = torch.from_numpy(where).to(device)
    other = source.targets.gather(partner, temperature, device)
    if probabilities is not None:
        probabilities[spot] = mix_probabilities(own["logits"][spot], other["logits"], share, rule, temperature)
    if rule == "keep":
        return probabilities, own
    mixed = {name: fields.mix(name, own[name][spot], other[name], share) for name in own}
    return probabilities, {name: _put(own[name], spot, mixed[name]) for name in own}


def _put(target: Tensor, spot: Tensor, value: Tensor) -> Tensor:
    target[spot] = value
    return target
