"""Batches: each point against a slow reference, the same bytes from host and device, what is read, what is refused."""

import pickle
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lessons import CPU, TRAIN, condensed, digits, precomputed, teacher_of
from pupils import same_files
from torch.utils.data import DataLoader

from kcdcache.condensation import manifest
from kcdcache.datasets.images import EncodedImages, Split
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.settings import OptimizerSettings, PrecomputeSettings
from kcdcache.store import reader
from kcdcache.teacher import precompute, teacher
from kcdcache.training import batches, device_batches, loop, requery
from kcdcache.training.batches import HostBatches, KnowledgePoints, Mixing, connect, iterate
from kcdcache.training.device_batches import DeviceBatches
from kcdcache.training.sampling import Sampler, everything
from kcdcache.views import prefetch, rules

FIELDS = ("logits", "penultimate")
ENCODINGS = ("float32", "float16", "top:3")
TARGETS = ("linear_prob", "linear_logit", "keep")
MIXES = ("convex", "additive_clip")
TEMPERATURE, SIZE, SEED = 4.0, 14, 5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Digits, a teacher, its stores of three views, a condensed set, and the teacher on that set's mixes."""
    dataset, root = digits(), tmp_path_factory.mktemp("world")
    network = teacher_of(dataset)
    stores = {text: precomputed(root / text, dataset, network, fields=FIELDS, encoding=text) for text in ENCODINGS}
    knowledge = stores["float32"]
    chosen, mixes = condensed(knowledge), {}
    assert 30 < chosen.mixed.sum() < len(chosen) == 90
    for mix in MIXES:
        asked = requery.Mixes(manifest=chosen, fields=FIELDS, views=range(3), mix=mix)
        requery.write(root / mix, asked, knowledge, dataset, network)
        mixes[mix] = reader.open(root / mix)
    return SimpleNamespace(
        data=dataset, network=network, stores=stores, knowledge=knowledge, manifest=chosen, mixes=mixes
    )  # fmt: skip


def connected(world, chosen=None, mix="convex", target="linear_prob", encoding="float32", names=FIELDS):
    knowledge = world.stores[encoding]
    found = replace(world.manifest if chosen is None else chosen, knowledge_id=knowledge.knowledge_id)
    again = world.mixes[mix] if target == "requery" else None
    mixing = Mixing(mix=mix, target=target, temperature=TEMPERATURE)
    return connect(world.data, knowledge, found, fields=names, mixing=mixing, requeried=again)


def whole(world):
    return manifest.full(manifest.Samples(world.knowledge.knowledge_id, TRAIN))


def parts(batch):
    """A batch's tensors by name, those of `knowledge` among them."""
    found = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return found | {f"teacher_{name}": value for name, value in batch.knowledge.items()}


def collected(found):
    """All batches of an epoch in one, as name -> tensor."""
    found = [parts(batch) for batch in found]
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def same(left, right):
    assert set(left) == set(right)
    return [name for name in left if left[name].dtype != right[name].dtype or not torch.equal(left[name], right[name])]


def view_of_one(world, index, view):
    rule, one = world.knowledge.knowledge.views, np.array([index])
    images = torch.from_numpy(world.data.train.images(one))
    return rules.apply(rule, images, rules.parameters(rule, one, view))


def soft(logits):
    powers = np.exp((logits - logits.max()).astype(np.float64) / TEMPERATURE)
    return powers / powers.sum()


def reference_point(world, index, view, mix, target):
    """One point of the manifest as Eq. 14 says, alone and in float64: pixels, probabilities, fields."""
    row = int(np.searchsorted(world.manifest.index, index))
    partner, eps = int(world.manifest.partner[row]), float(world.manifest.epsilon[row])
    pixels = view_of_one(world, index, view).double()
    own = {name: world.knowledge.read(name, view, np.array([index]))[0].astype(np.float64) for name in FIELDS}
    if partner < 0:
        return pixels, soft(own["logits"]), own
    dropped = view_of_one(world, partner, view).double()
    mixed = (1 - eps) * pixels + eps * dropped if mix == "convex" else (pixels + eps * dropped).clamp(0, 1)
    other = {name: world.knowledge.read(name, view, np.array([partner]))[0].astype(np.float64) for name in FIELDS}
    blend = {name: (1 - eps) * own[name] + eps * other[name] for name in FIELDS}
    if target == "requery":
        seen = {k: v[0].numpy() for k, v in teacher.outputs(world.network, mixed.float(), FIELDS).items()}
        return mixed, soft(seen["logits"]), seen
    if target == "keep":
        return mixed, soft(own["logits"]), own
    if target == "linear_logit":
        return mixed, soft(blend["logits"]), blend
    return mixed, (1 - eps) * soft(own["logits"]) + eps * soft(other["logits"]), blend


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("target", [*TARGETS, "requery"])
def test_every_point_of_a_batch_equals_a_slow_reference(world, mix, target):
    with connected(world, mix=mix, target=target) as source:
        found = collected(iterate(source, 1, batch_size=32, seed=5))
        rows = np.flatnonzero(world.manifest.mixed)
        place = {index: i for i, index in enumerate(found["index"].tolist())}
        seen = found["pixels"][[place[index] for index in world.manifest.index[rows].tolist()]]
        assert torch.equal(batches.mixed_views(source, rows, 1, CPU), seen)
    for i, index in list(enumerate(found["index"].tolist()))[::6]:
        pixels, probabilities, fields = reference_point(world, index, 1, mix, target)
        np.testing.assert_allclose(found["pixels"][i : i + 1], pixels, atol=1e-6)
        np.testing.assert_allclose(found["probabilities"][i], probabilities, atol=1e-5)
        for name, expected in fields.items():
            np.testing.assert_allclose(found[f"teacher_{name}"][i], expected, atol=1e-4, rtol=1e-4)


def test_labels_shares_and_weights_are_the_manifests_and_pixels_channels_last_in_zero_to_one(world):
    weighted = replace(world.manifest, weight=np.linspace(0.5, 2, len(world.manifest)).astype(np.float32))
    labels = world.data.train.labels
    with connected(world, weighted, mix="additive_clip") as source:
        each = list(iterate(source, 0, batch_size=32))
    found = collected(each)
    row = np.searchsorted(weighted.index, found["index"].numpy())
    partner = weighted.partner[row]
    assert np.array_equal(found["labels"], labels[found["index"]])
    expected = [labels[p if p >= 0 else i] for p, i in zip(partner, found["index"], strict=True)]
    assert np.array_equal(found["partner_labels"], expected)
    for name in ("mixed", "epsilon", "weight"):
        assert np.array_equal(found[name], getattr(weighted, name)[row])
    for batch in each:
        assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
        assert 0 <= batch.pixels.min() <= batch.pixels.max() <= 1


@pytest.mark.parametrize(("mix", "target"), [*zip(("convex", "additive_clip", "convex"), TARGETS, strict=True)])
def test_epsilon_zero_leaves_the_kept_point_bit_identical(world, mix, target):
    flat = replace(world.manifest, epsilon=np.zeros(len(world.manifest), np.float32))
    plain = replace(world.manifest, **manifest.plain(world.manifest.index))
    with connected(world, flat, mix, target) as mixed, connected(world, plain, mix, target) as kept:
        left, right = (collected(iterate(source, 2, batch_size=32)) for source in (mixed, kept))
    assert same(left, right) == ["partner_labels", "mixed"]


def test_an_epoch_uses_its_view_modulo_the_cached_ones_and_partners_are_seen_in_their_own(world):
    with connected(world) as source:
        assert [source.view_of(epoch) for epoch in range(7)] == [0, 1, 2, 0, 1, 2, 0]
        assert [replace(source, views=None).view_of(epoch) for epoch in (0, 7, 300)] == [0, 7, 300]
        for epoch in range(5):
            found = collected(iterate(source, epoch, batch_size=50))
            expected = world.knowledge.read("logits", epoch % 3, found["index"].numpy())
            plain = ~found["mixed"]
            assert np.array_equal(found["teacher_logits"][plain], expected[plain.numpy()])
        points = everything(Sampler(manifest=source.manifest, optimizer=OptimizerSettings()), 1)
        plan = batches.plan_epoch(source, 1, points)
    rule, mixed = world.knowledge.knowledge.views, points.partner >= 0
    assert np.array_equal(plan.partner_parameters[mixed], rules.parameters(rule, points.partner[mixed], 1))
    assert np.array_equal(plan.parameters, rules.parameters(rule, points.index, 1))
    assert not np.array_equal(plan.parameters[mixed], plan.partner_parameters[mixed])


@pytest.mark.parametrize(("target", "batch_size"), [("linear_prob", 7), ("requery", 64), ("linear_prob", 1000)])
def test_batches_do_not_depend_on_how_an_epoch_is_cut_and_all_but_the_last_are_full(world, target, batch_size):
    with connected(world, target=target) as source:
        one, many = (list(iterate(source, 1, batch_size=size)) for size in (90, batch_size))
    sizes = [len(batch.index) for batch in many]
    assert sizes == [batch_size] * (90 // batch_size) + ([90 % batch_size] if 90 % batch_size else [])
    one, many = collected(one), collected(many)
    for name in one:
        torch.testing.assert_close(one[name], many[name], atol=1e-6, rtol=1e-6)


def made_by(way, source, size=SIZE):
    sampler = Sampler(manifest=source.manifest, optimizer=OptimizerSettings(batch_size=size, seed=SEED))
    return DeviceBatches(source, sampler, CPU) if way == "device" else HostBatches(source=source, sampler=sampler)


CASES = [
    *({"encoding": text, "mix": mix, "target": target} for text in ENCODINGS for mix, target in zip(
        ("convex", "convex", "additive_clip"), TARGETS, strict=True)),
    {"target": "requery"}, {"names": ()}, {"names": ("penultimate",)}, {"chosen": whole},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[str(number) for number in range(len(CASES))])
def test_batches_made_on_the_device_have_the_bytes_of_those_made_on_the_host(world, case):
    chosen = case["chosen"](world) if "chosen" in case else None
    with connected(world, **(case | {"chosen": chosen})) as source:
        host, device = (made_by(way, source) for way in ("host", "device"))
        for epoch, start in ((0, 0), (1, 0), (4, 2 * SIZE)):
            pairs = list(zip(device.epoch(epoch, start), host.epoch(epoch, start), strict=True))
            assert device.begin(epoch, start) == [len(batch.index) for _, batch in pairs]
            for ours, theirs in pairs:
                assert same(parts(ours), parts(theirs)) == []
                assert (ours.shared, ours.idle) == (theirs.shared, theirs.idle) == (None, False)
                assert ours.pixels.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=5)
@given(start=st.integers(0, 8), epoch=st.integers(0, 4), way=st.sampled_from(["host", "device"]))
def test_an_epoch_continues_exactly_where_it_was_left(world, start, epoch, way):
    with connected(world) as source:
        maker = made_by(way, source)
        every, rest = list(maker.epoch(epoch)), list(maker.epoch(epoch, min(start * SIZE, 90)))
    assert len(rest) == max(0, len(every) - start)
    assert [same(parts(left), parts(right)) for left, right in zip(every[start:], rest, strict=True)] == [[]] * len(
        rest
    )


@pytest.mark.parametrize("way", ["host", "device"])
def test_a_single_point_left_over_joins_the_batch_before_wherever_an_epoch_goes_on(world, way):
    chosen = condensed(world.knowledge, keep=0.607)
    assert len(chosen) == 91
    with connected(world, chosen) as source:
        maker = made_by(way, source, 18)
        for epoch in (0, 4):
            every = list(maker.epoch(epoch))
            assert [len(batch.index) for batch in every] == [18, 18, 18, 18, 19]
            assert sorted(collected(every)["index"].tolist()) == chosen.index.tolist()
            for taken, rest in ((54, every[3:]), (72, every[4:]), (91, [])):
                found = list(maker.epoch(epoch, taken))
                assert [same(parts(left), parts(right)) for left, right in zip(found, rest, strict=True)] == [[]] * len(
                    rest
                )
            # an earlier kcdcache stopped where the single point was a batch of its own
            assert [batch.index.tolist() for batch in maker.epoch(epoch, 90)] == [every[-1].index[18:].tolist()]
        sizes = [len(batch.index) for batch in iterate(source, 0, batch_size=18, seed=SEED, start=3)]
    assert sizes == [18, 19]


def test_only_kept_samples_and_partners_are_read(world):
    partial = condensed(world.knowledge, keep=0.9, k0="stage_slice")
    knowledge = reader.open(world.knowledge.path)
    expected = sorted({*partial.index.tolist(), *partial.partner[partial.mixed].tolist()})
    assert batches.needed_rows(partial).tolist() == expected
    assert batches.needed_rows(partial, requeried=True).tolist() == partial.index.tolist()
    few = replace(partial, **manifest.plain(partial.index))
    with connect(world.data, knowledge, few) as source:
        list(iterate(replace(source, views=1), 0, batch_size=64))
    assert knowledge.rows_read == len(partial)


@pytest.mark.parametrize("target", ["linear_prob", "requery"])
def test_torchs_data_loader_gives_the_same_numbers_in_batches_and_alone(world, target):
    with connected(world, target=target) as source:
        points = KnowledgePoints(source, seed=3)
        for epoch in (0, 4):
            points.set_epoch(epoch)
            found = list(DataLoader(points, batch_size=32, num_workers=0))
            expected = [parts(batch) for batch in iterate(source, epoch, batch_size=32, seed=3)]
            assert [same(left, right) for left, right in zip(found, expected, strict=True)] == [[]] * 3
        items = list(DataLoader(points, batch_size=None, num_workers=0))
        every = collected(iterate(source, 4, batch_size=90, seed=3))
    assert len(points) == len(items) == 90
    for i in (0, 41, 89):
        for found in (items[i], points[i]):
            for name, value in every.items():
                torch.testing.assert_close(found[name], value[i], atol=1e-6, rtol=1e-6)


SLOW = pytest.mark.slow
STARTED = [
    ("fork", False, 8e9), ("fork", True, 8e9), ("fork", True, 0), ("spawn", True, 0),
    *(pytest.param(how, stays, 8e9, marks=SLOW)
      for how, stays in [("spawn", False), ("forkserver", False), ("forkserver", True)]),
]  # fmt: skip
"""how workers are started, whether they stay, and the memory for rows, beyond which they lie in mapped files"""


@pytest.mark.parametrize(("how", "stays", "memory"), STARTED)
def test_set_epoch_reaches_the_workers_however_they_are_started_and_how_long_they_stay(world, how, stays, memory):
    """Also where epochs are passed over, and the view of an earlier one comes again."""
    epochs = (0, 1, 3, 2)
    with connected(world) as source:
        expected = [[parts(batch) for batch in iterate(source, epoch, batch_size=32, seed=3)] for epoch in epochs]
    mixing = Mixing(temperature=TEMPERATURE)
    chosen = connect(world.data, world.knowledge, world.manifest, fields=FIELDS, mixing=mixing, memory_bytes=memory)
    with chosen as source:
        points = KnowledgePoints(source, seed=3)
        loader = DataLoader(points, batch_size=32, num_workers=2, persistent_workers=stays, multiprocessing_context=how)
        for epoch, wanted in zip(epochs, expected, strict=True):
            points.set_epoch(epoch)
            assert [same(*pair) for pair in zip(loader, wanted, strict=True)] == [[]] * 3


@pytest.mark.parametrize("case", [*({"encoding": text} for text in ENCODINGS), {"target": "requery"}, {"names": ()}])
def test_points_pickled_give_the_same_numbers(world, case):
    with connected(world, **case) as source:
        points = KnowledgePoints(source, seed=3)
        points.set_epoch(1)
        again = pickle.loads(pickle.dumps(points))
        assert (len(again), again[7].keys()) == (len(points), points[7].keys())
        assert same(again[7], points[7]) == []
        with ExitStack() as ended:
            for targets in again._source.stored:
                ended.enter_context(targets)


def test_points_are_those_of_their_epoch_though_another_reader_of_the_source_is_elsewhere(world):
    with connected(world) as source:
        points = KnowledgePoints(source, seed=3)
        before = points[5]
        list(iterate(source, 1, batch_size=90))
        assert same(points[5], before) == []


def test_an_epoch_before_the_first_is_refused(world):
    with connected(world) as source, pytest.raises(SettingsError, match="takes the number of an epoch, from 0 on; fou"):
        KnowledgePoints(source).set_epoch(-1)


def test_without_fields_nothing_is_taught(world):
    knowledge = reader.open(world.knowledge.path)
    with connect(world.data, knowledge, world.manifest, fields=()) as source:
        batch = next(iterate(source, 0, batch_size=8))
        item = KnowledgePoints(source)[0]
    assert (batch.probabilities, batch.knowledge, knowledge.rows_read) == (None, {}, 0)
    assert "probabilities" not in item


def test_sets_and_mixes_that_were_not_made_for_each_other_are_refused(world):
    refused = {
        "the manifest was made for knowledge k, the store holds": (manifest.full(manifest.Samples("k", TRAIN)), None),
        r"differ in manifest: .*precompute --manifest": (condensed(world.knowledge, seed=9), world.mixes["convex"]),
        "differ in mix: 'additive_clip' against 'convex'": (world.manifest, world.mixes["additive_clip"]),
        "differ in manifest: None against": (world.manifest, world.knowledge),
    }
    with (
        pytest.raises(SettingsError, match="takes the teacher's outputs on the mixes from a store of their own"),
        connect(world.data, world.knowledge, world.manifest, mixing=Mixing(target="requery")),
    ):
        pass
    for message, (chosen, requeried) in refused.items():
        with (
            pytest.raises(MismatchError, match=message),
            connect(world.data, world.knowledge, chosen, requeried=requeried),
        ):
            pass


@pytest.mark.parametrize("fill", ["zero", "reflect"])
@pytest.mark.parametrize("name", ["none", "crop", "crop-flip"])
def test_views_of_held_images_are_those_of_single_batches(name, fill):
    images = np.random.default_rng(0).integers(0, 256, (20, 9, 7, 3), dtype=np.uint8)
    padding = 0 if name == "none" else 3
    rule = rules.ViewRule(rule=name, padding=padding, fill=fill, size=(9, 7), seed=2**63 + 5)
    held = rules.HeldImages(rule, images, CPU)
    chosen = np.array([3, 3, 19, 0])
    for view in range(min(rules.count(rule), 12)):
        expected = rules.parameters(rule, np.arange(20), view)
        assert np.array_equal(held.parameters(view).numpy(), expected)
        found = held.views(torch.from_numpy(chosen), held.parameters(view))
        assert torch.equal(found, rules.apply(rule, torch.from_numpy(images[chosen]), expected[chosen]))


class LiveTargets:
    """A teacher in the loop, whose outputs no store holds."""

    def prepare(self, view, following):
        """Nothing is loaded."""

    def gather(self, index, temperature, device):
        return {"logits": torch.zeros(len(index), 10)}


def test_data_that_cannot_lie_on_the_device_are_refused_or_made_on_the_host(world):
    with connected(world) as source:
        plain = Sampler(manifest=source.manifest, optimizer=OptimizerSettings())
        resident = replace(plain, optimizer=OptimizerSettings(resident="on"))
        needed = device_batches.bytes_of(source)
        assert device_batches.obstacle(source, CPU, needed) is None
        train = world.data.train
        on_demand = Split(train.labels, EncodedImages(["x.png"] * len(train), image_size=train.image_size))
        cases = {
            "its targets are not those of a store": replace(source, targets=LiveTargets()),
            "views by 'resized-crop-flip' are resized one by one": replace(
                source, rule=replace(source.rule, rule="resized-crop-flip", padding=0)
            ),
            "its images are decoded on demand": replace(source, data=replace(world.data, train=on_demand)),
        }
        for reason, other in cases.items():
            assert device_batches.obstacle(other, CPU) == reason
            with pytest.raises(SettingsError, match=f"--resident on: .* the device, {reason}; use --resident auto"):
                loop.batches_of(other, resident, CPU)
            assert isinstance(loop.batches_of(other, plain, CPU), HostBatches)
        told = device_batches.obstacle(source, CPU, needed - 1)
        assert told == f"it would take {needed:,} bytes of {needed - 1:,} that may be taken"


def test_auto_takes_a_gpu_and_leaves_a_cpu():
    gpu = torch.device("cuda")
    assert [prefetch.wanted("auto", None, device) for device in (CPU, gpu)] == [False, True]
    assert not prefetch.wanted("auto", "no room", gpu)
    assert [prefetch.wanted(asked, None, gpu) for asked in ("on", "off")] == [True, False]


def test_what_the_data_take_is_counted(world):
    with connected(world, whole(world), encoding="float16") as source:
        made = made_by("device", source)
        made.begin(0)
        test = device_batches.hold(world.data.test, rules.plain(source.rule), CPU)._pixels
        held = sum(tensor.nbytes for tensor in [made._images._pixels, *made._held[0]._rows.values(), test])
        assert held <= device_batches.bytes_of(source) <= 1.2 * held


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
