"""Stop requests: SIGINT and SIGTERM ask for a clean stop at the next safe point; a second one aborts at once.

And whether a process runs at all.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from kcdcache.errors import InterruptedRunError

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
