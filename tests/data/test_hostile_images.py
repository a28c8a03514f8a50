"""Image sets of unknown origin: pictures and archives that ask for memory, never end, or are no plain files."""

import io
import os
import zipfile

import numpy as np
import pytest
from damaging import endless
from PIL import Image

from kcdcache.data import datasets, images
from kcdcache.errors import CorruptionError, MismatchError, UnsafeError

SIDE = 12_000
"""144 million pixels: 18 MB as they come out of the file, 430 MB in RGB"""


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


def planned(run, spec, out):
    """What a command that reads the data set says of it."""
    return run("fit", "--data", spec, "--model", "resnet8", "--out", out / "run", "--dry-run")


def test_folders_of_plain_images_are_read(run, tmp_path):
    class_folders(tmp_path / "d").write_bytes(saved(Image.new("L", (8, 8), 200)))
    done = planned(run, f"folder:{tmp_path}/d", tmp_path)
    assert (done.code, "samples: 3" in done.output) == (0, True), done.output


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(run, tmp_path):
    file = class_folders(tmp_path / "d")
    file.write_bytes(saved(Image.new("1", (SIDE, SIDE))))
    assert file.stat().st_size < 2**20
    done = planned(run, f"folder:{tmp_path}/d", tmp_path)
    assert (done.code, f"{file} has {SIDE} x {SIDE} pixels" in done.output) == (8, True), done.output


def test_an_image_whose_size_alone_is_asked_for_is_held_to_the_bound(tmp_path):
    file = class_folders(tmp_path / "d", "-.png")  # the first of its class, which tells the size of all
    file.write_bytes(saved(Image.new("1", (8_000, 8_001))))
    with pytest.raises(UnsafeError, match=r"-\.png has 8000 x 8001 pixels, expected at most 64000000 in all"):
        datasets.load(f"folder:{tmp_path}/d")


def test_an_image_file_that_never_ends_is_refused(run, tmp_path):
    file = class_folders(tmp_path / "d")
    file.write_bytes(saved(Image.new("RGB", (8, 8))))
    os.truncate(file, 2**40)  # sparse: it takes no room
    done = planned(run, f"folder:{tmp_path}/d", tmp_path)
    assert (done.code, "1.png has 1099511627776 bytes" in done.output) == (8, True), done.output


@pytest.mark.parametrize("what", ["fifo", "/dev/zero", "link to a fifo"])
def test_a_pipe_or_device_among_images_is_not_waited_for(run, tmp_path, what):
    file = class_folders(tmp_path / "d")
    endless(tmp_path / "pipe", "fifo")
    endless(file, tmp_path / "pipe" if what.startswith("link") else what)
    done = planned(run, f"folder:{tmp_path}/d", tmp_path)
    assert (done.code, f"{file} is a pipe or a device" in done.output) == (8, True), done.output


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF"])
def test_an_animated_image_is_refused(tmp_path, kind):
    frames = [Image.new("L", (8, 8), level) for level in (0, 90, 200)]
    class_folders(tmp_path / "d").write_bytes(saved(frames[0], format=kind, save_all=True, append_images=frames[1:]))
    with pytest.raises(MismatchError, match=r"1\.png is animated: it holds 3 images, expected one"):
        datasets.load(f"folder:{tmp_path}/d")


def test_a_photograph_with_smaller_copies_is_no_animation():
    frames = [Image.new("RGB", (8, 8), (level,) * 3) for level in (40, 90)]
    content = saved(frames[0], format="MPO", save_all=True, append_images=frames[1:])
    assert images.rgb(content, "photo").mean() == 40


@pytest.mark.parametrize("kind", ["EPS", "PPM", "PCX"])
def test_a_file_of_a_format_that_no_training_set_needs_is_no_image(tmp_path, kind):
    class_folders(tmp_path / "d").write_bytes(saved(Image.new("RGB", (8, 8)), format=kind))
    with pytest.raises(CorruptionError, match=r"1\.png is not a readable image"):
        datasets.load(f"folder:{tmp_path}/d")


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


ARRAYS = {"images": np.zeros((4, 8, 8, 3), np.uint8), "labels": np.array([0, 1, 0, 1])}


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_archives_of_plain_arrays_are_read_as_numpy_does(tmp_path, method):
    file = npz(tmp_path / "a.npz", method, classes=np.array(["ant", "bee"]), order=np.arange(6).reshape(2, 3).T)
    expected = np.load(file)
    found = datasets.read_npz(file)
    assert set(found) == set(expected.files)
    assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_an_archive_that_unpacks_to_far_more_than_it_is_is_refused_in_little_memory(run, tmp_path):
    file = npz(tmp_path / "a.npz", train_images=np.zeros((100, 1000, 1100, 3), np.uint8))
    assert file.stat().st_size < 2**20
    done = planned(run, f"arrays:{file}", tmp_path)
    assert (done.code, "claim to unpack to 330" in done.output) == (8, True), done.output


@pytest.mark.parametrize(
    ("shape", "code"), [((10**6, 8, 8, 3), 3), ((10**12, 8, 8, 3), 8), ((3, 8, 8, 3), 4), ((-4, 8, -8, 3), 3)], ids=str
)
def test_an_array_that_claims_another_shape_than_its_bytes_is_refused_in_little_memory(run, tmp_path, shape, code):
    file = npz(tmp_path / "a.npz", train_images=npy(ARRAYS["images"], shape=shape))
    done = planned(run, f"arrays:{file}", tmp_path)
    assert (done.code, str(file) in done.output) == (code, True), done.output


def test_an_archive_whose_list_of_arrays_is_huge_is_refused_in_little_memory(run, tmp_path):
    file = npz(tmp_path / "a.npz")
    end = bytearray(file.read_bytes()[-22:])
    end[12:16], end[16:20] = (2**31).to_bytes(4, "little"), (0).to_bytes(4, "little")
    with open(file, "wb") as stream:
        stream.truncate(2**31)  # sparse: it takes no room
        stream.seek(2**31)
        stream.write(end)
    done = planned(run, f"arrays:{file}", tmp_path)
    assert (done.code, f"its list of arrays takes {2**31} bytes" in done.output) == (8, True), done.output


def test_an_archive_packed_as_numpy_never_does_is_refused(tmp_path):
    with pytest.raises(UnsafeError, match=r"'train_images\.npy' is compressed in a way numpy never does"):
        datasets.load(f"arrays:{npz(tmp_path / 'a.npz', zipfile.ZIP_LZMA)}")


@pytest.mark.parametrize("at", [0, 60, 300])
def test_a_damaged_archive_is_named(tmp_path, at):
    file = npz(tmp_path / "a.npz")
    content = bytearray(file.read_bytes())
    content[at] ^= 255
    file.write_bytes(content)
    with pytest.raises(CorruptionError, match=r"a\.npz is not a readable \.npz file"):
        datasets.load(f"arrays:{file}")


@pytest.mark.parametrize("what", ["fifo", "/dev/zero"])
def test_an_archive_that_is_a_pipe_or_device_is_not_waited_for(run, tmp_path, what):
    file = tmp_path / "a.npz"
    endless(file, what)
    done = planned(run, f"arrays:{file}", tmp_path)
    assert (done.code, "is a pipe or a device" in done.output) == (8, True), done.output
