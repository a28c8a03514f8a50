from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kcdcache.condensation import schedule
from kcdcache.condensation.schedule import kept_count, plan
from kcdcache.errors import SettingsError

ROOT = 0.7 ** (1 / 6)
SPLITS = st.tuples(st.sampled_from(sorted(schedule.SCHEDULES)), st.integers(1, 8), st.integers(1, 8))


def fractions(name: str, keep: float = 0.7, stages: int = 6, base: float = 1.0) -> list[float]:
    return [stage.keep for stage in plan(name, 240, stages, keep, base)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("end_of_stage", [ROOT**s for s in range(6)]),
        ("alg1_shift", [ROOT**s for s in range(7)]),
        ("paper_stage", [ROOT ** (s + 1) for s in range(6)]),
        ("reference_linear", [1 - 0.05 * s for s in range(6)]),
        ("poster", [0.7 ** (s / 5) for s in range(6)]),
    ],
)
def test_fractions_are_those_of_the_paper_and_its_readings(name: str, expected: list[float]) -> None:
    assert fractions(name) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("given", "starts", "sources"),
    [
        (("alg1_shift", 240, 6, 0.7), [0, 1, 41, 81, 121, 161, 201], ["full"] + ["condensed"] * 6),
        (("alg1_shift", 3, 3, 0.5), [0, 1, 2], ["full"] + ["condensed"] * 2),
        (("paper_stage", 6, 3, 0.5), [0, 2, 4], ["random"] + ["condensed"] * 2),
        (("poster", 6, 1, 0.5), [0], ["full"]),
        (("alg1_shift", 240, 1, 0.9, 0.7), [0], ["given"]),
    ],
)
def test_stages_begin_and_get_their_sets_as_the_schedule_says(given: tuple, starts: list, sources: list) -> None:
    stages = plan(*given)
    assert [stage.start for stage in stages] == starts
    assert [stage.source for stage in stages] == sources


def test_a_given_set_with_one_stage_is_not_condensed_in_the_end() -> None:
    assert (schedule.export_keep(1, 0.9, 0.7), schedule.export_keep(1, 0.9)) == (None, 0.9)


@given(SPLITS, st.floats(0.05, 1), st.floats(0.05, 1))
@settings(max_examples=30, deadline=None)
def test_stages_cover_all_epochs_and_never_grow(split: tuple[str, int, int], first: float, second: float) -> None:
    name, count, length = split
    base, keep = max(first, second), min(first, second)
    stages = plan(name, count * length, count, keep, base)
    assert [s.number for s in stages] == list(range(len(stages)))
    assert [epoch for s in stages for epoch in range(s.start, s.stop)] == list(range(count * length))
    kept = [base] + [s.keep for s in stages] + [schedule.export_keep(count, keep, base) or base]
    assert all(kept_count(b, 10**6) <= kept_count(a, 10**6) for a, b in pairwise(kept))


def test_given_set_shrinks_from_its_own_size() -> None:
    assert fractions("end_of_stage", keep=0.35, stages=2, base=0.7) == pytest.approx([0.7, 0.7 * 0.5**0.5])
    assert fractions("reference_linear", keep=0.5, stages=2, base=0.7) == pytest.approx([0.7, 0.6])
    assert plan("end_of_stage", 6, 2, 0.35, base=0.7)[0].source == "given"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear", 240, 6, 0.7), "unknown schedule 'linear'; known: end_of_stage, alg1_shift"),
        (("poster", 240, 7, 0.7), "epochs must be a multiple of stages; found 240 epochs in 7 stages"),
        (("poster", 240, 0, 0.7), "found 240 epochs in 0 stages"),
        (("poster", 240, 6, 0.7, 0.5), "keep 0.7 exceeds the given set's share 0.5"),
        (("poster", 240, 6, 0.0), r"shares in \(0, 1\]; found keep 0.0"),
    ],
)
def test_impossible_plans_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        plan(*arguments)


def test_kept_counts_are_those_of_the_paper() -> None:
    assert [kept_count(0.7 ** (s / 6), 50000) for s in range(7)] == [50000, 47114, 44395, 41833, 39418, 37143, 35000]


@given(st.integers(1, 100), st.integers(0, 2_000_000))
@settings(deadline=None)
def test_kept_count_is_the_floor_of_the_decimal(percent: int, count: int) -> None:
    assert kept_count(percent / 100, count) == percent * count // 100


@given(st.floats(1e-6, 1), st.integers(1, 2_000_000))
@settings(deadline=None)
def test_kept_count_rounds_up_only_within_rounding_error(keep: float, count: int) -> None:
    exact = Fraction(keep) * count
    assert exact - 1 < kept_count(keep, count) <= min(count, exact * (1 + Fraction(1, 2**47)) + Fraction(1, 2**47))


@given(st.integers(1, 1000), st.integers(1000, 100000))
@settings(deadline=None)
def test_the_share_of_a_set_gives_its_size_back(size: int, count: int) -> None:
    assert kept_count(size / count, count) == size


@pytest.mark.parametrize(
    ("keep", "expected"), [(0.3, (0.525, 0.528, 0.642, 0.708)), (0.7, (0.816, 0.818, 0.866, 0.875))]
)
def test_expected_costs_are_those_of_the_facts(keep: float, expected: tuple) -> None:
    names = ("paper_stage", "alg1_shift", "end_of_stage", "reference_linear")
    costs = [schedule.expected_cost(plan(name, 240, 6, keep), 50000, 240) for name in names]
    assert costs == pytest.approx(expected, abs=0.0006)


@given(SPLITS, st.floats(0.05, 1))
@settings(max_examples=25, deadline=None)
def test_stretched_clock_counts_the_samples_consumed_before(split: tuple[str, int, int], keep: float) -> None:
    name, count, length = split
    stages, epochs = plan(name, count * length, count, keep), count * length
    per_epoch = [next(s.keep for s in stages if s.start <= epoch < s.stop) for epoch in range(epochs)]
    expected = [sum(per_epoch[:epoch]) / sum(per_epoch) * epochs for epoch in range(epochs)]
    np.testing.assert_allclose(schedule.stretched(stages, epochs), expected, rtol=1e-9, atol=1e-12)
