"""What a path holds: store, manifest, values, run, exported set or network, told without torch, zarr or images."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kcdcache.condense import manifest, value_files
from kcdcache.errors import MismatchError, NotFoundError, SettingsError, UnfinishedError
from kcdcache.export import record
from kcdcache.export.record import FORMAT_VERSION, MANIFEST, MIXES, ORIGIN, STORE, Record, read, require_file
from kcdcache.files import parquet
from kcdcache.files.atomic import MOST_FILE_BYTES, MOST_JSON_BYTES, digest_of, read_bytes, read_object, sha256_file
from kcdcache.methods import registry
from kcdcache.methods.base import Pair
from kcdcache.methods.registry import METHODS
from kcdcache.networks.registry import tap_shapes
from kcdcache.settings import MethodSettings
from kcdcache.store import encoding, identity, log, plan
from kcdcache.teacher import fields
from kcdcache.training.sampling import SAMPLING

MOST_SAMPLES = parquet.UNKNOWN_ROWS
"""more than this no data set has: a higher index is a mistake, not a reason to take that much memory"""


def inspect(path: Path) -> dict[str, Any]:
    """Return what lies at a path, as JSON values with `kind` first.

    Raises:
        NotFoundError: there is nothing.
        MismatchError: it is nothing of ours.
        CorruptionError: it is damaged.
    """
    kind = kind_of(path)
    return {"kind": kind, "path": str(path), "id": id_of(path), **TELLERS[kind](path)}


def id_of(path: Path) -> str | None:
    """Return what names this content and no other: who has it from a trusted place can expect it.

    The SHA-256 of a store's last commit, the digest of a manifest or values file, that over an exported set's record,
    which names its files, the SHA-256 of a network's weights or
    of a finished run's summary; None for what is not finished or made by another tool.

    Raises:
        NotFoundError, MismatchError, CorruptionError: as for `inspect`.
    """
    return IDS[kind_of(path)](path)


def require_ids(paths: Iterable[Path], expected: Collection[str] | None) -> None:
    """Do nothing if everything at some paths has one of the expected ids, or none are expected.

    Raises:
        MismatchError: something has another; prints both sides.
    """
    for path in paths if expected else ():
        if (found := id_of(path)) not in (expected or ()):
            raise MismatchError(
                f"{path} has the id {found}, expected {' or '.join(expected or ())}: it is not what was promised; "
                "get it again, or leave --expect-id out"
            )


def kind_of(path: Path) -> str:
    """Return what a path holds: condensed (an exported set), store, run, manifest, values or network.

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
    if runs := _runs_in(path):
        some = ", ".join(runs[:3]) + (", ..." if len(runs) > 3 else "")
        raise MismatchError(
            f"{path} is a folder of {len(runs)} runs ({some}): name one of them, or make a report of all with "
            f"`kcdcache report {path} --out report.html`"
        )
    if (path / record.STORE / log.FOLDER).is_dir():
        record.read(path)  # says that its export was cut short
    raise MismatchError(f"{path} is no store, manifest, values file, run or network of kcdcache")


def _runs_in(path: Path) -> list[str]:
    return sorted(entry.parent.name for entry in path.glob("*/run.json")) if path.is_dir() else []


def _parquet_keys(path: Path) -> set[str]:
    if parquet.is_folder(path):
        return parquet.metadata_keys(path) | {"parquet"}
    if path.suffix != ".parquet" or not path.is_file():
        return set()
    return parquet.metadata_keys(path) | {"parquet"}


KINDS: Mapping[str, Callable[[Path], bool]] = {
    "condensed": lambda path: (path / record.RECORD).exists(),
    "store": lambda path: (path / log.FOLDER).is_dir(),
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
    for growth in range(len(commits), log.growths(path, "plan")):
        plans.append(log.read_plan(path, growth))
        records += log.read_log(path, growth)
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
        "skipped": len(log.skipped_samples(records)),
        "parameters": sorted(identity.read_parameters(path, knowledge) or ()),
        **_origin(path, knowledge),
        "teacher_accuracy": _teacher_accuracy(plans[-1], records),
        "knowledge_id": knowledge.knowledge_id,
        "knowledge": knowledge.document(),
    }


def _origin(path: Path, knowledge: identity.Knowledge) -> dict[str, Any]:
    """Return what a store tells of its labels and of the data its teacher learned from."""
    found = identity.read_origin(path)
    told = {} if found is None else found.told(knowledge.data.digest)
    return {name: value for name, value in told.items() if name != "class_sizes"}  # a thousand numbers


def _commits(path: Path) -> list[log.Commit]:
    try:
        return log.read_commits(path)
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


def _teacher_accuracy(plan: Mapping[str, Any], records: list[log.Record]) -> dict[str, float]:
    """Return view -> share of the samples done so far that the teacher got right, in [0, 1]."""
    views = sorted({record.view for record in records if record.view is not None})  # the plan may claim any number
    sums = {view: log.sum_measurements(records, view, plan["count"], plan["part_rows"]) for view in views}
    return {str(view): found["correct"] / found["samples"] for view, found in sums.items() if "correct" in found}


def _run(path: Path) -> dict[str, Any]:
    record = read_object(path / "run.json", "settings", "inputs", "environment")
    summary = read_object(path / "summary.json") if (path / "summary.json").exists() else None
    metrics = path / "metrics.jsonl"
    stages = [file for file in path.glob("stages/*/manifest.parquet") if file.parent.name.isdecimal()]
    return {
        "finished": summary is not None,
        "epochs_done": read_bytes(metrics, MOST_JSON_BYTES).count(b"\n") if metrics.exists() else 0,
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
    found = value_files.read(path, count)
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
    if parquet.is_folder(path):
        return parquet.read_seal(path).samples
    foreign = value_files.METADATA_KEY not in parquet.metadata_keys(path)
    table = parquet.read(path, columns=value_files.COLUMNS if foreign else None)
    rows: int = table.num_rows
    if not foreign or table.column_names.count("index") != 1:
        return rows
    index = table["index"].to_numpy()
    highest = index.max(initial=-1) if index.dtype.kind in "iuf" else -1
    return (
        max(rows, int(highest) + 1) if 0 <= highest < MOST_SAMPLES else rows
    )  # `values.read` then names the row that is wrong


def _network(path: Path) -> dict[str, Any]:
    record = path.with_suffix(".json")
    if not record.exists():
        raise NotFoundError(f"{path} has no {record.name} beside it that says what it is")
    return read_object(record)


def _condensed(path: Path) -> dict[str, Any]:
    record = read(path)
    content, data = record.content, record.knowledge.data
    require_file(record, MANIFEST)
    chosen = manifest.read(record.place(MANIFEST), data.count)
    return {
        "format_version": FORMAT_VERSION,
        "rows": content.rows,
        **_contents(content.layout),
        "samples": data.count,
        "baked": None if content.baked is None else content.baked.model_dump(),
        "images": content.images is not None,
        "bytes": _bytes(record),
        "license": content.licence,
        "manifest": manifest.summary(chosen),
        **(_origin(record.place(STORE), record.knowledge) if ORIGIN in content.files else {}),
        "made": record.made,
        "knowledge_id": content.knowledge_id,
        "knowledge": content.knowledge,
    }


def _bytes(record: Record) -> int:
    """Return the bytes of an exported set: of its files, and of the chunks of its stores."""
    inside = (STORE, MIXES) if record.content.baked else (STORE,)
    chunks = sum(_store(record.place(part))["bytes"] for part in inside)
    return int(chunks) + sum(size for size, _ in record.content.files.values())


TELLERS: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "condensed": _condensed,
    "store": _store,
    "run": _run,
    "manifest": lambda path: manifest.summary(manifest.read(path)),
    "values": _values,
    "network": _network,
}
"""kind -> what is told of it"""


def _store_id(path: Path) -> str | None:
    sealed = log.growths(path, "commit")
    return sha256_file(log.commit_path(path, sealed - 1), MOST_JSON_BYTES) if sealed else None


def _values_id(path: Path) -> str | None:
    with value_files.opened(path, _count(path), held=0) as (_, document):
        return None if document is None else str(document["digest"])


IDS: Mapping[str, Callable[[Path], str | None]] = {
    "condensed": lambda path: record.read(path).id,
    "store": _store_id,
    "run": lambda path: (
        sha256_file(path / "summary.json", MOST_JSON_BYTES) if (path / "summary.json").exists() else None
    ),
    "manifest": manifest.read_digest,
    "values": _values_id,
    "network": lambda path: sha256_file(path.with_suffix(".safetensors"), MOST_FILE_BYTES),
}
"""kind -> what names its content"""


def listing(teacher: str, student: str, classes: int, size: int, encoded: str = "float16") -> dict[str, Any]:
    """Return every method for a pair on square colour images, with the bytes it keeps per sample and view.

    A method that this pair cannot use has the reason in place of its fields. Vectors and maps count in float16 where
    `encoded` is top:K, images of BSS as bytes.

    Raises:
        SettingsError: a network is unknown or cannot see such images.
    """
    pair = Pair(
        teacher=teacher,
        student=student,
        teacher_taps=tap_shapes(teacher, classes, 3, size, size),
        student_taps=tap_shapes(student, classes, 3, size, size),
        image=(3, size, size),
        labels=np.arange(classes),
        kept=np.arange(classes),
        settings=MethodSettings(),
        seed=0,
    )
    found = [_row(name, pair, encoded) for name in METHODS]
    return {
        "teacher": teacher,
        "student": student,
        "classes": classes,
        "size": size,
        "table": table(found),
        "note": (
            f"bytes per sample and view for {teacher} -> {student}, {classes} classes, {size}x{size}; "
            f"join methods with +, as in crd+kd; --sampling is one of {', '.join(SAMPLING)}"
        ),
        "methods": found,
        "sampling": [
            {"sampling": name, "about": scheme.about, "source": scheme.source} for name, scheme in SAMPLING.items()
        ],
    }


def bytes_of(names: Sequence[str], taps: fields.Taps, image: tuple[int, int, int], encoded: str) -> int:
    """Return the bytes of one sample's rows of some fields in one view, before padding."""
    total = 0
    for name in names:
        form = encoding.parse(fields.encoding_for(name, encoded), name, fields.row_shape(name, taps, image))
        total += sum(plan.row_bytes(spec.row_shape, spec.dtype) for spec in form.arrays)
    return total


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the methods as lines of text: name, bytes, live or cached, what is read, source."""
    cells = [["method", "bytes", "teacher", "reads", "source"]]
    for row in rows:
        reads = row["problem"] or ", ".join(row["reads"]) or "-"
        size = "-" if row["bytes"] is None else f"{row['bytes']:,}"
        cells.append([row["method"], size, "live" if row["live"] else "cached", reads, row["source"]])
    widths = [max(len(line[place]) for line in cells) for place in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]) for line in cells
    )


def _row(name: str, pair: Pair, encoded: str) -> dict[str, Any]:
    method = METHODS[name]
    settings = MethodSettings(method=name)
    weights = registry.weights_of(settings)
    row: dict[str, Any] = {
        "method": name,
        "about": method.about,
        "source": method.source,
        "live": method.live,
        "gamma": weights.gamma,
        "alpha": weights.alpha,
        "beta": weights.parts[name],
        "temperature": weights.temperature,
        "recipe": registry.recipe(settings, pair.student),
        "reads": [],
        "bytes": None,
        "problem": None,
    }
    try:
        reads = registry.make_loss(weights, lambda: pair).fields
        return row | {"reads": list(reads), "bytes": bytes_of(reads, pair.teacher_taps, pair.image, encoded)}
    except SettingsError as error:
        return row | {"problem": f"not for this pair: {error}"}
