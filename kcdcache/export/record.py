"""The folder of an exported condensed set: what its files are called, its record, and which samples it holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, UInt64
from pydantic import Field, PlainSerializer

from kcdcache.errors import CorruptionError, NotFoundError, UnfinishedError
from kcdcache.files import parquet, records
from kcdcache.files.atomic import MOST_FILE_BYTES, sha256_bytes, sha256_file, write_atomic
from kcdcache.files.records import (
    Count,
    Sha256,
    canonical_json,
    digest_of,
    parse,
    read_sealed_object,
    require_format,
    sealed_json,
)
from kcdcache.store.identity import Knowledge
from kcdcache.store.log import PlanRecord

RECORD, CARD, MANIFEST, SAMPLES = "condensed.json", "README.md", "manifest.parquet", "samples.parquet"
STORE, MIXES, IMAGES = "store", "mixes", "data"
SEALS = {part: f"{part}/_kcd/commit.0.json" for part in (STORE, MIXES)}
"""what vouches for every file of a store inside: its commit names them all by SHA-256"""
PARAMETERS = f"{STORE}/_kcd/parameters.json"
ORIGIN = f"{STORE}/_kcd/origin.json"
OPTIONAL = (PARAMETERS, ORIGIN)
"""records of its store that a set has where the store it was taken from has them"""
SPLITS = {split: f"{IMAGES}/{split}-00000-of-00001.parquet" for split in ("train", "test")}
"""where the images lie, as the Hugging Face hub serves them"""
FORMAT_VERSION = 0
MOST_SAMPLES = 10**8
MOST_IMAGE_BYTES = 2**40
"""of a file of images, which is hashed and then read by row groups"""
SCHEMA = pa.schema([("label", pa.int64()), ("digest", pa.uint64()), ("row", pa.int64())])


class Baked(records.Record):
    """At what temperature, and how, the targets of mixed points were made."""

    temperature: float = Field(gt=0)
    target: Literal["linear_prob", "linear_logit", "keep"]
    mix: Literal["convex", "additive_clip"]
    """how the images they belong to are mixed"""


class Images(records.Record):
    """What image files of an export hold."""

    train: Literal["pixels", "files"]
    """pixels: PNG of what was decoded, which sample digests are of; files: the image files as they were"""
    test: Literal["pixels", "files"]
    mean: tuple[float] | tuple[float, float, float]
    """per channel, of all the training pixels in [0, 1]"""
    std: tuple[float] | tuple[float, float, float]
    test_digest: Sha256


class Content(records.Record):
    """All that an exported set is; its digest is the set's id."""

    knowledge: Annotated[Knowledge, PlainSerializer(Knowledge.document)]
    """identity of the store it was taken from"""
    knowledge_id: Sha256
    manifest: Sha256
    """digest of the condensed set"""
    rows: Count
    """rows of knowledge it holds, in each view"""
    views: int = Field(ge=1)
    layout: PlanRecord
    """the plan of its store"""
    skipped: tuple[Count, ...]
    """samples the store it was taken from has no outputs of"""
    baked: Baked | None
    images: Images | None
    licence: str
    files: dict[str, tuple[Count, Sha256]]
    """name -> bytes and SHA-256"""

    @property
    def stores(self) -> tuple[str, ...]:
        """Names of the stores inside: of samples' own outputs, and of baked targets."""
        return (STORE, MIXES) if self.baked else (STORE,)


class _Document(records.Record):
    """What condensed.json holds."""

    format_version: int = FORMAT_VERSION
    id: str
    content: Content
    made: dict[str, Any]


@dataclass(frozen=True)
class Record:
    """What condensed.json says."""

    path: Path
    """the exported folder"""
    id: str
    content: Content
    made: dict[str, Any]
    """versions it was made with; not part of the id"""

    def place(self, name: str) -> Path:
        """Return the path of one of its files."""
        return self.path / name


class Samples(NamedTuple):
    """Every sample of the whole training split, and where its knowledge lies."""

    label: Int64[np.ndarray, " n"]
    digest: UInt64[np.ndarray, " n"]
    row: Int64[np.ndarray, " n"]
    """row in the store, -1 for samples that have none there"""


def write(path: Path, content: Content, made: Mapping[str, Any]) -> str:
    """Write the record that finishes an export, last of all; return its id."""
    name = digest_of(content.document())
    write_atomic(path / RECORD, sealed_json(_Document(id=name, content=content, made=dict(made)).document()))
    return name


def read(path: Path) -> Record:
    """Return the record of an exported set; none of its other files is read.

    Raises:
        NotFoundError: there is no exported set.
        UnfinishedError: its export was cut short.
        MismatchError: it was written by a newer format.
        CorruptionError: the record is not what was written.
        UnsafeError: it is no plain file, or larger than any record of ours.
    """
    file = path / RECORD
    if not file.exists():
        if (path / STORE).is_dir():
            raise UnfinishedError(f"the export in {path} was cut short (no {RECORD}); run its command again")
        raise NotFoundError(f"no exported set at {path} (no {RECORD} in it); make one with `kcdcache export`")
    found = read_sealed_object(file, "format_version")
    require_format(found, FORMAT_VERSION, file)
    document = parse(_Document, canonical_json(found), file)
    if problem := _problem(document):
        raise CorruptionError(f"{file}: {problem}")
    return Record(path, document.id, document.content, document.made)


def _problem(document: _Document) -> str | None:
    """Return what entries of a record contradict each other, None for a sound one."""
    content, knowledge = document.content, document.content.knowledge
    # no record can name other files, inside or outside its folder
    expected = {CARD, MANIFEST, SAMPLES, *map(SEALS.__getitem__, content.stores)}
    expected |= set(SPLITS.values()) if content.images else set()
    if document.id != digest_of(content.document()):
        return f"its content does not have the id {document.id!r:.80}"
    if odd := (content.files.keys() - set(OPTIONAL)) ^ expected:
        return f"expected the files {', '.join(sorted(expected))}; look at {min(odd)!r:.80}"
    if not (0 < knowledge.data.count <= MOST_SAMPLES and knowledge.whole):
        return f"its knowledge is of no data set: it counts {knowledge.data.count} samples, or is of some of them"
    if knowledge.knowledge_id != content.knowledge_id:
        return "its knowledge does not have its knowledge_id"
    if content.images and len(content.images.mean) != len(content.images.std):
        return "its images have statistics of different numbers of channels"
    return None


def encode_samples(samples: Samples) -> bytes:
    """Return the file that `read_samples` reads."""
    return parquet.encode(pa.table(samples._asdict(), schema=SCHEMA))


def read_samples(record: Record) -> Samples:
    """Return the labels, digests and rows of all samples, after holding them against the identity of the data.

    Raises:
        NotFoundError: the file is missing.
        CorruptionError: it is not what was exported.
        MismatchError, UnsafeError: it is not even a table of that many samples.
    """
    path, data = record.place(SAMPLES), record.content.knowledge.data
    require_file(record, SAMPLES)
    with parquet.opened_file(path, data.count) as reader:
        parquet.require_schema(reader.schema, SCHEMA, path)
        table = reader.whole()
    if table.num_rows != data.count or any(column.null_count for column in table.columns):
        raise CorruptionError(f"{path} should have {data.count} rows without empty cells, found {table.num_rows}")
    found = Samples(*(np.array(table[name].to_numpy()) for name in Samples._fields))
    # as `Dataset.identity` makes it
    if sha256_bytes(found.digest.astype("<u8").tobytes() + canonical_json(list(data.classes))) != data.digest:
        raise CorruptionError(f"{path}: its digests are not those of the data the set was made from; export it again")
    if found.label.min(initial=0) < 0 or found.label.max(initial=0) >= len(data.classes):
        raise CorruptionError(f"{path} holds labels outside 0..{len(data.classes) - 1}; export it again")
    held = found.row[found.row >= 0]
    if not np.array_equal(held, np.arange(len(held))) or found.row.min(initial=-1) < -1:
        raise CorruptionError(f"{path}: rows should count up from 0, -1 where a sample has none; export it again")
    return found


def entry_of(path: Path, name: str) -> tuple[int, str]:
    """Return a file's entry in the record."""
    return (path / name).stat().st_size, sha256_file(path / name)


def require_file(record: Record, name: str) -> None:
    """Do nothing if a file is the one that was exported.

    Raises:
        CorruptionError: it is not, or it is missing.
        UnsafeError: it is no plain file.
    """
    if (problem := problem_of(record, name)) is not None:
        raise CorruptionError(problem)


def problem_of(record: Record, name: str) -> str | None:
    """Return what is wrong with a file, None for the one that was exported; it is read whole only if its size fits.

    Raises:
        UnsafeError: it is no plain file, or larger than any of ours.
    """
    path, (size, digest) = record.place(name), record.content.files[name]
    try:
        found = path.stat().st_size
        if path.is_file() and found != size:
            return f"{path} has {found} bytes, {size} were exported; fetch it again"
        most = MOST_IMAGE_BYTES if name in SPLITS.values() else MOST_FILE_BYTES
        if sha256_file(path, most) != digest:
            return f"{path} is not what was exported: its SHA-256 differs from {RECORD}; fetch it again"
    except FileNotFoundError:
        return f"{path} is missing; fetch it again"
    return None
