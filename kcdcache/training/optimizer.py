"""The update of a step: optimizer, learning rate, clipping, averaged weights, and their state in a checkpoint."""

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from kcdcache.settings import OptimizerSettings

OF_DEVICE = ("capturable", "fused", "foreach")
"""options of AdamW that the device decides, not the checkpoint"""


def make_optimizer(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return SGD (as in CRD/RepDistiller and the paper) or AdamW over the parameters; fused on a GPU.

    AdamW is torch's: decoupled weight decay, scaled by the learning rate. Source: Loshchilov and Hutter 2019.
    """
    trained = list(parameters)
    on_gpu = trained[0].is_cuda
    groups, fused = decay_groups(trained, settings), True if on_gpu else None
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=settings.learning_rate,
            betas=settings.adam_betas,
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            fused=fused,
            capturable=on_gpu,  # counts its steps on the device, as a recorded step needs
        )
    return torch.optim.SGD(
        groups,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
        fused=fused,
    )


def decay_groups(parameters: Sequence[nn.Parameter], settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Return the parameters as one group, or with `decay_norms` off as those with weight decay and those without.

    Parameters of at most one dimension (scales and shifts of norms, biases) have none then, as in timm, whether they
    are the network's or a method's own.
    """
    if settings.decay_norms:
        return [{"params": list(parameters)}]
    decayed, spared = ([p for p in parameters if (p.ndim > 1) == many] for many in (True, False))
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def clip(optimizer: torch.optim.Optimizer, most: float | None) -> None:
    """Scale the gradients of all trained parameters, so that their common norm is at most `most`; None does nothing.

    The norm is that of all gradients as one vector, in torch with 1e-6 added before dividing by it. Waits for no
    device, so that a step with it can be recorded as a CUDA graph; under torchrun every process clips the same averaged
    gradient.
    """
    if most is not None:
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(trained, most)


class Average(nn.Module):
    """Exponential moving average of a network's weights, evaluated and saved beside them.

    Update n = 0, 1, ... is average = d average + (1 - d) weights with d = min(decay, (1 + n) / (10 + n)), so that a
    short run is not held at its initial weights. Batch statistics are averaged too; counters are copied. torch's
    `AveragedModel` reads its count from the device in every step, which a CUDA graph cannot record; this one does not.
    Source: `ExponentialMovingAverage` of TensorFlow, with `num_updates`.
    """

    updates: Tensor

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Start from the network's weights; `decay` in (0, 1)."""
        super().__init__()
        self.network = deepcopy(network).requires_grad_(False).eval()
        self.register_buffer("updates", torch.zeros((), device=next(network.parameters()).device))
        self._least = 1 - decay
        averages, current = ([*one.parameters(), *one.buffers()] for one in (self.network, network))
        self._pairs = [*zip(averages, current, strict=True)]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the network's weights after a step, without waiting for the device."""
        share = (9 / (10 + self.updates)).clamp_min(self._least)
        for average, current in self._pairs:
            if average.is_floating_point():
                average.lerp_(current, share.to(average.dtype))
            else:
                average.copy_(current)
        self.updates += 1


def flattened(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of an optimizer's `state_dict` by NUMBER.NAME of a parameter, and the rest as JSON values.

    Equal states give equal results in the same order.
    """
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for number, entries in sorted(state["state"].items()):
        for name, value in sorted(entries.items()):
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value
            else:
                rest.setdefault(str(number), {})[name] = value
    return tensors, {"state": rest, "groups": state["param_groups"]}


def restore(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Set the state of an optimizer over the same parameters from the results of `flattened`."""
    state: dict[int, dict[str, Any]] = {int(number): dict(entries) for number, entries in rest["state"].items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:  # in the parameter's memory layout, so that steps round equally
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(number), {})[name] = value
    groups = [_of_here(then, now) for then, now in zip(rest["groups"], optimizer.param_groups, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _of_here(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded group; AdamW written on a GPU may go on on a CPU, which cannot count on the device."""
    changed = {name: now[name] for name in OF_DEVICE} if "capturable" in now else {}
    # a file has lists, where the optimizer had tuples
    return {name: tuple(value) if name == "betas" else value for name, value in then.items()} | changed


def learning_rate(settings: OptimizerSettings, position: float) -> float:
    """Return the learning rate at a position in [0, epochs).

    >>> settings = OptimizerSettings(epochs=240)
    >>> [round(learning_rate(settings, epoch), 6) for epoch in (0, 149, 150, 180, 239)]
    [0.05, 0.05, 0.005, 0.0005, 5e-05]
    """
    if position < settings.warmup_epochs:
        return settings.learning_rate * (position + 1) / (settings.warmup_epochs + 1)
    share = position / settings.epochs
    if settings.decay == "cosine":
        return settings.learning_rate * (1 + math.cos(math.pi * share)) / 2
    # a milestone of 0.625 of 24 epochs is epoch 15 exactly; the slack absorbs the share's rounding
    drops = sum(share >= milestone - 1e-9 for milestone in settings.milestones) if settings.decay == "milestones" else 0
    return settings.learning_rate * settings.decay_factor**drops
