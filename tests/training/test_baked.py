"""Exported sets whose mixed targets were baked at one temperature."""

from types import SimpleNamespace

import numpy as np
import pytest
from exports import exporting, narrowed, prepared, trained
from lessons import condensed as condensed_set
from lessons import precomputed
from pupils import SPEC, promised

from kcdcache.commands import verify
from kcdcache.condensation import manifest
from kcdcache.datasets import datasets
from kcdcache.errors import SettingsError
from kcdcache.export import condensed_set as export_condensed_set
from kcdcache.runs import state
from kcdcache.store import encoding, reader
from kcdcache.training import batches


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = prepared(tmp_path_factory.mktemp("baked"))
    exporting(place, place.root / "baked", bake=True, temperature=4.0)
    return place


def every_target(opened, chosen, requeried=None, **mixing):
    """Index and view -> probabilities that a student is shown."""
    found = {}
    how = batches.Mixing(**mixing)
    dataset = datasets.load(SPEC)
    with batches.connect(dataset, opened, chosen, mixing=how, requeried=requeried) as source:
        for epoch in range(3):
            for batch in batches.iterate(source, epoch, batch_size=32):
                for row, index in enumerate(batch.index.tolist()):
                    found[index, epoch] = batch.probabilities[row].double().numpy()
    return found


@pytest.mark.parametrize(("rule", "temperature"), [("linear_prob", 4.0), ("linear_logit", 2.0), ("keep", 1.0)])
def test_baked_targets_are_those_that_batches_mix(place, tmp_path, rule, temperature):
    exporting(place, tmp_path / "e", bake=True, temperature=temperature, mix_target=rule)
    opened = export_condensed_set.open(tmp_path / "e")
    mixing = {"temperature": temperature, "target": rule}
    found = every_target(opened.knowledge, opened.manifest, reader.open(opened.mixes), **mixing)
    assert len(found) == 3 * len(place.set)
    for point, probabilities in every_target(place.knowledge, place.set, **mixing).items():
        assert found[point] == pytest.approx(probabilities, abs=2e-6)


def test_targets_baked_in_many_blocks_have_the_same_bytes(place, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BLOCK_BYTES", 100)
    exporting(place, tmp_path / "e", bake=True, temperature=4.0)
    assert promised(tmp_path / "e") == promised(place.root / "baked")


def test_a_baked_set_holds_one_row_for_each_kept_sample(place):
    opened = export_condensed_set.open(place.root / "baked")
    mixes = reader.open(opened.mixes)
    assert (opened.knowledge.plan.count, mixes.count) == (40, 40)
    assert opened.knowledge.held.tolist() == place.set.index[~place.set.mixed].tolist()
    assert list(opened.knowledge.fields) == list(mixes.fields) == ["logits"]
    blank = opened.knowledge.load(0, place.set.index, ("logits",))["logits"]
    assert np.isnan(blank[place.set.mixed]).all()
    assert np.isfinite(blank[~place.set.mixed]).all()


def test_a_student_of_baked_targets_is_the_one_of_mixed_targets_up_to_rounding(place, tmp_path):
    mixed = {"temperature": 4.0, "learning_rate": 0.01}
    trained(tmp_path / "full", store=place.knowledge.path, manifest=place.file, **mixed)
    trained(tmp_path / "baked", condensed=place.root / "baked", **mixed)
    losses = [[row.loss for row in state.read_metrics(tmp_path / name)] for name in ("full", "baked")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    rows = state.read_metrics(tmp_path / "baked")[0]
    assert rows.rows_read == len(place.set) + int(place.set.mixed.sum())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": 2.0}, r"are baked for --temperature 4.0, the run asks for 2.0; give --temperature 4.0, or"),
        ({"mix_target": "keep"}, "are baked for --mix-target linear_prob, the run asks for keep"),
        ({"mix": "additive_clip"}, "are baked for --mix convex, the run asks for additive_clip"),
        ({"stages": 2, "keep": 0.2}, "are baked for --stages 1, the run asks for 2"),
        ({"method": "kd+rkd", "student": "resnet8"}, r"they serve methods that read softened outputs alone \(kd\)"),
        ({"method": "dkd", "student": "resnet8"}, "they serve methods that read softened outputs alone"),
    ],
)
def test_what_baked_targets_cannot_serve_is_refused(place, tmp_path, changes, said):
    given = {"condensed": place.root / "baked", "temperature": 4.0} | changes
    with pytest.raises(SettingsError, match=said):
        trained(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_labels_alone_need_nothing_that_was_baked(place, tmp_path):
    full = trained(tmp_path / "full", store=place.knowledge.path, manifest=place.file, method="ce")
    assert trained(tmp_path / "part", condensed=place.root / "baked", method="ce") == full


def test_a_set_of_mixes_only_is_baked_too(place, tmp_path):
    chosen = condensed_set(place.knowledge, keep=0.3)
    assert chosen.mixed.all()
    manifest.write(tmp_path / "set.parquet", chosen)
    exporting(place, tmp_path / "e", manifest=tmp_path / "set.parquet", bake=True, temperature=4.0)
    verify.verify(tmp_path / "e")
    trained(tmp_path / "run", condensed=tmp_path / "e", temperature=4.0)


def stored_as(place, tmp_path, encoding):
    """Another store of the same teacher, and a set for it."""
    knowledge = precomputed(tmp_path / "store", place.data, place.network, encoding=encoding)
    manifest.write(tmp_path / "set.parquet", narrowed(knowledge))
    return SimpleNamespace(file=tmp_path / "set.parquet", knowledge=knowledge, set=narrowed(knowledge))


def test_baked_targets_are_as_exact_as_the_stores_encoding(place, tmp_path):
    other = stored_as(place, tmp_path, "float16")
    exporting(other, tmp_path / "e", bake=True, temperature=4.0)
    opened = export_condensed_set.open(tmp_path / "e")
    mixes = reader.open(opened.mixes)
    assert {side.fields["logits"].name for side in (opened.knowledge, mixes)} == {"float16"}
    found = every_target(opened.knowledge, other.set, mixes, temperature=4.0)
    wanted = every_target(other.knowledge, other.set, temperature=4.0)
    assert 0 < max(np.abs(found[key] - wanted[key]).max() for key in wanted) < 2e-3


def test_packed_logits_are_exported_but_not_baked(place, tmp_path):
    other = stored_as(place, tmp_path, "top:3")
    with pytest.raises(SettingsError, match=r"keeps logits as top:3, mixed targets need whole rows .* without --bake"):
        exporting(other, tmp_path / "e", bake=True, temperature=4.0)
    exporting(other, tmp_path / "e")
    full = trained(tmp_path / "full", store=other.knowledge.path, manifest=other.file)
    assert trained(tmp_path / "part", condensed=tmp_path / "e") == full


def test_baking_a_set_without_mixes_is_refused(place, tmp_path):
    samples = manifest.Samples(place.knowledge.knowledge_id, 200)
    manifest.write(tmp_path / "full.parquet", manifest.full(samples))
    with pytest.raises(SettingsError, match=r"no mixed points \(K_Aug is empty\), there is nothing to bake"):
        exporting(place, tmp_path / "e", manifest=tmp_path / "full.parquet", bake=True, temperature=4.0)
