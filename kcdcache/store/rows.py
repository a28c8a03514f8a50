"""The rows of a store that a stage needs, one view at a time; the next view is loaded in the background."""

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from kcdcache.errors import MismatchError
from kcdcache.files.atomic import reserve
from kcdcache.store.reader import Store

Rows = dict[str, np.ndarray]
Some = Int64[np.ndarray, " some"] | None
"""samples, ascending, each once; None for all"""
SMALL_BYTES = 16
"""arrays with rows of at most this size are looked up once per epoch for all samples"""
THREADS = 2
"""threads for a view that is waited for; one read ahead takes a single thread, to leave the others to the student"""


@runtime_checkable
class Targets(Protocol):
    """The source of a batch's teacher outputs: a store, or a live teacher in tests."""

    def prepare(self, view: int, following: int | None, mine: Some = None, later: Some = None) -> None:
        """Make `view` current, for the samples `mine` or all; `following` may be loaded ahead."""

    def gather(self, index: Int64[np.ndarray, " batch"], temperature: float, device: torch.device) -> dict[str, Tensor]:
        """Return field -> float32 targets (batch, ...) of the current view for these samples."""


class _Part(NamedTuple):
    """Some rows of a view."""

    view: int
    samples: Int64[np.ndarray, " some"]
    """ascending, each once"""

    def same(self, other: "_Part") -> bool:
        """Return whether two parts have the same rows."""
        same = self.samples is other.samples or np.array_equal(self.samples, other.samples)
        return self.view == other.view and same


class StoredTargets:
    """The needed rows of a store's current view, in one contiguous array per stored array.

    At most two views are in memory: the current one and the next, loaded ahead. The one after that is read into the
    arrays of the current one, since fresh memory costs more than the copy. Results of `gather` are the caller's;
    results of `take` are valid until the next call of either.

    Above the memory budget the arrays are memory-mapped files in `folder`, unlinked at once, so that nothing is left
    behind however the process ends.
    """

    def __init__(
        self,
        store: Store,
        index: Int64[np.ndarray, " rows"],
        fields: Sequence[str],
        *,
        memory_bytes: float,
        folder: Path,
        rows: Int64[np.ndarray, " rows"] | None = None,
        slots: Mapping[int, int] | None = None,
        count: int | None = None,
    ) -> None:
        """Serve the sorted unique samples `index`, found in the store's `rows` (default: the same numbers).

        `slots` maps a view to its place in the store's view axis (default: the same number). `count` is the number of
        samples of the data set (default: of the store). Raises MismatchError if the store lacks a field.
        """
        for field in fields:
            if field not in store.fields:
                known = ", ".join(store.fields)
                raise MismatchError(
                    f"this method needs the field '{field}', the store at {store.path} holds {known}; "
                    f"add it with `kcdcache precompute --fields {field}` on the same store"
                )
        self._store, self._fields, self._folder = store, tuple(fields), folder
        self._index, self._rows, self._slots = index, index if rows is None else rows, slots
        self._every = _numbered(index, store.count if count is None else count)
        """sample -> its number among `rows`, -1 for none"""
        self._memory_bytes = memory_bytes
        self._begin()

    def _begin(self) -> None:
        """Hold nothing yet."""
        self._process = os.getpid()
        self.positions = self._every
        self._spare: list[np.ndarray] = []
        self._current: tuple[_Part, Rows] | None = None
        self._next: tuple[_Part, Future[Rows]] | None = None
        self._buffers: Rows = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kcdcache-prefetch")

    def _begin_in_fork(self) -> None:
        """Keep only the rows that are this process's own memory.

        The threads of the parent do not run here, one of them may have held the store's lock, and it may write over
        files that were mapped before the fork.
        """
        held, self._store = self._current, copy(self._store)
        self._begin()
        if held is not None and held[0].samples is self._index and not any(map(_is_mapped, held[1].values())):
            self._current = held

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_spare": [], "_current": None, "_next": None, "_buffers": {}, "_pool": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def __enter__(self) -> "StoredTargets":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def prepare(self, view: int, following: int | None, mine: Some = None, later: Some = None) -> None:
        """Load `view` unless it is current, and start loading `following` in the background.

        Only the samples `mine` and `later` of the two are loaded.
        """
        if self._process != os.getpid():
            self._begin_in_fork()
        wanted = _Part(view, self._index if mine is None else mine)
        if self._current is None or not self._current[0].same(wanted):
            self._current = (wanted, self._turned(wanted))
            everyone = wanted.samples is self._index
            self.positions = self._every if everyone else _numbered(wanted.samples, len(self._every))
        coming = None if following is None else _Part(following, self._index if later is None else later)
        if coming is None or coming.same(wanted):
            self._spare.clear()
        elif self._next is None or not self._next[0].same(coming):
            self._drop_next()
            self._next = (coming, self._pool.submit(self._load, coming, 1))

    def gather(self, index: Int64[np.ndarray, " batch"], temperature: float, device: torch.device) -> dict[str, Tensor]:
        """Return field -> decoded float32 targets of the current view, in memory of their own."""
        return self.decoded(self.take(index), temperature, device)

    def decoded(self, taken: Rows, temperature: float, device: torch.device) -> dict[str, Tensor]:
        """Return field -> float32 targets on a device, in memory of their own, from the result of `take`."""
        copy = device.type != "cpu"
        moved = {name: torch.from_numpy(rows).to(device, copy=copy) for name, rows in taken.items()}
        return self.decode(moved, temperature)

    def decode(self, taken: Mapping[str, Tensor], temperature: float) -> dict[str, Tensor]:
        """Return field -> float32 targets, on their device, from stored array -> rows."""
        return {name: self._store.fields[name].decode(taken, temperature) for name in self._fields}

    @property
    def rows(self) -> Rows:
        """Stored array -> rows of the current view; copy them before another view is prepared."""
        assert self._current is not None, "prepare comes first"
        return self._current[1]

    @property
    def cost(self) -> tuple[int, int]:
        """Number of `rows`, and bytes of the chunk files that were read for them."""
        assert self._current is not None, "prepare comes first"
        rows = self._rows_of(self._current[0])
        return len(rows), self._store.chunk_bytes(rows, self._fields)

    @property
    def view_bytes(self) -> int:
        """Bytes of `rows` if all are loaded."""
        return len(self._rows) * self._store.row_bytes(self._fields)

    def take(self, index: Int64[np.ndarray, " batch"]) -> Rows:
        """Return array name -> encoded rows (batch, ...) of the current view, in buffers that the next call reuses.

        A fresh array per batch would cost three times the copy (page faults).
        """
        position = self.places(index)
        return {name: self.copied(name, rows, position) for name, rows in self.rows.items()}

    def places(self, index: Int64[np.ndarray, " some"]) -> Int64[np.ndarray, " some"]:
        """Return the samples' numbers among `rows`."""
        position = self.positions.take(index)
        assert position.min(initial=0) >= 0, "only the samples asked for at the start are held"
        return position

    def copied(self, name: str, rows: np.ndarray, position: Int64[np.ndarray, " batch"]) -> np.ndarray:
        """Return some rows of an array of `rows`, in the buffer of that array."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < len(position):
            buffer = self._buffers[name] = np.empty((len(position), *rows.shape[1:]), rows.dtype)
        return rows.take(position, 0, buffer[: len(position)], "clip")

    def plan(self, index: Int64[np.ndarray, " epoch"]) -> "PlannedRows":
        """Return the current view's rows in an epoch's order, with the lookups that can be made in advance."""
        return PlannedRows(self, self.places(index))

    def _turned(self, wanted: _Part) -> Rows:
        """Return the rows of `wanted`; the current arrays become spare."""
        if self._current is not None:
            self._spare += self._current[1].values()
            self._current = None
        if self._next is not None and self._next[0].same(wanted):
            future, self._next = self._next[1], None
            return future.result()
        self._drop_next()
        return self._load(wanted, THREADS)

    def _drop_next(self) -> None:
        """Forget a view loaded ahead that is not wanted, and its error if loading failed."""
        if self._next is not None and self._next[1].exception() is None:
            self._spare += self._next[1].result().values()
        self._next = None

    def _load(self, part: _Part, threads: int) -> Rows:
        slot = part.view if self._slots is None else self._slots[part.view]
        return self._store.load(slot, self._rows_of(part), self._fields, threads, self._allocate)

    def _rows_of(self, part: _Part) -> Int64[np.ndarray, " rows"]:
        if part.samples is self._index:
            return self._rows
        places = self._every[part.samples]
        assert places.min(initial=0) >= 0, "only the samples asked for at the start are served"
        return self._rows[places]

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        for place, array in reversed([*enumerate(self._spare)]):
            if array.shape[1:] == shape[1:] and array.dtype == dtype:
                del self._spare[place]  # an array of another length is dropped: parts differ in size
                if len(array) == shape[0]:
                    return array
        held = 2 if self._store.views > 1 else 1
        if held * shape[0] * self._store.row_bytes(self._fields) <= self._memory_bytes:
            return np.empty(shape, dtype)
        with tempfile.TemporaryFile(dir=self._folder) as stream:
            reserve(stream.fileno(), max(1, math.prod(shape) * dtype.itemsize), self._folder)
            mapped = np.memmap(stream, dtype=dtype, mode="r+", shape=shape)
        return np.asarray(mapped)  # a plain array costs less per batch


def _is_mapped(rows: np.ndarray) -> bool:
    return isinstance(rows.base, np.memmap)


def _numbered(index: Int64[np.ndarray, " some"], count: int) -> Int64[np.ndarray, " samples"]:
    """Return sample -> its position in `index`, -1 for none."""
    found = np.full(count, -1, np.int64)
    found[index] = np.arange(len(index))
    return found


class PlannedRows:
    """The current view's rows in the order of an epoch: a batch is a slice, copied in one call.

    Valid until another view is prepared.
    """

    def __init__(self, targets: StoredTargets, place: Int64[np.ndarray, " epoch"]) -> None:
        """Look up the small arrays, such as each row's maximum, for all rows numbered `place`."""
        rows = targets.rows
        small = {name for name, values in rows.items() if values[:1].nbytes <= SMALL_BYTES}
        self._targets, self._place, self._view = targets, place, rows
        self._small = {name: rows[name].take(place, 0, mode="clip") for name in small}
        self._large = {name: values for name, values in rows.items() if name not in small}

    def take(self, part: slice) -> Rows:
        """Return array name -> encoded rows (batch, ...) of a slice of the epoch: read-only, until the next call."""
        assert self._targets.rows is self._view, "another view was prepared since this epoch was planned"
        place = self._place[part]
        found = {name: rows[part] for name, rows in self._small.items()}
        for name, rows in self._large.items():
            found[name] = self._targets.copied(name, rows, place)
        return found

    def gather(self, part: slice, temperature: float, device: torch.device) -> dict[str, Tensor]:
        """Return field -> decoded float32 targets of a slice of the epoch, in memory of their own."""
        return self._targets.decoded(self.take(part), temperature, device)
