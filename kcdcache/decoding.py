"""One image out of a file that others may have made: its header is judged before anything is decoded."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, NotFoundError, UnsafeError

MOST_PIXELS = 64 * 10**6
"""of one image: decoded it takes 3 bytes for each"""
MOST_ENCODED_BYTES = 2**28
"""of one image's file"""
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""what is decoded, whatever a file is called; Pillow knows more, of which some start other programs"""
_ORIENTATION = 274
_TURNS = {
    1: (False, False, False), 2: (False, False, True), 3: (False, True, True), 4: (False, True, False),
    5: (True, False, False), 6: (True, False, True), 7: (True, True, True), 8: (True, True, False),
}  # fmt: skip
"""EXIF orientation -> whether axes are swapped, then rows and columns reversed"""


def rgb(content: bytes, place: str) -> UInt8[np.ndarray, "_ _ 3"]:
    """Return the RGB image that some bytes hold, upright as its EXIF entry says; `place` names them in messages.

    Grey, palette, CMYK and other colours become RGB as Pillow converts them; transparency is left out: what lies under
    it counts, as for torchvision's ImageFolder.

    Raises:
        CorruptionError: they cannot be decoded, or end too early.
        MismatchError: the image has more than 8 bits per channel, or is animated.
        UnsafeError: it has more pixels than any image of a training set.
    """
    with reading(place), opened(io.BytesIO(content), place) as image:
        if deep := _deep(image):
            raise MismatchError(f"{place} has more than 8 bits per channel ({deep}); convert it to 8")
        turn = _orientation(image)
        # by way of RGBA, because Pillow warns of a palette's transparency otherwise
        plain = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
        pixels = np.array(plain if plain.mode == "RGB" else plain.convert("RGB"))
    return _upright(pixels, turn)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the height and width that `rgb` gives an opened image; decodes nothing."""
    high, wide = image.height, image.width
    return (wide, high) if _TURNS[_orientation(image)][0] else (high, wide)


def opened(stream: io.BytesIO | io.BufferedReader, place: str) -> Image.Image:
    """Return an image whose header was read and found to ask for nothing unusual; nothing is decoded yet.

    Raises:
        UnsafeError, MismatchError: as for `rgb`. What Pillow raises is for `reading` to explain.
    """
    image = Image.open(stream, formats=FORMATS)
    if image.width * image.height > MOST_PIXELS:
        raise UnsafeError(f"{place} has {image.width} x {image.height} pixels, expected at most {MOST_PIXELS} in all")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO: a photograph, then smaller copies of it
        raise MismatchError(f"{place} is animated: it holds {frames} images, expected one; keep only the one to learn")
    return image


def whole(stream: io.BytesIO | io.BufferedReader, place: str) -> bytes:
    """Return an image file's bytes.

    Raises:
        UnsafeError: there are more than any image has.
    """
    if (size := stream.seek(0, os.SEEK_END)) > MOST_ENCODED_BYTES:
        raise UnsafeError(f"{place} has {size} bytes, expected at most {MOST_ENCODED_BYTES}; it is not read")
    stream.seek(0)
    return stream.read(size)


def _deep(image: Image.Image) -> str:
    """Return what says that a channel has more than 8 bits, of which Pillow would quietly take the upper 8; else ''."""
    modes = [image.mode, *(str(tile[3]) for tile in getattr(image, "tile", ()))]
    # a BMP of 16 bits a pixel (BGR;16) has 5 or 6 a channel
    return next((m for m in modes if m in ("I", "F") or (";16" in m and "BGR;16" not in m)), "")


def _orientation(image: Image.Image) -> int:
    """Return an opened image's EXIF orientation, 1 to 8; 1 where there is none or it is damaged.

    Read here, since Pillow's reader would decode a PNG for it and warns of what is damaged. Pillow turns TIFF itself.

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


def _upright(pixels: UInt8[np.ndarray, "_ _ 3"], orientation: int) -> UInt8[np.ndarray, "_ _ 3"]:
    swapped, down, across = _TURNS[orientation]
    turned = pixels.swapaxes(0, 1) if swapped else pixels
    return np.ascontiguousarray(turned[:: -1 if down else 1, :: -1 if across else 1])


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Make errors of the system and of Pillow name the image they are about.

    Raises:
        NotFoundError, UnsafeError, CorruptionError, KcdcacheError: instead of them.
    """
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
            raise KcdcacheError(f"{place} cannot be read ({error.strerror}); see to the file or its disk") from None
        raise CorruptionError(f"{place} is not a readable image ({error}); replace or remove it") from None
