"""Boundary supporting samples (BSS): softened outputs also on images beside the teacher's decision boundary."""

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from kcdcache.methods.base import Batch, Outputs, Pair, Term, constant
from kcdcache.methods.losses import logit_divergence

MOST_ATTACKED = 64
"""base samples of a batch, at most"""


class BoundarySupport(Term):
    """BSS: (3 (1 - e/E) + 1) KL on the images + 2 (1 - 4e/3E)+ KL on their boundary images, in epoch e = 1 .. E.

    Boundary images count for the base samples: those both networks get right, at most 64, with the largest difference
    of probabilities. Both divergences are without T^2, as released. The boundary images pass the student together with
    the batch, also where their weight is 0, so batch statistics are those of both; the release shows it the base
    samples' alone, in a second pass.
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

    def extra(self, batch: Batch) -> Float32[Tensor, "extra c h w"]:
        """Return each image's boundary image."""
        return batch.knowledge["boundary:images"]

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        count, temperature, teacher = len(batch.labels), self._temperature, batch.knowledge["logits"]
        plain, beside = outputs["logits"][:count], outputs["logits"][count:]
        base = base_weights(plain.float().softmax(1), teacher.softmax(1), batch.labels)
        softened = logit_divergence(plain, teacher, temperature) / (temperature * temperature)
        attacked = boundary_divergence(beside, batch.knowledge["boundary:logits"], base, temperature)
        return self._plain * softened + self._beside * attacked


def base_weights(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    most: int = MOST_ATTACKED,
) -> Float[Tensor, " batch"]:
    """Return 1 for the samples to attack, 0 for the others; the arguments are class probabilities. No gradient.

    Eligible are samples both networks classify correctly, as in the release (its first commit asks the teacher alone);
    of those the `most` with the largest squared difference of probabilities over the classes other than the label, ties
    by position. Shapes do not depend on the values.
    """
    found, wanted = student.detach().float(), teacher.detach().float()
    correct = (found.argmax(dim=1) == labels) & (wanted.argmax(dim=1) == labels)
    squared = (found - wanted).square().scatter(1, labels.unsqueeze(1), 0)
    score = torch.where(correct, squared.sum(dim=1), -1)
    order = torch.argsort(score, descending=True, stable=True)
    return (correct & (torch.argsort(order) < most)).float()


def boundary_divergence(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    weights: Float[Tensor, " batch"] | Bool[Tensor, " batch"],
    temperature: float,
) -> Float[Tensor, " batch"]:
    """Return KL(teacher || student) at T of the logits on the attacked images, times weights / their mean; no T^2.

    With the 0/1 weights of `base_weights` the mean over the batch is the mean over the base samples; all zero where no
    weight is positive. Weights are not negative. It differs from the released soft cross-entropy by the teacher's
    entropy only.
    """
    share = weights.detach().float()
    mean = share.mean()
    rows = logit_divergence(student, teacher, temperature) / (temperature * temperature)
    return rows * share / torch.where(mean > 0, mean, 1)
