"""Contents and id of a store, manifest, values file, run, exported set or network."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import InstanceOf

from kcdcache.condensation import manifest, value_files
from kcdcache.errors import MismatchError, NotFoundError, UnfinishedError
from kcdcache.export import record
from kcdcache.files import parquet
from kcdcache.files.atomic import MOST_FILE_BYTES, read_bytes, sha256_file
from kcdcache.files.records import MOST_RECORD_BYTES, digest_of, read_object
from kcdcache.runs.folder import RunFolder
from kcdcache.settings import Settings
from kcdcache.store import identity, log
from kcdcache.store.identity import Knowledge
from kcdcache.store.log import PlanRecord

MOST_SAMPLES = parquet.UNKNOWN_ROWS
"""an index above this is a mistake, not a reason to allocate that much memory"""


class Contents(Settings):
    """The contents of a store according to its plan."""

    samples: int
    views: int
    points: int
    """samples x views"""
    fields: dict[str, str]
    part_rows: int
    batch_size: int
    compression: str
    layout_id: str


class StoreReport(Contents):
    """A store according to its records; the inherited fields are of its last commit, or of its first plan."""

    path: Path
    id: str | None
    """SHA-256 of the last commit; None before the first"""
    format_version: int
    sealed: bool
    growths: int
    growing_to: Contents | None
    """planned contents if the store is growing"""
    parts: dict[str, int]
    """parts `done` and `pending`"""
    bytes: int
    files: int
    skipped: int
    """samples without outputs, because their images are unreadable"""
    parameters: list[str]
    """stages whose filter statistics it has"""
    origin: dict[str, Any]
    """corruption of the labels, and whether the teacher was trained on the same data"""
    teacher_accuracy: dict[str, float]
    """view -> accuracy of the teacher on the samples done so far, in [0, 1]"""
    knowledge_id: str
    knowledge: InstanceOf[Knowledge]

    def document(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        found = self.model_dump(mode="json", exclude={"knowledge", "origin"})
        return found | self.origin | {"knowledge": self.knowledge.document()}


def inspect(path: Path) -> dict[str, Any]:
    """Return the contents of a path as JSON values, `kind` first; raises the errors of `kind_of`."""
    kind = kind_of(path)
    return {"kind": kind, "path": str(path), "id": KINDS[kind].id(path), **KINDS[kind].contents(path)}


def settings_file(path: Path) -> str:
    """Return a run's settings as TOML for `--config`; paths and machine are left to the command line.

    Raises MismatchError if there is something else.
    """
    if (kind := kind_of(path)) != "run":
        raise MismatchError(f"{path} is a {kind}; --toml prints the settings of a run: give the folder of one")
    found = read_object(RunFolder(path=path).settings, "settings", "inputs")["settings"]
    command, places = ("fit", "--data and --out") if "model" in found else ("train", "--data, --store and --out")
    # JSON of numbers, texts and lists is TOML, but for one character
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in found.items() if value is not None]
    return "\n".join([f"# kcdcache {command} --config FILE.toml, with {places}", *lines]).replace("\x7f", "\\u007f")


def id_of(path: Path) -> str | None:
    """Return the digest that identifies the contents of a path, or None if they are unfinished or of another tool.

    The SHA-256 of a store's last commit, a network's weights or a finished run's summary; the digest of a manifest,
    values file or exported set's record, which names its files.
    """
    return KINDS[kind_of(path)].id(path)


def require_ids(paths: Iterable[Path], expected: Collection[str] | None) -> None:
    """Raise MismatchError unless everything at the paths has one of the expected ids; without any, check nothing."""
    if not expected:
        return
    for path in paths:
        if (found := id_of(path)) not in expected:
            raise MismatchError(
                f"{path} has the id {found}, expected {' or '.join(expected)}; get it again, or leave --expect-id out"
            )


def kind_of(path: Path) -> str:
    """Return the kind of a path, a key of KINDS, by its marker alone.

    Raises:
        NotFoundError: the path does not exist.
        MismatchError: it is nothing that kcdcache wrote.
        CorruptionError: it is a damaged parquet file.
    """
    if not path.exists():
        raise NotFoundError(f"nothing at {path}")
    for name, kind in KINDS.items():
        if kind.fits(path):
            return name
    if runs := sorted(file.parent.name for file in path.glob("*/run.json")) if path.is_dir() else []:
        some = ", ".join(runs[:3]) + (", ..." if len(runs) > 3 else "")
        raise MismatchError(
            f"{path} is a folder of {len(runs)} runs ({some}): name one of them, or make a report of all with "
            f"`kcdcache report {path} --out report.html`"
        )
    if is_store(path / record.STORE):
        record.read(path)  # raises that the export was interrupted
    raise MismatchError(f"{path} is not a store, manifest, values file, run or network written by kcdcache")


def is_store(path: Path) -> bool:
    """Return whether a path is a store, finished or not."""
    return (path / log.FOLDER).is_dir()


def store_report(path: Path) -> StoreReport:
    """Read the records of a store, without its chunks; raise UnfinishedError if it has no plan yet."""
    knowledge = identity.read_store_identity(path)
    commits: list[log.Commit] = []
    with suppress(UnfinishedError):
        commits = log.read_commits(path)
    plans, records = [commit.plan for commit in commits], [found for commit in commits for found in commit.records]
    for growth in range(len(commits), log.growths(path, "plan")):
        plans.append(log.read_plan(path, growth))
        records += log.read_log(path, growth)
    if not plans:
        raise UnfinishedError(f"the store at {path} has no plan yet; run the same `kcdcache precompute` again")
    done = sum(found.view is not None for found in records)
    return StoreReport(
        path=path,
        id=_store_id(path),
        format_version=identity.FORMAT_VERSION,
        sealed=bool(commits),
        **dict(_contents(plans[max(0, len(commits) - 1)])),
        growths=len(commits),
        growing_to=_contents(plans[-1]) if 0 < len(commits) < len(plans) else None,
        parts={"done": done, "pending": sum(map(_planned_parts, plans, [None, *plans])) - done},
        bytes=sum(file.bytes for found in records for file in found.files),
        files=sum(len(found.files) for found in records),
        skipped=len(log.skipped_samples(records)),
        parameters=sorted(identity.read_parameters(path, knowledge) or ()),
        origin=_origin(path, knowledge),
        teacher_accuracy=_teacher_accuracy(plans[-1], records),
        knowledge_id=knowledge.knowledge_id,
        knowledge=knowledge,
    )


def _origin(path: Path, knowledge: Knowledge) -> dict[str, Any]:
    found = identity.read_origin(path)
    known = {} if found is None else found.told(knowledge.data.digest)
    return {name: value for name, value in known.items() if name != "class_sizes"}  # a thousand numbers


def _contents(plan: PlanRecord) -> Contents:
    return Contents(
        samples=plan.count,
        points=plan.count * plan.views,
        fields={entry.name: entry.encoding for entry in plan.fields},
        layout_id=digest_of(plan.document()),
        **plan.model_dump(include={"views", "part_rows", "batch_size", "compression"}),
    )


def _planned_parts(plan: PlanRecord, before: PlanRecord | None) -> int:
    """Return how many parts a plan adds to the previous one, as listed by `plan.parts`."""
    per_view = -(-plan.count // plan.part_rows)
    held = before.views if before is not None and len(before.fields) == len(plan.fields) else 0
    return per_view * (plan.views - held)


def _teacher_accuracy(plan: PlanRecord, records: Sequence[log.LogEntry]) -> dict[str, float]:
    views = sorted({found.view for found in records if found.view is not None})  # the plan may claim any number
    sums = {view: log.sum_measurements(records, view, plan.count, plan.part_rows) for view in views}
    return {str(view): found["correct"] / found["samples"] for view, found in sums.items() if "correct" in found}


def _run(path: Path) -> dict[str, Any]:
    folder = RunFolder(path=path)
    found = read_object(folder.settings, "settings", "inputs", "environment")
    summary = read_object(folder.summary) if folder.summary.exists() else None
    return {
        "finished": summary is not None,
        "epochs_done": read_bytes(folder.metrics, MOST_RECORD_BYTES).count(b"\n") if folder.metrics.exists() else 0,
        **{name: found[name] for name in ("settings", "inputs", "environment")},
        "stages": [manifest.summary(manifest.read(file)) for file in folder.manifests().values()],
        "summary": summary,
    }


def _values(path: Path) -> dict[str, Any]:
    count = _count(path)
    found = value_files.read(path, count)
    visits = found.values.visits
    value = found.values.value[visits > 0]
    return {
        "from": "another tool" if found.document is None else "kcdcache",
        "samples": count,
        "visited": len(value),
        "visits": [int(visits.min()), int(visits.max())] if count else None,
        "value_range": [float(value.min()), float(value.max())] if len(value) else None,
        "value_mean": float(value.mean(dtype="float64")) if len(value) else None,
        **(found.document or {}),
    }


def _count(path: Path) -> int:
    """Return the number of samples of a values file; the highest index decides, as other tools may omit samples."""
    if parquet.is_folder(path):
        return parquet.read_seal(path).samples
    foreign = value_files.METADATA_KEY not in parquet.metadata_keys(path)
    table = parquet.read(path, columns=tuple(value_files.COLUMNS))
    rows: int = table.num_rows
    if not foreign or table.column_names.count("index") != 1:
        return rows
    index = table["index"].to_numpy()
    highest = index.max(initial=-1) if index.dtype.kind in "iuf" else -1
    # `value_files.read` reports the row if it is no index
    return max(rows, int(highest) + 1) if 0 <= highest < MOST_SAMPLES else rows


def _network(path: Path) -> dict[str, Any]:
    file = path.with_suffix(".json")
    if not file.exists():
        raise NotFoundError(f"{path} has no {file.name} beside it, which describes it")
    return read_object(file)


def _condensed(path: Path) -> dict[str, Any]:
    found = record.read(path)
    content, count = found.content, found.content.knowledge.data.count
    record.require_file(found, record.MANIFEST)
    return {
        "format_version": record.FORMAT_VERSION,
        "rows": content.rows,
        **_contents(content.layout).model_dump(),
        "samples": count,
        "baked": None if content.baked is None else content.baked.model_dump(),
        "images": content.images is not None,
        "bytes": sum(store_report(found.path / part).bytes for part in content.stores)
        + sum(size for size, _ in content.files.values()),
        "license": content.licence,
        "manifest": manifest.summary(manifest.read(found.path / record.MANIFEST, count)),
        **(_origin(found.path / record.STORE, content.knowledge) if record.ORIGIN in content.files else {}),
        "made": found.made,
        "knowledge_id": content.knowledge_id,
        "knowledge": content.knowledge.document(),
    }


def _store_id(path: Path) -> str | None:
    sealed = log.growths(path, "commit")
    return sha256_file(log.commit_path(path, sealed - 1), MOST_RECORD_BYTES) if sealed else None


def _values_id(path: Path) -> str | None:
    with value_files.opened(path, _count(path), held=0) as source:
        return None if source.document is None else str(source.document["digest"])


def _is_table(path: Path) -> bool:
    return parquet.is_folder(path) or (path.suffix == ".parquet" and path.is_file())


class Kind(NamedTuple):
    """A kind of artifact."""

    fits: Callable[[Path], bool]
    """whether a path has its marker"""
    contents: Callable[[Path], dict[str, Any]]
    id: Callable[[Path], str | None]


KINDS: Mapping[str, Kind] = {
    "condensed": Kind(lambda path: (path / record.RECORD).exists(), _condensed, lambda path: record.read(path).id),
    "store": Kind(is_store, lambda path: store_report(path).document(), _store_id),
    "run": Kind(
        lambda path: RunFolder(path=path).settings.exists(),
        _run,
        lambda path: sha256_file(file, MOST_RECORD_BYTES) if (file := RunFolder(path=path).summary).exists() else None,
    ),
    "manifest": Kind(
        lambda path: _is_table(path) and manifest.METADATA_KEY in parquet.metadata_keys(path),
        lambda path: manifest.summary(manifest.read(path)),
        lambda path: manifest.read_head(path).digest,
    ),
    "values": Kind(_is_table, _values, _values_id),
    "network": Kind(
        lambda path: path.suffix in {".json", ".safetensors"} and path.with_suffix(".safetensors").exists(),
        _network,
        lambda path: sha256_file(path.with_suffix(".safetensors"), MOST_FILE_BYTES),
    ),
}
"""name -> kind, in the order they are tried"""
