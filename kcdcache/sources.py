"""Values opened to be condensed: in memory, or read again each time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kcdcache import foreign, partitioned, records, tables, values
from kcdcache.errors import CorruptionError, MismatchError
from kcdcache.values import Block, Held, Source, Stream, Values

HELD_SAMPLES = 2**23
"""values of more samples are not held in memory while they are condensed, but read again"""
_FINGERPRINTED: dict[str, type] = {"visits": np.int32, "value": np.float32}
Opened = tuple[Source, dict[str, Any] | None]


@contextmanager
def opened(path: Path, count: int, held: int = HELD_SAMPLES) -> Iterator[Opened]:
    """Yield the values of `count` samples, checked as `values.read` does, and our document (None: from another tool).

    Ours of more than `held` samples are not held in memory but read one row group at a time, each time anew.

    Raises:
        NotFoundError, CorruptionError, MismatchError, NonFiniteError: as for `values.read`.
    """
    if count <= held or not _ours(path):
        found = values.read(path, count)
        yield Held(found.values, found.labels), found.document
        return
    with streamed(path, count) as opened_:
        yield opened_


@contextmanager
def streamed(path: Path, count: int) -> Iterator[Opened]:
    """Yield the same without ever holding them.

    Another tool's rows have to be in ascending order of the index, within each file and from file to file.

    Raises:
        NotFoundError, CorruptionError, MismatchError, NonFiniteError: as for `values.read`.
    """
    if not _ours(path):
        yield Files(foreign.files_of(path), count), None
        return
    with _stream(path, count) as (source, reader):
        _look(source, reader, path)
        yield source, source.document


class Files:
    """Another tool's files as a source: their rows ascend, samples left out are unseen, nothing is held."""

    def __init__(self, paths: list[Path], count: int) -> None:
        """Look at the files' columns and first rows.

        Raises:
            MismatchError: a column is missing.
        """
        self._count, self._known = count, ""
        begins, rows, names = [], 0, []
        for path in paths:
            with tables.opened(path, count) as reader:
                partitioned.require_no_part(reader.schema, path)
                foreign.require_columns(reader.schema.names, path)
                first = next((table["index"][0].as_py() for table in reader.groups(["index"], 0, 1)), None)
                names.append(reader.schema.names)
                rows += reader.rows
            if first is not None:
                begins.append((first, path))
        begins.sort()
        self._paths = [path for _, path in begins]
        self._begins = [first for first, _ in begins]
        if twice := [first for first, after in pairwise(self._begins) if first == after]:
            raise MismatchError(f"two of the files begin with index {twice[0]}: {self._paths[0].parent}; sort the rows")
        self.labelled = rows == count and all("label" in some for some in names)

    def blocks(self) -> Iterator[Block]:
        """Yield all samples.

        Raises:
            MismatchError: indices do not ascend, or lie outside [0, count); names the file.
            NonFiniteError: a value is not finite; names the row.
            CorruptionError: they are not those of the time before.
        """
        digest = tables.Digest(_FINGERPRINTED)
        for block in self._blocks():
            digest.add({"visits": block.values.visits, "value": block.values.value})
            yield block
        found = digest.over(b"")
        if self._known not in ("", found):
            raise CorruptionError(f"{self._paths[0].parent}: the values were changed meanwhile; run the command again")
        self._known = found

    def _blocks(self) -> Iterator[Block]:
        reached = 0
        for index, some, labels in self._rows():
            for first in range(reached, int(index[-1]) + 1, tables.ROWS):
                last = min(first + tables.ROWS, int(index[-1]) + 1)
                inside = slice(*np.searchsorted(index, [first, last]))
                yield _filled(first, last, index[inside], Values(some.visits[inside], some.value[inside]),
                              None if labels is None else labels[inside])  # fmt: skip
                reached = last
        nothing = np.empty(0, np.int64)
        for first in range(reached, self._count, tables.ROWS):  # never measured
            yield _filled(first, min(first + tables.ROWS, self._count), nothing, values.start(0), None)

    def fingerprint(self) -> str:
        """Return `values.fingerprint` of them, as of the last time they were gone through whole; "" before."""
        return self._known

    def _rows(self) -> Iterator[tuple[np.ndarray, Values, np.ndarray | None]]:
        last = -1
        ends = [*self._begins[1:], self._count]
        for path, after in zip(self._paths, ends, strict=True):
            with tables.opened(path, self._count) as reader:
                first = 0
                for table in reader.groups(foreign.COLUMNS):
                    index, visits, value = foreign.rows_of(table, path, first, self._count)
                    if (np.diff(index, prepend=last) <= 0).any():
                        raise MismatchError(
                            f"{path}, rows from {first}: expected indices above {last} in ascending order, file after "
                            "file; sort the rows, or condense in memory (--memory-gb)"
                        )
                    if (last := int(index[-1])) >= after:
                        raise MismatchError(
                            f"{path} has index {last}, but another file begins with {after}; sort the rows"
                        )
                    first += len(index)
                    labels = foreign.labels_of(table, path) if self.labelled else None
                    yield index, Values(visits, value), labels


def _filled(first: int, stop: int, index: np.ndarray, some: Values, labels: np.ndarray | None) -> Block:
    """Return all samples from `first` to `stop`, of which some were measured."""
    made = values.start(stop - first)
    made.visits[index - first] = some.visits
    made.value[index - first] = some.value
    return Block(first, made, labels)


def _ours(path: Path) -> bool:
    return not foreign.is_several(path) and values.METADATA_KEY in partitioned.metadata_keys(path)


@contextmanager
def _stream(path: Path, count: int) -> Iterator[tuple[Stream, tables.Table]]:
    with ExitStack() as stack:

        def look() -> tuple[Stream, tables.Table]:
            reader = stack.enter_context(partitioned.opened(path, count))
            return Stream(reader, path, count), reader

        yield records.steady(path, look)


def _look(source: Stream, reader: tables.Table, path: Path) -> None:
    """Let a source know its fingerprint, and hold it against its digest unless that comes with every part."""
    if source.known:
        source.require_rows(reader.rows)
    else:
        for _ in source.blocks():
            pass
    records.require(path, records.Facts(reader.rows, source.fingerprint()))
