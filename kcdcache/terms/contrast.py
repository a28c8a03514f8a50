"""Contrast of student and teacher over a memory of all samples (CRD); the memory is that of WCoRD too."""

import math

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor, nn

from kcdcache.errors import SettingsError
from kcdcache.losses import contrast
from kcdcache.losses.vectors import product, unit
from kcdcache.terms.base import Lesson, Pair, Seen, Term, constant

SIZE = 128
"""length of an embedding"""
TEMPERATURE = 0.07
MOMENTUM = 0.5
DRAWS = 2**62
"""range of the raw draws, so large that the remainder by a number of samples is uniform"""


class Others(nn.Module):
    """The samples that can be negatives, sorted by class, to draw those of another class without a loop or a search."""

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
        """Return samples of other classes than each label, uniform and with replacement."""
        raw = torch.randint(DRAWS, (len(labels), number), device=labels.device)
        rest = len(self._order) - self._count[labels.long()]
        return self.ranked(raw % rest[:, None], labels)

    def ranked(
        self, rank: Int64[Tensor, "batch number"], labels: Int[Tensor, " batch"]
    ) -> Int64[Tensor, "batch number"]:
        """Return the samples at ranks in [0, number of other classes' samples) of the order without the own class."""
        own = labels.long()[:, None]
        return self._order[torch.where(rank < self._first[own], rank, rank + self._count[own])]


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
    ) -> None:
        """Move the samples' rows halfway to new embeddings; no gradient."""
        for bank, new in ((self.student, student), (self.teacher, teacher)):
            bank.index_copy_(0, index, MOMENTUM * bank[index] + (1 - MOMENTUM) * new.detach())

    def normalise(self, index: Int64[Tensor, " batch"]) -> None:
        """Give the samples' rows length 1."""
        for bank in (self.student, self.teacher):
            bank.index_copy_(0, index, unit(bank[index]))


def similarities(
    anchors: Float[Tensor, "batch size"], bank: Float[Tensor, "count size"], index: Int64[Tensor, "batch number"]
) -> Float32[Tensor, "batch number"]:
    """Return each anchor's dot products with its own choice of the bank's rows.

    All products are made and some read: gathering the rows instead would move number / 8 times as many bytes at the
    defaults, and its gradient twice. The bank is copied, as it moves on before the gradient is taken.
    """
    return product(anchors, bank.clone().mT).gather(1, index)


class Contrast(Term):
    """CRD: noise-contrastive estimation between both networks' embeddings of a sample and those of other classes.

    Both embeddings are trained, the teacher's too; Z is that of the first batch. The negatives of both directions are
    the same. With the memory of only kept samples, Z and the noise still count all samples: the count cancels in them.
    Source: Tian et al., ICLR 2020, Eq. 18-19; K, temperature and momentum of RepDistiller (facts.md section 4).
    """

    taps = ("penultimate",)
    fields = ("penultimate",)
    remembers = True
    _log_z: Tensor
    _started: Tensor

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self._negatives, self._total = pair.settings.crd_negatives, len(pair.labels)
        self.student = nn.Linear(pair.student_shape("penultimate")[0], SIZE)
        self.teacher = nn.Linear(pair.teacher_shape("penultimate")[0], SIZE)
        self.memory = Memory(self._total)
        self.others = Others(pair)
        self.register_buffer("_log_z", torch.zeros(2))
        self.register_buffer("_started", torch.zeros((), dtype=torch.bool))

    def forward(self, seen: Seen, lesson: Lesson) -> Float32[Tensor, " batch"]:
        """Return the loss per sample, and move the memory on."""
        ours = unit(self.student(seen["penultimate"][: len(lesson.labels)]))
        theirs = unit(self.teacher(lesson.knowledge["penultimate"].detach()))
        chosen = torch.cat([lesson.index[:, None], self.others.draw(lesson.labels, self._negatives)], dim=1)
        student = similarities(ours, self.memory.teacher, chosen) / TEMPERATURE
        teacher = similarities(theirs, self.memory.student, chosen) / TEMPERATURE
        log_z = torch.stack([contrast.log_partition(scores, self._total) for scores in (student, teacher)])
        self._log_z.copy_(torch.where(self._started, self._log_z, log_z))
        self._started.fill_(True)
        self.memory.update(lesson.index, ours, theirs)
        self.memory.normalise(lesson.index)
        return sum(  # type: ignore[return-value]
            contrast.nce(scores[:, 0], scores[:, 1:], self._total, shift)
            for scores, shift in zip((student, teacher), self._log_z.clone(), strict=True)
        )
