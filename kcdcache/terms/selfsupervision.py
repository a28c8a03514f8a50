"""Self-supervised distillation: what the teacher finds alike among rotated and upright images."""

from copy import deepcopy

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from kcdcache import fields
from kcdcache.losses import selfsupervision
from kcdcache.terms.base import Lesson, Pair, Seen, Term, constant

ROTATED, SIMILARITY = 2.7, 10.0
"""weights of class divergence on rotated images and of the divergence of similarities"""
SHARPNESS, SHARE = 0.5, 0.75
"""temperature of the similarities, and the share kept of the anchors the teacher gets wrong"""
PREPARATION = 60 / 240
"""share of the epochs in which the teacher's projection learns"""


class SelfSupervision(Term):
    """SSKD: 2.7 KL of the classes on three rotations + 10 KL of the softmax over similarities to upright images.

    The teacher's projection (an MLP on its cached penultimate values) learns to find a rotated image's upright one
    during the first quarter of the epochs, at least one, in which the similarities have no weight; then it stays as it
    is. Its authors train it for 60 epochs before their 240. What serves is a copy that follows the trained one: the
    optimizer would go on moving a projection that gets no gradient.
    Source: Xu et al., ECCV 2020 (arXiv 2006.07114); weights and temperatures of its release (facts.md section 4).
    """

    taps = ("penultimate",)
    fields = ("rotations:logits", "rotations:penultimate")
    _preparing: Tensor

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self._temperature = pair.settings.temperature or 4.0
        self.student = _projection(pair.student_shape("penultimate")[0])
        self.apprentice = _projection(pair.teacher_shape("penultimate")[0])
        self.teacher = deepcopy(self.apprentice).requires_grad_(False)
        constant(self, "_preparing", torch.ones(()))

    def weights_at(self, epoch: int, epochs: int) -> tuple[float, float]:
        """Let the teacher's projection learn in the first epochs; factors are 1."""
        self._preparing.fill_(float(epoch < max(1, round(epochs * PREPARATION))))
        return 1.0, 1.0

    def extra(self, lesson: Lesson) -> Float32[Tensor, "extra c h w"]:
        """Return all images turned once, then all turned twice, then three times."""
        return fields.rotated(lesson.pixels)[len(lesson.pixels) :]

    def forward(self, seen: Seen, lesson: Lesson) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        self._follow()
        features = lesson.knowledge["rotations:penultimate"].detach()
        ours = self.student(fields.unrotated(seen["penultimate"]))
        theirs, learning = self.teacher(features), self.apprentice(features)
        rotated = selfsupervision.rotated_divergence(
            fields.unrotated(seen["logits"])[:, 1:],
            lesson.knowledge["rotations:logits"][:, 1:],
            lesson.labels,
            self._temperature,
            share=1.0,
        )
        alike = selfsupervision.rotation_similarity(
            ours[:, 1:], ours[:, 0], theirs[:, 1:], theirs[:, 0], SHARPNESS, SHARE
        )
        found = selfsupervision.rotation_task(learning[:, 1:], learning[:, 0])
        return ROTATED * rotated + (1 - self._preparing) * SIMILARITY * alike + self._preparing * found

    @torch.no_grad()
    def _follow(self) -> None:
        for kept, now in zip(self.teacher.parameters(), self.apprentice.parameters(), strict=True):
            kept.copy_(torch.where(self._preparing > 0, now, kept))


def _projection(size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))
