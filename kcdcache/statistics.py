"""Mean and spread of repeated measurements, and paired differences with confidence intervals."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """Mean and spread of repeated measurements."""

    n: int
    mean: float | None
    std: float | None
    """sample standard deviation (n - 1); None if n < 2"""


class Difference(NamedTuple):
    """Mean difference over paired seeds with its 95 % confidence interval, in the unit of the measurements."""

    n: int
    mean: float
    std: float | None
    """sample standard deviation of the differences; None, like the interval, for one pair"""
    low: float | None
    high: float | None


def spread(numbers: Sequence[float]) -> Spread:
    """Return n, mean and sample standard deviation.

    >>> spread([1.0, 3.0])
    Spread(n=2, mean=2.0, std=1.4142135623730951)
    """
    if not numbers:
        return Spread(0, None, None)
    return Spread(len(numbers), statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)


def difference(measured: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Return the mean of measured - reference over their common seeds, or None if there are none.

    The interval is Student's t with n - 1 degrees of freedom, mean +- t std / sqrt(n). It assumes independent, roughly
    normal differences, without correction for multiple comparisons.
    """
    from scipy import stats

    n, mean, std = spread([measured[seed] - reference[seed] for seed in sorted(measured.keys() & reference.keys())])
    if mean is None or std is None:
        return None if mean is None else Difference(n, mean, None, None, None)
    reach = float(stats.t.ppf(0.975, n - 1)) * std / math.sqrt(n)
    return Difference(n, mean, std, mean - reach, mean + reach)
