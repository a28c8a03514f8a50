"""Image data sets, loaded by data spec."""

import logging
import os
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from kcdcache import rng
from kcdcache.datasets import images, label_noise, tables
from kcdcache.datasets.images import DecodedImages, EncodedImages, Origins, Split, Statistics
from kcdcache.datasets.label_noise import Corruption
from kcdcache.datasets.spec import DataIdentity, DataSpec, Options, at_home, parse
from kcdcache.errors import (
    CorruptionError,
    KcdcacheError,
    MismatchError,
    NotFoundError,
    SettingsError,
    UnsafeError,
    reason,
    spelled,
)
from kcdcache.files.atomic import naming, open_plain, sha256_bytes
from kcdcache.files.records import canonical_json
from kcdcache.settings import STATISTICS

logger = logging.getLogger(__name__)

CACHE = Path("~/.cache/kcdcache")
IMAGE_ENDINGS = (
    ".avif", ".bmp", ".gif", ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".png",
    ".tif", ".tiff", ".webp",
)  # fmt: skip
SYSTEM_FOLDERS = {
    "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "__macosx", "__pycache__", "lost+found", "$recycle.bin",
    "system volume information",
}  # fmt: skip
"""folders, in lower case, that systems put among images"""
HIDDEN, OTHERS, AGAIN, OUTSIDE = (
    "hidden or system files and folders", "files that are not images", "links to folders already read",
    "files outside the class folders",
)  # fmt: skip
"""kinds of what is left out of class folders"""
CHANNELS = (1, 3, 4)
"""numbers of channels that need not be stated"""
_CIFAR = {name: Statistics(*STATISTICS[name]) for name in ("cifar10", "cifar100")}
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

    def __repr__(self) -> str:
        sizes = f"{len(self.train):,} training and {len(self.test):,} test images"
        return f"Dataset({self.name!r}: {sizes}, {len(self.classes)} classes)"

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
        MismatchError: labels are not 0..C-1, a class has no training image, or images and labels do not match.
        CorruptionError: an image cannot be decoded; names file and row.
    """
    parsed = parse(spec)
    options, known = parsed.options, {**LOADERS, **(others or {})}
    if parsed.kind not in known:
        raise SettingsError(f"'{spec}' is an exported set: open it with `export.condensed_set.load_data`")
    loaded = known[parsed.kind](parsed)
    for split, name in ((loaded.train, "training"), (loaded.test, "test")):
        if len(split) == 0:
            raise NotFoundError(f"the {name} split of '{spec}' holds no images")
    classes = loaded.classes or _numbered(loaded.train.labels, spec)
    _require_texts(classes, spec)
    for split in (loaded.train, loaded.test):
        _require_in_range(split, len(classes))
    train = _limited(loaded.train, options.train, options.order, f"training split of '{spec}'")
    test = _limited(loaded.test, options.test, options.order, f"test split of '{spec}'")
    sizes = np.bincount(train.labels, minlength=len(classes))
    if parsed.kind != "condensed":
        _require_all_classes(sizes, classes, spec, options)
    if untested := _without(np.bincount(test.labels, minlength=len(classes)), classes):
        logger.warning("'%s' has no test image of %s; test accuracy is of the others", spec, untested)
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


def _limited(split: Split, limit: int | None, order: str, what: str) -> Split:
    """Return a split with the images that a limit takes; images in parquet files are read."""
    if limit is None:
        unread = isinstance(split.source, tables.ParquetImages)
        return Split(split.labels, split.source.taken(np.arange(len(split)))) if unread else split
    if limit > len(split):
        raise SettingsError(f"the {what} has {len(split)} images; {limit} were requested")
    rows = np.arange(limit) if order == "stored" else label_noise.balanced(split.labels, limit)
    return Split(split.labels[rows], split.source.taken(rows))


def _corrupted(split: Split, classes: int, asked: Corruption, spec: str) -> Split:
    if not asked:
        return split
    try:
        rows, labels = label_noise.applied(split.labels, classes, asked)
    except SettingsError as error:
        raise SettingsError(f"data spec '{spec}': {error}") from None
    source = split.source if len(rows) == len(split) else split.source.taken(rows)
    return Split(labels, source, split.labels[rows])


def _require_texts(classes: Sequence[str], spec: str) -> None:
    """Raise MismatchError for a class name that cannot be recorded: half of a character, as of a name not in UTF-8."""
    if odd := [name for name in classes if any("\ud800" <= letter <= "\udfff" for letter in name)]:
        raise MismatchError(f"the class name {odd[0]!a} in '{spec}' is not valid UTF-8; rename it")


def _require_in_range(split: Split, count: int) -> None:
    for row in np.flatnonzero((split.labels < 0) | (split.labels >= count))[:1]:
        found = f"label {split.labels[row]} (a null counts as -1)"
        raise MismatchError(f"{split.source.place(int(row))} has {found}; labels must be 0..{count - 1}")


def _numbered(labels: Int64[np.ndarray, " n"], spec: str) -> tuple[str, ...]:
    """Return the names of classes that have none: their numbers."""
    count = int(labels.max()) + 1
    if count > len(labels):  # before a name is made for each
        found = f"{len(labels)} images have labels up to {count - 1}"
        raise MismatchError(f"labels of '{spec}' must be 0..C-1 without gaps; {found}")
    return tuple(map(str, range(count)))


def _require_all_classes(
    sizes: Int64[np.ndarray, " classes"], classes: Sequence[str], spec: str, options: Options
) -> None:
    if not (missing := _without(sizes, classes)):
        return
    remedy = f"labels must be 0..{len(classes) - 1} without gaps: add images, or take the class out"
    if options.train is not None:
        remedy = "give a larger train" + (", or leave order=stored out" if options.order == "stored" else "")
    raise MismatchError(f"'{spec}' has no training image of {missing}; {remedy}")


def _without(sizes: Int64[np.ndarray, " classes"], classes: Sequence[str]) -> str:
    """Return number and names of the classes of size 0; '' if there are none."""
    missing = [f"{label} ('{classes[label]}')" for label in np.flatnonzero(sizes == 0).tolist()]
    return f"{len(missing)} of {len(classes)} classes: {_few(missing)}" if missing else ""


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


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
    asked = (spec.options.train_split, spec.options.test_split)
    train, test = (
        _split_folder(spec.path, (name,) if name else usual)
        for name, usual in zip(asked, (("train",), ("val", "test")), strict=True)
    )
    own, theirs = _class_folders(train), _class_folders(test)
    classes = tuple(own)
    numbers = tables.numbered(list(theirs), classes)
    if unknown := [spelled(name) for name, number in zip(theirs, numbers, strict=True) if number < 0]:
        raise MismatchError(f"{test} has class folders that {train} lacks: {_few(unknown)}; remove or rename them")
    tested = dict(zip(numbers, theirs.values(), strict=True))
    walks = [_Walk(train, [*own.values()]), _Walk(test, [tested.get(number) for number in range(len(classes))])]
    left = {
        what: sorted(name for walk in walks for name in walk.left[what]) for what in (HIDDEN, OTHERS, AGAIN, OUTSIDE)
    }
    if counts := [f"{what}: {len(names)} ({_few(names)})" for what, names in left.items() if names]:
        logger.warning("left out of %s: %s", spec.path, "; ".join(counts))
    return Loaded(walks[0].split(), walks[1].split(), classes)


def _split_folder(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise NotFoundError(f"no folder {' or '.join(str(root / name) for name in names)}; folder:DIR needs class folders")


def _class_folders(folder: Path) -> dict[str, str]:
    """Return the paths of the class folders by name, sorted; names are UTF-8 in any locale."""
    places = [entry for entry in _entries(str(folder)) if os.path.isdir(entry.path) and not _hidden(entry.name)]
    found = {_utf8(entry.name, folder): entry.path for entry in places}
    tables.require_distinct(list(found), f"the class folders in {folder}")
    return dict(sorted(found.items()))


def _utf8(name: str, folder: Path) -> str:
    raw = os.fsencode(name)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise MismatchError(
            f"the class folder {str(raw)[1:]} in {folder} has no name in UTF-8, which classes need; rename it"
        ) from None


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise KcdcacheError(f"the folder {folder} cannot be read ({error.strerror}); check its permissions") from None


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


class _Walk:
    """The images in the class folders of a split, and what is left out.

    Links to folders are followed after all folders, and each folder is read once: a link to the split, or to a folder
    around it, leads nowhere.
    """

    def __init__(self, folder: Path, places: Sequence[str | None]) -> None:
        self.root = folder
        self.images: list[list[str]] = [[] for _ in places]
        """paths by class; `places` are the class folders, None for a class that has none here"""
        self.left = defaultdict[str, list[str]](list)
        """names of what is left out, by kind"""
        self._links = list[tuple[int, str]]()
        around = folder.resolve()
        self._seen = {_identity(str(place)) for place in (around, *around.parents)}
        for entry in _entries(str(folder)):
            if not (hidden := _hidden(entry.name)) and os.path.isdir(entry.path):
                continue
            self._leave(HIDDEN if hidden else OUTSIDE, entry.path)
        for label, place in enumerate(places):
            if place is not None:
                self._enter(label, place)
        for label, path in self._links:  # linked folders may hold further links
            self._read(label, path)

    def split(self) -> Split:
        """Return the images as a split."""
        labels = np.repeat(np.arange(len(self.images)), [len(paths) for paths in self.images])
        return Split(labels, EncodedImages([path for paths in self.images for path in sorted(paths)]))

    def _enter(self, label: int, folder: str) -> None:
        if os.path.islink(folder):
            self._links.append((label, folder))
        else:
            self._read(label, folder)

    def _read(self, label: int, folder: str) -> None:
        if (identity := _identity(folder)) in self._seen:
            self._leave(AGAIN, folder)
            return
        self._seen.add(identity)
        for entry in _entries(folder):
            if _hidden(entry.name):
                self._leave(HIDDEN, entry.path)
            elif os.path.isdir(entry.path):
                self._enter(label, entry.path)
            elif not entry.is_symlink() and not entry.is_file():  # a link's target is checked when it is opened
                raise UnsafeError(f"{entry.path} is a pipe or a device; images are plain files, remove it")
            elif entry.name.lower().endswith(IMAGE_ENDINGS):
                self.images[label].append(entry.path)
            else:
                self._leave(OTHERS, entry.path)

    def _leave(self, what: str, path: str) -> None:
        self.left[what].append(os.path.relpath(path, self.root.parent))


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino


def _parquet(spec: DataSpec) -> Loaded:
    return Loaded(*tables.load(spec))


def _arrays(spec: DataSpec) -> Loaded:
    arrays = read_npz(spec.path)
    classes = tuple(str(name) for name in arrays["classes"]) if "classes" in arrays else None
    train, test = (_array_split(arrays, part, spec) for part in ("train", "test"))
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


def _array_split(arrays: dict[str, np.ndarray], part: str, spec: DataSpec) -> Split:
    file = spec.path
    for name in (f"{part}_images", f"{part}_labels"):
        if name not in arrays:
            raise NotFoundError(f"no array {name} in {file}; it holds {', '.join(sorted(arrays))}")
    pixels, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
        raise MismatchError(f"{part}_images in {file} should be uint8 (N,H,W,C); found {pixels.dtype} {pixels.shape}")
    _require_channels_last(pixels.shape, spec.options.channels, f"{part}_images in {file}")
    if labels.dtype.kind not in "iu" or labels.shape != pixels.shape[:1]:
        found = f"{labels.dtype} {labels.shape}"
        raise MismatchError(f"{part}_labels in {file} should be {len(pixels)} integers; found {found}")
    return Split(labels.astype(np.int64), DecodedImages(pixels, Origins((f"{file} {part}_images",))))


def _require_channels_last(shape: tuple[int, ...], stated: int | None, what: str) -> None:
    allowed = CHANNELS if stated is None else (stated,)
    if shape[3] in allowed:
        return
    found = f"{what} should be (N,H,W,C) with C = {' or '.join(map(str, allowed))}; found {shape}"
    if shape[1] in allowed:
        raise MismatchError(f"{found}, which seems to be (N,C,H,W): save it transposed by (0, 2, 3, 1)")
    raise MismatchError(f"{found}: transpose it, or add channels={shape[3]} to the data spec if it is right")


LOADERS: dict[str, Callable[[DataSpec], Loaded]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "folder": _folder,
    "parquet": _parquet,
    "arrays": _arrays,
}
