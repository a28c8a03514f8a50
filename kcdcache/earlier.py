"""What stages before mixed into samples, for those that keep it (mix_base = cumulative): pure arrays."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from kcdcache.manifest import Manifest


class Round(NamedTuple):
    """What one earlier stage mixed into some points of a batch."""

    where: Int64[np.ndarray, " some"]
    """their places in the batch, ascending"""
    partner: Int64[np.ndarray, " some"]
    epsilon: Float32[np.ndarray, " some"]
    """the partners' shares in [0, 1]"""


class Earlier:
    """The mixes of earlier stages, oldest first; false where there are none.

    A sample that an earlier stage mixed stays so: a later stage, in which it may be in K_1H, sees that mix, or mixes a
    partner into it. Partners are taken as they are in the data: what had been mixed into them is left out.

    Source: the paper's released code, which writes mixes over the data it trains on; facts.md A12, our reading of it.
    """

    def __init__(self, sets: Sequence[Manifest] = ()) -> None:
        self._rounds = [_by_sample(chosen) for chosen in sets if chosen.mixed.any()]

    def __bool__(self) -> bool:
        return bool(self._rounds)

    def rounds(self, index: Int64[np.ndarray, " batch"]) -> Iterator[Round]:
        """Yield what each earlier stage mixed into these samples, oldest first, stages that touched none left out."""
        for partner, epsilon in self._rounds:
            where = np.flatnonzero(partner[index] >= 0)
            if len(where):
                yield Round(where, partner[index[where]], epsilon[index[where]])

    def partners(self, index: Int64[np.ndarray, " kept"]) -> Int64[np.ndarray, " partners"]:
        """Return all samples that were mixed into these, ascending, each once."""
        found = [round_.partner for round_ in self.rounds(index)]
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)


NOTHING = Earlier()


def _by_sample(chosen: Manifest) -> tuple[Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Return each sample's partner (-1 for none) and the partner's share."""
    partner, epsilon = np.full(chosen.count, -1, np.int64), np.zeros(chosen.count, np.float32)
    mixed = chosen.mixed
    partner[chosen.index[mixed]], epsilon[chosen.index[mixed]] = chosen.partner[mixed], chosen.epsilon[mixed]
    return partner, epsilon
