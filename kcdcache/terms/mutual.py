"""Deep mutual learning: a second network that learns beside the student."""

import torch
from jaxtyping import Float32
from torch import Tensor

from kcdcache.losses.mutual import mutual
from kcdcache.models import spec
from kcdcache.terms.base import Lesson, Pair, Seen, Term, hard_term


class MutualLearning(Term):
    """DML: KL(peer || student) + CE(peer) + KL(student || peer), each divergence's target a constant; T = 1.

    The peer sees the student's very input, learns with its optimizer and takes its step at the same time; its
    labels are the student's, smoothed and mixed as those are. It computes in float32.
    Source: Zhang et al., CVPR 2018 (arXiv 1706.00384), Eq. 5-6.
    """

    taps = ("input",)

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        name = pair.settings.peer or pair.student
        peer = spec.build(name, pair.classes, drawn_seed(), channels=pair.image[0])
        self._labels = pair.settings.mix_label, pair.smoothing
        self.peer = peer.to(memory_format=torch.channels_last)

    def forward(self, seen: Seen, lesson: Lesson) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        count = len(lesson.labels)
        student, peer = seen["logits"][:count], self.peer(seen["input"][:count])
        return mutual(student, peer) + hard_term(peer, lesson, *self._labels) + mutual(peer, student)


def drawn_seed() -> int:
    """Return a seed from torch's generator, which stands at the method's own place while a term is made."""
    return int(torch.randint(2**62, ()))
