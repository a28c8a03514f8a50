"""Where given places lie in the order of many keys, exactly, ties by index: radix selection on several processes."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Integer, UInt64

from kcdcache.errors import SettingsError
from kcdcache.team import ALONE, Team

DIGIT = 16
"""bits told apart in one pass"""
_COUNTS = 2**DIGIT
_LOW = np.uint64(_COUNTS - 1)
Blocks = Callable[[], Iterable[UInt64[np.ndarray, " _"]]]


class Cuts(NamedTuple):
    """Where the places `at` lie in the order of all keys: ascending, equal ones by their samples' index."""

    at: Int64[np.ndarray, " cuts"]
    """the places, ascending"""
    of: UInt64[np.ndarray, " cuts"]
    """key at each place"""
    keys: UInt64[np.ndarray, " keys"]
    """those keys, each once, ascending"""
    before: Int64[np.ndarray, " keys"]
    """keys of all processes below each of them, and equal ones of the processes before this one"""


def find(blocks: Blocks, bits: int, at: Int64[np.ndarray, " cuts"], team: Team = ALONE) -> Cuts:
    """Return where some places lie; `blocks` gives this process's keys of `bits` bits, and is called bits/16 times.

    In every pass the keys that share their upper digits with a wanted one are counted by their next digit, and the
    counts of all processes added up: 65,536 numbers, later as many for every different start of a wanted key. The
    processes hold the samples in the order of their ranks.

    Raises:
        SettingsError: there are fewer keys than places.
    """
    starts, below = np.zeros(1, np.uint64), np.zeros(1, np.int64)
    of_start, ties = np.zeros(len(at), np.int64), np.zeros(0, np.int64)
    for shift in range(bits - DIGIT, -1, -DIGIT) if len(at) else ():
        mine = _counted(blocks(), starts if shift < bits - DIGIT else None, shift)
        counts = team.total(mine)
        if shift == bits - DIGIT and not (at[0] >= 0 and at[-1] < counts.sum()):
            raise SettingsError(
                f"cannot select {at[-1] + 1} of {counts.sum()} samples; ask for at least 1 and at most all"
            )
        ends = np.cumsum(counts, axis=1) + below[:, None]
        digit = np.array([np.searchsorted(ends[s], place, "right") for s, place in zip(of_start, at, strict=True)])
        found = starts[of_start] << np.uint64(DIGIT) | digit.astype(np.uint64)
        under, equal = ends[of_start, digit] - counts[of_start, digit], mine[of_start, digit]
        starts, first, of_start = np.unique(found, return_index=True, return_inverse=True)
        below, ties = under[first], equal[first]
    if not len(at):
        starts, below = starts[:0], below[:0]
    return Cuts(at, starts[of_start], starts, below + team.each(ties)[: team.rank].sum(axis=0))


class Sieve:
    """Tells for one key after the other, in the order of the samples, between which cuts its place lies."""

    def __init__(self, cuts: Cuts) -> None:
        """Begin with this process's first key."""
        self._cuts, self._before = cuts, cuts.before.copy()

    def sorted(self, keys: UInt64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
        """Return for each of the next keys how many of the cuts lie at its place or before it."""
        found = np.searchsorted(self._cuts.of, keys, "left")
        rows, which = _same(keys, self._cuts.keys)
        found[rows] = np.searchsorted(self._cuts.at, numbered(which, self._before), "right")
        self._before += np.bincount(which, minlength=len(self._before))
        return found


def numbered(groups: Integer[np.ndarray, " rows"], first: Int64[np.ndarray, " groups"]) -> Int64[np.ndarray, " rows"]:
    """Return each row's number within its group, counted from `first` of the group.

    >>> numbered(np.array([1, 0, 1]), np.array([0, 10])).tolist()
    [10, 0, 11]
    """
    counts = np.bincount(groups, minlength=len(first))
    by_group = np.argsort(groups, kind="stable")
    found = np.empty(len(groups), np.int64)
    found[by_group] = np.arange(len(groups)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    return found


def _counted(
    blocks: Iterable[UInt64[np.ndarray, " _"]], starts: UInt64[np.ndarray, " starts"] | None, shift: int
) -> Int64[np.ndarray, "starts digits"]:
    """Return how many keys begin with each of `starts`, by their next digit; with None that digit is their first."""
    counts = np.zeros((1 if starts is None else len(starts)) * _COUNTS, np.int64)
    for keys in blocks:
        left = keys >> np.uint64(shift)
        found = left.astype(np.int64)
        if starts is not None:
            rows, which = _same(left >> np.uint64(DIGIT), starts)
            found = which * _COUNTS + (left[rows] & _LOW).astype(np.int64)
        counts += np.bincount(found, minlength=len(counts))
    return counts.reshape(-1, _COUNTS)


def _same(
    keys: UInt64[np.ndarray, " rows"], known: UInt64[np.ndarray, " known"]
) -> tuple[Int64[np.ndarray, " some"], Int64[np.ndarray, " some"]]:
    """Return which of the keys are known, and which of the known ones each of those is."""
    if not len(known):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    rows = np.flatnonzero(known[place] == keys)
    return rows, place[rows]
