"""How two condensed sets differ, against plain loops and laws."""

import json

import numpy as np
import pytest
from commands import alone, failure, outcome
from exports import exporting, prepared
from hypothesis import given
from hypothesis import strategies as st
from pupils import SPEC

from kcdcache import progress
from kcdcache.commands import differ, steps
from kcdcache.condense import manifest, summary
from kcdcache.condense.values import Values
from kcdcache.errors import MismatchError, NotFoundError
from kcdcache.settings import CondenseSettings, TrainCommand, make

COUNT, CLASSES = 40, 4
NUMBERS = st.lists(st.integers(-3, 3), min_size=0, max_size=12)


def a_set(seed, keep=0.5, count=COUNT, unseen=0, **changes):
    """A condensed set of random values."""
    random = np.random.default_rng(seed)
    visits = np.ones(count, np.int32)
    visits[:unseen] = 0
    given = {"knowledge_id": "k", "stage": 1, "labels": np.arange(count) % CLASSES, "classes": CLASSES} | changes
    found = Values(visits=visits, value=random.random(count, np.float32) * (visits > 0))
    return summary.condense(found, CondenseSettings(), count=count, keep=keep, **given)


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
def test_rank_correlation_is_spearmans(data, x):
    y = data.draw(st.lists(st.integers(-3, 3), min_size=len(x), max_size=len(x)))
    found = differ.spearman(np.array(x), np.array(y))
    wanted = slow_spearman(x, y) if len(x) > 1 else None
    assert found == (wanted if wanted is None else pytest.approx(wanted, abs=1e-12))


@given(NUMBERS)
def test_rank_correlation_is_one_under_any_monotone_change(x):
    if len(set(x)) > 1:
        x = np.array(x, np.float64)
        assert differ.spearman(x, np.exp(x)) == pytest.approx(1)
        assert differ.spearman(x, -(x**3)) == pytest.approx(-1)


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


@pytest.mark.parametrize(("keep", "other", "unseen"), [(0.5, 0.5, 0), (0.7, 0.6, 0), (0.9, 0.65, 12)])
@pytest.mark.parametrize("seed", range(3))
def test_every_number_is_the_one_counted_by_hand(keep, other, unseen, seed):
    a, b = a_set(seed, keep), a_set(seed + 10, other, unseen=unseen, knowledge_id="other")
    found = differ.compare(a, b)
    wanted = slow_compare(a, b)
    assert found.pop("class_difference") == wanted.pop("class_difference")
    assert found == pytest.approx(wanted)


def test_a_set_differs_in_nothing_from_itself():
    a = a_set(0, 0.7)
    found = differ.compare(a, a)
    assert (found["identical"], found["jaccard"], found["hamming"], found["parts_moved"]) == (True, 1.0, 0.0, 0)
    assert (found["rank_correlation"], found["value_correlation"]) == (pytest.approx(1), pytest.approx(1))
    assert found["same_partner"] == int(a.mixed.sum()) > 0


def test_turned_around_it_says_the_same_of_the_other():
    a, b = a_set(1, 0.7), a_set(2, 0.5)
    there, back = differ.compare(a, b), differ.compare(b, a)
    for name in ("both", "jaccard", "hamming", "rank_correlation", "parts_moved", "same_partner", "dropped_by_both"):
        assert there[name] == pytest.approx(back[name])
    assert (there["only_a"], there["K_1H_to_K_Aug"]) == (back["only_b"], back["K_Aug_to_K_1H"])
    assert [-number for number in there["class_difference"]] == back["class_difference"]


def test_what_cannot_be_said_is_none():
    a, b = a_set(0, labels=None, classes=None), a_set(1)
    assert differ.compare(a, b)["class_difference"] is None
    one = manifest.Manifest(
        **manifest.plain(np.array([3])), rank=np.zeros(1, np.int64), value=np.zeros(1, np.float32),
        visits=np.zeros(1, np.int32), knowledge_id="k", count=COUNT, stage=0, keep=0.5,
    )  # fmt: skip
    found = differ.compare(one, manifest.full("k", COUNT))
    assert (found["both"], found["rank_correlation"], found["value_correlation"]) == (1, None, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": 44}, r"A is a set of data with samples 40, B with 44; compare sets of one data set"),
        ({"data_digest": "d2"}, r"data with data digest d1, B with d2"),
        ({"labels": np.arange(COUNT) % 5, "classes": 5}, "A counts 4 classes, B 5"),
    ],
    ids=["samples", "digest", "classes"],
)
def test_sets_of_other_data_are_not_compared(changes, said):
    given = {"data_digest": "d1"} | changes
    if "count" in given:
        given["labels"] = None
    with pytest.raises(MismatchError, match=said):
        differ.compare(a_set(0, data_digest="d1"), a_set(0, **given))


# of files


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two runs of one store, an exported set, and a manifest."""
    place = prepared(tmp_path_factory.mktemp("difference"), fields=("logits",))
    settings = {"student": "lessons:TinyNet", "epochs": 4, "batch_size": 64, "data": SPEC, "device": "cpu"}
    for name, stages, keep in (("one", 2, 0.5), ("two", 4, 0.4)):
        given = settings | {"store": place.knowledge.path, "out": place.root / name, "stages": stages, "keep": keep}
        steps.train(make(TrainCommand, given), progress.silent)
    exporting(place, place.root / "set")
    return place


def test_runs_are_compared_stage_by_stage(place):
    found = differ.run(place.root / "one", place.root / "two")
    assert list(found["stages"]) == ["0", "1", "2"]
    assert (found["only_in_a"], found["only_in_b"]) == ([], [3, 4])
    assert found["stages"]["0"]["identical"]
    for number in (1, 2):
        sets = [manifest.read(place.root / name / f"stages/{number}/manifest.parquet") for name in ("one", "two")]
        assert found["stages"][str(number)] == differ.compare(*sets)


def test_a_run_beside_a_set_is_its_last_one_and_an_export_its_manifest(place):
    wanted = differ.compare(manifest.read(place.root / "two/stages/4/manifest.parquet"), place.set)
    found = differ.run(place.root / "two", place.root / "set")
    assert {name: found[name] for name in wanted} == wanted
    assert differ.run(place.file, place.root / "set")["identical"]


def test_the_table_has_a_line_a_stage_and_no_torch_is_loaded(place):
    done = alone("diff", place.root / "one", place.root / "two")
    assert (done.returncode, done.stderr) == (0, "loaded: pydantic\n")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["stage", "0", "1", "2"]
    assert lines[2].split()[1:] == list(differ.COLUMNS)
    assert lines[3].split()[1:4] == ["200", "200", "200"]


def test_json_holds_every_number(capsys, place):
    code, out, _ = outcome(capsys, "diff", place.file, place.root / "set", "--json")
    found = json.loads(out)
    assert (code, found["kept_a"], found["jaccard"], found["class_difference"]) == (0, 80, 1.0, [0] * 10)


@pytest.mark.parametrize(
    ("other", "code", "said"), [("store", 4, "is a store; diff compares"), ("none", 10, "nothing at")]
)
def test_other_things_are_refused(capsys, place, other, code, said):
    found = failure(capsys, "diff", place.file, place.root / other)
    assert found[0] == code
    assert said in found[1]


def test_a_run_without_a_set_says_so(place, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")
    with pytest.raises(NotFoundError, match="has no condensed set yet"):
        differ.run(tmp_path / "run", place.file)
    with pytest.raises(NotFoundError, match="have no stage in common"):
        differ.run(tmp_path / "run", place.root / "one")
