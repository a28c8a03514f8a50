"""Label noise and class imbalance as functions of labels: which samples stay, and which label each is given."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from kcdcache import rng
from kcdcache.errors import SettingsError

NOISE_SEED = 12345
"""seed of label noise unless another is given, as in the protocol's code"""
RARE = 20
"""how many times fewer samples the last class has than the first, unless n_min is given: 5000/250 and 500/25"""
SETTINGS_OF = {"noise": ("noise_seed", "redraw"), "gamma": ("n_max", "n_min")}
"""what switches a corruption on -> what else decides it"""


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """What a data spec does to a training split: first it thins out classes, then it changes labels."""

    noise: float = 0.0
    """chance in [0, 1] that a sample's label is drawn anew"""
    noise_seed: int = NOISE_SEED
    """seed of the noise"""
    redraw: bool = True
    """whether the draw is over all C classes, the true one among them, so that noise (C - 1) / C of the labels become
    wrong; else over the other classes, so that `noise` of them do"""
    gamma: float | None = None
    """exponent of the class sizes, above 0: the smaller, the more uneven; None leaves the classes as they are"""
    n_max: int | None = None
    """samples of the first class; those of the smallest class if None"""
    n_min: int | None = None
    """samples of the last class; n_max / 20 if None"""

    def __bool__(self) -> bool:
        return self.noise > 0 or self.gamma is not None

    def settled(self, sizes: Int64[np.ndarray, " classes"]) -> "Corruption":
        """Return it with n_max and n_min filled in for classes of these sizes."""
        if self.gamma is None:
            return self
        n_max = int(sizes.min()) if self.n_max is None else self.n_max
        return replace(self, n_max=n_max, n_min=max(1, round(n_max / RARE)) if self.n_min is None else self.n_min)

    def document(self) -> dict[str, Any]:
        """Return what is in force, as JSON values."""
        known = asdict(self)
        return {
            name: known[name] for switch, others in SETTINGS_OF.items() if known[switch] for name in (switch, *others)
        }


NOTHING = Corruption()
"""what a data spec without such options does"""


def class_sizes(classes: int, gamma: float, n_max: int, n_min: int) -> Int64[np.ndarray, " classes"]:
    """Return n_c = round(a / (b + c^gamma)) for c = 1..classes, where a and b make n_1 = n_max and n_C = n_min.

    gamma > 0, n_max >= n_min >= 1. b = (n_min C^gamma - n_max) / (n_max - n_min), a = n_max (1 + b).

    Source: the power law of Dong et al. 2018 and Hendrycks et al. 2019 as used for "Knowledge Distillation Beyond Model
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
    """Return the positions, ascending, of the first `sizes[c]` samples of every class c.

    Raises:
        SettingsError: a class has fewer; names it.
    """
    held = np.bincount(labels, minlength=len(sizes))
    for short in np.flatnonzero(held < sizes)[:1].tolist():
        raise SettingsError(
            f"gamma asks for {sizes[short]} samples of class {short}, which has {held[short]}; "
            "give n_max and n_min that every class can fill"
        )
    order = np.argsort(labels, kind="stable")
    starts = np.cumsum(held) - held
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - starts[labels[order]]
    return np.flatnonzero(rank < sizes[labels])


def noisy(
    labels: Int64[np.ndarray, " n"],
    index: Int64[np.ndarray, " n"],
    classes: int,
    *,
    rate: float,
    seed: int = NOISE_SEED,
    redraw: bool = True,
) -> Int64[np.ndarray, " n"]:
    """Return labels in [0, classes) of which each was drawn anew, uniformly, with probability `rate`.

    `redraw` is as in `Corruption`. `index` is each sample's number in the whole training split: what becomes of a
    sample depends on it and the seed alone, not on which others there are.

    Source: symmetric noise of "Knowledge Distillation Beyond Model Compression" (facts.md section 2), whose code draws
    from one stream of random numbers where this draws by address.
    """
    chance, which, _, _ = rng.words(seed, index, rng.NOISE)
    other = rng.below(which, classes) if redraw else (labels + 1 + rng.below(which, classes - 1)) % classes
    return np.where(rng.unit(chance) < rate, other, labels)


def applied(
    labels: Int64[np.ndarray, " n"], classes: int, corruption: Corruption
) -> tuple[Int64[np.ndarray, " kept"], Int64[np.ndarray, " kept"]]:
    """Return the positions of the samples that a corruption leaves, ascending, and the labels it gives them.

    Raises:
        SettingsError: a class has fewer samples than it shall have, there is only one class, or n_min is above n_max.
    """
    rows = np.arange(len(labels))
    if classes < 2:
        raise SettingsError("label noise and class imbalance need two classes or more")
    if corruption.gamma is not None:
        held = np.bincount(labels, minlength=classes)
        full = corruption.settled(held)
        assert full.n_max is not None
        assert full.n_min is not None
        if corruption.n_max is None and full.n_max < 2:
            raise SettingsError(
                f"gamma has nothing to thin out: class {int(held.argmin())} has only {full.n_max} samples, and n_max "
                "is the size of the smallest class; use more training images, or give n_max and n_min"
            )
        if full.n_min > full.n_max or full.n_min < 1:
            raise SettingsError(
                f"class sizes run from n_max down to n_min; found n_max={full.n_max}, n_min={full.n_min}"
            )
        rows = first_of_each(labels, class_sizes(classes, corruption.gamma, full.n_max, full.n_min))
    given = labels[rows]
    if corruption.noise:
        seed, redraw = corruption.noise_seed, corruption.redraw
        given = noisy(given, rows, classes, rate=corruption.noise, seed=seed, redraw=redraw)
    return rows, given


def frequent(sizes: Int64[np.ndarray, " classes"]) -> Bool[np.ndarray, " classes"]:
    """Return which classes are the largest that together hold at least half of the samples, ties by label."""
    order = np.argsort(-sizes, kind="stable")
    before = np.cumsum(sizes[order]) - sizes[order]
    found = np.zeros(len(sizes), bool)
    found[order] = 2 * before < sizes.sum()
    return found
