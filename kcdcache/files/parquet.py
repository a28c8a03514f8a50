"""Parquet tables as deterministic bytes: page checksums on, a digest over header and columns, damage refused."""

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Shaped

from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, UnfinishedError, UnsafeError
from kcdcache.files import atomic, pages
from kcdcache.files.atomic import create_exclusive, naming, open_plain, sha256_file, write_atomic
from kcdcache.files.records import canonical_json, parse_json, read_sealed_object, sealed_json

ROWS = 2**20
"""rows of each row group but the last"""
UNKNOWN_ROWS = 2**24
"""rows allowed where the number of samples is not known: more than ImageNet-21k has"""
ROWS_PER_BYTE = 8
"""and so many per byte of the file, which a condensed set stays far below"""
MOST_NAMES = 64
"""columns read at once"""
PAGE_BYTES, VALUE_BYTES = 4096, 16
"""a page of numbers takes at most so much, and so much more per value"""
TEXT_BYTES = 64
"""all different texts of a column together: the names of the parts"""
LEAST_TEXTS = 2
"""a dictionary may hold so many where there are fewer rows: the names of both parts"""
PLAIN_ENCODINGS = (0, 2, 8)
"""of texts, as parquet numbers them: plain, and the two names of dictionary indices; others can repeat a long text"""


class Digest:
    """SHA-256 of a header and columns that come in blocks of rows; how they are cut makes no difference."""

    def __init__(self, kinds: Mapping[str, Any]) -> None:
        """Begin; `kinds` holds every column's name and numpy type, in order."""
        self._kinds = {name: np.dtype(kind).newbyteorder("<") for name, kind in kinds.items()}
        self._states = {name: hashlib.sha256() for name in kinds}
        self._rows = dict.fromkeys(kinds, 0)

    def add(self, columns: Mapping[str, Shaped[np.ndarray, " rows"]]) -> None:
        """Take the next rows of some of the columns; others in `columns` are passed over."""
        for name in self._kinds.keys() & columns.keys():
            little = np.ascontiguousarray(columns[name], dtype=self._kinds[name])
            self._states[name].update(little.view(np.uint8).data)
            self._rows[name] += little.size

    def over(self, header: bytes, names: Sequence[str] | None = None) -> str:
        """Return the digest of a header and of the rows so far, of all columns or of those named, in that order."""
        chosen = self._kinds if names is None else names
        return combined(header, {name: (self._kinds[name], self._rows[name], self.of(name)) for name in chosen})

    def of(self, name: str) -> bytes:
        """Return the SHA-256 of the rows of one column so far."""
        return self._states[name].digest()


def combined(header: bytes, columns: Mapping[str, tuple[Any, int, bytes]]) -> str:
    """Return the digest of a header and of columns of which numpy type, rows and SHA-256 are known, in their order.

    It is the SHA-256 of the header's length (8 bytes, little endian), the header, and for each column
    `name:type:rows;` and the SHA-256 of its bytes (little endian).
    """
    state = hashlib.sha256(len(header).to_bytes(8, "little") + header)
    for name, (kind, rows, digest) in columns.items():
        state.update(f"{name}:{np.dtype(kind).newbyteorder('<').str}:{rows};".encode() + digest)
    return state.hexdigest()


def regrouped(blocks: Iterable[Mapping[str, np.ndarray]], rows: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the rows of blocks of columns, in order, in blocks of exactly `rows` rows and a last one of the others."""
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


def digest(header: bytes, columns: Mapping[str, Shaped[np.ndarray, " rows"]]) -> str:
    """Return the digest of a header and whole columns, as `Digest` defines it."""
    state = Digest({name: column.dtype for name, column in columns.items()})
    state.add(columns)
    return state.over(header)


class Writer:
    """Writes a parquet file by row groups of at most ROWS rows, with the same bytes however the rows come in.

    Integers are DELTA_BINARY_PACKED, floats and 32-bit integers (counts) BYTE_STREAM_SPLIT, strings dictionary encoded;
    zstd level 1; every page carries a checksum. The metadata stands there once: Arrow's own copy of it would be a
    second truth.
    """

    def __init__(self, sink: Any, schema: pa.Schema) -> None:
        """Begin a file in `sink`, a binary stream of Python or Arrow."""
        plain = {field.name: field.type for field in schema if not _is_text(field.type)}
        self._writer = pq.ParquetWriter(
            sink, schema.remove_metadata(), compression="zstd", compression_level=1, write_page_checksum=True,
            store_schema=False, use_dictionary=[name for name in schema.names if name not in plain],
            column_encoding={name: _encoding(kind) for name, kind in plain.items()},
        )  # fmt: skip

    def write(self, table: pa.Table) -> None:
        """Write the next rows; only the last call may give a number of rows that ROWS does not divide.

        Raises:
            OSError: the system refuses to write.
        """
        self._writer.write_table(table.replace_schema_metadata(), row_group_size=ROWS)

    def close(self, metadata: Mapping[Any, Any]) -> None:
        """Write the metadata and end the file."""
        self._writer.add_key_value_metadata(dict(metadata))
        self._writer.close()


def encode(table: pa.Table) -> bytes:
    """Return a table as parquet bytes, equal whenever the tables are (same pyarrow version)."""
    sink = pa.BufferOutputStream()
    writer = Writer(sink, table.schema)
    writer.write(table)
    writer.close(table.schema.metadata or {})
    return sink.getvalue().to_pybytes()


@runtime_checkable
class Table(Protocol):
    """Rows open for reading: of a file (`Reader`), or of several as if they were one (`partitioned.Joined`)."""

    rows: int
    schema: pa.Schema
    """with the metadata of the file"""

    def check(self, columns: Sequence[str] | None = None) -> list[str]:
        """Return the columns to read, after holding all that is claimed of them against the rows."""

    def groups(
        self, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None
    ) -> Iterator[pa.Table]:
        """Yield rows `start` to `stop` in order."""

    def whole(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return all rows at once."""


class Reader:
    """A parquet file open for reading, one row group at a time; each is checked before it is decoded."""

    def __init__(self, path: Path, stream: BinaryIO, groups: list[pages.Group], parquet: pq.ParquetFile) -> None:
        """Take an open file whose footer was read."""
        self._path, self._stream, self._groups, self._parquet = path, stream, groups, parquet
        self._paths = [parquet.schema.column(position).path for position in range(len(parquet.schema))]
        self._honest: set[tuple[int, str]] = set()
        self.rows = sum(group.rows for group in groups)
        self.schema: pa.Schema = parquet.schema_arrow

    def check(self, columns: Sequence[str] | None = None) -> list[str]:
        """Return the columns to read, after holding all that the file claims of them against its rows.

        Raises:
            CorruptionError, MismatchError, UnsafeError: as for `read`.
        """
        return self._check(columns, range(len(self._groups)))

    def groups(
        self, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None
    ) -> Iterator[pa.Table]:
        """Yield rows `start` to `stop` in order, as tables of at most one row group each.

        With `columns` only those that are there are read. Row groups without any of the rows are not even looked at.

        Raises:
            CorruptionError, MismatchError, UnsafeError: as for `read`.
        """
        spans = list(self._spans(start, self.rows if stop is None else stop))
        names = self._check(columns, [number for number, _, _ in spans])
        with ThreadPoolExecutor(1) as pool:
            coming = [pool.submit(self._read, [number], names) for number, _, _ in spans[:1]]
            for place, (_, low, high) in enumerate(spans):
                table = coming.pop().result()
                # the next ones are read while the caller works
                coming += [pool.submit(self._read, [number], names) for number, _, _ in spans[place + 1 : place + 2]]
                yield table.slice(low, high - low)

    def whole(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return all rows at once.

        Raises:
            CorruptionError, MismatchError, UnsafeError: as for `read`.
        """
        names = self.check(columns)
        return self._read([number for number, group in enumerate(self._groups) if group.rows], names)

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield each row group that has some of the rows: its number, and where they begin and end in it."""
        first = 0
        for number, group in enumerate(self._groups):
            low, high = max(start - first, 0), min(stop - first, group.rows)
            if low < high:
                yield number, low, high
            first += group.rows

    def _check(self, columns: Sequence[str] | None, numbers: Sequence[int]) -> list[str]:
        with _explaining(self._path):
            names = _require_plain_columns(self.schema, self._path, columns)
            for number in numbers:
                new = {name: text for name, text in names.items() if (number, name) not in self._honest}
                if new and self._groups[number].rows:
                    _require_honest_group(self._groups[number], self._paths, new, self._stream)
                self._honest.update((number, name) for name in new)
        return list(names)

    def _read(self, numbers: list[int], names: list[str]) -> pa.Table:
        with _explaining(self._path):
            return self._parquet.read_row_groups(numbers, columns=names)


@contextmanager
def opened_file(path: Path, most_rows: int | None = None) -> Iterator[Reader]:
    """Open a parquet file to read it by row groups; what replaces it meanwhile at `path` is not seen.

    Raises:
        NotFoundError, CorruptionError, MismatchError, UnsafeError: as for `read`.
    """
    with naming(path):
        stream = open_plain(path)
    with stream:
        with _explaining(path):
            groups = pages.read_groups(stream)
            reader = Reader(path, stream, groups, _parquet_file(stream))
            require_few_rows(reader.rows, os.fstat(stream.fileno()).st_size, path, most_rows)
        yield reader


def read(path: Path, most_rows: int | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a parquet file's table, every page checked against its checksum where it has one.

    Columns hold integers, floats, booleans or short texts. With `columns` only those of them that are there are read.
    Nothing is decoded before the file's own figures, down to every page's, were found within bounds: memory is limited
    by the rows allowed, not by what the file claims. Without `most_rows` 16.8 million rows are allowed, or 8 per byte.

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: the file is not parquet, or damaged.
        MismatchError: it has more than `most_rows` rows, or a column holds something else.
        UnsafeError: it is no plain file, or claims more than its rows can hold.
    """
    with opened_file(path, most_rows) as reader:
        return reader.whole(columns)


def column_names(path: Path) -> list[str]:
    """Return the names of a parquet file's columns; none is read.

    Raises:
        NotFoundError, CorruptionError, UnsafeError: as for `read`.
    """
    with opened_file(path, sys.maxsize) as reader:
        return list(reader.schema.names)


def document(schema: pa.Schema, key: str, path: Path) -> dict[str, Any] | None:
    """Return the JSON object kept under a metadata key of a schema, or None where the key is absent.

    Raises:
        CorruptionError: what stands there is not a JSON object.
    """
    text = (schema.metadata or {}).get(key.encode())
    if text is None:
        return None
    found = parse_json(text, f"{path}: its metadata '{key}' is damaged or was changed; it")
    if not isinstance(found, dict):
        raise CorruptionError(f"{path}: its metadata '{key}' should be a JSON object; write the file again")
    return found


def require_schema(schema: pa.Schema, expected: pa.Schema, path: Path) -> None:
    """Do nothing if a schema has exactly the expected columns and types.

    Raises:
        CorruptionError: a column is missing, unknown, or of another type; names the first one.
    """
    found = [(field.name, str(field.type)) for field in schema]
    wanted = [(field.name, str(field.type)) for field in expected]
    if found == wanted:
        return
    odd = [item for item in found if item not in wanted] or [item for item in wanted if item not in found] or found
    raise CorruptionError(
        f"{path} was changed after it was written: expected the columns {_listed(wanted)}, found {_listed(found)}; "
        f"look at '{odd[0][0]}', or write the file again"
    )


def require_few_rows(rows: int, size: int, path: Path, most_rows: int | None) -> None:
    """Do nothing if a table of `size` bytes has no more than `most_rows` rows (None: than its bytes make credible).

    Raises:
        MismatchError: it claims more.
    """
    most = max(UNKNOWN_ROWS, ROWS_PER_BYTE * size) if most_rows is None else most_rows
    if rows > most:
        raise MismatchError(f"{path} holds {rows} rows, expected at most {most} (one per sample); give the right file")


def _listed(columns: list[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in columns)


def _encoding(kind: pa.DataType) -> str:
    return "BYTE_STREAM_SPLIT" if pa.types.is_floating(kind) or kind == pa.int32() else "DELTA_BINARY_PACKED"


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_dictionary(kind))


def _parquet_file(stream: BinaryIO) -> pq.ParquetFile:
    return pq.ParquetFile(
        stream, page_checksum_verification=True, arrow_extensions_enabled=False,
        thrift_string_size_limit=pages.MOST_FOOTER_BYTES, thrift_container_size_limit=pages.MOST_COLUMNS,
    )  # fmt: skip


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a parquet file is read into our errors."""
    with naming(path):
        try:
            yield
        except UnsafeError as error:
            raise UnsafeError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
        except pa.ArrowMemoryError as error:
            raise UnsafeError(f"{path} asks for more memory than there is: {error}; it is not read") from None
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, KcdcacheError) or getattr(error, "errno", None) is not None:
                raise
            reason = str(error).strip()[:400]
            raise CorruptionError(f"{path} is not an undamaged parquet file: {reason}; write it again") from error


def _require_plain_columns(schema: pa.Schema, path: Path, columns: Sequence[str] | None) -> dict[str, bool]:
    """Return the columns to read, each with whether it holds texts."""
    fields = [field for field in schema if columns is None or field.name in columns]
    if len(fields) > MOST_NAMES:
        raise UnsafeError(f"{path} has {len(fields)} columns, expected at most {MOST_NAMES}; it is not read")
    for field in fields:
        if not _is_plain(field.type):
            raise MismatchError(f"{path}: column '{field.name}' should hold numbers, found {field.type}")
    return {field.name: pa.types.is_string(field.type) for field in fields}


def _require_honest_group(
    group: pages.Group, paths: Sequence[str], names: Mapping[str, bool], stream: BinaryIO
) -> None:
    """Hold every page of the named columns against the rows of its group (`names`: whether a column holds texts)."""
    for column, name in zip(group.columns, paths, strict=True):
        if name in names:
            claimed = sum(_allowed(page, group.rows, name, names[name]) for page in pages.read_pages(stream, column))
            if not claimed == column.values == group.rows:
                raise UnsafeError(
                    f"the pages of column '{name}' claim {claimed} values for {group.rows} rows; it is not read"
                )


def _allowed(page: pages.Page, rows: int, name: str, text: bool) -> int:
    """Return the rows a page holds, if it is no larger than its values can be."""
    dictionary = page.kind == pages.DICTIONARY
    most = TEXT_BYTES if text and dictionary else PAGE_BYTES + VALUE_BYTES * page.values
    plain = not text or page.encoding in PLAIN_ENCODINGS
    values = max(rows, LEAST_TEXTS) if text and dictionary else rows
    if max(page.bytes, page.stored) > most or page.values > values or not plain:
        raise UnsafeError(
            f"a page of column '{name}' claims {page.bytes} bytes for {page.values} values (encoding {page.encoding}), "
            f"expected at most {most} for {rows}; it is not decoded"
        )
    return 0 if dictionary else page.values


def _is_plain(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_string(kind)
    )


SEAL = "_parts.json"
"""record of a folder; other tools pass over names that begin so, and read the parquet files beside it"""
FORMAT_VERSION = 0
PART_KEY = "kcdcache.part"
"""under this key a part says that it is one"""
MOST_PARTS = 10**5
_PATTERN = "part-*-of-*.parquet"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FACTS = ("format_version", "key", "samples", "partition_rows", "document", "fingerprint", "parts")


class Span(NamedTuple):
    """The samples one part is about."""

    number: int
    of: int
    """number of parts"""
    first: int
    stop: int

    @property
    def name(self) -> str:
        """The part's file name."""
        return f"part-{self.number:05}-of-{self.of:05}.parquet"


class Part(NamedTuple):
    """A finished part."""

    rows: int
    bytes: int
    sha256: str


class Seal(NamedTuple):
    """What a folder holds."""

    key: str
    """metadata key under which a single file of the same kind keeps its document"""
    samples: int
    """of the whole data set"""
    partition_rows: int
    """samples of each part but the last"""
    document: dict[str, Any]
    """that of the single file with the same rows, with its digest"""
    fingerprint: str | None
    """of values, `values.fingerprint`"""
    parts: tuple[Part, ...]


def spans(count: int, partition_rows: int) -> list[Span]:
    """Return the parts of a table about `count` > 0 samples: whole ranges of `partition_rows`, and the rest."""
    of = -(-count // partition_rows)
    return [
        Span(number, of, number * partition_rows, min((number + 1) * partition_rows, count)) for number in range(of)
    ]


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder of parts, sealed or not."""
    return path.is_dir() and ((path / SEAL).exists() or any(path.glob(_PATTERN)))


def write_part(folder: Path, span: Span, schema: pa.Schema, blocks: Iterable[pa.Table]) -> Part:
    """Write one part, whole or not at all; all blocks but the last have `tables.ROWS` rows.

    Raises:
        LockedError: it is there already.
        NoSpaceError: the disk is full.
    """
    path, rows = folder / span.name, 0

    def fill(temporary: Path) -> None:
        nonlocal rows
        with open(temporary, "wb") as sink:
            writer = Writer(sink, schema)
            for block in blocks:
                writer.write(block)
                rows += block.num_rows
            writer.close({PART_KEY: canonical_json(span._asdict())})

    create_exclusive(path, fill)
    return Part(rows, path.stat().st_size, sha256_file(path))


def seal(folder: Path, content: Seal) -> None:
    """Write the record of a folder whose parts are all there: what makes it whole.

    Raises:
        NoSpaceError: the disk is full.
    """
    parts = [part._asdict() for part in content.parts]
    write_atomic(folder / SEAL, sealed_json({"format_version": FORMAT_VERSION, **content._asdict(), "parts": parts}))


def write(path: Path, content: Seal, schema: pa.Schema, blocks: Callable[[Span], Iterable[pa.Table]]) -> None:
    """Write a folder of parts, whole or not at all; `blocks` gives the rows of each, `content` all but the parts.

    Raises:
        LockedError: something is there already.
        NoSpaceError: the disk is full.
    """
    with atomic.beside(path) as place:
        made = place / "set"
        made.mkdir()
        parts = [
            write_part(made, span, schema, blocks(span)) for span in spans(content.samples, content.partition_rows)
        ]
        seal(made, content._replace(parts=tuple(parts)))
        atomic.place(made, path, SEAL)


def read_seal(folder: Path) -> Seal:
    """Return the record of a folder.

    Raises:
        UnfinishedError: there is none, so the folder was never finished or not copied whole.
        CorruptionError: it is damaged, or a part is missing or of another size.
        MismatchError: it is of a newer format.
    """
    if not (folder / SEAL).exists():
        raise UnfinishedError(
            f"{folder} has parts but no {SEAL}, which is written last: it was not written or copied to its end; make "
            "or copy it again"
        )
    found = read_sealed_object(folder / SEAL, *_FACTS)
    if (version := found["format_version"]) != FORMAT_VERSION:
        raise MismatchError(f"{folder} has format {version}, this kcdcache reads {FORMAT_VERSION}; upgrade kcdcache")
    try:
        parts = tuple(Part(**part) for part in found["parts"])
        content = Seal(**{name: found[name] for name in Seal._fields if name != "parts"}, parts=parts)
        _require_sound(content)
    except (TypeError, ValueError) as error:
        raise CorruptionError(f"{folder / SEAL} is damaged: {error}") from None
    for span, part in zip(spans(content.samples, content.partition_rows), parts, strict=True):
        _require_size(folder / span.name, part)
    return content


class Joined:
    """The parts of a folder as one table; each is held against the record whenever it is opened."""

    def __init__(self, path: Path) -> None:
        """Take a folder.

        Raises:
            UnfinishedError, CorruptionError, MismatchError: as for `read_seal`.
        """
        self._path, self.seal = path, read_seal(path)
        self._spans = spans(self.seal.samples, self.seal.partition_rows)
        self.rows = sum(part.rows for part in self.seal.parts)
        with self._opened(self._spans[0]) as reader:
            plain = reader.schema.remove_metadata()
        self.schema: pa.Schema = plain.with_metadata({self.seal.key: canonical_json(self.seal.document)})

    def check(self, columns: Sequence[str] | None = None) -> list[str]:
        """Return the columns to read; what the parts claim of them is checked as each is opened."""
        return [name for name in self.schema.names if columns is None or name in columns]

    def groups(
        self, columns: Sequence[str] | None = None, start: int = 0, stop: int | None = None
    ) -> Iterator[pa.Table]:
        """Yield rows `start` to `stop` in order, as tables of at most one row group each; other parts stay closed.

        Raises:
            CorruptionError: a part is not the one that was written.
            MismatchError, UnsafeError: as for `tables.read`.
        """
        first, end = 0, self.rows if stop is None else stop
        for span, part in zip(self._spans, self.seal.parts, strict=True):
            low, high = max(start - first, 0), min(end - first, part.rows)
            if low < high:
                with self._opened(span) as reader:
                    if not reader.schema.equals(self.schema):
                        raise CorruptionError(
                            f"{self._path / span.name} has other columns than the part before; make the set again"
                        )
                    yield from reader.groups(columns, low, high)
            first += part.rows

    def whole(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return all rows at once.

        Raises:
            CorruptionError, MismatchError, UnsafeError: as for `groups`.
        """
        empty = self.schema.remove_metadata().empty_table().select(self.check(columns))
        return pa.concat_tables([empty, *self.groups(columns)])

    @contextmanager
    def _opened(self, span: Span) -> Iterator[Reader]:
        path, part = self._path / span.name, self.seal.parts[span.number]
        _require_size(path, part)
        if (found := sha256_file(path)) != part.sha256:
            raise CorruptionError(
                f"{path} is not what was written: its SHA-256 is {found}, {SEAL} tells {part.sha256}; make the set "
                "again, or copy it again"
            )
        with opened_file(path, span.stop - span.first) as reader:
            if reader.rows != part.rows:
                raise CorruptionError(f"{path} has {reader.rows} rows, {SEAL} tells {part.rows}; make the set again")
            yield reader


@contextmanager
def opened(path: Path, most_rows: int | None = None) -> Iterator[Table]:
    """Open a table to read it by row groups, whether it is one file or a folder of parts.

    Raises:
        NotFoundError, CorruptionError, MismatchError, UnsafeError: as for `tables.opened`.
        UnfinishedError: it is a folder without its record.
    """
    if not is_folder(path):
        with opened_file(path, most_rows) as reader:
            require_no_part(reader.schema, path)
            yield reader
        return
    joined = Joined(path)
    size = sum(part.bytes for part in joined.seal.parts)
    require_few_rows(joined.rows, size, path, most_rows)
    yield joined


def metadata_keys(path: Path) -> set[str]:
    """Return the keys of a table's metadata; no column is read.

    Raises:
        NotFoundError, CorruptionError, UnsafeError, UnfinishedError: as for `opened`.
    """
    if is_folder(path):
        return {read_seal(path).key}
    with opened(path, sys.maxsize) as reader:
        return {key.decode(errors="replace") for key in reader.schema.metadata or {}}


def require_no_part(schema: pa.Schema, path: Path) -> None:
    """Do nothing if a file is a whole table, and not one part of several.

    Raises:
        MismatchError: it is a part; names the folder to give instead.
    """
    if PART_KEY.encode() in (schema.metadata or {}):
        raise MismatchError(f"{path} is one of several parts of a set; give their folder, {path.parent}")


def _require_sound(content: Seal) -> None:
    for name, kind in (("key", str), ("samples", int), ("partition_rows", int), ("document", dict)):
        if not isinstance(getattr(content, name), kind):
            raise ValueError(f"'{name}' should be {kind.__name__}, found {getattr(content, name)!r:.80}")
    if not isinstance(content.fingerprint, str | None):
        raise ValueError("'fingerprint' should be a text")
    if content.samples < 1 or content.partition_rows < 1:
        raise ValueError(f"{content.samples} samples in parts of {content.partition_rows}")
    of = -(-content.samples // content.partition_rows)
    if of != len(content.parts) or of > MOST_PARTS:
        raise ValueError(f"it tells of {len(content.parts)} parts, expected {of} (at most {MOST_PARTS})")
    for span, part in zip(spans(content.samples, content.partition_rows), content.parts, strict=True):
        whole = isinstance(part.rows, int) and isinstance(part.bytes, int) and isinstance(part.sha256, str)
        if not whole or not 0 <= part.rows <= span.stop - span.first or not _SHA256.fullmatch(part.sha256):
            raise ValueError(f"what it tells of {span.name} is none of a part: {part!r:.200}")


def _require_size(path: Path, part: Part) -> None:
    if not path.is_file():
        raise CorruptionError(f"{path} is missing, {SEAL} beside it tells of it; make or copy the set again")
    if (size := os.stat(path).st_size) != part.bytes:
        raise CorruptionError(f"{path} has {size} bytes, {SEAL} tells {part.bytes}; make or copy the set again")
