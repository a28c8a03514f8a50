"""The condensed set of one stage as an immutable value: valid by construction, written once, checked on every read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float32, Int32, Int64, Shaped

from kcdcache import tables
from kcdcache.errors import CorruptionError, MismatchError
from kcdcache.files import canonical_json, create_exclusive

METADATA_KEY = "kcdcache.manifest"
FORMAT_VERSION = 0
MOST_ROWS = 10**8
KEPT, MIXED = "K_1H", "K_Aug"
"""The parts: points kept as they are, and kept points with a dropped one mixed in."""

_ARRAYS: dict[str, type] = {
    "index": np.int64, "mixed": np.bool_, "partner": np.int64, "epsilon": np.float32,
    "rank": np.int64, "value": np.float32, "visits": np.int32, "weight": np.float32,
}  # fmt: skip
_SCHEMA = pa.schema([
    ("index", pa.int64()), ("part", pa.string()), ("partner", pa.int64()), ("epsilon", pa.float32()),
    ("rank", pa.int64()), ("value", pa.float32()), ("visits", pa.int32()), ("weight", pa.float32()),
])  # fmt: skip
_TYPE_NAMES: dict[type, str] = {NoneType: "None", tuple: "tuple of int"}
_FACTS: dict[str, tuple[type, ...]] = {
    "knowledge_id": (str,), "count": (int,), "stage": (int,), "keep": (float,), "dropped": (int,), "rule": (dict,),
    "parent": (str, NoneType), "values": (str, NoneType), "class_counts": (tuple,), "data_digest": (str, NoneType),
}  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class Manifest:
    """Which samples a stage trains on and what is mixed into them; arrays are read-only and sorted by index.

    Raises:
        MismatchError: a row or fact breaks the rules of a manifest; names the first such row.
    """

    index: Int64[np.ndarray, " rows"]
    """kept samples, ascending"""
    mixed: Bool[np.ndarray, " rows"]
    """True for K_Aug, False for K_1H"""
    partner: Int64[np.ndarray, " rows"]
    """dropped sample mixed in, -1 for K_1H (null in the file)"""
    epsilon: Float32[np.ndarray, " rows"]
    """share of the partner in [0, 1], 0 for K_1H"""
    rank: Int64[np.ndarray, " rows"]
    """place in the ranking of all candidates, 0 is best"""
    value: Float32[np.ndarray, " rows"]
    """value the ranking used, 0 where unseen (null in the file)"""
    visits: Int32[np.ndarray, " rows"]
    """visit count, 0 where unseen"""
    weight: Float32[np.ndarray, " rows"]
    """weight of the sample's loss, above 0"""
    knowledge_id: str
    """the knowledge it was made for"""
    count: int
    """number of samples N in the whole training split"""
    stage: int
    """stage that trains on it"""
    keep: float
    """share of N kept"""
    dropped: int = 0
    """size of K_0, the dropped points the rule names, used as partners or not"""
    rule: dict[str, Any] = field(default_factory=dict)
    """settings of the condensation"""
    parent: str | None = None
    """digest of the previous stage's manifest"""
    values: str | None = None
    """fingerprint of the values it was ranked by"""
    class_counts: tuple[int, ...] = ()
    """kept samples per class, empty where labels were not known"""
    data_digest: str | None = None
    """digest of the training split, which lets a transfer to another teacher check its data"""

    def __post_init__(self) -> None:
        for name, kind in _ARRAYS.items():
            object.__setattr__(self, name, _read_only(name, getattr(self, name), kind, len(self.index)))
        if isinstance(self.keep, int):
            object.__setattr__(self, "keep", float(self.keep))  # 1 and 1.0 must give one digest
        _require_types(self)
        _require_facts(self)
        for column, expected, bad in _row_rules(self):
            _require_rows(self, column, expected, bad)

    def __len__(self) -> int:
        return len(self.index)

    def columns(self) -> dict[str, np.ndarray]:
        """Return the arrays by name, each of shape (rows,)."""
        return {name: getattr(self, name) for name in _ARRAYS}

    def document(self) -> dict[str, Any]:
        """Return everything but the arrays as JSON values, without the digest."""
        facts = {name: getattr(self, name) for name in _FACTS}
        changed = {"class_counts": list(self.class_counts), "rows": len(self)}
        return {"format_version": FORMAT_VERSION, **facts, **changed}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the document and all columns: equal exactly where the manifests are."""
        return _digest(self.document(), self.columns())


def full(
    knowledge_id: str,
    count: int,
    labels: Int64[np.ndarray, " n"] | None = None,
    classes: int | None = None,
    data_digest: str | None = None,
) -> Manifest:
    """Return the manifest that keeps all `count` samples as they are: what stage 0 trains on."""
    return Manifest(
        **plain(np.arange(count)), rank=np.arange(count), value=np.zeros(count, np.float32),
        visits=np.zeros(count, np.int32), knowledge_id=knowledge_id, count=count, stage=0, keep=1.0,
        class_counts=class_counts(np.arange(count), labels, classes), data_digest=data_digest,
    )  # fmt: skip


def plain(index: Int64[np.ndarray, " rows"]) -> dict[str, Any]:
    """Return the columns of a set without mixes: index, mixed, partner, epsilon and weight, each of shape (rows,)."""
    rows = len(index)
    return {
        "index": index, "mixed": np.zeros(rows, np.bool_), "partner": np.full(rows, -1),
        "epsilon": np.zeros(rows, np.float32), "weight": np.ones(rows, np.float32),
    }  # fmt: skip


def class_counts(
    index: Int64[np.ndarray, " rows"], labels: Int64[np.ndarray, " n"] | None, classes: int | None
) -> tuple[int, ...]:
    """Return how many of the given samples each class has; empty where labels are not known."""
    if labels is None:
        return ()
    return tuple(np.bincount(labels[index], minlength=classes or 0).tolist())


def write(path: Path, manifest: Manifest) -> None:
    """Write a manifest as parquet, whole or not at all, with the same bytes for the same content.

    Raises:
        LockedError: something is there already; manifests are never overwritten.
        NoSpaceError: the disk is full.
    """
    content = {**manifest.document(), "digest": manifest.digest}
    table = pa.table(_cells(manifest), schema=_SCHEMA.with_metadata({METADATA_KEY: canonical_json(content)}))
    create_exclusive(path, tables.encode(table))


def read(path: Path | str, most_rows: int = MOST_ROWS) -> Manifest:
    """Return the manifest in a file, after checking its page checksums and its digest.

    More than `most_rows` rows are refused before any is decoded: a few bytes of parquet can claim hundreds of millions.

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: it is damaged or was changed after it was written.
        MismatchError: it is no manifest, of a newer format, or not a valid one; names the first invalid row.
    """
    path = Path(path)
    table = tables.read(path, most_rows)
    document = tables.document(table, METADATA_KEY, path)
    if document is None:
        raise MismatchError(
            f"{path} is a parquet file but no manifest (no '{METADATA_KEY}' in its metadata); "
            "make a manifest of a values file with `kcdcache condense`"
        )
    if (version := document.get("format_version")) != FORMAT_VERSION:
        raise MismatchError(f"{path} has format {version}, this kcdcache reads {FORMAT_VERSION}; upgrade kcdcache")
    tables.require_schema(table, _SCHEMA, path)
    columns = _arrays(table, path)
    _require_digest(document, columns, path)
    facts = {name: document[name] for name in _FACTS}
    counts = facts["class_counts"]
    return Manifest(**columns, **{**facts, "class_counts": tuple(counts) if isinstance(counts, list) else counts})


def require_knowledge(
    manifest: Manifest,
    knowledge_id: str,
    *,
    count: int | None = None,
    data_digest: str | None = None,
    transfer: bool = False,
) -> None:
    """Do nothing if a manifest was made for this knowledge, or with `transfer` at least for the same data.

    Raises:
        MismatchError: it was not; prints both ids and the way out.
    """
    if manifest.knowledge_id == knowledge_id:
        return
    if not transfer:
        raise MismatchError(
            f"the manifest was made for knowledge {manifest.knowledge_id}, the store holds {knowledge_id}; give the "
            "manifest's own store, or --transfer to use it with another teacher's store of the same data"
        )
    for name, found, expected in (
        ("samples", manifest.count, count),
        ("data digest", manifest.data_digest, data_digest),
    ):
        if found is not None and expected is not None and found != expected:
            raise MismatchError(
                f"--transfer needs a store of the same data: {name} {found} in the manifest of "
                f"{manifest.knowledge_id}, {expected} in the store of {knowledge_id}"
            )


def summary(manifest: Manifest) -> dict[str, Any]:
    """Return what `inspect` and `condense` print of a manifest: JSON values, sizes in samples."""
    mixed, counts = int(manifest.mixed.sum()), manifest.class_counts
    epsilon = manifest.epsilon[manifest.mixed]
    return {
        "stage": manifest.stage, "samples": manifest.count, "kept": len(manifest), "keep": manifest.keep,
        KEPT: len(manifest) - mixed, MIXED: mixed, "K_0": manifest.dropped,
        "epsilon": [float(epsilon.min()), float(epsilon.max())] if mixed else None,
        "unseen": int((manifest.visits == 0).sum()),
        "classes": len(counts), "class_min": min(counts, default=None), "class_max": max(counts, default=None),
        "rule": dict(manifest.rule), "knowledge_id": manifest.knowledge_id, "parent": manifest.parent,
        "values": manifest.values, "digest": manifest.digest,
    }  # fmt: skip


def _read_only(name: str, array: Any, kind: type, rows: int) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.dtype != kind or array.shape != (rows,):
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise MismatchError(f"manifest column '{name}': expected {np.dtype(kind)} of shape ({rows},), found {found}")
    view = array.view()
    view.flags.writeable = False
    return view


def _require_types(manifest: Manifest) -> None:
    for name, kinds in _FACTS.items():
        found = getattr(manifest, name)
        parts = found if isinstance(found, tuple) else ()
        if not isinstance(found, kinds) or not all(isinstance(part, int) for part in parts):
            wanted = " or ".join(_TYPE_NAMES.get(kind, kind.__name__) for kind in kinds)
            raise MismatchError(f"manifest field '{name}': expected {wanted}, found {found!r}")


def _require_facts(manifest: Manifest) -> None:
    counts = manifest.class_counts
    for name, expected, good in (
        ("count", f"at least its {len(manifest)} rows", manifest.count >= len(manifest)),
        ("stage", "0 or more", manifest.stage >= 0),
        ("keep", "a share in (0, 1]", 0 < manifest.keep <= 1),
        ("dropped", "at least the number of mixed rows", manifest.dropped >= manifest.mixed.sum()),
        ("class_counts", f"{len(manifest)} in all, or nothing", not counts or sum(counts) == len(manifest)),
    ):
        if not good:
            raise MismatchError(f"manifest field '{name}': expected {expected}, found {getattr(manifest, name)}")


Rule = tuple[str, str, Bool[np.ndarray, " rows"]]
"""(column, what is expected of it, which rows break that)."""


def _row_rules(manifest: Manifest) -> Iterator[Rule]:
    index, samples = manifest.index, f"a sample in [0, {manifest.count})"
    yield "index", samples, (index < 0) | (index >= manifest.count)
    yield "index", "ascending order, each sample once", np.diff(index, prepend=-1) <= 0
    yield from _partner_rules(manifest, samples)
    epsilon, weight = manifest.epsilon, manifest.weight
    yield "epsilon", "a share in [0, 1]", ~((epsilon >= 0) & (epsilon <= 1))
    yield "epsilon", f"0 in {KEPT}", ~manifest.mixed & (epsilon != 0)
    yield "rank", f"a rank in [0, {manifest.count})", (manifest.rank < 0) | (manifest.rank >= manifest.count)
    yield "rank", "each rank once", _repeated(manifest.rank)
    yield "visits", "0 or more", manifest.visits < 0
    yield "value", "a finite number", ~np.isfinite(manifest.value)
    yield "value", "0 for an unseen sample", (manifest.visits == 0) & (manifest.value != 0)
    yield "weight", "a finite number above 0", ~(np.isfinite(weight) & (weight > 0))


def _partner_rules(manifest: Manifest, samples: str) -> Iterator[Rule]:
    partner, mixed = manifest.partner, manifest.mixed
    yield "partner", f"none (-1) in {KEPT}", ~mixed & (partner != -1)
    yield "partner", f"{samples} in {MIXED}", mixed & ((partner < 0) | (partner >= manifest.count))
    yield "partner", "a dropped sample, not a kept one", mixed & np.isin(partner, manifest.index)
    yield "partner", "each partner once", mixed & _repeated(partner)


def _repeated(array: Shaped[np.ndarray, " rows"]) -> Bool[np.ndarray, " rows"]:
    order = np.argsort(array, kind="stable")
    repeated = np.zeros(len(array), np.bool_)
    repeated[order[1:]] = array[order][1:] == array[order][:-1]
    return repeated


def _require_rows(manifest: Manifest, column: str, expected: str, bad: Bool[np.ndarray, " rows"]) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        found = getattr(manifest, column)[row]
        raise MismatchError(
            f"manifest row {row}, index {manifest.index[row]}: expected {column} to be {expected}, found {found}"
        )


def _cells(manifest: Manifest) -> dict[str, pa.Array]:
    parts = pa.DictionaryArray.from_arrays(manifest.mixed.astype(np.int8), [KEPT, MIXED])
    cells = {name: pa.array(column) for name, column in manifest.columns().items() if name != "mixed"}
    cells["partner"] = pa.array(manifest.partner, mask=~manifest.mixed)
    cells["value"] = pa.array(manifest.value, mask=manifest.visits == 0)
    return {**cells, "part": parts.cast(pa.string())}


def _arrays(table: pa.Table, path: Path) -> dict[str, Any]:
    part = table.column("part").combine_chunks()
    mixed = np.asarray(pc.equal(part, MIXED).fill_null(False))
    known = mixed | np.asarray(pc.equal(part, KEPT).fill_null(False))
    if not known.all():
        row = int(np.argmin(known))
        raise CorruptionError(f"{path}, row {row}: expected part {KEPT} or {MIXED}, found {part[row]}; write it again")
    filled = {"partner": -1, "value": 0}
    columns = {name: _filled(table, name, filled.get(name), path) for name in _ARRAYS if name != "mixed"}
    return {**columns, "mixed": mixed}


def _filled(table: pa.Table, name: str, fill: int | None, path: Path) -> np.ndarray:
    column = table.column(name)
    if fill is not None:
        column = column.fill_null(fill)
    if column.null_count:
        raise CorruptionError(f"{path} was changed after it was written: '{name}' has empty cells; write it again")
    return column.to_numpy()


def _digest(document: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> str:
    return tables.digest(canonical_json(document), {name: columns[name] for name in _ARRAYS})


def _require_digest(document: Mapping[str, Any], columns: Mapping[str, np.ndarray], path: Path) -> None:
    content = {name: item for name, item in document.items() if name != "digest"}
    expected = {"format_version", "rows", *_FACTS}
    if set(content) != expected or _digest(content, columns) != document.get("digest"):
        raise CorruptionError(
            f"{path} was changed after it was written: its content does not match its digest "
            f"{document.get('digest')}; make it again with `kcdcache condense`"
        )
