"""Images per second: mean and spread, from lines of clock times or from what was measured."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from kcdcache.errors import CorruptionError, UnsafeError
from kcdcache.files.atomic import MOST_JSON_BYTES, MOST_RECORD_BYTES, parse_json, read_bytes
from kcdcache.statistics import spread

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
    warm_up: float | None = None
    """mean of the stretches that came first, which are left out of all the above; None if there are none"""

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
    Rate(n=2, mean=2.0, std=1.4142135623730951, warm_up=None)
    """
    n, mean, std = spread(list(rates))
    return None if mean is None else Rate(n, mean, std)


def logged(file: Path) -> Rate | None:
    """Return the rate that a file of clock times tells; None if it tells none.

    A stretch is what a line's `seconds` hold: an epoch with its evaluation and checkpoint, or what went on of one that
    was interrupted, or a part of a store from images to encoded rows. Lines of one epoch are one stretch. Epochs marked
    as `warm_up` are told apart where there are others. A line torn by a power loss counts nothing, and so does one
    without seconds.
    """
    if not file.exists():
        return None
    lines = read_bytes(file, MOST_RECORD_BYTES).split(b"\n", MOST_LINES)[:MOST_LINES]
    found: dict[tuple[str, int], _Stretch] = {}
    for number, line in enumerate(lines):
        if (stretch := _stretch(line, file, number)) is not None:
            before = found.get(stretch.key)
            found[stretch.key] = stretch if before is None else before.joined(stretch)
    steady, first = ([one.rate for one in found.values() if one.warm_up == early] for early in (False, True))
    if not steady:
        return rate_of(first)
    rate = rate_of(steady)
    return rate if rate is None or not first else rate._replace(warm_up=spread(first).mean)


def document(rate: Rate | None) -> dict[str, Any] | None:
    """Return a rate as JSON values, rounded to a hundredth."""
    if rate is None:
        return None
    found = {"n": rate.n, "mean": round(rate.mean, 2), "std": None if rate.std is None else round(rate.std, 2)}
    return found if rate.warm_up is None else found | {"warm_up": round(rate.warm_up, 2)}


class _Stretch(NamedTuple):
    """What one or more lines tell."""

    key: tuple[str, int]
    images: float
    seconds: float
    warm_up: bool

    @property
    def rate(self) -> float:
        return self.images / self.seconds

    def joined(self, other: "_Stretch") -> "_Stretch":
        return _Stretch(
            self.key, self.images + other.images, self.seconds + other.seconds, self.warm_up or other.warm_up
        )


def _stretch(line: bytes, file: Path, number: int) -> _Stretch | None:
    try:
        row = parse_json(line, file)
    except (CorruptionError, UnsafeError):
        return None
    if not isinstance(row, dict):
        return None
    seconds, images = row.get("seconds"), next((row[name] for name in COUNTS if name in row), None)
    if not isinstance(seconds, int | float) or not isinstance(images, int | float) or seconds <= 0:
        return None
    epoch = row.get("epoch")
    key = ("epoch", epoch) if isinstance(epoch, int) else ("line", number)
    return _Stretch(key, images, seconds, row.get("warm_up") is True)


"""of a file of clock times"""


def logged_seconds(file: Path) -> float:
    """Return the sum of `seconds` over a file of clock times; a line torn by a power loss counts nothing."""
    if not file.exists():
        return 0.0
    return sum(_seconds(line, file) for line in read_bytes(file, MOST_JSON_BYTES).split(b"\n", MOST_LINES)[:MOST_LINES])


def _seconds(line: bytes, file: Path) -> float:
    try:
        found = parse_json(line, file)
    except (CorruptionError, UnsafeError):
        return 0.0
    seconds = found.get("seconds") if isinstance(found, dict) else None
    return float(seconds) if isinstance(seconds, int | float) else 0.0
