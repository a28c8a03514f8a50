"""A folder beside a result, in which it is made: locked while its process lives, and gone afterwards."""

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kcdcache import places
from kcdcache.crashpoints import step
from kcdcache.errors import LockedError
from kcdcache.files import TEMPORARY_MARK, locked, naming, process_runs, sync_directory

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
    if (mirror := places.of(path)) is not None:
        _upload(folder, path, last, mirror)
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


def _upload(folder: Path, path: Path, last: str, mirror: places.Mirror) -> None:
    taken = LockedError(f"{path} exists already: another process wrote it first")
    if path.is_file() or (path / last).exists():
        raise taken
    path.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        if file.name != last:
            mirror.place(file, path / file.name, exclusive=False)
    try:
        mirror.place(folder / last, path / last, exclusive=True)
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
