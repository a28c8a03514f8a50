"""Processes that do one piece of work on arrays together: what they add up, tell and hand each other; no torch."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int64, Shaped

Columns = Mapping[str, Shaped[np.ndarray, " rows"]]


class Team:
    """A process alone, to which every method gives back what it is given; `gloo.Gloo` is one of several.

    All processes call the same methods in the same order.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def first(self) -> bool:
        """Whether this process is the one that does what only one may do."""
        return self.rank == 0

    def total(self, numbers: Int64[np.ndarray, "..."]) -> Int64[np.ndarray, "..."]:
        """Return the sum over all processes."""
        return numbers

    def each(self, numbers: Int64[np.ndarray, "..."]) -> Int64[np.ndarray, "world ..."]:
        """Return the numbers of all processes, which have as many of them, in the order of their ranks."""
        return numbers[None]

    def told(self, data: bytes) -> bytes:
        """Return what the first process gives."""
        return data

    def dealt(self, columns: Columns, to: Shaped[np.ndarray, " rows"]) -> dict[str, np.ndarray]:
        """Return the rows that all processes have for this one; `to` is the process each of these rows goes to.

        They come in the order of their senders, and of each sender in its own.
        """
        return dict(columns)

    def most(self, number: int) -> int:
        """Return the largest of all processes' numbers."""
        return int(self.each(np.array([number])).max())

    def wait(self) -> None:
        """Return when all processes are here."""
        self.most(0)


ALONE = Team()
