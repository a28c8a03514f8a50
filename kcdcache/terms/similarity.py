"""Similarities between the samples of a batch, of whole feature maps."""

from jaxtyping import Float32
from torch import Tensor

from kcdcache.losses import relations
from kcdcache.terms.base import Lesson, Pair, Seen, Term


class Similarity(Term):
    """SP: ||G_S - G_T||_F^2 / b^2, G = Q Q^T with rows of length 1, Q the last stage's map, flattened; b the batch.

    The two maps may differ in shape.
    Source: Tung & Mori, ICCV 2019 (arXiv 1907.09682); the layer is that of RepDistiller.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        ours, theirs = pair.stages()[-1]
        self.taps, self.fields = (ours,), (f"maps:{theirs}",)

    def forward(self, seen: Seen, lesson: Lesson) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        own = seen[self.taps[0]][: len(lesson.labels)]
        return relations.similarity_preserving(own, lesson.knowledge[self.fields[0]])
