"""Boundary supporting samples: images pushed just over the teacher's decision boundary by its own gradient."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

STEPS = 10
RATE = 0.3
SLACK = 1e-4

Scores = Callable[[Float32[Tensor, "batch c h w"]], Float32[Tensor, "batch classes"]]
"""pixels in [0, 1] -> logits, differentiable"""


class Boundary(NamedTuple):
    """Images beside a decision boundary, and what the teacher says of them."""

    images: Float32[Tensor, "batch c h w"]
    """whole multiples of 1/255 in [0, 1]"""
    logits: Float32[Tensor, "batch classes"]


def boundary(scores: Scores, pixels: Float32[Tensor, "batch c h w"], std: Float32[Tensor, "c 1 1"]) -> Boundary:
    """Return every image pushed towards another class, and the teacher's logits on it.

    Up to 10 steps of 0.3 (gap + 1e-4) g / ||g|| along the gradient g of score(target) - score(base), in units of the
    normalised input (`std` per channel); gap is the absolute difference of the two scores. An image stays where its
    class first changes. The target is drawn by the teacher's probabilities of the other classes, from a hash of the
    image, so that a row depends on its own image alone. Images stay in [0, 1] and are rounded to whole 255ths before
    the teacher looks again.

    Source: Heo et al., AAAI 2019 (arXiv 1805.05532), section 3.1, Eq. 4-6, and facts.md section 4; the original clips
    the normalised input at +-2.5 instead, and draws the target anew every time.
    """
    with torch.inference_mode(False), torch.enable_grad():
        start = pixels.clone()
        first = scores(start).detach()
        base = first.argmax(1)
        target = draw_target(first, base, image_hash(start))
        images = start
        still = torch.ones(len(start), dtype=torch.bool, device=start.device)
        for _ in range(STEPS):
            images, still = _pushed(scores, images, still, base, target, std)
        images = (images * 255).round() / 255
        return Boundary(images, scores(images).detach())


def draw_target(
    logits: Float32[Tensor, "batch classes"], base: Int64[Tensor, " batch"], draw: Float32[Tensor, " batch"]
) -> Int64[Tensor, " batch"]:
    """Return for each row another class than `base`, by the rows' probabilities; `draw` in [0, 1) is its chance."""
    others = logits.double().scatter(1, base[:, None], -torch.inf).softmax(1)
    reached = others.cumsum(1)
    chosen = torch.searchsorted(reached, draw.double()[:, None] * reached[:, -1:], right=True)[:, 0]
    chosen = chosen.clamp_max(logits.shape[1] - 1)
    # a draw at the very end of rounding may land on a class of no mass, base among them
    return torch.where(others.gather(1, chosen[:, None])[:, 0] > 0, chosen, others.argmax(1))


def image_hash(pixels: Float32[Tensor, "batch c h w"]) -> Float32[Tensor, " batch"]:
    """Return a number in [0, 1) per image, a function of its pixels in 65535ths alone, the same on every device."""
    values = (pixels.flatten(1) * 65535).round().long()
    place = torch.arange(values.shape[1], device=pixels.device)
    weight = (place * 2654435761 + 40503) & 0xFFFFFFFF | 1
    mixed = ((values + 1) * weight) & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 15)) * 2246822519 & 0xFFFFFFFF
    total = mixed.sum(1) & 0xFFFFFFFF
    total = ((total ^ (total >> 16)) * 3266489917) & 0xFFFFFFFF
    return ((total >> 8).float()) / 2**24


def _pushed(
    scores: Scores, images: Tensor, still: Tensor, base: Tensor, target: Tensor, std: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the images one step on where they still are of their class, and which of them are."""
    images = images.detach().requires_grad_(True)
    logits = scores(images)
    still = still & (logits.argmax(1) == base)
    gap = logits.gather(1, target[:, None])[:, 0] - logits.gather(1, base[:, None])[:, 0]
    gradient = torch.autograd.grad(gap.sum(), images)[0] * std
    norm = gradient.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    step = RATE * (gap.detach().abs() + SLACK) / norm
    moved = (images.detach() + std * step.view(-1, 1, 1, 1) * gradient).clamp(0, 1)
    return torch.where(still.view(-1, 1, 1, 1), moved, images.detach()), still
