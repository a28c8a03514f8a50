"""Methods that match sparsely recoded distributions of filters (KR) or of pooled activations.

Our reading of "Knowledge Representing" (Liu et al. 2019, arXiv 1911.05329), without its formulas (facts.md section 3).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn import functional

from kcdcache.methods.base import Batch, Outputs, Pair, Term, constant
from kcdcache.networks.taps import FILTERS
from kcdcache.teacher.fields import pooled


class _Represented(Term):
    """The schedule of the weight, the softmax temperature and the threshold of both variants."""

    usual_temperature = 1.0
    """softmax temperature unless the user gives one"""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        settings = pair.settings
        self._temperature = settings.kr_temperature or self.usual_temperature
        self._threshold = settings.kr_lambda
        self._falls = settings.kr_schedule == "linear"

    def weights_at(self, epoch: int, epochs: int) -> tuple[float, float]:
        """Return 1, and for this term a factor that falls from 1 to 1/epochs, or is constant."""
        return 1.0, 1 - epoch / epochs if self._falls else 1.0

    def _compared(self, ours: Float[Tensor, "... bins"], theirs: Float[Tensor, "... bins"]) -> Float[Tensor, "..."]:
        logs = [torch.log_softmax(side.float() / self._temperature, -1) for side in (ours, theirs)]
        return recoded_divergence(logs[0], logs[1], self._threshold)


class FilterStatistics(_Represented):
    """KR on weights: sum over stages of the recoded divergence between both networks' filter profiles.

    A stage's profile is the softmax over the quantiles of its filters' norms, averaged over its convolutions. The loss
    is the same for all samples and depends on the student's weights alone. It needs 64 numbers a stage of the teacher,
    which are in the store (`precompute --fields parameters`).

    Liu et al.'s abstract states: distributions of parameters, aggregated to a more abstract level, with a sparse
    recoding penalty; Gou et al.'s survey adds that groups of layers are compared, by cross-entropy. Ours: stages as
    groups of equal weight, L2 norms, quantiles, softmax, the divergence, its threshold (`kr_lambda`) and its falling
    weight (`kr_schedule`). Before batch normalisation a filter's norm has no effect on the network's outputs, only on
    the filter's effective learning rate, so expect little there.
    """

    statistics = True
    usual_temperature = 0.1  # trained filters' norms differ by some tenths

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair)
        self._places = [(f"{FILTERS}{ours}", theirs) for ours, theirs in pair.stages()]
        self.taps = tuple(tap for tap, _ in self._places)
        for _, theirs in self._places:  # without a store, only what it reads is asked
            known: Sequence[float] = pair.teacher_filters[theirs] if pair.teacher_filters else ()
            constant(self, f"_{theirs}", torch.tensor(known, dtype=torch.float32))

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss, the same for every sample."""
        parts = [self._compared(outputs[tap], getattr(self, f"_{theirs}")) for tap, theirs in self._places]
        return torch.stack(parts).sum().expand(len(batch.labels))


class PooledDistributions(_Represented):
    """KR on activations: sum over stages of the recoded divergence between both networks' channel distributions.

    P(x) = softmax of the stage's map averaged over all positions. Where the numbers of channels differ, a linear map of
    the student's averages (a 1x1 convolution of its maps) is trained with it. Entirely our reading, in case
    "distribution" refers to activations; facts.md section 3.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair)
        self._places = pair.stages()
        self.taps = tuple(ours for ours, _ in self._places)
        self.fields = tuple(f"pooled:{theirs}" for _, theirs in self._places)
        sizes = [(pair.student_shape(ours)[0], pair.teacher_shape(theirs)[0]) for ours, theirs in self._places]
        self._connectors = nn.ModuleList(
            nn.Identity() if ours == theirs else nn.Linear(ours, theirs, bias=False) for ours, theirs in sizes
        )

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss per sample."""
        places = zip(self._places, self._connectors, strict=True)
        return sum(  # type: ignore[return-value]
            self._compared(connector(pooled(outputs[ours].float())), batch.knowledge[f"pooled:{theirs}"])
            for (ours, theirs), connector in places
        )


def recoded_divergence(
    student: Float[Tensor, "... bins"], teacher: Float[Tensor, "... bins"], threshold: float = 0.0
) -> Float[Tensor, "..."]:
    """Return sum_k P_T (e^s - 1 - s), s = softshrink(log P_S - log P_T, threshold), of log-probabilities; at least 0.

    With threshold = 0 this is KL(P_T || P_S). Entries with log-ratios within the threshold have no loss or gradient;
    the others' gradient by log P_S is P_T (e^s - 1), which for threshold = 0 is P_S - P_T as for cross-entropy.
    """
    teacher = teacher.detach()
    target = teacher.exp()
    rest = functional.softshrink(student - teacher, threshold)
    near = rest.clamp(-1, 1)
    # each form where it is accurate: expm1 overflows for large ratios, the other cancels near 0
    close, far = target * (torch.expm1(near) - near), (teacher + rest).exp() - target * (1 + rest)
    return torch.where(rest.abs() <= 1, close, far).sum(-1)
