"""Comparisons of condensed sets: of two, of a run's sets over its stages, and of what they keep of marked samples."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int8, Shaped
from pydantic import ConfigDict

from kcdcache.condensation.manifest import Manifest
from kcdcache.errors import MismatchError
from kcdcache.settings import Settings

DROPPED, KEPT, MIXED = 0, 1, 2
FATES = {
    "stayed": "kept in every stage",
    "left": "kept at first, dropped at some stage, never back",
    "returned": "dropped at some stage, kept again, and kept in the last set",
    "unsteady": "dropped, kept again, and dropped in the last set",
    "joined": "not in the first set, taken up later and kept from then on",
    "never": "in no set",
}
"""fate of a sample -> its meaning; every sample has exactly one"""
BAND = (0.1, 0.5, 0.9)
"""quantiles that sum up the values of many samples"""


class Difference(Settings):
    """Differences of two condensed sets A and B of the same data; all counts are of samples."""

    samples: int
    """N, of the whole training split"""
    kept_a: int
    kept_b: int
    both: int
    only_a: int
    only_b: int
    dropped_by_both: int
    jaccard: float
    """|A and B| / |A or B| in [0, 1]"""
    hamming: float
    """|A xor B| / N in [0, 1]"""
    rank_correlation: float | None
    """Spearman's in [-1, 1], over the samples kept in both; None if fewer than two, or all alike"""
    value_correlation: float | None
    """the same of their values, over those visited in both"""
    parts_moved: int
    """kept in both, but mixed in one only: the sum of the next two"""
    K_1H_to_K_Aug: int
    K_Aug_to_K_1H: int
    mixed_in_both: int
    same_partner: int
    """mixed in both, with the same partner"""
    class_difference: list[int] | None
    """kept in B minus kept in A, by class; None if a set does not know its classes"""
    same_knowledge: bool
    identical: bool
    """equal in every column and fact"""


class Turnover(NamedTuple):
    """Differences of a set and the one before it, in samples."""

    stayed: int
    left: int
    returned: int
    """kept now and in an earlier set, but not in the one before"""
    new: int
    """kept for the first time; in the first set all of it"""


class SetCounts(Settings):
    """Sizes of a stage's set, and how well its values separate marked samples.

    Entries ending in `wrong` count samples with a wrong label, in `rare` samples of rare classes. They are unset if no
    sample is marked; those about values also before the stage has any.
    """

    model_config = ConfigDict(strict=True)

    stage: int
    kept: int
    enriched: int
    """K_Aug"""
    partners: int
    """dropped samples mixed into those"""
    dropped: int
    kept_wrong: int | None = None
    enriched_wrong: int | None = None
    partners_wrong: int | None = None
    dropped_wrong: int | None = None
    kept_rare: int | None = None
    enriched_rare: int | None = None
    partners_rare: int | None = None
    dropped_rare: int | None = None
    separation_wrong: float | None = None
    """`separation` by the values at the stage's end, of the samples visited so far"""
    value_wrong: list[float] | None = None
    """BAND of those values"""
    value_not_wrong: list[float] | None = None
    separation_rare: float | None = None
    value_rare: list[float] | None = None
    value_not_rare: list[float] | None = None


def compare(a: Manifest, b: Manifest, names: tuple[str, str] = ("A", "B")) -> Difference:
    """Compare two condensed sets; raises MismatchError, with their `names`, if they are of different data."""
    _require_same_data(a, b, names)
    common, at_a, at_b = np.intersect1d(a.index, b.index, assume_unique=True, return_indices=True)
    either, both = len(a) + len(b) - len(common), len(common)
    seen = (a.visits[at_a] > 0) & (b.visits[at_b] > 0)
    was, now = a.mixed[at_a], b.mixed[at_b]
    gained, lost = int((~was & now).sum()), int((was & ~now).sum())
    return Difference(
        samples=a.count,
        kept_a=len(a),
        kept_b=len(b),
        both=both,
        only_a=len(a) - both,
        only_b=len(b) - both,
        dropped_by_both=a.count - either,
        jaccard=both / either if either else 1.0,
        hamming=(either - both) / a.count,
        rank_correlation=spearman(a.rank[at_a], b.rank[at_b]),
        value_correlation=spearman(a.value[at_a][seen], b.value[at_b][seen]),
        parts_moved=gained + lost,
        K_1H_to_K_Aug=gained,
        K_Aug_to_K_1H=lost,
        mixed_in_both=int((was & now).sum()),
        same_partner=int((was & now & (a.partner[at_a] == b.partner[at_b])).sum()),
        class_difference=_class_difference(a, b),
        same_knowledge=a.knowledge_id == b.knowledge_id,
        identical=a.digest == b.digest,
    )


def _require_same_data(a: Manifest, b: Manifest, names: tuple[str, str]) -> None:
    classes = [len(chosen.class_counts) or None for chosen in (a, b)]
    for what, one, other in (
        ("samples", a.count, b.count), ("data digest", a.data_digest, b.data_digest), ("classes", *classes),
    ):  # fmt: skip
        if one is not None and other is not None and one != other:
            raise MismatchError(
                f"{names[0]} is a set of data with {what} {one}, {names[1]} with {other}; compare sets of one data set"
            )


def _class_difference(a: Manifest, b: Manifest) -> list[int] | None:
    if not a.class_counts or not b.class_counts:
        return None
    return [after - before for before, after in zip(a.class_counts, b.class_counts, strict=True)]


def spearman(x: Shaped[np.ndarray, " n"], y: Shaped[np.ndarray, " n"]) -> float | None:
    """Return Spearman's rank correlation in [-1, 1], ties at their mean rank; None for fewer than two values."""
    from scipy import stats

    if min(len(np.unique(x)), len(np.unique(y))) < 2:
        return None
    return float(stats.spearmanr(x, y).statistic)


def parts(sets: Sequence[Manifest]) -> Int8[np.ndarray, "sets n"]:
    """Return DROPPED, KEPT (K_1H) or MIXED (K_Aug) for all N samples in each set."""
    found = np.full((len(sets), sets[0].count), DROPPED, np.int8)
    for row, chosen in zip(found, sets, strict=True):
        row[chosen.index] = np.where(chosen.mixed, MIXED, KEPT)
    return found


def turnover(found: Int8[np.ndarray, "sets n"]) -> list[Turnover]:
    """Compare each set with the one before it."""
    kept = found > DROPPED
    ever = np.zeros(kept.shape[1], bool)
    rows = []
    for number, now in enumerate(kept):
        before = kept[number - 1] if number else np.zeros_like(now)
        counts = (now & before, before & ~now, now & ~before & ever, now & ~ever)
        rows.append(Turnover(*(int(mask.sum()) for mask in counts)))
        ever |= now
    return rows


def fates(found: Int8[np.ndarray, "sets n"]) -> dict[str, Bool[np.ndarray, " n"]]:
    """Return fate -> the samples that had it, in the order of FATES."""
    kept = found > DROPPED
    ever, last = kept.any(axis=0), kept[-1]
    earlier = np.logical_or.accumulate(kept, axis=0)
    back = (kept[1:] & ~kept[:-1] & earlier[:-1]).any(axis=0)
    return {
        "stayed": kept.all(axis=0),
        "left": ever & ~last & ~back,
        "returned": back & last,
        "unsteady": back & ~last,
        "joined": last & ~back & ~kept.all(axis=0),
        "never": ~ever,
    }


def percentiles(score: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return each sample's percentile by score, from 0 (least valuable) to 1 (most); ties share their mean."""
    from scipy import stats

    ranks: Float[np.ndarray, " n"] = stats.rankdata(score) - 1
    return ranks / max(1, len(ranks) - 1)


def hamming(sets: Sequence[Manifest]) -> Float[np.ndarray, "sets sets"]:
    """Return the share of all samples that just one of two sets keeps, in [0, 1], for each pair of sets.

    Source: Fig. 3c of Knowledge Condensation Distillation (arXiv 2207.05409): distance of final value labels.
    """
    kept = parts(sets) > DROPPED
    return np.array([[float(np.mean(one != other)) for other in kept] for one in kept])


def by_chance(one: Manifest, other: Manifest) -> float:
    """Return the expected distance of two random sets of these sizes: a (1 - b) + b (1 - a) for shares a and b."""
    a, b = len(one) / one.count, len(other) / other.count
    return a * (1 - b) + b * (1 - a)


def count_set(
    chosen: Manifest,
    value: Float[np.ndarray, " n"] | None,
    wrong: Bool[np.ndarray, " n"] | None,
    rare: Bool[np.ndarray, " n"] | None,
) -> SetCounts:
    """Count a stage's set, in all and by samples marked `wrong` and `rare`.

    `value` has the values at the stage's end, NaN for samples that were never visited; those count as samples, not as
    values.
    """
    groups = {name: np.zeros(chosen.count, bool) for name in ("kept", "enriched", "partners")}
    groups["kept"][chosen.index] = True
    groups["enriched"][chosen.index[chosen.mixed]] = True
    groups["partners"][chosen.partner[chosen.mixed]] = True
    groups["dropped"] = ~groups["kept"]
    found: dict[str, Any] = {name: int(group.sum()) for name, group in groups.items()}
    for name, mark in (("wrong", wrong), ("rare", rare)):
        if mark is not None:
            found |= {f"{group}_{name}": int((of & mark).sum()) for group, of in groups.items()}
            if value is not None:
                seen = ~np.isnan(value)
                known, marked = value[seen], mark[seen]
                found[f"separation_{name}"] = separation(known, marked)
                found[f"value_{name}"], found[f"value_not_{name}"] = _band(known[marked]), _band(known[~marked])
    return SetCounts(stage=chosen.stage, **found)


def separation(score: Float[np.ndarray, " n"], marked: Bool[np.ndarray, " n"]) -> float | None:
    """Return the chance in [0, 1] that a marked sample scores above an unmarked one, a tie counting half.

    0.5 for an unrelated score, None if all or no samples are marked.

    Source: the area under the ROC curve as the Mann-Whitney statistic.
    """
    from scipy import stats

    ones, others = int(marked.sum()), int((~marked).sum())
    if not ones or not others:
        return None
    return float((stats.rankdata(score)[marked].sum() - ones * (ones + 1) / 2) / (ones * others))


def _band(value: Float[np.ndarray, " n"]) -> list[float] | None:
    return [float(found) for found in np.quantile(value, BAND)] if len(value) else None
