"""Manifests: which samples a stage trains on, as an immutable value and as a file, and the rules its rows keep."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int32, Int64, Integer, Shaped

from kcdcache.condense.schedule import kept_count
from kcdcache.errors import CorruptionError, MismatchError
from kcdcache.files import parquet, run_files
from kcdcache.files.atomic import create_exclusive
from kcdcache.files.records import canonical_json

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
    ("index", pa.int64()), ("part", pa.dictionary(pa.int32(), pa.string())), ("partner", pa.int64()),
    ("epsilon", pa.float32()), ("rank", pa.int64()), ("value", pa.float32()), ("visits", pa.int32()),
    ("weight", pa.float32()),
])  # fmt: skip
FORMAT_VERSION = 0
_TYPE_NAMES: dict[type, str] = {NoneType: "None", tuple: "tuple of int"}
FACTS: dict[str, tuple[type, ...]] = {
    "knowledge_id": (str,), "count": (int,), "stage": (int,), "keep": (float,), "dropped": (int,), "rule": (dict,),
    "parent": (str, NoneType), "values": (str, NoneType), "class_counts": (tuple,), "data_digest": (str, NoneType),
}  # fmt: skip
KEPT, MIXED = "K_1H", "K_Aug"
"""The parts: points kept as they are, and kept points with a dropped one mixed in."""

BYTES_A_SAMPLE = 1
"""memory of `Blocks`"""
Columns = Mapping[str, np.ndarray]
"""The arrays of a condensed set by name, each of shape (rows,)."""
Rule = tuple[str, str, Bool[np.ndarray, " rows"]]
"""(column, what is expected of it, which rows break that)."""
_IN_ORDER, _RANK_ONCE, _PARTNER_ONCE = "ascending order, each sample once", "each rank once", "each partner once"
_DROPPED = "a dropped sample, not a kept one"
_AS_KEPT, _AS_PARTNER, _AS_RANK = np.uint8(1), np.uint8(2), np.uint8(4)


@dataclass(frozen=True, eq=False, kw_only=True)
class Facts:
    """What a manifest says beside its rows.

    Raises:
        MismatchError: a fact is of another type than it should be.
    """

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
        if isinstance(self.keep, int):
            object.__setattr__(self, "keep", float(self.keep))  # 1 and 1.0 must give one digest
        _require_types(self)

    def document_of(self, rows: int) -> dict[str, Any]:
        """Return them as JSON values, for a manifest of so many rows; without the digest."""
        facts = {name: getattr(self, name) for name in FACTS}
        changed = {"class_counts": list(self.class_counts), "rows": rows}
        return {"format_version": FORMAT_VERSION, **facts, **changed}

    def require_fit(self, rows: int, mixed: int) -> None:
        """Do nothing if they fit a manifest of so many rows, so many of them mixed.

        Raises:
            MismatchError: one does not; names it.
        """
        _require_facts(self, rows, mixed)


class Totals(NamedTuple):
    """What a summary needs of the rows."""

    rows: int = 0
    mixed: int = 0
    unseen: int = 0
    """rows of samples that were never visited"""
    epsilon: tuple[float, float] | None = None
    """smallest and largest share of a partner; None where nothing is mixed"""

    def plus(self, columns: Mapping[str, np.ndarray]) -> "Totals":
        """Return the totals of these rows and more."""
        shares = columns["epsilon"][columns["mixed"]]
        ends = [] if self.epsilon is None else [*self.epsilon]
        ends += [float(shares.min()), float(shares.max())] if len(shares) else []
        return Totals(
            self.rows + len(columns["index"]), self.mixed + len(shares),
            self.unseen + int((columns["visits"] == 0).sum()), (min(ends), max(ends)) if ends else None,
        )  # fmt: skip


def summary_of(facts: Facts, totals: Totals, digest: str) -> dict[str, Any]:
    """Return what `summary` does, of a manifest that is not in memory."""
    counts = facts.class_counts
    return {
        "stage": facts.stage, "samples": facts.count, "kept": totals.rows, "keep": facts.keep,
        KEPT: totals.rows - totals.mixed, MIXED: totals.mixed, "K_0": facts.dropped,
        "epsilon": None if totals.epsilon is None else [*totals.epsilon], "unseen": totals.unseen,
        "classes": len(counts), "class_min": min(counts, default=None), "class_max": max(counts, default=None),
        "rule": dict(facts.rule), "knowledge_id": facts.knowledge_id, "parent": facts.parent,
        "values": facts.values, "digest": digest,
    }  # fmt: skip


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
        require(self.columns(), self.count)

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
        return parquet.digest(canonical_json(self.document()), self.columns())


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
        parquet.write(path, content, SCHEMA, lambda span: _cells_of(manifest, span))
        return
    table = cells(manifest.columns()).replace_schema_metadata(metadata(manifest.document(), manifest.digest))
    create_exclusive(path, parquet.encode(table))


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
    with parquet.opened(path, most_rows) as reader:
        document = _document(reader.schema, path)
        blocks = list(_checked(reader, document, path))
    columns: dict[str, Any] = {name: _joined([block[name] for block in blocks], kind) for name, kind in ARRAYS.items()}
    facts = {name: document[name] for name in FACTS}
    counts = facts["class_counts"]
    found = Manifest(**columns, **{**facts, "class_counts": tuple(counts) if isinstance(counts, list) else counts})
    run_files.require(path, run_files.Facts(len(found), found.digest))
    return found


def read_digest(path: Path, most_rows: int = MOST_ROWS) -> str:
    """Return the digest of the manifest in a file, after checking that its content has it; one row group at a time.

    Raises:
        NotFoundError, CorruptionError, MismatchError: as for `read_document`.
    """
    return str(read_document(path, most_rows)["digest"])


def read_document(
    path: Path, most_rows: int = MOST_ROWS, each: Callable[[Int64[np.ndarray, " rows"]], None] | None = None
) -> dict[str, Any]:
    """Return what the manifest in a file says beside its rows, after checking that its content has its digest.

    It is read one row group at a time; `each` is given the kept samples of every one.

    Raises:
        NotFoundError, CorruptionError, MismatchError: as for `read`, but the rules of a manifest are not checked: one
            with the digest of a valid manifest is that manifest.
    """
    with parquet.opened(path, most_rows) as reader:
        document = _document(reader.schema, path)
        for columns in _checked(reader, document, path):
            if each is not None:
                each(columns["index"])
        run_files.require(path, run_files.Facts(reader.rows, document["digest"]))
    return document


def arrays(
    table: pa.Table, path: Path, first: int = 0, names: Collection[str] = tuple(ARRAYS)
) -> dict[str, np.ndarray]:
    """Return some columns of rows as they stand in a file, `first` rows after its beginning; `mixed` is read of `part`.

    Raises:
        CorruptionError: a cell is empty, or of an unknown part.
    """
    return {name: _column(table, name, path, first) for name in names}


def seal_of(
    document: Mapping[str, Any], digest: str, count: int, partition_rows: int, parts: Sequence[parquet.Part] = ()
) -> parquet.Seal:
    """Return the record of a folder for a manifest; as yet without parts, if none are given."""
    return parquet.Seal(
        key=METADATA_KEY, samples=count, partition_rows=partition_rows, document={**document, "digest": digest},
        parts=tuple(parts),
    )  # fmt: skip


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
    return summary_of(manifest, Totals().plus(manifest.columns()), manifest.digest)


def cells(columns: Mapping[str, np.ndarray]) -> pa.Table:
    """Return rows as they stand in a file."""
    parts = pa.DictionaryArray.from_arrays(columns["mixed"].astype(np.int32), [KEPT, MIXED])
    found = {name: pa.array(column) for name, column in columns.items() if name != "mixed"}
    found["partner"] = pa.array(columns["partner"], mask=~columns["mixed"])
    found["value"] = pa.array(columns["value"], mask=columns["visits"] == 0)
    return pa.table({field.name: found.get(field.name, parts) for field in SCHEMA})


def metadata(document: Mapping[str, Any], digest: str) -> dict[str, bytes]:
    """Return a file's metadata: document and digest."""
    return {METADATA_KEY: canonical_json({**document, "digest": digest})}


def require(columns: Columns, count: int) -> None:
    """Do nothing if the rows of a whole condensed set of `count` samples are valid.

    Raises:
        MismatchError: they are not; names the first such row.
    """
    _raise_first([*_own_rules(columns, count), *_set_rules(columns)], columns, 0)


class Blocks:
    """Holds the rows of one condensed set as they come against all rules; takes one byte for each sample of the set."""

    def __init__(self, count: int) -> None:
        """Begin with the rows of a set of `count` samples."""
        self._count, self._rows, self._last = count, 0, -1
        self._used = np.zeros(count, np.uint8)

    def add(self, columns: Columns) -> None:
        """Take the next rows.

        Raises:
            MismatchError: one of them breaks a rule; names the first.
        """
        before = self._rows
        _raise_first(list(_own_rules(columns, self._count, self._last)), columns, before)
        self._rows += len(columns["index"])
        self._last = int(columns["index"][-1]) if len(columns["index"]) else self._last
        partner = columns["partner"][columns["mixed"]]
        again = np.zeros(len(columns["mixed"]), np.bool_)
        again[columns["mixed"]] = self._marked(partner, _AS_PARTNER)
        self._marked(columns["index"], _AS_KEPT)
        kept = np.zeros_like(again)
        kept[columns["mixed"]] = self._used[partner] & _AS_KEPT != 0
        rules = [("partner", _DROPPED, kept), ("partner", _PARTNER_ONCE, again)]
        rules.append(("rank", _RANK_ONCE, self._marked(columns["rank"], _AS_RANK)))
        _raise_first(rules, columns, before)

    def end(self) -> None:
        """Do nothing if no partner of an early row is kept by a later one.

        Raises:
            MismatchError: one is; names it.
        """
        both = _AS_KEPT | _AS_PARTNER
        for start in range(0, self._count, 2**20):
            if (bad := self._used[start : start + 2**20] & both == both).any():
                raise MismatchError(
                    f"manifest row of index {start + np.argmax(bad)}: expected partner to be {_DROPPED}, found it kept"
                )

    def _marked(self, places: Integer[np.ndarray, " rows"], mark: np.unsignedinteger) -> Bool[np.ndarray, " rows"]:
        """Mark some samples or ranks; return which of them had that mark already."""
        again = self._used[places] & mark != 0
        self._used[places] |= mark
        return again | _repeated(places)


def _read_only(name: str, array: Any, kind: type, rows: int) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.dtype != kind or array.shape != (rows,):
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise MismatchError(f"manifest column '{name}': expected {np.dtype(kind)} of shape ({rows},), found {found}")
    view = array.view()
    view.flags.writeable = False
    return view


def _document(schema: pa.Schema, path: Path) -> dict[str, Any]:
    document = parquet.document(schema, METADATA_KEY, path)
    if document is None:
        raise MismatchError(
            f"{path} is a parquet file but no manifest (no '{METADATA_KEY}' in its metadata); "
            "make a manifest of a values file with `kcdcache condense`"
        )
    if (version := document.get("format_version")) != FORMAT_VERSION:
        raise MismatchError(f"{path} has format {version}, this kcdcache reads {FORMAT_VERSION}; upgrade kcdcache")
    parquet.require_schema(schema, SCHEMA, path)
    return document


def _cells_of(manifest: Manifest, span: parquet.Span) -> Iterator[pa.Table]:
    start, stop = np.searchsorted(manifest.index, [span.first, span.stop]).tolist()
    for first in range(start, stop, parquet.ROWS):
        some = slice(first, min(first + parquet.ROWS, stop))
        yield cells({name: column[some] for name, column in manifest.columns().items()})


def _checked(reader: parquet.Table, document: Mapping[str, Any], path: Path) -> Iterator[dict[str, np.ndarray]]:
    """Yield the columns of each row group, then hold all of them against the digest."""
    rows, digest = 0, parquet.Digest(ARRAYS)
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
    part = table.column("part").unify_dictionaries().combine_chunks()
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


def _own_rules(columns: Columns, count: int, last: int = -1) -> Iterator[Rule]:
    """Yield the rules that a row keeps or breaks by itself, or with the row before it (`last` is the index before)."""
    index, samples = columns["index"], f"a sample in [0, {count})"
    yield "index", samples, (index < 0) | (index >= count)
    yield "index", _IN_ORDER, np.diff(index, prepend=last) <= 0
    partner, mixed = columns["partner"], columns["mixed"]
    yield "partner", f"none (-1) in {KEPT}", ~mixed & (partner != -1)
    yield "partner", f"{samples} in {MIXED}", mixed & ((partner < 0) | (partner >= count))
    epsilon, weight, rank = columns["epsilon"], columns["weight"], columns["rank"]
    yield "epsilon", "a share in [0, 1]", ~((epsilon >= 0) & (epsilon <= 1))
    yield "epsilon", f"0 in {KEPT}", ~mixed & (epsilon != 0)
    yield "rank", f"a rank in [0, {count})", (rank < 0) | (rank >= count)
    yield "visits", "0 or more", columns["visits"] < 0
    yield "value", "a finite number", ~np.isfinite(columns["value"])
    yield "value", "0 for an unseen sample", (columns["visits"] == 0) & (columns["value"] != 0)
    yield "weight", "a finite number above 0", ~(np.isfinite(weight) & (weight > 0))


def _set_rules(columns: Columns) -> Iterator[Rule]:
    """Yield the rules between any two rows of a whole set."""
    partner, mixed = columns["partner"], columns["mixed"]
    yield "partner", _DROPPED, mixed & np.isin(partner, columns["index"])
    yield "partner", _PARTNER_ONCE, mixed & _repeated(partner, partner[mixed])
    yield "rank", _RANK_ONCE, _repeated(columns["rank"])


def _repeated(array: Shaped[np.ndarray, " rows"], of: Shaped[np.ndarray, " some"] | None = None) -> np.ndarray:
    """Return which stand there again, after their first row; none, quickly, where those of interest (`of`) differ."""
    ascending = np.sort(array if of is None else of)
    repeated = np.zeros(len(array), np.bool_)
    if (ascending[1:] == ascending[:-1]).any():
        order = np.argsort(array, kind="stable")
        repeated[order[1:]] = array[order][1:] == array[order][:-1]
    return repeated


def _raise_first(rules: list[Rule], columns: Columns, before: int) -> None:
    """Raise for the first row that breaks a rule; `before` is the number of rows before these."""
    broken = [(int(np.argmax(bad)), column, expected) for column, expected, bad in rules if bad.any()]
    if broken:
        row, column, expected = min(broken, key=lambda rule: rule[0])
        raise MismatchError(
            f"manifest row {before + row}, index {columns['index'][row]}: expected {column} to be {expected}, "
            f"found {columns[column][row]}"
        )


def _require_types(facts: Facts) -> None:
    for name, kinds in FACTS.items():
        found = getattr(facts, name)
        parts = found if isinstance(found, tuple) else ()
        if not isinstance(found, kinds) or not all(isinstance(part, int) for part in parts):
            wanted = " or ".join(_TYPE_NAMES.get(kind, kind.__name__) for kind in kinds)
            raise MismatchError(f"manifest field '{name}': expected {wanted}, found {found!r}")


def _require_facts(facts: Facts, rows: int, mixed: int) -> None:
    counts = facts.class_counts
    for name, expected, good in (
        ("count", f"at least its {rows} rows", facts.count >= rows),
        ("stage", "0 or more", facts.stage >= 0),
        ("keep", "a share in (0, 1]", 0 < facts.keep <= 1),
        ("keep", f"a share of {facts.count} that its {rows} rows do not exceed", _fits_share(facts, rows)),
        ("dropped", "at least the number of mixed rows", facts.dropped >= mixed),
        ("dropped", "no more than are not kept", facts.dropped <= facts.count - rows),
        ("class_counts", "0 or more of each class", all(number >= 0 for number in counts)),
        ("class_counts", f"{rows} in all, or nothing", not counts or sum(counts) == rows),
    ):
        if not good:
            raise MismatchError(f"manifest field '{name}': expected {expected}, found {getattr(facts, name)}")


def _fits_share(facts: Facts, rows: int) -> bool:
    """Fewer rows than the share are fine: where samples were skipped, fewer are left than it allows."""
    return not 0 < facts.keep <= 1 or rows <= kept_count(facts.keep, facts.count)
