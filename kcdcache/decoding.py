"""One image out of a file that others may have made: its header is judged before anything is decoded."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

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


def rgb(content: bytes, place: str) -> UInt8[np.ndarray, "_ _ 3"]:
    """Return the RGB image that some bytes hold; `place` names them in messages.

    Raises:
        CorruptionError: they cannot be decoded.
        MismatchError: the image has more than 8 bits per channel, or is animated.
        UnsafeError: it has more pixels than any image of a training set.
    """
    with reading(place), opened(io.BytesIO(content), place) as image:
        if image.mode.startswith(("I", "F")):
            raise MismatchError(f"{place} has more than 8 bits per channel (mode {image.mode}); convert it to 8")
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


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
