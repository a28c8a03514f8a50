"""A team of processes under `torchrun` that hand each other arrays of the host's memory, by gloo."""

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int64, Shaped
from torch import Tensor

from kcdcache.team import Columns, Team


class Gloo(Team):
    """One of the processes of the default process group of torch."""

    def total(self, numbers: Int64[np.ndarray, "..."]) -> Int64[np.ndarray, "..."]:
        """Return the sum over all processes."""
        found = torch.from_numpy(numbers.copy())
        dist.all_reduce(found)
        return found.numpy()

    def each(self, numbers: Int64[np.ndarray, "..."]) -> Int64[np.ndarray, "world ..."]:
        """Return the numbers of all processes, which have as many of them, in the order of their ranks."""
        mine = torch.from_numpy(np.ascontiguousarray(numbers))
        found = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(found, mine)
        return torch.stack(found).numpy()

    def told(self, data: bytes) -> bytes:
        """Return what the first process gives."""
        size = self.most(len(data) if self.first else 0)
        found = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.first else torch.empty(size, dtype=torch.uint8)
        )
        dist.broadcast(found, 0)
        return found.numpy().tobytes()

    def dealt(self, columns: Columns, to: Shaped[np.ndarray, " rows"]) -> dict[str, np.ndarray]:
        """Return the rows that all processes have for this one; `to` is the process each of these rows goes to."""
        order = np.argsort(to, kind="stable")
        given = np.bincount(to, minlength=self.world).astype(np.int64)
        taken = torch.empty(self.world, dtype=torch.int64)
        dist.all_to_all_single(taken, torch.from_numpy(given))
        return {
            name: _dealt(np.ascontiguousarray(column[order]), given.tolist(), taken.tolist())
            for name, column in columns.items()
        }


def _dealt(column: Shaped[np.ndarray, " rows"], given: list[int], taken: list[int]) -> Shaped[np.ndarray, " others"]:
    size = column.itemsize
    received: Tensor = torch.empty(sum(taken) * size, dtype=torch.uint8)
    dist.all_to_all_single(
        received,
        torch.from_numpy(column.view(np.uint8)),
        [size * rows for rows in taken],
        [size * rows for rows in given],
    )
    return received.numpy().view(column.dtype)
