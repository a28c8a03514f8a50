"""Atomic durable writes, bounded reads, canonical JSON, digests, locks, and folders made beside their results."""

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from kcdcache.errors import (
    CorruptionError,
    KcdcacheError,
    LockedError,
    NoSpaceError,
    NotFoundError,
    UnsafeError,
)
from kcdcache.files import cloud
from kcdcache.interrupt import process_runs, step

MOST_RECORD_BYTES = 64 * 2**20
MOST_JSON_VALUES = 10**6
"""values in one JSON text: in memory each takes up to some 150 bytes, however few it has in the file"""
MOST_JSON_DEPTH = 64
MOST_INTEGER = 2**64
"""larger than every number of ours; larger ones break arithmetic in arrays"""


def open_plain(path: Path) -> BufferedReader:
    """Return a plain file, opened for reading; a link is followed, but a pipe or device is never waited for or read.

    Raises:
        NotFoundError: there is no file.
        UnsafeError: it is a pipe, a device or a socket.
    """
    cloud.bring(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"no file at {path}") from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise NotFoundError(f"no file at {path}: a folder is there")
    raise UnsafeError(f"{path} is a pipe or a device, expected a plain file; it is not read")


def read_bounded(path: Path, most: int) -> bytes:
    """Return the bytes of a plain file.

    Raises:
        NotFoundError: there is no file.
        UnsafeError: it is no plain file, or has more than `most` bytes; it is not read.
    """
    with open_plain(path) as stream:
        if (size := os.fstat(stream.fileno()).st_size) > most:
            raise UnsafeError(f"{path} has {size} bytes, expected at most {most}; it is not read")
        return stream.read(size)


def parse_json(data: bytes, where: Path | str) -> Any:
    """Return the value of a JSON text in UTF-8: finite numbers, integers within 64 bits, no key twice in an object.

    Raises:
        UnsafeError: it holds more values than any record of ours.
        CorruptionError: it is no such text, or nested too deeply.
    """
    values = sum(map(data.count, (b",", b"[", b"{")))  # too many only where texts hold such marks
    if values > MOST_JSON_VALUES:
        raise UnsafeError(f"{where} holds {values} JSON values, expected at most {MOST_JSON_VALUES}; it is not read")
    try:
        text = data.decode()
        found = json.loads(
            text, parse_int=_integer, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_object
        )
        if "\\u" in text:  # half a pair could be neither printed nor digested
            json.dumps(found, ensure_ascii=False).encode()
        if _deeper(found, MOST_JSON_DEPTH):
            raise RecursionError
    except RecursionError:
        raise CorruptionError(f"{where} should hold JSON: it is nested too deeply") from None
    except ValueError as error:
        raise CorruptionError(f"{where} should hold JSON: {error}") from None
    return found


def parse_lines(data: bytes, where: Path | str) -> list[Any]:
    """Return the values of a text with one JSON value a line.

    Raises:
        UnsafeError, CorruptionError: as for `parse_json`; name the line.
    """
    values = sum(map(data.count, (b",", b"[", b"{", b"\n")))
    if values > MOST_JSON_VALUES:
        raise UnsafeError(f"{where} holds {values} JSON values, expected at most {MOST_JSON_VALUES}; it is not read")
    return [parse_json(line, f"{where}, line {number}") for number, line in enumerate(data.splitlines(), 1)]


def require_no_links(root: Path, files: bool = True) -> None:
    """Do nothing if no folder (or file) under `root` is a symbolic link: writing through one would change other files.

    Where files are only ever replaced whole, which replaces the link itself, `files` may be False.

    Raises:
        UnsafeError: one is; names it.
    """
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names) if files else folders:
            if os.path.islink(path := os.path.join(folder, name)):
                raise UnsafeError(f"{path} is a symbolic link; nothing is written in a folder that holds one")


def _integer(text: str) -> int:
    number = int(text) if len(text) <= 20 else MOST_INTEGER
    if abs(number) >= MOST_INTEGER:
        raise ValueError(f"the number {text[:24]}... has more than 64 bits")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:24]} is not a finite number")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)[:80]!r} stands there twice")
    return found


def _deeper(value: Any, most: int) -> bool:
    """Return whether lists and objects stand in each other more than `most` deep."""
    level = [value]
    for _ in range(most):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]
        if not level:
            return False
    return True


TEMPORARY_MARK = cloud.TEMPORARY_MARK
MOST_JSON_BYTES = MOST_RECORD_BYTES
MOST_FILE_BYTES = 16 * 2**30
"""of a file read whole, such as a checkpoint"""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""what the system calls a full disk, an exhausted quota, and a file larger than allowed"""


def canonical_json(value: Any) -> bytes:
    """Return `value` as JSON bytes that are equal whenever the values are: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: a float is not finite.

    >>> canonical_json({"b": 1, "a": [1.5, None]})
    b'{"a":[1.5,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def readable_json(value: Any) -> bytes:
    """Return `value` as indented JSON bytes for people, with sorted keys and a closing newline."""
    return (json.dumps(value, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def sha256_bytes(data: bytes | bytearray | memoryview) -> str:
    """Return the SHA-256 of `data` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path, most: int | None = None) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits.

    Raises:
        NotFoundError: there is no such file.
        UnsafeError: it is no plain file, or has more than `most` bytes.
    """
    with naming(path), open_plain(path) as stream:
        if most is not None and (size := os.fstat(stream.fileno()).st_size) > most:
            raise UnsafeError(f"{path} has {size} bytes, expected at most {most}; it is not read")
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form."""
    return sha256_bytes(canonical_json(value))


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable, so that a rename survives a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes | bytearray | memoryview) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one, even after a power loss.

    Raises:
        NoSpaceError: the disk or quota is full; the old file is untouched.
        OSError: any other refusal of the system; names `path`.
    """
    _place(path, data, exclusive=False)


def create_exclusive(path: Path, data: bytes) -> None:
    """Write `path` durably, only if nothing is there yet: of several racing writers exactly one succeeds.

    Raises:
        LockedError: the file exists already.
        NoSpaceError: the disk or quota is full.
        OSError: any other refusal of the system; names `path`.
    """
    try:
        _place(path, data, exclusive=True)
    except FileExistsError:
        raise LockedError(f"{path} exists already: another process wrote it first") from None


def create_filled(path: Path, fill: Callable[[Path], object]) -> None:
    """Write `path` as `create_exclusive` does, with what `fill` writes into the temporary file that it is given.

    Raises:
        LockedError, NoSpaceError, OSError: as for `create_exclusive`.
    """
    try:
        _place(path, fill, exclusive=True)
    except FileExistsError:
        raise LockedError(f"{path} exists already: another process wrote it first") from None


def move(source: Path, path: Path) -> None:
    """Put a finished, durable file in the place of another on the same disk; the object of a mirrored one too."""
    cloud.place(source, path, exclusive=False)
    sync_directory(path.parent)


def append(path: Path, data: bytes) -> None:
    """Add `data` to the end of a file, which is made if need be and after an error holds what it held; not durable.

    Raises:
        NoSpaceError: the disk or quota is full.
        OSError: any other refusal of the system; names `path`.
    """
    with naming(path, len(data)):
        descriptor = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            step()
            before = os.fstat(descriptor).st_size
            if os.write(descriptor, data) < len(data):  # only a full disk cuts so small a write
                os.ftruncate(descriptor, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    cloud.appended(path, data)


def remove(path: Path) -> None:
    """Delete a file, if there is one: of a mirrored one the object first."""
    cloud.remove(path)


ZEROS = memoryview(bytes(2**22))


def reserve(descriptor: int, count: int, folder: Path) -> None:
    """Give an open file of `folder` `count` > 0 bytes of disk, zeros written in order.

    Mapped into memory without that, the file would end the process with a signal (SIGBUS) where the disk is full; and
    pages made in the order in which threads touch them lie scattered, which makes random rows a third slower.

    Raises:
        NoSpaceError: the disk or quota is full.
    """
    with naming(folder / "(a temporary file)", count):
        step()
        os.posix_fallocate(descriptor, 0, count)
        for start in range(0, count, len(ZEROS)):
            os.pwrite(descriptor, ZEROS[: count - start], start)


@contextmanager
def naming(path: Path, needed: int | None = None) -> Iterator[None]:
    """Make system errors name the file they are about: those of reading, writing and syncing do not by themselves.

    `needed` is the number of bytes about to be written.

    Raises:
        NoSpaceError: instead of a system error that says so.
    """
    try:
        yield
    except KcdcacheError:
        raise
    except OSError as error:
        raise _explained(error, path, needed) from error


def read_bytes(path: Path, most: int = MOST_FILE_BYTES) -> bytes:
    """Return a file's content.

    Raises:
        NotFoundError: there is no such file.
        UnsafeError: it is no plain file, or has more than `most` bytes (by default: than any file of ours).
        OSError: the system refuses or fails to read it; names `path`.
    """
    with naming(path):
        return read_bounded(path, most)


def holds(path: Path, data: bytes) -> bool:
    """Return whether a plain file has exactly this content; a larger one is not read."""
    try:
        return read_bytes(path, len(data)) == data
    except (NotFoundError, UnsafeError):
        return False


def read_json(path: Path) -> Any:
    """Return the JSON value in a file.

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: the file is not JSON.
        UnsafeError: it is no plain file, or larger than any record of ours; it is not read.
    """
    return parse_json(read_bytes(path, MOST_JSON_BYTES), path)


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """Return the JSON object in a file, which has at least these keys.

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: the file is not JSON, not an object, or lacks a key.
        UnsafeError: it is no plain file, or larger than any record of ours; it is not read.
    """
    return read_written(path, *keys)[0]


def read_written(path: Path, *keys: str) -> tuple[dict[str, Any], bytes]:
    """Return the JSON object in a file and the bytes it stands for, from one read: the file may change meanwhile.

    Raises:
        NotFoundError, CorruptionError, UnsafeError: as for `read_object`.
    """
    data = read_bytes(path, MOST_JSON_BYTES)
    found = parse_json(data, path)
    if not isinstance(found, dict):
        raise CorruptionError(f"{path} should hold a JSON object, found {type(found).__name__}")
    if missing := [key for key in keys if key not in found]:
        raise CorruptionError(f"{path} should have the key '{missing[0]}', found {', '.join(sorted(found)) or 'none'}")
    return found, data


def sealed_json(document: Mapping[str, Any]) -> bytes:
    """Return a document as canonical JSON with its own SHA-256 under `digest`, so that damage shows."""
    return canonical_json({**document, "digest": digest_of(document)})


def read_sealed(path: Path, *keys: str) -> dict[str, Any]:
    """Return the document that `sealed_json` wrote, without its digest; it has at least these keys.

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: it is not what was written.
    """
    found, data = read_written(path, *keys, "digest")
    document = {key: value for key, value in found.items() if key != "digest"}
    if found["digest"] != digest_of(document) or data != canonical_json(found):
        raise CorruptionError(f"{path} was changed: its content does not match its digest")
    return document


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete temporary files that killed writers left anywhere under `folder`; return their paths."""
    found = sorted(folder.rglob(f"*{TEMPORARY_MARK}*"))
    for path in found:
        path.unlink(missing_ok=True)
    return found


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; the system frees it when the process ends, however it ends.

    A mirrored folder is owned against other machines too, and brought up to date.

    Raises:
        LockedError: another process holds it, or another machine owns it; names that.
    """
    file = cloud.lock_file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a+", opener=open_own) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read(200).strip() or "another process"
            raise LockedError(f"{path.parent} is being written by {holder}; wait for it or stop it") from None
        me = f"process {os.getpid()} on {socket.gethostname()}".encode()
        with naming(path, len(me)):
            stream.truncate(0)
            os.write(stream.fileno(), me)  # nothing may wait in a buffer: closing would fail on it again
        with cloud.owned(path.parent):
            yield


def open_own(path: str | Path, flags: int) -> int:
    """Return a descriptor for writing a plain file in place, but never through a link: it could lead anywhere.

    Raises:
        UnsafeError: it is a link, a pipe or a device.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeError(f"{path} is a symbolic link; nothing is written through it, remove it") from None
        if error.errno == errno.ENXIO:
            raise UnsafeError(f"{path} is a pipe or a device; nothing is written to it, remove it") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnsafeError(f"{path} is a pipe or a device; nothing is written to it, remove it")
    return descriptor


def _temporary(path: Path) -> Path:
    """Return a name beside `path` that no other thread or process uses now."""
    return path.with_name(f"{path.name}{TEMPORARY_MARK}{os.getpid()}-{threading.get_ident()}")


def _place(
    path: Path,
    content: bytes | bytearray | memoryview | Callable[[Path], object],
    exclusive: bool,
) -> None:
    """Write a temporary file beside `path`, make it durable, and put it in place, if `exclusive` only of nothing."""
    temporary = _temporary(path)
    if cloud.is_mirrored(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path, None if callable(content) else memoryview(content).nbytes):
        try:
            step()
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content)
            step()
            _sync_file(temporary)
            step()
            cloud.place(temporary, path, exclusive=exclusive)
            step()
            sync_directory(path.parent)
            step()
        finally:
            with suppress(OSError):  # a read-only disk refuses even this
                temporary.unlink(missing_ok=True)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: OSError, path: Path, needed: int | None) -> OSError:
    if error.errno in FULL:
        told = f"{'' if needed is None else f' this write needs {needed:,} bytes,'} {_free(path)} are free"
        remedy = "free some and run the same command again to resume"
        return NoSpaceError(f"no space left to write {path}: {remedy} ({error.strerror}:{told})")
    return error if error.errno is None else OSError(error.errno, error.strerror, str(path))


def _free(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path.parent).free:,}"
    except OSError:
        return "an unknown number"


LOCK = "lock"
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
"""what the system says where a folder's name is taken"""


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, which is deleted in the end; first what killed processes left there is."""
    remove_orphans(path)
    folder = path.with_name(f"{path.name}{TEMPORARY_MARK}{os.getpid()}-set")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / LOCK):
            yield folder
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def place(folder: Path, path: Path, last: str) -> None:
    """Give a finished folder its name, durably, unless something is there already.

    In an object store, where no folder can be moved, its files are put there one by one, the one named `last` at last
    and only where none is: without it the folder is unfinished, and whoever comes next may write it.

    Raises:
        LockedError: something is.
    """
    if cloud.is_mirrored(path):
        _upload(folder, path, last)
        return
    with naming(path):
        step()
        try:
            os.rename(folder, path)
        except OSError as error:
            if error.errno in _TAKEN:
                raise LockedError(f"{path} exists already: another process wrote it first") from None
            raise
        sync_directory(path.parent)
        step()


def _upload(folder: Path, path: Path, last: str) -> None:
    taken = LockedError(f"{path} exists already: another process wrote it first")
    if path.is_file() or (path / last).exists():
        raise taken
    path.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        if file.name != last:
            cloud.place(file, path / file.name, exclusive=False)
    try:
        cloud.place(folder / last, path / last, exclusive=True)
    except FileExistsError:
        raise taken from None


def remove_orphans(path: Path) -> None:
    """Delete what killed writers of `path` left beside it; those that still run may need theirs."""
    for left in path.parent.glob(f"{glob.escape(path.name)}{TEMPORARY_MARK}*"):
        process = left.name.rpartition(TEMPORARY_MARK)[2].partition("-")[0]
        if not process.isdecimal() or process_runs(int(process)):
            continue
        if not left.is_dir():
            left.unlink(missing_ok=True)
            continue
        with suppress(LockedError), locked(left / LOCK):  # who holds it still writes, on another machine
            shutil.rmtree(left, ignore_errors=True)
