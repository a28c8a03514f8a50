"""Training by several real processes under torchrun: the same order, exact values, one set of files, resume."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import ROOT, environment
from pupils import SPEC, digits, lines, loaded, precomputed, same_files, saved_teacher
from safetensors.torch import load_file
from torch import nn

from kcdcache import batches, learner, manifest, store, together, values
from kcdcache.config import MethodSettings, OptimizerSettings
from kcdcache.errors import SettingsError

RUN = {"epochs": 4, "stages": 2, "batch_size": 32, "keep": 0.6, "threads": 1}
PLAIN = "test_together:PlainNet"


class PlainNet(nn.Module):
    """A student without batch statistics or dropout, in float64: what differs between worlds is only rounding."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.fc = nn.Linear(4 * 49, num_classes)
        self.double()

    def forward(self, pixels):
        return self.fc(torch.relu(self.conv(pixels.double())).flatten(1))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("together")
    data = digits(200, 60)
    precomputed(root / "store", data, loaded(saved_teacher(root / "teacher", data), data), views=3)
    return root


def command(place, out, student, **changes):
    return ["train", *lines({"data": SPEC, "store": place / "store", "student": student, "out": out} | RUN | changes)]


def launched(processes, words, log):
    """A command under torchrun, one process per rank."""
    # the launcher picks a free port, so that tests do not meet
    meeting = ["--nproc-per-node", str(processes), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    launch = [sys.executable, "-m", "torch.distributed.run", *meeting, "-m", "kcdcache", *words]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with open(log, "ab") as stream:
        return subprocess.Popen(launch, stdout=stream, stderr=stream, env=environment(PYTHONPATH=path))


def trained(place, out, processes, student=PLAIN, **changes):
    log = out.parent / f"{out.name}.log"
    code = launched(processes, command(place, out, student, **changes), log).wait(300)
    assert code == 0, log.read_text()
    return out


@pytest.fixture(scope="module")
def worlds(place):
    """The same run by one, two and three processes."""
    return {count: trained(place, place / f"world{count}", count) for count in (1, 2, 3)}


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_processes_trains_the_same_student(worlds, count):
    one, many = (load_file(worlds[n] / "student.safetensors") for n in (1, count))
    for name, weight in one.items():
        torch.testing.assert_close(many[name], weight, rtol=1e-4, atol=1e-6)  # the losses are float32
    assert not torch.equal(one["conv.weight"], PlainNet().conv.weight)


@pytest.mark.parametrize("count", [2, 3])
def test_they_visit_and_keep_the_same_samples(worlds, count):
    for stage in (0, 1, 2):
        one, many = (manifest.read(worlds[n] / f"stages/{stage}/manifest.parquet") for n in (1, count))
        assert np.array_equal(one.index, many.index)
        assert np.array_equal(one.partner, many.partner)
    one, many = (values.read(worlds[n] / "values.parquet", 200).values for n in (1, count))
    assert np.array_equal(one.visits, many.visits)
    np.testing.assert_allclose(many.value, one.value, rtol=1e-5)


@pytest.mark.parametrize("count", [2, 3])
def test_one_of_them_writes_what_all_did(worlds, count):
    for alone, together_ in zip(rows_of(worlds[1]), rows_of(worlds[count]), strict=True):
        assert {k: v for k, v in together_.items() if not isinstance(v, float)} == {
            k: v for k, v in alone.items() if not isinstance(v, float)
        }
        assert together_ == pytest.approx(alone, rel=1e-5)
    assert json.loads((worlds[count] / "run.json").read_text())["environment"]["processes"] == count
    told = (worlds[count].parent / f"world{count}.log").read_text()
    assert told.count("condensed_set:") == 1


def test_one_process_under_torchrun_is_one_without(place, worlds, tmp_path):
    alone = subprocess.run(
        [sys.executable, "-m", "kcdcache", *command(place, tmp_path / "run", PLAIN)], capture_output=True, check=False,
        env=environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")])),
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr.decode()
    assert same_files(worlds[1], tmp_path / "run")


def test_two_processes_run_twice_make_the_same_bytes(place, tmp_path):
    runs = [trained(place, tmp_path / name, 2, "lessons:TinyNet") for name in ("one", "two")]
    assert same_files(*runs)


@pytest.fixture(scope="module")
def whole(place):
    return trained(place, place / "whole", 2, epochs=40)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_stopped_they_go_on_to_the_same_bytes_and_in_another_number(place, whole, tmp_path, number):
    words, log = command(place, tmp_path / "run", PLAIN, epochs=40, checkpoint_seconds=0), tmp_path / "log"
    process = launched(2, words, log)
    while not (tmp_path / "run/metrics.jsonl").exists() or len(rows_of(tmp_path / "run")) < 3:
        assert process.poll() is None, log.read_text()
    if number == signal.SIGKILL:  # one of them dies: torchrun ends the other
        os.kill(min(_children(process.pid)), number)
    else:
        process.send_signal(number)
    assert process.wait(120) != 0
    done = len(rows_of(tmp_path / "run"))
    assert done < 40
    refused = launched(1, words, tmp_path / "refused")
    assert refused.wait(120) != 0
    assert "differ in processes: 2 against 1" in (tmp_path / "refused").read_text()
    again = trained(place, tmp_path / "run", 2, epochs=40, checkpoint_seconds=0)
    assert (again / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()
    assert (again / "values.parquet").read_bytes() == (whole / "values.parquet").read_bytes()


def _children(parent):
    found = []
    for path in (entry for entry in os.scandir("/proc") if entry.name.isdecimal()):
        try:
            stat = Path(path.path, "stat").read_text()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == parent:
            found.append(int(path.name))
    return found


def test_batches_of_all_ranks_together_are_those_of_one(place):
    data = digits(200, 60)
    with source_of(place, data) as source:
        for world in (2, 3, 5):
            whole = list(batches.iterate(source, 1, batch_size=48, seed=3))
            parts = [list(batches.iterate(source, 1, batch_size=48, seed=3, rank=r, world=world)) for r in range(world)]
            for step, batch in enumerate(whole):
                mine = [part[step] for part in parts]
                index = torch.full_like(batch.index, -1)
                for rank, part in enumerate(mine):
                    assert part.shared == len(batch.index)
                    if not part.idle:
                        index[rank::world] = part.index
                        assert torch.equal(part.pixels, batch.pixels[rank::world])
                        assert torch.equal(part.probabilities, batch.probabilities[rank::world])
                assert torch.equal(index, batch.index)


def source_of(place, data):
    knowledge = store.open(place / "store")
    chosen = manifest.full(
        knowledge.knowledge_id, 200, data.train.labels, 10, data_digest=knowledge.knowledge.data.digest
    )
    return batches.connect(data, knowledge, chosen)


def test_a_process_without_a_sample_counts_nothing(place):
    with source_of(place, digits(200, 60)) as source:
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
    chosen, group = OptimizerSettings(**change), together.Group(1, 4)
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
        together.group_of(variables),
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
    held.settle(together.ALONE)
    assert torch.equal(held.visits, record.visits)
    assert torch.equal(held.value, record.value)
    assert held.pending == []
