"""Who made what: digests of teacher, data and views, their comparison, and a store's identity read without zarr."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kcdcache.errors import CorruptionError, MismatchError, NotFoundError
from kcdcache.files import digest_of, read_object

IDENTITY_FILE = Path("_kcd/identity.json")
FORMAT_VERSION = 0


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
class ViewIdentity:
    """What the teacher looked at: the rule that makes view v of sample i."""

    rule: str
    padding: int
    fill: str
    size: tuple[int, int]
    seed: int


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


def first_difference(expected: Any, found: Any, place: str = "") -> tuple[str, Any, Any] | None:
    """Return (path, expected, found) of the first place where two JSON-like values differ, or None if equal.

    >>> first_difference({"views": {"padding": 4}}, {"views": {"padding": 2}})
    ('views.padding', 4, 2)
    """
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for key in sorted({*expected, *found}, key=str):
            inner = f"{place}.{key}" if place else str(key)
            if key not in expected or key not in found:
                return inner, expected.get(key, "absent"), found.get(key, "absent")
            if difference := first_difference(expected[key], found[key], inner):
                return difference
        return None
    if isinstance(expected, list | tuple) and isinstance(found, list | tuple):
        for position, (a, b) in enumerate(zip(expected, found, strict=False)):
            if difference := first_difference(a, b, f"{place}[{position}]"):
                return difference
        if len(expected) != len(found):
            return f"{place} length", len(expected), len(found)
        return None
    return None if expected == found else (place, expected, found)


def require_same(expected: Any, found: Any, names: tuple[str, str], remedy: str) -> None:
    """Do nothing if two identity documents are equal.

    Raises:
        MismatchError: they differ; prints the first difference with both sides, and the remedy.
    """
    if difference := first_difference(expected, found):
        place, left, right = difference
        raise MismatchError(f"{names[0]} and {names[1]} differ in {place}: {left!r} against {right!r}; {remedy}")


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
