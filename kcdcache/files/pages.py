"""What a parquet file claims of its columns and pages, read from footer and page headers before anything is decoded.

Decoders allocate what a page claims, and a file's footer need not tell it, so a few bytes could ask for any memory.
pyarrow's own view of a footer is no help: asked for the columns of a damaged one, it ends the process.

Source: Apache Parquet format, `parquet.thrift`, and the compact protocol of Apache Thrift.
"""

import os
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

MOST_FOOTER_BYTES = 2 * 2**20
MOST_COLUMNS = 20_000
"""columns of all row groups together"""
HEADER_BYTES = 2**16
"""more than any page header takes: it holds a few numbers, and a page's extremes"""
DATA, DICTIONARY, DATA_V2 = 0, 2, 3
_BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 3, 4, 5, 6, 7, 8, 9, 10, 12
_NUMBERS = (_I16, _I32, _I64)
_COLUMN = {1: _BINARY, 3: {5: _I64, 7: _I64, 9: _I64, 11: _I64}}
_FOOTER = {3: _I64, 4: [{1: [_COLUMN], 3: _I64}]}
"""field number -> kind of the fields of interest; others are passed over"""
_PAGE = {1: _I32, 2: _I32, 3: _I32, 5: {1: _I32, 2: _I32}, 7: {1: _I32, 2: _I32}, 8: {1: _I32, 4: _I32}}
_DETAILS = {DATA: (5, 2), DICTIONARY: (7, 2), DATA_V2: (8, 4)}
"""kind of page -> field number of its own header, and of the encoding in that"""


class Column(NamedTuple):
    """One column of one row group: how many values it has, and where in the file it lies."""

    values: int
    start: int
    bytes: int


class Group(NamedTuple):
    """One row group."""

    rows: int
    columns: tuple[Column, ...]


class Page(NamedTuple):
    """One page as its header describes it."""

    kind: int
    bytes: int
    """size once decompressed"""
    stored: int
    """size in the file, without the header"""
    values: int
    encoding: int


def read_groups(stream: BinaryIO) -> list[Group]:
    """Return the row groups that a parquet file's footer tells of.

    Raises:
        ValueError: the footer is damaged, contradicts itself, or is larger than allowed.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - 8))
    length = int.from_bytes(stream.read(4), "little")
    if stream.read(4) != b"PAR1" or length > min(size, MOST_FOOTER_BYTES):
        raise ValueError(f"no parquet footer of at most {MOST_FOOTER_BYTES} bytes at its end")
    stream.seek(max(0, size - 8 - length))
    fields = _parsed(stream.read(length), _FOOTER)[0]
    groups = [_group(entry) for entry in fields.get(4, [])]
    if sum(group.rows for group in groups) != fields.get(3):
        raise ValueError(f"its footer tells of {fields.get(3)} rows, its row groups of others")
    if (columns := sum(len(group.columns) for group in groups)) > MOST_COLUMNS or len(groups) > MOST_COLUMNS:
        raise ValueError(f"{len(groups)} row groups have {columns} columns, expected at most {MOST_COLUMNS} of each")
    return groups


def read_pages(stream: BinaryIO, column: Column) -> Iterator[Page]:
    """Yield the pages of a column; nothing is decompressed.

    Raises:
        ValueError: a header is damaged, or the pages do not fill the column exactly.
    """
    at, stop = column.start, column.start + column.bytes
    while at < stop:
        stream.seek(at)
        fields, length = _parsed(stream.read(min(HEADER_BYTES, stop - at)), _PAGE)
        page = _page(fields)
        at += length + page.stored
        yield page
    if at != stop:
        raise ValueError(f"the page before byte {at} does not end with its column at byte {stop}")


def _parsed(data: bytes, wanted: dict[int, Any]) -> tuple[dict[int, Any], int]:
    reader = _Reader(data)
    try:
        return reader.struct(wanted), reader.at
    except (IndexError, RecursionError):
        raise ValueError("a footer or page header does not end") from None


def _group(fields: dict[int, Any]) -> Group:
    return Group(_natural(fields, 3), tuple(_column(entry) for entry in fields.get(1, [])))


def _column(fields: dict[int, Any]) -> Column:
    if fields.get(1):
        raise ValueError("a column lies in another file")
    own = fields.get(3, {})
    start, dictionary = _natural(own, 9), own.get(11, 0)
    return Column(_natural(own, 5), dictionary if 0 < dictionary < start else start, _natural(own, 7))


def _page(fields: dict[int, Any]) -> Page:
    kind = _natural(fields, 1)
    if kind not in _DETAILS:
        raise ValueError(f"a page of kind {kind}")
    number, encoding = _DETAILS[kind]
    own = fields.get(number, {})
    return Page(kind, _natural(fields, 2), _natural(fields, 3), _natural(own, 1), _natural(own, encoding))


def _natural(fields: dict[int, Any], number: int) -> int:
    value: int = fields.get(number, -1)
    if value < 0:
        raise ValueError(f"field {number} of a footer or page header is {value}, expected 0 or more")
    return value


class _Reader:
    """The compact protocol, strictly: fields ascend, so that no reader can take another of two with one number."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def struct(self, wanted: dict[int, Any]) -> dict[int, Any]:
        """Return the wanted fields of the structure at the current place, and pass over it."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            before, number = number, number + (head >> 4) if head >> 4 else self._integer()
            if number <= before:
                raise ValueError(f"field {number} of a footer or page header follows field {before}")
            value = self._value(head & 15, wanted.get(number))
            if number in wanted:
                fields[number] = value
        return fields

    def _value(self, kind: int, wanted: Any) -> Any:
        expected = _STRUCT if isinstance(wanted, dict) else _LIST if isinstance(wanted, list) else wanted
        if wanted is not None and kind != expected:
            raise ValueError(f"a footer or page header holds a field of kind {kind}, expected {expected}")
        if kind == _STRUCT:
            return self.struct(wanted or {})
        if kind in _NUMBERS:
            return self._integer()
        if kind in (_LIST, _SET):
            return self._list(wanted)
        return self._skipped(kind)

    def _list(self, wanted: list[Any] | None) -> list[Any]:
        head = self._byte()
        kind, size = head & 15, self._varint() if head >> 4 == 15 else head >> 4
        if kind in (1, 2):  # truth values, which take a byte here, and none as a field
            self._skip(size)
            return []
        if wanted is None:
            for _ in range(size):
                self._value(kind, None)
            return []
        return [self._value(kind, wanted[0]) for _ in range(size)]

    def _skipped(self, kind: int) -> int:
        if kind not in (1, 2, _BYTE, _DOUBLE, _BINARY):
            raise ValueError(f"a footer or page header holds a field of kind {kind}")
        length = self._varint() if kind == _BINARY else {_BYTE: 1, _DOUBLE: 8}.get(kind, 0)
        self._skip(length)
        return length

    def _skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self._data):
            raise IndexError

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _varint(self) -> int:
        number = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise ValueError("a number in a footer or page header does not end")

    def _integer(self) -> int:
        number = self._varint()
        return (number >> 1) ^ -(number & 1)
