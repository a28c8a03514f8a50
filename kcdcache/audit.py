"""What a store holds, finished or not, and whether every byte of it is what was written."""

from pathlib import Path
from typing import Any, NamedTuple

from kcdcache import layout, ledger
from kcdcache.errors import CorruptionError, KcdcacheError, NotFoundError
from kcdcache.files import read_json, sha256_file
from kcdcache.identity import FORMAT_VERSION, Knowledge, read_store_identity
from kcdcache.layout import Chunk, StorePlan
from kcdcache.ledger import Commit, FileRecord, Record
from kcdcache.store import check_documents, check_listing, file_table, listed_sizes, size_problem, sum_measurements


class Verification(NamedTuple):
    """What a verification looked at, and all it found wrong."""

    files: int
    """chunk files compared"""
    bytes: int
    """bytes of chunk files read; 0 if only records and sizes were compared"""
    problems: tuple[str, ...]
    """one line per damage, each naming file and samples; empty for a sound store"""


def verify(path: Path | str, *, read_data: bool = True) -> Verification:
    """Compare records with commits, array documents with the plan, and every chunk file with its size and SHA-256.

    All damage is collected. Without `read_data` only records, documents and sizes are compared.

    Raises:
        NotFoundError: there is no store.
        UnfinishedError: it was never sealed.
        MismatchError: it was written by a newer format.
    """
    root, problems = Path(path), list[str]()
    _check_identity(root, problems)
    commits = ledger.read_commits(root, problems.append)
    plan = _plan(commits, problems)
    if plan is None:
        return Verification(0, 0, tuple(problems))
    files = file_table(commits)
    check_documents(root, plan, len(commits), problems.append)
    check_listing(root, plan, files, problems.append)
    chunks = layout.all_chunks(plan)
    sound = _sound_chunks(root, plan, chunks, files) if read_data else []
    for chunk in sound:
        if sha256_file(root / chunk.key) != files[chunk.key].sha256:
            problems.append(f"{root}/{chunk} is not what was written: its SHA-256 differs from the log")
    return Verification(len(chunks), sum(files[chunk.key].bytes for chunk in sound), tuple(problems))


def describe(path: Path | str) -> dict[str, Any]:
    """Return what a store holds, finished or not, as JSON values: identity, fields with bounds, sizes, parts, accuracy.

    Raises:
        NotFoundError: there is no store.
        MismatchError: it was written by a newer format.
        CorruptionError: a record was changed.
    """
    root = Path(path)
    knowledge = read_store_identity(root)
    sealed, growths = ledger.growths(root, "commit"), ledger.growths(root, "plan")
    if not growths:
        raise NotFoundError(f"the store at {root} has no plan yet; run the same `kcdcache precompute` again")
    plan = layout.plan_from(read_json(ledger.plan_path(root, growths - 1)))
    records = [record for growth in range(growths) for record in _records(root, growth)]
    done = sum(record.view is not None for record in records)
    return {
        "path": str(root),
        "format_version": FORMAT_VERSION,
        "sealed": sealed > 0,
        "growing": 0 < sealed < growths,
        **_identity(knowledge),
        **_contents(plan),
        "parts": {"done": done, "pending": _planned_parts(root, growths) - done},
        "measurements": [_measured(plan, records, view) for view in range(plan.views)],
    }


def _check_identity(root: Path, problems: list[str]) -> Knowledge | None:
    try:
        return read_store_identity(root)
    except CorruptionError as error:
        problems.append(str(error))
        return None


def _plan(commits: list[Commit], problems: list[str]) -> StorePlan | None:
    try:
        return layout.plan_from(commits[-1].plan) if commits else None
    except KcdcacheError as error:
        problems.append(str(error))
        return None


def _sound_chunks(root: Path, plan: StorePlan, chunks: list[Chunk], files: dict[str, FileRecord]) -> list[Chunk]:
    """Return the chunks worth reading: those of the logged size; the others are reported already."""
    sizes = listed_sizes(root, plan)
    return [chunk for chunk in chunks if not size_problem(plan, chunk, files.get(chunk.key), sizes.get(chunk.key))]


def _identity(knowledge: Knowledge) -> dict[str, Any]:
    return {"knowledge_id": knowledge.knowledge_id, "knowledge": knowledge.document()}


def _contents(plan: StorePlan) -> dict[str, Any]:
    return {
        "layout_id": plan.layout_id,
        "samples": plan.count,
        "views": plan.views,
        "fields": {name: _field(plan, name) for name in plan.fields},
        "part_rows": plan.part_rows,
        "batch_size": plan.batch_size,
        "compression": plan.compression,
        "bytes_per_view": plan.bytes_per_view,
        "bytes": plan.bytes,
    }


def _field(plan: StorePlan, name: str) -> dict[str, Any]:
    form = plan.fields[name]
    return {
        "encoding": form.name,
        "row_shape": list(form.row_shape),
        "bound": form.bound,
        "row_bytes": sum(array.row_bytes for array in plan.arrays_of((name,))),
    }


def _records(root: Path, growth: int) -> list[Record]:
    folder = ledger.record_path(root, growth, "").parent
    return [ledger.read_record(path) for path in sorted(folder.glob("*.json"))]


def _planned_parts(root: Path, growths: int) -> int:
    plans = [layout.plan_from(read_json(ledger.plan_path(root, growth))) for growth in range(growths)]
    return sum(len(layout.parts(plan, before)) for plan, before in zip(plans, [None, *plans], strict=False))


def _measured(plan: StorePlan, records: list[Record], view: int) -> dict[str, int | float]:
    sums = sum_measurements(plan, records, view)
    if sums.get("samples") and "correct" in sums:
        sums["accuracy"] = sums["correct"] / sums["samples"]
    return sums
