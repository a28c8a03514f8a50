"""Where a store comes from: its teacher, data and views, its origin, and its teacher's filters; free of torch."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_serializer
from pydantic_core import to_jsonable_python

from kcdcache.datasets.spec import DataIdentity
from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, NotFoundError
from kcdcache.files import records
from kcdcache.files.atomic import found_at, write_atomic
from kcdcache.files.records import Record, Sealed, digest_of, read_sealed, sealed_json
from kcdcache.settings import ViewRule

FOLDER = Path("_kcd")
"""the folder of a store's records"""
IDENTITY_FILE = FOLDER / "identity.json"
ORIGIN_FILE = FOLDER / "origin.json"
PARAMETERS_FILE = FOLDER / "parameters.json"
FORMAT_VERSION = 0


@dataclass(frozen=True, kw_only=True)
class TeacherIdentity:
    """What decides the outputs of a frozen network."""

    architecture: str
    """model spec"""
    weights: str
    """SHA-256 over names, shapes, types and bytes of all tensors"""
    transform: dict[str, Any]
    """the input transform: size, mean, std; and `outputs` if the logits are the logarithm of probabilities"""
    precision: str

    @property
    def imported(self) -> bool:
        """Whether the outputs were computed elsewhere."""
        return self.architecture == "imported"


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What decides the rows of a store; values, manifests and runs bind to its `knowledge_id`."""

    teacher: TeacherIdentity
    data: DataIdentity
    views: ViewRule
    mixes: dict[str, Any] | None = None
    """for a requery store: the manifest's digest, the mixing rule and the view numbers; None for plain views"""
    subset: dict[str, Any] | None = None
    """for the store in an exported set: the manifest's digest and the number of rows; None for all samples"""

    @property
    def whole(self) -> bool:
        """Whether there is a row for every sample of the data."""
        return self.mixes is None and self.subset is None

    @property
    def knowledge_id(self) -> str:
        """SHA-256 of the canonical form of all the above."""
        return digest_of(self.document())

    def document(self) -> dict[str, Any]:
        """Return the identity as JSON values."""
        document: dict[str, Any] = to_jsonable_python(self)
        if self.subset is None:  # keeps the ids from before there were exports
            del document["subset"]
        return document


class IdentityRecord(Record):
    """The content of identity.json."""

    format_version: int = FORMAT_VERSION
    knowledge: Knowledge
    knowledge_id: str

    @classmethod
    def of(cls, knowledge: Knowledge) -> "IdentityRecord":
        """Return the record of a store of this knowledge."""
        return cls(knowledge=knowledge, knowledge_id=knowledge.knowledge_id)

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {**vars(self), "knowledge": self.knowledge.document()}


def read_store_identity(store: Path) -> Knowledge:
    """Return the identity of the store at a path, without opening its arrays.

    Raises NotFoundError without a store, MismatchError for a newer format, CorruptionError if the record was changed.
    """
    path = store / IDENTITY_FILE
    if not path.exists():
        if any(path.parent.glob("commit.*.json")):
            raise CorruptionError(f"{path} is missing; `kcdcache verify {store} --repair` makes it again")
        raise NotFoundError(
            f"no knowledge store at {store} ({found_at(Path(store))}); give the folder of a store, which "
            "`kcdcache precompute` makes"
        )
    found = records.read_object(path, "format_version")
    records.require_format(found, FORMAT_VERSION, path)
    record = records.parse(IdentityRecord, records.canonical_json(found), path)
    if record.knowledge_id != record.knowledge.knowledge_id:
        raise CorruptionError(f"{path} was changed: its content does not match its knowledge_id")
    return record.knowledge


class Origin(Sealed):
    """Where a store comes from, for people; not part of its id, which has digests of the same."""

    corruption: dict[str, Any]
    """what was done to the training split (`Dataset.corrupted`); empty for nothing"""
    teacher_data: str | None
    """digest of the training split that the teacher learned from; None if unknown"""

    def told(self, data: str) -> dict[str, Any]:
        """Return the entries of a summary; `data` is the digest of the store's own training split."""
        known = {} if self.teacher_data is None else {"teacher_data": "same" if self.teacher_data == data else "other"}
        return {**self.corruption, **known}


def write_origin(root: Path, found: Origin) -> None:
    """Write a store's origin, or complete one without the teacher's training split."""
    held = read_origin(root)
    if held is None or (held.teacher_data is None and found.teacher_data is not None):
        write_atomic(root / ORIGIN_FILE, sealed_json(found.document()))


def read_origin(root: Path) -> Origin | None:
    """Return the origin of a store, None if an earlier kcdcache made it; raises CorruptionError if it was changed."""
    path = root / ORIGIN_FILE
    return read_sealed(path, Origin) if path.exists() else None


def corruption_of(root: Path) -> Mapping[str, Any]:
    """Return what was done to the training split of a store; empty for nothing, or if unknown."""
    found = read_origin(root)
    return {} if found is None else found.corruption


PARAMETERS = "parameters"
"""name of the record of a teacher's filters in `--fields` and messages: not a field, since it has no rows"""
QUANTILES = 64
"""numbers per stage, whatever its number of filters"""
Profiles = Mapping[str, list[float]]
"""stage -> quantiles of its filters' norms, averaged over its convolutions"""
_REMEDY = "delete it and run `kcdcache precompute --fields parameters` again"
_Norms = Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=QUANTILES, max_length=QUANTILES)]


class ParametersRecord(Sealed):
    """A store's record of its teacher's filters: the digest of its weights, and `Profiles`."""

    weights: str
    quantiles: Literal[64] = 64
    stages: Annotated[dict[str, _Norms], Field(min_length=1)]


def per_sample(names: Collection[str]) -> tuple[str, ...]:
    """Return the names that are fields, with rows per sample."""
    return tuple(name for name in names if name != PARAMETERS)


def write_parameters(root: Path, stages: Profiles, knowledge: Knowledge) -> None:
    """Write or replace the record of a teacher's filters; equal numbers give equal bytes."""
    record = ParametersRecord(weights=knowledge.teacher.weights, stages=dict(stages))
    write_atomic(root / PARAMETERS_FILE, sealed_json(record.document()))


def read_parameters(root: Path, knowledge: Knowledge) -> dict[str, list[float]] | None:
    """Return a store's record of its teacher's filters, or None without one.

    Raises CorruptionError if the record was changed, MismatchError if it is of another teacher.
    """
    path = root / PARAMETERS_FILE
    if not path.exists():
        return None
    found = read_sealed(path, ParametersRecord)
    if found.weights != knowledge.teacher.weights:
        raise MismatchError(
            f"{path} is of weights {found.weights!r:.80}, the store's are {knowledge.teacher.weights}; {_REMEDY} with "
            "the store's own teacher"
        )
    return found.stages


def parameters_problem(root: Path, knowledge: Knowledge, own: Profiles | None = None) -> str | None:
    """Return what is wrong with a store's record of filters, or None; `own` filters are compared with it, if given.

    Another machine may compute other last bits: up to 1e-5 of the largest number is no difference.
    """
    try:
        found = read_parameters(root, knowledge)
    except KcdcacheError as error:
        return str(error)
    if found is None or own is None:
        return None
    if own.keys() == found.keys() and all(np.allclose(own[name], found[name], rtol=1e-5) for name in own):
        return None
    return f"{root / PARAMETERS_FILE} holds other numbers than this teacher's parameters give; {_REMEDY}"
