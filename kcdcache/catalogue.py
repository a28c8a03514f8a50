"""The distillation methods: METHODS maps a name to its term of the loss, default weights and what its authors did."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kcdcache.terms.adaptive import Adaptive
from kcdcache.terms.attention import Attention
from kcdcache.terms.base import Pair, Term
from kcdcache.terms.boundary import BoundarySupport
from kcdcache.terms.contrast import Contrast
from kcdcache.terms.decoupled import Decoupled
from kcdcache.terms.ensemble import Ensemble
from kcdcache.terms.flow import Flow
from kcdcache.terms.hint import Hint
from kcdcache.terms.mutual import MutualLearning
from kcdcache.terms.parameters import FilterStatistics, PooledDistributions
from kcdcache.terms.relational import Probabilistic, Relational
from kcdcache.terms.review import Review
from kcdcache.terms.selfsupervision import SelfSupervision
from kcdcache.terms.similarity import Similarity
from kcdcache.terms.variational import Variational
from kcdcache.terms.wasserstein import WassersteinContrast

LIGHT_STUDENTS = ("MobileNetV2", "ShuffleV1", "ShuffleV2")
"""students that the methods' authors train with a lower learning rate"""


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
    light: Mapping[str, Any] = field(default_factory=dict)
    """what its authors changed further for LIGHT_STUDENTS, if it is not LIGHT_RECIPE"""
    live: bool = False
    """whether it trains further networks with the student, so that no store can replace its forward passes"""


LIGHT_RECIPE: Mapping[str, Any] = {"learning_rate": 0.01}
"""what RepDistiller and the releases after it change for LIGHT_STUDENTS (0.05 for all others)"""

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
        term=Attention,
        beta=1000.0,
    ),
    "fitnet": Method(
        about="the teacher's map in the middle, regressed",
        source="Romero et al., ICLR 2015 (arXiv 1412.6550); weight and regressor of RepDistiller",
        term=Hint,
        beta=100.0,
    ),
    "sp": Method(
        about="similarities between the last maps of a batch",
        source="Tung & Mori, ICCV 2019 (arXiv 1907.09682); weight of RepDistiller",
        term=Similarity,
        beta=3000.0,
    ),
    "vid": Method(
        about="variational information between the maps of every stage",
        source="Ahn et al., CVPR 2019 (arXiv 1904.05835); weight of RepDistiller",
        term=Variational,
        beta=1.0,
    ),
    "rkd": Method(
        about="distances and angles within a batch",
        source="Park et al., CVPR 2019 (arXiv 1904.05068); weights of RepDistiller",
        term=Relational,
        beta=1.0,
    ),
    "pkt": Method(
        about="probabilities of being neighbours within a batch",
        source="Passalis & Tefas, ECCV 2018 (arXiv 1803.10837); weight of RepDistiller",
        term=Probabilistic,
        beta=30000.0,
    ),
    "fsp": Method(
        about="flow matrices of consecutive stages, taught alone before the labels",
        source="Yim et al., CVPR 2017 (A Gift from Knowledge Distillation); phases of RepDistiller",
        term=Flow,
        beta=1.0,
    ),
    "reviewkd": Method(
        about="fused features of all stages against maps before their activation",
        source="Chen et al., CVPR 2021 (arXiv 2104.09044); weight, warm-up and recipe of its CIFAR-100 code",
        term=Review,
        beta=5.0,
        recipe={"learning_rate": 0.1, "batch_size": 128, "nesterov": True},
        light={"learning_rate": 0.02},
    ),
    "crd": Method(
        about="contrast of embeddings with those of other classes, over a memory of all samples",
        source="Tian et al., ICLR 2020 (arXiv 1910.10699); weight of RepDistiller",
        term=Contrast,
        beta=0.8,
    ),
    "wcord": Method(
        about="contrast through a 1-Lipschitz critic, and optimal transport between batches",
        source="Chen et al., CVPR 2021 (arXiv 2012.08674); critic and transport plan are our reading",
        term=WassersteinContrast,
        beta=1.0,
    ),
    "sskd": Method(
        about="classes and similarities of rotated images, beside softened outputs",
        source="Xu et al., ECCV 2020 (arXiv 2006.07114); its release, whose views are cropped and not flipped",
        term=SelfSupervision,
        gamma=0.1,
        alpha=0.9,
        beta=1.0,
    ),
    "bss": Method(
        about="softened outputs, also on adversarial images beside the decision boundary",
        source="Heo et al., AAAI 2019 (arXiv 1805.05532); its release",
        term=BoundarySupport,
        beta=1.0,
        temperature=3.0,
    ),
    "dkd": Method(
        about="softened outputs, target class and other classes weighed apart",
        source="Zhao et al., CVPR 2022 (arXiv 2203.08679); its release's default weights",
        term=Decoupled,
        beta=1.0,
    ),
    "eakd": Method(
        about="softened outputs, the more the less sure both networks are of a sample",
        source="Su et al., ICCV 2025 (arXiv 2311.13621); weights and temperatures of its release",
        term=Adaptive,
        gamma=0.1,
        beta=0.9,
    ),
    "kr": Method(
        about="distributions of the filters of every stage, recoded sparsely",
        source="our reading of Liu et al. 2019 (arXiv 1911.05329), of which no formula could be read",
        term=FilterStatistics,
        beta=1.0,
    ),
    "kr_activations": Method(
        about="distributions of the pooled channels of every stage, recoded sparsely",
        source="our reading of Liu et al. 2019 (arXiv 1911.05329), of which no formula could be read",
        term=PooledDistributions,
        beta=1.0,
    ),
    "dml": Method(
        about="a peer network that learns with the student, no teacher",
        source="Zhang et al., CVPR 2018 (arXiv 1706.00384)",
        term=MutualLearning,
        beta=1.0,
        temperature=1.0,
        live=True,
    ),
    "one": Method(
        about="two more branches of the student and their gated ensemble, no teacher",
        source="Lan et al., NeurIPS 2018 (arXiv 1806.04606)",
        term=Ensemble,
        beta=1.0,
        temperature=3.0,
        live=True,
    ),
}
