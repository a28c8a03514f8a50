"""Mean and spread of repeated measurements, and paired differences with confidence intervals."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kcdcache.errors import SettingsError

CONFIDENCE = 0.95


class Spread(NamedTuple):
    """Repeated measurements of one thing."""

    n: int
    """how many"""
    mean: float | None
    """None where there are none"""
    std: float | None
    """sample standard deviation (n - 1); None for fewer than two"""


class Difference(NamedTuple):
    """How much one thing exceeds another over paired seeds, in the unit of what was measured."""

    n: int
    """pairs"""
    mean: float
    std: float | None
    """sample standard deviation of the pairs' differences; None for one pair"""
    low: float | None
    """lower end of the confidence interval of the mean; None for one pair"""
    high: float | None
    """upper end of it"""


def spread(numbers: Sequence[float]) -> Spread:
    """Return n, mean and sample standard deviation.

    >>> spread([1.0, 3.0])
    Spread(n=2, mean=2.0, std=1.4142135623730951)
    """
    if not numbers:
        return Spread(0, None, None)
    return Spread(len(numbers), statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)


def difference(
    measured: Mapping[int, float], reference: Mapping[int, float], confidence: float = CONFIDENCE
) -> Difference | None:
    """Return the mean of measured - reference over the seeds both have, or None if they share none.

    The interval is that of Student's t with n - 1 degrees of freedom: mean +- t std / sqrt(n). It takes differences of
    seeds to be independent and roughly normal, and is not adjusted for the number of comparisons made.

    Raises:
        SettingsError: the confidence lies outside (0, 1).
    """
    from scipy import stats

    if not 0 < confidence < 1:
        raise SettingsError(f"a confidence lies between 0 and 1, found {confidence}; 0.95 is usual")
    n, mean, std = spread([measured[seed] - reference[seed] for seed in sorted(measured.keys() & reference.keys())])
    if mean is None or std is None:
        return None if mean is None else Difference(n, mean, None, None, None)
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * std / math.sqrt(n)
    return Difference(n, mean, std, mean - reach, mean + reach)
