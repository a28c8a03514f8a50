"""Views decoded and made ahead of their use by a few threads, in order: the bits of `views.show`, without the wait."""

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

from kcdcache.data.images import Split
from kcdcache.errors import SettingsError
from kcdcache.settings import ViewRule
from kcdcache.views import rules

BLOCK = 16
"""images that one thread makes at a time: more would leave threads idle at the end of a batch"""
PARAMETERS = 4096
"""samples whose view parameters are made at a time: few rows cost as many"""

T = TypeVar("T")
R = TypeVar("R")
Rows = tuple[int, int, int]
"""view, first sample, last sample + 1"""


class Asked(NamedTuple):
    """One batch of views."""

    samples: Int64[np.ndarray, " batch"]
    """their numbers, at least one"""
    parameters: Int64[np.ndarray, "batch k"]
    """as `views.parameters` gives them"""


def pays(split: Split, rule: ViewRule) -> bool:
    """Return whether views are worth making ahead: images are decoded, or resized one by one."""
    return split.on_demand or not rules.can_hold(rule, split.image_size)


def ahead(work: Callable[[T], R], items: Iterable[T], workers: int, depth: int) -> Generator[R, None, None]:
    """Yield work(item) for all items in order; up to `depth` further ones are worked on by threads, or wait, meanwhile.

    What `work` raises is raised in its turn. Once the iterator ends or is closed, no thread is left.
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
    """Yield the views (batch, c, h, w) of each batch asked for, in order, on the device.

    Where that `pays`, about one batch, and a block per worker, is made ahead and held; `workers` is the number of
    threads, as many as torch has unless given.

    Raises:
        CorruptionError, MismatchError, NotFoundError: as for `Split.images`, in the turn of the batch it is about.
    """
    if not pays(split, rule):
        yield from (rules.show(rule, split.images(samples), parameters, device) for samples, parameters in asked)
        return
    count = workers or torch.get_num_threads()
    if device.type == "cuda" and device.index is None:  # the current one, which another thread would not know
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
    """Views of consecutive training samples, as a teacher sees them: made ahead of its use of them if announced."""

    def __init__(self, split: Split, rule: ViewRule, device: torch.device, workers: int | None = None) -> None:
        """Make views by a rule of a split's images on a device; `workers` is as for `shown`."""
        self._split, self._rule, self._device, self._workers = split, rule, device, workers
        self._coming: Iterator[tuple[Rows, Tensor]] | None = None
        self._view, self._first = -1, 0
        self._made = np.zeros((0, 0), np.int64)

    def __call__(self, view: int, start: int, stop: int) -> Tensor:
        """Return one view of samples start to stop - 1: pixels in [0, 1], (batch, c, h, w)."""
        if self._coming is None:
            asked = self._asked((view, start, stop))
            return rules.show(self._rule, self._split.images(asked.samples), asked.parameters, self._device)
        rows, pixels = next(self._coming)
        assert rows == (view, start, stop), f"rows {rows} were announced, {(view, start, stop)} are asked for"
        return pixels

    @contextmanager
    def announced(self, rows: Iterable[Rows]) -> Iterator[None]:
        """Make rows ahead while within; all are to be asked for in this order, until one leaves."""
        if not pays(self._split, self._rule):
            yield
            return
        rows, told = tee(rows)
        with closing(shown(self._split, self._rule, map(self._asked, rows), self._device, self._workers)) as made:
            self._coming = zip(told, made, strict=False)
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
    """Yield a pool whose threads compute with one core each: teams of cores would wait for each other.

    torch keeps a thread count per thread and one for threads to come, which each takes over when it first asks; the
    latter is put back once all have begun.
    """
    before, ready = torch.get_num_threads(), threading.Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)
        ready.wait()

    with ThreadPoolExecutor(count, "kcdcache-ahead", begin) as pool:
        for _ in range(count):  # a thread is started when something is to be done and none is free
            pool.submit(int)
        ready.wait()
        torch.set_num_threads(before)
        yield pool


def _blocks(asked: Iterable[Asked]) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Yield samples and parameters of each block, and whether it ends its batch."""
    for index, parameters in asked:
        for low in range(0, len(index), BLOCK):
            part = slice(low, low + BLOCK)
            yield index[part], parameters[part], low + BLOCK >= len(index)


SHARE = 0.5
"""of a device's free memory that the data may take; the rest is for the network"""


def wanted(asked: str, found: str | None, device: torch.device) -> bool:
    """Return whether data shall lie on the device: asked for by 'on', or by 'auto' on a GPU, and nothing is in the way.

    Raises:
        SettingsError: asked for by 'on', and something is.
    """
    if asked == "on" and found is not None:
        raise SettingsError(f"--resident on: batches cannot be made on the device, {found}; use --resident auto")
    return asked == "on" or (asked == "auto" and device.type == "cuda" and found is None)


def room_obstacle(needed: int, device: torch.device, free: int | None = None) -> str | None:
    """Return why so many bytes do not go on the device, None if they do; `free` is as for `obstacle`."""
    if free is None:
        free = int(SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else needed
    return None if needed <= free else f"it would take {needed:,} bytes of {free:,} that may be taken"


def images_obstacle(split: Split, rule: ViewRule) -> str | None:
    """Return why a split's images cannot lie on a device, None if they can."""
    if split.on_demand:
        return "its images are decoded on demand"
    return None if rules.can_hold(rule, split.image_size) else f"views by '{rule.name}' are resized one by one"


def every_image(split: Split) -> UInt8[np.ndarray, "n h w c"]:
    """Return all images of a split that has no `images_obstacle`."""
    return np.asarray(split.images(np.arange(len(split))))


def image_bytes(split: Split, rule: ViewRule) -> int:
    """Return the bytes that a split's padded images take."""
    height, width = (side + 2 * rule.padding for side in rule.size)
    return len(split) * height * width * split.images(np.arange(1)).shape[3]  # type: ignore[union-attr]


def held_views(
    asked: str, split: Split, rule: ViewRule, device: torch.device
) -> Callable[[int, int, int], Float32[Tensor, "batch c h w"]] | None:
    """Return what gives one view of samples start to stop - 1, from (view, start, stop), of images on the device.

    None where they are not to lie there, as `wanted` says.

    Raises:
        SettingsError: as for `wanted`.
    """
    found = images_obstacle(split, rule)
    if not wanted(asked, found or room_obstacle(image_bytes(split, rule), device), device):
        return None
    images = rules.HeldImages(rule, every_image(split), device)
    parameters = lru_cache(1)(images.parameters)
    return lambda view, start, stop: images.views(torch.arange(start, stop, device=device), parameters(view))
