"""Records: JSON in one canonical form, read by strict models, sealed by their own digest; logs of clock times."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PlainSerializer, ValidationError
from pydantic_core import from_json

from kcdcache.errors import CorruptionError, MismatchError, UnsafeError
from kcdcache.files.atomic import read_bytes, sha256_bytes
from kcdcache.statistics import spread

MOST_RECORD_BYTES = 64 * 2**20
MOST_JSON_VALUES = 10**6
"""values in one JSON text: in memory each takes up to some 150 bytes, however few it has in the file"""
MOST_LINES = 10**6
"""of a file of clock times"""

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""of anything, or an index"""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""64 hexadecimal digits"""


class Record(BaseModel):
    """What stands in a JSON object of ours: frozen, finite, every key known, no type guessed."""

    # built when first used: a command needs few of these
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    def document(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return self.model_dump(mode="json")


class Sealed(Record):
    """A record in a file of its own, which `sealed_json` writes and `read_sealed` reads."""

    digest: str = Field(default="", exclude=True, repr=False)
    """SHA-256 of all else, in the file alone: empty here"""


class Sparse(Sealed):
    """A record whose unset entries are not written."""

    def document(self) -> dict[str, Any]:
        """Return what is set of it as JSON values."""
        return self.model_dump(mode="json", exclude_unset=True)


R = TypeVar("R", bound=BaseModel)
S = TypeVar("S", bound=Sealed)


def canonical_json(value: Any) -> bytes:
    """Return `value` as JSON bytes that are equal whenever the values are: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: a float is not finite.

    >>> canonical_json({"b": 1, "a": [1.5, None]})
    b'{"a":[1.5,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def readable_json(value: Any) -> bytes:
    """Return `value` as indented JSON bytes for people, with sorted keys and a closing newline."""
    return (json.dumps(value, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form."""
    return sha256_bytes(canonical_json(value))


def sealed_json(document: Mapping[str, Any], form: Callable[[Any], bytes] = canonical_json) -> bytes:
    """Return a document as JSON with its own SHA-256 under `digest`, so that damage shows."""
    return form({**document, "digest": digest_of(document)})


def parse_json(data: bytes, where: Path | str) -> Any:
    """Return the value of a JSON text in UTF-8.

    Raises:
        UnsafeError: it holds more values than any record of ours.
        CorruptionError: it is no such text, or nested too deeply.
    """
    _require_few_values(data, where)
    try:
        found = from_json(data, allow_inf_nan=False)
        json.dumps(found, allow_nan=False)  # numbers beyond floats were read as infinite
        return found
    except ValueError as error:
        raise CorruptionError(f"{where} should hold JSON: {error}") from None


def parse(model: type[R], data: bytes, where: Path | str) -> R:
    """Return a JSON text as its model.

    Raises:
        UnsafeError: it holds more values than any record of ours.
        CorruptionError: it is no such text, or an entry is missing, unknown, or not what it should be; names it.
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
    """Return the JSON value in a file.

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: the file is not JSON.
        UnsafeError: it is no plain file, or larger than any record of ours; it is not read.
    """
    return parse_json(read_bytes(path, MOST_RECORD_BYTES), path)


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """Return the JSON object in a file, which has at least these keys.

    Raises:
        NotFoundError, UnsafeError: as for `read_json`.
        CorruptionError: the file is not JSON, not an object, or lacks a key.
    """
    return _object(read_json(path), path, *keys)


def require_format(document: Mapping[str, Any], known: int, path: Path | str) -> None:
    """Do nothing if a document's `format_version` is the one that is `known` here.

    Raises:
        MismatchError: it is another one, or there is none.
    """
    if (version := document.get("format_version")) != known:
        raise MismatchError(f"{path} has format {version!r:.40}, this kcdcache reads {known}; upgrade kcdcache")


def _object(found: Any, path: Path, *keys: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise CorruptionError(f"{path} should hold a JSON object, found {type(found).__name__}")
    if missing := [key for key in keys if key not in found]:
        raise CorruptionError(f"{path} should have the key '{missing[0]}', found {', '.join(sorted(found)) or 'none'}")
    return found


def read_sealed(path: Path, model: type[S], form: Callable[[Any], bytes] = canonical_json) -> S:
    """Return the record that `sealed_json` wrote in that form, after comparing every byte with it.

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: it is not what was written.
        UnsafeError: it is no plain file, or larger than any record of ours; it is not read.
    """
    data = read_bytes(path, MOST_RECORD_BYTES)
    found = parse(model, data, path)
    if data != sealed_json(found.document(), form):
        raise CorruptionError(f"{path} was changed: its content does not match its digest")
    return found.model_copy(update={"digest": ""})


def read_sealed_object(path: Path, *keys: str, form: Callable[[Any], bytes] = canonical_json) -> dict[str, Any]:
    """Return the document that `sealed_json` wrote in that form, without its digest; it has at least these keys.

    Raises:
        NotFoundError, CorruptionError, UnsafeError: as for `read_sealed`.
    """
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
    """Images per second, over some stretches of work that count alike: epochs, parts or batches."""

    n: int
    """number of stretches"""
    mean: Hundredths
    std: Hundredths | None
    """sample standard deviation; None of a single stretch"""
    warm_up: Hundredths | None = None
    """mean of the stretches that came first, which are left out of all the above; unset if there are none"""

    def __str__(self) -> str:
        """Return mean and spread for people.

        >>> str(Rate(n=3, mean=1234.5, std=67.8)), str(Rate(n=1, mean=0.25, std=None))
        ('1,234 ± 68', '0.25')
        """
        digits = 0 if self.mean >= 10 else 2
        return f"{self.mean:,.{digits}f}" + ("" if self.std is None else f" ± {self.std:,.{digits}f}")


class Timing(BaseModel):
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
    return None if mean is None else Rate(n=n, mean=mean, std=std)


def logged(file: Path) -> Rate | None:
    """Return the rate that a file of clock times tells; None if it tells none.

    A stretch is what a line's `seconds` hold: an epoch with its evaluation and checkpoint, or what went on of one that
    was interrupted, or a part of a store from images to encoded rows. Lines of one epoch are one stretch. Epochs marked
    as `warm_up` are told apart where there are others. A line torn by a power loss counts nothing, and so does one
    without seconds.
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
    """Return the sum of `seconds` over a file of clock times; a line torn by a power loss counts nothing."""
    return sum((line.seconds for line in timings(file)), 0.0)


def timings(file: Path) -> Iterator[Timing]:
    """Yield the lines of a file of clock times; one torn by a power loss, or without seconds, is left out."""
    if not file.exists():
        return
    for text in read_bytes(file, MOST_RECORD_BYTES).split(b"\n", MOST_LINES)[:MOST_LINES]:
        try:
            yield Timing.model_validate_json(text)
        except ValidationError:
            continue


def _rate(lines: list[Timing]) -> float:
    return sum(line.images or 0 for line in lines) / sum(line.seconds for line in lines)
