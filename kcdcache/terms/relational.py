"""Relations between the samples of a batch, of the vectors before the classifier: RKD and PKT."""

from jaxtyping import Float32
from torch import Tensor

from kcdcache.losses import relations
from kcdcache.terms.base import Lesson, Pair, Seen, Term

DISTANCE, ANGLE = 25.0, 50.0
"""weights of the two parts of RKD"""


class _Penultimate(Term):
    """A term on the penultimate vectors of both networks, which may differ in length."""

    taps = ("penultimate",)
    fields = ("penultimate",)

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        for shape in (pair.student_shape, pair.teacher_shape):
            shape("penultimate")  # or a message says that there is none


class Relational(_Penultimate):
    """RKD: 25 Huber(d_S, d_T) + 50 Huber(cos_S, cos_T), of distances over their mean and of angles within the batch.

    Each is the mean over pairs, or over triples, of samples, on the vectors before the classifier.
    Source: Park et al., CVPR 2019 (arXiv 1904.05068), RKD-D and RKD-A; weights and layer of RepDistiller.
    """

    def forward(self, seen: Seen, lesson: Lesson) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        own, target = seen["penultimate"][: len(lesson.labels)], lesson.knowledge["penultimate"]
        return DISTANCE * relations.distance_wise(own, target) + ANGLE * relations.angle_wise(own, target)


class Probabilistic(_Penultimate):
    """PKT: mean over pairs of P_T log(P_T / P_S), P = (cos + 1) / 2 between the samples of a batch, rows of sum 1.

    On the vectors before the classifier.
    Source: Passalis & Tefas, ECCV 2018 (arXiv 1803.10837), with the cosine kernel; layer of RepDistiller.
    """

    def forward(self, seen: Seen, lesson: Lesson) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        own = seen["penultimate"][: len(lesson.labels)]
        return relations.probabilistic(own, lesson.knowledge["penultimate"])
