"""Leases on an object store: locks between machines, taken over when their holder is not heard of."""

import functools
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from kcdcache.errors import CorruptionError, KcdcacheError, LockedError, RemoteError, SettingsError, UnsafeError
from kcdcache.files import atomic
from kcdcache.files.atomic import process_runs
from kcdcache.files.remote import ChangedError, Remote, Version

logger = logging.getLogger(__name__)

PATIENCE = "KCDCACHE_LEASE_SECONDS"
"""environment variable: how long a holder on another machine may stay silent before its lease is taken over"""
USUAL_SECONDS = 60.0
MOST_BYTES = 10_000
"""of a lease; anything longer is none of ours"""

Found = tuple[dict[str, Any], Version]
"""a lease's document and the version of its object"""


def patience() -> float:
    """Return the seconds after which a silent holder is taken for dead; holders give a sign six times as often.

    Raises:
        SettingsError: the variable is no positive number.
    """
    text = os.environ.get(PATIENCE, "")
    try:
        seconds = float(text) if text else USUAL_SECONDS
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise SettingsError(f"{PATIENCE} should be a positive number of seconds, found {text!r}")
    return seconds


class Lease:
    """One lease: an object that names its holder, replaced with every sign of life.

    Every step is a conditional write, so that of several takers one wins and a holder learns that it lost. No clock of
    one machine is compared with another's: a waiter measures by its own how long the object stays as it is.
    """

    def __init__(self, remote: Remote, key: str, what: str) -> None:
        self._remote, self.key, self._what = remote, key, what
        self._seconds = patience()
        self._me = {"id": uuid.uuid4().hex, **this_process()}
        self._beats = 0
        self._version: Version | None = None
        """of the object while this process holds it"""
        self._renewed = 0.0
        self._lost: str | None = None
        self._turn = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, patient: bool = False) -> None:
        """Hold the lease; with `patient`, wait for as long as others that live hold it.

        Raises:
            LockedError: another process holds it; names that process.
            RemoteError: the store makes objects where there are some already, so that nothing can be held.
        """
        while self._version is None:
            found = self.look()
            try:
                if found is None:
                    self._version = self._remote.create(self.key, self._document())
                elif _over(found[0]) or not self._lives(found):
                    self._version = self._remote.update(self.key, self._document(), found[1])
                elif not patient:
                    raise LockedError(f"{self._what} is being written by {holder(found[0])}; wait for it or stop it")
            except (FileExistsError, ChangedError):
                continue  # somebody was faster: look again
        self._renewed = clock()
        _require_conditions(self._remote, self.key)
        self._thread = threading.Thread(target=self._beat, name="kcdcache-lease", daemon=True)
        self._thread.start()

    def require_gone(self) -> None:
        """Do nothing if nobody holds the lease; one of a silent holder is freed, so that it learns of it.

        Raises:
            LockedError: a process that lives holds it; names that process.
        """
        while (found := self.look()) is not None and not _over(found[0]):
            if self._lives(found):
                raise LockedError(f"{self._what} is being written by {holder(found[0])}; wait for it or stop it")
            try:
                self._remote.update(self.key, _content({**found[0], "free": True}), found[1])
            except ChangedError:
                continue

    def look(self) -> Found | None:
        """Return what is there of the lease; what is no lease counts as one whose holder is not known."""
        try:
            data, version = self._remote.read(self.key, MOST_BYTES)
            document = atomic.parse_json(data, self.key)
        except FileNotFoundError:
            return None
        except (CorruptionError, UnsafeError):
            entry = self._remote.head(self.key)
            return None if entry is None else ({}, Version(entry.tag, None))
        return document if isinstance(document, dict) else {}, version

    def require(self) -> None:
        """Do nothing if this process still holds the lease; after a long silence of its own it asks.

        Raises:
            LockedError: another process has taken it over.
        """
        if self._lost is None and clock() - self._renewed > self._seconds / 2:
            self._renew()
        if self._lost is not None:
            raise LockedError(
                f"{self._what} was taken over by {self._lost}, since this process was not heard of for "
                f"{self._seconds:g} s; it writes no more, what it wrote is kept"
            )

    def give_back(self) -> None:
        """Free the lease; where the store does not answer, it goes to others when they have waited."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        with self._turn:
            if self._version is None or self._lost is not None:
                return
            try:
                self._remote.update(self.key, self._document(free=True), self._version)
            except (KcdcacheError, ChangedError) as error:
                logger.warning("%s could not be freed: %s", self._what, error)
            self._version = None

    def _lives(self, found: Found) -> bool:
        """Return whether a holder lives: known at once on this machine, of others by their signs of life."""
        known = here_and_alive(found[0])
        if known is not None:
            return known
        until = clock() + self._seconds
        while clock() < until:
            time.sleep(min(1.0, self._seconds / 20))
            now = self.look()
            if now is None or now[1] != found[1]:  # a holder's sign of life; or it is another's now: look again
                return now is not None and not _over(now[0]) and now[0].get("id") == found[0].get("id")
        return False

    def _beat(self) -> None:
        while not self._over.wait(self._seconds / 6):
            try:
                self._renew()
            except RemoteError as error:
                logger.warning("%s", error)
            if self._lost is not None:
                return

    def _renew(self) -> None:
        with self._turn:
            if self._version is None or self._lost is not None:
                return
            self._beats += 1
            try:
                self._version = self._remote.update(self.key, self._document(), self._version)
                self._renewed = clock()
            except ChangedError:
                found = self.look()
                self._lost = "another process" if found is None else holder(found[0])

    def _document(self, free: bool = False) -> bytes:
        return _content({**self._me, "beat": self._beats, "free": free})


def clock() -> float:
    """Return seconds that go on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def this_process() -> dict[str, Any]:
    """Return what tells this process from all others."""
    return {"host": socket.gethostname(), "machine": _machine(), "process": os.getpid(), "began": _began(os.getpid())}


def here_and_alive(document: dict[str, Any]) -> bool | None:
    """Return whether a lease's holder, a process of this machine, runs; None if it is one of another machine."""
    process = document.get("process")
    if (document.get("host"), document.get("machine")) != (socket.gethostname(), _machine()) or type(
        process
    ) is not int:
        return None
    if not process_runs(process):
        return False
    return _began(process) == document.get("began")


def holder(document: dict[str, Any]) -> str:
    """Return a lease's holder as messages name it."""
    return f"process {str(document.get('process'))[:20]} on {str(document.get('host'))[:80]}"


def _over(document: dict[str, Any]) -> bool:
    return document.get("free") is True


def _content(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True).encode()


@functools.cache
def _machine() -> str:
    """Return what tells this run of this machine, and this container's process numbers, from others of its name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _began(process: int) -> str:
    """Return when a process began, in ticks of this machine: its number may have been another's before."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]  # one that ended, and whose parent has not asked yet, is dead


_honest: set[str] = set()


def _require_conditions(remote: Remote, key: str) -> None:
    """Refuse a store that ignores conditions: two writers could both believe to be alone."""
    if remote.url in _honest:
        return
    try:
        remote.create(key, b"{}")
    except FileExistsError:
        _honest.add(remote.url)
        return
    raise RemoteError(
        f"{remote.url} replaced an object that was to be made only where none is (it ignores If-None-Match): of two "
        "writers neither would know of the other; use a server that supports conditional writes"
    )
