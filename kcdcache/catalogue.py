"""The distillation methods: METHODS maps a name to its term of the loss, default weights and what its authors did."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kcdcache.terms.attention import Attention
from kcdcache.terms.base import Pair, Term


@dataclass(frozen=True, kw_only=True)
class Method:
    """One distillation method: L = gamma CE(y, z_S) + alpha T^2 KL(p_T || p_S) + beta (its own term)."""

    about: str
    """the idea in a few words"""
    source: str
    """paper, and where the defaults are from"""
    term: Callable[[Pair], Term] | None = None
    """makes its own term; None for methods on logits and labels alone"""
    gamma: float = 1.0
    alpha: float = 0.0
    beta: float = 0.0
    temperature: float = 4.0
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """training settings its authors changed; they hold where the user gives none"""
    live: bool = False
    """whether it trains further networks with the student, so that no store can replace its forward passes"""


METHODS: Mapping[str, Method] = {
    "ce": Method(about="plain cross-entropy, no teacher", source="-", temperature=1.0),
    "kd": Method(
        about="softened outputs",
        source="Hinton et al. 2015 (arXiv 1503.02531); weights and T of RepDistiller",
        gamma=0.1,
        alpha=0.9,
    ),
    "at": Method(
        about="normalised attention maps of every stage",
        source="Zagoruyko & Komodakis, ICLR 2017 (arXiv 1612.03928); weight of RepDistiller",
        term=Attention,
        beta=1000.0,
    ),
}
