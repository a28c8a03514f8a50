"""Wasserstein contrast (WCoRD): a critic between joint and mismatched pairs, and transport between two batches."""

import math

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from kcdcache.losses import contrast
from kcdcache.losses.vectors import length
from kcdcache.terms.base import Lesson, Pair, Seen, Term
from kcdcache.terms.contrast import SIZE, Memory, Others, similarities

GLOBAL, LOCAL = 0.8, 0.05
"""weights of the dual contrast (GCKT) and of the transport between batches (LCKT)"""
ENTROPY, ITERATIONS = 0.1, 20
"""of the Sinkhorn plan: weight of its entropy in units of the cost, and how often it is balanced"""


def ball(x: Float[Tensor, "*stack dim"]) -> Float32[Tensor, "*stack dim"]:
    """Return the nearest point of the unit ball, along the last axis; this never takes two points further apart."""
    return x.float() / length(x).clamp_min(1).unsqueeze(-1)


class WassersteinContrast(Term):
    """WCoRD: 0.8 GCKT + 0.05 LCKT.

    The critic is g(s, t) = <ball(A s), ball(B t)> / sqrt(2) with A and B of spectral norm 1 (by power iteration, so
    nearly), hence 1-Lipschitz in (s, t). Positives are the batch's pairs, negatives are embeddings of other classes'
    samples in a memory of each network, half of them per direction. LCKT compares the directions of A s and B t.
    Source: Chen et al., CVPR 2021 (arXiv 2012.08674), for the two terms; weights as in facts.md section 4. The form of
    the critic, the Sinkhorn plan's constants and the memory's use are our reading.
    """

    taps = ("penultimate",)
    fields = ("penultimate",)
    remembers = True

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self._negatives = pair.settings.crd_negatives
        self.student = spectral_norm(nn.Linear(pair.student_shape("penultimate")[0], SIZE, bias=False))
        self.teacher = spectral_norm(nn.Linear(pair.teacher_shape("penultimate")[0], SIZE, bias=False))
        self.memory = Memory(len(pair.labels))
        self.others = Others(pair)

    def forward(self, seen: Seen, lesson: Lesson) -> Float32[Tensor, " batch"]:
        """Return the loss per sample, and move the memory on."""
        student = self.student(seen["penultimate"][: len(lesson.labels)])
        teacher = self.teacher(lesson.knowledge["penultimate"].detach())
        ours, theirs = ball(student), ball(teacher)
        chosen = self.others.draw(lesson.labels, self._negatives)
        memory = self.memory
        apart = torch.cat(
            [similarities(ours, memory.teacher, chosen), similarities(theirs, memory.student, chosen)], dim=1
        )
        memory.update(lesson.index, ours, theirs)
        together = (ours * theirs).sum(dim=1)
        dual = contrast.dual_contrast(together, apart) / math.sqrt(2)
        return GLOBAL * dual + LOCAL * contrast.sinkhorn_distance(student, teacher, ENTROPY, ITERATIONS)
