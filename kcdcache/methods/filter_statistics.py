"""Methods that match distributions of filters (KR) or of pooled activations, recoded sparsely: our reading of a paper.

Of "Knowledge Representing" (Liu et al. 2019, arXiv 1911.05329) no formula could be read (facts.md section 3).
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
    """What both variants share: the schedule of their weight, softmax temperature and threshold."""

    usual_temperature = 1.0
    """softmax temperature unless the user gives one"""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        settings = pair.settings
        self._temperature = settings.kr_temperature or self.usual_temperature
        self._threshold = settings.kr_lambda
        self._falls = settings.kr_schedule == "linear"

    def weights_at(self, epoch: int, epochs: int) -> tuple[float, float]:
        """Return 1 for the other terms, and for this one a factor that falls from 1 to 1/epochs, or stays 1."""
        return 1.0, 1 - epoch / epochs if self._falls else 1.0

    def _compared(self, ours: Float[Tensor, "... bins"], theirs: Float[Tensor, "... bins"]) -> Float[Tensor, "..."]:
        logs = [torch.log_softmax(side.float() / self._temperature, -1) for side in (ours, theirs)]
        return recoded_divergence(logs[0], logs[1], self._threshold)


class FilterStatistics(_Represented):
    """KR on weights: sum over stages of the recoded divergence between both networks' filter profiles.

    A stage's profile is the softmax over the quantiles of its filters' norms, averaged over its convolutions. It is the
    same for every sample: the loss moves the student's weights alone. Of the teacher it needs 64 numbers a stage, which
    the store keeps beside its fields (`precompute --fields parameters`).

    Liu et al.'s abstract states: distributions of parameters, aggregated to a more abstract level, with a sparse
    recoding penalty; Gou et al.'s survey adds that groups of layers are compared, by cross-entropy. Ours: stages as
    groups of equal weight, L2 norms, quantiles, softmax, the divergence, its threshold (`kr_lambda`) and its falling
    weight (`kr_schedule`). Before batch normalisation a filter's norm does not change what the network computes, only
    how fast the filter turns; so expect little of it there.
    """

    statistics = True
    usual_temperature = 0.1  # trained filters' norms differ by some tenths: at 1 they would all look alike

    def __init__(self, pair: Pair) -> None:
        super().__init__(pair)
        self._places = [(f"{FILTERS}{ours}", theirs) for ours, theirs in pair.stages()]
        self.taps = tuple(tap for tap, _ in self._places)
        for _, theirs in self._places:  # without a store at hand, what it needs is all that is asked
            known: Sequence[float] = pair.teacher_filters[theirs] if pair.teacher_filters else ()
            constant(self, f"_{theirs}", torch.tensor(known, dtype=torch.float32))

    def forward(self, outputs: Outputs, batch: Batch) -> Float32[Tensor, " batch"]:
        """Return the loss, the same for every sample."""
        parts = [self._compared(outputs[tap], getattr(self, f"_{theirs}")) for tap, theirs in self._places]
        return torch.stack(parts).sum().expand(len(batch.labels))


class PooledDistributions(_Represented):
    """KR on activations: sum over stages of the recoded divergence between both networks' channel distributions.

    P(x) = softmax of the stage's map averaged over all places. Where the channel counts differ, a linear map of the
    student's averages (a 1x1 convolution of its maps) is trained with it.

    Ours altogether, for the case that "distribution" means what the parameters do to a sample; facts.md section 3.
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

    With threshold = 0 this is KL(P_T || P_S), the cross-entropy less its constant. An entry whose log-ratio is within
    the threshold costs nothing and gets no gradient; the others' gradient by log P_S is P_T (e^s - 1), which is the
    cross-entropy's own residual P_S - P_T for threshold = 0. Hence 0 for equal distributions, and the support of the
    gradient shrinks as the threshold grows.
    """
    teacher = teacher.detach()  # what is known of the teacher is not to be moved
    target = teacher.exp()
    rest = functional.softshrink(student - teacher, threshold)
    near = rest.clamp(-1, 1)
    # each form where it is accurate: expm1 loses a large ratio of tiny probabilities, the other cancels near 0
    close, far = target * (torch.expm1(near) - near), (teacher + rest).exp() - target * (1 + rest)
    return torch.where(rest.abs() <= 1, close, far).sum(-1)
