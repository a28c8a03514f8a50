"""What commands make of their settings: refusals, plans, and the settings that suit data, networks and methods."""

import numpy as np
import pytest
from pupils import SCHOOL, SPEC, command, executed

from kcdcache.commands import checks, train
from kcdcache.condensation import schedule
from kcdcache.errors import MismatchError, NotFoundError, SettingsError
from kcdcache.export import condensed_set
from kcdcache.methods import catalogue
from kcdcache.runs import state
from kcdcache.settings import TrainCommand, make
from kcdcache.store import encoding, identity
from kcdcache.teacher import fields, teacher


def import_from(file, out, **more):
    return executed("precompute", {"data": SPEC, "store": out, "from_logits": file, "augment": "none"} | more)


def test_data_is_loaded_once():
    assert condensed_set.load_data(SPEC) is condensed_set.load_data(SPEC)


def test_a_dry_fit_counts_steps(tmp_path):
    given = {"data": SPEC, "model": "resnet8", "out": tmp_path / "out", "epochs": 3, "batch_size": 64}
    wanted = {"would": "fit", "model": "resnet8", "samples": 200, "steps": 12, "out": str(tmp_path / "out")}
    assert executed("fit", given, dry_run=True) == wanted
    assert list(tmp_path.iterdir()) == []


def test_a_dry_train_lists_the_stages_of_the_schedule(place, tmp_path):
    found = command(place, "train", out=tmp_path / "out", dry_run=True, **SCHOOL)
    stages = schedule.plan("end_of_stage", 6, 3, 0.6)
    assert [(stage["epochs"], stage["keep"], stage["source"]) for stage in found["stages"]] == [
        (f"{stage.start + 1}-{stage.stop}", stage.keep, stage.source) for stage in stages
    ]
    assert found["relative_cost"] == schedule.expected_cost(stages, 200, 6)
    assert list(tmp_path.iterdir()) == []


IMPORT = {"augment": "none", "from_logits": "logits.npy", "teacher": None}
REFUSED = [
    ("precompute", {"teacher_size": 9}, r"--teacher-size does nothing here: .* brings its own input transform"),
    ("precompute", {"from_logits": "logits.npy"}, r"--from-logits needs --augment: say which views"),
    ("precompute", {"from_probabilities": "p.npy", "teacher": None}, "--from-probabilities needs --augment: say"),
    ("precompute", {"from_probabilities": "p.npy", "augment": "none"}, "--teacher does nothing beside --from-prob"),
    ("precompute", {"from_probabilities": True, "teacher": None}, "--teacher is missing"),
    ("precompute", IMPORT | {"from_probabilities": "p.npy"}, "name two files; give one of them"),
    ("precompute", {"weights_key": "model"}, "--weights-key does nothing here: a saved network has one set of weights"),
    ("train", SCHOOL | {"condensed": "set"}, "--store does nothing beside --condensed, which brings its own"),
    *(
        ("precompute", IMPORT | {name: value}, rf"--{name.rstrip('_').replace('_', '-')} does nothing beside --from-lo")
        for name, value in {
            "teacher": "resnet8", "views": 2, "fields": ["penultimate"], "batch_size": 9, "for_": "kd",
            "student": "resnet8", "budget_gb": 1, "teacher_size": 9, "mix": "convex",
        }.items()
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "message"), REFUSED)
def test_settings_that_contradict_each_other_are_refused(place, tmp_path, name, given, message):
    places = {"out" if name == "train" else "store": tmp_path / "new", "store": tmp_path / "new"}
    asked = {key: value for key, value in (places | {"teacher": str(place.teacher)} | given).items() if value}
    if "from_logits" in given and "teacher" not in given:
        asked.pop("teacher")
    with pytest.raises(SettingsError, match=message):
        executed(name, {"data": SPEC} | asked)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_to_import_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match=r"--from-logits: no file at .*logits.npy"):
        import_from(tmp_path / "logits.npy", tmp_path / "store")


def test_few_views_for_many_epochs_are_noted(place, tmp_path, caplog):
    for epochs, noted in ((12, True), (9, False)):
        command(place, "train", out=tmp_path / "out", dry_run=True, **SCHOOL | {"epochs": epochs})
        assert ("note: 3 cached views for 12 epochs" in caplog.text) == noted
        caplog.clear()


@pytest.mark.parametrize(("method", "rate"), [("ce", 0.01), ("kd", 0.01), ("at+kd", 0.01), ("reviewkd", 0.02)])
def test_light_students_learn_at_their_authors_rate_unless_told_another(method, rate):
    for student in catalogue.LIGHT_STUDENTS:
        given = {"data": SPEC, "store": "s", "out": "o", "student": student, "method": method}
        assert train.settings_of(make(TrainCommand, given)).learning_rate == rate
        assert train.settings_of(make(TrainCommand, given | {"learning_rate": 0.3})).learning_rate == 0.3


@pytest.mark.parametrize("joined", ["kd+reviewkd", "reviewkd+kd"])
def test_a_methods_own_rate_wins_over_the_usual_one_in_any_order(joined):
    assert catalogue.recipe(joined, "ShuffleV2") == {"learning_rate": 0.02, "batch_size": 128, "nesterov": True}
    assert catalogue.recipe(joined, "resnet8") == {"learning_rate": 0.1, "batch_size": 128, "nesterov": True}


def test_the_authors_settings_are_told_where_they_hold(place, tmp_path, caplog):
    caplog.set_level("INFO")
    for given, told in (
        ({"student": "ShuffleV1"}, True),
        ({}, False),
        ({"student": "ShuffleV1", "learning_rate": 0.05}, False),
    ):
        command(place, "train", out=tmp_path / "out", dry_run=True, **SCHOOL | given)
        assert ("train: the authors' settings of kd for ShuffleV1: learning_rate 0.01" in caplog.text) == told
        assert ("settings of" in caplog.text) == told
        caplog.clear()


@pytest.mark.parametrize(("student", "kd", "reviewkd"), [("resnet8", None, 0.1), ("ShuffleV2", 0.01, 0.02)])
def test_the_listing_tells_the_recipe_of_the_pair(student, kd, reviewkd):
    pair = {"teacher": "resnet8", "student": student, "classes": 10, "size": 16}
    rates = {row["method"]: row["recipe"].get("learning_rate") for row in executed("methods", pair)["methods"]}
    assert (rates["kd"], rates["reviewkd"]) == (kd, reviewkd)


def test_digits_are_cropped_where_no_views_are_named():
    data = condensed_set.load_data(SPEC)
    assert data.usual_views({"epochs"}) == {"augment": "crop", "padding": 2}
    assert data.usual_views({"padding"}) == {"augment": "crop"}
    assert data.usual_views({"augment"}) == {}


def test_imported_logits_have_no_teacher_to_ask_but_a_store_has_one_of_its_precision(place, tmp_path):
    assert teacher.precision_of(place.knowledge.knowledge, place.knowledge.path) == "float32"
    np.save(tmp_path / "logits.npy", 9 * np.eye(10, dtype=np.float32)[place.data.train.labels])
    imported = import_from(tmp_path / "logits.npy", tmp_path / "store")["store"]
    with pytest.raises(MismatchError, match=r"the logits in .* were imported from elsewhere \(float32\)"):
        command(place, "train", store=imported, out=tmp_path / "out", **SCHOOL | {"mix_target": "requery"})


def test_the_condensed_set_of_a_run_is_what_it_exported(place, tmp_path):
    out = tmp_path / "out"
    assert state.condensed_set(out) == out / "(its condensed set)"
    command(place, "train", out=out, until=1, **SCHOOL)
    assert state.condensed_set(out) == out / "(its condensed set)"
    found = command(place, "train", out=out, **SCHOOL)
    assert state.condensed_set(out) == out / found["condensed_set"]
    assert state.condensed_set(out).is_file()


def test_what_checks_know_without_torch_is_what_there_is():
    assert set(checks.ENCODINGS) == set(encoding.ENCODINGS)
    known = {name.partition(":")[0] for name in (*fields.EXAMPLES, identity.PARAMETERS)}
    assert set(checks.FIELDS) == known
