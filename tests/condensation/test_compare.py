"""How condensed sets differ, against plain loops and laws."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kcdcache.condensation import compare, manifest, summary
from kcdcache.condensation.manifest import Samples
from kcdcache.condensation.values import Values
from kcdcache.errors import MismatchError
from kcdcache.settings import CondenseSettings

COUNT, CLASSES = 40, 4
NUMBERS = st.lists(st.integers(-3, 3), min_size=0, max_size=12)


def a_set(seed, keep=0.5, count=COUNT, unseen=0, **changes):
    """A condensed set of random values."""
    random = np.random.default_rng(seed)
    visits = np.ones(count, np.int32)
    visits[:unseen] = 0
    given = {"knowledge_id": "k", "labels": np.arange(count) % CLASSES, "classes": CLASSES} | changes
    found = Values(visits=visits, value=random.random(count, np.float32) * (visits > 0))
    return summary.condense(found, CondenseSettings(), Samples(count=count, **given), stage=1, keep=keep)


def slow_spearman(x, y):
    """Spearman's coefficient by its definition, one pair of numbers at a time."""
    places = []
    for numbers in (x, y):
        ranks = [sum(b < a for b in numbers) + (sum(b == a for b in numbers) - 1) / 2 for a in numbers]
        mean = sum(ranks) / len(ranks)
        places.append([rank - mean for rank in ranks])
    top = sum(a * b for a, b in zip(*places, strict=True))
    bottom = (sum(a * a for a in places[0]) * sum(b * b for b in places[1])) ** 0.5
    return top / bottom if bottom else None


@given(st.data(), NUMBERS)
@settings(max_examples=25)
def test_rank_correlation_is_spearmans(data, x):
    y = data.draw(st.lists(st.integers(-3, 3), min_size=len(x), max_size=len(x)))
    found = compare.spearman(np.array(x), np.array(y))
    wanted = slow_spearman(x, y) if len(x) > 1 else None
    assert found == (wanted if wanted is None else pytest.approx(wanted, abs=1e-12))


def slow_compare(a, b):
    """The same numbers by sets and loops."""
    kept = [dict(zip(s.index.tolist(), range(len(s)), strict=True)) for s in (a, b)]
    both = [i for i in range(a.count) if i in kept[0] and i in kept[1]]
    either = [i for i in range(a.count) if i in kept[0] or i in kept[1]]
    rows = [(kept[0][i], kept[1][i]) for i in both]
    seen = [(p, q) for p, q in rows if a.visits[p] and b.visits[q]]
    return {
        "samples": a.count,
        "kept_a": len(kept[0]),
        "kept_b": len(kept[1]),
        "both": len(both),
        "only_a": sum(i not in kept[1] for i in kept[0]),
        "only_b": sum(i not in kept[0] for i in kept[1]),
        "dropped_by_both": sum(i not in kept[0] and i not in kept[1] for i in range(a.count)),
        "jaccard": len(both) / len(either),
        "hamming": sum((i in kept[0]) != (i in kept[1]) for i in range(a.count)) / a.count,
        "rank_correlation": slow_spearman([a.rank[p] for p, _ in rows], [b.rank[q] for _, q in rows]),
        "value_correlation": slow_spearman([a.value[p] for p, _ in seen], [b.value[q] for _, q in seen]),
        "K_1H_to_K_Aug": sum(not a.mixed[p] and b.mixed[q] for p, q in rows),
        "K_Aug_to_K_1H": sum(a.mixed[p] and not b.mixed[q] for p, q in rows),
        "parts_moved": sum(a.mixed[p] != b.mixed[q] for p, q in rows),
        "mixed_in_both": sum(a.mixed[p] and b.mixed[q] for p, q in rows),
        "same_partner": sum(a.mixed[p] and b.mixed[q] and a.partner[p] == b.partner[q] for p, q in rows),
        "class_difference": [
            sum(i % CLASSES == c for i in kept[1]) - sum(i % CLASSES == c for i in kept[0]) for c in range(CLASSES)
        ],
        "same_knowledge": a.knowledge_id == b.knowledge_id,
        "identical": False,
    }


@pytest.mark.parametrize(("keep", "other", "unseen", "seed"), [(0.5, 0.5, 0, 0), (0.7, 0.6, 0, 1), (0.9, 0.65, 12, 2)])
def test_every_number_is_the_one_counted_by_hand(keep, other, unseen, seed):
    a, b = a_set(seed, keep), a_set(seed + 10, other, unseen=unseen, knowledge_id="other")
    found, wanted = compare.compare(a, b).model_dump(), slow_compare(a, b)
    assert found.pop("class_difference") == wanted.pop("class_difference")
    assert found == pytest.approx(wanted)
    assert compare.by_chance(a, b) == pytest.approx(keep + other - 2 * keep * other, abs=0.02)


def test_a_set_differs_in_nothing_from_itself():
    a = a_set(0, 0.7)
    found = compare.compare(a, a)
    assert (found.identical, found.jaccard, found.hamming, found.parts_moved) == (True, 1.0, 0.0, 0)
    assert found.same_partner == int(a.mixed.sum()) > 0


def test_what_cannot_be_said_is_none():
    a, b = a_set(0, labels=None), a_set(1)
    assert compare.compare(a, b).class_difference is None
    one = manifest.unranked(Samples("k", COUNT), np.array([3]), np.array([0]), keep=0.5)
    found = compare.compare(one, manifest.full(Samples("k", COUNT)))
    assert (found.both, found.rank_correlation, found.value_correlation) == (1, None, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": 44}, r"A is a set of data with samples 40, B with 44; compare sets of one data set"),
        ({"data_digest": "d2"}, r"data with data digest d1, B with d2"),
        ({"labels": np.arange(COUNT) % 5, "classes": 5}, r"data with classes 4, B with 5"),
    ],
    ids=["samples", "digest", "classes"],
)
def test_sets_of_other_data_are_not_compared(changes, said):
    given = {"data_digest": "d1"} | changes
    if "count" in given:
        given["labels"] = None
    with pytest.raises(MismatchError, match=said):
        compare.compare(a_set(0, data_digest="d1"), a_set(0, **given))


# over the stages of a run

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
    index, enriched = np.array(index), np.isin(index, list(mixed))
    spare = np.setdiff1d(np.arange(count), index)
    plain = manifest.unranked(
        Samples("k", count), index, np.arange(len(index)), keep=len(index) / count, dropped=len(spare)
    )
    return replace(plain, mixed=enriched, partner=np.where(enriched, spare[0], -1))


def test_parts_say_dropped_kept_and_enriched():
    assert compare.parts([chosen([0]), chosen([2, 3], mixed=[3])])[:, :4].tolist() == [[1, 0, 0, 0], [0, 0, 1, 2]]


def test_hamming_is_what_one_set_keeps_and_the_other_does_not():
    a, b, c = (chosen(index) for index in ([0, 1, 2], [0, 1, 2], [2, 3]))
    assert compare.hamming([a, b, c]).tolist() == [[0, 0, 0.3], [0, 0, 0.3], [0.3, 0.3, 0]]
