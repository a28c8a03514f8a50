"""Views made ahead by threads, with the bits of `rules.show`; and views of images held on a device."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import lru_cache
from itertools import chain, tee
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from kcdcache.datasets.images import Split
from kcdcache.errors import SettingsError, require_known
from kcdcache.settings import ViewRule
from kcdcache.views import rules

BLOCK = 16
"""images made by one thread at a time; more would leave threads idle at the end of a batch"""
PARAMETERS = 4096
"""samples whose view parameters are computed at a time"""

T = TypeVar("T")
R = TypeVar("R")
Rows = tuple[int, int, int]
"""view, first sample, last sample + 1"""


class Asked(NamedTuple):
    """One batch of views."""

    samples: Int64[np.ndarray, " batch"]
    """at least one"""
    parameters: Int64[np.ndarray, "batch k"]
    """from `rules.parameters`"""


def pays(split: Split, rule: ViewRule) -> bool:
    """Return whether views are worth making ahead: if images are decoded on demand, or resized one by one."""
    return split.on_demand or not rules.can_hold(rule, split.image_size)


def ahead(work: Callable[[T], R], items: Iterable[T], workers: int, depth: int) -> Generator[R, None, None]:
    """Yield work(item) for all items in order, computed by threads at most `depth` items ahead.

    Exceptions are raised in the item's turn. No thread is left once the iterator ends or is closed.
    """
    waiting: deque[Future[R]] = deque()
    with _threads(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def shown(
    split: Split, rule: ViewRule, asked: Iterable[Asked], device: torch.device, workers: int | None = None
) -> Generator[Tensor, None, None]:
    """Yield the views (batch, c, h, w) of each batch in order, on the device.

    If that `pays`, about one batch, and a block per thread, is made ahead by `workers` threads (default: as many as
    torch has). Errors of `Split.images` are raised in the batch's turn.
    """
    if not pays(split, rule):
        yield from (rules.show(rule, split.images(samples), parameters, device) for samples, parameters in asked)
        return
    count = workers or torch.get_num_threads()
    if device.type == "cuda" and device.index is None:  # other threads do not know the current one
        device = torch.device("cuda", torch.cuda.current_device())

    def make(block: tuple[np.ndarray, np.ndarray, bool]) -> tuple[Tensor, bool]:
        samples, parameters, last = block
        return rules.show(rule, split.images(samples, threads=1), parameters, device), last

    batches = iter(asked)
    if (first := next(batches, None)) is None:
        return
    depth, pieces = count + -(-len(first.samples) // BLOCK), []
    with closing(ahead(make, _blocks(chain([first], batches)), count, depth)) as made:
        for pixels, last in made:
            pieces.append(pixels)
            if last:
                yield torch.cat(pieces) if len(pieces) > 1 else pixels
                pieces.clear()


class RowsAhead:
    """Views of consecutive samples for a teacher, made ahead if announced."""

    def __init__(self, split: Split, rule: ViewRule, device: torch.device, workers: int | None = None) -> None:
        """Make a split's views by a rule on a device; for `workers` see `shown`."""
        self._split, self._rule, self._device, self._workers = split, rule, device, workers
        self._coming: Iterator[tuple[Rows, Tensor]] | None = None
        self._view, self._first = -1, 0
        self._made = np.zeros((0, 0), np.int64)

    def __call__(self, view: int, start: int, stop: int) -> Tensor:
        """Return one view (batch, c, h, w) of samples start to stop - 1, pixels in [0, 1]."""
        if self._coming is None:
            asked = self._asked((view, start, stop))
            return rules.show(self._rule, self._split.images(asked.samples), asked.parameters, self._device)
        rows, pixels = next(self._coming)
        assert rows == (view, start, stop), f"rows {rows} were announced, {(view, start, stop)} are asked for"
        return pixels

    @contextmanager
    def announced(self, rows: Iterable[Rows]) -> Iterator[None]:
        """Within this context, make rows ahead; the calls must be for these rows in this order."""
        if not pays(self._split, self._rule):
            yield
            return
        names, rows = tee(rows)
        with closing(shown(self._split, self._rule, map(self._asked, rows), self._device, self._workers)) as made:
            self._coming = zip(names, made, strict=False)
            try:
                yield
            finally:
                self._coming = None

    def _asked(self, rows: Rows) -> Asked:
        view, start, stop = rows
        if view != self._view or start < self._first or stop > self._first + len(self._made):
            index = np.arange(start, min(max(stop, start + PARAMETERS), len(self._split)))
            self._view, self._first, self._made = view, start, rules.parameters(self._rule, index, view)
        return Asked(np.arange(start, stop), self._made[start - self._first : stop - self._first])


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool whose threads use one core each, as teams of cores would wait for each other.

    torch keeps a count per thread and one for new threads, which a thread takes when it first asks for its count; the
    latter is restored once all threads have started.
    """
    before, ready = torch.get_num_threads(), threading.Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)
        ready.wait()

    with ThreadPoolExecutor(count, "kcdcache-ahead", begin) as pool:
        for _ in range(count):  # a thread is started if there is work and no thread is free
            pool.submit(int)
        ready.wait()
        torch.set_num_threads(before)
        yield pool


def _blocks(asked: Iterable[Asked]) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Yield samples and parameters of each block, and whether it is the last of its batch."""
    for index, parameters in asked:
        for low in range(0, len(index), BLOCK):
            part = slice(low, low + BLOCK)
            yield index[part], parameters[part], low + BLOCK >= len(index)


SHARE = 0.5
"""share of a device's free memory for data; the rest is for the network"""


def wanted(asked: str, found: str | None, device: torch.device) -> bool:
    """Return whether to hold data on the device: with 'on', or with 'auto' on a GPU if there is no obstacle.

    `found` is the obstacle, if any; raises SettingsError for one with 'on'.
    """
    require_known("choice of what is held on the device", asked, ("auto", "on", "off"))
    if asked == "on" and found is not None:
        raise SettingsError(f"--resident on: batches cannot be made on the device, {found}; use --resident auto")
    return asked == "on" or (asked == "auto" and device.type == "cuda" and found is None)


def room_obstacle(needed: int, device: torch.device, free: int | None = None) -> str | None:
    """Return why so many bytes do not fit on the device, or None; `free` is by default `SHARE` of a GPU's memory."""
    if free is None:
        free = int(SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else needed
    return None if needed <= free else f"it would take {needed:,} bytes of {free:,} that may be taken"


def images_obstacle(split: Split, rule: ViewRule) -> str | None:
    """Return why a split's images cannot be held on a device, or None if they can."""
    if split.on_demand:
        return "its images are decoded on demand"
    return None if rules.can_hold(rule, split.image_size) else f"views by '{rule.name}' are resized one by one"


def every_image(split: Split) -> UInt8[np.ndarray, "n h w c"]:
    """Return all images of a split without `images_obstacle`."""
    return np.asarray(split.images(np.arange(len(split))))


def image_bytes(split: Split, rule: ViewRule) -> int:
    """Return the bytes of a split's padded images."""
    height, width = (side + 2 * rule.padding for side in rule.size)
    return len(split) * height * width * split.images(np.arange(1)).shape[3]  # type: ignore[union-attr]


def held_views(
    asked: str, split: Split, rule: ViewRule, device: torch.device
) -> Callable[[int, int, int], Float32[Tensor, "batch c h w"]] | None:
    """Return (view, start, stop) -> view of samples start to stop - 1 of images on the device; None unless wanted."""
    found = images_obstacle(split, rule)
    if not wanted(asked, found or room_obstacle(image_bytes(split, rule), device), device):
        return None
    images = rules.HeldImages(rule, every_image(split), device)
    parameters = lru_cache(1)(images.parameters)
    return lambda view, start, stop: images.views(torch.arange(start, stop, device=device), parameters(view))
