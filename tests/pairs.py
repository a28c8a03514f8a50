"""Made-up pairs of networks and lessons for tests of single terms, and softmax in plain Python."""

import math
from types import SimpleNamespace

import numpy as np
import torch

from kcdcache.methods.base import Pair
from kcdcache.methods.registry import METHODS
from kcdcache.settings import MethodSettings

CLASSES, OURS, THEIRS = 4, 6, 10


def pair_of(labels, kept=None, student="resnet8", ours=None, image=(3, 8, 8), smoothing=0.0, **settings):
    """A pair whose penultimate values have 6 and 10 numbers."""
    labels = np.asarray(labels, np.int64)
    return Pair(
        teacher="T", student=student, image=image, labels=labels, seed=0, smoothing=smoothing,
        settings=MethodSettings(**settings),
        teacher_taps={"penultimate": (THEIRS,), "logits": (CLASSES,)},
        student_taps=ours or {"penultimate": (OURS,), "logits": (CLASSES,)},
        kept=np.arange(len(labels)) if kept is None else np.asarray(kept, np.int64),
    )  # fmt: skip


def term_of(name, pair, seed=0):
    torch.manual_seed(seed)
    return METHODS[name].term(pair)


def lesson_of(index, labels, pixels=None, **knowledge):
    """A lesson about these samples; fields are given with `_` for `:`."""
    labels = torch.as_tensor(labels, dtype=torch.int64)
    rows = len(labels)
    return SimpleNamespace(
        index=torch.as_tensor(index, dtype=torch.int64), labels=labels, partner_labels=labels,
        pixels=torch.rand(rows, 3, 8, 8) if pixels is None else pixels, probabilities=None,
        epsilon=torch.zeros(rows), mixed=torch.zeros(rows, dtype=torch.bool),
        knowledge={name.replace("_", ":"): value for name, value in knowledge.items()},
    )  # fmt: skip


def softmax(row, temperature=1.0):
    top = max(row)
    powers = [math.exp((z - top) / temperature) for z in row]
    return [power / sum(powers) for power in powers]


def divergence(target, found):
    """KL(target || found) in nats of two rows of probabilities."""
    return sum(p * (math.log(p) - math.log(q)) for p, q in zip(target, found, strict=True))


def rows_of(values):
    return values.detach().double().tolist()
