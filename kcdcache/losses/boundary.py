"""Losses on samples that support the teacher's decision boundary (BSS); one value per sample."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcdcache.losses.softmax import logit_divergence


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

    Source: Heo et al. 2019 (Adversarial Samples Supporting Decision Boundary); T = 3.
    """
    share = weights.detach().float()
    mean = share.mean()
    rows = logit_divergence(student, teacher, temperature) / (temperature * temperature)
    return rows * share / torch.where(mean > 0, mean, 1)


def base_weights(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    most: int = 64,
) -> Float[Tensor, " batch"]:
    """Return 1 for the samples to attack, 0 for the others; the arguments are class probabilities. No gradient.

    Eligible are samples both networks classify correctly; of those the `most` with the largest squared difference of
    probabilities over the classes other than the label, ties by position. Shapes do not depend on the values.
    The released code asks correctness of the teacher alone.

    Source: Heo et al. 2019 (Adversarial Samples Supporting Decision Boundary), base sample selection.
    """
    found, wanted = student.detach().float(), teacher.detach().float()
    correct = (found.argmax(dim=1) == labels) & (wanted.argmax(dim=1) == labels)
    squared = (found - wanted).square().scatter(1, labels.unsqueeze(1), 0)
    score = torch.where(correct, squared.sum(dim=1), -1)
    order = torch.argsort(score, descending=True, stable=True)
    return (correct & (torch.argsort(order) < most)).float()
