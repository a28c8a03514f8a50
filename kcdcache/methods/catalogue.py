"""The distillation methods with their sources, default weights and training settings.

Terms are imported when they are made, so that names and weights can be checked without torch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pkgutil import resolve_name
from typing import Any

from kcdcache.errors import SettingsError, nearest, require_known
from kcdcache.settings import MethodSettings

LIGHT_STUDENTS = ("MobileNetV2", "ShuffleV1", "ShuffleV2")
"""students trained with a lower learning rate by the methods' authors"""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One distillation method: L = gamma CE(y, z_S) + alpha T^2 KL(p_T || p_S) + beta (its own term)."""

    about: str
    """the idea in a few words"""
    source: str
    """paper, and source of the defaults"""
    term: Callable[..., Any] | None = None
    """makes its `Term` from a `Pair`; None for methods on logits and labels alone"""
    gamma: float = 1.0
    alpha: float = 0.0
    beta: float = 0.0
    temperature: float = 4.0
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """its authors' training settings, used where the user gives none"""
    light: Mapping[str, Any] = field(default_factory=dict)
    """its authors' further settings for LIGHT_STUDENTS, if other than LIGHT_RECIPE"""
    live: bool = False
    """whether it trains further networks with the student, whose forward passes no store can replace"""


LIGHT_RECIPE: Mapping[str, Any] = {"learning_rate": 0.01}
"""settings of RepDistiller and later releases for LIGHT_STUDENTS (0.05 for all others)"""


def _made(where: str, pair: Any) -> Any:
    return resolve_name(f"kcdcache.methods.{where}")(pair)


METHODS: dict[str, Method] = {
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
        term=partial(_made, "feature_maps:Attention"),
        beta=1000.0,
    ),
    "fitnet": Method(
        about="the teacher's map in the middle, regressed",
        source="Romero et al., ICLR 2015 (arXiv 1412.6550); weight and regressor of RepDistiller",
        term=partial(_made, "feature_maps:Hint"),
        beta=100.0,
    ),
    "sp": Method(
        about="similarities between the last maps of a batch",
        source="Tung & Mori, ICCV 2019 (arXiv 1907.09682); weight of RepDistiller",
        term=partial(_made, "relations:Similarity"),
        beta=3000.0,
    ),
    "vid": Method(
        about="variational information between the maps of every stage",
        source="Ahn et al., CVPR 2019 (arXiv 1904.05835); weight of RepDistiller",
        term=partial(_made, "feature_maps:Variational"),
        beta=1.0,
    ),
    "rkd": Method(
        about="distances and angles within a batch",
        source="Park et al., CVPR 2019 (arXiv 1904.05068); weights of RepDistiller",
        term=partial(_made, "relations:Relational"),
        beta=1.0,
    ),
    "pkt": Method(
        about="probabilities of being neighbours within a batch",
        source="Passalis & Tefas, ECCV 2018 (arXiv 1803.10837); weight of RepDistiller",
        term=partial(_made, "relations:Probabilistic"),
        beta=30000.0,
    ),
    "fsp": Method(
        about="flow matrices of consecutive stages, taught alone before the labels",
        source="Yim et al., CVPR 2017 (A Gift from Knowledge Distillation); phases of RepDistiller",
        term=partial(_made, "feature_maps:Flow"),
        beta=1.0,
    ),
    "reviewkd": Method(
        about="fused features of all stages against maps before their activation",
        source="Chen et al., CVPR 2021 (arXiv 2104.09044); weight, warm-up and recipe of its CIFAR-100 code",
        term=partial(_made, "feature_maps:Review"),
        beta=5.0,
        recipe={"learning_rate": 0.1, "batch_size": 128, "nesterov": True},
        light={"learning_rate": 0.02},
    ),
    "crd": Method(
        about="contrast of embeddings with those of other classes, over a memory of all samples",
        source="Tian et al., ICLR 2020 (arXiv 1910.10699); weight of RepDistiller",
        term=partial(_made, "contrast:Contrast"),
        beta=0.8,
    ),
    "wcord": Method(
        about="contrast through a 1-Lipschitz critic, and optimal transport between batches",
        source="Chen et al., CVPR 2021 (arXiv 2012.08674); critic and transport plan are our reading",
        term=partial(_made, "contrast:WassersteinContrast"),
        beta=1.0,
    ),
    "sskd": Method(
        about="classes and similarities of rotated images, beside softened outputs",
        source="Xu et al., ECCV 2020 (arXiv 2006.07114); its release, but one view is turned, not each turn cropped",
        term=partial(_made, "extra_images:SelfSupervision"),
        gamma=0.1,
        alpha=0.9,
        beta=1.0,
    ),
    "bss": Method(
        about="softened outputs, also on adversarial images beside the decision boundary",
        source="Heo et al., AAAI 2019 (arXiv 1805.05532); its release",
        term=partial(_made, "extra_images:BoundarySupport"),
        beta=1.0,
        temperature=3.0,
    ),
    "dkd": Method(
        about="softened outputs, target class and other classes weighed apart",
        source="Zhao et al., CVPR 2022 (arXiv 2203.08679); its release's default weights",
        term=partial(_made, "logits:Decoupled"),
        beta=1.0,
    ),
    "eakd": Method(
        about="softened outputs, the more the less sure both networks are of a sample",
        source="Su et al., ICCV 2025 (arXiv 2311.13621); weights and temperatures of its release",
        term=partial(_made, "logits:Adaptive"),
        gamma=0.1,
        beta=0.9,
    ),
    "kr": Method(
        about="distributions of the filters of every stage, recoded sparsely",
        source="our reading of Liu et al. 2019 (arXiv 1911.05329), of which no formula could be read",
        term=partial(_made, "filter_statistics:FilterStatistics"),
        beta=1.0,
    ),
    "kr_activations": Method(
        about="distributions of the pooled channels of every stage, recoded sparsely",
        source="our reading of Liu et al. 2019 (arXiv 1911.05329), of which no formula could be read",
        term=partial(_made, "filter_statistics:PooledDistributions"),
        beta=1.0,
    ),
    "dml": Method(
        about="a peer network that learns with the student, no teacher",
        source="Zhang et al., CVPR 2018 (arXiv 1706.00384)",
        term=partial(_made, "online:MutualLearning"),
        beta=1.0,
        temperature=1.0,
        live=True,
    ),
    "one": Method(
        about="two more branches of the student and their gated ensemble, no teacher",
        source="Lan et al., NeurIPS 2018 (arXiv 1806.04606)",
        term=partial(_made, "online:Ensemble"),
        beta=1.0,
        temperature=3.0,
        live=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of a run's loss, of one method or of several joined by '+'."""

    gamma: float
    """weight of the hard-label cross-entropy"""
    alpha: float
    """weight of the soft-label divergence"""
    temperature: float
    parts: Mapping[str, float]
    """method -> weight of its own term; 0 without one"""
    mix_label: str
    """hard label of a mixed point: 'keep' or 'mix'"""
    smoothing: float
    """of hard labels"""

    def __post_init__(self) -> None:
        require_known("mix_label", self.mix_label, ("keep", "mix"))

    @property
    def terms(self) -> dict[str, float]:
        """Method -> weight, of methods with a term of their own."""
        return {name: weight for name, weight in self.parts.items() if METHODS[name].term is not None}


def named(method: str) -> dict[str, float | None]:
    """Return method -> weight, or None if not given, from a text such as `kd` or `kd*0.5+at`.

    Raises SettingsError if a method is unknown or given twice, or its weight is invalid or cannot be changed.
    """
    found: dict[str, float | None] = {}
    for text in method.split("+"):
        name, star, weight = (part.strip() for part in text.partition("*"))
        if name not in METHODS:
            raise SettingsError(
                f"unknown method '{name}'; {nearest(name, list(METHODS))}, or several such as kd+at or kd*0.5+at*1000"
            )
        if name in found:
            raise SettingsError(f"method '{method}' names '{name}' twice")
        found[name] = _weight(weight, name, method) if star else None
    return found


def _weight(text: str, name: str, method: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise SettingsError(f"method '{method}': the weight of {name} should be a number of at least 0, found '{text}'")
    if METHODS[name].term is None and name != "kd":
        raise SettingsError(f"method '{method}': {name} has no term of its own to weigh; --gamma weighs the labels")
    return value


def weights_of(settings: MethodSettings, smoothing: float = 0.0) -> Weights:
    """Return the weights of the methods in the settings: those given, or else their authors'.

    One method has its own weights. Several have gamma = 1, alpha = 1 if kd is among them, and each its own beta
    (RepDistiller's combinations, such as crd+kd); `A*w` gives method A the weight w. Raises SettingsError if beta is
    given for several terms.
    """
    given = named(settings.method)
    chosen = {name: METHODS[name] for name in given}
    parts = {name: _or(given[name], method.beta) if method.term else 0.0 for name, method in chosen.items()}
    if settings.beta is not None:
        terms = [name for name, method in chosen.items() if method.term]
        if len(terms) != 1:
            raise SettingsError(
                f"--beta is the weight of one method's own term, '{settings.method}' has {len(terms)}; "
                "write the weights into the method: kd+at*1000+pkt*30000"
            )
        parts[terms[0]] = settings.beta
    gamma, alpha = 1.0, _or(given["kd"], 1.0) if "kd" in given else 0.0
    if [*given.values()] == [None]:
        (only,) = chosen.values()
        gamma, alpha = only.gamma, only.alpha
    temperatures = [method.temperature for name, method in chosen.items() if name != "ce"]
    return Weights(
        gamma=_or(settings.gamma, gamma),
        alpha=_or(settings.alpha, alpha),
        temperature=_or(settings.temperature, temperatures[0] if temperatures else 1.0),
        parts=parts,
        mix_label=settings.mix_label,
        smoothing=smoothing,
    )


def _or(given: float | None, usual: float) -> float:
    return usual if given is None else given


def recipe(method: str, student: str) -> dict[str, Any]:
    """Return the training settings of the authors of one or several methods for a student."""
    light = student in LIGHT_STUDENTS
    found: dict[str, Any] = dict(LIGHT_RECIPE) if light else {}
    for name in named(method):
        found |= METHODS[name].recipe
        found |= METHODS[name].light if light else {}
    return found
