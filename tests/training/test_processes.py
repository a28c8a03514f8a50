"""Every stage by several real processes: the same order, exact values, one set of files, its own rows, resume.

The processes are forks of one that imported all and meet by gloo; slow tests start torchrun itself.
"""

import json
import signal
import socket
import time
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from lessons import condensed
from pupils import SPEC, digits, executed, lines, loaded, precomputed, same_files, saved_teacher
from ranks import PLAIN, Forked, PlainNet, launched, ran, stopped
from safetensors.torch import load_file

from kcdcache.condensation import manifest, value_files
from kcdcache.errors import SettingsError
from kcdcache.methods import run_loss
from kcdcache.settings import MethodSettings, OptimizerSettings
from kcdcache.store import reader
from kcdcache.training import batches, learner, processes, requery
from kcdcache.training.learner import ValueRecord
from kcdcache.training.processes import Group
from kcdcache.training.sampling import Sampler

CPU = torch.device("cpu")
CE = run_loss.Loss(run_loss.weights_of(MethodSettings(method="ce")), {})
UNEVEN = 31
"""batch size that no number of processes divides; it leaves 14 samples of 200 to the last batch"""
TRAIN = {"data": SPEC, "epochs": 4, "stages": 2, "batch_size": UNEVEN, "keep": 0.6, "threads": 1, "ema_decay": 0.9,
         "clip_norm": 1}  # fmt: skip
FIT = {"data": SPEC, "epochs": 2, "batch_size": UNEVEN, "threads": 1, "augment": "crop", "padding": 2}
FILL = {"data": SPEC, "augment": "crop", "padding": 2, "views": 3, "batch_size": 16, "min_accuracy": 0, "threads": 1}
TINY = "lessons:TinyNet"
WORLD = 4
SIGNALS = (signal.SIGTERM, signal.SIGKILL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    data = digits(200, 60)
    precomputed(root / "store", data, loaded(saved_teacher(root / "teacher", data), data), views=3)
    return root


def training(place, out, student=PLAIN, **changes):
    return ["train", *lines(TRAIN | {"store": place / "store", "student": student, "out": out} | changes)]


def fitting(place, out, model=PLAIN, **changes):
    return ["fit", *lines(FIT | {"model": model, "out": out} | changes)]


def filling(place, out, **changes):
    return ["precompute", *lines(FILL | {"teacher": place / "teacher", "store": out} | changes)]


STAGES = {"train": (training, "student"), "fit": (fitting, "model")}
"""stage -> its command's words, and the name of what it trains"""


def done(start, words, world, log):
    """What a command's processes printed, once all have ended well."""
    running = Forked(start, words, world, log)
    assert running.codes() == [0] * world, "\n".join(running.told())
    return running.told()


def rows_of(run):
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Worlds:
    """One stage's run by one process and by four."""

    def __init__(self, start, place, stage):
        words, weights = STAGES[stage]
        root = place / stage
        root.mkdir()
        self.runs = {world: root / str(world) for world in (1, WORLD)}
        self.told = {world: done(start, words(place, run), world, f"{run}.log") for world, run in self.runs.items()}
        self.weights = {world: load_file(run / f"{weights}.safetensors") for world, run in self.runs.items()}
        if stage == "train":
            averages = {world: load_file(run / "ema" / f"{weights}.safetensors") for world, run in self.runs.items()}
            for world, average in averages.items():
                self.weights[world] |= {f"average of {name}": value for name, value in average.items()}


@pytest.fixture(scope="module")
def worlds(start, place):
    return {stage: Worlds(start, place, stage) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_four_processes_train_the_same_float64_network_as_one_and_one_tells_of_it(worlds, stage):
    """Sums over a batch are taken in another order, so that the last bits differ, and nothing else."""
    found = worlds[stage]
    for name, weight in found.weights[1].items():
        torch.testing.assert_close(found.weights[WORLD][name], weight, rtol=1e-11, atol=1e-13)
    assert not torch.equal(found.weights[1]["conv.weight"], PlainNet().conv.weight)
    for alone, shared in zip(rows_of(found.runs[1]), rows_of(found.runs[WORLD]), strict=True):
        counts = {name: value for name, value in alone.items() if isinstance(value, int) and name != "bytes_read"}
        means = counts.keys() ^ alone.keys() - {"bytes_read"}
        assert counts.items() <= shared.items()
        assert {name: shared[name] for name in means} == pytest.approx({name: alone[name] for name in means}, rel=1e-6)
    record, summary = (json.loads((found.runs[WORLD] / name).read_text()) for name in ("run.json", "summary.json"))
    assert record["environment"]["processes"] == WORLD
    assert {"mean", "std", "n", "warm_up"} == summary["images_per_second"].keys()
    assert "test accuracy" in found.told[WORLD][0]
    assert not any("accuracy_last" in text or "epoch" in text for text in found.told[WORLD][1:])


def test_they_visit_and_keep_the_same_samples_and_each_reads_the_rows_of_its_share(worlds):
    """A row of the store is read by the one process that shows its sample; checksums are of whole files."""
    runs = worlds["train"].runs
    for stage in (0, 1, 2):
        one, many = (manifest.read(runs[n] / f"stages/{stage}/manifest.parquet") for n in (1, WORLD))
        assert np.array_equal(one.index, many.index)
        assert np.array_equal(one.partner, many.partner)
    one, many = (value_files.read(runs[n] / "values.parquet", 200).values for n in (1, WORLD))
    assert np.array_equal(one.visits, many.visits)
    np.testing.assert_allclose(many.value, one.value, rtol=1e-6)
    for alone, shared in zip(rows_of(runs[1]), rows_of(runs[WORLD]), strict=True):
        each = shared["rows_read_by_each"]
        assert (len(each), sum(each)) == (WORLD, alone["rows_read"])
        assert max(each) <= alone["rows_read"] / WORLD + 10  # batches of 31 leave one more to the first
        assert shared["bytes_read"] == sum(shared["bytes_read_by_each"]) <= WORLD * alone["bytes_read"]
        assert "rows_read_by_each" not in alone


def test_two_processes_keep_almost_the_sets_of_one(start, place, tmp_path):
    """Batch statistics are each process's own, so that values differ from those of one process."""
    for world in (1, 2):
        done(start, training(place, tmp_path / str(world), TINY), world, tmp_path / "log")
    stages = executed("diff", {"a": tmp_path / "1", "b": tmp_path / "2"})["stages"]
    assert stages["0"]["jaccard"] == 1
    assert 0.2 < stages["2"]["jaccard"] < 1


LONG = {"epochs": 8, "checkpoint_seconds": 0}
"""long enough to be stopped inside an epoch"""
SLOW = pytest.mark.slow


@pytest.mark.parametrize("stage", ["train", pytest.param("fit", marks=SLOW)])
@pytest.mark.parametrize(
    ("number", "codes"), [pytest.param(signal.SIGTERM, [143, 130], marks=SLOW), (signal.SIGKILL, [9, -9])]
)
def test_stopped_or_one_killed_the_rest_ends_and_the_same_command_makes_the_same_bytes(
    start, place, tmp_path, stage, number, codes
):
    words, run = STAGES[stage][0](place, tmp_path / "run", TINY, **LONG), tmp_path / "run"
    running = Forked(start, words, 2, tmp_path / "log")
    running.signal_once(lambda: len(rows_of(run)) >= 2, int(number == signal.SIGKILL), number)
    assert running.codes() == codes
    expected = "lost another process of this run" if number == signal.SIGKILL else "the same command resumes"
    assert expected in running.told()[0]
    assert len(rows_of(run)) < LONG["epochs"]
    done(start, words, 2, tmp_path / "log")
    done(start, STAGES[stage][0](place, tmp_path / "whole", TINY, epochs=LONG["epochs"]), 2, tmp_path / "log")
    assert same_files(run, tmp_path / "whole")


@SLOW
@pytest.mark.parametrize("stage", STAGES)
def test_another_number_of_processes_goes_on_if_asked_to(start, place, tmp_path, stage):
    """Where nothing but rounding depends on the number, the result is that of one process throughout."""
    words, name = STAGES[stage]
    run = words(place, tmp_path / "run", **LONG)
    running = Forked(start, run, 4, tmp_path / "log")
    running.signal_once(lambda: len(rows_of(tmp_path / "run")) >= 2, 2, signal.SIGTERM)
    assert running.codes() == [130, 130, 143, 130]
    refused = Forked(start, run, 2, tmp_path / "refused")
    assert refused.codes() == [4, 9]
    assert "differ in processes: 4 against 2" in refused.told()[0]
    done(start, [*run, "--allow-env-change"], 2, tmp_path / "log")
    done(start, words(place, tmp_path / "whole", **LONG), 1, tmp_path / "log")
    found, wanted = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("run", "whole"))
    for key, weight in wanted.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-6, atol=1e-8)


def test_what_fit_cannot_share_is_refused_before_it_trains(start, place, tmp_path):
    running = Forked(start, fitting(place, tmp_path / "run", batch_size=3), 4, tmp_path / "log")
    assert running.codes() == [2] * 4
    assert "--batch-size 3 leaves some of 4 processes without a sample" in running.told()[0]
    assert not (tmp_path / "run" / "checkpoint").exists()


# under the real torchrun; each launch imports torch in every process


@SLOW
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world", [2, 4])
def test_training_that_lost_a_process_ends_and_resumes_to_the_same_bytes(place, tmp_path, stage, number, world):
    words, log, run = STAGES[stage][0], tmp_path / "log", tmp_path / "run"
    long = {"epochs": 24, "checkpoint_seconds": 0}
    stopped(launched(world, words(place, run, TINY, **long), log), log, lambda: len(rows_of(run)) >= 3, number)
    assert len(rows_of(run)) < 24
    ran(world, words(place, run, TINY, **long), log)
    ran(world, words(place, tmp_path / "whole", TINY, **long), log)
    assert same_files(run, tmp_path / "whole")


@SLOW
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("world", [2, 4])
def test_a_store_that_lost_a_process_is_filled_to_the_same_bytes(place, tmp_path, number, world):
    def parts():
        return len(list((tmp_path / "store").glob("_kcd/log/0/v*.json")))

    log, many = tmp_path / "log", {"data": "digits", "views": 25}
    words = filling(place, tmp_path / "store", **many)
    stopped(launched(world, words, log), log, lambda: parts() >= 3, number)
    assert parts() < 25
    ran(world, words, log)
    ran(1, filling(place, tmp_path / "whole", **many), log)
    assert same_files(tmp_path / "store", tmp_path / "whole")


# the parts, in this process


def test_processes_draw_their_own_dropout_masks_also_after_a_stop():
    """Two processes stopped; of four that go on, two have a state of their own, and the others draw yet others."""
    torch.manual_seed(1)
    states = [torch.get_rng_state(), torch.manual_seed(2).get_state()]
    drawn = []
    for rank in range(4):
        pupil = learner.new_learner(TINY, digits(200, 60), OptimizerSettings(), CE, CPU, group=Group(rank, 4))
        pupil.restore(pupil.tensors() | {"rng": torch.stack(states)}, pupil.state())
        drawn.append(torch.rand(3))
    for state, found in zip(states, drawn, strict=False):
        torch.set_rng_state(state)
        assert torch.equal(torch.rand(3), found)
    assert len({tuple(found.tolist()) for found in drawn}) == 4


@pytest.fixture(scope="module")
def sets(place):
    """What epochs may be made of: everything, or a condensed set, whose mixes the teacher was perhaps asked about."""
    knowledge, data = reader.open(place / "store"), digits(200, 60)
    mixed, network = condensed(knowledge), loaded(place / "teacher", data)
    mixes = requery.Mixes(manifest=mixed, fields=("logits",), views=(0, 1, 2))
    requery.write(place / "mixes", mixes, knowledge, data, network)
    digest = knowledge.knowledge.data.digest
    full = manifest.full(manifest.Samples(knowledge.knowledge_id, 200, data.train.labels, 10, digest))
    return {"full": (full, None), "mixed": (mixed, None), "asked again": (mixed, place / "mixes")}


def shown(place, sets, rank, world, epochs=(1,), kind="full", views=None, stop=None, size=UNEVEN):
    """One process's batches of some epochs, and the store that it read."""
    knowledge, (chosen, asked) = reader.open(place / "store"), sets[kind]
    mixes = None if asked is None else reader.open(asked)
    with batches.connect(digits(200, 60), knowledge, chosen, requeried=mixes, cached_views=views) as source:
        sampler = Sampler(manifest=chosen, optimizer=OptimizerSettings(batch_size=size, seed=3))
        source = replace(source, stop=epochs[-1] + 1 if stop is None else stop)
        made = batches.HostBatches(source=source, sampler=sampler, group=Group(rank, world))
        found = [batch for epoch in epochs for batch in made.epoch(epoch)]
        return found, knowledge


def test_of_one_view_all_rows_are_read_once_and_kept(place, sets):
    assert shown(place, sets, 1, 4, epochs=(0, 1, 2), views=1)[1].rows_read == 200


def test_the_next_epochs_rows_are_fetched_ahead_if_they_are_known(place, sets):
    knowledge, share = reader.open(place / "store"), len(processes.deal(200, UNEVEN, 1, 4)[0])
    limit = time.monotonic() + 60
    with batches.connect(digits(200, 60), knowledge, sets["full"][0]) as source:
        sampler = Sampler(manifest=source.manifest, optimizer=OptimizerSettings(batch_size=UNEVEN))
        made = batches.HostBatches(source=replace(source, stop=2), sampler=sampler, group=Group(1, 4))
        list(made.epoch(0))
        while knowledge.rows_read < 2 * share:
            assert time.monotonic() < limit, "nothing was fetched in the background"
        list(made.epoch(1))
    assert knowledge.rows_read == 2 * share


DEALS = [(200, 33, 4), (200, 31, 4), (5, 3, 3), (7, 8, 4), (64, 16, 4), (0, 4, 2), (65, 32, 1), (66, 32, 1), (9, 1, 1)]


def cut(count, batch_size, world):
    """The batches of an epoch by a plain loop: the last joins the one before if a process had fewer than two of it."""
    found = [list(range(low, min(low + batch_size, count))) for low in range(0, count, batch_size)]
    if len(found) > 1 and len(found[-1]) < batch_size and len(found[-1][world - 1 :: world]) < 2:
        found[-2:] = [found[-2] + found[-1]]
    return found


@pytest.mark.parametrize(("count", "batch_size", "world"), DEALS)
def test_a_deal_gives_every_point_to_one_process(count, batch_size, world):
    dealt = [processes.deal(count, batch_size, rank, world) for rank in range(world)]
    batches = cut(count, batch_size, world)
    assert [len(whole) for whole in batches] == processes.batch_sizes(count, batch_size, world)
    for step, whole in enumerate(batches):
        for rank, (points, parts) in enumerate(dealt):
            mine = np.arange(count)[points][parts[step].mine].tolist()
            assert mine == (whole[rank::world] or [rank])
            assert parts[step][1:] == (len(whole), not whole[rank::world])
    assert {len(parts) for _, parts in dealt} == {len(batches)}
    assert sorted(place for points, _ in dealt for place in np.arange(count)[points].tolist()) == list(range(count))


@pytest.mark.parametrize(("begun_by", "continued_by"), [(1, 4), (4, 1), (1, 2), (3, 3)])
@pytest.mark.parametrize(("count", "batch_size"), [(65, 16), (70, 16), (64, 16)])
def test_what_is_left_of_an_epoch_is_dealt_once_whoever_goes_on(count, batch_size, begun_by, continued_by):
    start = 0
    for size in processes.batch_sizes(count, batch_size, begun_by):
        start += size
        left = []
        for rank in range(continued_by):
            points, parts = processes.deal(count, batch_size, rank, continued_by, start)
            for part in parts[-(-start // batch_size) :]:
                left += [] if part.idle else np.arange(count)[points][part.mine].tolist()
        assert sorted(left) == list(range(start, count))


@pytest.mark.parametrize(("kind", "world"), [("full", 3), ("mixed", 2), ("asked again", 5)])
def test_batches_of_all_processes_together_are_those_of_one(place, sets, kind, world):
    made = [shown(place, sets, rank, world, kind=kind) for rank in range(world)]
    parts = [part for part, _ in made]
    if kind == "full":
        assert sum(knowledge.rows_read for _, knowledge in made) == 200
    for step, batch in enumerate(shown(place, sets, 0, 1, kind=kind)[0]):
        assert {part[step].shared for part in parts} == {len(batch.index)}
        for rank, part in enumerate(part[step] for part in parts):
            assert part.idle == (rank >= len(batch.index))
            for name, value in {} if part.idle else vars(batch).items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(getattr(part, name), value[rank::world]), name
            assert part.idle or torch.equal(part.knowledge["logits"], batch.knowledge["logits"][rank::world])


def test_points_too_few_for_a_batch_of_all_processes_join_the_batch_before(place, sets):
    """Two of 200 are left over: one process makes a batch of them, four show them with the batch before."""
    alone = shown(place, sets, 0, 1, size=33)[0]
    each = [shown(place, sets, rank, 4, size=33)[0] for rank in range(4)]
    assert [len(batch.index) for batch in alone] == [33] * 6 + [2]
    for parts in each:
        assert [batch.shared for batch in parts] == [33] * 5 + [35]
        assert min(len(batch.index) for batch in parts) >= 8
    together = torch.empty(35, dtype=torch.int64)
    for rank, parts in enumerate(each):
        together[rank::4] = parts[-1].index
    assert together.tolist() == torch.cat([alone[5].index, alone[6].index]).tolist()


def test_two_processes_train_a_network_that_needs_two_samples_of_every_batch(start, place, tmp_path):
    """Of 115 samples three are left over, which is one for the second process."""
    words = {"data": "digits?train=115&test=60", "batch_size": 16, "epochs": 1}
    done(start, fitting(place, tmp_path / "run", "lessons:Pooled", **words), 2, tmp_path / "log")
    assert [row["samples"] for row in rows_of(tmp_path / "run")] == [115]


def test_a_set_too_small_for_the_processes_is_refused_before_it_trains(start, place, tmp_path):
    few = {"schedule": "paper_stage", "keep": 0.035}
    running = Forked(start, training(place, tmp_path / "run", **few), 4, tmp_path / "log")
    assert running.codes() == [2] * 4
    assert (
        "a set of 7 samples to train on: batch statistics need at least 2 for each of 4 processes"
        in (running.told()[0])
    )
    assert not (tmp_path / "run").exists()


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
    with pytest.raises(SettingsError, match=message):
        learner.new_learner("resnet8", digits(200, 60), OptimizerSettings(**change), CE, CPU, group=Group(1, 4))


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
PLACES = [
    ({"RANK": "2"}, "which names no place of 0 to N - 1 of torchrun; start the command with `torchrun"),
    ({"RANK": "-1"}, "which names no place of 0 to N - 1 of torchrun"),
    ({}, "MASTER_PORT is '', expected the port where the processes of torchrun meet"),
    ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http', expected the port"),
]


@pytest.mark.parametrize(("changes", "message"), PLACES)
def test_a_place_that_is_none_is_refused(changes, message):
    with pytest.raises(SettingsError, match=message), processes.group_of(TORCHRUN | changes):
        pass


@pytest.mark.parametrize("absent", ["LOCAL_RANK", "MASTER_ADDR", "RANK", "WORLD_SIZE"])
def test_some_variables_of_torchrun_are_no_torchrun(absent, caplog):
    with processes.group_of({name: value for name, value in TORCHRUN.items() if name != absent}) as group:
        assert group is processes.ALONE
    assert ("works alone" in caplog.text) == (absent != "WORLD_SIZE")


def test_a_follower_of_nobody_says_what_it_has_done(start, place, tmp_path):
    """RANK alone, left by something else: the command trains, and prints its result."""
    process = start(fitting(place, tmp_path / "run", epochs=1), tmp_path / "log", RANK="1")
    assert process.ended(120)
    assert (process.code, "test accuracy" in (tmp_path / "log").read_text()) == (0, True)


# waits for others that do not come


@pytest.mark.parametrize("stage", ["fit", pytest.param("train", marks=SLOW)])
@pytest.mark.parametrize(("rank", "number"), [("0", signal.SIGINT), ("0", signal.SIGTERM), ("1", signal.SIGTERM)])
def test_one_signal_ends_a_process_whose_peers_never_come(start, place, tmp_path, stage, rank, number):
    """The first waits for the other to connect; the other has connected to one that does not answer: inside torch."""
    log, words = tmp_path / "log", STAGES[stage][0](place, tmp_path / "run")
    log.touch()
    with socket.socket() as other, ExitStack() as connected:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        if rank == "1":
            other.listen()
            other.settimeout(60)
        else:
            other.close()
        process = start(words, log, **TORCHRUN | {"RANK": rank, "MASTER_PORT": str(port)})
        if rank == "1":
            connected.enter_context(other.accept()[0])
        while rank == "0" and "waiting for the others" not in log.read_text():
            assert not process.ended(0.01), log.read_text()
        process.signal(number)
        assert process.ended(20)
    assert (process.code, log.read_text().count("nothing was begun")) == (128 + number, 1)
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_second_signal_ends_a_process_that_waits_for_a_stopped_one(start, place, tmp_path):
    """In the middle of training, where the first would write a checkpoint if only the other were there."""
    running = Forked(start, training(place, tmp_path / "run", TINY, epochs=400), 2, tmp_path / "log")
    running.signal_once(lambda: len(rows_of(tmp_path / "run")) >= 1, 1, signal.SIGSTOP)
    running.signal_once(lambda: True, 0, signal.SIGINT)
    running.signal_once(lambda: True, 0, signal.SIGTERM)
    assert running.ended(0, 20)
    running.signal_once(lambda: True, 1, signal.SIGKILL)
    assert running.codes()[0] in (-signal.SIGTERM, -signal.SIGINT)
    assert running.codes()[1] == -signal.SIGKILL


def test_a_port_that_others_have_is_named(start, place, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        process = start(fitting(place, tmp_path / "run"), tmp_path / "log", **TORCHRUN | {"MASTER_PORT": port})
        assert process.ended(60)
    told = (tmp_path / "log").read_text()
    assert process.code == 9, told
    assert (
        f"error: process 0 did not meet the others at 127.0.0.1:{port}, which MASTER_ADDR and MASTER_PORT name" in told
    )


def test_observations_joined_are_those_of_one_process():
    """Alone, in a group of one that keeps its observations, the record is the same."""
    record, held = (ValueRecord(6, MethodSettings(), CPU) for _ in range(2))
    held.pending = []
    logits, index = torch.randn(4, 3), torch.tensor([5, 0, 2, 3])
    mixed = torch.tensor([True, False, False, True])
    for one in (record, held):
        one.observe(logits, logits[:, 0], index, mixed)
    assert held.visits.sum() == 0
    held.join(processes.ALONE)
    assert torch.equal(held.visits, record.visits)
    assert torch.equal(held.value, record.value)
    assert held.pending == []
