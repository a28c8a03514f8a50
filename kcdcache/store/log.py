"""The log and commit records of a store: which files were finished, and what seals them; touches no array."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jaxtyping import Int64

from kcdcache.errors import CorruptionError, KcdcacheError, NonFiniteError, UnfinishedError
from kcdcache.files.atomic import (
    MOST_JSON_BYTES,
    canonical_json,
    create_exclusive,
    read_json,
    read_sealed,
    sealed_json,
    sha256_bytes,
    sha256_file,
    write_atomic,
)
from kcdcache.store.identity import FORMAT_VERSION, IDENTITY_FILE, Knowledge

FOLDER = Path("_kcd")
SAMPLES = "samples"
MOST_SKIPPED = 0.01
"""share of all samples that may be skipped; a teacher that fails on more is broken, or not made for the data"""

REPAIR = "`kcdcache verify STORE --repair --teacher ... --data ...` makes again what is damaged"

PLAN_NUMBERS = ("count", "views", "part_rows", "batch_size")
_NAME, _SHA256 = re.compile(r"\w[\w-]*", re.ASCII), re.compile(r"[0-9a-f]{64}")

Report = Callable[[str], None]
Numbers = Mapping[str, int | float]


class FileRecord(NamedTuple):
    """One finished chunk file."""

    path: str
    """relative to the store, with `/`"""
    bytes: int
    sha256: str
    crc32c: int
    """checksum of the chunk, which the file's last four bytes hold"""


@dataclass(frozen=True)
class Record:
    """What was finished together: a part of a view, or the arrays that describe samples (view None)."""

    view: int | None
    part: int | None
    files: tuple[FileRecord, ...]
    statistics: Mapping[str, Numbers] = field(default_factory=dict)
    """field -> count, minimum, maximum, non_finite of its values before encoding"""
    measurements: Numbers = field(default_factory=dict)
    """what was counted while the part was made, such as the teacher's correct answers; may be summed over parts"""
    skipped: tuple[int, ...] = ()
    """samples of the part whose outputs were not finite; their rows hold NaN and are never read"""

    @property
    def name(self) -> str:
        """The record's file name, without ending."""
        return SAMPLES if self.view is None else f"v{self.view:05}-p{self.part:05}"


@dataclass(frozen=True)
class Commit:
    """A sealed growth: its number, the plan it ended with, and its records."""

    growth: int
    plan: dict[str, Any]
    records: tuple[Record, ...]
    sha256: str
    """of the commit file"""


def plan_path(root: Path, growth: int) -> Path:
    """Return where the plan of a growth lies (growth 0 is the store's creation)."""
    return root / FOLDER / f"plan.{growth}.json"


def commit_path(root: Path, growth: int) -> Path:
    """Return where the commit record of a growth lies."""
    return root / FOLDER / f"commit.{growth}.json"


def record_path(root: Path, growth: int, name: str) -> Path:
    """Return where the log record of a part lies."""
    return root / FOLDER / "log" / str(growth) / f"{name}.json"


def growths(root: Path, kind: str) -> int:
    """Return how many consecutive growths from 0 have a `plan` or a `commit` file."""
    count = 0
    while (root / FOLDER / f"{kind}.{count}.json").exists():
        count += 1
    return count


def write_record(root: Path, growth: int, record: Record) -> None:
    """Write a part's log record, after its files are durable.

    Raises:
        LockedError: another writer logged the same part.
    """
    create_exclusive(record_path(root, growth, record.name), record_bytes(growth, record))


def record_bytes(growth: int, record: Record) -> bytes:
    """Return the content of a part's log record."""
    files = [entry._asdict() for entry in record.files]
    return sealed_json(asdict(record) | {"growth": growth, "files": files, "skipped": list(record.skipped)})


def read_record(path: Path) -> Record:
    """Return a log record.

    Raises:
        NotFoundError: there is none.
        CorruptionError: it is damaged.
    """
    document = read_sealed(path, "growth", *Record.__dataclass_fields__)
    try:
        files = tuple(_file_record(entry) for entry in document["files"])
        given = {name: document[name] for name in Record.__dataclass_fields__}
        record = Record(**given | {"files": files, "skipped": _indices(document["skipped"])})
        if record.name != path.stem:
            raise ValueError(f"it is the record {record.name}")
        if odd := [value for value in record.measurements.values() if not isinstance(value, int | float)]:
            raise TypeError(f"it measured {odd[0]!r:.80}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptionError(f"{path} is damaged: {error}") from None
    return record


def read_log(root: Path, growth: int) -> list[Record]:
    """Return all log records of a growth, sealed or not, by name.

    Raises:
        CorruptionError: one is damaged.
    """
    return [read_record(path) for path in sorted(record_path(root, growth, "").parent.glob("*.json"))]


def sum_measurements(records: Iterable[Record], view: int, count: int, part_rows: int) -> dict[str, int | float]:
    """Return a view's measurements summed over its logged parts, and how many of the `count` samples those hold.

    Of a part logged twice (for a new field) the first record that has a measurement counts.
    """
    parts: dict[int, dict[str, int | float]] = {}
    for record in records:
        if record.view == view and record.part is not None:
            parts[record.part] = {**record.measurements, **parts.get(record.part, {})}
    names = sorted({name for measured in parts.values() for name in measured})
    sums = {name: sum(measured.get(name, 0) for measured in parts.values()) for name in names}
    return {"samples": sum(min(part_rows, count - part * part_rows) for part in parts), **sums}


def skipped_samples(records: Iterable[Record]) -> Int64[np.ndarray, " skipped"]:
    """Return the samples that any of some records leaves out, ascending, each once."""
    return np.array(sorted({index for record in records for index in record.skipped}), np.int64)


def read_skipped(root: Path) -> Int64[np.ndarray, " skipped"]:
    """Return the samples that a store leaves out: those of its sealed growths, or all logged where none is sealed.

    Raises:
        CorruptionError: a record is damaged.
    """
    try:
        return skipped_samples(record for commit in read_commits(root) for record in commit.records)
    except UnfinishedError:
        return skipped_samples(read_log(root, 0))


def logged_skips(root: Path) -> set[int]:
    """Return the samples that parts logged so far leave out, sealed or not; parts of damaged records come again."""
    found: set[int] = set()
    for path in (root / FOLDER / "log").glob("*/*.json"):
        with suppress(CorruptionError):
            found.update(read_record(path).skipped)
    return found


def require_few_skipped(skipped: Collection[int], count: int) -> None:
    """Do nothing if no more than MOST_SKIPPED of `count` samples are skipped.

    Raises:
        NonFiniteError: more are; names the first.
    """
    if len(skipped) > MOST_SKIPPED * count:
        first = ", ".join(map(str, sorted(skipped)[:8]))
        raise NonFiniteError(
            f"{len(skipped)} of {count} samples have outputs that cannot be stored (the first: {first}), at most "
            f"{MOST_SKIPPED:.0%} may be skipped: the teacher is broken, or not made for this data"
        )


def refuse_skipped(skipped: Int64[np.ndarray, " skipped"], rows: Int64[np.ndarray, " rows"], path: Path) -> None:
    """Do nothing if no skipped sample is among the rows asked for, each of which is named once.

    Raises:
        NonFiniteError: one is; names the first.
    """
    if len(skipped) and len(found := np.intersect1d(rows, skipped, assume_unique=True)):
        raise NonFiniteError(
            f"sample {found[0]} was skipped when {path} was made, because the teacher's outputs on it are not finite; "
            f"leave out the {len(skipped)} samples of `Store.skipped`, as `train` does by itself"
        )


def write_plan(root: Path, growth: int, plan: Mapping[str, Any]) -> None:
    """Write the plan of a growth, before its first part."""
    write_atomic(plan_path(root, growth), sealed_json(plan))


def read_plan(root: Path, growth: int) -> dict[str, Any]:
    """Return the plan of a growth.

    Raises:
        NotFoundError: there is none.
        CorruptionError: it is damaged.
    """
    plan = read_sealed(plan_path(root, growth))
    _require_plan(plan, plan_path(root, growth))
    return plan


def write_commit(root: Path, growth: int, names: Iterable[str]) -> None:
    """Seal a growth: write the record that everything before it leads to, last of all.

    Raises:
        LockedError: another writer sealed it.
    """
    create_exclusive(commit_path(root, growth), commit_bytes(root, growth, names))


def commit_bytes(root: Path, growth: int, names: Iterable[str]) -> bytes:
    """Return the content of a commit: copies of identity and plan, digests of all records and of the commit before.

    Every small file can be made again from the others: the commit holds what identity and plan hold, and they and the
    records hold what the commit holds.
    """
    return sealed_json(
        {
            "format_version": FORMAT_VERSION,
            "growth": growth,
            "identity": read_json(root / IDENTITY_FILE),
            "plan": read_plan(root, growth),
            "previous": sha256_file(commit_path(root, growth - 1), MOST_JSON_BYTES) if growth else None,
            "log": [[name, sha256_file(record_path(root, growth, name), MOST_JSON_BYTES)] for name in names],
        }
    )


def refuse(problem: str) -> NoReturn:
    """Report a problem by raising it, with what can be done about it.

    Raises:
        CorruptionError: always.
    """
    raise CorruptionError(f"{problem}; {REPAIR}")


def check_count(root: Path, count: int, knowledge: Knowledge, report: Report = refuse) -> None:
    """Compare the samples of a store's plan with those of its data; one of mixes, or exported, holds a part of them.

    Raises:
        CorruptionError: they differ, unless `report` collects it.
    """
    if knowledge.whole and count != knowledge.data.count:
        report(f"the plan of {root} has {count} samples, its identity {knowledge.data.count}: get the store again")


def stored_bytes(root: Path) -> int:
    """Return the bytes of a sealed store's chunk files, as its commits list them.

    Raises:
        UnfinishedError, CorruptionError: as for `read_commits`.
    """
    return sum(file.bytes for commit in read_commits(root) for record in commit.records for file in record.files)


def read_commits(root: Path, report: Report = refuse) -> list[Commit]:
    """Return all sealed growths in order, each checked against the files it names; damage goes to `report`.

    Raises:
        UnfinishedError: nothing was sealed yet.
        CorruptionError: something is damaged, unless `report` collects it.
    """
    listed = list((root / FOLDER).glob("commit.*.json"))  # first: a growth sealed meanwhile has not passed over another
    sealed = growths(root, "commit")
    if later := [path.name for path in listed if not _precedes(path, sealed)]:
        report(f"{root / FOLDER} holds {', '.join(sorted(later))} but not {commit_path(root, sealed).name}")
    elif not sealed:
        raise UnfinishedError(
            f"the store at {root} is not finished: it has no commit record; run the same `kcdcache precompute` again "
            "and it resumes"
        )
    return [commit for growth in range(sealed) if (commit := _attempt(report, _read_commit, root, growth, report))]


def read_seal(root: Path, growth: int) -> dict[str, Any]:
    """Return the content of a commit, compared with nothing but its own digest.

    Raises:
        NotFoundError: the growth is not sealed.
        CorruptionError: the commit is damaged.
    """
    document = read_sealed(commit_path(root, growth), "growth", "identity", "plan", "previous", "log")
    _require_commit(document, commit_path(root, growth))
    if document["growth"] != growth:
        raise CorruptionError(f"{commit_path(root, growth)} is the commit of growth {document['growth']}")
    return document


def _require_commit(document: Mapping[str, Any], path: Path) -> None:
    """Refuse a commit of wrong types, and names in it that could lead to files elsewhere."""
    log = document["log"]
    if not isinstance(document["identity"], dict) or not isinstance(log, list):
        raise CorruptionError(f"{path} is damaged: its identity should be an object and its log a list")
    _require_plan(document["plan"], path)
    if len({str(entry) for entry in log}) < len(log):  # a record read again and again would fill the memory
        raise CorruptionError(f"{path} is damaged: its log names a record twice")
    for entry in log:
        whole = isinstance(entry, list) and len(entry) == 2 and all(isinstance(text, str) for text in entry)
        if not whole or not _NAME.fullmatch(entry[0]) or not _SHA256.fullmatch(entry[1]):
            raise CorruptionError(
                f"{path} is damaged: its log has the entry {entry!r:.80}, not a record and its SHA-256"
            )


def _require_plan(plan: Any, path: Path) -> None:
    """Refuse what is no plan at all; `layout.plan_from` looks closer."""
    numbers = [plan.get(name) for name in PLAN_NUMBERS] if isinstance(plan, dict) else [None]
    fields = plan.get("fields") if isinstance(plan, dict) else None
    if not all(type(number) is int and number > 0 for number in numbers) or not isinstance(
        plan.get("compression"), str
    ):
        raise CorruptionError(f"{path} is damaged: {', '.join(PLAN_NUMBERS)} of its plan should be positive numbers")
    if not isinstance(fields, list) or not all(_is_field(entry) for entry in fields):
        raise CorruptionError(f"{path} is damaged: the fields of its plan should each have a name and an encoding")


def _is_field(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "encoding"))


def _read_commit(root: Path, growth: int, report: Report) -> Commit:
    path = commit_path(root, growth)
    document = read_seal(root, growth)
    _attempt(report, _require_bytes, root / IDENTITY_FILE, canonical_json(document["identity"]), path)
    _attempt(report, _require_bytes, plan_path(root, growth), sealed_json(document["plan"]), path)
    if growth:
        _attempt(report, _require_digest, commit_path(root, growth - 1), document["previous"], path)
    # one path after the other: a list of all would take ten times the memory of their names
    logged = ((record_path(root, growth, name), digest) for name, digest in document["log"])
    records = [_attempt(report, _read_logged, file, digest, path) for file, digest in logged]
    return Commit(
        growth, document["plan"], tuple(record for record in records if record), sha256_file(path, MOST_JSON_BYTES)
    )


def _read_logged(path: Path, digest: str, commit: Path) -> Record:
    _require_digest(path, digest, commit)
    return read_record(path)


def _require_bytes(path: Path, data: bytes, commit: Path) -> None:
    _require_digest(path, sha256_bytes(data), commit)


def _require_digest(path: Path, digest: str, commit: Path) -> None:
    if sha256_file(path, MOST_JSON_BYTES) != digest:
        raise CorruptionError(f"{path} is not the file that {commit.name} sealed")


def _attempt(report: Report, read: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return read(*arguments)
    except KcdcacheError as error:
        report(str(error))
        return None


def _file_record(entry: Mapping[str, Any]) -> FileRecord:
    record = FileRecord(**entry)
    if not isinstance(record.path, str) or not isinstance(record.bytes, int) or not isinstance(record.crc32c, int):
        raise TypeError(f"file entry {entry}")
    return record


def _indices(entries: Any) -> tuple[int, ...]:
    if not all(type(index) is int and 0 <= index < 2**63 for index in entries):
        raise TypeError(f"skipped samples {entries}")
    return tuple(entries)


def _precedes(path: Path, sealed: int) -> bool:
    number = path.name.split(".")[1]
    return number.isdecimal() and int(number) < sealed
