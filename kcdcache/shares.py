"""Which points of each batch one of several processes takes."""

from typing import NamedTuple


class Share(NamedTuple):
    """What one process takes of one batch."""

    mine: slice
    """points of the epoch: the batch's first where none is left for this process"""
    shared: int
    """points of all processes"""
    idle: bool
    """whether none is left for this process"""


def of_batches(count: int, start: int, batch_size: int, rank: int = 0, world: int = 1) -> list[Share]:
    """Return the shares of one process in the batches from number `start` on of an epoch of `count` points.

    >>> of_batches(5, 0, 3, rank=2, world=3)
    [Share(mine=slice(2, 3, 3), shared=3, idle=False), Share(mine=slice(3, 4, None), shared=2, idle=True)]
    """
    found = []
    for low in range(start * batch_size, count, batch_size):
        high = min(low + batch_size, count)
        idle = low + rank >= high
        mine = slice(low, low + 1) if idle else slice(low + rank, high, world)
        found.append(Share(mine, high - low, idle))
    return found
