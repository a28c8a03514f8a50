"""The processes of one training run under `torchrun`: which of them this is, what they add up and agree on."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from kcdcache.errors import SettingsError

PATIENCE = timedelta(hours=6)
"""one process condenses or asks the teacher again while the others wait"""


class Group:
    """The processes that train one student; of one alone, every method gives back what it is given.

    All processes call the same methods in the same order.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

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
        self.most(0)


ALONE = Group()


@contextmanager
def group_of(variables: Mapping[str, str] = os.environ) -> Iterator[Group]:
    """Yield the group that torchrun started this process in: CPU tensors by gloo, CUDA ones by NCCL.

    Raises:
        SettingsError: the launcher's variables are no place in a group.
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
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Group(int(rank), int(world))
    finally:
        dist.destroy_process_group()
