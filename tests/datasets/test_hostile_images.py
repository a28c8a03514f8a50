"""Image sets of unknown origin: pictures and archives that ask for memory, never end, or are no plain files."""

import io
import zipfile
from contextlib import suppress

import numpy as np
import pytest
from damaging import endless
from PIL import Image

from kcdcache.datasets import datasets, images
from kcdcache.errors import CorruptionError, MismatchError, UnsafeError


def saved(image, **options):
    stream = io.BytesIO()
    image.save(stream, **{"format": "PNG"} | options)
    return stream.getvalue()


def class_folders(root, name="1.png"):
    """Two classes of one image each, in both splits; return where another image of the first may stand."""
    for split in ("train", "val"):
        for colour, label in enumerate(("ant", "bee")):
            (root / split / label).mkdir(parents=True)
            (root / split / label / "0.png").write_bytes(saved(Image.new("RGB", (8, 8), (9 * colour,) * 3)))
    return root / "train/ant" / name


def require_told(run, spec, folder, code, said):
    """A command that reads the data set ends so, in little memory and time."""
    done = run("fit", "--data", spec, "--model", "resnet8", "--out", folder / "run", "--dry-run")
    assert (done.code, said in done.output) == (code, True), done.output


# 144 million pixels take 18 MB as they come out of the file, 430 MB in RGB; a sparse file takes no room
@pytest.mark.parametrize(
    ("put", "code", "said"),
    [
        (lambda file: file.write_bytes(saved(Image.new("L", (8, 8), 200))), 0, "samples: 3"),
        (lambda file: file.write_bytes(saved(Image.new("1", (12_000,) * 2))), 8, "1.png has 12000 x 12000 pixels"),
        (lambda file: endless(file, "sparse"), 8, "1.png has 1099511627776 bytes"),
    ],
    ids=["a plain image", "too many pixels", "no end"],
)
def test_an_image_that_asks_for_too_much_is_refused_before_it_is_decoded(run, tmp_path, put, code, said):
    put(class_folders(tmp_path / "d"))
    require_told(run, f"folder:{tmp_path}/d", tmp_path, code, said)


def test_an_image_whose_size_alone_is_asked_for_is_held_to_the_bound(tmp_path):
    file = class_folders(tmp_path / "d", "-.png")  # the first of its class, which tells the size of all
    file.write_bytes(saved(Image.new("1", (8_000, 8_001))))
    with pytest.raises(UnsafeError, match=r"-\.png has 8000 x 8001 pixels, expected at most 64000000 in all"):
        datasets.load(f"folder:{tmp_path}/d")


def claiming(kind, width, height):
    """A small picture whose header claims another size; sources as for `images._deep`: ispe of AVIF; ihdr, SIZ."""
    content = saved(Image.new("RGB", (8, 9)), format=kind)
    pairs = [(b"ispe\0\0\0\0", (8, 9)), (b"ihdr", (9, 8)), (b"\xff\x51\0\x2f\0\0", (8, 9))]
    for mark, size in pairs:
        other = (height, width) if mark == b"ihdr" else (width, height)
        before, after = (b"".join(number.to_bytes(4) for number in numbers) for numbers in (size, other))
        content = content.replace(mark + before, mark + after)
    return content


# AVIF's decoder refuses above 2^28 pixels and 32768 a side by itself, JPEG 2000's has no bound but 32 bits a side
@pytest.mark.parametrize(
    ("kind", "width", "height", "code", "said"),
    [
        ("AVIF", 8, 9, 0, "samples: 3"),
        ("AVIF", 8_000, 8_001, 8, "1.png has 8000 x 8001 pixels, expected at most 64000000 in all"),
        ("AVIF", 2**31, 2**31, 3, "1.png is not a readable image"),
        ("JPEG2000", 8, 9, 0, "samples: 3"),
        ("JPEG2000", 8_000, 8_001, 8, "1.png has 8000 x 8001 pixels, expected at most 64000000 in all"),
        ("JPEG2000", 2**31 - 1, 2**31 - 1, 8, "1.png "),
        ("JPEG2000", 2**32 - 1, 2**32 - 1, 8, "1.png "),
    ],
)
def test_a_size_that_a_header_claims_is_refused_before_room_is_made_for_it(
    run, tmp_path, kind, width, height, code, said
):
    class_folders(tmp_path / "d").write_bytes(claiming(kind, width, height))
    require_told(run, f"folder:{tmp_path}/d", tmp_path, code, said)


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000"])
@pytest.mark.parametrize(("width", "height"), [(7_000, 9_000), (1, 1), (8, 0)])
def test_a_size_within_the_bound_that_the_pixels_do_not_have_is_refused_or_harmless(kind, width, height):
    with suppress(CorruptionError):
        assert images.rgb(claiming(kind, width, height), "1.png").shape == (height, width, 3)


@pytest.mark.parametrize("what", ["fifo", "/dev/zero", "link to a fifo"])
def test_a_pipe_or_device_among_images_is_not_waited_for(run, tmp_path, what):
    file = class_folders(tmp_path / "d")
    endless(tmp_path / "pipe", "fifo")
    endless(file, tmp_path / "pipe" if what.startswith("link") else what)
    require_told(run, f"folder:{tmp_path}/d", tmp_path, 8, f"{file} is a pipe or a device")


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF"])
def test_an_animated_image_is_refused(kind):
    frames = [Image.new("L", (8, 8), level) for level in (0, 90, 200)]
    content = saved(frames[0], format=kind, save_all=True, append_images=frames[1:])
    with pytest.raises(MismatchError, match=r"1\.png is animated: it holds 3 images, expected one"):
        images.rgb(content, "1.png")


def test_a_photograph_with_smaller_copies_is_no_animation():
    frames = [Image.new("RGB", (8, 8), (level,) * 3) for level in (40, 90)]
    content = saved(frames[0], format="MPO", save_all=True, append_images=frames[1:])
    assert images.rgb(content, "photo").mean() == 40


@pytest.mark.parametrize("kind", ["EPS", "PPM", "PCX"])
def test_a_file_of_a_format_that_no_training_set_needs_is_no_image(kind):
    with pytest.raises(CorruptionError, match=r"1\.png is not a readable image"):
        images.rgb(saved(Image.new("RGB", (8, 8)), format=kind), "1.png")


ARRAYS = {"images": np.zeros((4, 8, 8, 3), np.uint8), "labels": np.array([0, 1, 0, 1])}


def npz(file, method=zipfile.ZIP_DEFLATED, **changes):
    """An archive as numpy writes it, with some members' bytes replaced or added."""
    arrays = {f"{part}_{what}": value for part in ("train", "test") for what, value in ARRAYS.items()}
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, value in (arrays | changes).items():
            archive.writestr(f"{name}.npy", value if isinstance(value, bytes) else npy(value))
    return file


def npy(array, **header):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array) | header)
    return stream.getvalue() + array.tobytes()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_archives_of_plain_arrays_are_read_as_numpy_does(tmp_path, method):
    file = npz(tmp_path / "a.npz", method, classes=np.array(["ant", "bee"]), order=np.arange(6).reshape(2, 3).T)
    expected, found = np.load(file), datasets.read_npz(file)
    assert set(found) == set(expected.files)
    assert all(np.array_equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("images", "code", "said"),
    [
        (np.zeros((100, 1000, 1100, 3), np.uint8), 8, "claim to unpack to 330"),
        (npy(ARRAYS["images"], shape=(10**6, 8, 8, 3)), 3, "a.npz"),
        (npy(ARRAYS["images"], shape=(10**12, 8, 8, 3)), 8, "a.npz"),
        (npy(ARRAYS["images"], shape=(3, 8, 8, 3)), 4, "a.npz"),
        (npy(ARRAYS["images"], shape=(-4, 8, -8, 3)), 3, "a.npz"),
    ],
    ids=["zeros", "many", "very many", "fewer", "negative"],
)
def test_an_archive_that_unpacks_to_far_more_than_it_is_is_refused_in_little_memory(run, tmp_path, images, code, said):
    """As are arrays that claim another shape than their bytes have."""
    file = npz(tmp_path / "a.npz", train_images=images)
    assert file.stat().st_size < 2**20
    require_told(run, f"arrays:{file}", tmp_path, code, said)


def test_an_archive_whose_list_of_arrays_is_huge_is_refused_in_little_memory(run, tmp_path):
    file = npz(tmp_path / "a.npz")
    end = bytearray(file.read_bytes()[-22:])
    end[12:16], end[16:20] = (2**31).to_bytes(4, "little"), (0).to_bytes(4, "little")
    with open(file, "wb") as stream:
        stream.truncate(2**31)  # sparse: it takes no room
        stream.seek(2**31)
        stream.write(end)
    require_told(run, f"arrays:{file}", tmp_path, 8, f"its list of arrays takes {2**31} bytes")


def test_an_archive_packed_as_numpy_never_does_is_refused(tmp_path):
    with pytest.raises(UnsafeError, match=r"'train_images\.npy' is compressed in a way numpy never does"):
        datasets.read_npz(npz(tmp_path / "a.npz", zipfile.ZIP_LZMA))


@pytest.mark.parametrize("at", [0, 60, 300])
def test_a_damaged_archive_is_named(tmp_path, at):
    file = npz(tmp_path / "a.npz")
    content = bytearray(file.read_bytes())
    content[at] ^= 255
    file.write_bytes(content)
    with pytest.raises(CorruptionError, match=r"a\.npz is not a readable \.npz file"):
        datasets.read_npz(file)


@pytest.mark.parametrize("what", ["fifo", "/dev/zero"])
def test_an_archive_that_is_a_pipe_or_device_is_not_waited_for(run, tmp_path, what):
    endless(tmp_path / "a.npz", what)
    require_told(run, f"arrays:{tmp_path / 'a.npz'}", tmp_path, 8, "is a pipe or a device")
