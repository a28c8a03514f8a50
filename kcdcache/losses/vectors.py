"""Vector arithmetic of the losses in float32: products outside autocast, lengths and directions safe at zero."""

import torch
from jaxtyping import Float
from torch import Tensor


def product(left: Float[Tensor, "*stack m k"], right: Float[Tensor, "*stack k n"]) -> Float[Tensor, "*stack m n"]:
    """Return the matrix product in float32, inside autocast too, which would otherwise round both sides to half."""
    with torch.autocast(left.device.type, enabled=False):
        return left.float() @ right.float()


def length(x: Float[Tensor, "*stack dim"]) -> Float[Tensor, "*stack"]:
    """Return the Euclidean length of the last axis; its gradient at the zero vector is zero, not NaN."""
    squared = x.float().square().sum(dim=-1)
    positive = squared > 0
    return torch.where(positive, squared, 1).sqrt() * positive


def unit(x: Float[Tensor, "*stack dim"]) -> Float[Tensor, "*stack dim"]:
    """Return x divided by its length along the last axis; the zero vector stays zero and passes no gradient."""
    x = x.float()  # once: gradients of two casts would meet in half precision
    size = length(x).unsqueeze(-1)
    positive = size > 0
    return x * (positive / torch.where(positive, size, 1))


def cosines(left: Float[Tensor, "m dim"], right: Float[Tensor, "n dim"]) -> Float[Tensor, "m n"]:
    """Return cosines of the rows of `left` with those of `right`, in [-1, 1] up to rounding; 0 for rows of zeros."""
    return product(unit(left), unit(right).mT)
