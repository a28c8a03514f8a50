"""Files that others may have made: plain ones only, never more bytes or values than allowed, JSON of one meaning."""

import json
import math
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from kcdcache import places
from kcdcache.errors import CorruptionError, NotFoundError, UnsafeError

MOST_JSON_BYTES = 64 * 2**20
MOST_JSON_VALUES = 10**6
"""values in one JSON text: in memory each takes up to some 150 bytes, however few it has in the file"""
MOST_JSON_DEPTH = 64
MOST_INTEGER = 2**64
"""larger than every number of ours; larger ones break arithmetic in arrays"""


def open_plain(path: Path) -> BufferedReader:
    """Return a plain file, opened for reading; a link is followed, but a pipe or device is never waited for or read.

    Raises:
        NotFoundError: there is no file.
        UnsafeError: it is a pipe, a device or a socket.
    """
    places.bring(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"no file at {path}") from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise NotFoundError(f"no file at {path}: a folder is there")
    raise UnsafeError(f"{path} is a pipe or a device, expected a plain file; it is not read")


def read_bytes(path: Path, most: int) -> bytes:
    """Return the bytes of a plain file.

    Raises:
        NotFoundError: there is no file.
        UnsafeError: it is no plain file, or has more than `most` bytes; it is not read.
    """
    with open_plain(path) as stream:
        if (size := os.fstat(stream.fileno()).st_size) > most:
            raise UnsafeError(f"{path} has {size} bytes, expected at most {most}; it is not read")
        return stream.read(size)


def parse_json(data: bytes, where: Path | str) -> Any:
    """Return the value of a JSON text in UTF-8: finite numbers, integers within 64 bits, no key twice in an object.

    Raises:
        UnsafeError: it holds more values than any record of ours.
        CorruptionError: it is no such text, or nested too deeply.
    """
    values = sum(map(data.count, (b",", b"[", b"{")))  # too many only where texts hold such marks
    if values > MOST_JSON_VALUES:
        raise UnsafeError(f"{where} holds {values} JSON values, expected at most {MOST_JSON_VALUES}; it is not read")
    try:
        text = data.decode()
        found = json.loads(
            text, parse_int=_integer, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_object
        )
        if "\\u" in text:  # half a pair could be neither printed nor digested
            json.dumps(found, ensure_ascii=False).encode()
        if _deeper(found, MOST_JSON_DEPTH):
            raise RecursionError
    except RecursionError:
        raise CorruptionError(f"{where} should hold JSON: it is nested too deeply") from None
    except ValueError as error:
        raise CorruptionError(f"{where} should hold JSON: {error}") from None
    return found


def parse_lines(data: bytes, where: Path | str) -> list[Any]:
    """Return the values of a text with one JSON value a line.

    Raises:
        UnsafeError, CorruptionError: as for `parse_json`; name the line.
    """
    values = sum(map(data.count, (b",", b"[", b"{", b"\n")))
    if values > MOST_JSON_VALUES:
        raise UnsafeError(f"{where} holds {values} JSON values, expected at most {MOST_JSON_VALUES}; it is not read")
    return [parse_json(line, f"{where}, line {number}") for number, line in enumerate(data.splitlines(), 1)]


def require_no_links(root: Path, files: bool = True) -> None:
    """Do nothing if no folder (or file) under `root` is a symbolic link: writing through one would change other files.

    Where files are only ever replaced whole, which replaces the link itself, `files` may be False.

    Raises:
        UnsafeError: one is; names it.
    """
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names) if files else folders:
            if os.path.islink(path := os.path.join(folder, name)):
                raise UnsafeError(f"{path} is a symbolic link; nothing is written in a folder that holds one")


def _integer(text: str) -> int:
    number = int(text) if len(text) <= 20 else MOST_INTEGER
    if abs(number) >= MOST_INTEGER:
        raise ValueError(f"the number {text[:24]}... has more than 64 bits")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:24]} is not a finite number")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)[:80]!r} stands there twice")
    return found


def _deeper(value: Any, most: int) -> bool:
    """Return whether lists and objects stand in each other more than `most` deep."""
    level = [value]
    for _ in range(most):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]
        if not level:
            return False
    return True
