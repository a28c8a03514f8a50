"""Which points of a condensed set an epoch visits, and with what weight: each scheme a pure function."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from kcdcache import rng
from kcdcache.condense.manifest import Manifest
from kcdcache.condense.values import Values
from kcdcache.errors import SettingsError
from kcdcache.settings import SamplingSettings, nearest


@dataclass(frozen=True, kw_only=True, eq=False)
class Draw:
    """The points of one epoch, in order."""

    index: Int64[np.ndarray, " n"]
    partner: Int64[np.ndarray, " n"]
    """sample that is mixed in, -1 where none is"""
    epsilon: Float32[np.ndarray, " n"]
    """the partner's share in [0, 1]"""
    weight: Float32[np.ndarray, " n"]
    """factor of the loss, above 0"""

    def part(self, chosen: Int64[np.ndarray, " some"] | slice) -> "Draw":
        """Return some of the points, in the order given."""
        return Draw(**{name: column[chosen] for name, column in vars(self).items()})

    def visited(self) -> Int64[np.ndarray, " some"]:
        """Return the samples visited, ascending."""
        return np.sort(self.index)

    def samples(self) -> Int64[np.ndarray, " some"]:
        """Return the samples visited or mixed in, ascending, each once."""
        return np.union1d(self.index, self.partner[self.partner >= 0])

    def mixed(self) -> Int64[np.ndarray, " some"]:
        """Return the samples that another one is mixed into, ascending."""
        return np.sort(self.index[self.partner >= 0])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a scheme draws from."""

    manifest: Manifest
    values: Values | None
    """what is known of each sample at the epoch's start; None where the scheme does not ask"""
    settings: SamplingSettings
    seed: int
    epoch: int
    epochs: int
    """of the whole run"""
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A way of sampling."""

    about: str
    """the idea in a few words"""
    source: str
    draw: Callable[[Plan], Draw]
    values: bool = False
    """whether it asks for the values at the epoch's start"""
    mixes: bool = False
    """whether it mixes points itself, so that it takes only sets without K_Aug"""
    partial: bool = False
    """whether an epoch visits only `sample_share` of the set"""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A scheme at work on one manifest."""

    manifest: Manifest
    settings: SamplingSettings
    seed: int
    epochs: int
    batch_size: int
    started: Callable[[], Values | None] = lambda: None
    """gives the values at the current epoch's start, for schemes that ask for them"""

    def __post_init__(self) -> None:
        if self.mixes and self.manifest.mixed.any():
            raise SettingsError(
                f"sampling '{self.settings.sampling}' mixes points itself, and {int(self.manifest.mixed.sum())} points "
                "of this condensed set are mixed already; condense with --no-augment-kept, or take another sampling"
            )

    @property
    def mixes(self) -> bool:
        """Whether the scheme mixes points itself."""
        return scheme_named(self.settings.sampling).mixes

    def ahead(self, epoch: int) -> Draw | None:
        """Return the points of an epoch to come, None where they depend on values to be recorded until then."""
        return None if scheme_named(self.settings.sampling).values else self.draw(epoch)

    def draw(self, epoch: int) -> Draw:
        """Return the points that an epoch visits: a pure function of what the sampler holds and of the values."""
        plan = Plan(
            manifest=self.manifest, values=self.started(), settings=self.settings, seed=self.seed, epoch=epoch,
            epochs=self.epochs, batch_size=self.batch_size,
        )  # fmt: skip
        return scheme_named(self.settings.sampling).draw(plan)


def scheme_named(name: str) -> Scheme:
    """Return the scheme of that name.

    Raises:
        SettingsError: there is none; names the nearest.
    """
    if name not in SAMPLING:
        raise SettingsError(f"unknown sampling '{name}'; {nearest(name, list(SAMPLING))}")
    return SAMPLING[name]


def everything(manifest: Manifest, seed: int, epoch: int) -> Draw:
    """Return every point of a manifest in the epoch's order.

    The order is the kept indices sorted by Philox(seed, epoch, index): a subset keeps the full set's relative order.
    """
    return _of(manifest, rng.epoch_order(seed, epoch, manifest.index))


def _all(plan: Plan) -> Draw:
    return everything(plan.manifest, plan.seed, plan.epoch)


def _random_per_epoch(plan: Plan) -> Draw:
    """RS2: a new random subset every epoch, without repetition inside one.

    Source: Okanovic et al., Repeated Random Sampling for Minimizing the Time-to-Accuracy of Learning, ICLR 2024.
    """
    order = rng.epoch_order(plan.seed, plan.epoch, plan.manifest.index)
    return _of(plan.manifest, order[: _share(plan, len(order))])


def _random_fixed(plan: Plan) -> Draw:
    """Return one random subset of the whole run, in every epoch's own order: static pruning at random."""
    index = plan.manifest.index
    chosen = _by_word(plan.seed, index, 0)[: _share(plan, len(index))]
    return _of(plan.manifest, rng.epoch_order(plan.seed, plan.epoch, np.sort(chosen)))


def _infobatch(plan: Plan) -> Draw:
    """Drop each sample whose value is below the mean with probability r; those of them that stay weigh 1 / (1 - r).

    The expected loss is that of all samples. Samples without a value stay; the last (1 - prune_until) of the epochs
    visit everything. Values are what the run records: the last loss of each sample unless set otherwise.

    Source: Qin et al., InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning, ICLR 2024, Eq. 3 and 5.
    """
    whole = _all(plan)
    if plan.epoch >= plan.settings.prune_until * plan.epochs:
        return whole
    assert plan.values is not None
    low = _below_mean(plan.values, whole.index)
    word, *_ = rng.words(plan.seed, whole.index, rng.SAMPLE, view=plan.epoch)
    dropped = low & (np.asarray(rng.unit(word)) < plan.settings.prune_probability)
    weight = np.where(low, 1 / (1 - plan.settings.prune_probability), 1.0).astype(np.float32) * whole.weight
    kept = ~dropped
    return Draw(
        index=whole.index[kept], partner=whole.partner[kept], epsilon=whole.epsilon[kept], weight=weight[kept]
    )  # fmt: skip


def _unix(plan: Plan) -> Draw:
    """Of each pool of samples keep the most uncertain, the less certain the clearer, mixed with others of the pool.

    A pool holds batch_size / sample_share samples, of which batch_size are visited. With r = 0, 1, ... the place by
    value, highest first, P the pool's size, b = unix_clear P and l ~ U(0, 1) per pool, the share of the partner (a
    random sample of the pool, each at most once) is l / (1 + exp(-w (r / P - (2b - 1) / 2P))).

    An approximation: the order is that of the values recorded so far and not of a further forward pass, and the mixes'
    targets are those of mix_target, by default mixed cached ones, where UNIX runs the teacher on the mixes.
    Source: Xu et al., Computation-Efficient Knowledge Distillation via Uncertainty-Aware Mixup (arXiv 2012.09413) and
    its release, whose values are batch_size 48, share 0.75, unix_clear 0.5, w = 10.
    """
    assert plan.values is not None
    whole = _all(plan)
    pool = max(1, round(plan.batch_size / plan.settings.sample_share))
    parts = [
        _pool(plan, whole.index[low : low + pool], number)
        for number, low in enumerate(range(0, len(whole.index), pool))
    ]
    index, partner, share = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    epsilon = share.astype(np.float32)
    own = index == partner  # mixed with itself is unmixed
    partner, epsilon = np.where(own, -1, partner), np.where(own, np.float32(0), epsilon)
    return Draw(index=index, partner=partner, epsilon=epsilon, weight=np.ones(len(index), np.float32))


def _pool(
    plan: Plan, index: Int64[np.ndarray, " pool"], number: int
) -> tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"], Float64[np.ndarray, " k"]]:
    """Return a pool's visited samples, their partners and the partners' shares."""
    assert plan.values is not None
    size, settings = len(index), plan.settings
    value = np.where(plan.values.visits[index] > 0, plan.values.value[index], np.inf)
    ranked = index[np.argsort(-value, kind="stable")]
    clear = 2 * settings.unix_clear * size - 1
    place = np.arange(size) / size - clear / (2 * size)
    word, *_ = rng.words(plan.seed, number, rng.SAMPLE, view=plan.epoch, draw=1)
    share = float(rng.unit(int(word))) / (1 + np.exp(-settings.unix_slope * place))
    kept = max(1, round(size * settings.sample_share))
    partner = _by_word(plan.seed, np.sort(index), plan.epoch + 1)
    return ranked[:kept], partner[:kept], share[:kept]


SAMPLING: Mapping[str, Scheme] = {
    "all": Scheme(about="every point of the set", source="-", draw=_all),
    "random_per_epoch": Scheme(
        about="a new random share in every epoch (RS2)",
        source="Okanovic et al., ICLR 2024 (arXiv 2305.18424)",
        draw=_random_per_epoch,
        partial=True,
    ),
    "random_fixed": Scheme(
        about="one random share for the whole run", source="static random pruning", draw=_random_fixed, partial=True
    ),
    "infobatch": Scheme(
        about="half of what is below the mean loss is left out, the rest of it weighs double",
        source="Qin et al., ICLR 2024 (arXiv 2303.04947)",
        draw=_infobatch,
        values=True,
    ),
    "unix": Scheme(
        about="the most uncertain of each pool, the surer ones mixed with others (on cached outputs: approximate)",
        source="Xu et al. 2020 (arXiv 2012.09413)",
        draw=_unix,
        values=True,
        mixes=True,
        partial=True,
    ),
}
"""name -> how it chooses an epoch's points"""


def _of(manifest: Manifest, order: Int64[np.ndarray, " n"]) -> Draw:
    row = np.searchsorted(manifest.index, order)
    return Draw(
        index=order, partner=manifest.partner[row], epsilon=manifest.epsilon[row], weight=manifest.weight[row]
    )  # fmt: skip


def _share(plan: Plan, count: int) -> int:
    size = int(plan.settings.sample_share * count)
    if size < 1:
        raise SettingsError(
            f"sample_share {plan.settings.sample_share} of {count} samples visits none; raise it to at least "
            f"{1 / count:g}"
        )
    return size


def _by_word(seed: int, index: Int64[np.ndarray, " n"], draw: int) -> Int64[np.ndarray, " n"]:
    """Return ascending indices in a random order that is not any epoch's."""
    high, low, *_ = rng.words(seed, index, rng.SAMPLE, view=draw, draw=2)
    return index[np.lexsort((np.asarray(low), np.asarray(high)))]


def _below_mean(values: Values, index: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    seen = values.visits[index] > 0
    if not seen.any():
        return seen
    value = values.value[index].astype(np.float64)
    return seen & (value < value[seen].mean())
