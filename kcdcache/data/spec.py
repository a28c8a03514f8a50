"""Data specs: one line of text that names a data set, how much of it is used and what is done to its labels."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kcdcache.data.label_noise import NOTHING, SETTINGS_OF, Corruption
from kcdcache.errors import SettingsError
from kcdcache.settings import nearest

FORMS: Mapping[str, str] = {
    "digits": "digits",
    "cifar10": "cifar10[:DIR]",
    "cifar100": "cifar100[:DIR]",
    "folder": "folder:DIR",
    "parquet": "parquet:DIR[#label_column]",
    "arrays": "arrays:FILE.npz",
    "condensed": "condensed:DIR",
}
"""kind of data -> how its spec is written"""
LIMITS = ("train", "test")
MOST_GAMMA = 20.0


@dataclass(frozen=True, kw_only=True)
class DataIdentity:
    """What was taught: the training split of one data set."""

    count: int
    """number of training samples N"""
    classes: tuple[str, ...]
    """class names, in label order"""
    image_size: tuple[int, int] | None
    """height and width in pixels, or None where images differ"""
    digest: str
    """SHA-256 over the per-sample digests (image bytes and label) in order"""


class DataSpec(NamedTuple):
    """A parsed data spec."""

    kind: str
    location: str | None = None
    """folder or file"""
    column: str | None = None
    """label column of a parquet set"""
    train: int | None = None
    """how many of the first training images to use; all if None"""
    test: int | None = None
    """how many of the first test images to use; all if None"""
    corruption: Corruption = NOTHING
    """what is done to the training split then"""

    @property
    def path(self) -> Path:
        """The location as a path.

        Raises:
            SettingsError: the spec has none.
        """
        if not self.location:
            raise SettingsError(f"data spec '{self.kind}' needs a path: write {FORMS[self.kind]}")
        return Path(self.location).expanduser()


def parse(spec: str) -> DataSpec:
    """Return the parts of a spec KIND[:LOCATION[#COLUMN]][?OPTION=VALUE[&OPTION=VALUE...]].

    Options: train, test, noise, noise_seed, redraw, gamma, n_max, n_min (see `DataSpec` and `Corruption`).

    Raises:
        SettingsError: the kind or an option is unknown, a value is out of range, or an option does nothing here.

    >>> parse("parquet:/d#fine_label?train=500").train, parse("digits?noise=0.4&redraw=false").corruption.redraw
    (500, False)
    """
    body, _, query = spec.partition("?")
    kind, _, location = body.partition(":")
    if kind not in FORMS:
        raise SettingsError(f"unknown data '{kind}' in '{spec}'; {nearest(kind, FORMS)}")
    column = None
    if kind == "parquet":
        location, _, column = location.partition("#")
    values = {name: OPTIONS[name](text) for name, text in _options(query, spec).items()}
    limits = {name: values.pop(name) for name in LIMITS if name in values}
    corruption = Corruption(**values)
    _require_effect(values, corruption, kind, spec)
    return DataSpec(kind, location or None, column or None, **limits, corruption=corruption)


def extended(spec: str, options: str) -> str:
    """Return a spec with further options `NAME=VALUE[&NAME=VALUE...]`; limits that it has already stay as they are.

    Raises:
        SettingsError: an option is unknown, or one that is no limit is given already.

    >>> extended("digits?train=50", "train=4000&noise=0.4")
    'digits?train=50&noise=0.4'
    """
    body, _, query = spec.partition("?")
    held, added = _options(query, spec), _options(options, options)
    if twice := [name for name in added if name in held and name not in LIMITS]:
        raise SettingsError(f"data spec '{spec}' has {twice[0]} already, and '{options}' is to be added; give it once")
    query = "&".join(f"{name}={value}" for name, value in {**held, **added, **held}.items())
    return f"{body}?{query}" if query else body


def _options(query: str, spec: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in query.split("&") if query else ():
        name, _, value = part.partition("=")
        if name not in OPTIONS:
            raise SettingsError(f"unknown option '{name}' in data spec '{spec}'; {nearest(name, OPTIONS)}")
        if name in found:
            raise SettingsError(f"data spec '{spec}' gives {name} twice")
        try:
            OPTIONS[name](value)
        except ValueError as error:
            raise SettingsError(f"'{part}' in data spec '{spec}': {name} should be {error}") from None
        found[name] = value
    return found


def _require_effect(values: Mapping[str, Any], corruption: Corruption, kind: str, spec: str) -> None:
    for switch, others in SETTINGS_OF.items():
        idle = [name for name in others if name in values and switch not in values]  # noise=0 may be one of a sweep
        if idle:
            raise SettingsError(f"{idle[0]} in data spec '{spec}' does nothing without {switch}; leave it out")
    if corruption and kind == "condensed":
        raise SettingsError(
            f"data spec '{spec}': an exported set has the labels and classes its students saw; leave the options out"
        )


def _whole(least: int) -> Callable[[str], int]:
    def parsed(text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text, re.ASCII) or int(text) < least:
            raise ValueError(f"a whole number of at least {least}")
        return int(text)

    return parsed


def _number(low: float, high: float) -> Callable[[str], float]:
    """Return a parser of decimal numbers above `low`, or 0 where that is 0, up to `high`."""

    def parsed(text: str) -> float:
        if (
            not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,18})?|\.[0-9]{1,18}", text, re.ASCII)
            or not low <= float(text) <= high
        ):
            raise ValueError(f"a number from {low:g} to {high:g}")
        return float(text)

    return parsed


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("true or false")
    return text == "true"


OPTIONS: Mapping[str, Callable[[str], Any]] = {
    "train": _whole(1),
    "test": _whole(1),
    "noise": _number(0, 1),
    "noise_seed": _whole(0),
    "redraw": _truth,
    "gamma": _number(0.001, MOST_GAMMA),
    "n_max": _whole(1),
    "n_min": _whole(1),
}
"""option of a data spec -> its parser"""
