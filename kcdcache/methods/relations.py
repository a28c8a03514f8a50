"""Methods that compare relations inside a batch: RKD (distances, angles), PKT (neighbours) and SP (similarities).

Each compares a table over all pairs of the batch. A sample's value is its row's share, scaled so that the mean over the
batch is the published loss.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from kcdcache.methods.base import Compared, Pair
from kcdcache.methods.losses import cosines
from kcdcache.teacher.fields import length, product, unit

DISTANCE, ANGLE = 25.0, 50.0
"""weights of the two parts of RKD"""
TINY = 1e-7
"""added by PKT to both probabilities under the logarithm"""


def distance_wise(
    student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch other"]
) -> Float[Tensor, " batch"]:
    """Return row means of Huber(d_S, d_T); d are distances between samples over the mean of the non-zero ones.

    Huber is smooth L1 with its knee at 1; a row includes the distance to itself. Source: RKD-D.
    """
    return functional.smooth_l1_loss(_distances(student), _distances(teacher.detach()), reduction="none").mean(dim=1)


def angle_wise(student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch other"]) -> Float[Tensor, " batch"]:
    """Return, per sample i, the mean over j and k of Huber(cos_S, cos_T) of the angle j-i-k with vertex i.

    An angle with two equal corners has cosine 0. Takes memory for batch^3 numbers. Source: RKD-A.
    """
    found, wanted = _angles(student), _angles(teacher.detach())
    return functional.smooth_l1_loss(found, wanted, reduction="none").mean(dim=(1, 2))


def _differences(features: Tensor) -> Tensor:
    """Return x_j - x_i at [i, j]; taken before squaring, as |a|^2 + |b|^2 - 2ab loses near neighbours to rounding."""
    x = features.float()
    return x.unsqueeze(0) - x.unsqueeze(1)


def _distances(features: Tensor) -> Tensor:
    found = length(_differences(features))
    mean = found.sum() / (found > 0).sum().clamp_min(1)
    return found / torch.where(mean > 0, mean, 1)


def _angles(features: Tensor) -> Tensor:
    directions = unit(_differences(features))
    return product(directions, directions.mT)


def probabilistic(
    student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch other"]
) -> Float[Tensor, " batch"]:
    """Return row means of P_T log((P_T + 1e-7) / (P_S + 1e-7)); P are rows of (cos + 1) / 2 divided by their sums.

    A row is its divergence over the batch size, as released. A row of zeros has cosine 0 with every row, also itself.
    """
    found, wanted = _neighbours(student), _neighbours(teacher.detach())
    return (wanted * ((wanted + TINY) / (found + TINY)).log()).mean(dim=1)


def _neighbours(features: Tensor) -> Tensor:
    x = features.float()
    affinity = ((cosines(x, x) + 1) / 2).clamp_min(0)  # rounding exceeds -1 by an ulp
    return affinity / affinity.sum(dim=1, keepdim=True)


def similarity_preserving(
    student: Float[Tensor, "batch ..."], teacher: Float[Tensor, "batch ..."]
) -> Float[Tensor, " batch"]:
    """Return row sums of (G_S - G_T)^2 divided by the batch, G as in `Similarity`; in [0, 4 / batch]."""
    difference = _similarity(student) - _similarity(teacher.detach())
    return difference.square().mean(dim=1)


def _similarity(features: Tensor) -> Tensor:
    flat = features.float().flatten(1)
    return unit(product(flat, flat.mT))


class _Penultimate(Compared):
    """A term on both networks' vectors before the classifier, which may differ in length."""

    def __init__(self, pair: Pair) -> None:
        super().__init__("penultimate", "penultimate")
        for shape in (pair.student_shape, pair.teacher_shape):
            shape("penultimate")  # raises if there is none


class Relational(_Penultimate):
    """RKD: 25 Huber(d_S, d_T) + 50 Huber(cos_S, cos_T), of distances over their mean and of angles within the batch.

    Each is the mean over pairs, or over triples, of samples.
    Source: Park et al., CVPR 2019 (arXiv 1904.05068), RKD-D and RKD-A; weights and layer of RepDistiller.
    """

    @staticmethod
    def compare(student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss per sample."""
        return DISTANCE * distance_wise(student, teacher) + ANGLE * angle_wise(student, teacher)


class Probabilistic(_Penultimate):
    """PKT: mean over pairs of P_T log(P_T / P_S), P = (cos + 1) / 2 between the samples of a batch, rows of sum 1.

    Source: Passalis & Tefas, ECCV 2018 (arXiv 1803.10837), with the cosine kernel; layer of RepDistiller.
    """

    compare = staticmethod(probabilistic)


class Similarity(Compared):
    """SP: ||G_S - G_T||_F^2 / b^2, G = Q Q^T with rows of length 1, Q the last stage's map, flattened; b the batch.

    The two maps may differ in shape.
    Source: Tung & Mori, ICCV 2019 (arXiv 1907.09682); the layer is that of RepDistiller.
    """

    compare = staticmethod(similarity_preserving)

    def __init__(self, pair: Pair) -> None:
        ours, theirs = pair.stages()[-1]
        super().__init__(ours, f"maps:{theirs}")
