"""The loss of a run from the chosen methods for a pair of networks, and the teacher fields it reads."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from kcdcache.datasets.datasets import Dataset
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.methods import losses
from kcdcache.methods.base import Batch, Outputs, Pair, Term, constant, hard_term
from kcdcache.methods.catalogue import METHODS, Weights, weights_of
from kcdcache.networks.registry import runs_foreign_code, tap_shapes, torch_seed
from kcdcache.networks.taps import FILTERS
from kcdcache.settings import MethodSettings
from kcdcache.store import identity


class Loss(nn.Module):
    """The loss of a run: hard labels, softened outputs and the methods' own terms.

    Modules of the terms are trained, saved and resumed with the student.
    """

    _base: Tensor
    _shares: Tensor

    def __init__(self, weights: Weights, terms: Mapping[str, Term]) -> None:
        """Take the terms of the methods in `weights`."""
        super().__init__()
        self.weights = weights
        self._terms = nn.ModuleDict(dict(terms))
        found = list(terms.values())
        soft = ("logits",) if weights.alpha > 0 else ()
        self.taps: tuple[str, ...] = tuple(dict.fromkeys(tap for term in found for tap in term.taps))
        """taps of the student that the terms read, besides the logits"""
        self.fields: tuple[str, ...] = tuple(dict.fromkeys((*soft, *(name for term in found for name in term.fields))))
        """fields of the teacher that a run reads from the store"""
        self.statistics: bool = any(term.statistics for term in found)
        """whether the terms read the teacher's parameters"""
        self.alone: str = " and ".join(name for name, term in terms.items() if term.remembers)
        """the methods that only one process can train"""
        self.tells = False
        """whether a forward pass leaves the terms in `parts`"""
        self.parts: dict[str, Tensor] = {}
        """term -> its part of the last loss per sample, which add up to it: hard and soft labels, then the methods'"""
        # tensors, so that a step recorded as a CUDA graph reads the epoch's
        constant(self, "_base", torch.ones(()))
        constant(self, "_shares", torch.ones(len(found)))

    def begin(self, epoch: int, epochs: int) -> None:
        """Set the weights of an epoch."""
        factors = [term.weights_at(epoch, epochs) for term in self._of()]
        self._base.fill_(math.prod(base for base, _ in factors))
        for place, (_, own) in enumerate(factors):
            self._shares[place] = own

    def extra(self, batch: Batch) -> Float32[Tensor, "extra c h w"] | None:
        """Return images to add to the batch in the student's forward pass."""
        found = [images for term in self._of() if (images := term.extra(batch)) is not None]
        return found[0] if found else None

    def forward(self, outputs: Outputs, batch: Batch) -> Float[Tensor, " batch"]:
        """Return the loss per sample from the student's outputs on a batch."""
        # sliced again for each term, as gradients of a shared slice would be added in another order
        total = basic(outputs["logits"][: len(batch.labels)], batch, self.weights)
        if self._terms:
            total = self._base * total
        if self.tells:
            self.parts = self._basic_parts(outputs["logits"][: len(batch.labels)], batch, total)
        for place, (name, term) in enumerate(zip(self._terms, self._of(), strict=True)):
            given = outputs if term.shows_images else _own_rows(outputs, term, len(batch.labels))
            own = self.weights.parts[name] * self._shares[place] * term(given, batch)
            total = total + own
            if self.tells:
                self.parts[name] = own.detach()
        return total

    @torch.no_grad()
    def _basic_parts(self, logits: Tensor, batch: Batch, total: Tensor) -> dict[str, Tensor]:
        hard = self.weights.gamma * hard_term(logits, batch, self.weights.mix_label, self.weights.smoothing)
        hard = self._base * hard if self._terms else hard
        return {"hard": hard} | ({"soft": total - hard} if self.weights.alpha > 0 else {})

    def _of(self) -> list[Term]:
        return list(self._terms.values())  # type: ignore[arg-type]


def _own_rows(outputs: Outputs, term: Term, rows: int) -> Outputs:
    """Return the taps of a term without the rows of another term's images."""
    return {tap: outputs[tap] if tap.startswith(FILTERS) else outputs[tap][:rows] for tap in ("logits", *term.taps)}


def make_loss(weights: Weights, pair: Callable[[], Pair]) -> Loss:
    """Return the loss of the chosen methods; initial weights of their modules depend on the seed alone.

    `pair` is called only if a method has a term of its own. Raises SettingsError if a method cannot be used with this
    pair, or two methods add images to the batch.
    """
    makers = {name: maker for name in weights.parts if (maker := METHODS[name].term) is not None}
    made: dict[str, Term] = {}
    if makers:
        between = pair()
        with torch.random.fork_rng(devices=[]):
            for number, (name, make) in enumerate(makers.items(), start=1):
                torch.default_generator.manual_seed(torch_seed(between.seed + number))
                made[name] = make(between)
    own = [name for name, term in made.items() if term.shows_images]
    if len(own) > 1:
        raise SettingsError(f"{' and '.join(own)} each show the student images of their own; use one of them")
    return Loss(weights, made)


def pair_of(
    settings: MethodSettings,
    student: str,
    knowledge: identity.Knowledge,
    data: Dataset,
    kept: np.ndarray,
    seed: int,
    teacher_filters: Mapping[str, Sequence[float]] | None = None,
    smoothing: float = 0.0,
) -> Pair:
    """Return the pair of a store's teacher and a student; raises SettingsError if the student cannot take the views."""
    views, channels, classes = knowledge.views, len(data.mean), len(data.classes)
    height, width = views.size
    source = knowledge.teacher
    size = source.transform.get("size")
    theirs = (height, width) if size is None else (size, size)
    known = source.architecture != "imported" and not runs_foreign_code(source.architecture)
    return Pair(
        teacher=source.architecture,
        student=student,
        teacher_taps=tap_shapes(source.architecture, classes, channels, *theirs) if known else {"logits": (classes,)},
        student_taps=tap_shapes(student, classes, channels, height, width),
        image=(channels, height, width),
        labels=data.train.labels,
        kept=kept,
        settings=settings,
        seed=seed,
        smoothing=smoothing,
        teacher_filters=teacher_filters,
    )


def reads(settings: MethodSettings, student: str, knowledge: identity.Knowledge, data: Dataset) -> tuple[str, ...]:
    """Return the teacher's fields, `parameters` included, that a run with these settings reads from a store."""
    everything = np.arange(len(data.train))
    loss = make_loss(weights_of(settings), lambda: pair_of(settings, student, knowledge, data, everything, 0))
    return (*loss.fields, *((identity.PARAMETERS,) if loss.statistics else ()))


def require_fields(needed: Sequence[str], held: Collection[str], settings: MethodSettings, student: str) -> None:
    """Raise MismatchError, with the command that adds them, if a store lacks fields that a run reads."""
    if not (missing := [name for name in needed if name not in held]):
        return
    raise MismatchError(
        f"method '{settings.method}' for {student} reads {', '.join(needed)}; the store lacks {', '.join(missing)} and "
        f"holds {', '.join(held)}. Add them with `kcdcache precompute --for {settings.method} --student {student}` and "
        "the --store, --teacher and --data it was made with: what is there stays as it is"
    )


def basic(logits: Float[Tensor, "batch classes"], batch: Batch, weights: Weights) -> Float[Tensor, " batch"]:
    """Return gamma CE(y, z_S) + alpha T^2 KL(p_T || p_S) per sample: Eq. 1 with hard labels and T of the code."""
    total = weights.gamma * hard_term(logits, batch, weights.mix_label, weights.smoothing)
    if weights.alpha == 0:
        return total
    assert batch.probabilities is not None, "a store with logits serves this method"
    return total + weights.alpha * losses.soft_divergence(logits, batch.probabilities, weights.temperature)
