"""Image data sets, loaded by data spec."""

import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt8

from kcdcache import rng
from kcdcache.data import images, label_noise
from kcdcache.data.images import DecodedImages, EncodedImages, Origins, Split, Statistics
from kcdcache.data.label_noise import Corruption
from kcdcache.data.spec import DataIdentity, DataSpec, at_home, parse
from kcdcache.errors import (
    CorruptionError,
    KcdcacheError,
    MismatchError,
    NotFoundError,
    SettingsError,
    UnsafeError,
    reason,
)
from kcdcache.files.atomic import naming, open_plain, sha256_bytes
from kcdcache.files.records import canonical_json, parse_json

logger = logging.getLogger(__name__)

CACHE = Path("~/.cache/kcdcache")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_CIFAR = {
    "cifar10": Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Statistics((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
MOST_BYTES = 64 * 2**30
"""maximum size of all arrays of an archive"""
FREE_BYTES, MOST_RATIO = 256 * 2**20, 64
"""unpacked size allowed for any archive, and further bytes per byte of the file: deflate can reach 1,000"""
MOST_DIRECTORY_BYTES = 2**20
"""maximum size of an archive's list of arrays"""
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_END_BYTES, _LOCATOR_BYTES, _END64_BYTES = 22, 20, 56


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images in a training and a test split."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    """class names, in label order"""
    known_statistics: Statistics | None = None
    """published mean and std; None to compute them from the training images"""
    corruption: Corruption = field(default_factory=Corruption)

    def usual_views(self, given: Collection[str]) -> dict[str, str | int]:
        """Return the default view settings for digits (no flips) that are not given; none if `augment` is given."""
        usual: dict[str, str | int] = {"augment": "crop", "padding": 2} if self.name.startswith("digits") else {}
        return {} if "augment" in given else {key: value for key, value in usual.items() if key not in given}

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean per channel of the training pixels in [0, 1] (of ImageNet if images are decoded on demand)."""
        return self._statistics.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation per channel of the training pixels in [0, 1] (of ImageNet, like the mean)."""
        return self._statistics.std

    @cached_property
    def _statistics(self) -> Statistics:
        if self.known_statistics is not None:
            return self.known_statistics
        source = self.train.source
        return images.pixel_statistics(source.pixels) if isinstance(source, DecodedImages) else images.IMAGENET

    def corrupted(self) -> dict[str, Any]:
        """Return options, wrong labels, digest of the true labels and class sizes of the corruption; empty if none."""
        clean = self.train.clean_labels
        if not self.corruption or clean is None:
            return {}
        return {
            "corruption": self.corruption.document(),
            "mislabelled": int((self.train.labels != clean).sum()),
            "true_labels": sha256_bytes(clean.astype("<i8").tobytes()),
            "class_sizes": np.bincount(clean, minlength=len(self.classes)).tolist(),
        }

    def identity(self) -> DataIdentity:
        """Return the identity of the training split."""
        train = self.train
        digest = sha256_bytes(train.digests().astype("<u8").tobytes() + canonical_json(list(self.classes)))
        return DataIdentity(count=len(train), classes=self.classes, image_size=train.image_size, digest=digest)


def load(spec: str, others: Mapping[str, Callable[[DataSpec], "Loaded"]] | None = None) -> Dataset:
    """Load the data set of a spec (see the README); the same spec gives the same samples in the same order.

    `others` are further loaders by kind.

    Raises:
        SettingsError: the spec is wrong, a class has too few samples, or a column is unknown or ambiguous.
        NotFoundError: a folder, file or split is missing or empty.
        MismatchError: labels are not 0..C-1, or images and labels do not match.
        CorruptionError: an image cannot be decoded; names file and row.
    """
    parsed = parse(spec)
    options, known = parsed.options, {**LOADERS, **(others or {})}
    if parsed.kind not in known:
        raise SettingsError(f"'{spec}' is an exported set: open it with `export.condensed_set.load_data`")
    loaded = known[parsed.kind](parsed)
    train = _first(loaded.train, options.train, f"training split of '{spec}'")
    test = _first(loaded.test, options.test, f"test split of '{spec}'")
    classes = loaded.classes or tuple(str(label) for label in range(int(train.labels.max()) + 1))
    for split in (train, test):
        _require_in_range(split, len(classes))
    sizes = np.bincount(train.labels, minlength=len(classes))
    if (options.train is None and parsed.kind != "condensed") or loaded.classes is None:
        _require_all_classes(sizes, classes, spec)
    train, test = (
        replace(split, source=images.decode_once(split.source)) if type(split.source) is EncodedImages else split
        for split in (_corrupted(train, len(classes), options.corruption, spec), test)
    )
    return Dataset(spec, train, test, classes, loaded.statistics, options.corruption.settled(sizes))


class Loaded(NamedTuple):
    """Result of a loader; class names and published statistics are optional."""

    train: Split
    test: Split
    classes: tuple[str, ...] | None = None
    statistics: Statistics | None = None


def _first(split: Split, limit: int | None, what: str) -> Split:
    if len(split) == 0:
        raise NotFoundError(f"the {what} holds no images")
    if limit is None:
        return split
    if limit > len(split):
        raise SettingsError(f"the {what} has {len(split)} images; {limit} were asked for")
    return Split(split.labels[:limit], split.source.taken(np.arange(limit)))


def _corrupted(split: Split, classes: int, asked: Corruption, spec: str) -> Split:
    if not asked:
        return split
    try:
        rows, labels = label_noise.applied(split.labels, classes, asked)
    except SettingsError as error:
        raise SettingsError(f"data spec '{spec}': {error}") from None
    source = split.source if len(rows) == len(split) else split.source.taken(rows)
    return Split(labels, source, split.labels[rows])


def _require_in_range(split: Split, count: int) -> None:
    for row in np.flatnonzero((split.labels < 0) | (split.labels >= count))[:1]:
        found = f"label {split.labels[row]} (a null counts as -1)"
        raise MismatchError(f"{split.source.place(int(row))} has {found}; labels must be 0..{count - 1}")


def _require_all_classes(sizes: Int64[np.ndarray, " classes"], classes: Sequence[str], spec: str) -> None:
    missing = [f"{label} ('{classes[label]}')" for label in np.flatnonzero(sizes == 0).tolist()]
    if missing:
        listed = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        first = f"labels of '{spec}' must be 0..{len(classes) - 1} without gaps"
        raise MismatchError(f"{first}; {len(missing)} have no training image: {listed}")


def _digits(spec: DataSpec) -> Loaded:
    if spec.location:
        raise SettingsError(f"data 'digits' is embedded and takes no path; found '{spec.location}'")
    # the file of scikit-learn, read without importing it, which takes a second
    file = str(distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz"))
    table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    pixels, labels = _enlarged(table[:, :-1].reshape(-1, 8, 8)), table[:, -1]
    order = rng.epoch_order(0, 0, np.arange(len(table)))
    held_out = np.arange(len(order)) % 5 == 0
    train, test = (
        Split(labels[rows], DecodedImages(pixels[rows], Origins((f"digits {name}",))))
        for name, rows in (("train", order[~held_out]), ("test", order[held_out]))
    )
    return Loaded(train, test, tuple("0123456789"))


def _enlarged(digits: Int64[np.ndarray, "n 8 8"]) -> UInt8[np.ndarray, "n 16 16 3"]:
    """Enlarge images of levels 0..16 twice (bilinear, half-pixel centres, exact integers) and convert to uint8 RGB."""
    target, one = np.arange(16), np.eye(8, dtype=np.int64)
    beside = np.clip((target - 1) // 2 + target % 2, 0, 7)
    weights = 3 * one[target // 2] + one[beside]
    levels = weights @ digits @ weights.T  # 0..256: each axis weights neighbours 3 to 1
    return np.repeat(((levels * 255 + 128) // 256).astype(np.uint8)[..., None], 3, axis=3)


def _cifar(spec: DataSpec) -> Loaded:
    folder = at_home(spec.location or CACHE)
    from torchvision.datasets import CIFAR10, CIFAR100

    dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[spec.kind]
    try:
        parts = [dataset(str(folder), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        told = reason(error) if isinstance(error, OSError) else error
        raise NotFoundError(
            f"{spec.kind} is not in {folder} and could not be downloaded ({told}); put {dataset.filename} from "
            f"{dataset.url} there, or use parquet:DIR with the files of the Hugging Face hub"
        ) from None
    train, test = (
        Split(np.array(part.targets), DecodedImages(part.data, Origins((f"{spec.kind} {name}",))))
        for part, name in zip(parts, ("train", "test"), strict=True)
    )
    return Loaded(train, test, tuple(parts[0].classes), _CIFAR[spec.kind])


def _folder(spec: DataSpec) -> Loaded:
    train, test = _split_folder(spec.path, ("train",)), _split_folder(spec.path, ("val", "test"))
    classes = _class_folders(train)
    if unknown := sorted(set(_class_folders(test)) - set(classes)):
        raise MismatchError(f"{test} has class folders that {train} lacks: {', '.join(unknown[:10])}")
    return Loaded(_folder_split(train, classes), _folder_split(test, classes), classes)


def _split_folder(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise NotFoundError(f"no folder {' or '.join(str(root / name) for name in names)}; folder:DIR needs class folders")


def _class_folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))


def _folder_split(folder: Path, classes: tuple[str, ...]) -> Split:
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_plain_files(folder / name))
        files += (file for file in found if file.lower().endswith(IMAGE_ENDINGS))
        labels += [label] * (len(files) - len(labels))
        if others := sum(not file.lower().endswith(IMAGE_ENDINGS) for file in found):
            logger.warning("%d files in %s are not images and are left out", others, folder / name)
    return Split(np.array(labels, np.int64), EncodedImages(files))


def _plain_files(folder: Path | str) -> Iterator[str]:
    """Yield all files below a folder, including links to files; links to folders are not followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _plain_files(entry.path)
            elif entry.is_symlink():  # its target is checked when it is opened
                yield from () if os.path.isdir(entry.path) else (entry.path,)
            elif entry.is_file():
                yield entry.path
            else:
                raise UnsafeError(f"{entry.path} is a pipe or a device; images are plain files, remove it")


def _parquet(spec: DataSpec) -> Loaded:
    train, test = _parquet_files(spec.path, ("train",)), _parquet_files(spec.path, ("test", "validation"))
    schema = _opened(train[0]).schema_arrow
    columns = (_image_column(schema, train[0]), _label_column(schema, spec))
    return Loaded(
        _read_rows(train, columns, spec.options.train),
        _read_rows(test, columns, spec.options.test),
        _class_names(schema, columns[1]),
    )


def _parquet_files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    for name in names:
        if files := sorted(folder.glob(f"{name}-*.parquet")):
            return files
    found = ", ".join(sorted(path.name for path in folder.glob("*"))[:10]) or "nothing"
    raise NotFoundError(f"no {' or '.join(f'{name}-*.parquet' for name in names)} in {folder}; it holds {found}")


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise CorruptionError(f"{file} is not a readable parquet file: {error}") from None


def _image_column(schema: pa.Schema, file: Path) -> str:
    found = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    if len(found) != 1:
        listed = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise SettingsError(f"{file} should have one struct column with image `bytes`; found {len(found)} in: {listed}")
    return found[0]


def _label_column(schema: pa.Schema, spec: DataSpec) -> str:
    known = [field.name for field in schema if pa.types.is_integer(field.type)]
    if spec.column is None and len(known) == 1:
        return known[0]
    if spec.column in known:
        return str(spec.column)
    listed = ", ".join(known) or "none"
    found = f"'{spec.column}' is none of them" if spec.column else "choose one"
    raise SettingsError(f"integer columns of {spec.path}: {listed}; {found}: write parquet:{spec.location}#COLUMN")


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    found = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"), "the parquet metadata 'huggingface'")
    for key in ("info", "features", label, "names"):
        found = found.get(key) if isinstance(found, dict) else None
    return tuple(map(str, found)) if isinstance(found, list) and found else None


def _read_rows(files: list[Path], columns: tuple[str, str], limit: int | None) -> Split:
    """Read the rows of parquet files, up to the row group that reaches `limit`."""
    payloads: list[bytes | None] = []
    labels, starts = [np.empty(0, np.int64)], dict[str, int]()
    for place, table in ((str(file), table) for file in files for table in _row_groups(file, *columns)):
        starts.setdefault(place, len(payloads))
        payloads.extend(row["bytes"] if row else None for row in table[0].to_pylist())
        labels.append(table[1].cast(pa.int64()).fill_null(-1).to_numpy())
        if limit is not None and len(payloads) >= limit:
            break
    origins = Origins(tuple(starts), tuple(starts.values()))
    return Split(np.concatenate(labels), EncodedImages(payloads, origins))


def _row_groups(file: Path, image: str, label: str) -> Iterator[pa.Table]:
    opened = _opened(file)
    if missing := {image, label} - set(opened.schema_arrow.names):
        raise MismatchError(f"{file} lacks the column {', '.join(sorted(missing))} that the first file has")
    for group in range(opened.num_row_groups):
        try:
            yield opened.read_row_group(group, columns=[f"{image}.bytes", label]).select([image, label])
        except (pa.ArrowException, OSError) as error:
            raise CorruptionError(f"row group {group} of {file} cannot be read: {error}") from None


def _arrays(spec: DataSpec) -> Loaded:
    arrays = read_npz(spec.path)
    classes = tuple(str(name) for name in arrays["classes"]) if "classes" in arrays else None
    train, test = (_array_split(arrays, part, spec.path) for part in ("train", "test"))
    if arrays["train_images"].shape[1:] != arrays["test_images"].shape[1:]:
        raise MismatchError(f"training and test images in {spec.path} differ in size or channels")
    return Loaded(train, test, classes)


def read_npz(file: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a .npz file by name, without pickles; sizes are checked before anything is unpacked.

    Raises:
        NotFoundError: the file does not exist.
        UnsafeError: it is not a plain file, holds Python objects, or claims to unpack to too many bytes.
        CorruptionError: it is damaged.
    """
    with naming(file), open_plain(file) as stream:
        try:
            _require_small_directory(stream)
            with np.lib.npyio.NpzFile(stream, allow_pickle=False) as arrays:
                assert arrays.zip is not None
                _require_few_bytes(arrays.zip.infolist(), stream.seek(0, 2))
                found = dict(arrays)
            if odd := [name for name, array in found.items() if not isinstance(array, np.ndarray)]:
                raise ValueError(f"{odd[0]!r:.80} is not a numpy array")
            return found
        except (UnsafeError, MemoryError) as error:
            raise UnsafeError(f"{file} is refused: {error}") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
            if isinstance(error, KcdcacheError) or getattr(error, "errno", None) is not None:
                raise
            if "allow_pickle" in str(error):
                raise UnsafeError(f"{file} is refused: it holds Python objects, which could run code") from None
            raise CorruptionError(f"{file} is not a readable .npz file: {error}") from None


def _require_small_directory(stream: BinaryIO) -> None:
    """Raise UnsafeError if the list of members, which zipfile reads whole, is too large.

    Source: APPNOTE.TXT of the ZIP format, sections 4.3.14 to 4.3.16.
    """
    size = stream.seek(0, 2)
    stream.seek(max(0, size - _END_BYTES - _LOCATOR_BYTES - _END64_BYTES))
    tail = stream.read()
    end = tail[-_END_BYTES:]
    if end[:4] != b"PK\5\6" or end[-2:] != b"\0\0":
        raise zipfile.BadZipFile("it does not end as an archive without a comment does")
    claimed = int.from_bytes(end[12:16], "little")
    if tail[-_END_BYTES - _LOCATOR_BYTES :][:4] == b"PK\6\7":  # zip64, which zipfile then uses
        claimed = int.from_bytes(tail[40:48], "little")
    if claimed > MOST_DIRECTORY_BYTES:
        raise UnsafeError(f"its list of arrays takes {claimed} bytes, expected at most {MOST_DIRECTORY_BYTES}")


def _require_few_bytes(members: list[zipfile.ZipInfo], size: int) -> None:
    claimed, most = sum(member.file_size for member in members), min(MOST_BYTES, FREE_BYTES + MOST_RATIO * size)
    if claimed > most:
        raise UnsafeError(f"{size} bytes claim to unpack to {claimed}, expected at most {most}")
    if odd := [member.filename for member in members if member.compress_type not in _METHODS]:
        raise UnsafeError(f"{odd[0]!r:.80} is compressed in a way numpy never does")


def _array_split(arrays: dict[str, np.ndarray], part: str, file: Path) -> Split:
    for name in (f"{part}_images", f"{part}_labels"):
        if name not in arrays:
            raise NotFoundError(f"no array {name} in {file}; it holds {', '.join(sorted(arrays))}")
    pixels, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
        raise MismatchError(f"{part}_images in {file} should be uint8 (N,H,W,C); found {pixels.dtype} {pixels.shape}")
    if labels.dtype.kind not in "iu" or labels.shape != pixels.shape[:1]:
        found = f"{labels.dtype} {labels.shape}"
        raise MismatchError(f"{part}_labels in {file} should be {len(pixels)} integers; found {found}")
    return Split(labels.astype(np.int64), DecodedImages(pixels, Origins((f"{file} {part}_images",))))


LOADERS: dict[str, Callable[[DataSpec], Loaded]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "folder": _folder,
    "parquet": _parquet,
    "arrays": _arrays,
}
