"""What a path holds: store, manifest, values, run or network, told without torch, zarr or images."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from kcdcache import identity, ledger, manifest, tables, values
from kcdcache.errors import CorruptionError, MismatchError, NotFoundError, UnfinishedError
from kcdcache.files import digest_of, read_json, read_object

MOST_SAMPLES = 10**8
"""more than this no data set has: a higher index is a mistake, not a reason to take that much memory"""


def inspect(path: Path) -> dict[str, Any]:
    """Return what lies at a path, as JSON values with `kind` first.

    Raises:
        NotFoundError: there is nothing.
        MismatchError: it is nothing of ours.
        CorruptionError: it is damaged.
    """
    kind = kind_of(path)
    return {"kind": kind, "path": str(path), **TELLERS[kind](path)}


def kind_of(path: Path) -> str:
    """Return what a path holds: store, run, manifest, values or network.

    Raises:
        NotFoundError: there is nothing.
        MismatchError: it is nothing of ours.
        CorruptionError: it is a damaged parquet file.
    """
    if not path.exists():
        raise NotFoundError(f"nothing at {path}")
    for kind, fits in KINDS.items():
        if fits(path):
            return kind
    raise MismatchError(f"{path} is no store, manifest, values file, run or network of kcdcache")


def _parquet_keys(path: Path) -> set[str]:
    if path.suffix != ".parquet" or not path.is_file():
        return set()
    try:
        metadata = pq.read_schema(path).metadata or {}
    except Exception as error:
        raise CorruptionError(f"{path} is not a readable parquet file: {error}") from None
    return {key.decode(errors="replace") for key in metadata} | {"parquet"}


KINDS: Mapping[str, Callable[[Path], bool]] = {
    "store": lambda path: (path / identity.IDENTITY_FILE).exists(),
    "run": lambda path: (path / "run.json").exists(),
    "manifest": lambda path: manifest.METADATA_KEY in _parquet_keys(path),
    "values": lambda path: "parquet" in _parquet_keys(path),
    "network": lambda path: path.suffix in {".json", ".safetensors"} and path.with_suffix(".safetensors").exists(),
}
"""kind -> whether a path holds one"""


def _store(path: Path) -> dict[str, Any]:
    knowledge = identity.read_store_identity(path)
    commits = _commits(path)
    plans, records = [commit.plan for commit in commits], [record for commit in commits for record in commit.records]
    for growth in range(len(commits), ledger.growths(path, "plan")):
        plans.append(read_json(ledger.plan_path(path, growth)))
        records += ledger.read_log(path, growth)
    if not plans:
        raise UnfinishedError(f"the store at {path} has no plan yet; run the same `kcdcache precompute` again")
    done = sum(record.view is not None for record in records)
    return {
        "format_version": identity.FORMAT_VERSION,
        "sealed": bool(commits),
        **_contents(plans[max(0, len(commits) - 1)]),
        "growths": len(commits),
        "growing_to": _contents(plans[-1]) if 0 < len(commits) < len(plans) else None,
        "parts": {"done": done, "pending": sum(map(_planned_parts, plans, [None, *plans])) - done},
        "bytes": sum(file.bytes for record in records for file in record.files),
        "files": sum(len(record.files) for record in records),
        "teacher_accuracy": _teacher_accuracy(plans[-1], records),
        "knowledge_id": knowledge.knowledge_id,
        "knowledge": knowledge.document(),
    }


def _commits(path: Path) -> list[ledger.Commit]:
    try:
        return ledger.read_commits(path)
    except UnfinishedError:
        return []


def _contents(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "samples": plan["count"],
        "views": plan["views"],
        "points": plan["count"] * plan["views"],
        "fields": {entry["name"]: entry["encoding"] for entry in plan["fields"]},
        "part_rows": plan["part_rows"],
        "batch_size": plan["batch_size"],
        "compression": plan["compression"],
        "layout_id": digest_of(plan),
    }


def _planned_parts(plan: Mapping[str, Any], before: Mapping[str, Any] | None) -> int:
    """Return how many parts a plan writes that the one before it did not, as `layout.parts` lists them."""
    per_view = -(-plan["count"] // plan["part_rows"])
    grown = before is not None and len(before["fields"]) == len(plan["fields"])
    return per_view * (plan["views"] - before["views"] if grown and before else plan["views"])


def _teacher_accuracy(plan: Mapping[str, Any], records: list[ledger.Record]) -> dict[str, float]:
    """Return view -> share of the samples done so far that the teacher got right, in [0, 1]."""
    sums = {
        view: ledger.sum_measurements(records, view, plan["count"], plan["part_rows"]) for view in range(plan["views"])
    }
    return {str(view): found["correct"] / found["samples"] for view, found in sums.items() if "correct" in found}


def _run(path: Path) -> dict[str, Any]:
    record = read_object(path / "run.json", "settings", "inputs", "environment")
    summary = read_object(path / "summary.json") if (path / "summary.json").exists() else None
    metrics = path / "metrics.jsonl"
    stages = [file for file in path.glob("stages/*/manifest.parquet") if file.parent.name.isdecimal()]
    return {
        "finished": summary is not None,
        "epochs_done": len(metrics.read_bytes().splitlines()) if metrics.exists() else 0,
        "settings": record["settings"],
        "inputs": record["inputs"],
        "environment": record["environment"],
        "stages": [
            manifest.summary(manifest.read(file)) for file in sorted(stages, key=lambda file: int(file.parent.name))
        ],
        "summary": summary,
    }


def _values(path: Path) -> dict[str, Any]:
    count = _count(path)
    found = values.read(path, count)
    seen = found.values.visits > 0
    value = found.values.value[seen]
    return {
        "from": "another tool" if found.foreign else "kcdcache",
        "samples": count,
        "visited": int(seen.sum()),
        "visits": [int(found.values.visits.min()), int(found.values.visits.max())] if count else None,
        "value_range": [float(value.min()), float(value.max())] if len(value) else None,
        "value_mean": float(value.mean(dtype="float64")) if len(value) else None,
        **(found.document or {}),
    }


def _count(path: Path) -> int:
    """Return the samples a values file speaks of: another tool's may leave some out, so its highest index decides."""
    table = tables.read(path)
    rows: int = table.num_rows
    if values.METADATA_KEY in _parquet_keys(path) or table.column_names.count("index") != 1:
        return rows
    highest = pc.max(table["index"]).as_py()
    plausible = isinstance(highest, int | float) and 0 <= highest < MOST_SAMPLES
    return max(rows, int(highest) + 1) if plausible else rows  # `values.read` then names the row that is wrong


def _network(path: Path) -> dict[str, Any]:
    record = path.with_suffix(".json")
    if not record.exists():
        raise NotFoundError(f"{path} has no {record.name} beside it that says what it is")
    return read_object(record)


TELLERS: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "store": _store,
    "run": _run,
    "manifest": lambda path: manifest.summary(manifest.read(path)),
    "values": _values,
    "network": _network,
}
"""kind -> what is told of it"""
