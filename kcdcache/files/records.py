"""What a run wrote: rows, digest and SHA-256 of its files in one record, so that a swapped or stale one is refused."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kcdcache.errors import CorruptionError, MismatchError
from kcdcache.files.atomic import (
    MOST_FILE_BYTES,
    digest_of,
    read_object,
    read_sealed,
    sealed_json,
    sha256_file,
    write_atomic,
)

T = TypeVar("T")

FILE = "files.json"
RUN = "run.json"
CLOCKED = ("summary.json",)
"""files with clock times in them: their digest leaves those out, and nobody keeps a SHA-256 of them"""
_NAMES = re.compile(
    r"(values|given)\.parquet|stages/\d+/(manifest|values)\.parquet|(student|model)\.(safetensors|json)|summary\.json"
)


class Facts(NamedTuple):
    """What is known of a file before it is written."""

    rows: int | None = None
    """rows of a table"""
    digest: str | None = None
    """digest of what it means: of a manifest, of values, of a summary without its clock times"""


class Entry(NamedTuple):
    """A finished file."""

    rows: int | None
    digest: str | None
    bytes: int | None
    sha256: str | None


class Record(NamedTuple):
    """All of a run's files by their name in its folder."""

    files: Mapping[str, Entry]
    """finished ones"""
    pending: frozenset[str]
    """being written now, or cut short by a kill: the run's command writes them again"""


def run_id(run: Path) -> str | None:
    """Return the digest of a run's settings and inputs, or None where there is no run.

    Raises:
        CorruptionError: its run.json is damaged.
    """
    file = run / RUN
    if not file.exists():
        return None
    document = read_object(file, "settings", "inputs")
    return digest_of([document["settings"], document["inputs"]])


def read(run: Path) -> Record:
    """Return the record of a run's files; an empty one where nothing was written yet.

    Raises:
        CorruptionError: the record is damaged.
        MismatchError: it is another run's; prints both ids.
    """
    file = run / FILE
    if not file.exists():
        return Record({}, frozenset())
    found = read_sealed(file, "run", "files", "pending")
    if found["run"] != (own := run_id(run)):
        raise MismatchError(f"{file} is of run {found['run']}, {run / RUN} of {own}: they are of different runs")
    try:
        record = Record({name: Entry(**entry) for name, entry in found["files"].items()}, frozenset(found["pending"]))
        if odd := [name for name in (*record.files, *record.pending) if not _NAMES.fullmatch(name)]:
            raise ValueError(f"it names {odd[0]!r:.80}, which no file of a run is called")
    except (TypeError, ValueError, AttributeError) as error:
        raise CorruptionError(f"{file} is damaged: {error}") from None
    return record


@contextmanager
def writing(run: Path, files: Mapping[str, Facts]) -> Iterator[None]:
    """Announce files of a run, let the body write them, then record what lies there.

    A kill inside leaves them announced: readers take them as they are (each is whole by itself), and the run's command
    writes them again. One writer at a time (the run's lock).

    Raises:
        NoSpaceError: the disk is full.
    """
    before = read(run)
    known = {name: entry for name, entry in before.files.items() if name not in files}
    if not before.pending >= set(files):
        _write(run, Record(known, before.pending | set(files)))
    yield
    made = {name: _entry(run / name, name, facts) for name, facts in files.items()}
    _write(run, Record(known | made, before.pending - set(files)))


def cut_short(run: Path, name: str) -> bool:
    """Return whether a kill fell between the announcement of a file and its record, so that it must be made again."""
    return name in read(run).pending


def place_of(path: Path) -> tuple[Path, str] | None:
    """Return (run folder, name in it) of a file that runs keep a record of, or None for any other."""
    whole = path.resolve()
    for folder in (whole.parent, *whole.parents[2:3]):
        name = str(whole.relative_to(folder))
        if _NAMES.fullmatch(name) and (folder / RUN).exists():
            return folder, name
    return None


def require(path: Path, facts: Facts) -> None:
    """Do nothing if a file that was just read is the one its run wrote, or lies in no run.

    Raises:
        MismatchError: it is a whole one, but another; prints both digests and row counts.
        CorruptionError: its bytes differ, or the run has no record of it.
    """
    place = place_of(path)
    if place is None:
        return
    record = read(place[0])
    if place[1] in record.pending:
        return
    entry = _known(record, path, place[1])
    if (entry.rows, entry.digest) != facts:
        raise MismatchError(
            f"{path} holds {facts.digest} with {facts.rows} rows, the run wrote {entry.digest} with {entry.rows} rows: "
            "another file was put in its place; put the run's own back, or start the run anew"
        )
    if trouble := _differs(path, entry):
        raise CorruptionError(f"{path} {trouble}")


def steady(path: Path, look: Callable[[], T]) -> T:
    """Return what `look` finds in a file, looking again where the run replaced the file meanwhile."""
    while True:
        before, found = _state(path), look()
        if _state(path) == before:
            return found


def problems(run: Path, record: Record) -> dict[Path, str]:
    """Return file -> what is wrong, for each that is missing, not recorded, or not what the run wrote."""
    found = {}
    for name, entry in sorted(record.files.items()):
        if trouble := _differs(run / name, entry):
            found[run / name] = trouble
    there = [str(file.relative_to(run)) for file in sorted(run.rglob("*")) if file.is_file()]
    for name in there:
        if _NAMES.fullmatch(name) and name not in record.files and name not in record.pending:
            found[run / name] = _UNKNOWN
    return found


_UNKNOWN = (
    f"is not in {FILE}, the record of what the run wrote: an older kcdcache made it, or it was put there by hand; "
    "start the run anew, and give a set made by hand with --manifest"
)


def _state(path: Path) -> Entry | None:
    place = place_of(path)
    return read(place[0]).files.get(place[1]) if place else None


def _known(record: Record, path: Path, name: str) -> Entry:
    if name not in record.files:
        raise CorruptionError(f"{path} {_UNKNOWN}")
    return record.files[name]


def _differs(path: Path, entry: Entry) -> str | None:
    if not path.is_file():
        return "is missing; the run wrote it"
    if entry.sha256 is None:
        return None
    if (size := path.stat().st_size) != entry.bytes:
        return f"has {size} bytes, the run wrote {entry.bytes}; put the run's own file back, or start the run anew"
    if (found := sha256_file(path, MOST_FILE_BYTES)) != entry.sha256:
        return (
            f"is not what the run wrote: its SHA-256 is {found}, recorded was {entry.sha256}; put the run's own file "
            "back, or start the run anew"
        )
    return None


def _entry(path: Path, name: str, facts: Facts) -> Entry:
    if name in CLOCKED:
        return Entry(facts.rows, facts.digest, None, None)
    return Entry(facts.rows, facts.digest, path.stat().st_size, sha256_file(path))


def _write(run: Path, record: Record) -> None:
    content: dict[str, Any] = {
        "run": run_id(run),
        "files": {name: entry._asdict() for name, entry in record.files.items()},
        "pending": sorted(record.pending),
    }
    write_atomic(run / FILE, sealed_json(content))
