"""How a dropped point is mixed into a kept one: pixels, teacher probabilities and values."""

from collections.abc import Callable, Mapping

from jaxtyping import Float, Float32
from torch import Tensor

from kcdcache.errors import require_known


def mix_pixels(
    kept: Float32[Tensor, "batch c h w"],
    dropped: Float32[Tensor, "batch c h w"],
    epsilon: Float32[Tensor, " batch"],
    rule: str,
) -> Float32[Tensor, "batch c h w"]:
    """Return (1-eps) kept + eps dropped (convex), or kept + eps dropped clipped to [0, 1] (additive_clip).

    Source: Eq. 14 and Fig. 2 of the paper (convex), its literal addition (additive_clip); facts.md A8, A11.
    """
    require_known("mix", rule, PIXEL_RULES)
    return PIXEL_RULES[rule](kept, dropped, epsilon)


def mix_probabilities(
    kept: Float[Tensor, "batch classes"],
    dropped: Float[Tensor, "batch classes"],
    epsilon: Float[Tensor, " batch"],
    rule: str,
    temperature: float,
) -> Float[Tensor, "batch classes"]:
    """Return the teacher's probabilities at T for mixed points, from the logits of both.

    linear_prob: (1-eps) softmax(z/T) + eps softmax(z0/T); linear_logit: that of the mixed logits; keep: softmax(z/T).
    Source: Eq. 14 read offline; facts.md A10.
    """
    require_known("mix target", rule, TARGET_RULES)
    own = kept / temperature
    return TARGET_RULES[rule](own.softmax(1), own, dropped / temperature, epsilon.view(-1, 1))


TARGET_RULES: Mapping[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "linear_prob": lambda p, z, z0, eps: (1 - eps) * p + eps * z0.softmax(1),
    "linear_logit": lambda p, z, z0, eps: ((1 - eps) * z + eps * z0).softmax(1),
    "keep": lambda p, z, z0, eps: p,
}


def mix_values(
    kept: Float[Tensor, "batch ..."], dropped: Float[Tensor, "batch ..."], epsilon: Float[Tensor, " batch"]
) -> Float[Tensor, "batch ..."]:
    """Return (1-eps) kept + eps dropped, row by row."""
    share = epsilon.view(-1, *([1] * (kept.ndim - 1)))
    return (1 - share) * kept + share * dropped


PIXEL_RULES: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "convex": mix_values,
    "additive_clip": lambda kept, dropped, eps: (kept + eps.view(-1, 1, 1, 1) * dropped).clamp(0, 1),
}
