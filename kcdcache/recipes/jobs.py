"""Units of work that need each other, done in turn or several at once in processes of their own; one failing stops none
but those that need it."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from kcdcache import interrupt
from kcdcache.errors import InterruptedRunError, KcdcacheError

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
"""between looks whether the user asked to stop"""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work."""

    name: str
    needs: tuple[str, ...] = ()
    """units that must have succeeded before"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a unit."""

    result: dict[str, Any] | None = None
    """what it returned; None if it failed or was not begun"""
    error: str = ""
    exit_code: int = 0
    """that of its error: see `errors`"""


Prepare = Callable[[str], Any]
"""name of a unit -> what it is given, asked for when all that it needs is there"""
Work = Callable[[Any], dict[str, Any]]
"""what a unit is given -> its result; importable by name, since other processes call it"""


def execute(
    units: Sequence[Unit], prepare: Prepare, work: Work, *, jobs: int = 1, logs: Path | None = None
) -> dict[str, Outcome]:
    """Do all units, each as soon as what it needs is done; return what became of each.

    With `jobs` above 1, so many at once, each in a process of its own, whose log goes to logs/NAME.log.

    Raises:
        InterruptedRunError: the user asked to stop; what was running has stopped at a safe point.
    """
    if jobs == 1:
        return _in_turn(units, prepare, work)
    assert logs is not None, "processes need a place for their logs"
    return _Crew(units, prepare, work, jobs, logs).execute()


def _in_turn(units: Sequence[Unit], prepare: Prepare, work: Work) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    for unit in units:
        if (missing := _missing(unit, found)) is not None:
            found[unit.name] = missing
            continue
        found[unit.name] = _attempted(lambda unit=unit: work(prepare(unit.name)))  # type: ignore[misc]
        _tell(unit.name, found[unit.name], len(found), len(units))
    return found


def _attempted(do: Callable[[], dict[str, Any]]) -> Outcome:
    """Return the outcome of some work; only a wish to stop goes further."""
    try:
        return Outcome(result=do())
    except InterruptedRunError:
        raise
    except KcdcacheError as error:
        return Outcome(error=str(error), exit_code=error.exit_code)
    except Exception as error:
        logger.debug("", exc_info=True)
        return Outcome(error=f"{type(error).__name__}: {error}", exit_code=1)


def _missing(unit: Unit, found: Mapping[str, Outcome]) -> Outcome | None:
    """Return the outcome of a unit that cannot be begun, None if it can."""
    failed = [need for need in unit.needs if found[need].result is None]
    return Outcome(error=f"not begun: it needs '{failed[0]}', which failed", exit_code=9) if failed else None


def _tell(name: str, outcome: Outcome, done: int, total: int) -> None:
    if outcome.result is None:
        logger.error("%s failed: %s", name, outcome.error)
    else:
        logger.info("%s is done, %d of %d", name, done, total)


@dataclass(kw_only=True)
class _Running:
    process: ForkServerProcess
    pipe: Connection


@dataclass
class _Crew:
    """Several processes at work."""

    units: Sequence[Unit]
    prepare: Prepare
    work: Work
    jobs: int
    logs: Path
    found: dict[str, Outcome] = field(default_factory=dict)
    running: dict[str, _Running] = field(default_factory=dict)
    stopping: bool = False

    def execute(self) -> dict[str, Outcome]:
        """Do all units."""
        self.logs.mkdir(parents=True, exist_ok=True)
        # children fork from a server that has imported everything and started no thread
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([self.work.__module__])
        while self._begin(context) or self.running:
            self._look()
            for name in [name for name, one in self.running.items() if _ended(one)]:
                self._end(name)
        if self.stopping:
            interrupt.stop(f"{len(self.found)} of {len(self.units)} finished; the others stand at a safe point")
        return self.found

    def _begin(self, context: Any) -> bool:
        """Start what can be started; return whether anything was."""
        begun = False
        for unit in self.units:
            if unit.name in self.found or unit.name in self.running or not all(n in self.found for n in unit.needs):
                continue
            if (missing := _missing(unit, self.found)) is not None:
                self._note(unit.name, missing)
                begun = True
            elif len(self.running) < self.jobs and not self.stopping:
                self._start(unit.name, context)
                begun = True
        return begun

    def _start(self, name: str, context: Any) -> None:
        try:
            given = self.prepare(name)
        except KcdcacheError as error:
            self._note(name, Outcome(error=str(error), exit_code=error.exit_code))
            return
        here, there = context.Pipe()
        process = context.Process(target=_child, args=(there, self.work, given, self.logs / f"{name}.log"))
        process.start()
        there.close()
        self.running[name] = _Running(process=process, pipe=here)
        logger.info("%s begun, process %d", name, process.pid)

    def _look(self) -> None:
        """Wait a little; pass a wish to stop on, once."""
        wait([one.pipe for one in self.running.values()], LOOK_SECONDS)
        if interrupt.requested() and not self.stopping:
            self.stopping = True
            for one in self.running.values():
                one.process.terminate()

    def _end(self, name: str) -> None:
        one = self.running.pop(name)
        try:
            outcome = one.pipe.recv() if one.pipe.poll() else None
        except EOFError:
            outcome = None
        one.process.join()
        if outcome is None:
            code = one.process.exitcode or 0
            how = f"by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"with exit code {code}"
            outcome = Outcome(error=f"its process ended {how}; see {self.logs / f'{name}.log'}", exit_code=1)
        if not (self.stopping and outcome.exit_code in (130, 143)):
            self._note(name, outcome)

    def _note(self, name: str, outcome: Outcome) -> None:
        self.found[name] = outcome
        _tell(name, outcome, len(self.found), len(self.units))


def _ended(one: _Running) -> bool:
    return one.pipe.poll() or not one.process.is_alive()


def _child(pipe: Connection, work: Work, given: Any, log: Path) -> None:
    """Do one unit in a process of its own."""
    # the terminal sends Ctrl-C to all processes; the parent passes the wish on, once
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 2)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s", force=True)
    with interrupt.listening((signal.SIGTERM,)):
        try:
            outcome = _attempted(lambda: work(given))
        except InterruptedRunError as error:
            outcome = Outcome(error=str(error), exit_code=error.exit_code)
    if outcome.error:
        logger.error("%s", outcome.error)
    pipe.send(outcome)
    pipe.close()


def _stop_with_parent() -> None:
    """Ask this process to stop when its parent is gone: nobody would take its result."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)  # a teacher's part, the longest that is finished first, is over by then
    os.kill(os.getpid(), signal.SIGKILL)
