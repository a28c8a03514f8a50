"""What a path holds: store, manifest, values, run or network, told without torch, zarr or images."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from kcdcache import identity, ledger, manifest, values
from kcdcache.errors import CorruptionError, MismatchError, NotFoundError, UnfinishedError
from kcdcache.files import read_json


def inspect(path: Path) -> dict[str, Any]:
    """Return what lies at a path, as JSON values with `kind` first.

    Raises:
        NotFoundError: there is nothing.
        MismatchError: it is nothing of ours.
        CorruptionError: it is damaged.
    """
    if not path.exists():
        raise NotFoundError(f"nothing at {path}")
    for kind, fits in KINDS.items():
        if fits(path):
            return {"kind": kind, "path": str(path), **TELLERS[kind](path)}
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
    try:
        commits = ledger.read_commits(path)
    except UnfinishedError:
        commits = []
    plan = commits[-1].plan if commits else read_json(ledger.plan_path(path, 0))
    records = [record for commit in commits for record in commit.records]
    return {
        "sealed": bool(commits),
        "samples": plan["count"],
        "views": plan["views"],
        "fields": {entry["name"]: entry["encoding"] for entry in plan["fields"]},
        "points": plan["count"] * plan["views"],
        "bytes": sum(file.bytes for record in records for file in record.files),
        "files": sum(len(record.files) for record in records),
        "growths": len(commits),
        "teacher_accuracy": teacher_accuracy(records, plan["count"]),
        "knowledge_id": knowledge.knowledge_id,
        "knowledge": knowledge.document(),
    }


def teacher_accuracy(records: list[ledger.Record], count: int) -> dict[str, float]:
    """Return view -> share of samples the teacher got right, from the log, in [0, 1]."""
    right: dict[int, float] = {}
    for record in records:
        if record.view is not None and "correct" in record.measurements:
            right[record.view] = right.get(record.view, 0.0) + record.measurements["correct"]
    return {str(view): right[view] / count for view in sorted(right)}


def _run(path: Path) -> dict[str, Any]:
    record = read_json(path / "run.json")
    summary = read_json(path / "summary.json") if (path / "summary.json").exists() else None
    metrics = path / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_bytes().splitlines()] if metrics.exists() else []
    stages = sorted((path / "stages").glob("*/manifest.parquet"), key=lambda file: int(file.parent.name))
    return {
        "finished": summary is not None,
        "epochs_done": len(rows),
        "settings": record["settings"],
        "inputs": record["inputs"],
        "environment": record["environment"],
        "stages": [manifest.summary(manifest.read(file)) for file in stages],
        "summary": summary,
    }


def _values(path: Path) -> dict[str, Any]:
    rows = pq.read_metadata(path).num_rows
    found = values.read(path, rows)
    seen = found.values.visits > 0
    value = found.values.value[seen]
    return {
        "from": "another tool" if found.foreign else "kcdcache",
        "samples": rows,
        "visited": int(seen.sum()),
        "visits": [int(found.values.visits.min()), int(found.values.visits.max())] if rows else None,
        "value_range": [float(value.min()), float(value.max())] if len(value) else None,
        "value_mean": float(value.mean(dtype="float64")) if len(value) else None,
        **(found.document or {}),
    }


def _network(path: Path) -> dict[str, Any]:
    record = path.with_suffix(".json")
    if not record.exists():
        raise NotFoundError(f"{path} has no {record.name} beside it that says what it is")
    document: dict[str, Any] = read_json(record)
    return document


TELLERS: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "store": _store,
    "run": _run,
    "manifest": lambda path: manifest.summary(manifest.read(path)),
    "values": _values,
    "network": _network,
}
"""kind -> what is told of it"""
