"""Contrastive losses: noise-contrastive estimation (CRD), optimal transport and its dual form (WCoRD); per sample."""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from kcdcache.losses.vectors import cosines

TINY = 1e-7
"""what CRD adds to its denominators"""


def log_partition(scores: Float[Tensor, "batch candidates"], count: int) -> Float[Tensor, ""]:
    """Return log Z = log(count * mean of exp(scores)), the reference's estimate from its first batch; no gradient.

    `scores` are those of the positive and all negatives, already divided by the temperature; `count` is the number of
    training samples. In logarithms, as exp(score) leaves float32 at 89.

    Source: Wu et al. 2018 (Instance Discrimination), as in CRD's released memory.
    """
    return torch.logsumexp(scores.detach().float().flatten(), dim=0) + math.log(count) - math.log(scores.numel())


def nce(
    positive: Float[Tensor, " batch"],
    negatives: Float[Tensor, "batch negatives"],
    count: int,
    log_z: Float[Tensor, ""],
) -> Float[Tensor, " batch"]:
    """Return -log h(positive) - sum_k log(1 - h(negative_k)), in nats, at least 0, for one direction of CRD.

    h(s) = x / (x + K / N + eps) with x = exp(s) / Z, s a dot product over the temperature, log Z from `log_partition`,
    K negatives, N = `count` and eps = 1e-7; 1 - h is taken as (K / N) / (x + K / N + eps), as released. CRD adds the
    value with the student as anchor and that with the teacher as anchor. Gradient flows into both score tensors,
    since CRD trains the teacher's embedding too.

    Source: Tian et al. 2020 (Contrastive Representation Distillation), Eq. 18.
    """
    noise = negatives.shape[1] / count
    shift = log_z.detach().float() + math.log(noise + TINY)
    missed = functional.softplus(shift - positive.float())
    mistaken = functional.softplus(negatives.float() - shift).sum(dim=1)
    return missed + mistaken + negatives.shape[1] * math.log1p(TINY / noise)


def sinkhorn_distance(
    student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch dim"], epsilon: float, iterations: int
) -> Float[Tensor, " batch"]:
    """Return b * sum_j P_ij C_ij with C = 1 - cos and P the Sinkhorn plan between the two batches; in [0, 2].

    The mean over rows is the transport cost <P, C> (WCoRD's LCKT). P has marginals 1 / b, rows exact and columns as far
    as `iterations` (at least 1) bring them; `epsilon` weighs its entropy, in units of the cost. P is a constant to the
    gradient, which at convergence is that of the entropy-regularised cost (envelope theorem).

    Source: Chen et al. 2021 (Wasserstein Contrastive Representation Distillation), LCKT; Cuturi 2013.
    """
    cost = 1 - cosines(student, teacher.detach())
    return student.shape[0] * (_plan(cost.detach(), epsilon, iterations) * cost).sum(dim=1)


def dual_contrast(
    positive: Float[Tensor, " batch"], negatives: Float[Tensor, "batch negatives"]
) -> Float[Tensor, " batch"]:
    """Return mean_k g(negative_k) - g(positive), to be minimised over student and critic g; any sign.

    Minus its mean is the Kantorovich-Rubinstein bound on the Wasserstein distance between matching and mismatched
    pairs, if g is 1-Lipschitz, which is the critic's duty. Our reading, as the paper's equation was not at hand: the
    negatives enter by their mean. A factor on them, as in CRD's sum over negatives, would let g fall by a constant
    everywhere without bound.

    Source: Chen et al. 2021 (Wasserstein Contrastive Representation Distillation), GCKT.
    """
    return negatives.float().mean(dim=1) - positive.float()


def _plan(cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    kernel, share = -cost / epsilon, -math.log(cost.shape[0])
    rows = torch.zeros_like(kernel[:, :1])
    for _ in range(iterations):
        columns = share - torch.logsumexp(kernel + rows, dim=0, keepdim=True)
        rows = share - torch.logsumexp(kernel + columns, dim=1, keepdim=True)
    return (kernel + rows + columns).exp()
