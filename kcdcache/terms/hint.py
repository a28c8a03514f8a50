"""Hints: the student regresses one of the teacher's feature maps."""

from jaxtyping import Float32
from torch import Tensor, nn

from kcdcache.errors import SettingsError
from kcdcache.losses import maps
from kcdcache.terms.base import Lesson, Pair, Seen, Term

STAGE = 2
"""the stage of the hint, counted from 1 over the matched stages; the stem is none of them"""


class Hint(Term):
    """FitNet: mean over entries of (r(F_S) - F_T)^2 at the second stage, r = ReLU(BN(conv)) to the teacher's shape.

    The hint counts from the first step on, beside the hard label, instead of in a stage of its own before.
    Source: Romero et al., ICLR 2015 (arXiv 1412.6550), Eq. 3; regressor, stage and joint training of RepDistiller.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        ours, theirs = pair.stages()[STAGE - 1]
        self.taps, self.fields = (ours,), (f"maps:{theirs}",)
        shapes = pair.student_shape(ours), pair.teacher_shape(theirs)
        self.regressor = nn.Sequential(_to_shape(*shapes), nn.BatchNorm2d(shapes[1][0]), nn.ReLU())

    def forward(self, seen: Seen, lesson: Lesson) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        own = seen[self.taps[0]][: len(lesson.labels)]
        return maps.hint(self.regressor(own), lesson.knowledge[self.fields[0]])


def _to_shape(ours: tuple[int, ...], theirs: tuple[int, ...]) -> nn.Module:
    """Return the convolution from one shape of map to the other: halving, doubling, or valid with a kernel that fits.

    Raises:
        SettingsError: the teacher's map is larger and not twice the student's.
    """
    (channels, *sides), (wanted, *target) = ours, theirs
    if sides == [2 * side for side in target]:
        return nn.Conv2d(channels, wanted, 3, stride=2, padding=1)
    if [2 * side for side in sides] == target:
        return nn.ConvTranspose2d(channels, wanted, 4, stride=2, padding=1)
    kernel = [1 + side - other for side, other in zip(sides, target, strict=True)]
    if min(kernel) < 1:
        raise SettingsError(
            f"fitnet: the student's map of shape {ours} should be no smaller than the teacher's of shape {theirs}, "
            "or half its size; take a student with larger maps, or a method that pools them (at, vid, reviewkd)"
        )
    return nn.Conv2d(channels, wanted, (kernel[0], kernel[1]))
