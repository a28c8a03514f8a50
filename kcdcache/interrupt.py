"""Stop requests: SIGINT and SIGTERM ask for a clean stop at the next safe point; a second one aborts at once.

And whether a process runs at all, and where a test may kill this one.
"""

import errno
import itertools
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from kcdcache.errors import InterruptedRunError, SettingsError

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_received: list[int] = []


@contextmanager
def listening(numbers: tuple[signal.Signals, ...] = SIGNALS) -> Iterator[None]:
    """Turn some signals into stop requests while the context lasts; outside the main thread does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received.clear()
    before = {number: signal.signal(number, _note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def requested() -> bool:
    """Return whether a stop was asked for."""
    return bool(_received)


def stop(done: str) -> None:
    """Stop now, at a safe point; `done` says what is kept.

    Raises:
        InterruptedRunError: always; its exit code is 130 for SIGINT, 143 for SIGTERM.
    """
    number = _received[0] if _received else signal.SIGINT
    name = signal.Signals(number).name
    raise InterruptedRunError(f"stopped by {name}: {done}; the same command resumes", 128 + number)


def process_runs(process: int) -> bool:
    """Return whether this machine has a process of that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it runs, but is another user's
    return True


def _note(number: int, frame: FrameType | None) -> None:
    if _received:
        signal.signal(number, signal.SIG_DFL)  # the second one is not asked to wait
        signal.raise_signal(number)
    _received.append(number)
    os.write(2, b"stopping at the next safe point; once more aborts\n")  # print is not safe inside a handler


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
