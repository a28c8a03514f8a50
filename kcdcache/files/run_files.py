"""The record of a run's files: rows, digest and SHA-256 of each, so that swapped or stale ones are refused."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

from pydantic import Field

from kcdcache.errors import CorruptionError, MismatchError
from kcdcache.files.atomic import MOST_FILE_BYTES, sha256_file, write_atomic
from kcdcache.files.records import Count, Record, Sealed, Sha256, digest_of, read_object, read_sealed, sealed_json

T = TypeVar("T")

FILE = "files.json"
RUN = "run.json"
CLOCKED = ("summary.json",)
"""files with clock times: their digest leaves those out, and no SHA-256 is recorded"""
NAMES = (
    r"(values|given)\.parquet|stages/[0-9]+/(manifest|values)\.parquet|(ema/)?(student|model)\.(safetensors|json)"
    r"|summary\.json"
)
"""names of the files in the record"""
Name = Annotated[str, Field(pattern=f"^({NAMES})$")]


class Facts(NamedTuple):
    """What is known of a file before it is written."""

    rows: int | None = None
    """of a table"""
    digest: str | None = None
    """of the content: a manifest, values, or a summary without its clock times"""


class Entry(Record):
    """A finished file."""

    rows: Count | None
    digest: Sha256 | None
    bytes: Count | None
    sha256: Sha256 | None


class RunFiles(Sealed):
    """All files of a run, by name in its folder."""

    run: Sha256 | None = None
    """id of the run"""
    files: Mapping[Name, Entry] = Field(default_factory=dict)
    """finished files"""
    pending: tuple[Name, ...] = ()
    """being written, or cut short by a kill: the run's command writes them again"""


def run_id(run: Path) -> str | None:
    """Return the digest of a run's settings and inputs, or None if there is no run."""
    file = run / RUN
    if not file.exists():
        return None
    document = read_object(file, "settings", "inputs")
    return digest_of([document["settings"], document["inputs"]])


def read(run: Path) -> RunFiles:
    """Return the record of a run's files, empty before the first; raises MismatchError for another run's record."""
    file = run / FILE
    if not file.exists():
        return RunFiles()
    found = read_sealed(file, RunFiles)
    if found.run != (own := run_id(run)):
        raise MismatchError(f"{file} is of run {found.run}, {run / RUN} of {own}: they are of different runs")
    return found


@contextmanager
def writing(run: Path, files: Mapping[str, Facts]) -> Iterator[None]:
    """Announce files of a run, let the body write them, then record them; only under the run's lock.

    After a kill inside they stay announced: readers accept them (each is whole), and the run's command writes them
    again.
    """
    before = read(run)
    known, pending = {name: entry for name, entry in before.files.items() if name not in files}, set(before.pending)
    if not pending >= set(files):
        _write(run, known, pending | set(files))
    yield
    made = {name: _entry(run / name, name, facts) for name, facts in files.items()}
    _write(run, known | made, pending - set(files))


def cut_short(run: Path, name: str) -> bool:
    """Check whether a kill fell between the announcement of a file and its record, so that it must be made again."""
    return name in read(run).pending


def require(path: Path, facts: Facts) -> None:
    """Check that a file just read is the one its run wrote, or belongs to no run.

    Raises:
        MismatchError: it is another valid file; prints both digests and row counts.
        CorruptionError: its bytes differ, or the run has no record of it.
    """
    run, name = _place_of(path)
    if run is None:
        return
    record = read(run)
    if name in record.pending:
        return
    if name not in record.files:
        raise CorruptionError(f"{path} {_UNKNOWN}")
    entry = record.files[name]
    if (entry.rows, entry.digest) != facts:
        raise MismatchError(
            f"{path} holds {facts.digest} with {facts.rows} rows, the run wrote {entry.digest} with {entry.rows} rows: "
            "another file was put in its place; put the run's own back, or start a new run"
        )
    if trouble := _differs(path, entry):
        raise CorruptionError(f"{path} {trouble}")


def steady(path: Path, look: Callable[[], T]) -> T:
    """Return `look()`, repeated if the run replaced the file meanwhile."""
    run, name = _place_of(path)
    while True:
        before = run and read(run).files.get(name)
        found = look()
        if (run and read(run).files.get(name)) == before:
            return found


def problems(run: Path, record: RunFiles) -> dict[Path, str]:
    """Return file -> what is wrong, for files that are missing, not recorded, or not what the run wrote."""
    found = {run / name: _differs(run / name, entry) for name, entry in sorted(record.files.items())}
    for file in sorted(run.rglob("*")):
        name = str(file.relative_to(run))
        if file.is_file() and re.fullmatch(NAMES, name) and name not in (*record.files, *record.pending):
            found[file] = _UNKNOWN
    return {file: trouble for file, trouble in found.items() if trouble}


_UNKNOWN = (
    f"is not in {FILE}, the record of what the run wrote: an older kcdcache made it, or it was put there by hand; "
    "start a new run, and give a set made by hand with --manifest"
)


def _place_of(path: Path) -> tuple[Path | None, str]:
    """Return (run folder, name in it) of a file that runs record, or (None, "")."""
    whole = path.resolve()
    for folder in whole.parents[:3]:
        name = str(whole.relative_to(folder))
        if re.fullmatch(NAMES, name) and (folder / RUN).exists():
            return folder, name
    return None, ""


def _differs(path: Path, entry: Entry) -> str | None:
    if not path.is_file():
        return "is missing; the run wrote it"
    if entry.sha256 is None:
        return None
    if (size := path.stat().st_size) != entry.bytes:
        return f"has {size} bytes, the run wrote {entry.bytes}; put the run's own file back, or start a new run"
    if (found := sha256_file(path, MOST_FILE_BYTES)) != entry.sha256:
        return (
            f"is not what the run wrote: its SHA-256 is {found}, recorded was {entry.sha256}; put the run's own file "
            "back, or start a new run"
        )
    return None


def _entry(path: Path, name: str, facts: Facts) -> Entry:
    timed = name in CLOCKED
    size, digest = (None, None) if timed else (path.stat().st_size, sha256_file(path))
    return Entry(rows=facts.rows, digest=facts.digest, bytes=size, sha256=digest)


def _write(run: Path, files: Mapping[str, Entry], pending: set[str]) -> None:
    record = RunFiles(run=run_id(run), files=files, pending=tuple(sorted(pending)))
    write_atomic(run / FILE, sealed_json(record.document()))
