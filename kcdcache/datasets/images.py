"""Splits of labelled images, in memory or decoded on demand; every file is checked before it is decoded."""

import hashlib
import io
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8, UInt64
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose

from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, NotFoundError, UnsafeError
from kcdcache.files.atomic import open_plain, sha256_bytes
from kcdcache.settings import STATISTICS

MOST_PIXELS = 64 * 10**6
"""maximum size of a decoded image, at 3 bytes per pixel"""
MOST_ENCODED_BYTES = 2**28
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")
"""formats that are decoded, whatever the file name; some others of Pillow start other programs"""
_MARKS = (
    (4, b"ftypavi", "AVIF"), (0, b"BM", "BMP"), (0, b"GIF8", "GIF"), (0, b"\xff\xd8", "JPEG"), (0, b"\x89PNG", "PNG"),
    (0, b"\0\0\0\x0cjP", "JPEG2000"), (0, b"\xff\x4f\xff\x51", "JPEG2000"), (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"), (8, b"WEBP", "WEBP"),
    (4, b"ftyphe", "HEIC"), (4, b"ftypmif1", "HEIC"), (0, b"\0\0\0\x0cJXL ", "JPEG XL"), (0, b"\xff\n", "JPEG XL"),
    (0, b"8BPS", "PSD"), (0, b"%!PS", "EPS"), (0, b"%PDF", "PDF"), (0, b"\n\5\1", "PCX"), (128, b"DICM", "DICOM"),
    (0, b"\0\0\1\0", "ICO"), (0, b"P5", "PGM"), (0, b"P6", "PPM"), (0, b"\x93NUMPY", "a numpy array"),
    (0, b"<", "HTML or SVG"), (0, b"version https://git-lfs", "a pointer of Git LFS (see `git lfs pull`)"),
)  # fmt: skip
"""(offset, bytes, name) of formats: those that are decoded, and what is found in place of images"""
_CODESTREAM = b"\xff\x4f\xff\x51"
"""beginning of a JPEG 2000 codestream, alone or in a box"""
_ORIENTATION = 274
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip
"""transpose by EXIF orientation; 5 and above swap height and width"""
DECODED_BYTES = 4 << 30
"""maximum size of images that are decoded once and kept in memory"""
ImageList = list[UInt8[np.ndarray, "_ _ _"]]
Check = Callable[[int, bytes], None]
"""function of position and content that raises if they do not match"""
_BLOCK = 64  # images per task: a future per image costs more than decoding a small one
_SMALL = 64 * 64  # for images of fewer pixels, threads are 1.5 times slower because of the interpreter lock


class Statistics(NamedTuple):
    """Mean and standard deviation per channel of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Statistics(*STATISTICS["imagenet"])


class Origins(NamedTuple):
    """Files that images came from, with the number of the first image of each."""

    files: tuple[str, ...]
    starts: tuple[int, ...] = (0,)
    rows: Int64[np.ndarray, " n"] | None = None
    """number of the image at each position, if only some images were taken"""

    def place(self, position: int) -> str:
        """Return file and row of an image, for messages."""
        number = position if self.rows is None else int(self.rows[position])
        file = bisect_right(self.starts, number) - 1
        return f"{self.files[file]} row {number - self.starts[file]}"

    def taken(self, rows: Int64[np.ndarray, " kept"]) -> "Origins":
        """Return the origins of the images at the given positions."""
        return self._replace(rows=rows if self.rows is None else self.rows[rows])


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

    def taken(self, rows: Int64[np.ndarray, " kept"]) -> "DecodedImages":
        """Return the images at the given positions."""
        return replace(self, pixels=self.pixels[rows], origins=self.origins.taken(rows))

    def images(self, index: Int64[np.ndarray, " batch"]) -> UInt8[np.ndarray, "batch height width channels"]:
        """Return a new array of the images at the given positions."""
        return np.take(self.pixels, index, axis=0)

    def place(self, position: int) -> str:
        """Return file and row of an image, for messages."""
        return self.origins.place(position)

    def content(self, position: int) -> bytes:
        """Return the bytes that identify an image: shape as three 64-bit integers, then pixels."""
        image = self.pixels[position]
        return np.array(image.shape, "<i8").tobytes() + image.tobytes()


class OtherSizeError(MismatchError):
    """An image does not have the size that all images should have."""


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Image files, or their bytes, decoded to RGB on demand."""

    payloads: Sequence[str | bytes | None]
    """per image its path or encoded bytes; None if they are missing"""
    origins: Origins | None = None
    """origins of bytes; None for paths"""
    image_size: tuple[int, int] | None = None
    """height and width, if known to be the same for all images"""

    def __len__(self) -> int:
        return len(self.payloads)

    def taken(self, rows: Int64[np.ndarray, " kept"]) -> "EncodedImages":
        """Return the images at the given positions."""
        payloads = [self.payloads[row] for row in rows.tolist()]
        return replace(self, payloads=payloads, origins=self.origins and self.origins.taken(rows))

    def images(
        self, index: Int64[np.ndarray, " batch"], check: Check | None = None, threads: int | None = None
    ) -> UInt8[np.ndarray, "batch height width 3"] | ImageList:
        """Return the images at the given positions as an array if `image_size` is known, else as a list.

        `check` is called with the bytes of each image before decoding; `threads` as for `in_blocks`.
        """
        size, positions = self.image_size, index.tolist()
        found: Any = [None] * len(positions) if size is None else np.empty((len(positions), *size, 3), np.uint8)

        def fill(slot: int) -> None:
            found[slot] = self.image(positions[slot], check)

        in_blocks(len(positions), fill, threads)
        return found

    def place(self, position: int) -> str:
        """Return the file of an image, and its row if the file has several, for messages."""
        return self.origins.place(position) if self.origins else str(self.payloads[position])

    def content(self, position: int) -> bytes:
        """Return the bytes of an image file.

        Raises:
            NotFoundError: the file no longer exists.
            CorruptionError: a parquet row has no bytes.
            UnsafeError: the file is too large, or not a plain file.
            KcdcacheError: the system cannot read the file.
        """
        with reading(self.place(position)), self._stream(position) as stream:
            return stream.read(MOST_ENCODED_BYTES)

    def image(self, position: int, check: Check | None = None) -> UInt8[np.ndarray, "_ _ 3"]:
        """Return one image decoded to RGB, after `check`; raises OtherSizeError unless it has the known size."""
        content = self.content(position)
        if check is not None:
            check(position, content)
        image = self.decoded(position, content)
        if self.image_size not in (None, image.shape[:2]):
            place, found = self.place(position), image.shape[:2]
            raise OtherSizeError(f"{place} is {found} pixels high and wide, but {self.image_size} when it was listed")
        return image

    def decoded(self, position: int, content: bytes) -> UInt8[np.ndarray, "_ _ 3"]:
        """Return the decoded content of the image at a position."""
        return rgb(content, self.place(position))

    def size(self, position: int) -> tuple[int, int]:
        """Return height and width of an upright image from its header."""
        place = self.place(position)
        with reading(place), self._stream(position) as stream, opened(stream, place) as image:
            size = image.height, image.width
            return size[::-1] if _orientation(image) >= 5 else size

    def _stream(self, position: int) -> io.BytesIO | io.BufferedReader:
        payload, place = self.payloads[position], self.place(position)
        if payload is None:
            raise CorruptionError(f"{place} holds no image bytes")
        stream = io.BytesIO(payload) if isinstance(payload, bytes) else open_plain(Path(payload))
        if (size := stream.seek(0, os.SEEK_END)) > MOST_ENCODED_BYTES:
            stream.close()
            raise UnsafeError(f"{place} has {size} bytes, expected at most {MOST_ENCODED_BYTES}; it is not read")
        stream.seek(0)
        return stream


class Known(NamedTuple):
    """Expected digests of all samples and their source."""

    digests: UInt64[np.ndarray, " n"]
    where: str
    """source, as in the message `it should be X in the store at Y`"""


@dataclass(eq=False)
class Split:
    """One split of a data set: labelled images in a fixed order.

    Once digests are known from `digests` or `expect`, images decoded on demand are checked each time.
    """

    labels: Int64[np.ndarray, " n"]
    """class per image, in [0, classes)"""
    source: DecodedImages | EncodedImages
    clean_labels: Int64[np.ndarray, " n"] | None = None
    """labels of a corrupted split before label noise; only for reports"""
    _known: Known | None = field(default=None, init=False, repr=False)

    @property
    def on_demand(self) -> bool:
        """Whether images are decoded on demand."""
        return isinstance(self.source, EncodedImages)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width in pixels, or None if they differ."""
        return self.source.image_size

    def images(
        self, index: Int64[np.ndarray, " batch"], threads: int | None = None
    ) -> UInt8[np.ndarray, "batch height width channels"] | ImageList:
        """Return the images at the given positions as a new array, or as a list if sizes differ.

        `threads` decode images on demand, see `in_blocks`.

        Raises:
            CorruptionError: an image cannot be decoded; names file and row.
            MismatchError: a position is outside the split, or an image does not have its known digest.
            NotFoundError: an image file no longer exists.
        """
        outside = index[(index < 0) | (index >= len(self))]
        if outside.size:
            raise MismatchError(f"index {outside[0]} is outside this split, which has {len(self)} samples")
        if not isinstance(self.source, EncodedImages):
            return self.source.images(index)
        check = None if self._known is None else partial(self._require, self._known)
        return self.source.images(index, check, threads)

    def digest(self) -> str:
        """Return the SHA-256 over `digests`."""
        return sha256_bytes(self.digests().astype("<u8").tobytes())

    def digests(self) -> UInt64[np.ndarray, " n"]:
        """Return the digest of each sample, read from all images once unless given by `expect`."""
        if self._known is None:
            out = np.empty(len(self), np.uint64)

            def write(position: int) -> None:
                out[position] = sample_digest(self.source.content(position), self.labels[position])

            in_blocks(len(self), write, threads=None if self.on_demand else 1)
            self._known = Known(out, "as this process first read it")
        return self._known.digests

    def expect(self, digests: UInt64[np.ndarray, " n"], where: str) -> None:
        """Expect these digests from now on; `where` is their source in messages, as in "in the store at X".

        Decoded images are compared now, images decoded on demand when they are decoded; known digests are compared now.

        Raises:
            MismatchError: a sample has another digest; names the first one.
            CorruptionError: its image cannot be decoded.
        """
        known = digests if self.on_demand and self._known is None else self.digests()
        expected = Known(digests, where)
        for position in np.flatnonzero(known != digests)[:1].tolist():
            self._require(expected, position, self.source.content(position))
        self._known = expected

    def _require(self, known: Known, position: int, content: bytes) -> None:
        found, expected = sample_digest(content, self.labels[position]), int(known.digests[position])
        if found == expected:
            return
        differs = (
            f"sample {position} differs (image, label or order): {self.source.place(position)} with label "
            f"{self.labels[position]} has digest {found:016x}, it should be {expected:016x} {known.where}"
        )
        if isinstance(self.source, EncodedImages):
            try:
                self.source.decoded(position, content)
            except CorruptionError as error:
                raise CorruptionError(f"{differs}; it is damaged: {error}") from None
        raise MismatchError(
            f"{differs}; put back the image that was there, or precompute a new store from the data as it is now"
        )


def decode_once(source: EncodedImages, limit_bytes: int = DECODED_BYTES) -> DecodedImages | EncodedImages:
    """Return the images decoded if they have one size and fit the limit, else encoded, with `image_size` if known."""
    size = source.size(0)
    alike = replace(source, image_size=size)
    if len(source) * size[0] * size[1] * 3 > limit_bytes:
        return alike if all(source.size(position) == size for position in range(1, len(source))) else source
    try:
        pixels = alike.images(np.arange(len(source)), threads=1 if size[0] * size[1] < _SMALL else None)
    except OtherSizeError:
        return source
    assert isinstance(pixels, np.ndarray)
    return DecodedImages(pixels, source.origins or Origins(tuple(map(str, source.payloads)), tuple(range(len(source)))))


def sample_digest(content: bytes, label: np.int64) -> int:
    """Return the first 8 bytes, little endian, of the SHA-256 over an image's content and 64-bit label."""
    state = hashlib.sha256(content)
    state.update(label.astype("<i8").tobytes())
    return int.from_bytes(state.digest()[:8], "little")


def pixel_statistics(pixels: UInt8[np.ndarray, "n height width channels"]) -> Statistics:
    """Return mean and population std per channel of pixels / 255, to 4 decimals; the std of a constant channel is 1.

    Computed from counts of the 256 levels, so that the order of summation has no effect.
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
    """Call `work` for each position below `count`, by default on up to 16 threads; raises the first error in order."""
    threads = threads or min(16, os.cpu_count() or 1)
    if threads == 1:
        for position in range(count):
            work(position)
        return
    step = max(1, min(_BLOCK, -(-count // threads)))

    def block(start: int) -> None:
        for position in range(start, min(start + step, count)):
            work(position)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(block, range(0, count, step)):
            pass


def rgb(content: bytes, place: str) -> UInt8[np.ndarray, "_ _ 3"]:
    """Decode an image to RGB, upright by its EXIF entry; `place` is its name in messages.

    Other colour modes are converted by Pillow; transparency is ignored, as in torchvision's ImageFolder.

    Raises:
        CorruptionError: it cannot be decoded, or is truncated.
        MismatchError: it has more than 8 bits per channel, or is animated.
        UnsafeError: it has too many pixels.
    """
    with reading(place), opened(io.BytesIO(content), place) as image:
        if deep := _deep(image, content):
            raise MismatchError(f"{place} has more than 8 bits per channel ({deep}); convert it to 8")
        if image.format == "JPEG2000" and not _ended(content):  # Pillow would leave tiles that are missing grey
            raise ValueError("image file is truncated")
        turn = _TURNS.get(_orientation(image))
        # via RGBA, because Pillow warns about the transparency of a palette otherwise
        plain = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
        plain = plain if plain.mode == "RGB" else plain.convert("RGB")
        return np.array(plain if turn is None else plain.transpose(turn))


def opened(stream: io.BytesIO | io.BufferedReader, place: str) -> Image.Image:
    """Open an image and check its size and number of frames, without decoding it; errors of Pillow pass through."""
    try:
        image = Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:  # its text has a memory address
        stream.seek(0)
        raise ValueError(_kind(stream.read(132))) from None
    if image.width * image.height > MOST_PIXELS:
        raise UnsafeError(f"{place} has {image.width} x {image.height} pixels, expected at most {MOST_PIXELS} in all")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO: a photograph with smaller copies
        raise MismatchError(f"{place} is animated: it holds {frames} images, expected one; keep only the one to learn")
    return image


def _kind(head: bytes) -> str:
    """Describe a file that Pillow does not open, from its first bytes."""
    name = next((name for offset, mark, name in _MARKS if head.startswith(mark, offset)), "")
    if name in FORMATS:
        return f"it begins as {name} does, but is damaged, or Pillow was built without {name}"
    return f"it is {name or ('of no format we know' if head else 'empty')}, read are {', '.join(FORMATS)}"


def _deep(image: Image.Image, content: bytes) -> str:
    """Return the mode if a channel has more than 8 bits, of which Pillow would keep the upper 8, else ''.

    Source: AV1-ISOBMFF 1.2, section 2.3 (av1C); ISO/IEC 15444-1, A.5.1 (SIZ).
    """
    if image.format == "AVIF":
        at = content.find(b"av1C")
        return "AVIF of 10 or 12 bits" if content[at + 6] & 0x40 else ""
    if image.format == "JPEG2000":
        at = content.find(_CODESTREAM) + 42
        depths = [(depth & 0x7F) + 1 for depth in content[at : at + 3 * content[at - 1] : 3]]
        return f"JPEG 2000 of {max(depths)} bits" if max(depths, default=0) > 8 else ""
    modes = [image.mode, *(str(tile[3]) for tile in getattr(image, "tile", ()))]
    # a BMP of 16 bits per pixel (BGR;16) has 5 or 6 per channel
    return next((m for m in modes if m in ("I", "F") or (";16" in m and "BGR;16" not in m)), "")


def _ended(content: bytes) -> bool:
    """Whether a JPEG 2000 codestream has its end marker. Source: ISO/IEC 15444-1, A.4.4 (EOC), I.4 (box lengths)."""
    start = content.find(_CODESTREAM)
    size = int.from_bytes(content[start - 8 : start - 4]) if start > 0 else 0
    end = start - 8 + size if size else len(content)
    return content[end - 2 : end] == b"\xff\xd9"


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 to 8; 1 if it is missing or damaged.

    Pillow's own reader would decode a PNG and warn about damage; TIFF is transposed by Pillow.

    Source: CIPA DC-008 (Exif 2.3), 4.6.4 and 4.6.5, tag 274; TIFF 6.0, section 2.
    """
    exif = image.info.get("exif", b"") if image.format != "TIFF" else b""
    body = exif[6:] if exif.startswith(b"Exif\0\0") else exif
    order: Literal["little", "big"] = "little" if body[:2] == b"II" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(body[at : at + size], order)

    first = number(4, 4)
    for entry in range(first + 2, min(first + 2 + 12 * number(first, 2), len(body) - 11), 12):
        if number(entry, 2) == _ORIENTATION:
            found = number(entry + 8, 2)
            return found if found in _TURNS else 1
    return 1


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Convert errors of the system and of Pillow to a KcdcacheError that names the image."""
    try:
        yield
    except FileNotFoundError:
        raise NotFoundError(
            f"the image {place} has vanished since the data set was listed; put it back, or run the command again"
        ) from None
    except KcdcacheError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnsafeError(f"{place} is refused: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's; what Pillow cannot decode has none
            raise KcdcacheError(f"{place} cannot be read ({error.strerror}); check the file or its disk") from None
        raise CorruptionError(f"{place} is not a readable image ({error}); replace or remove it") from None
