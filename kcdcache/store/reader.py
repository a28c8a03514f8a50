"""Sealed stores: opened after a check of their records, then read chunk by chunk with every byte checked."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64, UInt64

from kcdcache.errors import CorruptionError, MismatchError, NonFiniteError, SettingsError, attempt
from kcdcache.files import cloud
from kcdcache.files.atomic import read_bytes
from kcdcache.files.records import MOST_RECORD_BYTES, canonical_json
from kcdcache.store import log
from kcdcache.store.chunks import copy_rows, listed_sizes, size_problem
from kcdcache.store.encoding import Encoding
from kcdcache.store.identity import PARAMETERS, PARAMETERS_FILE, Knowledge, read_store_identity
from kcdcache.store.log import Commit, Report, refuse
from kcdcache.store.plan import ArrayPlan, Chunk, all_chunks, chunks, documents, plan_from

SPARE_CHUNKS = 100_000
"""chunks that are checked even if their log records are damaged"""

Index = Int64[np.ndarray, " rows"]
Allocate = Callable[..., np.ndarray]
Task = tuple[Chunk, int, int]
"""a chunk, and the range of wanted rows in it"""


class Excerpt(NamedTuple):
    """All samples of a data set, for a store with the rows of only some of them."""

    label: Int64[np.ndarray, " n"]
    digest: UInt64[np.ndarray, " n"]
    row: Int64[np.ndarray, " n"]
    """sample -> its row in the store, ascending; -1 for none"""
    blank: Bool[np.ndarray, " n"]
    """samples whose own row nothing may use, since their targets were baked; they read as NaN"""
    skipped: tuple[int, ...]
    """samples without usable outputs in the original store"""


class Store:
    """A sealed store: one teacher's outputs on one data set, read chunk by chunk and checked.

    With an `excerpt` it has the samples and indices of the whole data set, but rows of only some; asking for others is
    an error. Methods are thread-safe. Made by `open`.
    """

    def __init__(
        self, path: Path, knowledge: Knowledge, commits: Sequence[Commit], excerpt: Excerpt | None = None
    ) -> None:
        self.path = path
        self.knowledge = knowledge
        self.plan = plan_from(commits[-1].plan)
        self.commits = tuple(commit.sha256 for commit in commits)
        """SHA-256 of each commit, oldest first"""
        self.bytes_read = 0
        """of chunk files, so far"""
        self.rows_read = 0
        """rows (one view of one sample) asked for, so far"""
        self._records = [record for commit in commits for record in commit.records]
        self._excerpt = excerpt
        self.skipped = log.skipped_samples(self._records) if excerpt is None else np.array(excerpt.skipped, np.int64)
        """samples without usable outputs in some view or field, ascending: never read"""
        self.files = {file.path: file for record in self._records for file in record.files}
        """chunk key -> log entry"""
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        rows, fields = f"{self.count:,} samples x {self.views} views", ", ".join(self.fields)
        return f"Store({str(self.path)!r}: {rows} of {fields}; teacher {self.knowledge.teacher.architecture})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    @property
    def knowledge_id(self) -> str:
        """The id that values, manifests and runs bind to."""
        return self.knowledge.knowledge_id

    @property
    def count(self) -> int:
        """Number of samples N."""
        return self.plan.count if self._excerpt is None else len(self._excerpt.row)

    @property
    def held(self) -> Index:
        """The samples with rows, ascending: row j of the arrays is of sample held[j]."""
        return np.arange(self.count) if self._excerpt is None else np.flatnonzero(self._excerpt.row >= 0)

    @property
    def views(self) -> int:
        """Number of cached views per sample."""
        return self.plan.views

    @property
    def fields(self) -> dict[str, Encoding]:
        """Field -> encoding."""
        return self.plan.encodings

    @property
    def kept(self) -> tuple[str, ...]:
        """The fields, and `parameters` if the store has that record."""
        return (*self.fields, *((PARAMETERS,) if (self.path / PARAMETERS_FILE).exists() else ()))

    @cached_property
    def labels(self) -> Int64[np.ndarray, " n"]:
        """The class of every sample."""
        return self._sample_array("labels") if self._excerpt is None else self._excerpt.label

    @cached_property
    def sample_digest(self) -> UInt64[np.ndarray, " n"]:
        """A digest of every sample's bytes and label."""
        return self._sample_array("sample_digest") if self._excerpt is None else self._excerpt.digest

    @property
    def forwards(self) -> int:
        """Number of teacher forwards that made the store; a field added later counts its own."""
        parts = [record.part for record in self._records if record.part is not None]
        rows = self.plan.part_rows
        return sum(min(rows, self.plan.count - part * rows) for part in parts)

    def row_bytes(self, fields: Sequence[str]) -> int:
        """Return the bytes of one row in the arrays that `load` returns for these fields."""
        return sum(self.fields[name].row_bytes for name in fields)

    def chunk_bytes(self, rows: Index, fields: Sequence[str]) -> int:
        """Return the bytes of the chunk files that `load` reads for these rows of one view; exact for view 0."""
        tasks = self._tasks(self.plan.arrays_of(fields), 0, self._places(rows))
        return sum(self.files[chunk.key].bytes for chunk, _, _ in tasks)

    def measurements(self, view: int) -> dict[str, int | float]:
        """Return the counts of a view (such as `correct`) summed over its parts, and its number of `samples`."""
        return log.sum_measurements(self._records, view, self.plan.count, self.plan.part_rows)

    def load(
        self, view: int, rows: Index, fields: Sequence[str], threads: int = 2, allocate: Allocate = np.empty
    ) -> dict[str, np.ndarray]:
        """Return array name -> encoded rows (rows, ...) of a view, for strictly increasing sample indices.

        `allocate(shape, dtype)` makes each result array. Every chunk with a wanted row is read once and checked.

        Raises:
            SettingsError: the view, a row or a field is not in the store, or the rows are not strictly increasing.
            NonFiniteError: a row was skipped when the store was made.
            MismatchError: an excerpt does not have a sample.
            CorruptionError: a chunk is missing, damaged or swapped; names file and samples.
        """
        self._require_rows(view, rows, fields)
        arrays, places = self.plan.arrays_of(fields), self._places(rows)
        with self._lock:
            self.rows_read += len(places)
        if self._excerpt is None or len(places) == len(rows):
            return self._gather(arrays, view, places, threads, allocate)
        there, whole = self._excerpt.row[rows] >= 0, dict[str, np.ndarray]()
        for name, values in self._gather(arrays, view, places, threads, np.empty).items():
            whole[name] = allocate((len(rows), *values.shape[1:]), values.dtype)
            whole[name][there], whole[name][~there] = values, np.nan
        return whole

    def read(
        self, field: str, view: int, index: Int64[np.ndarray, " batch"], temperature: float = 1.0
    ) -> Float32[np.ndarray, "batch ..."]:
        """Return decoded values (batch, ...) of samples in any order, duplicates allowed; convenient, not fast."""
        rows, place = np.unique(index, return_inverse=True)
        stored = {name: torch.from_numpy(values) for name, values in self.load(view, rows, (field,)).items()}
        return self.fields[field].decode(stored, temperature).numpy()[place]

    def _sample_array(self, name: str) -> np.ndarray:
        array = next(array for array in self.plan.arrays if array.name == name)
        return self._gather([array], None, np.arange(self.plan.count), 1, np.empty)[name]

    def _places(self, rows: Index) -> Int64[np.ndarray, " places"]:
        """Return the samples' rows in the arrays, ascending; without those of blank samples."""
        if self._excerpt is None:
            return rows
        places = self._excerpt.row[rows]
        if len(missing := rows[(places < 0) & ~self._excerpt.blank[rows]]):
            raise MismatchError(
                f"{self.path} holds nothing of sample {missing[0]}: an exported set has the {len(self.held)} of "
                f"{self.count} samples that its own manifest keeps or mixes in; give the whole store for others"
            )
        return places[places >= 0]

    def _require_rows(self, view: int, rows: np.ndarray, fields: Sequence[str]) -> None:
        if missing := [field for field in fields if field not in self.fields]:
            raise SettingsError(f"no field '{missing[0]}' in {self.path}; it holds {', '.join(self.fields)}")
        if not 0 <= view < self.views:
            raise SettingsError(f"no view {view} in {self.path}; it holds views 0..{self.views - 1}")
        if len(rows) and (rows[0] < 0 or rows[-1] >= self.count or np.any(np.diff(rows) <= 0)):
            raise SettingsError(f"rows should increase strictly within 0..{self.count - 1}, found {rows}")
        if len(self.skipped) and len(found := np.intersect1d(rows, self.skipped, assume_unique=True)):
            raise NonFiniteError(
                f"sample {found[0]} was skipped when {self.path} was made, because the teacher's outputs on it are not "
                f"finite; leave out the {len(self.skipped)} samples of `Store.skipped`, as `train` does by itself"
            )

    def _gather(
        self, arrays: Sequence[ArrayPlan], view: int | None, rows: np.ndarray, threads: int, allocate: Allocate
    ) -> dict[str, np.ndarray]:
        out = {array.name: allocate((len(rows), *array.row_shape), np.dtype(array.dtype)) for array in arrays}
        tasks = self._tasks(arrays, view, rows)
        cloud.bring(*(self.path / chunk.key for chunk, _, _ in tasks))
        shares = [tasks[start::threads] for start in range(min(threads, len(tasks)))]
        if len(shares) == 1:  # memory first touched by a new thread costs a millisecond
            self._fill(shares[0], rows, out)
            return out
        with ThreadPoolExecutor(threads, thread_name_prefix="kcdcache-load") as pool:
            for done in [pool.submit(self._fill, share, rows, out) for share in shares]:
                done.result()
        return out

    def _tasks(self, arrays: Sequence[ArrayPlan], view: int | None, rows: np.ndarray) -> list[Task]:
        tasks: list[Task] = []
        for chunk in chunks(self.plan, arrays, view, 0, self.plan.count):
            low, high = np.searchsorted(rows, (chunk.start, chunk.stop)).tolist()
            if low < high:
                tasks.append((chunk, low, high))
        return tasks

    def _fill(self, tasks: Sequence[Task], rows: np.ndarray, out: Mapping[str, np.ndarray]) -> None:
        """Copy wanted rows out of some chunks, all read through one buffer: fresh memory costs more than the copy."""
        scratch = np.empty(max(self.files[chunk.key].bytes for chunk, _, _ in tasks), np.uint8)
        for chunk, low, high in tasks:
            self._copy(chunk, rows[low:high] - chunk.start, out[chunk.array.name][low:high], scratch)

    def _copy(self, chunk: Chunk, wanted: np.ndarray, target: np.ndarray, scratch: np.ndarray) -> None:
        """Copy rows out of a chunk; raise CorruptionError if it is not what was logged."""
        record, file = self.files[chunk.key], self.path / chunk.key
        what = record, chunk.array, self.plan.compression, wanted, target, scratch
        try:
            sound = copy_rows(file, *what)
            if not sound and cloud.bring_again(file):
                sound = copy_rows(file, *what)
        except FileNotFoundError:
            raise CorruptionError(f"{self.path}/{chunk} is missing; {log.REPAIR}") from None
        with self._lock:
            self.bytes_read += record.bytes
        if not sound:
            raise CorruptionError(f"{self.path}/{chunk} is not what was written; {log.REPAIR}")


def open(path: Path | str) -> Store:
    """Return a sealed store after checking its records, array documents and the presence and size of every file.

    The last sealed state is opened; a growth in progress is ignored. No chunk is read. Raises NotFoundError without a
    store, UnfinishedError if it was never sealed, MismatchError if a newer format wrote it, CorruptionError if a record
    was changed or a file is missing or has another size.
    """
    root = Path(path)
    store = Store(root, read_store_identity(root), log.read_commits(root))
    check(store)
    return store


def check(store: Store, report: Report = refuse) -> list[Chunk]:
    """Check a store's sample count, array documents, and presence and size of every file; return the sound chunks.

    Problems go to `report`.
    """
    claimed = store.knowledge.data.count
    if store.knowledge.whole and store.count != claimed:  # stores of mixes and exported ones have only some samples
        report(f"the plan of {store.path} has {store.count} samples, its identity {claimed}: get the store again")
    _check_documents(store, report)
    plan, sizes, sound = store.plan, listed_sizes(store.path, store.plan), list[Chunk]()
    if plan.chunk_count > SPARE_CHUNKS + 2 * len(store.files):  # a hostile plan could claim any number
        report(f"the plan of {store.path} implies {plan.chunk_count} chunk files, its log names {len(store.files)}")
        return sound
    for chunk in all_chunks(plan):
        if problem := size_problem(plan, chunk, store.files.get(chunk.key), sizes.get(chunk.key)):
            report(f"{store.path}/{chunk} {problem}")
        else:
            sound.append(chunk)
    return sound


def _check_documents(store: Store, report: Report) -> None:
    """Compare each `zarr.json` with those that are allowed."""
    for name, document in documents(store.plan).items():
        file = store.path / name / "zarr.json"
        found = attempt(report, read_bytes, file, MOST_RECORD_BYTES)
        if found is not None and found not in _allowed(store, name, document):
            report(f"{file} is not what this store's plan implies: it was changed or belongs to another store")


def _allowed(store: Store, name: str, document: dict[str, Any]) -> Iterator[bytes]:
    """Yield the forms a document may have: as planned, without axis names (older stores), as a growth in progress."""
    yield canonical_json(document)
    yield canonical_json({key: value for key, value in document.items() if key != "dimension_names"})
    growing = len(store.commits)
    if log.plan_path(store.path, growing).exists():
        yield canonical_json(documents(plan_from(log.read_plan(store.path, growing))).get(name))
