"""Arrays in .npz archives that others may have made: no pickles, and no more memory than the file's size allows."""

import math
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from kcdcache.errors import CorruptionError, KcdcacheError, UnsafeError
from kcdcache.files import naming
from kcdcache.untrusted import open_plain

MOST_BYTES = 64 * 2**30
"""of all arrays together"""
FREE_BYTES, MOST_RATIO = 256 * 2**20, 64
"""what any archive may unpack to, and how many bytes more per byte of the file: deflate alone would reach 1,000"""
MOST_DIRECTORY_BYTES = 2**20
"""of an archive's list of arrays"""
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_END_BYTES, _LOCATOR_BYTES, _END64_BYTES = 22, 20, 56


def read_npz(file: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a .npz file by name.

    Nothing is unpacked before the archive's own figures, and the shape each array claims, were found within bounds.

    Raises:
        NotFoundError: there is no such file.
        UnsafeError: it is no plain file, holds Python objects, or claims far more than its size could hold.
        CorruptionError: it is damaged.
    """
    with naming(file), open_plain(file) as stream:
        try:
            _require_small_directory(stream)
            with zipfile.ZipFile(stream) as archive:  # numpy would take anything else for a pickle
                members = archive.infolist()
                _require_few_bytes(members, stream.seek(0, 2))
                return {member.filename.removesuffix(".npy"): _array(archive, member) for member in members}
        except UnsafeError as error:
            raise UnsafeError(f"{file} is refused: {error}") from None
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            OSError,
            ValueError,
            NotImplementedError,
            RuntimeError,
        ) as error:
            if isinstance(error, KcdcacheError) or getattr(error, "errno", None) is not None:
                raise
            raise CorruptionError(f"{file} is not a readable .npz file: {error}") from None


def _require_small_directory(stream: BinaryIO) -> None:
    """Refuse a list of members that is large in memory already; zipfile reads it whole.

    Source: APPNOTE.TXT of the ZIP format, sections 4.3.14 to 4.3.16.
    """
    size = stream.seek(0, 2)
    stream.seek(max(0, size - _END_BYTES - _LOCATOR_BYTES - _END64_BYTES))
    tail = stream.read()
    end = tail[-_END_BYTES:]
    if end[:4] != b"PK\5\6" or end[-2:] != b"\0\0":
        raise zipfile.BadZipFile("it does not end as an archive without a comment does")
    claims = [int.from_bytes(end[12:16], "little")]
    if tail[-_END_BYTES - _LOCATOR_BYTES :][:4] == b"PK\6\7":  # an archive beyond 4 GiB, which zipfile then goes by
        claims = [int.from_bytes(tail[40:48], "little")]
    if max(claims) > MOST_DIRECTORY_BYTES:
        raise UnsafeError(f"its list of arrays takes {max(claims)} bytes, expected at most {MOST_DIRECTORY_BYTES}")


def _require_few_bytes(members: list[zipfile.ZipInfo], size: int) -> None:
    claimed, most = sum(member.file_size for member in members), min(MOST_BYTES, FREE_BYTES + MOST_RATIO * size)
    if claimed > most:
        raise UnsafeError(f"{size} bytes claim to unpack to {claimed}, expected at most {most}")
    if odd := [member.filename for member in members if member.compress_type not in _METHODS]:
        raise UnsafeError(f"{odd[0]!r:.80} is compressed in a way numpy never does")


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """Return an array after holding the shape it claims against the bytes it has."""
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{member.filename!r:.80} has the .npy format {version}, expected (1, 0) or (2, 0)")
        shape, _, dtype = read(stream)
        if dtype.hasobject:
            raise UnsafeError(f"{member.filename!r:.80} holds Python objects, which could run code")
        claimed = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or claimed != member.file_size - stream.tell():
            there = member.file_size - stream.tell()
            raise UnsafeError(
                f"{member.filename!r:.80} claims the shape {shape} {dtype}, {claimed} bytes, and has {there}"
            )
    with archive.open(member) as stream:
        found: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
        return found
