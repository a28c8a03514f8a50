"""What condensed sets do with samples known to be mislabelled and with rare classes."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from kcdcache.manifest import Manifest


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
