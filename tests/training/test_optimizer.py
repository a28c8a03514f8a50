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
from torch.utils._python_dispatch import TorchDispatchMode

import kcdcache
from kcdcache.files.records import canonical_json
from kcdcache.settings import OptimizerSettings
from kcdcache.training import optimizer
from kcdcache.training.optimizer import learning_rate

OURS = {
    "momentum": {}, "nesterov": {"nesterov": True}, "plain": {"momentum": 0.0},
    "clipped by groups": {"clip_norm": 0.5, "decay_norms": False},
    "adamw by groups": {"optimizer": "adamw", "decay_norms": False, "adam_betas": (0.8, 0.95)},
}  # fmt: skip
"""what settings make of make_optimizer"""
MAKERS = {
    **{name: partial(optimizer.make_optimizer, settings=OptimizerSettings(**change)) for name, change in OURS.items()},
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
    tensors, rest = optimizer.flattened(made)
    return safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}), canonical_json(rest)


@pytest.mark.parametrize("name", MAKERS)
def test_an_optimizer_read_from_a_file_takes_the_steps_of_the_one_written(name):
    whole, cut = network(), network()
    expected, first = MAKERS[name](list(whole.parameters())), MAKERS[name](list(cut.parameters()))
    steps(whole, expected, range(6))
    steps(cut, first, range(3))
    tensors, rest = written(first)
    resumed = MAKERS[name](list(cut.parameters()))
    optimizer.restore(resumed, safetensors.torch.load(tensors), json.loads(rest))
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
STEPS_OF_WRITING, OF_AVERAGE = (36, 140), 14
"""such a run dies at: inside its first epoch, and inside its second; so many more to write the averaged weights"""


def reached(run):
    """The epoch and the batch in it that a run's checkpoint is after."""
    pointer = json.loads((run / "checkpoint" / "latest.json").read_text())
    with safe_open(run / "checkpoint" / pointer["file"], "pt") as held:
        record = json.loads(held.metadata()["kcdcache"])
    return record["epoch"], record["step"]


FLAGS = {
    "nesterov": ["--nesterov"],
    "adamw, clipping and averaged weights": [
        "--optimizer", "adamw", "--no-decay-norms", "--clip-norm", "0.5", "--ema-decay", "0.9"
    ],
    "sgd and averaged weights": ["--ema-decay", "0.99", "--warmup-epochs", "1", "--decay", "cosine"],
    "plain": ["--momentum", "0"],
}  # fmt: skip


@pytest.mark.parametrize("name", [*FLAGS][:2] + [pytest.param(name, marks=pytest.mark.slow) for name in [*FLAGS][2:]])
def test_killed_inside_an_epoch_with_any_optimizer_and_run_again_gives_the_same_bytes(start, place, tmp_path, name):
    def words(out):
        return ["train", *lines({"data": SPEC, "store": place.knowledge.path, "out": out} | RUN), *FLAGS[name]]

    succeeds(start, words(tmp_path / "whole"), tmp_path / "log")
    draw, moments = random.Random(name), []
    for first in STEPS_OF_WRITING:
        later = OF_AVERAGE * ("averaged" in name and first > 100)
        run, point = tmp_path / str(first), str(first + later + draw.randrange(8))
        assert finished(start, words(run), tmp_path / "log", KCDCACHE_CRASHPOINT=point) == -signal.SIGKILL
        moments.append(reached(run))
        succeeds(start, words(run), tmp_path / "log")
        assert same_files(tmp_path / "whole", run)
        assert (run / "ema" / "student.safetensors").exists() == ("averaged" in name)
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


def schedule_of(made, epochs):
    """The rates that one of torch's schedules gives, epoch by epoch."""
    found = []
    for _ in range(epochs):
        found.append(made.optimizer.param_groups[0]["lr"])
        made.optimizer.step()
        made.step()
    return found


def test_warm_up_and_cosine_are_those_of_torchs_schedules():
    def sgd():
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)

    linear = torch.optim.lr_scheduler.LinearLR(sgd(), start_factor=1 / 5, total_iters=4)
    warm = OptimizerSettings(epochs=12, decay="constant", learning_rate=0.3, warmup_epochs=4)
    assert rates(warm, range(12)) == pytest.approx(schedule_of(linear, 12))
    cosine = OptimizerSettings(epochs=12, decay="cosine", learning_rate=0.3)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(sgd(), T_max=12)
    assert rates(cosine, range(12)) == pytest.approx(schedule_of(torchs, 12))
    both = OptimizerSettings(epochs=12, decay="cosine", learning_rate=0.3, warmup_epochs=4)
    assert rates(both, range(12)) == pytest.approx([*rates(warm, range(4)), *rates(cosine, range(4, 12))])


def adamw_by_hand(weight, gradients, rate, decay, betas, epsilon):
    """Loshchilov and Hutter 2019, Algorithm 2, number by number in double precision."""
    first, second = [0.0] * len(weight), [0.0] * len(weight)
    for t, gradient in enumerate(gradients, start=1):
        for i, g in enumerate(gradient):
            first[i] = betas[0] * first[i] + (1 - betas[0]) * g
            second[i] = betas[1] * second[i] + (1 - betas[1]) * g * g
            step = (first[i] / (1 - betas[0] ** t)) / (math.sqrt(second[i] / (1 - betas[1] ** t)) + epsilon)
            weight[i] -= rate * (step + decay * weight[i])
    return weight


@pytest.mark.parametrize("decay_norms", [True, False])
def test_adamw_is_its_papers_and_spares_norms_and_biases_if_asked_to(decay_norms):
    chosen = OptimizerSettings(optimizer="adamw", weight_decay=0.3, adam_betas=(0.7, 0.9), decay_norms=decay_norms)
    assert chosen.learning_rate == 1e-3
    matrix, bias = (torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in ([[0.5, -2.0]], [1.0, 3.0]))
    draw = random.Random(1)
    gradients = [[draw.gauss(0, 1) for _ in range(4)] for _ in range(5)]
    made = optimizer.make_optimizer([matrix, bias], chosen)
    for gradient in gradients:
        matrix.grad, bias.grad = torch.tensor([gradient[:2]]).double(), torch.tensor(gradient[2:]).double()
        made.step()
    for parameter, start, part, decay in (
        (matrix, [0.5, -2.0], slice(0, 2), 0.3), (bias, [1.0, 3.0], slice(2, 4), 0.3 if decay_norms else 0.0),
    ):  # fmt: skip
        expected = adamw_by_hand(start, [g[part] for g in gradients], 1e-3, decay, (0.7, 0.9), 1e-8)
        assert parameter.detach().flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_groups_leave_no_parameter_out_and_are_one_by_default():
    parameters = list(network().parameters())
    one, two = (optimizer.decay_groups(parameters, OptimizerSettings(decay_norms=on)) for on in (True, False))
    assert [len(group["params"]) for group in one] == [4]
    assert [[p.ndim for p in group["params"]] for group in two] == [[4, 2], [1, 1]]
    assert [group.get("weight_decay") for group in two] == [None, 0.0]


@pytest.mark.parametrize("most", [0.01, 1e6, None])
def test_clipping_scales_all_gradients_by_one_number(most):
    model = network()
    made = optimizer.make_optimizer(model.parameters(), OptimizerSettings(decay_norms=False))
    model(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    before = [parameter.grad.double().flatten().tolist() for parameter in model.parameters()]
    norm = math.sqrt(sum(g * g for gradient in before for g in gradient))
    optimizer.clip(made, most)
    factor = 1.0 if most is None or norm < most else most / norm
    for gradient, parameter in zip(before, model.parameters(), strict=True):
        assert parameter.grad.flatten().tolist() == pytest.approx([factor * g for g in gradient], rel=2e-5)


def test_an_average_follows_its_rule_in_weights_and_batch_statistics():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    made, draw = optimizer.Average(model, 0.6), torch.Generator().manual_seed(2)
    expected = {name: value.double().clone() for name, value in model.state_dict().items()}
    for n in range(8):
        with torch.no_grad():
            model(torch.randn(5, 2, generator=draw))
            model[0].weight.add_(torch.randn(3, 2, generator=draw))
        decay = min(0.6, (1 + n) / (10 + n))
        for name, value in model.state_dict().items():
            mean = decay * expected[name] + (1 - decay) * value.double()
            expected[name] = mean if value.is_floating_point() else value.double()
        made.update()
    for name, value in made.network.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not made.network.training
    assert made.updates == 8


class NoReading(TorchDispatchMode):
    """Refuses to read a tensor's number, for which a GPU would have to be waited for."""

    def __torch_dispatch__(self, function, types, given=(), named=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a number is read")
        return function(*given, **(named or {}))


def test_clipping_and_averaging_never_wait_for_the_device():
    """As a CUDA graph demands of the steps that it records."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    made, average = optimizer.make_optimizer(model.parameters(), OptimizerSettings()), optimizer.Average(model, 0.9)
    model(torch.ones(4, 2)).sum().backward()
    with NoReading():
        optimizer.clip(made, 1.0)
        average.update()
        with pytest.raises(RuntimeError, match="a number is read"):
            float(average.updates)
