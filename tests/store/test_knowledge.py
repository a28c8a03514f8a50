import gc
import pickle
import shutil
import time
import tracemalloc
import weakref
from multiprocessing import Pipe, get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from lessons import CPU
from stores import form, make, plan_of, small_parts

from kcdcache.errors import CorruptionError, MismatchError
from kcdcache.store import plan, reader
from kcdcache.store.rows import StoredTargets

COUNT, PLENTY = 150, 1e9
ENCODINGS = ("float16", "float32", "top:3")
EVERY_THIRD = np.arange(0, COUNT, 3)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Encoding -> folder of a store of two views, in parts and chunks of a few rows."""
    root = tmp_path_factory.mktemp("stores")
    return {text: make(root / text, small_parts(COUNT, 2, 64, 32, text)) for text in ENCODINGS}


def holding(knowledge, folder, index=EVERY_THIRD, memory_bytes=PLENTY, fields=("logits",), **more):
    return StoredTargets(knowledge, index, fields, memory_bytes=memory_bytes, folder=folder, **more)


def gathered(targets, view, index, temperature=4.0):
    targets.prepare(view, None)
    return targets.gather(np.asarray(index), temperature, CPU)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("memory_bytes", [0, PLENTY])
def test_gathered_rows_and_slices_of_a_planned_epoch_are_the_stores(stores, tmp_path, encoding, memory_bytes):
    knowledge, random = reader.open(stores[encoding]), np.random.default_rng(0)
    with holding(knowledge, tmp_path, memory_bytes=memory_bytes) as targets:
        for view, size in ((0, 6), (1, 0), (1, 20), (0, 1), (0, 6)):
            index = random.choice(EVERY_THIRD, size)
            found = gathered(targets, view, index)
            assert np.array_equal(found["logits"].numpy(), knowledge.read("logits", view, index, 4.0))
        targets.prepare(1, None)
        planned = targets.plan(order := random.permutation(EVERY_THIRD))
        for part in (slice(0, 16), slice(16, 32), slice(32, 99), slice(3, 4), slice(50, 60)):
            found = planned.gather(part, 4.0, CPU)["logits"].numpy()
            assert np.array_equal(found, knowledge.read("logits", 1, order[part], 4.0))
    with holding(knowledge, tmp_path, np.arange(0), memory_bytes) as targets:
        assert gathered(targets, 0, np.arange(0))["logits"].shape == (0, 7)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_store_and_its_rows_pickled_read_the_same(stores, tmp_path, encoding):
    knowledge = reader.open(stores[encoding])
    again = pickle.loads(pickle.dumps(knowledge))
    assert (again.knowledge_id, again.plan, again.commits) == (
        knowledge.knowledge_id,
        knowledge.plan,
        knowledge.commits,
    )
    assert np.array_equal(again.labels, knowledge.labels)
    with holding(knowledge, tmp_path) as targets:
        wanted = gathered(targets, 1, [9, 3])
        with pickle.loads(pickle.dumps(targets)) as copied:
            assert torch.equal(gathered(copied, 1, [9, 3])["logits"], wanted["logits"])


@pytest.mark.parametrize("memory_bytes", [0, PLENTY])
def test_a_fork_reads_its_own_rows_while_its_parent_reads_others(stores, tmp_path, memory_bytes):
    """Rows in mapped files are the parent's to overwrite; a thread of the parent may hold the store's lock for ever."""
    knowledge, index = reader.open(stores["float32"]), EVERY_THIRD
    wanted = [knowledge.read("logits", view, index, 4.0) for view in (0, 1)]
    with holding(knowledge, tmp_path, memory_bytes=memory_bytes) as targets:
        targets.prepare(0, 1)
        asked, answered = Pipe()

        def reading():
            for view in iter(asked.recv, None):
                asked.send(np.array_equal(gathered(targets, view, index)["logits"], wanted[view]))

        with knowledge._lock:
            child = get_context("fork").Process(target=reading)
            child.start()
        for ours, theirs in ((1, 0), (0, 1), (1, 0)):
            assert np.array_equal(gathered(targets, ours, index)["logits"], wanted[ours])
            targets.prepare(ours, 1 - ours)
            answered.send(theirs)
            assert answered.poll(60), "the fork waits for ever"
            assert answered.recv()
        answered.send(None)
        child.join(60)
        assert child.exitcode == 0


def test_all_fields_of_a_batch_come_together(tmp_path):
    forms = [form("logits"), form("penultimate")]
    knowledge, index = reader.open(make(tmp_path / "store", plan.plan_store(COUNT, 2, forms))), np.array([6, 3])
    with holding(knowledge, tmp_path, fields=("logits", "penultimate")) as targets:
        found = gathered(targets, 1, index)
    assert set(found) == {"logits", "penultimate"}
    for name, rows in found.items():
        assert rows.dtype == torch.float32
        assert np.array_equal(rows.numpy(), knowledge.read(name, 1, index))


def test_only_the_needed_rows_of_a_prepared_view_are_read_and_held(stores, tmp_path):
    knowledge = reader.open(stores["float32"])
    with holding(knowledge, tmp_path) as targets:
        with pytest.raises(AssertionError, match="prepare comes first"):
            targets.gather(np.array([3]), 1.0, CPU)
        targets.prepare(0, None)
        targets.prepare(0, None)
        assert knowledge.rows_read == len(EVERY_THIRD)
        for ask in (lambda index: targets.gather(index, 1.0, CPU), targets.plan):
            with pytest.raises(AssertionError, match="only the samples asked for"):
                ask(np.array([3, 4]))
        planned = targets.plan(EVERY_THIRD)
        targets.prepare(1, None)
        with pytest.raises(AssertionError, match="another view was prepared"):
            planned.take(slice(0, 2))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_later_batches_and_turns_of_the_view_leave_the_first_as_it_was(stores, tmp_path, encoding):
    with holding(reader.open(stores[encoding]), tmp_path) as targets:
        targets.prepare(0, 1)
        first, planned = targets.gather(EVERY_THIRD[:3], 4.0, CPU)["logits"], targets.plan(EVERY_THIRD)
        second = planned.gather(slice(0, 3), 4.0, CPU)["logits"]
        before = first.clone()
        targets.gather(np.array([30, 33, 36]), 4.0, CPU)["logits"].zero_()
        planned.gather(slice(0, 8), 4.0, CPU)["logits"].zero_()
        for view in (1, 0, 1):
            targets.prepare(view, 1 - view)
            targets.gather(EVERY_THIRD[::-1].copy(), 4.0, CPU)
        assert torch.equal(first, before)
        assert torch.equal(second, before)
        assert torch.equal(gathered(targets, 0, [0, 3, 6])["logits"], before)


@pytest.mark.parametrize("memory_bytes", [0, PLENTY])
def test_the_next_view_is_fetched_ahead_and_then_used(stores, tmp_path, memory_bytes):
    knowledge = reader.open(shutil.copytree(stores["float16"], tmp_path / "store"))
    expected = knowledge.read("logits", 1, EVERY_THIRD)
    with holding(knowledge, tmp_path, memory_bytes=memory_bytes) as targets:
        read, limit = knowledge.rows_read, time.monotonic() + 60
        targets.prepare(0, 1)
        while knowledge.rows_read < read + 2 * len(EVERY_THIRD):
            assert time.monotonic() < limit, "view 1 was not fetched in the background"
        targets.gather(EVERY_THIRD, 1.0, CPU)
        targets.prepare(1, 1)
        assert np.array_equal(targets.gather(EVERY_THIRD, 1.0, CPU)["logits"].numpy(), expected)
        assert knowledge.rows_read == read + 2 * len(EVERY_THIRD)


def test_a_failure_while_fetching_ahead_shows_when_the_view_is_wanted(stores, tmp_path):
    knowledge = reader.open(shutil.copytree(stores["float16"], tmp_path / "store"))
    (knowledge.path / "logits/c.1.0.0").unlink()
    with holding(knowledge, tmp_path) as targets:
        targets.prepare(0, 1)
        with pytest.raises(CorruptionError, match=r"c\.1\.0\.0.* is missing"):
            targets.prepare(1, None)


def mapped_from(folder):
    """Lines of this process's memory map that lie in a folder."""
    gc.collect()
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{folder}/" in line]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
@pytest.mark.parametrize(("share", "mapped"), [(0.99, True), (1.0, False)])
def test_above_a_budget_of_two_views_unlinked_files_serve_and_vanish(stores, tmp_path, share, mapped):
    knowledge = reader.open(stores["float16"])
    needed = 2 * len(EVERY_THIRD) * (7 * 2 + 4)  # seven classes in float16 beside the row's maximum in float32
    with holding(knowledge, tmp_path, memory_bytes=share * needed) as targets:
        targets.prepare(0, 1)
        assert list(tmp_path.iterdir()) == []
        assert bool(mapped_from(tmp_path)) == mapped
    del targets
    assert list(tmp_path.iterdir()) == []
    assert not mapped_from(tmp_path)


def test_a_field_the_store_lacks_is_refused_with_the_remedy(stores, tmp_path):
    message = (
        r"needs the field 'penultimate', the store at .*float16 holds logits; "
        r"add it with `kcdcache precompute --fields penultimate`"
    )
    with pytest.raises(MismatchError, match=message):
        holding(reader.open(stores["float16"]), tmp_path, fields=("logits", "penultimate"))


def test_samples_and_views_can_lie_elsewhere_in_the_store(tmp_path):
    knowledge = reader.open(make(tmp_path / "store", plan_of(5, 2)))
    index, slots = np.array([10, 20, 30, 40, 900]), {7: 0, 3: 1}
    with holding(knowledge, tmp_path, index, rows=np.arange(5), slots=slots, count=1000) as targets:
        found = gathered(targets, 3, [900, 10])["logits"].numpy()
        assert np.array_equal(found, knowledge.read("logits", 1, np.array([4, 0])))
        found = gathered(targets, 7, [20])["logits"].numpy()
        assert np.array_equal(found, knowledge.read("logits", 0, np.array([1])))


def addresses(targets):
    return {rows.ctypes.data for rows in targets.rows.values()}


@pytest.mark.parametrize("memory_bytes", [0, PLENTY])
def test_the_next_view_but_one_is_read_into_the_arrays_of_the_current(tmp_path, memory_bytes):
    knowledge = reader.open(make(tmp_path / "store", small_parts(COUNT, 4, 64, 32)))
    with holding(knowledge, tmp_path, memory_bytes=memory_bytes) as targets:
        used = []
        for view in range(4):
            targets.prepare(view, view + 1 if view < 3 else None)
            used.append(addresses(targets))
            found = targets.gather(EVERY_THIRD, 1.0, CPU)["logits"].numpy()
            assert np.array_equal(found, knowledge.read("logits", view, EVERY_THIRD))
    assert used[0].isdisjoint(used[1])
    assert used[:2] == used[2:]


def test_a_view_fetched_ahead_in_vain_leaves_its_arrays_to_the_next(tmp_path):
    knowledge = reader.open(make(tmp_path / "store", small_parts(COUNT, 4, 64, 32)))
    (knowledge.path / "logits/c.3.0.0").unlink()
    with holding(knowledge, tmp_path) as targets:
        for view, following in ((0, 1), (2, 3), (1, 0)):  # of view 3 nobody learns that it is missing
            targets.prepare(view, following)
            found = targets.gather(EVERY_THIRD, 1.0, CPU)["logits"].numpy()
            assert np.array_equal(found, knowledge.read("logits", view, EVERY_THIRD))


def test_the_last_view_is_held_alone(stores, tmp_path):
    with holding(reader.open(stores["float16"]), tmp_path) as targets:
        targets.prepare(0, 1)
        first = weakref.ref(targets.rows["logits"])
        targets.prepare(1, None)
        assert first() is None


def test_a_planned_batch_allocates_nothing_of_its_size(tmp_path):
    knowledge = reader.open(make(tmp_path / "store", plan_of(20_000, 1)))
    with holding(knowledge, tmp_path, np.arange(20_000)) as targets:
        targets.prepare(0, None)
        planned = targets.plan(np.random.default_rng(0).permutation(20_000))
        planned.take(slice(0, 10_000))
        tracemalloc.start()
        planned.take(slice(10_000, 20_000))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 10_000  # of a batch of 180,000 bytes
