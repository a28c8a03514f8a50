"""What fills a store: where its outputs come from, and one part of them computed, encoded and counted."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kcdcache import encoding
from kcdcache.errors import NonFiniteError
from kcdcache.holding import WHOLE, Shard
from kcdcache.layout import Part, StorePlan
from kcdcache.prefetch import Rows

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
REFUSED = "; `--on-nonfinite skip` leaves such samples out of the store and of all training"

Outputs = Callable[[int, int, int], dict[str, Tensor]]
"""(view, first row, last row + 1) -> field -> float32 outputs of those rows"""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where outputs are computed: it decides their last bits, so a store is finished where it was begun."""

    device: torch.device = CPU
    threads: int | None = None
    """CPU threads asked for; those the store was begun with if None"""
    allow_change: bool = False
    """continue although device, threads or versions changed; recorded"""
    shard: Shard = WHOLE
    """which parts are computed here"""


ANYWHERE = Place(allow_change=True)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What fills a store: rows, what they should be, and who says it is plausible."""

    outputs: Outputs
    labels: np.ndarray
    digests: np.ndarray
    least_accuracy: float
    """accuracy on a view below which the outputs cannot be right; 0 where none is demanded"""
    place: Place
    """where the outputs are computed"""
    announced: Callable[[Iterable[Rows]], AbstractContextManager[None]] = lambda rows: nullcontext()
    """told which rows' outputs will be asked for, in order; within what it returns they may be prepared ahead"""
    may_skip: bool | None = None
    """whether samples with outputs that cannot be stored are skipped; None where the user has no such choice"""
    truth: np.ndarray | None = None
    """labels by which the outputs are judged, where those given are partly wrong"""


class Computed(NamedTuple):
    """One part, ready to be written."""

    stored: dict[str, np.ndarray]
    """encoded arrays"""
    statistics: dict[str, encoding.Statistics]
    correct: float
    """how often the teacher was right"""
    skipped: tuple[int, ...]
    """samples whose outputs cannot be stored"""


def compute(part: Part, plan: StorePlan, job: Job) -> Computed:
    """Return a part's arrays, and what is counted of them.

    Raises:
        NonFiniteError: outputs cannot be stored and may not be skipped; names the samples.
    """
    whole, correct = _asked(part, plan, job)
    mask = _unusable(part, whole, plan) if job.may_skip else None
    skipped = [] if mask is None else (part.start + mask.nonzero().flatten()).tolist()
    stored: dict[str, np.ndarray] = {}
    try:
        for field, values in whole.items():
            stored |= plan.fields[field].encode(values, part.start, mask)
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}, in view {part.view}{REFUSED if job.may_skip is False else ''}") from None
    statistics = {field: encoding.statistics(values) for field, values in whole.items()}
    return Computed(stored, statistics, correct, tuple(skipped))


def _unusable(part: Part, whole: Mapping[str, Tensor], plan: StorePlan) -> Tensor | None:
    """Return the mask (rows,) of samples of which some field cannot be stored, after saying which; None without any."""
    faults = [fault for field, values in whole.items() for fault in plan.fields[field].faults(values)]
    for fault in faults:
        if rows := fault.rows.nonzero().flatten().tolist():
            named = encoding.name_some([part.start + row for row in rows])
            complaint = f"{fault.complaint} for {len(rows)} samples, which are skipped: {named}{fault.remedy}"
            logger.warning("precompute: view %d, %s", part.view, complaint)
    mask = torch.stack([fault.rows for fault in faults]).any(0)
    return mask if mask.any() else None


def _asked(part: Part, plan: StorePlan, job: Job) -> tuple[dict[str, Tensor], float]:
    """Return a part's fields, and how often the teacher was right."""
    pieces: dict[str, list[Tensor]] = {field: [] for field in part.fields}
    guesses: list[Tensor] = []
    for start, stop in plan.batches(part):
        outputs = job.outputs(part.view, start, stop)
        for field in part.fields:
            pieces[field].append(outputs[field])
        if "logits" in outputs:
            logits = outputs["logits"]
            finite = torch.isfinite(logits).all(1)  # a row with a NaN has its maximum there
            guesses.append(torch.where(finite, logits.argmax(1), -1))
    # counted once a part: a number read after every batch would stall the device
    labels = job.labels if job.truth is None else job.truth
    correct = _agreement(guesses, labels[part.start : part.stop]) if guesses else 0.0
    return {field: torch.cat(values) for field, values in pieces.items()}, correct


def _agreement(guesses: Sequence[Tensor], labels: np.ndarray) -> float:
    found = torch.cat(list(guesses))
    return float((found == torch.from_numpy(labels).to(found.device)).sum())
