import numpy as np
import pytest
from pupils import SCHOOL, SPEC, command, executed, school

from kcdcache.commands import checks, inputs, methods, train
from kcdcache.condense import schedule
from kcdcache.errors import MismatchError, NotFoundError, SettingsError
from kcdcache.export import condensed_set
from kcdcache.methods import catalogue
from kcdcache.runs import state
from kcdcache.settings import TrainCommand, make
from kcdcache.store import encoding, identity
from kcdcache.teacher import fields


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return school(tmp_path_factory.mktemp("steps"))


@pytest.fixture(scope="module")
def imported(place, tmp_path_factory):
    """A store of logits made elsewhere."""
    folder = tmp_path_factory.mktemp("imported")
    np.save(folder / "logits.npy", np.eye(10, dtype=np.float32)[place.data.train.labels])
    return import_from(folder / "logits.npy", folder / "store")


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
        (f"{stage.start}-{stage.stop - 1}", stage.keep, stage.source) for stage in stages
    ]
    assert found["relative_cost"] == schedule.expected_cost(stages, 200, 6)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_must_be_named(place, tmp_path):
    with pytest.raises(SettingsError, match=r"--teacher is missing: a folder written by `kcdcache fit`"):
        command(place, "precompute", store=tmp_path / "new", teacher=None)


def test_a_student_must_be_named(place, tmp_path):
    with pytest.raises(SettingsError, match=r"--student is missing: .*--student resnet8"):
        command(place, "train", out=tmp_path / "out")


def test_few_views_for_many_epochs_are_noted(place, tmp_path, caplog):
    settings = SCHOOL | {"epochs": 12, "stages": 3}
    command(place, "train", out=tmp_path / "out", dry_run=True, **settings)
    assert "note: 3 cached views for 12 epochs" in caplog.text
    caplog.clear()
    command(place, "train", out=tmp_path / "out", dry_run=True, **(settings | {"epochs": 9}))
    assert caplog.text == ""


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
    command(place, "train", out=tmp_path / "out", dry_run=True, **SCHOOL | {"student": "ShuffleV1"})
    assert "train: the authors' settings of kd for ShuffleV1: learning_rate 0.01" in caplog.text
    caplog.clear()
    command(place, "train", out=tmp_path / "out", dry_run=True, **SCHOOL)
    given = SCHOOL | {"student": "ShuffleV1", "learning_rate": 0.05}
    command(place, "train", out=tmp_path / "out", dry_run=True, **given)
    assert "settings of" not in caplog.text


def test_the_listing_tells_the_recipe_of_the_pair():
    rates = {}
    for student in ("resnet8", "ShuffleV2"):
        rows = methods.run("resnet8", student, 10, 16)["methods"]
        rates[student] = {row["method"]: row["recipe"].get("learning_rate") for row in rows}
    assert (rates["resnet8"]["kd"], rates["resnet8"]["reviewkd"]) == (None, 0.1)
    assert (rates["ShuffleV2"]["kd"], rates["ShuffleV2"]["reviewkd"]) == (0.01, 0.02)


def test_digits_are_cropped_where_no_views_are_named():
    data = condensed_set.load_data(SPEC)
    assert inputs.usual_views({"epochs"}, data) == {"augment": "crop", "padding": 2}
    assert inputs.usual_views({"padding"}, data) == {"augment": "crop"}
    assert inputs.usual_views({"augment"}, data) == {}


def test_the_precision_of_a_teacher_is_the_stores(place):
    assert inputs.precision_of(place.knowledge.knowledge, place.knowledge.path) == "float32"


def test_imported_logits_have_no_teacher_to_ask(place, imported, tmp_path):
    settings = SCHOOL | {"mix_target": "requery"}
    with pytest.raises(MismatchError, match=r"the logits in .* were imported from elsewhere \(float32\)"):
        command(place, "train", store=imported["store"], out=tmp_path / "out", **settings)


@pytest.mark.parametrize(
    "flag",
    [
        {"teacher": "resnet8"}, {"views": 2}, {"fields": ["penultimate"]}, {"batch_size": 9}, {"for_": "kd"},
        {"student": "resnet8"}, {"budget_gb": 1}, {"teacher_size": 9}, {"mix": "convex"},
    ],
)  # fmt: skip
def test_an_import_refuses_flags_it_would_ignore(tmp_path, flag):
    name = next(iter(flag)).rstrip("_").replace("_", "-")
    with pytest.raises(SettingsError, match=rf"--{name} does nothing beside --from-logits"):
        import_from(tmp_path / "logits.npy", tmp_path / "store", **flag)


def test_an_import_must_say_which_views_it_is_of(tmp_path):
    given = {"data": SPEC, "store": tmp_path / "s", "from_logits": tmp_path / "logits.npy"}
    with pytest.raises(SettingsError, match=r"--from-logits needs --augment: say which views"):
        executed("precompute", given)


def test_a_missing_file_to_import_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match=r"--from-logits: no file at .*logits.npy"):
        import_from(tmp_path / "logits.npy", tmp_path / "store")


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


def test_a_saved_teacher_brings_its_own_input_transform(place, tmp_path):
    with pytest.raises(SettingsError, match=r"--teacher-size does nothing here: .* brings its own input transform"):
        command(place, "precompute", store=tmp_path / "new", teacher_size=9)


def test_what_an_exported_set_brings_is_not_given_beside_it(place, tmp_path):
    with pytest.raises(SettingsError, match="--store does nothing beside --condensed, which brings its own"):
        command(place, "train", out=tmp_path / "out", condensed=tmp_path / "set", **SCHOOL)
