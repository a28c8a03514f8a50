"""The exceptions kcdcache raises on purpose, one per exit code."""

import difflib
import re
import unicodedata
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
_ADDRESS = re.compile(r"(<[^<>]*?) at 0x[0-9a-fA-F]+>")
"""an object as Python shows it, with its place in memory, which messages leave out"""


class KcdcacheError(Exception):
    """Base class, also of input/output errors; `exit_code` is the exit code of the command line.

    >>> str(KcdcacheError("found <object object at 0x7f00>"))
    'found <object object>'
    """

    exit_code = 1

    def __str__(self) -> str:
        return _ADDRESS.sub(r"\1>", super().__str__())


class SettingsError(KcdcacheError, ValueError):
    """A setting is unknown, of the wrong type, or out of range."""

    exit_code = 2


class CorruptionError(KcdcacheError, ValueError):
    """A file is damaged, missing, swapped or edited."""

    exit_code = 3


class MismatchError(KcdcacheError, ValueError):
    """Two inputs do not belong together; the message gives both sides and the first difference."""

    exit_code = 4


class NonFiniteError(KcdcacheError, ArithmeticError):
    """NaN or infinity where a finite number is required."""

    exit_code = 5


class LockedError(KcdcacheError, BlockingIOError):
    """Another process is writing here, or has already written it."""

    exit_code = 6


class NoSpaceError(KcdcacheError, OSError):
    """The disk or quota is full; finished work is kept."""

    exit_code = 7


class UnsafeError(KcdcacheError, ValueError):
    """Refused input that could run code, escape its folder or exhaust the machine."""

    exit_code = 8


class UnfinishedError(KcdcacheError, RuntimeError):
    """Written only in part, not usable yet."""

    exit_code = 9


class NotFoundError(KcdcacheError, FileNotFoundError):
    """A path, name or record does not exist."""

    exit_code = 10


class RemoteError(KcdcacheError, ConnectionError):
    """An object store refused, or did not answer after retries."""

    exit_code = 11


class InterruptedRunError(KcdcacheError, RuntimeError):
    """A signal (SIGINT: 130, SIGTERM: 143) stopped the work at a safe point; the same command resumes it."""

    exit_code = 130

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def printable(text: str) -> str:
    """Return text with control, line break and bidirectional characters escaped.

    >>> printable("a\\x1b[31m")
    'a\\\\x1b[31m'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def reason(error: OSError) -> str:
    """Return what the system says of an error, and the paths it is about, without its number.

    >>> reason(PermissionError(13, "Permission denied", "/runs"))
    "Permission denied: '/runs'"
    """
    places = " and ".join(f"'{place}'" for place in (error.filename, error.filename2) if place is not None)
    return ": ".join(filter(None, (error.strerror or str(error), places)))


def spelled(name: str) -> str:
    """Return a name in quotes, with its spelling in ASCII if it could be taken for another.

    >>> spelled("cow"), spelled("caf\u00e9")
    ("'cow'", "'caf\u00e9' (spelled 'caf\\\\xe9')")
    """
    return f"'{name}'" if name.isascii() else f"'{name}' (spelled {name!a})"


def against(left: Any, right: Any) -> str:
    """Return two differing values for a message, spelled in ASCII if they look alike.

    >>> against(4, 2), against("caf\u00e9", "cafe\u0301")
    ('4 against 2', "'caf\\\\xe9' against 'cafe\\\\u0301'")
    """
    alike = unicodedata.normalize("NFKC", repr(left)) == unicodedata.normalize("NFKC", repr(right))
    return f"{left!a} against {right!a}" if alike else f"{left!r} against {right!r}"


def attempt(report: Callable[[str], object], read: Callable[..., T], *arguments: Any) -> T | None:
    """Return the result of `read`, or None if it raises a KcdcacheError, whose message is passed to `report`."""
    try:
        return read(*arguments)
    except KcdcacheError as error:
        report(str(error))
        return None


def first_difference(expected: Any, found: Any, place: str = "") -> tuple[str, Any, Any] | None:
    """Return (path, expected, found) of the first difference between two JSON-like values, or None if equal.

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
    """Raise MismatchError unless two JSON-like values are equal; `names` are the two sides in the message."""
    if difference := first_difference(expected, found):
        place, left, right = difference
        raise MismatchError(f"{names[0]} and {names[1]} differ in {place}: {against(left, right)}; {remedy}")


def require_known(what: str, word: object, known: Collection[str]) -> None:
    """Raise SettingsError if a word is not one of those known.

    >>> require_known("mix", "convx", ("convex", "additive_clip"))
    Traceback (most recent call last):
    kcdcache.errors.SettingsError: unknown mix 'convx'; known: convex, additive_clip
    """
    if word not in tuple(known):
        raise SettingsError(f"unknown {what} {word!r}; known: {', '.join(known)}")


def nearest(name: str, known: Collection[str]) -> str:
    """Return a hint with the known name closest to a wrong one, ignoring case, or with all known names.

    >>> nearest("tempreture", ["temperature", "keep"])
    "did you mean 'temperature'?"
    >>> nearest("SHUFFLEV2", ["ShuffleV1", "ShuffleV2"])
    "did you mean 'ShuffleV2'?"
    """
    lowered = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f"did you mean '{lowered[close[0]]}'?" if close else f"known: {', '.join(sorted(known))}"
