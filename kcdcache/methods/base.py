"""What a method is given and what it answers: the pair of networks, a batch as a lesson, a term of the loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor, nn

from kcdcache.errors import SettingsError
from kcdcache.methods.losses import cross_entropy
from kcdcache.settings import MethodSettings
from kcdcache.teacher import fields

Seen = Mapping[str, Float[Tensor, "..."]]
"""tap of the student -> its values for the batch, and for a term that shows further images, for those after it;
`logits` is among them, perhaps bfloat16; a tap `filters:STAGE` is no value of samples but the profile of the student's
own filters"""


@runtime_checkable
class Lesson(Protocol):
    """What a loss needs of a batch: images, labels, mixing shares and the teacher's targets."""

    @property
    def index(self) -> Int64[Tensor, " batch"]:
        """Number of each point's sample."""

    @property
    def pixels(self) -> Float32[Tensor, "batch c h w"]:
        """Images in [0, 1], mixed ones mixed."""

    @property
    def labels(self) -> Int[Tensor, " batch"]:
        """Hard label of each point."""

    @property
    def partner_labels(self) -> Int[Tensor, " batch"]:
        """Hard label of what is mixed in; the own label where nothing is."""

    @property
    def epsilon(self) -> Float[Tensor, " batch"]:
        """Share of the partner in [0, 1]."""

    @property
    def mixed(self) -> Bool[Tensor, " batch"]:
        """Whether the point is of K_Aug."""

    @property
    def probabilities(self) -> Float[Tensor, "batch classes"] | None:
        """The teacher's softened output, or None where the store gives none."""

    @property
    def knowledge(self) -> Mapping[str, Tensor]:
        """The teacher's fields by name, mixed where the point is."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A teacher and a student, as a method sees them before the first step."""

    teacher: str
    """the teacher's architecture"""
    student: str
    """the student's architecture"""
    teacher_taps: fields.Taps
    """tap -> shape of one sample; only logits where the teacher cannot be built here (imported logits, foreign code)"""
    student_taps: fields.Taps
    image: tuple[int, int, int]
    """channels, height and width of a view"""
    labels: Int64[np.ndarray, " n"]
    """hard label of every sample of the data set"""
    kept: Int64[np.ndarray, " kept"]
    """samples of the current stage"""
    settings: MethodSettings
    seed: int
    smoothing: float = 0.0
    """label smoothing of hard-label terms, in [0, 1)"""
    teacher_filters: Mapping[str, Sequence[float]] | None = None
    """stage -> profile of the teacher's filters (see `parameters`); None where no store is at hand, or it has none"""

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.student_taps["logits"][0]

    def teacher_shape(self, tap: str) -> tuple[int, ...]:
        """Return the shape of one of the teacher's values.

        Raises:
            SettingsError: this teacher has no such value.
        """
        return _shape(self.teacher_taps, tap, f"the teacher '{self.teacher}'")

    def student_shape(self, tap: str) -> tuple[int, ...]:
        """Return the shape of one of the student's values.

        Raises:
            SettingsError: this student has no such value.
        """
        return _shape(self.student_taps, tap, f"the student '{self.student}'")

    def stages(self) -> list[tuple[str, str]]:
        """Return (student's, teacher's) stage by stage without the stems; of unequal numbers, the last ones.

        RepDistiller pairs the first ones instead: there the last stage of a vgg teacher meets none of a resnet student.

        Raises:
            SettingsError: one of them has no known stages.
        """
        ours, theirs = fields.stages(self.student_taps)[1:], fields.stages(self.teacher_taps)[1:]
        count = min(len(ours), len(theirs))
        return list(zip(ours[-count:], theirs[-count:], strict=True))


class Term(nn.Module):
    """One method's share of the loss, with the modules it trains beside the student.

    Its parameters are trained by the student's optimizer, its buffers and parameters are part of every checkpoint;
    buffers that can be made again from the pair are to be registered with persistent=False.
    """

    taps: tuple[str, ...] = ()
    """the student's values it reads, besides the logits"""
    fields: tuple[str, ...] = ()
    """the teacher's fields it reads"""
    statistics: bool = False
    """whether it reads what the store keeps of the teacher's parameters"""
    remembers: bool = False
    """whether it keeps something of all samples from step to step, which several processes would not share"""

    @property
    def shows_images(self) -> bool:
        """Whether it has the student see further images, and so is given the values of more rows than the batch's."""
        return type(self).extra is not Term.extra

    def weights_at(self, epoch: int, epochs: int) -> tuple[float, float]:
        """Return factors in an epoch: of the cross-entropy and soft-label terms, and of this one."""
        return 1.0, 1.0

    def extra(self, lesson: Lesson) -> Float32[Tensor, "extra c h w"] | None:
        """Return further images that the student sees in the same forward pass, after the batch's."""
        return None

    def forward(self, seen: Seen, lesson: Lesson) -> Float32[Tensor, " batch"]:
        """Return the loss per sample, whose mean over the batch is the method's."""
        raise NotImplementedError


def hard_term(
    logits: Float[Tensor, "batch classes"], lesson: Lesson, mix_label: str, smoothing: float
) -> Float[Tensor, " batch"]:
    """Return the hard-label cross-entropy per sample, in nats; with mix_label 'mix' the partner's counts by epsilon."""
    own = cross_entropy(logits, lesson.labels, smoothing)
    if mix_label == "keep":
        return own
    other = cross_entropy(logits, lesson.partner_labels, smoothing)
    return torch.where(lesson.mixed, (1 - lesson.epsilon) * own + lesson.epsilon * other, own)


def constant(module: nn.Module, name: str, value: Tensor) -> None:
    """Keep a tensor on the module's device without making it part of checkpoints."""
    module.register_buffer(name, value, persistent=False)


def _shape(taps: fields.Taps, tap: str, whose: str) -> tuple[int, ...]:
    if tap not in taps:
        raise SettingsError(
            f"this method reads '{tap}', which {whose} does not have (it has {', '.join(taps)}); take a method that "
            "needs less (`kcdcache methods` lists them)"
        )
    return taps[tap]
