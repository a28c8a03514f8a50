"""The divergence weighed by what both networks are unsure of (EA-KD); one value per sample."""

import math

from jaxtyping import Float
from torch import Tensor

from kcdcache.losses.softmax import entropy, logit_divergence


def entropy_weights(
    student: Float[Tensor, "batch classes"], teacher: Float[Tensor, "batch classes"], temperature: float
) -> Float[Tensor, " batch"]:
    """Return (H_T + H_T H_S / ln C) / 2, H the entropy in nats of the softmax at `temperature`; in [0, ln C].

    0 where the teacher is sure, ln C where both networks are undecided among all C >= 2 classes. No gradient.

    Source: Su et al. 2025 (EA-KD). H_ub = ln C is what its ImageNet code has; its CIFAR-100 code divides by 100, not by
    ln 100, so that the student hardly counts there.
    """
    ours, theirs = (entropy(logits.detach().float() / temperature) for logits in (student, teacher))
    return theirs * (1 + ours / math.log(student.shape[1])) / 2


def entropy_weighted(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    temperature: float,
    weight_temperature: float,
) -> Float[Tensor, " batch"]:
    """Return w T^2 KL(softmax(teacher / T) || softmax(student / T)), w the `entropy_weights`; nats squared, at least 0.

    Source: Su et al. 2025 (EA-KD).
    """
    weights = entropy_weights(student, teacher, weight_temperature)
    return weights * logit_divergence(student, teacher, temperature)
