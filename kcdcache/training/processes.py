"""The processes of one training run under `torchrun`: their shares of a batch, and how they communicate."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int64, Shaped
from torch import Tensor

from kcdcache import environment
from kcdcache.errors import KcdcacheError, SettingsError, UnfinishedError
from kcdcache.networks.input_transform import resolve_device, use_threads
from kcdcache.runs import state
from kcdcache.runs.folder import RunFolder
from kcdcache.settings import MachineSettings

logger = logging.getLogger(__name__)


class Share(NamedTuple):
    """One process's share of one batch."""

    mine: slice
    """of its own points; the first one as a stand-in if `idle`"""
    shared: int
    """points of all processes"""
    idle: bool
    """whether no point is left for this process"""


LEAST = 2
"""samples of every batch for each process: batch statistics of one sample over a map of 1x1 do not exist"""


def batch_sizes(count: int, batch_size: int, world: int = 1) -> list[int]:
    """Return the sizes of the batches of `count` points: full ones, then the rest.

    A rest that would leave any of `world` processes fewer than two points joins the batch before it.

    >>> batch_sizes(66, 32), batch_sizes(65, 32), batch_sizes(66, 32, world=2), batch_sizes(1, 32)
    ([32, 32, 2], [32, 33], [32, 34], [1])
    """
    full, rest = divmod(count, batch_size)
    if full and 0 < rest < LEAST * world:
        return [batch_size] * (full - 1) + [batch_size + rest]
    return [batch_size] * full + [rest] * (rest > 0)


def deal(
    count: int, batch_size: int, rank: int = 0, world: int = 1, start: int = 0
) -> tuple[Int64[np.ndarray, " mine"] | slice, list[Share]]:
    """Return one process's points of an epoch of `count` (rank, rank + world, ... of each batch) and its shares.

    Every point belongs to one process. A process without any gets the first point as a stand-in. The first `start`
    points were taken already, perhaps by another number of processes: then what is left may be cut in another way.

    >>> points, batches = deal(7, 3, rank=1, world=2)
    >>> points.tolist(), batches[1]
    ([1, 4, 6], Share(mine=slice(1, 3, None), shared=4, idle=False))
    """
    done = start // batch_size if start < count else 0
    sizes = [batch_size] * done + batch_sizes(count - done * batch_size, batch_size, world)
    found, taken = [], 0
    for size in sizes:
        own = len(range(rank, size, world))
        found.append(Share(slice(taken, taken + own) if own else slice(0, 1), size, not own))
        taken += own
    if world == 1:
        return slice(None), found
    place, last = np.arange(count) % batch_size, sizes[-1] if sizes else 0
    place[count - last :] = np.arange(last)
    mine = np.flatnonzero(place % world == rank)
    return mine if len(mine) else np.arange(count)[:1], found


PATIENCE = timedelta(minutes=30)
"""waiting time within an epoch and at its end, where one process measures and writes"""
LONG_PATIENCE = timedelta(hours=6)
"""waiting time while one process condenses or runs the teacher on mixes"""
ENDED = (
    "closed by peer",
    "reset by peer",
    "was likely closed",
    "Broken pipe",
    "Timed out waiting",
    "wait timeout",
    "NCCL",
)
"""in torch's errors when another process is gone or does not answer"""
ABSENT = ("failed to connect", "failed to listen", "Timed out after", "getaddrinfo")
"""in torch's errors when processes do not meet in the first place"""


class Group:
    """The processes that train one student. All call the same methods in the same order."""

    def __init__(self, rank: int = 0, world: int = 1, waiting: dist.ProcessGroup | None = None) -> None:
        """Be process `rank` of `world`; `waiting` is their group for long waits."""
        self.rank, self.world, self._waiting = rank, world, waiting

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and reports progress."""
        return self.rank == 0

    def total(self, values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Return the sum over all processes."""
        if self.world == 1:
            return values
        found = values.clone()
        dist.all_reduce(found)
        return found

    def joined(self, rows: Shaped[Tensor, " rows"]) -> Shaped[Tensor, " all"]:
        """Return the rows of all processes in the order of their ranks; their numbers of rows may differ."""
        if self.world == 1:
            return rows
        sizes = torch.zeros(self.world, dtype=torch.int64, device=rows.device)
        sizes[self.rank] = len(rows)
        dist.all_reduce(sizes)
        padded = torch.zeros(int(sizes.max()), dtype=rows.dtype, device=rows.device)
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(found, padded)
        return torch.cat([part[:size] for part, size in zip(found, sizes.tolist(), strict=True)])

    def most(self, number: int) -> int:
        """Return the largest of all processes' numbers, without waiting for a device."""
        if self.world == 1:
            return number
        found = torch.tensor([number])
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.world > 1:
            dist.all_reduce(torch.zeros(1), group=self._waiting)


ALONE = Group()
DEFAULT_MACHINE = MachineSettings()


@contextmanager
def session(
    folder: RunFolder,
    settings: Mapping[str, Any],
    inputs: state.Inputs,
    machine: MachineSettings,
    group: Group,
) -> Iterator[torch.device | None]:
    """Open a run's folder while a group trains there; yield the device, or None if the run is already finished.

    The first process locks the folder and begins or continues its record; see `state.session`.
    """
    finished = folder.is_complete(folder.summary)
    group.wait()  # all have read the folder before the first writes
    if finished:
        if group.first:
            state.start(folder, settings, inputs)
        yield None
    elif group.first:
        with state.session(folder, settings, inputs, machine, group.world) as device:
            yield device
    else:
        use_threads(machine.threads)
        yield resolve_device(machine.device)


def take_own_gpu(variables: Mapping[str, str] = os.environ) -> None:
    """Make the GPU that torchrun meant for this process the current one: number LOCAL_RANK, modulo the GPUs here."""
    if torch.cuda.is_available() and environment.torchrun_place(variables).total > 1:
        torch.cuda.set_device(int(variables["LOCAL_RANK"]) % torch.cuda.device_count())


@contextmanager
def group_of(variables: Mapping[str, str] = os.environ) -> Iterator[Group]:
    """Yield the group in which torchrun started this process, with gloo for CPU tensors and NCCL for CUDA ones.

    Raises SettingsError for invalid variables, and UnfinishedError if another process has ended or does not answer.
    """
    rank, world, _ = environment.torchrun_place(variables)
    environment.note_unused(variables)
    if world == 1:
        yield ALONE
        return
    port = variables.get("MASTER_PORT", "")
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise SettingsError(
            f"MASTER_PORT is {port!r}, expected the port where the processes of torchrun meet, 1 to 65535; start them "
            "with `torchrun --nproc-per-node N -m kcdcache train ...`"
        )
    where = f"{variables['MASTER_ADDR']}:{port}"
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        take_own_gpu(variables)
    logger.info("process %d of %d is waiting for the others at %s", rank, world, where)
    with _others_there(rank, where):
        dist.init_process_group(backend, timeout=PATIENCE)
        try:
            waiting = dist.new_group(backend="gloo", timeout=LONG_PATIENCE)
            yield Group(rank, world, waiting if isinstance(waiting, dist.ProcessGroup) else None)
        finally:
            dist.destroy_process_group()


@contextmanager
def _others_there(rank: int, where: str) -> Iterator[None]:
    """Turn errors from the loss or absence of another process into UnfinishedError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, KcdcacheError) or not any(phrase in str(error) for phrase in (*ENDED, *ABSENT)):
            raise
        first = str(error).splitlines()[0]
        if any(phrase in first for phrase in ABSENT):
            raise UnfinishedError(
                f"process {rank} did not meet the others at {where}, which MASTER_ADDR and MASTER_PORT name: the first "
                f"must run on that machine, and the port be free there; nothing was begun ({first})"
            ) from error
        raise UnfinishedError(
            f"process {rank} lost another process of this run; see its own message, if it wrote one; the "
            f"same command resumes ({first})"
        ) from error
