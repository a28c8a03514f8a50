"""The folder of an exported condensed set: file names, record and table of samples."""

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
from kcdcache.files.records import Count, Sha256, canonical_json, digest_of
from kcdcache.store.identity import Knowledge
from kcdcache.store.log import PlanRecord

RECORD, CARD, MANIFEST, SAMPLES = "condensed.json", "README.md", "manifest.parquet", "samples.parquet"
LOCK = ".lock"
"""held while the folder is written, gone when it is finished"""
STORE, MIXES, IMAGES = "store", "mixes", "data"
SEALS = {part: f"{part}/_kcd/commit.0.json" for part in (STORE, MIXES)}
"""store inside -> its commit, which lists all files of the store by SHA-256"""
PARAMETERS = f"{STORE}/_kcd/parameters.json"
ORIGIN = f"{STORE}/_kcd/origin.json"
OPTIONAL = (PARAMETERS, ORIGIN)
"""records that are copied if the source store has them"""
SPLITS = {split: f"{IMAGES}/{split}-00000-of-00001.parquet" for split in ("train", "test")}
"""image files, named as on the Hugging Face hub"""
FORMAT_VERSION = 0
MOST_SAMPLES = 10**8
MOST_IMAGE_BYTES = 2**40
"""most bytes of a file of images, which is hashed and then read by row groups"""
SCHEMA = pa.schema([("label", pa.int64()), ("digest", pa.uint64()), ("row", pa.int64())])


class Baked(records.Record):
    """Temperature and method of baked targets."""

    temperature: float = Field(gt=0)
    target: Literal["linear_prob", "linear_logit", "keep"]
    mix: Literal["convex", "additive_clip"]


class Images(records.Record):
    """The image files of an export."""

    train: Literal["pixels", "files"]
    """pixels: PNG of the decoded pixels, as digested; files: the original image files"""
    test: Literal["pixels", "files"]
    mean: tuple[float] | tuple[float, float, float]
    """per channel, over all training pixels in [0, 1]"""
    std: tuple[float] | tuple[float, float, float]
    test_digest: Sha256


class Content(records.Record):
    """The contents of an exported set; their digest is its id."""

    knowledge: Annotated[Knowledge, PlainSerializer(Knowledge.document)]
    knowledge_id: Sha256
    manifest: Sha256
    rows: Count
    """rows of knowledge in each view"""
    views: int = Field(ge=1)
    layout: PlanRecord
    skipped: tuple[Count, ...]
    """samples without outputs in the source store"""
    baked: Baked | None
    images: Images | None
    licence: str
    files: dict[str, tuple[Count, Sha256]]

    @property
    def stores(self) -> tuple[str, ...]:
        """Names of the stores inside: outputs of samples, and baked targets."""
        return (STORE, MIXES) if self.baked else (STORE,)


class _Document(records.Record):
    format_version: int = FORMAT_VERSION
    id: str
    content: Content
    made: dict[str, Any]


@dataclass(frozen=True)
class Record:
    """The record of an exported set, condensed.json."""

    path: Path
    id: str
    content: Content
    made: dict[str, Any]
    """versions of the libraries; not part of the id"""


class Samples(NamedTuple):
    """All samples of the training split, with their rows of knowledge."""

    label: Int64[np.ndarray, " n"]
    digest: UInt64[np.ndarray, " n"]
    row: Int64[np.ndarray, " n"]
    """row in the store, -1 if it has none"""


def write(path: Path, content: Content, made: Mapping[str, Any]) -> str:
    """Write the record, which completes an export; return the id."""
    name = digest_of(content.document())
    document = _Document(id=name, content=content, made=dict(made)).document()
    write_atomic(path / RECORD, records.sealed_json(document))
    return name


def read(path: Path) -> Record:
    """Read the record of an exported set, and no other file.

    Raises:
        NotFoundError: there is no exported set.
        UnfinishedError: the export was interrupted.
        MismatchError: it has a newer format.
        CorruptionError, UnsafeError: the record is damaged, larger than any record, or not a regular file.
    """
    file = path / RECORD
    if not file.exists():
        if (path / STORE).is_dir():
            raise UnfinishedError(f"the export in {path} was cut short (no {RECORD}); run its command again")
        raise NotFoundError(f"no exported set at {path} (no {RECORD} in it); make one with `kcdcache export`")
    found = records.read_sealed_object(file, "format_version")
    records.require_format(found, FORMAT_VERSION, file)
    document = records.parse(_Document, canonical_json(found), file)
    if problem := _problem(document):
        raise CorruptionError(f"{file}: {problem}")
    return Record(path, document.id, document.content, document.made)


def _problem(document: _Document) -> str | None:
    """Return the first contradiction between entries of a record, or None."""
    content, knowledge = document.content, document.content.knowledge
    # a record cannot name other files, inside or outside its folder
    expected = {CARD, MANIFEST, SAMPLES, *(SEALS[part] for part in content.stores)}
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
    """Read labels, digests and rows of all samples, and check them against the identity of the data.

    Raises:
        CorruptionError: the file is missing or differs from the export.
        MismatchError, UnsafeError: it is no table of that many samples.
    """
    path, data = record.path / SAMPLES, record.content.knowledge.data
    require_file(record, SAMPLES)
    with parquet.opened_file(path, data.count) as reader:
        parquet.require_schema(reader.schema, SCHEMA, path)
        table = reader.whole()
    if table.num_rows != data.count or any(column.null_count for column in table.columns):
        raise CorruptionError(f"{path} should have {data.count} rows without empty cells, found {table.num_rows}")
    found = Samples(*(np.array(table[name].to_numpy()) for name in Samples._fields))
    # as in `Dataset.identity`
    if sha256_bytes(found.digest.astype("<u8").tobytes() + canonical_json(list(data.classes))) != data.digest:
        raise CorruptionError(f"{path}: its digests are not those of the data the set was made from; export it again")
    if found.label.min(initial=0) < 0 or found.label.max(initial=0) >= len(data.classes):
        raise CorruptionError(f"{path} holds labels outside 0..{len(data.classes) - 1}; export it again")
    held = found.row[found.row >= 0]
    if not np.array_equal(held, np.arange(len(held))) or found.row.min(initial=-1) < -1:
        raise CorruptionError(f"{path}: rows should count up from 0, -1 where a sample has none; export it again")
    return found


def entry_of(path: Path, name: str) -> tuple[int, str]:
    """Return the entry of a file in the record."""
    return (path / name).stat().st_size, sha256_file(path / name)


def require_file(record: Record, name: str) -> None:
    """Raise CorruptionError unless a file is the one that was exported."""
    if (problem := problem_of(record, name)) is not None:
        raise CorruptionError(problem)


def problem_of(record: Record, name: str) -> str | None:
    """Return what is wrong with a file, or None; raise UnsafeError if it is too large or not a regular file."""
    path, (size, digest) = record.path / name, record.content.files[name]
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
