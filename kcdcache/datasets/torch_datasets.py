"""Labelled images from Python objects: torch's map-style datasets, and splits of Hugging Face `datasets`."""

import io
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from kcdcache.datasets.datasets import CHANNELS, Dataset
from kcdcache.datasets.images import DecodedImages, EncodedImages, Origins, Split, Statistics
from kcdcache.errors import MismatchError, NotFoundError, SettingsError, nearest

logger = logging.getLogger(__name__)

READ_AGAIN = 32
"""images that are read twice, to notice random transforms"""
MOST_BYTES = 16 * 2**30
"""maximum size of a split in memory"""
Pixels = UInt8[np.ndarray, "_ _ _"]


def load(
    train: Any,
    test: Any,
    *,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image: str | None = None,
    label: str | None = None,
) -> Dataset:
    """Read two map-style datasets into memory as a training and a test split.

    An item is (image, label) or a mapping with these; `image` and `label` name its keys where there are several. An
    image is a PIL image, a uint8 array (height, width[, channels]), or a tensor (channels, height, width) of uint8, or
    of floats in [0, 1] as of torchvision's `ToTensor`. A label is an integer in [0, classes) or a text. Names of
    `classes` are those of the dataset (`classes`, or the `ClassLabel` of its features) unless given; texts are classes
    in sorted order. `mean` and `std` are per channel, of pixels in [0, 1], and those of the training images if unset.

    Raises:
        MismatchError: an image or label is none of these, images were normalised, a dataset is random (two reads of
            an image differ), or the splits differ in channels.
        NotFoundError: a dataset is empty, or has no such key.
        SettingsError: mean and std do not belong together, or the images take more than 16 GiB.
    """
    if (mean is None) != (std is None):
        raise SettingsError("mean and std belong together: give both, one number a channel in [0, 1], or neither")
    parts = [_Reader(dataset, name, image, label) for dataset, name in ((train, "train"), (test, "test"))]
    read = [part.read() for part in parts]
    names = _class_names(classes, parts[0], read[0].labels)
    splits = [_split(part, found, names) for part, found in zip(parts, read, strict=True)]
    if len(channels := {found.images[0].shape[2] for found in read}) > 1:
        raise MismatchError(f"training and test images have {' and '.join(map(str, sorted(channels)))} channels")
    known = None if mean is None or std is None else Statistics(tuple(mean), tuple(std))
    if known is not None and {len(known.mean), len(known.std)} != channels:
        raise SettingsError(f"mean {known.mean} and std {known.std} need one number for each of {channels} channels")
    return Dataset(f"python:{type(train).__name__}", splits[0], splits[1], names, known)


class _Read(NamedTuple):
    images: list[Pixels]
    labels: list[int | str]


class _Reader:
    """One dataset, read item by item; errors name it and the item."""

    def __init__(self, dataset: Any, name: str, image: str | None, label: str | None) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise MismatchError(
                f"{name}= takes a map-style dataset, with len(dataset) and dataset[i]; found {type(dataset).__name__}"
            )
        if len(dataset) == 0:
            raise NotFoundError(f"{name}= is a dataset without items")
        self.dataset, self.name = dataset, name
        self.keys = _keys(dataset[0], image, label, name)

    def read(self) -> _Read:
        """Read all items, and some of them twice."""
        found, total = _Read([], []), 0
        for row in range(len(self.dataset)):
            item = self.dataset[row]
            pixels = _pixels(item[self.keys[0]], f"{self.name}[{row}]")
            total += pixels.nbytes
            if total > MOST_BYTES:
                raise SettingsError(
                    f"the images of {self.name}= take more than {MOST_BYTES >> 30} GiB in memory; use class folders "
                    "(folder:DIR) or parquet files (parquet:DIR), which are decoded when they are needed"
                )
            found.images.append(pixels)
            found.labels.append(_label(item[self.keys[1]], f"{self.name}[{row}]"))
        self._require_steady(found)
        return found

    def _require_steady(self, found: _Read) -> None:
        for row in sorted(set(np.linspace(0, len(found.images) - 1, READ_AGAIN).astype(int).tolist())):
            again = _pixels(self.dataset[row][self.keys[0]], f"{self.name}[{row}]")
            if not np.array_equal(again, found.images[row]):
                raise MismatchError(
                    f"{self.name}[{row}] is another image when it is read again: the dataset has a random transform; "
                    "give it without, the views of `kc.precompute(..., augment=...)` take its place"
                )

    def named_classes(self) -> tuple[str, ...] | None:
        """Return the class names that the dataset states: as torchvision's do, or by a `ClassLabel` feature."""
        features = getattr(self.dataset, "features", None)
        stated = getattr(features[self.keys[1]], "names", None) if isinstance(features, Mapping) else None
        stated = stated if stated is not None else getattr(self.dataset, "classes", None)
        return tuple(map(str, stated)) if isinstance(stated, list | tuple) else None


def _keys(item: Any, image: str | None, label: str | None, name: str) -> tuple[Any, Any]:
    """Return the keys of image and label in an item."""
    if isinstance(item, Mapping):
        images = [k for k, value in item.items() if isinstance(value, Image.Image) or getattr(value, "ndim", 0) >= 2]
        labels = [k for k, value in item.items() if isinstance(value, int | str) or getattr(value, "ndim", 1) == 0]
        return _key(item, image, images, "image", name), _key(item, label, labels, "label", name)
    if image is not None or label is not None:
        raise SettingsError("image= and label= name the keys of items that are mappings; these are pairs")
    if not isinstance(item, Sequence) or len(item) < 2:
        raise MismatchError(f"{name}[0] should be (image, label), or a mapping; found {type(item).__name__}")
    return 0, 1


def _key(item: Mapping[Any, Any], asked: str | None, usual: Sequence[Any], what: str, name: str) -> Any:
    if asked is not None:
        if asked not in item:
            raise NotFoundError(f"{name}[0] has no '{asked}'; {nearest(asked, list(map(str, item)))}")
        return asked
    if len(usual) == 1 or what in usual:
        return what if what in usual else usual[0]
    listed = ", ".join(map(str, usual or item))
    raise MismatchError(f"{name}[0] has several keys that may be its {what}, or none ({listed}): give {what}=KEY")


def _pixels(image: Any, place: str) -> Pixels:
    """Return an image as uint8 (height, width, channels)."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if hasattr(image, "detach"):  # a tensor; torch is not imported for it
        return _of_tensor(image.detach().cpu().numpy(), place)
    array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in CHANNELS:
        raise MismatchError(
            f"{place} should be a PIL image, a uint8 array (height, width, channels) with 1, 3 or 4 channels, or a "
            f"tensor (channels, height, width); found an array of {array.dtype} {array.shape}"
        )
    return np.ascontiguousarray(array)


def _of_tensor(values: np.ndarray, place: str) -> Pixels:
    values = values[None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[0] not in CHANNELS:
        raise MismatchError(f"{place} should be a tensor (1, 3 or 4 channels, height, width); found {values.shape}")
    if values.dtype != np.uint8:
        if values.dtype.kind != "f" or not (values.min() >= 0 and values.max() <= 1):
            low, high = float(values.min()), float(values.max())
            raise MismatchError(
                f"{place} has {values.dtype} values from {low:.3g} to {high:.3g}; expected uint8, or floats in [0, 1]: "
                "leave the normalisation out of the dataset, mean= and std= are applied before each network"
            )
        values = np.rint(values.astype(np.float64) * 255).astype(np.uint8)
    return np.ascontiguousarray(values.transpose(1, 2, 0))


def _label(value: Any, place: str) -> int | str:
    if isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.ndim or array.dtype.kind not in "iub":
        raise MismatchError(f"{place} should have a whole number or a text as label; found {value!r:.60}")
    return int(array)


def _class_names(given: Sequence[str] | None, train: _Reader, labels: Sequence[int | str]) -> tuple[str, ...]:
    texts = sorted({label for label in labels if isinstance(label, str)})
    if texts and len(texts) < len(set(labels)):
        raise MismatchError("the labels of train= are texts and numbers; give one of them")
    names = tuple(given) if given is not None else train.named_classes()
    if names is None:
        names = tuple(texts) if texts else tuple(map(str, range(max(map(int, labels)) + 1)))
    if len(set(names)) < len(names):
        raise MismatchError(f"the names of the {len(names)} classes are not all different")
    return names


def _split(part: _Reader, found: _Read, names: tuple[str, ...]) -> Split:
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.array([numbers.get(one, -1) if isinstance(one, str) else one for one in found.labels], np.int64)
    for row in np.flatnonzero((labels < 0) | (labels >= len(names)))[:1].tolist():
        raise MismatchError(
            f"{part.name}[{row}] has the label {found.labels[row]!r}; there are {len(names)} classes: 0 to "
            f"{len(names) - 1}, or their names ({', '.join(names[:5])}, ...)"
        )
    if part.name == "train":
        _require_all_classes(labels, names)
    return Split(labels, _source(found.images, Origins((f"{part.name}=",))))


def _require_all_classes(labels: Int64[np.ndarray, " n"], names: Sequence[str]) -> None:
    missing = [names[label] for label in np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0).tolist()]
    if missing:
        raise MismatchError(
            f"train= has no image of {len(missing)} of {len(names)} classes ({', '.join(missing[:5])}); add some, or "
            "leave these classes out"
        )


def _source(found: Sequence[Pixels], origins: Origins) -> DecodedImages | EncodedImages:
    """Return the images in one array or, where their sizes differ, each as a PNG file in memory."""
    if len({image.shape for image in found}) == 1:
        return DecodedImages(np.stack(found), origins)
    if odd := [row for row, image in enumerate(found) if image.shape[2] != 3]:
        raise MismatchError(
            f"{origins.files[0]}: images of different sizes need 3 channels, item {odd[0]} has {found[odd[0]].shape[2]}"
        )
    payloads = []
    for image in found:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", compress_level=1)
        payloads.append(file.getvalue())
    return EncodedImages(payloads, origins)
