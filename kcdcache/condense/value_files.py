"""Values opened to be condensed: in memory, or read again each time."""

import glob
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int32, Int64, Shaped

from kcdcache.condense import values
from kcdcache.condense.values import MOST_VISITS, Values, _require_finite, fingerprint
from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, NonFiniteError, NotFoundError, SettingsError
from kcdcache.files import parquet, run_files
from kcdcache.files.atomic import write_atomic
from kcdcache.files.records import canonical_json

MOST_INDEX = 2**62
COLUMNS = ("index", "visits", "value", "label")


def is_several(path: Path) -> bool:
    """Return whether a path stands for several files of another tool: a folder of parquet files, or a glob pattern."""
    if path.is_dir():
        return not parquet.is_folder(path)
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
        with parquet.opened_file(file, most_rows) as reader:
            parquet.require_no_part(reader.schema, file)
            if (rows := rows + reader.rows) > most_rows:
                raise MismatchError(f"{path} holds {rows} rows or more, expected at most {most_rows} (one per sample)")
            found.append(reader.whole(COLUMNS).replace_schema_metadata())
    return pa.concat_tables(found, promote_options="permissive")


def read_foreign(
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
            found = ", ".join(names[:20] if is_several(path) else parquet.column_names(path)[:20])
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


METADATA_KEY = "kcdcache.values"
FORMAT_VERSION = 0

COLUMNS = COLUMNS
_KINDS: dict[str, type] = {"index": np.int64, "visits": np.int32, "value": np.float32, "label": np.int64}
_REQUIRED = ("epoch", "knowledge_id", "student")


class ValuesFile(NamedTuple):
    """What a values file holds."""

    values: Values
    labels: Int64[np.ndarray, " n"] | None
    """label of every sample, or None where the file does not give all of them"""
    document: dict[str, Any] | None
    """our metadata (knowledge_id, student, epoch, digest, ...), or None for a file of another tool"""
    foreign: bool
    """whether another tool wrote the file"""


class Block(NamedTuple):
    """Consecutive samples."""

    first: int
    """index of the first of them"""
    values: Values
    labels: Int64[np.ndarray, " n"] | None


@runtime_checkable
class Source(Protocol):
    """Values that can be gone through, in order of the index, as often as need be."""

    @property
    def labelled(self) -> bool:
        """Whether every sample has a label."""

    def blocks(self) -> Iterator[Block]:
        """Yield all samples."""

    def fingerprint(self) -> str:
        """Return `fingerprint` of the values."""


@dataclass(frozen=True, eq=False)
class Held:
    """Values in memory as a source."""

    values: Values
    labels: Int64[np.ndarray, " n"] | None = None

    @property
    def labelled(self) -> bool:
        """Whether every sample has a label."""
        return self.labels is not None

    def blocks(self) -> Iterator[Block]:
        """Yield all samples, in views of the arrays."""
        for first in range(0, len(self.values.visits), parquet.ROWS):
            some = slice(first, first + parquet.ROWS)
            labels = None if self.labels is None else self.labels[some]
            yield Block(first, Values(self.values.visits[some], self.values.value[some]), labels)

    def fingerprint(self) -> str:
        """Return `fingerprint` of the values."""
        return fingerprint(self.values)


def write(
    path: Path, values: Values, labels: Int64[np.ndarray, " n"] | None, document: Mapping[str, Any],
    partition_rows: int | None = None,
) -> None:  # fmt: skip
    """Write values as parquet, atomically and with the same bytes for the same content.

    `document` holds JSON values, among them knowledge_id, student and epoch. More than `partition_rows` values become a
    folder of parts of so many, which replaces nothing.

    Raises:
        SettingsError: the document lacks a key.
        MismatchError: labels and values differ in length.
        NonFiniteError: a visited sample's value is not finite.
        NoSpaceError: the disk is full; an old file stays as it was.
        LockedError: something lies where a folder should be made.
    """
    if missing := [key for key in _REQUIRED if key not in document]:
        raise SettingsError(f"values for {path} need '{missing[0]}' in their document; found {sorted(document)}")
    if labels is not None and len(labels) != len(values.visits):
        raise MismatchError(f"{path}: {len(labels)} labels for {len(values.visits)} values; give one label per sample")
    _require_finite(values.value, values.value, values.visits > 0)
    columns = _columns(values, labels)
    content = {**document, "format_version": FORMAT_VERSION, "count": len(values.visits)}
    content["digest"] = _digest(content, columns)
    if partition_rows is not None and len(values.visits) > partition_rows:
        kept = parquet.Seal(METADATA_KEY, content["count"], partition_rows, content, fingerprint(values), ())
        schema = pa.schema([(name, pa.from_numpy_dtype(_KINDS[name])) for name in columns])
        parquet.write(path, kept, schema, lambda span: _cells_of(columns, span))
        return
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: canonical_json(content)})
    write_atomic(path, parquet.encode(table))


def read(path: Path | str, count: int) -> ValuesFile:
    """Return the values of `count` samples from our file or, where our metadata is absent, from another tool's.

    Another tool's file needs `index` and `value`; `visits` (1 if absent) and `label` are used where present. Its rows
    may stand in any order and be of any number type; samples it leaves out are unseen.

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: the file is damaged or was changed after it was written.
        MismatchError: it is for another number of samples, a row is unusable (named), or its run wrote another one.
        NonFiniteError: a visited sample's value is NaN or infinite; names the row.
    """
    path = Path(path)
    found = run_files.steady(path, lambda: _read(path, count))
    run_files.require(path, run_files.Facts(len(found.values.visits), fingerprint(found.values)))
    return found


class Stream:
    """Our values file as a source: every time it is gone through whole it is held against its digest."""

    def __init__(self, reader: parquet.Table, path: Path, count: int) -> None:
        """Take an open file that should be of ours, of `count` samples.

        Raises:
            CorruptionError: its metadata is damaged, or it has other columns than ours.
            MismatchError: it is of a newer format.
        """
        self._reader, self._path, self._count = reader, path, count
        self.known = (isinstance(reader, parquet.Joined) and reader.seal.fingerprint) or ""  # or set from elsewhere
        self.document = parquet.document(reader.schema, METADATA_KEY, path) or {}
        if (version := self.document.get("format_version")) != FORMAT_VERSION:
            raise MismatchError(f"{path} has format {version}, this kcdcache reads {FORMAT_VERSION}; upgrade kcdcache")
        self.labelled = "label" in reader.schema.names
        self.kinds = {name: kind for name, kind in _KINDS.items() if name != "label" or self.labelled}
        expected = pa.schema([(name, pa.from_numpy_dtype(kind)) for name, kind in self.kinds.items()])
        parquet.require_schema(reader.schema, expected, path)

    def blocks(self) -> Iterator[Block]:
        """Yield all samples; what was yielded counts only once all was: only then the digest was compared.

        Raises:
            CorruptionError: the file is damaged, or its content does not match its digest.
            MismatchError: it is of another number of samples, or a count of visits is negative; names the row.
            NonFiniteError: a value is not finite; names the row.
        """
        digest, rows, trouble = parquet.Digest(self.kinds), 0, None
        for table in self._reader.groups():
            columns = self._columns(table)
            digest.add({**columns, "index": np.arange(rows, rows + table.num_rows)})  # which it then has to hold
            values = Values(columns["visits"], columns["value"])
            trouble = trouble or _trouble(values, self._path, rows)
            if trouble is None:
                yield Block(rows, values, columns.get("label"))
            rows += table.num_rows
        self._require_digest({name: (kind, rows, digest.of(name)) for name, kind in self.kinds.items()})
        if trouble is not None:
            raise trouble

    def fingerprint(self) -> str:
        """Return `fingerprint` of the values, as of the last time they were gone through whole, or as known before."""
        return self.known

    def _require_digest(self, columns: Mapping[str, tuple[type, int, bytes]]) -> None:
        """Do nothing if the columns, of which type, rows and SHA-256 are given, have the file's digest."""
        header = canonical_json({key: item for key, item in self.document.items() if key != "digest"})
        if parquet.combined(header, columns) != self.document.get("digest"):
            raise CorruptionError(
                f"{self._path} was changed after it was written: its content does not match its digest"
            )
        self.require_rows(columns["visits"][1])
        found = parquet.combined(b"", {name: columns[name] for name in ("visits", "value")})
        if self.known not in ("", found):
            raise CorruptionError(
                f"{self._path}: its values have the fingerprint {found}, its record tells {self.known}"
            )
        self.known = found

    def require_rows(self, rows: int) -> None:
        """Do nothing if that is the number of samples.

        Raises:
            MismatchError: it is not.
        """
        if rows != self._count:
            raise MismatchError(f"{self._path} holds values of {rows} samples, expected {self._count}; use its store")

    def _columns(self, table: pa.Table) -> dict[str, np.ndarray]:
        if any(column.null_count for column in table.columns):
            raise CorruptionError(f"{self._path} was changed after it was written: it has empty cells; write it again")
        return {name: table.column(name).to_numpy() for name in self.kinds}


def _cells_of(columns: Mapping[str, np.ndarray], span: parquet.Span) -> Iterator[pa.Table]:
    for first in range(span.first, span.stop, parquet.ROWS):
        some = slice(first, min(first + parquet.ROWS, span.stop))
        yield pa.table({name: column[some] for name, column in columns.items()})


def _read(path: Path, count: int) -> ValuesFile:
    if is_several(path):
        visits, value, labels = read_foreign(whole(path, count), path, count)
        return ValuesFile(Values(visits, value), labels, None, True)
    with parquet.opened(path, count) as reader:
        if METADATA_KEY.encode() not in (reader.schema.metadata or {}):
            visits, value, labels = read_foreign(reader.whole(COLUMNS), path, count)
            return ValuesFile(Values(visits, value), labels, None, True)
        source = Stream(reader, path, count)
        blocks = list(source.blocks())
    values = Values(
        _joined([block.values.visits for block in blocks], np.int32),
        _joined([block.values.value for block in blocks], np.float32),
    )
    labels = _joined([block.labels for block in blocks], np.int64) if source.labelled else None
    return ValuesFile(values, labels, source.document, False)


def _joined(blocks: list[Any], kind: type) -> Any:
    return blocks[0] if len(blocks) == 1 else np.concatenate([np.empty(0, kind), *blocks])


def _columns(values: Values, labels: Int64[np.ndarray, " n"] | None) -> dict[str, np.ndarray]:
    columns = {"index": np.arange(len(values.visits)), "visits": values.visits, "value": values.value}
    return columns if labels is None else {**columns, "label": labels}


def _digest(content: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> str:
    return parquet.digest(canonical_json({key: content[key] for key in content if key != "digest"}), columns)


def _trouble(values: Values, path: Path, first: int) -> KcdcacheError | None:
    """Return what is wrong with some rows, `first` rows after the beginning of a file of ours."""
    if (bad := values.visits < 0).any():
        row = int(np.argmax(bad))
        return MismatchError(f"{path}, row {first + row}: 'visits' is {values.visits[row]}, expected 0 or more")
    if (bad := ~np.isfinite(values.value)).any():
        row = int(np.argmax(bad))
        found = values.value[row]
        return NonFiniteError(f"{path}, row {first + row}: 'value' is {found}, expected a finite float32")
    return None


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
        found = read(path, count)
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
        yield Files(files_of(path), count), None
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
            with parquet.opened_file(path, count) as reader:
                parquet.require_no_part(reader.schema, path)
                require_columns(reader.schema.names, path)
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
        digest = parquet.Digest(_FINGERPRINTED)
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
            for first in range(reached, int(index[-1]) + 1, parquet.ROWS):
                last = min(first + parquet.ROWS, int(index[-1]) + 1)
                inside = slice(*np.searchsorted(index, [first, last]))
                yield _filled(first, last, index[inside], Values(some.visits[inside], some.value[inside]),
                              None if labels is None else labels[inside])  # fmt: skip
                reached = last
        nothing = np.empty(0, np.int64)
        for first in range(reached, self._count, parquet.ROWS):  # never measured
            yield _filled(first, min(first + parquet.ROWS, self._count), nothing, values.start(0), None)

    def fingerprint(self) -> str:
        """Return `values.fingerprint` of them, as of the last time they were gone through whole; "" before."""
        return self._known

    def _rows(self) -> Iterator[tuple[np.ndarray, Values, np.ndarray | None]]:
        last = -1
        ends = [*self._begins[1:], self._count]
        for path, after in zip(self._paths, ends, strict=True):
            with parquet.opened_file(path, self._count) as reader:
                first = 0
                for table in reader.groups(COLUMNS):
                    index, visits, value = rows_of(table, path, first, self._count)
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
                    labels = labels_of(table, path) if self.labelled else None
                    yield index, Values(visits, value), labels


def _filled(first: int, stop: int, index: np.ndarray, some: Values, labels: np.ndarray | None) -> Block:
    """Return all samples from `first` to `stop`, of which some were measured."""
    made = values.start(stop - first)
    made.visits[index - first] = some.visits
    made.value[index - first] = some.value
    return Block(first, made, labels)


def _ours(path: Path) -> bool:
    return not is_several(path) and METADATA_KEY in parquet.metadata_keys(path)


@contextmanager
def _stream(path: Path, count: int) -> Iterator[tuple[Stream, parquet.Table]]:
    with ExitStack() as stack:

        def look() -> tuple[Stream, parquet.Table]:
            reader = stack.enter_context(parquet.opened(path, count))
            return Stream(reader, path, count), reader

        yield run_files.steady(path, look)


def _look(source: Stream, reader: parquet.Table, path: Path) -> None:
    """Let a source know its fingerprint, and hold it against its digest unless that comes with every part."""
    if source.known:
        source.require_rows(reader.rows)
    else:
        for _ in source.blocks():
            pass
    run_files.require(path, run_files.Facts(reader.rows, source.fingerprint()))
