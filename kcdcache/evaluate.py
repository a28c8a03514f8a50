"""Accuracy, agreement with the teacher, and calibration."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from kcdcache import prefetch, views
from kcdcache.data import Split
from kcdcache.losses.softmax import cross_entropy
from kcdcache.models.transform import InputTransform

BATCH = 512


def predict(
    network: nn.Module,
    transform: InputTransform,
    split: Split,
    rule: views.ViewRule,
    device: torch.device,
    held: views.HeldImages | None = None,
    workers: int | None = None,
) -> Float[Tensor, "n classes"]:
    """Return the logits of every sample of a split, in eval mode, in float32, on the device.

    `rule` should be `views.plain` of the training rule: no augmentation. `held` are the split's images by that rule if
    they lie on the device already; else `workers` is as for `prefetch.shown`.
    """
    with _evaluating(network):
        shown = _shown(split, rule, device, held, workers)
        return torch.cat([network(transform(pixels)).float() for pixels in shown])


def guesses(
    network: nn.Module,
    transform: InputTransform,
    split: Split,
    rule: views.ViewRule,
    device: torch.device,
    workers: int | None = None,
) -> Int64[np.ndarray, " n"]:
    """Return the class that a network names for view 0 of every sample, in eval mode, in float32."""
    with _evaluating(network):
        shown = _shown(split, rule, device, None, workers)
        found = [network(transform(pixels)).float().argmax(1).cpu() for pixels in shown]
    return torch.cat(found).numpy()


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        network.train(was_training)


def accuracy(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> float:
    """Return the share of samples whose largest logit is at their label, in [0, 1]."""
    return float((logits.argmax(1) == labels).double().mean())


def agreement(logits: Float[Tensor, "n classes"], others: Float[Tensor, "n classes"]) -> float:
    """Return the share of samples on which two networks name the same class, in [0, 1]."""
    return float((logits.argmax(1) == others.argmax(1)).double().mean())


def calibration_error(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"], bins: int = 15) -> float:
    """Return the expected calibration error: mean over samples of |confidence - accuracy| per confidence bin.

    Source: Guo et al. 2017, Eq. 3, with equal-width bins.
    """
    confidence, guess = logits.double().cpu().softmax(1).max(1)  # on a GPU index_add_ would add in any order
    right = (guess == labels.cpu()).double()
    which = (confidence * bins).long().clamp_max(bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, confidence - right)
    return float(gaps.abs().sum() / len(labels))


def measure(
    network: nn.Module,
    transform: InputTransform,
    split: Split,
    rule: views.ViewRule,
    device: torch.device,
    held: views.HeldImages | None = None,
    workers: int | None = None,
) -> dict[str, float]:
    """Return test accuracy in [0, 1], mean cross-entropy in nats, and expected calibration error in [0, 1]."""
    logits = predict(network, transform, split, rule, device, held, workers)
    labels = torch.from_numpy(split.labels).to(device)
    return {
        "test_accuracy": accuracy(logits, labels),
        "test_loss": float(cross_entropy(logits, labels).double().mean()),
        "test_calibration_error": calibration_error(logits, labels),
    }


def _shown(
    split: Split, rule: views.ViewRule, device: torch.device, held: views.HeldImages | None, workers: int | None
) -> Iterator[Tensor]:
    blocks = [torch.arange(low, min(low + BATCH, len(split))) for low in range(0, len(split), BATCH)]
    if held is not None:
        every = held.parameters(0)
        yield from (held.views(block.to(device), every) for block in blocks)
        return
    asked = (prefetch.Asked(block.numpy(), views.parameters(rule, block.numpy(), 0)) for block in blocks)
    if prefetch.pays(split, rule):
        yield from prefetch.shown(split, rule, asked, device, workers)
        return
    yield from (views.show(rule, split.images(index), parameters, device) for index, parameters in asked)
