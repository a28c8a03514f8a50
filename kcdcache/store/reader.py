"""Rows out of one uncompressed chunk file, read and checked in blocks small enough for the processor's cache."""

import asyncio
import builtins
import errno
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import zarr
from awscrt import checksums
from jaxtyping import Float32, Int64, UInt64
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from kcdcache.errors import CorruptionError, SettingsError, UnsafeError
from kcdcache.files import cloud
from kcdcache.files.atomic import naming, read_json, sha256_bytes, write_atomic
from kcdcache.store import log, plan
from kcdcache.store.encoding import Encoding
from kcdcache.store.identity import Knowledge, read_store_identity
from kcdcache.store.log import Commit, FileRecord, Report, refuse
from kcdcache.store.plan import (
    CHECKSUM_BYTES,
    GROUP_DOCUMENT,
    ArrayPlan,
    Chunk,
    StorePlan,
    all_chunks,
    array_document,
    plan_from,
)

BLOCK_BYTES = 2**20
"""bytes read at once: small enough for the cache, and so large that two threads seldom wait for the interpreter's lock:
in 128 KiB they take 2.5 times as long on two cores (pipelines/results/bench/attempts.json)"""


def copy_rows(
    path: Path, size: int, checksum: int, wanted: Int64[np.ndarray, " rows"], target: np.ndarray, block: np.ndarray
) -> bool:
    """Copy strictly increasing row numbers `wanted` of a chunk into `target` (rows, ...), in C order.

    The whole file is read and compared: its `size` in bytes, its last four bytes, and the `checksum` of all before.
    `block` is scratch memory from `new_block`.

    Returns:
        Whether the file is what was written; if not, `target` holds anything.

    Raises:
        FileNotFoundError: there is no such file.
        UnsafeError: it is a symbolic link.
    """
    row_bytes = target.itemsize * math.prod(target.shape[1:])
    count, step = (size - CHECKSUM_BYTES) // row_bytes, max(1, len(block) // row_bytes)
    places = np.searchsorted(wanted, [*range(0, count, step), count]).tolist()
    found = 0
    with naming(path), builtins.open(path, "rb", buffering=0, opener=open_plain) as stream:
        if os.fstat(stream.fileno()).st_size != size:
            return False
        for start, low, high in zip(range(0, count, step), places, places[1:], strict=False):
            length = min(step, count - start)
            every = high - low == length  # then they need no copy
            data = _bytes(target[low:high]) if every else block[: length * row_bytes]
            if stream.readinto(data.data) != len(data):
                return False
            found = checksums.crc32c(data.data, found)
            if low < high and not every:
                rows = data.view(target.dtype).reshape(length, *target.shape[1:])
                np.take(rows, wanted[low:high] - start, axis=0, out=target[low:high], mode="clip")
        stored = stream.read(CHECKSUM_BYTES)
    return found == checksum and stored == checksum.to_bytes(CHECKSUM_BYTES, "little")


def listed(folder: Path) -> dict[str, int]:
    """Return name -> bytes of a folder's plain files; symbolic links are not followed, the folder's own neither."""
    if not folder.is_dir() or folder.is_symlink():
        return {}
    with os.scandir(folder) as entries:
        found = {entry.name: _plain_size(entry) for entry in entries}
    return {name: size for name, size in found.items() if size is not None}


def new_block(row_bytes: int) -> np.ndarray:
    """Return scratch memory for `copy_rows` of rows of at most so many bytes."""
    return np.empty(max(BLOCK_BYTES, row_bytes), np.uint8)


def open_plain(path: str, flags: int) -> int:
    """Return a descriptor of a file that is not reached through a symbolic link in its last place.

    Raises:
        UnsafeError: it is a symbolic link.
    """
    cloud.bring(path)
    try:
        return os.open(path, flags | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeError(f"{path} is a symbolic link; a store's files are plain files") from None
        raise


def _bytes(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(-1).view(np.uint8)


def _plain_size(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else None
    except FileNotFoundError:  # a writer's temporary file was renamed since the listing
        return None


MAGIC = bytes.fromhex("28b52ffd")
_RLE, _RESERVED = 1, 3


def content_bytes(data: bytes) -> int | None:
    """Return the decoded size that one whole zstd frame claims, or None if the data is anything else or does not tell.

    The decoder itself refuses a frame whose blocks do not come to that size.
    """
    if data[:4] != MAGIC or len(data) < 6:
        return None
    descriptor = data[4]
    size_flag, single_segment, dictionary_flag = descriptor >> 6, descriptor >> 5 & 1, descriptor & 3
    at = 5 + (0 if single_segment else 1) + (0, 1, 2, 4)[dictionary_flag]
    width = (1 if single_segment else 0, 2, 4, 8)[size_flag]
    end = _blocks_end(data, at + width)
    if not width or end is None or end + (4 if descriptor >> 2 & 1 else 0) != len(data):
        return None
    return int.from_bytes(data[at : at + width], "little") + (256 if width == 2 else 0)


def _blocks_end(data: bytes, at: int) -> int | None:
    """Return where the blocks that begin at a place end, or None if they do not end within the data."""
    while at + 3 <= len(data):
        header = int.from_bytes(data[at : at + 3], "little")
        last, kind, size = header & 1, header >> 1 & 3, header >> 3
        if kind == _RESERVED:
            return None
        at += 3 + (1 if kind == _RLE else size)
        if last:
            return at
    return None


SPARE_CHUNKS = 100_000
"""chunks listed even where damage took their log records"""

Task = tuple[Chunk, int, int]
"""a chunk, and the range of wanted rows it holds"""


class Field(NamedTuple):
    """A field as a store holds it."""

    encoding: Encoding
    row_shape: tuple[int, ...]
    """shape of one sample's decoded values"""


class DurableStore(LocalStore):
    """zarr's local store whose files survive a power loss, and which remembers what it wrote for the log."""

    def __init__(self, root: Path | str, *, read_only: bool = False) -> None:
        super().__init__(root, read_only=read_only)
        self.written: dict[str, FileRecord] = {}

    async def set(self, key: str, value: Buffer) -> None:
        """Write one key whole and durably."""
        await asyncio.to_thread(self._write, key, value)

    def _write(self, key: str, value: Buffer) -> None:
        data = memoryview(value.as_buffer_like()).cast("B")
        write_atomic(self.root / key, data)
        checksum = int.from_bytes(data[-CHECKSUM_BYTES:], "little")
        self.written[key] = FileRecord(key, len(data), sha256_bytes(data), checksum)


class ChunkWriter:
    """Writes whole chunks of planned arrays and tells what each file became."""

    def __init__(self, root: Path) -> None:
        self._store = DurableStore(root)

    def write(self, array: ArrayPlan, view: int | None, start: int, rows: np.ndarray) -> None:
        """Write rows start.. of one array; chunks there are replaced, so `start` and the end are chunk boundaries.

        Raises:
            SettingsError: the rows have another type or shape than planned.
            NoSpaceError: the disk or quota is full.
        """
        if rows.dtype != np.dtype(array.dtype) or rows.shape[1:] != array.row_shape:
            raise SettingsError(
                f"rows of '{array.name}' should be {array.dtype} {array.row_shape}, found {rows.dtype} {rows.shape[1:]}"
            )
        with zarr.config.set({"array.write_empty_chunks": True}):
            target: Any = zarr.open_array(store=self._store, path=array.name, mode="r+", zarr_format=3)
        if view is None:
            target[start : start + len(rows)] = rows
        else:
            target[view : view + 1, start : start + len(rows)] = rows[None]

    def take(self, chunks: Iterable[Chunk]) -> tuple[FileRecord, ...]:
        """Return, once, the records of chunks just written."""
        return tuple(self._store.written.pop(chunk.key) for chunk in chunks)


class Store:
    """A sealed store: knowledge points of one teacher on one data set, read chunk by chunk and checked.

    Methods may be called from several threads. Made by `open`.
    """

    def __init__(self, path: Path, knowledge: Knowledge, commits: Sequence[Commit]) -> None:
        self.path = path
        self.knowledge = knowledge
        self.plan = plan.plan_from(commits[-1].plan)
        self.commits = tuple(commit.sha256 for commit in commits)
        """SHA-256 of each commit record, the store's creation first"""
        self.bytes_read = 0
        """bytes of chunk files read so far"""
        self.rows_read = 0
        """store rows (one view of one sample) asked for so far"""
        self._records = [record for commit in commits for record in commit.records]
        self.skipped = log.skipped_samples(self._records)
        """samples without usable outputs in some view or field, ascending: they are never read"""
        self._files = file_table(commits)
        self._lock = threading.Lock()

    @property
    def knowledge_id(self) -> str:
        """What values, manifests and runs bind to."""
        return self.knowledge.knowledge_id

    @property
    def layout_id(self) -> str:
        """SHA-256 over fields, encodings, parts and view count."""
        return self.plan.layout_id

    @property
    def count(self) -> int:
        """Number of samples N."""
        return self.plan.count

    @property
    def views(self) -> int:
        """Number of cached views per sample."""
        return self.plan.views

    @cached_property
    def fields(self) -> dict[str, Field]:
        """The stored fields by name."""
        return {name: Field(form, form.row_shape) for name, form in self.plan.fields.items()}

    @cached_property
    def labels(self) -> Int64[np.ndarray, " n"]:
        """The class of every sample, read at first use."""
        return self._sample_array("labels")

    @cached_property
    def sample_digest(self) -> UInt64[np.ndarray, " n"]:
        """A digest of every sample's bytes and label, read at first use."""
        return self._sample_array("sample_digest")

    @property
    def forwards(self) -> int:
        """Number of teacher forwards that made the store; a field added later cost its own."""
        parts = [record.part for record in self._records if record.part is not None]
        rows = self.plan.part_rows
        return sum(min(rows, self.plan.count - part * rows) for part in parts)

    def row_bytes(self, fields: Sequence[str]) -> int:
        """Return the bytes one row takes in the arrays `load` returns for these fields."""
        return sum(array.row_bytes for array in self.plan.arrays_of(fields))

    def chunk_bytes(self, rows: Int64[np.ndarray, " rows"], fields: Sequence[str]) -> int:
        """Return the bytes of the chunk files that `load` reads for these rows of one view (of view 0, to be exact)."""
        tasks = self._tasks(self.plan.arrays_of(fields), 0, self._places(rows))
        return sum(self._files[chunk.key].bytes for chunk, _, _ in tasks)

    def measurements(self, view: int) -> dict[str, int | float]:
        """Return what precompute counted on a view (such as `correct`), summed over its parts, with `samples`."""
        return log.sum_measurements(self._records, view, self.plan.count, self.plan.part_rows)

    def load(
        self,
        view: int,
        rows: Int64[np.ndarray, " rows"],
        fields: Sequence[str],
        threads: int = 2,
        allocate: Callable[..., np.ndarray] = np.empty,
    ) -> dict[str, np.ndarray]:
        """Return array name -> still encoded rows (rows, ...) of a view, for strictly increasing sample indices.

        `allocate(shape, dtype)` makes each result array. Every chunk that holds a wanted row is read once and checked.

        Raises:
            SettingsError: the view, a row or a field is not in the store, or the rows are not strictly increasing.
            NonFiniteError: a row was skipped when the store was made.
            CorruptionError: a chunk is missing, damaged or swapped; names file and samples.
        """
        self._require_rows(view, rows, fields)
        with self._lock:
            self.rows_read += len(rows)
        return self._gather(self.plan.arrays_of(fields), view, self._places(rows), threads, allocate)

    def read(
        self, field: str, view: int, index: Int64[np.ndarray, " batch"], temperature: float = 1.0
    ) -> Float32[np.ndarray, "batch ..."]:
        """Return decoded values (batch, ...) of samples in any order, duplicates allowed; convenient, not fast.

        Raises:
            SettingsError, NonFiniteError, CorruptionError: as for `load`.
        """
        rows, place = np.unique(index, return_inverse=True)
        stored = {name: torch.from_numpy(values) for name, values in self.load(view, rows, (field,)).items()}
        return self.plan.fields[field].decode(stored, temperature).numpy()[place]

    def _sample_array(self, name: str) -> np.ndarray:
        array = next(array for array in self.plan.arrays if array.name == name)
        return self._gather([array], None, np.arange(self.plan.count), 1, np.empty)[name]

    def _places(self, rows: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " places"]:
        """Return where the rows of some samples lie in the arrays, ascending as they are."""
        return rows

    def _require_rows(self, view: int, rows: np.ndarray, fields: Sequence[str]) -> None:
        if missing := [field for field in fields if field not in self.plan.fields]:
            raise SettingsError(f"no field '{missing[0]}' in {self.path}; it holds {', '.join(self.plan.fields)}")
        if not 0 <= view < self.views:
            raise SettingsError(f"no view {view} in {self.path}; it holds views 0..{self.views - 1}")
        if len(rows) and (rows[0] < 0 or rows[-1] >= self.count or np.any(np.diff(rows) <= 0)):
            raise SettingsError(f"rows should increase strictly within 0..{self.count - 1}, found {rows}")
        log.refuse_skipped(self.skipped, rows, self.path)

    def _gather(
        self,
        arrays: Sequence[ArrayPlan],
        view: int | None,
        rows: np.ndarray,
        threads: int,
        allocate: Callable[..., np.ndarray],
    ) -> dict[str, np.ndarray]:
        out = {array.name: allocate((len(rows), *array.row_shape), np.dtype(array.dtype)) for array in arrays}
        tasks = self._tasks(arrays, view, rows)
        cloud.bring(*(self.path / chunk.key for chunk, _, _ in tasks))
        shares = [tasks[start::threads] for start in range(threads) if tasks[start::threads]]
        if len(shares) <= 1:
            for share in shares:
                self._fill(share, rows, out)
            return out
        with ThreadPoolExecutor(len(shares), thread_name_prefix="kcdcache-load") as pool:
            for done in [pool.submit(self._fill, share, rows, out) for share in shares]:
                done.result()
        return out

    def _tasks(self, arrays: Sequence[ArrayPlan], view: int | None, rows: np.ndarray) -> list[Task]:
        tasks: list[Task] = []
        for chunk in plan.chunks(self.plan, arrays, view, 0, self.plan.count):
            low, high = np.searchsorted(rows, (chunk.start, chunk.stop)).tolist()
            if low < high:
                tasks.append((chunk, low, high))
        return tasks

    def _fill(self, tasks: Sequence[Task], rows: np.ndarray, out: Mapping[str, np.ndarray]) -> None:
        """Copy wanted rows out of some chunks, all read through one buffer: fresh memory costs more than the copy."""
        raw = self.plan.compression == "none"
        most = max(chunk.array.row_bytes if raw else self._files[chunk.key].bytes for chunk, _, _ in tasks)
        buffer = new_block(most)
        for chunk, low, high in tasks:
            target, wanted = out[chunk.array.name][low:high], rows[low:high] - chunk.start
            if raw:
                self._copy(chunk, wanted, target, buffer)
            else:
                np.take(self._decoded_rows(chunk, buffer), wanted, axis=0, out=target, mode="clip")

    def _decoded_rows(self, chunk: Chunk, buffer: np.ndarray) -> np.ndarray:
        payload = buffer[: self._files[chunk.key].bytes - CHECKSUM_BYTES]
        self._copy(chunk, np.zeros(1, np.int64), payload[None], buffer)
        if (claimed := content_bytes(payload.tobytes())) != chunk.array.chunk_bytes:
            found = "other data than one zstd frame" if claimed is None else f"a zstd frame of {claimed} bytes"
            found += f", its plan implies {chunk.array.chunk_bytes} bytes"
            raise UnsafeError(f"{self.path}/{chunk} holds {found}; it was not written by kcdcache and is not decoded")
        return self._zarr_rows(chunk)

    def _copy(self, chunk: Chunk, wanted: np.ndarray, target: np.ndarray, block: np.ndarray) -> None:
        """Copy rows out of a chunk file as it lies on disk, and compare all of it with its log entry."""
        record, file = self._files[chunk.key], self.path / chunk.key
        what = record.bytes, record.crc32c, wanted, target, block
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

    def _zarr_rows(self, chunk: Chunk) -> np.ndarray:
        array = self._zarr_arrays[chunk.array.name]
        place: Any = slice(chunk.start, chunk.stop)
        try:
            return np.asarray(array[place] if chunk.view is None else array[chunk.view, place])
        except (ValueError, RuntimeError) as error:
            raise CorruptionError(f"{self.path}/{chunk} cannot be decoded: {error}") from None

    @cached_property
    def _zarr_arrays(self) -> dict[str, Any]:
        files = LocalStore(self.path, read_only=True)
        return {array.name: zarr.open_array(store=files, path=array.name, mode="r") for array in self.plan.arrays}


def open(path: Path | str) -> Store:
    """Return a sealed store after checking its records, array documents and the presence and size of every file.

    A growth in progress is ignored: the last sealed state is opened. No chunk is read.

    Raises:
        NotFoundError: there is no store.
        UnfinishedError: it was never sealed.
        MismatchError: it was written by a newer format.
        CorruptionError: a record was changed, or a file is missing, empty, cut or extended.
    """
    root = Path(path)
    store = Store(root, read_store_identity(root), log.read_commits(root))
    check(store)
    return store


def check(store: Store) -> None:
    """Compare a store's samples, array documents, and presence and size of every file with its records.

    Raises:
        CorruptionError: as for `open`.
    """
    log.check_count(store.path, store.count, store.knowledge)
    check_documents(store.path, store.plan, len(store.commits))
    check_listing(store.path, store.plan, store._files)


def file_table(commits: Iterable[Commit]) -> dict[str, FileRecord]:
    """Return chunk key -> log entry over all sealed growths."""
    return {file.path: file for commit in commits for record in commit.records for file in record.files}


def check_documents(root: Path, plan: StorePlan, sealed: int, report: Report = refuse) -> None:
    """Compare each `zarr.json` with the one the plan implies; while growth `sealed` is under way also with its own.

    Raises:
        CorruptionError: one differs, unless `report` collects it.
    """
    expected = {"": GROUP_DOCUMENT, **{a.name: array_document(plan, a) for a in plan.arrays}}
    for name, document in expected.items():
        file = root / name / "zarr.json"
        try:
            if (found := read_json(file)) is None or found not in (document, _growing_document(root, name, sealed)):
                report(f"{file} is not what this store's plan implies: it was changed or belongs to another store")
        except (CorruptionError, FileNotFoundError, UnsafeError) as error:
            report(str(error))


def _growing_document(root: Path, name: str, sealed: int) -> dict[str, Any] | None:
    if not name or not log.plan_path(root, sealed).exists():
        return None
    plan = plan_from(log.read_plan(root, sealed))
    return next((array_document(plan, array) for array in plan.arrays if array.name == name), None)


def check_listing(root: Path, plan: StorePlan, files: Mapping[str, FileRecord], report: Report = refuse) -> None:
    """Compare presence and size of every chunk file with the log, by one listing per array.

    Raises:
        CorruptionError: a file is missing, empty, cut or extended, unless `report` collects it.
    """
    if not plausible(plan, files):
        report(f"the plan of {root} implies {plan.chunk_count} chunk files, its log names {len(files)}")
        return
    sizes = listed_sizes(root, plan)
    for chunk in all_chunks(plan):
        if problem := size_problem(plan, chunk, files.get(chunk.key), sizes.get(chunk.key)):
            report(f"{root}/{chunk} {problem}")


def plausible(plan: StorePlan, files: Mapping[str, FileRecord]) -> bool:
    """Return whether a plan's chunks may be listed: a hostile plan could claim any number of them."""
    return plan.chunk_count <= SPARE_CHUNKS + 2 * len(files)


def size_problem(plan: StorePlan, chunk: Chunk, logged: FileRecord | None, found: int | None) -> str | None:
    """Return what is wrong with a chunk file of `found` bytes (None: no plain file there), or None."""
    if logged is None:
        return "is not in the log"
    most = chunk.array.chunk_bytes + CHECKSUM_BYTES
    if plan.compression == "none" and logged.bytes != most:
        return f"is logged with {logged.bytes} bytes, its plan implies {most}"
    if logged.bytes > most + most // 128 + 1024:  # what zstd adds to incompressible input at most
        return f"is logged with {logged.bytes} bytes, more than its {most} could compress to"
    if found is None:
        return "is missing"
    return None if found == logged.bytes else f"has {found} bytes, {logged.bytes} were written"


def listed_sizes(root: Path, plan: StorePlan) -> dict[str, int]:
    """Return key -> bytes of the plain files in every array's folder (symbolic links are not followed)."""
    folders = {array.name: listed(root / array.name) for array in plan.arrays}
    return {f"{name}/{file}": size for name, found in folders.items() for file, size in found.items()}
