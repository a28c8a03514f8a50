import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcdcache.condense import compare, manifest

sets = st.integers(1, 6).flatmap(
    lambda count: st.lists(st.lists(st.integers(0, 2), min_size=count, max_size=count), min_size=1, max_size=40)
).map(lambda samples: np.array(samples, np.int8).T)  # fmt: skip
"""parts of up to 40 samples in up to 6 sets"""


def fate_of(kept):
    """What became of one sample, by a walk over its stages."""
    was, dropped, back = False, False, False
    for now in kept:
        back = back or (now and dropped)
        dropped = dropped or (was and not now)
        was = was or now
    if not was:
        return "never"
    if back:
        return "returned" if kept[-1] else "unsteady"
    if all(kept):
        return "stayed"
    return "joined" if kept[-1] else "left"


@given(sets)
def test_every_sample_has_the_fate_of_its_own_walk(parts):
    found = compare.fates(parts)
    for sample in range(parts.shape[1]):
        fates = [fate for fate, mask in found.items() if mask[sample]]
        assert fates == [fate_of([bool(part) for part in parts[:, sample]])]


@given(sets)
def test_turnover_counts_one_by_one(parts):
    seen, before, expected = set(), set(), []
    for row in parts:
        now = {sample for sample, part in enumerate(row) if part}
        expected.append((len(now & before), len(before - now), len((now - before) & seen), len(now - seen)))
        seen, before = seen | now, now
    assert [tuple(row) for row in compare.turnover(parts)] == expected


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30))
def test_percentiles_count_what_lies_below(numbers):
    found = compare.percentiles(np.array(numbers, np.float32))
    for number, place in zip(numbers, found, strict=True):
        below = sum(other < number for other in numbers) + (numbers.count(number) - 1) / 2
        assert place == pytest.approx(below / max(1, len(numbers) - 1))


def chosen(index, count=10, mixed=()):
    index = np.array(index)
    columns = manifest.plain(index)
    enriched = np.isin(index, list(mixed))
    spare = np.setdiff1d(np.arange(count), index)
    columns["mixed"], columns["partner"] = enriched, np.where(enriched, spare[0] if len(spare) else 0, -1)
    rows = len(index)
    return manifest.Manifest(
        **columns, rank=np.arange(rows), value=np.zeros(rows, np.float32), visits=np.zeros(rows, np.int32),
        knowledge_id="k", count=count, stage=0, keep=rows / count, dropped=len(spare),
    )  # fmt: skip


def test_parts_say_dropped_kept_and_enriched():
    assert compare.parts([chosen([0]), chosen([2, 3], mixed=[3])])[:, :4].tolist() == [[1, 0, 0, 0], [0, 0, 1, 2]]
    assert compare.part_of(chosen([1, 4, 9], mixed=[4])).tolist() == [0, 1, 0, 0, 2, 0, 0, 0, 0, 1]


def test_hamming_is_what_one_set_keeps_and_the_other_does_not():
    a, b, c = (chosen(index) for index in ([0, 1, 2], [0, 1, 2], [2, 3]))
    assert compare.hamming([a, b, c]).tolist() == [[0, 0, 0.3], [0, 0, 0.3], [0.3, 0.3, 0]]


def test_distance_by_chance_is_that_of_random_sets():
    random, one, other = np.random.default_rng(0), chosen(range(7)), chosen(range(4))
    drawn = [
        len(set(random.permutation(10)[:7].tolist()) ^ set(random.permutation(10)[:4].tolist())) / 10
        for _ in range(9000)
    ]
    assert compare.by_chance(one, other) == pytest.approx(0.54)
    assert np.mean(drawn) == pytest.approx(0.54, abs=0.01)
