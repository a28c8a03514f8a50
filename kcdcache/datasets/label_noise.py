"""Label noise, class imbalance and class-balanced subsets, as functions of labels."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Int64
from pydantic import Field

from kcdcache import rng
from kcdcache.errors import SettingsError
from kcdcache.settings import Settings

NOISE_SEED = 12345
"""default seed, from the code of the protocol"""
RARE = 20
"""default ratio of n_max to n_min, as in 5000/250 and 500/25"""
BOUNDS = ("n_max", "n_min")
SETTINGS_OF = {"noise": ("noise_seed", "redraw"), "gamma": BOUNDS}
"""further settings of each corruption"""


class Corruption(Settings):
    """Corruption of a training split: class imbalance first, then label noise."""

    noise: float = Field(default=0.0, ge=0, le=1)
    """probability of replacing a label"""
    noise_seed: int = Field(default=NOISE_SEED, ge=0, lt=2**64)
    redraw: bool = True
    """draw from all C classes, so that noise (C - 1) / C of the labels become wrong, or only from the wrong ones"""
    gamma: float | None = Field(default=None, ge=0.001, le=20)
    """exponent of the class sizes: the smaller, the less balanced; None for no imbalance"""
    n_max: int | None = Field(default=None, ge=1, lt=10**18)
    """size of the first class; that of the smallest class if None"""
    n_min: int | None = Field(default=None, ge=1, lt=10**18)
    """size of the last class; n_max / 20 if None"""

    def __bool__(self) -> bool:
        return self.noise > 0 or self.gamma is not None

    def bounds(self, sizes: Int64[np.ndarray, " classes"]) -> tuple[int, int]:
        """Return n_max and n_min for classes of these sizes."""
        n_max = int(sizes.min()) if self.n_max is None else self.n_max
        return n_max, max(1, round(n_max / RARE)) if self.n_min is None else self.n_min

    def settled(self, sizes: Int64[np.ndarray, " classes"]) -> "Corruption":
        """Return a copy with n_max and n_min filled in for classes of these sizes."""
        if self.gamma is None:
            return self
        return self.model_copy(update=dict(zip(BOUNDS, self.bounds(sizes), strict=True)))

    def document(self) -> dict[str, Any]:
        """Return the settings that have an effect, as JSON values."""
        known = self.model_dump()
        names = [name for switch, others in SETTINGS_OF.items() if known[switch] for name in (switch, *others)]
        return {name: known[name] for name in names}


def class_sizes(classes: int, gamma: float, n_max: int, n_min: int) -> Int64[np.ndarray, " classes"]:
    """Return n_c = round(a / (b + c^gamma)) for c = 1..classes, where a and b make n_1 = n_max and n_C = n_min.

    gamma > 0, n_max >= n_min >= 1. b = (n_min C^gamma - n_max) / (n_max - n_min), a = n_max (1 + b).

    Source: power law of Dong et al. 2018 and Hendrycks et al. 2019, as used in "Knowledge Distillation Beyond Model
    Compression" (Sarfraz et al., arXiv 2007.01922); facts.md section 2.

    >>> class_sizes(10, 0.2, 5000, 250).tolist()
    [5000, 858, 557, 439, 375, 333, 304, 282, 264, 250]
    """
    if n_max == n_min:
        return np.full(classes, n_max)
    powers = np.arange(1, classes + 1, dtype=np.float64) ** gamma
    b = (n_min * powers[-1] - n_max) / (n_max - n_min)
    return np.round(n_max * (1 + b) / (b + powers)).astype(np.int64)


def first_of_each(labels: Int64[np.ndarray, " n"], sizes: Int64[np.ndarray, " classes"]) -> Int64[np.ndarray, " kept"]:
    """Return the ascending positions of the first `sizes[c]` samples of each class; SettingsError if it has fewer."""
    held = np.bincount(labels, minlength=len(sizes))
    for short in np.flatnonzero(held < sizes)[:1].tolist():
        raise SettingsError(
            f"gamma asks for {sizes[short]} samples of class {short}, which has {held[short]}; "
            "give n_max and n_min that every class can fill"
        )
    return np.flatnonzero(_rank(labels, held) < sizes[labels])


def balanced(labels: Int64[np.ndarray, " n"], count: int) -> Int64[np.ndarray, " kept"]:
    """Return the ascending positions of `count` samples: of every class its share, taken from its first samples.

    Labels are 0 or more. Shares are those of Webster's divisor method (of Sainte-Lague) over class sizes n_c: sample
    r = 0, 1, ... of a class comes before another's if (2r + 1) / n_c is smaller, ties by class. Hence a smaller subset
    is part of a larger one.

    Source: Balinski and Young, "Fair Representation" (1982), appendix A.

    >>> balanced(np.array([0, 0, 0, 0, 1, 1]), 3).tolist()
    [0, 1, 4]
    """
    held = np.bincount(labels)
    first = np.lexsort((labels, (2 * _rank(labels, held) + 1) / held[labels]))
    return np.sort(first[:count])


def _rank(labels: Int64[np.ndarray, " n"], held: Int64[np.ndarray, " classes"]) -> Int64[np.ndarray, " n"]:
    """Return how many earlier samples have the same label; `held` are the class sizes."""
    order = np.argsort(labels, kind="stable")
    starts = np.cumsum(held) - held
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - starts[labels[order]]
    return rank


def noisy(
    labels: Int64[np.ndarray, " n"], index: Int64[np.ndarray, " n"], classes: int, asked: Corruption
) -> Int64[np.ndarray, " n"]:
    """Return labels in [0, classes), each replaced by a uniform draw with probability `asked.noise`.

    The draw depends only on the seed and on `index`, the sample's number in the whole training split.

    Source: symmetric noise of "Knowledge Distillation Beyond Model Compression" (facts.md section 2), whose code draws
    from one random stream instead of by address.
    """
    chance, which, _, _ = rng.words(asked.noise_seed, index, rng.NOISE)
    other = rng.below(which, classes) if asked.redraw else (labels + 1 + rng.below(which, classes - 1)) % classes
    return np.where(rng.unit(chance) < asked.noise, other, labels)


def applied(
    labels: Int64[np.ndarray, " n"], classes: int, corruption: Corruption
) -> tuple[Int64[np.ndarray, " kept"], Int64[np.ndarray, " kept"]]:
    """Return the ascending positions of the samples left by a corruption, and their labels.

    Raises SettingsError if there is only one class, a class has too few samples, or n_min > n_max.
    """
    rows = np.arange(len(labels))
    if classes < 2:
        raise SettingsError("label noise and class imbalance need two classes or more")
    if corruption.gamma is not None:
        held = np.bincount(labels, minlength=classes)
        n_max, n_min = corruption.bounds(held)
        if corruption.n_max is None and n_max < 2:
            raise SettingsError(
                f"gamma has nothing to thin out: class {int(held.argmin())} has only {n_max} samples, and n_max "
                "is the size of the smallest class; use more training images, or give n_max and n_min"
            )
        if n_min > n_max:
            raise SettingsError(f"class sizes run from n_max down to n_min; found n_max={n_max}, n_min={n_min}")
        rows = first_of_each(labels, class_sizes(classes, corruption.gamma, n_max, n_min))
    return rows, noisy(labels[rows], rows, classes, corruption)


def frequent(sizes: Int64[np.ndarray, " classes"]) -> Bool[np.ndarray, " classes"]:
    """Return which classes are frequent: the largest ones that hold at least half of the samples, ties by label."""
    order = np.argsort(-sizes, kind="stable")
    before = np.cumsum(sizes[order]) - sizes[order]
    found = np.zeros(len(sizes), bool)
    found[order] = 2 * before < sizes.sum()
    return found
