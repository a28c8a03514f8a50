"""Write a store part by part, in one process or several that each write a share of the parts."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int64, UInt64

from kcdcache import environment
from kcdcache.errors import (
    CorruptionError,
    LockedError,
    NotFoundError,
    SettingsError,
    UnfinishedError,
    attempt,
    require_same,
)
from kcdcache.files import atomic, cloud
from kcdcache.files.atomic import lock, require_no_links, write_atomic
from kcdcache.files.records import canonical_json, sealed_json
from kcdcache.store import log
from kcdcache.store.chunks import listed_sizes, size_problem, write_chunks
from kcdcache.store.encoding import Encoding
from kcdcache.store.identity import (
    FOLDER,
    IDENTITY_FILE,
    ORIGIN_FILE,
    PARAMETERS_FILE,
    IdentityRecord,
    Knowledge,
    read_store_identity,
)
from kcdcache.store.log import LogEntry, Numbers, record_path
from kcdcache.store.plan import Part, StorePlan, documents, grow_plan, part_chunks, parts, plan_from

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Shard(NamedTuple):
    """Parts number, number + total, number + 2 total, ... of a store; by default all."""

    number: int = 0
    total: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


WHOLE = Shard()


def parse_shard(text: str) -> Shard:
    """Return the shard given as text such as `0/4`; raises SettingsError for other text.

    >>> parse_shard("1/4")
    Shard(number=1, total=4)
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    shard = Shard(int(match[1]), int(match[2])) if match else Shard(0, 0)
    if not shard.number < shard.total:
        raise SettingsError(f"--shard takes I/N with 0 <= I < N, such as 0/4 to 3/4; found {text!r}; or --shard auto")
    return shard


def shard_of(text: str | None, variables: Mapping[str, str] = os.environ) -> Shard:
    """Return the shard given as text, for `auto` this process's place under a launcher, for None under torchrun alone.

    Raises SettingsError for other text, for `auto` without a launcher, and if its variables name no place.

    >>> shard_of("auto", {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"})
    Shard(number=1, total=2)
    """
    if text is not None and text != "auto":
        return parse_shard(text)
    place = environment.torchrun_place(variables)
    if text is None and place == environment.ALONE:
        environment.note_unused(variables)
        _note_slurm(variables)
        return WHOLE
    if place == environment.ALONE:
        place = environment.slurm_place(variables)
    if place == environment.ALONE:
        raise SettingsError(
            "--shard auto takes the place that torchrun, srun or a SLURM array gives a process, and none did"
            f"{_BATCH if 'SLURM_PROCID' in variables else ''}; give --shard I/N, such as --shard 0/4, or leave it out "
            "to write the whole store"
        )
    logger.info("shard %d/%d, from %s", *place)
    return Shard(*place[:2])


_BATCH = " (SLURM_PROCID without SLURM_STEP_ID is that of the batch script itself: put srun before the command)"


def _note_slurm(variables: Mapping[str, str]) -> None:
    """Log that a step of srun or an array writes the whole store in each of its processes."""
    place = attempt(logger.debug, environment.slurm_place, variables)
    if place is not None and place.total > 1:
        logger.info(
            "note: the whole store is written here, although this is number %d of %d of %s; --shard auto writes its "
            "share only",
            *place,
        )


@contextmanager
def held(root: Path, begin: Callable[[bool], T], shard: Shard = WHOLE) -> Iterator[T]:
    """Hold the parts of one shard of a store for writing; yield the result of `begin`.

    `begin(alone)` is called while no other process begins or leaves; `alone` is whether nobody else writes the store.
    Whoever begins or leaves alone removes the leftovers of killed writers. The locks are files in the store. For a
    mirrored store they are in the cache, and an object protects it, or one shard, from other machines; a shard there
    never counts as alone, since another machine may begin at the same moment.

    Raises LockedError if another process or machine holds these parts or writes the store in another number of shards,
    UnsafeError if a folder in the store is a symbolic link, through which other files could be changed.
    """
    require_no_links(root, files=False)
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    door = cloud.lock_file(root / FOLDER / "lock")  # held while one process begins or leaves
    part = f"{shard.number}-{shard.total}"
    mine, what = door.with_name(f"lock.{part}"), str(root / FOLDER) if shard == WHOLE else f"shard {shard} of {root}"
    with ExitStack() as held_now:
        try:
            with lock(door, what, wait=True):
                alone = _require_apart(root, door, shard)
                held_now.enter_context(lock(mine, what))
                held_now.enter_context(cloud.owned(root, cloud.ALL if shard == WHOLE else part))
                (root / FOLDER).mkdir(parents=True, exist_ok=True)
                if alone:
                    atomic.remove_leftovers(root)
                begun = begin(alone and (shard == WHOLE or not cloud.is_mirrored(root)))
            yield begun
        finally:
            with lock(door, what, wait=True):
                held_now.close()
                if not _held_by_others(door):
                    atomic.remove_leftovers(root)
                    for path in door.parent.glob("lock.*"):
                        path.unlink()


def _held_by_others(door: Path) -> list[Path]:
    return [path for path in sorted(door.parent.glob("lock.*-*[0-9]")) if atomic.is_locked(path)]


def _require_apart(root: Path, door: Path, shard: Shard) -> bool:
    """Raise LockedError if another process holds some of the shard's parts; return whether none holds any."""
    others = _held_by_others(door)
    for path in others:
        total = int(path.name.rpartition("-")[2])
        if 1 in (total, shard.total):
            raise LockedError(f"{root / FOLDER} is being written by {atomic.holder(path)}; wait for it or stop it")
        if total != shard.total:
            raise LockedError(
                f"{root} is being written in another number of shards ({path.name}, by {atomic.holder(path)}), shard "
                f"{shard} would share parts with it; wait, or give the same number"
            )
    return not others


REFUSED = FOLDER / "refused"
"""marks a store whose first view the teacher failed on: other settings may begin it anew"""
REMEDY = "continue with the settings it was begun with, or write to another path"


class Writer:
    """One growth of a store, written by this process; made by `create` and `grow`."""

    def __init__(self, path: Path, plan: StorePlan, growth: int, before: StorePlan | None, shard: Shard = WHOLE):
        self.path = path
        self.shard = shard
        self.plan = plan
        self.growth = growth
        """0 while the store is created"""
        self.parts = tuple(parts(plan, before))
        """all parts of this growth"""
        self.mine = self.parts[shard.number :: shard.total]
        """those of the shard"""

    @property
    def sealed(self) -> bool:
        """Whether nothing is left to do."""
        return log.commit_path(self.path, self.growth).exists()

    def pending(self, parts: Sequence[Part] | None = None) -> list[Part]:
        """Return the parts (default: of this shard) that are not logged, or lack a file of the logged size."""
        if self.sealed:
            return []
        sizes = listed_sizes(self.path, self.plan)
        return [part for part in (self.mine if parts is None else parts) if not self._done(part, sizes)]

    def write_part(
        self,
        part: Part,
        rows: Mapping[str, np.ndarray],
        statistics: Mapping[str, Numbers],
        measurements: Numbers | None = None,
        skipped: Sequence[int] = (),
    ) -> None:
        """Write all rows of a part (array name -> encoded rows), then its log record; earlier ones are replaced.

        `skipped` are the samples of the part without usable outputs, ascending; they are never read. Raises
        SettingsError if the part or its arrays are not in the plan.
        """
        if part not in self.parts:
            raise SettingsError(f"{part} is not a part of the plan of {self.path}: {self.plan}")
        if set(rows) != (expected := {array.name for array in self.plan.arrays_of(part.fields)}):
            raise SettingsError(f"{part} needs the arrays {sorted(expected)}, found {sorted(rows)}")
        if strangers := [index for index in skipped if not part.start <= index < part.stop]:
            raise SettingsError(f"{part} holds no sample {strangers[0]} that could be skipped")
        if self.sealed:
            raise SettingsError(f"the store at {self.path} is sealed; grow it to add views or fields")
        self._write(part, rows, statistics=statistics, measurements=measurements or {}, skipped=tuple(skipped))

    def write_samples(self, labels: np.ndarray, sample_digest: np.ndarray) -> None:
        """Write labels and digests of all samples, unless they are logged."""
        if not self._done(None, listed_sizes(self.path, self.plan)):
            self._write(None, {"labels": labels, "sample_digest": sample_digest})

    def seal(self) -> None:
        """Write the commit that makes the growth readable, unless it is sealed already.

        Raises UnfinishedError if parts of any shard are pending, NonFiniteError if too many samples are skipped.
        """
        if self.sealed:
            return
        atomic.remove(self.path / REFUSED)
        if left := self.pending(self.parts):
            raise UnfinishedError(f"{len(left)} of {len(self.parts)} parts of {self.path} are not written yet")
        log.require_few_skipped(log.logged_skips(self.path), self.plan.count)
        names = [*([] if self.growth else [log.SAMPLES]), *(part.name for part in self.parts)]
        commit = log.commit_bytes(self.path, self.growth, names)
        try:
            atomic.create_exclusive(log.commit_path(self.path, self.growth), commit)
        except LockedError:
            if self.shard == WHOLE:
                raise  # several shards may finish together; any of them seals with the same bytes

    def refuse(self, view: int) -> None:
        """Leave a new store, of which only parts of this view are logged, to whoever comes with other settings."""
        logged = record_path(self.path, 0, "").parent.glob("v*.json")
        if not self.growth and all(path.name.startswith(f"v{view:05}-") for path in logged):
            write_atomic(self.path / REFUSED, b"")

    def seal_last(self) -> int:
        """Seal if all parts of all shards are written; return the number that are not."""
        cloud.refresh(self.path)  # with the parts from other machines
        left = len(self.pending(self.parts))
        if not left:
            self.seal()
        return left

    def _write(self, part: Part | None, rows: Mapping[str, np.ndarray], **described: Any) -> None:
        atomic.remove(self._record(part))
        log.write_record(self.path, write_rows(self.path, self.plan, self.growth, part, rows, **described))

    def _record(self, part: Part | None) -> Path:
        return record_path(self.path, self.growth, log.SAMPLES if part is None else part.name)

    def _done(self, part: Part | None, sizes: Mapping[str, int]) -> bool:
        try:
            record = log.read_record(self._record(part))
        except (NotFoundError, CorruptionError):
            return False
        files, chunks = {file.path: file for file in record.files}, part_chunks(self.plan, part)
        return not any(size_problem(self.plan, chunk, files.get(chunk.key), sizes.get(chunk.key)) for chunk in chunks)


@contextmanager
def create(
    path: Path | str,
    knowledge: Knowledge,
    plan: StorePlan,
    labels: Int64[np.ndarray, " n"],
    sample_digest: UInt64[np.ndarray, " n"],
    shard: Shard = WHOLE,
) -> Iterator[Writer]:
    """Yield the writer of a new store, or of the same store unfinished or sealed (then nothing is pending).

    Raises MismatchError for a store of other knowledge or plan, SettingsError if the folder is something else or the
    numbers of labels and digests are not N, LockedError if another process writes it, UnsafeError for symbolic links.
    """
    root = Path(path)
    if root.is_file() or (root.exists() and not (root / FOLDER).is_dir() and any(root.iterdir())):
        raise SettingsError(f"{root} is there already and is not a knowledge store; choose a new folder")
    require_no_links(root)
    count = knowledge.data.count if knowledge.whole else plan.count
    if not len(labels) == len(sample_digest) == plan.count == count:
        raise SettingsError(
            f"a store of {count} samples needs a plan, labels and digests for as many; found "
            f"{plan.count}, {len(labels)} and {len(sample_digest)}"
        )

    def begin(alone: bool) -> Writer:
        _begin(root, knowledge, plan, alone)
        writer = Writer(root, plan, 0, None, shard)
        if not writer.sealed:
            _prepare(root, plan, 0)
            writer.write_samples(labels, sample_digest)
        return writer

    with held(root, begin, shard) as writer:
        yield writer


def missing(root: Path, knowledge: Knowledge, plan: StorePlan, shard: Shard = WHOLE) -> list[Part]:
    """Return the shard's parts that would be pending if this plan's store were made or grown at `root`; writes nothing.

    Raises MismatchError if there is a store of other knowledge.
    """
    if _replaceable(root, knowledge, plan):
        return list(Writer(root, plan, 0, None, shard).mine)
    if (root / IDENTITY_FILE).exists():
        _require_same_knowledge(root, knowledge)
    if not log.commit_path(root, 0).exists():
        return Writer(root, plan, 0, None, shard).pending()
    commits = log.read_commits(root)
    before = plan_from(commits[-1].plan)
    return [] if plan == before else Writer(root, plan, len(commits), before, shard).pending()


@contextmanager
def grow(
    path: Path | str, knowledge: Knowledge, *, views: int = 0, fields: Sequence[Encoding] = (), shard: Shard = WHOLE
) -> Iterator[Writer]:
    """Yield the writer that adds views (`views` in all) or fields to a sealed store; continues a growth in progress.

    The sealed state stays readable. If the store has all that already, nothing is pending. Raises MismatchError if the
    knowledge differs or another growth is in progress, LockedError if another process writes it, UnsafeError for
    symbolic links.
    """
    root = Path(path)
    require_no_links(root)
    _require_same_knowledge(root, knowledge)
    with held(root, lambda alone: _growing(root, views, fields, shard, alone), shard) as writer:
        yield writer


def seal(path: Path | str) -> bool:
    """Seal a store, or its growth in progress, with all parts written; return False if it was sealed already.

    Needs neither teacher nor data: for the case that the last of several processes ended before it sealed. Raises
    UnfinishedError if parts are missing, LockedError if a process writes the store.
    """
    root = Path(path)
    read_store_identity(root)
    require_no_links(root)
    growth = max(0, log.growths(root, "plan") - 1)
    if log.commit_path(root, growth).exists():
        return False
    before = plan_from(log.read_plan(root, growth - 1)) if growth else None
    writer = Writer(root, plan_from(log.read_plan(root, growth)), growth, before)
    with held(root, lambda alone: None):
        writer.seal()
    return True


def _growing(root: Path, views: int, fields: Sequence[Encoding], shard: Shard, alone: bool) -> Writer:
    commits = log.read_commits(root)
    before = plan_from(commits[-1].plan)
    if alone and log.growths(root, "plan") > len(commits) and not _logged(root, len(commits)):
        _forget(root, len(commits), before)
    plan = grow_plan(before, views or before.views, fields)
    if plan == before and log.growths(root, "plan") == len(commits):
        return Writer(root, plan, len(commits) - 1, None, shard)
    _plan_or_compare(root, len(commits), plan, f"the growth under way at {root}")
    _prepare(root, plan, len(commits))
    return Writer(root, plan, len(commits), before, shard)


def _begin(root: Path, knowledge: Knowledge, plan: StorePlan, alone: bool) -> None:
    if alone and _replaceable(root, knowledge, plan):
        _forget(root, 0, None)
    atomic.remove(root / REFUSED)
    if (root / IDENTITY_FILE).exists():
        _require_same_knowledge(root, knowledge)
    else:
        # exclusive: shards on several machines may begin a store in a bucket at once
        atomic.create_exclusive(root / IDENTITY_FILE, canonical_json(IdentityRecord.of(knowledge).document()))
    _plan_or_compare(root, 0, plan, f"the plan of the store at {root}")


def _replaceable(root: Path, knowledge: Knowledge, plan: StorePlan) -> bool:
    """Return whether the next writer decides what a store is: nothing is computed, or it was refused and differs."""
    if log.commit_path(root, 0).exists():
        return False
    if not _logged(root, 0):
        return True
    held = attempt(logger.debug, read_store_identity, root), attempt(logger.debug, log.read_plan, root, 0)
    asked = knowledge.document(), plan.document()
    return (root / REFUSED).exists() and tuple(one and one.document() for one in held) != asked


def _logged(root: Path, growth: int) -> bool:
    return any(record_path(root, growth, "").parent.glob("v*.json"))


OWN = (IDENTITY_FILE, ORIGIN_FILE, PARAMETERS_FILE, FOLDER / "environment.json", FOLDER / "timing.jsonl")
"""records of a store that tell how its first growth began"""


def _forget(root: Path, growth: int, before: StorePlan | None) -> None:
    """Delete what was written of a growth that is not sealed; files of others stay.

    Its log goes first, so that a kill leaves nothing that counts, and its plan, which names the files, last.
    """
    if growth == 0 and _logged(root, 0):
        logger.info("the store at %s was refused for its teacher's accuracy: it is started again", root)
    for path in record_path(root, growth, "").parent.glob("*.json"):
        atomic.remove(path)
    planned = log.plan_path(root, growth)
    if planned.exists() and (plan := attempt(logger.debug, lambda: plan_from(log.read_plan(root, growth)))) is not None:
        for path in _files_of(root, plan, before):
            atomic.remove(path)
            with suppress(OSError):  # of an array of its own, when the last file goes
                path.parent.rmdir()
    if before is None:
        for name in OWN:
            atomic.remove(root / name)
    else:
        write_documents(root, before)
    atomic.remove(planned)


def _files_of(root: Path, plan: StorePlan, before: StorePlan | None) -> Iterator[Path]:
    """Yield the files that a plan adds to those of the one before: chunks, and the documents of its own arrays."""
    listed = listed_sizes(root, plan)
    known = documents(before).keys() if before else {""}
    added = [*parts(plan, before), *([] if before else [None])]
    yield from (root / chunk.key for part in added for chunk in part_chunks(plan, part) if chunk.key in listed)
    yield from (root / name / "zarr.json" for name in documents(plan).keys() - known)


def _require_same_knowledge(root: Path, knowledge: Knowledge) -> None:
    found = read_store_identity(root).document()
    require_same(found, knowledge.document(), (f"the store at {root}", "the request"), REMEDY)


def _plan_or_compare(root: Path, growth: int, plan: StorePlan, name: str) -> None:
    if log.plan_path(root, growth).exists():
        require_same(log.read_plan(root, growth).document(), plan.document(), (name, "the request"), REMEDY)
    else:
        write_atomic(log.plan_path(root, growth), sealed_json(plan.document()))


def _prepare(root: Path, plan: StorePlan, growth: int) -> None:
    """Make folders and array documents."""
    records = record_path(root, growth, "").parent
    records.mkdir(parents=True, exist_ok=True)
    write_documents(root, plan)
    for folder in (records.parent, root / FOLDER, root, root.absolute().parent):
        atomic.sync(folder)


def write_rows(
    root: Path, plan: StorePlan, growth: int, part: Part | None, rows: Mapping[str, np.ndarray], **described: Any
) -> LogEntry:
    """Write the chunks of a part (None: of the arrays that describe samples); return its log entry with `described`."""
    view, number, start = (None, None, 0) if part is None else (part.view, part.number, part.start)
    files = write_chunks(root, plan, part_chunks(plan, part), start, rows)
    return LogEntry(growth=growth, view=view, part=number, files=files, **described)


def write_documents(root: Path, plan: StorePlan) -> list[str]:
    """Make the folder and document of every array as planned; return the documents that were replaced."""
    replaced = []
    for name, document in documents(plan).items():
        file, data = root / name / "zarr.json", canonical_json(document)
        file.parent.mkdir(parents=True, exist_ok=True)
        if not atomic.holds(file, data):
            write_atomic(file, data)
            replaced.append(str(file.relative_to(root)))
    return replaced
