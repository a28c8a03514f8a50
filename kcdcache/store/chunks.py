"""Chunk files of Zarr version 3: written whole and durably, every byte checked when read.

The format is zarr's: rows in C order, little-endian, padded, optionally zstd, then a crc32c.
"""

import errno
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from awscrt import checksums
from jaxtyping import Int64, UInt8

from kcdcache.errors import SettingsError, UnsafeError
from kcdcache.files.atomic import naming, sha256_bytes, write_atomic
from kcdcache.store.log import FileRecord
from kcdcache.store.plan import CHECKSUM_BYTES, ZSTD_LEVEL, ArrayPlan, Chunk, StorePlan

BLOCK_BYTES = 2**20
"""bytes read and summed at once: fits the processor's cache"""
WRITERS = 4
"""chunks written at a time: most of it is waiting for the disk"""


def write_chunks(
    root: Path, plan: StorePlan, chunks: Sequence[Chunk], start: int, rows: Mapping[str, np.ndarray]
) -> tuple[FileRecord, ...]:
    """Write chunks and return their log entries; `rows` has each array's rows from sample `start` on.

    Raises SettingsError if the rows do not have the planned type and shape.
    """
    for array, stop in {chunk.array: chunk.stop for chunk in chunks}.items():
        found, shape = rows[array.name], (stop - start, *array.row_shape)
        if found.dtype != np.dtype(array.dtype) or found.shape != shape:
            raise SettingsError(
                f"rows of '{array.name}' should be {array.dtype} {shape}, found {found.dtype} {found.shape}"
            )

    def write(chunk: Chunk) -> FileRecord:
        data = encoded(chunk.array, rows[chunk.array.name][chunk.start - start : chunk.stop - start], plan.compression)
        write_atomic(root / chunk.key, data)
        checksum = int.from_bytes(data[-CHECKSUM_BYTES:], "little")
        return FileRecord(chunk.key, len(data), sha256_bytes(data), checksum)

    with ThreadPoolExecutor(WRITERS, thread_name_prefix="kcdcache-write") as pool:
        return tuple(pool.map(write, chunks))


def encoded(array: ArrayPlan, rows: np.ndarray, compression: str) -> bytes:
    """Return the bytes of a chunk's file; fewer rows than the chunk has are padded."""
    kind = np.dtype(array.dtype).newbyteorder("<")
    whole = np.full((array.chunk_rows, *array.row_shape), np.nan if kind.kind == "f" else 0, kind)
    whole[: len(rows)] = rows
    data = whole.tobytes()
    if compression == "zstd":
        data = pa.Codec("zstd", compression_level=ZSTD_LEVEL).compress(data, asbytes=True)
    return data + int(checksums.crc32c(data)).to_bytes(CHECKSUM_BYTES, "little")


def copy_rows(
    path: Path,
    record: FileRecord,
    array: ArrayPlan,
    compression: str,
    wanted: Int64[np.ndarray, " rows"],
    target: np.ndarray,
    scratch: UInt8[np.ndarray, " bytes"],
) -> bool:
    """Copy rows `wanted` of a chunk, strictly increasing, into `target` (rows, ...), in C order; return if it is sound.

    The whole file is read, into `scratch` of at least its size, and checked against its log entry `record`; what is not
    compressed is copied block by block, while it is in the processor's cache. If the file is not what was written, the
    content of `target` is undefined. Raises FileNotFoundError without the file, UnsafeError if it is a symbolic link or
    unpacks to another size than planned.
    """
    size, row_bytes, packed = record.bytes - CHECKSUM_BYTES, array.row_bytes, compression != "none"
    rows = size if packed else max(1, BLOCK_BYTES // row_bytes)
    step, found = BLOCK_BYTES if packed else rows * row_bytes, 0
    edges = np.searchsorted(wanted, range(0, array.chunk_rows + rows, rows)).tolist()
    with naming(path), open(path, "rb", buffering=0, opener=_open_plain) as stream:
        if os.fstat(stream.fileno()).st_size != record.bytes:
            return False
        for number, start in enumerate(range(0, size, step)):
            length = min(step, size - start)
            low, high = (0, 0) if packed else edges[number : number + 2]
            whole = (high - low) * row_bytes == length  # then it needs no copy
            block = target[low:high].reshape(-1).view(np.uint8) if whole else scratch[start if packed else 0 :][:length]
            if stream.readinto(block.data) != len(block):
                return False
            found = checksums.crc32c(block.data, found)
            if low < high and not whole:
                _take(block, array, wanted[low:high] - number * rows, target[low:high])
        stored = stream.read(CHECKSUM_BYTES)
    if found != record.crc32c or stored != found.to_bytes(CHECKSUM_BYTES, "little"):
        return False
    if packed:
        _take(_unpacked(scratch[:size], array.chunk_bytes, path), array, wanted, target)
    return True


def listed_sizes(root: Path, plan: StorePlan) -> dict[str, int]:
    """Return key -> bytes of the plain files in every array's folder; symbolic links are ignored."""
    found: dict[str, int | None] = {}
    for array in plan.arrays:
        folder = root / array.name
        if folder.is_dir() and not folder.is_symlink():
            with os.scandir(folder) as entries:
                found |= {f"{array.name}/{entry.name}": _plain_size(entry) for entry in entries}
    return {key: size for key, size in found.items() if size is not None}


def size_problem(plan: StorePlan, chunk: Chunk, logged: FileRecord | None, found: int | None) -> str | None:
    """Return what is wrong with a chunk file of `found` bytes (None: no plain file), or None."""
    if logged is None:
        return "is not in the log"
    most = chunk.array.file_bytes
    if plan.compression == "none" and logged.bytes != most:
        return f"is logged with {logged.bytes} bytes, its plan implies {most}"
    if not CHECKSUM_BYTES < logged.bytes <= most + most // 128 + 1024:  # what zstd adds to incompressible input at most
        return f"is logged with {logged.bytes} bytes, {most} cannot be compressed to that"
    if found is None:
        return "is missing"
    return None if found == logged.bytes else f"has {found} bytes, {logged.bytes} were written"


def _take(data: UInt8[np.ndarray, " bytes"], array: ArrayPlan, wanted: np.ndarray, target: np.ndarray) -> None:
    np.take(data.view(array.dtype).reshape(-1, *array.row_shape), wanted, axis=0, out=target, mode="clip")


def _unpacked(data: np.ndarray, size: int, path: Path) -> np.ndarray:
    """Return the unpacked bytes; never takes more memory than planned, whatever the data claims."""
    try:
        return np.frombuffer(pa.Codec("zstd").decompress(data, size), np.uint8)
    except OSError as error:
        raise UnsafeError(
            f"{path} does not unpack to the {size} bytes its plan implies ({error}); it was not written by kcdcache"
        ) from None


def _open_plain(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeError(f"{path} is a symbolic link; a store's files are plain files") from None
        raise


def _plain_size(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat(follow_symlinks=False).st_size if entry.is_file(follow_symlinks=False) else None
    except FileNotFoundError:  # a writer's temporary file was renamed since the listing
        return None
