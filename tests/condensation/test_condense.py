import logging
import math
from typing import Any

import numpy as np
import pytest
from condensing import OPTIONS
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kcdcache import rng
from kcdcache.condensation import manifest, summary, values
from kcdcache.condensation.manifest import Manifest, Samples
from kcdcache.condensation.summary import condense, partition, random_stage
from kcdcache.condensation.values import Values
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.settings import CondenseSettings

KNOWLEDGE = "k" * 64


def make(visits: list[int], value: list[float]) -> Values:
    return Values(np.array(visits, np.int32), np.array(value, np.float32))


def distinct(count: int) -> Values:
    """Values whose ranking is count - 1, ..., 0."""
    return Values(np.ones(count, np.int32), np.arange(count, dtype=np.float32))


def run(
    known: Values, keep: float, previous: Manifest | None = None, labels: Any = None, excluded: Any = (),
    stage: int = 2, **options: Any,
) -> Manifest:  # fmt: skip
    samples = Samples(KNOWLEDGE, len(known.visits), labels, excluded=np.array(excluded, np.int64))
    return condense(known, CondenseSettings(**options), samples, stage=stage, keep=keep, previous=previous)


def rows_of(made: Manifest) -> list[tuple]:
    columns = (made.index, made.mixed, made.partner, made.epsilon, made.rank, made.value, made.visits)
    return list(zip(*[column.tolist() for column in columns], strict=True))


def slow_order(case: dict[str, Any], option: CondenseSettings) -> list[int]:
    """Candidates, best first, by sorting Python tuples."""
    everyone = range(case["count"])
    members = case["members"] if option.candidates == "current" and case["members"] is not None else everyone
    members = [index for index in members if index not in case["excluded"]]

    def key(index: int) -> tuple:
        if option.ranking == "random":
            words = rng.words(option.condense_seed, index, rng.RANKING, view=case["stage"])
            return (*(int(word) for word in words[:2]), index)
        visits, value = case["visits"][index], case["value"][index]
        if visits == 0:
            return (-math.inf if option.unseen == "first" else math.inf, index)
        return (-float(np.float32(value * float(visits) ** option.cost_exponent)), index)

    return sorted(members, key=key)


def slow_kept(case: dict[str, Any], option: CondenseSettings, order: list[int], size: int) -> list[int]:
    if not option.stratify:
        return order[:size]
    classes = {label: [index for index in order if case["labels"][index] == label] for label in sorted(case["labels"])}
    quota = {label: size * len(group) // len(order) for label, group in classes.items()}
    by_remainder = sorted(classes, key=lambda label: (-(size * len(classes[label]) % len(order)), label))
    for label in by_remainder[: size - sum(quota.values())]:
        quota[label] += 1
    chosen = {index for label, group in classes.items() for index in group[: quota[label]]}
    return [index for index in order if index in chosen]


def slow_epsilon(option: CondenseSettings, i: int, pairs: int) -> float:
    if option.eps_grid == "zero_based":
        return option.eps_max * i / pairs
    if option.eps_grid == "one_based":
        return option.eps_max * (i + 1) / pairs
    if option.eps_grid == "inclusive":
        return option.eps_max * i / (pairs - 1) if pairs > 1 else 0.0
    return option.eps_max


def slow_condense(case: dict[str, Any], option: CondenseSettings) -> tuple[list[tuple], int]:
    """Rows (index, mixed, partner, epsilon, rank, value, visits) by index, and the size of K_0."""
    order, size = slow_order(case, option), case["size"]
    kept = slow_kept(case, option, order, size)
    dropped = [index for index in order if index not in kept]
    if option.k0 == "stage_slice":
        before = case["count"] if case["members"] is None else len(case["members"])
        dropped = dropped[: max(0, before - size)]
    pairs = min(len(kept), len(dropped)) if option.augment_kept else 0
    partner = {kept[len(kept) - pairs + i]: (dropped[i], slow_epsilon(option, i, pairs)) for i in range(pairs)}
    rows = []
    for index in sorted(kept):
        other, epsilon = partner.get(index, (-1, 0.0))
        value = case["value"][index] if case["visits"][index] else 0.0
        rows.append((index, index in partner, other, epsilon, order.index(index), value, case["visits"][index]))
    return rows, len(dropped)


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    count = draw(st.integers(1, 40))
    column = lambda items: draw(st.lists(items, min_size=count, max_size=count))  # noqa: E731
    few = st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0])
    members = draw(st.none() | st.sets(st.integers(0, count - 1), min_size=1).map(sorted))
    case: dict[str, Any] = {"count": count, "members": members}
    left_out = draw(st.just(set()) | st.sets(st.integers(0, count - 1), max_size=count - 1))
    case["excluded"] = sorted(left_out - set(members or [])) if draw(st.booleans()) else sorted(left_out)
    case["visits"] = column(st.sampled_from([0, 0, 1, 2, 7]))
    case["value"] = column(few | st.floats(-1e9, 1e9, width=32))
    case["labels"] = column(st.integers(0, 4))
    case["size"] = draw(st.integers(1, count) | st.just(count) | st.just(1))
    case["stage"] = draw(st.integers(1, 9))
    return case


OPTIONS |= {name: st.booleans() for name in ("augment_kept", "stratify")}
OPTIONS |= {"eps_max": st.floats(0, 1), "cost_exponent": st.just(0.0) | st.floats(0, 1)}
OPTIONS |= {"condense_seed": st.integers(0, 2**64 - 1)}
assert set(OPTIONS) == set(CondenseSettings.model_fields)


@given(cases(), st.fixed_dictionaries(OPTIONS))
@settings(max_examples=40)
def test_condense_equals_the_slow_reference(case: dict[str, Any], options: dict[str, Any]) -> None:
    option = CondenseSettings(**options)
    competing = len(slow_order(case, option))
    assume(competing > 0)
    case["size"] = min(case["size"], competing)
    made = run(
        make(case["visits"], case["value"]), case["size"] / case["count"], parent_of(case),
        np.array(case["labels"]), case["excluded"], case["stage"], **options,
    )  # fmt: skip
    expected, dropped = slow_condense(case, option)
    assert [row[:3] + row[4:] for row in rows_of(made)] == [row[:3] + row[4:] for row in expected]
    assert made.epsilon.tolist() == pytest.approx([row[3] for row in expected], rel=1e-6)
    kept_labels = [case["labels"][row[0]] for row in expected]
    assert made.dropped == dropped
    assert made.class_counts == tuple(kept_labels.count(label) for label in range(len(made.class_counts)))


def parent_of(case: dict[str, Any]) -> Manifest | None:
    if case["members"] is None:
        return None
    size, samples = len(case["members"]), Samples(KNOWLEDGE, case["count"])
    return manifest.unranked(samples, np.array(case["members"]), np.arange(size), keep=size / samples.count)


def test_manifest_records_where_it_comes_from() -> None:
    first = run(distinct(10), 0.8)
    second = run(distinct(10), 0.6, previous=first, eps_max=0.2)
    assert (second.parent, second.values, second.stage) == (first.digest, values.fingerprint(distinct(10)), 2)
    assert second.rule == CondenseSettings(eps_max=0.2).model_dump()


def test_more_dropped_than_kept_points_are_logged_and_only_the_best_serve(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, summary.__name__):
        made = run(distinct(10), 0.3)
    assert "K_0 has 7 points, K_1 only 3: the best 3 of K_0 are mixed in" in caplog.text
    assert (made.mixed.all(), sorted(made.partner.tolist()), made.dropped) == (True, [4, 5, 6], 7)


def test_random_stage_keeps_a_seeded_sample_without_mixes() -> None:
    samples = Samples(KNOWLEDGE, 1000, np.arange(1000) % 2, 2)
    one, again, other = (random_stage(samples, keep=0.5, seed=seed) for seed in (0, 0, 1))
    assert one.digest == again.digest
    assert one.index.tolist() != other.index.tolist()
    assert (len(one), one.mixed.any(), one.dropped, sum(one.class_counts)) == (500, False, 500, 500)
    assert 200 < one.class_counts[0] < 300


def four(rows: int = 4, labels: Any = None, **more: Any) -> Manifest:
    return condense(distinct(rows), CondenseSettings(), Samples(KNOWLEDGE, 4, labels), stage=1, keep=0.5, **more)


@pytest.mark.parametrize(
    ("ask", "error", "said"),
    [
        (lambda: run(distinct(10), 0.05), SettingsError, "keep 0.05 of 10 samples keeps none; raise keep to at least"),
        (lambda: run(distinct(10), 0.9, previous=run(distinct(10), 0.5), candidates="current"), SettingsError,
         "keep 0.9 of 10 samples asks for 9, but only 5 compete"),
        (lambda: run(distinct(4), 0.5, stratify=True), SettingsError, "stratify needs the label of every sample"),
        (lambda: partition(np.arange(2), 1, np.array([0, -1])), SettingsError, "found a negative one"),
        (lambda: four(3), MismatchError, "expected values of the knowledge's 4 samples, found 3"),
        (lambda: four(labels=np.arange(3)), MismatchError, "expected labels of the knowledge's 4 samples, found 3"),
        (lambda: four(previous=manifest.full(Samples(KNOWLEDGE, 5))), MismatchError,
         "expected the previous manifest of the knowledge's 4 samples, found 5"),
    ],
)  # fmt: skip
def test_what_cannot_be_condensed_is_refused(ask: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        ask()


def test_a_random_stage_leaves_skipped_samples_out() -> None:
    whole = random_stage(Samples(KNOWLEDGE, 100), keep=0.5, seed=0)
    samples = Samples(KNOWLEDGE, 100, excluded=whole.index[:9])
    made = random_stage(samples, keep=0.5, seed=0)
    assert len(made) == 50
    assert set(whole.index[9:].tolist()) < set(made.index.tolist())
    assert not np.isin(whole.index[:9], made.index).any()
    inside = random_stage(samples, keep=0.3, seed=0, previous=whole)
    assert set(inside.index.tolist()) < set(whole.index[9:].tolist())
    assert inside.parent == whole.digest
    few = Samples(KNOWLEDGE, 10, excluded=np.array([0, 9]))
    assert random_stage(few, keep=1.0, seed=0).index.tolist() == list(range(1, 9))
    assert manifest.full(few).index.tolist() == list(range(1, 9))


def test_classes_that_lose_nearly_everything_are_told_of(caplog):
    labels = np.repeat(np.arange(4), 25)
    value = np.where(labels == 2, 0.1, 1.0).astype(np.float32)
    value[50] = 5.0  # one sample of the easy class stays
    held = Values(np.full(100, 3, np.int32), value)
    samples = Samples("k", 100, labels, 4)
    condense(held, CondenseSettings(), samples, stage=1, keep=0.76)
    text = "1 of 4 classes keep less than a tenth of their share (class 2: 1 of 25 samples); --stratify keeps the same"
    assert text in caplog.text
    caplog.clear()
    condense(held, CondenseSettings(stratify=True), samples, stage=1, keep=0.76)
    condense(held, CondenseSettings(), samples, stage=1, keep=1.0)
    assert "share" not in caplog.text
