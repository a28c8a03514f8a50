"""What a store keeps of the teacher's parameters: one small record for the whole network, beside its fields."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError
from kcdcache.files import read_sealed, sealed_json, write_atomic
from kcdcache.identity import Knowledge

NAME = "parameters"
"""how `--fields` and messages call it: no field, since it has no rows"""
DEFAULT = ("logits",)
"""fields of a store of which nothing else is asked"""
FILE = Path("_kcd") / "parameters.json"
QUANTILES = 64
"""numbers that stand for a stage's filters, whatever their count"""
Profiles = Mapping[str, list[float]]
"""stage -> quantiles of its filters' norms, averaged over its convolutions"""


@runtime_checkable
class Kept(Protocol):
    """A store, as far as this matters."""

    @property
    def path(self) -> Path:
        """Its folder."""

    @property
    def fields(self) -> Mapping[str, Any]:
        """Its fields by name."""


def held(store: Kept) -> tuple[str, ...]:
    """Return the names of all that a store keeps of its teacher: its fields, and NAME if it has the record."""
    return (*store.fields, *((NAME,) if (store.path / FILE).exists() else ()))


def per_sample(names: Collection[str]) -> tuple[str, ...]:
    """Return the names of those that are fields, with rows per sample."""
    return tuple(name for name in names if name != NAME)


def write(root: Path, stages: Profiles, knowledge: Knowledge) -> None:
    """Write the record of a store's teacher, replacing one that is there; the same numbers give the same bytes.

    Raises:
        NoSpaceError: the disk is full.
    """
    document = {"weights": knowledge.teacher.weights, "quantiles": QUANTILES, "stages": dict(stages)}
    write_atomic(root / FILE, sealed_json(document))


def read(root: Path, knowledge: Knowledge) -> dict[str, list[float]] | None:
    """Return what a store keeps of its teacher's parameters, None if it has no record.

    Raises:
        CorruptionError: the record is not what was written.
        MismatchError: it is of another teacher.
        UnsafeError: it is no plain file, or larger than any record of ours.
    """
    path = root / FILE
    if not path.exists():
        return None
    found = read_sealed(path, "weights", "quantiles", "stages")
    if found["weights"] != knowledge.teacher.weights:
        raise MismatchError(
            f"{path} is of weights {found['weights']!r:.80}, the store's are {knowledge.teacher.weights}; "
            "delete it and run `kcdcache precompute --fields parameters` with the store's own teacher"
        )
    stages = found["stages"]
    if not isinstance(stages, dict) or not stages or not all(map(_sound, stages.values())):
        raise CorruptionError(f"{path} should hold {QUANTILES} numbers of at least 0 per stage; {REMEDY}")
    return stages


def problem(root: Path, knowledge: Knowledge, own: Profiles | None = None) -> str | None:
    """Return what is wrong with a store's record, None for none or a sound one; compared with its teacher's if given.

    Another machine may compute other last bits: up to 1e-5 of the largest number is no difference.
    """
    try:
        found = read(root, knowledge)
    except KcdcacheError as error:
        return str(error)
    if found is None or own is None:
        return None
    if own.keys() == found.keys() and all(np.allclose(own[name], found[name], rtol=1e-5) for name in own):
        return None
    return f"{root / FILE} holds other numbers than this teacher's parameters give; {REMEDY}"


REMEDY = "delete it and run `kcdcache precompute --fields parameters` again"


def _sound(numbers: Any) -> bool:
    if not isinstance(numbers, list) or len(numbers) != QUANTILES:
        return False
    return all(type(number) is float and 0 <= number < np.inf for number in numbers)
