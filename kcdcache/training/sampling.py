"""Sampling schemes: which points of a condensed set an epoch visits, and with what weight."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from kcdcache import rng
from kcdcache.condensation.manifest import Manifest
from kcdcache.condensation.values import Values
from kcdcache.errors import SettingsError
from kcdcache.settings import OptimizerSettings, SamplingSettings
from kcdcache.training.processes import LEAST

P = TypeVar("P", bound="Points")


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """The points of an epoch in order."""

    index: Int64[np.ndarray, " n"]
    partner: Int64[np.ndarray, " n"]
    """sample that is mixed in, or -1"""
    epsilon: Float32[np.ndarray, " n"]
    """the partner's share in [0, 1]"""
    weight: Float32[np.ndarray, " n"]
    """factor of the loss, above 0"""

    def __len__(self) -> int:
        return len(self.index)

    def part(self: P, chosen: Int64[np.ndarray, " some"] | Bool[np.ndarray, " n"] | slice) -> P:
        """Return some of the points in the given order."""
        return type(self)(**{name: column[chosen] for name, column in vars(self).items()})

    def mixed(self) -> Int64[np.ndarray, " some"]:
        """Return the samples with a partner, ascending."""
        return np.sort(self.index[self.partner >= 0])


ALL = SamplingSettings()


def _nothing() -> None:
    """Return no values."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A scheme, and what it chooses an epoch's points from."""

    manifest: Manifest
    optimizer: OptimizerSettings
    """seed, epochs and batch size of the run"""
    settings: SamplingSettings = ALL
    started: Callable[[], Values | None] = _nothing
    """returns the values at the current epoch's start, for schemes that use them"""
    least: int = LEAST
    """points that an epoch visits at least"""

    def __post_init__(self) -> None:
        if self.scheme.mixes and self.manifest.mixed.any():
            raise SettingsError(
                f"sampling '{self.settings.sampling}' mixes points itself, and {int(self.manifest.mixed.sum())} points "
                "of this condensed set are mixed already; condense with --no-augment-kept, or take another sampling"
            )

    @property
    def scheme(self) -> "Scheme":
        """The scheme in the settings."""
        return SAMPLING[self.settings.sampling]

    @property
    def mixes(self) -> bool:
        """Whether an epoch may have mixed points."""
        return self.scheme.mixes or bool(self.manifest.mixed.any())

    def known(self, index: Int64[np.ndarray, " n"]) -> tuple[Bool[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
        """Return which samples have a value at the current epoch's start, and the values."""
        found = self.started()
        assert found is not None, "the record notes where each epoch starts"
        return found.visits[index] > 0, found.value[index].astype(np.float64)

    def points(self, epoch: int) -> Points:
        """Return the points of an epoch, a pure function of the sampler and the values."""
        return self.scheme.points(self, epoch)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A sampling scheme."""

    about: str
    """the idea in a few words"""
    source: str
    points: Callable[[Sampler, int], Points]
    """(sampler, epoch) -> points of the epoch"""
    values: bool = False
    """whether it uses the values at the epoch's start"""
    mixes: bool = False
    """whether it mixes points itself, so that it accepts only sets without K_Aug"""
    partial: bool = False
    """whether an epoch visits only `sample_share` of the set"""
    visits: Callable[[SamplingSettings, int, int], int] = lambda settings, batch_size, count: count
    """(settings, batch size, size of the set) -> points of an epoch, at most"""


def require_enough(settings: SamplingSettings, batch_size: int, count: int, world: int = 1) -> None:
    """Raise SettingsError if an epoch over a set of `count` samples has fewer than two for a process."""
    visited, needed = SAMPLING[settings.sampling].visits(settings, batch_size, count), LEAST * world
    if visited >= needed:
        return
    share = f", of which sampling '{settings.sampling}' visits {visited} in an epoch" if visited < count else ""
    each = f" for each of {world} processes" if world > 1 else ""
    raise SettingsError(
        f"a set of {count} sample{'s' if count != 1 else ''} to train on{share}: batch statistics need at least "
        f"{LEAST}{each}; train on more samples{' (--sample-share)' if share else ' (--keep, or more data)'}"
        f"{', or start fewer processes' if each else ''}"
    )


def everything(sampler: Sampler, epoch: int) -> Points:
    """Return all points of the set, sorted by Philox(seed, epoch, index): a subset keeps the full set's order."""
    return _ordered(sampler, epoch, sampler.manifest.index)


def _random_per_epoch(sampler: Sampler, epoch: int) -> Points:
    """RS2: a new random subset in every epoch, without repetition within an epoch (Okanovic et al., ICLR 2024)."""
    return everything(sampler, epoch).part(slice(_share(sampler)))


def _random_fixed(sampler: Sampler, epoch: int) -> Points:
    """Static random pruning: one random subset for the whole run, in each epoch's order."""
    chosen = _by_word(sampler.optimizer.seed, sampler.manifest.index, 0)[: _share(sampler)]
    return _ordered(sampler, epoch, np.sort(chosen))


def _infobatch(sampler: Sampler, epoch: int) -> Points:
    """Drop each sample whose value is below the mean with probability r; the others below the mean get 1 / (1 - r).

    The expected loss is that of all samples. Samples without a value stay; the last (1 - prune_until) of the epochs,
    and any that would visit fewer than `least` points, visit everything. Source: Qin et al., InfoBatch, ICLR 2024,
    Eq. 3 and 5.
    """
    whole, settings = everything(sampler, epoch), sampler.settings
    if epoch >= settings.prune_until * sampler.optimizer.epochs:
        return whole
    known, value = sampler.known(whole.index)
    low = known & (value < value[known].mean()) if known.any() else known
    word, *_ = rng.words(sampler.optimizer.seed, whole.index, rng.SAMPLE, view=epoch)
    dropped = low & (np.asarray(rng.unit(word)) < settings.prune_probability)
    if len(whole) - dropped.sum() < sampler.least:
        return whole
    weight = np.where(low, 1 / (1 - settings.prune_probability), 1.0).astype(np.float32) * whole.weight
    return replace(whole, weight=weight).part(~dropped)


def _unix(sampler: Sampler, epoch: int) -> Points:
    """Keep the most uncertain samples of each pool, and mix others of the pool into them, the less the less certain.

    A pool has batch_size / sample_share samples, of which batch_size are visited. With r = 0, 1, ... the rank by value,
    highest first, P the pool's size, b = unix_clear P and l ~ U(0, 1) per pool, the share of the partner (a random
    sample of the pool, each at most once) is l / (1 + exp(-w (r / P - (2b - 1) / 2P))).

    An approximation: ranks are by the recorded values, not by a further forward pass, and the mixes' targets follow
    mix_target (by default mixed cached ones), while UNIX runs the teacher on the mixes. Source: Xu et al. (arXiv
    2012.09413) and its release, with batch_size 48, share 0.75, unix_clear 0.5, w = 10.
    """
    whole = everything(sampler, epoch).index
    known, value = sampler.known(whole)
    value = np.where(known, value, np.inf)
    size = _pool_size(sampler.settings, sampler.optimizer.batch_size)
    pools = [slice(low, low + size) for low in range(0, len(whole), size)]
    parts = [_mixed_pool(sampler, epoch, number, whole[pool], value[pool]) for number, pool in enumerate(pools)]
    index, partner, share = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    epsilon = share.astype(np.float32)
    own = index == partner  # mixed with itself is unmixed
    partner, epsilon = np.where(own, -1, partner), np.where(own, np.float32(0), epsilon)
    return Points(index=index, partner=partner, epsilon=epsilon, weight=np.ones(len(index), np.float32))


def _mixed_pool(
    sampler: Sampler, epoch: int, number: int, index: Int64[np.ndarray, " pool"], value: Float64[np.ndarray, " pool"]
) -> tuple[Int64[np.ndarray, " k"], Int64[np.ndarray, " k"], Float64[np.ndarray, " k"]]:
    """Return a pool's visited samples, their partners and the partners' shares."""
    size, settings, seed = len(index), sampler.settings, sampler.optimizer.seed
    ranked = index[np.argsort(-value, kind="stable")]
    clear = 2 * settings.unix_clear * size - 1
    place = np.arange(size) / size - clear / (2 * size)
    word, *_ = rng.words(seed, number, rng.SAMPLE, view=epoch, draw=1)
    share = float(rng.unit(int(word))) / (1 + np.exp(-settings.unix_slope * place))
    kept = _visited_of_pool(settings, size)
    partner = _by_word(seed, np.sort(index), epoch + 1)
    return ranked[:kept], partner[:kept], share[:kept]


def _pool_size(settings: SamplingSettings, batch_size: int) -> int:
    return max(1, round(batch_size / settings.sample_share))


def _visited_of_pool(settings: SamplingSettings, size: int) -> int:
    return max(1, round(size * settings.sample_share))


def _visited_of_pools(settings: SamplingSettings, batch_size: int, count: int) -> int:
    size = _pool_size(settings, batch_size)
    return sum(_visited_of_pool(settings, min(size, count - low)) for low in range(0, count, size))


def _visited_of_share(settings: SamplingSettings, batch_size: int, count: int) -> int:
    return int(settings.sample_share * count)


SAMPLING: Mapping[str, Scheme] = {
    "all": Scheme(about="every point of the set", source="-", points=everything),
    "random_per_epoch": Scheme(
        about="a new random share in every epoch (RS2)",
        source="Okanovic et al., ICLR 2024 (arXiv 2305.18424)",
        points=_random_per_epoch,
        partial=True,
        visits=_visited_of_share,
    ),
    "random_fixed": Scheme(
        about="one random share for the whole run",
        source="static random pruning",
        points=_random_fixed,
        partial=True,
        visits=_visited_of_share,
    ),
    "infobatch": Scheme(
        about="half of what is below the mean loss is left out, the rest of it weighs double",
        source="Qin et al., ICLR 2024 (arXiv 2303.04947)",
        points=_infobatch,
        values=True,
    ),
    "unix": Scheme(
        about="the most uncertain of each pool, the surer ones mixed with others (on cached outputs: approximate)",
        source="Xu et al. 2020 (arXiv 2012.09413)",
        points=_unix,
        values=True,
        mixes=True,
        partial=True,
        visits=_visited_of_pools,
    ),
}
"""name -> scheme"""


def _ordered(sampler: Sampler, epoch: int, index: Int64[np.ndarray, " n"]) -> Points:
    """Return the manifest's points of some samples in the epoch's order."""
    given, order = sampler.manifest, rng.epoch_order(sampler.optimizer.seed, epoch, index)
    row = np.searchsorted(given.index, order)
    return Points(index=order, partner=given.partner[row], epsilon=given.epsilon[row], weight=given.weight[row])


def _share(sampler: Sampler) -> int:
    """Return the number of points in an epoch."""
    share, count = sampler.settings.sample_share, len(sampler.manifest.index)
    if (found := _visited_of_share(sampler.settings, 0, count)) < 1:
        raise SettingsError(f"sample_share {share} of {count} samples visits none; raise it to at least {1 / count:g}")
    return found


def _by_word(seed: int, index: Int64[np.ndarray, " n"], draw: int) -> Int64[np.ndarray, " n"]:
    """Return ascending indices in a random order, independent of the epochs' orders."""
    high, low, *_ = rng.words(seed, index, rng.SAMPLE, view=draw, draw=2)
    return index[np.lexsort((np.asarray(low), np.asarray(high)))]
