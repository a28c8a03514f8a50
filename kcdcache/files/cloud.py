"""Paths in buckets: a folder of the cache mirrors what an object store holds; writes are uploaded first.

CACHE/s3/BUCKET/KEY is the mirror of s3://BUCKET/KEY, so the path alone names the object and nothing is registered. A
mirrored file is whole, or hollow (only name and size) until it is read; its time stamp says of which version: `_mark`.
"""

import errno
import fcntl
import functools
import itertools
import logging
import os
import re
import socket
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import unquote

from kcdcache.errors import KcdcacheError, LockedError, NoSpaceError, RemoteError, SettingsError, UnsafeError, reason
from kcdcache.interrupt import process_runs, step

logger = logging.getLogger(__name__)
T = TypeVar("T")

FOLDER, OWNER = "KCDCACHE_CACHE", "KCDCACHE_OWNER"
"""environment variables: the cache, and the name under which this machine owns what it writes"""
TEMPORARY_MARK = ".tmp-"
"""in names of files and folders that this machine alone uses; a process number follows"""
KINDS: Mapping[str, tuple[str, str, str]] = {
    "s3": ("S3Store", "AWS", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true if it is public"),
    "gs": ("GCSStore", "GOOGLE", "GOOGLE_APPLICATION_CREDENTIALS"),
    "az": ("AzureStore", "AZURE", "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"),
}
"""scheme -> class in obstore, prefix of its environment variables, and those that give access"""
RETRIES: dict[str, Any] = {
    "max_retries": 10,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2},
}
MOST_TRIES = 10
"""for what obstore does not retry: truncated bodies, conditional writes whose answer was lost"""
TIMEOUTS = {"timeout": timedelta(seconds=120), "connect_timeout": timedelta(seconds=10)}
"""of one request, 64 MiB at 4 Mbit/s; AWS_TIMEOUT and AWS_CONNECT_TIMEOUT (GOOGLE_..., AZURE_...) override them"""
AT_ONCE = 16
"""parallel requests"""
SINGLE_BYTES, MOST_CREATED = 64 * 2**20, 2**30
"""largest object uploaded in one request: unconditionally, and only where none exists"""
SMALL_BYTES = 2**20
"""larger files are fetched only when read, and not compared when opened"""
MOST_OBJECTS, MOST_APPENDED, MOST_NAME = 10**6, 64 * 2**20, 240
"""objects below a command's path; bytes of an object that lines are appended to; bytes of a file name"""
OWNERS, ALL = ".owner", "all"
"""folder with one object per owner, and the name of the owner of a whole folder"""
CHUNK = re.compile(r"c(\.\d+)+")
"""name of a chunk file, which readers check: fetched when read, not kept here when written"""
BESIDE = {".json": [".safetensors"], ".safetensors": [".json"], ".parquet": []}
"""suffix of a file that may be given by itself -> suffixes of the files beside it; OF_RUN are checked too"""
OF_RUN = ("run.json", "files.json")
LOCAL = re.compile(rf"{re.escape(TEMPORARY_MARK)}|\.log$|(^|/)(_kcd/repair|{re.escape(OWNERS)})/")
"""matches keys that are never mirrored: temporary files, logs, parts recomputed by a repair; owners"""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""system errors for a full disk, an exhausted quota, and a file larger than allowed"""
LATEST = 2**30 * 10**9
"""time stamps from 2004 on are clock times"""
_URL = re.compile(r"(?:([a-z][a-z0-9]*):)?([A-Za-z][A-Za-z0-9+.-]*)://([^?]*)(.*)", re.S)
_VAIN = re.compile(r"status code: 4(?!08|09|29)\d\d")
"""matches client errors, which no retry can mend"""
_SECRET = re.compile(r"KEY|SECRET|TOKEN|SAS|PASSWORD|CREDENTIAL", re.I)

WRITER = "writer"
"""in an object's metadata: who appended to it last"""
Version = dict[str, str]
Stamp = tuple[int, int, int] | None
"""inode, time stamp and size: one state of a local file"""


class Entry(NamedTuple):
    """A listed object; its tag changes whenever its content does."""

    key: str
    bytes: int
    tag: str


class Content(NamedTuple):
    """A small object: content, version (for a conditional upload) and, if lines were appended, the last writer."""

    data: bytes
    version: Version
    writer: str | None = None

    @classmethod
    def of(cls, data: bytes, answer: Mapping[str, Any], writer: str | None) -> "Content":
        """Return content with the version in an answer of the store."""
        return cls(data, {name: answer[name] for name in ("e_tag", "version") if answer[name] is not None}, writer)

    @property
    def tag(self) -> str:
        """Its entity tag."""
        return _plain(self.version.get("e_tag"))


def no_space(where: str, reason: str | None) -> NoSpaceError:
    """Return the error for a full disk."""
    return NoSpaceError(f"no space left {where}: free some and run the same command again to resume ({reason})")


def is_orphan(name: str) -> bool:
    """Check for the temporary name of a process that this machine no longer runs."""
    process = name.rpartition(TEMPORARY_MARK)[2].partition("-")[0]
    return TEMPORARY_MARK in name and process.isdecimal() and not process_runs(int(process))


def open_path(text: str, fresh: bool = False) -> Path:
    """Return the up-to-date mirror of a URL, or any other text as a path; with `fresh`, cached copies are not trusted.

    Raises SettingsError if the URL is malformed or has an unknown scheme, or if the extra `cloud` is not installed.

    >>> open_path("runs/kd"), open_path("file:///data/my%20kd")
    (PosixPath('runs/kd'), PosixPath('/data/my kd'))
    """
    if (match := _URL.fullmatch(text)) is None:
        return Path(text)
    kind, scheme, place, rest = match.groups()
    bucket, _, key = place.partition("/")
    url = re.sub(r"//[^/]*@", "//...@", f"{scheme}://{place}")
    if kind is not None:
        remedy = "copy it here, or give condensed:URL for a set exported with its images"
        raise SettingsError(
            f"{kind}: takes a path of this machine, found a URL: data sets are read from local disks; {remedy}"
        )
    if rest:
        raise SettingsError(f"{url}?... has a '?'; a URL here is scheme://bucket/key and nothing more")
    if scheme == "file":
        if bucket not in ("", "localhost") or not key:
            raise SettingsError(f"{url} should be file:///PATH, an absolute path of this machine")
        return Path("/" + unquote(key))
    if scheme not in KINDS:
        known = ", ".join(f"{name}://" for name in (*KINDS, "file"))
        raise SettingsError(f"{url} has the unknown scheme {scheme}://; known: {known}")
    if "@" in bucket:
        raise SettingsError(
            f"{url} holds credentials, which would be shown and recorded; set in the environment {KINDS[scheme][2]}"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
        raise SettingsError(f"{url} names no bucket; write {scheme}://BUCKET/KEY")
    cache = _cache()
    if f"{os.sep}~{os.sep}" in cache:
        raise SettingsError(
            f"{scheme}://{bucket} needs a cache on this machine, and this user has no home folder (HOME is unset, and "
            f"no passwd entry names one); set {FOLDER} to a folder that can be written"
        )
    return _opened(cache, _folder_of(scheme), bucket).open(key.strip("/"), fresh)


def opened(value: Any, fresh: bool = False) -> Any:
    """Return a setting's value with mirror paths in place of URLs; `condensed:URL?...` stays a data spec.

    >>> opened(("file:///runs/kd", 3)), opened("condensed:file:///sets/a?train=5")
    (('/runs/kd', 3), 'condensed:/sets/a?train=5')
    """
    if isinstance(value, tuple):
        return tuple(opened(part, fresh) for part in value)
    if not isinstance(value, str) or (match := _URL.fullmatch(value)) is None:
        return value
    kind, scheme, place, rest = match.groups()
    if kind == "condensed":
        return f"condensed:{open_path(f'{scheme}://{place}', fresh)}{rest}"
    return str(open_path(value, fresh))


def named(text: str) -> str:
    """Return a text with URLs in place of mirror paths."""
    if (cache := _cache()) not in text:
        return text
    return re.sub(rf"{re.escape(cache)}/({'|'.join(KINDS)})(-[0-9a-f]{{8}})?/", r"\1://", text)


def shown(value: Any) -> Any:
    """Apply `named` to all texts in JSON values."""
    if isinstance(value, str):
        return named(value)
    if isinstance(value, dict):
        return {shown(key): shown(item) for key, item in value.items()}
    return [shown(item) for item in value] if isinstance(value, list | tuple) else value


def is_mirrored(path: Path | str) -> bool:
    """Check whether a path belongs to a mirror."""
    return _bucket(path) is not None


def bring(*paths: Path | str) -> None:
    """Fetch those mirrored files that are hollow, several at once."""
    wanted = [(bucket, Path(path)) for path in paths if (bucket := _bucket(path)) is not None and _is_hollow(path)]
    _together(lambda one: one[0].bring(one[1]), wanted)


def bring_again(path: Path) -> bool:
    """Fetch a mirrored file again; return False if the path is not mirrored."""
    if (bucket := _bucket(path)) is None:
        return False
    logger.info("%s: the cached copy is damaged or outdated; fetched again", named(str(path)))
    bucket.fetch(path, _stamp(path))
    return True


def refresh(path: Path) -> None:
    """Update a mirror with what other machines wrote or deleted below a path."""
    if (bucket := _bucket(path)) is not None:
        bucket.refresh(path)


def place(temporary: Path, path: Path, exclusive: bool) -> None:
    """Move a finished temporary file to its path; a mirrored file is uploaded first.

    With `exclusive`, raises FileExistsError if the path is taken; in a bucket, the same bytes count as one's own.
    """
    if (bucket := _bucket(path)) is None:
        (os.link if exclusive else os.replace)(temporary, path)
        return
    tag = bucket.upload(temporary, path, exclusive)
    step()
    if CHUNK.fullmatch(path.name):
        _make_hollow(temporary, tag, temporary.stat().st_size)
    else:
        _set_mark(temporary, tag, path.name)
    bucket.replace(temporary, path)


def remove(path: Path) -> None:
    """Delete a file, if it exists; its object first."""
    if (bucket := _bucket(path)) is None:
        path.unlink(missing_ok=True)
    elif (seen := _stamp(path)) is not None:  # else the object was missing at the last look
        bucket.delete(bucket.key(path))
        step()
        bucket.replace(None, path, seen)


def appended(path: Path, data: bytes) -> None:
    """Append to the object of a file as well, after others' lines; failures only warn: these are clock times."""
    if (bucket := _bucket(path)) is not None:
        try:
            bucket.append(path, data)
        except (KcdcacheError, FileExistsError) as error:
            logger.warning("the last clock times of %s were not uploaded: %s", named(str(path)), error)


def lock_file(path: Path) -> Path:
    """Return the lock file of `path` on this machine: beside the mirror, if it is mirrored."""
    if (bucket := _bucket(path)) is None:
        return path
    found = bucket.locks / bucket.key(path)
    found.parent.mkdir(parents=True, exist_ok=True)
    return found


@contextmanager
def owned(folder: Path, part: str = ALL) -> Iterator[None]:
    """Own a mirrored folder, or part I-N of it, against other machines, after updating it.

    The caller holds the lock against this machine's processes. A killed owner remains the owner: its machine goes on,
    another takes over by using its name.

    Raises:
        LockedError: another machine owns the folder, or a part of a different split; names it.
        RemoteError: the store overwrites existing objects, so nothing can be owned.
    """
    bucket = _bucket(folder)
    with nullcontext() if bucket is None else bucket.owned(folder, part):
        yield


def require_free(folder: Path) -> None:
    """Raise LockedError, naming the owner, if another machine owns a mirrored folder."""
    if (bucket := _bucket(folder)) is not None:
        bucket.require_no_rival("", folder)


class Bucket:
    """A bucket and its mirror in the cache, shared by this machine's processes and threads.

    Files are compared and fetched without a lock, so changes apply only to files not changed meanwhile: `replace`.
    All methods raise RemoteError if the store refuses, or does not answer within minutes of retries.
    """

    def __init__(self, cache: Path, folder: str, bucket: str) -> None:
        scheme = folder.partition("-")[0]
        name, variables, self._access = KINDS[scheme]
        self.url, self.base = f"{scheme}://{bucket}", cache / folder / bucket
        self.locks, self._temporaries = cache / "locks" / folder / bucket, cache / "temporary"
        try:
            import obstore.exceptions
            import obstore.store
        except ImportError:
            raise SettingsError(
                f'{self.url}: object stores need the extra `cloud`: pip install "kcdcache[cloud]"'
            ) from None
        self._obstore: Any = obstore
        given = {name.upper() for name in os.environ}
        options: dict[str, Any] = {k: v for k, v in TIMEOUTS.items() if f"{variables}_{k.upper()}" not in given}
        if "http://" in _endpoint(variables):  # whoever names such an endpoint means it
            options["allow_http"] = True
        try:
            self._store = getattr(self._obstore.store, name)(bucket, client_options=options, retry_config=RETRIES)
        except (self._obstore.exceptions.BaseError, ValueError) as error:
            raise SettingsError(f"{self.url} cannot be reached: {_cleaned(str(error))}; set {self._access}") from None
        try:
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            for made in (self.base, self.locks, self._temporaries):
                made.mkdir(parents=True, exist_ok=True)
            trial = self._temporaries / f"try{TEMPORARY_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}"
            trial.touch()  # the folders may be there, and the disk read-only
            trial.unlink()
        except OSError as error:
            raise SettingsError(
                f"{self.url} needs a cache on this machine, and {cache} cannot be written ({reason(error)}); set "
                f"{FOLDER} to a folder that can"
            ) from None
        self._cache, self._conditional = cache, False

    def key(self, path: Path) -> str:
        """Return the key of a path."""
        return "" if path == self.base else path.relative_to(self.base).as_posix()

    def open(self, key: str, fresh: bool) -> Path:
        """Return the path of a key, after updating everything below it and the records that vouch for it."""
        self._require_keys([key] if key else [])
        path = self.base / key
        for folder in (path, self._temporaries):
            _clear(folder)
        with suppress(OSError):
            path.rmdir()
        self.refresh(path, fresh=fresh)
        if path.suffix in BESIDE:
            runs = [path.parent, *([path.parents[2]] if key.count("/") > 2 else [])]
            beside = [path.with_suffix(suffix) for suffix in BESIDE[path.suffix]]
            for other in [*beside, *(run / name for run in runs for name in OF_RUN)]:
                self.refresh(other, single=True)
        if path.suffix == ".parquet":
            self.refresh(path.with_suffix(".requery"))
        return path

    def refresh(self, root: Path, *, fresh: bool = False, single: bool = False) -> None:
        """Make the mirror match the listing: delete, hollow out, fetch small files; `single`: `root` is one file."""
        here = [root] if root.is_symlink() or root.is_file() else []
        here += [Path(folder, name) for folder, _, names in ([] if single else os.walk(root)) for name in names]
        seen = {path: _stamp(path) for path in here if is_mirrored(path)}  # before the listing
        there = self._listing(self.key(root), single)
        for path in seen.keys() - there.keys():
            self.replace(None, path, seen[path])
        stale = {path for path, entry in there.items() if (fresh and not _is_hollow(path)) or not _is_copy(path, entry)}
        small = [path for path in stale if there[path].bytes <= SMALL_BYTES and not CHUNK.fullmatch(path.name)]
        for path in stale.difference(small):
            with self._temporary() as temporary:
                _make_hollow(temporary, there[path].tag, there[path].bytes)
                self.replace(temporary, path, seen.get(path))
        _together(lambda path: self.fetch(path, seen.get(path)), small)

    def bring(self, path: Path) -> None:
        """Fetch a hollow file."""
        while _is_hollow(path):  # still, where another process of this machine changed it meanwhile
            self.fetch(path, _stamp(path))

    def fetch(self, path: Path, seen: Stamp) -> None:
        """Fetch a file unless it changed here since it was `seen`; delete it here if the object is gone."""
        with self._temporary() as temporary:
            try:
                tag = self._tried(f"read {self.key(path)}", lambda: self._download(self.key(path), temporary))
            except FileNotFoundError:
                self.replace(None, path, seen)
            else:
                _set_mark(temporary, tag, path.name)
                self.replace(temporary, path, seen)

    def upload(self, temporary: Path, path: Path, exclusive: bool) -> str:
        """Upload a file, with `exclusive` only if no object exists; return its tag."""
        key, size = self.key(path), temporary.stat().st_size
        if exclusive and size <= MOST_CREATED:
            try:
                return self.create(key, temporary.read_bytes())
            except FileExistsError:
                self.fetch(path, _stamp(path))  # the winner's, for whoever compares it with his own
                raise
        if exclusive and self._head(key) is not None:
            raise FileExistsError(key)
        whole = size <= SINGLE_BYTES
        content: Any = temporary.read_bytes() if whole else temporary
        made = self._tried(
            f"write {key}", lambda: self._obstore.put(self._store, key, content, use_multipart=not whole)
        )
        return _plain(made["e_tag"])

    def append(self, path: Path, lines: bytes) -> None:
        """Append lines to an object that others append to as well, and update the mirror.

        Raises FileExistsError if the object changes faster than it can be read and written.
        """
        mine = uuid.uuid4().hex  # equal lines of others are not these
        for _ in range(MOST_TRIES):
            there = Content(b"", {})
            with suppress(FileNotFoundError):
                there = self.read(self.key(path), MOST_APPENDED)
            if there.writer != mine:
                with suppress(FileExistsError):
                    there = self._put(self.key(path), there.data + lines, there.version or "create", writer=mine)
            if there.writer == mine:  # also where the answer to the upload was lost
                break
        else:
            raise FileExistsError(path)
        with self._temporary() as temporary:
            temporary.write_bytes(there.data)
            _set_mark(temporary, there.tag, path.name)
            self.replace(temporary, path)

    def replace(self, temporary: Path | None, path: Path, seen: Stamp | Literal["any"] = "any") -> None:
        """Move a file to a path, or delete that path (None), unless it changed since it was seen."""
        with open(self.locks / ".turn", "ab") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)  # others of this machine wait
            if seen not in ("any", _stamp(path)):
                return
            if temporary is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary, path)
                return
            path.unlink(missing_ok=True)
            with suppress(OSError):  # the first that is not empty
                for parent in path.relative_to(self.base).parents[:-1]:
                    (self.base / parent).rmdir()

    @contextmanager
    def owned(self, folder: Path, part: str) -> Iterator[None]:
        """See the function `owned`."""
        self._claim(mine := self.key(folder / OWNERS / part), folder)
        try:
            self.require_no_rival(mine, folder)
            _clear(folder)
            self.refresh(folder)
            folder.mkdir(parents=True, exist_ok=True)
            yield
        finally:
            try:
                if self._named(mine) == _owner(self._cache):
                    self.delete(mine)
            except KcdcacheError as error:  # the folder stays this machine's
                logger.warning("%s/%s could not be deleted: %s", self.url, mine, error)

    def _claim(self, mine: str, folder: Path) -> None:
        """Create the object that names the owner; this owner's own from a killed process will do."""
        try:
            self.create(mine, _owner(self._cache).encode())
        except FileExistsError:
            raise self._owned_by(mine, folder) from None
        if not self._conditional:
            try:
                self.create(mine, b"")
            except FileExistsError:
                self._conditional = True
            else:
                self.delete(mine)
                raise RemoteError(
                    f"{self.url} replaced an object that was to be made only where none is (it ignores If-None-Match): "
                    "of two writers neither would know of the other; use a server that supports conditional writes"
                )

    def require_no_rival(self, mine: str, folder: Path) -> None:
        """Raise LockedError if another machine owns all of a folder or a part of a different split."""
        for key in [entry.key for entry in self._list(self.key(folder / OWNERS))]:
            if re.split("[/-]", key)[-1] != re.split("[/-]", mine)[-1]:
                if self._named(key) != _owner(self._cache):
                    raise self._owned_by(key, folder)
                if mine:
                    self.delete(key)  # of a process that was killed: this one holds the locks of this machine

    def read(self, key: str, most: int) -> Content:
        """Return a small object; raises UnsafeError if it has more than `most` bytes."""

        def once() -> Content:
            result = self._obstore.get(self._store, key)
            if (size := result.meta["size"]) > most:
                raise UnsafeError(f"{self.url}/{key} has {size} bytes, expected at most {most}; it is not read")
            return Content.of(bytes(result.bytes()), result.meta, result.attributes.get(WRITER))

        return self._tried(f"read {key}", once)

    def create(self, key: str, data: bytes) -> str:
        """Create an object and return its tag; raises FileExistsError if it exists with another content.

        The same content counts as this call's own: the answer to its upload may have been lost.
        """
        try:
            return self._put(key, data, "create").tag
        except FileExistsError:
            with suppress(FileNotFoundError, UnsafeError):
                if (found := self.read(key, len(data))).data == data:
                    return found.tag
            raise

    def _put(self, key: str, data: bytes, mode: Version | Literal["create"], writer: str | None = None) -> Content:
        """Upload an object only if none exists, or only over one version; else raise FileExistsError."""
        errors, told = self._obstore.exceptions, None if writer is None else {WRITER: writer}
        put = functools.partial(
            self._obstore.put, self._store, key, data, mode=mode, attributes=told, use_multipart=False
        )
        try:
            return Content.of(data, self._tried(f"write {key}", put), writer)
        except (errors.AlreadyExistsError, errors.PreconditionError, FileNotFoundError):
            raise FileExistsError(key) from None

    def delete(self, key: str) -> None:
        """Delete an object, if it exists."""
        with suppress(FileNotFoundError):
            self._tried(f"delete {key}", lambda: self._obstore.delete(self._store, key))

    def _download(self, key: str, path: Path) -> str:
        result = self._obstore.get(self._store, key)
        with open(path, "wb") as sink:
            for block in result.stream(min_chunk_size=4 * 2**20):
                sink.write(memoryview(block))
            if sink.tell() != result.meta["size"]:
                raise ConnectionError(f"{sink.tell()} of {result.meta['size']} bytes came")
        return _plain(result.meta["e_tag"])

    def _head(self, key: str) -> Entry | None:
        try:
            one = self._tried(f"look at {key}", lambda: self._obstore.head(self._store, key))
        except FileNotFoundError:
            return None
        return Entry(key, int(one["size"]), _plain(one["e_tag"]))

    def _list(self, prefix: str) -> list[Entry]:
        """List all objects below a folder; in the whole bucket for an empty prefix."""
        asked = functools.partial(self._obstore.list, self._store, prefix or None, chunk_size=1000)
        found = self._tried(f"list {prefix}", lambda: asked().collect())
        return [Entry(str(one["path"]), int(one["size"]), _plain(one["e_tag"])) for one in found]

    def _listing(self, prefix: str, single: bool) -> dict[Path, Entry]:
        """Return local path -> entry for all mirrored objects at or below a key."""
        found = [] if single else self._list(prefix)
        if len(found) > MOST_OBJECTS:
            raise UnsafeError(
                f"{self.url}/{prefix} holds {len(found)} objects, expected at most {MOST_OBJECTS}: "
                "name the folder of a store, run or set"
            )
        if prefix and (one := self._head(prefix)) is not None:
            found.append(one)
        self._require_keys(entry.key for entry in found)
        there = {self.base / e.key: e for e in found if not e.key.endswith("/") and not LOCAL.search(e.key)}
        for path in there:
            if (both := next((parent for parent in path.parents if parent in there), None)) is not None:
                raise UnsafeError(f"{self.url} has objects at and below {self.key(both)}; a path is a file or a folder")
        return there

    def _require_keys(self, keys: Iterable[str]) -> None:
        """Raise UnsafeError for keys that are no relative path, or that no file system takes."""
        for key in keys:
            for part in key.rstrip("/").split("/"):
                if part in ("", ".", "..") or len(part.encode()) > MOST_NAME or not part.isprintable():
                    told = f"{self.url} has the key {key!r:.200}, which cannot be a file's path; nothing is fetched"
                    raise UnsafeError(told)

    def _named(self, key: str) -> str:
        """Return the owner named in an object, '?' if there is none."""
        try:
            name = self.read(key, 200).data.decode(errors="replace")
        except (FileNotFoundError, UnsafeError):
            return "?"
        return name if re.fullmatch(r"[A-Za-z0-9._-]+", name) else "?"

    def _owned_by(self, key: str, folder: Path) -> LockedError:
        owner, remedy = self._named(key), f"delete the object {self.url}/{key}"
        if owner != "?":
            remedy = f"set {OWNER}={owner} in the environment"
        return LockedError(
            f"{self.url}/{self.key(folder)} is being written by {owner}, or its command was killed there: wait for it, "
            f"stop it, or run it again there; if that cannot be, {remedy} to take over"
        )

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        made = self._temporaries / f"file{TEMPORARY_MARK}{os.getpid()}-{uuid.uuid4().hex}"
        try:
            yield made
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise no_space(f"in the cache at {self.base}", error.strerror) from error
        finally:
            made.unlink(missing_ok=True)

    def _tried(self, what: str, work: Callable[[], T]) -> T:
        """Return the result of `work`, repeated if the connection breaks."""
        errors, until = self._obstore.exceptions, time.monotonic() + RETRIES["retry_timeout"].total_seconds()
        remedy = "what is there stays as it is, run the same command again to resume"
        for attempt in itertools.count():
            try:
                return work()
            except (errors.AlreadyExistsError, errors.PreconditionError):
                raise
            except (errors.PermissionDeniedError, errors.UnauthenticatedError) as error:
                told = f"{self.url} refuses to {what}: {_cleaned(str(error))}"
                raise RemoteError(f"{told}; access is taken from the environment: set {self._access}") from None
            except (errors.BaseError, ConnectionError) as error:
                # the provider's own machines ask for access at this address; who comes there elsewhere has none
                if "169.254.169.254" in str(error):
                    remedy = f"no access was found in the environment: set {self._access}"
                if attempt >= MOST_TRIES or time.monotonic() > until or _VAIN.search(str(error)):
                    raise RemoteError(f"{self.url}: could not {what}: {_cleaned(str(error))}; {remedy}") from None
                time.sleep(min(10.0, 0.1 * 2**attempt))
        raise AssertionError


def _bucket(path: Path | str) -> Bucket | None:
    """Return the bucket of a path or None, within microseconds."""
    text, cache = os.fspath(path), _cache()
    if not text.startswith(cache + os.sep):
        return None
    folder, _, rest = text[len(cache) + 1 :].partition(os.sep)
    bucket, _, key = rest.partition(os.sep)
    if (scheme := folder.partition("-")[0]) not in KINDS or not bucket or LOCAL.search(key):
        return None
    if folder != _folder_of(scheme):
        raise SettingsError(f"{text} mirrors a bucket at another endpoint than the environment names")
    return _opened(cache, folder, bucket)


@functools.cache
def _opened(cache: str, folder: str, bucket: str) -> Bucket:
    return Bucket(Path(cache), folder, bucket)


def _cache() -> str:
    return _cache_of(*map(os.environ.get, (FOLDER, "XDG_CACHE_HOME", "HOME")))


@functools.cache
def _cache_of(given: str | None, caches: str | None, home: str | None) -> str:
    return os.path.realpath(given or os.path.join(caches or os.path.expanduser("~/.cache"), "kcdcache"))


def _folder_of(scheme: str) -> str:
    """Return the folder of a scheme's buckets: each endpoint or account has its own."""
    where = _endpoint(KINDS[scheme][1])
    return f"{scheme}-{sha256(where.encode()).hexdigest()[:8]}" if where else scheme


def _endpoint(variables: str) -> str:
    """Return the environment's endpoint or account, without secrets; "" for the provider's default."""
    names = ("ENDPOINT_URL_S3", "ENDPOINT_URL", "ENDPOINT", "STORAGE_ENDPOINT", "STORAGE_ACCOUNT_NAME")
    return " ".join(filter(None, (os.environ.get(f"{variables}_{name}") for name in names)))


def _owner(cache: Path) -> str:
    """Return this machine's owner name: machines that share the cache share the name."""
    if given := os.environ.get(OWNER):
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", given):
            raise SettingsError(f"{OWNER} should be a name of letters, digits and . _ -, found {given!r:.200}")
        return given
    file, mine = cache / "owner", cache / f"owner{TEMPORARY_MARK}{os.getpid()}-"
    if not file.exists():
        mine.write_text(uuid.uuid4().hex[:8])
        with suppress(FileExistsError):
            os.link(mine, file)
        mine.unlink()
    return re.sub(r"[^A-Za-z0-9.-]", "-", f"{socket.gethostname()[:80]}-{file.read_text()[:8]}")


def _stamp(path: Path | str) -> Stamp:
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _mark(tag: str, checksum: int | None) -> int:
    """Return the time stamp of a copy of an object's version: its CRC-32, or None if hollow (odd seconds).

    It is before 2004 and depends on tag and checksum; two agree by chance once in 2^58.
    """
    digest = sha256(f"{tag} {checksum}".encode()).digest()
    seconds = int.from_bytes(digest[:4], "big") >> 3 << 1 | (checksum is None)
    return seconds * 10**9 + int.from_bytes(digest[4:8], "big") % 10**9


def _set_mark(path: Path, tag: str, name: str | None) -> None:
    """Mark a file as the copy, later called `name`, of a version; as a hollow one for None."""
    mark = _mark(tag, None if name is None else _checksum(path, name))
    os.utime(path, ns=(mark, mark))


def _make_hollow(path: Path, tag: str, size: int) -> None:
    with open(path, "wb") as stream:
        stream.truncate(size)
    _set_mark(path, tag, None if size else "")


def _checksum(path: Path, name: str) -> int:
    """Return the CRC-32 of a small file; 0 for large files and chunks, which are compared when used."""
    return 0 if path.stat().st_size > SMALL_BYTES or CHUNK.fullmatch(name) else zlib.crc32(path.read_bytes())


def _is_hollow(path: Path | str) -> bool:
    found = _stamp(path)
    return found is not None and found[1] < LATEST and found[1] // 10**9 % 2 == 1


def _is_copy(path: Path, entry: Entry) -> bool:
    """Check whether a file is a copy of an object, hollow or not."""
    if (found := _stamp(path)) is None or found[2] != entry.bytes or path.is_symlink() or not path.is_file():
        return False
    return found[1] == _mark(entry.tag, None if _is_hollow(path) else _checksum(path, path.name))


def _clear(root: Path) -> None:
    """Delete temporary files of this machine's dead processes, and empty folders."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            if is_orphan(name):
                Path(folder, name).unlink(missing_ok=True)
        if folder != str(root):
            with suppress(OSError):
                os.rmdir(folder)


def _together(work: Callable[[T], object], items: Sequence[T]) -> None:
    """Call `work` for each item, several at once."""
    if items:
        with ThreadPoolExecutor(min(AT_ONCE, len(items)), thread_name_prefix="kcdcache-cloud") as pool:
            list(pool.map(work, items))


def _plain(tag: str | None) -> str:
    """Return an entity tag without quotes, which listings and answers use differently."""
    return (tag or "").strip('"')


def _cleaned(text: str) -> str:
    """Shorten an error's text: no URL queries (signatures), no secrets of the environment."""
    text = re.sub(r"\?[^\s<>\"')]*", "?...", text.split("\n\nDebug source")[0])
    for name, value in os.environ.items():
        if len(value) >= 4 and _SECRET.search(name):
            text = text.replace(value, "***")
    return " ".join(re.sub(r"<[^<>]*>", " ", text).split())[:400]
