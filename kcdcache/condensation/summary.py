"""From values to a manifest: score, rank, partition into K_1 and K_0, pair and mix (Eq. 8, 13 to 15)."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Integer, UInt32, UInt64

from kcdcache import rng
from kcdcache.condensation import ranking
from kcdcache.condensation.manifest import Manifest, Samples, unranked
from kcdcache.condensation.ranking import Plan, numbered
from kcdcache.condensation.schedule import kept_count
from kcdcache.condensation.value_files import Held, Source
from kcdcache.condensation.values import Values, score
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.settings import CondenseSettings

logger = logging.getLogger(__name__)

STARVED = 0.1
"""a class that keeps less than this part of its share gets a warning"""


class Partition(NamedTuple):
    """Candidates, split by rank."""

    kept: Integer[np.ndarray, " kept"]
    """K_1, best first"""
    dropped: Integer[np.ndarray, " dropped"]
    """the others, best first"""
    rank: Int64[np.ndarray, " kept"] | None
    """rank of each kept sample among all candidates; None if it is the place among the kept"""


def condense(
    values: Values, settings: CondenseSettings, samples: Samples, *, stage: int, keep: float,
    previous: Manifest | None = None,
) -> Manifest:  # fmt: skip
    """Return the manifest for `stage`: the floor(keep N) best samples, with dropped ones mixed into the lowest.

    `previous` is the manifest the values were last updated on, None for all samples. Samples the store skipped do not
    compete; if fewer than floor(keep N) are left, all are kept.

    Raises:
        MismatchError: values, labels or previous are of another number of samples.
        SettingsError: no sample or more than the candidates would be kept, or stratify lacks labels.
        NonFiniteError: a visited sample's value is not finite.

    Source: sections 3.3 and 3.4, Eq. 8 and 13 to 15 of Knowledge Condensation Distillation (arXiv 2207.05409).
    """
    count = samples.count
    for name, found in (
        ("values", len(values.visits)),
        ("labels", count if samples.labels is None else len(samples.labels)),
        ("the previous manifest", count if previous is None else previous.count),
    ):
        if found != count:
            raise MismatchError(
                f"expected {name} of the knowledge's {count} samples, found {found}; give those of this store"
            )
    source = Held(values, samples.labels)
    made = plan(source, settings, samples, stage=stage, keep=keep, previous=previous).draft(source).held()
    _warn_starved(made.class_counts, samples.class_counts(np.arange(count)), keep)
    return made


def plan(
    source: Source, settings: CondenseSettings, samples: Samples, *, stage: int, keep: float,
    previous: Manifest | None = None,
) -> Plan:  # fmt: skip
    """Return the set for `stage` before its rows are made, in 8 bytes per sample; arguments and errors as `condense`.

    Random rankings and `stratify` take up to 32 bytes per sample.
    """
    require_labelled(source, settings)
    competing = previous if settings.candidates == "current" else None
    order, room = _ranked(source, settings, samples, competing, stage)
    size = size_of(keep, samples, len(order))
    labels = [block.labels for block in source.blocks() if block.labels is not None] if settings.stratify else None
    split = partition(order, size, np.concatenate(labels) if labels else None)
    used = K0[settings.k0](len(split.dropped), (len(previous) if previous else samples.count) - len(split.kept))
    log_sizes(size, used, settings)
    partner = split.dropped[: min(used, size) if settings.augment_kept else 0]
    return Plan(
        samples=samples, settings=settings, stage=stage, keep=keep, parent=previous.digest if previous else None,
        kept=size, pairs=len(partner), dropped=used, places=_places(split.kept, room), partner=partner,
        rank=split.rank,
    )  # fmt: skip


def random_stage(samples: Samples, *, keep: float, seed: int, previous: Manifest | None = None) -> Manifest:
    """Return a manifest of stage 0 without values: floor(keep N) random samples, nothing mixed.

    Raises SettingsError if no sample, or more than `previous` has, would be kept.
    """
    order = _shuffled(_candidates(samples, previous), seed, rng.STAGE0, 0)
    size = size_of(keep, samples, len(order))
    chosen = np.argsort(order[:size])
    return unranked(
        samples, order[:size][chosen], chosen, keep=keep, dropped=len(order) - size,
        rule={"ranking": "random", "augment_kept": False, "condense_seed": seed},
        parent=previous.digest if previous else None,
    )  # fmt: skip


def partition(
    order: Integer[np.ndarray, " candidates"],
    size: int,
    labels: Int64[np.ndarray, " n"] | None = None,
) -> Partition:
    """Return the `size` best of the ranked candidates or, with labels, the best of each class in equal shares.

    Shares are rounded by largest remainder, ties to the lower class, so that exactly `size` are kept.
    """
    if labels is None:
        return Partition(order[:size], order[size:], None)
    own = labels[order]
    require_labels(own)
    chosen = numbered(own) < quotas(np.bincount(own), size)[own]
    return Partition(order[chosen], order[~chosen], np.flatnonzero(chosen))


K0: dict[str, Callable[[int, int], int]] = {
    "complement": lambda dropped, shrinkage: dropped,
    "stage_slice": lambda dropped, shrinkage: min(dropped, max(0, shrinkage)),
}
"""rule -> size of K_0, the best dropped samples: (number dropped, shrinkage of the set) -> size"""


def require_labelled(source: Source, settings: CondenseSettings) -> None:
    """Raise SettingsError if stratify lacks the label of a sample."""
    if settings.stratify and not source.labelled:
        raise SettingsError("stratify needs the label of every sample; give a values file with a 'label' column")


def size_of(keep: float, samples: Samples, candidates: int) -> int:
    """Return how many samples are kept, at most floor(keep N); raises SettingsError unless in [1, candidates]."""
    count = samples.count
    size = min(kept_count(keep, count), count - len(samples.excluded))
    if size < 1:
        raise SettingsError(f"keep {keep} of {count} samples keeps none; raise keep to at least {1 / max(count, 1):g}")
    if size > candidates:
        raise SettingsError(
            f"keep {keep} of {count} samples asks for {size}, but only {candidates} compete; "
            "lower keep, or set candidates to global"
        )
    return size


def _candidates(samples: Samples, within: Manifest | None) -> Int64[np.ndarray, " candidates"]:
    everyone = np.arange(samples.count) if within is None else within.index
    return np.setdiff1d(everyone, samples.excluded, assume_unique=True)  # 10^7 samples: 0.02 s instead of 13.5


def _ranked(
    source: Source, settings: CondenseSettings, samples: Samples, within: Manifest | None, stage: int
) -> tuple[Integer[np.ndarray, " candidates"], UInt32[np.ndarray, " n"]]:
    """Return the candidates, best first, and room for one number per sample."""
    if settings.ranking == "random":
        order = _shuffled(_candidates(samples, within), settings.condense_seed, rng.RANKING, stage)
        return order, np.empty(samples.count, np.uint32)
    ranker = ranking.Ranker(samples.count)
    everyone = within is None and not len(samples.excluded)
    competing = None if everyone else _candidates(samples, within)
    for block in source.blocks():
        scores = score(block.values, settings.cost_exponent, settings.unseen, block.first)
        index = np.arange(block.first, block.first + len(scores))
        if competing is not None:
            ends = np.searchsorted(competing, [block.first, block.first + len(scores)])
            index = competing[ends[0] : ends[1]]
        ranker.add(index, scores[index - block.first])
    return ranker.ranked()


def _places(kept: Integer[np.ndarray, " kept"], room: UInt32[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
    """Return the place of each sample among the kept, written into `room`."""
    room.fill(2**32 - 1)
    for first in range(0, len(kept), 2**20):
        some = kept[first : first + 2**20]
        room[some] = np.arange(first, first + len(some), dtype=np.uint32)
    return room


def _shuffled(index: Int64[np.ndarray, " n"], seed: int, purpose: int, stage: int) -> Int64[np.ndarray, " n"]:
    return index[np.argsort(random_keys(index, seed, purpose, stage), kind="stable")]


def random_keys(index: Int64[np.ndarray, " n"], seed: int, purpose: int, stage: int) -> UInt64[np.ndarray, " n"]:
    """Return random 64-bit keys that order samples at random, ties by index."""
    high, low, _, _ = rng.words(seed, index, purpose, view=stage)
    return np.asarray(high).astype(np.uint64) << np.uint64(32) | np.asarray(low).astype(np.uint64)


def require_labels(labels: Int64[np.ndarray, " some"]) -> None:
    """Raise SettingsError if a label is negative."""
    if len(labels) and labels.min() < 0:
        raise SettingsError("stratify needs a label of 0 or more for every sample; found a negative one")


def quotas(counts: Int64[np.ndarray, " classes"], size: int) -> Int64[np.ndarray, " classes"]:
    """Return how many candidates of each class are kept: equal shares, `size` in all, by largest remainder."""
    quota, remainder = np.divmod(counts * size, counts.sum())
    quota[np.argsort(-remainder, kind="stable")[: size - quota.sum()]] += 1
    return quota


def _warn_starved(counts: tuple[int, ...], whole: tuple[int, ...], keep: float) -> None:
    """Warn of classes that lose nearly all their samples: the student cannot learn them."""
    kept = [*counts, *(0 for _ in whole[len(counts) :])]  # classes beyond the largest kept label, where none are named
    starved = [c for c, all_ in enumerate(whole) if kept[c] < STARVED * keep * all_]
    if starved:
        worst = min(starved, key=lambda c: kept[c] / whole[c])
        logger.warning(
            "%d of %d classes keep less than a tenth of their share (class %d: %d of %d samples); --stratify keeps the "
            "same share of every class", len(starved), len(whole), worst, kept[worst], whole[worst],
        )  # fmt: skip


def log_sizes(kept: int, dropped: int, settings: CondenseSettings) -> None:
    """Log that K_0 is larger than K_1, or empty for a reason that is not obvious."""
    if settings.augment_kept and dropped > kept:
        logger.info("K_0 has %d points, K_1 only %d: the best %d of K_0 are mixed in", dropped, kept, kept)
    if settings.augment_kept and not dropped and settings.k0 == "stage_slice":
        logger.info("no sample was dropped since the previous manifest, so k0 = stage_slice has nothing to mix in")
