"""Data and teacher to store: resumed, grown, imported, guarded, checked again."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from lessons import CLASSES, CPU, condensed, digits, opinionated, teacher_of
from pupils import (
    SPEC,
    TRAIN,
    BrokenOffError,
    command,
    everything,
    leftovers,
    promised,
    same_files,
    school,
    stop_after,
)
from torch import nn

from kcdcache.commands import verify
from kcdcache.condense import manifest
from kcdcache.errors import MismatchError, NonFiniteError, NotFoundError, SettingsError, UnfinishedError
from kcdcache.networks import registry, weights
from kcdcache.networks.input_transform import InputTransform
from kcdcache.progress import silent
from kcdcache.settings import PrecomputeSettings
from kcdcache.store import plan as plan_
from kcdcache.store import reader
from kcdcache.teacher import precompute, teacher
from kcdcache.training import requery
from kcdcache.views import rules

FIELDS = ("logits", "penultimate")
CROPS = {"augment": "crop", "padding": 2, "batch_size": 64, "min_accuracy": 0}
IMPORT = {"augment": "crop", "padding": 2, "encoding": "float32", "min_accuracy": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return school(tmp_path_factory.mktemp("school"), fields=FIELDS)


def run(place, path, network=None, progress=silent, data=None, **changes):
    wanted = PrecomputeSettings(**(CROPS | {"views": 3, "encoding": "float32", "fields": FIELDS} | changes))
    return precompute.run(wanted, data or place.data, network or place.network, path, progress)


def live(place, view, index, batch=64):
    """The teacher's outputs on the store's fixed batches, computed here."""
    rule = place.knowledge.knowledge.views
    parts = []
    for start in range(0, len(index), batch):
        chosen = index[start : start + batch]
        images = torch.from_numpy(place.data.train.images(chosen))
        pixels = rules.apply(rule, images, rules.parameters(rule, chosen, view))
        parts.append(teacher.outputs(place.network, pixels, FIELDS))
    return {field: torch.cat([part[field] for part in parts]).numpy() for field in FIELDS}


@pytest.mark.parametrize("view", [0, 2])
def test_the_store_holds_what_the_teacher_says(place, view):
    everyone = np.arange(TRAIN)
    for field, expected in live(place, view, everyone).items():
        assert np.array_equal(place.knowledge.read(field, view, everyone), expected), field


def test_a_result_tells_what_is_there(place, tmp_path):
    told = run(place, tmp_path / "store")
    index = np.arange(TRAIN)
    right = [float((live(place, v, index)["logits"].argmax(1) == place.data.train.labels).mean()) for v in range(3)]
    assert (told["count"], told["views"], told["teacher_forwards"]) == (TRAIN, 3, 3 * TRAIN)
    assert told["teacher_accuracy"] == right
    assert told["fields"] == {"logits": "float32", "penultimate": "float32"}
    assert told["knowledge_id"] == place.knowledge.knowledge_id


@pytest.mark.parametrize("parts", [1, 2])
def test_broken_off_and_resumed_gives_the_same_bytes(place, tmp_path, parts):
    with pytest.raises(BrokenOffError):
        run(place, tmp_path / "store", progress=stop_after(parts))
    with pytest.raises(UnfinishedError, match="run the same `kcdcache precompute` again"):
        reader.open(tmp_path / "store")
    run(place, tmp_path / "store")
    assert same_files(place.knowledge.path, tmp_path / "store")
    assert not leftovers(tmp_path)


def test_resuming_computes_only_what_is_missing(place, tmp_path):
    with pytest.raises(BrokenOffError):
        run(place, tmp_path / "store", progress=stop_after(2))
    done = []
    run(place, tmp_path / "store", progress=lambda what, now, total, remark: done.append((now, total)))
    assert done[-1] == (3 * TRAIN, 3 * TRAIN)
    assert done[0][0] >= 2 * TRAIN


def test_a_finished_store_changes_no_byte(place, tmp_path):
    first = run(place, tmp_path / "store")
    before = everything(tmp_path / "store")
    assert run(place, tmp_path / "store") == first
    assert run(place, tmp_path / "store", views=2) == first  # fewer views than there are
    assert everything(tmp_path / "store") == before


def test_views_and_fields_grow_to_the_same_values(place, tmp_path):
    run(place, tmp_path / "store", views=1, fields=("logits",))
    before = reader.open(tmp_path / "store")
    run(place, tmp_path / "store", views=2, fields=("logits",))
    run(place, tmp_path / "store", views=3)
    grown, everyone = reader.open(tmp_path / "store"), np.arange(TRAIN)
    assert (grown.views, len(grown.commits)) == (3, 3)
    for field in FIELDS:
        for view in range(3):
            expected = place.knowledge.read(field, view, everyone)
            assert np.array_equal(grown.read(field, view, everyone), expected)
    assert grown.knowledge_id == before.knowledge_id == place.knowledge.knowledge_id
    assert grown.layout_id != before.layout_id


def test_a_growth_broken_off_leaves_the_store_readable_and_resumes(place, tmp_path):
    for path in (tmp_path / "cut", tmp_path / "whole"):
        run(place, path, views=1)
    with pytest.raises(BrokenOffError):
        run(place, tmp_path / "cut", progress=stop_after(1))
    assert reader.open(tmp_path / "cut").views == 1
    for path in (tmp_path / "cut", tmp_path / "whole"):
        run(place, path)
    assert same_files(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"padding": 1}, r"views\.padding"),
        ({"view_seed": 1}, r"views\.seed"),
        ({"encoding": "float16"}, "'logits' is stored as float32"),
    ],
)
def test_another_store_at_the_place_is_refused(place, tmp_path, change, said):
    run(place, tmp_path / "store", views=1)
    with pytest.raises((MismatchError, SettingsError), match=said):
        run(place, tmp_path / "store", **({"views": 1} | change))


def one_ulp_off(network):
    module = copy.deepcopy(network.module)
    with torch.no_grad():
        weight = module.fc.weight.view(-1)[:1]
        weight.copy_(torch.nextafter(weight, torch.tensor([torch.inf])))
    return module, network.transform


OTHER_TEACHERS = {
    "another": (lambda network: (teacher_of(digits(), seed=9).module, network.transform), r"teacher\.weights"),
    "one ulp off": (one_ulp_off, r"teacher\.weights"),
    "another transform": (
        lambda network: (
            network.module,
            InputTransform(tuple(m + 0.01 for m in network.transform.mean), network.transform.std),
        ),
        r"teacher\.transform\.mean",
    ),
}


@pytest.mark.parametrize("which", OTHER_TEACHERS)
def test_another_teacher_at_the_place_is_refused(place, tmp_path, which):
    change, said = OTHER_TEACHERS[which]
    run(place, tmp_path / "store", views=1)
    other = teacher.freeze(*change(place.network), "resnet8", place.data.classes, CPU)
    with pytest.raises(MismatchError, match=said):
        run(place, tmp_path / "store", network=other, views=1)


def test_a_dry_run_writes_nothing(place, tmp_path):
    planned = command(place, "precompute", store=tmp_path / "store", views=3, fields=FIELDS, dry_run=True, **CROPS)
    assert not (tmp_path / "store").exists()
    assert planned["points"] == 3 * TRAIN
    made = run(place, tmp_path / "store", encoding="float16")
    assert made["knowledge_id"] == planned["knowledge_id"]
    assert made["layout_id"] == planned["layout_id"]
    assert planned["bytes"] <= made["bytes"]


def trained(place, path):
    """A teacher that knows its digits by way of least squares: a linear network on pixels."""
    images = place.data.train.images(np.arange(TRAIN)).astype(np.float64) / 255
    inputs = ((images - place.data.mean) / place.data.std).transpose(0, 3, 1, 2).reshape(TRAIN, -1)
    wanted = np.eye(CLASSES)[place.data.train.labels]
    solved = np.linalg.solve(inputs.T @ inputs + 100 * np.eye(inputs.shape[1]), inputs.T @ wanted)
    network = linear(CLASSES)
    with torch.no_grad():
        network[1].weight.copy_(torch.from_numpy(solved.T))
        network[1].bias.zero_()
    torch.save(network.state_dict(), path)
    return path


def linear(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))


def test_a_wrong_normalisation_is_refused(place, tmp_path):
    path = trained(place, tmp_path / "linear.pt")
    options = {"teacher": "test_precompute:linear", "weights": path, "augment": "none", "store": tmp_path / "store"}
    wrong = {"teacher_mean": (125.3, 123.0, 113.9), "teacher_std": (63.0, 62.1, 66.7)}  # of pixels in [0, 255]
    with pytest.raises(
        MismatchError, match=r"right on .*% of the first 200 samples of view 0, expected at least 30.00%"
    ):
        command(place, "precompute", **(options | wrong))
    assert not (tmp_path / "store" / "logits" / "c.0.0.0").exists()
    told = command(place, "precompute", **(options | {"store": tmp_path / "good"}))
    assert told["teacher_accuracy"][0] > 0.9
    told = command(place, "precompute", min_accuracy=0.0, **(options | wrong | {"store": tmp_path / "weak"}))
    assert told["teacher_accuracy"][0] < 0.3


def test_the_demanded_accuracy_is_the_users(place, tmp_path):
    with pytest.raises(MismatchError, match=r"expected at least 99.00%"):
        run(place, tmp_path / "store", min_accuracy=0.99)


def test_a_teacher_of_nothing_is_caught_by_name(place, tmp_path):
    network = opinionated(registry.build("resnet8", CLASSES, 1))
    with torch.no_grad():
        network.fc.bias[3] = torch.nan
    broken = teacher.freeze(network, InputTransform(place.data.mean, place.data.std), "r", place.data.classes, CPU)
    with pytest.raises(NonFiniteError, match=r"logits.*0"):
        run(place, tmp_path / "store", network=broken)
    with pytest.raises(UnfinishedError, match="not finished"):
        reader.open(tmp_path / "store")


def test_more_views_than_there_are_is_refused(place, tmp_path):
    with pytest.raises(SettingsError, match="25"):
        run(place, tmp_path / "store", views=26)
    with pytest.raises(SettingsError, match="has no end; give a number"):
        run(place, tmp_path / "store", views="all", augment="resized-crop-flip")


def test_all_views_are_all(place, tmp_path):
    assert run(place, tmp_path / "store", padding=1, views="all", fields=("logits",))["views"] == 9


def test_a_field_only_a_growth_adds_keeps_the_counted_accuracy(place, tmp_path):
    first = run(place, tmp_path / "store", fields=("logits",))
    assert run(place, tmp_path / "store", fields=("penultimate",))["teacher_accuracy"] == first["teacher_accuracy"]


def imported(place, path, logits, **changes):
    file = path.with_suffix(".npy")
    np.save(file, logits)
    return command(place, "precompute", store=path, from_logits=file, **(IMPORT | changes))


def test_imported_logits_are_the_computed_ones(place, tmp_path):
    everyone = np.arange(TRAIN)
    logits = np.stack([place.knowledge.read("logits", view, everyone) for view in range(3)])
    told = imported(place, tmp_path / "store", logits)
    found = reader.open(tmp_path / "store")
    for view in range(3):
        assert np.array_equal(found.read("logits", view, everyone), logits[view])
        assert found.measurements(view)["correct"] == place.knowledge.measurements(view)["correct"]
    assert (told["views"], told["teacher_forwards"]) == (3, 0)
    assert promised(tmp_path / "store")["logits/c.0.0.0"] == promised(place.knowledge.path)["logits/c.0.0.0"]


def test_one_view_may_be_imported_without_its_axis(place, tmp_path):
    logits = place.knowledge.read("logits", 0, np.arange(TRAIN)).astype(np.float64)
    imported(place, tmp_path / "store", logits)
    found = reader.open(tmp_path / "store")
    assert found.views == 1
    assert np.array_equal(found.read("logits", 0, np.arange(TRAIN)), logits.astype(np.float32))


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((TRAIN, 9), np.float32), r"holds float32 \(1, 200, 9\), expected floats of shape \(views, 200, 10\)"),
        (np.zeros((3, 199, 10), np.float32), r"\(3, 199, 10\)"),
        (np.zeros((TRAIN, 10), np.int64), "holds int64"),
        (np.zeros((1, 1, TRAIN, 10), np.float32), r"\(1, 1, 200, 10\)"),
    ],
)
def test_logits_of_another_shape_are_refused(place, tmp_path, array, said):
    with pytest.raises(MismatchError, match=said):
        imported(place, tmp_path / "store", array)
    assert not (tmp_path / "store").exists()


def test_imported_chance_is_refused(place, tmp_path):
    random = np.random.default_rng(0).normal(size=(TRAIN, 10)).astype(np.float32)
    with pytest.raises(MismatchError, match=r"right on .* expected at least 30\.00%"):
        imported(place, tmp_path / "store", random, min_accuracy=None)


def test_what_is_no_array_is_refused(place, tmp_path):
    (tmp_path / "bad.npy").write_bytes(b"not an array")
    for name, said in (("bad.npy", "is not a plain .npy array"), ("none.npy", "no file at")):
        with pytest.raises((SettingsError, NotFoundError), match=said):
            command(place, "precompute", store=tmp_path / "store", from_logits=tmp_path / name, **IMPORT)


def test_imported_logits_cannot_be_asked_again(place, tmp_path):
    imported(place, tmp_path / "store", place.knowledge.read("logits", 0, np.arange(TRAIN)))
    with pytest.raises(MismatchError, match="were imported from elsewhere"):
        verify.verify(tmp_path / "store", data=SPEC, teacher=str(place.teacher))


def test_verify_computes_all_points_when_asked_for_more(place):
    found = verify.recheck(place.knowledge, place.data, place.network, points=10**9)
    assert (found.points, found.differing) == (3 * TRAIN, 0)


def test_recheck_sees_a_teacher_whose_identity_lies(place):
    """A changed library would say other things under the same identity."""
    with torch.no_grad():
        changed = teacher_of(place.data)
        changed.module.fc.weight[2, :4] += 0.5
    lying = replace(changed, identity=place.network.identity)
    found = verify.recheck(place.knowledge, place.data, lying, points=150)
    assert found.differing == found.points
    assert found.largest > 0.01


def test_requery_says_what_the_teacher_says_of_the_mixes(place, tmp_path):
    chosen = condensed(place.knowledge, keep=0.6)
    manifest.write(tmp_path / "set.parquet", chosen)
    told = command(place, "precompute", manifest=tmp_path / "set.parquet", fields=FIELDS)
    found = reader.open(requery.path_for(tmp_path / "set.parquet"))
    rows = np.flatnonzero(chosen.mixed)
    rule = place.knowledge.knowledge.views
    for view in range(3):
        kept, dropped = (crops(place, rule, index[rows], view) for index in (chosen.index, chosen.partner))
        share = torch.from_numpy(chosen.epsilon[rows]).view(-1, 1, 1, 1)
        mixed = (1 - share) * kept + share * dropped
        batched = [teacher.outputs(place.network, part, FIELDS) for part in mixed.split(64)]
        for field in FIELDS:
            expected = torch.cat([part[field] for part in batched]).numpy()
            assert np.array_equal(found.read(field, view, np.arange(len(rows))), expected)
    assert told["teacher_forwards"] == 3 * len(rows)


def crops(place, rule, index, view):
    images = torch.from_numpy(place.data.train.images(index))
    return rules.apply(rule, images, rules.parameters(rule, index, view))


def test_requery_again_changes_no_byte_and_does_not_run(place, tmp_path):
    manifest.write(tmp_path / "set.parquet", condensed(place.knowledge, keep=0.6))
    first = command(place, "precompute", manifest=tmp_path / "set.parquet")
    before = everything(tmp_path)
    assert command(place, "precompute", manifest=tmp_path / "set.parquet") == first
    assert everything(tmp_path) == before


def test_a_set_without_mixes_has_nothing_to_ask(place, tmp_path):
    chosen = condensed(place.knowledge, keep=0.6)
    manifest.write(tmp_path / "set.parquet", replace(chosen, **manifest.plain(chosen.index)))
    with pytest.raises(MismatchError, match=r"no mixed points \(K_Aug is empty\)"):
        command(place, "precompute", manifest=tmp_path / "set.parquet")


def test_a_dry_requery_writes_nothing(place, tmp_path):
    chosen = condensed(place.knowledge, keep=0.6)
    manifest.write(tmp_path / "set.parquet", chosen)
    told = command(place, "precompute", manifest=tmp_path / "set.parquet", dry_run=True)
    assert told["points"] == 3 * int(chosen.mixed.sum())
    assert [path.name for path in tmp_path.iterdir()] == ["set.parquet"]


def test_a_store_without_a_teacher_named_is_refused(place, tmp_path):
    with pytest.raises(SettingsError, match="--teacher is missing"):
        command(place, "precompute", store=tmp_path / "store", teacher=None)


def test_time_spent_is_logged_apart_from_what_is_promised(place):
    file = place.knowledge.path / "_kcd" / "timing.jsonl"
    assert sum(json.loads(line)["points"] for line in file.read_text().splitlines()) == 3 * TRAIN


def test_stores_batches_are_a_fixed_partition(place):
    """What a student's store says must not depend on where a precompute was cut: bounds never cross a part's start."""
    plan = place.knowledge.plan
    bounds = [pair for part in plan_.parts(plan) for pair in plan.batches(part)]
    assert bounds == [(0, 64), (64, 128), (128, 192), (192, 200)] * 3


def test_a_teachers_file_of_weights_is_the_teacher_in_a_folder(place, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes((place.teacher / "model.safetensors").read_bytes())
    options = CROPS | {"views": 1, "encoding": "float32", "store": tmp_path / "store"}
    command(place, "precompute", teacher="resnet8", weights=path, **options)
    assert reader.open(tmp_path / "store").knowledge_id == place.knowledge.knowledge_id
    assert weights.load_weights(path).keys() == place.network.module.state_dict().keys()
