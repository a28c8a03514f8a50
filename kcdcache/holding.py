"""Who may write a store now: one process alone, or several that each hold a share of its parts."""

import fcntl
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from kcdcache import places
from kcdcache.errors import LockedError, NotFoundError, SettingsError, UnsafeError
from kcdcache.files import naming, open_own, read_bytes, remove_leftovers
from kcdcache.ledger import FOLDER
from kcdcache.untrusted import open_plain, require_no_links

logger = logging.getLogger(__name__)


class Shard(NamedTuple):
    """Parts number, number + total, number + 2 total, ... of a store."""

    number: int = 0
    total: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


WHOLE = Shard()
"""all parts"""


def parse_shard(text: str) -> Shard:
    """Return the shard that a text such as `0/4` names.

    Raises:
        SettingsError: it names none.

    >>> parse_shard("1/4")
    Shard(number=1, total=4)
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    shard = Shard(int(match[1]), int(match[2])) if match else Shard(0, 0)
    if not shard.number < shard.total:
        raise SettingsError(f"--shard takes I/N with 0 <= I < N, such as 0/4 to 3/4; found {text!r}")
    return shard


SCHEDULERS = (
    ("RANK", "WORLD_SIZE", None),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("SLURM_PROCID", "SLURM_NTASKS", None),
)
"""variables that torchrun, a SLURM array and srun set: this process's number, how many there are, the first number"""


def shard_of(variables: Mapping[str, str]) -> Shard:
    """Return the shard that the environment of a launcher (torchrun, a SLURM array, srun) makes this process; else all.

    Raises:
        SettingsError: a launcher's variables name no shard.

    >>> shard_of({"RANK": "3", "WORLD_SIZE": "8"})
    Shard(number=3, total=8)
    """
    for number, total, first in SCHEDULERS:
        if variables.get(total, "1") == "1" or number not in variables:
            continue
        given = {name: variables[name] for name in (number, total, first) if name is not None and name in variables}
        try:
            shard = Shard(int(variables[number]) - int(variables.get(first or "", "0")), int(variables[total]))
        except ValueError:
            shard = Shard(0, 0)
        if not 0 <= shard.number < shard.total:
            raise SettingsError(
                f"the environment has {given}, which names no shard of 0 to N - 1 (job arrays need a step of 1); give "
                "--shard I/N yourself"
            )
        logger.info("shard %s, from %s and %s", shard, number, total)
        return shard
    return WHOLE


@contextmanager
def held(root: Path, begin: Callable[[bool], None], shard: Shard = WHOLE) -> Iterator[None]:
    """Hold the parts of one shard of a store for writing.

    `begin(alone)` is called while no other process begins or leaves, with whether nobody else writes the store. What
    killed writers left is removed by whoever begins or leaves alone. The locks lie in the store; of a mirrored one they
    lie in the cache, and leases hold between machines.

    Raises:
        LockedError: another process holds these parts, or the store is being written in another number of shards.
        UnsafeError: a folder in the store is a symbolic link, through which other files could be changed.
    """
    require_no_links(root, files=False)
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    locks = _locks(root)
    with ExitStack() as stack:
        with _door(locks), places.door(root / FOLDER):
            whole = stack.enter_context(_open(locks / "lock"))
            mine = _take(root, whole, shard, stack)
            there = stack.enter_context(places.share(root / FOLDER / _lock_name(shard), partial(_rivals, shard)))
            alone = _locked(whole, fcntl.LOCK_EX)
            if alone:
                remove_leftovers(root)
            alone = alone and there
            begin(alone)
            if shard.total > 1:
                _locked(whole, fcntl.LOCK_SH)
        try:
            yield
        finally:
            with _door(locks):
                mine.truncate(0)
                if _locked(whole, fcntl.LOCK_EX):
                    remove_leftovers(root)
                    for path in _shard_locks(root):
                        path.unlink()


@contextmanager
def _door(locks: Path) -> Iterator[None]:
    """Let one process at a time begin or leave."""
    folder = os.open(locks, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _take(root: Path, whole: IO[bytes], shard: Shard, stack: ExitStack) -> IO[bytes]:
    """Lock what the shard needs and return the file that says who holds it."""
    if not _locked(whole, fcntl.LOCK_EX if shard.total == 1 else fcntl.LOCK_SH):
        raise LockedError(f"{root / FOLDER} is being written by {_holders(root)}; wait for it or stop it")
    mine = whole
    if shard.total > 1:
        _require_same_split(root, shard)
        mine = stack.enter_context(_open(_shard_lock(root, shard)))
        if not _locked(mine, fcntl.LOCK_EX):
            raise LockedError(f"shard {shard} of {root} is being written by {_holders(root)}; wait for it or stop it")
    me = f"process {os.getpid()} on {socket.gethostname()}".encode()
    with naming(Path(mine.name), len(me)):
        mine.truncate(0)
        os.write(mine.fileno(), me)
    return mine


def _require_same_split(root: Path, shard: Shard) -> None:
    for path in _shard_locks(root):
        with open_plain(path) as stream:
            if not path.name.endswith(f"-{shard.total}") and not _locked(stream, fcntl.LOCK_SH):
                raise LockedError(
                    f"{root} is being written in another number of shards ({path.name}, by {_holders(root)}), shard "
                    f"{shard} would share parts with it; wait, or give the same number"
                )


def _locks(root: Path) -> Path:
    """Return the folder of a store's lock files."""
    return places.lock_file(root / FOLDER / "lock").parent


def _lock_name(shard: Shard) -> str:
    return "lock" if shard.total == 1 else f"lock.{shard.number}-{shard.total}"


def _rivals(shard: Shard, name: str) -> bool:
    """Return whether another lock of a store must not be held beside a shard's."""
    return shard.total == 1 or not name.endswith(f"-{shard.total}")


def _shard_lock(root: Path, shard: Shard) -> Path:
    return _locks(root) / _lock_name(shard)


def _shard_locks(root: Path) -> list[Path]:
    return sorted(_locks(root).glob("lock.*-*"))


def _holders(root: Path) -> str:
    texts = [_holder(path) for path in (_locks(root) / "lock", *_shard_locks(root))]
    return ", ".join(text for text in texts if text) or "another process"


def _holder(path: Path) -> str:
    try:
        return read_bytes(path, 1000).decode(errors="replace").strip()
    except (NotFoundError, UnsafeError):
        return ""


def _open(path: Path) -> IO[bytes]:
    return open(path, "a+b", opener=open_own)


def _locked(stream: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
