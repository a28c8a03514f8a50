"""What a method is given and what it answers: the pair of networks, a batch, a term of the loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn

from kcdcache.errors import SettingsError
from kcdcache.methods.losses import cross_entropy
from kcdcache.settings import MethodSettings
from kcdcache.teacher import fields

Outputs = Mapping[str, Float[Tensor, "..."]]
"""tap of the student -> its values for the batch, and for a term that shows further images, for those after it;
`logits` is among them, perhaps bfloat16; a tap `filters:STAGE` is no value of samples but the profile of the student's
own filters"""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's samples on the device, K_Aug points already mixed."""

    index: Int64[Tensor, " batch"]
    pixels: Float32[Tensor, "batch channels height width"]
    """in [0, 1], channels_last; each network applies its own input transform"""
    labels: Int64[Tensor, " batch"]
    partner_labels: Int64[Tensor, " batch"]
    """label of the point mixed in; the own label where nothing is"""
    mixed: Bool[Tensor, " batch"]
    epsilon: Float32[Tensor, " batch"]
    """share of the partner, 0 for K_1H"""
    weight: Float32[Tensor, " batch"]
    """factor of the loss"""
    probabilities: Float32[Tensor, "batch classes"] | None = None
    """teacher probabilities at the distillation temperature, mixed as the target rule says"""
    knowledge: Mapping[str, Tensor]
    """the teacher's fields as float32, mixed as `fields.mix` says"""
    shared: int | None = None
    """number of samples of this step in all processes together; None if it is all here"""
    idle: bool = False
    """whether this process has no sample of the step, and this one stands in for it without counting"""


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

    def extra(self, batch: Batch) -> Float32[Tensor, "extra c h w"] | None:
        """Return further images that the student sees in the same forward pass, after the batch's."""
        return None

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss per sample, whose mean over the batch is the method's."""
        raise NotImplementedError


class Compared(Term):
    """A term that compares one value of the student's with one field of the teacher's."""

    compare: Callable[[Tensor, Tensor], Tensor]
    """the student's values and the teacher's -> loss per sample"""

    def __init__(self, tap: str, field: str) -> None:
        super().__init__()
        self.taps, self.fields = (tap,), (field,)

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        return self.compare(outputs[self.taps[0]], batch.knowledge[self.fields[0]])


def hard_term(
    logits: Float[Tensor, "batch classes"], batch: Batch, mix_label: str, smoothing: float
) -> Float[Tensor, " batch"]:
    """Return the hard-label cross-entropy per sample, in nats; with mix_label 'mix' the partner's counts by epsilon."""
    own = cross_entropy(logits, batch.labels, smoothing)
    if mix_label == "keep":
        return own
    other = cross_entropy(logits, batch.partner_labels, smoothing)
    return torch.where(batch.mixed, (1 - batch.epsilon) * own + batch.epsilon * other, own)


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
