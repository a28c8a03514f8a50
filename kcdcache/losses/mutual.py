"""Losses between networks trained together: mutual learning (DML) and the on-the-fly ensemble (ONE); per sample."""

from jaxtyping import Float
from torch import Tensor

from kcdcache.losses.softmax import logit_divergence


def mutual(student: Float[Tensor, "batch classes"], peer: Float[Tensor, "batch classes"]) -> Float[Tensor, " batch"]:
    """Return KL(softmax(peer) || softmax(student)) in nats, at least 0; the peer is a constant to the gradient.

    With several peers the method takes the mean over them.

    Source: Zhang et al. 2018 (Deep Mutual Learning).
    """
    return logit_divergence(student, peer, 1.0)


def ensemble_divergence(
    branch: Float[Tensor, "batch classes"], ensemble: Float[Tensor, "batch classes"], temperature: float
) -> Float[Tensor, " batch"]:
    """Return T^2 KL(ensemble || branch) of the softmax at T, in nats; the ensemble is a constant to the gradient.

    Source: Lan et al. 2018 (Knowledge Distillation by On-the-Fly Native Ensemble); T = 3.
    """
    return logit_divergence(branch, ensemble, temperature)
