"""The flow of solution procedure: how one stage's channels go with the next one's."""

from itertools import pairwise

from jaxtyping import Float32
from torch import Tensor

from kcdcache.errors import SettingsError
from kcdcache.losses import maps
from kcdcache.terms.base import Lesson, Pair, Seen, Term

SHARE = 8
"""one in so many epochs, the first ones, is taught by the flow alone: 30 of 240"""


class Flow(Term):
    """FSP: sum over consecutive stages of the mean over entries of (G_S - G_T)^2, G = F_i F_{i+1}^T / (h w).

    In two phases: the first eighth of the epochs (rounded down, but one where there are two or more) teaches by this
    term alone, the rest without it. The stem is the first stage where both networks have as many stages. Both need the
    same numbers of channels; heights and widths may differ.
    Source: Yim et al., CVPR 2017 (A Gift from Knowledge Distillation), Sec. 3; layers, mean over entries, thirty epochs
    and their weight 1 of RepDistiller, which adds them to the 240; the 50 of its script weighs nothing there, and made
    a wide network diverge here.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        stages = pair.stages()
        if stages[0] == ("stage1", "stage1"):
            stages = [("stage0", "stage0"), *stages]
        for ours, theirs in stages:
            _require_equal_channels(pair, ours, theirs)
        self._places = [(bottom, top, f"fsp:{below}:{above}") for (bottom, below), (top, above) in pairwise(stages)]
        self.taps = tuple(tap for tap, _ in stages)
        self.fields = tuple(name for _, _, name in self._places)

    def weights_at(self, epoch: int, epochs: int) -> tuple[float, float]:
        """Return (0, 1) in the first phase, (1, 0) in the second."""
        first = min(max(1, epochs // SHARE), epochs - 1)
        return (0.0, 1.0) if epoch < first else (1.0, 0.0)

    def forward(self, seen: Seen, lesson: Lesson) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        own = {tap: seen[tap][: len(lesson.labels)] for tap in self.taps}
        return sum(  # type: ignore[return-value]
            maps.fsp(maps.fsp_matrix(own[bottom], own[top]), lesson.knowledge[name])
            for bottom, top, name in self._places
        )


def _require_equal_channels(pair: Pair, ours: str, theirs: str) -> None:
    found, wanted = pair.student_shape(ours), pair.teacher_shape(theirs)
    if found[0] != wanted[0]:
        raise SettingsError(
            f"fsp needs equal numbers of channels: '{theirs}' of the teacher '{pair.teacher}' has shape {wanted}, "
            f"'{ours}' of the student '{pair.student}' has {found}; take a student as wide, or another method"
        )
