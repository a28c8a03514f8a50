"""Files of a cache: whole, or hollow (a name and a size whose content is elsewhere)."""

import fcntl
import json
import os
import re
import threading
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from kcdcache.errors import SettingsError
from kcdcache.files.atomic import TEMPORARY_MARK, process_runs

FOLDER, LIMIT = "KCDCACHE_CACHE", "KCDCACHE_CACHE_BYTES"
"""environment variables: where the cache is, and how many bytes of contents it keeps of a bucket (all, if unset)"""
EMPTIED = 0.9
"""share of the limit that is kept once it was reached, so that not every new file makes the cache be looked through"""
SMALL_BYTES = 2**20
"""largest file that is checked whenever it is reused, and fetched before it is asked for"""
LEAST_EMPTIED = 4096
"""bytes of a file that is worth emptying"""
SPARED = 64
"""files last used by this process that are never emptied, whatever the limit: they may be in use"""
TEMPORARY = re.compile(re.escape(TEMPORARY_MARK) + r"(\d+)-")
"""in the name of a temporary file, with the process that writes it"""
HOLLOW_NS = 0
"""time stamp of a hollow file, which no written file has: name, size and mark come with one rename"""
READ_AT_ONCE = 2**20


class Tag(NamedTuple):
    """What a cached file is a copy of."""

    version: str
    """the object store's tag of the content"""
    checksum: int | None
    """CRC-32 of a small file's content"""


def folder() -> Path:
    """Return the cache's folder: KCDCACHE_CACHE, or kcdcache in the user's cache folder."""
    if given := os.environ.get(FOLDER):
        return Path(given).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "kcdcache"


def limit() -> int | None:
    """Return how many bytes of contents the cache may keep, None for any number.

    Raises:
        SettingsError: the variable is no number.
    """
    text = os.environ.get(LIMIT, "")
    if text and not text.isdecimal():
        raise SettingsError(f"{LIMIT} should be a number of bytes, found {text!r}")
    return int(text) if text else None


class CacheFiles:
    """The cached files of one bucket.

    Processes of one machine share them: whoever puts an object there and here holds `writing`, whoever compares all of
    it with a listing holds `alone`, so that nobody takes a file just written for one that was deleted elsewhere.
    """

    def __init__(self, name: str) -> None:
        root = folder()
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        root = root.resolve()
        self.base = root / name
        self._tags, self.locks = root / "tags" / name, root / "locks" / name
        for path in (self.base, self._tags, self.locks):
            path.mkdir(parents=True, exist_ok=True)
        self._limit = limit()
        self._used: deque[Path] = deque(maxlen=SPARED)
        self._kept: int | None = None
        self._counting = threading.Lock()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Put a file there and here, beside others that do."""
        with self._locked(fcntl.LOCK_SH):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Change files while no other process of this machine does."""
        with self._locked(fcntl.LOCK_EX):
            yield

    def tag(self, path: Path) -> Tag | None:
        """Return what a cached file is a copy of, None if that is not known."""
        try:
            version, checksum = json.loads(self._tag(path).read_bytes())
        except (OSError, ValueError, TypeError):
            return None
        return Tag(str(version), checksum if isinstance(checksum, int) else None)

    def is_hollow(self, path: Path) -> bool:
        """Return whether a file is only a name and a size."""
        try:
            found = os.stat(path, follow_symlinks=False)
        except OSError:
            return False
        return found.st_mtime_ns == HOLLOW_NS and found.st_size > 0

    def whole(self, path: Path, version: str, size: int) -> bool:
        """Return whether a file is a copy of a version, hollow or not; a small one's content is compared too."""
        try:
            found = os.stat(path, follow_symlinks=False)
        except OSError:
            return False
        tag = self.tag(path)
        if tag is None or tag.version != version or found.st_size != size:
            return False
        return tag.checksum is None or self.is_hollow(path) or checksum_of(path) == tag.checksum

    def settle(self, temporary: Path, path: Path, version: str) -> None:
        """Put a finished temporary file in place as the copy of a version."""
        size = temporary.stat().st_size
        checksum = checksum_of(temporary) if size <= SMALL_BYTES else None
        self._replace(temporary, path, Tag(version, checksum))
        self._used.append(path)

    def hollow(self, path: Path, version: str, size: int) -> None:
        """Make a file only a name and a size."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}{os.getpid()}-{threading.get_ident()}-hollow")
        with open(temporary, "wb") as stream:
            stream.truncate(size)
        os.utime(temporary, ns=(HOLLOW_NS, HOLLOW_NS))
        self._replace(temporary, path, Tag(version, None))

    def drop(self, path: Path) -> None:
        """Delete a file, and the folders that this leaves empty."""
        path.unlink(missing_ok=True)
        self._tag(path).unlink(missing_ok=True)
        for parent in path.parents:
            if parent == self.base or not parent.is_relative_to(self.base):
                return
            try:
                parent.rmdir()
            except OSError:
                return

    def clear(self, root: Path) -> None:
        """Delete what killed processes of this machine left below a folder: temporary files, and empty folders."""
        with self.alone():
            for place, _, names in os.walk(root, topdown=False):
                for name in names:
                    match = TEMPORARY.search(name)
                    if match is not None and not process_runs(int(match[1])):
                        Path(place, name).unlink(missing_ok=True)
                with suppress(OSError):
                    os.rmdir(place)

    def use(self, path: Path) -> None:
        """Take note that a file is in use."""
        self._used.append(path)
        if self._limit is not None:
            with suppress(OSError):
                os.utime(self._tag(path))

    def keep_within(self, added: int) -> None:
        """Empty the files that were not used for longest, now that so many bytes were added."""
        if self._limit is None:
            return
        with self._counting:
            if self._kept is not None and self._kept + added <= self._limit:
                self._kept += added
                return
            found = sorted(self._contents())
            self._kept = sum(size for _, size, _ in found)
            if self._kept <= self._limit:
                return
            spared = set(self._used)
            for _, size, path in found:
                if self._kept <= EMPTIED * self._limit:
                    return
                if path not in spared and size >= LEAST_EMPTIED and (tag := self.tag(path)) is not None:
                    self.hollow(path, tag.version, size)
                    self._kept -= size

    def _contents(self) -> Iterator[tuple[int, int, Path]]:
        """Yield (last use, bytes, path) of every file with content."""
        for place, _, names in os.walk(self.base):
            for name in names:
                path = Path(place, name)
                with suppress(OSError):
                    found, tag = os.stat(path), os.stat(self._tag(path))
                    if found.st_mtime_ns != HOLLOW_NS:
                        yield tag.st_mtime_ns, found.st_size, path

    def _replace(self, temporary: Path, path: Path, tag: Tag) -> None:
        """Rename; a kill in between leaves a file without a tag, which is fetched again."""
        place = self._tag(path)
        place.unlink(missing_ok=True)
        os.replace(temporary, path)
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = place.with_name(f"{place.name}.{os.getpid()}-{threading.get_ident()}")
        beside.write_bytes(json.dumps(tag).encode())
        os.replace(beside, place)

    def _tag(self, path: Path) -> Path:
        return self._tags / f"{path.relative_to(self.base)}.tag"

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        # whoever waits for the lock holds the gate: a row of writers that overlap would keep it waiting for ever
        with open(self.locks / ".files", "ab") as lock:
            with open(self.locks / ".gate", "ab") as gate:
                fcntl.flock(gate, fcntl.LOCK_EX)
                fcntl.flock(lock, kind)
            yield


def checksum_of(path: Path) -> int:
    """Return the CRC-32 of a file's content."""
    found = 0
    with open(path, "rb") as stream:
        while block := stream.read(READ_AT_ONCE):
            found = zlib.crc32(block, found)
    return found
