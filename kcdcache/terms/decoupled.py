"""Decoupled distillation: the target class against the rest, and the rest among themselves."""

from jaxtyping import Float32
from torch import Tensor

from kcdcache.losses.decoupled import decoupled
from kcdcache.terms.base import Lesson, Pair, Seen, Term

TARGET, REST = 1.0, 8.0
"""weights of the target's and the other classes' divergence"""
WARM_UP = 20
"""epochs over which the term grows to its weight"""


class Decoupled(Term):
    """DKD: T^2 (TCKD + 8 NCKD), times min(1, e / 20) in epoch e = 1, 2, ...

    A mixed point's target class is the kept point's.
    Source: Zhao et al., CVPR 2022 (arXiv 2203.08679), Eq. 7. The weight 8 is its release's default and that of
    resnet32x4 teachers; it takes 6 for wrn_40_2 and vgg13, 2 for resnet56 and resnet20.
    """

    fields = ("logits",)

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self._temperature = pair.settings.temperature or 4.0

    def weights_at(self, epoch: int, epochs: int) -> tuple[float, float]:
        """Return 1, and the warm-up's share of the term."""
        return 1.0, min(1.0, (epoch + 1) / WARM_UP)

    def forward(self, seen: Seen, lesson: Lesson) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        logits = seen["logits"][: len(lesson.labels)]
        return decoupled(logits, lesson.knowledge["logits"], lesson.labels, TARGET, REST, self._temperature)
