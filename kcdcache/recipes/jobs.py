"""Jobs with dependencies, run in turn or in parallel processes; if one fails, those that need it are skipped."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from kcdcache import interrupt
from kcdcache.errors import InterruptedRunError, KcdcacheError, reason

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outcome of a job."""

    result: dict[str, Any] | None = None
    """None if the job failed or was not started"""
    error: str = ""
    exit_code: int = 0

    @classmethod
    def of(cls, error: KcdcacheError) -> "Outcome":
        """Return the outcome of a job that raised `error`."""
        return cls(error=str(error), exit_code=error.exit_code)


Work = Callable[[Any], dict[str, Any]]
"""input of a job -> result; importable by name, because other processes call it"""


def execute(
    needs: Mapping[str, Collection[str]],
    prepare: Callable[[str], Any],
    work: Work,
    *,
    jobs: int,
    logs: Path,
    preload: Sequence[str],
) -> dict[str, Outcome]:
    """Run all jobs, each as soon as the jobs it needs are done; return name -> outcome.

    `needs` maps each name, in order of priority, to the jobs it needs; `prepare` returns the input of a job. With
    `jobs` above 1, that many run at once, each in a process that has imported `preload` and logs to logs/NAME.log.
    Raises InterruptedRunError if the user asked to stop, after running jobs have stopped at a safe point.
    """
    processes = None
    if jobs > 1:
        interrupt.begin()  # a stop is passed on to them
        processes = _Processes(work, jobs, logs, preload)
    order, found, ready = list(needs), dict[str, Outcome](), list[str]()
    sorter = TopologicalSorter(needs)
    sorter.prepare()

    def settle(name: str, outcome: Outcome) -> None:
        found[name] = outcome
        sorter.done(name)
        if outcome.result is None:
            logger.error("%s failed: %s", name, outcome.error)
        else:
            logger.info("%s finished, %d of %d", name, len(found), len(order))

    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=order.index)
        for name in ready.copy():
            failed = [need for need in needs[name] if found[need].result is None]
            if not failed and processes is not None and not processes.free():
                break
            ready.remove(name)
            if failed:
                settle(name, Outcome(error=f"skipped: step '{failed[0]}' failed", exit_code=9))
            elif processes is None:
                settle(name, _attempted(lambda one: work(prepare(one)), name))
                break  # jobs that need it may come before the others
            else:
                try:
                    processes.begin(name, prepare(name))
                except KcdcacheError as error:
                    settle(name, Outcome.of(error))
        for name, outcome in processes.ended() if processes is not None else ():
            settle(name, outcome)
        if processes is not None and processes.stopped():
            interrupt.stop(f"{len(found)} of {len(order)} finished; the others stopped at a safe point")
    return {name: found[name] for name in order}


def _attempted(do: Work, given: Any) -> Outcome:
    """Return the outcome of some work; only InterruptedRunError passes through."""
    try:
        return Outcome(result=do(given))
    except InterruptedRunError:
        raise
    except KcdcacheError as error:
        return Outcome.of(error)
    except OSError as error:
        return Outcome(error=reason(error), exit_code=1)
    except Exception as error:
        logger.debug("", exc_info=True)
        return Outcome(error=f"{type(error).__name__}: {error}", exit_code=1)


class _Processes:
    def __init__(self, work: Work, jobs: int, logs: Path, preload: Sequence[str]) -> None:
        self._work, self._jobs, self._logs = work, jobs, logs
        self._running: dict[str, tuple[ForkServerProcess, Connection]] = {}
        self._stopping = False
        logs.mkdir(parents=True, exist_ok=True)
        # children are forked from a server that has imported everything and started no thread
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([work.__module__, *preload])

    def free(self) -> bool:
        return len(self._running) < self._jobs and not self._stopping

    def begin(self, name: str, given: Any) -> None:
        here, there = self._context.Pipe()
        process = self._context.Process(target=_child, args=(there, self._work, given, self._logs / f"{name}.log"))
        process.start()
        there.close()
        self._running[name] = process, here
        logger.info("%s started as process %d", name, process.pid)

    def ended(self) -> Iterator[tuple[str, Outcome]]:
        """Wait a moment, forward a request to stop once, and yield the jobs that have ended."""
        wait([pipe for _, pipe in self._running.values()], LOOK_SECONDS)
        if interrupt.requested() and not self._stopping:
            self._stopping = True
            for process, _ in self._running.values():
                process.terminate()
        for name, (process, pipe) in list(self._running.items()):
            if pipe.poll() or not process.is_alive():
                del self._running[name]
                outcome = self._outcome(name, process, pipe)
                if not (self._stopping and outcome.exit_code in (130, 143)):
                    yield name, outcome

    def stopped(self) -> bool:
        return self._stopping and not self._running

    def _outcome(self, name: str, process: ForkServerProcess, pipe: Connection) -> Outcome:
        try:
            outcome: Outcome | None = pipe.recv() if pipe.poll() else None
        except EOFError:
            outcome = None
        process.join()
        if outcome is not None:
            return outcome
        code = process.exitcode or 0
        how = f"by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"with exit code {code}"
        error = f"its process ended {how}; see {self._logs / f'{name}.log'}"
        return Outcome(error=error, exit_code=code if code in (130, 143) else 1)


def _child(pipe: Connection, work: Work, given: Any, log: Path) -> None:
    # the terminal sends Ctrl-C to all processes; the parent forwards it once
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 2)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", force=True)
    with interrupt.listening((signal.SIGTERM,)):
        try:
            outcome = _attempted(work, given)
        except InterruptedRunError as error:
            outcome = Outcome.of(error)
    if outcome.error:
        logger.error("%s", outcome.error)
    pipe.send(outcome)
    pipe.close()


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)  # enough to finish a part of a store, the longest step to a safe point
    os.kill(os.getpid(), signal.SIGKILL)
