"""The exceptions kcdcache raises on purpose, one leaf per exit code.

KcdcacheError                    1   input/output error or a fault of ours
├── SettingsError                2   a setting or option is unknown or out of range
├── CorruptionError              3   bytes on disk are not what was written
├── MismatchError                4   inputs that were not made for each other
├── NonFiniteError               5   NaN or infinity where a number was needed
├── LockedError                  6   another process holds or has taken it
├── NoSpaceError                 7   the disk or quota is full
├── UnsafeError                  8   input that could harm this machine
├── UnfinishedError              9   written only in part so far; not usable yet
├── NotFoundError               10   a path or name that is not there
├── RemoteError                 11   an object store does not answer, or refuses
└── InterruptedRunError    130/143   stopped by a signal; run it again to resume
"""

import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class KcdcacheError(Exception):
    """The root of every error kcdcache raises on purpose; `exit_code` is what the command line ends with."""

    exit_code = 1


class SettingsError(KcdcacheError, ValueError):
    """A setting is unknown, of the wrong type, or out of range."""

    exit_code = 2


class CorruptionError(KcdcacheError, ValueError):
    """What lies on disk is not what was written: damaged, missing, swapped or edited."""

    exit_code = 3


class MismatchError(KcdcacheError, ValueError):
    """Two inputs were not made for each other; the message prints both sides and the first difference."""

    exit_code = 4


class NonFiniteError(KcdcacheError, ArithmeticError):
    """A NaN or an infinity turned up where a finite number is required."""

    exit_code = 5


class LockedError(KcdcacheError, BlockingIOError):
    """Another process writes here, or won the race to write it first."""

    exit_code = 6


class NoSpaceError(KcdcacheError, OSError):
    """The disk or the quota is full; what was finished is kept."""

    exit_code = 7


class UnsafeError(KcdcacheError, ValueError):
    """Input that could run code, escape its folder or exhaust the machine; refused."""

    exit_code = 8


class UnfinishedError(KcdcacheError, RuntimeError):
    """Something was written only in part and is not usable yet."""

    exit_code = 9


class NotFoundError(KcdcacheError, FileNotFoundError):
    """A path, name or record that does not exist."""

    exit_code = 10


class RemoteError(KcdcacheError, ConnectionError):
    """An object store did not answer in spite of retries, or refused; what it holds stays as it is."""

    exit_code = 11


class InterruptedRunError(KcdcacheError, RuntimeError):
    """A signal stopped the work at a clean point; the same command resumes it."""

    exit_code = 130

    def __init__(self, message: str, exit_code: int = 130) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def printable(text: str) -> str:
    """Return text in one line and without control or bidirectional characters: names from files may hold any.

    >>> printable("a\\x1b[31m")
    'a\\\\x1b[31m'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def attempt(report: Callable[[str], object], read: Callable[..., T], *arguments: Any) -> T | None:
    """Return what `read` finds, or None where it raises an error of ours, whose message goes to `report`."""
    try:
        return read(*arguments)
    except KcdcacheError as error:
        report(str(error))
        return None


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


def nearest(name: str, known: Collection[str]) -> str:
    """Return a hint naming the known name closest to a wrong one, whatever the case, or all of them if none is close.

    >>> nearest("tempreture", ["temperature", "keep"])
    "did you mean 'temperature'?"
    >>> nearest("SHUFFLEV2", ["ShuffleV1", "ShuffleV2"])
    "did you mean 'ShuffleV2'?"
    """
    lowered = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f"did you mean '{lowered[close[0]]}'?" if close else f"known: {', '.join(sorted(known))}"
