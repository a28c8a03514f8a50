"""Values that another tool measured: rows in any order and of any number type, each held against what it may be."""

import glob
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int32, Int64, Shaped

from kcdcache import partitioned, tables
from kcdcache.errors import MismatchError, NonFiniteError, NotFoundError

MOST_VISITS = 2**31 - 1
MOST_INDEX = 2**62
COLUMNS = ("index", "visits", "value", "label")


def is_several(path: Path) -> bool:
    """Return whether a path stands for several files of another tool: a folder of parquet files, or a glob pattern."""
    if path.is_dir():
        return not partitioned.is_folder(path)
    return not path.exists() and glob.has_magic(str(path))


def files_of(path: Path) -> list[Path]:
    """Return the files a path stands for, by name; of a folder all parquet files in it, hidden ones left out.

    Raises:
        NotFoundError: there are none.
    """
    if not is_several(path):
        return [path]
    found = sorted(path.rglob("*.parquet") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True)))
    found = [file for file in found if file.is_file() and not file.name.startswith(("_", "."))]
    if not found:
        raise NotFoundError(f"no parquet files at {path}")
    return found


def whole(path: Path, most_rows: int) -> pa.Table:
    """Return the rows of all files that a path stands for.

    Raises:
        NotFoundError, CorruptionError, MismatchError, UnsafeError: one cannot be read, or all have too many rows.
    """
    found: list[pa.Table] = []
    rows = 0
    for file in files_of(path):
        with tables.opened(file, most_rows) as reader:
            partitioned.require_no_part(reader.schema, file)
            if (rows := rows + reader.rows) > most_rows:
                raise MismatchError(f"{path} holds {rows} rows or more, expected at most {most_rows} (one per sample)")
            found.append(reader.whole(COLUMNS).replace_schema_metadata())
    return pa.concat_tables(found, promote_options="permissive")


def read(
    table: pa.Table, path: Path, count: int
) -> tuple[Int32[np.ndarray, " n"], Float32[np.ndarray, " n"], Int64[np.ndarray, " n"] | None]:
    """Return visits, value and, where every sample has one, label of `count` samples; those left out have no visits.

    Raises:
        MismatchError: a column is missing, or a row is unusable; names it.
        NonFiniteError: a visited sample's value is not finite; names the row.
    """
    require_columns(table.column_names, path)
    index = _integers(table, "index", count, path)
    _require_unique(index, path)
    all_visits, all_value = np.zeros(count, np.int32), np.zeros(count, np.float32)
    visits = np.ones(len(index), np.int64)
    if "visits" in table.column_names:
        visits = _integers(table, "visits", MOST_VISITS + 1, path)
    all_visits[index] = visits
    all_value[index] = _floats(table, "value", visits > 0, path)
    return all_visits, all_value, _labels(table, index, path, count)


def require_columns(names: list[str], path: Path) -> None:
    """Do nothing if a file has the columns without which it holds no values.

    Raises:
        MismatchError: one is missing; names it.
    """
    for name in ("index", "value"):
        if name not in names:
            found = ", ".join(names[:20] if is_several(path) else tables.column_names(path)[:20])
            raise MismatchError(f"{path} has no column '{name}', expected 'index' and 'value'; found: {found}")


def labels_of(table: pa.Table, path: Path) -> Int64[np.ndarray, " n"]:
    """Return the labels of some rows.

    Raises:
        MismatchError: a row is unusable; names it.
    """
    return _integers(table, "label", 2**62, path)


def rows_of(
    table: pa.Table, path: Path, first: int, stop: int = MOST_INDEX
) -> tuple[Int64[np.ndarray, " n"], Int32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Return index, visits and value of some rows of another tool's file, `first` rows after its beginning.

    Indices lie below `stop`.

    Raises:
        MismatchError, NonFiniteError: a row is unusable; names it.
    """
    index = _integers(table, "index", stop, path, first)
    visits = np.ones(len(index), np.int64)
    if "visits" in table.column_names:
        visits = _integers(table, "visits", MOST_VISITS + 1, path, first)
    return index, visits.astype(np.int32), _floats(table, "value", visits > 0, path, first)


def _labels(table: pa.Table, index: Int64[np.ndarray, " rows"], path: Path, count: int) -> np.ndarray | None:
    if "label" not in table.column_names or len(index) < count:
        return None
    labels = np.empty(count, np.int64)
    labels[index] = labels_of(table, path)
    return labels


def _require_unique(index: Int64[np.ndarray, " rows"], path: Path) -> None:
    order = np.argsort(index, kind="stable")
    again = order[1:][index[order][1:] == index[order][:-1]]
    if again.size:
        row = int(again.min())
        raise MismatchError(f"{path}, row {row}: index {index[row]} stands there again; expected each index once")


def _numbers(table: pa.Table, name: str, path: Path) -> Shaped[np.ndarray, " rows"]:
    if table.column_names.count(name) > 1:
        raise MismatchError(f"{path} has the column '{name}' more than once; expected it once")
    column = table.column(name)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise MismatchError(f"{path}: column '{name}' should hold numbers, found {column.type}")
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy()))
        raise MismatchError(f"{path}, row {row}: '{name}' is empty; expected a number in every row")
    return column.to_numpy()


def _integers(table: pa.Table, name: str, stop: int, path: Path, first: int = 0) -> Int64[np.ndarray, " rows"]:
    found = _numbers(table, name, path)
    fits = (found >= 0) & (found < stop)
    if found.dtype.kind == "f":
        fits &= found == np.floor(found)
    if not fits.all():
        row = int(np.argmin(fits))
        raise MismatchError(
            f"{path}, row {first + row}: '{name}' is {found[row]}, expected a whole number in [0, {stop})"
        )
    return found.astype(np.int64)


def _floats(
    table: pa.Table, name: str, seen: Shaped[np.ndarray, " rows"], path: Path, first: int = 0
) -> Float32[np.ndarray, " rows"]:
    found = _numbers(table, name, path)
    with np.errstate(over="ignore"):
        narrow = np.where(seen, found, 0).astype(np.float32)
    bad = ~np.isfinite(narrow)
    if bad.any():
        row = int(np.argmax(bad))
        raise NonFiniteError(f"{path}, row {first + row}: '{name}' is {found[row]}, expected a finite float32")
    return narrow
