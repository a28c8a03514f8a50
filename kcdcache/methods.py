"""The distillation methods: METHODS maps a name to its losses, default weights and the fields it needs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcdcache.config import MethodSettings, nearest
from kcdcache.errors import SettingsError
from kcdcache.losses import softmax


@runtime_checkable
class Lesson(Protocol):
    """What a loss needs of a batch: labels, mixing shares and the teacher's targets."""

    @property
    def labels(self) -> Int[Tensor, " batch"]:
        """Hard label of each point."""

    @property
    def partner_labels(self) -> Int[Tensor, " batch"]:
        """Hard label of what is mixed in; the own label where nothing is."""

    @property
    def epsilon(self) -> Float[Tensor, " batch"]:
        """Share of the partner in [0, 1]."""

    @property
    def mixed(self) -> Bool[Tensor, " batch"]:
        """Whether the point is of K_Aug."""

    @property
    def probabilities(self) -> Float[Tensor, "batch classes"] | None:
        """The teacher's softened output, or None where the method needs none."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Resolved weights of one run's loss."""

    gamma: float
    """weight of the hard-label cross-entropy"""
    alpha: float
    """weight of the soft-label divergence"""
    temperature: float
    """distillation temperature T"""
    mix_label: str
    """'keep' or 'mix': the hard label of a mixed point"""
    smoothing: float
    """label smoothing of the hard-label term"""


Loss = Callable[[Float[Tensor, "batch classes"], Lesson, Weights], Float[Tensor, " batch"]]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One distillation method: its loss per sample, defaults and needs."""

    loss: Loss
    fields: tuple[str, ...]
    """teacher fields read from the store"""
    gamma: float
    alpha: float
    temperature: float
    source: str
    """paper, and where the defaults are from"""


def hard_term(logits: Float[Tensor, "batch classes"], lesson: Lesson, weights: Weights) -> Float[Tensor, " batch"]:
    """Return the hard-label cross-entropy per sample; with mix_label 'mix' the partner's label counts by epsilon."""
    own = softmax.cross_entropy(logits, lesson.labels, weights.smoothing)
    if weights.mix_label == "keep":
        return own
    other = softmax.cross_entropy(logits, lesson.partner_labels, weights.smoothing)
    return torch.where(lesson.mixed, (1 - lesson.epsilon) * own + lesson.epsilon * other, own)


def ce(logits: Float[Tensor, "batch classes"], lesson: Lesson, weights: Weights) -> Float[Tensor, " batch"]:
    """Return gamma CE(y, z_S) per sample: plain training, no teacher."""
    return weights.gamma * hard_term(logits, lesson, weights)


def kd(logits: Float[Tensor, "batch classes"], lesson: Lesson, weights: Weights) -> Float[Tensor, " batch"]:
    """Return gamma CE(y, z_S) + alpha T^2 KL(p_T || p_S) per sample.

    Source: Hinton et al. 2015; Eq. 1 of the paper with the hard label and T of its reference code.
    """
    assert lesson.probabilities is not None, "a store with logits serves this method"
    hard = hard_term(logits, lesson, weights)
    soft = softmax.soft_divergence(logits, lesson.probabilities, weights.temperature)
    return weights.gamma * hard + weights.alpha * soft


METHODS: Mapping[str, Method] = {
    "ce": Method(loss=ce, fields=(), gamma=1.0, alpha=0.0, temperature=1.0, source="plain cross-entropy"),
    "kd": Method(
        loss=kd,
        fields=("logits",),
        gamma=0.1,
        alpha=0.9,
        temperature=4.0,
        source="Hinton et al. 2015 (arXiv 1503.02531); weights and T of RepDistiller",
    ),
}


def method_named(name: str) -> Method:
    """Return the method of that name.

    Raises:
        SettingsError: there is none; names the nearest.
    """
    if name not in METHODS:
        raise SettingsError(f"unknown method '{name}'; {nearest(name, list(METHODS))}")
    return METHODS[name]


def weights_for(settings: MethodSettings, smoothing: float) -> Weights:
    """Return the run's weights: the settings where given, the method's own defaults elsewhere."""
    method = method_named(settings.method)
    return Weights(
        gamma=method.gamma if settings.gamma is None else settings.gamma,
        alpha=method.alpha if settings.alpha is None else settings.alpha,
        temperature=method.temperature if settings.temperature is None else settings.temperature,
        mix_label=settings.mix_label,
        smoothing=smoothing,
    )
