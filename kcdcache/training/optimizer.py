"""The optimizer, its learning rate over the epochs, and its state as tensors and JSON values."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kcdcache.settings import OptimizerSettings


def make_optimizer(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """Return SGD over the parameters, as CRD/RepDistiller and the paper use it; on a GPU in one kernel."""
    trained = list(parameters)
    return torch.optim.SGD(
        trained,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.nesterov,
        fused=True if trained[0].is_cuda else None,
    )


def learning_rate(settings: OptimizerSettings, position: float) -> float:
    """Return the learning rate at a position in [0, epochs), the number of epochs behind.

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


def flattened(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of any optimizer's `state_dict`, by number of the parameter and name, and the rest as JSON.

    The same state gives the same names and values in the same order.
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
    """Give an optimizer over the same parameters the state that `flattened` took apart."""
    state: dict[int, dict[str, Any]] = {int(number): dict(entries) for number, entries in rest["state"].items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:  # in the parameter's memory layout: steps then round as they did
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})
