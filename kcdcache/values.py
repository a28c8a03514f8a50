"""The online value estimate of every sample: state, update, merge, score, and its parquet file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64, Int32, Int64, Shaped

from kcdcache import foreign, partitioned, records, tables
from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, NonFiniteError, SettingsError
from kcdcache.files import canonical_json, write_atomic

METADATA_KEY = "kcdcache.values"
FORMAT_VERSION = 0
UNSEEN = {"first": np.inf, "last": -np.inf}
"""Score of samples that were never visited, by policy."""

COLUMNS = foreign.COLUMNS
_KINDS: dict[str, type] = {"index": np.int64, "visits": np.int32, "value": np.float32, "label": np.int64}
_REQUIRED = ("epoch", "knowledge_id", "student")
_MOST_VISITS = foreign.MOST_VISITS
_LOOKED_UP = 2**10


@dataclass(frozen=True, eq=False)
class Values:
    """What is known of each of N samples; a sample without visits has value 0 and counts as unseen."""

    visits: Int32[np.ndarray, " n"]
    """visit count F, 0 or more"""
    value: Float32[np.ndarray, " n"]
    """value V, usually the mean student entropy over all visits in nats"""

    def __post_init__(self) -> None:
        if len(self.visits) != len(self.value):
            raise MismatchError(f"values need one row per sample: {len(self.visits)} visits, {len(self.value)} values")


class ValuesFile(NamedTuple):
    """What a values file holds."""

    values: Values
    labels: Int64[np.ndarray, " n"] | None
    """label of every sample, or None where the file does not give all of them"""
    document: dict[str, Any] | None
    """our metadata (knowledge_id, student, epoch, digest, ...), or None for a file of another tool"""
    foreign: bool
    """whether another tool wrote the file"""


class Block(NamedTuple):
    """Consecutive samples."""

    first: int
    """index of the first of them"""
    values: Values
    labels: Int64[np.ndarray, " n"] | None


@runtime_checkable
class Source(Protocol):
    """Values that can be gone through, in order of the index, as often as need be."""

    @property
    def labelled(self) -> bool:
        """Whether every sample has a label."""

    def blocks(self) -> Iterator[Block]:
        """Yield all samples."""

    def fingerprint(self) -> str:
        """Return `fingerprint` of the values."""


@dataclass(frozen=True, eq=False)
class Held:
    """Values in memory as a source."""

    values: Values
    labels: Int64[np.ndarray, " n"] | None = None

    @property
    def labelled(self) -> bool:
        """Whether every sample has a label."""
        return self.labels is not None

    def blocks(self) -> Iterator[Block]:
        """Yield all samples, in views of the arrays."""
        for first in range(0, len(self.values.visits), tables.ROWS):
            some = slice(first, first + tables.ROWS)
            labels = None if self.labels is None else self.labels[some]
            yield Block(first, Values(self.values.visits[some], self.values.value[some]), labels)

    def fingerprint(self) -> str:
        """Return `fingerprint` of the values."""
        return fingerprint(self.values)


def start(count: int) -> Values:
    """Return the values of `count` samples that nobody has visited yet."""
    return Values(np.zeros(count, np.int32), np.zeros(count, np.float32))


def observe(
    visits: Int32[Any, " batch"],
    mean: Float32[Any, " batch"],
    value: Float32[Any, " batch"],
    record: str = "mean",
    decay: float = 0.9,
) -> tuple[Int32[Any, " batch"], Float32[Any, " batch"]]:
    """Return visits and value after one more observation per row: F + 1, and by `record` the new estimate.

    'mean': m + (v - m) / F, the running mean; 'last': v; 'ema': decay m + (1 - decay) v, the first visit being v.
    Works on numpy arrays and torch tensors alike, on any device, and changes none of them.

    Raises:
        SettingsError: `record` is unknown.

    Source: Eq. 12 of Knowledge Condensation Distillation (arXiv 2207.05409); 'ema' is ours.
    """
    if record not in RECORDS:
        raise SettingsError(f"unknown record '{record}'; known: {', '.join(RECORDS)}")
    return visits + 1, RECORDS[record](visits, mean, value, decay)


def merge(left: Values, right: Values) -> Values:
    """Return the pooled values of two histories of the same samples: visits add up, means are weighted by visits.

    Exact for values recorded as 'mean', whether the histories share samples or not; symmetric.

    Raises:
        MismatchError: the histories cover different numbers of samples.
    """
    if len(left.visits) != len(right.visits):
        raise MismatchError(f"values of {len(left.visits)} and of {len(right.visits)} samples cannot be merged")
    visits = left.visits.astype(np.int64) + right.visits
    if (visits > _MOST_VISITS).any():
        raise MismatchError(f"index {np.argmax(visits > _MOST_VISITS)}: more than {_MOST_VISITS} visits in all")
    total = left.value * left.visits.astype(np.float64) + right.value * right.visits.astype(np.float64)
    return Values(visits.astype(np.int32), (total / np.maximum(visits, 1)).astype(np.float32))


def score(values: Values, exponent: float, unseen: str, first: int = 0) -> Float32[np.ndarray, " n"]:
    """Return value * visits^exponent per sample, unseen samples at +inf ('first') or -inf ('last'); never NaN or -0.

    `first` is the index of the first sample, for errors.

    Raises:
        SettingsError: the policy is unknown.
        NonFiniteError: a visited sample's value or score is not finite; names the first index.

    Source: Eq. 13 of Knowledge Condensation Distillation; the policy for unseen samples is ours.
    """
    if unseen not in UNSEEN:
        raise SettingsError(f"unknown policy '{unseen}' for unseen samples; known: {', '.join(UNSEEN)}")
    seen = values.visits > 0
    with np.errstate(over="ignore", invalid="ignore"):
        weighted = values.value * _weights(values.visits, exponent)
        found = weighted.astype(np.float32) + np.float32(0)  # adding 0 turns -0 into +0, so that both tie
    _require_finite(values.value, found, seen, first)
    return np.where(seen, found, np.float32(UNSEEN[unseen]))


def fingerprint(values: Values) -> str:
    """Return the SHA-256 over visits and values: the same for values in memory, in our file, or from another tool."""
    return tables.digest(b"", {"visits": values.visits, "value": values.value})


def write(
    path: Path, values: Values, labels: Int64[np.ndarray, " n"] | None, document: Mapping[str, Any],
    partition_rows: int | None = None,
) -> None:  # fmt: skip
    """Write values as parquet, atomically and with the same bytes for the same content.

    `document` holds JSON values, among them knowledge_id, student and epoch. More than `partition_rows` values become a
    folder of parts of so many, which replaces nothing.

    Raises:
        SettingsError: the document lacks a key.
        MismatchError: labels and values differ in length.
        NonFiniteError: a visited sample's value is not finite.
        NoSpaceError: the disk is full; an old file stays as it was.
        LockedError: something lies where a folder should be made.
    """
    if missing := [key for key in _REQUIRED if key not in document]:
        raise SettingsError(f"values for {path} need '{missing[0]}' in their document; found {sorted(document)}")
    if labels is not None and len(labels) != len(values.visits):
        raise MismatchError(f"{path}: {len(labels)} labels for {len(values.visits)} values; give one label per sample")
    _require_finite(values.value, values.value, values.visits > 0)
    columns = _columns(values, labels)
    content = {**document, "format_version": FORMAT_VERSION, "count": len(values.visits)}
    content["digest"] = _digest(content, columns)
    if partition_rows is not None and len(values.visits) > partition_rows:
        kept = partitioned.Seal(METADATA_KEY, content["count"], partition_rows, content, fingerprint(values), ())
        schema = pa.schema([(name, pa.from_numpy_dtype(_KINDS[name])) for name in columns])
        partitioned.write(path, kept, schema, lambda span: _cells_of(columns, span))
        return
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: canonical_json(content)})
    write_atomic(path, tables.encode(table))


def read(path: Path | str, count: int) -> ValuesFile:
    """Return the values of `count` samples from our file or, where our metadata is absent, from another tool's.

    Another tool's file needs `index` and `value`; `visits` (1 if absent) and `label` are used where present. Its rows
    may stand in any order and be of any number type; samples it leaves out are unseen.

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: the file is damaged or was changed after it was written.
        MismatchError: it is for another number of samples, a row is unusable (named), or its run wrote another one.
        NonFiniteError: a visited sample's value is NaN or infinite; names the row.
    """
    path = Path(path)
    found = records.steady(path, lambda: _read(path, count))
    records.require(path, records.Facts(len(found.values.visits), fingerprint(found.values)))
    return found


class Stream:
    """Our values file as a source: every time it is gone through whole it is held against its digest."""

    def __init__(self, reader: tables.Table, path: Path, count: int) -> None:
        """Take an open file that should be of ours, of `count` samples.

        Raises:
            CorruptionError: its metadata is damaged, or it has other columns than ours.
            MismatchError: it is of a newer format.
        """
        self._reader, self._path, self._count = reader, path, count
        self.known = (isinstance(reader, partitioned.Joined) and reader.seal.fingerprint) or ""  # or set from elsewhere
        self.document = tables.document(reader.schema, METADATA_KEY, path) or {}
        if (version := self.document.get("format_version")) != FORMAT_VERSION:
            raise MismatchError(f"{path} has format {version}, this kcdcache reads {FORMAT_VERSION}; upgrade kcdcache")
        self.labelled = "label" in reader.schema.names
        self.kinds = {name: kind for name, kind in _KINDS.items() if name != "label" or self.labelled}
        expected = pa.schema([(name, pa.from_numpy_dtype(kind)) for name, kind in self.kinds.items()])
        tables.require_schema(reader.schema, expected, path)

    def blocks(self) -> Iterator[Block]:
        """Yield all samples; what was yielded counts only once all was: only then the digest was compared.

        Raises:
            CorruptionError: the file is damaged, or its content does not match its digest.
            MismatchError: it is of another number of samples, or a count of visits is negative; names the row.
            NonFiniteError: a value is not finite; names the row.
        """
        digest, rows, trouble = tables.Digest(self.kinds), 0, None
        for table in self._reader.groups():
            columns = self._columns(table)
            digest.add({**columns, "index": np.arange(rows, rows + table.num_rows)})  # which it then has to hold
            values = Values(columns["visits"], columns["value"])
            trouble = trouble or _trouble(values, self._path, rows)
            if trouble is None:
                yield Block(rows, values, columns.get("label"))
            rows += table.num_rows
        self._require_digest({name: (kind, rows, digest.of(name)) for name, kind in self.kinds.items()})
        if trouble is not None:
            raise trouble

    def fingerprint(self) -> str:
        """Return `fingerprint` of the values, as of the last time they were gone through whole, or as known before."""
        return self.known

    def _require_digest(self, columns: Mapping[str, tuple[type, int, bytes]]) -> None:
        """Do nothing if the columns, of which type, rows and SHA-256 are given, have the file's digest."""
        header = canonical_json({key: item for key, item in self.document.items() if key != "digest"})
        if tables.combined(header, columns) != self.document.get("digest"):
            raise CorruptionError(
                f"{self._path} was changed after it was written: its content does not match its digest"
            )
        self.require_rows(columns["visits"][1])
        found = tables.combined(b"", {name: columns[name] for name in ("visits", "value")})
        if self.known not in ("", found):
            raise CorruptionError(
                f"{self._path}: its values have the fingerprint {found}, its record tells {self.known}"
            )
        self.known = found

    def require_rows(self, rows: int) -> None:
        """Do nothing if that is the number of samples.

        Raises:
            MismatchError: it is not.
        """
        if rows != self._count:
            raise MismatchError(f"{self._path} holds values of {rows} samples, expected {self._count}; use its store")

    def _columns(self, table: pa.Table) -> dict[str, np.ndarray]:
        if any(column.null_count for column in table.columns):
            raise CorruptionError(f"{self._path} was changed after it was written: it has empty cells; write it again")
        return {name: table.column(name).to_numpy() for name in self.kinds}


def _cells_of(columns: Mapping[str, np.ndarray], span: partitioned.Span) -> Iterator[pa.Table]:
    for first in range(span.first, span.stop, tables.ROWS):
        some = slice(first, min(first + tables.ROWS, span.stop))
        yield pa.table({name: column[some] for name, column in columns.items()})


def _read(path: Path, count: int) -> ValuesFile:
    if foreign.is_several(path):
        visits, value, labels = foreign.read(foreign.whole(path, count), path, count)
        return ValuesFile(Values(visits, value), labels, None, True)
    with partitioned.opened(path, count) as reader:
        if METADATA_KEY.encode() not in (reader.schema.metadata or {}):
            visits, value, labels = foreign.read(reader.whole(COLUMNS), path, count)
            return ValuesFile(Values(visits, value), labels, None, True)
        source = Stream(reader, path, count)
        blocks = list(source.blocks())
    values = Values(
        _joined([block.values.visits for block in blocks], np.int32),
        _joined([block.values.value for block in blocks], np.float32),
    )
    labels = _joined([block.labels for block in blocks], np.int64) if source.labelled else None
    return ValuesFile(values, labels, source.document, False)


def _joined(blocks: list[Any], kind: type) -> Any:
    return blocks[0] if len(blocks) == 1 else np.concatenate([np.empty(0, kind), *blocks])


def _record_mean(visits: Any, mean: Any, value: Any, decay: float) -> Any:
    step = value - mean
    step /= visits + 1  # in place: numpy would otherwise widen float32 / int32 to float64
    return mean + step


def _record_last(visits: Any, mean: Any, value: Any, decay: float) -> Any:
    return value


def _record_ema(visits: Any, mean: Any, value: Any, decay: float) -> Any:
    past = mean - value
    past *= decay
    past *= visits > 0
    return value + past


RECORDS = {"mean": _record_mean, "last": _record_last, "ema": _record_ema}
"""What a value is: the mean of all observations, the latest one, or a moving average."""


def _weights(visits: Int32[np.ndarray, " n"], exponent: float) -> Float64[np.ndarray, " n"]:
    """Return visits^exponent, and 1 for none: looked up, because powers take longer than all the rest."""
    highest = int(visits.max(initial=1))
    if highest > len(visits) + _LOOKED_UP:
        return np.maximum(visits, 1).astype(np.float64) ** exponent
    powers = np.maximum(np.arange(highest + 1), 1).astype(np.float64) ** exponent
    return powers[np.maximum(visits, 0)]


def _require_finite(
    value: Shaped[Any, " n"], found: Shaped[Any, " n"], seen: Shaped[Any, " n"], first: int = 0
) -> None:
    bad = seen & ~np.isfinite(found)
    if bad.any():
        index = int(np.argmax(bad))
        at = f"the value of index {first + index} is {value[index]}, expected a finite number whose score fits float32"
        raise NonFiniteError(f"{at}; find out in which epoch the student diverged")


def _columns(values: Values, labels: Int64[np.ndarray, " n"] | None) -> dict[str, np.ndarray]:
    columns = {"index": np.arange(len(values.visits)), "visits": values.visits, "value": values.value}
    return columns if labels is None else {**columns, "label": labels}


def _digest(content: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> str:
    return tables.digest(canonical_json({key: content[key] for key in content if key != "digest"}), columns)


def _trouble(values: Values, path: Path, first: int) -> KcdcacheError | None:
    """Return what is wrong with some rows, `first` rows after the beginning of a file of ours."""
    if (bad := values.visits < 0).any():
        row = int(np.argmax(bad))
        return MismatchError(f"{path}, row {first + row}: 'visits' is {values.visits[row]}, expected 0 or more")
    if (bad := ~np.isfinite(values.value)).any():
        row = int(np.argmax(bad))
        found = values.value[row]
        return NonFiniteError(f"{path}, row {first + row}: 'value' is {found}, expected a finite float32")
    return None
