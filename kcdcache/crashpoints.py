"""The steps of writing, at which a test may ask for this process to be killed or to fail."""

import errno
import itertools
import os
import re
import signal

from kcdcache.errors import SettingsError

CRASH_POINT = "KCDCACHE_CRASHPOINT"
"""environment variable, for tests: `n` kills this process (SIGKILL) at the n-th step of the write protocol, `n:NAME`
fails that step with a system error (ENOSPC, EIO, ...)"""

_steps = itertools.count(1)


def step() -> None:
    """Pass one point of the write protocol; die or fail here if a test asked for it."""
    if CRASH_POINT not in os.environ:
        return
    point, number = _crash_point(os.environ[CRASH_POINT])
    if next(_steps) != point:
        return
    if number is None:
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        raise OSError(number, os.strerror(number))


def _crash_point(text: str) -> tuple[int, int | None]:
    """Return the step of the write protocol to stop at, and the number of the system error to fail with (None: die)."""
    match = re.fullmatch(r"([1-9][0-9]*)(?::(\w+))?", text)
    number = getattr(errno, match[2], None) if match and match[2] else None
    if match is None or (match[2] and not isinstance(number, int)):
        raise SettingsError(
            f"{CRASH_POINT} should be n or n:NAME (be killed at the n-th step of writing, or fail there with a system "
            f"error such as ENOSPC or EIO), found {text!r}; it is for tests, unset it"
        )
    return int(match[1]), number
