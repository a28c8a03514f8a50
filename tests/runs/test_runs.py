"""A run's folder: continued only as itself, on the machine it began on, by one process; damage is found."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest
import torch
from commands import words
from killing import finished, succeeds
from lessons import on_cpu, precomputed
from pupils import distilled, everything, promised, same_files, school, settings

from kcdcache import environment
from kcdcache.errors import LockedError, MismatchError, NotFoundError, SettingsError, UnfinishedError
from kcdcache.files.records import logged_seconds
from kcdcache.runs import state
from kcdcache.runs.folder import RunFolder
from kcdcache.runs.state import load_checkpoint, read_metrics, read_summary, save_checkpoint
from kcdcache.store import reader

CHANGES = {"epochs": 9, "keep": 0.5, "student": "resnet8", "seed": 1, "mix_target": "keep", "precision": "bfloat16"}


@pytest.fixture(scope="module")
def begun(place):
    """A run stopped inside its second stage."""
    distilled(place, place.root / "begun", run={"until": 3})
    return place.root / "begun"


@pytest.mark.parametrize("name", CHANGES)
def test_another_setting_is_refused_by_name(place, begun, name):
    before = everything(begun)
    was, now = getattr(settings(), name), CHANGES[name]
    said = rf"holds a run with {name} = {was!r}, requested now: {now!r}; give the same settings to continue it, or"
    with pytest.raises(SettingsError, match=said):
        distilled(place, begun, **{name: now})
    assert unlocked(everything(begun)) == unlocked(before)


def unlocked(files):
    return {name: data for name, data in files.items() if name not in (".lock", ".lock.holder")}


def test_of_trainings_racing_for_one_folder_exactly_one_goes_on(place, begun, tmp_path):
    """Who comes when the winner has ended goes on with nothing: every epoch is trained once."""
    distilled(place, tmp_path / "run", run={"until": 1})
    asked = [(place, tmp_path / "run", None, {"until": 3})] * 4
    with ThreadPoolExecutor(4) as pool:
        racers = [pool.submit(distilled, *one) for one in asked]
    errors = [racer.exception() for racer in racers if racer.exception() is not None]
    assert len(errors) < 4
    assert all(type(error) is LockedError for error in errors), errors
    assert [row.epoch for row in read_metrics(tmp_path / "run")] == [0, 1, 2]
    assert len((tmp_path / "run" / "timing.jsonl").read_text().splitlines()) == 3
    assert same_files(begun, tmp_path / "run")


def test_another_store_is_refused(place, begun, tmp_path):
    other = school(tmp_path, view_seed=1)
    with pytest.raises(MismatchError, match=r"knowledge_id.*use another --out"):
        distilled(other, begun)


def test_a_folder_of_something_else_is_refused(place, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(MismatchError, match=r"holds thesis.txt but no run.json; give an empty or new folder"):
        distilled(place, tmp_path / "run")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_another_version_is_refused_unless_allowed(place, tmp_path):
    distilled(place, tmp_path / "run", run={"until": 1})
    folder = RunFolder(path=tmp_path / "run")
    record = state.read_record(folder)
    record.environment.versions["torch"] = "1.0"
    state.write_record(folder, record)
    with pytest.raises(MismatchError, match=r"versions\.torch.*1\.0"):
        distilled(place, tmp_path / "run")
    distilled(place, tmp_path / "run", run={"until": 2, "machine": on_cpu(allow_env_change=True)})
    assert [change.versions["torch"] for change in state.read_record(folder).changes] == [version("torch")]


def test_the_thread_count_of_the_start_is_put_in_force_again_and_another_refused(place, tmp_path):
    before = torch.get_num_threads()
    seen = []

    def progress(what, done, total, remark):
        seen.append(torch.get_num_threads())

    distilled(place, tmp_path / "run", run={"until": 1, "machine": on_cpu(threads=before + 1), "progress": progress})
    distilled(place, tmp_path / "run", run={"until": 2, "progress": progress})
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before
    with pytest.raises(MismatchError, match=rf"threads.*{before + 1}.*{before}.*--allow-env-change continues anyway"):
        distilled(place, tmp_path / "run", run={"machine": on_cpu(threads=before)})


def test_the_record_names_what_decided_the_run(place, begun):
    record = state.read_record(RunFolder(path=begun))
    assert (record.inputs.knowledge_id, record.inputs.given) == (place.knowledge.knowledge_id, None)
    assert record.settings["keep"] == 0.6
    assert {"checkpoint_seconds", "memory_gb"}.isdisjoint(record.settings)
    assert set(environment.COMPARED) <= record.environment.model_fields_set


def test_what_killed_writers_left_is_removed(place, tmp_path):
    distilled(place, tmp_path / "run", run={"until": 1})
    names = ("values.parquet.tmp-77", "stages/0/manifest.parquet.tmp-77", "checkpoint/0123456789abcdef.safetensors")
    left = [tmp_path / "run" / name for name in names]
    for file in left:
        file.write_bytes(b"half")
    distilled(place, tmp_path / "run", run={"until": 2})
    assert not any(file.exists() for file in left)


def test_a_checkpoint_is_whole_and_alone(tmp_path):
    for name in ("left", "right"):
        folder = RunFolder(path=tmp_path / name)
        folder.path.mkdir()
        assert load_checkpoint(folder) is None
        for step in range(3):
            record = state.Checkpoint(epoch=1, step=step, samples=9, rows=ROWS[:1], optimizer={})
            save_checkpoint(folder, {"a": torch.full((2, 3), float(step)), "b": torch.arange(step)}, record)
    assert same_files(tmp_path / "left", tmp_path / "right")
    tensors, found = load_checkpoint(folder)
    assert found == record
    assert torch.equal(tensors["a"], torch.full((2, 3), 2.0))
    assert torch.equal(tensors["b"], torch.arange(2))
    assert len(list(folder.checkpoints.glob("*.safetensors"))) == 1


def test_metrics_and_summary_are_read_back(place, begun, tmp_path):
    assert [row.epoch for row in read_metrics(begun)] == [0, 1, 2]
    with pytest.raises(UnfinishedError, match="is not finished; run its command again"):
        read_summary(begun)
    with pytest.raises(NotFoundError, match="no run at"):
        read_summary(tmp_path)
    with pytest.raises(NotFoundError, match="no metrics at"):
        read_metrics(tmp_path)


def row(epoch, samples_so_far, **measured):
    plain = {"learning_rate": 0.1, "samples": 6, "loss": 1.0, "train_accuracy": 0.5, "view": 0}
    return state.MetricsRow(epoch=epoch, samples_so_far=samples_so_far, **plain, **measured)


ROWS = [
    row(0, 10, test_accuracy=0.2, test_calibration_error=0.1),
    row(1, 16),
    row(2, 22, test_accuracy=0.7, test_calibration_error=0.1),
    row(3, 28, test_accuracy=0.5, test_calibration_error=0.3),
]


def test_an_outcome_is_arithmetic_on_the_rows():
    found = state.outcome(ROWS, 10, 4)
    assert (found.accuracy_last, found.accuracy_best, found.best_epoch) == (0.5, 0.7, 2)
    assert (found.relative_cost, found.student_samples, found.calibration_error) == (0.7, 28, 0.3)


def test_clock_times_stand_apart_and_a_torn_last_line_is_forgiven(begun, tmp_path):
    assert not [name for name, data in promised(begun).items() if b"seconds" in data]
    rows = [json.loads(line) for line in (begun / "timing.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert logged_seconds(begun / "timing.jsonl") == pytest.approx(sum(row["seconds"] for row in rows))
    (tmp_path / "timing.jsonl").write_bytes(b'{"seconds":1.5}\n{"seco')
    for _ in range(2):
        state.add_timing(RunFolder(path=tmp_path), {"seconds": 2.0})
    assert logged_seconds(tmp_path / "timing.jsonl") == 3.5  # the first went into the torn line


def test_a_grown_store_continues_a_run_as_it_began(place, begun, tmp_path):
    """More views are more knowledge of the same kind, but a run must not change its views half way."""
    other = school(tmp_path)
    distilled(other, tmp_path / "run", run={"until": 3})
    precomputed(other.knowledge.path, other.data, other.network, views=4)
    assert reader.open(other.knowledge.path).views == 4
    distilled(other, tmp_path / "run")
    distilled(place, tmp_path / "whole")
    assert same_files(tmp_path / "whole", tmp_path / "run")


def requery_without_teacher(here, path):
    """A set with mixes to start from, and nobody to ask about them: the run has kept the set when it finds out."""
    chosen = here.root / "train" / "stages" / "1" / "manifest.parquet"
    given = words(here.root, "train", path, manifest=chosen, stages=1)
    place = given.index("--teacher")
    return given[:place] + given[place + 2 :]


ENDED = {
    "fit diverged": ("fit", lambda here, path: words(here.root, "fit", path, learning_rate=1e30), {}, 5),
    "train diverged": ("train", lambda here, path: words(here.root, "train", path, learning_rate=1e30), {}, 5),
    "train refused": ("train", requery_without_teacher, {}, 2),
    "fit killed": (
        "fit", lambda here, path: words(here.root, "fit", path, seed=3), {"KCDCACHE_CRASHPOINT": "9"}, -signal.SIGKILL
    ),
    "train killed": (
        "train", lambda here, path: words(here.root, "train", path, threads=2), {"KCDCACHE_CRASHPOINT": "9"},
        -signal.SIGKILL,
    ),
}  # fmt: skip
"""how a first run ended before its first checkpoint -> its command, its words, its environment and its exit code"""


@pytest.mark.parametrize("how", ENDED)
def test_a_run_that_ended_before_its_first_checkpoint_is_begun_anew_by_a_corrected_command(here, tmp_path, how):
    name, asked, variables, code = ENDED[how]
    path, log = tmp_path / "run", tmp_path / "log"
    assert finished(here.start, asked(here, path), log, **variables) == code, log.read_text()
    assert (path / "run.json").exists()
    assert not (path / "checkpoint" / "latest.json").exists()
    mine = [path / "notes.txt", path / "stages" / "0" / "mine.txt"]
    for file in mine:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    succeeds(here.start, words(here.root, name, path), log)
    assert [file.read_text() for file in mine] == ["mine", "mine"]
    for file in mine:
        file.unlink()
    assert same_files(here.root / name, path)
    assert not state.read_record(RunFolder(path=path)).changes


def test_a_run_with_a_checkpoint_inside_its_first_epoch_is_never_discarded(here, tmp_path):
    path, log = tmp_path / "run", tmp_path / "log"
    slow = {"batch_size": 8, "checkpoint_seconds": 0}
    process = here.start(words(here.root, "fit", path, **slow), log)
    while not process.ended(0.001) and not (path / "checkpoint" / "latest.json").exists():
        pass
    process.kill()
    assert not (path / "metrics.jsonl").exists()
    before = unlocked(everything(path))
    assert finished(here.start, words(here.root, "fit", path, **slow, learning_rate=0.01), log) == 2
    assert "holds a run with learning_rate = 0.05, requested now: 0.01" in log.read_text()
    assert unlocked(everything(path)) == before
