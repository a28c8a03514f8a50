"""A bucket's mirror: what is written below a folder of the cache reaches the object store first."""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from kcdcache.errors import KcdcacheError, LockedError, UnsafeError
from kcdcache.files.atomic import TEMPORARY_MARK, naming, step
from kcdcache.files.cachefiles import SMALL_BYTES, CacheFiles
from kcdcache.files.leases import Lease, here_and_alive, holder
from kcdcache.files.remote import MOST_APPENDED, MOST_CREATED, Entry, Remote, plain

logger = logging.getLogger(__name__)

AT_ONCE = 16
"""requests under way together"""
MOST_OBJECTS = 10**6
"""below what a command is given"""
LEASES = ".leases"
"""folder beside what is locked, with an object per lease"""
CHUNK = re.compile(r"c(\.\d+)+")
"""name of a chunk file: fetched when it is read, and not kept here when it is written"""
LOG = ".log"
"""ending of what processes of this machine tell, which stays here"""
STORE_RECORDS, SCRATCH = "_kcd", "repair"
MOST_NAME = 240
"""bytes of a file's name, with room for our endings"""
APPENDED = "timing.jsonl"
"""clock times, which grow in place here and are uploaded now and then"""
FLUSH_SECONDS = 10.0
COMPANIONS = {".json": (".safetensors",), ".safetensors": (".json",), ".parquet": ()}
"""endings of files that are given by themselves, and what lies beside them under the same name"""
OF_RUN = ("run.json", "files.json")
"""what a run's files are compared with"""


def mirror(scheme: str, bucket: str) -> "BucketMirror":
    """Return the mirror of a bucket; access comes from the environment's standard variables."""
    return BucketMirror(Remote(scheme, bucket))


class BucketMirror:
    """See `places.Mirror`."""

    def __init__(self, remote: Remote) -> None:
        scheme, _, bucket = remote.url.partition("://")
        where = f"-{sha256(remote.place.encode()).hexdigest()[:8]}" if remote.place else ""
        self._remote = remote
        self._files = CacheFiles(f"{scheme}{where}/{bucket}")
        self.base, self.url = str(self._files.base), remote.url
        self._leases: dict[str, tuple[Path, Lease]] = {}
        """key -> the folder it guards, and a lease that this process holds"""
        self._unsent: dict[Path, bytes] = {}
        self._sent = time.monotonic()
        self._turn = threading.Lock()

    def open(self, key: str, fresh: bool = False) -> Path:
        """Return the path of a key, after bringing all below it, and what vouches for it, up to date."""
        key = key.strip("/")
        _require_key(key, self.url)
        path = self._files.base / key
        self._files.clear(path)
        self._refresh(key, fresh=fresh)
        if path.suffix in COMPANIONS:
            self._look_around(path)
        return path

    def refresh(self, path: Path) -> None:
        """Bring all below a path up to date."""
        self._refresh(self._key(path))

    def bring(self, paths: Iterable[Path]) -> None:
        """Fetch the contents of files that are only names yet."""
        wanted = []
        for path in paths:
            self._files.use(path)
            if self._files.is_hollow(path):
                wanted.append(path)
        _together(self._fetch, wanted)

    def bring_again(self, path: Path) -> None:
        """Fetch the content of a file, whatever is here: a damaged copy is nobody's fault but the cache's."""
        logger.info("%s/%s: its copy in the cache is damaged or old, fetched again", self.url, self._key(path))
        self._fetch(path, whatever=True)

    def place(self, temporary: Path, path: Path, exclusive: bool) -> None:
        """Upload a temporary file, then put it in place, so that what is here never runs ahead of what is there.

        Raises:
            FileExistsError: the name is taken there, and `exclusive`.
            LockedError: a lease that this needs was lost.
        """
        if not self._mirrored(path):
            (os.link if exclusive else os.replace)(temporary, path)
            return
        self._require_leases(path)
        self._send_now_and_then()
        with self._files.writing():
            tag = self._upload(temporary, path, exclusive)
            step()
            if CHUNK.fullmatch(path.name):
                size = temporary.stat().st_size
                temporary.unlink()
                self._files.hollow(path, tag, size)
            else:
                self._files.settle(temporary, path, tag)
        self._files.keep_within(0 if CHUNK.fullmatch(path.name) else path.stat().st_size)

    def remove(self, path: Path) -> None:
        """Delete a file there, then here; what is not here was not there when this process looked."""
        if not os.path.lexists(path):
            return
        if self._mirrored(path):
            self._require_leases(path)
            with self._files.writing():
                self._remote.delete(self._key(path))
                step()
                self._files.drop(path)
        else:
            path.unlink(missing_ok=True)

    def appended(self, path: Path, data: bytes) -> None:
        """Take note of what was added to a file here."""
        with self._turn:
            self._unsent[path] = self._unsent.get(path, b"") + data

    def lock_file(self, path: Path) -> Path:
        """Return where processes of this machine lock: beside the mirror, which shows nothing but what is there."""
        place = self._files.locks / self._key(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    @contextmanager
    def held(self, path: Path) -> Iterator[None]:
        """Hold the lease of a lock file, and see what its last holder left."""
        with self._holding(path, path.parent):
            self._files.clear(path.parent)
            self._refresh(self._key(path.parent), alone=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            yield

    @contextmanager
    def door(self, folder: Path) -> Iterator[None]:
        """Let one process on any machine at a time begin to write a folder."""
        lease = self._lease(folder / "door")
        lease.take(patient=True)
        try:
            yield
        finally:
            lease.give_back()

    @contextmanager
    def share(self, lock: Path, rivals: Callable[[str], bool]) -> Iterator[bool]:
        """Hold one of several leases of a folder; yield whether nobody else holds any."""
        alone = True
        for other in self._remote.list(self._key(lock.parent / LEASES)):
            name = other.key.rpartition("/")[2]
            if name in (lock.name, "door"):
                continue
            lease = self._lease(lock.with_name(name))
            if rivals(name):
                lease.require_gone()
            elif (found := lease.look()) is not None and not found[0].get("free"):
                alone = alone and here_and_alive(found[0]) is False
        with self._holding(lock, lock.parent.parent):
            self._refresh(self._key(lock.parent.parent), alone=alone)
            lock.parent.mkdir(parents=True, exist_ok=True)
            yield alone

    def require_free(self, path: Path) -> None:
        """Do nothing if nobody holds the lease of a lock file."""
        found = self._lease(path).look()
        if found is not None and not found[0].get("free") and here_and_alive(found[0]) is not False:
            raise LockedError(f"{path.parent} is being written by {holder(found[0])}: look when its command has ended")

    @contextmanager
    def _holding(self, path: Path, root: Path) -> Iterator[None]:
        """Hold the lease of a lock file, without which nothing below `root` is written."""
        lease = self._lease(path)
        lease.take()
        self._leases[lease.key] = (root, lease)
        try:
            yield
        finally:
            self._send()
            self._leases.pop(lease.key)
            lease.give_back()

    def _lease(self, path: Path) -> Lease:
        folder = path.parent if path.parent.name != STORE_RECORDS else path.parent.parent
        return Lease(self._remote, self._key(path.parent / LEASES / path.name), f"{self.url}/{self._key(folder)}")

    def _require_leases(self, path: Path) -> None:
        for root, lease in list(self._leases.values()):
            if path.is_relative_to(root):
                lease.require()

    def _key(self, path: Path) -> str:
        key = path.relative_to(self._files.base).as_posix()
        return "" if key == "." else key

    def _mirrored(self, path: Path) -> bool:
        """Return whether a file here stands for an object, and is not of this machine alone."""
        key = self._key(path)
        return not (TEMPORARY_MARK in key or path.suffix == LOG or is_scratch(key))

    def _upload(self, temporary: Path, path: Path, exclusive: bool) -> str:
        key = self._key(path)
        size = temporary.stat().st_size
        if not exclusive:
            return self._remote.put(key, temporary)
        if size > MOST_CREATED:  # too large for one request, and several cannot be conditional
            if self._remote.head(key) is not None:
                raise FileExistsError(key)
            return self._remote.put(key, temporary)
        try:
            return plain(self._remote.create(key, temporary.read_bytes()).tag)
        except FileExistsError:
            self._take(key, path)  # the winner's, for whoever compares it with his own
            raise

    def _take(self, key: str, path: Path) -> None:
        """Put what is there of a key in place, while no other process of this machine compares all of it."""
        with self._downloaded(key, path) as (temporary, tag):
            self._files.settle(temporary, path, tag)

    @contextmanager
    def _downloaded(self, key: str, path: Path) -> Iterator[tuple[Path, str]]:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}{os.getpid()}-{threading.get_ident()}-fetched")
        try:
            with naming(path):
                tag = self._remote.fetch(key, temporary)
            yield temporary, tag
        finally:
            temporary.unlink(missing_ok=True)

    def _fetch(self, path: Path, whatever: bool = False) -> None:
        """Fill a hollow file, unless another process has changed it meanwhile; drop what is not there any more."""
        before = self._files.tag(path)
        try:
            with self._downloaded(self._key(path), path) as (temporary, tag):
                size = temporary.stat().st_size
                with self._files.alone():
                    if whatever or (self._files.is_hollow(path) and self._files.tag(path) == before):
                        self._files.settle(temporary, path, tag)
        except FileNotFoundError:
            with self._files.alone():
                self._files.drop(path)
            return
        self._files.keep_within(size)

    def _refresh(self, prefix: str, fresh: bool = False, alone: bool = False) -> None:
        """Make what is here show what is there: drop, hollow out, and fetch what is small.

        `alone`: no other process writes below, so that clock times which are not there are nobody's.
        """
        root = self._files.base / prefix
        with self._files.alone():
            there = self._listing(prefix)
            here = {path for path in _files_below(root) if self._mirrored(path)}
            for path in here - there.keys():
                if alone or path.name != APPENDED or self._files.tag(path) is not None:
                    self._files.drop(path)
            stale = [
                path
                for path, entry in there.items()
                if (fresh and not self._files.is_hollow(path)) or not self._files.whole(path, entry.tag, entry.bytes)
            ]
            small = [path for path in stale if _is_small(path, there[path]) and not self._runs_ahead(path)]
            for path in stale:
                if not _is_small(path, there[path]):
                    self._files.hollow(path, there[path].tag, there[path].bytes)
            _together(self._take_listed, small)

    def _take_listed(self, path: Path) -> None:
        try:
            self._take(self._key(path), path)
        except FileNotFoundError:  # deleted since the listing
            self._files.drop(path)

    def _runs_ahead(self, path: Path) -> bool:
        """Return whether a file of clock times has more lines here: another process of this machine will send them."""
        if path.name != APPENDED or not path.is_file():
            return False
        content, _ = self._remote.read(self._key(path), MOST_APPENDED)
        return path.read_bytes().startswith(content)

    def _listing(self, prefix: str) -> dict[Path, Entry]:
        """Return local path -> entry of all objects at or below a key that are mirrored."""
        found = self._remote.list(prefix)
        if len(found) > MOST_OBJECTS:
            raise UnsafeError(
                f"{self.url}/{prefix} holds {len(found)} objects, expected at most {MOST_OBJECTS}: name the folder "
                "of a store, run or set"
            )
        if prefix and (one := self._remote.head(prefix)) is not None:
            found.append(one)
        for entry in found:
            _require_key(entry.key, self.url)
        paths = {self._files.base / entry.key: entry for entry in found if not entry.key.endswith("/")}
        there = {path: entry for path, entry in paths.items() if self._mirrored(path) and LEASES not in path.parts}
        _require_places(there, self._files.base, self.url)
        return there

    def _look_around(self, path: Path) -> None:
        """Bring what vouches for a single file up to date: its other half, its run's records, its teacher's answers."""
        beside = [path.with_suffix(suffix) for suffix in COMPANIONS[path.suffix]]
        runs = [path.parent, *([path.parents[2]] if len(path.relative_to(self._files.base).parts) > 3 else [])]
        for other in [*beside, *(run / name for run in runs for name in OF_RUN)]:
            self._refresh_one(other)
        if path.suffix == ".parquet":
            self.refresh(path.with_suffix(".requery"))

    def _refresh_one(self, path: Path) -> None:
        with self._files.alone():
            entry = self._remote.head(self._key(path))
            if entry is None:
                self._files.drop(path)
            elif not self._files.whole(path, entry.tag, entry.bytes):
                if _is_small(path, entry):
                    self._take_listed(path)
                else:
                    self._files.hollow(path, entry.tag, entry.bytes)

    def _send_now_and_then(self) -> None:
        if self._unsent and time.monotonic() - self._sent > FLUSH_SECONDS:
            self._send()

    def _send(self) -> None:
        """Add the lines there that were added here; clock times are worth no error."""
        with self._turn:
            self._sent = time.monotonic()
            for path, lines in list(self._unsent.items()):
                try:
                    self._remote.append(self._key(path), lines)
                except KcdcacheError as error:
                    logger.warning("clock times of %s were not uploaded: %s", self._key(path), error)
                else:
                    del self._unsent[path]


def is_scratch(key: str) -> bool:
    """Return whether a key lies where a repair computes parts anew, on this machine alone."""
    return f"/{STORE_RECORDS}/{SCRATCH}/" in f"/{key}"


def _is_small(path: Path, entry: Entry) -> bool:
    return entry.bytes <= SMALL_BYTES and not CHUNK.fullmatch(path.name)


def _files_below(root: Path) -> Iterator[Path]:
    if root.is_file() or root.is_symlink():
        yield root
    for folder, _, names in os.walk(root):
        yield from (Path(folder, name) for name in names)


def _together(work: Callable[[Path], None], paths: Sequence[Path]) -> None:
    """Do some work for each path, several at once."""
    if len(paths) <= 1:
        for path in paths:
            work(path)
        return
    with ThreadPoolExecutor(min(AT_ONCE, len(paths)), thread_name_prefix="kcdcache-mirror") as pool:
        for done in [pool.submit(work, path) for path in paths]:
            done.result()


def _require_key(key: str, url: str) -> None:
    """Refuse keys that are no path below a folder, or that no file system takes."""
    parts = key.rstrip("/").split("/") if key else []
    odd = [
        part for part in parts if part in ("", ".", "..") or len(part.encode()) > MOST_NAME or not part.isprintable()
    ]
    if odd:
        raise UnsafeError(f"{url} has the key {key!r:.200}, which cannot be a file's path; nothing is fetched")


def _require_places(there: dict[Path, Entry], base: Path, url: str) -> None:
    """Refuse an object whose key is both a file's and a folder's."""
    for path in there:
        for parent in path.parents:
            if parent == base:
                break
            if parent in there:
                key = parent.relative_to(base).as_posix()
                raise UnsafeError(f"{url} has objects at and below {key}; a path is a file or a folder")
