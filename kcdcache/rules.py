"""What must hold of the rows of a condensed set: of a whole one, or block by block in bounded memory."""

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Bool, Integer, Shaped

from kcdcache.errors import MismatchError

KEPT, MIXED = "K_1H", "K_Aug"
"""The parts: points kept as they are, and kept points with a dropped one mixed in."""

BYTES_A_SAMPLE = 1
"""memory of `Blocks`"""
Columns = Mapping[str, np.ndarray]
"""The arrays of a condensed set by name, each of shape (rows,)."""
Rule = tuple[str, str, Bool[np.ndarray, " rows"]]
"""(column, what is expected of it, which rows break that)."""
_IN_ORDER, _RANK_ONCE, _PARTNER_ONCE = "ascending order, each sample once", "each rank once", "each partner once"
_DROPPED = "a dropped sample, not a kept one"
_AS_KEPT, _AS_PARTNER, _AS_RANK = np.uint8(1), np.uint8(2), np.uint8(4)


def require(columns: Columns, count: int) -> None:
    """Do nothing if the rows of a whole condensed set of `count` samples are valid.

    Raises:
        MismatchError: they are not; names the first such row.
    """
    _raise_first([*_own_rules(columns, count), *_set_rules(columns)], columns, 0)


class Blocks:
    """Holds the rows of one condensed set as they come against all rules; takes one byte for each sample of the set."""

    def __init__(self, count: int) -> None:
        """Begin with the rows of a set of `count` samples."""
        self._count, self._rows, self._last = count, 0, -1
        self._used = np.zeros(count, np.uint8)

    def add(self, columns: Columns) -> None:
        """Take the next rows.

        Raises:
            MismatchError: one of them breaks a rule; names the first.
        """
        before = self._rows
        _raise_first(list(_own_rules(columns, self._count, self._last)), columns, before)
        self._rows += len(columns["index"])
        self._last = int(columns["index"][-1]) if len(columns["index"]) else self._last
        partner = columns["partner"][columns["mixed"]]
        again = np.zeros(len(columns["mixed"]), np.bool_)
        again[columns["mixed"]] = self._marked(partner, _AS_PARTNER)
        self._marked(columns["index"], _AS_KEPT)
        kept = np.zeros_like(again)
        kept[columns["mixed"]] = self._used[partner] & _AS_KEPT != 0
        rules = [("partner", _DROPPED, kept), ("partner", _PARTNER_ONCE, again)]
        rules.append(("rank", _RANK_ONCE, self._marked(columns["rank"], _AS_RANK)))
        _raise_first(rules, columns, before)

    def end(self) -> None:
        """Do nothing if no partner of an early row is kept by a later one.

        Raises:
            MismatchError: one is; names it.
        """
        both = _AS_KEPT | _AS_PARTNER
        for start in range(0, self._count, 2**20):
            if (bad := self._used[start : start + 2**20] & both == both).any():
                raise MismatchError(
                    f"manifest row of index {start + np.argmax(bad)}: expected partner to be {_DROPPED}, found it kept"
                )

    def _marked(self, places: Integer[np.ndarray, " rows"], mark: np.unsignedinteger) -> Bool[np.ndarray, " rows"]:
        """Mark some samples or ranks; return which of them had that mark already."""
        again = self._used[places] & mark != 0
        self._used[places] |= mark
        return again | _repeated(places)


def _own_rules(columns: Columns, count: int, last: int = -1) -> Iterator[Rule]:
    """Yield the rules that a row keeps or breaks by itself, or with the row before it (`last` is the index before)."""
    index, samples = columns["index"], f"a sample in [0, {count})"
    yield "index", samples, (index < 0) | (index >= count)
    yield "index", _IN_ORDER, np.diff(index, prepend=last) <= 0
    partner, mixed = columns["partner"], columns["mixed"]
    yield "partner", f"none (-1) in {KEPT}", ~mixed & (partner != -1)
    yield "partner", f"{samples} in {MIXED}", mixed & ((partner < 0) | (partner >= count))
    epsilon, weight, rank = columns["epsilon"], columns["weight"], columns["rank"]
    yield "epsilon", "a share in [0, 1]", ~((epsilon >= 0) & (epsilon <= 1))
    yield "epsilon", f"0 in {KEPT}", ~mixed & (epsilon != 0)
    yield "rank", f"a rank in [0, {count})", (rank < 0) | (rank >= count)
    yield "visits", "0 or more", columns["visits"] < 0
    yield "value", "a finite number", ~np.isfinite(columns["value"])
    yield "value", "0 for an unseen sample", (columns["visits"] == 0) & (columns["value"] != 0)
    yield "weight", "a finite number above 0", ~(np.isfinite(weight) & (weight > 0))


def _set_rules(columns: Columns) -> Iterator[Rule]:
    """Yield the rules between any two rows of a whole set."""
    partner, mixed = columns["partner"], columns["mixed"]
    yield "partner", _DROPPED, mixed & np.isin(partner, columns["index"])
    yield "partner", _PARTNER_ONCE, mixed & _repeated(partner, partner[mixed])
    yield "rank", _RANK_ONCE, _repeated(columns["rank"])


def _repeated(array: Shaped[np.ndarray, " rows"], of: Shaped[np.ndarray, " some"] | None = None) -> np.ndarray:
    """Return which stand there again, after their first row; none, quickly, where those of interest (`of`) differ."""
    ascending = np.sort(array if of is None else of)
    repeated = np.zeros(len(array), np.bool_)
    if (ascending[1:] == ascending[:-1]).any():
        order = np.argsort(array, kind="stable")
        repeated[order[1:]] = array[order][1:] == array[order][:-1]
    return repeated


def _raise_first(rules: list[Rule], columns: Columns, before: int) -> None:
    """Raise for the first row that breaks a rule; `before` is the number of rows before these."""
    broken = [(int(np.argmax(bad)), column, expected) for column, expected, bad in rules if bad.any()]
    if broken:
        row, column, expected = min(broken, key=lambda rule: rule[0])
        raise MismatchError(
            f"manifest row {before + row}, index {columns['index'][row]}: expected {column} to be {expected}, "
            f"found {columns[column][row]}"
        )
