import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from condensing import COUNT, identify, labels, some_values
from stores import content, knowledge

from kcdcache import settings
from kcdcache.commands import condense as condense_command
from kcdcache.condensation import large, manifest, summary, value_files
from kcdcache.errors import MismatchError, NotFoundError, SettingsError


@pytest.fixture
def place(tmp_path):
    """What condensing reads of a store, and values measured on it."""
    identify(tmp_path / "store", knowledge())
    return write_values(tmp_path / "values.parquet").parent


def write_values(path, knowledge_id=None):
    document = {"knowledge_id": knowledge_id or knowledge().knowledge_id, "student": "resnet8", "epoch": 3}
    value_files.write(path, some_values(), labels(), document)
    return path


def command(place, **more):
    given = {"values": place / "values.parquet", "store": place / "store", "keep": 0.6, "out": place / "out/m.parquet"}
    return settings.make(settings.CondenseCommand, given | more)


def run(place, dry_run=False, **more):
    return condense_command.run(command(place, **more), dry_run=dry_run)


def test_the_manifest_is_that_of_condense(place):
    found = run(place, eps_max=0.2, ranking="random", condense_seed=3)
    expected = summary.condense(
        some_values(), settings.CondenseSettings(eps_max=0.2, ranking="random", condense_seed=3),
        manifest.Samples(knowledge().knowledge_id, COUNT, labels(), 2, knowledge().data.digest), stage=1, keep=0.6,
    )  # fmt: skip
    assert manifest.read(place / "out/m.parquet").digest == expected.digest == found["digest"]
    assert (found["already"], found["values_from"], found["out"]) == (False, "kcdcache", str(place / "out/m.parquet"))


def test_values_too_large_to_hold_make_the_same_file(place):
    run(place)
    condense_command.run(command(place, out=place / "streamed"), held=COUNT - 1)
    assert (place / "streamed").read_bytes() == (place / "out/m.parquet").read_bytes()


def test_a_dry_run_tells_the_manifest_and_writes_nothing(place):
    before = content(place)
    found = run(place, dry_run=True)
    assert content(place) == before
    assert (found["would"], found["temporary_bytes"]) == ("condense", round(90 * condense_command.BYTES_A_ROW))
    assert found["digest"] == run(place)["digest"]


def test_what_condensing_takes_is_told_before(place):
    told = condense_command.run(command(place, memory_gb=1e-6), dry_run=True)
    assert told["temporary_bytes"] == large.SPILLED_A_SAMPLE * COUNT + round(90 * condense_command.BYTES_A_ROW)
    most = 10**8
    assert 9 * most < condense_command.estimate(command(place, memory_gb=16), most)["memory_bytes"] < 14 * most
    beyond = condense_command.estimate(command(place, memory_gb=0.5), most)
    assert beyond["memory_bytes"] == condense_command.BASE_BYTES + 6 * most
    assert not (place / "out").exists()


def test_the_next_stage_follows_the_previous_manifest(place):
    first = run(place, out=place / "one.parquet", stage=4)
    second = run(place, previous=place / "one.parquet", keep=0.5, out=place / "two.parquet")
    assert (first["stage"], second["stage"], second["parent"]) == (4, 5, first["digest"])


def test_values_of_other_knowledge_are_refused_with_both_ids(place):
    write_values(place / "theirs.parquet", "kk")
    with pytest.raises(
        MismatchError, match=rf"theirs.parquet were measured on knowledge kk, .* holds {knowledge().knowledge_id}"
    ):
        run(place, values=place / "theirs.parquet")


def test_another_tools_values_are_taken_and_named(place):
    order = np.random.default_rng(1).permutation(COUNT)
    pq.write_table(pa.table({"value": order.astype(np.float64), "index": order}), place / "theirs.parquet")
    found = run(place, values=place / "theirs.parquet", augment_kept=False)
    assert (found["values_from"], found["classes"]) == ("another tool", 0)
    assert manifest.read(place / "out/m.parquet").index.tolist() == list(range(60, COUNT))
    with pytest.raises(SettingsError, match="give a values file with a 'label' column"):
        run(place, values=place / "theirs.parquet", stratify=True)


@pytest.mark.parametrize("name", ["values", "store", "previous"])
def test_what_is_missing_is_named(place, name):
    with pytest.raises(NotFoundError, match=r"no .* at .*nowhere"):
        run(place, **{name: place / "nowhere"})
