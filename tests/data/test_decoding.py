"""Files of every kind that class folders of photographs hold: converted as documented, or refused by name."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from kcdcache.data import datasets, images
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


@pytest.mark.parametrize("order", ["big", "little"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_as_pillow_turns_them(orientation, kind, order):
    content = saved(Image.fromarray(COLOURS), kind, exif=turned_by(orientation, order))
    with Image.open(io.BytesIO(content)) as image:
        expected = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    found = images.rgb(content, "a.jpg")
    assert np.array_equal(found, expected)
    assert found.flags.c_contiguous
    assert images.EncodedImages([content]).size(0) == expected.shape[:2]


def test_a_tiff_is_turned_once():
    entry = Image.Exif()
    entry[274] = 6
    content = saved(Image.fromarray(COLOURS), "TIFF", exif=entry)
    assert np.array_equal(images.rgb(content, "a.tif"), np.rot90(COLOURS, -1))
    assert images.EncodedImages([content]).size(0) == (WIDE, HIGH)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", turned_by(6)[:-20], turned_by(9), turned_by(0), b"Exif\0\0MM" + b"\xff" * 9]
)
def test_a_damaged_or_unknown_orientation_leaves_the_picture_as_it_is(exif):
    content = saved(Image.fromarray(COLOURS), "WEBP", lossless=True, exif=exif)
    assert np.array_equal(images.rgb(content, "a.webp"), COLOURS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_becomes_three_equal_channels(kind):
    content = saved(Image.fromarray(SMOOTH[..., 0]), kind)
    found = images.rgb(content, "a")
    assert (found == found[..., :1]).all()
    assert np.abs(found[..., 0].astype(int) - SMOOTH[..., 0]).max() <= 3


def test_cmyk_jpegs_become_rgb_by_full_inks():
    inks = np.concatenate([255 - SMOOTH, np.zeros((HIGH, WIDE, 1), np.uint8)], -1)  # no black: RGB is 255 - CMY
    found = images.rgb(saved(as_cmyk(inks), "JPEG", quality=95), "a.jpg")
    assert np.abs(found.astype(int) - SMOOTH).max() <= 8


def as_cmyk(inks):
    return Image.frombytes("CMYK", (WIDE, HIGH), inks.tobytes())


def palette_picture():
    image = Image.fromarray(GREY % 4).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    return image


@pytest.mark.parametrize("transparency", [None, 2, b"\x00\x80\xff\x10"])
def test_a_palettes_colours_count_whatever_is_transparent(transparency):
    image = palette_picture()
    options = {} if transparency is None else {"transparency": transparency}
    expected = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [100, 110, 120]], np.uint8)[np.array(image)]
    assert np.array_equal(images.rgb(saved(image, "PNG", **options), "a.png"), expected)


@pytest.mark.parametrize("colours", [COLOURS, GREY])
def test_transparency_is_left_out(colours):
    alpha = np.arange(HIGH * WIDE, dtype=np.uint8).reshape(HIGH, WIDE, 1)
    content = saved(Image.fromarray(np.concatenate([colours.reshape(HIGH, WIDE, -1), alpha], -1)), "PNG")
    expected = colours if colours.ndim == 3 else np.repeat(GREY[..., None], 3, -1)
    assert np.array_equal(images.rgb(content, "a.png"), expected)


def test_black_and_white_becomes_0_and_255():
    content = saved(Image.fromarray(GREY > 100), "PNG")
    assert np.array_equal(images.rgb(content, "a.png"), np.repeat((GREY > 100)[..., None] * np.uint8(255), 3, -1))


DEEP = {
    "grey PNG": saved(Image.fromarray(GREY.astype(np.uint16) * 200), "PNG"),
    "grey TIFF": saved(Image.fromarray(GREY.astype(np.uint16) * 200), "TIFF"),
    "TIFF of integers": saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
    "TIFF of floats": saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "colour PNG": deep_png(2),
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


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_file_that_ends_too_early_is_refused_by_name(tmp_path, kind):
    for part in ("train", "val"):
        for label, size in (("ant", 40), ("bee", 50)):
            (tmp_path / part / label).mkdir(parents=True)
            pixels = np.random.default_rng(size).integers(0, 256, (size, 40, 3), dtype=np.uint8)
            (tmp_path / part / label / "1.jpg").write_bytes(saved(Image.fromarray(pixels), kind))
    loaded = datasets.load(f"folder:{tmp_path}")
    file = tmp_path / "train/bee/1.jpg"
    file.write_bytes(file.read_bytes()[: len(file.read_bytes()) // 2])
    assert loaded.train.images(np.array([0]))[0].shape == (40, 40, 3)
    with pytest.raises(CorruptionError, match=r"train/bee/1\.jpg is not a readable image \(.*; replace or remove it"):
        loaded.train.images(np.array([0, 1]))
