"""Variational information between feature maps."""

import math
from itertools import pairwise

import torch
from jaxtyping import Float32
from torch import Tensor, nn
from torch.nn import functional

from kcdcache.losses import maps
from kcdcache.terms.base import Lesson, Pair, Seen, Term

VARIANCE, LEAST_VARIANCE = 5.0, 1e-5
"""each channel's variance at the start, and what `losses.maps.variational` adds to its softplus"""


class Variational(Term):
    """VID: sum over stages of the mean over entries of 1/2 [(mu(F_S) - F_T)^2 / s_c^2 + log s_c^2]; may be negative.

    mu is three 1x1 convolutions without bias, ReLU between them, as wide as the teacher's map; s_c^2, one per channel
    of the teacher, is learned and starts at 5. The larger of the two maps is average-pooled to the other's size.
    Source: Ahn et al., CVPR 2019 (arXiv 1904.05835); modules, stages and pooling of RepDistiller.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self._places: list[tuple[str, str, tuple[int, int]]] = []
        self.means, self.raw_variances = nn.ModuleList(), nn.ParameterList()
        for ours, theirs in pair.stages():
            (channels, h, w), (wanted, height, width) = pair.student_shape(ours), pair.teacher_shape(theirs)
            self._places.append((ours, f"maps:{theirs}", (min(h, height), min(w, width))))
            self.means.append(_mean(channels, wanted))
            start = math.log(math.expm1(VARIANCE - LEAST_VARIANCE))
            self.raw_variances.append(nn.Parameter(torch.full((wanted,), start)))
        self.taps = tuple(tap for tap, _, _ in self._places)
        self.fields = tuple(name for _, name, _ in self._places)

    def forward(self, seen: Seen, lesson: Lesson) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        losses = []
        for (tap, name, side), mean, raw in zip(self._places, self.means, self.raw_variances, strict=True):
            # a network's own output may lie otherwise in memory than a store's values, which changes the last bits
            own, target = seen[tap][: len(lesson.labels)], lesson.knowledge[name].contiguous()
            own, target = (functional.adaptive_avg_pool2d(values, side) for values in (own, target))
            losses.append(maps.variational(mean(own), target, raw))
        return torch.stack(losses).sum(dim=0)


def _mean(channels: int, wanted: int) -> nn.Module:
    widths = (channels, wanted, wanted, wanted)
    first, second, third = (nn.Conv2d(width, following, 1, bias=False) for width, following in pairwise(widths))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
