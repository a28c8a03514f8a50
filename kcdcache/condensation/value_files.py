"""Files of values: our own and other tools', held in memory or streamed block by block."""

import glob
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int32, Int64, Shaped

from kcdcache.condensation import manifest, values
from kcdcache.condensation.values import MOST_VISITS, Values
from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, NonFiniteError, NotFoundError, SettingsError
from kcdcache.files import parquet, run_files
from kcdcache.files.atomic import write_atomic
from kcdcache.files.records import canonical_json, require_format

METADATA_KEY = "kcdcache.values"
FORMAT_VERSION = 0
COLUMNS: dict[str, type] = {"index": np.int64, "visits": np.int32, "value": np.float32, "label": np.int64}
"""column -> its type in our files, in digest order"""
FINGERPRINTED = ("visits", "value")
REQUIRED = ("epoch", "knowledge_id", "student")
HELD_SAMPLES = 2**23
"""values of more samples are streamed while they are condensed"""
MOST_LABEL = 2**62


class Block(NamedTuple):
    """Consecutive samples."""

    first: int
    """index of the first of them"""
    values: Values
    labels: Int64[np.ndarray, " n"] | None


class Source(ABC):
    """Values that can be streamed in index order, as often as needed."""

    labelled: bool
    """whether every sample has a label"""
    document: dict[str, Any] | None = None
    """our metadata (knowledge_id, student, epoch, digest, ...); None for another tool's values"""

    @abstractmethod
    def blocks(self) -> Iterator[Block]:
        """Yield all samples."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return their `values.fingerprint`; "" if streamed values were not read to the end yet."""


class Held(Source):
    """Values in memory."""

    def __init__(
        self, known: Values, labels: Int64[np.ndarray, " n"] | None = None, document: dict[str, Any] | None = None
    ) -> None:
        """Take values, labels if all samples have one, and the metadata of our file."""
        self.values, self.labels, self.document, self.labelled = known, labels, document, labels is not None

    def blocks(self) -> Iterator[Block]:
        """Yield all samples, as views of the arrays."""
        for first in range(0, len(self.values.visits), parquet.ROWS):
            some = slice(first, first + parquet.ROWS)
            labels = None if self.labels is None else self.labels[some]
            yield Block(first, Values(self.values.visits[some], self.values.value[some]), labels)

    def fingerprint(self) -> str:
        """Return their `values.fingerprint`."""
        return values.fingerprint(self.values)


def write(path: Path, known: Values, labels: Int64[np.ndarray, " n"] | None, document: Mapping[str, Any]) -> None:
    """Write values as parquet, atomically; the same content gives the same bytes.

    Raises:
        SettingsError: `document` (JSON values) lacks knowledge_id, student or epoch.
        MismatchError: labels and values differ in length.
        NonFiniteError: a visited sample's value is not finite.
    """
    count = len(known.visits)
    if missing := [key for key in REQUIRED if key not in document]:
        raise SettingsError(f"values for {path} need '{missing[0]}' in their document; found {sorted(document)}")
    if labels is not None and len(labels) != count:
        raise MismatchError(f"{path}: {len(labels)} labels for {count} values; give one label per sample")
    values.require_finite(known.value, known.value, known.visits > 0)
    columns = {"index": np.arange(count), "visits": known.visits, "value": known.value}
    columns |= {} if labels is None else {"label": labels}
    content = {**document, "format_version": FORMAT_VERSION, "count": count}
    content["digest"] = parquet.digest(_header(content), columns)
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: canonical_json(content)})
    write_atomic(path, parquet.encode(table))


def read(path: Path | str, count: int) -> Held:
    """Return the values of `count` samples, from our file or another tool's file, folder of files or glob pattern.

    Other tools' files need `index` and `value`; `visits` (default 1) and `label` are optional. Rows may have any order
    and number type; samples without a row are unseen.

    Raises:
        CorruptionError: the file is damaged or was changed after it was written.
        MismatchError: it has another number of samples or an unusable row (named), or is not the one its run wrote.
        NonFiniteError: a visited sample's value is NaN or infinite; names the row.
    """
    path = Path(path)
    found = run_files.steady(path, lambda: _read_own(path, count) if _is_own(path) else _read_foreign(path, count))
    run_files.require(path, run_files.Facts(len(found.values.visits), values.fingerprint(found.values)))
    return found


@contextmanager
def opened(path: Path, count: int, held: int = HELD_SAMPLES) -> Iterator[Source]:
    """Yield the values of `count` samples, checked like `read`; our file of more than `held` samples is streamed."""
    if count > held and _is_own(path):
        with streamed(path, count) as source:
            yield source
    else:
        yield read(path, count)


@contextmanager
def streamed(path: Path, count: int) -> Iterator[Source]:
    """Yield the values of `count` samples, checked like `read` but never held in memory.

    Another tool's rows must ascend by index, within each file and from file to file.
    """
    if not _is_own(path):
        yield ForeignFiles(_files_of(path), count)
        return
    with ExitStack() as stack:
        source = run_files.steady(path, lambda: OwnFile(stack.enter_context(parquet.opened(path, count)), path, count))
        source.require_known()
        run_files.require(path, run_files.Facts(count, source.fingerprint()))
        yield source


class OwnFile(Source):
    """Our values file; every complete pass is checked against its digest."""

    def __init__(self, reader: parquet.Table, path: Path, count: int) -> None:
        """Take an open file; raises CorruptionError or MismatchError unless it has our metadata, format and columns."""
        self._reader, self._path, self._count = reader, path, count
        self._known = (isinstance(reader, parquet.Joined) and reader.seal.fingerprint) or ""
        self.document = parquet.document(reader.schema, METADATA_KEY, path) or {}
        require_format(self.document, FORMAT_VERSION, path)
        self.labelled = "label" in reader.schema.names
        self._kinds = {name: kind for name, kind in COLUMNS.items() if name != "label" or self.labelled}
        expected = pa.schema([(name, pa.from_numpy_dtype(kind)) for name, kind in self._kinds.items()])
        parquet.require_schema(reader.schema, expected, path)

    def blocks(self) -> Iterator[Block]:
        """Yield all samples; the digest is compared after the last one, so nothing counts before that.

        Raises:
            CorruptionError: the file is damaged, or its content does not match its digest.
            MismatchError: it has another number of samples, or a negative visit count; names the row.
            NonFiniteError: a value is not finite; names the row.
        """
        digest, rows, trouble = parquet.Digest(self._kinds), 0, None
        for table in self._reader.groups():
            if any(column.null_count for column in table.columns):
                raise CorruptionError(
                    f"{self._path} was changed after it was written: it has empty cells; write it again"
                )
            columns = {name: table.column(name).to_numpy() for name in self._kinds}
            digest.add({**columns, "index": np.arange(rows, rows + table.num_rows)})  # which it then has to hold
            some = Values(columns["visits"], columns["value"])
            trouble = trouble or _trouble(some, self._path, rows)
            if trouble is None:
                yield Block(rows, some, columns.get("label"))
            rows += table.num_rows
        self._require_digest(digest)
        self._require_count(rows)
        if trouble is not None:
            raise trouble

    def fingerprint(self) -> str:
        """Return their `values.fingerprint`, as recorded or of the last complete pass; "" before."""
        return self._known

    def require_known(self) -> None:
        """Make the fingerprint known: from the record of a file's parts, or by a pass."""
        if self._known:
            self._require_count(self._reader.rows)
        else:
            for _ in self.blocks():
                pass

    def _require_digest(self, digest: parquet.Digest) -> None:
        assert self.document is not None
        if digest.over(_header(self.document)) != self.document.get("digest"):
            raise CorruptionError(
                f"{self._path} was changed after it was written: its content does not match its digest"
            )
        found = digest.over(b"", FINGERPRINTED)
        if self._known not in ("", found):
            raise CorruptionError(
                f"{self._path}: its values have the fingerprint {found}, its record says {self._known}"
            )
        self._known = found

    def _require_count(self, rows: int) -> None:
        if rows != self._count:
            raise MismatchError(f"{self._path} holds values of {rows} samples, expected {self._count}; use its store")


class ForeignFiles(Source):
    """Another tool's files, with ascending rows; samples without a row are unseen."""

    def __init__(self, paths: list[Path], count: int) -> None:
        """Read the files' columns and first rows; raises MismatchError if a column is missing, or two begin alike."""
        self._count, self._known = count, ""
        begins, rows, self.labelled = [], 0, True
        for path in paths:
            with _opened_foreign(path, count) as reader:
                first = next((table["index"][0].as_py() for table in reader.groups(["index"], 0, 1)), None)
                self.labelled &= "label" in reader.schema.names
                rows += reader.rows
            if first is not None:
                begins.append((first, path))
        self._begins = sorted(begins)
        if twice := [one for (one, _), (other, _) in pairwise(self._begins) if one == other]:
            raise MismatchError(f"two of the files begin with index {twice[0]}: {paths[0].parent}; sort the rows")
        self.labelled &= rows == count

    def blocks(self) -> Iterator[Block]:
        """Yield all samples.

        Raises:
            MismatchError: indices do not ascend, or are outside [0, count); names the file.
            NonFiniteError: a value is not finite; names the row.
            CorruptionError: the values differ from the pass before.
        """
        digest = parquet.Digest({name: COLUMNS[name] for name in FINGERPRINTED})
        for block in self._blocks():
            digest.add({"visits": block.values.visits, "value": block.values.value})
            yield block
        found = digest.over(b"")
        if self._known not in ("", found):
            where = self._begins[0][1].parent
            raise CorruptionError(f"{where}: the values were changed meanwhile; run the command again")
        self._known = found

    def fingerprint(self) -> str:
        """Return their `values.fingerprint` of the last complete pass; "" before."""
        return self._known

    def _blocks(self) -> Iterator[Block]:
        """Yield the samples with a row and, between and after them, the unseen ones."""
        reached = 0
        for rows in self._rows():
            stop = int(rows.index[-1]) + 1
            for first in range(reached, stop, parquet.ROWS):
                reached = min(first + parquet.ROWS, stop)
                yield rows.block(first, reached)
        for first in range(reached, self._count, parquet.ROWS):
            yield Block(first, values.start(min(parquet.ROWS, self._count - first)), None)

    def _rows(self) -> Iterator["Rows"]:
        last, ends = -1, [*(first for first, _ in self._begins[1:]), self._count]
        for (_, path), after in zip(self._begins, ends, strict=True):
            first = 0
            with parquet.opened_file(path, self._count) as reader:
                for table in reader.groups(tuple(COLUMNS)):
                    rows = _rows_of(table, path, self._count, first, self.labelled)
                    if (np.diff(rows.index, prepend=last) <= 0).any():
                        raise MismatchError(
                            f"{path}, rows from {first}: expected indices above {last} in ascending order, file after "
                            "file; sort the rows, or condense in memory (--memory-gb)"
                        )
                    if (last := int(rows.index[-1])) >= after:
                        raise MismatchError(
                            f"{path} has index {last}, but another file begins with {after}; sort the rows"
                        )
                    first += len(rows.index)
                    yield rows


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of another tool's file, in any order."""

    index: Int64[np.ndarray, " rows"]
    visits: Int32[np.ndarray, " rows"]
    value: Float32[np.ndarray, " rows"]
    label: Int64[np.ndarray, " rows"] | None

    def block(self, first: int, stop: int) -> Block:
        """Return the samples from `first` to `stop`; those without a row are unseen. The rows must ascend."""
        inside = slice(*np.searchsorted(self.index, [first, stop]))
        made = values.start(stop - first)
        made.visits[self.index[inside] - first] = self.visits[inside]
        made.value[self.index[inside] - first] = self.value[inside]
        return Block(first, made, None if self.label is None else self.label[inside])


def _is_several(path: Path) -> bool:
    """Check for a folder of parquet files or a glob pattern of another tool."""
    if path.is_dir():
        return not parquet.is_folder(path)
    return not path.exists() and glob.has_magic(str(path))


def _is_own(path: Path) -> bool:
    return not _is_several(path) and METADATA_KEY in parquet.metadata_keys(path)


def _files_of(path: Path) -> list[Path]:
    """Return the files at a path, by name: itself, or all parquet files of a folder or pattern but hidden ones."""
    if not _is_several(path):
        return [path]
    found = sorted(path.rglob("*.parquet") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True)))
    found = [file for file in found if file.is_file() and not file.name.startswith(("_", "."))]
    if not found:
        raise NotFoundError(f"no parquet files at {path}")
    return found


def _header(document: Mapping[str, Any]) -> bytes:
    return canonical_json({key: item for key, item in document.items() if key != "digest"})


def _read_own(path: Path, count: int) -> Held:
    with parquet.opened(path, count) as reader:
        source = OwnFile(reader, path, count)
        blocks = list(source.blocks())
    visits = np.concatenate([np.empty(0, np.int32), *(block.values.visits for block in blocks)])
    value = np.concatenate([np.empty(0, np.float32), *(block.values.value for block in blocks)])
    labels = [np.empty(0, np.int64), *(block.labels for block in blocks if block.labels is not None)]
    return Held(Values(visits, value), np.concatenate(labels) if source.labelled else None, source.document)


def _trouble(some: Values, path: Path, first: int) -> KcdcacheError | None:
    """Return the first error in rows of our file that begin at row `first`."""
    if (bad := some.visits < 0).any():
        row = int(np.argmax(bad))
        return MismatchError(f"{path}, row {first + row}: 'visits' is {some.visits[row]}, expected 0 or more")
    if (bad := ~np.isfinite(some.value)).any():
        row = int(np.argmax(bad))
        return NonFiniteError(f"{path}, row {first + row}: 'value' is {some.value[row]}, expected a finite float32")
    return None


def _read_foreign(path: Path, count: int) -> Held:
    """Return the values in all files at a path; their rows may have any order."""
    tables, rows = [], 0
    for file in _files_of(path):
        with _opened_foreign(file, count) as reader:
            if (rows := rows + reader.rows) > count:
                raise MismatchError(f"{path} holds {rows} rows or more, expected at most {count} (one per sample)")
            tables.append(reader.whole(tuple(COLUMNS)).replace_schema_metadata())
    table = pa.concat_tables(tables, promote_options="permissive")
    found = _rows_of(table, path, count, 0, "label" in table.column_names and rows == count)
    order = np.argsort(found.index, kind="stable")
    again = order[1:][np.diff(found.index[order]) == 0]
    if again.size:
        row = int(again.min())
        raise MismatchError(f"{path}, row {row}: index {found.index[row]} occurs again; expected each index once")
    made = values.start(count)
    made.visits[found.index], made.value[found.index] = found.visits, found.value
    return Held(made, None if found.label is None else found.label[order])  # every index is there


@contextmanager
def _opened_foreign(path: Path, count: int) -> Iterator[parquet.Reader]:
    """Open another tool's file; raises unless it has the columns of values."""
    with parquet.opened_file(path, count) as reader:
        parquet.require_no_part(reader.schema, path)
        for name in ("index", "value"):
            if name not in reader.schema.names:
                found = ", ".join(reader.schema.names[:20])
                raise MismatchError(f"{path} has no column '{name}', expected 'index' and 'value'; found: {found}")
        if set(manifest.ARRAYS) - {"mixed"} <= set(reader.schema.names):
            if manifest.METADATA_KEY.encode() in (reader.schema.metadata or {}):
                raise MismatchError(f"{path} is a manifest, expected values; give the run's values.parquet")
            raise CorruptionError(f"{path} has a manifest's columns, but lost its record; make or copy it again")
        yield reader


def _rows_of(table: pa.Table, path: Path, count: int, first: int, labelled: bool) -> Rows:
    """Return rows of another tool's file that begin at row `first` of it."""
    index = _integers(table, "index", count, path, first)
    visits = np.ones(len(index), np.int64)
    if "visits" in table.column_names:
        visits = _integers(table, "visits", MOST_VISITS + 1, path, first)
    given = _numbers(table, "value", path, first)
    with np.errstate(over="ignore"):
        value = np.where(visits > 0, given, 0).astype(np.float32)
    if (bad := ~np.isfinite(value)).any():
        row = int(np.argmax(bad))
        raise NonFiniteError(f"{path}, row {first + row}: 'value' is {given[row]}, expected a finite float32")
    label = _integers(table, "label", MOST_LABEL, path, first) if labelled else None
    return Rows(index, visits.astype(np.int32), value, label)


def _numbers(table: pa.Table, name: str, path: Path, first: int) -> Shaped[np.ndarray, " rows"]:
    if table.column_names.count(name) > 1:
        raise MismatchError(f"{path} has the column '{name}' more than once; expected it once")
    column = table.column(name)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise MismatchError(f"{path}: column '{name}' should hold numbers, found {column.type}")
    if column.null_count:
        row = first + int(np.argmax(column.is_null().to_numpy()))
        raise MismatchError(f"{path}, row {row}: '{name}' is empty; expected a number in every row")
    return column.to_numpy()


def _integers(table: pa.Table, name: str, stop: int, path: Path, first: int) -> Int64[np.ndarray, " rows"]:
    found = _numbers(table, name, path, first)
    fits = (found >= 0) & (found < stop)
    if found.dtype.kind == "f":
        fits &= found == np.floor(found)
    if not fits.all():
        row = int(np.argmin(fits))
        raise MismatchError(
            f"{path}, row {first + row}: '{name}' is {found[row]}, expected a whole number in [0, {stop})"
        )
    return found.astype(np.int64)
