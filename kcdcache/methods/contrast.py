"""Methods that contrast a sample's embeddings with those of other samples from a memory: CRD and WCoRD."""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from kcdcache.errors import SettingsError
from kcdcache.methods.base import Batch, Outputs, Pair, Term, constant
from kcdcache.methods.losses import cosines
from kcdcache.teacher.fields import length, product, unit

SIZE = 128
"""length of an embedding"""
MOMENTUM = 0.5
"""of the memory's moving average"""
TEMPERATURE, TINY = 0.07, 1e-7
"""CRD's temperature, and the epsilon in its denominators"""
GLOBAL, LOCAL = 0.8, 0.05
"""WCoRD's weights of the dual contrast (GCKT) and of the transport between batches (LCKT)"""
ENTROPY, ITERATIONS = 0.1, 20
"""of WCoRD's Sinkhorn plan: weight of the entropy in units of the cost, and number of iterations"""
DRAWS = 2**62
"""range of raw draws, so large that remainders are uniform"""


class _Contrasting(Term):
    """Embeddings of both networks, the memory of them, and the negatives."""

    taps = ("penultimate",)
    fields = ("penultimate",)
    remembers = True

    def __init__(self, pair: Pair, embedding: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self._negatives = pair.settings.crd_negatives
        self.student = embedding(pair.student_shape("penultimate")[0])
        self.teacher = embedding(pair.teacher_shape("penultimate")[0])
        self.memory = Memory(len(pair.labels))
        self.others = Others(pair)


class Contrast(_Contrasting):
    """CRD: noise-contrastive estimation between both networks' embeddings of a sample and those of other classes.

    Both embeddings are trained; Z is that of the first batch. Both directions have the same negatives. With negatives
    from kept samples only, Z and the noise still count all samples: the count cancels.
    Source: Tian et al., ICLR 2020, Eq. 18-19; K, temperature and momentum of RepDistiller (facts.md section 4).
    """

    _log_z: Tensor
    _started: Tensor

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair, lambda size: nn.Linear(size, SIZE))
        self._total = len(pair.labels)
        self.register_buffer("_log_z", torch.zeros(2))
        self.register_buffer("_started", torch.zeros((), dtype=torch.bool))

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss per sample, and update the memory."""
        ours = unit(self.student(outputs["penultimate"]))
        theirs = unit(self.teacher(batch.knowledge["penultimate"].detach()))
        chosen = torch.cat([batch.index[:, None], self.others.draw(batch.labels, self._negatives)], dim=1)
        student = similarities(ours, self.memory.teacher, chosen) / TEMPERATURE
        teacher = similarities(theirs, self.memory.student, chosen) / TEMPERATURE
        log_z = torch.stack([log_partition(scores, self._total) for scores in (student, teacher)])
        self._log_z.copy_(torch.where(self._started, self._log_z, log_z))
        self._started.fill_(True)
        self.memory.update(batch.index, ours, theirs, normalised=True)
        return sum(  # type: ignore[return-value]
            nce(scores[:, 0], scores[:, 1:], self._total, shift)
            for scores, shift in zip((student, teacher), self._log_z.clone(), strict=True)
        )


def nce(
    positive: Float[Tensor, " batch"], negatives: Float[Tensor, "batch negatives"], count: int, log_z: Float[Tensor, ""]
) -> Float[Tensor, " batch"]:
    """Return -log h(positive) - sum_k log(1 - h(negative_k)), in nats, at least 0, for one direction of CRD.

    h(s) = x / (x + K / N + eps) with x = exp(s) / Z, s a dot product over the temperature, log Z from `log_partition`,
    K negatives, N = `count` and eps = 1e-7; 1 - h is taken as (K / N) / (x + K / N + eps), as released. CRD adds the
    value with the student as anchor and that with the teacher as anchor. Gradient flows into both score tensors.
    Source: Tian et al. 2020 (Contrastive Representation Distillation), Eq. 18.
    """
    noise = negatives.shape[1] / count
    shift = log_z.detach().float() + math.log(noise + TINY)
    missed = functional.softplus(shift - positive.float())
    mistaken = functional.softplus(negatives.float() - shift).sum(dim=1)
    return missed + mistaken + negatives.shape[1] * math.log1p(TINY / noise)


def log_partition(scores: Float[Tensor, "batch candidates"], count: int) -> Float[Tensor, ""]:
    """Return log Z = log(count * mean of exp(scores)), the reference's estimate from its first batch; no gradient.

    `scores` are those of the positive and all negatives over the temperature, `count` the number of training samples.
    Source: Wu et al. 2018 (Instance Discrimination), as in CRD's released memory.
    """
    return torch.logsumexp(scores.detach().float().flatten(), dim=0) + math.log(count) - math.log(scores.numel())


class WassersteinContrast(_Contrasting):
    """WCoRD: 0.8 GCKT + 0.05 LCKT, GCKT = mean_k g(negative_k) - g(positive), of any sign, LCKT `sinkhorn_distance`.

    The critic is g(s, t) = <ball(A s), ball(B t)> / sqrt(2) with A and B of spectral norm 1 (by power iteration, so
    nearly), hence 1-Lipschitz in (s, t), and minus GCKT bounds a Wasserstein distance (Kantorovich-Rubinstein).
    Positives are the batch's pairs, negatives are embeddings of other classes' samples in a memory of each network,
    half of them per direction. LCKT compares the directions of A s and B t.
    Source: Chen et al., CVPR 2021 (arXiv 2012.08674), for the two terms; weights as in facts.md section 4. The form of
    the critic, the mean over negatives (their sum, as CRD has, would let g fall without bound), the Sinkhorn plan's
    constants and the memory's use are our reading.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair, lambda size: spectral_norm(nn.Linear(size, SIZE, bias=False)))

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss per sample, and update the memory."""
        student = self.student(outputs["penultimate"])
        teacher = self.teacher(batch.knowledge["penultimate"].detach())
        ours, theirs = ball(student), ball(teacher)
        chosen = self.others.draw(batch.labels, self._negatives)
        banks = (ours, self.memory.teacher), (theirs, self.memory.student)
        apart = torch.cat([similarities(anchors, bank, chosen) for anchors, bank in banks], dim=1)
        self.memory.update(batch.index, ours, theirs, normalised=False)
        together = (ours * theirs).sum(dim=1)
        dual = (apart.mean(dim=1) - together) / math.sqrt(2)
        return GLOBAL * dual + LOCAL * sinkhorn_distance(student, teacher, ENTROPY, ITERATIONS)


def ball(x: Float[Tensor, "*stack dim"]) -> Float32[Tensor, "*stack dim"]:
    """Return the nearest point of the unit ball along the last axis, which is 1-Lipschitz."""
    return x.float() / length(x).clamp_min(1).unsqueeze(-1)


def sinkhorn_distance(
    student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch dim"], epsilon: float, iterations: int
) -> Float[Tensor, " batch"]:
    """Return b * sum_j P_ij C_ij with C = 1 - cos and P the Sinkhorn plan between the two batches; in [0, 2].

    The mean over rows is the transport cost <P, C> (WCoRD's LCKT). P has marginals 1 / b, exact for rows, approximate
    for columns after `iterations` >= 1; `epsilon` weighs its entropy in units of the cost. P has no gradient, which at
    convergence gives that of the entropy-regularised cost (envelope theorem).
    Source: Chen et al. 2021 (Wasserstein Contrastive Representation Distillation), LCKT; Cuturi 2013.
    """
    cost = 1 - cosines(student, teacher.detach())
    kernel, share = -cost.detach() / epsilon, -math.log(len(cost))
    rows = torch.zeros_like(kernel[:, :1])
    for _ in range(iterations):
        columns = share - torch.logsumexp(kernel + rows, dim=0, keepdim=True)
        rows = share - torch.logsumexp(kernel + columns, dim=1, keepdim=True)
    return len(cost) * ((kernel + rows + columns).exp() * cost).sum(dim=1)


class Memory(nn.Module):
    """Moving averages of both networks' embeddings of every sample."""

    student: Tensor
    teacher: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(SIZE / 3)
        for name in ("student", "teacher"):
            self.register_buffer(name, torch.empty(count, SIZE).uniform_(-bound, bound))

    def update(
        self,
        index: Int64[Tensor, " batch"],
        student: Float[Tensor, "batch size"],
        teacher: Float[Tensor, "batch size"],
        normalised: bool,
    ) -> None:
        """Move the samples' rows halfway to new embeddings, and to length 1 if `normalised`; no gradient."""
        for bank, new in ((self.student, student), (self.teacher, teacher)):
            moved = MOMENTUM * bank[index] + (1 - MOMENTUM) * new.detach()
            bank.index_copy_(0, index, unit(moved) if normalised else moved)


class Others(nn.Module):
    """The samples to draw negatives from, sorted by class, so that drawing other classes needs no loop or search."""

    _order: Tensor
    _first: Tensor
    _count: Tensor

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        members = pair.kept if pair.settings.crd_bank == "kept" else np.arange(len(pair.labels))
        labels = pair.labels[members]
        counts = np.bincount(labels, minlength=pair.classes)
        if (counts == len(members)).any():
            raise SettingsError(
                f"contrast needs negatives of other classes, but all {len(members)} samples are of class "
                f"{int(counts.argmax())}; keep more, or draw from the whole data (crd_bank = 'whole')"
            )
        constant(self, "_order", torch.from_numpy(members[np.argsort(labels, kind="stable")]))
        constant(self, "_first", torch.from_numpy(np.cumsum(counts) - counts))
        constant(self, "_count", torch.from_numpy(counts))

    def draw(self, labels: Int[Tensor, " batch"], number: int) -> Int64[Tensor, "batch number"]:
        """Return samples of other classes than each label, drawn uniformly with replacement."""
        raw = torch.randint(DRAWS, (len(labels), number), device=labels.device)
        rest = len(self._order) - self._count[labels.long()]
        return self.ranked(raw % rest[:, None], labels)

    def ranked(
        self, rank: Int64[Tensor, "batch number"], labels: Int[Tensor, " batch"]
    ) -> Int64[Tensor, "batch number"]:
        """Return the samples at some ranks of the order without the own class."""
        own = labels.long()[:, None]
        return self._order[torch.where(rank < self._first[own], rank, rank + self._count[own])]


def similarities(
    anchors: Float[Tensor, "batch size"], bank: Float[Tensor, "count size"], index: Int64[Tensor, "batch number"]
) -> Float32[Tensor, "batch number"]:
    """Return each anchor's dot products with its chosen rows of the bank.

    Computes all products and reads some, as gathering the rows would move many more bytes. The bank is copied, as it is
    updated before the gradient is taken.
    """
    return product(anchors, bank.clone().mT).gather(1, index)
