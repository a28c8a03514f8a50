"""Batches made where images, view parameters and knowledge lie on the device: no copy and no wait in a step."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from kcdcache.data.images import Split
from kcdcache.settings import OptimizerSettings
from kcdcache.store.rows import StoredTargets
from kcdcache.teacher import fields
from kcdcache.training import batches, evaluation, processes
from kcdcache.training.batches import Batch, Source
from kcdcache.training.learner import Learner
from kcdcache.training.sampling import Draw, Sampler, everything
from kcdcache.views import rules
from kcdcache.views.mixing import mix_pixels, mix_probabilities
from kcdcache.views.prefetch import image_bytes, images_obstacle, room_obstacle, wanted


class Supply(NamedTuple):
    """Where a run's batches and test images come from."""

    batches: Callable[[int, int], Iterator[Batch]]
    """(epoch, first step) -> that epoch's remaining batches"""
    evaluate: Callable[[], dict[str, float]]
    """measurements of the network on the test split"""
    feed: "Feed | None"
    """what makes the batches, if they are made on the device"""


def supply(settings: OptimizerSettings, source: Source, pupil: Learner, sampler: Sampler | None = None) -> Supply:
    """Return what feeds a run: batches made on the device as `settings.resident` says, else copied there one by one.

    `sampler` chooses an epoch's points; without one, all are visited.

    Raises:
        SettingsError: resident = on, and the data cannot lie on the device; says why.
    """
    test, plain = source.data.test, rules.plain(source.rule)

    def measured(held: rules.HeldImages | None) -> Callable[[], dict[str, float]]:
        return lambda: evaluation.measure(
            pupil.network, pupil.transform, test, plain, pupil.device, held, settings.workers
        )

    group = pupil.group
    if group.world == 1 and wanted(settings.resident, obstacle(source, pupil.device), pupil.device):
        feed = Feed(source, pupil.device, batch_size=settings.batch_size, seed=settings.seed, sampler=sampler)
        return Supply(feed.iterate, measured(hold(test, plain, pupil.device)), feed)

    def streamed(epoch: int, start: int) -> Iterator[Batch]:
        given = {"batch_size": settings.batch_size, "seed": settings.seed, "start": start}
        given |= {"rank": group.rank, "world": group.world}
        drawn = None if sampler is None else sampler.draw(epoch)
        return batches.iterate(
            source, epoch, device=pupil.device, drawn=drawn, workers=settings.workers, later=coming(epoch), **given
        )

    def coming(epoch: int) -> Draw | None:
        """Return what this one of several processes takes of the next epoch, if that is known."""
        if group.world == 1 or sampler is None or epoch + 1 == source.stop:
            return None
        if (later := sampler.ahead(epoch + 1)) is None:
            return None
        return later.part(processes.deal(len(later.index), settings.batch_size, group.rank, group.world).points)

    return Supply(streamed, measured(None), None)


def obstacle(source: Source, device: torch.device, free: int | None = None) -> str | None:
    """Return why a source's data cannot lie on the device, None if they can.

    Arguments:
        free: bytes that may be taken; on a GPU, a share of what is free there unless given.
    """
    if (found := images_obstacle(source.data.train, source.rule)) is not None:
        return found
    if any(targets is not None and not isinstance(targets, StoredTargets) for targets in _targets(source)):
        return "its targets are not those of a store"
    return room_obstacle(bytes_of(source), device, free)


def bytes_of(source: Source) -> int:
    """Return the bytes that a source's images, view parameters and knowledge of one view take on the device."""
    images = sum(image_bytes(split, source.rule) for split in (source.data.train, source.data.test))
    rows = sum(targets.view_bytes for targets in _targets(source) if isinstance(targets, StoredTargets))
    return images + rows + 64 * len(source.data.train)


def hold(split: Split, rule: rules.ViewRule, device: torch.device) -> rules.HeldImages | None:
    """Return a split's images on the device, or None where they cannot lie there."""
    if images_obstacle(split, rule) is not None:
        return None
    return rules.HeldImages(rule, np.asarray(split.images(np.arange(len(split)))), device)


class Feed:
    """Makes an epoch's batches on one device: the bytes of `batches.iterate` from the same source.

    A batch is made from memory at fixed addresses, without the host's help, so that it can be part of a CUDA graph:
    which samples it holds is counted on the device.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device,
        *,
        batch_size: int,
        seed: int = 0,
        sampler: Sampler | None = None,
    ) -> None:
        split = source.data.train
        self._source, self._seed, self._sampler, self._size = source, seed, sampler, batch_size
        self._images = rules.HeldImages(source.rule, np.asarray(split.images(np.arange(len(split)))), device)
        self._labels = torch.from_numpy(np.array(split.labels)).to(device)
        plain = everything(source.manifest, seed, 0)
        self._points = {name: torch.from_numpy(np.array(column)).to(device) for name, column in vars(plain).items()}
        """the points of the current epoch, in order; those behind `_count` are an earlier one's"""
        self._count = len(plain.index)
        self._mixes = bool(source.manifest.mixed.any()) or (sampler is not None and sampler.mixes)
        self._cursor = torch.zeros((), dtype=torch.int64, device=device)
        self._offsets = torch.arange(batch_size, device=device)
        self._parameters = self._images.parameters(0)
        self._view = 0
        self._own, self._requeried = (
            _HeldTargets(targets, device) if isinstance(targets, StoredTargets) else None
            for targets in _targets(source)
        )

    def begin(self, epoch: int, start: int) -> None:
        """Go to batch number `start` of an epoch; loads what its view needs."""
        view = self._source.view_of(epoch)
        sampler = self._sampler
        drawn = everything(self._source.manifest, self._seed, epoch) if sampler is None else sampler.draw(epoch)
        self._count = len(drawn.index)
        for name, column in vars(drawn).items():
            self._points[name][: self._count].copy_(torch.from_numpy(column))
        self._cursor.fill_(start * self._size)
        if view != self._view:
            self._parameters.copy_(self._images.parameters(view))
            self._view = view
        self._source.prepare(epoch)
        for held in (self._own, self._requeried):
            if held is not None:
                held.load(view)

    def sizes(self, start: int) -> list[int]:
        """Return the sizes of an epoch's batches from number `start` on; the last may be smaller."""
        return [min(self._size, self._count - low) for low in range(start * self._size, self._count, self._size)]

    def iterate(self, epoch: int, start: int) -> Iterator[Batch]:
        """Yield an epoch's remaining batches, as `batches.iterate` does."""
        self.begin(epoch, start)
        for size in self.sizes(start):
            yield self.batch(size)

    def batch(self, size: int) -> Batch:
        """Return the next batch."""
        place = self._cursor + self._offsets[:size]
        self._cursor += size
        index, partner, epsilon, weight = (
            self._points[name].index_select(0, place) for name in ("index", "partner", "epsilon", "weight")
        )
        mixed = partner >= 0
        other = torch.where(mixed, partner, index)
        probabilities, knowledge = self._taught(index, other, mixed, epsilon)
        return Batch(
            index=index,
            pixels=self._pixels(index, other, epsilon),
            labels=self._labels.index_select(0, index),
            partner_labels=self._labels.index_select(0, other),
            mixed=mixed,
            epsilon=epsilon,
            weight=weight,
            probabilities=probabilities,
            knowledge=knowledge,
        )

    def _pixels(self, index: Tensor, other: Tensor, epsilon: Tensor) -> Float32[Tensor, "batch c h w"]:
        """Return the views, mixed with those of `other`; a share of 0 leaves pixels as they are, to the bit."""
        pixels = self._images.views(index, self._parameters)
        if not self._mixes:
            return pixels
        return mix_pixels(pixels, self._images.views(other, self._parameters), epsilon, self._source.mixing.mix)

    def _taught(
        self,
        index: Int64[Tensor, " batch"],
        other: Int64[Tensor, " batch"],
        mixed: Bool[Tensor, " batch"],
        epsilon: Float32[Tensor, " batch"],
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        if self._own is None:
            return None, {}
        mixing = self._source.mixing
        temperature = mixing.temperature
        own = self._own.take(index, temperature)
        plain = (own["logits"] / temperature).softmax(1) if "logits" in own else None
        if not self._mixes:
            return plain, own
        taught, values = plain, own
        if self._requeried is not None:
            values = self._requeried.take(index, temperature)
            taught = None if plain is None else (values["logits"] / temperature).softmax(1)
        else:
            seen = self._own.take(other, temperature)
            if plain is not None:
                taught = mix_probabilities(own["logits"], seen["logits"], epsilon, mixing.target, temperature)
            if mixing.target != "keep":
                values = {name: fields.mix(name, own[name], seen[name], epsilon) for name in own}
        chosen = None if taught is None or plain is None else _where(mixed, taught, plain)
        return chosen, {name: _where(mixed, values[name], own[name]) for name in own}


class _HeldTargets:
    """The rows of a store's current view on the device, at the same addresses for every view."""

    def __init__(self, targets: StoredTargets, device: torch.device) -> None:
        self._targets, self._device = targets, device
        self._place = torch.from_numpy(targets.positions).to(device).clamp_min(0)
        self._rows: dict[str, Tensor] = {}
        self._view: int | None = None

    def load(self, view: int) -> None:
        """Copy the rows of the view that the targets have prepared."""
        if view == self._view:
            return
        for name, rows in self._targets.rows.items():
            known = torch.from_numpy(rows.view(np.int16) if rows.dtype == np.uint16 else rows)
            if name in self._rows:
                self._rows[name].copy_(known)
            else:
                self._rows[name] = known.to(self._device, copy=True)
        self._view = view

    def take(self, index: Int64[Tensor, " batch"], temperature: float) -> dict[str, Tensor]:
        """Return field -> float32 targets; of a sample that has no row, those of another one."""
        place = self._place.index_select(0, index)
        taken = {name: rows.index_select(0, place) for name, rows in self._rows.items()}
        return self._targets.decode(taken, temperature)


def _targets(source: Source) -> tuple[object, object]:
    return source.targets, source.requeried


def _where(mixed: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mixed.view(-1, *[1] * (old.ndim - 1)), new, old)
