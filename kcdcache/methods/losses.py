"""Losses on class probabilities: entropy, hard cross-entropy, soft divergence; one value per sample."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from kcdcache.teacher.fields import product, unit


def entropy(logits: Float[Tensor, "batch classes"]) -> Float[Tensor, " batch"]:
    """Return the entropy of softmax(logits) in nats, in [0, ln C] for all finite logits.

    H = logsumexp(z) - sum_c softmax(z)_c z_c, which stays finite where p log p would not.
    Source: Knowledge Condensation Distillation, Eq. 7; facts.md 1.5.
    """
    z = logits.float()
    z = (z - z.amax(dim=1, keepdim=True)).clamp_min(torch.finfo(torch.float32).min)  # 0 * -inf would be NaN
    found = torch.logsumexp(z, dim=1) - (torch.softmax(z, dim=1) * z).sum(dim=1)
    return found.clamp(0, math.log(z.shape[1]))  # rounding exceeds either end by an ulp


def cross_entropy(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], smoothing: float = 0.0
) -> Float[Tensor, " batch"]:
    """Return the cross-entropy per sample in nats; `smoothing` is the share of the label spread over all classes."""
    return functional.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)


def soft_divergence(
    logits: Float[Tensor, "batch classes"], target: Float[Tensor, "batch classes"], temperature: float
) -> Float[Tensor, " batch"]:
    """Return T^2 KL(target || softmax(logits / T)) per sample, in nats; target rows are probabilities at T.

    The factor T^2 keeps gradients of the same size at every temperature.
    Source: Hinton et al. 2015; differs from Eq. 1 by the target's entropy.
    """
    log_student = functional.log_softmax(logits.float() / temperature, dim=1)
    return functional.kl_div(log_student, target, reduction="none").sum(dim=1) * (temperature * temperature)


def logit_divergence(
    logits: Float[Tensor, "batch classes"], teacher: Float[Tensor, "batch classes"], temperature: float
) -> Float[Tensor, " batch"]:
    """Return T^2 KL(softmax(teacher / T) || softmax(logits / T)) per sample, in nats; no gradient into the teacher."""
    target = torch.softmax(teacher.detach().float() / temperature, dim=1)
    return soft_divergence(logits, target, temperature)


def cosines(left: Float[Tensor, "m dim"], right: Float[Tensor, "n dim"]) -> Float[Tensor, "m n"]:
    """Return cosines of rows of `left` and `right`, in [-1, 1] up to rounding; 0 for rows of zeros."""
    return product(unit(left), unit(right).mT)
