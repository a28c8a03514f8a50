"""Files of every format, written once and committed (see golden/make.py), read and resumed by today's code."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from damaging import files_of
from pupils import same_files
from stores import content, creating, finish

from kcdcache import environment
from kcdcache.commands import verify
from kcdcache.errors import MismatchError, UnfinishedError
from kcdcache.runs import check, state
from kcdcache.runs.folder import RunFolder
from kcdcache.store import reader
from kcdcache.store.writer import write_documents

spec = importlib.util.spec_from_file_location("golden_make", Path(__file__).parent / "golden/make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
GOLDEN = make.FOLDER
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
MOST_BYTES = 600_000


@pytest.fixture(scope="module")
def read():
    return make.read_all(GOLDEN)


@pytest.fixture
def place(tmp_path):
    """A copy of all golden files, for commands that write."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


def test_everything_golden_is_named(read):
    assert set(read) == set(EXPECTED)
    assert sum((GOLDEN / name).stat().st_size for name in files_of(GOLDEN)) < MOST_BYTES


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_read_is_what_was_written(read, name):
    assert read[name]["sha256"] == EXPECTED[name]["sha256"]
    assert {key: read[name][key] for key in read[name] if key not in ("sha256", "first_values")} == {
        key: EXPECTED[name][key] for key in EXPECTED[name] if key not in ("sha256", "first_values")
    }
    for field, values in EXPECTED[name].get("first_values", {}).items():
        assert read[name]["first_values"][field] == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("names", [make.STORES, make.requeried(GOLDEN), [*make.MANIFESTS, "values.parquet", "fitted"]])
def test_golden_files_are_in_order(names):
    assert names
    for name in names:
        verify.verify(GOLDEN / name, read_data=True)


@pytest.mark.parametrize("name", make.RUNS)
def test_golden_runs_are_in_order(name):
    verify.verify(GOLDEN / "finished" / name)
    found = check.check(GOLDEN / "interrupted" / name)
    assert (found.problems, found.finished) == ((), False)


def test_an_unfinished_golden_store_is_refused_then_resumed_to_the_bytes_of_its_finished_twin(place):
    path, twin = place / make.UNFINISHED, place / "stores/float16-none"
    with pytest.raises(UnfinishedError, match="no commit record"):
        reader.open(path)
    with creating(path, make.plan()) as writing:
        assert len(writing.pending()) == len(writing.parts) - 1
        finish(writing)
    write_documents(twin, make.plan())  # it was made before axes had names
    (path / "_kcd/lock").unlink()
    assert content(path) == content(twin)


@pytest.mark.parametrize("name", make.RUNS)
def test_an_interrupted_golden_run_is_resumed(place, name):
    path = place / "interrupted" / name
    if same_environment(path):
        make.train(place, path, name)
        assert same_files(path, place / "finished" / name)
        return
    with pytest.raises(MismatchError, match="--allow-env-change continues anyway"):
        make.train(place, path, name)
    summary = make.train(place, path, name, allow_env_change=True)
    finished = state.read_summary(place / "finished" / name)
    assert (summary.epochs, summary.count, summary.kept) == (finished.epochs, finished.count, finished.kept)
    assert check.check(path).problems == ()


def same_environment(path):
    known = state.read_record(RunFolder(path=path)).latest.document()
    return not environment.changed(known, environment.environment(torch.device("cpu"), 1))
