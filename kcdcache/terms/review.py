"""Knowledge review: the student's deep features, fused with its shallow ones, answer for the teacher's."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn import functional

from kcdcache.losses import maps
from kcdcache.terms.base import Lesson, Pair, Seen, Term

WIDTH = 512
"""most channels that are fused"""
WARM_UP = 20
"""epochs until the term has its full weight"""


class _Level(NamedTuple):
    """One level of the review: where both networks' values come from and their shapes as maps."""

    tap: str
    field: str
    ours: tuple[int, ...]
    theirs: tuple[int, ...]


class Fusion(nn.Module):
    """ABF: a level's features at common width, weighed position by position against what comes from above.

    f = a_1 conv(F) + a_2 up(above), a = sigmoid(conv([conv(F), up(above)])); without a level above f = conv(F).
    """

    def __init__(self, channels: int, width: int, wanted: tuple[int, ...], fuse: bool) -> None:
        super().__init__()
        self._side = wanted[1:]
        self.narrow = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.attend = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if fuse else None
        self.answer = nn.Sequential(nn.Conv2d(width, wanted[0], 3, padding=1, bias=False), nn.BatchNorm2d(wanted[0]))
        for block in (self.narrow, self.answer):
            nn.init.kaiming_uniform_(block[0].weight, a=1)  # type: ignore[arg-type]

    def forward(
        self, features: Float[Tensor, "batch channels h w"], above: Float[Tensor, "batch width h2 w2"] | None
    ) -> tuple[Float[Tensor, "batch wanted height width2"], Float[Tensor, "batch width height width2"]]:
        """Return what answers for the teacher's map, in its shape, and the fused features for the level below."""
        fused = self.narrow(features)
        if self.attend is not None and above is not None:
            above = functional.interpolate(above, fused.shape[2:])
            shares = self.attend(torch.cat([fused, above], dim=1))
            fused = fused * shares[:, :1] + above * shares[:, 1:]
        if fused.shape[2:] != self._side:
            fused = functional.interpolate(fused, self._side)
        return self.answer(fused), fused


class Review(Term):
    """ReviewKD: sum over levels of HCL(ABF-fused student's features, teacher's map before its last ReLU).

    Levels are all stages and, as a map of one position, the vector before the classifier. Fused features go from each
    level to the one below it, brought to its size by nearest neighbours, at a width of at most 512. The weight grows
    linearly over the first 20 epochs. Its authors' weights for CIFAR-100 are 5 (the default: WRN-40-2 -> WRN-16-2,
    WRN-40-1 and ShuffleV1; ResNet32x4 -> ResNet8x4 and ShuffleV1), 8 (ResNet32x4 -> ShuffleV2), 0.6 (ResNet56 ->
    ResNet20) and 1 (ResNet110 -> ResNet32).
    Source: Chen et al., CVPR 2021 (arXiv 2104.09044); levels, widths, initial weights and warm-up of
    their CIFAR-100 code (dvlab-research/ReviewKD).
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self._levels = _levels(pair)
        width = min(WIDTH, self._levels[0].ours[0])
        self.fusions = nn.ModuleList(
            Fusion(level.ours[0], width, level.theirs, number > 0) for number, level in enumerate(self._levels)
        )
        self.taps = tuple(level.tap for level in self._levels)
        self.fields = tuple(level.field for level in self._levels)

    def weights_at(self, epoch: int, epochs: int) -> tuple[float, float]:
        """Return (1, epoch / 20), the latter at most 1."""
        return 1.0, min(1.0, epoch / WARM_UP)

    def forward(self, seen: Seen, lesson: Lesson) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        losses, fused = [], None
        for level, fusion in zip(self._levels, self.fusions, strict=True):
            # a network's own output may lie otherwise in memory than a store's values, which changes the last bits
            own, target = seen[level.tap][: len(lesson.labels)], lesson.knowledge[level.field].contiguous()
            answer, fused = fusion(own.reshape(-1, *level.ours), fused)
            losses.append(maps.hierarchical_context(answer, target.reshape(-1, *level.theirs)))
        return torch.stack(losses).sum(dim=0)


def _levels(pair: Pair) -> list[_Level]:
    """Return the levels from the classifier down to the first stage."""
    matched = [(ours, f"{theirs}.pre") for ours, theirs in pair.stages()]
    stages = [
        _Level(ours, f"maps:{theirs}", pair.student_shape(ours), pair.teacher_shape(theirs)) for ours, theirs in matched
    ]
    ours, theirs = (shape("penultimate") for shape in (pair.student_shape, pair.teacher_shape))
    last = _Level("penultimate", "penultimate", (*ours, 1, 1), (*theirs, 1, 1))
    return [last, *reversed(stages)]
