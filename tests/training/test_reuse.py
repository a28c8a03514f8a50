"""Reuse of a condensed set: as it is, condensed further inside itself, or with another teacher's store."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from lessons import condensed, precomputed, teacher_of
from pupils import SCHOOL, TRAIN, command, digits, distilled, school

from kcdcache.condense import manifest, value_files
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.runs.state import read_metrics
from kcdcache.training import distill


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return school(tmp_path_factory.mktemp("school"))


@pytest.fixture(scope="module")
def small_set(place):
    return condensed(place.knowledge, keep=0.6)


def test_a_reused_set_is_taught_as_it_is(place, small_set, tmp_path):
    summary = distilled(place, tmp_path / "run", given=small_set, stages=1, student="resnet14", epochs=4)
    assert [row.kept for row in read_metrics(tmp_path / "run")] == [120] * 4
    assert [row.mixed for row in read_metrics(tmp_path / "run")] == [int(small_set.mixed.sum())] * 4
    assert sorted(path.name for path in (tmp_path / "run" / "stages").iterdir()) == ["0"]
    assert summary["condensed_set"] == "stages/0/manifest.parquet"
    assert (summary["kept"], summary["relative_cost"]) == (120, 0.6)
    kept = manifest.read(tmp_path / "run" / "stages" / "0" / "manifest.parquet")
    assert kept.digest == small_set.digest


def test_a_reused_sets_values_are_of_its_own_samples(place, small_set, tmp_path):
    distilled(place, tmp_path / "run", given=small_set, stages=1, epochs=2, run={"until": 99})
    found = value_files.read(tmp_path / "run" / "values.parquet", TRAIN).values
    assert np.array_equal(np.flatnonzero(found.visits), small_set.index)
    assert set(found.visits[small_set.index].tolist()) == {2}


@pytest.mark.parametrize("k0", ["complement", "stage_slice"])
def test_a_reused_set_is_condensed_inside_itself(place, small_set, tmp_path, caplog, k0):
    with caplog.at_level(logging.INFO, "kcdcache"):
        summary = distilled(place, tmp_path / "run", given=small_set, keep=0.3, k0=k0)
    assert "reuse: the candidates are the 120 samples of the given set" in caplog.text
    before = set(small_set.index.tolist())
    for number in (1, 2, 3):
        found = manifest.read(tmp_path / "run" / "stages" / str(number) / "manifest.parquet")
        assert set(found.index.tolist()) < before
        before = set(found.index.tolist())
        assert found.rule["candidates"] == "current"
    assert summary["kept"] == len(before) == 60


def test_a_fresh_run_condenses_among_everything(place, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "kcdcache"):
        distilled(place, tmp_path / "run")
    assert "reuse" not in caplog.text
    found = manifest.read(tmp_path / "run" / "stages" / "1" / "manifest.parquet")
    assert found.rule["candidates"] == "global"


def test_a_reused_set_cannot_grow(place, small_set, tmp_path):
    with pytest.raises(SettingsError, match=r"keep 0.8 exceeds the given set's share 0.6"):
        distilled(place, tmp_path / "run", given=small_set, keep=0.8)


@pytest.fixture(scope="module")
def other_teacher(place):
    network = teacher_of(place.data, seed=2)
    return precomputed(place.root / "other", place.data, network)


def test_another_teachers_store_takes_a_set_only_by_transfer(place, small_set, other_teacher, tmp_path):
    path = tmp_path / "set.parquet"
    manifest.write(path, small_set)
    options = SCHOOL | {"stages": 1, "out": tmp_path / "run", "manifest": path, "store": other_teacher.path}
    with pytest.raises(MismatchError, match=r"the store holds .* or --transfer to use it with another teacher's"):
        command(place, "train", **options)
    assert not (tmp_path / "run").exists()
    summary = command(place, "train", transfer=True, **options)
    assert summary["knowledge_id"] == other_teacher.knowledge_id != small_set.knowledge_id
    kept = manifest.read(tmp_path / "run" / "stages" / "0" / "manifest.parquet")
    assert (kept.parent, kept.knowledge_id) == (small_set.digest, other_teacher.knowledge_id)
    assert np.array_equal(kept.index, small_set.index)
    assert command(place, "train", transfer=True, **options) == summary


def test_a_transfer_to_other_data_is_refused(place, small_set, tmp_path):
    dataset = digits(TRAIN, 50)
    images = dataset.train.source.pixels.copy()
    images[7, 3, 3, 0] ^= 1
    dataset = replace(dataset, train=replace(dataset.train, source=replace(dataset.train.source, pixels=images)))
    elsewhere = precomputed(tmp_path / "store", dataset, place.network)
    bound = replace(small_set, data_digest=place.data.identity().digest)
    with pytest.raises(MismatchError, match="--transfer needs a store of the same data: data digest"):
        distill.accept(bound, elsewhere, transfer=True)
    smaller = precomputed(tmp_path / "smaller", digits(150, 50), place.network)
    with pytest.raises(MismatchError, match=r"--transfer needs a store of the same data: samples 200 .* 150"):
        distill.accept(bound, smaller, transfer=True)
