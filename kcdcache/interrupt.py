"""Stop requests by SIGINT and SIGTERM: the first one stops at the next safe point, the second one aborts at once."""

import errno
import itertools
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from kcdcache.errors import InterruptedRunError, SettingsError

_received: list[int] = []


@contextmanager
def listening(numbers: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)) -> Iterator[None]:
    """Context in which signals are stop requests; has no effect outside the main thread."""
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
    """Return whether a stop was requested."""
    return bool(_received)


def stop(done: str) -> None:
    """Raise InterruptedRunError with exit code 130 for SIGINT or 143 for SIGTERM; `done` says what is kept."""
    number = _received[0] if _received else signal.SIGINT
    name = signal.Signals(number).name
    raise InterruptedRunError(f"stopped by {name}: {done}; the same command resumes", 128 + number)


def process_runs(process: int) -> bool:
    """Return whether a process with this id runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it belongs to another user
    return True


def _note(number: int, frame: FrameType | None) -> None:
    if _received:
        signal.signal(number, signal.SIG_DFL)  # the second one aborts
        signal.raise_signal(number)
    _received.append(number)
    os.write(2, b"stopping at the next safe point; once more aborts\n")  # print is not safe inside a handler


CRASH_POINT = "KCDCACHE_CRASHPOINT"
"""environment variable for tests: kill this process (`n`) or raise an OSError (`n:ENOSPC`) at the n-th write step"""

_steps = itertools.count(1)


def step() -> None:
    """Count a step of the write protocol; die or fail here if CRASH_POINT says so."""
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
    """Return the number of the step and the errno to fail with, or None to kill the process."""
    match = re.fullmatch(r"([1-9][0-9]*)(?::(\w+))?", text)
    number = getattr(errno, match[2], None) if match and match[2] else None
    if match is None or (match[2] and not isinstance(number, int)):
        raise SettingsError(
            f"{CRASH_POINT} should be n or n:NAME (be killed at the n-th step of writing, or fail there with a system "
            f"error such as ENOSPC or EIO), found {text!r}; it is for tests, unset it"
        )
    return int(match[1]), number
