"""Records: canonical JSON, read by strict models and sealed by its own digest; logs of clock times."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PlainSerializer, ValidationError
from pydantic_core import from_json

from kcdcache.errors import CorruptionError, MismatchError, SettingsError, UnsafeError
from kcdcache.files.atomic import read_bytes, sha256_bytes
from kcdcache.statistics import spread

MOST_RECORD_BYTES = 64 * 2**20
MOST_JSON_VALUES = 10**6
"""values in one JSON text: each takes up to 150 bytes of memory, however few in the file"""
MOST_LINES = 10**6
"""lines in a log of clock times"""

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""also an index"""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""64 hexadecimal digits"""


class Record(BaseModel):
    """A JSON object of ours: frozen, finite, no unknown keys, no type conversions."""

    # built when first used: a command needs few of these
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    def document(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return self.model_dump(mode="json")


class Sealed(Record):
    """A record in a file of its own, written by `sealed_json` and read by `read_sealed`."""

    digest: str = Field(default="", exclude=True, repr=False)
    """SHA-256 of the rest, in the file alone: empty here"""


class Sparse(Sealed):
    """A sealed record whose unset entries are not written."""

    def document(self) -> dict[str, Any]:
        """Return the set entries as JSON values."""
        return self.model_dump(mode="json", exclude_unset=True)


R = TypeVar("R", bound=BaseModel)
S = TypeVar("S", bound=Sealed)


def canonical_json(value: Any) -> bytes:
    """Return JSON bytes, equal if the values are: sorted keys, no spaces; raises ValueError for NaN or infinity.

    >>> canonical_json({"b": 1, "a": [1.5, None]})
    b'{"a":[1.5,null],"b":1}'
    """
    return _encoded(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False))


def readable_json(value: Any) -> bytes:
    """Return indented JSON bytes for people, with sorted keys and a final newline."""
    return _encoded(json.dumps(value, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def _encoded(text: str) -> bytes:
    """Return a text as UTF-8; raises SettingsError for a name that was not text in this process's locale."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        first, last = text.rfind('"', 0, error.start) + 1, text.find('"', error.end)
        raise SettingsError(
            f"the name {text[first:last]!a} cannot be recorded, as it or this locale is not UTF-8; rename it, or "
            "set LC_ALL=C.UTF-8"
        ) from None


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value's canonical form."""
    return sha256_bytes(canonical_json(value))


def sealed_json(document: Mapping[str, Any], form: Callable[[Any], bytes] = canonical_json) -> bytes:
    """Return a document as JSON with its own SHA-256 under `digest`, which reveals damage."""
    return form({**document, "digest": digest_of(document)})


def parse_json(data: bytes, where: Path | str) -> Any:
    """Return the value of a UTF-8 JSON text.

    Raises:
        UnsafeError: it has more values than any record of ours.
        CorruptionError: it is not JSON, or nested too deeply.
    """
    _require_few_values(data, where)
    try:
        found = from_json(data, allow_inf_nan=False)
        json.dumps(found, allow_nan=False)  # numbers beyond floats were read as infinite
        return found
    except ValueError as error:
        raise CorruptionError(f"{where} should hold JSON: {error}") from None


def parse(model: type[R], data: bytes, where: Path | str) -> R:
    """Return a JSON text as a model.

    Raises:
        UnsafeError: it has more values than any record of ours.
        CorruptionError: it is not JSON, or an entry (named) is missing, unknown or invalid.
    """
    _require_few_values(data, where)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise CorruptionError(f"{where} is damaged or was changed: {told(error)}") from None


def told(error: ValidationError) -> str:
    """Return what is wrong with the first entry that does not fit a model."""
    item = error.errors(include_url=False)[0]
    place = ".".join(map(str, item["loc"]))
    return f"{place:.200}: {item['msg']}, found {item['input']!r:.80}" if place else f"{item['msg']:.200}"


def read_json(path: Path) -> Any:
    """Return the JSON value in a file; see `parse_json`."""
    return parse_json(read_bytes(path, MOST_RECORD_BYTES), path)


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """Return the JSON object in a file; raises CorruptionError if it lacks one of the keys."""
    return _object(read_json(path), path, *keys)


def require_format(document: Mapping[str, Any], known: int, path: Path | str) -> None:
    """Raise MismatchError unless a document's `format_version` is `known`."""
    if (version := document.get("format_version")) != known:
        raise MismatchError(f"{path} has format {version!r:.40}, this kcdcache reads {known}; upgrade kcdcache")


def _object(found: Any, path: Path, *keys: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise CorruptionError(f"{path} should hold a JSON object, found {type(found).__name__}")
    if missing := [key for key in keys if key not in found]:
        raise CorruptionError(f"{path} should have the key '{missing[0]}', found {', '.join(sorted(found)) or 'none'}")
    return found


def read_sealed(path: Path, model: type[S], form: Callable[[Any], bytes] = canonical_json) -> S:
    """Return a record written by `sealed_json` in that form; raises CorruptionError unless every byte is as written."""
    data = read_bytes(path, MOST_RECORD_BYTES)
    found = parse(model, data, path)
    if data != sealed_json(found.document(), form):
        raise CorruptionError(f"{path} was changed: its content does not match its digest")
    return found.model_copy(update={"digest": ""})


def read_sealed_object(path: Path, *keys: str, form: Callable[[Any], bytes] = canonical_json) -> dict[str, Any]:
    """Return a document written by `sealed_json`, without its digest; raises CorruptionError like `read_sealed`."""
    data = read_bytes(path, MOST_RECORD_BYTES)  # once: the file may change meanwhile
    found = _object(parse_json(data, path), path, *keys)
    found.pop("digest", None)
    if data != sealed_json(found, form):
        raise CorruptionError(f"{path} was changed: its content does not match its digest")
    return found


def _require_few_values(data: bytes, where: Path | str) -> None:
    values = sum(map(data.count, (b",", b"[", b"{")))  # too many only where texts hold such marks
    if values > MOST_JSON_VALUES:
        raise UnsafeError(f"{where} holds {values} JSON values, expected at most {MOST_JSON_VALUES}; it is not read")


# ---- clock times: a line of JSON per stretch of work


Hundredths = Annotated[float, PlainSerializer(lambda number: round(number, 2))]
"""written to a hundredth"""


class Rate(Sparse):
    """Images per second, over stretches of work of one kind: epochs, parts or batches."""

    n: int
    """number of stretches"""
    mean: Hundredths
    std: Hundredths | None
    """sample standard deviation; None for a single stretch"""
    warm_up: Hundredths | None = None
    """mean of the first stretches, which are left out above; unset if there are none"""

    def __str__(self) -> str:
        """Return mean and spread for people.

        >>> str(Rate(n=3, mean=1234.5, std=67.8)), str(Rate(n=1, mean=0.25, std=None))
        ('1,234 ± 68', '0.25')
        """
        digits = 0 if self.mean >= 10 else 2
        return f"{self.mean:,.{digits}f}" + ("" if self.std is None else f" ± {self.std:,.{digits}f}")


class Timing(BaseModel):
    """The used entries of a line of clock times."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    seconds: float = Field(gt=0)
    images: float | None = Field(default=None, validation_alias=AliasChoices("samples", "points"))
    epoch: int | None = None
    warm_up: bool = False


def rate_of(rates: Iterable[float]) -> Rate | None:
    """Return mean and spread of images per second; None for no rates.

    >>> rate_of([1.0, 3.0])
    Rate(n=2, mean=2.0, std=1.4142135623730951, warm_up=None)
    """
    n, mean, std = spread(list(rates))
    return None if mean is None else Rate(n=n, mean=mean, std=std)


def logged(file: Path) -> Rate | None:
    """Return the rate recorded in a file of clock times, or None.

    A stretch is the time in a line's `seconds`: an epoch with evaluation and checkpoint, the part of an interrupted
    epoch, or a part of a store from images to encoded rows. Lines of one epoch are one stretch. Epochs marked `warm_up`
    are kept apart if there are others.
    """
    stretches: dict[tuple[str, int], list[Timing]] = {}
    for number, line in enumerate(timings(file)):
        if line.images is not None:
            key = ("line", number) if line.epoch is None else ("epoch", line.epoch)
            stretches.setdefault(key, []).append(line)
    steady, first = (
        [_rate(lines) for lines in stretches.values() if any(line.warm_up for line in lines) == early]
        for early in (False, True)
    )
    rate = rate_of(steady or first)
    return rate.model_copy(update={"warm_up": spread(first).mean}) if rate and steady and first else rate


def logged_seconds(file: Path) -> float:
    """Return the sum of `seconds` in a file of clock times."""
    return sum((line.seconds for line in timings(file)), 0.0)


def timings(file: Path) -> Iterator[Timing]:
    """Yield the lines of a file of clock times, but not those without seconds or torn by a power loss."""
    if not file.exists():
        return
    for text in read_bytes(file, MOST_RECORD_BYTES).split(b"\n", MOST_LINES)[:MOST_LINES]:
        try:
            yield Timing.model_validate_json(text)
        except ValidationError:
            continue


def _rate(lines: list[Timing]) -> float:
    return sum(line.images or 0 for line in lines) / sum(line.seconds for line in lines)
