"""The records of a store: its plans, the log of finished parts, and the commits that seal it; reads no array."""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, NamedTuple, NoReturn

import numpy as np
from jaxtyping import Int64
from pydantic import Field, model_validator

from kcdcache.errors import CorruptionError, NonFiniteError, UnfinishedError, attempt
from kcdcache.files.atomic import create_exclusive, sha256_bytes, sha256_file
from kcdcache.files.records import MOST_RECORD_BYTES, Count, Record, Sealed, Sha256, digest_of, read_sealed, sealed_json
from kcdcache.store.identity import FOLDER, IDENTITY_FILE, IdentityRecord, Knowledge, read_store_identity

SAMPLES = "samples"
MOST_SKIPPED = 0.01
"""share of all samples that may be skipped; a teacher that fails on more is broken, or not made for the data"""
REPAIR = "`kcdcache verify STORE --repair --teacher ... --data ...` makes again what is damaged"

Report = Callable[[str], object]
Numbers = Mapping[str, int | float]
Size = Annotated[int, Field(gt=0, lt=2**63)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$")]
"""of a log record: never a path out of its folder"""


class FieldPlan(Record):
    """How the rows of one field are stored."""

    name: str
    encoding: str
    row_shape: tuple[Size, ...]
    chunk_rows: dict[str, Size]
    """array -> rows of each of its chunks"""


class PlanRecord(Sealed):
    """The content of plan.N.json; `plan.StorePlan` adds what follows from it."""

    count: Size
    """number of samples N"""
    views: Size
    part_rows: Size
    batch_size: Size
    """the teacher's batch within a part; other sizes change the last bits"""
    compression: str
    fields: tuple[FieldPlan, ...]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One finished chunk file."""

    path: str
    """relative to the store, with `/`"""
    bytes: Count
    sha256: Sha256
    crc32c: Count
    """checksum of the chunk, in the file's last four bytes"""


class LogEntry(Sealed):
    """What was finished together: a part of a view, or the arrays that describe samples (view None)."""

    growth: Count
    view: Count | None
    part: Count | None
    files: tuple[FileRecord, ...]
    statistics: dict[str, Numbers] = Field(default_factory=dict)
    """field -> count, minimum, maximum, non_finite of its values before encoding"""
    measurements: Numbers = Field(default_factory=dict)
    """counts made along with the part, such as the teacher's correct answers; may be summed over parts"""
    skipped: tuple[Count, ...] = ()
    """samples of the part with outputs that are not finite; their rows hold NaN and are never read"""

    @property
    def name(self) -> str:
        """The record's file name, without suffix."""
        return name_of(self.view, self.part)


class CommitRecord(Sealed):
    """The content of commit.N.json.

    Every small file can be restored from the others: the commit has the content of identity and plan, which together
    with the log records give the commit.
    """

    format_version: int
    growth: Count
    identity: IdentityRecord
    plan: PlanRecord
    previous: Sha256 | None
    """SHA-256 of the previous commit"""
    log: tuple[tuple[Name, Sha256], ...]

    @model_validator(mode="after")
    def _each_once(self) -> "CommitRecord":
        if len(set(self.log)) < len(self.log):  # reading a record again and again would fill the memory
            raise ValueError("its log names a record twice")
        return self


class Commit(NamedTuple):
    """A sealed growth: its knowledge, the plan it ended with, and its log."""

    knowledge: Knowledge
    plan: PlanRecord
    records: tuple[LogEntry, ...]
    sha256: str
    """of the commit file"""


def name_of(view: int | None, part: int | None) -> str:
    """Return the name of the log record of a part (view None: of the arrays that describe samples)."""
    return SAMPLES if view is None else f"v{view:05}-p{part:05}"


def plan_path(root: Path, growth: int) -> Path:
    """Return the path of a growth's plan (growth 0 creates the store)."""
    return root / FOLDER / f"plan.{growth}.json"


def commit_path(root: Path, growth: int) -> Path:
    """Return the path of a growth's commit."""
    return root / FOLDER / f"commit.{growth}.json"


def record_path(root: Path, growth: int, name: str) -> Path:
    """Return the path of a log record."""
    return root / FOLDER / "log" / str(growth) / f"{name}.json"


def growths(root: Path, kind: str) -> int:
    """Return the number of consecutive growths from 0 with a file of this kind, `plan` or `commit`."""
    return next(number for number in count() if not (root / FOLDER / f"{kind}.{number}.json").exists())


def write_record(root: Path, entry: LogEntry) -> None:
    """Write a part's log record, after its files are durable; raises LockedError if another writer logged the part."""
    create_exclusive(record_path(root, entry.growth, entry.name), sealed_json(entry.document()))


def read_record(path: Path) -> LogEntry:
    """Return a log record; raises CorruptionError if it is damaged."""
    entry = read_sealed(path, LogEntry)
    if entry.name != path.stem:
        raise CorruptionError(f"{path} is damaged: it is the record {entry.name}")
    return entry


def read_log(root: Path, growth: int) -> list[LogEntry]:
    """Return all log records of a growth, sealed or not, by name."""
    return [read_record(path) for path in sorted(record_path(root, growth, "").parent.glob("*.json"))]


def sum_measurements(records: Iterable[LogEntry], view: int, count: int, part_rows: int) -> dict[str, int | float]:
    """Return a view's measurements summed over its logged parts, and how many of the `count` samples are in those.

    Of a part logged twice (for a new field) the first record with a measurement counts.
    """
    parts: dict[int, dict[str, int | float]] = {}
    for record in records:
        if record.view == view and record.part is not None:
            parts[record.part] = {**record.measurements, **parts.get(record.part, {})}
    names = sorted({name for measured in parts.values() for name in measured})
    sums = {name: sum(measured.get(name, 0) for measured in parts.values()) for name in names}
    return {"samples": sum(min(part_rows, count - part * part_rows) for part in parts), **sums}


def skipped_samples(records: Iterable[LogEntry]) -> Int64[np.ndarray, " skipped"]:
    """Return the samples that any of these records skips, ascending, each once."""
    return np.array(sorted({index for record in records for index in record.skipped}), np.int64)


def read_skipped(root: Path) -> Int64[np.ndarray, " skipped"]:
    """Return the skipped samples of a store: of its sealed growths, or of all logged parts if none is sealed."""
    try:
        return skipped_samples(record for commit in read_commits(root) for record in commit.records)
    except UnfinishedError:
        return skipped_samples(read_log(root, 0))


def logged_skips(root: Path) -> set[int]:
    """Return the skipped samples of all logged parts, sealed or not, without those of damaged records."""
    found: set[int] = set()
    for path in (root / FOLDER / "log").glob("*/*.json"):
        with suppress(CorruptionError):
            found.update(read_record(path).skipped)
    return found


def require_few_skipped(skipped: Collection[int], count: int) -> None:
    """Raise NonFiniteError if more than MOST_SKIPPED of `count` samples are skipped."""
    if len(skipped) > MOST_SKIPPED * count:
        first = ", ".join(map(str, sorted(skipped)[:8]))
        raise NonFiniteError(
            f"{len(skipped)} of {count} samples have outputs that cannot be stored (the first: {first}), at most "
            f"{MOST_SKIPPED:.0%} may be skipped: the teacher is broken, or not made for this data"
        )


def read_plan(root: Path, growth: int) -> PlanRecord:
    """Return the plan of a growth."""
    return read_sealed(plan_path(root, growth), PlanRecord)


def commit_bytes(root: Path, growth: int, names: Iterable[str]) -> bytes:
    """Return the content of the commit that seals the log records of these names."""
    identity = IdentityRecord.of(read_store_identity(root))
    commit = CommitRecord(
        format_version=identity.format_version,
        growth=growth,
        identity=identity,
        plan=read_plan(root, growth),
        previous=_sha256(commit_path(root, growth - 1)) if growth else None,
        log=tuple((name, _sha256(record_path(root, growth, name))) for name in names),
    )
    return sealed_json(commit.document())


def read_seal(root: Path, growth: int) -> CommitRecord:
    """Return the content of a commit, checked against its own digest only; raises CorruptionError if it is damaged."""
    commit = read_sealed(commit_path(root, growth), CommitRecord)
    if commit.growth != growth:
        raise CorruptionError(f"{commit_path(root, growth)} is the commit of growth {commit.growth}")
    return commit


def refuse(problem: str) -> NoReturn:
    """Raise a problem as CorruptionError, with the remedy."""
    raise CorruptionError(f"{problem}; {REPAIR}")


def unfinished(root: Path) -> UnfinishedError:
    """Return the error for a store without commit records."""
    remedy = "it has no commit record; run the same `kcdcache precompute` again and it resumes"
    remedy += " (without --shard, which leaves parts to others)"
    return UnfinishedError(f"the store at {root} is not finished: {remedy}")


def stored_bytes(root: Path) -> int:
    """Return the total size of a sealed store's chunk files, as listed in its commits."""
    return sum(file.bytes for commit in read_commits(root) for record in commit.records for file in record.files)


def read_commits(root: Path, report: Report = refuse) -> list[Commit]:
    """Return all sealed growths in order, each checked against the files it names; damage goes to `report`.

    Raises UnfinishedError if nothing is sealed yet.
    """
    listed = list((root / FOLDER).glob("commit.*.json"))  # before counting: a growth may be sealed in between
    sealed = growths(root, "commit")
    known = {commit_path(root, growth) for growth in range(sealed)}
    if later := sorted(path.name for path in listed if path not in known):
        report(f"{root / FOLDER} holds {', '.join(later)} but not {commit_path(root, sealed).name}")
    elif not sealed:
        raise unfinished(root)
    return [commit for growth in range(sealed) if (commit := attempt(report, _read_commit, root, growth, report))]


def _read_commit(root: Path, growth: int, report: Report) -> Commit:
    path = commit_path(root, growth)
    seal = read_seal(root, growth)
    attempt(report, _require_same, root / IDENTITY_FILE, digest_of(seal.identity.document()), path)
    attempt(report, _require_same, plan_path(root, growth), sha256_bytes(sealed_json(seal.plan.document())), path)
    if growth:
        attempt(report, _require_same, commit_path(root, growth - 1), str(seal.previous), path)
    # a generator: a list of all paths would take ten times the memory of their names
    logged = ((record_path(root, growth, name), digest) for name, digest in seal.log)
    records = tuple(entry for file, digest in logged if (entry := attempt(report, _read_logged, file, digest, path)))
    return Commit(seal.identity.knowledge, seal.plan, records, _sha256(path))


def _read_logged(path: Path, digest: str, commit: Path) -> LogEntry:
    _require_same(path, digest, commit)
    return read_record(path)


def _require_same(path: Path, digest: str, commit: Path) -> None:
    if _sha256(path) != digest:
        raise CorruptionError(f"{path} is not the file that {commit.name} sealed")


def _sha256(path: Path) -> str:
    return sha256_file(path, MOST_RECORD_BYTES)
