"""Atomic durable writes, canonical JSON, digests and locks."""

import errno
import fcntl
import hashlib
import itertools
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kcdcache.errors import CorruptionError, LockedError, NoSpaceError, NotFoundError, UnsafeError

TEMPORARY_MARK = ".tmp-"
MOST_JSON_BYTES = 64 * 2**20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""what the system calls a full disk, an exhausted quota, and a file larger than allowed"""
CRASH_POINT = "KCDCACHE_CRASHPOINT"
"""environment variable: kill this process (SIGKILL) at the n-th step of the write protocol; for tests"""

_steps = itertools.count(1)


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


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits.

    Raises:
        NotFoundError: there is no such file.
    """
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise NotFoundError(f"no file at {path}") from None


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
    """

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as stream:
            stream.write(data)

    write_atomic_with(path, write)


def write_atomic_with(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then make it durable and rename it to `path`.

    Raises:
        NoSpaceError: the disk or quota is full; the old file is untouched.
    """
    temporary = _temporary(path)
    try:
        _step()
        write(temporary)
        _step()
        _sync_file(temporary)
        _step()
        os.replace(temporary, path)
        _step()
        sync_directory(path.parent)
        _step()
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _explained(error, path) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def create_exclusive(path: Path, data: bytes) -> None:
    """Write `path` durably, only if nothing is there yet: of several racing writers exactly one succeeds.

    Raises:
        LockedError: the file exists already.
        NoSpaceError: the disk or quota is full.
    """
    temporary = _temporary(path)
    try:
        _step()
        temporary.write_bytes(data)
        _step()
        _sync_file(temporary)
        _step()
        os.link(temporary, path)  # unlike rename, link fails when the name is taken
        _step()
        sync_directory(path.parent)
        _step()
    except FileExistsError:
        raise LockedError(f"{path} exists already: another process wrote it first") from None
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Return the JSON value in a file.

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: the file is not JSON.
        UnsafeError: it is larger than any record of ours; it is not read.
    """
    try:
        if (size := path.stat().st_size) > MOST_JSON_BYTES:
            raise UnsafeError(f"{path} has {size} bytes, a record at most {MOST_JSON_BYTES}; it is not read")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotFoundError(f"no file at {path}") from None
    except UnsafeError:
        raise
    except RecursionError:
        raise CorruptionError(f"{path} should hold JSON: it is nested too deeply") from None
    except ValueError as error:
        raise CorruptionError(f"{path} should hold JSON: {error}") from None


def read_object(path: Path, *keys: str) -> dict[str, Any]:
    """Return the JSON object in a file, which has at least these keys.

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: the file is not JSON, not an object, or lacks a key.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise CorruptionError(f"{path} should hold a JSON object, found {type(found).__name__}")
    if missing := [key for key in keys if key not in found]:
        raise CorruptionError(f"{path} should have the key '{missing[0]}', found {', '.join(sorted(found)) or 'none'}")
    return found


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete temporary files that killed writers left anywhere under `folder`; return their paths."""
    found = sorted(folder.rglob(f"*{TEMPORARY_MARK}*"))
    for path in found:
        path.unlink(missing_ok=True)
    return found


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; the system frees it when the process ends, however it ends.

    Raises:
        LockedError: another process holds it; names that process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            raise LockedError(f"{path.parent} is being written by {holder}; wait for it or stop it") from None
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        yield


def _temporary(path: Path) -> Path:
    """Return a name beside `path` that no other thread or process uses now."""
    return path.with_name(f"{path.name}{TEMPORARY_MARK}{os.getpid()}-{threading.get_ident()}")


def _step() -> None:
    """Pass one point of the write protocol; die here if a test asked for it."""
    if CRASH_POINT in os.environ and next(_steps) == int(os.environ[CRASH_POINT]):
        os.kill(os.getpid(), signal.SIGKILL)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explained(error: OSError, path: Path) -> OSError:
    if error.errno in FULL:
        return NoSpaceError(f"no space left to write {path}: free some and run the same command again to resume")
    return error
