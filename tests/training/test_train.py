"""One stage of a student on one manifest: resume, values, memory, what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lessons import condensed, opinionated, precomputed
from pupils import TRAIN, BrokenOffError, distilled, once, promised, same_files, school, settings, stop_after

from kcdcache import rng
from kcdcache.condense import manifest, value_files
from kcdcache.errors import MismatchError, NonFiniteError, SettingsError
from kcdcache.methods import registry as methods_registry
from kcdcache.networks import registry as networks_registry
from kcdcache.networks import weights
from kcdcache.runs import folder
from kcdcache.runs.state import load_checkpoint, read_metrics, read_summary
from kcdcache.settings import TrainSettings
from kcdcache.store import reader
from kcdcache.training import distill
from kcdcache.training.stage import views_used


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return school(tmp_path_factory.mktemp("school"))


@pytest.fixture(scope="module")
def runs(place):
    return once(place)


@pytest.mark.parametrize("epochs", [1, 2, 3, 6])
def test_broken_off_after_an_epoch_and_resumed_gives_the_same_bytes(place, runs, tmp_path, epochs):
    with pytest.raises(BrokenOffError):
        distilled(place, tmp_path / "run", run={"progress": stop_after(epochs)})
    distilled(place, tmp_path / "run")
    assert same_files(runs(), tmp_path / "run")


def test_a_requery_broken_off_inside_the_teachers_work_resumes(place, runs, tmp_path):
    whole = runs(mix_target="requery")
    stops = 0
    for step in range(1, 12):
        try:
            distilled(place, tmp_path / "run", mix_target="requery", run={"progress": stop_after(step)})
            break
        except BrokenOffError:
            stops += 1
    assert stops > 3
    assert same_files(whole, tmp_path / "run")


@pytest.mark.parametrize("change", [{"record": "last"}, {"record": "ema"}, {"record_mixed": False}])
def test_how_values_are_recorded_decides_what_is_kept(runs, change):
    plain, other = (runs(**given) for given in ({}, change))
    assert promised(plain)["stages/0/manifest.parquet"] == promised(other)["stages/0/manifest.parquet"]
    assert promised(plain)["values.parquet"] != promised(other)["values.parquet"]


def test_without_mixed_values_only_points_kept_as_they_are_are_counted(runs):
    run = runs(record_mixed=False)
    first = value_files.read(run / "stages" / "0" / "values.parquet", TRAIN).values.visits
    second = value_files.read(run / "stages" / "1" / "values.parquet", TRAIN).values.visits
    chosen = manifest.read(run / "stages" / "1" / "manifest.parquet")
    expected = np.zeros(TRAIN, int)
    expected[chosen.index[~chosen.mixed]] = 2
    assert chosen.mixed.any()
    assert np.array_equal(second - first, expected)


def test_values_name_their_student_knowledge_and_epoch(place, runs):
    for stage, epoch in ((0, 2), (1, 4), (2, 6)):
        found = value_files.read(runs() / "stages" / str(stage) / "values.parquet", TRAIN)
        assert found.document["epoch"] == epoch
        assert found.document["student"] == settings().student
        assert found.document["knowledge_id"] == place.knowledge.knowledge_id
        assert np.array_equal(found.labels, place.data.train.labels)


def test_metrics_have_a_row_an_epoch(runs):
    rows = read_metrics(runs())
    assert [row.epoch for row in rows] == [*range(6)]
    assert [row.stage for row in rows] == [0, 0, 1, 1, 2, 2]
    assert [row.view for row in rows] == [0, 1, 2, 0, 1, 2]
    assert [row.samples for row in rows] == [row.kept for row in rows]
    assert np.cumsum([row.samples for row in rows]).tolist() == [row.samples_so_far for row in rows]
    assert all(0 <= row.agreement <= 1 and 0 <= row.train_accuracy <= 1 for row in rows)


def test_the_student_saved_is_the_one_measured(place, runs):
    run = runs(student="resnet8")
    document, state = weights.load_network(run, "student")
    assert (document["architecture"], document["epoch"]) == ("resnet8", 6)
    network = networks_registry.build("resnet8", 10)
    weights.load_into(network, state, "student")
    network.eval()
    pixels = torch.from_numpy(place.data.test.images(np.arange(60))).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(document["transform"][key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    guess = network((pixels - mean) / std).argmax(1)
    right = float((guess.numpy() == place.data.test.labels).mean())
    assert abs(right - read_summary(run)["accuracy_last"]) < 1e-9


def test_views_used_are_those_of_the_epochs():
    assert views_used(0, 40, 1) == (0,)
    assert views_used(38, 42, 40) == (0, 1, 38, 39)
    assert views_used(2, 100, 3) == (0, 1, 2)


def test_weights_of_the_manifest_weigh_the_loss(place, tmp_path):
    chosen = condensed(place.knowledge, keep=0.6)
    heavy = replace(chosen, weight=np.linspace(0.1, 3, len(chosen)).astype(np.float32))
    for name, given in (("plain", chosen), ("heavy", heavy)):
        distilled(place, tmp_path / name, given=given, stages=1, epochs=1)
    left, right = (promised(tmp_path / name)["student.safetensors"] for name in ("plain", "heavy"))
    assert left != right


@pytest.mark.parametrize(
    "change",
    [{"mix": "additive_clip"}, {"mix_label": "mix"}, {"mix_target": "keep"}, {"mix_target": "linear_logit"}],
)
def test_each_way_of_mixing_teaches_something_else(runs, change):
    plain, other = (runs(keep=0.5, stages=2, **given) for given in ({}, change))
    before, after = (read_metrics(run) for run in (plain, other))
    assert before[:3] == after[:3]  # nothing is mixed in the first stage
    assert before[3].mixed > 0
    assert before[3].loss != after[3].loss


@pytest.mark.parametrize("encoding", ["float16", "top:8"])
def test_shorter_encodings_teach_nearly_the_same(place, runs, tmp_path, encoding):
    knowledge = precomputed(tmp_path / "store", place.data, place.network, encoding=encoding)
    material = distill.Material(data=place.data, knowledge=knowledge)
    distill.run(settings(keep=1.0), material, out=tmp_path / "run", device="cpu")
    exact, found = (read_metrics(run) for run in (runs(keep=1.0), tmp_path / "run"))
    np.testing.assert_allclose(found[0].loss, exact[0].loss, rtol=1e-3 if encoding == "float16" else 0.05)


def test_a_missing_field_names_the_command_that_adds_it(place, tmp_path):
    knowledge = precomputed(tmp_path / "store", place.data, place.network, fields=("penultimate",))
    material = distill.Material(data=place.data, knowledge=knowledge)
    with pytest.raises(
        MismatchError, match=r"reads logits; the store lacks logits and holds penultimate\. Add.*precompute --for kd"
    ):
        distill.run(settings(), material, out=tmp_path / "run", device="cpu")


def test_an_unknown_method_or_student_is_refused_before_anything_is_written(place, tmp_path):
    with pytest.raises(SettingsError, match="unknown method 'kdd'; did you mean 'kd'"):
        distilled(place, tmp_path / "run", method="kdd")
    assert not (tmp_path / "run").exists()
    with pytest.raises(SettingsError, match="unknown network 'resnet9'; did you mean"):
        distilled(place, tmp_path / "run", student="resnet9")


def test_after_a_wrong_student_the_folder_is_free_again(place, tmp_path):
    with pytest.raises(SettingsError, match="unknown network"):
        distilled(place, tmp_path / "run", student="resnet9")
    assert distilled(place, tmp_path / "run", epochs=3, stages=1)["finished"]


def test_a_diverged_student_keeps_its_last_good_checkpoint(place, tmp_path):
    wild = {"learning_rate": 1e30, "warmup_epochs": 0, "student": "resnet8"}
    with pytest.raises(NonFiniteError, match=r"the training loss is (nan|inf) in epoch 0"):
        distilled(place, tmp_path / "run", checkpoint_seconds=0, **wild)
    assert not (tmp_path / "run" / "student.safetensors").exists()
    kept = tmp_path / "run" / "checkpoint" / "latest.json"
    if kept.exists():
        state, record = load_checkpoint(folder.RunFolder(path=tmp_path / "run"))
        assert record["step"] >= 1
        assert all(torch.isfinite(value).all() for name, value in state.items() if name.startswith("sum."))


def test_the_order_of_an_epoch_is_the_subsets_of_the_whole(place, tmp_path):
    """Paired seeds are paired: what is kept is visited in the order it has among everything."""
    chosen = condensed(place.knowledge, keep=0.6)
    whole = rng.epoch_order(0, 3, np.arange(TRAIN))
    assert [i for i in whole if i in set(chosen.index)] == rng.epoch_order(0, 3, chosen.index).tolist()


def test_defaults_are_the_papers_recipe():
    plain = TrainSettings()
    assert (plain.epochs, plain.batch_size, plain.learning_rate, plain.momentum) == (240, 64, 0.05, 0.9)
    assert (plain.weight_decay, plain.keep, plain.stages, plain.cost_exponent) == (5e-4, 0.7, 6, 0.03)
    resolved = methods_registry.choose(plain).weights
    assert (resolved.gamma, resolved.alpha, resolved.temperature) == (0.1, 0.9, 4.0)


def test_opinionated_teachers_are_not_uniform(place):
    """Else every test here would compare students of one and the same flat target."""
    probabilities = torch.from_numpy(reader.open(place.knowledge.path).read("logits", 0, np.arange(TRAIN))).softmax(1)
    assert probabilities.max(1).values.mean() > 0.2
    assert opinionated(networks_registry.build("resnet8", 10, 1)).fc.weight.abs().max() > 1
