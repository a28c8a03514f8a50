"""Losses of self-supervised distillation (SSKD) over rotated views; one value per sample, mean of its views."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kcdcache.losses.softmax import cross_entropy, logit_divergence
from kcdcache.losses.vectors import cosines


def rotation_similarity(
    rotated: Float[Tensor, "batch views dim"],
    plain: Float[Tensor, "batch dim"],
    teacher_rotated: Float[Tensor, "batch views other"],
    teacher_plain: Float[Tensor, "batch other"],
    temperature: float,
    share: float,
) -> Float[Tensor, " batch"]:
    """Return T^2 KL(teacher || student) of each rotated view's softmax over cosines with all plain views, over T.

    Only the anchors of `selected` count, by the teacher's rank of the own plain view; `share` is the part kept of
    those it gets wrong. The mean over the batch is the mean over the anchors kept, 0 if there are none.

    Source: Xu et al. 2020 (Knowledge Distillation Meets Self-Supervision); T = 0.5, share 0.75.
    """
    views = rotated.shape[1]
    found = cosines(rotated.flatten(0, 1), plain)
    wanted = cosines(teacher_rotated.flatten(0, 1), teacher_plain)
    kept = selected(wanted, _own(plain.shape[0], views, wanted.device), share)
    return _over_kept(logit_divergence(found, wanted, temperature), kept, views)


def rotated_divergence(
    student: Float[Tensor, "batch views classes"],
    teacher: Float[Tensor, "batch views classes"],
    labels: Int[Tensor, " batch"],
    temperature: float,
    share: float,
) -> Float[Tensor, " batch"]:
    """Return T^2 KL(teacher || student) of the class logits on rotated views, over the anchors of `selected` only.

    The teacher's rank of the label decides; the mean over the batch is the mean over the anchors kept.

    Source: Xu et al. 2020 (Knowledge Distillation Meets Self-Supervision); T = 4, share 1.
    """
    views = student.shape[1]
    wanted = teacher.flatten(0, 1)
    kept = selected(wanted, labels.repeat_interleave(views), share)
    return _over_kept(logit_divergence(student.flatten(0, 1), wanted, temperature), kept, views)


def rotation_task(
    rotated: Float[Tensor, "batch views dim"], plain: Float[Tensor, "batch dim"]
) -> Float[Tensor, " batch"]:
    """Return the cross-entropy, in nats, of finding each rotated view's own plain view by cosine at temperature 1.

    It trains the teacher's projection head before distillation; gradient flows into both arguments.

    Source: Xu et al. 2020 (Knowledge Distillation Meets Self-Supervision); T = 1 as released.
    """
    batch, views = rotated.shape[:2]
    found = cross_entropy(cosines(rotated.flatten(0, 1), plain), _own(batch, views, plain.device))
    return found.view(batch, views).mean(dim=1)


def selected(
    scores: Float[Tensor, "rows candidates"], truth: Int[Tensor, " rows"], share: float
) -> Bool[Tensor, " rows"]:
    """Return which rows to learn from: all that score the truth highest, and floor(share * wrong) of the wrong ones.

    Of the wrong ones those with the best rank of the truth are kept; equal ranks by the larger probability of the
    truth, then by position. Among equal scores in a row the earlier candidate ranks first.

    Source: Xu et al. 2020 (Knowledge Distillation Meets Self-Supervision): selective transfer.
    """
    own = scores.gather(1, truth.unsqueeze(1))
    earlier = torch.arange(scores.shape[1], device=scores.device) < truth.unsqueeze(1)
    rank = ((scores > own) | ((scores == own) & earlier)).sum(dim=1)
    sure = torch.log_softmax(scores.float(), dim=1).gather(1, truth.unsqueeze(1)).squeeze(1)
    order = torch.argsort(sure, descending=True, stable=True)
    order = order[torch.argsort(rank[order], stable=True)]
    wrong = (rank > 0).sum()
    most = len(rank) - wrong + (wrong * share).floor()
    return torch.argsort(order) < most  # argsort of an order is each row's place in it


def _own(batch: int, views: int, device: torch.device) -> Tensor:
    return torch.arange(batch, device=device).repeat_interleave(views)


def _over_kept(anchors: Tensor, kept: Tensor, views: int) -> Tensor:
    """Return each sample's mean over its views, scaled so that the mean over samples is that over kept anchors."""
    scale = len(kept) / kept.sum().clamp_min(1)
    return (anchors * kept).view(-1, views).mean(dim=1) * scale
