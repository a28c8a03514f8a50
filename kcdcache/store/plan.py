"""The plan of a store as a plain value: parts, chunks, bytes, file names and array documents; touches no disk."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from kcdcache.errors import CorruptionError, SettingsError
from kcdcache.files.records import digest_of
from kcdcache.settings import nearest
from kcdcache.store import encoding
from kcdcache.store.encoding import ArraySpec, Encoding
from kcdcache.store.log import FieldPlan, PlanRecord

CHECKSUM_BYTES = 4
"""bytes after the rows, their crc32c with the lowest byte first"""
MOST_PART_ROWS = 16384
CHUNK_BYTES = 8 * 2**20
"""of a new store's chunks, unless one row takes more: small enough to be read whole and checked in the cache"""
MOST_CHUNK_BYTES = 32 * 2**20
"""of any store's chunks"""
MOST_PADDING = 0.02
ROW_UNIT = 64
SAMPLES = "labels and digests"
MOST_SAMPLES = 10**8
"""more than this no data set has: a store that claims more is damaged or hostile"""
MOST_PARTS = 330_000
"""of a store: its commit names every part, and is not read with more than 10^6 values"""

GROUP_DOCUMENT: dict[str, Any] = {"attributes": {}, "node_type": "group", "zarr_format": 3}
ZSTD_LEVEL = 1
COMPRESSIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "none": (),
    "zstd": ({"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}},),
}


class Part(NamedTuple):
    """The unit of work, log and resume: some rows of one view, with the fields to write there."""

    view: int
    number: int
    start: int
    """first sample"""
    stop: int
    """one past the last sample"""
    fields: tuple[str, ...]


@dataclass(frozen=True)
class ArrayPlan:
    """One array on disk."""

    name: str
    row_shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    field: str | None
    """the field it belongs to, or None for the arrays that describe samples and have no view axis"""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return row_bytes(self.row_shape, self.dtype)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk before compression and checksum."""
        return self.chunk_rows * self.row_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of one chunk's file before compression: its rows, padding included, and a checksum."""
        return self.chunk_bytes + CHECKSUM_BYTES


class Chunk(NamedTuple):
    """One chunk file: its key, its view (None for arrays without views) and its samples."""

    key: str
    array: ArrayPlan
    view: int | None
    number: int
    start: int
    stop: int

    def __str__(self) -> str:
        view = "" if self.view is None else f" of view {self.view}"
        return f"{self.key} (samples {self.start}..{self.stop - 1}{view})"


@dataclass(frozen=True)
class StorePlan:
    """Everything about a store that shapes and settings decide; printable, equal when the files will be."""

    count: int
    """number of samples N"""
    views: int
    fields: Mapping[str, Encoding]
    part_rows: int
    arrays: tuple[ArrayPlan, ...]
    """the fields' arrays in order, then `labels` and `sample_digest`"""
    compression: str
    batch_size: int
    """the teacher's batch within a part; other sizes change the last bits"""

    @property
    def layout_id(self) -> str:
        """SHA-256 over fields, encodings, parts and view count."""
        return digest_of(self.document())

    @property
    def parts_per_view(self) -> int:
        """Number of parts of one view."""
        return -(-self.count // self.part_rows)

    @property
    def chunk_count(self) -> int:
        """Number of chunk files."""
        return sum(map(self.chunks_of, self.arrays))

    @property
    def bytes_per_view(self) -> int:
        """Bytes of one view's rows, padding included, before compression."""
        arrays = self.arrays_of(self.fields)
        return sum(self.chunks_of(array) * array.chunk_bytes for array in arrays) // self.views

    @property
    def bytes(self) -> int:
        """Bytes of all chunks, padding included, before compression."""
        return sum(self.chunks_of(array) * array.chunk_bytes for array in self.arrays)

    def chunks_of(self, array: ArrayPlan) -> int:
        """Return the number of an array's chunk files."""
        return -(-self.count // array.chunk_rows) * (1 if array.field is None else self.views)

    def arrays_of(self, fields: Iterable[str] | None) -> tuple[ArrayPlan, ...]:
        """Return the arrays of some fields; None stands for the arrays that describe samples."""
        wanted = {None} if fields is None else set(fields)
        return tuple(array for array in self.arrays if array.field in wanted)

    def batches(self, part: Part) -> list[tuple[int, int]]:
        """Return the fixed (start, stop) batches in which the teacher sees a part."""
        return [(at, min(at + self.batch_size, part.stop)) for at in range(part.start, part.stop, self.batch_size)]

    def record(self) -> PlanRecord:
        """Return the plan as its record; `plan_from` reads it."""
        fields = tuple(
            FieldPlan(
                name=name,
                encoding=form.name,
                row_shape=form.row_shape,
                chunk_rows={array.name: array.chunk_rows for array in self.arrays_of((name,))},
            )
            for name, form in self.fields.items()
        )
        return PlanRecord(
            count=self.count,
            views=self.views,
            part_rows=self.part_rows,
            batch_size=self.batch_size,
            compression=self.compression,
            fields=fields,
        )

    def document(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return self.record().document()

    def __str__(self) -> str:
        names = ", ".join(f"{form.field} {form.row_shape} as {form.name}" for form in self.fields.values())
        return (
            f"{self.count} samples x {self.views} views; {names}; {self.parts_per_view} parts of {self.part_rows} rows "
            f"a view, teacher batches of {self.batch_size}; {self.bytes_per_view} bytes a view, {self.bytes} in all "
            f"(compression {self.compression})"
        )


def plan_store(
    count: int, views: int, fields: Sequence[Encoding], compression: str = "none", batch_size: int = 256
) -> StorePlan:
    """Return the plan of a new store: parts of 4,096-16,384 rows (one part below that), chunks of at most 8 MiB.

    Every array's chunk rows divide the part's rows and padding is at most 2 % of its rows.

    Raises:
        SettingsError: a number is not positive or too large, no field is there or one twice, a row exceeds 32 MiB.
    """
    if min(count, views, batch_size) < 1 or not fields:
        raise SettingsError(
            f"a store needs samples, views, a batch size and fields; found {count} samples, {views} views, "
            f"batch size {batch_size}, {len(fields)} fields"
        )
    if compression not in COMPRESSIONS:
        raise SettingsError(f"unknown compression {compression!r}; {nearest(compression, COMPRESSIONS)}")
    rows = _part_rows(count)
    arrays = [_planned(spec, form.field, rows) for form in fields for spec in form.arrays]
    named, together = {form.field: form for form in fields}, _with_samples(arrays, rows)
    return _of_allowed_size(StorePlan(count, views, named, rows, together, compression, batch_size))


def grow_plan(plan: StorePlan, views: int, fields: Sequence[Encoding] = ()) -> StorePlan:
    """Return the plan with `views` views in all and new fields beside the old; fields it holds already may be given.

    Raises:
        SettingsError: there would be fewer views or too many, or a field's encoding would change.
    """
    if views < plan.views:
        raise SettingsError(f"a store only grows: it holds {plan.views} views, {views} were asked for")
    for form in fields:
        if form.field in plan.fields and plan.fields[form.field] != form:
            found = plan.fields[form.field]
            raise SettingsError(f"field '{form.field}' is stored as {found.name} {found.row_shape}, not {form.name}")
    new = [form for form in fields if form.field not in plan.fields]
    arrays = [array for array in plan.arrays if array.field is not None]
    arrays += [_planned(spec, form.field, plan.part_rows) for form in new for spec in form.arrays]
    everything = {form.field: form for form in (*plan.fields.values(), *new)}
    return _of_allowed_size(replace(plan, views=views, fields=everything, arrays=_with_samples(arrays, plan.part_rows)))


def plan_from(record: PlanRecord) -> StorePlan:
    """Return the plan that `StorePlan.record` wrote.

    Raises:
        CorruptionError: no plan has such fields and numbers.
    """
    try:
        forms = [encoding.parse(entry.encoding, entry.name, entry.row_shape) for entry in record.fields]
        rows = {array: number for entry in record.fields for array, number in entry.chunk_rows.items()}
        arrays = [
            ArrayPlan(spec.name, spec.row_shape, spec.dtype, rows[spec.name], form.field)
            for form in forms
            for spec in form.arrays
        ]
        plan = StorePlan(
            count=record.count,
            views=record.views,
            fields={form.field: form for form in forms},
            part_rows=record.part_rows,
            arrays=_with_samples(arrays, record.part_rows),
            compression=record.compression,
            batch_size=record.batch_size,
        )
        _require_sound(plan)
    except (KeyError, ValueError) as error:
        raise CorruptionError(f"a store's plan is damaged: {error}") from None
    if plan.record() != record:
        raise CorruptionError("a store's plan holds entries this kcdcache does not know")
    return plan


def parts(plan: StorePlan, before: StorePlan | None = None) -> list[Part]:
    """Return the parts of a plan, in the order of writing; with `before`, those that a growth from it adds."""
    return [
        Part(view, number, start, min(start + plan.part_rows, plan.count), fields)
        for view in range(plan.views)
        if (fields := _fields_to_write(plan, before, view))
        for number, start in enumerate(range(0, plan.count, plan.part_rows))
    ]


def chunks(plan: StorePlan, arrays: Iterable[ArrayPlan], view: int | None, start: int, stop: int) -> list[Chunk]:
    """Return the chunks of some arrays that hold samples start..stop-1 of a view (None: arrays without views)."""
    return [
        _chunk(plan, array, view, number)
        for array in arrays
        for number in range(start // array.chunk_rows, -(-stop // array.chunk_rows))
    ]


def part_chunks(plan: StorePlan, part: Part) -> list[Chunk]:
    """Return the chunks one part writes."""
    return chunks(plan, plan.arrays_of(part.fields), part.view, part.start, part.stop)


def sample_chunks(plan: StorePlan) -> list[Chunk]:
    """Return the chunks of `labels` and `sample_digest`."""
    return chunks(plan, plan.arrays_of(None), None, 0, plan.count)


def all_chunks(plan: StorePlan) -> list[Chunk]:
    """Return every chunk of a store."""
    fields = plan.arrays_of(plan.fields)
    viewed = [chunk for view in range(plan.views) for chunk in chunks(plan, fields, view, 0, plan.count)]
    return viewed + sample_chunks(plan)


def file_bytes(plan: StorePlan) -> dict[str, int]:
    """Return the bytes of all chunk files of each field, and of what describes samples, before compression."""
    found = dict.fromkeys((*plan.fields, SAMPLES), 0)
    for array in plan.arrays:
        found[array.field or SAMPLES] += plan.chunks_of(array) * array.file_bytes
    return found


def chunk_key(array: ArrayPlan, view: int | None, number: int) -> str:
    """Return a chunk's path inside the store; separator `.` keeps all chunks of an array in one folder."""
    numbers = [number, *(0 for _ in array.row_shape)]
    return f"{array.name}/c." + ".".join(str(n) for n in (numbers if view is None else [view, *numbers]))


def documents(plan: StorePlan) -> dict[str, dict[str, Any]]:
    """Return folder in the store -> its `zarr.json`."""
    return {"": GROUP_DOCUMENT, **{array.name: array_document(plan, array) for array in plan.arrays}}


def array_document(plan: StorePlan, array: ArrayPlan) -> dict[str, Any]:
    """Return the `zarr.json` of an array.

    Source: Zarr specification version 3, section "Array metadata".
    """
    views = () if array.field is None else (plan.views,)
    return {
        "attributes": {},
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [*(1 for _ in views), array.chunk_rows, *array.row_shape]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            *COMPRESSIONS[plan.compression],
            {"name": "crc32c"},
        ],
        "data_type": array.dtype,
        "dimension_names": [*("view" for _ in views), "sample", *_axes(array)],
        "fill_value": "NaN" if np.dtype(array.dtype).kind == "f" else 0,
        "node_type": "array",
        "shape": [*views, plan.count, *array.row_shape],
        "storage_transformers": [],
        "zarr_format": 3,
    }


def row_bytes(row_shape: tuple[int, ...], dtype: str) -> int:
    """Return the bytes of one row."""
    return math.prod(row_shape) * np.dtype(dtype).itemsize


def _axes(array: ArrayPlan) -> list[str]:
    """Return names of a row's axes: an axis of equal name has equal length in all arrays of a store, as xarray asks."""
    if array.name == "logits" and array.dtype != "uint16":  # those of top:K are packed
        return ["class"]
    return [f"{array.name}_{number}" for number in range(len(array.row_shape))]


def _part_rows(count: int) -> int:
    """Return rows per part: equal parts, rounded up to a power of two that costs at most 2 % and gives chunks room."""
    whole = -(-count // -(-count // MOST_PART_ROWS))
    unit = ROW_UNIT
    while unit > 1 and unit > MOST_PADDING * count:
        unit //= 2
    return -(-whole // unit) * unit


def _chunk_rows(part_rows: int, bytes_a_row: int) -> int:
    """Return the largest divisor of the part's rows whose chunk is small enough, or 1."""
    most = min(part_rows, CHUNK_BYTES // max(1, bytes_a_row))
    return next((rows for rows in range(most, 0, -1) if part_rows % rows == 0), 1)


def _planned(spec: ArraySpec, field: str | None, part_rows: int) -> ArrayPlan:
    found = row_bytes(spec.row_shape, spec.dtype)
    if found > MOST_CHUNK_BYTES:
        raise SettingsError(
            f"one row of '{spec.name}' {spec.row_shape} takes {found} bytes; at most 32 MiB are possible"
        )
    return ArrayPlan(spec.name, spec.row_shape, spec.dtype, _chunk_rows(part_rows, found), field)


def _with_samples(arrays: Sequence[ArrayPlan], part_rows: int) -> tuple[ArrayPlan, ...]:
    labels = ArrayPlan("labels", (), "int64", part_rows, None)
    digests = ArrayPlan("sample_digest", (), "uint64", part_rows, None)
    together = (*arrays, labels, digests)
    names = [array.name for array in together]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SettingsError(f"two arrays of a store would be called '{twice}'; choose other fields")
    return together


def _fields_to_write(plan: StorePlan, before: StorePlan | None, view: int) -> tuple[str, ...]:
    if before is None or view >= before.views:
        return tuple(plan.fields)
    return tuple(field for field in plan.fields if field not in before.fields)


def _chunk(plan: StorePlan, array: ArrayPlan, view: int | None, number: int) -> Chunk:
    start = number * array.chunk_rows
    stop = min(start + array.chunk_rows, plan.count)
    return Chunk(chunk_key(array, view, number), array, view, number, start, stop)


def _of_allowed_size(plan: StorePlan) -> StorePlan:
    if plan.count > MOST_SAMPLES or (parts := plan.views * plan.parts_per_view) > MOST_PARTS:
        told = f"{plan.count} samples" if plan.count > MOST_SAMPLES else f"{plan.views} views in {parts} parts"
        raise SettingsError(f"a store takes {MOST_SAMPLES} samples and {MOST_PARTS} parts at most, found {told}")
    return plan


def _require_sound(plan: StorePlan) -> None:
    if plan.compression not in COMPRESSIONS:
        raise ValueError(f"compression {plan.compression!r:.80}")
    _of_allowed_size(plan)
    for array in plan.arrays:
        if plan.part_rows % array.chunk_rows or array.chunk_bytes > MOST_CHUNK_BYTES:
            raise ValueError(f"chunks of {array.chunk_rows} rows of '{array.name}' in parts of {plan.part_rows} rows")
