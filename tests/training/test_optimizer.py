"""The learning rate over the epochs, and any optimizer's state through a file and back: no step is another one."""

import json
import math
import random
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from killing import finished, succeeds
from pupils import SPEC, leftovers, lines, same_files, same_tensors
from safetensors import safe_open

import kcdcache
from kcdcache.files.records import canonical_json
from kcdcache.settings import OptimizerSettings
from kcdcache.training import learner
from kcdcache.training.loop import learning_rate

OURS = {"momentum": {}, "nesterov": {"nesterov": True}, "plain": {"momentum": 0.0}}
"""what settings make of make_optimizer"""
MAKERS = {
    **{name: partial(learner.make_optimizer, settings=OptimizerSettings(**change)) for name, change in OURS.items()},
    "AdamW": partial(torch.optim.AdamW, lr=1e-2, amsgrad=True),
    "AdamW by groups": lambda p: torch.optim.AdamW([{"params": p[:1], "weight_decay": 0}, {"params": p[1:]}], lr=1e-2),
}


def network():
    torch.manual_seed(1)
    made = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5))
    return made.to(memory_format=torch.channels_last)


def steps(model, made, numbers):
    for number in numbers:
        pixels = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        made.zero_grad()
        model(pixels).square().mean().backward()
        made.step()


def written(made):
    """The state as a checkpoint's bytes hold it."""
    tensors, rest = learner.flattened(made)
    return safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}), canonical_json(rest)


@pytest.mark.parametrize("name", MAKERS)
def test_an_optimizer_read_from_a_file_takes_the_steps_of_the_one_written(name):
    whole, cut = network(), network()
    expected, first = MAKERS[name](list(whole.parameters())), MAKERS[name](list(cut.parameters()))
    steps(whole, expected, range(6))
    steps(cut, first, range(3))
    tensors, rest = written(first)
    resumed = MAKERS[name](list(cut.parameters()))
    learner.restore(resumed, safetensors.torch.load(tensors), json.loads(rest))
    assert written(resumed) == (tensors, rest)
    steps(cut, resumed, range(3, 6))
    assert same_tensors(whole.state_dict(), cut.state_dict())
    assert written(resumed) == written(expected)
    for parameter, state in resumed.state.items():
        for value in state.values():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                assert value.stride() == parameter.stride()


def test_no_checkpoint_is_read_by_pickle():
    package = Path(kcdcache.__file__).parent
    sources = [path.read_text() for room in ("training", "runs") for path in (package / room).glob("*.py")]
    assert len(sources) > 12
    assert not [text for text in sources if re.search(r"(?<!safetensors\.)torch\.load\b|pickle", text)]


RUN = {"student": "lessons:TinyNet", "epochs": 2, "stages": 2, "batch_size": 50, "keep": 0.6, "threads": 1,
       "checkpoint_seconds": 0}  # fmt: skip
"""a condensation between two epochs of four and three batches, and a checkpoint after every batch"""
STEPS_OF_WRITING = (36, 140)
"""such a run dies at: inside its first epoch, and inside its second"""


def reached(run):
    """The epoch and the batch in it that a run's checkpoint is after."""
    pointer = json.loads((run / "checkpoint" / "latest.json").read_text())
    with safe_open(run / "checkpoint" / pointer["file"], "pt") as held:
        record = json.loads(held.metadata()["kcdcache"])
    return record["epoch"], record["step"]


@pytest.mark.parametrize("name", ["nesterov", pytest.param("plain", marks=pytest.mark.slow)])
def test_killed_inside_an_epoch_with_and_without_momentum_and_run_again_gives_the_same_bytes(
    start, place, tmp_path, name
):
    def words(out):
        given = {"data": SPEC, "store": place.knowledge.path, "out": out, "momentum": OURS[name].get("momentum", 0.9)}
        return ["train", *lines(given | RUN), *(["--nesterov"] if name == "nesterov" else [])]

    succeeds(start, words(tmp_path / "whole"), tmp_path / "log")
    draw, moments = random.Random(name), []
    for first in STEPS_OF_WRITING:
        run, point = tmp_path / str(first), str(first + draw.randrange(8))
        assert finished(start, words(run), tmp_path / "log", KCDCACHE_CRASHPOINT=point) == -signal.SIGKILL
        moments.append(reached(run))
        succeeds(start, words(run), tmp_path / "log")
        assert same_files(tmp_path / "whole", run)
        assert not leftovers(run)
    assert [epoch for epoch, step in moments if step] == [0, 1], moments


def rates(chosen, positions):
    return [learning_rate(chosen, position) for position in positions]


def test_the_cifar_recipe_drops_at_150_180_and_210_of_240_epochs():
    drops = {0: 0.05, 149: 0.05, 150: 5e-3, 179: 5e-3, 180: 5e-4, 209: 5e-4, 210: 5e-5, 239: 5e-5}
    assert rates(OptimizerSettings(), drops) == pytest.approx(list(drops.values()), rel=1e-9)


@pytest.mark.parametrize("epochs", [8, 24, 40, 56, 240, 1000])
def test_a_milestone_that_falls_on_an_epoch_is_that_epoch(epochs):
    for drop, milestone in enumerate((0.625, 0.75, 0.875)):
        epoch = round(milestone * epochs)
        found = rates(OptimizerSettings(epochs=epochs), (epoch - 1, epoch))
        assert found == pytest.approx([0.05 * 0.1**drop, 0.05 * 0.1 ** (drop + 1)])


def test_cosine_falls_through_half_of_the_rate_warm_up_rises_linearly_and_constant_stays():
    cosine = OptimizerSettings(epochs=100, decay="cosine", learning_rate=0.4)
    assert rates(cosine, (0, 25, 50, 100)) == pytest.approx([0.4, 0.2 * (1 + math.sqrt(0.5)), 0.2, 0.0])
    assert rates(cosine, range(100)) == sorted(rates(cosine, range(100)), reverse=True)
    warm = OptimizerSettings(epochs=10, decay="constant", learning_rate=0.6, warmup_epochs=2)
    assert rates(warm, (0, 1, 2, 9)) == pytest.approx([0.2, 0.4, 0.6, 0.6])
