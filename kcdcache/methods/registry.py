"""The loss of a run: which methods were chosen with which weights, and their terms for one pair of networks."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from kcdcache.data.datasets import Dataset
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.methods import losses
from kcdcache.methods.base import Lesson, Pair, Seen, Term, constant, hard_term
from kcdcache.methods.catalogue import METHODS, named
from kcdcache.networks import registry
from kcdcache.networks.registry import tap_shapes
from kcdcache.settings import MethodSettings
from kcdcache.store import identity
from kcdcache.store.identity import Knowledge


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Resolved weights of one run's loss: of a method, or of several joined by '+'."""

    gamma: float
    """weight of the hard-label cross-entropy"""
    alpha: float
    """weight of the soft-label divergence"""
    temperature: float
    """distillation temperature T"""
    parts: Mapping[str, float]
    """name -> weight of its own term; 0 where it has none"""
    mix_label: str
    """'keep' or 'mix': the hard label of a mixed point"""
    smoothing: float
    """label smoothing of the hard-label term"""

    @property
    def terms(self) -> dict[str, float]:
        """Name -> weight of the methods with a term of their own."""
        return {name: weight for name, weight in self.parts.items() if METHODS[name].term is not None}


class Loss(nn.Module):
    """The loss of a run: labels, softened outputs and the chosen methods' own terms, if they have any.

    What the terms train is trained, saved and resumed beside the student.
    """

    _base: Tensor
    _shares: Tensor

    def __init__(self, weights: Weights, terms: Mapping[str, Term]) -> None:
        """Weigh the terms, which are those that `weights` names."""
        super().__init__()
        self.weights = weights
        self._terms = nn.ModuleDict(dict(terms))
        found = list(terms.values())
        soft = ("logits",) if weights.alpha > 0 else ()
        self.taps: tuple[str, ...] = tuple(dict.fromkeys(tap for term in found for tap in term.taps))
        """the student's values the terms read, besides the logits"""
        self.fields: tuple[str, ...] = tuple(dict.fromkeys((*soft, *(name for term in found for name in term.fields))))
        """the teacher's fields that a run reads from the store"""
        self.statistics: bool = any(term.statistics for term in found)
        """whether the terms read the teacher's parameters"""
        self.alone: str = " and ".join(name for name, term in terms.items() if term.remembers)
        """the methods that only one process can train"""
        # tensors, so that a recorded step reads the epoch's own
        constant(self, "_base", torch.ones(()))
        constant(self, "_shares", torch.ones(len(found)))

    def begin(self, epoch: int, epochs: int) -> None:
        """Put the weights of an epoch in force."""
        factors = [term.weights_at(epoch, epochs) for term in self._of()]
        self._base.fill_(math.prod(base for base, _ in factors))
        for place, (_, own) in enumerate(factors):
            self._shares[place] = own

    def extra(self, lesson: Lesson) -> Float32[Tensor, "extra c h w"] | None:
        """Return further images for the student's forward pass, after the batch's."""
        found = [images for term in self._of() if (images := term.extra(lesson)) is not None]
        return found[0] if found else None

    def forward(self, seen: Seen, lesson: Lesson) -> Float[Tensor, " batch"]:
        """Return the loss per sample of the student's values on a batch."""
        total = basic(seen["logits"][: len(lesson.labels)], lesson, self.weights)
        if self._terms:
            total = self._base * total
        for place, (name, term) in enumerate(self._terms.items()):
            total = total + self.weights.parts[name] * self._shares[place] * term(seen, lesson)
        return total

    def _of(self) -> list[Term]:
        return list(self._terms.values())  # type: ignore[arg-type]


def weights_of(settings: MethodSettings, smoothing: float = 0.0) -> Weights:
    """Return the weights of the methods a user named: the settings' where given, their authors' elsewhere.

    One method has its own weights. Several have gamma = 1, alpha = 1 if kd is among them, and each its own beta
    (RepDistiller's combinations, such as crd+kd); `A*w` gives method A the weight w.

    Raises:
        SettingsError: a method is unknown, named twice or has no weight to change, or beta is given for several terms.
    """
    parts: dict[str, float] = {}
    alpha = 0.0
    for name, weight in named(settings.method).items():
        method = METHODS[name]
        parts[name] = 0.0 if method.term is None else method.beta if weight is None else weight
        if name == "kd":
            alpha = 1.0 if weight is None else weight
    only = METHODS[next(iter(parts))]
    alone = len(parts) == 1 and "*" not in settings.method
    terms = [name for name in parts if METHODS[name].term is not None]
    if settings.beta is not None:
        if len(terms) != 1:
            raise SettingsError(
                f"--beta is the weight of one method's own term, '{settings.method}' has {len(terms)}; "
                "write the weights into the method: kd+at*1000+pkt*30000"
            )
        parts[terms[0]] = settings.beta
    own = [METHODS[name].temperature for name in parts if name != "ce"]
    return Weights(
        gamma=(only.gamma if alone else 1.0) if settings.gamma is None else settings.gamma,
        alpha=(only.alpha if alone else alpha) if settings.alpha is None else settings.alpha,
        temperature=(own[0] if own else 1.0) if settings.temperature is None else settings.temperature,
        parts=parts,
        mix_label=settings.mix_label,
        smoothing=smoothing,
    )


def make_loss(weights: Weights, pair: Callable[[], Pair]) -> Loss:
    """Return the loss of the chosen methods; initial weights of what they train depend on the seed alone.

    `pair` is asked for only where a method has a term of its own.

    Raises:
        SettingsError: a method cannot be used with this pair, or two need images of their own.
    """
    made: dict[str, Term] = {}
    between = pair() if weights.terms else None
    with torch.random.fork_rng(devices=[]):
        for number, name in enumerate(weights.terms):
            make = METHODS[name].term
            assert make is not None
            assert between is not None
            torch.default_generator.manual_seed(registry.torch_seed(between.seed + number + 1))
            made[name] = make(between)
    own = [name for name, term in made.items() if type(term).extra is not Term.extra]
    if len(own) > 1:
        raise SettingsError(f"{' and '.join(own)} each show the student images of their own; use one of them")
    return Loss(weights, made)


def pair_of(
    settings: MethodSettings,
    student: str,
    knowledge: Knowledge,
    data: Dataset,
    kept: np.ndarray,
    seed: int,
    teacher_filters: Mapping[str, Sequence[float]] | None = None,
    smoothing: float = 0.0,
) -> Pair:
    """Return the pair of a store's teacher and a student, on a data set's views.

    Raises:
        SettingsError: the student is unknown or cannot see the views.
    """
    views, channels, classes = knowledge.views, len(data.mean), len(data.classes)
    height, width = views.size
    source = knowledge.teacher
    size = source.transform.get("size")
    theirs = (height, width) if size is None else (size, size)
    known = source.architecture != "imported" and not registry.runs_foreign_code(source.architecture)
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


def reads(settings: MethodSettings, student: str, knowledge: Knowledge, data: Dataset) -> tuple[str, ...]:
    """Return the teacher's fields that a student's run with these settings reads from a store, `parameters` included.

    Raises:
        SettingsError: as for `weights_of` and `make_loss`.
    """
    everything = np.arange(len(data.train))
    loss = make_loss(weights_of(settings), lambda: pair_of(settings, student, knowledge, data, everything, 0))
    return (*loss.fields, *((identity.PARAMETERS,) if loss.statistics else ()))


def require_fields(needed: Sequence[str], held: Collection[str], settings: MethodSettings, student: str) -> None:
    """Do nothing if a store holds all the fields that a student's run with these settings reads.

    Raises:
        MismatchError: it lacks some; names all of them and the command that adds them.
    """
    if not (missing := [name for name in needed if name not in held]):
        return
    raise MismatchError(
        f"method '{settings.method}' for {student} reads {', '.join(needed)}; the store lacks {', '.join(missing)} and "
        f"holds {', '.join(held)}. Add them with `kcdcache precompute --for {settings.method} --student {student}` and "
        "the --store, --teacher and --data it was made with: what is there stays as it is"
    )


def basic(logits: Float[Tensor, "batch classes"], lesson: Lesson, weights: Weights) -> Float[Tensor, " batch"]:
    """Return gamma CE(y, z_S) + alpha T^2 KL(p_T || p_S) per sample.

    Source: Hinton et al. 2015; Eq. 1 of the paper with the hard label and T of its reference code.
    """
    total = weights.gamma * hard_term(logits, lesson, weights.mix_label, weights.smoothing)
    if weights.alpha == 0:
        return total
    assert lesson.probabilities is not None, "a store with logits serves this method"
    return total + weights.alpha * losses.soft_divergence(logits, lesson.probabilities, weights.temperature)
