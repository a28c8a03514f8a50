"""Made-up pairs of networks and batches for tests of single terms."""

import numpy as np
import torch
from reference import array

from kcdcache.methods.base import Batch, Pair
from kcdcache.methods.catalogue import METHODS
from kcdcache.networks.registry import tap_shapes
from kcdcache.settings import MethodSettings
from kcdcache.teacher import fields

CLASSES, OURS, THEIRS = 4, 6, 10


def pair_between(theirs, ours, names=("T", "S"), **more):
    """A pair of networks with these taps."""
    given = {"image": (3, 8, 8), "labels": np.arange(20) % 10, "kept": np.arange(20), "settings": MethodSettings()}
    return Pair(teacher=names[0], student=names[1], teacher_taps=theirs, student_taps=ours, seed=0, **(given | more))


def pair_of(labels, kept=None, student="resnet8", ours=None, smoothing=0.0, **settings):
    """A pair whose penultimate values have 6 and 10 numbers."""
    labels = np.asarray(labels, np.int64)
    taps = ({"penultimate": (width,), "logits": (CLASSES,)} for width in (THEIRS, OURS))
    kept = np.arange(len(labels)) if kept is None else np.asarray(kept, np.int64)
    pair = pair_between(
        *taps, ("T", student), labels=labels, kept=kept, smoothing=smoothing, settings=MethodSettings(**settings)
    )
    pair.student_taps.update(ours or {})
    return pair


def published_pair(theirs, ours, classes=100, side=32, **more):
    """A pair of networks of the zoo."""
    return pair_between(*(tap_shapes(name, classes, 3, side, side) for name in (theirs, ours)), (theirs, ours), **more)


def term_of(name, pair, seed=0, moved=0.0):
    """The method's term; with `moved`, its weights are that far from those it starts with."""
    torch.manual_seed(seed)
    term = METHODS[name].term(pair)
    if moved:
        with torch.no_grad():
            for parameter in term.parameters():
                parameter.add_(torch.randn_like(parameter) * moved)
    return term


def batch_of(index, labels, pixels=None, **knowledge):
    """A batch about these samples; fields are given with `_` for `:`."""
    labels = torch.as_tensor(labels, dtype=torch.int64)
    rows = len(labels)
    return Batch(
        index=torch.as_tensor(index, dtype=torch.int64), labels=labels, partner_labels=labels,
        pixels=torch.rand(rows, 3, 8, 8) if pixels is None else pixels, weight=torch.ones(rows),
        epsilon=torch.zeros(rows), mixed=torch.zeros(rows, dtype=torch.bool),
        knowledge={name.replace("_", ":"): value for name, value in knowledge.items()},
    )  # fmt: skip


def random_batch(pair, names, rows=4):
    """A batch with random teacher's values of these fields."""
    batch = batch_of(range(rows), [0] * rows)
    for name in names:
        field = fields.parse(name)
        batch.knowledge[name] = field.derive(*(torch.randn(rows, *pair.teacher_shape(tap)) for tap in field.taps))
    return batch


def knowledge_of(batch):
    return {name: array(value) for name, value in batch.knowledge.items()}
