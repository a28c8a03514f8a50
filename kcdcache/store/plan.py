"""The plan of a store as a plain value: parts, chunks, sizes, file names and array documents; reads no file."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from kcdcache.errors import CorruptionError, SettingsError, require_known
from kcdcache.files.records import digest_of
from kcdcache.store import encoding
from kcdcache.store.encoding import ArraySpec, Encoding
from kcdcache.store.log import FieldPlan, PlanRecord, name_of

CHECKSUM_BYTES = 4
"""bytes after the rows: their crc32c, little-endian"""
MOST_PART_ROWS = 16384
CHUNK_BYTES = 8 * 2**20
"""most bytes of a new store's chunks, unless one row takes more: small enough to be checked in the cache"""
MOST_CHUNK_BYTES = 32 * 2**20
MOST_PADDING = 0.02
ROW_UNIT = 64
SAMPLES = "labels and digests"
MOST_SAMPLES = 10**8
"""more than any data set has: a store that claims more is damaged or hostile"""
MOST_PARTS = 330_000
"""of a store: its commit names every part, and a record may have 10^6 values"""

ZSTD_LEVEL = 1
COMPRESSIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "none": (),
    "zstd": ({"name": "zstd", "configuration": {"level": ZSTD_LEVEL, "checksum": False}},),
}


class Part(NamedTuple):
    """The unit of work, log and resume: samples start..stop-1 of one view, with the fields to write."""

    view: int
    number: int
    start: int
    stop: int
    fields: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of its log record."""
        return name_of(self.view, self.number)


@dataclass(frozen=True)
class ArrayPlan(ArraySpec):
    """One array on disk."""

    chunk_rows: int
    field: str | None
    """the field it belongs to; None for the arrays that describe samples, which have no view axis"""

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk before compression, without its checksum."""
        return self.chunk_rows * self.row_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of one chunk's file before compression: its rows with padding, and a checksum."""
        return self.chunk_bytes + CHECKSUM_BYTES


class Chunk(NamedTuple):
    """One chunk file: path in the store, array, view (None for arrays without views) and samples."""

    key: str
    array: ArrayPlan
    view: int | None
    start: int
    stop: int

    def __str__(self) -> str:
        view = "" if self.view is None else f" of view {self.view}"
        return f"{self.key} (samples {self.start}..{self.stop - 1}{view})"


class StorePlan(PlanRecord):
    """Everything about a store that shapes and settings decide; equal plans give equal files."""

    @cached_property
    def encodings(self) -> dict[str, Encoding]:
        """Field -> encoding."""
        return {entry.name: encoding.parse(entry.encoding, entry.name, entry.row_shape) for entry in self.fields}

    @cached_property
    def arrays(self) -> tuple[ArrayPlan, ...]:
        """The fields' arrays in order, then `labels` and `sample_digest`."""
        stored = [
            ArrayPlan(spec.name, spec.row_shape, spec.dtype, entry.chunk_rows[spec.name], entry.name)
            for entry in self.fields
            for spec in self.encodings[entry.name].arrays
        ]
        labels = ArrayPlan("labels", (), "int64", self.part_rows, None)
        return (*stored, labels, ArrayPlan("sample_digest", (), "uint64", self.part_rows, None))

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
    def bytes(self) -> int:
        """Bytes of all chunks before compression, padding included."""
        return sum(self.chunks_of(array) * array.chunk_bytes for array in self.arrays)

    def chunks_of(self, array: ArrayPlan) -> int:
        """Return the number of an array's chunk files."""
        return -(-self.count // array.chunk_rows) * (1 if array.field is None else self.views)

    def arrays_of(self, fields: Iterable[str] | None) -> tuple[ArrayPlan, ...]:
        """Return the arrays of some fields, or those that describe samples if None."""
        wanted = {None} if fields is None else set(fields)
        return tuple(array for array in self.arrays if array.field in wanted)

    def batches(self, part: Part) -> list[tuple[int, int]]:
        """Return the fixed (start, stop) batches in which the teacher sees a part."""
        return [(at, min(at + self.batch_size, part.stop)) for at in range(part.start, part.stop, self.batch_size)]

    def record(self) -> PlanRecord:
        """Return the record that `plan_from` reads."""
        return PlanRecord(**{name: getattr(self, name) for name in PlanRecord.model_fields})

    def __str__(self) -> str:
        names = ", ".join(f"{entry.name} {entry.row_shape} as {entry.encoding}" for entry in self.fields)
        viewed = sum(self.chunks_of(array) * array.chunk_bytes for array in self.arrays_of(self.encodings))
        return (
            f"{self.count} samples x {self.views} views; {names}; {self.parts_per_view} parts of {self.part_rows} rows "
            f"a view, teacher batches of {self.batch_size}; {viewed // self.views} bytes a view, {self.bytes} in all "
            f"(compression {self.compression})"
        )


def plan_store(
    count: int, views: int, fields: Sequence[Encoding], compression: str = "none", batch_size: int = 256
) -> StorePlan:
    """Return the plan of a new store: parts of 4,096-16,384 rows (one part below that), chunks of at most 8 MiB.

    Every array's chunk rows divide the part's rows; padding is at most 2 % of the rows. Raises SettingsError if a
    number is not positive or too large, fields are missing or given twice, or a row exceeds 32 MiB.
    """
    if min(count, views, batch_size) < 1 or not fields:
        raise SettingsError(
            f"a store needs samples, views, a batch size and fields; found {count} samples, {views} views, "
            f"batch size {batch_size}, {len(fields)} fields"
        )
    require_known("compression", compression, COMPRESSIONS)
    rows = _part_rows(count)
    plans = tuple(_field_plan(form, rows) for form in fields)
    made = StorePlan(
        count=count, views=views, part_rows=rows, batch_size=batch_size, compression=compression, fields=plans
    )
    return _sound(made)


def grow_plan(plan: StorePlan, views: int, fields: Sequence[Encoding] = ()) -> StorePlan:
    """Return the plan with `views` views in all and more fields; fields that are stored already are allowed.

    Raises SettingsError if there would be fewer views or too many, or if a field's encoding would change.
    """
    if views < plan.views:
        raise SettingsError(f"a store only grows: it holds {plan.views} views, {views} were requested")
    for form in fields:
        if (found := plan.encodings.get(form.field, form)) != form:
            raise SettingsError(f"field '{form.field}' is stored as {found.name} {found.row_shape}, not {form.name}")
    new = [_field_plan(form, plan.part_rows) for form in fields if form.field not in plan.encodings]
    return _sound(StorePlan(**vars(plan.record()) | {"views": views, "fields": (*plan.fields, *new)}))


def plan_from(record: PlanRecord) -> StorePlan:
    """Return the plan of a record; raises CorruptionError if no plan has such fields and numbers."""
    try:
        plan = _sound(StorePlan(**vars(record)))
    except (KeyError, ValueError) as error:
        raise CorruptionError(f"a store's plan is damaged: {error}") from None
    forms = {name: (form.name, {spec.name for spec in form.arrays}) for name, form in plan.encodings.items()}
    if any(forms[entry.name] != (entry.encoding, entry.chunk_rows.keys()) for entry in plan.fields):
        raise CorruptionError("a store's plan holds entries this kcdcache does not know")
    return plan


def parts(plan: StorePlan, before: StorePlan | None = None) -> list[Part]:
    """Return the parts of a plan in writing order; with `before`, only those that a growth from it adds."""
    names = tuple(plan.encodings)
    old, held = (0, names) if before is None else (before.views, tuple(before.encodings))
    added = tuple(name for name in names if name not in held)
    return [
        Part(view, number, start, min(start + plan.part_rows, plan.count), fields)
        for view in range(plan.views)
        if (fields := added if view < old else names)
        for number, start in enumerate(range(0, plan.count, plan.part_rows))
    ]


def chunks(plan: StorePlan, arrays: Iterable[ArrayPlan], view: int | None, start: int, stop: int) -> list[Chunk]:
    """Return the chunks of some arrays with samples start..stop-1 of a view (None: arrays without views)."""
    return [
        Chunk(_key(array, view, first // rows), array, view, first, min(first + rows, plan.count))
        for array in arrays
        for rows in [array.chunk_rows]
        for first in range(start - start % rows, stop, rows)
    ]


def part_chunks(plan: StorePlan, part: Part | None) -> list[Chunk]:
    """Return the chunks of one part (None: those of `labels` and `sample_digest`)."""
    if part is None:
        return chunks(plan, plan.arrays_of(None), None, 0, plan.count)
    return chunks(plan, plan.arrays_of(part.fields), part.view, part.start, part.stop)


def all_chunks(plan: StorePlan) -> list[Chunk]:
    """Return every chunk of a store."""
    fields = plan.arrays_of(plan.encodings)
    viewed = [chunk for view in range(plan.views) for chunk in chunks(plan, fields, view, 0, plan.count)]
    return viewed + part_chunks(plan, None)


def file_bytes(plan: StorePlan) -> dict[str, int]:
    """Return the bytes before compression of each field's chunk files, and of the arrays that describe samples."""
    found = dict.fromkeys((*plan.encodings, SAMPLES), 0)
    for array in plan.arrays:
        found[array.field or SAMPLES] += plan.chunks_of(array) * array.file_bytes
    return found


def documents(plan: StorePlan) -> dict[str, dict[str, Any]]:
    """Return folder in the store -> its `zarr.json`."""
    group = {"attributes": {}, "node_type": "group", "zarr_format": 3}
    return {"": group, **{array.name: array_document(plan, array) for array in plan.arrays}}


def array_document(plan: StorePlan, array: ArrayPlan) -> dict[str, Any]:
    """Return the `zarr.json` of an array (Zarr specification version 3, section "Array metadata")."""
    views = () if array.field is None else (plan.views,)
    chunk_shape = [*(1 for _ in views), array.chunk_rows, *array.row_shape]
    raw = {"name": "bytes", "configuration": {"endian": "little"}}
    return {
        "attributes": {},
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [raw, *COMPRESSIONS[plan.compression], {"name": "crc32c"}],
        "data_type": array.dtype,
        "dimension_names": [*("view" for _ in views), "sample", *_axes(array)],
        "fill_value": "NaN" if np.dtype(array.dtype).kind == "f" else 0,
        "node_type": "array",
        "shape": [*views, plan.count, *array.row_shape],
        "storage_transformers": [],
        "zarr_format": 3,
    }


def _key(array: ArrayPlan, view: int | None, number: int) -> str:
    """Return a chunk's path in the store; the separator `.` keeps all chunks of an array in one folder."""
    numbers = [*(() if view is None else (view,)), number, *(0 for _ in array.row_shape)]
    return f"{array.name}/c." + ".".join(map(str, numbers))


def _axes(array: ArrayPlan) -> list[str]:
    """Name a row's axes: axes of equal names have equal lengths in all arrays of a store, as xarray requires."""
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


def _field_plan(form: Encoding, part_rows: int) -> FieldPlan:
    rows = {spec.name: _chunk_rows(spec, part_rows) for spec in form.arrays}
    return FieldPlan(name=form.field, encoding=form.name, row_shape=form.row_shape, chunk_rows=rows)


def _chunk_rows(spec: ArraySpec, part_rows: int) -> int:
    """Return the largest divisor of the part's rows with a chunk that is small enough, or 1."""
    if spec.row_bytes > MOST_CHUNK_BYTES:
        raise SettingsError(
            f"one row of '{spec.name}' {spec.row_shape} takes {spec.row_bytes} bytes; at most 32 MiB are possible"
        )
    most = min(part_rows, CHUNK_BYTES // spec.row_bytes)
    return next((rows for rows in range(most, 0, -1) if part_rows % rows == 0), 1)


def _sound(plan: StorePlan) -> StorePlan:
    """Return the plan; raise SettingsError or ValueError if no store can have it."""
    if plan.count > MOST_SAMPLES or (parts := plan.views * plan.parts_per_view) > MOST_PARTS:
        size = f"{plan.count} samples" if plan.count > MOST_SAMPLES else f"{plan.views} views in {parts} parts"
        raise SettingsError(f"a store takes {MOST_SAMPLES} samples and {MOST_PARTS} parts at most, found {size}")
    if plan.compression not in COMPRESSIONS:
        raise ValueError(f"compression {plan.compression!r:.80}")
    names = set[str]()
    for array in plan.arrays:
        if array.name in names:
            raise SettingsError(f"two arrays of a store would be called '{array.name}'; choose other fields")
        if plan.part_rows % array.chunk_rows or array.chunk_bytes > MOST_CHUNK_BYTES:
            raise ValueError(f"chunks of {array.chunk_rows} rows of '{array.name}' in parts of {plan.part_rows} rows")
        names.add(array.name)
    return plan
