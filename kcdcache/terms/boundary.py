"""Boundary supporting samples: the teacher beside its own decision boundary."""

import torch
from jaxtyping import Float32
from torch import Tensor

from kcdcache.losses import boundary
from kcdcache.losses.softmax import logit_divergence
from kcdcache.terms.base import Lesson, Pair, Seen, Term, constant


class BoundarySupport(Term):
    """BSS: (3 (1 - e/E) + 1) KL on the images + 2 (1 - 4e/3E)+ KL on their boundary images, in epoch e = 1 .. E.

    Boundary images count for the base samples: those both networks get right, at most 64, with the largest difference
    of probabilities. Both divergences are without T^2, as released. The boundary images pass the student together with
    the batch, also where their weight is 0, so batch statistics are those of both.
    Source: Heo et al., AAAI 2019 (arXiv 1805.05532), Eq. 7-9; factors of its release (facts.md section 4).
    """

    fields = ("logits", "boundary:images", "boundary:logits")
    _plain: Tensor
    _beside: Tensor

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self._temperature = pair.settings.temperature or 3.0
        constant(self, "_plain", torch.ones(()))
        constant(self, "_beside", torch.ones(()))

    def weights_at(self, epoch: int, epochs: int) -> tuple[float, float]:
        """Put the epoch's weights of both divergences in force; factors are 1."""
        share = (epoch + 1) / epochs
        self._plain.fill_(3 * (1 - share) + 1)
        self._beside.fill_(2 * max(1 - 4 / 3 * share, 0))
        return 1.0, 1.0

    def extra(self, lesson: Lesson) -> Float32[Tensor, "extra c h w"]:
        """Return each image's boundary image."""
        return lesson.knowledge["boundary:images"]

    def forward(self, seen: Seen, lesson: Lesson) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        count, temperature = len(lesson.labels), self._temperature
        plain, beside = seen["logits"][:count], seen["logits"][count:]
        teacher = lesson.knowledge["logits"]
        base = boundary.base_weights(plain.float().softmax(1), teacher.softmax(1), lesson.labels)
        softened = logit_divergence(plain, teacher, temperature) / (temperature * temperature)
        attacked = boundary.boundary_divergence(beside, lesson.knowledge["boundary:logits"], base, temperature)
        return self._plain * softened + self._beside * attacked
