"""The store's rows that a stage needs, one view at a time: loaded once, the next view in the background."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from kcdcache.errors import MismatchError
from kcdcache.store import Store

Rows = dict[str, np.ndarray]


@runtime_checkable
class Targets(Protocol):
    """Where a batch's teacher outputs come from: a store, or a live teacher in tests."""

    def prepare(self, view: int, following: int | None) -> None:
        """Make `view` current; `following` may be fetched ahead."""

    def gather(self, index: Int64[np.ndarray, " batch"], temperature: float, device: torch.device) -> dict[str, Tensor]:
        """Return field -> float32 targets (batch, ...) of the current view for these samples."""


class StoredTargets:
    """The needed rows of the current view of a store, in one contiguous array per stored array.

    Above the memory budget the arrays are memory-mapped files in `folder`, unlinked at once, so nothing is left
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
        """Serve sorted unique samples `index`, found in the store's `rows` (the same numbers unless given).

        `slots` maps a view number to its place in the store's view axis (the same number unless given). `count` is the
        number of samples of the data set (the store's row count unless given).

        Raises:
            MismatchError: the store lacks one of the fields.
        """
        for field in fields:
            if field not in store.fields:
                known = ", ".join(store.fields)
                raise MismatchError(
                    f"this method needs the field '{field}', the store at {store.path} holds {known}; "
                    f"add it with `kcdcache precompute --fields {field}` on the same store"
                )
        self._store, self._fields, self._folder = store, tuple(fields), folder
        self._rows = index if rows is None else rows
        self._slots = slots
        self._position = np.full(store.count if count is None else count, -1, np.int64)
        self._position[index] = np.arange(len(index))
        self._allocate = self._allocator(memory_bytes)
        self._current: tuple[int, Rows] | None = None
        self._next: tuple[int, Future[Rows]] | None = None
        self._buffers: Rows = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kcdcache-prefetch")

    def __enter__(self) -> "StoredTargets":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def prepare(self, view: int, following: int | None) -> None:
        """Load `view` unless it is there, and start loading `following` in the background."""
        if self._current is None or self._current[0] != view:
            self._current = (view, self._fetched(view))
        wanted = following is not None and following != view and (self._next is None or self._next[0] != following)
        if wanted and following is not None:
            self._next = (following, self._pool.submit(self._load, following))

    def gather(self, index: Int64[np.ndarray, " batch"], temperature: float, device: torch.device) -> dict[str, Tensor]:
        """Return field -> decoded float32 targets of the current view."""
        assert self._current is not None, "prepare comes first"
        position = self._position[index]
        assert position.min(initial=0) >= 0, "only the samples asked for at the start are held"
        taken = {name: self._take(name, rows, position, device) for name, rows in self._current[1].items()}
        return {name: self._store.fields[name].encoding.decode(taken, temperature) for name in self._fields}

    def _fetched(self, view: int) -> Rows:
        if self._next is not None and self._next[0] == view:
            future, self._next = self._next[1], None
            self._current = None  # frees the old view before the new one is counted twice
            return future.result()
        return self._load(view)

    def _load(self, view: int) -> Rows:
        slot = view if self._slots is None else self._slots[view]
        return self._store.load(slot, self._rows, self._fields, allocate=self._allocate)

    def _take(self, name: str, rows: np.ndarray, position: np.ndarray, device: torch.device) -> Tensor:
        """Copy rows into a reused buffer: a fresh array per batch costs three times the copy (page faults)."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < len(position):
            buffer = self._buffers[name] = np.empty((len(position), *rows.shape[1:]), rows.dtype)
        out = buffer[: len(position)]
        np.take(rows, position, axis=0, out=out, mode="clip")
        return torch.from_numpy(out).to(device, copy=device.type != "cpu")

    def _allocator(self, memory_bytes: float) -> Callable[..., Any]:
        held = 2 if self._store.views > 1 else 1
        needed = held * len(self._rows) * self._store.row_bytes(self._fields)
        return np.empty if needed <= memory_bytes else self._mapped

    def _mapped(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        with tempfile.TemporaryFile(dir=self._folder) as stream:
            stream.truncate(max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize))
            return np.memmap(stream, dtype=dtype, mode="r+", shape=shape)
