"""Batches made on the device from images, view parameters and knowledge held there: no copy and no wait in a step."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from kcdcache.datasets.images import Split
from kcdcache.methods.base import Batch
from kcdcache.store.rows import StoredTargets
from kcdcache.training.batches import Mixer, Source
from kcdcache.training.processes import batch_sizes
from kcdcache.training.sampling import Sampler, everything
from kcdcache.views import rules
from kcdcache.views.prefetch import every_image, image_bytes, images_obstacle, room_obstacle


def obstacle(source: Source, device: torch.device, free: int | None = None) -> str | None:
    """Return why a source's data cannot be held on the device, or None; for `free` see `prefetch.room_obstacle`."""
    if (found := images_obstacle(source.data.train, source.rule)) is not None:
        return found
    if not all(targets is None or isinstance(targets, StoredTargets) for targets in (source.targets, source.requeried)):
        return "its targets are not those of a store"
    return room_obstacle(bytes_of(source), device, free)


def bytes_of(source: Source) -> int:
    """Return the bytes of a source's images, view parameters and knowledge of one view on the device."""
    images = sum(image_bytes(split, source.rule) for split in (source.data.train, source.data.test))
    rows = sum(targets.view_bytes for targets in source.stored)
    return images + rows + 64 * len(source.data.train)


def hold(split: Split, rule: rules.ViewRule, device: torch.device) -> rules.HeldImages | None:
    """Return a split's images on the device, or None if they cannot be held there."""
    if images_obstacle(split, rule) is not None:
        return None
    return rules.HeldImages(rule, every_image(split), device)


class DeviceBatches:
    """Batches made on one device, with the bytes of `HostBatches` from the same source and sampler.

    Memory has fixed addresses and the device counts the position in the epoch, so that CUDA graphs can record batches.
    """

    def __init__(self, source: Source, sampler: Sampler, device: torch.device) -> None:
        """Hold the images of a source without `obstacle`."""
        split = source.data.train
        self._source, self._sampler, self._size = source, sampler, sampler.optimizer.batch_size
        self._images = rules.HeldImages(source.rule, every_image(split), device)
        self._labels = torch.from_numpy(np.array(split.labels)).to(device)
        self._count = 0
        whole = vars(everything(sampler, 0))
        self._points = {name: torch.from_numpy(np.array(column)).to(device) for name, column in whole.items()}
        """the points of the current epoch in order; those after `_count` are left over"""
        self._cursor = torch.zeros((), dtype=torch.int64, device=device)
        self._offsets = torch.arange(self._size + 1, device=device)  # a single point left over joins the last batch
        self._parameters = self._images.parameters(0)
        self._view = 0
        held = (source.targets, source.requeried)
        self._held = [_HeldTargets(one, device) if isinstance(one, StoredTargets) else None for one in held]
        self._mixer = Mixer(source.mixing, *(None if one is None else one.gather for one in self._held))

    def begin(self, epoch: int, start: int = 0) -> list[int]:
        """Go to an epoch's point number `start` and load its view; return the sizes of the remaining batches."""
        view, points = self._source.view_of(epoch), self._sampler.points(epoch)
        self._count = len(points)
        for name, column in vars(points).items():
            self._points[name][: self._count].copy_(torch.from_numpy(column))
        self._cursor.fill_(start)
        if view != self._view:
            self._parameters.copy_(self._images.parameters(view))
            self._view = view
        self._source.prepare(epoch)
        for held in self._held:
            if held is not None:
                held.load(view)
        return batch_sizes(self._count - start, self._size)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Yield an epoch's batches after its first `start` points, cut as in `processes.batch_sizes`."""
        for size in self.begin(number, start):
            yield self.batch(size)

    def batch(self, size: int) -> Batch:
        """Return the next batch."""
        mixer, place = self._mixer, self._cursor + self._offsets[:size]
        self._cursor += size
        index, partner, epsilon, weight = (
            self._points[name].index_select(0, place) for name in ("index", "partner", "epsilon", "weight")
        )
        other = torch.where(partner >= 0, partner, index)
        plain = Batch(
            index=index,
            pixels=self._images.views(index, self._parameters),
            labels=self._labels.index_select(0, index),
            partner_labels=self._labels.index_select(0, other),
            mixed=partner >= 0,
            epsilon=epsilon,
            weight=weight,
            knowledge={} if mixer.own is None else mixer.own(index, mixer.mixing.temperature, index.device),
        )
        if not self._sampler.mixes:
            return replace(plain, probabilities=mixer.softened(plain.knowledge))
        return mixer.mixed(plain, None, self._images.views(other, self._parameters), index, other)


class _HeldTargets:
    """The rows of a store's current view on the device, at fixed addresses."""

    def __init__(self, targets: StoredTargets, device: torch.device) -> None:
        self._targets, self._device = targets, device
        self._place = torch.from_numpy(targets.positions).to(device).clamp_min(0)
        self._rows: dict[str, Tensor] = {}
        self._view: int | None = None

    def load(self, view: int) -> None:
        """Copy the rows of a view, which the targets have loaded."""
        if view == self._view:
            return
        for name, rows in self._targets.rows.items():
            known = torch.from_numpy(rows.view(np.int16) if rows.dtype == np.uint16 else rows)
            if name in self._rows:
                self._rows[name].copy_(known)
            else:
                self._rows[name] = known.to(self._device, copy=True)
        self._view = view

    def gather(self, index: Int64[Tensor, " batch"], temperature: float, device: torch.device) -> dict[str, Tensor]:
        """Return field -> float32 targets; a sample without a row gets those of another one."""
        place = self._place.index_select(0, index)
        taken = {name: rows.index_select(0, place) for name, rows in self._rows.items()}
        return self._targets.decode(taken, temperature)
