"""Where a store came from, in words: what was done to its labels, and which data its teacher learned from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kcdcache.errors import CorruptionError, KcdcacheError
from kcdcache.files import read_sealed, sealed_json, write_atomic

FILE = Path("_kcd") / "origin.json"


class Origin(NamedTuple):
    """What a store says of where it came from; no part of its id, which holds digests of the same."""

    corruption: Mapping[str, Any]
    """what was done to the training split, as `Dataset.corrupted` tells it; empty for nothing"""
    teacher_data: str | None
    """digest of the training split that the teacher learned from; None where its folder does not tell"""

    def told(self, data: str) -> dict[str, Any]:
        """Return it as a summary's entries; `data` is the digest of the store's own training split."""
        known = {} if self.teacher_data is None else {"teacher_data": "same" if self.teacher_data == data else "other"}
        return {**self.corruption, **known}


def write(root: Path, found: Origin) -> None:
    """Write a store's record, or complete one that does not know yet what the teacher learned from."""
    held = read(root)
    if held is None or (held.teacher_data is None and found.teacher_data is not None):
        write_atomic(
            root / FILE, sealed_json({"corruption": dict(found.corruption), "teacher_data": found.teacher_data})
        )


def read(root: Path) -> Origin | None:
    """Return where a store came from, None where it does not say: it was made by an earlier kcdcache.

    Raises:
        CorruptionError: the record is not what was written.
        UnsafeError: it is no plain file, or larger than any record of ours.
    """
    path = root / FILE
    if not path.exists():
        return None
    found = read_sealed(path, "corruption", "teacher_data")
    corruption, taught = found["corruption"], found["teacher_data"]
    if not isinstance(corruption, dict) or not (taught is None or isinstance(taught, str)):
        raise CorruptionError(f"{path} should hold an object and a digest; {REMEDY}")
    return Origin(corruption, taught)


def corruption_of(root: Path) -> Mapping[str, Any]:
    """Return what was done to the training split of a store, empty for nothing or where it does not say."""
    found = read(root)
    return {} if found is None else found.corruption


def problem(root: Path) -> str | None:
    """Return what is wrong with a store's record, None for none or a sound one."""
    try:
        read(root)
    except KcdcacheError as error:
        return str(error)
    return None


REMEDY = "delete it and run the store's `kcdcache precompute` again"
