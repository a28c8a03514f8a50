"""The processes of one training run under `torchrun`: which of them this is, what they add up and agree on."""

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

from kcdcache.errors import KcdcacheError, SettingsError, UnfinishedError
from kcdcache.networks.input_transform import resolve_device, use_threads
from kcdcache.runs import state
from kcdcache.runs.folder import RunFolder
from kcdcache.settings import MachineSettings


class Share(NamedTuple):
    """What one process takes of one batch."""

    mine: slice
    """of its own points: its first one where none of the batch is left for it"""
    shared: int
    """points of all processes"""
    idle: bool
    """whether none is left for this process"""


def deal(
    count: int, batch_size: int, rank: int = 0, world: int = 1
) -> tuple[Int64[np.ndarray, " mine"] | slice, list[Share]]:
    """Return one process's points of an epoch of `count`: rank, rank + world, ... of each batch; and each batch's.

    Every point belongs to one process. One that gets none at all is given the first point as a stand-in.

    >>> points, batches = deal(5, 3, rank=2, world=3)
    >>> points.tolist(), batches[0], batches[1]
    ([2], Share(mine=slice(0, 1, None), shared=3, idle=False), Share(mine=slice(0, 1, None), shared=2, idle=True))
    """
    found, taken = [], 0
    for low in range(0, count, batch_size):
        size = min(batch_size, count - low)
        own = len(range(rank, size, world))
        found.append(Share(slice(taken, taken + own) if own else slice(0, 1), size, not own))
        taken += own
    if world == 1:
        return slice(None), found
    every = np.arange(count)
    mine = every[every % batch_size % world == rank]
    return mine if len(mine) else every[:1], found


PATIENCE = timedelta(minutes=30)
"""of processes for each other within an epoch and at its end, where one measures and writes"""
LONG_PATIENCE = timedelta(hours=6)
"""one process condenses or asks the teacher again while the others wait"""
ENDED = ("closed by peer", "reset by peer", "was likely closed", "Broken pipe", "Timed out waiting", "NCCL")
"""what torch's errors say when another process is no longer there, or does not answer"""


class Group:
    """The processes that train one student; of one alone, every method gives back what it is given.

    All processes call the same methods in the same order.
    """

    def __init__(self, rank: int = 0, world: int = 1, waiting: dist.ProcessGroup | None = None) -> None:
        """Be number `rank` of `world` processes; `waiting` is their group for waits that may take long."""
        self.rank, self.world, self._waiting = rank, world, waiting

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and tells of progress."""
        return self.rank == 0

    def total(self, values: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Return the sum over all processes, the same in each."""
        if self.world == 1:
            return values
        found = values.clone()
        dist.all_reduce(found)
        return found

    def joined(self, rows: Shaped[Tensor, " rows"]) -> Shaped[Tensor, " all"]:
        """Return the rows of all processes, in the order of their ranks; each may have another number of them."""
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
        """Return the largest of all processes' numbers; the hosts agree on it, so that no device is waited for."""
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
    """Hold a run's folder while a group trains there; yield the device, or None where the run is finished already.

    The first process locks the folder and begins or continues its record.

    Raises:
        SettingsError, MismatchError, LockedError: as for `state.session`.
    """
    finished = folder.stands(folder.summary)
    group.wait()  # all have read what lies there before the first writes
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


@contextmanager
def group_of(variables: Mapping[str, str] = os.environ) -> Iterator[Group]:
    """Yield the group that torchrun started this process in: CPU tensors by gloo, CUDA ones by NCCL.

    Raises:
        SettingsError: the launcher's variables are no place in a group.
        UnfinishedError: another process has ended, or does not answer.
    """
    world, rank = variables.get("WORLD_SIZE", "1"), variables.get("RANK", "0")
    if world == "1":
        yield ALONE
        return
    if not (world.isdecimal() and rank.isdecimal() and int(rank) < int(world) and "MASTER_ADDR" in variables):
        raise SettingsError(
            f"WORLD_SIZE is {world!r} and RANK {rank!r}, which is no place among processes of torchrun; start it with "
            "`torchrun --nproc-per-node N -m kcdcache train ...`, or unset both"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(variables.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    with _others_there(rank):
        dist.init_process_group(backend, timeout=PATIENCE)
        try:
            waiting = dist.new_group(backend="gloo", timeout=LONG_PATIENCE)
            yield Group(int(rank), int(world), waiting if isinstance(waiting, dist.ProcessGroup) else None)
        finally:
            dist.destroy_process_group()


@contextmanager
def _others_there(rank: str) -> Iterator[None]:
    """Turn the loss of another process into an error that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, KcdcacheError) or not any(phrase in str(error) for phrase in ENDED):
            raise
        raise UnfinishedError(
            f"process {rank} lost another one of this run, whose own message, if it had time for one, says why; the "
            f"same command resumes ({str(error).splitlines()[0]})"
        ) from error
