"""Losses on feature maps: attention, flow matrices, hints, variational information, hierarchical context."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from kcdcache.errors import MismatchError
from kcdcache.losses.vectors import product, unit

POOLED_SIDES = (4, 2, 1)
"""sides of the pooled levels of the hierarchical context loss"""


def attention(
    features: Float[Tensor, "batch channels height width"], side: tuple[int, int] | None = None
) -> Float[Tensor, "batch positions"]:
    """Return Q = q / ||q||_2 with q the mean over channels of f^2, flattened row by row; a zero map gives zeros.

    `side` is (height, width) of the map wanted: the FEATURES are average-pooled to it before squaring, which differs
    from pooling the map. A teacher's map is therefore kept at the size the student's has.

    Source: Zagoruyko and Komodakis 2017, Eq. 2 (p = 2), and the released loss, which takes the mean for the sum.
    """
    pooled = features.float() if side is None else functional.adaptive_avg_pool2d(features.float(), side)
    return unit(pooled.square().mean(dim=1).flatten(1))


def attention_transfer(
    student: Float[Tensor, "batch positions"], target: Float[Tensor, "batch positions"]
) -> Float[Tensor, " batch"]:
    """Return the mean over positions of (Q_S - Q_T)^2, in [0, 4 / positions]; both come from `attention`.

    Source: Zagoruyko and Komodakis 2017, Eq. 2; the square and the mean are those of the released loss.
    """
    return _squared_error(student, target)


def fsp_matrix(
    bottom: Float[Tensor, "batch low h w"], top: Float[Tensor, "batch high h2 w2"]
) -> Float[Tensor, "batch low high"]:
    """Return the flow matrix G_ij = mean over positions of bottom_i * top_j; the larger map is average-pooled first.

    Source: Yim et al. 2017 (A Gift from Knowledge Distillation), Sec. 3: FSP matrix.
    """
    side = (min(bottom.shape[2], top.shape[2]), min(bottom.shape[3], top.shape[3]))
    low, high = (functional.adaptive_avg_pool2d(f.float(), side).flatten(2) for f in (bottom, top))
    return product(low, high.mT) / low.shape[2]


def fsp(student: Float[Tensor, "batch low high"], target: Float[Tensor, "batch low high"]) -> Float[Tensor, " batch"]:
    """Return the mean squared difference of two flow matrices of one pair of layers, from `fsp_matrix`.

    The values grow with the fourth power of the features: float16 features beyond a few hundred can have gradients
    that float16 does not hold.

    Source: Yim et al. 2017 (A Gift from Knowledge Distillation), with the mean over entries of the released losses.
    """
    return _squared_error(student, target)


def hint(student: Float[Tensor, "batch ..."], target: Float[Tensor, "batch ..."]) -> Float[Tensor, " batch"]:
    """Return the mean squared difference of the regressed student features and the teacher's.

    Source: Romero et al. 2015 (FitNets), Eq. 3, with the mean over entries in place of half the sum.
    """
    return _squared_error(student, target)


def variational(
    mean: Float[Tensor, "batch channels height width"],
    target: Float[Tensor, "batch channels height width"],
    raw_variance: Float[Tensor, " channels"],
) -> Float[Tensor, " batch"]:
    """Return the mean over entries of 1/2 [(mu - t)^2 / s_c^2 + log s_c^2], s_c^2 = softplus(raw_variance_c) + 1e-5.

    It is the negative log-likelihood of the teacher's map without its constant, and so may be negative. Gradient
    flows into `mean` and `raw_variance`.

    Source: Ahn et al. 2019 (Variational Information Distillation), with the mean over entries as released.
    """
    _refuse_other_shape(mean, target)
    variance = (functional.softplus(raw_variance.float()) + 1e-5).view(1, -1, 1, 1)
    squared = (mean.float() - target.detach().float()).square()
    return ((squared / variance + variance.log()) / 2).flatten(1).mean(dim=1)


def hierarchical_context(
    student: Float[Tensor, "batch channels height width"], target: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, " batch"]:
    """Return the weighted mean of the squared error at full size and pooled to 4, 2 and 1; weights 1, 1/2, 1/4, 1/8.

    A level not smaller than the map's shorter side is left out, and the weights go on halving over those that remain.

    Source: Chen et al. 2021 (Distilling Knowledge via Knowledge Review): HCL, weights as released.
    """
    student, target = student.float(), target.float()
    loss, weight, total = _squared_error(student, target), 1.0, 1.0
    for side in (side for side in POOLED_SIDES if side < min(student.shape[2:])):
        weight /= 2
        total += weight
        small, small_target = (functional.adaptive_avg_pool2d(f, side) for f in (student, target))
        loss = loss + weight * _squared_error(small, small_target)
    return loss / total


def _squared_error(student: Tensor, target: Tensor) -> Tensor:
    _refuse_other_shape(student, target)
    return (student.float() - target.detach().float()).square().flatten(1).mean(dim=1)


def _refuse_other_shape(student: Tensor, target: Tensor) -> None:
    """Raise where broadcasting would quietly compare a map with another's row or channel."""
    if student.shape != target.shape:
        raise MismatchError(
            f"expected the student's features in the teacher's shape {tuple(target.shape)}, "
            f"found {tuple(student.shape)}: pool or project one of the two first"
        )
