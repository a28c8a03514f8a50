"""Labelled uint8 images by index: held decoded in memory, or decoded on demand."""

import hashlib
import io
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8, UInt64
from PIL import Image

from kcdcache.errors import CorruptionError, MismatchError, NotFoundError, UnsafeError
from kcdcache.files import sha256_bytes

DECODED_BYTES = 4 << 30
"""Images of one size that take up to this many bytes decoded are decoded once."""

Pixels = UInt8[np.ndarray, "_ _ _"]
"""One image: height, width, channels."""
ImageList = list[UInt8[np.ndarray, "_ _ _"]]
"""Images of differing sizes."""

_BLOCK = 64  # images per task: a future per image would cost more than decoding a small one
_SMALL = 64 * 64  # below this many pixels threads only fight for the interpreter's lock: measured 1.5 times slower


class Statistics(NamedTuple):
    """Mean and standard deviation per channel of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Statistics of ImageNet, for images that are decoded on demand."""


class Origins(NamedTuple):
    """Where images came from: files, each with the position of its first image, in order."""

    files: tuple[str, ...]
    starts: tuple[int, ...] = (0,)

    def place(self, position: int) -> str:
        """Return the file and row of the image at a position, for messages."""
        number = bisect_right(self.starts, position) - 1
        return f"{self.files[number]} row {position - self.starts[number]}"


@dataclass(frozen=True, eq=False)
class DecodedImages:
    """Images of one size, all in memory."""

    pixels: UInt8[np.ndarray, "n height width channels"]
    origins: Origins

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[1], self.pixels.shape[2]

    def first(self, count: int) -> "DecodedImages":
        """Return the first `count` images."""
        return replace(self, pixels=self.pixels[:count])

    def images(self, index: Int64[np.ndarray, " batch"]) -> UInt8[np.ndarray, "batch height width channels"]:
        """Return a fresh array of the images at the given positions."""
        return np.take(self.pixels, index, axis=0)

    def place(self, position: int) -> str:
        """Return where the image at a position came from, for messages."""
        return self.origins.place(position)

    def content(self, position: int) -> bytes:
        """Return what identifies an image: its shape as three 64-bit integers and its pixels."""
        image = self.pixels[position]
        return np.array(image.shape, "<i8").tobytes() + image.tobytes()


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Image files, or the bytes of image files, decoded to RGB whenever they are asked for."""

    payloads: Sequence[str | bytes | None]
    """per image: a path, or the encoded bytes, or None where a file should hold some and does not"""
    origins: Origins | None = None
    """where the bytes came from; None where payloads are paths"""
    image_size: tuple[int, int] | None = None
    """height and width if all images are known to share them"""

    def __len__(self) -> int:
        return len(self.payloads)

    def first(self, count: int) -> "EncodedImages":
        """Return the first `count` images."""
        return replace(self, payloads=self.payloads[:count])

    def images(self, index: Int64[np.ndarray, " batch"]) -> UInt8[np.ndarray, "batch height width 3"] | ImageList:
        """Return the images at the given positions: one array if all share a size, else a list.

        Raises:
            CorruptionError: an image cannot be decoded; names file and row.
        """
        positions = index.tolist()
        if self.image_size is not None:
            pixels = np.empty((len(positions), *self.image_size, 3), np.uint8)
            in_blocks(len(positions), lambda slot: np.copyto(pixels[slot], self.image(positions[slot])))
            return pixels
        found: dict[int, Pixels] = {}
        in_blocks(len(positions), lambda slot: found.update({slot: self.image(positions[slot])}))
        return [found[slot] for slot in range(len(positions))]

    def place(self, position: int) -> str:
        """Return the file, and the row within it if it holds many, of the image at a position, for messages."""
        return self.origins.place(position) if self.origins else str(self.payloads[position])

    def content(self, position: int) -> bytes:
        """Return what identifies an image: the bytes of its file."""
        with _reading(self.place(position)), self._stream(position) as stream:
            return stream.read()

    def image(self, position: int) -> UInt8[np.ndarray, "_ _ 3"]:
        """Return one image decoded to RGB.

        Raises:
            CorruptionError: it cannot be decoded; names file and row.
            MismatchError: it has more than 8 bits per channel.
        """
        place = self.place(position)
        with _reading(place), self._stream(position) as stream, Image.open(stream) as image:
            if image.mode.startswith(("I", "F")):
                raise MismatchError(f"{place} has more than 8 bits per channel (mode {image.mode}); convert it to 8")
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))

    def size(self, position: int) -> tuple[int, int]:
        """Return an image's height and width from its header alone.

        Raises:
            CorruptionError: the header cannot be read; names file and row.
        """
        with _reading(self.place(position)), self._stream(position) as stream, Image.open(stream) as image:
            return image.height, image.width

    def _stream(self, position: int) -> io.BytesIO | io.BufferedReader:
        payload = self.payloads[position]
        if payload is None:
            raise CorruptionError(f"{self.place(position)} holds no image bytes")
        return io.BytesIO(payload) if isinstance(payload, bytes) else open(payload, "rb")


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a data set: labelled images in a fixed order."""

    labels: Int64[np.ndarray, " n"]
    """class per image, in [0, classes)"""
    source: DecodedImages | EncodedImages
    """where the images come from"""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width in pixels, or None where images differ."""
        return self.source.image_size

    def images(
        self, index: Int64[np.ndarray, " batch"]
    ) -> UInt8[np.ndarray, "batch height width channels"] | ImageList:
        """Return the images at the given positions: one fresh array, or a list where sizes differ.

        Raises:
            CorruptionError: an image cannot be decoded; names file and row.
            MismatchError: a position is outside the split.
        """
        outside = index[(index < 0) | (index >= len(self))]
        if outside.size:
            raise MismatchError(f"index {outside[0]} is outside this split, which has {len(self)} samples")
        return self.source.images(index)

    def digest(self) -> str:
        """Return the SHA-256 over images, labels and order."""
        return sha256_bytes(self.digests().astype("<u8").tobytes())

    def digests(self) -> UInt64[np.ndarray, " n"]:
        """Return per sample 64 bits of SHA-256 over image and label; computed once."""
        return self._digests

    @cached_property
    def _digests(self) -> UInt64[np.ndarray, " n"]:
        return digests(self.source, self.labels)


def decode_once(source: EncodedImages, limit_bytes: int = DECODED_BYTES) -> DecodedImages | EncodedImages:
    """Return the images decoded if all have one size and fit the limit; else as they are, to be decoded on demand.

    Raises:
        CorruptionError: an image cannot be read; names file and row.
    """
    size = source.size(0)
    if len(source) * size[0] * size[1] * 3 <= limit_bytes:
        return _decoded_alike(source, size) or source
    alike = all(source.size(position) == size for position in range(1, len(source)))
    return replace(source, image_size=size) if alike else source


def digests(source: DecodedImages | EncodedImages, labels: Int64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Return per image the first 8 bytes, little endian, of SHA-256 over its content and its label (64-bit)."""
    out = np.empty(len(source), "<u8")

    def write(position: int) -> None:
        state = hashlib.sha256(source.content(position))
        state.update(labels[position].astype("<i8").tobytes())
        out[position] = int.from_bytes(state.digest()[:8], "little")

    in_blocks(len(source), write, threads=1 if isinstance(source, DecodedImages) else None)
    return out.astype(np.uint64, copy=False)


def statistics(source: DecodedImages | EncodedImages) -> Statistics:
    """Return the statistics of decoded images, or ImageNet's where decoding them all would be needed."""
    return pixel_statistics(source.pixels) if isinstance(source, DecodedImages) else IMAGENET


def pixel_statistics(pixels: UInt8[np.ndarray, "n height width channels"]) -> Statistics:
    """Return mean and population std per channel of pixels / 255, to 4 decimals; the std of a constant channel is 1.

    Computed from exact counts of the 256 levels, so that no order of summation shows.
    """
    level = np.arange(256) / 255
    means, stds = [], []
    for channel in range(pixels.shape[3]):
        share = np.bincount(pixels[..., channel].ravel(), minlength=256) / pixels[..., channel].size
        mean = share @ level
        means.append(round(float(mean), 4))
        stds.append(round(float(np.sqrt(share @ (level - mean) ** 2)), 4) or 1.0)
    return Statistics(tuple(means), tuple(stds))


def in_blocks(count: int, work: Callable[[int], None], threads: int | None = None) -> None:
    """Call `work` for every position below `count`, on a few threads by default; raises the first failure in order."""
    threads = threads or min(16, os.cpu_count() or 1)
    step = max(1, min(_BLOCK, -(-count // threads)))

    def block(start: int) -> None:
        for position in range(start, min(start + step, count)):
            work(position)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(block, range(0, count, step)):
            pass


class _OtherSizeError(Exception):
    pass


def _decoded_alike(source: EncodedImages, size: tuple[int, int]) -> DecodedImages | None:
    pixels = np.empty((len(source), *size, 3), np.uint8)

    def decode(position: int) -> None:
        image = source.image(position)
        if image.shape != pixels.shape[1:]:
            raise _OtherSizeError
        pixels[position] = image

    try:
        in_blocks(len(source), decode, threads=1 if size[0] * size[1] < _SMALL else None)
    except _OtherSizeError:
        return None
    files = source.origins or Origins(tuple(map(str, source.payloads)), tuple(range(len(source))))
    return DecodedImages(pixels, files)


@contextmanager
def _reading(place: str) -> Iterator[None]:
    try:
        yield
    except (CorruptionError, MismatchError):
        raise
    except FileNotFoundError:
        raise NotFoundError(f"the image {place} has vanished since the data set was listed") from None
    except Image.DecompressionBombError as error:
        raise UnsafeError(f"{place} is refused: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise CorruptionError(f"{place} is not a readable image ({error}); replace or remove it") from None
