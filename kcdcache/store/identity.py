"""Who made what: digests of teacher, data and views, their comparison, and a store's identity read without zarr."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from kcdcache.data.spec import DataIdentity
from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, NotFoundError
from kcdcache.files.atomic import digest_of, read_object, read_sealed, sealed_json, write_atomic
from kcdcache.views.identity import ViewIdentity

IDENTITY_FILE = Path("_kcd/identity.json")
FORMAT_VERSION = 0


@dataclass(frozen=True, kw_only=True)
class TeacherIdentity:
    """Who taught: one frozen network and what it does to its input."""

    architecture: str
    """model spec"""
    weights: str
    """SHA-256 over names, shapes, types and bytes of all tensors"""
    transform: dict[str, Any]
    """the input transform: size, mean, std"""
    precision: str
    """arithmetic of the forward pass"""


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """The identity of a body of knowledge; values, manifests and runs bind to its `knowledge_id`."""

    teacher: TeacherIdentity
    data: DataIdentity
    views: ViewIdentity
    mixes: dict[str, Any] | None = None
    """for a requery store: the manifest's digest, the mixing rule and the view numbers; None for plain views"""
    subset: dict[str, Any] | None = None
    """for the store inside an exported set: the manifest's digest and the number of rows; None for all samples"""

    @property
    def whole(self) -> bool:
        """Whether there is a row for every sample of the data."""
        return self.mixes is None and self.subset is None

    @property
    def knowledge_id(self) -> str:
        """SHA-256 over everything above, in canonical form."""
        return digest_of(self.document())

    def document(self) -> dict[str, Any]:
        """Return the identity as JSON values."""
        document = asdict(self)
        document["data"]["classes"] = list(self.data.classes)
        document["data"]["image_size"] = list(self.data.image_size) if self.data.image_size else None
        document["views"]["size"] = list(self.views.size)
        if self.subset is None:  # so that every other store keeps the id it had before there were exports
            del document["subset"]
        return document


def knowledge_from(document: Mapping[str, Any]) -> Knowledge:
    """Return the identity that `Knowledge.document` wrote.

    Raises:
        CorruptionError: a key is missing or unknown.
    """
    try:
        data, views = dict(document["data"]), dict(document["views"])
        data["classes"] = tuple(data["classes"])
        data["image_size"] = tuple(data["image_size"]) if data["image_size"] else None
        views["size"] = tuple(views["size"])
        teacher = TeacherIdentity(**document["teacher"])
        return Knowledge(
            teacher=teacher,
            data=DataIdentity(**data),
            views=ViewIdentity(**views),
            mixes=document.get("mixes"),
            subset=document.get("subset"),
        )
    except (KeyError, TypeError) as error:
        raise CorruptionError(f"a knowledge identity lacks or exceeds its keys: {error}") from None


def read_store_identity(store: Path) -> Knowledge:
    """Return the identity of a store without opening its arrays (no zarr, no torch).

    Raises:
        NotFoundError: there is no store at that path.
        MismatchError: the store was written by a newer format.
        CorruptionError: the record does not match its own digest.
    """
    path = store / IDENTITY_FILE
    if not path.exists():
        if any(path.parent.glob("commit.*.json")):
            raise CorruptionError(f"{path} is missing; `kcdcache verify {store} --repair` makes it again")
        raise NotFoundError(f"no knowledge store at {store} (no {IDENTITY_FILE} in it); make one with `precompute`")
    record = read_object(path, "format_version", "knowledge", "knowledge_id")
    if record.get("format_version") != FORMAT_VERSION:
        found = record.get("format_version")
        raise MismatchError(f"{path} has format {found}, this kcdcache reads {FORMAT_VERSION}; upgrade kcdcache")
    try:
        knowledge = knowledge_from(record["knowledge"])
    except CorruptionError as error:
        raise CorruptionError(f"{path} was changed: {error}") from None
    if record.get("knowledge_id") != knowledge.knowledge_id:
        raise CorruptionError(f"{path} was changed: its content does not match its knowledge_id")
    return knowledge


ORIGIN_FILE = Path("_kcd") / "origin.json"


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


def write_origin(root: Path, found: Origin) -> None:
    """Write a store's record, or complete one that does not know yet what the teacher learned from."""
    held = read_origin(root)
    if held is None or (held.teacher_data is None and found.teacher_data is not None):
        write_atomic(
            root / ORIGIN_FILE, sealed_json({"corruption": dict(found.corruption), "teacher_data": found.teacher_data})
        )


def read_origin(root: Path) -> Origin | None:
    """Return where a store came from, None where it does not say: it was made by an earlier kcdcache.

    Raises:
        CorruptionError: the record is not what was written.
        UnsafeError: it is no plain file, or larger than any record of ours.
    """
    path = root / ORIGIN_FILE
    if not path.exists():
        return None
    found = read_sealed(path, "corruption", "teacher_data")
    corruption, taught = found["corruption"], found["teacher_data"]
    if not isinstance(corruption, dict) or not (taught is None or isinstance(taught, str)):
        raise CorruptionError(f"{path} should hold an object and a digest; {ORIGIN_REMEDY}")
    return Origin(corruption, taught)


def corruption_of(root: Path) -> Mapping[str, Any]:
    """Return what was done to the training split of a store, empty for nothing or where it does not say."""
    found = read_origin(root)
    return {} if found is None else found.corruption


def origin_problem(root: Path) -> str | None:
    """Return what is wrong with a store's record, None for none or a sound one."""
    try:
        read_origin(root)
    except KcdcacheError as error:
        return str(error)
    return None


ORIGIN_REMEDY = "delete it and run the store's `kcdcache precompute` again"


PARAMETERS = "parameters"
"""how `--fields` and messages call it: no field, since it has no rows"""
DEFAULT_PROFILES = ("logits",)
"""fields of a store of which nothing else is asked"""
PARAMETERS_FILE = Path("_kcd") / "parameters.json"
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
    return (*store.fields, *((PARAMETERS,) if (store.path / PARAMETERS_FILE).exists() else ()))


def per_sample(names: Collection[str]) -> tuple[str, ...]:
    """Return the names of those that are fields, with rows per sample."""
    return tuple(name for name in names if name != PARAMETERS)


def write_parameters(root: Path, stages: Profiles, knowledge: Knowledge) -> None:
    """Write the record of a store's teacher, replacing one that is there; the same numbers give the same bytes.

    Raises:
        NoSpaceError: the disk is full.
    """
    document = {"weights": knowledge.teacher.weights, "quantiles": QUANTILES, "stages": dict(stages)}
    write_atomic(root / PARAMETERS_FILE, sealed_json(document))


def read_parameters(root: Path, knowledge: Knowledge) -> dict[str, list[float]] | None:
    """Return what a store keeps of its teacher's parameters, None if it has no record.

    Raises:
        CorruptionError: the record is not what was written.
        MismatchError: it is of another teacher.
        UnsafeError: it is no plain file, or larger than any record of ours.
    """
    path = root / PARAMETERS_FILE
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
        raise CorruptionError(f"{path} should hold {QUANTILES} numbers of at least 0 per stage; {PARAMETERS_REMEDY}")
    return stages


def parameters_problem(root: Path, knowledge: Knowledge, own: Profiles | None = None) -> str | None:
    """Return what is wrong with a store's record, None for none or a sound one; compared with its teacher's if given.

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
    return f"{root / PARAMETERS_FILE} holds other numbers than this teacher's parameters give; {PARAMETERS_REMEDY}"


PARAMETERS_REMEDY = "delete it and run `kcdcache precompute --fields parameters` again"


def _sound(numbers: Any) -> bool:
    if not isinstance(numbers, list) or len(numbers) != QUANTILES:
        return False
    return all(type(number) is float and 0 <= number < np.inf for number in numbers)
