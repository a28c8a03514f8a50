"""Images per second: mean and spread, from lines of clock times or from what was measured."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from kcdcache.errors import CorruptionError, UnsafeError
from kcdcache.files import read_bytes
from kcdcache.untrusted import MOST_JSON_BYTES, parse_json

MOST_LINES = 10**6
COUNTS = ("samples", "points")
"""entries of a line of clock times that say how many images it is about"""


class Rate(NamedTuple):
    """Images per second, over some stretches of work that count alike: epochs, parts or batches."""

    n: int
    """number of stretches"""
    mean: float
    std: float | None
    """sample standard deviation; None of a single stretch"""

    def __str__(self) -> str:
        """Return mean and spread for people.

        >>> str(Rate(3, 1234.5, 67.8)), str(Rate(1, 0.25, None))
        ('1,234 ± 68', '0.25')
        """
        digits = 0 if self.mean >= 10 else 2
        return f"{self.mean:,.{digits}f}" + ("" if self.std is None else f" ± {self.std:,.{digits}f}")


def rate_of(rates: Iterable[float]) -> Rate | None:
    """Return mean and spread of images per second; None if there are none.

    >>> rate_of([1.0, 3.0])
    Rate(n=2, mean=2.0, std=1.4142135623730951)
    """
    found = list(rates)
    if not found:
        return None
    return Rate(len(found), statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None)


def logged(file: Path) -> Rate | None:
    """Return the rate that a file of clock times tells, one stretch per line; None if it tells none.

    A stretch is what its line's `seconds` hold: an epoch with its evaluation and checkpoint, or a part of a store from
    images to encoded rows. A line torn by a power loss counts nothing, and so does one without seconds.
    """
    if not file.exists():
        return None
    lines = read_bytes(file, MOST_JSON_BYTES).split(b"\n", MOST_LINES)[:MOST_LINES]
    return rate_of(rate for line in lines if (rate := _rate(line, file)) is not None)


def document(rate: Rate | None) -> dict[str, Any] | None:
    """Return a rate as JSON values, rounded to a hundredth."""
    if rate is None:
        return None
    return {"n": rate.n, "mean": round(rate.mean, 2), "std": None if rate.std is None else round(rate.std, 2)}


def _rate(line: bytes, file: Path) -> float | None:
    try:
        row = parse_json(line, file)
    except (CorruptionError, UnsafeError):
        return None
    if not isinstance(row, dict):
        return None
    seconds, images = row.get("seconds"), next((row[name] for name in COUNTS if name in row), None)
    if not isinstance(seconds, int | float) or not isinstance(images, int | float) or seconds <= 0:
        return None
    return images / seconds
