"""The value of every sample, in memory: start, observe, score, fingerprint."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int32, Shaped

from kcdcache.errors import MismatchError, NonFiniteError, SettingsError, require_known
from kcdcache.files import parquet

MOST_VISITS = 2**31 - 1
UNSEEN = {"first": np.inf, "last": -np.inf}
"""policy -> score of samples that were never visited"""
_LOOKED_UP = 2**10


@dataclass(frozen=True, eq=False)
class Values:
    """Visits and value of N samples; a sample without visits has value 0 and is unseen."""

    visits: Int32[np.ndarray, " n"]
    """visit count F, 0 or more"""
    value: Float32[np.ndarray, " n"]
    """value V, usually the mean student entropy over all visits in nats"""

    def __post_init__(self) -> None:
        if len(self.visits) != len(self.value):
            raise MismatchError(f"values need one row per sample: {len(self.visits)} visits, {len(self.value)} values")


def start(count: int) -> Values:
    """Return the values of `count` unseen samples."""
    return Values(np.zeros(count, np.int32), np.zeros(count, np.float32))


def observe(
    visits: Int32[Any, " batch"],
    mean: Float32[Any, " batch"],
    value: Float32[Any, " batch"],
    record: str = "mean",
    decay: float = 0.9,
) -> tuple[Int32[Any, " batch"], Float32[Any, " batch"]]:
    """Return visits and value after one more observation per row: F + 1, and the new estimate.

    'mean': m + (v - m) / F, the running mean; 'last': v; 'ema': decay m + (1 - decay) v, the first visit being v.
    Works on numpy arrays and torch tensors on any device, and changes none. Raises SettingsError for another `record`.

    Source: Eq. 12 of Knowledge Condensation Distillation (arXiv 2207.05409); 'ema' is ours.
    """
    require_known("record", record, RECORDS)
    return visits + 1, RECORDS[record](visits, mean, value, decay)


def score(values: Values, exponent: float, unseen: str, first: int = 0) -> Float32[np.ndarray, " n"]:
    """Return value * visits^exponent per sample, unseen samples at +inf ('first') or -inf ('last'); never NaN or -0.

    Raises:
        SettingsError: the policy is unknown.
        NonFiniteError: a visited sample's value or score is not finite; names its index, counted from `first`.

    Source: Eq. 13 of Knowledge Condensation Distillation; the policy for unseen samples is ours.
    """
    if unseen not in UNSEEN:
        raise SettingsError(f"unknown policy '{unseen}' for unseen samples; known: {', '.join(UNSEEN)}")
    seen = values.visits > 0
    with np.errstate(over="ignore", invalid="ignore"):
        weighted = values.value * _weights(values.visits, exponent)
        found = weighted.astype(np.float32) + np.float32(0)  # adding 0 turns -0 into +0, so that both tie
    require_finite(values.value, found, seen, first)
    return np.where(seen, found, np.float32(UNSEEN[unseen]))


def fingerprint(values: Values) -> str:
    """Return the SHA-256 over visits and values, the same in memory and in any file."""
    return parquet.digest(b"", {"visits": values.visits, "value": values.value})


def require_finite(value: Shaped[Any, " n"], found: Shaped[Any, " n"], seen: Shaped[Any, " n"], first: int = 0) -> None:
    """Raise NonFiniteError unless `found` is finite for all seen samples; `first` is the index of the first sample."""
    bad = seen & ~np.isfinite(found)
    if bad.any():
        index = int(np.argmax(bad))
        at = f"the value of index {first + index} is {value[index]}, expected a finite number whose score fits float32"
        raise NonFiniteError(f"{at}; find out in which epoch the student diverged")


def _record_mean(visits: Any, mean: Any, value: Any, decay: float) -> Any:
    step = value - mean
    step /= visits + 1  # in place: numpy would otherwise widen float32 / int32 to float64
    return mean + step


def _record_last(visits: Any, mean: Any, value: Any, decay: float) -> Any:
    return value


def _record_ema(visits: Any, mean: Any, value: Any, decay: float) -> Any:
    past = mean - value
    past *= decay
    past *= visits > 0
    return value + past


RECORDS = {"mean": _record_mean, "last": _record_last, "ema": _record_ema}
"""an estimate's rule: the mean of all observations, the latest one, or a moving average"""


def _weights(visits: Int32[np.ndarray, " n"], exponent: float) -> Float64[np.ndarray, " n"]:
    """Return visits^exponent, 1 for unseen samples; looked up, because powers are slow."""
    highest = int(visits.max(initial=1))
    if highest > len(visits) + _LOOKED_UP:
        return np.maximum(visits, 1).astype(np.float64) ** exponent
    powers = np.maximum(np.arange(highest + 1), 1).astype(np.float64) ** exponent
    return powers[np.maximum(visits, 0)]
