"""The decoupled loss (DKD): divergence of target against the rest, and among the rest; one value per sample."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def decoupled(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    alpha: float,
    beta: float,
    temperature: float,
) -> Float[Tensor, " batch"]:
    """Return T^2 (alpha TCKD + beta NCKD) of finite logits of at least 2 classes, per sample, in nats, at least 0.

    TCKD = KL of (p_y, 1 - p_y), NCKD = KL of softmax over the classes other than y, teacher against student, at T. With
    alpha = 1 and beta = 1 - p_y of the teacher it is T^2 KL(teacher || student).

    Source: Zhao et al. 2022 (Decoupled Knowledge Distillation).
    """
    binary, others = _split(student.float() / temperature, labels)
    wanted_binary, wanted_others = _split(teacher.detach().float() / temperature, labels)
    target, rest = _divergence(wanted_binary, binary), _divergence(wanted_others, others)
    return (alpha * target + beta * rest) * (temperature * temperature)


def _split(scaled: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities (label, not label) and those among the other classes alone.

    The label's column is left out by indices, as a mask of -inf would leave 0 * inf in the divergence.
    """
    log_p = functional.log_softmax(scaled, dim=1)
    label = labels.unsqueeze(1)
    columns = torch.arange(log_p.shape[1] - 1, device=labels.device).expand(len(labels), -1)
    others = log_p.gather(1, columns + (columns >= label))
    binary = torch.cat([log_p.gather(1, label), torch.logsumexp(others, dim=1, keepdim=True)], dim=1)
    return binary, functional.log_softmax(others, dim=1)


def _divergence(log_target: Tensor, log_found: Tensor) -> Tensor:
    return (log_target.exp() * (log_target - log_found)).sum(dim=1)
