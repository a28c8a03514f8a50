"""What became of every sample over a run's stages: kept, enriched, dropped, back again; and how far runs agree."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int8
from scipy.stats import rankdata

from kcdcache.condense.manifest import Manifest

DROPPED, KEPT, MIXED = 0, 1, 2
FATES = {
    "stayed": "kept in every stage",
    "left": "kept at first, dropped at some stage, never back",
    "returned": "dropped at some stage, kept again, and kept in the last set",
    "unsteady": "dropped, kept again, and dropped in the last set",
    "joined": "not in the first set, taken up later and kept from then on",
    "never": "in no set",
}
"""what can become of a sample -> what that means; every sample has exactly one"""


class Turnover(NamedTuple):
    """How one set differs from the one before it, in samples."""

    stayed: int
    """kept in both"""
    left: int
    """kept before, dropped now"""
    returned: int
    """kept now and in some earlier set, but not in the one before"""
    new: int
    """kept now for the first time; in the first set that is all of it"""


def part_of(chosen: Manifest) -> Int8[np.ndarray, " n"]:
    """Return 0 (dropped), 1 (kept as it is, K_1H) or 2 (kept and enriched, K_Aug) for each of all N samples."""
    found = np.full(chosen.count, DROPPED, np.int8)
    found[chosen.index] = np.where(chosen.mixed, MIXED, KEPT)
    return found


def parts(sets: Sequence[Manifest]) -> Int8[np.ndarray, "sets n"]:
    """Return `part_of` each set."""
    return np.stack([part_of(chosen) for chosen in sets])


def turnover(found: Int8[np.ndarray, "sets n"]) -> list[Turnover]:
    """Return how each set differs from the one before it."""
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
    """Return fate -> which samples had it, in the order of FATES; every sample has exactly one."""
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
    """Return each sample's place among all by score, from 0 (least valuable) to 1 (most); ties share their mean."""
    ranks: Float[np.ndarray, " n"] = rankdata(score) - 1
    return ranks / max(1, len(ranks) - 1)


def hamming(sets: Sequence[Manifest]) -> Float[np.ndarray, "sets sets"]:
    """Return the share of all samples that one set keeps and the other does not, in [0, 1], for each pair of sets.

    Source: Fig. 3c of Knowledge Condensation Distillation (arXiv 2207.05409): distance of final value labels.
    """
    kept = [part_of(chosen) > DROPPED for chosen in sets]
    return np.array([[float(np.mean(one != other)) for other in kept] for one in kept]).reshape(len(kept), len(kept))


def by_chance(one: Manifest, other: Manifest) -> float:
    """Return the distance to expect of two random sets of these sizes: a (1 - b) + b (1 - a) for shares a and b."""
    a, b = len(one) / one.count, len(other) / other.count
    return a * (1 - b) + b * (1 - a)


def screened(
    chosen: Manifest, wrong: Bool[np.ndarray, " n"] | None = None, rare: Bool[np.ndarray, " n"] | None = None
) -> dict[str, int]:
    """Return how many samples a set keeps, enriches, mixes in and drops, in all and of those marked.

    `wrong` marks samples whose label is wrong, `rare` those of rare classes. `kept` counts all of the set,
    `enriched` its K_Aug, `partners` the dropped samples that are mixed into those, each once.
    """
    count = chosen.count
    parts = {name: np.zeros(count, bool) for name in ("kept", "enriched", "partners")}
    parts["kept"][chosen.index] = True
    parts["enriched"][chosen.index[chosen.mixed]] = True
    parts["partners"][chosen.partner[chosen.mixed]] = True
    parts["dropped"] = ~parts["kept"]
    marks = {"": np.ones(count, bool), "_wrong": wrong, "_rare": rare}
    return {
        f"{name}{ending}": int((part & mark).sum())
        for ending, mark in marks.items()
        if mark is not None
        for name, part in parts.items()
    }


def separation(score: Float[np.ndarray, " n"], marked: Bool[np.ndarray, " n"]) -> float | None:
    """Return the chance in [0, 1] that a marked sample scores above an unmarked one, a tie counting half.

    0.5 is what an unrelated score gives; None where all or no samples are marked.

    Source: the area under the ROC curve as the Mann-Whitney statistic.
    """
    ones, others = int(marked.sum()), int((~marked).sum())
    if not ones or not others:
        return None
    _, group, sizes = np.unique(score, return_inverse=True, return_counts=True)
    middle = np.cumsum(sizes) - (sizes - 1) / 2  # rank from 1, the same for equal scores
    return float((middle[group][marked].sum() - ones * (ones + 1) / 2) / (ones * others))


def quantiles(
    value: Float[np.ndarray, " n"], marked: Bool[np.ndarray, " n"], shares: tuple[float, ...] = (0.1, 0.5, 0.9)
) -> list[float] | None:
    """Return quantiles of the marked samples' values, None where there are none."""
    return [float(found) for found in np.quantile(value[marked], shares)] if marked.any() else None


def per_set(
    chosen: Manifest,
    value: Float[np.ndarray, " n"] | None,
    wrong: Bool[np.ndarray, " n"] | None,
    rare: Bool[np.ndarray, " n"] | None,
) -> dict[str, Any]:
    """Return `screened` of a stage's set and, of the values at its end, how they tell the marked samples apart.

    `value` is NaN for samples that were never visited: those are counted in the set, and left out of what is said of
    values.
    """
    found: dict[str, Any] = {"stage": chosen.stage, **screened(chosen, wrong, rare)}
    for name, mark in (("wrong", wrong), ("rare", rare)):
        if mark is not None and value is not None:
            seen = ~np.isnan(value)
            known, marked = value[seen], mark[seen]
            found[f"separation_{name}"] = separation(known, marked)
            found[f"value_{name}"] = quantiles(known, marked)
            found[f"value_not_{name}"] = quantiles(known, ~marked)
    return found
