"""Every stage by several real processes: the same order, exact values, one set of files, its own rows, resume.

The processes of the quick tests are forks of one that imported all and meet by gloo; the slow ones start torchrun.
"""

import json
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from killing import nursery
from lessons import condensed
from pupils import SPEC, digits, lines, loaded, precomputed, same_files, saved_teacher
from ranks import PLAIN, Forked, PlainNet
from safetensors.torch import load_file

from kcdcache.commands import diff
from kcdcache.condense import manifest, value_files
from kcdcache.errors import SettingsError
from kcdcache.settings import MethodSettings, OptimizerSettings
from kcdcache.store import reader
from kcdcache.training import batches, learner, processes, requery, sampling

UNEVEN = 33
"""batch size that leaves two samples of 200 to the last batch, which is none for two of four processes"""
TRAIN = {"epochs": 4, "stages": 2, "batch_size": UNEVEN, "keep": 0.6, "threads": 1}
FIT = {"epochs": 3, "batch_size": UNEVEN, "threads": 1, "augment": "crop", "padding": 2}
TINY = "lessons:TinyNet"
WORLDS = (1, 2, 4)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("together")
    data = digits(200, 60)
    precomputed(root / "store", data, loaded(saved_teacher(root / "teacher", data), data), views=3)
    return root


@pytest.fixture(scope="module")
def start():
    with nursery() as begin:
        yield begin


def training(place, out, student=PLAIN, **changes):
    given = {"data": SPEC, "store": place / "store", "student": student, "out": out}
    return ["train", *lines(given | TRAIN | changes)]


def fitting(out, model=PLAIN, **changes):
    return ["fit", *lines({"data": SPEC, "model": model, "out": out} | FIT | changes)]


def filling(place, out, **changes):
    given = {"data": SPEC, "teacher": place / "teacher", "store": out, "augment": "crop", "padding": 2, "views": 3,
             "batch_size": 16, "min_accuracy": 0, "threads": 1}  # fmt: skip
    return ["precompute", *lines(given | changes)]


def done(start, words, world, log):
    """What a command's processes printed, once all have ended well."""
    running = Forked(start, words, world, log)
    assert running.codes() == [0] * world, "\n".join(running.told())
    return running.told()


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Worlds:
    """One run by one, two and four processes."""

    def __init__(self, start, root, words, weights):
        self.runs = {world: root / str(world) for world in WORLDS}
        self.told = {world: done(start, words(run), world, f"{run}.log") for world, run in self.runs.items()}
        self.weights = {world: load_file(run / f"{weights}.safetensors") for world, run in self.runs.items()}


@pytest.fixture(scope="module")
def trained(start, place):
    (place / "train").mkdir()
    return Worlds(start, place / "train", lambda out: training(place, out), "student")


@pytest.fixture(scope="module")
def fitted(start, place):
    (place / "fit").mkdir()
    return Worlds(start, place / "fit", fitting, "model")


@pytest.mark.parametrize("stage", ["trained", "fitted"])
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_trains_the_same_float64_network(request, stage, world):
    """Sums over a batch are taken in another order, so that the last bits differ, and nothing else."""
    found = request.getfixturevalue(stage).weights
    for name, weight in found[1].items():
        torch.testing.assert_close(found[world][name], weight, rtol=1e-11, atol=1e-13)
    assert not torch.equal(found[1]["conv.weight"], PlainNet().conv.weight)


@pytest.mark.parametrize("world", [2, 4])
def test_they_visit_and_keep_the_same_samples(trained, world):
    for stage in (0, 1, 2):
        one, many = (manifest.read(trained.runs[n] / f"stages/{stage}/manifest.parquet") for n in (1, world))
        assert np.array_equal(one.index, many.index)
        assert np.array_equal(one.partner, many.partner)
    one, many = (value_files.read(trained.runs[n] / "values.parquet", 200).values for n in (1, world))
    assert np.array_equal(one.visits, many.visits)
    np.testing.assert_allclose(many.value, one.value, rtol=1e-6)


@pytest.mark.parametrize("stage", ["trained", "fitted"])
@pytest.mark.parametrize("world", [2, 4])
def test_one_of_them_writes_and_tells_what_all_did(request, stage, world):
    found = request.getfixturevalue(stage)
    for alone, shared in zip(rows_of(found.runs[1]), rows_of(found.runs[world]), strict=True):
        counts = {name: value for name, value in alone.items() if isinstance(value, int) and name != "bytes_read"}
        assert counts.items() <= shared.items()
        assert {name: shared[name] for name in counts.keys() ^ alone.keys() - {"bytes_read"}} == pytest.approx(
            {name: alone[name] for name in counts.keys() ^ alone.keys() - {"bytes_read"}}, rel=1e-6
        )
    record, summary = (json.loads((found.runs[world] / name).read_text()) for name in ("run.json", "summary.json"))
    assert record["environment"]["processes"] == world
    assert {"mean", "std", "n", "warm_up"} == summary["images_per_second"].keys()
    assert "accuracy_last:" in found.told[world][0]
    assert not any("accuracy_last" in text or "epoch" in text for text in found.told[world][1:])


def test_each_process_reads_the_rows_of_its_share(trained):
    """A row of the store is read by the one process that shows its sample; checksums are of whole files."""
    for world in (2, 4):
        for alone, shared in zip(rows_of(trained.runs[1]), rows_of(trained.runs[world]), strict=True):
            each = shared["rows_read_by_each"]
            assert (len(each), sum(each)) == (world, alone["rows_read"])
            assert max(each) <= alone["rows_read"] / world + 10  # batches of 33 leave one more to the first
            assert shared["bytes_read"] == sum(shared["bytes_read_by_each"]) <= world * alone["bytes_read"]
    assert "rows_read_by_each" not in rows_of(trained.runs[1])[0]


def test_four_shards_at_once_make_the_store_of_one_process(start, place, tmp_path):
    for world in (1, 4):
        told = done(start, filling(place, tmp_path / str(world)), world, tmp_path / f"{world}.log")
    assert same_files(tmp_path / "1", tmp_path / "4")
    assert all(f"shard {rank}/4, from RANK and WORLD_SIZE" in text for rank, text in enumerate(told))


def test_two_processes_run_twice_make_the_same_bytes_and_keep_almost_the_sets_of_one(start, place, tmp_path):
    """Batch statistics are each process's own, so that values differ from those of one process."""
    runs = {name: tmp_path / name for name in ("one", "two", "again")}
    for world, name in ((1, "one"), (2, "two"), (2, "again")):
        done(start, training(place, runs[name], TINY), world, tmp_path / f"{name}.log")
    assert same_files(runs["two"], runs["again"])
    stages = diff.run(runs["one"], runs["two"])["stages"]
    assert stages["0"]["jaccard"] == 1
    assert 0.2 < stages["2"]["jaccard"] < 1


def reached(run, epochs=2):
    """Whether a run has finished so many epochs."""
    return lambda: (run / "metrics.jsonl").exists() and len(rows_of(run)) >= epochs


LONG = {"epochs": 12, "checkpoint_seconds": 0}
"""long enough to be stopped inside an epoch"""


SLOW_FIT = pytest.param(fitting, marks=pytest.mark.slow)


@pytest.mark.parametrize("stage", [training, SLOW_FIT])
@pytest.mark.parametrize(
    ("number", "codes"),
    [pytest.param(signal.SIGTERM, [143, 130], marks=pytest.mark.slow), (signal.SIGKILL, [9, -9])],
)
def test_stopped_or_one_killed_the_rest_ends_and_the_same_command_makes_the_same_bytes(
    start, place, tmp_path, stage, number, codes
):
    def words(name, **changes):
        return (training(place, tmp_path / name, TINY, **changes) if stage is training
                else fitting(tmp_path / name, TINY, **changes))  # fmt: skip

    running = Forked(start, words("run", **LONG), 2, tmp_path / "log")
    running.signal_once(reached(tmp_path / "run"), int(number == signal.SIGKILL), number)
    assert running.codes() == codes
    expected = "lost another one of this run" if number == signal.SIGKILL else r"the same command resumes"
    assert expected in running.told()[0]
    assert len(rows_of(tmp_path / "run")) < LONG["epochs"]
    done(start, words("run", **LONG), 2, tmp_path / "log")
    done(start, words("whole", epochs=LONG["epochs"]), 2, tmp_path / "log")
    assert same_files(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [training, fitting])
def test_another_number_of_processes_goes_on_if_asked_to(start, place, tmp_path, stage):
    """Where nothing but rounding depends on the number, the result is that of one process throughout."""
    words = training(place, tmp_path / "run", **LONG) if stage is training else fitting(tmp_path / "run", **LONG)
    running = Forked(start, words, 4, tmp_path / "log")
    running.signal_once(reached(tmp_path / "run"), 2, signal.SIGTERM)
    assert running.codes() == [130, 130, 143, 130]
    refused = Forked(start, words, 2, tmp_path / "refused")
    assert refused.codes() == [4, 9]
    assert "differ in processes: 4 against 2" in refused.told()[0]
    done(start, [*words, "--allow-env-change"], 2, tmp_path / "log")
    whole = [word if word != str(tmp_path / "run") else str(tmp_path / "whole") for word in words]
    done(start, whole, 1, tmp_path / "log")
    name = "student.safetensors" if stage is training else "model.safetensors"
    found, wanted = (load_file(tmp_path / run / name) for run in ("run", "whole"))
    for key, weight in wanted.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-6, atol=1e-8)


def test_what_fit_cannot_share_is_refused_before_it_trains(start, tmp_path):
    running = Forked(start, fitting(tmp_path / "run", batch_size=3), 4, tmp_path / "log")
    assert running.codes() == [2] * 4
    assert "--batch-size 3 leaves some of 4 processes without a sample" in running.told()[0]
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_processes_draw_their_own_dropout_masks_also_after_a_stop():
    """Two processes stopped; of four that go on, two have a state of their own, and the others draw yet others."""
    torch.manual_seed(1)
    states = [torch.get_rng_state(), torch.manual_seed(2).get_state()]
    drawn = []
    for rank in range(4):
        pupil = learner.new_learner(
            TINY, digits(200, 60), OptimizerSettings(), torch.device("cpu"), group=processes.Group(rank, 4)
        )
        pupil.restore(pupil.tensors() | {"rng": torch.stack(states)}, pupil.state())
        drawn.append(torch.rand(3))
    for state, found in zip(states, drawn, strict=False):
        torch.set_rng_state(state)
        assert torch.equal(torch.rand(3), found)
    assert len({tuple(found.tolist()) for found in drawn}) == 4


def source_of(place, views=None, chosen=None):
    knowledge, data = reader.open(place / "store"), digits(200, 60)
    chosen = chosen or manifest.full(
        knowledge.knowledge_id, 200, data.train.labels, 10, data_digest=knowledge.knowledge.data.digest
    )
    return knowledge, batches.connect(data, knowledge, chosen, cached_views=views)


def shown(place, world, rank, epoch, views=None, **more):
    """One process's batches of an epoch, and the store that it read."""
    knowledge, connected = source_of(place, views)
    with connected as source:
        given = {"batch_size": UNEVEN, "seed": 3, "rank": rank, "world": world}
        return list(batches.iterate(source, epoch, **given, **more)), knowledge


@pytest.mark.parametrize("world", [2, 3, 5, 7])
def test_of_several_views_each_row_is_read_by_one_process(place, world):
    assert sum(shown(place, world, rank, 1)[1].rows_read for rank in range(world)) == 200


def test_of_one_view_all_rows_are_read_once_and_kept(place):
    knowledge, connected = source_of(place, views=1)
    with connected as source:
        for epoch in range(3):
            list(batches.iterate(source, epoch, batch_size=UNEVEN, rank=1, world=4))
    assert knowledge.rows_read == 200


def test_the_next_epochs_rows_are_fetched_ahead_if_they_are_known(place):
    knowledge, connected = source_of(place)
    share, limit = processes.deal(200, UNEVEN, 1, 4).points, time.monotonic() + 60
    with connected as source:
        later = sampling.everything(source.manifest, 0, 1).part(share)
        given = {"batch_size": UNEVEN, "rank": 1, "world": 4}
        list(batches.iterate(source, 0, **given, later=later))
        while knowledge.rows_read < 2 * len(share):
            assert time.monotonic() < limit, "nothing was fetched in the background"
        list(batches.iterate(replace(source, stop=2), 1, **given))
    assert knowledge.rows_read == 2 * len(share)


@pytest.mark.parametrize(("count", "batch_size", "world"), [(200, 33, 4), (5, 3, 3), (2, 8, 4), (64, 16, 4), (0, 4, 2)])
def test_a_deal_gives_every_point_to_one_process(count, batch_size, world):
    dealt = [processes.deal(count, batch_size, rank, world) for rank in range(world)]
    for step, low in enumerate(range(0, count, batch_size)):
        whole = list(range(low, min(low + batch_size, count)))
        for rank, (points, parts) in enumerate(dealt):
            mine = points[parts[step].mine].tolist()
            assert mine == (whole[rank::world] or points[:1].tolist())
            assert parts[step][1:] == (len(whole), not whole[rank::world])
    if count >= world:
        assert sorted(place for points, _ in dealt for place in points.tolist()) == list(range(count))


@pytest.fixture(scope="module")
def sets(place):
    """What epochs may be made of: everything, or a condensed set, whose mixes the teacher was perhaps asked about."""
    knowledge, data = reader.open(place / "store"), digits(200, 60)
    mixed = condensed(knowledge)
    network = loaded(place / "teacher", data)
    with batches.connect(data, knowledge, mixed, fields=()) as source:
        requery.write(source, network, knowledge, place / "mixes", fields=("logits",), view_numbers=(0, 1, 2))
    full = manifest.full(
        knowledge.knowledge_id, 200, data.train.labels, 10, data_digest=knowledge.knowledge.data.digest
    )
    return {"full": (full, None), "mixed": (mixed, None), "asked again": (mixed, place / "mixes")}


@pytest.mark.parametrize("kind", ["full", "mixed", "asked again"])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_batches_of_all_processes_together_are_those_of_one(place, sets, kind, world):
    def made(rank, world):
        knowledge, data = reader.open(place / "store"), digits(200, 60)
        chosen, asked = sets[kind]
        mixes = None if asked is None else reader.open(asked)
        with batches.connect(data, knowledge, chosen, requeried=mixes) as source:
            return list(batches.iterate(source, 1, batch_size=UNEVEN, seed=3, rank=rank, world=world))

    parts = [made(rank, world) for rank in range(world)]
    for step, batch in enumerate(made(0, 1)):
        assert {part[step].shared for part in parts} == {len(batch.index)}
        for rank, part in enumerate(part[step] for part in parts):
            assert part.idle == (rank >= len(batch.index))
            for name, values_ in {} if part.idle else vars(batch).items():
                if isinstance(values_, torch.Tensor):
                    assert torch.equal(getattr(part, name), values_[rank::world]), name
            assert part.idle or torch.equal(part.knowledge["logits"], batch.knowledge["logits"][rank::world])


def test_a_process_without_a_sample_counts_nothing(place):
    with source_of(place)[1] as source:
        last = [list(batches.iterate(source, 0, batch_size=66, rank=rank, world=5))[-1] for rank in range(5)]
    assert [part.idle for part in last] == [False, False, True, True, True]
    assert [len(part.index) for part in last] == [1, 1, 1, 1, 1]
    assert {part.shared for part in last} == {2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3}, "--batch-size 3 leaves some of 4 processes without a sample; raise it, or start fewer"),
        ({"compile": True}, "--compile is for one process"),
        ({"resident": "on"}, "--resident on is for one process"),
        ({"sync_bn": True}, "--sync-bn joins the batch statistics of several processes on GPUs"),
    ],
)
def test_what_processes_cannot_share_is_refused(change, message):
    chosen, group = OptimizerSettings(**change), processes.Group(1, 4)
    with pytest.raises(SettingsError, match=message):
        learner.new_learner("resnet8", digits(200, 60), chosen, torch.device("cpu"), group=group)


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost"},
        {"WORLD_SIZE": "2", "RANK": "-1", "MASTER_ADDR": "localhost"},
        {"WORLD_SIZE": "2", "RANK": "0"},
    ],
)
def test_a_place_that_is_none_is_refused(variables):
    with (
        pytest.raises(SettingsError, match=r"which is no place among processes of torchrun; start it with `torchrun"),
        processes.group_of(variables),
    ):
        pass


def test_observations_settle_to_those_of_one_process():
    """Alone, in a group of one that keeps its observations, the record is the same."""
    record = learner.new_record(6, torch.device("cpu"), MethodSettings())
    held = learner.new_record(6, torch.device("cpu"), MethodSettings())
    held.pending = []
    logits, index = torch.randn(4, 3), torch.tensor([5, 0, 2, 3])
    mixed = torch.tensor([True, False, False, True])
    for one in (record, held):
        one.observe(logits, logits[:, 0], index, mixed)
    assert held.visits.sum() == 0
    held.settle(processes.ALONE)
    assert torch.equal(held.visits, record.visits)
    assert torch.equal(held.value, record.value)
    assert held.pending == []
