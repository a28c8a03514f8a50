from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lessons import CPU, TRAIN, condensed, digits, precomputed, teacher_of
from torch.utils.data import DataLoader

from kcdcache.condense import manifest
from kcdcache.errors import MismatchError
from kcdcache.store import check, reader
from kcdcache.teacher import teacher
from kcdcache.training import batches, requery
from kcdcache.training.batches import KnowledgePoints, Mixing, Source, connect, iterate, plan_epoch
from kcdcache.views import rules
from kcdcache.views.mixing import mix_pixels

FIELDS = ("logits", "penultimate")
TARGETS = ("linear_prob", "linear_logit", "keep")
TEMPERATURE = 4.0
SOME_DATA = digits(20, 20)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Digits, a teacher, its float32 store of three views, a condensed set, and the teacher on that set's mixes."""
    dataset = digits()
    network = teacher_of(dataset)
    root = tmp_path_factory.mktemp("world")
    knowledge = precomputed(root / "store", dataset, network, fields=FIELDS)
    chosen = condensed(knowledge)
    mixes = {}
    for mix in ("convex", "additive_clip"):
        with connect(dataset, knowledge, chosen, fields=(), mixing=Mixing(mix=mix)) as source:
            requery.write(source, network, knowledge, root / mix, fields=FIELDS, view_numbers=range(3))
        mixes[mix] = reader.open(root / mix)
    return SimpleNamespace(data=dataset, network=network, knowledge=knowledge, manifest=chosen, mixes=mixes)


def connected(world, chosen=None, mix="convex", target="linear_prob", **more):
    mixing = Mixing(mix=mix, target=target, temperature=TEMPERATURE)
    again = world.mixes[mix] if target == "requery" else None
    found = world.manifest if chosen is None else chosen
    return connect(world.data, world.knowledge, found, fields=FIELDS, mixing=mixing, requeried=again, **more)


def without_images(chosen, count=3):
    """A source for what is decided before any image is touched."""
    rule = rules.ViewRule(name="crop", padding=1, fill="zero", height=16, width=16, seed=0)
    return Source(data=SOME_DATA, rule=rule, views=count, manifest=chosen)


def subset(index, count=1000):
    kept = np.sort(np.array(index, np.int64))
    return replace(
        manifest.full("k", len(kept)), **manifest.plain(kept), rank=np.arange(len(kept)), count=count, keep=0.5
    )


def collected(parts):
    """All batches of an epoch in one, as name -> tensor."""
    parts = [vars(batch) | {f"teacher_{k}": v for k, v in batch.knowledge.items()} for batch in parts]
    return {
        name: torch.cat([part[name] for part in parts]) for name in parts[0] if isinstance(parts[0][name], torch.Tensor)
    }


def same(left, right):
    assert set(left) == set(right)
    return all(torch.equal(left[name], right[name]) for name in left)


def view_of_one(world, index, view):
    rule, one = rules.rule_of(world.knowledge.knowledge.views), np.array([index])
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


@pytest.mark.parametrize("mix", ["convex", "additive_clip"])
@pytest.mark.parametrize("target", [*TARGETS, "requery"])
def test_every_point_of_a_batch_equals_a_slow_reference(world, mix, target):
    with connected(world, mix=mix, target=target) as source:
        found = collected(iterate(source, 1, batch_size=32, seed=5))
    assert found["mixed"].sum() > 30
    for i, index in list(enumerate(found["index"].tolist()))[::3]:
        pixels, probabilities, fields = reference_point(world, index, 1, mix, target)
        np.testing.assert_allclose(found["pixels"][i : i + 1], pixels, atol=1e-6)
        np.testing.assert_allclose(found["probabilities"][i], probabilities, atol=1e-5)
        for name, expected in fields.items():
            np.testing.assert_allclose(found[f"teacher_{name}"][i], expected, atol=1e-4, rtol=1e-4)


def test_labels_shares_and_weights_are_the_manifests(world):
    weighted = replace(world.manifest, weight=np.linspace(0.5, 2, len(world.manifest)).astype(np.float32))
    labels = world.data.train.labels
    with connected(world, weighted) as source:
        found = collected(iterate(source, 0, batch_size=32))
    row = np.searchsorted(weighted.index, found["index"].numpy())
    partner = weighted.partner[row]
    assert np.array_equal(found["labels"], labels[found["index"]])
    expected = [labels[p if p >= 0 else i] for p, i in zip(partner, found["index"], strict=True)]
    assert np.array_equal(found["partner_labels"], expected)
    for name in ("mixed", "epsilon", "weight"):
        assert np.array_equal(found[name], getattr(weighted, name)[row])


@pytest.mark.parametrize("mix", ["convex", "additive_clip"])
@pytest.mark.parametrize("target", TARGETS)
def test_epsilon_zero_leaves_the_kept_point_bit_identical(world, mix, target):
    flat = replace(world.manifest, epsilon=np.zeros(len(world.manifest), np.float32))
    plain = replace(world.manifest, **manifest.plain(world.manifest.index))
    with connected(world, flat, mix, target) as mixed, connected(world, plain, mix, target) as kept:
        left, right = (collected(iterate(source, 2, batch_size=32)) for source in (mixed, kept))
    assert left["mixed"].any()
    for name in ("index", "pixels", "probabilities", "teacher_logits", "teacher_penultimate"):
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize(("eps", "expected"), [(0.25, [0.4, 0.85]), (0.0, [0.2, 0.8]), (1.0, [1.0, 1.0])])
def test_convex_mixing_by_hand(eps, expected):
    kept, dropped = torch.tensor([0.2, 0.8]), torch.tensor([1.0, 1.0])
    shaped = [t.view(1, 1, 1, 2) for t in (kept, dropped)]
    found = mix_pixels(*shaped, torch.tensor([eps]), "convex").flatten()
    torch.testing.assert_close(found, torch.tensor(expected))


def test_added_pixels_are_clipped_to_white():
    kept, dropped = torch.full((1, 1, 1, 2), 0.9), torch.tensor([0.1, 0.5]).view(1, 1, 1, 2)
    found = mix_pixels(kept, dropped, torch.tensor([0.5]), "additive_clip").flatten()
    torch.testing.assert_close(found, torch.tensor([0.95, 1.0]))


def test_mixed_views_are_what_the_student_sees(world):
    rows = np.flatnonzero(world.manifest.mixed)
    for mix in ("convex", "additive_clip"):
        with connected(world, mix=mix) as source:
            seen = collected(iterate(source, 2, batch_size=32))
            place = {index: i for i, index in enumerate(seen["index"].tolist())}
            expected = seen["pixels"][[place[index] for index in world.manifest.index[rows].tolist()]]
            assert torch.equal(batches.mixed_views(source, rows, 2, CPU), expected)


indices = st.lists(st.integers(0, 999), min_size=1, max_size=60, unique=True)


@settings(max_examples=50)
@given(indices, st.integers(0, 2**64 - 1), st.integers(0, 500))
def test_an_epoch_has_every_kept_sample_once_in_an_order_of_seed_and_epoch_alone(index, seed, epoch):
    source = without_images(subset(index))
    first, second = (plan_epoch(source, epoch, seed).index for _ in range(2))
    assert sorted(first) == sorted(index)
    assert np.array_equal(first, second)


@settings(max_examples=50)
@given(indices, st.integers(0, 2**64 - 1), st.data())
def test_a_subset_keeps_the_relative_order_of_the_whole(index, seed, data):
    part = data.draw(st.lists(st.sampled_from(index), min_size=1, unique=True))
    whole, kept = (plan_epoch(without_images(subset(i)), 3, seed).index for i in (index, part))
    assert [i for i in whole if i in set(part)] == list(kept)


def test_epochs_and_seeds_have_orders_of_their_own():
    source = without_images(subset(range(200)))
    orders = {tuple(plan_epoch(source, epoch, seed).index) for epoch in range(4) for seed in range(4)}
    assert len(orders) == 16


def test_an_epoch_uses_its_view_modulo_the_cached_ones(world):
    source = without_images(subset(range(5)))
    assert [source.view_of(epoch) for epoch in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [replace(source, views=None).view_of(epoch) for epoch in (0, 7, 300)] == [0, 7, 300]
    with connected(world) as held:
        turns = [collected(iterate(held, epoch, batch_size=50)) for epoch in range(5)]
    for epoch, found in enumerate(turns):
        expected = world.knowledge.read("logits", epoch % 3, found["index"].numpy())
        plain = ~found["mixed"]
        assert np.array_equal(found["teacher_logits"][plain], expected[plain.numpy()])


def test_a_partner_is_seen_in_its_own_view(world):
    rule = rules.rule_of(world.knowledge.knowledge.views)
    with connected(world) as source:
        plan = plan_epoch(source, 1, 0)
    mixed = plan.partner >= 0
    assert np.array_equal(plan.partner_parameters[mixed], rules.parameters(rule, plan.partner[mixed], 1))
    assert np.array_equal(plan.parameters, rules.parameters(rule, plan.index, 1))
    assert not np.array_equal(plan.parameters[mixed], plan.partner_parameters[mixed])


@pytest.mark.parametrize("batch_size", [7, 30, 64, 1000])
def test_all_but_the_last_batch_are_full(world, batch_size):
    with connected(world) as source:
        sizes = [len(batch.index) for batch in iterate(source, 0, batch_size=batch_size)]
    assert sum(sizes) == len(world.manifest) == 90
    assert sizes[:-1] == [batch_size] * (90 // batch_size - (90 % batch_size == 0))


@pytest.mark.parametrize("target", ["linear_prob", "requery"])
def test_batches_do_not_depend_on_how_an_epoch_is_cut(world, target):
    with connected(world, target=target) as source:
        one, many = (collected(iterate(source, 1, batch_size=size)) for size in (90, 13))
    for name in one:
        torch.testing.assert_close(one[name], many[name], atol=1e-6, rtol=1e-6)


@settings(max_examples=10)
@given(start=st.integers(0, 8), epoch=st.integers(0, 4))
def test_an_epoch_continues_exactly_where_it_was_left(world, start, epoch):
    with connected(world) as source:
        whole = list(iterate(source, epoch, batch_size=13))
        rest = list(iterate(source, epoch, batch_size=13, start=start))
    assert len(rest) == max(0, len(whole) - start)
    for left, right in zip(whole[start:], rest, strict=True):
        assert same(collected([left]), collected([right]))


def test_memory_mapped_knowledge_gives_the_same_batches(world, tmp_path):
    with connected(world) as held, connected(world, memory_bytes=0, folder=tmp_path) as mapped:
        left, right = (collected(iterate(source, 1, batch_size=32)) for source in (held, mapped))
    assert same(left, right)


def test_pixels_are_channels_last_in_zero_to_one(world):
    with connected(world, mix="additive_clip") as source:
        for batch in iterate(source, 0, batch_size=32):
            assert batch.pixels.is_contiguous(memory_format=torch.channels_last)
            assert 0 <= batch.pixels.min() <= batch.pixels.max() <= 1


def test_only_kept_samples_and_partners_are_read(world, tmp_path):
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
@pytest.mark.parametrize("epoch", [0, 4])
def test_torchs_data_loader_gives_the_same_numbers(world, target, epoch):
    with connected(world, target=target) as source:
        points = KnowledgePoints(source, seed=3)
        points.set_epoch(epoch)
        found = list(DataLoader(points, batch_size=32, num_workers=0))
        expected = [collected([batch]) for batch in iterate(source, epoch, batch_size=32, seed=3)]
    assert len(points) == 90
    assert all(same(left, right) for left, right in zip(found, expected, strict=True))


def test_single_items_are_the_rows_of_the_batches(world):
    with connected(world) as source:
        points = KnowledgePoints(source)
        items = list(DataLoader(points, batch_size=None, num_workers=0))
        expected = collected(iterate(source, 0, batch_size=90))
    assert len(items) == 90
    for i in (0, 41, 89):
        for found in (items[i], points[i]):
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value[i], atol=1e-6, rtol=1e-6)


def test_without_fields_nothing_is_taught(world):
    knowledge = reader.open(world.knowledge.path)
    with connect(world.data, knowledge, world.manifest, fields=()) as source:
        batch = next(iterate(source, 0, batch_size=8))
        item = KnowledgePoints(source)[0]
    assert (batch.probabilities, batch.knowledge, knowledge.rows_read) == (None, {}, 0)
    assert "probabilities" not in item


def changed(dataset, **columns):
    split = replace(dataset.train, **columns)
    return replace(dataset, train=split)


def test_other_data_is_refused_by_the_first_sample_that_differs(world):
    labels = world.data.train.labels.copy()
    labels[[17, 40]] = (labels[[17, 40]] + 1) % 10
    pixels = world.data.train.source.pixels.copy()
    pixels[23, 0, 0, 0] ^= 1
    images = replace(world.data.train.source, pixels=pixels)
    for other, first in ((changed(world.data, labels=labels), 17), (changed(world.data, source=images), 23)):
        with pytest.raises(MismatchError, match=rf"sample {first} differs \(image, label or order\)"):
            check.check_data(world.knowledge, other)
    assert check.check_data(world.knowledge, digits()) is None


def test_another_class_order_is_refused(world):
    swapped = replace(world.data, classes=("1", "0", *world.data.classes[2:]))
    with pytest.raises(MismatchError, match=r"classes\[0\].*'0'.*'1'.*precompute a new store"):
        check.check_data(world.knowledge, swapped)


def test_another_sample_count_is_refused(world):
    with pytest.raises(MismatchError, match=rf"count.*{TRAIN}.*20"):
        check.check_data(world.knowledge, SOME_DATA)


def test_a_set_made_for_other_knowledge_is_refused(world):
    with (
        pytest.raises(MismatchError, match="the manifest was made for knowledge k, the store holds"),
        connected(world, subset(range(5), TRAIN)),
    ):
        pass


def test_mixes_of_another_set_or_rule_are_refused(world):
    other = condensed(world.knowledge, seed=9)
    with (
        pytest.raises(MismatchError, match=r"differ in manifest: .*precompute --manifest"),
        connect(world.data, world.knowledge, other, requeried=world.mixes["convex"]),
    ):
        pass
    with (
        pytest.raises(MismatchError, match="differ in mix: 'additive_clip' against 'convex'"),
        connect(world.data, world.knowledge, world.manifest, requeried=world.mixes["additive_clip"]),
    ):
        pass
    with (
        pytest.raises(MismatchError, match="differ in manifest: None against"),
        connect(world.data, world.knowledge, world.manifest, requeried=world.knowledge),
    ):
        pass
