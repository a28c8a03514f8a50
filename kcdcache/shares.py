"""Which points of each batch one of several processes takes."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64


class Share(NamedTuple):
    """What one process takes of one batch."""

    mine: slice
    """of its own points: its first one where none of the batch is left for it"""
    shared: int
    """points of all processes"""
    idle: bool
    """whether none is left for this process"""


class Deal(NamedTuple):
    """What one process takes of an epoch."""

    points: Int64[np.ndarray, " mine"] | slice
    """its own points among the epoch's, in their order"""
    batches: list[Share]


def deal(count: int, batch_size: int, rank: int = 0, world: int = 1) -> Deal:
    """Return what one process takes of an epoch of `count` points: rank, rank + world, ... of each batch.

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
        return Deal(slice(None), found)
    every = np.arange(count)
    mine = every[every % batch_size % world == rank]
    return Deal(mine if len(mine) else every[:1], found)
