"""Batches made where the data lie on the device: the bytes of the streaming path, and what is refused."""

import json
import shutil
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lessons import CPU, TinyNet, condensed, digits, precomputed, teacher_of
from pupils import distilled, same_files, school
from torch import nn

from kcdcache import progress
from kcdcache.condense import manifest
from kcdcache.data.images import EncodedImages, Split
from kcdcache.errors import NonFiniteError, SettingsError
from kcdcache.methods import registry
from kcdcache.runs.folder import RunFolder
from kcdcache.runs.state import load_checkpoint
from kcdcache.settings import MethodSettings, OptimizerSettings, PrecomputeSettings
from kcdcache.store import reader
from kcdcache.teacher import precompute
from kcdcache.training import batches, device_batches, evaluation, learner, loop, requery
from kcdcache.views import prefetch, rules

KD = registry.choose(MethodSettings()).weights
COLUMNS = ("logits", "penultimate")
COUNT, SIZE, SEED = 110, 14, 5
ENCODINGS = ("float32", "float16", "top:3")
MIXINGS = [("convex", "linear_prob"), ("convex", "linear_logit"), ("additive_clip", "keep")]
CASES = [(text, *mixing) for text in ENCODINGS for mixing in MIXINGS] + [("float32", "convex", "requery")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Digits, a teacher's stores in several encodings, a condensed set, and the teacher on that set's mixes."""
    dataset, root = digits(COUNT, 30), tmp_path_factory.mktemp("world")
    network = teacher_of(dataset)
    stores = {text: precomputed(root / text, dataset, network, fields=COLUMNS, encoding=text) for text in ENCODINGS}
    chosen = condensed(stores["float32"])
    assert len(chosen) % SIZE
    assert 0 < chosen.mixed.sum() < len(chosen)
    with batches.connect(dataset, stores["float32"], chosen, fields=()) as source:
        requery.write(source, network, stores["float32"], root / "mixes", fields=COLUMNS, view_numbers=range(3))
    mixes = reader.open(root / "mixes")
    return SimpleNamespace(data=dataset, stores=stores, manifest=chosen, mixes=mixes)


def connected(world, encoding="float32", mix="convex", target="linear_prob", chosen=None, names=COLUMNS):
    knowledge = world.stores[encoding]
    found = replace(chosen or world.manifest, knowledge_id=knowledge.knowledge_id)
    mixing = batches.Mixing(mix=mix, target=target, temperature=4.0)
    again = world.mixes if target == "requery" else None
    return batches.connect(world.data, knowledge, found, fields=names, mixing=mixing, requeried=again)


def parts(batch):
    """A batch's tensors by name, those of `knowledge` among them."""
    found = {field.name: getattr(batch, field.name) for field in fields(batch)}
    assert (found.pop("shared"), found.pop("idle")) == (None, False)
    knowledge = found.pop("knowledge")
    return found | {f"knowledge.{name}": value for name, value in knowledge.items()}


def as_bytes(tensor):
    return None if tensor is None else (tensor.dtype, tuple(tensor.shape), tensor.contiguous().numpy().tobytes())


def assert_same_batches(source, epochs=(0, 1, 4), start=0):
    feed = device_batches.Feed(source, CPU, batch_size=SIZE, seed=SEED)
    for epoch in epochs:
        streamed = list(batches.iterate(source, epoch, batch_size=SIZE, seed=SEED, start=start))
        held = list(feed.iterate(epoch, start))
        assert feed.sizes(start) == [len(batch.index) for batch in held]
        for ours, theirs in zip(held, streamed, strict=True):
            left, right = parts(ours), parts(theirs)
            assert list(left) == list(right)
            assert [name for name in left if as_bytes(left[name]) != as_bytes(right[name])] == []
            assert ours.pixels.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("encoding", "mix", "target"), CASES)
def test_batches_have_the_bytes_of_the_streaming_path(world, encoding, mix, target):
    with connected(world, encoding, mix, target) as source:
        assert_same_batches(source)


def test_batches_without_mixes_or_without_knowledge_are_the_same_too(world):
    whole = manifest.full(world.stores["float32"].knowledge_id, COUNT)
    with connected(world, chosen=whole) as source:
        assert_same_batches(source)
    with connected(world, names=()) as source:
        assert_same_batches(source)


def test_an_epoch_continues_at_any_batch(world):
    with connected(world) as source:
        for start in range(6):
            assert_same_batches(source, epochs=(2,), start=start)


@pytest.mark.parametrize("fill", ["zero", "reflect"])
@pytest.mark.parametrize("name", ["none", "crop", "crop-flip"])
def test_views_of_held_images_are_those_of_single_batches(name, fill):
    images = np.random.default_rng(0).integers(0, 256, (20, 9, 7, 3), dtype=np.uint8)
    padding = 0 if name == "none" else 3
    rule = rules.ViewRule(name=name, padding=padding, fill=fill, height=9, width=7, seed=2**63 + 5)
    held = rules.HeldImages(rule, images, CPU)
    chosen = np.array([3, 3, 19, 0])
    for view in range(min(rules.count(rule), 12)):
        expected = rules.parameters(rule, np.arange(20), view)
        assert np.array_equal(held.parameters(view).numpy(), expected)
        found = held.views(torch.from_numpy(chosen), held.parameters(view))
        assert torch.equal(found, rules.apply(rule, torch.from_numpy(images[chosen]), expected[chosen]))


def test_measurements_are_the_same_on_held_images(world):
    pupil = learner.new_learner("resnet8", world.data, OptimizerSettings(), CPU)
    rule = rules.plain(rules.rule_of(world.stores["float32"].knowledge.views))
    held = device_batches.hold(world.data.test, rule, CPU)
    given = (pupil.network, pupil.transform, world.data.test, rule, CPU)
    assert torch.equal(evaluation.predict(*given, held), evaluation.predict(*given))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return school(tmp_path_factory.mktemp("school"))


@pytest.mark.parametrize("change", [{}, {"mix_target": "requery"}, {"method": "ce"}], ids=str)
def test_a_run_with_resident_data_writes_the_files_of_one_without(place, tmp_path, change):
    distilled(place, tmp_path / "streaming", resident="off", **change)
    for name, more in {"replayed": {}, "one by one": {"graphs": False}}.items():
        distilled(place, tmp_path / name, resident="on", **more, **change)
        assert same_files(tmp_path / "streaming", tmp_path / name)


class BrokenOffError(Exception):
    """Raised where a test breaks a run off."""


class CalmNet(TinyNet):
    """Without dropout, whose random numbers a compiler draws differently."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.dropout = nn.Identity()


def learned(world, source, path, resident_data, stop_at=None, device=CPU, student="lessons:TinyNet", **changes):
    """Three epochs of distillation; the loss raises when it is asked for the `stop_at`-th time."""
    given = {"epochs": 3, "batch_size": SIZE, "learning_rate": 0.02, "seed": SEED, "checkpoint_seconds": 0}
    chosen = OptimizerSettings(**(given | changes), resident=resident_data)
    record = learner.new_record(COUNT, device, MethodSettings())
    pupil = learner.new_learner(student, world.data, chosen, device, record)
    calls = []

    def loss(seen, batch):
        calls.append(len(batch.index))
        if len(calls) == stop_at:
            raise BrokenOffError
        return registry.basic(seen["logits"], batch, KD)

    supplied = device_batches.supply(chosen, source, pupil)._asdict()
    assert (supplied["feed"] is not None) == (resident_data == "on")
    folder = RunFolder(path=path)
    path.mkdir(exist_ok=True)
    loop.run(pupil, loop.Task(**supplied, loss=loss, details=lambda epoch: {}), chosen, folder, 3, progress.silent)
    return (path / "metrics.jsonl").read_bytes(), load_checkpoint(folder)


def assert_same_run(found, expected):
    assert found[0] == expected[0]
    assert found[1][1] == expected[1][1]
    assert set(found[1][0]) == set(expected[1][0])
    assert [name for name, value in expected[1][0].items() if not torch.equal(found[1][0][name], value)] == []


@pytest.mark.parametrize("stop_at", [1, 4, 5, 9])
def test_a_run_may_change_between_both_ways_inside_an_epoch(world, tmp_path, stop_at):
    with connected(world) as source:
        expected = learned(world, source, tmp_path / "whole", "off")
        for first, second in (("on", "off"), ("off", "on"), ("on", "on")):
            path = tmp_path / f"{first}-{second}"
            with pytest.raises(BrokenOffError):
                learned(world, source, path, first, stop_at)
            assert_same_run(learned(world, source, path, second), expected)


def test_a_diverged_run_names_the_same_batch_either_way(world, tmp_path):
    told = []
    with connected(world) as source:
        for way in ("on", "off"):
            with pytest.raises(
                NonFiniteError, match=r"first such loss was that of step \d+ .*, of these 14 samples"
            ) as error:
                learned(world, source, tmp_path / way, way, learning_rate=1e30)
            told.append(str(error.value))
    assert told[0] == told[1]


def test_work_is_done_once_a_call_before_and_after_it_is_recorded():
    calls = []
    replay = loop.Replay(lambda: calls.append(len(calls)), CPU)
    for key in (0.1, 0.1, 0.1, 0.1, 0.2, 0.1):
        replay(key)
    assert calls == list(range(6))


def test_a_store_made_from_held_images_has_the_same_bytes(tmp_path):
    dataset = digits(90, 20)
    network = teacher_of(dataset)
    chosen = PrecomputeSettings(augment="crop-flip", padding=2, views=3, batch_size=32, min_accuracy=0)
    for images in ("on", "off"):
        precompute.run(chosen, dataset, network, tmp_path / images, images=images)
    assert same_files(tmp_path / "on", tmp_path / "off")
    resized = PrecomputeSettings(augment="resized-crop-flip", min_accuracy=0)
    with pytest.raises(SettingsError, match="views by 'resized-crop-flip' are resized one by one"):
        precompute.run(resized, dataset, network, tmp_path / "resized", images="on")


class LiveTargets:
    """A teacher in the loop, whose outputs no store holds."""

    def prepare(self, view, following):
        """Nothing is loaded."""

    def gather(self, index, temperature, device):
        return {"logits": torch.zeros(len(index), 10)}


def on_demand(split):
    """The split as if its images were files."""
    return Split(split.labels, EncodedImages(["x.png"] * len(split), image_size=split.image_size))


def test_data_that_cannot_lie_on_the_device_are_refused_or_streamed(world):
    settings = OptimizerSettings(resident="on")
    pupil = learner.new_learner("resnet8", world.data, settings, CPU)
    with connected(world) as source:
        needed = device_batches.bytes_of(source)
        assert device_batches.obstacle(source, CPU, needed) is None
        resized = replace(source.rule, name="resized-crop-flip", padding=0)
        cases = {
            "its targets are not those of a store": replace(source, targets=LiveTargets()),
            "views by 'resized-crop-flip' are resized one by one": replace(source, rule=resized),
            "its images are decoded on demand": replace(
                source, data=replace(world.data, train=on_demand(world.data.train))
            ),
        }
        for reason, other in cases.items():
            assert device_batches.obstacle(other, CPU) == reason
            with pytest.raises(SettingsError, match=f"--resident on: .* the device, {reason}; use --resident auto"):
                device_batches.supply(settings, other, pupil)
            assert device_batches.supply(OptimizerSettings(), other, pupil).feed is None
        told = device_batches.obstacle(source, CPU, needed - 1)
        assert told == f"it would take {needed:,} bytes of {needed - 1:,} that may be taken"


def test_auto_takes_a_gpu_and_leaves_a_cpu():
    gpu = torch.device("cuda")
    assert [prefetch.wanted("auto", None, device) for device in (CPU, gpu)] == [False, True]
    assert not prefetch.wanted("auto", "no room", gpu)
    assert [prefetch.wanted(asked, None, gpu) for asked in ("on", "off")] == [True, False]


def test_what_the_data_take_is_counted(world):
    whole = manifest.full(world.stores["float16"].knowledge_id, COUNT)
    with connected(world, "float16", chosen=whole) as source:
        feed = device_batches.Feed(source, CPU, batch_size=SIZE)
        feed.begin(0, 0)
        tensors = [feed._images._pixels, *feed._own._rows.values()]
        test = device_batches.hold(world.data.test, rules.plain(source.rule), CPU)._pixels
        held = sum(tensor.nbytes for tensor in [*tensors, test])
        assert held <= device_batches.bytes_of(source) <= 1.2 * held


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and g++ is not there")
def test_a_compiled_student_learns_what_an_eager_one_does(world, tmp_path):
    """Within rounding: the compiler fuses operations. Evaluation and checkpoints see the same weights."""
    with connected(world) as source:
        (eager, _), (compiled, held) = (
            learned(world, source, tmp_path / str(flag), "on", student="test_resident:CalmNet", compile=flag)
            for flag in (False, True)
        )
    losses = [[json.loads(line)["loss"] for line in rows.splitlines()] for rows in (eager, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert not [name for name in held[0] if "_orig_mod" in name]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here: CUDA graphs are exercised only on one")
def test_a_gpu_replays_the_steps_it_would_take_one_by_one(world, tmp_path):
    with connected(world) as source:
        one, other = (
            learned(world, source, tmp_path / str(flag), "on", device=torch.device("cuda"), graphs=flag)[1][0]
            for flag in (True, False)
        )
    for name, value in other.items():
        if not name.startswith("rng"):
            torch.testing.assert_close(one[name], value, atol=1e-4, rtol=1e-4)
