"""Files of every kind that class folders of photographs hold: converted as documented, or refused by name."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from kcdcache.datasets import images
from kcdcache.errors import CorruptionError, MismatchError

HIGH, WIDE = 9, 6
COLOURS = np.random.default_rng(0).integers(0, 256, (HIGH, WIDE, 3), dtype=np.uint8)
GREY = COLOURS[..., 0]
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[0:240:9j, 0:240:6j], 120.0), -1).astype(np.uint8)
"""colours that JPEG keeps nearly as they are"""


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned_by(orientation, order="big"):
    """An EXIF block with one other entry before the orientation."""
    mark = {"big": ">", "little": "<"}[order]
    head = (b"MM" if order == "big" else b"II") + struct.pack(f"{mark}HI", 42, 8)
    entries = struct.pack(f"{mark}HHIHH", 259, 3, 1, 6, 0) + struct.pack(f"{mark}HHIHH", 274, 3, 1, orientation, 0)
    return b"Exif\0\0" + head + struct.pack(f"{mark}H", 2) + entries + bytes(4)


def deep_png(mode):
    """A PNG of 16 bits a channel, which Pillow cannot write; `mode` is 2 for colours, 4 for grey with alpha."""
    row = b"\0" + bytes(2 * WIDE * {2: 3, 4: 2}[mode])
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", WIDE, HIGH, 16, mode, 0, 0, 0)),
              (b"IDAT", zlib.compress(row * HIGH)), (b"IEND", b""))  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_as_pillow_turns_them(orientation, kind):
    entry = Image.Exif()
    entry[274] = orientation
    exifs = [entry] if kind == "TIFF" else [turned_by(orientation, order) for order in ("big", "little")]
    for content in (saved(Image.fromarray(COLOURS), kind, exif=exif) for exif in exifs):
        with Image.open(io.BytesIO(content)) as image:
            expected = np.array(ImageOps.exif_transpose(image).convert("RGB"))
        found = images.rgb(content, "a.jpg")
        assert np.array_equal(found, expected)
        assert found.flags.c_contiguous
        assert images.EncodedImages([content]).size(0) == expected.shape[:2]


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", turned_by(6)[:-20], turned_by(9), turned_by(0), b"Exif\0\0MM" + b"\xff" * 9]
)
def test_a_damaged_or_unknown_orientation_leaves_the_picture_as_it_is(exif):
    content = saved(Image.fromarray(COLOURS), "WEBP", lossless=True, exif=exif)
    assert np.array_equal(images.rgb(content, "a.webp"), COLOURS)


ALPHA = np.arange(HIGH * WIDE, dtype=np.uint8).reshape(HIGH, WIDE, 1)
PALETTE = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [100, 110, 120]], np.uint8)


def palette_picture(**options):
    image = Image.fromarray(GREY % 4).convert("P")
    image.putpalette(PALETTE.ravel().tolist())
    return saved(image, "PNG", **options)


def of_arrays(*channels):
    return saved(Image.fromarray(np.concatenate(channels, -1)), "PNG")


CONVERTED = {
    "grey": (saved(Image.fromarray(GREY), "PNG"), np.repeat(GREY[..., None], 3, -1)),
    "a grey JPEG": (saved(Image.fromarray(SMOOTH[..., 0]), "JPEG"), np.repeat(SMOOTH[..., :1], 3, -1)),
    # no black: RGB is 255 - CMY
    "CMYK": (saved(Image.frombytes("CMYK", (WIDE, HIGH), np.concatenate([255 - SMOOTH, 0 * ALPHA], -1).tobytes()),
                   "JPEG", quality=95), SMOOTH),
    "a palette": (palette_picture(), PALETTE[GREY % 4]),
    "a palette with a transparent colour": (palette_picture(transparency=2), PALETTE[GREY % 4]),
    "a palette with alpha": (palette_picture(transparency=b"\x00\x80\xff\x10"), PALETTE[GREY % 4]),
    "transparency": (of_arrays(COLOURS, ALPHA), COLOURS),
    "transparent grey": (of_arrays(GREY[..., None], ALPHA), np.repeat(GREY[..., None], 3, -1)),
    "JPEG 2000": (saved(Image.fromarray(COLOURS), "JPEG2000"), COLOURS),
    "a codestream of JPEG 2000": (saved(Image.fromarray(COLOURS), "JPEG2000", no_jp2=True), COLOURS),
    "transparent JPEG 2000": (saved(Image.fromarray(np.concatenate([COLOURS, ALPHA], -1)), "JPEG2000"), COLOURS),
    "grey JPEG 2000": (saved(Image.fromarray(GREY), "JPEG2000"), np.repeat(GREY[..., None], 3, -1)),
    "AVIF": (saved(Image.fromarray(SMOOTH), "AVIF", quality=95, subsampling="4:4:4"), SMOOTH),
    "transparent AVIF": (saved(Image.fromarray(np.concatenate([SMOOTH, ALPHA], -1)), "AVIF", quality=95,
                               subsampling="4:4:4"), SMOOTH),
    "black and white": (saved(Image.fromarray(GREY > 100), "PNG"), np.repeat((GREY > 100)[..., None] * 255, 3, -1)),
}  # fmt: skip
"""what files hold -> the RGB image they become, JPEGs about"""


@pytest.mark.parametrize("kind", CONVERTED)
def test_every_kind_of_colour_becomes_rgb(kind):
    content, expected = CONVERTED[kind]
    off = np.abs(images.rgb(content, "a").astype(int) - expected).max()
    assert off <= (8 if content[:2] == b"\xff\xd8" or b"ftypavif" in content[:16] else 0)


def deepened(kind, **changes):
    """An image of a format that Pillow writes with 8 bits only, which says that it has more."""
    content = saved(Image.fromarray(COLOURS), kind)
    for before, after in changes.values():
        assert before in content
        content = content.replace(before, after)
    return content


DEEP = {
    "grey PNG": saved(Image.fromarray(GREY.astype(np.uint16) * 200), "PNG"),
    "grey TIFF": saved(Image.fromarray(GREY.astype(np.uint16) * 200), "TIFF"),
    "TIFF of integers": saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
    "TIFF of floats": saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "colour PNG": deep_png(2),
    "grey JPEG 2000": saved(Image.fromarray(GREY.astype(np.uint16) * 200), "JPEG2000"),
    "colour JPEG 2000": deepened("JPEG2000", siz=(b"\x07\x01\x01", b"\x0b\x01\x01")),
    "one deep channel of JPEG 2000": deepened("JPEG2000", siz=(b"\x07\x01\x01\xff", b"\x0f\x01\x01\xff")),
    "AVIF of 10 bits": deepened(
        "AVIF", av1c=(b"av1C\x81\x00\x0c", b"av1C\x81\x00\x4c"), pixi=(b"\3\x08\x08\x08", b"\3\x0a\x0a\x0a")
    ),
    "grey PNG with alpha": deep_png(4),
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_8_bits_a_channel_are_refused_by_name(tmp_path, kind):
    file = tmp_path / "deep.png"
    file.write_bytes(DEEP[kind])
    with pytest.raises(MismatchError, match=r"deep\.png has more than 8 bits per channel .*; convert it to 8"):
        images.EncodedImages([str(file)]).image(0)


def test_a_bitmap_of_16_bits_a_pixel_is_not_deep():
    header = struct.pack("<IiiHHIIiiII", 40, 1, 1, 1, 16, 0, 4, 0, 0, 0, 0)
    content = b"BM" + struct.pack("<IHHI", 58, 0, 0, 54) + header + struct.pack("<HH", 0x7FFF, 0)
    assert images.rgb(content, "a.bmp").tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("options", [{}, {"no_jp2": True}, {"tile_size": (16, 16)}])
def test_a_jpeg_2000_that_ends_too_early_anywhere_is_refused(options):
    """Also between tiles, where its decoder would leave the others grey; boxes may follow the picture."""
    content = saved(Image.fromarray(np.resize(COLOURS, (40, 40, 3))), "JPEG2000", **options)
    for length in range(150, len(content)):
        with pytest.raises(CorruptionError, match=r"a\.jp2 is not a readable image"):
            images.rgb(content[:length], "a.jp2")
    further = b"" if options.get("no_jp2") else b"\0\0\0\x0cxml <a/>"
    assert np.array_equal(images.rgb(content + further, "a.jp2"), np.resize(COLOURS, (40, 40, 3)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "AVIF", "JPEG2000"])
def test_a_file_that_ends_too_early_is_refused_by_name(kind):
    content = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)), kind)
    with pytest.raises(CorruptionError, match=r"bee/1\.jpg is not a readable image \(.*; replace or remove it"):
        images.rgb(content[: len(content) // 2], "bee/1.jpg")
