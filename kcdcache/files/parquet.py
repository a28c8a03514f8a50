"""Parquet tables with deterministic bytes, in one file or a folder of parts: digested, written, read.

Before a row of an unknown file is decoded, it must have a small footer, no more rows than expected, and columns of the
expected types. Every page with a checksum is verified.
"""

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Shaped
from pydantic import ConfigDict, Field

from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, UnfinishedError, UnsafeError
from kcdcache.files import records
from kcdcache.files.atomic import create_exclusive, naming, open_plain, sha256_file, write_atomic
from kcdcache.settings import Settings

ROWS = 2**20
"""rows of each row group but the last"""
UNKNOWN_ROWS = 2**24
"""rows allowed if the number of samples is not known: more than ImageNet-21k has"""
ROWS_PER_BYTE = 8
"""also allowed then, far above a condensed set's"""
MOST_FOOTER_BYTES = 2 * 2**20
MOST_ENTRIES = 20_000
"""columns or row groups in a footer"""
TEXT = "part"
"""the only text column; read as a dictionary, so that a long text repeated in every row is in memory once"""


class Digest:
    """SHA-256 of a header and columns that come in blocks of rows, however they are cut."""

    def __init__(self, kinds: Mapping[str, Any]) -> None:
        """Begin; `kinds` maps every column's name to its numpy type, in order."""
        self._kinds = {name: np.dtype(kind).newbyteorder("<") for name, kind in kinds.items()}
        self._states = {name: hashlib.sha256() for name in kinds}
        self._rows = dict.fromkeys(kinds, 0)

    def add(self, columns: Mapping[str, Shaped[np.ndarray, " rows"]]) -> None:
        """Add the next rows of some columns; unknown columns are ignored."""
        for name in self._kinds.keys() & columns.keys():
            little = np.ascontiguousarray(columns[name], dtype=self._kinds[name])
            self._states[name].update(little.view(np.uint8).data)
            self._rows[name] += little.size

    def over(self, header: bytes, names: Sequence[str] | None = None) -> str:
        """Return the digest of a header and the rows so far, of all or the named columns, in that order.

        It is the SHA-256 of the header's length (8 bytes, little endian), the header, and for each column
        `name:type:rows;` and the SHA-256 of its bytes (little endian).
        """
        state = hashlib.sha256(len(header).to_bytes(8, "little") + header)
        for name in self._kinds if names is None else names:
            state.update(f"{name}:{self._kinds[name].str}:{self._rows[name]};".encode() + self._states[name].digest())
        return state.hexdigest()


def digest(header: bytes, columns: Mapping[str, Shaped[np.ndarray, " rows"]]) -> str:
    """Return the digest of a header and whole columns, as `Digest` defines it."""
    state = Digest({name: column.dtype for name, column in columns.items()})
    state.add(columns)
    return state.over(header)


def regrouped(blocks: Iterable[Mapping[str, np.ndarray]], rows: int) -> Iterator[dict[str, np.ndarray]]:
    """Regroup blocks of columns into blocks of exactly `rows` rows and a last, smaller one."""
    held: list[Mapping[str, np.ndarray]] = []
    size = 0
    for block in blocks:
        held.append(block)
        size += len(next(iter(block.values())))
        while size >= rows:
            whole = {name: np.concatenate([part[name] for part in held]) for name in block}
            yield {name: column[:rows] for name, column in whole.items()}
            held, size = [{name: column[rows:] for name, column in whole.items()}], size - rows
    if size:
        yield {name: np.concatenate([part[name] for part in held]) for name in held[0]}


# ---- writing


class Writer:
    """Writes a parquet file in row groups of ROWS rows, with the same bytes however the rows come in.

    Integers are DELTA_BINARY_PACKED, floats PLAIN (fastparquet and Spark 3.5 cannot read BYTE_STREAM_SPLIT, which saves
    nothing here), texts dictionary encoded; zstd level 1; every page has a checksum. Metadata is stored once, without
    Arrow's own copy.
    """

    def __init__(self, sink: Any, schema: pa.Schema) -> None:
        """Begin a file in `sink`, a binary stream of Python or Arrow."""
        numbers = {field.name: field.type for field in schema if not _is_text(field.type)}
        self._writer = pq.ParquetWriter(
            sink, schema.remove_metadata(), compression="zstd", compression_level=1, write_page_checksum=True,
            store_schema=False, use_dictionary=[name for name in schema.names if name not in numbers],
            column_encoding={
                name: "PLAIN" if pa.types.is_floating(kind) else "DELTA_BINARY_PACKED"
                for name, kind in numbers.items()
            },
        )  # fmt: skip

    def write(self, table: pa.Table) -> None:
        """Write the next rows; their number must be a multiple of ROWS in all calls but the last."""
        self._writer.write_table(table.replace_schema_metadata(), row_group_size=ROWS)

    def close(self, metadata: Mapping[Any, Any]) -> None:
        """Write the metadata and finish the file."""
        self._writer.add_key_value_metadata(dict(metadata))
        self._writer.close()


def encode(table: pa.Table) -> bytes:
    """Return a table as parquet bytes, equal if the tables are (same pyarrow version)."""
    sink = pa.BufferOutputStream()
    writer = Writer(sink, table.schema)
    writer.write(table)
    writer.close(table.schema.metadata or {})
    return sink.getvalue().to_pybytes()


# ---- reading


class Reader:
    """An open parquet file, read one row group at a time."""

    def __init__(self, path: Path, parquet: pq.ParquetFile) -> None:
        """Take an open file; raises ValueError if its footer contradicts itself."""
        self._path, self._parquet, self._group_rows = path, parquet, _group_rows(parquet.metadata)
        self.rows = sum(self._group_rows)
        self.schema: pa.Schema = parquet.schema_arrow

    def groups(
        self, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None
    ) -> Iterator[pa.Table]:
        """Yield rows `start` to `stop` in order, at most one row group at a time; other row groups are not read.

        `columns` that do not exist are ignored.
        """
        names = _columns_to_read(self.schema, self._path, columns)
        spans = list(_pieces(self._group_rows, start, stop))
        with ThreadPoolExecutor(1) as pool:
            coming = [pool.submit(self._read, [number], names) for number, _, _ in spans[:1]]
            for place, (_, low, high) in enumerate(spans):
                table = coming.pop().result()
                # the next ones are read while the caller works
                coming += [pool.submit(self._read, [number], names) for number, _, _ in spans[place + 1 : place + 2]]
                yield table.slice(low, high - low)

    def whole(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return all rows at once."""
        names = _columns_to_read(self.schema, self._path, columns)
        return self._read([number for number, rows in enumerate(self._group_rows) if rows], names)

    def _read(self, numbers: list[int], names: list[str]) -> pa.Table:
        with _explaining(self._path):
            table = self._parquet.read_row_groups(numbers, columns=names)
            table.validate()
            if names and table.num_rows != (rows := sum(self._group_rows[number] for number in numbers)):
                raise ValueError(f"its pages hold {table.num_rows} rows, its footer says {rows}")
            return table


def _pieces(rows: Iterable[int], start: int, stop: int | None) -> Iterator[tuple[int, int, int]]:
    """Yield (number, first row, stop row) for each block with some of the wanted rows."""
    first = 0
    for number, count in enumerate(rows):
        low, high = max(start - first, 0), count if stop is None else min(stop - first, count)
        if low < high:
            yield number, low, high
        first += count


@contextmanager
def opened_file(path: Path, most_rows: int | None = None) -> Iterator[Reader]:
    """Open a parquet file to read it by row groups, unaffected if `path` is replaced; errors are those of `read`."""
    with naming(path):
        stream = open_plain(path)
    with stream:
        with _explaining(path):
            _require_small_footer(stream)
            parquet = _parquet_file(stream)
            if TEXT in parquet.schema_arrow.names:
                parquet = _parquet_file(stream, metadata=parquet.metadata, read_dictionary=[TEXT])
            reader = Reader(path, parquet)
        _require_few_rows(reader.rows, os.fstat(stream.fileno()).st_size, path, most_rows)
        yield reader


def read(path: Path, most_rows: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a parquet file's table, after verifying every page that has a checksum.

    Columns are integers, floats or booleans; only `part` has texts. `columns` that do not exist are ignored. Without
    `most_rows`, 16.8 million rows or 8 per byte are allowed.

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: the file is not parquet, or damaged.
        MismatchError: it has more than `most_rows` rows, or a column of another type.
        UnsafeError: it is no plain file, or asks for more memory than there is.
    """
    with opened_file(path, most_rows) as reader:
        return reader.whole(columns)


def document(schema: pa.Schema, key: str, path: Path) -> dict[str, Any] | None:
    """Return the JSON object under a metadata key; None if absent. Raises CorruptionError if it is damaged."""
    text = (schema.metadata or {}).get(key.encode())
    if text is None:
        return None
    found = records.parse_json(text, f"{path}: its metadata '{key}' is damaged or was changed; it")
    if not isinstance(found, dict):
        raise CorruptionError(f"{path}: its metadata '{key}' should be a JSON object; write the file again")
    return found


def require_schema(schema: pa.Schema, expected: pa.Schema, path: Path) -> None:
    """Raise CorruptionError, naming the first odd column, unless a schema has the expected columns and types."""
    found, wanted = ([(field.name, str(field.type)) for field in some] for some in (schema, expected))
    if found == wanted:
        return
    odd = [item for item in found if item not in wanted] or [item for item in wanted if item not in found] or found
    listed = [", ".join(f"{name} {kind}" for name, kind in columns) for columns in (wanted, found)]
    raise CorruptionError(
        f"{path} was changed after it was written: expected the columns {listed[0]}, found {listed[1]:.400}; "
        f"look at '{odd[0][0]:.80}', or write the file again"
    )


def _require_small_footer(stream: BinaryIO) -> None:
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - 8))
    length = int.from_bytes(stream.read(4), "little")
    if stream.read(4) != b"PAR1" or length > min(size, MOST_FOOTER_BYTES):
        raise ValueError(f"no parquet footer of at most {MOST_FOOTER_BYTES} bytes at its end")
    stream.seek(0)


def _parquet_file(stream: BinaryIO, **how: Any) -> pq.ParquetFile:
    return pq.ParquetFile(
        stream, page_checksum_verification=True, arrow_extensions_enabled=False,
        thrift_string_size_limit=MOST_FOOTER_BYTES, thrift_container_size_limit=MOST_ENTRIES, **how,
    )  # fmt: skip


def _group_rows(metadata: pq.FileMetaData) -> list[int]:
    """Return the rows of every row group, without looking at its columns: damaged ones can crash the process."""
    rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
        raise ValueError(f"its footer says {metadata.num_rows} rows, its row groups {sum(rows)}")
    return rows


def _require_few_rows(rows: int, size: int, path: Path, most_rows: int | None) -> None:
    """Raise MismatchError for more than `most_rows` rows, or (None) more than a file of `size` bytes can hold."""
    most = max(UNKNOWN_ROWS, ROWS_PER_BYTE * size) if most_rows is None else most_rows
    if rows > most:
        raise MismatchError(f"{path} holds {rows} rows, expected at most {most} (one per sample); give the right file")


def _columns_to_read(schema: pa.Schema, path: Path, columns: Sequence[str] | None) -> list[str]:
    fields = [field for field in schema if columns is None or field.name in columns]
    for field in fields:
        kind, is_text = field.type, field.name == TEXT and _is_text(field.type)
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or is_text):
            raise MismatchError(f"{path}: column '{field.name}' should hold numbers, found {kind}")
    return [field.name for field in fields]


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_dictionary(kind))


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Turn errors while a parquet file is read into ours."""
    with naming(path):
        try:
            yield
        except pa.ArrowMemoryError as error:
            raise UnsafeError(f"{path} asks for more memory than there is: {error}; it is not read") from None
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, KcdcacheError) or getattr(error, "errno", None) is not None:
                raise
            reason = str(error).strip()[:400]
            raise CorruptionError(f"{path} is not an undamaged parquet file: {reason}; write it again") from error


# ---- folders of parts


SEAL = "_parts.json"
"""record of a folder; other tools skip names that begin so, and read the parquet files beside it"""
FORMAT_VERSION = 0
PART_KEY = "kcdcache.part"
"""metadata key that marks a part"""
MOST_PARTS = 10**5
_PATTERN = "part-*-of-*.parquet"


class Span(NamedTuple):
    """The samples of one part."""

    number: int
    of: int
    """number of parts"""
    first: int
    stop: int

    @property
    def name(self) -> str:
        """File name of the part."""
        return f"part-{self.number:05}-of-{self.of:05}.parquet"


class Part(records.Record):
    """A finished part."""

    rows: records.Count
    bytes: records.Count
    sha256: records.Sha256


class Seal(Settings):
    """The record of a folder."""

    model_config = ConfigDict(strict=True)

    key: str
    """metadata key of the document in a single file of the same kind"""
    samples: int = Field(ge=1)
    """of the whole data set"""
    partition_rows: int = Field(ge=1)
    """samples of each part but the last"""
    document: dict[str, Any]
    """that of a single file with the same rows, with its digest"""
    fingerprint: str | None = None
    """`values.fingerprint`, of values"""
    parts: tuple[Part, ...] = ()


def spans(count: int, partition_rows: int) -> list[Span]:
    """Split a table of `count` > 0 samples into ranges of `partition_rows`, the last one smaller."""
    of = -(-count // partition_rows)
    return [
        Span(number, of, number * partition_rows, min((number + 1) * partition_rows, count)) for number in range(of)
    ]


def is_folder(path: Path) -> bool:
    """Check for a folder of parts, sealed or not."""
    return path.is_dir() and ((path / SEAL).exists() or any(path.glob(_PATTERN)))


def write_part(folder: Path, span: Span, schema: pa.Schema, blocks: Iterable[pa.Table]) -> Part:
    """Write one part, whole or not at all; raises LockedError if it exists. All blocks but the last have ROWS rows."""
    path, rows = folder / span.name, []

    def fill(temporary: Path) -> None:
        with open(temporary, "wb") as sink:
            writer = Writer(sink, schema)
            for block in blocks:
                writer.write(block)
                rows.append(block.num_rows)
            writer.close({PART_KEY: records.canonical_json(span._asdict())})

    create_exclusive(path, fill)
    return Part(rows=sum(rows), bytes=path.stat().st_size, sha256=sha256_file(path))


def seal(folder: Path, content: Seal) -> None:
    """Write the record of a folder whose parts are all there, which completes it."""
    write_atomic(
        folder / SEAL, records.sealed_json({"format_version": FORMAT_VERSION, **content.model_dump(mode="json")})
    )


def read_seal(folder: Path) -> Seal:
    """Return the record of a folder.

    Raises:
        UnfinishedError: there is none: the folder was not finished, or not copied whole.
        CorruptionError: it is damaged, or a part is missing or of another size.
        MismatchError: it has a newer format.
    """
    file = folder / SEAL
    if not file.exists():
        raise UnfinishedError(
            f"{folder} has parts but no {SEAL}, which is written last: it was not written or copied to its end; make "
            "or copy it again"
        )
    found = records.read_sealed_object(file, "format_version")
    records.require_format(found, FORMAT_VERSION, folder)
    del found["format_version"]
    content = records.parse(Seal, records.canonical_json(found), file)
    of = -(-content.samples // content.partition_rows)
    if of != len(content.parts) or of > MOST_PARTS:
        raise CorruptionError(
            f"{file} is damaged: it lists {len(content.parts)} parts, expected {of} (at most {MOST_PARTS})"
        )
    for span, part in zip(spans(content.samples, content.partition_rows), content.parts, strict=True):
        if part.rows > span.stop - span.first:
            raise CorruptionError(f"{file} is damaged: {span.name} has {part.rows} rows, more than its samples")
        _require_size(folder / span.name, part)
    return content


class Joined:
    """The parts of a folder as one table; each is compared with the record whenever it is opened."""

    def __init__(self, path: Path) -> None:
        """Take a folder; errors are those of `read_seal`."""
        self._path, self.seal = path, read_seal(path)
        self._spans = spans(self.seal.samples, self.seal.partition_rows)
        self.rows = sum(part.rows for part in self.seal.parts)
        with self._opened(self._spans[0]) as reader:
            plain = reader.schema.remove_metadata()
        self.schema: pa.Schema = plain.with_metadata({self.seal.key: records.canonical_json(self.seal.document)})

    def groups(
        self, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None
    ) -> Iterator[pa.Table]:
        """Yield rows like `Reader.groups`; other parts stay closed. Raises CorruptionError if a part was changed."""
        for number, low, high in _pieces((part.rows for part in self.seal.parts), start, stop):
            with self._opened(span := self._spans[number]) as reader:
                if not reader.schema.equals(self.schema):
                    raise CorruptionError(
                        f"{self._path / span.name} has other columns than the part before; make the set again"
                    )
                yield from reader.groups(columns, low, high)

    def whole(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return all rows at once."""
        names = [name for name in self.schema.names if columns is None or name in columns]
        empty = self.schema.remove_metadata().empty_table().select(names)
        return pa.concat_tables([empty, *self.groups(columns)])

    @contextmanager
    def _opened(self, span: Span) -> Iterator[Reader]:
        path, part = self._path / span.name, self.seal.parts[span.number]
        _require_size(path, part)
        if (found := sha256_file(path)) != part.sha256:
            raise CorruptionError(
                f"{path} is not what was written: its SHA-256 is {found}, {SEAL} says {part.sha256}; make the set "
                "again, or copy it again"
            )
        with opened_file(path, span.stop - span.first) as reader:
            if reader.rows != part.rows:
                raise CorruptionError(f"{path} has {reader.rows} rows, {SEAL} says {part.rows}; make the set again")
            yield reader


Table = Reader | Joined
"""an open table"""


@contextmanager
def opened(path: Path, most_rows: int | None = None) -> Iterator[Table]:
    """Open a table, one file or a folder of parts, to read it by row groups; errors are those of `read`.

    Raises UnfinishedError for a folder without its record.
    """
    if not is_folder(path):
        with opened_file(path, most_rows) as reader:
            require_no_part(reader.schema, path)
            yield reader
        return
    joined = Joined(path)
    size = sum(part.bytes for part in joined.seal.parts)
    _require_few_rows(joined.rows, size, path, most_rows)
    yield joined


def metadata_keys(path: Path) -> set[str]:
    """Return the keys of a table's metadata, without reading a column."""
    if is_folder(path):
        return {read_seal(path).key}
    with opened(path, sys.maxsize) as reader:
        return {key.decode(errors="replace") for key in reader.schema.metadata or {}}


def require_no_part(schema: pa.Schema, path: Path) -> None:
    """Raise MismatchError, naming the folder to give instead, if a file is one part of several."""
    if PART_KEY.encode() in (schema.metadata or {}):
        raise MismatchError(f"{path} is one of several parts of a set; give their folder, {path.parent}")


def _require_size(path: Path, part: Part) -> None:
    if not path.is_file():
        raise CorruptionError(f"{path} is missing, {SEAL} beside it lists it; make or copy the set again")
    if (size := path.stat().st_size) != part.bytes:
        raise CorruptionError(f"{path} has {size} bytes, {SEAL} says {part.bytes}; make or copy the set again")
