"""The images of some samples under the positions they have in the whole data set, as an exported set holds them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt8

from kcdcache import decoding, exported
from kcdcache.errors import CorruptionError, MismatchError, UnsafeError
from kcdcache.exported import Record
from kcdcache.images import DECODED_BYTES, Check, DecodedImages, EncodedImages, ImageList, Origins, Split, Statistics


@dataclass(frozen=True, eq=False)
class PartialImages(EncodedImages):
    """Images of some positions only; asking for another one is an error, so that nothing else is ever taken for it."""

    held: DecodedImages | EncodedImages = field(kw_only=True)
    """the images there are"""
    row: Int64[np.ndarray, " n"] = field(kw_only=True)
    """position -> its number among them, -1 where there is none"""

    def __len__(self) -> int:
        return len(self.row)

    def first(self, count: int) -> "PartialImages":
        """Return those among the first `count` positions."""
        return replace(self, row=self.row[:count])

    def images(
        self, index: Int64[np.ndarray, " batch"], check: Check | None = None, threads: int | None = None
    ) -> UInt8[np.ndarray, "batch height width channels"] | ImageList:
        """Return the images at the given positions: one array if all share a size, else a list.

        Raises:
            MismatchError: one of them is not there; names it.
            CorruptionError: an image cannot be decoded.
        """
        rows = self._rows(index)
        if isinstance(self.held, DecodedImages):
            return self.held.images(rows)  # compared with their digests when they were loaded
        if check is None:
            return self.held.images(rows, threads=threads)
        back, seen = dict(zip(rows.tolist(), index.tolist(), strict=True)), check
        return self.held.images(rows, lambda row, content: seen(back[row], content), threads)

    def place(self, position: int) -> str:
        """Return where the image at a position came from, for messages."""
        return self.held.place(self._row(position))

    def content(self, position: int) -> bytes:
        """Return what identifies an image, as the data set it came from had it.

        Raises:
            MismatchError: it is not there.
        """
        return self.held.content(self._row(position))

    def decoded(self, position: int, content: bytes) -> UInt8[np.ndarray, "_ _ channels"]:
        """Return the image that the content read at a position holds."""
        row = self._row(position)
        return self.held.pixels[row] if isinstance(self.held, DecodedImages) else self.held.decoded(row, content)

    def size(self, position: int) -> tuple[int, int]:
        """Return an image's height and width."""
        row = self._row(position)
        return self.held.image_size if isinstance(self.held, DecodedImages) else self.held.size(row)

    def _row(self, position: int) -> int:
        return int(self._rows(np.array([position]))[0])

    def _rows(self, index: Int64[np.ndarray, " some"]) -> Int64[np.ndarray, " some"]:
        rows = self.row[index]
        if len(missing := index[rows < 0]):
            raise MismatchError(
                f"sample {missing[0]} is not among the {int((self.row >= 0).sum())} of {len(self)} images that the "
                "exported set holds: it serves `kcdcache train --condensed` with the same set; for anything else give "
                "the whole data set"
            )
        return rows


def load(path: Path) -> tuple[Split, Split, tuple[str, ...], Statistics]:
    """Return training and test split, class names and pixel statistics of a set exported with its images.

    Labels and digests are those of the whole training split; every image is compared with its digest.

    Raises:
        NotFoundError, UnfinishedError: there is no exported set.
        MismatchError: it was exported without images.
        CorruptionError: a file is not what was exported.
    """
    record = exported.read(path)
    kinds, data = record.content.images, record.knowledge.data
    if kinds is None:
        raise MismatchError(f"{path} was exported without images: give the data set it was made from as --data")
    if not len(kinds.mean) == len(kinds.std) in (1, 3):
        raise CorruptionError(f"{record.place(exported.RECORD)} has statistics of {len(kinds.mean)} channels")
    samples = exported.read_samples(record)
    payloads, labels, index = _read(record, "train")
    row = np.full(data.count, -1)
    row[_sound(index, data.count, record)] = np.arange(len(index))
    if not np.array_equal(labels, samples.label[index]):
        raise CorruptionError(f"{record.place(exported.SPLITS['train'])} has other labels than {exported.SAMPLES}")
    held = _source(record, "train", payloads, kinds.train, len(kinds.mean))
    images = PartialImages((), image_size=data.image_size, held=held, row=row)
    if isinstance(held, DecodedImages) and held.image_size != data.image_size:
        raise CorruptionError(f"{path} holds images of {held.image_size} pixels, its record says {data.image_size}")
    train = Split(samples.label, images)
    _require_digests(Split(labels, held), samples.digest[index], path)
    train.expect(samples.digest, f"in the exported set {path}")
    return train, _test(record, kinds), data.classes, Statistics(tuple(kinds.mean), tuple(kinds.std))


def _test(record: Record, kinds: exported.Images) -> Split:
    payloads, labels, _ = _read(record, "test")
    split = Split(labels, _source(record, "test", payloads, kinds.test, len(kinds.mean)))
    if split.digest() != kinds.test_digest:
        raise CorruptionError(f"{record.place(exported.SPLITS['test'])} is not the test split that was exported")
    return split


def _read(record: Record, name: str) -> tuple[list[bytes], Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Return image bytes, labels and positions of a split."""
    exported.require_file(record, exported.SPLITS[name])
    path = record.place(exported.SPLITS[name])
    payloads: list[bytes] = []
    try:
        with pq.ParquetFile(path) as opened:
            for group in range(opened.num_row_groups):
                table = opened.read_row_group(group, columns=["image.bytes"])
                payloads += [(row or {}).get("bytes") or b"" for row in table["image"].to_pylist()]
            numbers = opened.read(columns=["label", "index"])
        labels, index = (
            np.array(numbers[column].cast(pa.int64()).fill_null(-1).to_numpy()) for column in ("label", "index")
        )
    except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
        raise CorruptionError(f"{path} is not a readable parquet file of images: {error}") from None
    classes = len(record.knowledge.data.classes)
    if not len(payloads) == len(labels) == len(index) > 0 or labels.min() < 0 or labels.max() >= classes:
        raise CorruptionError(f"{path} should hold an image, a label in 0..{classes - 1} and an index in every row")
    return payloads, labels, index


def _sound(index: Int64[np.ndarray, " n"], count: int, record: Record) -> Int64[np.ndarray, " n"]:
    if index[0] < 0 or index[-1] >= count or np.any(np.diff(index) <= 0):
        raise CorruptionError(f"{record.place(exported.SPLITS['train'])}: its index should ascend in 0..{count - 1}")
    return index


def _source(
    record: Record, name: str, payloads: Sequence[bytes], kind: str, channels: int
) -> DecodedImages | EncodedImages:
    origins = Origins((str(record.place(exported.SPLITS[name])),))
    if kind == "files":
        return EncodedImages(payloads, origins)
    first = decoding.rgb(payloads[0], origins.place(0))
    if (needed := len(payloads) * first.size) > DECODED_BYTES:
        raise UnsafeError(f"{origins.files[0]} would take {needed:,} bytes decoded, at most {DECODED_BYTES:,} are")
    pixels = np.empty((len(payloads), *first.shape[:2], channels), np.uint8)
    for number, payload in enumerate(payloads):
        image = decoding.rgb(payload, origins.place(number))
        if image.shape != first.shape:
            raise CorruptionError(f"{origins.place(number)} has another size than the image before it")
        pixels[number] = image[..., :channels]
    return DecodedImages(pixels, origins)


def _require_digests(split: Split, digests: np.ndarray, path: Path) -> None:
    """Compare every image with the digest its sample had; one that differs is damaged or forged."""
    if len(wrong := np.flatnonzero(split.digests() != digests)):
        raise CorruptionError(
            f"{split.source.place(int(wrong[0]))} in {path} is not the image that the teacher saw; export it again"
        )
