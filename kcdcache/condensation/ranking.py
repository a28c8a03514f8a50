"""Exact rankings of many scores, ties by position, and the rows of a condensed set that follow from a ranking.

Scores and positions are packed into 64-bit words, which are sorted in place.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64, Integer, UInt32

from kcdcache.condensation.manifest import Draft, Facts, Samples, Totals, plain
from kcdcache.condensation.value_files import Block, Source
from kcdcache.errors import MismatchError, require_known
from kcdcache.settings import CondenseSettings

BYTES_A_SAMPLE = 8
"""memory of a ranker"""
_AT_ONCE = 2**16
"""scores packed at a time, so that intermediate results fit the processor's cache"""
_LOW = np.uint64(2**32 - 1)


def keys(score: Float32[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
    """Return 32-bit keys, ascending where the scores, none of them NaN, descend; -0 equals 0."""
    bits = (score + np.float32(0)).view(np.uint32)  # adding 0 makes -0 and +0 tie
    flipped = (bits.view(np.int32) >> 31).view(np.uint32) | np.uint32(1 << 31)  # all bits of negative numbers
    return ~(bits ^ flipped)


class Ranker:
    """Ranks up to `count` scores that come in blocks, in 8 bytes each."""

    def __init__(self, count: int) -> None:
        """Begin; `count` is below 2^32."""
        self._words = np.empty(count, np.uint64)
        self._filled = 0

    def add(self, index: Integer[np.ndarray, " n"], score: Float32[np.ndarray, " n"]) -> None:
        """Add the scores of more samples; none is NaN."""
        words = self._words[self._filled : self._filled + len(index)]
        self._filled += len(index)
        for start in range(0, len(words), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            words[some] = keys(score[some])
            words[some] <<= np.uint64(32)
            words[some] |= index[some].astype(np.uint64)

    def ranked(self) -> tuple[UInt32[np.ndarray, " n"], UInt32[np.ndarray, " count"]]:
        """Return the samples from the highest score to the lowest, ties by index, and room for one number per sample.

        Both use the ranker's memory, so call this once.
        """
        words = self._words[: self._filled]
        words.sort()
        halves = self._words.view(np.uint32)
        for start in range(0, len(words), _AT_ONCE):  # always behind what is still to be read
            halves[start : min(start + _AT_ONCE, len(words))] = words[start : start + _AT_ONCE] & _LOW
        return halves[: len(words)], halves[len(self._words) :]


def numbered(groups: Integer[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
    """Number the rows of each group from 0; groups are 0 or more.

    >>> numbered(np.array([1, 0, 1])).tolist()
    [0, 0, 1]
    """
    counts = np.bincount(groups)
    by_group = np.argsort(groups, kind="stable")
    found = np.empty(len(groups), np.int64)
    found[by_group] = np.arange(len(groups)) - np.repeat(np.cumsum(counts) - counts, counts)
    return found


@dataclass(frozen=True, eq=False, kw_only=True)
class Outline(ABC):
    """A condensed set before its rows are written: its sizes, and what it is made from."""

    samples: Samples
    settings: CondenseSettings
    stage: int
    keep: float
    parent: str | None
    kept: int
    pairs: int
    """kept samples with a dropped one mixed in (Eq. 14): the lowest kept with the best dropped, in order"""
    dropped: int
    """size of K_0"""

    @property
    def first(self) -> int:
        """First place with a partner."""
        return self.kept - self.pairs

    @abstractmethod
    def columns(self, block: Block) -> dict[str, np.ndarray]:
        """Return the manifest columns of the kept samples in a block, ascending."""

    def rows(
        self, block: Block, inside: Int64[np.ndarray, " rows"], place: Int64[np.ndarray, " rows"],
        partner: Integer[np.ndarray, " mixed"], rank: Integer[np.ndarray, " rows"],
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """Return manifest columns of samples, given by their positions `inside` a block and places among the kept.

        `partner` has the partners of those at places from `first` on.
        """
        columns = plain(inside + block.first)
        columns["mixed"] = mixed = place >= self.first
        pairs = place[mixed] - self.first
        columns["partner"][mixed] = partner
        columns["epsilon"][mixed] = epsilons(self.settings.eps_grid, self.settings.eps_max, pairs, self.pairs)
        columns["rank"] = np.asarray(rank, np.int64)
        visits, value = block.values.visits[inside], block.values.value[inside]
        return {**columns, "visits": visits, "value": np.where(visits > 0, value, np.float32(0))}

    def draft(self, source: Source) -> Draft:
        """Return the set as rows to write; `source` holds the values it was planned by, and perhaps labels.

        While the rows pass, raises CorruptionError, NonFiniteError or MismatchError if the source was changed.
        """
        counts = np.zeros(self.samples.classes if source.labelled else 0, np.int64)

        def blocks() -> Iterator[dict[str, np.ndarray]]:
            nonlocal counts
            for block in source.blocks():
                columns = self.columns(block)
                if block.labels is not None:
                    more = np.bincount(block.labels[columns["index"] - block.first], minlength=len(counts))
                    more[: len(counts)] += counts
                    counts = more
                yield columns

        def facts(totals: Totals) -> Facts:
            if (totals.rows, totals.mixed) != (self.kept, self.pairs):
                raise MismatchError(
                    f"{totals.rows} rows were written, {totals.mixed} of them mixed, expected {self.kept} and "
                    f"{self.pairs}: the values were changed meanwhile; run the same command again"
                )
            rule = {name: getattr(self.settings, name) for name in CondenseSettings.model_fields}
            return Facts(
                knowledge_id=self.samples.knowledge_id, count=self.samples.count, stage=self.stage, keep=self.keep,
                dropped=self.dropped, rule=rule, parent=self.parent, values=source.fingerprint(),
                class_counts=tuple(counts.tolist()), data_digest=self.samples.data_digest,
            )  # fmt: skip

        return Draft(self.samples.count, blocks(), facts)


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan(Outline):
    """A condensed set whose rows follow from arrays in memory."""

    places: UInt32[np.ndarray, " n"]
    """place of each sample among the kept ones, best first; `kept` or more for the others"""
    partner: Integer[np.ndarray, " pairs"]
    """partners of the kept samples from place `first` on"""
    rank: Int64[np.ndarray, " kept"] | None
    """rank by place; None if they are the same"""

    def columns(self, block: Block) -> dict[str, np.ndarray]:
        """Return the manifest columns of the kept samples in a block, ascending."""
        places = self.places[block.first : block.first + len(block.values.visits)]
        inside = np.flatnonzero(places < self.kept)
        place = places[inside].astype(np.int64)
        partner = self.partner[place[place >= self.first] - self.first]
        return self.rows(block, inside, place, partner, place if self.rank is None else self.rank[place])


def epsilons(grid: str, eps_max: float, place: Int64[np.ndarray, " n"], count: int) -> Float32[np.ndarray, " n"]:
    """Return the partner's share at some of the places 0..count-1: it grows down the ranks from 0 to eps_max.

    With i = place and L = count: 'zero_based' eps_max i / L, 'one_based' eps_max (i + 1) / L, 'inclusive'
    eps_max i / (L - 1) (0 for L = 1), 'constant' eps_max.

    Source: Eq. 15 of Knowledge Condensation Distillation in the readings of facts.md A4.
    """
    require_known("eps_grid", grid, GRIDS)
    return (eps_max * GRIDS[grid](place.astype(np.float64), count)).astype(np.float32)


GRIDS: dict[str, Callable[[Float64[np.ndarray, " count"], int], Float64[np.ndarray, " count"]]] = {
    "zero_based": lambda i, count: i / max(count, 1),
    "one_based": lambda i, count: (i + 1) / max(count, 1),
    "inclusive": lambda i, count: i / max(count - 1, 1),
    "constant": lambda i, count: np.ones_like(i),
}
"""grid -> share of eps_max in [0, 1] at i = 0 .. L-1 of L"""
