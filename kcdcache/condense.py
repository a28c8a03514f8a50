"""From values to a manifest: score, rank, partition into K_1 and K_0, pair and mix (Eq. 8, 13 to 15); pure arrays."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from kcdcache import rng
from kcdcache.config import CondenseSettings, nearest
from kcdcache.errors import MismatchError, NonFiniteError, SettingsError
from kcdcache.manifest import Manifest, class_counts, plain
from kcdcache.schedule import kept_count
from kcdcache.values import Values, fingerprint, score

logger = logging.getLogger(__name__)


class Partition(NamedTuple):
    """Candidates split by rank."""

    kept: Int64[np.ndarray, " kept"]
    """K_1, best first"""
    dropped: Int64[np.ndarray, " dropped"]
    """the others, best first"""
    rank: Int64[np.ndarray, " kept"]
    """rank of each kept sample among all candidates"""


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
) -> Manifest:
    """Return the manifest that `stage` trains on: the floor(keep N) best samples, dropped ones mixed into the lowest.

    `previous` is the manifest the values were last updated on; None stands for all `count` samples.

    Raises:
        MismatchError: values, labels or previous are not of `count` samples.
        SettingsError: no sample or more samples than candidates would be kept, or stratify lacks labels.
        NonFiniteError: a visited sample's value is not finite.

    Source: sections 3.3 and 3.4, Eq. 8 and 13 to 15 of Knowledge Condensation Distillation (arXiv 2207.05409).
    """
    _require_lengths(count, values, labels, previous)
    if settings.stratify and labels is None:
        raise SettingsError("stratify needs the label of every sample; give a values file with a 'label' column")
    order = _ranked(values, settings, _candidates(settings, count, previous), stage)
    split = partition(order, _size(keep, count, len(order)), labels if settings.stratify else None)
    dropped = K0[settings.k0](split.dropped, (len(previous) if previous else count) - len(split.kept))
    columns = _mixed_columns(split.kept, dropped, settings)
    return _assembled(
        columns, split.rank, values, dropped=len(dropped), knowledge_id=knowledge_id, count=count, stage=stage,
        keep=keep, rule={name: getattr(settings, name) for name in CondenseSettings.model_fields},
        parent=previous.digest if previous else None, values=fingerprint(values), data_digest=data_digest,
        class_counts=class_counts(split.kept, labels, classes),
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
) -> Manifest:
    """Return the manifest of a stage 0 without any values: floor(keep N) samples at random, nothing mixed.

    Raises:
        SettingsError: no sample, or more than `previous` has, would be kept.
    """
    candidates = np.arange(count) if previous is None else previous.index
    order = _shuffled(candidates, seed, rng.STAGE0, 0)
    split = partition(order, _size(keep, count, len(order)))
    return _assembled(
        plain(split.kept), split.rank, None, dropped=len(split.dropped), knowledge_id=knowledge_id, count=count,
        stage=0, keep=keep, rule={"ranking": "random", "augment_kept": False, "condense_seed": seed},
        parent=previous.digest if previous else None, data_digest=data_digest,
        class_counts=class_counts(split.kept, labels, classes),
    )  # fmt: skip


def order_of(score: Float32[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Return positions from the highest score to the lowest, ties by position; infinities are fine.

    Sorts 64-bit words (complement of the score's order-preserving bits, position), several times faster than argsort.

    Raises:
        NonFiniteError: a score is NaN.
    """
    if np.isnan(score).any():
        raise NonFiniteError(f"the score at position {np.argmax(np.isnan(score))} is NaN, expected a number")
    bits = (score + np.float32(0)).view(np.uint32)  # adding 0 makes -0 and +0 tie
    rising = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    packed = (~rising).astype(np.uint64) << np.uint64(32) | np.arange(len(score), dtype=np.uint64)
    packed.sort()
    return (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)


def partition(
    order: Int64[np.ndarray, " candidates"],
    size: int,
    labels: Int64[np.ndarray, " n"] | None = None,
) -> Partition:
    """Return the `size` best of the ranked candidates or, with labels, the best of each class in equal shares.

    Shares that are no whole numbers go by largest remainder, ties to the lower class, so that `size` is met exactly.

    Raises:
        SettingsError: a label is negative.
    """
    if labels is None:
        return Partition(order[:size], order[size:], np.arange(size))
    chosen = _stratified(labels[order], size)
    return Partition(order[chosen], order[~chosen], np.flatnonzero(chosen))


def pair(
    kept: Int64[np.ndarray, " kept"], dropped: Int64[np.ndarray, " dropped"]
) -> tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]:
    """Return (K_1L, partners): the lowest kept samples and the best dropped ones, both best first, i-th with i-th.

    There are min(kept, dropped) pairs.

    Source: Eq. 14 of Knowledge Condensation Distillation.
    """
    pairs = min(len(kept), len(dropped))
    return kept[len(kept) - pairs :], dropped[:pairs]


def epsilons(grid: str, eps_max: float, count: int) -> Float32[np.ndarray, " count"]:
    """Return the partner's share in each of `count` mixes, growing down the ranks from about 0 to eps_max.

    With L = count: 'zero_based' eps_max i / L, 'one_based' eps_max (i + 1) / L, 'inclusive' eps_max i / (L - 1) (0 for
    L = 1), 'constant' eps_max.

    Raises:
        SettingsError: the grid is unknown.

    Source: Eq. 15 of Knowledge Condensation Distillation in the readings of facts.md A4.
    """
    if grid not in GRIDS:
        raise SettingsError(f"unknown eps_grid '{grid}'; {nearest(grid, GRIDS)}")
    return (eps_max * GRIDS[grid](np.arange(count, dtype=np.float64), count)).astype(np.float32)


GRIDS: dict[str, Callable[[Float64[np.ndarray, " count"], int], Float64[np.ndarray, " count"]]] = {
    "zero_based": lambda i, count: i / max(count, 1),
    "one_based": lambda i, count: (i + 1) / max(count, 1),
    "inclusive": lambda i, count: i / max(count - 1, 1),
    "constant": lambda i, count: np.ones_like(i),
}
"""Shape of the mixing share over ranks in [0, 1]: (i = 0 .. L-1, L) -> share of eps_max."""

K0: dict[str, Callable[[Int64[np.ndarray, " dropped"], int], Int64[np.ndarray, " used"]]] = {
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


def _size(keep: float, count: int, candidates: int) -> int:
    size = kept_count(keep, count)
    if size < 1:
        raise SettingsError(f"keep {keep} of {count} samples keeps none; raise keep to at least {1 / max(count, 1):g}")
    if size > candidates:
        raise SettingsError(
            f"keep {keep} of {count} samples asks for {size}, but only {candidates} compete; "
            "lower keep, or set candidates to global"
        )
    return size


def _candidates(settings: CondenseSettings, count: int, previous: Manifest | None) -> Int64[np.ndarray, " candidates"]:
    if settings.candidates == "current" and previous is not None:
        return previous.index
    return np.arange(count)


def _ranked(
    values: Values, settings: CondenseSettings, candidates: Int64[np.ndarray, " candidates"], stage: int
) -> Int64[np.ndarray, " candidates"]:
    if settings.ranking == "random":
        return _shuffled(candidates, settings.condense_seed, rng.RANKING, stage)
    scores = score(values, settings.cost_exponent, settings.unseen)
    return candidates[order_of(scores[candidates])]


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


def _mixed_columns(
    kept: Int64[np.ndarray, " kept"], dropped: Int64[np.ndarray, " dropped"], settings: CondenseSettings
) -> dict[str, Any]:
    columns = plain(kept)
    if not settings.augment_kept:
        return columns
    if len(dropped) > len(kept):
        logger.info("K_0 has %d points, K_1 only %d: the best %d of K_0 serve", len(dropped), len(kept), len(kept))
    if not len(dropped) and settings.k0 == "stage_slice":
        logger.info("nothing was cut since the manifest before, so k0 = stage_slice has nothing to mix in")
    low, partner = pair(kept, dropped)
    first = len(kept) - len(low)
    columns["mixed"][first:] = True
    columns["partner"][first:] = partner
    columns["epsilon"][first:] = epsilons(settings.eps_grid, settings.eps_max, len(low))
    return columns


def _assembled(
    columns: dict[str, Any], rank: Int64[np.ndarray, " kept"], known: Values | None, **facts: Any
) -> Manifest:
    """Return the manifest of rows given in rank order, sorted by index."""
    rows = np.argsort(columns["index"])
    sorted_columns = {name: column[rows] for name, column in columns.items()}
    index = sorted_columns["index"]
    visits = known.visits[index] if known else np.zeros(len(index), np.int32)
    value = np.where(visits > 0, known.value[index], np.float32(0)) if known else np.zeros(len(index), np.float32)
    return Manifest(**sorted_columns, rank=rank[rows], visits=visits, value=value, **facts)
