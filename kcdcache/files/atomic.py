"""Files that are whole or absent, read only if plain and of bounded size; and locks that name their holder."""

import errno
import glob
import hashlib
import os
import shutil
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from filelock import FileLock, Timeout

from kcdcache.errors import KcdcacheError, LockedError, NotFoundError, UnsafeError
from kcdcache.files import cloud
from kcdcache.interrupt import step

FULL, TEMPORARY_MARK = cloud.FULL, cloud.TEMPORARY_MARK
MOST_FILE_BYTES = 16 * 2**30
"""largest file read whole, such as a checkpoint"""
LOCK = "lock"
Content = bytes | bytearray | memoryview


def open_plain(path: Path) -> BufferedReader:
    """Open a plain file for reading, also through a link; pipes and devices are refused without waiting for them.

    Raises NotFoundError if there is no file, UnsafeError if it is not plain.
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
        raise NotFoundError(f"no file at {path}: a folder is there ({found_at(Path(path))}); give a file in it")
    raise UnsafeError(f"{path} is a pipe or a device, expected a plain file; it is not read")


MARKS = {
    "_kcd/identity.json": "a store",
    "condensed.json": "an exported set",
    "run.json": "a run",
    "model.json": "a network",
    "student.json": "a network",
}
"""files by which our folders are known"""


def found_at(path: Path) -> str:
    """Return what is at a path, as messages say it.

    >>> found_at(Path("/nowhere"))
    'found nothing there'
    """
    if not path.exists():
        return "found nothing there"
    if path.is_dir():
        known = (what for mark, what in MARKS.items() if (path / mark).exists())
        return f"found {next(known, 'a folder of other files')}"
    return f"found a file{' of parquet' * (path.suffix == '.parquet')}"


@contextmanager
def _bounded(path: Path, most: int | None) -> Iterator[BufferedReader]:
    with naming(path), open_plain(path) as stream:
        if most is not None and (size := os.fstat(stream.fileno()).st_size) > most:
            raise UnsafeError(f"{path} has {size} bytes, expected at most {most}; it is not read")
        yield stream


def read_bytes(path: Path, most: int = MOST_FILE_BYTES) -> bytes:
    """Return a file's content; raises UnsafeError if it has more than `most` bytes."""
    with _bounded(path, most) as stream:
        return stream.read(os.fstat(stream.fileno()).st_size)


def holds(path: Path, data: bytes) -> bool:
    """Check whether a plain file has exactly this content; a larger one is not read."""
    try:
        return read_bytes(path, len(data)) == data
    except (NotFoundError, UnsafeError):
        return False


def sha256_bytes(data: Content) -> str:
    """Return the SHA-256 of `data` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path, most: int | None = None) -> str:
    """Return the SHA-256 of a file's content as 64 hexadecimal digits."""
    with _bounded(path, most) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomic(path: Path, data: Content) -> None:
    """Write `data` to `path` so that readers see the old file or the whole new one, even after a power loss.

    Raises NoSpaceError if the disk or quota is full, other OSErrors with the path; the old file is untouched.
    """
    _place(path, data, exclusive=False)


def create_exclusive(path: Path, content: Content | Callable[[Path], object]) -> None:
    """Write `path` durably if it does not exist; of several racing writers one succeeds, others get LockedError.

    `content` is bytes, or a function that writes them to the temporary file it is given.
    """
    try:
        _place(path, content, exclusive=True)
    except FileExistsError:
        raise _taken(path) from None


def move(source: Path, path: Path) -> None:
    """Move a finished, durable file over another on the same disk, and in its bucket if mirrored."""
    cloud.place(source, path, exclusive=False)
    sync(path.parent)


def append(path: Path, data: bytes) -> None:
    """Append `data` to a file, created if missing, and unchanged after an error; not durable."""
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
    """Delete a file, if it exists; a mirrored file's object first."""
    cloud.remove(path)


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete all temporary files under a folder where no process is writing; return their paths."""
    found = sorted(folder.rglob(f"*{TEMPORARY_MARK}*"))
    for path in found:
        path.unlink(missing_ok=True)
    return found


def sync(path: Path) -> None:
    """Make a file durable, or a folder's names, so that a rename survives a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


ZEROS = memoryview(bytes(2**22))


def reserve(descriptor: int, count: int, folder: Path) -> None:
    """Give an open file of `folder` `count` > 0 bytes of disk, as zeros written in order.

    Without that, a full disk would end the process by SIGBUS once the file is mapped into memory; and pages written in
    the order of threads' accesses are scattered, which makes random rows a third slower.
    """
    with naming(folder / "(a temporary file)", count):
        step()
        os.posix_fallocate(descriptor, 0, count)
        for start in range(0, count, len(ZEROS)):
            os.pwrite(descriptor, ZEROS[: count - start], start)


@contextmanager
def naming(path: Path, needed: int | None = None) -> Iterator[None]:
    """Make system errors name the file `path`, and raise NoSpaceError for a full disk; `needed` are bytes to write."""
    try:
        yield
    except KcdcacheError:
        raise
    except OSError as error:
        if error.errno in FULL:
            needs = "" if needed is None else f" this write needs {needed:,} bytes,"
            raise cloud.no_space(f"to write {path}", f"{error.strerror}:{needs} {_free(path)} are free") from error
        raise error if error.errno is None else OSError(error.errno, error.strerror, str(path)) from error


def require_no_links(root: Path, files: bool = True) -> None:
    """Raise UnsafeError if a folder (or file) under `root` is a symbolic link: writing through one changes other files.

    `files` may be False if files are only ever replaced whole, which replaces the link.
    """
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names) if files else folders:
            if os.path.islink(path := os.path.join(folder, name)):
                raise UnsafeError(f"{path} is a symbolic link; nothing is written in a folder that holds one")


def open_own(path: str | Path, flags: int) -> int:
    """Open a plain file for writing in place; raises UnsafeError for links, pipes and devices."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
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


# Locks. The system frees one when its process ends, however it ends; the holder's name is in a file beside it.


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock `path`, and with it its folder; a mirrored folder is also owned against other machines and updated.

    Raises LockedError, with the name, if another process or machine holds it.
    """
    with lock(cloud.lock_file(path), str(path.parent)), cloud.owned(path.parent):
        yield


@contextmanager
def lock(file: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Hold a lock file of this machine for `what`; if another process holds it, `wait` or raise LockedError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with naming(file):
        os.close(open_own(file, os.O_RDWR | os.O_CREAT))
        held = FileLock(file)
        try:
            held.acquire(blocking=wait)
        except Timeout:
            raise LockedError(f"{what} is being written by {holder(file)}; wait for it or stop it") from None
    name = _holder_file(file)
    try:
        if not wait:
            with naming(name), open(open_own(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as stream:
                stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        if not wait:
            name.unlink(missing_ok=True)
        held.release()


def is_locked(file: Path) -> bool:
    """Check whether a process of this machine holds a lock file; one that cannot be written is not held."""
    try:
        os.close(open_own(file, os.O_RDWR))
        with FileLock(file, blocking=False):
            return False
    except Timeout:
        return True
    except OSError:
        return False


def holder(file: Path) -> str:
    """Return the holder of a lock file, in its own words."""
    try:
        return read_bytes(_holder_file(file), 1000).decode(errors="replace").strip() or "another process"
    except (NotFoundError, UnsafeError):
        return "another process"


def _holder_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.holder")


# Folders that are whole or absent.


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, deleted at the end; leftovers of killed processes are deleted first."""
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
    """Rename a finished folder to `path`, durably; raises LockedError if that exists.

    In an object store, which cannot rename, its files are uploaded one by one, the one named `last` at last and only if
    it does not exist: a folder without it is unfinished, and the next writer may complete it.
    """
    if cloud.is_mirrored(path):
        _upload(folder, path, last)
        return
    with naming(path):
        step()
        try:
            os.rename(folder, path)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise _taken(path) from None
            raise
        sync(path.parent)
        step()


def _upload(folder: Path, path: Path, last: str) -> None:
    if path.is_file() or (path / last).exists():
        raise _taken(path)
    path.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir(), key=lambda file: (file.name == last, file.name)):
        try:
            cloud.place(file, path / file.name, exclusive=file.name == last)
        except FileExistsError:
            raise _taken(path) from None


def remove_orphans(path: Path) -> None:
    """Delete what killed writers of `path` left beside it, but nothing of running ones."""
    for left in path.parent.glob(f"{glob.escape(path.name)}{TEMPORARY_MARK}*"):
        if not cloud.is_orphan(left.name):
            continue
        if not left.is_dir():
            left.unlink(missing_ok=True)
            continue
        with suppress(LockedError), locked(left / LOCK):  # who holds it still writes, on another machine
            shutil.rmtree(left, ignore_errors=True)


def _taken(path: Path) -> LockedError:
    return LockedError(f"{path} exists already: another process wrote it first")


def _place(path: Path, content: Content | Callable[[Path], object], exclusive: bool) -> None:
    """Write a temporary file beside `path`, make it durable, and move it there; `exclusive`: only if nothing is."""
    temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}{os.getpid()}-{threading.get_ident()}")
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
            sync(temporary)
            step()
            cloud.place(temporary, path, exclusive=exclusive)
            step()
            sync(path.parent)
            step()
        finally:
            with suppress(OSError):  # a read-only disk refuses even this
                temporary.unlink(missing_ok=True)


def _free(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path.parent).free:,}"
    except OSError:
        return "an unknown number"
