import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcdcache import statistics

T_TWO = 4.302652729911275
"""97.5 % point of Student's t with 2 degrees of freedom: sqrt(2) * 0.95 / sqrt(1 - 0.95^2)"""
numbers = st.floats(-100, 100).map(lambda value: round(value, 3))


def test_the_interval_by_hand():
    found = statistics.difference({0: 0.71, 1: 0.73, 2: 0.69}, {0: 0.70, 1: 0.70, 2: 0.68})
    pairs = [0.01, 0.03, 0.01]
    mean = sum(pairs) / 3
    std = math.sqrt(sum((pair - mean) ** 2 for pair in pairs) / 2)
    reach = math.sqrt(2) * 0.95 / math.sqrt(1 - 0.95**2) * std / math.sqrt(3)
    assert found == pytest.approx((3, mean, std, mean - reach, mean + reach))
    assert math.sqrt(2) * 0.95 / math.sqrt(1 - 0.95**2) == pytest.approx(T_TWO)


def test_only_seeds_that_both_have_are_paired():
    found = statistics.difference({0: 1.0, 1: 5.0, 7: 90.0}, {0: 0.5, 1: 4.0, 3: -90.0})
    assert (found.n, found.mean) == (2, pytest.approx(0.75))
    assert statistics.difference({0: 1.0}, {1: 1.0}) is None


def test_one_pair_has_a_difference_and_no_interval():
    assert statistics.difference({4: 2.0}, {4: 1.5}) == (1, 0.5, None, None, None)


@given(st.lists(numbers, min_size=2, max_size=9))
def test_spread_is_numpys_with_n_minus_1(found):
    n, mean, std = statistics.spread(found)
    assert (n, mean, std) == pytest.approx((len(found), np.mean(found), np.std(found, ddof=1)), abs=1e-9)


def test_spread_of_one_and_of_none():
    assert statistics.spread([0.5]) == (1, 0.5, None)
    assert statistics.spread([]) == (0, None, None)
