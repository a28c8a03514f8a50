"""Attention transfer."""

from jaxtyping import Float32
from torch import Tensor

from kcdcache.losses import maps
from kcdcache.terms.base import Lesson, Pair, Seen, Term


class Attention(Term):
    """AT: sum over stages of the mean squared difference of normalised attention maps.

    Both networks' maps have the smaller of the two sizes; features are pooled before they are squared.
    Source: Zagoruyko & Komodakis, ICLR 2017, Eq. 2 with p = 2; stages and pooling of RepDistiller (facts.md section 4).
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self._places: list[tuple[str, str, tuple[int, int]]] = []
        for ours, theirs in pair.stages():
            (_, h, w), (_, height, width) = pair.student_shape(ours), pair.teacher_shape(theirs)
            side = (min(h, height), min(w, width))
            self._places.append((ours, f"attention:{theirs}:{side[0]}x{side[1]}", side))
        self.taps = tuple(tap for tap, _, _ in self._places)
        self.fields = tuple(name for _, name, _ in self._places)

    def forward(self, seen: Seen, lesson: Lesson) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        rows = len(lesson.labels)
        return sum(  # type: ignore[return-value]
            maps.attention_transfer(maps.attention(seen[tap][:rows], side), lesson.knowledge[name])
            for tap, name, side in self._places
        )
