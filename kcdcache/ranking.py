"""Exact orders of many scores, ties by position: packed with their positions into 64-bit words and sorted in place."""

import numpy as np
from jaxtyping import Float32, Int64, Integer, UInt32, UInt64

from kcdcache.errors import NonFiniteError, SettingsError

MOST_POSITIONS = 2**32
"""what half a word can tell apart"""
BYTES_A_SAMPLE = 8
"""memory of a ranker"""
_AT_ONCE = 2**16
"""scores packed in one go, so that what stands between stays in the processor's cache"""
_LOW = np.uint64(MOST_POSITIONS - 1)


def keys(score: Float32[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
    """Return 32-bit keys that are in ascending order where the scores are in descending order, -0 equal to 0.

    Raises:
        NonFiniteError: a score is NaN; infinities are fine.
    """
    if np.isnan(score).any():
        raise NonFiniteError(f"the score at position {np.argmax(np.isnan(score))} is NaN, expected a number")
    bits = (score + np.float32(0)).view(np.uint32)  # adding 0 makes -0 and +0 tie
    flipped = (bits.view(np.int32) >> 31).view(np.uint32) | np.uint32(1 << 31)  # all bits of negative numbers
    return ~(bits ^ flipped)


def order_of(score: Float32[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Return positions from the highest score to the lowest, ties by position, as a `Ranker` orders them.

    Raises:
        NonFiniteError: a score is NaN; infinities are fine.
    """
    ranker = Ranker(len(score))
    ranker.add(np.arange(len(score)), score)
    return ranker.ranked()[0].astype(np.int64)


class Ranker:
    """Orders the scores of up to `count` samples that come in blocks, in 8 bytes for each."""

    def __init__(self, count: int) -> None:
        """Begin.

        Raises:
            SettingsError: there are more samples than can be ranked.
        """
        if count > MOST_POSITIONS:
            raise SettingsError(
                f"{count} samples cannot be ranked, at most {MOST_POSITIONS} can; select without ranks "
                "(kcdcache.selection)"
            )
        self._words = np.empty(count, np.uint64)
        self._filled = 0

    def add(self, index: Integer[np.ndarray, " n"], score: Float32[np.ndarray, " n"]) -> None:
        """Take the scores of some more samples.

        Raises:
            NonFiniteError: a score is NaN.
        """
        pack(self._words[self._filled : self._filled + len(index)], score, index)
        self._filled += len(index)

    def ranked(self) -> tuple[UInt32[np.ndarray, " n"], UInt32[np.ndarray, " count"]]:
        """Return the samples from the highest score to the lowest, ties by index, and room for one number for each.

        Both lie in the memory the ranker had; it is of no use afterwards.
        """
        words = self._words[: self._filled]
        words.sort()
        halves = self._words.view(np.uint32)
        for start in range(0, len(words), _AT_ONCE):  # always behind what is still to be read
            halves[start : min(start + _AT_ONCE, len(words))] = words[start : start + _AT_ONCE] & _LOW
        return halves[: len(words)], halves[len(self._words) :]


def pack(words: UInt64[np.ndarray, " n"], score: Float32[np.ndarray, " n"], index: Integer[np.ndarray, " n"]) -> None:
    """Fill words with the key of each score above the index, so that they sort as a `Ranker` does.

    Raises:
        NonFiniteError: a score is NaN.
    """
    for start in range(0, len(words), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        try:
            words[some] = keys(score[some])
        except NonFiniteError:
            keys(score)  # names the position in all of them
            raise
        words[some] <<= np.uint64(32)
        words[some] |= index[some].astype(np.uint64)
