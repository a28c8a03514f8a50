"""A table as aligned text that still knows its cells, so that a terminal can fit it."""

from collections.abc import Sequence


class TextTable(str):
    """Lines of aligned cells, with lines of plain text before and after; in JSON it is that text."""

    above: tuple[str, ...]
    """lines before it"""
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int
    """columns aligned to the left, from the first on; numbers follow"""
    below: tuple[str, ...]
    """lines after it"""

    def __new__(
        cls,
        head: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        left: int = 0,
        above: Sequence[str] = (),
        below: Sequence[str] = (),
        rule: bool = False,
    ) -> "TextTable":
        """Align cells; with `rule` a line of dashes follows the head."""
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [_aligned(row, widths, left) for row in (head, *rows)]
        ruled = [lines[0], "-" * len(lines[0]), *lines[1:]] if rule else lines
        made = super().__new__(cls, "\n".join([*above, *ruled, *below]))
        made.head, made.rows, made.left = tuple(head), tuple(map(tuple, rows)), left
        made.above, made.below = tuple(above), tuple(below)
        return made


def _aligned(row: Sequence[str], widths: Sequence[int], left: int) -> str:
    cells = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
    return "  ".join(cells)
