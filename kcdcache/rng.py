"""Addressed random integers: Philox4x32-10 in plain 64-bit integer arithmetic.

A random number depends on its address (seed, index, purpose, view, draw) alone, not on state, order of calls or number
of workers. The map from address to Philox key and counter is injective: no two addresses share a block. Only operators
common to Python integers, numpy arrays and torch tensors are used, so all three give the same words.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11, and the Random123 library.
"""

from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

ORDER, VIEW, CROP, INIT, RANKING, STAGE0, STEP, SAMPLE, NOISE = range(1, 10)
"""purposes of an address; the numbers are part of every store's identity and never change"""

Integers = int | np.integer | Int64[Any, "..."]
Words = tuple[Integers, Integers, Integers, Integers]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_FEISTEL_ROUNDS = 12
_MASK = 0xFFFFFFFF


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Return the four 32-bit words of Philox4x32-10 for a counter of four and a key of two 32-bit words.

    Counters broadcast against each other. Source: Salmon et al., SC'11, section 3.3.

    >>> [hex(word) for word in philox((0, 0, 0, 0), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(seed: int, index: Integers, purpose: int, view: Integers = 0, draw: Integers = 0) -> Words:
    """Return the four random 32-bit words at an address, each with the broadcast shape of index, view and draw.

    Key = (low, high half of seed), counter = (index, purpose, view, draw). Raises ValueError unless seed is in
    [0, 2^64), the rest of the address in [0, 2^32), and all arrays are 64-bit.
    """
    if seed >> 64:
        raise ValueError(f"a seed lies in [0, 2^64); found {seed}")
    for name, value in (("index", index), ("purpose", purpose), ("view", view), ("draw", draw)):
        _require_word(name, value)
    return philox((index, purpose, view, draw), (seed & _MASK, seed >> 32))


def below(word: Integers, n: int) -> Integers:
    """Scale random words to integers in [0, n), n <= 2^31; probabilities differ from 1/n by at most 2^-32."""
    return (word * n) >> 32


def unit(word: Integers) -> float | Float64[Any, "..."]:
    """Convert random words to float64 in [0, 1), multiples of 2^-32."""
    return word * 2.0**-32 if isinstance(word, int | np.ndarray | np.integer) else word.double() * 2.0**-32


def epoch_order(seed: int, epoch: int, index: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Return the indices sorted by their random 64-bit word at (seed, index, epoch), ties by index.

    A subset has the same relative order as in the full set, in whatever order it is given.
    """
    low, high, _, _ = words(seed, index, ORDER, view=epoch)
    position = (np.asarray(high).astype(np.uint64) << np.uint64(32)) | np.asarray(low).astype(np.uint64)
    return index[np.lexsort((index, position))]


def permuted(seed: int, index: Integers, view: int, a: int, b: int) -> tuple[Integers, Integers]:
    """Return element `view` of the permutation of [0, a) x [0, b) keyed by (seed, index), as (left, right).

    A Feistel network on mixed radices: `left` and `right` are shifted in turn, modulo a and b, by random words
    addressed by the other half. Rounds are invertible, so the a*b views of an index are all elements, each once. Over
    indices one view is uniform, and two views are uniform over pairs of distinct elements up to min(a, b)^-6 (the
    probability that two views agree in one half in all rounds). With a or b = 1 the permutation is only a rotation.
    Raises ValueError unless view is in [0, a*b).

    Source: Black & Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, section 5 (generalised Feistel).
    """
    if not 0 <= view < a * b:
        raise ValueError(f"view must lie in [0, {a * b}); found {view}")
    left: Any = index * 0 + view // b
    right: Any = index * 0 + view % b
    for turn in range(0, _FEISTEL_ROUNDS, 2):
        left = (left + below(words(seed, index, VIEW, right, turn)[0], a)) % a
        right = (right + below(words(seed, index, VIEW, left, turn + 1)[0], b)) % b
    return left, right


def _product(a: int, b: Any) -> tuple[Any, Any]:
    # 32 x 32 -> 64 bits in signed int64: halves of 16 bits keep every intermediate below 2^49
    lower = (a & 0xFFFF) * b
    upper = (a >> 16) * b + (lower >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) + (lower & 0xFFFF)


def _require_word(name: str, value: Any) -> None:
    if getattr(value, "itemsize", 8) != 8:
        raise ValueError(f"{name} must be 64-bit integers; found {value.dtype}")
    outside = (value >> 32) != 0  # an arithmetic shift: negative numbers stay non-zero
    if outside.any() if hasattr(outside, "any") else outside:
        raise ValueError(f"{name} must lie in [0, 2^32); found {value}")
