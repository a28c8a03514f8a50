"""Images per second: mean and spread, from lines of clock times or from what was measured."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from kcdcache.files.atomic import read_bytes
from kcdcache.files.records import MOST_RECORD_BYTES
from kcdcache.statistics import spread

MOST_LINES = 10**6
"""of a file of clock times"""


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


class _Line(BaseModel):
    """What matters here of a line of clock times."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    seconds: float = Field(gt=0)
    images: float | None = Field(default=None, validation_alias=AliasChoices("samples", "points"))
    epoch: int | None = None
    warm_up: bool = False


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
    stretches: dict[tuple[str, int], list[_Line]] = {}
    for number, line in enumerate(_lines(file)):
        if line.images is not None:
            key = ("line", number) if line.epoch is None else ("epoch", line.epoch)
            stretches.setdefault(key, []).append(line)
    steady, first = (
        [_rate(lines) for lines in stretches.values() if any(line.warm_up for line in lines) == early]
        for early in (False, True)
    )
    rate = rate_of(steady or first)
    return rate._replace(warm_up=spread(first).mean) if rate is not None and steady else rate


def logged_seconds(file: Path) -> float:
    """Return the sum of `seconds` over a file of clock times; a line torn by a power loss counts nothing."""
    return sum((line.seconds for line in _lines(file)), 0.0)


def document(rate: Rate | None) -> dict[str, Any] | None:
    """Return a rate as JSON values, rounded to a hundredth."""
    if rate is None:
        return None
    found = {"n": rate.n, "mean": round(rate.mean, 2), "std": None if rate.std is None else round(rate.std, 2)}
    return found if rate.warm_up is None else found | {"warm_up": round(rate.warm_up, 2)}


def _lines(file: Path) -> Iterator[_Line]:
    if not file.exists():
        return
    for text in read_bytes(file, MOST_RECORD_BYTES).split(b"\n", MOST_LINES)[:MOST_LINES]:
        try:
            yield _Line.model_validate_json(text)
        except ValidationError:
            continue


def _rate(lines: list[_Line]) -> float:
    return sum(line.images or 0 for line in lines) / sum(line.seconds for line in lines)
