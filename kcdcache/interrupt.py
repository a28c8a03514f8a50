"""Stop requests by SIGINT and SIGTERM: the first one stops at the next safe point, the second one ends the process."""

import ctypes
import errno
import itertools
import os
import re
import select
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from kcdcache.errors import InterruptedRunError, SettingsError

_received: list[int] = []
_begun = _watching = False
"""whether work is under way that a stop should finish up to a safe point; whether the watch is"""
GRACE_SECONDS = 2.0
"""for which a stop before any work leaves the main thread to end by itself; in a library's wait it cannot"""
DONE = b"\0"
"""what ends the watch, where a signal is a byte of its number"""


@contextmanager
def listening(numbers: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)) -> Iterator[None]:
    """Context in which signals are stop requests; has no effect outside the main thread.

    Before `begin` the first signal ends the command where it is, later at the next safe point; the second one ends the
    process at once. A thread sees to both where the main thread waits in a library, and Python runs no handler.
    """
    global _begun
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received.clear()
    _begun = False
    before = {number: signal.signal(number, _note) for number in numbers}
    try:
        with _watched(numbers):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def begin() -> None:
    """From here on a stop waits for the next safe point."""
    global _begun
    _begun = True


@contextmanager
def _watched(numbers: Sequence[signal.Signals]) -> Iterator[None]:
    global _watching
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(reader, frozenset(numbers)), daemon=True, name="kcdcache-signals")
    watch.start()
    _watching = True
    try:
        yield
    finally:
        _watching = False
        if signal.set_wakeup_fd(before) == writer:  # not so in a fork, which has no watch
            os.write(writer, DONE)
            watch.join()
        os.close(writer)
        os.close(reader)


def _watch(reader: int, numbers: frozenset[int]) -> None:
    """Read signals as they come, whatever the main thread does: let a second one kill, and end what has not begun."""
    if not (first := _next_signal(reader, numbers)):
        return
    for number in numbers:
        ctypes.CDLL(None).signal(number, None)  # the default, which is death: in Python only the main thread may
    if _begun:  # said here: of two signals at once, the second may kill before the main thread says anything
        _say("stopping at the next safe point; once more aborts")
    if second := _next_signal(reader, numbers, None if _begun else GRACE_SECONDS):
        os.kill(os.getpid(), second)
    elif second is None and not _begun:
        _say(f"error: stopped by {signal.Signals(first).name}: nothing was begun; the same command resumes")
        os._exit(128 + first)


def _next_signal(reader: int, numbers: frozenset[int], seconds: float | None = None) -> int | None:
    """Return the next signal of these, 0 when the watch is over, None after so many seconds without either."""
    while select.select([reader], [], [], seconds)[0]:
        number = os.read(reader, 1)[0]
        if number in numbers or number == DONE[0]:
            return number
    return None


def _leave_to_parent() -> None:
    """In a fork: signals are its own, and none of them is told to the parent's watch."""
    global _begun, _watching
    _begun = True
    if _watching and threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
    _watching = False


os.register_at_fork(after_in_child=_leave_to_parent)


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
    if _received and not _watching:  # the watch, where there is one, says what happens before the second one aborts
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    _received.append(number)
    if not _begun and len(_received) == 1:
        stop("nothing was begun")


def _say(text: str) -> None:
    with suppress(OSError):  # nobody may be reading
        os.write(2, f"{text}\n".encode())  # print is not safe inside a handler


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
