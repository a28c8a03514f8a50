import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import content, knowledge, make

from kcdcache import settings
from kcdcache.commands import condense as condense_command
from kcdcache.condense import manifest, summary, value_files, values
from kcdcache.errors import LockedError, MismatchError, NotFoundError, SettingsError

COUNT = 150


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store's records, and values measured on it."""
    place = tmp_path_factory.mktemp("condenser")
    make(place / "store")
    for file in (place / "store").rglob("c.*"):
        file.unlink()  # nothing but its identity is needed
    write_values(place / "values.parquet")
    return place


@pytest.fixture
def place(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "place"))


def some_values(seed=0):
    random = np.random.default_rng(seed)
    return values.Values(random.integers(1, 5, COUNT).astype(np.int32), random.random(COUNT).astype(np.float32))


def labels():
    return np.arange(COUNT) % 2


def write_values(path, knowledge_id=None, seed=0):
    document = {"knowledge_id": knowledge_id or knowledge().knowledge_id, "student": "resnet8", "epoch": 3}
    value_files.write(path, some_values(seed), labels(), document)
    return path


def run(place, dry_run=False, **more):
    given = {"values": place / "values.parquet", "store": place / "store", "keep": 0.6, "out": place / "out/m.parquet"}
    return condense_command.run(settings.make(settings.CondenseCommand, given | more), dry_run=dry_run)


def test_the_manifest_is_that_of_condense(place):
    found = run(place, eps_max=0.2, ranking="random", condense_seed=3)
    expected = summary.condense(
        some_values(), settings.CondenseSettings(eps_max=0.2, ranking="random", condense_seed=3),
        manifest.Samples(knowledge().knowledge_id, COUNT, labels(), 2, knowledge().data.digest), stage=1, keep=0.6,
    )  # fmt: skip
    assert manifest.read(place / "out/m.parquet").digest == expected.digest == found["digest"]
    assert (found["already"], found["values_from"], found["out"]) == (False, "kcdcache", str(place / "out/m.parquet"))


def test_the_same_again_says_so_and_changes_nothing(place):
    run(place)
    before = content(place)
    assert run(place)["already"] is True
    assert content(place) == before


def test_another_manifest_is_never_overwritten(place):
    run(place)
    before = content(place)
    with pytest.raises(LockedError, match=r"m.parquet holds another manifest; .*: give another --out"):
        run(place, keep=0.5)
    assert content(place) == before


def test_a_dry_run_tells_the_manifest_and_writes_nothing(place):
    before = content(place)
    found = run(place, dry_run=True)
    assert content(place) == before
    assert found["would"] == "condense"
    assert found["digest"] == run(place)["digest"]


def test_the_next_stage_follows_the_previous_manifest(place):
    first = run(place, out=place / "one.parquet", stage=4)
    second = run(place, previous=place / "one.parquet", keep=0.5, out=place / "two.parquet")
    assert (first["stage"], second["stage"], second["parent"]) == (4, 5, first["digest"])


def test_current_candidates_are_those_of_the_previous_manifest(place):
    run(place, out=place / "one.parquet")
    run(
        place,
        previous=place / "one.parquet",
        keep=0.5,
        candidates="current",
        ranking="random",
        out=place / "two.parquet",
    )
    one, two = manifest.read(place / "one.parquet"), manifest.read(place / "two.parquet")
    assert set(two.index) < set(one.index)


def test_values_of_other_knowledge_are_refused_with_both_ids(place):
    write_values(place / "theirs.parquet", "kk")
    with pytest.raises(
        MismatchError, match=rf"theirs.parquet were measured on knowledge kk, .* holds {knowledge().knowledge_id}"
    ):
        run(place, values=place / "theirs.parquet")


def test_a_previous_manifest_of_other_knowledge_is_refused(place):
    manifest.write(place / "theirs.parquet", manifest.full(manifest.Samples("kk", COUNT)))
    with pytest.raises(MismatchError, match=r"the manifest was made for knowledge kk, the store holds "):
        run(place, previous=place / "theirs.parquet")


def test_another_tools_values_are_taken_and_named(place):
    order = np.random.default_rng(1).permutation(COUNT)
    pq.write_table(pa.table({"value": order.astype(np.float64), "index": order}), place / "theirs.parquet")
    found = run(place, values=place / "theirs.parquet", augment_kept=False)
    assert (found["values_from"], found["classes"]) == ("another tool", 0)
    assert manifest.read(place / "out/m.parquet").index.tolist() == list(range(60, COUNT))


def test_samples_another_tool_leaves_out_are_unseen(place):
    pq.write_table(pa.table({"index": np.arange(100), "value": np.ones(100)}), place / "theirs.parquet")
    found = run(place, values=place / "theirs.parquet", keep=0.5)
    assert found["unseen"] == 50
    last = run(place, values=place / "theirs.parquet", keep=0.5, unseen="last", out=place / "last.parquet")
    assert last["unseen"] == 0


def test_another_tools_values_without_labels_cannot_be_stratified(place):
    pq.write_table(pa.table({"index": np.arange(COUNT), "value": np.ones(COUNT)}), place / "theirs.parquet")
    with pytest.raises(SettingsError, match="give a values file with a 'label' column"):
        run(place, values=place / "theirs.parquet", stratify=True)


def test_a_store_that_is_not_sealed_has_an_identity_already(place):
    (place / "store/_kcd/commit.0.json").unlink()
    assert run(place)["kept"] == 90


@pytest.mark.parametrize("name", ["values", "store", "previous"])
def test_what_is_missing_is_named(place, name):
    with pytest.raises(NotFoundError, match=r"no .* at .*nowhere"):
        run(place, **{name: place / "nowhere"})
