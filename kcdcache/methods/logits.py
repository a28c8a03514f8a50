"""Methods that reweigh softened outputs: DKD (target and other classes apart) and EA-KD (by entropy)."""

import math

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor
from torch.nn import functional

from kcdcache.methods.base import Batch, Outputs, Pair, Term
from kcdcache.methods.losses import entropy, logit_divergence

TARGET, REST = 1.0, 8.0
"""DKD's weights of the target's and the other classes' divergence"""
WARM_UP = 20
"""epochs until DKD has its full weight"""
WEIGHT_TEMPERATURE = 3.0
"""temperature of the entropies in EA-KD's weights"""


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
        """Return 1, and this term's warm-up factor."""
        return 1.0, min(1.0, (epoch + 1) / WARM_UP)

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        teacher = batch.knowledge["logits"]
        return decoupled(outputs["logits"], teacher, batch.labels, TARGET, REST, self._temperature)


def decoupled(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    alpha: float,
    beta: float,
    temperature: float,
) -> Float[Tensor, " batch"]:
    """Return T^2 (alpha TCKD + beta NCKD) of finite logits of at least 2 classes, per sample, in nats, at least 0.

    TCKD = KL of (p_y, 1 - p_y), NCKD = KL of softmax over the classes other than y, teacher to student, at T. With
    alpha = 1 and beta = 1 - p_y of the teacher this is T^2 KL(teacher || student).
    """
    binary, others = _split(student.float() / temperature, labels)
    wanted_binary, wanted_others = _split(teacher.detach().float() / temperature, labels)
    target, rest = _divergence(wanted_binary, binary), _divergence(wanted_others, others)
    return (alpha * target + beta * rest) * (temperature * temperature)


def _split(scaled: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of (label, not label), and of the other classes among themselves."""
    log_p = functional.log_softmax(scaled, dim=1)
    label = labels.unsqueeze(1)
    # other classes by index, as a mask of -inf would give 0 * inf in the divergence
    columns = torch.arange(log_p.shape[1] - 1, device=labels.device).expand(len(labels), -1)
    others = log_p.gather(1, columns + (columns >= label))
    binary = torch.cat([log_p.gather(1, label), torch.logsumexp(others, dim=1, keepdim=True)], dim=1)
    return binary, functional.log_softmax(others, dim=1)


def _divergence(log_target: Tensor, log_found: Tensor) -> Tensor:
    return (log_target.exp() * (log_target - log_found)).sum(dim=1)


class Adaptive(Term):
    """EA-KD: w T^2 KL(p_T || p_S), w = (H_T + H_T H_S / ln C) / 2 with both entropies at temperature 3, no gradient.

    Source: Su et al., ICCV 2025 (arXiv 2311.13621); temperatures and weights of its release (cpsu00/EA-KD). Its
    ImageNet code divides by ln 1000 as here; its CIFAR-100 code divides H_T H_S by 100 instead of ln 100, so that the
    student hardly counts there.
    """

    fields = ("logits",)

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self._temperature = pair.settings.temperature or 4.0

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        student, teacher = outputs["logits"], batch.knowledge["logits"]
        weights = entropy_weights(student, teacher, WEIGHT_TEMPERATURE)
        return weights * logit_divergence(student, teacher, self._temperature)


def entropy_weights(
    student: Float[Tensor, "batch classes"], teacher: Float[Tensor, "batch classes"], temperature: float
) -> Float[Tensor, " batch"]:
    """Return (H_T + H_T H_S / ln C) / 2, H the entropy in nats of the softmax at `temperature`; in [0, ln C].

    0 where the teacher is certain, ln C where both networks are uniform over all C >= 2 classes. No gradient.
    """
    ours, theirs = (entropy(logits.detach().float() / temperature) for logits in (student, teacher))
    return theirs * (1 + ours / math.log(student.shape[1])) / 2
