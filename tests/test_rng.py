import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kcdcache import rng

word = st.integers(0, 2**32 - 1)
VECTORS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


def reference(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 as the paper's figure draws it, in unbounded integers."""
    x, k = list(counter), list(key)
    for round_number in range(10):
        if round_number:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        first, second = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [second // 2**32 ^ x[1] ^ k[0], second % 2**32, first // 2**32 ^ x[3] ^ k[1], first % 2**32]
    return tuple(x)


def test_known_answers_of_random123():
    assert [rng.philox(counter, key) for counter, key, _ in VECTORS] == [expected for _, _, expected in VECTORS]


@given(st.tuples(word, word, word, word), st.tuples(word, word))
def test_philox_equals_the_reference_in_plain_integers(counter, key):
    arrays = rng.philox(tuple(np.array([c]) for c in counter), key)
    assert tuple(int(a[0]) for a in arrays) == reference(counter, key) == rng.philox(counter, key)


@given(st.integers(0, 2**64 - 1), st.lists(word, min_size=1, max_size=5), word, word)
def test_numpy_and_torch_give_equal_words(seed, index, view, draw):
    ours = rng.words(seed, np.array(index), rng.VIEW, view, draw)
    theirs = rng.words(seed, torch.tensor(index), rng.VIEW, view, draw)
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(ours, theirs, strict=True))
    assert np.array_equal(rng.unit(ours[0]), rng.unit(theirs[0]).numpy())


def test_the_address_is_the_key_and_the_counter():
    assert rng.words(0x0123456789ABCDEF, 5, rng.CROP, 6, 7) == reference((5, rng.CROP, 6, 7), (0x89ABCDEF, 0x01234567))


@pytest.mark.parametrize(
    ("seed", "index", "draw", "said"),
    [
        (0, np.array([0, 2**32]), 0, r"index must lie in \[0, 2\^32\)"),
        (0, torch.tensor([-1]), 0, "index must lie"),
        (0, 0, 2**32, "draw must lie"),
        (2**64, 0, 0, "a seed lies in"),
    ],
)
def test_addresses_outside_32_bits_are_refused(seed, index, draw, said):
    with pytest.raises(ValueError, match=said):
        rng.words(seed, index, rng.VIEW, draw=draw)


def test_purposes_keep_their_numbers():
    purposes = (rng.ORDER, rng.VIEW, rng.CROP, rng.INIT, rng.RANKING, rng.STAGE0, rng.STEP, rng.SAMPLE)
    assert purposes == (1, 2, 3, 4, 5, 6, 7, 8)


@given(word, st.integers(1, 2**31))
def test_below_and_unit_stay_in_range(value, n):
    assert rng.below(value, n) == value * n // 2**32
    assert 0 <= rng.below(value, n) < n
    assert rng.unit(value) == value / 2**32 < 1


@given(st.integers(0, 2**64 - 1), word, st.sets(word, max_size=20))
def test_epoch_order_sorts_by_each_samples_own_64_bit_word(seed, epoch, chosen):
    blocks = {i: rng.words(seed, i, rng.ORDER, view=epoch) for i in chosen}
    expected = sorted(blocks, key=lambda i: (blocks[i][1] * 2**32 + blocks[i][0], i))
    assert rng.epoch_order(seed, epoch, np.array(list(chosen), np.int64)).tolist() == expected


@pytest.mark.parametrize(("a", "b"), [(9, 18), (3, 6), (5, 5), (1, 2)])
def test_two_views_are_uniform_over_distinct_pairs(a, b):
    first, second = (rng.permuted(5, np.arange(40_000), view, a, b) for view in (0, 1))
    pair = (first[0] * b + first[1]) * a * b + second[0] * b + second[1]
    counts = np.bincount(pair, minlength=(a * b) ** 2).reshape(a * b, a * b)
    assert np.trace(counts) == 0
    for found in (counts.sum(0), counts.sum(1), counts[~np.eye(a * b, dtype=bool)]):
        assert stats.chisquare(found).pvalue > 1e-6


def test_seed_and_index_are_mixed_not_added():
    index = np.arange(1000)
    shifted = rng.permuted(8, index[:-1], 0, 9, 18), rng.permuted(7, index[1:], 0, 9, 18)
    same = np.mean((shifted[0][0] == shifted[1][0]) & (shifted[0][1] == shifted[1][1]))
    assert same < 0.03  # 1/162 by chance


def test_numpy_and_torch_permute_equally_and_no_view_is_beyond_the_set():
    ours, theirs = rng.permuted(1, np.arange(50), 7, 5, 10), rng.permuted(1, torch.arange(50), 7, 5, 10)
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(ValueError, match=r"view must lie in \[0, 18\); found 18"):
        rng.permuted(0, np.arange(3), 18, 3, 6)
