"""A table as a plain value: the same rows shown to people, written as CSV and as JSON."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""what makes a spreadsheet take a text for a formula"""


class Column(NamedTuple):
    """One column."""

    name: str
    """key in rows, CSV and JSON"""
    title: str
    """heading, with the unit as shown"""
    kind: str = "text"
    """one of SHOWN"""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of numbers and texts under named columns; a cell may be empty (None)."""

    key: str
    """its name in JSON and of its CSV file"""
    title: str
    note: str
    """how to read it"""
    columns: tuple[Column, ...]
    rows: Sequence[Mapping[str, Any]]

    def document(self) -> dict[str, Any]:
        """Return it as JSON values: unrounded, empty cells as null."""
        names = [column.name for column in self.columns]
        return {
            "title": self.title,
            "columns": {column.name: column.title for column in self.columns},
            "rows": [{name: row.get(name) for name in names} for row in self.rows],
        }

    def csv(self) -> str:
        """Return it as CSV, unrounded; before a text that a spreadsheet would run as a formula stands an apostrophe."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([column.name for column in self.columns])
        for row in self.rows:
            writer.writerow([_plain(row.get(column.name)) for column in self.columns])
        return stream.getvalue()

    def cells(self) -> list[list[str]]:
        """Return the rows as people see them: rounded, in the unit of the heading."""
        return [[shown(row.get(column.name), column.kind) for column in self.columns] for row in self.rows]

    def text(self) -> str:
        """Return heading and rows as aligned text."""
        lines = [[column.title for column in self.columns], *self.cells()]
        widths = [max(len(line[place]) for line in lines) for place in range(len(self.columns))]
        aligned = [
            "  ".join(
                cell.ljust(width) if column.kind == "text" else cell.rjust(width)
                for cell, width, column in zip(line, widths, self.columns, strict=True)
            )
            for line in lines
        ]
        return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])


def printable(text: str) -> str:
    """Return text in one line and without control or bidirectional characters: names from files may hold any."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(value: Any, kind: str) -> str:
    """Return a cell as people see it.

    >>> shown(0.99537, "percent"), shown(-0.1, "signed"), shown(None, "count")
    ('99.54', '-0.100', '')
    """
    if value is None:
        return ""
    return SHOWN[kind](value) if not isinstance(value, str) else printable(value)


SHOWN: Mapping[str, Callable[[Any], str]] = {
    "text": lambda value: printable(str(value)),
    "percent": lambda value: f"{100 * value:.2f}",
    "signed": lambda value: f"{value:+.3f}",
    "share": lambda value: f"{value:.3f}",
    "count": lambda value: f"{value:,.0f}",
    "number": lambda value: f"{value:.4g}",
    "seconds": lambda value: f"{value:,.1f}",
}
"""kind of a column -> how its numbers are shown; percent is a share times 100"""


def _plain(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(FORMULA) else text
