"""Rows out of one uncompressed chunk file, read and checked in blocks small enough for the processor's cache."""

import errno
import math
import os
from pathlib import Path

import numpy as np
from awscrt import checksums
from jaxtyping import Int64

from kcdcache import places
from kcdcache.errors import UnsafeError
from kcdcache.files import naming

BLOCK_BYTES = 2**20
"""bytes read at once: small enough for the cache, and so large that two threads seldom wait for the interpreter's lock:
in 128 KiB they take 2.5 times as long on two cores (pipelines/results/bench/attempts.json)"""
CHECKSUM_BYTES = 4
"""bytes after the rows, their crc32c with the lowest byte first"""


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
    with naming(path), open(path, "rb", buffering=0, opener=open_plain) as stream:
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
    places.bring(Path(path))
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
