"""Distributions of a network's filters and pooled activations, and their sparse matching.

Our reading of "Knowledge Representing: Efficient, Sparse Representation of Prior Knowledge for Knowledge Distillation"
(Liu et al., arXiv 1911.05329). Its abstract states: the teacher's parameter distribution is the knowledge; it is
aggregated to a more abstract level; a sparse recoding penalty makes the student learn with penalised gradients. That
the groups are of several layers and the loss a cross-entropy is said by Gou et al.'s survey. No formula of it could be
read: stages as groups, norms, quantiles, softmax and the penalty below are ours (facts.md section 3).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kcdcache.parameters import QUANTILES


def filter_quantiles(weight: Float[Tensor, "filters ..."], count: int = QUANTILES) -> Float[Tensor, " count"]:
    """Return `count` >= 2 quantiles of the filters' L2 norms, ascending from the smallest to the largest, in float32.

    Between two norms a quantile is interpolated linearly. No order of the filters counts, and networks with any numbers
    of filters can be compared; differentiable.
    """
    norms = torch.linalg.vector_norm(weight.float().flatten(1), dim=1).sort().values
    place = torch.linspace(0, len(norms) - 1, count, device=norms.device, dtype=torch.float32)
    below = place.floor().long().clamp_max(max(0, len(norms) - 2))
    above = (below + 1).clamp_max(len(norms) - 1)
    return torch.lerp(norms[below], norms[above], place - below)


def aggregated(layers: Sequence[Float[Tensor, "_ ..."]], count: int = QUANTILES) -> Float[Tensor, " count"]:
    """Return the mean of the layers' filter quantiles: one profile of a group of layers, however many it has."""
    return torch.stack([filter_quantiles(weight, count) for weight in layers]).mean(0)


def soft_threshold(residual: Float[Tensor, "..."], threshold: float) -> Float[Tensor, "..."]:
    """Return sign(r) max(|r| - threshold, 0), the identity for threshold = 0."""
    return residual.sign() * (residual.abs() - threshold).clamp_min(0)


def recoded_divergence(
    student: Float[Tensor, "... bins"], teacher: Float[Tensor, "... bins"], threshold: float = 0.0
) -> Float[Tensor, "..."]:
    """Return sum_k P_T (e^s - 1 - s) with s = soft(log P_S - log P_T, threshold), from log-probabilities; at least 0.

    With threshold = 0 this is KL(P_T || P_S), the cross-entropy less its constant. An entry whose log-ratio is within
    the threshold costs nothing and gets no gradient; the others' gradient by log P_S is P_T (e^s - 1), which is the
    cross-entropy's own residual P_S - P_T for threshold = 0. Hence 0 for equal distributions, and the support of the
    gradient shrinks as the threshold grows.
    """
    teacher = teacher.detach()  # what is known of the teacher is not to be moved
    target = teacher.exp()
    rest = soft_threshold(student - teacher, threshold)
    near = rest.clamp(-1, 1)
    # each form where it is accurate: expm1 loses a large ratio of tiny probabilities, the other cancels near 0
    close, far = target * (torch.expm1(near) - near), (teacher + rest).exp() - target * (1 + rest)
    return torch.where(rest.abs() <= 1, close, far).sum(-1)


def pooled(value: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch channels"]:
    """Return each channel's mean over all places."""
    return value.mean((2, 3))
