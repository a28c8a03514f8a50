"""How manifests, runs and exported sets differ, as the command tells it."""

import json

import pytest
from commands import alone, failure, outcome
from exports import exporting, prepared
from pupils import SPEC, executed

from kcdcache.commands import artifacts
from kcdcache.condensation import manifest
from kcdcache.condensation.compare import compare
from kcdcache.errors import NotFoundError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two runs of one store, an exported set, and a manifest."""
    place = prepared(tmp_path_factory.mktemp("difference"), fields=("logits",))
    settings = {"student": "lessons:TinyNet", "epochs": 4, "batch_size": 64, "data": SPEC, "device": "cpu"}
    for name, stages, keep in (("one", 2, 0.5), ("two", 4, 0.4)):
        given = settings | {"store": place.knowledge.path, "out": place.root / name, "stages": stages, "keep": keep}
        executed("train", given)
    exporting(place, place.root / "set")
    return place


def differ(a, b):
    return executed("diff", {"a": a, "b": b})


def test_runs_are_compared_stage_by_stage(place):
    found = differ(place.root / "one", place.root / "two")
    assert list(found["stages"]) == ["0", "1", "2"]
    assert (found["only_in_a"], found["only_in_b"]) == ([], [3, 4])
    assert found["stages"]["0"]["identical"]
    for number in (1, 2):
        sets = [manifest.read(place.root / name / f"stages/{number}/manifest.parquet") for name in ("one", "two")]
        assert found["stages"][str(number)] == compare(*sets).model_dump()


def test_a_run_beside_a_set_is_its_last_one_and_an_export_its_manifest(place):
    wanted = compare(manifest.read(place.root / "two/stages/4/manifest.parquet"), place.set).model_dump()
    found = differ(place.root / "two", place.root / "set")
    assert {name: found[name] for name in wanted} == wanted
    assert differ(place.file, place.root / "set")["identical"]


def test_the_table_has_a_line_a_stage_and_no_torch_is_loaded(place):
    done = alone("diff", place.root / "one", place.root / "two")
    assert (done.returncode, done.stderr) == (0, "loaded: scipy\n")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["stage", "0", "1", "2"]
    assert lines[2].split()[1:] == list(artifacts.COLUMNS)
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
        differ(tmp_path / "run", place.file)
    with pytest.raises(NotFoundError, match="have no stage in common"):
        differ(tmp_path / "run", place.root / "one")
