"""The best of any number of samples without ranking them: exact, ties by index, in memory that does not grow."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int64, UInt64

from kcdcache import cuts, foreign, ranking, tables, values
from kcdcache.errors import MismatchError
from kcdcache.files import create_filled

SCHEMA = pa.schema([("index", pa.int64())])
_COLUMNS = ("index", "value", "visits")


class Cut(NamedTuple):
    """Where a selection ends: every key below `key` is chosen, and of those equal to it the first `ties`."""

    key: int
    ties: int


def cut(blocks: Callable[[], Iterable[Float32[np.ndarray, " _"]]], size: int) -> Cut:
    """Return where the `size` highest scores end; `blocks` gives all scores, and is called twice.

    Two histograms of 65,536 counts each (`cuts.find`).

    Raises:
        SettingsError: there are fewer than `size` scores, or `size` is not above 0.
        NonFiniteError: a score is NaN.
    """

    def keys() -> Iterator[UInt64[np.ndarray, " _"]]:
        return (ranking.keys(score).astype(np.uint64) for score in blocks())

    found = cuts.find(keys, 32, np.array([size - 1]))
    return Cut(int(found.keys[0]), size - int(found.before[0]))


def masks(blocks: Iterable[Float32[np.ndarray, " _"]], end: Cut) -> Iterator[Bool[np.ndarray, " _"]]:
    """Yield for each block of scores, in the order of their samples, which are chosen."""
    left = end.ties
    for score in blocks:
        found = ranking.keys(score)
        chosen = found < end.key
        ties = np.flatnonzero(found == end.key)[:left]
        chosen[ties] = True
        left -= len(ties)
        yield chosen


def select(
    parts: Sequence[Path], out: Path, *, size: int, exponent: float = 0.03, unseen: str = "first"
) -> dict[str, int | float]:
    """Write the indices of the `size` samples of highest score, ascending, as a parquet file; return what was done.

    `parts` are parquet files with `index`, `value` and optionally `visits` (1 if absent), whose rows, file after file,
    are in ascending order of the index. Each is read three times, one row group at a time: memory does not grow with
    the number of samples. The choice is that of `condense`: value * visits^exponent, ties by index.

    Raises:
        NotFoundError, CorruptionError, UnsafeError: a part cannot be read.
        MismatchError: a column is missing or of another type, or the indices do not ascend; names the file.
        NonFiniteError: a visited sample's value is not finite.
        SettingsError: there are fewer samples than `size`.
        LockedError: something lies at `out`.
    """

    def scores() -> Iterator[Float32[np.ndarray, " _"]]:
        return (score for _, score in _scored(parts, exponent, unseen))

    end = cut(scores, size)
    done: list[dict[str, int | float]] = []

    def fill(temporary: Path) -> None:
        with open(temporary, "wb") as sink:
            done.append(_write(_chosen(_scored(parts, exponent, unseen), end), sink))

    create_filled(out, fill)
    return {**done[0], "key": end.key, "ties": end.ties}


def _scored(
    parts: Sequence[Path], exponent: float, unseen: str
) -> Iterator[tuple[Int64[np.ndarray, " _"], Float32[np.ndarray, " _"]]]:
    last = -1
    for part in parts:
        with tables.opened(part) as reader:
            for name in ("index", "value"):
                if reader.schema.names.count(name) != 1:
                    raise MismatchError(f"{part}: expected one column '{name}', found {', '.join(reader.schema.names)}")
            first = 0
            for table in reader.groups(_COLUMNS):
                index, visits, value = foreign.rows_of(table, part, first)
                some = values.Values(visits, value)
                if index[0] <= last or (np.diff(index) <= 0).any():
                    raise MismatchError(
                        f"{part}, rows from {first}: expected indices above {last} in ascending order; sort the rows"
                    )
                last, first = int(index[-1]), first + len(index)
                yield index, values.score(some, exponent, unseen)


def _chosen(
    scored: Iterator[tuple[Int64[np.ndarray, " _"], Float32[np.ndarray, " _"]]], end: Cut
) -> Iterator[Int64[np.ndarray, " _"]]:
    waiting: list[Int64[np.ndarray, " _"]] = []

    def scores() -> Iterator[Float32[np.ndarray, " _"]]:
        for index, score in scored:
            waiting.append(index)
            yield score

    for chosen in masks(scores(), end):
        yield waiting.pop()[chosen]


def _write(blocks: Iterator[Int64[np.ndarray, " _"]], sink: object) -> dict[str, int | float]:
    writer, rows = tables.Writer(sink, SCHEMA), 0
    for block in tables.regrouped(({"index": index} for index in blocks), tables.ROWS):
        writer.write(pa.table(dict(block), schema=SCHEMA))
        rows += len(block["index"])
    writer.close({})
    return {"kept": rows}
