"""`kcdcache verify` and `--expect-id` as users call them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from damaging import flip
from exports import exporting
from pupils import SCHOOL, SPEC, digits, distilled, everything, lines, saved_teacher, school

from kcdcache.cli import main
from kcdcache.commands import verify
from kcdcache.condensation import manifest
from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, SettingsError
from kcdcache.report import show

KINDS = {
    "store": "store",
    "run": "run",
    "manifest": "run/stages/2/manifest.parquet",
    "values": "run/values.parquet",
    "network": "teacher/model.json",
    "condensed": "exported",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = school(tmp_path_factory.mktemp("verify"))
    distilled(place, place.root / "run")
    place.file = place.root / "run"
    exporting(place, place.root / "exported")
    return place.root


@pytest.fixture
def place(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "place"))


def told(capsys, *words):
    """The exit code and the JSON result of a command, or its error text."""
    code = main._outcome([*map(str, words), "--json", "-q"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if code == 0 else err


@pytest.mark.parametrize("kind", verify.CHECKS)
def test_what_was_written_is_in_order_and_stays_as_it_is(made, kind):
    before = everything(made)
    found = verify.verify(made / KINDS[kind])
    assert (found["kind"], found["problems"]) == (kind, 0)
    assert everything(made) == before


def test_a_run_is_counted_whole(made):
    found = verify.verify(made / "run")
    assert found["finished"] is True
    assert found["manifests"] == len(list((made / "run/stages").glob("*/manifest.parquet"))) == 4
    assert found["values"] == 4
    assert found["networks"] == 1


def test_random_damage_of_any_file_of_a_run_is_an_error_of_ours(place):
    """Only what nobody promises may change unseen: who holds the lock, and clock times that change no sum."""
    random, files = np.random.default_rng(0), sorted(path for path in (place / "run").rglob("*") if path.is_file())
    for path in [path for path in files if path.stat().st_size]:
        whole = path.read_bytes()
        path.write_bytes(flip(whole, 8 * int(random.integers(len(whole))) + 2))
        try:
            verify.verify(place / "run")
        except KcdcacheError:
            assert path.name != ".lock"
        else:
            assert path.name in (".lock", "timing.jsonl")
        path.write_bytes(whole)
    assert verify.verify(place / "run")["problems"] == 0


@pytest.mark.parametrize(("path", "given"), [("run", {"data": SPEC}), ("store", {})])
def test_points_are_computed_again_for_stores_only_and_with_their_data(made, path, given):
    with pytest.raises(SettingsError, match="give a store, its --teacher and its --data"):
        verify.verify(made / path, teacher=str(made / "teacher"), **given)


def test_a_set_changed_by_another_tool_is_corruption(place):
    path = place / KINDS["manifest"]
    data = path.read_bytes()
    assert manifest.read(path).knowledge_id.encode() in data
    path.write_bytes(data.replace(manifest.read(path).knowledge_id.encode()[:8], b"00000000"))
    with pytest.raises(CorruptionError, match=r"manifest.parquet was changed after it was written"):
        verify.verify(path)


def test_as_much_is_read_as_was_asked_for_and_damage_found_there(capsys, place):
    for words, read in (((), 0), (("--sample", "5%"), 1), (("--sample", "0.5"), 3), (("--read-data",), 5)):
        code, found = told(capsys, "verify", place / "store", *words)
        assert (code, found["kind"], found["files"], found["problems"]) == (0, "store", 5, 0)
        assert (found["files_read"], found["bytes_read"] > 0) == (read, read > 0)
    file = place / "store/logits/c.1.0.0"
    file.write_bytes(file.read_bytes()[:-9] + b"123456789")
    assert told(capsys, "verify", place / "store")[0] == 0
    code, error = told(capsys, "verify", place / "store", "--read-data")
    assert (code, "logits/c.1.0.0 (samples 0..199 of view 1) is not what was written" in error) == (3, True)


def test_data_and_teacher_are_compared_with_the_stores(capsys, place, tmp_path):
    code, found = told(capsys, "verify", place / "store", "--data", SPEC)
    assert (code, found["data"]) == (0, "the store's")
    code, error = told(capsys, "verify", place / "store", "--data", "digits?train=199&test=60&order=stored")
    assert (code, "199" in error) == (4, True)
    code, found = told(capsys, "verify", place / "store", *teacher_of(place), "--points", 100)
    assert (code, found["recomputed"]["points"] >= 100, found["recomputed"]["differing"]) == (0, True, 0)
    saved_teacher(tmp_path / "other", digits(200, 60), seed=5)
    code, error = told(capsys, "verify", place / "store", *teacher_of(tmp_path, "other"))
    assert (code, "give the teacher the store was made with" in error) == (4, True)


def teacher_of(place, name="teacher"):
    return "--teacher", place / name, "--data", SPEC


def test_a_growth_whose_commit_is_lost_is_told(capsys, place):
    """It looks like one that was never sealed, so it is no damage; but nobody should believe it to be there."""
    root = place / "store"
    assert "growth" not in told(capsys, "verify", root)[1]
    shutil.copy(root / "_kcd/plan.0.json", root / "_kcd/plan.1.json")
    assert told(capsys, "verify", root)[1]["growth"].startswith("begun and not sealed")


def test_repair_makes_the_same_bytes_of_the_store_that_was_expected(capsys, place):
    before = everything(place / "store")
    (place / "store/logits/c.1.0.0").unlink()
    (place / "store/_kcd/plan.0.json").write_bytes(b"")
    code, error = told(capsys, "verify", place / "store", "--repair")
    assert (code, "give --teacher and --data" in error) == (2, True)
    damaged = everything(place / "store")
    code, error = told(capsys, "verify", place / "store", "--repair", *teacher_of(place), "--expect-id", "0" * 64)
    assert (code, "get it again, or leave --expect-id out" in error) == (4, True)
    assert everything(place / "store") == damaged
    code, found = told(capsys, "verify", place / "store", "--repair", *teacher_of(place))
    assert (code, found["repaired"]) == (0, ["logits/c.1.0.0"])  # the plan came back at the first attempt
    assert (found["problems"], found["files_read"]) == (0, found["files"])
    assert everything(place / "store") == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_id_is_told_and_expected(capsys, place, kind):
    path = place / KINDS[kind]
    shown = told(capsys, "inspect", path)[1]
    found = shown["id"]
    assert (shown["kind"], len(found)) == (kind, 64)
    assert told(capsys, "verify", path, "--expect-id", found)[0] == 0
    code, error = told(capsys, "verify", path, "--expect-id", "0" * 64)
    assert (code, f"has the id {found}, expected {'0' * 64}" in error) == (4, True)
    if kind != "store":  # what is no store cannot be repaired
        code, error = told(capsys, "verify", path, "--repair")
        assert (code, f"is a {kind}: " in error) == (2, True)


def test_a_store_rewritten_with_fitting_digests_has_another_id(place, tmp_path):
    """Digests find damage; only an id from a trusted place finds a store that was replaced whole."""
    other = school(tmp_path, views=3, encoding="float16")
    assert show.id_of(other.knowledge.path) != show.id_of(place / "store")
    with pytest.raises(MismatchError, match="get it again, or leave --expect-id out"):
        show.require_ids([other.knowledge.path], [show.id_of(place / "store")])


def test_train_and_condense_take_only_what_was_promised(capsys, place):
    ids = {kind: show.id_of(place / path) for kind, path in KINDS.items()}
    given = {"store": place / "store", "data": SPEC, "out": place / "new", "device": "cpu"}
    chosen = {"student": "resnet8", "epochs": 1, "stages": 1, "manifest": place / KINDS["manifest"]}
    train = ("train", *lines(SCHOOL | given | chosen))
    code, error = told(capsys, *train, "--expect-id", ids["store"])
    assert (code, f"manifest.parquet has the id {ids['manifest']}, expected {ids['store']}" in error) == (4, True)
    assert not (place / "new").exists()
    assert told(capsys, *train, "--expect-id", f"{ids['store']},{ids['manifest']}")[0] == 0
    assert told(capsys, *train)[0] == 0  # what was promised is no part of the run
    assert "expect_id" not in (place / "new/run.json").read_text()
    given = {"values": place / "run/values.parquet", "store": place / "store", "keep": 0.5, "out": place / "m.parquet"}
    code, error = told(capsys, "condense", *lines(given), "--expect-id", ids["store"])
    assert (code, "values.parquet has the id" in error) == (4, True)
    assert told(capsys, "condense", *lines(given), "--expect-id", f"{ids['store']},{ids['values']}")[0] == 0
