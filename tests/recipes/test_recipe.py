"""Recipes: how they are read, what their steps leave, and what failing and killed ones come to."""

import json
import shutil
import signal
import time
from pathlib import Path

import killing
import pytest
from stores import content

from kcdcache.condensation import manifest
from kcdcache.datasets.spec import parse
from kcdcache.errors import SettingsError
from kcdcache.progress import silent
from kcdcache.recipes import recipe
from kcdcache.settings import MachineSettings

HEAD = 'title = "Tiny"\ndata = "digits?train=100&test=50"\nseeds = [0, 1]\n'
TEACHER = '[[step]]\nname = "teacher"\ntitle = "the teacher"\nrun = "fit"\nmodel = "resnet8"\nepochs = 2\n'
STORE = '[[step]]\nname = "store"\nrun = "precompute"\nteacher = "@teacher"\nviews = 2\nmin_accuracy = 0\n'
KCD = (
    '[[step]]\nname = "kcd"\ntitle = "condensed"\nrun = "train"\nper_seed = true\nstore = "@store"\n'
    'student = "lessons:TinyNet"\nepochs = 2\nstages = 2\nkeep = 0.5\n'
)
SMALLER = (
    '[[step]]\nname = "smaller"\nrun = "condense"\nper_seed = true\nstore = "@store"\nvalues = "@kcd:values"\n'
    'previous = "@kcd:condensed"\nkeep = 0.25\n'
)
REUSE = (
    '[[step]]\nname = "reuse"\ntitle = "second"\nrun = "train"\nper_seed = true\nstore = "@store"\n'
    'manifest = "@smaller"\nstudent = "lessons:TinyNet"\nepochs = 2\nstages = 1\n'
)
PIPELINES = Path(recipe.__file__).parents[2] / "pipelines"
SHORT = HEAD + TEACHER + STORE + KCD
TINY = SHORT + SMALLER + REUSE


def written(folder, text=TINY):
    (folder / "tiny.toml").write_text(text)
    return folder / "tiny.toml"


def carried_out(folder, out, **more):
    return recipe.run(recipe.load(written(folder)), out, progress=silent, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    place = tmp_path_factory.mktemp("recipe")
    results = carried_out(place, place / "out", command="kcdcache run tiny.toml")
    return place / "out", results


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished[0], tmp_path / "out"))


def settled(folder):
    """The files of a recipe's folder except its results, which describe one execution."""
    found = content(folder)
    del found["results.json"]
    return found


def timeless(files):
    """The files without those that have clock times and the state of the machine."""
    names = ("run.json", "timing.jsonl", "summary.json", "environment.json", ".lock", "lock")
    return {name: data for name, data in files.items() if Path(name).name not in names}


# reading


@pytest.mark.parametrize("path", [recipe.EMBEDDED, *sorted(PIPELINES.glob("*.toml"))], ids=lambda path: path.stem)
def test_every_recipe_of_the_project_can_be_planned(tmp_path, path):
    found = recipe.load(path)
    plan = recipe.planned(found, tmp_path / "out")
    assert len(plan) == sum(len(found.seeds) if step.per_seed else 1 for step in found.step) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "sedes = [1]", r"unknown setting 'sedes' in .*tiny.toml; did you mean 'seeds'\?"),
        (HEAD + TEACHER + "epocs = 3", r"unknown setting 'epocs' in .*, step 'teacher'; did you mean 'epochs'\?"),
        (HEAD + TEACHER + "[step.settings]\nepochs = 1", r"unknown setting 'settings' in .*, step 'teacher'"),
        (HEAD + TEACHER.replace('"fit"', '"fitt"'), r"step 'teacher': unknown command 'fitt'; did you mean 'fit'\?"),
        (HEAD + TEACHER.replace('"teacher"', '"T!"'), r"setting 'name' in .*, step 1: .*pattern.*; found 'T!'"),
        (HEAD + '[[step]]\nname = "a"', r"setting 'run' in .*tiny.toml, step 1: Field required"),
        (HEAD + TEACHER + TEACHER, r"two steps are called 'teacher'"),
        (HEAD + STORE + TEACHER, r"step 'store': @teacher names no earlier step"),
        (HEAD + TEACHER + STORE.replace("@teacher", "@techer"), r"@techer names no .*; did you mean 'teacher'"),
        (HEAD + TEACHER + STORE.replace("@teacher", "@tea/cher"), r"'@tea/cher' is not a reference; write @name, "),
        (
            HEAD + TEACHER + STORE + KCD.replace('"@store"', '"@store:condensed"'),
            r"@store:condensed asks for what only a 'train' step has; 'store' runs precompute",
        ),
        (HEAD + TEACHER + STORE + KCD + SMALLER.replace("per_seed = true\n", ""), r"@kcd runs per seed, so"),
        (HEAD + TEACHER.replace("epochs = 2", "epochs = 0"), r"setting 'epochs' in .*, step 'teacher': .*; found 0"),
        (TINY.replace("keep = 0.25\n", ""), r"setting 'keep' in .*, step 'smaller': Field required"),
        (HEAD + TEACHER.replace('"resnet8"', "8"), r"setting 'model' in .*, step 'teacher': .*valid string; found 8"),
        (HEAD + 'step = ["a"]', r"steps are tables headed \[\[step\]\], found step = \['a'\]"),
        (HEAD.replace("[0, 1]", "[]") + TEACHER, r"setting 'seeds' in .*at least 1 item"),
        (HEAD + KCD + "seed = 3", r"it runs once per seed of the recipe, so it cannot set 'seed'"),
        (HEAD + "[machine]\ncores = 3", r"unknown setting 'machine.cores' in .*tiny.toml"),
        ("data = 1", r"setting 'title' in .*Field required"),
        ("data = ", r"tiny.toml is not valid TOML"),
        (TINY.replace("seeds =", 'train_order = "stored"\nseeds ='),
         r"train_order in .*tiny.toml does nothing without train_images; leave it out"),
        (TINY.replace("seeds =", 'train_images = 50\ntrain_order = "sorted"\nseeds ='),
         r"setting 'train_order' in .*'balanced' or 'stored'; found 'sorted'"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_before_anything_runs(tmp_path, text, message):
    with pytest.raises(SettingsError, match=message):
        recipe.load(written(tmp_path, text))


# planning


def test_a_plan_resolves_references_data_and_seeds_and_writes_nothing(tmp_path):
    out = tmp_path / "out"
    plan = recipe.planned(recipe.load(written(tmp_path)), out)
    assert [entry["step"] for entry in plan] == ["teacher", "store", *["kcd"] * 2, *["smaller"] * 2, *["reuse"] * 2]
    assert [plan[2][name] for name in ("student", "epochs", "keep")] == ["lessons:TinyNet", 2, 0.5]
    by_step = {(entry["step"], entry.get("seed")): entry for entry in plan}
    assert by_step["store", None]["teacher"] == str(out / "teacher")
    assert by_step["kcd", 1]["out"] == str(out / "kcd-seed1")
    assert by_step["kcd", 1]["data"] == "digits?train=100&test=50"
    assert by_step["reuse", 0]["manifest"] == str(out / "smaller-seed0.parquet")
    assert [entry["values"] for entry in plan if entry["step"] == "smaller"] == [
        str(out / f"kcd-seed{seed}/values.parquet") for seed in (0, 1)
    ]
    assert not out.exists()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("digits", "digits?train=50"),
        ("digits?test=9", "digits?test=9&train=50"),
        ("digits?train=7", "digits?train=7"),
        ("digits?test=9&train=7", "digits?test=9&train=7"),
    ],
)
def test_train_images_limit_the_data_unless_it_limits_itself(tmp_path, spec, expected):
    text = TINY.replace("seeds =", "train_images = 50\nseeds =")
    plan = recipe.planned(recipe.load(written(tmp_path, text)).model_copy(update={"data": spec}), tmp_path)
    assert {entry.get("data") for entry in plan} == {expected, None}
    ours = spec != expected
    stored = recipe.load(written(tmp_path, text.replace("seeds =", 'train_order = "stored"\nseeds =')))
    plan = recipe.planned(stored.model_copy(update={"data": spec}), tmp_path)
    assert {entry.get("data") for entry in plan} == {expected + "&order=stored" * ours, None}


def test_published_small_recipes_take_the_first_images_as_they_did():
    limits = []
    for path in sorted(PIPELINES.glob("*_small.toml")):
        planned = recipe.planned(recipe.load(path), path.parent)
        limits += [parse(entry["data"]).options for entry in planned if "data" in entry]
    assert {(options.train, options.order) for options in limits if options.train or options.test} == {
        (4000, "stored"), (10000, "stored")
    }  # fmt: skip


# running


def test_steps_leave_their_results_where_the_plan_says_and_build_on_each_other(finished):
    out, results = finished
    expected = ["kcd-seed0", "kcd-seed1", "results.json", "reuse-seed0", "reuse-seed1", "smaller-seed0.parquet"]
    assert sorted(path.name for path in out.iterdir()) == [*expected, "smaller-seed1.parquet", "store", "teacher"]
    smaller = manifest.read(out / "smaller-seed1.parquet")
    run = json.loads((out / "kcd-seed1/summary.json").read_text())
    assert (smaller.parent, len(smaller)) == (manifest.read(out / "kcd-seed1" / run["condensed_set"]).digest, 25)
    assert json.loads((out / "reuse-seed1/run.json").read_text())["inputs"]["given"] == smaller.digest
    seeds = [json.loads((out / f"kcd-seed{seed}/run.json").read_text())["settings"]["seed"] for seed in (0, 1)]
    assert seeds == results["seeds"] == [0, 1]
    assert (out / "kcd-seed0/values.parquet").read_bytes() != (out / "kcd-seed1/values.parquet").read_bytes()


def test_results_are_in_a_file_with_their_command_and_environment(finished):
    out, results = finished
    assert json.loads((out / "results.json").read_text()) == results
    assert (results["command"], results["data"]) == ("kcdcache run tiny.toml", "digits?train=100&test=50")
    assert results["environment"]["versions"]["torch"]


def test_the_table_has_a_line_per_step_but_condensations_with_the_mean_over_seeds(finished):
    out, results = finished
    row = next(row for row in results["rows"] if row["step"] == "kcd")
    accuracy = [json.loads((out / f"kcd-seed{seed}/summary.json").read_text())["accuracy_last"] for seed in (0, 1)]
    assert (row["n"], row["title"]) == (2, "condensed")
    assert row["accuracy_last"] == pytest.approx(sum(accuracy) / 2)
    assert row["accuracy_last_std"] == pytest.approx(abs(accuracy[0] - accuracy[1]) / 2**0.5)
    lines = recipe.table(results).splitlines()
    assert lines[0] == "Tiny"
    assert [line.split("  ")[0] for line in lines[4:]] == ["the teacher", "store", "condensed", "second"]
    assert len({len(line) for line in lines[2:]}) == 1
    line = next(line for line in lines if line.startswith("condensed"))
    assert f" {100 * row['accuracy_last']:.2f} ± {100 * row['accuracy_last_std']:.2f} " in line
    assert f" {row['relative_cost']:.3f} " in line


def test_a_finished_recipe_run_again_changes_nothing_but_its_results(copy, tmp_path, finished):
    before = settled(copy)
    again = carried_out(tmp_path, copy)
    assert settled(copy) == before
    assert again["rows"] == finished[1]["rows"]


@pytest.mark.parametrize("lost", ["teacher", "kcd-seed1", "smaller-seed0.parquet"])
def test_a_lost_step_is_made_again_to_the_same_bytes(copy, tmp_path, lost):
    before = timeless(settled(copy))
    path = copy / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    carried_out(tmp_path, copy)
    assert timeless(settled(copy)) == before


class BrokenOffError(BaseException):
    """Raised where the test breaks the recipe off."""


@pytest.mark.parametrize("reports", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 7))])
def test_a_recipe_broken_off_anywhere_resumes_to_the_same_bytes(finished, tmp_path, reports):
    seen = []

    def progress(what, done, total, remark):
        seen.append(what)
        if len(seen) == reports:
            raise BrokenOffError

    tiny = recipe.load(written(tmp_path))
    with pytest.raises(BrokenOffError, match=r"^$"):
        recipe.run(tiny, tmp_path / "out", progress=progress)
    recipe.run(tiny, tmp_path / "out", progress=silent)
    assert timeless(settled(tmp_path / "out")) == timeless(settled(finished[0]))


def test_machine_settings_reach_the_steps_that_take_them(tmp_path):
    text = HEAD + "[machine]\nthreads = 1\n" + TEACHER.replace("epochs = 2", "epochs = 1")
    recipe.run(recipe.load(written(tmp_path, text)), tmp_path / "out", progress=silent)
    assert json.loads((tmp_path / "out/teacher/run.json").read_text())["environment"]["threads"] == 1


def test_a_settings_error_names_its_step(tmp_path):
    tiny = recipe.load(written(tmp_path))
    wrong = tiny.model_copy(update={"step": (tiny.step[0].model_copy(update={"settings": {"epochs": -1}}),)})
    with pytest.raises(SettingsError, match=r"setting 'epochs' in step 'teacher'"):
        recipe.run(wrong, tmp_path / "out", progress=silent)
    assert not (tmp_path / "out").exists()


GRID = (
    '[[pair]]\nstudent = "resnet8"\n\n[[pair]]\nstudent = "resnet14"\n' + TEACHER + STORE +
    '[[step]]\nname = "{student}"\ntitle = "{student}:"\nrun = "train"\nper_seed = true\nstore = "@store"\n'
    'student = "{student}"\nepochs = 2\nstages = 2\n'
    '[[step.variant]]\nname = "kd"\ntitle = "everything"\nkeep = 1.0\n'
    '[[step.variant]]\nname = "kcd"\nkeep = 0.5\n'
    '[[step]]\nname = "again-{student}"\nrun = "train"\nper_seed = true\nstore = "@store"\nstages = 1\n'
    'manifest = "@{student}-kcd:condensed"\nstudent = "resnet8"\nepochs = 2\n'
)  # fmt: skip


def test_pairs_and_variants_are_spelled_out_each_once(tmp_path):
    found = {step.name: step for step in recipe.load(written(tmp_path, HEAD + GRID)).step}
    assert list(found) == [
        "teacher", "store", "resnet8-kd", "resnet8-kcd", "again-resnet8", "resnet14-kd", "resnet14-kcd",
        "again-resnet14",
    ]  # fmt: skip
    assert found["resnet14-kd"].title == "resnet14: everything"
    assert found["resnet14-kcd"].title == "resnet14: kcd"
    assert found["resnet14-kd"].settings == {
        "store": "@store", "student": "resnet14", "epochs": 2, "stages": 2, "keep": 1.0,
    }  # fmt: skip
    assert found["again-resnet14"].settings["manifest"] == "@resnet14-kcd:condensed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            GRID.replace("{student}:", "{studnt}"),
            r"{studnt} is not a key of every \[\[pair\]\]; did you mean 'student'",
        ),
        (
            GRID.replace('name = "{student}"', 'name = "same"'),
            "two steps are called 'same-kd'; names differ by {...} of a pair",
        ),
        (
            GRID.replace('\nname = "kcd"', ""),
            r"step '{student}': variants are tables headed \[\[step.variant\]\] with a",
        ),
        ("pair = 3\n" + TEACHER, r"pairs of networks are tables headed \[\[pair\]\], found pair = 3"),
    ],
)
def test_a_wrong_grid_is_refused(tmp_path, text, message):
    with pytest.raises(SettingsError, match=message):
        recipe.load(written(tmp_path, HEAD + text))


DIVERGING = 'name = "kcd"\nbatch_size = 20\nlearning_rate = 1e30'
FAILING = TINY.replace('name = "kcd"', DIVERGING) + TEACHER.replace('"teacher"', '"other"')


def test_a_failing_step_stops_none_but_those_that_need_it(tmp_path):
    results = recipe.run(recipe.load(written(tmp_path, FAILING)), tmp_path / "out", progress=silent)
    failed = {failure["run"]: failure for failure in results["failed"]}
    assert set(failed) == {f"{name}-seed{seed}" for name in ("kcd", "smaller", "reuse") for seed in (0, 1)}
    assert failed["kcd-seed0"]["exit_code"] == 5
    assert "the training loss is nan in epoch" in failed["kcd-seed0"]["error"]
    assert failed["smaller-seed1"]["error"] == "skipped: step 'kcd-seed1' failed"
    counts = {row["step"]: row["n"] for row in results["rows"] if row["step"] != "store"}
    assert counts == {"teacher": 1, "kcd": 0, "reuse": 0, "other": 1}
    assert "failed: kcd-seed0: the training loss is nan" in recipe.table(results)


BROKEN = HEAD + TEACHER.replace("epochs = 2", "epochs = 1\nlearning_rate = 1e30") + STORE
"""a step that fails, and one that needs it"""


def test_the_command_of_a_failing_recipe_ends_with_its_exit_code(start, tmp_path):
    path = written(tmp_path, BROKEN + TEACHER.replace('"teacher"', '"other"'))
    words = ["run", path, "--out", tmp_path / "out", "--jobs", "2", "--threads", "1", "-q"]
    assert killing.finished(start, words, tmp_path / "log") == 5
    assert "failed: teacher: the training loss is nan" in (tmp_path / "log").read_text()
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [failure["run"] for failure in results["failed"]] == ["teacher", "store"]
    assert {row["step"]: row["n"] for row in results["rows"]}["other"] == 1


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_recipe_at_several_jobs_that_is_stopped_resumes_to_the_same_bytes(start, finished, tmp_path, number):
    """SIGTERM to the parent, or its death: the runs under way stop too, and free their folders."""
    out, path = tmp_path / "out", written(tmp_path, SHORT)
    started = start(["run", path, "--out", out, "--jobs", "2", "--threads", "1"], tmp_path / "log")
    deadline = time.monotonic() + 120
    while not list(out.glob("kcd-seed*/checkpoint")) and time.monotonic() < deadline:
        assert not started.ended(killing.POLL), (tmp_path / "log").read_text()
    started.signal(number)
    assert started.ended(120)
    assert started.code == (143 if number == signal.SIGTERM else -9)
    waiting, alone = True, recipe.load(path).model_copy(update={"machine": MachineSettings(threads=1)})
    while waiting and time.monotonic() < deadline:
        resumed = recipe.run(alone, out, jobs=2, progress=silent)
        waiting = any("is being written by" in failure["error"] for failure in resumed["failed"])
    assert resumed["failed"] == []
    shutil.rmtree(out / "logs")
    whole = timeless(settled(finished[0]))
    assert timeless(settled(out)) == {
        name: whole[name] for name in whole if name.startswith(("teacher", "store", "kcd"))
    }
    numbers = [{k: v for k, v in row.items() if "seconds" not in k} for row in resumed["rows"]]
    assert numbers == [{k: v for k, v in row.items() if "seconds" not in k} for row in finished[1]["rows"][:3]]


def test_a_step_that_leaves_its_store_unsealed_fails_with_the_command_that_ends_it(tmp_path):
    written(tmp_path, SHORT.replace("min_accuracy = 0", 'min_accuracy = 0\nshard = "1/2"'))
    results = recipe.run(recipe.load(tmp_path / "tiny.toml"), tmp_path / "out", progress=silent)
    failed = {one["run"]: one for one in results["failed"]}
    assert failed["store"]["exit_code"] == 9
    assert (
        "one process finishes it with `kcdcache precompute "
        f"--data 'digits?train=100&test=50' --store {tmp_path}/out/store " in failed["store"]["error"]
    )
    assert failed["kcd-seed0"]["error"] == "skipped: step 'store' failed"
