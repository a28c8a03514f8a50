"""Methods that show the student further images: SSKD (rotated) and BSS (beside a decision boundary)."""

from copy import deepcopy

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor, nn

from kcdcache.methods.base import Batch, Outputs, Pair, Term, constant
from kcdcache.methods.losses import cosines, cross_entropy, logit_divergence
from kcdcache.teacher import fields

ROTATED, SIMILARITY = 2.7, 10.0
"""weights of the divergences of classes and of similarities on rotated images"""
SHARPNESS, SHARE = 0.5, 0.75
"""temperature of the similarities, and share kept of the anchors that the teacher gets wrong"""
PREPARATION = 60 / 240
"""share of the epochs in which the teacher's projection learns"""


class SelfSupervision(Term):
    """SSKD: 2.7 KL of the classes on three rotations + 10 KL of the softmax over similarities to upright images.

    The teacher's projection (an MLP on its cached penultimate values) learns to find a rotated image's upright one in
    the first quarter of the epochs, at least one, in which the similarities have no weight; then it is fixed. The
    authors train it for 60 epochs before their 240. The projection used is a copy of the trained one, as the optimizer
    would go on changing one without gradient. The release flips an image with p = 0.5 and crops each of its four
    rotations on its own; here one view by the store's rule is rotated.
    Source: Xu et al., ECCV 2020 (arXiv 2006.07114); weights and temperatures of its release (facts.md section 4).
    """

    taps = ("penultimate",)
    fields = ("rotations:logits", "rotations:penultimate")
    _preparing: Tensor

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self._temperature = pair.settings.temperature or 4.0
        self.student = _projection(pair.student_shape("penultimate")[0])
        self.apprentice = _projection(pair.teacher_shape("penultimate")[0])
        self.teacher = deepcopy(self.apprentice).requires_grad_(False)
        constant(self, "_preparing", torch.ones(()))

    def weights_at(self, epoch: int, epochs: int) -> tuple[float, float]:
        """Train the teacher's projection in the first epochs; factors are 1."""
        self._preparing.fill_(float(epoch < max(1, round(epochs * PREPARATION))))
        return 1.0, 1.0

    def extra(self, batch: Batch) -> Float32[Tensor, "extra c h w"]:
        """Return all images rotated once, then twice, then three times."""
        return fields.rotated(batch.pixels)[len(batch.pixels) :]

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        self._follow()
        features = batch.knowledge["rotations:penultimate"].detach()
        ours = self.student(fields.unrotated(outputs["penultimate"]))
        theirs, learning = self.teacher(features), self.apprentice(features)
        rotated = rotated_divergence(
            fields.unrotated(outputs["logits"])[:, 1:],
            batch.knowledge["rotations:logits"][:, 1:],
            batch.labels,
            self._temperature,
            share=1.0,
        )
        alike = rotation_similarity(ours[:, 1:], ours[:, 0], theirs[:, 1:], theirs[:, 0], SHARPNESS, SHARE)
        found = rotation_task(learning[:, 1:], learning[:, 0])
        return ROTATED * rotated + (1 - self._preparing) * SIMILARITY * alike + self._preparing * found

    @torch.no_grad()
    def _follow(self) -> None:
        for kept, now in zip(self.teacher.parameters(), self.apprentice.parameters(), strict=True):
            kept.copy_(torch.where(self._preparing > 0, now, kept))


def _projection(size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))


def rotation_similarity(
    rotated: Float[Tensor, "batch views dim"],
    plain: Float[Tensor, "batch dim"],
    teacher_rotated: Float[Tensor, "batch views other"],
    teacher_plain: Float[Tensor, "batch other"],
    temperature: float,
    share: float,
) -> Float[Tensor, " batch"]:
    """Return T^2 KL(teacher || student) of each rotated view's softmax over cosines with all plain views, over T.

    Only the anchors of `selected` count, by the teacher's rank of the own plain view; `share` is kept of those it gets
    wrong. The mean over the batch is the mean over the anchors kept, 0 if there are none. T = 0.5, share 0.75.
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

    They are chosen by the teacher's rank of the label; the mean over the batch is that over the anchors kept. T = 4,
    share 1.
    """
    views = student.shape[1]
    wanted = teacher.flatten(0, 1)
    kept = selected(wanted, labels.repeat_interleave(views), share)
    return _over_kept(logit_divergence(student.flatten(0, 1), wanted, temperature), kept, views)


def rotation_task(
    rotated: Float[Tensor, "batch views dim"], plain: Float[Tensor, "batch dim"]
) -> Float[Tensor, " batch"]:
    """Return the cross-entropy, in nats, of finding each rotated view's own plain view by cosine at temperature 1.

    It trains the teacher's projection; gradient flows into both arguments.
    """
    batch, views = rotated.shape[:2]
    found = cross_entropy(cosines(rotated.flatten(0, 1), plain), _own(batch, views, plain.device))
    return found.view(batch, views).mean(dim=1)


def selected(
    scores: Float[Tensor, "rows candidates"], truth: Int[Tensor, " rows"], share: float
) -> Bool[Tensor, " rows"]:
    """Return the rows to learn from: all that score the truth highest, and floor(share * wrong) of the wrong ones.

    These are the wrong ones with the best rank of the truth; equal ranks go by the larger probability of the truth,
    then by position. Of equal scores in a row the earlier candidate ranks first. The paper calls it selective transfer.
    """
    own = scores.gather(1, truth.unsqueeze(1))
    earlier = torch.arange(scores.shape[1], device=scores.device) < truth.unsqueeze(1)
    rank = ((scores > own) | ((scores == own) & earlier)).sum(dim=1)
    sure = torch.log_softmax(scores.float(), dim=1).gather(1, truth.unsqueeze(1)).squeeze(1)
    order = torch.argsort(sure, descending=True, stable=True)
    order = order[torch.argsort(rank[order], stable=True)]
    wrong = (rank > 0).sum()
    most = len(rank) - wrong + (wrong * share).floor()
    return torch.argsort(order) < most  # the argsort of an order gives each row's position


def _own(batch: int, views: int, device: torch.device) -> Tensor:
    return torch.arange(batch, device=device).repeat_interleave(views)


def _over_kept(anchors: Tensor, kept: Tensor, views: int) -> Tensor:
    """Return each sample's mean over its views, scaled so that the mean over samples is that over kept anchors."""
    scale = len(kept) / kept.sum().clamp_min(1)
    return (anchors * kept).view(-1, views).mean(dim=1) * scale


MOST_ATTACKED = 64
"""most base samples of a batch"""


class BoundarySupport(Term):
    """BSS: (3 (1 - e/E) + 1) KL on the images + 2 (1 - 4e/3E)+ KL on their boundary images, in epoch e = 1 .. E.

    Boundary images count for the base samples: of those both networks get right, the at most 64 with the largest
    difference of probabilities. Both divergences are without T^2, as released. All boundary images are in the student's
    forward pass of the batch, which shares batch statistics; the release has a second pass of the base samples' alone.
    Source: Heo et al., AAAI 2019 (arXiv 1805.05532), Eq. 7-9; factors of its release (facts.md section 4).
    """

    fields = ("logits", "boundary:images", "boundary:logits")
    _plain: Tensor
    _beside: Tensor

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self._temperature = pair.settings.temperature or 3.0
        constant(self, "_plain", torch.ones(()))
        constant(self, "_beside", torch.ones(()))

    def weights_at(self, epoch: int, epochs: int) -> tuple[float, float]:
        """Set the epoch's weights of both divergences; factors are 1."""
        share = (epoch + 1) / epochs
        self._plain.fill_(3 * (1 - share) + 1)
        self._beside.fill_(2 * max(1 - 4 / 3 * share, 0))
        return 1.0, 1.0

    def extra(self, batch: Batch) -> Float32[Tensor, "extra c h w"]:
        """Return each image's boundary image."""
        return batch.knowledge["boundary:images"]

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        count, temperature, teacher = len(batch.labels), self._temperature, batch.knowledge["logits"]
        plain, beside = outputs["logits"][:count], outputs["logits"][count:]
        base = base_weights(plain.float().softmax(1), teacher.softmax(1), batch.labels)
        softened = logit_divergence(plain, teacher, temperature) / (temperature * temperature)
        attacked = boundary_divergence(beside, batch.knowledge["boundary:logits"], base, temperature)
        return self._plain * softened + self._beside * attacked


def base_weights(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    most: int = MOST_ATTACKED,
) -> Float[Tensor, " batch"]:
    """Return 1 for base samples, 0 for others, from class probabilities; no gradient.

    Base samples are, of those both networks classify correctly (as released; its first commit asks the teacher alone),
    the `most` with the largest squared difference of probabilities over the classes other than the label, ties by
    position. Shapes do not depend on the values.
    """
    found, wanted = student.detach().float(), teacher.detach().float()
    correct = (found.argmax(dim=1) == labels) & (wanted.argmax(dim=1) == labels)
    squared = (found - wanted).square().scatter(1, labels.unsqueeze(1), 0)
    score = torch.where(correct, squared.sum(dim=1), -1)
    order = torch.argsort(score, descending=True, stable=True)
    return (correct & (torch.argsort(order) < most)).float()


def boundary_divergence(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    weights: Float[Tensor, " batch"] | Bool[Tensor, " batch"],
    temperature: float,
) -> Float[Tensor, " batch"]:
    """Return KL(teacher || student) at T of the logits on boundary images, times weights / their mean, without T^2.

    With the weights of `base_weights`, the mean over the batch is the mean over the base samples, 0 if there are none.
    It differs from the released soft cross-entropy only by the teacher's entropy.
    """
    share = weights.detach().float()
    mean = share.mean()
    rows = logit_divergence(student, teacher, temperature) / (temperature * temperature)
    return rows * share / torch.where(mean > 0, mean, 1)
