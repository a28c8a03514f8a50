"""Views made ahead by threads: the bits and the errors of views made when they are asked for, and nothing left over."""

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from lessons import CPU, ON_CPU, condensed, opinionated, precomputed
from PIL import Image
from pupils import same_files

from kcdcache.condensation import manifest
from kcdcache.datasets import datasets
from kcdcache.errors import CorruptionError, MismatchError
from kcdcache.networks import registry
from kcdcache.networks.input_transform import InputTransform
from kcdcache.settings import OptimizerSettings, TrainSettings, ViewSettings
from kcdcache.teacher import teacher
from kcdcache.training import batches, distill, evaluation
from kcdcache.training.sampling import Sampler, everything
from kcdcache.views import prefetch, rules

NAMES = ("ant", "bee", "cow")
SEEN = {"augment": "resized-crop-flip", "size": 16}


def photograph(seed, high, wide):
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (high // 4 + 1, wide // 4 + 1, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((wide, high)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """60 training and 21 test JPEGs, each of its own size."""
    root = tmp_path_factory.mktemp("photographs")
    for part, count in (("train", 20), ("val", 7)):
        for label, name in enumerate(NAMES):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                size = 20 + 3 * number + label, 50 - 2 * number + label
                (root / part / name / f"{number:02}.jpg").write_bytes(photograph(100 * label + number, *size))
    return root


@pytest.fixture
def loaded(place):
    return datasets.load(f"folder:{place}")


def rule_of(dataset):
    return rules.rule_from(ViewSettings(**SEEN), dataset.train.image_size)


def teacher_of(dataset):
    network = opinionated(registry.build("resnet8", len(NAMES), 1))
    return teacher.freeze(network, InputTransform(dataset.mean, dataset.std), "resnet8", dataset.classes, CPU)


def asked_of(rule, *batches_of):
    return [prefetch.Asked(np.array(index), rules.parameters(rule, np.array(index), 3)) for index in batches_of]


def one_by_one(dataset, rule, asked):
    """The same views, each image decoded alone by Pillow itself and shown alone."""
    for index, parameters in asked:
        shown = []
        for sample, row in zip(index.tolist(), parameters, strict=True):
            with Image.open(dataset.train.source.payloads[sample]) as image:
                shown.append(rules.apply(rule, [torch.from_numpy(np.array(image.convert("RGB")))], row[None]))
        yield torch.cat(shown)


@pytest.mark.parametrize("workers", [1, 5, None])
def test_views_made_ahead_have_the_bits_of_those_made_one_by_one(loaded, workers):
    rule = rule_of(loaded)
    asked = asked_of(rule, range(40), [7], [3, 3, 59, 0], range(16, 33))
    found = list(prefetch.shown(loaded.train, rule, asked, CPU, workers))
    expected = list(one_by_one(loaded, rule, asked))
    assert len(found) == len(expected) == 4
    for mine, its in zip(found, expected, strict=True):
        assert torch.equal(mine, its)
        assert mine.is_contiguous(memory_format=torch.channels_last)
    assert list(prefetch.shown(loaded.train, rule, [], CPU, workers)) == []


def test_training_shows_the_views_the_teacher_saw_bit_for_bit(loaded, tmp_path):
    """precompute and train, both with views made ahead: what the student is shown gives the store's own outputs."""
    network = teacher_of(loaded)
    knowledge = precomputed(tmp_path / "store", loaded, network, views=2, batch_size=20, encoding="float32", **SEEN)
    everything = manifest.full(manifest.Samples(knowledge.knowledge_id, 60, loaded.train.labels, 3))
    with batches.connect(datasets.load(loaded.name), knowledge, everything) as source:
        for epoch in (0, 1):
            pixels, kept = torch.empty(60, 3, 16, 16), torch.empty(60, 3)
            for batch in batches.iterate(source, epoch, batch_size=13, workers=3):
                pixels[batch.index], kept[batch.index] = batch.pixels, batch.knowledge["logits"]
            for part in torch.arange(60).split(20):  # the store's own teacher batches
                shown = pixels[part].contiguous(memory_format=torch.channels_last)
                assert torch.equal(teacher.outputs(network, shown, ["logits"])["logits"], kept[part])


def test_a_store_and_a_test_accuracy_do_not_depend_on_the_number_of_workers(loaded, tmp_path):
    network, rule = teacher_of(loaded), rule_of(loaded)
    for workers in (1, 4):
        precomputed(tmp_path / str(workers), loaded, network, views=2, batch_size=7, workers=workers, **SEEN)
    assert same_files(tmp_path / "1", tmp_path / "4")
    one, four = (
        evaluation.predict(
            network.module, network.transform, evaluation.first_views(loaded.test, rules.plain(rule), CPU, count)
        )
        for count in (1, 4)
    )
    assert torch.equal(one, four)


def test_a_run_goes_on_with_another_number_of_workers_to_the_same_bytes(loaded, tmp_path):
    knowledge = precomputed(tmp_path / "store", loaded, teacher_of(loaded), views=2, **SEEN)
    given = {"student": "lessons:TinyNet", "epochs": 2, "stages": 2, "batch_size": 13, "keep": 0.6}
    material = distill.Material(data=loaded, knowledge=knowledge)
    for name, turns in (("one", [(1, None)]), ("changed", [(3, 1), (2, None)])):
        for workers, until in turns:
            settings = TrainSettings(**given, workers=workers)
            distill.run(settings, material, out=tmp_path / name, machine=ON_CPU, until=until)
    assert same_files(tmp_path / "one", tmp_path / "changed")


def test_mixed_points_are_shown_ahead_as_without(loaded, tmp_path):
    knowledge = precomputed(tmp_path / "store", loaded, teacher_of(loaded), views=1, **SEEN)
    with batches.connect(loaded, knowledge, condensed(knowledge)) as source:
        points = everything(Sampler(manifest=source.manifest, optimizer=OptimizerSettings()), 0)
        plan = batches.plan_epoch(source, 0, points)
        source.prepare(0)
        found = list(batches.iterate(source, 0, batch_size=11, workers=2))
        assert sum(int(batch.mixed.sum()) for batch in found) > 5
        for number, batch in enumerate(found):
            alone = batches.make_batch(source, plan.part(slice(11 * number, 11 * number + 11)))
            assert torch.equal(batch.pixels, alone.pixels)
            assert torch.equal(batch.index, alone.index)


def test_an_image_that_changed_is_refused_in_its_turn_and_no_thread_is_left(loaded):
    rule, asked = rule_of(loaded), asked_of(rule_of(loaded), range(10), range(10, 50), range(50, 60))
    loaded.train.digests()
    payloads = list(loaded.train.source.payloads)
    payloads[30] = photograph(999, 30, 30)
    object.__setattr__(loaded.train.source, "payloads", payloads)
    coming = prefetch.shown(loaded.train, rule, asked, CPU, 3)
    assert len(next(coming)) == 10
    with pytest.raises(MismatchError, match="sample 30 differs"):
        next(coming)
    assert no_threads()


def test_a_damaged_image_is_named_by_file_from_a_thread(loaded):
    payloads = list(loaded.train.source.payloads)
    payloads[5] = Path(payloads[5]).read_bytes()[:100]
    object.__setattr__(loaded.train.source, "payloads", payloads)
    with pytest.raises(CorruptionError, match="is not a readable image"):
        list(prefetch.shown(loaded.train, rule_of(loaded), asked_of(rule_of(loaded), range(20)), CPU, 2))


def no_threads():
    return not any(thread.name.startswith("kcdcache-ahead") for thread in threading.enumerate())


def test_results_come_in_order_and_no_more_than_the_depth_is_begun():
    begun, release = [], threading.Event()

    def work(item):
        begun.append(item)
        if item == 0:
            release.wait(10)  # the first is the last to end
        else:
            release.set() if item == 3 else None
        return item * item

    coming = prefetch.ahead(work, range(20), 2, 3)
    assert next(coming) == 0
    assert sorted(begun)[-1] <= 3
    assert list(coming) == [item * item for item in range(1, 20)]


def test_threads_compute_with_one_core_and_leave_the_others_setting_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert set(prefetch.ahead(lambda item: torch.get_num_threads(), range(8), 2, 2)) == {1}
        assert torch.get_num_threads() == 3
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [3]
    finally:
        torch.set_num_threads(before)


def test_rows_that_were_announced_are_those_asked_for(loaded):
    rule = rule_of(loaded)
    rows = prefetch.RowsAhead(loaded.train, rule, CPU, 2)
    announced = [(0, 0, 20), (0, 20, 60), (1, 0, 7)]
    alone = [rows(*one) for one in announced]
    with rows.announced(announced):
        assert all(torch.equal(rows(*one), its) for one, its in zip(announced, alone, strict=True))
    with rows.announced(announced):
        assert torch.equal(rows(0, 0, 20), alone[0])  # broken off: the rest is dropped
        assert not no_threads()
    assert no_threads()
    assert torch.equal(rows(1, 0, 7), alone[2])
