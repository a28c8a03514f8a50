"""The condensed set of one stage as an immutable value: valid by construction, written once, checked on every read."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int32, Int64

from kcdcache import partitioned, records, rules, tables
from kcdcache.errors import CorruptionError, MismatchError
from kcdcache.facts import FACTS, FORMAT_VERSION, Facts, Totals, told
from kcdcache.files import canonical_json, create_exclusive
from kcdcache.rules import KEPT, MIXED

METADATA_KEY = "kcdcache.manifest"
MOST_ROWS = 10**8
_OTHER_KNOWLEDGE = (
    "the manifest was made for knowledge {}, the store holds {}; give the manifest's own store, or --transfer to use "
    "it with another teacher's store of the same data"
)

ARRAYS: dict[str, type] = {
    "index": np.int64, "mixed": np.bool_, "partner": np.int64, "epsilon": np.float32,
    "rank": np.int64, "value": np.float32, "visits": np.int32, "weight": np.float32,
}  # fmt: skip
"""column -> its type, in the order of the digest"""
SCHEMA = pa.schema([
    ("index", pa.int64()), ("part", pa.string()), ("partner", pa.int64()), ("epsilon", pa.float32()),
    ("rank", pa.int64()), ("value", pa.float32()), ("visits", pa.int32()), ("weight", pa.float32()),
])  # fmt: skip
_NAMES = pa.dictionary(pa.int8(), pa.string())
SCHEMA_WRITTEN = SCHEMA.set(1, pa.field("part", _NAMES))
"""the same file comes of it: parts are written as numbers of names, and read as names"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Manifest(Facts):
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

    def __post_init__(self) -> None:
        for name, kind in ARRAYS.items():
            object.__setattr__(self, name, _read_only(name, getattr(self, name), kind, len(self.index)))
        super().__post_init__()
        self.require_fit(len(self), int(self.mixed.sum()))
        rules.require(self.columns(), self.count)

    def __len__(self) -> int:
        return len(self.index)

    def columns(self) -> dict[str, np.ndarray]:
        """Return the arrays by name, each of shape (rows,)."""
        return {name: getattr(self, name) for name in ARRAYS}

    def document(self) -> dict[str, Any]:
        """Return everything but the arrays as JSON values, without the digest."""
        return self.document_of(len(self))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the document and all columns: equal exactly where the manifests are."""
        return tables.digest(canonical_json(self.document()), self.columns())


def full(
    knowledge_id: str,
    count: int,
    labels: Int64[np.ndarray, " n"] | None = None,
    classes: int | None = None,
    data_digest: str | None = None,
    excluded: Int64[np.ndarray, " excluded"] | None = None,
) -> Manifest:
    """Return the manifest that keeps all `count` samples as they are: what stage 0 trains on.

    Samples in `excluded` (those the store skipped) are left out; `keep` still says 1, a share of what can be kept.
    """
    index = np.arange(count) if excluded is None else np.setdiff1d(np.arange(count), excluded, assume_unique=True)
    rows = len(index)
    return Manifest(
        **plain(index), rank=np.arange(rows), value=np.zeros(rows, np.float32), visits=np.zeros(rows, np.int32),
        knowledge_id=knowledge_id, count=count, stage=0, keep=1.0, class_counts=class_counts(index, labels, classes),
        data_digest=data_digest,
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


def write(path: Path, manifest: Manifest, partition_rows: int | None = None) -> None:
    """Write a manifest as parquet, whole or not at all, with the same bytes for the same content.

    About more than `partition_rows` samples it becomes a folder of parts, each about so many of them.

    Raises:
        LockedError: something is there already; manifests are never overwritten.
        NoSpaceError: the disk is full.
    """
    if partition_rows is not None and manifest.count > partition_rows:
        content = seal_of(manifest.document(), manifest.digest, manifest.count, partition_rows)
        partitioned.write(path, content, SCHEMA_WRITTEN, lambda span: _cells_of(manifest, span))
        return
    table = cells(manifest.columns()).replace_schema_metadata(metadata(manifest.document(), manifest.digest))
    create_exclusive(path, tables.encode(table))


def read(path: Path | str, most_rows: int = MOST_ROWS) -> Manifest:
    """Return the manifest in a file, after checking its page checksums, its digest and, in a run, the run's record.

    More than `most_rows` rows are refused before any is decoded: a few bytes of parquet can claim hundreds of millions.

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: it is damaged or was changed after it was written, or its run has no record of it.
        MismatchError: it is no manifest, of a newer format, not a valid one (names the first invalid row), or not the
            one that the run wrote there (prints both digests).
    """
    path = Path(path)
    with partitioned.opened(path, most_rows) as reader:
        reader.check()  # before anything it says is taken up
        document = _document(reader.schema, path)
        blocks = list(_checked(reader, document, path))
    columns: dict[str, Any] = {name: _joined([block[name] for block in blocks], kind) for name, kind in ARRAYS.items()}
    facts = {name: document[name] for name in FACTS}
    counts = facts["class_counts"]
    found = Manifest(**columns, **{**facts, "class_counts": tuple(counts) if isinstance(counts, list) else counts})
    records.require(path, records.Facts(len(found), found.digest))
    return found


def read_digest(path: Path, most_rows: int = MOST_ROWS) -> str:
    """Return the digest of the manifest in a file, after checking that its content has it; one row group at a time.

    Raises:
        NotFoundError, CorruptionError, MismatchError: as for `read`, but the rules of a manifest are not checked: one
            with the digest of a valid manifest is that manifest.
    """
    return read_part(path, most_rows)[0]["digest"]


def read_part(
    path: Path, most_rows: int = MOST_ROWS, start: int = 0, stop: int = 0, checked: bool = True
) -> tuple[dict[str, Any], Int64[np.ndarray, " some"]]:
    """Return the document of the manifest in a file, and those of its kept samples that lie in [start, stop).

    It is held against its digest only if it is to be `checked`: of several processes that read it one is enough.

    Raises:
        NotFoundError, CorruptionError, MismatchError: as for `read_digest`; or the samples do not ascend.
    """
    found, last = [np.empty(0, np.int64)], -1
    with partitioned.opened(path, most_rows) as reader:
        reader.check()  # before anything it says is taken up
        document = _document(reader.schema, path)
        known = ({"index": _column(table, "index", path, 0)} for table in reader.groups(["index"]))
        for columns in _checked(reader, document, path) if checked else known:
            index = columns["index"]
            if (np.diff(index, prepend=last) <= 0).any():
                raise MismatchError(f"{path}: expected index to be in ascending order, each sample once")
            last = int(index[-1])
            found.append(index[np.searchsorted(index, start) : np.searchsorted(index, stop)])
        if checked:
            records.require(path, records.Facts(reader.rows, document["digest"]))
    return document, np.concatenate(found)


def arrays(
    table: pa.Table, path: Path, first: int = 0, names: Collection[str] = tuple(ARRAYS)
) -> dict[str, np.ndarray]:
    """Return some columns of rows as they stand in a file, `first` rows after its beginning; `mixed` is read of `part`.

    Raises:
        CorruptionError: a cell is empty, or of an unknown part.
    """
    return {name: _column(table, name, path, first) for name in names}


def seal_of(document: Mapping[str, Any], digest: str, count: int, partition_rows: int) -> partitioned.Seal:
    """Return the record of a folder for a manifest, as yet without parts."""
    return partitioned.Seal(METADATA_KEY, count, partition_rows, {**document, "digest": digest}, None, ())


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
        raise MismatchError(_OTHER_KNOWLEDGE.format(manifest.knowledge_id, knowledge_id))
    for name, found, expected in (
        ("samples", manifest.count, count),
        ("data digest", manifest.data_digest, data_digest),
    ):
        if found is not None and expected is not None and found != expected:
            raise MismatchError(
                f"--transfer needs a store of the same data: {name} {found} in the manifest of "
                f"{manifest.knowledge_id}, {expected} in the store of {knowledge_id}"
            )


def require_document(document: Mapping[str, Any], knowledge_id: str) -> None:
    """Do nothing if a manifest, of which only the document was read, was made for this knowledge.

    Raises:
        MismatchError: it was not; prints both ids.
        CorruptionError: the document says something else than a manifest's.
    """
    for name, kind in (("knowledge_id", str), ("rows", int), ("stage", int), ("digest", str)):
        if not isinstance(document.get(name), kind):
            raise CorruptionError(
                f"manifest field '{name}': expected {kind.__name__}, found {document.get(name)!r:.80}"
            )
    if document["knowledge_id"] != knowledge_id:
        raise MismatchError(_OTHER_KNOWLEDGE.format(document["knowledge_id"], knowledge_id))


def require_usable(manifest: Manifest, skipped: Int64[np.ndarray, " skipped"]) -> None:
    """Do nothing if a manifest uses no sample that its store skipped.

    Raises:
        MismatchError: it keeps or mixes in one; names the first such row.
    """
    for column, used in (("index", manifest.index), ("partner", manifest.partner)):
        if (bad := np.isin(used, skipped)).any():
            row = int(np.argmax(bad))
            raise MismatchError(
                f"manifest row {row}, index {manifest.index[row]}: expected {column} to be a sample the store has "
                f"outputs of, found {used[row]}, one of {len(skipped)} skipped because the teacher's outputs were not "
                "finite; condense again with this store"
            )


def summary(manifest: Manifest) -> dict[str, Any]:
    """Return what `inspect` and `condense` print of a manifest: JSON values, sizes in samples."""
    return told(manifest, Totals().plus(manifest.columns()), manifest.digest)


def cells(columns: Mapping[str, np.ndarray]) -> pa.Table:
    """Return rows as they stand in a file."""
    parts = pa.DictionaryArray.from_arrays(columns["mixed"].astype(np.int8), [KEPT, MIXED])
    found = {name: pa.array(column) for name, column in columns.items() if name != "mixed"}
    found["partner"] = pa.array(columns["partner"], mask=~columns["mixed"])
    found["value"] = pa.array(columns["value"], mask=columns["visits"] == 0)
    return pa.table({field.name: found.get(field.name, parts) for field in SCHEMA})


def metadata(document: Mapping[str, Any], digest: str) -> dict[str, bytes]:
    """Return a file's metadata: document and digest."""
    return {METADATA_KEY: canonical_json({**document, "digest": digest})}


def _read_only(name: str, array: Any, kind: type, rows: int) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.dtype != kind or array.shape != (rows,):
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise MismatchError(f"manifest column '{name}': expected {np.dtype(kind)} of shape ({rows},), found {found}")
    view = array.view()
    view.flags.writeable = False
    return view


def _document(schema: pa.Schema, path: Path) -> dict[str, Any]:
    document = tables.document(schema, METADATA_KEY, path)
    if document is None:
        raise MismatchError(
            f"{path} is a parquet file but no manifest (no '{METADATA_KEY}' in its metadata); "
            "make a manifest of a values file with `kcdcache condense`"
        )
    if (version := document.get("format_version")) != FORMAT_VERSION:
        raise MismatchError(f"{path} has format {version}, this kcdcache reads {FORMAT_VERSION}; upgrade kcdcache")
    tables.require_schema(schema, SCHEMA, path)
    return document


def _cells_of(manifest: Manifest, span: partitioned.Span) -> Iterator[pa.Table]:
    start, stop = np.searchsorted(manifest.index, [span.first, span.stop]).tolist()
    for first in range(start, stop, tables.ROWS):
        some = slice(first, min(first + tables.ROWS, stop))
        yield cells({name: column[some] for name, column in manifest.columns().items()})


def _checked(reader: tables.Table, document: Mapping[str, Any], path: Path) -> Iterator[dict[str, np.ndarray]]:
    """Yield the columns of each row group, then hold all of them against the digest."""
    rows, digest = 0, tables.Digest(ARRAYS)
    for table in reader.groups():
        columns = arrays(table, path, rows)
        digest.add(columns)
        rows += table.num_rows
        yield columns
    content = {name: item for name, item in document.items() if name != "digest"}
    known = {"format_version", "rows", *FACTS}
    if set(content) != known or digest.over(canonical_json(content)) != document.get("digest"):
        raise CorruptionError(
            f"{path} was changed after it was written: its content does not match its digest "
            f"{document.get('digest')}; make it again with `kcdcache condense`"
        )


def _joined(blocks: list[np.ndarray], kind: type) -> np.ndarray:
    return blocks[0] if len(blocks) == 1 else np.concatenate([np.empty(0, kind), *blocks])


def _column(table: pa.Table, name: str, path: Path, first: int) -> np.ndarray:
    """Return a column of some rows, `first` rows after the beginning of the file."""
    if name != "mixed":
        return _filled(table, name, {"partner": -1, "value": 0}.get(name), path)
    part = table.column("part").combine_chunks().dictionary_encode()
    names = part.dictionary.to_pylist()
    codes = part.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    mixed: np.ndarray = codes == (names.index(MIXED) if MIXED in names else -2)
    known = mixed | (codes == (names.index(KEPT) if KEPT in names else -2))
    if not known.all():
        row = int(np.argmin(known))
        raise CorruptionError(
            f"{path}, row {first + row}: expected part {KEPT} or {MIXED}, found {part[row]}; write it again"
        )
    return mixed


def _filled(table: pa.Table, name: str, fill: int | None, path: Path) -> np.ndarray:
    column = table.column(name)
    if fill is not None:
        column = column.fill_null(fill)
    if column.null_count:
        raise CorruptionError(f"{path} was changed after it was written: '{name}' has empty cells; write it again")
    return column.to_numpy()
