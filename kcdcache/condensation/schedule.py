"""The schedule of a run: keep fractions per stage, epochs between condensations, and the expected cost."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from kcdcache.errors import SettingsError, require_known

_ROUNDING = 16 * sys.float_info.epsilon


@dataclass(frozen=True)
class Stage:
    """The epochs [start, stop) that train on one manifest."""

    number: int
    start: int
    """first epoch"""
    stop: int
    """epoch after the last"""
    keep: float
    """share of all N samples in the stage's manifest"""
    source: str
    """origin of its manifest: 'full', 'given', 'random' or 'condensed'"""


def kept_count(keep: float, count: int) -> int:
    """Return floor(keep * count), the number of samples kept, without the artefacts of binary fractions.

    >>> kept_count(0.29, 100), int(0.29 * 100)
    (29, 28)
    """
    product = keep * count
    nearest = round(product)
    if abs(product - nearest) <= _ROUNDING * max(product, 1.0):
        return min(nearest, count)
    return math.floor(product)


def plan(schedule: str, epochs: int, stages: int, keep: float, base: float = 1.0) -> tuple[Stage, ...]:
    """Return the stages of a run; together they cover the epochs [0, epochs) without gap or overlap.

    Fractions fall from `base` (the share of N in a given set; 1 if training starts on everything) to `keep`. A given
    set with one stage is trained as it is. `export_keep` is the fraction condensed after the last epoch.

    Raises SettingsError if the schedule is unknown, epochs is no multiple of stages, or keep exceeds base.

    Source: Eq. 16 and Algorithm 1 of Knowledge Condensation Distillation, its poster and the authors' code, in the
    readings of SCHEDULES.
    """
    require_known("schedule", schedule, SCHEDULES)
    if not 0 < base <= 1 or not 0 < keep <= 1:
        raise SettingsError(f"keep and base are shares in (0, 1]; found keep {keep}, base {base}")
    require_whole_stages(epochs, stages)
    first = "full" if base == 1 else "given"
    if export_keep(stages, keep, base) is None:
        return (Stage(0, 0, epochs, base, first),)
    if keep > base:
        raise SettingsError(f"keep {keep} exceeds the given set's share {base} of all samples; lower keep to it")
    steps = SCHEDULES[schedule](base, keep, stages, epochs // stages)
    steps = [step for step in steps if step[0] < epochs]
    stops = [start for start, _ in steps[1:]] + [epochs]
    sources = ["random" if schedule == "paper_stage" else first] + ["condensed"] * (len(steps) - 1)
    return tuple(
        Stage(number, begin, stop, fraction, source)
        for number, ((begin, fraction), stop, source) in enumerate(zip(steps, stops, sources, strict=True))
    )


def export_keep(stages: int, keep: float, base: float = 1.0) -> float | None:
    """Return the keep fraction of the set condensed after the last epoch; None if a given set stays as it is."""
    return None if base < 1 and stages == 1 else keep


def require_whole_stages(epochs: int, stages: int) -> None:
    """Raise SettingsError unless epochs divide evenly into stages."""
    if stages < 1 or epochs < 1 or epochs % stages:
        raise SettingsError(
            f"epochs must be a multiple of stages; found {epochs} epochs in {stages} stages: give --epochs "
            f"{max(1, round(epochs / max(1, stages))) * max(1, stages)}, or leave --stages out"
        )


def fitting_stages(epochs: int, usual: int = 6) -> int:
    """Return the divisor of `epochs` in [2, 2 usual] that is nearest to the usual number of stages; 1 for one epoch.

    Raises SettingsError, with the nearest numbers of epochs that have one, if there is none.

    >>> [fitting_stages(epochs) for epochs in (240, 10, 7, 4, 1)]
    [6, 5, 7, 4, 1]
    """
    if epochs == 1:
        return 1
    found = [stages for stages in range(2, 2 * usual + 1) if epochs % stages == 0]
    if not found:
        raise SettingsError(
            f"{epochs} epochs do not divide into 2 to {2 * usual} stages of equal length: give --epochs {epochs - 1} "
            f"or {epochs + 1}, or --stages 1"
        )
    return min(found, key=lambda stages: abs(stages - usual))


def expected_cost(stages: Sequence[Stage], count: int, epochs: int) -> float:
    """Return the relative cost C in (0, 1]: samples the student sees over N times epochs, counted, not estimated.

    Source: Eq. 16 of Knowledge Condensation Distillation, with counted set sizes in place of tau^t.
    """
    return sum(kept_count(stage.keep, count) * (stage.stop - stage.start) for stage in stages) / (count * epochs)


def stretched(stages: Sequence[Stage], epochs: int) -> Float64[np.ndarray, " epochs"]:
    """Return, for each epoch, the share of the run's samples seen before it, times `epochs`.

    With this clock for the learning rate's milestones, a shrinking set spends the same share of its steps at each rate;
    without shrinking it is 0, 1, ..., epochs - 1.
    """
    keep = np.repeat([stage.keep for stage in stages], [stage.stop - stage.start for stage in stages])
    before = np.concatenate(([0.0], np.cumsum(keep)))
    return before[:-1] * (epochs / before[-1])


Steps = list[tuple[int, float]]
"""(first epoch, keep fraction) per stage"""


def _geometric(base: float, keep: float, exponent: float) -> float:
    return keep if exponent == 1 else base * (keep / base) ** exponent


def _end_of_stage(base: float, keep: float, stages: int, length: int) -> Steps:
    return [(s * length, _geometric(base, keep, s / stages)) for s in range(stages)]


def _alg1_shift(base: float, keep: float, stages: int, length: int) -> Steps:
    # Algorithm 1 condenses after epochs i with i % T == 0, so epoch 0 alone sees everything
    later = [(1 + s * length, _geometric(base, keep, (s + 1) / stages)) for s in range(stages)]
    return [(0, base), *later]


def _paper_stage(base: float, keep: float, stages: int, length: int) -> Steps:
    return [(s * length, _geometric(base, keep, (s + 1) / stages)) for s in range(stages)]


def _reference_linear(base: float, keep: float, stages: int, length: int) -> Steps:
    return [(s * length, base - (base - keep) * s / stages) for s in range(stages)]


def _poster(base: float, keep: float, stages: int, length: int) -> Steps:
    return [(s * length, _geometric(base, keep, s / max(stages - 1, 1))) for s in range(stages)]


SCHEDULES = {
    "end_of_stage": _end_of_stage,
    "alg1_shift": _alg1_shift,
    "paper_stage": _paper_stage,
    "reference_linear": _reference_linear,
    "poster": _poster,
}
"""readings of the paper's schedule: (base, keep, stages, epochs per stage) -> first epoch and fraction of each"""
