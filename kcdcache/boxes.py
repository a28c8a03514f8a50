"""Boxes of rows that fill up and are gone through again, in memory or in files, and rows dealt into those of a team."""

from collections.abc import Iterator, Mapping
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

from kcdcache.files import naming
from kcdcache.team import Columns, Team

ROWS = 2**20
"""rows handled at once"""
Kinds = Mapping[str, type[np.generic]]
"""column -> its type"""


@runtime_checkable
class Box(Protocol):
    """Rows of the same columns, in the order in which they came."""

    rows: int

    def add(self, columns: Columns) -> None:
        """Take some more rows."""

    def blocks(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield all rows, ROWS of them at once."""

    def whole(self) -> dict[str, np.ndarray]:
        """Return all rows at once; they are the box's own where it lies in memory."""

    def drop(self) -> None:
        """Free what it takes; it is empty afterwards."""


class Held:
    """A box in memory."""

    def __init__(self, kinds: Kinds, room: int) -> None:
        """Begin an empty box for at most `room` rows."""
        self.rows, self._kinds = 0, kinds
        self._columns = {name: np.empty(room, kind) for name, kind in kinds.items()}

    def add(self, columns: Columns) -> None:
        """Take some more rows."""
        rows = len(next(iter(columns.values())))
        for name, column in self._columns.items():
            column[self.rows : self.rows + rows] = columns[name]
        self.rows += rows

    def blocks(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield all rows, ROWS of them at once, in views of the box's arrays."""
        for start in range(0, self.rows, ROWS):
            stop = min(start + ROWS, self.rows)
            yield {name: column[start:stop] for name, column in self._columns.items()}

    def whole(self) -> dict[str, np.ndarray]:
        """Return the box's arrays."""
        return {name: column[: self.rows] for name, column in self._columns.items()}

    def drop(self) -> None:
        """Free the memory."""
        self.rows, self._columns = 0, {name: np.empty(0, kind) for name, kind in self._kinds.items()}


class Spill:
    """A folder for boxes that memory does not hold, and what they take of the disk."""

    def __init__(self, folder: Path) -> None:
        """Take a folder, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.boxes = folder, 0
        self.bytes, self.most = 0, 0
        """now, and at the fullest moment"""

    def count(self, more: int) -> None:
        """Take note of bytes that were written, or deleted if negative."""
        self.bytes += more
        self.most = max(self.most, self.bytes)


class Spilled:
    """A box in files, one for each column."""

    def __init__(self, kinds: Kinds, spill: Spill) -> None:
        """Begin an empty box."""
        self.rows, self._spill = 0, spill
        self._kinds = {name: np.dtype(kind) for name, kind in kinds.items()}
        self._files = {name: spill.folder / f"{spill.boxes:05}.{name}" for name in kinds}
        spill.boxes += 1

    def add(self, columns: Columns) -> None:
        """Take some more rows.

        Raises:
            NoSpaceError: the disk is full.
        """
        rows = len(next(iter(columns.values())))
        for name, kind in self._kinds.items() if rows else ():
            with naming(self._files[name], rows * kind.itemsize), open(self._files[name], "ab") as stream:
                stream.write(np.ascontiguousarray(columns[name], kind).data)
            self._spill.count(rows * kind.itemsize)
        self.rows += rows

    def blocks(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield all rows, ROWS of them at once."""
        for start in range(0, self.rows, ROWS):
            yield self._read(start, min(ROWS, self.rows - start))

    def whole(self) -> dict[str, np.ndarray]:
        """Return all rows at once."""
        return self._read(0, self.rows)

    def drop(self) -> None:
        """Delete the files."""
        for name, kind in self._kinds.items() if self.rows else ():
            self._files[name].unlink()
            self._spill.count(-self.rows * kind.itemsize)
        self.rows = 0

    def _read(self, start: int, rows: int) -> dict[str, np.ndarray]:
        if not rows:
            return {name: np.empty(0, kind) for name, kind in self._kinds.items()}
        return {
            name: np.fromfile(self._files[name], kind, rows, offset=start * kind.itemsize)
            for name, kind in self._kinds.items()
        }


class Boxes:
    """The boxes of a team: numbered, every process has as many, the first ones being the first process's."""

    def __init__(self, team: Team, each: int, spill: Spill | None) -> None:
        """Begin; a process has `each` boxes at a time, which lie in memory, or in files where there is a `spill`."""
        self.team, self.each, self._spill = team, each, spill
        self.number = team.world * each
        self.own = range(team.rank * each, (team.rank + 1) * each)
        """numbers of this process's boxes"""

    def box(self, kinds: Kinds, room: int) -> Box:
        """Return an empty box for at most `room` rows."""
        return Held(kinds, room) if self._spill is None else Spilled(kinds, self._spill)

    def dealt(
        self, kinds: Kinds, rooms: Integer[np.ndarray, " number"],
        blocks: Iterator[tuple[Integer[np.ndarray, " rows"], Columns]], count: int,
    ) -> list[Box]:  # fmt: skip
        """Return this process's boxes, filled with the rows that all processes have for them.

        `rooms` is how many rows each box gets; `blocks` are this process's, each with the boxes its rows go to, at most
        `count` of them.
        """
        found = [self.box(kinds, int(rooms[box])) for box in self.own]
        nothing = (np.empty(0, np.int64), {name: np.empty(0, kind) for name, kind in kinds.items()})
        for to, given in islice(chain(blocks, repeat(nothing)), self.team.most(count)):
            columns = {name: np.asarray(given[name], kind) for name, kind in kinds.items()}  # the same for all
            if self.each == 1:
                found[0].add(self.team.dealt(columns, to))
                continue
            rows = self.team.dealt({**columns, "to": to}, to // self.each)
            target = rows.pop("to") - self.own.start
            order = np.argsort(target.astype(np.uint16), kind="stable")
            ends = np.cumsum(np.bincount(target, minlength=self.each))
            for box, start, stop in zip(found, [0, *ends[:-1]], ends, strict=True):
                box.add({name: column[order[start:stop]] for name, column in rows.items()})
        assert next(blocks, None) is None, "there are more blocks than announced"
        return found
