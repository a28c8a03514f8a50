"""What a method gets and returns: the pair of networks, a batch, a term of the loss."""

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
"""tap of the student, with `logits` (perhaps bfloat16) -> values for the batch, followed by those for `Term.extra`
images; `filters:STAGE` is the profile of the student's own filters instead of values per sample"""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's samples on the device, K_Aug points already mixed."""

    index: Int64[Tensor, " batch"]
    pixels: Float32[Tensor, "batch channels height width"]
    """in [0, 1], channels_last, before any network's input transform"""
    labels: Int64[Tensor, " batch"]
    partner_labels: Int64[Tensor, " batch"]
    """label of the partner; the own label without one"""
    mixed: Bool[Tensor, " batch"]
    epsilon: Float32[Tensor, " batch"]
    """share of the partner; 0 for K_1H"""
    weight: Float32[Tensor, " batch"]
    """factor of the loss"""
    probabilities: Float32[Tensor, "batch classes"] | None = None
    """teacher probabilities at the distillation temperature, mixed by the target rule"""
    knowledge: Mapping[str, Tensor]
    """the teacher's fields as float32, mixed by `fields.mix`"""
    shared: int | None = None
    """samples of this step in all processes together; None for one process"""
    idle: bool = False
    """whether this process has no sample of the step, only a stand-in that does not count"""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What a method knows of teacher and student before the first step."""

    teacher: str
    """architecture"""
    student: str
    """architecture"""
    teacher_taps: fields.Taps
    """tap -> shape of one sample; only logits if the teacher cannot be built (imported logits, foreign code)"""
    student_taps: fields.Taps
    image: tuple[int, int, int]
    """channels, height and width of a view"""
    labels: Int64[np.ndarray, " n"]
    """of all samples of the data set"""
    kept: Int64[np.ndarray, " kept"]
    """samples of the current stage"""
    settings: MethodSettings
    seed: int
    smoothing: float = 0.0
    """label smoothing of hard-label terms, in [0, 1)"""
    teacher_filters: Mapping[str, Sequence[float]] | None = None
    """stage -> profile of the teacher's filters (see `parameters`); None without a store that has them"""

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.student_taps["logits"][0]

    def teacher_shape(self, tap: str) -> tuple[int, ...]:
        """Return the shape of a tap of the teacher; raises SettingsError if it has no such tap."""
        return _shape(self.teacher_taps, tap, f"the teacher '{self.teacher}'")

    def student_shape(self, tap: str) -> tuple[int, ...]:
        """Return the shape of a tap of the student; raises SettingsError if it has no such tap."""
        return _shape(self.student_taps, tap, f"the student '{self.student}'")

    def stages(self) -> list[tuple[str, str]]:
        """Return the pairs of (student's, teacher's) stages without stems; of unequal numbers, the last ones.

        RepDistiller pairs the first ones instead, which leaves out the last stage of a vgg teacher of a resnet student.
        Raises SettingsError if one of them has no known stages.
        """
        ours, theirs = fields.stages(self.student_taps)[1:], fields.stages(self.teacher_taps)[1:]
        count = min(len(ours), len(theirs))
        return list(zip(ours[-count:], theirs[-count:], strict=True))


class Term(nn.Module):
    """One method's term of the loss, with the modules it trains beside the student.

    The student's optimizer trains its parameters; checkpoints have its parameters and its buffers, except those
    registered with persistent=False because they can be made from the pair (see `constant`).
    """

    taps: tuple[str, ...] = ()
    """taps of the student that it reads, besides the logits"""
    fields: tuple[str, ...] = ()
    """fields of the teacher that it reads"""
    statistics: bool = False
    """whether it reads the store's statistics of the teacher's parameters"""
    remembers: bool = False
    """whether it has a memory of all samples, which several processes would not share"""

    @property
    def shows_images(self) -> bool:
        """Whether it adds images to the batch, and so gets values of more rows than the batch has."""
        return type(self).extra is not Term.extra

    def weights_at(self, epoch: int, epochs: int) -> tuple[float, float]:
        """Return an epoch's factors of the cross-entropy and soft-label terms, and of this one."""
        return 1.0, 1.0

    def extra(self, batch: Batch) -> Float32[Tensor, "extra c h w"] | None:
        """Return images to add to the batch in the student's forward pass."""
        return None

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss per sample; the method's loss is the mean over the batch."""
        raise NotImplementedError


class Compared(Term):
    """A term that compares one tap of the student with one field of the teacher."""

    compare: Callable[[Tensor, Tensor], Tensor]
    """(student's values, teacher's values) -> loss per sample"""

    def __init__(self, tap: str, field: str) -> None:
        super().__init__()
        self.taps, self.fields = (tap,), (field,)

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        return self.compare(outputs[self.taps[0]], batch.knowledge[self.fields[0]])


def hard_term(
    logits: Float[Tensor, "batch classes"], batch: Batch, mix_label: str, smoothing: float
) -> Float[Tensor, " batch"]:
    """Return the hard-label cross-entropy per sample in nats; mix_label 'mix' mixes in the partner's by epsilon."""
    own = cross_entropy(logits, batch.labels, smoothing)
    if mix_label == "keep":
        return own
    other = cross_entropy(logits, batch.partner_labels, smoothing)
    return torch.where(batch.mixed, (1 - batch.epsilon) * own + batch.epsilon * other, own)


def constant(module: nn.Module, name: str, value: Tensor) -> None:
    """Register a tensor as a buffer that is not in checkpoints."""
    module.register_buffer(name, value, persistent=False)


def _shape(taps: fields.Taps, tap: str, whose: str) -> tuple[int, ...]:
    if tap not in taps:
        raise SettingsError(
            f"this method reads '{tap}', which {whose} does not have (it has {', '.join(taps)}); take a method that "
            "needs less (`kcdcache methods` lists them)"
        )
    return taps[tap]
