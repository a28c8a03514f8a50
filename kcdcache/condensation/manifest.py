"""Manifests: which samples a stage trains on, in memory and in a file, and the rules their rows keep."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int32, Int64, Integer

from kcdcache.condensation.schedule import kept_count
from kcdcache.errors import CorruptionError, MismatchError
from kcdcache.files import atomic, parquet, run_files
from kcdcache.files.records import canonical_json, require_format

METADATA_KEY = "kcdcache.manifest"
MOST_ROWS = 10**8
"""the largest store"""

ARRAYS: dict[str, type] = {
    "index": np.int64, "mixed": np.bool_, "partner": np.int64, "epsilon": np.float32,
    "rank": np.int64, "value": np.float32, "visits": np.int32, "weight": np.float32,
}  # fmt: skip
"""column -> its type, in digest order"""
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
"""parts: samples kept as they are, and kept samples with a dropped one mixed in"""

BYTES_A_SAMPLE = 1
"""memory of `Checks`"""
Columns = Mapping[str, np.ndarray]
"""arrays of a condensed set by name, each of shape (rows,)"""
Rule = tuple[str, str, Bool[np.ndarray, " rows"]]
"""(column, expectation, which rows break it)"""
_DROPPED = "a dropped sample, not a kept one"
_AS_KEPT, _AS_PARTNER, _AS_RANK = np.uint8(1), np.uint8(2), np.uint8(4)


@dataclass(frozen=True, eq=False)
class Samples:
    """All samples of a store, as far as selection needs them."""

    knowledge_id: str
    count: int
    """N, of the whole training split"""
    labels: Int64[np.ndarray, " n"] | None = None
    classes: int = 0
    """number of classes, 0 if unknown"""
    data_digest: str | None = None
    excluded: Int64[np.ndarray, " excluded"] = field(default_factory=lambda: np.empty(0, np.int64))
    """skipped by the store: never kept, never mixed in"""

    def class_counts(self, index: Int64[np.ndarray, " some"]) -> tuple[int, ...]:
        """Count the given samples by class; empty if labels are unknown."""
        return () if self.labels is None else tuple(np.bincount(self.labels[index], minlength=self.classes).tolist())


@dataclass(frozen=True, eq=False, kw_only=True)
class Facts:
    """A manifest without its rows; raises MismatchError for a fact of the wrong type."""

    knowledge_id: str
    """of the store it was made for"""
    count: int
    """number of samples N in the whole training split"""
    stage: int
    keep: float
    """share of N kept"""
    dropped: int = 0
    """size of K_0: the dropped samples the rule selects, mixed in or not"""
    rule: dict[str, Any] = field(default_factory=dict)
    """settings of the condensation"""
    parent: str | None = None
    """digest of the previous stage's manifest"""
    values: str | None = None
    """fingerprint of the values behind the ranking"""
    class_counts: tuple[int, ...] = ()
    """kept samples per class, empty if labels were unknown"""
    data_digest: str | None = None
    """digest of the training split, checked by a transfer to another teacher"""

    def __post_init__(self) -> None:
        if isinstance(self.keep, int):
            object.__setattr__(self, "keep", float(self.keep))  # 1 and 1.0 must give one digest
        for name, kinds in FACTS.items():
            found = getattr(self, name)
            parts = found if isinstance(found, tuple) else ()
            if not isinstance(found, kinds) or not all(isinstance(part, int) for part in parts):
                wanted = " or ".join(_TYPE_NAMES.get(kind, kind.__name__) for kind in kinds)
                raise MismatchError(f"manifest field '{name}': expected {wanted}, found {found!r}")

    def document_of(self, rows: int) -> dict[str, Any]:
        """Return the JSON values of a manifest with these facts and `rows` rows, without the digest."""
        facts = {name: getattr(self, name) for name in FACTS} | {"class_counts": list(self.class_counts)}
        return {"format_version": FORMAT_VERSION, **facts, "rows": rows}

    def require_fit(self, rows: int, mixed: int) -> None:
        """Raise MismatchError, naming the fact, unless these fit a manifest of `rows` rows, `mixed` of them mixed.

        Fewer rows than `keep` allows are fine: the store may have skipped samples.
        """
        counts, is_share = self.class_counts, 0 < self.keep <= 1
        for name, expected, good in (
            ("count", f"at least its {rows} rows", self.count >= rows),
            ("count", f"at most {MOST_ROWS}", self.count <= MOST_ROWS),
            ("stage", "0 or more", self.stage >= 0),
            ("keep", "a share in (0, 1]", is_share),
            ("keep", f"a share of {self.count} that its {rows} rows do not exceed",
             not is_share or rows <= kept_count(self.keep, self.count)),
            ("dropped", "at least the number of mixed rows", self.dropped >= mixed),
            ("dropped", "no more than are not kept", self.dropped <= self.count - rows),
            ("class_counts", "0 or more of each class", all(number >= 0 for number in counts)),
            ("class_counts", f"{rows} in all, or nothing", not counts or sum(counts) == rows),
        ):  # fmt: skip
            if not good:
                raise MismatchError(f"manifest field '{name}': expected {expected}, found {getattr(self, name)}")


class Totals(NamedTuple):
    """Sums over the rows, for a summary."""

    rows: int = 0
    mixed: int = 0
    unseen: int = 0
    """rows of samples without a visit"""
    epsilon: tuple[float, float] | None = None
    """smallest and largest share of a partner; None if nothing is mixed"""

    def plus(self, columns: Columns) -> "Totals":
        """Return the totals including these rows."""
        shares = columns["epsilon"][columns["mixed"]]
        ends = [] if self.epsilon is None else [*self.epsilon]
        ends += [float(shares.min()), float(shares.max())] if len(shares) else []
        return Totals(
            self.rows + len(columns["index"]), self.mixed + len(shares),
            self.unseen + int((columns["visits"] == 0).sum()), (min(ends), max(ends)) if ends else None,
        )  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class Manifest(Facts):
    """Which samples a stage trains on, and what is mixed into them; arrays are read-only and sorted by index.

    Raises MismatchError if a row or fact breaks a rule; it names the first such row.
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
    """rank among all candidates, 0 is best"""
    value: Float32[np.ndarray, " rows"]
    """value behind the ranking, 0 if unseen (null in the file)"""
    visits: Int32[np.ndarray, " rows"]
    """visit count, 0 if unseen"""
    weight: Float32[np.ndarray, " rows"]
    """weight of the sample's loss, above 0"""

    def __post_init__(self) -> None:
        for name, kind in ARRAYS.items():
            object.__setattr__(self, name, _read_only(name, getattr(self, name), kind, len(self.index)))
        super().__post_init__()
        self.require_fit(len(self), int(self.mixed.sum()))
        Checks(self.count).add(self.columns())

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        mixed, kept = int(self.mixed.sum()), f"{len(self):,} of {self.count:,} samples"
        return f"Manifest({kept}: {len(self) - mixed:,} in K_1H, {mixed:,} in K_Aug; digest {self.digest[:12]})"

    def columns(self) -> dict[str, np.ndarray]:
        """Return the arrays by name, each of shape (rows,)."""
        return {name: getattr(self, name) for name in ARRAYS}

    def document(self) -> dict[str, Any]:
        """Return everything but the arrays as JSON values, without the digest."""
        return self.document_of(len(self))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the document and all columns: equal if and only if the manifests are."""
        return parquet.digest(canonical_json(self.document()), self.columns())


class Draft:
    """A condensed set on its way to a file: its rows pass once, in blocks, and are checked and digested."""

    def __init__(self, count: int, blocks: Iterable[Columns], facts: Callable[[Totals], Facts]) -> None:
        """Take the rows of a set of `count` samples, in order; `facts` is called once all rows have passed."""
        self._count, self._blocks, self._facts = count, iter(blocks), facts
        self._checks, self._totals, self._digest = Checks(count), Totals(), parquet.Digest(ARRAYS)

    def write(self, path: Path, partition_rows: int | None = None, place: Path | None = None) -> None:
        """Write the set as parquet, whole or not at all; the same content gives the same bytes.

        A set of more than `partition_rows` samples becomes a folder of parts, one per `partition_rows` samples, built
        in the folder `place` (default: `atomic.beside`).

        Raises:
            MismatchError: a row or fact breaks a rule.
            LockedError: the path exists; manifests are never overwritten.
        """
        if partition_rows is None or self._count <= partition_rows:
            atomic.create_exclusive(path, self._fill)
            return
        with atomic.beside(path) if place is None else nullcontext(place) as folder:
            made, waiting = folder / "set", list[Columns]()
            made.mkdir()
            parts = tuple(
                parquet.write_part(made, span, SCHEMA, self._tables(_until(span.stop, self._blocks, waiting)))
                for span in parquet.spans(self._count, partition_rows)
            )
            content = parquet.Seal(
                key=METADATA_KEY, samples=self._count, partition_rows=partition_rows, document=self._ended[1],
                parts=parts,
            )  # fmt: skip
            parquet.seal(made, content)
            atomic.place(made, path, parquet.SEAL)

    def summary(self) -> dict[str, Any]:
        """Return the `summary` of the set, after checking the rows that were not written."""
        for _ in self._tables(self._blocks):
            pass
        facts, document = self._ended
        return _summary(facts, self._totals, document["digest"])

    def held(self) -> Manifest:
        """Return the set as a manifest in memory."""
        columns = _joined(list(self._blocks))
        return Manifest(**columns, **vars(self._facts(Totals().plus(columns))))

    def _fill(self, temporary: Path) -> None:
        with open(temporary, "wb") as sink:
            writer = parquet.Writer(sink, SCHEMA)
            for table in self._tables(self._blocks):
                writer.write(table)
            writer.close({METADATA_KEY: canonical_json(self._ended[1])})

    def _tables(self, blocks: Iterable[Columns]) -> Iterator[pa.Table]:
        """Yield file rows, parquet.ROWS at a time, which are checked and digested while the caller works."""
        with ThreadPoolExecutor(2) as pool:
            for columns in parquet.regrouped(blocks, parquet.ROWS):
                beside = [pool.submit(work, columns) for work in (self._checks.add, self._digest.add)]
                yield cells(columns)
                self._totals = self._totals.plus(columns)
                for work in beside:
                    work.result()

    @cached_property
    def _ended(self) -> tuple[Facts, dict[str, Any]]:
        """The facts, and the document with its digest; only after all rows have passed."""
        self._checks.end()
        facts = self._facts(self._totals)
        facts.require_fit(self._totals.rows, self._totals.mixed)
        document = facts.document_of(self._totals.rows)
        return facts, {**document, "digest": self._digest.over(canonical_json(document))}
        return facts, {**document, "digest": self._digest.over(canonical_json(document))}


class _Whole(Draft):
    """A manifest in memory on its way to a file: it was checked when it was made, and knows its digest."""

    def __init__(self, made: Manifest) -> None:
        starts, columns = range(0, len(made), parquet.ROWS), made.columns()
        blocks = ({name: column[first : first + parquet.ROWS] for name, column in columns.items()} for first in starts)
        super().__init__(made.count, blocks, lambda totals: made)
        self._made = made

    def _tables(self, blocks: Iterable[Columns]) -> Iterator[pa.Table]:
        return map(cells, parquet.regrouped(blocks, parquet.ROWS))

    @cached_property
    def _ended(self) -> tuple[Facts, dict[str, Any]]:
        return self._made, {**self._made.document(), "digest": self._made.digest}


def full(samples: Samples) -> Manifest:
    """Return the manifest that keeps all samples as they are, except those the store skipped; `keep` is 1 even so."""
    index = np.setdiff1d(np.arange(samples.count), samples.excluded, assume_unique=True)
    return unranked(samples, index, np.arange(len(index)), keep=1.0)


def unranked(
    samples: Samples, index: Int64[np.ndarray, " rows"], rank: Int64[np.ndarray, " rows"], **facts: Any
) -> Manifest:
    """Return a manifest of stage 0 without values: some samples, kept as they are."""
    rows = len(index)
    return Manifest(
        **plain(index), rank=rank, value=np.zeros(rows, np.float32), visits=np.zeros(rows, np.int32),
        knowledge_id=samples.knowledge_id, count=samples.count, stage=0, class_counts=samples.class_counts(index),
        data_digest=samples.data_digest, **facts,
    )  # fmt: skip


def plain(index: Int64[np.ndarray, " rows"]) -> dict[str, Any]:
    """Return index, mixed, partner, epsilon and weight of a set without mixes, each of shape (rows,)."""
    rows = len(index)
    return {
        "index": index, "mixed": np.zeros(rows, np.bool_), "partner": np.full(rows, -1),
        "epsilon": np.zeros(rows, np.float32), "weight": np.ones(rows, np.float32),
    }  # fmt: skip


def write(path: Path, manifest: Manifest, partition_rows: int | None = None) -> None:
    """Write a manifest like `Draft.write`; it is not checked or digested again."""
    _Whole(manifest).write(path, partition_rows)


def read(path: Path | str, most_rows: int = MOST_ROWS) -> Manifest:
    """Return the manifest in a file, after checking page checksums, digest, rules and, in a run, the run's record.

    A file of more than `most_rows` rows is refused before decoding: a few bytes of parquet can claim billions of rows.

    Raises:
        CorruptionError: the file is damaged or was changed, or its run has no record of it.
        MismatchError: the file is no valid manifest, has a newer format, or is not the one its run wrote there.
    """
    path = Path(path)
    with parquet.opened(path, most_rows) as reader:
        document = _document(reader.schema, path)
        columns = _joined(list(_checked(reader, document, path)))
    found = Manifest(**columns, **_facts(document))
    run_files.require(path, run_files.Facts(len(found), found.digest))
    return found


class Head(NamedTuple):
    """A manifest in a file, without its rows."""

    facts: Facts
    rows: int
    digest: str


def read_head(
    path: Path, most_rows: int = MOST_ROWS, each: Callable[[Int64[np.ndarray, " rows"]], None] | None = None
) -> Head:
    """Return the head of a manifest in a file, after checking its digest, one row group at a time.

    `each` is called with the kept samples of every row group. Errors are those of `read`, but the rows' rules are not
    checked: the digest of a valid manifest vouches for them.
    """
    with parquet.opened(path, most_rows) as reader:
        document = _document(reader.schema, path)
        for columns in _checked(reader, document, path):
            if each is not None:
                each(columns["index"])
        found = Head(Facts(**_facts(document)), reader.rows, document["digest"])
        run_files.require(path, run_files.Facts(found.rows, found.digest))
    return found


def require_knowledge(
    manifest: Facts, knowledge_id: str, *, count: int | None = None, data_digest: str | None = None,
    transfer: bool = False,
) -> None:  # fmt: skip
    """Raise MismatchError unless a manifest fits this knowledge, or with `transfer` a store of the same data."""
    if manifest.knowledge_id == knowledge_id:
        return
    if not transfer:
        raise MismatchError(
            f"the manifest was made for knowledge {manifest.knowledge_id}, the store holds {knowledge_id}; give the "
            "manifest's own store, or --transfer to use it with another teacher's store of the same data"
        )
    own, given = (manifest.count, manifest.data_digest), (count, data_digest)
    for name, found, expected in zip(("samples", "data digest"), own, given, strict=True):
        if found is not None and expected is not None and found != expected:
            raise MismatchError(
                f"--transfer needs a store of the same data: {name} {found} in the manifest of "
                f"{manifest.knowledge_id}, {expected} in the store of {knowledge_id}"
            )


def require_usable(manifest: Manifest, skipped: Int64[np.ndarray, " skipped"]) -> None:
    """Raise MismatchError, naming the row, if a manifest keeps or mixes in a sample that its store skipped."""
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
    return _summary(manifest, Totals().plus(manifest.columns()), manifest.digest)


def _summary(facts: Facts, totals: Totals, digest: str) -> dict[str, Any]:
    counts = facts.class_counts
    return {
        "stage": facts.stage, "samples": facts.count, "kept": totals.rows, "keep": facts.keep,
        KEPT: totals.rows - totals.mixed, MIXED: totals.mixed, "K_0": facts.dropped,
        "epsilon": None if totals.epsilon is None else [*totals.epsilon], "unseen": totals.unseen,
        "classes": len(counts), "class_min": min(counts, default=None), "class_max": max(counts, default=None),
        "rule": dict(facts.rule), "knowledge_id": facts.knowledge_id, "parent": facts.parent,
        "values": facts.values, "digest": digest,
    }  # fmt: skip


def cells(columns: Columns) -> pa.Table:
    """Return rows in the file's form."""
    parts = pa.DictionaryArray.from_arrays(columns["mixed"].astype(np.int32), [KEPT, MIXED])
    found = {name: pa.array(column) for name, column in columns.items() if name != "mixed"}
    found["partner"] = pa.array(columns["partner"], mask=~columns["mixed"])
    found["value"] = pa.array(columns["value"], mask=columns["visits"] == 0)
    return pa.table({field.name: found.get(field.name, parts) for field in SCHEMA})


class Checks:
    """Checks the rows of one condensed set block by block against all rules; takes one byte per sample."""

    def __init__(self, count: int) -> None:
        """Begin a set of `count` samples."""
        self._count, self._rows, self._last = count, 0, -1
        self._used = np.zeros(count, np.uint8)

    def add(self, columns: Columns) -> None:
        """Check the next rows.

        Raises MismatchError for the first row that breaks a rule alone, else the first that does with another row.
        """
        _raise_first([*_own_rules(columns, self._count, self._last)], columns, self._rows)
        index, mixed = columns["index"], columns["mixed"]
        partner, again, kept = columns["partner"][mixed], np.zeros_like(mixed), np.zeros_like(mixed)
        again[mixed] = self._marked(partner, _AS_PARTNER)
        self._used[index] |= _AS_KEPT
        kept[mixed] = self._used[partner] & _AS_KEPT != 0
        rules = [("partner", _DROPPED, kept), ("partner", "each partner once", again)]
        rules.append(("rank", "each rank once", self._marked(columns["rank"], _AS_RANK)))
        _raise_first(rules, columns, self._rows)
        self._rows, self._last = self._rows + len(index), int(index[-1]) if len(index) else self._last

    def end(self) -> None:
        """Raise MismatchError if a later row keeps the partner of an earlier one."""
        both = _AS_KEPT | _AS_PARTNER
        for start in range(0, self._count, 2**20):
            if (bad := self._used[start : start + 2**20] & both == both).any():
                raise MismatchError(
                    f"manifest row of index {start + np.argmax(bad)}: expected partner to be {_DROPPED}, found it kept"
                )

    def _marked(self, places: Integer[np.ndarray, " rows"], mark: np.unsignedinteger) -> Bool[np.ndarray, " rows"]:
        """Mark some samples or ranks; return which of them were marked before, or occur twice."""
        again: np.ndarray = self._used[places] & mark != 0
        self._used[places] |= mark
        ascending = np.sort(places)
        if (ascending[1:] == ascending[:-1]).any():  # seldom, and quickly seen
            order = np.argsort(places, kind="stable")
            again[order[1:]] |= ascending[1:] == ascending[:-1]
        return again


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
    require_format(document, FORMAT_VERSION, path)
    parquet.require_schema(schema, SCHEMA, path)
    return document


def _facts(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts in a document whose digest was checked, but not its content."""
    facts, counts = {name: document[name] for name in FACTS}, document["class_counts"]
    return {**facts, "class_counts": tuple(counts) if isinstance(counts, list) else counts}


def _until(stop: int, blocks: Iterator[Columns], waiting: list[Columns]) -> Iterator[Columns]:
    """Yield the rows of samples before `stop`; the rest of a block stays in `waiting` for the next call."""
    while (columns := waiting.pop() if waiting else next(blocks, None)) is not None:
        here = int(np.searchsorted(columns["index"], stop))
        yield {name: column[:here] for name, column in columns.items()}
        if here < len(columns["index"]):
            waiting.append({name: column[here:] for name, column in columns.items()})
            return


def _checked(reader: parquet.Table, document: Mapping[str, Any], path: Path) -> Iterator[dict[str, np.ndarray]]:
    """Yield the columns of each row group, then compare all of them with the digest."""
    rows, digest = 0, parquet.Digest(ARRAYS)
    for table in reader.groups():
        columns = {name: _column(table, name, path, rows) for name in ARRAYS}
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


def _joined(blocks: list[Columns]) -> dict[str, Any]:
    return {
        name: np.concatenate([np.empty(0, kind), *(block[name] for block in blocks)]) for name, kind in ARRAYS.items()
    }


def _column(table: pa.Table, name: str, path: Path, first: int) -> np.ndarray:
    """Return a column of a row group that begins at row `first` of the file; `mixed` is read from `part`."""
    if name != "mixed":
        column = table.column(name)
        column = column.fill_null({"partner": -1, "value": 0}[name]) if name in ("partner", "value") else column
        if column.null_count:
            raise CorruptionError(f"{path} was changed after it was written: '{name}' has empty cells; write it again")
        return column.to_numpy()
    part = table.column("part").unify_dictionaries().combine_chunks()
    codes = part.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    names = np.array([*part.dictionary.to_pylist(), None], object)  # the last is an empty cell's
    mixed, known = names[codes] == MIXED, np.isin(names, [KEPT, MIXED])[codes]
    if not known.all():
        row = int(np.argmin(known))
        raise CorruptionError(
            f"{path}, row {first + row}: expected part {KEPT} or {MIXED}, found {part[row]}; write it again"
        )
    return mixed


def _own_rules(columns: Columns, count: int, last: int) -> Iterator[Rule]:
    """Yield the rules for a row by itself, or with the row before it (`last` is the index before the first)."""
    index, samples = columns["index"], f"a sample in [0, {count})"
    yield "index", samples, (index < 0) | (index >= count)
    yield "index", "ascending order, each sample once", np.diff(index, prepend=last) <= 0
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


def _raise_first(rules: list[Rule], columns: Columns, before: int) -> None:
    """Raise for the first row that breaks a rule; `before` is the number of earlier rows."""
    broken = [(int(np.argmax(bad)), column, expected) for column, expected, bad in rules if bad.any()]
    if broken:
        row, column, expected = min(broken, key=lambda rule: rule[0])
        raise MismatchError(
            f"manifest row {before + row}, index {columns['index'][row]}: expected {column} to be {expected}, "
            f"found {columns[column][row]}"
        )
