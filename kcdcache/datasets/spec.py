"""Data specs: one line of text that gives a data set, limits on its size and corruption of its training split."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from kcdcache.datasets.label_noise import SETTINGS_OF, Corruption
from kcdcache.errors import SettingsError, nearest
from kcdcache.settings import Composed, fields, make

FORMS: Mapping[str, str] = {
    "digits": "digits",
    "cifar10": "cifar10[:DIR]",
    "cifar100": "cifar100[:DIR]",
    "folder": "folder:DIR",
    "parquet": "parquet:DIR[#label_column]",
    "arrays": "arrays:FILE.npz",
    "condensed": "condensed:DIR",
}
"""form of the spec by kind of data"""
LIMITS = ("train", "test")
IDLE: Mapping[tuple[str, ...], tuple[str, ...]] = {LIMITS: ("order",), **{(k,): v for k, v in SETTINGS_OF.items()}}
"""options that do nothing without one of others"""
ONLY_FOR: Mapping[str, tuple[str, ...]] = {
    "channels": ("arrays",), "image": ("parquet",), "train_split": ("folder", "parquet"),
    "test_split": ("folder", "parquet"),
}  # fmt: skip
"""option -> the kinds of data that take it, if not all do"""


@dataclass(frozen=True, kw_only=True)
class DataIdentity:
    """Identity of a training split."""

    count: int
    classes: tuple[str, ...]
    """class names, in label order"""
    image_size: tuple[int, int] | None
    """height and width in pixels, or None if they differ"""
    digest: str
    """SHA-256 over the digests of the samples (image and label) in order"""


class Options(Composed):
    """Options of a data spec, after the question mark."""

    train: int | None = Field(default=None, ge=1)
    """use only N training images; all if unset"""
    test: int | None = Field(default=None, ge=1)
    """use only N test images; all if unset"""
    order: Literal["balanced", "stored"] = "balanced"
    """images of a limit: every class's share, see `label_noise.balanced`, or the first in stored order"""
    channels: int | None = Field(default=None, ge=1)
    """channels of arrays, the length of their last axis; 1, 3 or 4 if unset"""
    image: str | None = Field(default=None, min_length=1)
    """image column of a parquet set"""
    train_split: str | None = Field(default=None, min_length=1)
    """split to train on; train if unset"""
    test_split: str | None = Field(default=None, min_length=1)
    """split to test on; test or validation if unset"""
    corruption: Corruption


class DataSpec(NamedTuple):
    """A parsed data spec; `column` is the label column of a parquet set."""

    kind: str
    location: str | None
    """folder or file"""
    column: str | None
    options: Options

    @property
    def path(self) -> Path:
        """The location as a path; raises SettingsError if the spec has none."""
        if not self.location:
            raise SettingsError(f"data spec '{self.kind}' needs a path: write {FORMS[self.kind]}")
        return at_home(self.location)


def _kind_at(body: str, spec: str) -> str:
    """Return the kind of the data at a bare path; raises SettingsError where there are none, or two kinds."""
    path = at_home(body.partition("#")[0])
    if not path.exists():
        raise SettingsError(
            f"unknown data '{body.partition(':')[0]}' in '{spec}'; {nearest(body.partition(':')[0], FORMS)} (or a path "
            f"of class folders, parquet files or an .npz file; nothing is at {path})"
        )
    if path.is_file():
        found = ["arrays"] if path.suffix == ".npz" else []
    elif (path / "condensed.json").is_file():
        found = ["condensed"]
    else:
        tables = next((name for name in path.rglob("*.parquet")), None)
        found = [*["folder"] * (path / "train").is_dir(), *["parquet"] * (tables is not None)]
    if len(found) == 1:
        return found[0]
    if found:
        raise SettingsError(f"{body} holds class folders and parquet files: give folder:{body} or parquet:{body}")
    held = (
        "has no class folders in train/, no parquet files and no exported set" if path.is_dir() else "is no .npz file"
    )
    raise SettingsError(
        f"{body} is no data: it {held}; class folders are DIR/train/CLASS/IMAGE, with DIR/val or DIR/test for testing"
    )


def at_home(location: str | Path) -> Path:
    """Return a path with the home folder in place of `~`; raises SettingsError if this user has none."""
    try:
        return Path(location).expanduser()
    except RuntimeError:
        raise SettingsError(
            f"{location} is in the home folder, and this user has none (HOME is unset, and no passwd entry names one); "
            "set HOME, or give a path without ~, as in cifar100:/data/cifar100"
        ) from None


def parse(spec: str) -> DataSpec:
    """Parse a spec KIND[:LOCATION[#COLUMN]][?OPTION=VALUE[&OPTION=VALUE...]]; raises SettingsError if it is wrong.

    Without KIND, a path is read as what is there: class folders, parquet files, an .npz file or an exported set.

    >>> parse("parquet:/d#fine_label?train=500").column, parse("digits?noise=0.4&redraw=false").options.corruption.noise
    ('fine_label', 0.4)
    """
    body, _, query = spec.partition("?")
    kind, _, location = body.partition(":")
    if kind not in FORMS:
        kind, location = _kind_at(body, spec), body
    column = ""
    if kind == "parquet":
        location, _, column = location.partition("#")
    options = make(Options, _split(query, spec), f"data spec '{spec}'")
    for switches, others in IDLE.items():
        idle = options.given.intersection(others)
        if idle and not options.given.intersection(switches):  # noise=0 may be part of a sweep
            needed = " or ".join(switches)
            raise SettingsError(f"{min(idle)} in data spec '{spec}' does nothing without {needed}; leave it out")
    for option in sorted(options.given & ONLY_FOR.keys()):
        if kind not in ONLY_FOR[option]:
            told = f"{option} in data spec '{spec}' does nothing there"
            raise SettingsError(f"{told}: it is for {' and '.join(ONLY_FOR[option])}; leave it out")
    if options.corruption and kind == "condensed":
        raise SettingsError(
            f"data spec '{spec}': an exported set has the labels and classes its students saw; leave the options out"
        )
    return DataSpec(kind, location or None, column or None, options)


def extended(spec: str, options: str) -> str:
    """Return a spec with further options `NAME=VALUE[&NAME=VALUE...]`; its own limits and order take precedence.

    An added order is left out if the added limits have no effect.

    Raises SettingsError if an option is unknown, or given twice and not a limit.

    >>> extended("digits?train=50", "train=4000&noise=0.4")
    'digits?train=50&noise=0.4'
    >>> extended("digits?train=50", "train=4000&order=stored"), extended("digits?test=9", "train=4000&order=stored")
    ('digits?train=50', 'digits?test=9&train=4000&order=stored')
    """
    body, _, query = spec.partition("?")
    held, added = _split(query, spec), _split(options, options)
    if twice := [name for name in added if name in held and name not in (*LIMITS, "order")]:
        raise SettingsError(f"data spec '{spec}' has {twice[0]} already, and '{options}' is to be added; give it once")
    if (limits := added.keys() & set(LIMITS)) and limits <= held.keys():
        added.pop("order", None)
    query = "&".join(f"{name}={value}" for name, value in {**held, **added, **held}.items())
    return f"{body}?{query}" if query else body


def _split(query: str, spec: str) -> dict[str, str]:
    """Return the options by name; raises SettingsError if one is unknown or given twice."""
    found: dict[str, str] = {}
    for name, _, value in (part.partition("=") for part in query.split("&") if query):
        if name not in fields(Options):
            raise SettingsError(f"unknown option '{name}' in data spec '{spec}'; {nearest(name, fields(Options))}")
        if name in found:
            raise SettingsError(f"data spec '{spec}' gives {name} twice")
        found[name] = value
    return found
