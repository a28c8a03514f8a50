"""The log and commit records of a store: which files were finished, and what seals them; touches no array."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from kcdcache.errors import CorruptionError, KcdcacheError, UnfinishedError
from kcdcache.files import canonical_json, create_exclusive, digest_of, read_json, sha256_bytes, sha256_file
from kcdcache.identity import FORMAT_VERSION, IDENTITY_FILE

FOLDER = Path("_kcd")
SAMPLES = "samples"

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
    document = asdict(record) | {"growth": growth, "files": [entry._asdict() for entry in record.files]}
    create_exclusive(record_path(root, growth, record.name), canonical_json(document))


def read_record(path: Path) -> Record:
    """Return a log record.

    Raises:
        NotFoundError: there is none.
        CorruptionError: it is damaged.
    """
    document = read_json(path)
    try:
        files = tuple(_file_record(entry) for entry in document["files"])
        record = Record(document["view"], document["part"], files, document["statistics"], document["measurements"])
        if record.name != path.stem:
            raise ValueError(f"it is the record {record.name}")
    except (KeyError, TypeError, ValueError) as error:
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


def write_commit(root: Path, growth: int, names: Iterable[str]) -> None:
    """Seal a growth: write the record that everything before it leads to, last of all.

    Raises:
        LockedError: another writer sealed it.
    """
    previous = sha256_file(commit_path(root, growth - 1)) if growth else None
    document = {
        "format_version": FORMAT_VERSION,
        "growth": growth,
        "identity": sha256_file(root / IDENTITY_FILE),
        "plan": sha256_file(plan_path(root, growth)),
        "previous": previous,
        "log": [[name, sha256_file(record_path(root, growth, name))] for name in names],
    }
    create_exclusive(commit_path(root, growth), canonical_json(document | {"digest": digest_of(document)}))


def refuse(problem: str) -> NoReturn:
    """Report a problem by raising it.

    Raises:
        CorruptionError: always.
    """
    raise CorruptionError(problem)


def read_commits(root: Path, report: Report = refuse) -> list[Commit]:
    """Return all sealed growths in order, each checked against the files it names; damage goes to `report`.

    Raises:
        UnfinishedError: nothing was sealed yet.
        CorruptionError: something is damaged, unless `report` collects it.
    """
    sealed = growths(root, "commit")
    if later := [path.name for path in (root / FOLDER).glob("commit.*.json") if not _precedes(path, sealed)]:
        report(f"{root / FOLDER} holds {', '.join(sorted(later))} but not {commit_path(root, sealed).name}")
    elif not sealed:
        raise UnfinishedError(
            f"the store at {root} is not finished: it has no commit record; run the same `kcdcache precompute` again "
            "and it resumes"
        )
    return [commit for growth in range(sealed) if (commit := _attempt(report, _read_commit, root, growth, report))]


def _read_commit(root: Path, growth: int, report: Report) -> Commit:
    path = commit_path(root, growth)
    data = path.read_bytes()
    document = read_json(path)
    _require_own_digest(path, data, document)
    if document["growth"] != growth:
        report(f"{path} is the commit of growth {document['growth']}")
    expected = [(root / IDENTITY_FILE, document["identity"]), (plan_path(root, growth), document["plan"])]
    if growth:
        expected.append((commit_path(root, growth - 1), document["previous"]))
    for file, digest in expected:
        _attempt(report, _require_digest, file, digest, path)
    logged = [(record_path(root, growth, name), digest) for name, digest in document["log"]]
    records = [_attempt(report, _read_logged, file, digest, path) for file, digest in logged]
    plan = _attempt(report, read_json, plan_path(root, growth)) or {}
    return Commit(growth, plan, tuple(record for record in records if record), sha256_bytes(data))


def _read_logged(path: Path, digest: str, commit: Path) -> Record:
    _require_digest(path, digest, commit)
    return read_record(path)


def _require_digest(path: Path, digest: str, commit: Path) -> None:
    if sha256_file(path) != digest:
        raise CorruptionError(f"{path} is not the file that {commit.name} sealed")


def _require_own_digest(path: Path, data: bytes, document: Any) -> None:
    content = {key: value for key, value in document.items() if key != "digest"} if isinstance(document, dict) else {}
    if not content or document.get("digest") != digest_of(content) or canonical_json(document) != data:
        raise CorruptionError(f"{path} was changed: its content does not match its digest")


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


def _precedes(path: Path, sealed: int) -> bool:
    number = path.name.split(".")[1]
    return number.isdecimal() and int(number) < sealed
