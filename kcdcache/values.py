"""The online value estimate of every sample: state, update, merge, score, and its parquet file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int32, Int64, Shaped

from kcdcache import tables
from kcdcache.errors import CorruptionError, MismatchError, NonFiniteError, SettingsError
from kcdcache.files import canonical_json, write_atomic

METADATA_KEY = "kcdcache.values"
FORMAT_VERSION = 0
UNSEEN = {"first": np.inf, "last": -np.inf}
"""Score of samples that were never visited, by policy."""

_REQUIRED = ("epoch", "knowledge_id", "student")
_MOST_VISITS = 2**31 - 1


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


def score(values: Values, exponent: float, unseen: str) -> Float32[np.ndarray, " n"]:
    """Return value * visits^exponent per sample, unseen samples at +inf ('first') or -inf ('last'); never NaN or -0.

    Raises:
        SettingsError: the policy is unknown.
        NonFiniteError: a visited sample's value or score is not finite; names the first index.

    Source: Eq. 13 of Knowledge Condensation Distillation; the policy for unseen samples is ours.
    """
    if unseen not in UNSEEN:
        raise SettingsError(f"unknown policy '{unseen}' for unseen samples; known: {', '.join(UNSEEN)}")
    seen = values.visits > 0
    with np.errstate(over="ignore", invalid="ignore"):
        weighted = values.value * np.maximum(values.visits, 1).astype(np.float64) ** exponent
        found = weighted.astype(np.float32) + np.float32(0)  # adding 0 turns -0 into +0, so that both tie
    _require_finite(values.value, found, seen)
    return np.where(seen, found, np.float32(UNSEEN[unseen]))


def fingerprint(values: Values) -> str:
    """Return the SHA-256 over visits and values: the same for values in memory, in our file, or from another tool."""
    return tables.digest(b"", {"visits": values.visits, "value": values.value})


def write(path: Path, values: Values, labels: Int64[np.ndarray, " n"] | None, document: Mapping[str, Any]) -> None:
    """Write values as parquet, atomically and with the same bytes for the same content.

    `document` holds JSON values, among them knowledge_id, student and epoch.

    Raises:
        SettingsError: the document lacks a key.
        MismatchError: labels and values differ in length.
        NonFiniteError: a visited sample's value is not finite.
        NoSpaceError: the disk is full; an old file stays as it was.
    """
    if missing := [key for key in _REQUIRED if key not in document]:
        raise SettingsError(f"values for {path} need '{missing[0]}' in their document; found {sorted(document)}")
    if labels is not None and len(labels) != len(values.visits):
        raise MismatchError(f"{path}: {len(labels)} labels for {len(values.visits)} values; give one label per sample")
    _require_finite(values.value, values.value, values.visits > 0)
    columns = _columns(values, labels)
    content = {**document, "format_version": FORMAT_VERSION, "count": len(values.visits)}
    content["digest"] = _digest(content, columns)
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: canonical_json(content)})
    write_atomic(path, tables.encode(table))


def read(path: Path | str, count: int) -> ValuesFile:
    """Return the values of `count` samples from our file or, where our metadata is absent, from another tool's.

    Another tool's file needs `index` and `value`; `visits` (1 if absent) and `label` are used where present. Its rows
    may stand in any order and be of any number type; samples it leaves out are unseen.

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: the file is damaged or was changed after it was written.
        MismatchError: it is for another number of samples, or a row is unusable; names the first such row.
        NonFiniteError: a visited sample's value is NaN or infinite; names the row.
    """
    path = Path(path)
    table = tables.read(path, most_rows=count)
    document = tables.document(table, METADATA_KEY, path)
    if document is None:
        return _foreign(table, path, count)
    return _ours(table, document, path, count)


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
"""What a value is: the running mean of all observations, the latest one, or a moving average."""


def _require_finite(
    value: Float32[np.ndarray, " n"], found: Float32[np.ndarray, " n"], seen: Shaped[np.ndarray, " n"]
) -> None:
    bad = seen & ~np.isfinite(found)
    if bad.any():
        index = int(np.argmax(bad))
        raise NonFiniteError(
            f"the value of index {index} is {value[index]}, expected a finite number whose score fits float32; "
            "find out in which epoch the student diverged"
        )


def _columns(values: Values, labels: Int64[np.ndarray, " n"] | None) -> dict[str, np.ndarray]:
    columns = {"index": np.arange(len(values.visits)), "visits": values.visits, "value": values.value}
    return columns if labels is None else {**columns, "label": labels}


def _digest(content: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> str:
    return tables.digest(canonical_json({key: content[key] for key in content if key != "digest"}), columns)


def _ours(table: pa.Table, document: dict[str, Any], path: Path, count: int) -> ValuesFile:
    if (version := document.get("format_version")) != FORMAT_VERSION:
        raise MismatchError(f"{path} has format {version}, this kcdcache reads {FORMAT_VERSION}; upgrade kcdcache")
    fields = {"index": pa.int64(), "visits": pa.int32(), "value": pa.float32(), "label": pa.int64()}
    wanted = {name: kind for name, kind in fields.items() if name != "label" or "label" in table.column_names}
    tables.require_schema(table, pa.schema(wanted.items()), path)
    if any(column.null_count for column in table.columns):
        raise CorruptionError(f"{path} was changed after it was written: it has empty cells; write it again")
    columns = {name: table.column(name).to_numpy() for name in wanted}
    values, labels = Values(columns["visits"], columns["value"]), columns.get("label")
    if _digest(document, {**columns, **_columns(values, labels)}) != document.get("digest"):
        raise CorruptionError(f"{path} was changed after it was written: its content does not match its digest")
    if len(columns["index"]) != count:
        raise MismatchError(f"{path} holds values of {len(columns['index'])} samples, expected {count}; use its store")
    return ValuesFile(values, labels, document, False)


def _foreign(table: pa.Table, path: Path, count: int) -> ValuesFile:
    for name in ("index", "value"):
        if name not in table.column_names:
            found = ", ".join(table.column_names)
            raise MismatchError(f"{path} has no column '{name}', expected 'index' and 'value'; found: {found}")
    index = _integers(table, "index", count, path)
    _require_unique(index, path)
    values = start(count)
    visits = np.ones(len(index), np.int64)
    if "visits" in table.column_names:
        visits = _integers(table, "visits", _MOST_VISITS + 1, path)
    values.visits[index] = visits
    values.value[index] = _floats(table, "value", visits > 0, path)
    return ValuesFile(values, _labels(table, index, path, count), None, True)


def _labels(table: pa.Table, index: Int64[np.ndarray, " rows"], path: Path, count: int) -> np.ndarray | None:
    if "label" not in table.column_names or len(index) < count:
        return None
    labels = np.empty(count, np.int64)
    labels[index] = _integers(table, "label", 2**62, path)
    return labels


def _require_unique(index: Int64[np.ndarray, " rows"], path: Path) -> None:
    order = np.argsort(index, kind="stable")
    again = order[1:][index[order][1:] == index[order][:-1]]
    if again.size:
        row = int(again.min())
        raise MismatchError(f"{path}, row {row}: index {index[row]} stands there again; expected each index once")


def _numbers(table: pa.Table, name: str, path: Path) -> Shaped[np.ndarray, " rows"]:
    if table.column_names.count(name) > 1:
        raise MismatchError(f"{path} has the column '{name}' more than once; expected it once")
    column = table.column(name)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise MismatchError(f"{path}: column '{name}' should hold numbers, found {column.type}")
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy()))
        raise MismatchError(f"{path}, row {row}: '{name}' is empty; expected a number in every row")
    return column.to_numpy()


def _integers(table: pa.Table, name: str, stop: int, path: Path) -> Int64[np.ndarray, " rows"]:
    found = _numbers(table, name, path)
    fits = (found >= 0) & (found < stop)
    if found.dtype.kind == "f":
        fits &= found == np.floor(found)
    if not fits.all():
        row = int(np.argmin(fits))
        raise MismatchError(f"{path}, row {row}: '{name}' is {found[row]}, expected a whole number in [0, {stop})")
    return found.astype(np.int64)


def _floats(table: pa.Table, name: str, seen: Shaped[np.ndarray, " rows"], path: Path) -> Float32[np.ndarray, " rows"]:
    found = _numbers(table, name, path)
    with np.errstate(over="ignore"):
        narrow = np.where(seen, found, 0).astype(np.float32)
    bad = ~np.isfinite(narrow)
    if bad.any():
        row = int(np.argmax(bad))
        raise NonFiniteError(f"{path}, row {row}: '{name}' is {found[row]}, expected a finite float32")
    return narrow
