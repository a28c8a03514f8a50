"""An exported condensed set opened for training: its manifest, and its rows under the indices of the whole data set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt64

from kcdcache import audit, exported, ledger, manifest, store
from kcdcache import partial as images
from kcdcache.config import TrainSettings
from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, SettingsError
from kcdcache.exported import Record, Samples
from kcdcache.identity import read_store_identity, require_same
from kcdcache.ledger import Commit
from kcdcache.manifest import Manifest
from kcdcache.methods import Choice

HELD = "the store in an exported set"


class Excerpt(store.Store):
    """The knowledge of a condensed set's samples, under their indices in the whole data set.

    It is a `Store` of all N samples that holds rows of some; asking for another one is an error. Of samples in `blank`,
    whose targets were baked, it gives NaN: nothing may use their own.
    """

    def __init__(self, record: Record, samples: Samples, commits: Sequence[Commit], blank: np.ndarray) -> None:
        super().__init__(record.place(exported.STORE), record.knowledge, commits)
        self.skipped = np.array(record.content.skipped, np.int64)
        self._samples, self._blank = samples, blank

    @property
    def count(self) -> int:
        """Number of samples N of the whole data set."""
        return len(self._samples.row)

    @property
    def labels(self) -> Int64[np.ndarray, " n"]:
        """The class of every sample of the whole data set."""
        return self._samples.label

    @property
    def sample_digest(self) -> UInt64[np.ndarray, " n"]:
        """A digest of every sample's bytes and label, of the whole data set."""
        return self._samples.digest

    @property
    def held(self) -> Int64[np.ndarray, " rows"]:
        """The samples it has rows of, ascending: row j of its arrays is of sample held[j]."""
        return np.flatnonzero(self._samples.row >= 0)

    def load(
        self,
        view: int,
        rows: Int64[np.ndarray, " rows"],
        fields: Sequence[str],
        threads: int = 2,
        allocate: Callable[..., np.ndarray] = np.empty,
    ) -> dict[str, np.ndarray]:
        """Return array name -> still encoded rows (rows, ...) of a view, as `Store.load` does.

        Raises:
            MismatchError: the set holds nothing of a sample; names it.
            SettingsError, CorruptionError: as for `Store.load`.
        """
        self._require_rows(view, rows, fields)
        there = self._samples.row[rows] >= 0
        if there.all() or not self._blank[rows[~there]].all():
            return super().load(view, rows, fields, threads, allocate)
        found = super().load(view, rows[there], fields, threads)
        whole = {name: allocate((len(rows), *values.shape[1:]), values.dtype) for name, values in found.items()}
        for name, values in found.items():
            whole[name][there] = values
            whole[name][~there] = np.nan
        return whole

    def _places(self, rows: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " places"]:
        places = self._samples.row[rows]
        if len(missing := rows[(places < 0) & ~self._blank[rows]]):
            raise MismatchError(
                f"{self.path} holds nothing of sample {missing[0]}: an exported set has the {len(self.held)} of "
                f"{self.count} samples that its own manifest keeps or mixes in; give the whole store for others"
            )
        return places[places >= 0]


@dataclass(frozen=True, kw_only=True)
class Condensed:
    """An exported condensed set, ready to train from."""

    record: Record
    manifest: Manifest
    knowledge: Excerpt
    mixes: Path | None
    """the store of its baked targets, None where both points of a mix keep their own knowledge"""


def open(path: Path | str) -> Condensed:
    """Return an exported set after checking its records, manifest and samples; chunks are checked when they are read.

    Raises:
        NotFoundError, UnfinishedError: there is no exported set, or its export was cut short.
        CorruptionError: a file is not what was exported.
        MismatchError: it was written by a newer format, or its parts were not made for each other.
        UnsafeError: a file is none of ours and is not read.
    """
    record = exported.read(Path(path))
    samples = exported.read_samples(record)
    chosen = _manifest(record)
    baked = record.content.baked
    blank = np.zeros(len(samples.row), np.bool_)
    if baked is not None:
        blank[chosen.index[chosen.mixed]] = True
    knowledge = Excerpt(record, samples, _commits(record), blank)
    _require_optional(record)
    store.check(knowledge)
    _require_held(knowledge, chosen, baked is not None)
    mixes = None if baked is None else record.place(exported.MIXES)
    if mixes is not None:
        _require_mixes(record, chosen, store.open(mixes))
    return Condensed(record=record, manifest=chosen, knowledge=knowledge, mixes=mixes)


def require_served(opened: Condensed, settings: TrainSettings, choice: Choice) -> None:
    """Do nothing if a run may learn from an exported set's baked targets.

    Raises:
        SettingsError: it asks for another temperature or another mix, condenses further, or reads more than softened
            outputs; says what the set serves.
    """
    baked = opened.record.content.baked
    assert baked is not None
    if choice.weights.alpha == 0 and not choice.terms:
        return  # it reads nothing of the teacher
    asked = {
        "temperature": (choice.weights.temperature, baked.temperature),
        "mix-target": (settings.mix_target, baked.target),
        "mix": (settings.mix, baked.mix),
        "stages": (settings.stages, 1),
    }
    for name, (wanted, made) in asked.items():
        if wanted != made:
            raise SettingsError(
                f"the targets in {opened.record.path} are baked for --{name} {made}, the run asks for {wanted}; give "
                f"--{name} {made}, or a set exported without --bake, which serves any"
            )
    if choice.terms:
        raise SettingsError(
            f"the targets in {opened.record.path} are baked: they serve methods that read softened outputs alone (kd), "
            f"'{settings.method}' reads more; use a set exported without --bake"
        )


def problems(path: Path, share: float = 1.0, seed: int = 0) -> list[str]:
    """Return all that is wrong with an exported set: every file, and a share of its stores' chunks, are read.

    Raises:
        NotFoundError, UnfinishedError, CorruptionError, MismatchError: its record cannot be read.
    """
    record = exported.read(path)
    found = [problem for name in record.content.files if (problem := exported.problem_of(record, name))]
    for part in (exported.STORE, exported.MIXES) if record.content.baked else (exported.STORE,):
        found += _attempt(partial(_damage, path / part, share, seed))
    return found or _attempt(partial(_disagreements, path))


def _attempt(look: Callable[[], list[str]]) -> list[str]:
    try:
        return look()
    except KcdcacheError as error:
        return [str(error)]


def _damage(path: Path, share: float, seed: int) -> list[str]:
    return list(audit.verify(path, share=share, seed=seed).problems)


def _disagreements(path: Path) -> list[str]:
    """Return where the store inside, or the images, are not those of the table of samples."""
    opened = open(path)
    inside, held = store.open(opened.knowledge.path), opened.knowledge.held
    found = [
        f"{inside.path}: its {name} are not those in {exported.SAMPLES}; export it again"
        for name in ("labels", "sample_digest")
        if not np.array_equal(getattr(inside, name), getattr(opened.knowledge, name)[held])
    ]
    if opened.record.content.images is not None and not found:
        images.load(path)
    return found


def _manifest(record: Record) -> Manifest:
    """Return the manifest of the record, made for its knowledge."""
    exported.require_file(record, exported.MANIFEST)
    path = record.place(exported.MANIFEST)
    chosen = manifest.read(path, record.knowledge.data.count)
    if chosen.digest != record.content.manifest:
        raise CorruptionError(f"{path} holds manifest {chosen.digest}, exported was {record.content.manifest}")
    manifest.require_knowledge(chosen, record.content.knowledge_id)
    if chosen.count != record.knowledge.data.count:
        raise CorruptionError(f"{path} counts {chosen.count} samples, its data {record.knowledge.data.count}")
    return chosen


def _commits(record: Record) -> list[Commit]:
    """Return the commits of the store inside, after comparing its identity and seal with the record."""
    exported.require_file(record, exported.SEALS[exported.STORE])
    root = record.place(exported.STORE)
    commits = ledger.read_commits(root)
    subset = {"manifest": record.content.manifest, "rows": record.content.rows}
    expected = replace(record.knowledge, subset=subset).document()
    names = (f"the record of {record.path}", HELD)
    require_same(expected, read_store_identity(root).document(), names, "export it again")
    if len(commits) != 1 or commits[0].plan != record.content.layout:
        raise CorruptionError(f"{root} has another plan than {exported.RECORD} says; export it again")
    return commits


def _require_optional(record: Record) -> None:
    """Compare the records of the store inside that a set may do without with what was exported."""
    for name in exported.OPTIONAL:
        if name in record.content.files:
            exported.require_file(record, name)
        elif record.place(name).exists():
            raise CorruptionError(f"{record.place(name)} was not exported with the rest; delete it")


def _require_held(knowledge: Excerpt, chosen: Manifest, baked: bool) -> None:
    """Compare the rows of the store with the samples that are said to have one, and those with the manifest's."""
    held, plan = knowledge.held, knowledge.plan
    if len(held) != plan.count:
        raise CorruptionError(f"{knowledge.path} has {plan.count} rows, {exported.SAMPLES} names {len(held)}")
    needed = chosen.index[~chosen.mixed] if baked else np.union1d(chosen.index, chosen.partner[chosen.mixed])
    if len(missing := np.setdiff1d(needed, held)):
        raise CorruptionError(f"{knowledge.path} holds no row of sample {missing[0]}, which its manifest needs")
    manifest.require_usable(chosen, knowledge.skipped)


def _require_mixes(record: Record, chosen: Manifest, mixes: store.Store) -> None:
    """Compare the store of baked targets with the record."""
    exported.require_file(record, exported.SEALS[exported.MIXES])
    baked = record.content.baked
    assert baked is not None
    expected = replace(record.knowledge, mixes=mixes_of(chosen, baked, record.content.views)).document()
    names = (f"the record of {record.path}", "its store of baked targets")
    require_same(expected, mixes.knowledge.document(), names, "export it again")
    if (mixes.count, mixes.views) != (int(chosen.mixed.sum()), record.content.views):
        raise CorruptionError(f"{mixes.path} has {mixes.count} rows in {mixes.views} views; export it again")


def mixes_of(chosen: Manifest, baked: exported.Baked, views: int) -> dict[str, object]:
    """Return what identifies the baked targets of a manifest: those of a requery, and how they were made."""
    how = {"temperature": baked.temperature, "target": baked.target}
    return {"manifest": chosen.digest, "mix": baked.mix, "views": list(range(views)), "baked": how}
