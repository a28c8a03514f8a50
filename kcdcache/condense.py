"""From values to a manifest: score, rank, partition into K_1 and K_0, pair and mix (Eq. 8, 13 to 15); pure arrays."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, Integer, UInt32

from kcdcache import ranking, rng
from kcdcache.config import CondenseSettings, nearest
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.facts import Facts
from kcdcache.manifest import Manifest, class_counts, plain
from kcdcache.schedule import kept_count
from kcdcache.values import Block, Held, Source, Values, score

logger = logging.getLogger(__name__)

NOBODY = np.empty(0, np.int64)


class Partition(NamedTuple):
    """Candidates split by rank."""

    kept: Integer[np.ndarray, " kept"]
    """K_1, best first"""
    dropped: Integer[np.ndarray, " dropped"]
    """the others, best first"""
    rank: Int64[np.ndarray, " kept"] | None
    """rank of each kept sample among all candidates; None where it is the place among the kept"""


STARVED = 0.1
"""of its share of the set: a class that keeps less is told of"""


def condense(
    values: Values,
    settings: CondenseSettings,
    *,
    knowledge_id: str,
    count: int,
    stage: int,
    keep: float,
    labels: Int64[np.ndarray, " n"] | None = None,
    classes: int | None = None,
    previous: Manifest | None = None,
    data_digest: str | None = None,
    excluded: Int64[np.ndarray, " excluded"] = NOBODY,
) -> Manifest:
    """Return the manifest that `stage` trains on: the floor(keep N) best samples, dropped ones mixed into the lowest.

    `previous` is the manifest the values were last updated on; None stands for all samples. The samples `excluded`
    (those the store skipped) are no candidates: never kept, never mixed in. `keep` stays a share of all `count`
    samples; where that is more than are left, all that are left are kept.

    Raises:
        MismatchError: values, labels or previous are not of `count` samples.
        SettingsError: no sample or more samples than candidates would be kept, or stratify lacks labels.
        NonFiniteError: a visited sample's value is not finite.

    Source: sections 3.3 and 3.4, Eq. 8 and 13 to 15 of Knowledge Condensation Distillation (arXiv 2207.05409).
    """
    _require_lengths(count, values, labels, previous)
    source = Held(values, labels)
    made = plan(source, settings, count=count, stage=stage, keep=keep, previous=previous, excluded=excluded)
    counts = class_counts(made.index(), labels, classes)
    _tell_starved(counts, class_counts(np.arange(count), labels, classes), keep)
    columns = _joined([made.columns(block) for block in source.blocks()])
    facts = made.facts(
        knowledge_id=knowledge_id, values=source.fingerprint(), data_digest=data_digest, class_counts=counts
    )
    return Manifest(**columns, **{item.name: getattr(facts, item.name) for item in fields(facts)})


def plan(
    source: Source,
    settings: CondenseSettings,
    *,
    count: int,
    stage: int,
    keep: float,
    previous: Manifest | None = None,
    excluded: Int64[np.ndarray, " excluded"] = NOBODY,
) -> "Plan":
    """Return which samples `stage` trains on, in 8 bytes for each of the `count` samples; arguments as for `condense`.

    Rankings at random and `stratify` take more memory: up to 32 bytes a sample.

    Raises:
        SettingsError, NonFiniteError: as for `condense`.
    """
    if settings.stratify and not source.labelled:
        raise SettingsError("stratify needs the label of every sample; give a values file with a 'label' column")
    competing = previous if settings.candidates == "current" else None
    order, room = _ranked(source, settings, count, competing, excluded, stage)
    size = _size(keep, count, len(order), count - len(excluded))
    split = partition(order, size, _labels(source) if settings.stratify else None)
    dropped = K0[settings.k0](split.dropped, (len(previous) if previous else count) - len(split.kept))
    _tell(split.kept, dropped, settings)
    low, partner = pair(split.kept, dropped) if settings.augment_kept else (NOBODY, NOBODY)
    return Plan(
        places=_places(split.kept, room), partner=partner, rank=split.rank, kept=size, first=size - len(low),
        dropped=len(dropped), settings=settings, count=count, stage=stage, keep=keep,
        parent=previous.digest if previous else None,
    )  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """A condensed set before it is written down: its rows follow from a few numbers for each sample."""

    places: UInt32[np.ndarray, " n"]
    """place of each sample among the kept ones, best first; `kept` or more for the others"""
    partner: Integer[np.ndarray, " pairs"]
    """what is mixed into the kept samples from place `first` on"""
    rank: Int64[np.ndarray, " kept"] | None
    """rank by place, where that is not the place itself"""
    kept: int
    first: int
    dropped: int
    """size of K_0"""
    settings: CondenseSettings
    count: int
    stage: int
    keep: float
    parent: str | None

    def index(self) -> Int64[np.ndarray, " kept"]:
        """Return the kept samples, ascending."""
        return np.flatnonzero(self.places < self.kept)

    def columns(self, block: Block) -> dict[str, np.ndarray]:
        """Return the rows of the kept ones among some samples, ascending, as the columns of a manifest."""
        places = self.places[block.first : block.first + len(block.values.visits)]
        inside = np.flatnonzero(places < self.kept)
        place = places[inside].astype(np.int64)
        columns = plain(inside + block.first)
        columns["mixed"] = mixed = place >= self.first
        pairs = place[mixed] - self.first
        columns["partner"][mixed] = self.partner[pairs]
        columns["epsilon"][mixed] = epsilons(self.settings.eps_grid, self.settings.eps_max, pairs, len(self.partner))
        columns["rank"] = place if self.rank is None else self.rank[place]
        visits, value = block.values.visits[inside], block.values.value[inside]
        return {**columns, "visits": visits, "value": np.where(visits > 0, value, np.float32(0))}

    def facts(self, **others: Any) -> Facts:
        """Return what the manifest says beside its rows, with what only the caller knows."""
        rule = {name: getattr(self.settings, name) for name in CondenseSettings.model_fields}
        return Facts(
            count=self.count, stage=self.stage, keep=self.keep, dropped=self.dropped, rule=rule, parent=self.parent,
            **others,
        )  # fmt: skip


def random_stage(
    *,
    knowledge_id: str,
    count: int,
    keep: float,
    seed: int,
    labels: Int64[np.ndarray, " n"] | None = None,
    classes: int | None = None,
    previous: Manifest | None = None,
    data_digest: str | None = None,
    excluded: Int64[np.ndarray, " excluded"] = NOBODY,
) -> Manifest:
    """Return the manifest of a stage 0 without any values: floor(keep N) samples at random, nothing mixed.

    The samples `excluded` (those the store skipped) are never kept.

    Raises:
        SettingsError: no sample, or more than `previous` has, would be kept.
    """
    order = _shuffled(_candidates(count, previous, excluded), seed, rng.STAGE0, 0)
    size = _size(keep, count, len(order), count - len(excluded))
    chosen = np.argsort(order[:size])
    index = order[:size][chosen]
    return Manifest(
        **plain(index), rank=chosen, value=np.zeros(size, np.float32), visits=np.zeros(size, np.int32),
        knowledge_id=knowledge_id, count=count, stage=0, keep=keep, dropped=len(order) - size,
        rule={"ranking": "random", "augment_kept": False, "condense_seed": seed},
        parent=previous.digest if previous else None, data_digest=data_digest,
        class_counts=class_counts(index, labels, classes),
    )  # fmt: skip


def partition(
    order: Integer[np.ndarray, " candidates"],
    size: int,
    labels: Int64[np.ndarray, " n"] | None = None,
) -> Partition:
    """Return the `size` best of the ranked candidates or, with labels, the best of each class in equal shares.

    Shares that are no whole numbers go by largest remainder, ties to the lower class, so that `size` is met exactly.

    Raises:
        SettingsError: a label is negative.
    """
    if labels is None:
        return Partition(order[:size], order[size:], None)
    chosen = _stratified(labels[order], size)
    return Partition(order[chosen], order[~chosen], np.flatnonzero(chosen))


def pair(
    kept: Integer[np.ndarray, " kept"], dropped: Integer[np.ndarray, " dropped"]
) -> tuple[Integer[np.ndarray, " pairs"], Integer[np.ndarray, " pairs"]]:
    """Return (K_1L, partners): the lowest kept samples and the best dropped ones, both best first, i-th with i-th.

    There are min(kept, dropped) pairs.

    Source: Eq. 14 of Knowledge Condensation Distillation.
    """
    pairs = min(len(kept), len(dropped))
    return kept[len(kept) - pairs :], dropped[:pairs]


def epsilons(grid: str, eps_max: float, place: Int64[np.ndarray, " n"], count: int) -> Float32[np.ndarray, " n"]:
    """Return the partner's share in the mixes at some places 0..count-1, growing down the ranks from 0 to eps_max.

    With i = place and L = count: 'zero_based' eps_max i / L, 'one_based' eps_max (i + 1) / L, 'inclusive'
    eps_max i / (L - 1) (0 for L = 1), 'constant' eps_max.

    Raises:
        SettingsError: the grid is unknown.

    Source: Eq. 15 of Knowledge Condensation Distillation in the readings of facts.md A4.
    """
    if grid not in GRIDS:
        raise SettingsError(f"unknown eps_grid '{grid}'; {nearest(grid, GRIDS)}")
    return (eps_max * GRIDS[grid](place.astype(np.float64), count)).astype(np.float32)


GRIDS: dict[str, Callable[[Float64[np.ndarray, " count"], int], Float64[np.ndarray, " count"]]] = {
    "zero_based": lambda i, count: i / max(count, 1),
    "one_based": lambda i, count: (i + 1) / max(count, 1),
    "inclusive": lambda i, count: i / max(count - 1, 1),
    "constant": lambda i, count: np.ones_like(i),
}
"""Shape of the mixing share over ranks in [0, 1]: (i = 0 .. L-1, L) -> share of eps_max."""

K0: dict[str, Callable[[Integer[np.ndarray, " dropped"], int], Integer[np.ndarray, " used"]]] = {
    "complement": lambda dropped, shrinkage: dropped,
    "stage_slice": lambda dropped, shrinkage: dropped[: max(0, shrinkage)],
}
"""Which dropped points are K_0: (all of them, best first; by how many the set shrinks) -> K_0, best first."""


def _require_lengths(
    count: int, values: Values, labels: Int64[np.ndarray, " n"] | None, previous: Manifest | None
) -> None:
    for name, found in (
        ("values", len(values.visits)),
        ("labels", count if labels is None else len(labels)),
        ("the previous manifest", count if previous is None else previous.count),
    ):
        if found != count:
            raise MismatchError(
                f"expected {name} of the knowledge's {count} samples, found {found}; give those of this store"
            )


def _size(keep: float, count: int, candidates: int, usable: int) -> int:
    size = min(kept_count(keep, count), usable)
    if size < 1:
        raise SettingsError(f"keep {keep} of {count} samples keeps none; raise keep to at least {1 / max(count, 1):g}")
    if size > candidates:
        raise SettingsError(
            f"keep {keep} of {count} samples asks for {size}, but only {candidates} compete; "
            "lower keep, or set candidates to global"
        )
    return size


def _candidates(
    count: int, within: Manifest | None, excluded: Int64[np.ndarray, " excluded"]
) -> Int64[np.ndarray, " candidates"]:
    everyone = np.arange(count) if within is None else within.index
    return np.setdiff1d(everyone, excluded)


def _ranked(
    source: Source, settings: CondenseSettings, count: int, within: Manifest | None,
    excluded: Int64[np.ndarray, " excluded"], stage: int,
) -> tuple[Integer[np.ndarray, " candidates"], UInt32[np.ndarray, " n"]]:  # fmt: skip
    """Return the candidates, best first, and room for a number for each sample."""
    if settings.ranking == "random":
        order = _shuffled(_candidates(count, within, excluded), settings.condense_seed, rng.RANKING, stage)
        return order, np.empty(count, np.uint32)
    ranker = ranking.Ranker(count)
    everyone = within is None and not len(excluded)
    competing = None if everyone else _candidates(count, within, excluded)
    for block in source.blocks():
        scores = score(block.values, settings.cost_exponent, settings.unseen, block.first)
        index = np.arange(block.first, block.first + len(scores))
        if competing is not None:
            ends = np.searchsorted(competing, [block.first, block.first + len(scores)])
            index = competing[ends[0] : ends[1]]
        ranker.add(index, scores[index - block.first])
    return ranker.ranked()


def _places(kept: Integer[np.ndarray, " kept"], room: UInt32[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
    """Return the place of each sample among the kept ones, written into `room`."""
    room.fill(2**32 - 1)
    for first in range(0, len(kept), 2**20):
        some = kept[first : first + 2**20]
        room[some] = np.arange(first, first + len(some), dtype=np.uint32)
    return room


def _labels(source: Source) -> Int64[np.ndarray, " n"]:
    return np.concatenate([NOBODY, *(block.labels for block in source.blocks() if block.labels is not None)])


def _joined(blocks: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _shuffled(index: Int64[np.ndarray, " n"], seed: int, purpose: int, stage: int) -> Int64[np.ndarray, " n"]:
    high, low, _, _ = rng.words(seed, index, purpose, view=stage)
    keys = np.asarray(high).astype(np.uint64) << np.uint64(32) | np.asarray(low).astype(np.uint64)
    return index[np.argsort(keys, kind="stable")]


def _stratified(labels: Int64[np.ndarray, " candidates"], size: int) -> Bool[np.ndarray, " candidates"]:
    """Return which of the candidates, given by their labels in rank order, are kept."""
    if len(labels) and labels.min() < 0:
        raise SettingsError("stratify needs a label of 0 or more for every sample; found a negative one")
    counts = np.bincount(labels)
    quota, remainder = np.divmod(counts * size, len(labels))
    quota[np.argsort(-remainder, kind="stable")[: size - quota.sum()]] += 1
    by_class = np.argsort(labels, kind="stable")
    place = np.empty(len(labels), np.int64)
    place[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return place < quota[labels]


def _tell_starved(counts: tuple[int, ...], whole: tuple[int, ...], keep: float) -> None:
    """Say which classes lose nearly all of their samples: a student cannot learn what it is never shown."""
    kept = [*counts, *(0 for _ in whole[len(counts) :])]  # classes beyond the largest kept label, where none are named
    starved = [c for c, all_ in enumerate(whole) if kept[c] < STARVED * keep * all_]
    if starved:
        worst = min(starved, key=lambda c: kept[c] / whole[c])
        logger.warning(
            "%d of %d classes keep less than a tenth of their share (class %d: %d of %d samples); --stratify keeps the "
            "same share of every class", len(starved), len(whole), worst, kept[worst], whole[worst],
        )  # fmt: skip


def _tell(
    kept: Integer[np.ndarray, " kept"], dropped: Integer[np.ndarray, " dropped"], settings: CondenseSettings
) -> None:
    if settings.augment_kept and len(dropped) > len(kept):
        logger.info("K_0 has %d points, K_1 only %d: the best %d of K_0 serve", len(dropped), len(kept), len(kept))
    if settings.augment_kept and not len(dropped) and settings.k0 == "stage_slice":
        logger.info("nothing was cut since the manifest before, so k0 = stage_slice has nothing to mix in")
