"""Batches made where images, view parameters and knowledge lie on the device: no copy and no wait in a step."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from kcdcache.data.images import Split
from kcdcache.methods.base import Batch
from kcdcache.store.rows import StoredTargets
from kcdcache.training.batches import HostBatches, Mixer, Source
from kcdcache.training.processes import ALONE, Group
from kcdcache.training.sampling import Sampler, everything
from kcdcache.views import rules
from kcdcache.views.prefetch import every_image, image_bytes, images_obstacle, room_obstacle, wanted


def batches_of(
    source: Source, sampler: Sampler, device: torch.device, group: Group = ALONE
) -> "HostBatches | DeviceBatches":
    """Return what makes a run's batches: on the device as its `resident` says, else on the host.

    Raises:
        SettingsError: resident = on, and the data cannot lie on the device; says why.
    """
    settings = sampler.optimizer
    if group.world == 1 and wanted(settings.resident, obstacle(source, device), device):
        return DeviceBatches(source, sampler, device)
    return HostBatches(source=source, sampler=sampler, device=device, workers=settings.workers, group=group)


def obstacle(source: Source, device: torch.device, free: int | None = None) -> str | None:
    """Return why a source's data cannot lie on the device, None if they can.

    Arguments:
        free: bytes that may be taken; on a GPU, a share of what is free there unless given.
    """
    if (found := images_obstacle(source.data.train, source.rule)) is not None:
        return found
    if not all(targets is None or isinstance(targets, StoredTargets) for targets in (source.targets, source.requeried)):
        return "its targets are not those of a store"
    return room_obstacle(bytes_of(source), device, free)


def bytes_of(source: Source) -> int:
    """Return the bytes that a source's images, view parameters and knowledge of one view take on the device."""
    images = sum(image_bytes(split, source.rule) for split in (source.data.train, source.data.test))
    rows = sum(targets.view_bytes for targets in source.stored)
    return images + rows + 64 * len(source.data.train)


def hold(split: Split, rule: rules.ViewRule, device: torch.device) -> rules.HeldImages | None:
    """Return a split's images on the device, or None where they cannot lie there."""
    if images_obstacle(split, rule) is not None:
        return None
    return rules.HeldImages(rule, every_image(split), device)


class DeviceBatches:
    """Batches made on one device: the bytes of `HostBatches` from the same source and sampler.

    A batch is made from memory at fixed addresses, without the host's help, so that it can be part of a CUDA graph:
    which samples it holds is counted on the device.
    """

    def __init__(self, source: Source, sampler: Sampler, device: torch.device) -> None:
        """Hold the images of a source that has no `obstacle`."""
        split = source.data.train
        self._source, self._sampler, self._size = source, sampler, sampler.optimizer.batch_size
        self._images = rules.HeldImages(source.rule, every_image(split), device)
        self._labels = torch.from_numpy(np.array(split.labels)).to(device)
        self._count = 0
        whole = vars(everything(sampler, 0))
        self._points = {name: torch.from_numpy(np.array(column)).to(device) for name, column in whole.items()}
        """the points of the current epoch, in order; those behind `_count` are an earlier one's"""
        self._cursor = torch.zeros((), dtype=torch.int64, device=device)
        self._offsets = torch.arange(self._size, device=device)
        self._parameters = self._images.parameters(0)
        self._view = 0
        held = (source.targets, source.requeried)
        self._held = [_HeldTargets(one, device) if isinstance(one, StoredTargets) else None for one in held]
        self._mixer = Mixer(source.mixing, *(None if one is None else one.gather for one in self._held))

    def begin(self, epoch: int, start: int = 0) -> list[int]:
        """Go to batch number `start` of an epoch and load what its view needs; return the sizes of its batches."""
        view, points = self._source.view_of(epoch), self._sampler.points(epoch)
        self._count = len(points)
        for name, column in vars(points).items():
            self._points[name][: self._count].copy_(torch.from_numpy(column))
        self._cursor.fill_(start * self._size)
        if view != self._view:
            self._parameters.copy_(self._images.parameters(view))
            self._view = view
        self._source.prepare(epoch)
        for held in self._held:
            if held is not None:
                held.load(view)
        return [min(self._size, self._count - low) for low in range(start * self._size, self._count, self._size)]

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Yield an epoch's batches from number `start` on; the last may be smaller."""
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

    def gather(self, index: Int64[Tensor, " batch"], temperature: float, device: torch.device) -> dict[str, Tensor]:
        """Return field -> float32 targets where they are held; of a sample that has no row, those of another one."""
        place = self._place.index_select(0, index)
        taken = {name: rows.index_select(0, place) for name, rows in self._rows.items()}
        return self._targets.decode(taken, temperature)
