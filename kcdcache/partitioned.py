"""Tables as folders of parquet files, each of a fixed range of samples, with a record written last; or as one file."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from kcdcache import scratch, tables
from kcdcache.errors import CorruptionError, MismatchError, UnfinishedError
from kcdcache.files import canonical_json, create_filled, read_sealed, sealed_json, sha256_file, write_atomic

SEAL = "_parts.json"
"""record of a folder; other tools pass over names that begin so, and read the parquet files beside it"""
FORMAT_VERSION = 0
PART_KEY = "kcdcache.part"
"""under this key a part says that it is one"""
ROWS = 2**24
"""samples of each part, unless told otherwise: some 100 MB of a condensed set"""
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
            writer = tables.Writer(sink, schema)
            for block in blocks:
                writer.write(block)
                rows += block.num_rows
            writer.close({PART_KEY: canonical_json(span._asdict())})

    create_filled(path, fill)
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
    with scratch.beside(path) as place:
        made = place / "set"
        made.mkdir()
        parts = [
            write_part(made, span, schema, blocks(span)) for span in spans(content.samples, content.partition_rows)
        ]
        seal(made, content._replace(parts=tuple(parts)))
        scratch.place(made, path, SEAL)


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
    found = read_sealed(folder / SEAL, *_FACTS)
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
    def _opened(self, span: Span) -> Iterator[tables.Reader]:
        path, part = self._path / span.name, self.seal.parts[span.number]
        _require_size(path, part)
        if (found := sha256_file(path)) != part.sha256:
            raise CorruptionError(
                f"{path} is not what was written: its SHA-256 is {found}, {SEAL} tells {part.sha256}; make the set "
                "again, or copy it again"
            )
        with tables.opened(path, span.stop - span.first) as reader:
            if reader.rows != part.rows:
                raise CorruptionError(f"{path} has {reader.rows} rows, {SEAL} tells {part.rows}; make the set again")
            yield reader


@contextmanager
def opened(path: Path, most_rows: int | None = None) -> Iterator[tables.Table]:
    """Open a table to read it by row groups, whether it is one file or a folder of parts.

    Raises:
        NotFoundError, CorruptionError, MismatchError, UnsafeError: as for `tables.opened`.
        UnfinishedError: it is a folder without its record.
    """
    if not is_folder(path):
        with tables.opened(path, most_rows) as reader:
            require_no_part(reader.schema, path)
            yield reader
        return
    joined = Joined(path)
    size = sum(part.bytes for part in joined.seal.parts)
    tables.require_few_rows(joined.rows, size, path, most_rows)
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
