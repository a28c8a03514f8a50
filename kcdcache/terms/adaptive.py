"""Entropy-based adaptive distillation: softened outputs, the more the less sure both networks are."""

from jaxtyping import Float32
from torch import Tensor

from kcdcache.losses.adaptive import entropy_weighted
from kcdcache.terms.base import Lesson, Pair, Seen, Term

WEIGHT_TEMPERATURE = 3.0
"""temperature of the entropies that weigh the samples"""


class Adaptive(Term):
    """EA-KD: w T^2 KL(p_T || p_S), w = (H_T + H_T H_S / ln C) / 2 with both entropies at temperature 3, no gradient.

    Source: Su et al., ICCV 2025 (arXiv 2311.13621); temperatures and weights of its release (cpsu00/EA-KD). Its
    ImageNet code divides by ln 1000 as here; its CIFAR-100 code divides H_T H_S by 100 instead of ln 100.
    """

    fields = ("logits",)

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self._temperature = pair.settings.temperature or 4.0

    def forward(self, seen: Seen, lesson: Lesson) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        logits = seen["logits"][: len(lesson.labels)]
        return entropy_weighted(logits, lesson.knowledge["logits"], self._temperature, WEIGHT_TEMPERATURE)
