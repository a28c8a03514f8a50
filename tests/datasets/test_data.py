import hashlib
import json
import os
import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import failure, outcome
from datasets_on_disk import make_pixels, png, write_folder, write_hub, write_npz, write_parquet
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from kcdcache.datasets import datasets, images, label_noise
from kcdcache.errors import CorruptionError, MismatchError, NotFoundError, SettingsError, UnsafeError

CIFAR100 = Path(os.environ.get("KCDCACHE_CIFAR100", Path(__file__).parents[3] / "shared/data/cifar100"))
SPLITS = {"train": 6, "test": 3}


def test_digits_are_the_real_ones_split_once():
    digits, original = datasets.load("digits"), load_digits()
    assert (len(digits.train), len(digits.test), digits.train.image_size) == (1437, 360, (16, 16))
    enlarged = datasets._enlarged(original.images.astype(np.int64))
    together = np.concatenate([part.images(np.arange(len(part))) for part in (digits.train, digits.test)])
    labels = np.concatenate([digits.train.labels, digits.test.labels])
    ours = sorted((image.tobytes(), int(label)) for image, label in zip(together, labels, strict=True))
    theirs = sorted((image.tobytes(), int(label)) for image, label in zip(enlarged, original.target, strict=True))
    assert ours == theirs
    digest = "33f1a886c3bd66ea0e675bb22d66f7bfd4374fe4f619c5af8ed5644110936c4a"  # for ever
    assert (digits.identity().digest, digits.classes) == (digest, tuple("0123456789"))


def test_digits_are_enlarged_bilinearly():
    levels = np.random.default_rng(0).integers(0, 17, (2, 8, 8))
    expected = np.zeros((2, 16, 16))
    for y, x in np.ndindex(16, 16):
        for from_y, from_x in np.ndindex(8, 8):
            near = [np.clip((place - 0.5) / 2, 0, 7) for place in (y, x)]
            weight = max(0, 1 - abs(near[0] - from_y)) * max(0, 1 - abs(near[1] - from_x))
            expected[:, y, x] += weight * levels[:, from_y, from_x]
    enlarged = datasets._enlarged(levels)
    assert np.abs(enlarged[..., 0] - expected * 255 / 16).max() <= 0.5 + 1e-9
    assert (enlarged[..., :1] == enlarged).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_keep_images_labels_and_order(tmp_path, channels):
    pixels = {part: make_pixels(count, channels=channels) for part, count in (("train", 6), ("test", 3))}
    arrays = {f"{part}_images": images for part, images in pixels.items()}
    loaded = datasets.load(write_npz(tmp_path / "a.npz", classes=np.array(["x", "y", "z"]), **arrays))
    assert np.array_equal(loaded.train.images(np.array([4, 0])), pixels["train"][[4, 0]])
    assert loaded.test.labels.tolist() == [2, 0, 0]
    assert (loaded.classes, len(loaded.mean)) == (("x", "y", "z"), channels)


@pytest.mark.parametrize(
    "write",
    [lambda folder: write_npz(folder / "a.npz"), write_hub, write_folder, lambda folder: write_folder(folder, (5, 6)),
     lambda folder: "digits?train=60&test=30&noise=0.4"],
)  # fmt: skip
def test_data_pickled_are_the_same(tmp_path, write):
    """As worker processes get them where they are spawned."""
    loaded = datasets.load(write(tmp_path))
    again = pickle.loads(pickle.dumps(loaded))
    assert (again.identity(), again.mean, again.classes) == (loaded.identity(), loaded.mean, loaded.classes)
    for one, other in ((again.train, loaded.train), (again.test, loaded.test)):
        every = np.arange(len(one))
        assert all(map(np.array_equal, one.images(every), other.images(every)))
        assert np.array_equal(one.labels, other.labels)


@given(st.integers(0, 100), st.integers(1, 4))
def test_statistics_are_those_of_the_pixels(seed, channels):
    pixels = make_pixels(3, channels=channels, seed=seed)
    found = images.pixel_statistics(pixels)
    scaled = pixels.astype(np.float64) / 255
    assert np.allclose(found.mean, scaled.mean((0, 1, 2)), atol=5.1e-5)
    assert np.allclose(found.std, scaled.std((0, 1, 2)), atol=5.1e-5)
    assert images.pixel_statistics(np.full((2, 3, 3, 1), 255, np.uint8)) == ((1.0,), (1.0,))


def test_digests_are_those_of_the_definition(tmp_path):
    loaded = datasets.load(write_npz(tmp_path / "a.npz"))
    for row, pixels in enumerate(make_pixels(6)):
        content = np.array([5, 4, 3], "<i8").tobytes() + pixels.tobytes() + int(row % 3).to_bytes(8, "little")
        assert int(loaded.train.digests()[row]) == int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def test_identity_sees_pixel_label_order_and_class_names(tmp_path):
    pixels, labels = make_pixels(6), np.arange(6) % 3
    touched = pixels.copy()
    touched[5, 4, 3, 2] ^= 1
    sets = [
        {}, {"train_images": touched}, {"train_labels": labels[::-1].copy()}, {"classes": np.array(["a", "b", "c"])},
        {"train_images": pixels[::-1].copy(), "train_labels": labels[::-1].copy()},
    ]  # fmt: skip
    specs = [write_npz(tmp_path / f"{number}.npz", **changes) for number, changes in enumerate(sets)]
    assert len({datasets.load(spec).identity().digest for spec in specs}) == len(sets)
    again = write_npz(tmp_path / "again.npz", test_labels=np.array([0, 0, 0]))
    assert datasets.load(again).identity() == datasets.load(specs[0]).identity()


def test_parquet_reads_files_in_order_with_class_names(tmp_path):
    loaded = datasets.load(write_hub(tmp_path))
    assert np.array_equal(loaded.train.images(np.arange(6)), make_pixels(6))
    assert loaded.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert loaded.classes == ("cat", "dog", "owl")
    assert len(loaded.test) == 3
    assert datasets.load(write_hub(tmp_path, names=None)).classes == ("0", "1", "2")
    (tmp_path / "two").mkdir()
    assert datasets.load(f"{two_columns(tmp_path / 'two')}#fine").train.labels.tolist() == [0, 1]


def webster(labels, count):
    """Seats one by one, each for the class with the largest size per (2 seats + 1), ties by class."""
    held = {label: labels.count(label) for label in sorted(set(labels))}
    seats = dict.fromkeys(held, 0)
    for _ in range(count):
        winner = max(held, key=lambda label: (Fraction(held[label], 2 * seats[label] + 1), -label))
        seats[winner] += 1
    return [row for row, label in enumerate(labels) if labels[:row].count(label) < seats[label]]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.data())
def test_a_balanced_subset_gives_every_class_its_share_and_is_part_of_a_larger_one(labels, data):
    count = data.draw(st.integers(1, len(labels)))
    found = label_noise.balanced(np.array(labels), count).tolist()
    assert found == webster(labels, count)
    if count < len(labels):
        assert set(found) < set(label_noise.balanced(np.array(labels), count + 1).tolist())


def sorted_arrays(folder):
    return write_npz(folder / "a.npz", train_labels=np.repeat(np.arange(3), 2), test_labels=np.array([0, 0, 2]))


def sorted_hub(folder):
    write_parquet(folder / "train-0.parquet", [png(i) for i in make_pixels(6)], label=[0, 0, 1, 1, 2, 2])
    write_parquet(folder / "test-0.parquet", [png(i) for i in make_pixels(3, seed=1)], label=[0, 0, 2])
    return f"parquet:{folder}"


@pytest.mark.parametrize("make", [sorted_arrays, sorted_hub])
def test_a_limit_takes_every_class_or_the_first_in_stored_order(tmp_path, make):
    spec = make(tmp_path)
    loaded = datasets.load(f"{spec}?train=4&test=2")
    assert (loaded.train.labels.tolist(), loaded.test.labels.tolist()) == ([0, 0, 1, 2], [0, 2])
    assert np.array_equal(loaded.train.images(np.arange(4)), make_pixels(6)[[0, 1, 2, 4]])
    assert loaded.train.source.place(3).endswith("row 4")
    loaded = datasets.load(f"{spec}?train=5&test=2&order=stored")
    assert (loaded.train.labels.tolist(), loaded.test.labels.tolist()) == ([0, 0, 1, 1, 2], [0, 0])
    assert np.array_equal(loaded.train.images(np.arange(5)), make_pixels(6)[:5])
    every = datasets.load(f"{spec}?train=6&test=3")
    assert (
        every.identity() == datasets.load(spec).identity() == datasets.load(f"{spec}?train=6&order=stored").identity()
    )


@pytest.mark.parametrize("make", [sorted_arrays, sorted_hub, write_hub, lambda folder: "digits"])
@pytest.mark.parametrize("order", ["", "&order=stored"])
def test_a_limit_that_leaves_a_class_without_images_is_refused(tmp_path, make, order):
    """As without a limit; classes that have no names are counted in the whole split."""
    spec = make(tmp_path)
    remedy = "give a larger train, or leave order=stored out$" if order else "give a larger train$"
    with pytest.raises(MismatchError, match=rf"has no training image of \d of \d+ classes: .*; {remedy}"):
        datasets.load(f"{spec}?train=2{order}")


def test_a_limit_reads_only_the_row_groups_that_it_needs(tmp_path):
    spec, file = write_hub(tmp_path), tmp_path / "train-00001-of-00002.parquet"
    with pq.ParquetFile(file) as opened:
        chunk = opened.metadata.row_group(0).column(0)
    content = bytearray(file.read_bytes())
    content[chunk.data_page_offset : chunk.data_page_offset + 8] = b"\xff" * 8
    file.write_bytes(content)
    for order in ("", "&order=stored"):
        assert datasets.load(f"{spec}?train=4{order}").train.labels.tolist() == [0, 1, 2, 0]
    with pytest.raises(CorruptionError, match=r"row group 0 of .*train-00001-of-00002\.parquet cannot be read"):
        datasets.load(f"{spec}?train=5")


def test_commands_learn_from_every_class_of_sorted_data(capsys, caplog, tmp_path):
    spec = f"{sorted_arrays(tmp_path)}?train=3&test=2"
    words = ["fit", "--data", spec, "--model", "resnet8", "--out", tmp_path / "f", "--dry-run", "--json", "-q"]
    code, out, _ = outcome(capsys, *words)
    assert (code, "no test image of 1 of 3 classes: 1 ('1')" in caplog.text) == (0, True)
    assert json.loads(out)["samples"] == 3
    words[2] = f"{spec}&order=stored"
    code, said = failure(capsys, *words)
    assert (code, "has no training image of 1 of 3 classes: 2 ('2'); give a larger train" in said) == (4, True)


@pytest.mark.parametrize("axis", [1, 2])
def test_arrays_whose_channels_are_not_last_are_refused_with_the_remedy(capsys, tmp_path, axis):
    """(N, C, H, W), and (N, H, C, W); whatever is stated is taken."""
    images = {f"{part}_images": np.moveaxis(make_pixels(count, 8, 9), 3, axis) for part, count in SPLITS.items()}
    spec = write_npz(tmp_path / "a.npz", **images)
    code, said = failure(capsys, "fit", "--data", spec, "--model", "resnet8", "--out", tmp_path / "f")
    remedy = "save it transposed by (0, 2, 3, 1)" if axis == 1 else "transpose it, or add channels=9 to the data spec"
    assert (code, "should be (N,H,W,C) with C = 1 or 3 or 4; found (6, " in said, remedy in said) == (4, True, True)
    assert len(datasets.load(f"{spec}?channels=9").mean) == 9
    with pytest.raises(MismatchError, match=r"\(N,H,W,C\) with C = 5; found \(6, .*add channels=9 to the data spec"):
        datasets.load(f"{spec}?channels=5")


def test_a_corrupt_image_is_named_by_file_and_row(tmp_path):
    write_hub(tmp_path)
    payloads = [png(i) for i in make_pixels(3)]
    for broken in (payloads[0][:60], b"junk", None):
        write_parquet(tmp_path / "test-00000-of-00001.parquet", [*payloads, broken], label=[0, 1, 2, 0])
        with pytest.raises(CorruptionError, match=r"test-00000-of-00001.parquet row 3"):
            datasets.load(f"parquet:{tmp_path}")


def two_columns(folder):
    for part in ("train", "test"):
        write_parquet(folder / f"{part}-0.parquet", [png(i) for i in make_pixels(2)], fine=[0, 1], coarse=[0, 0])
    return f"parquet:{folder}"


def test_parquet_images_of_differing_size_come_as_a_list(tmp_path):
    different = [make_pixels(1, 5 + row)[0] for row in range(3)]
    for part in ("train", "validation"):
        write_parquet(tmp_path / f"{part}-0.parquet", [png(i) for i in different], label=[0, 1, 0])
    loaded = datasets.load(f"parquet:{tmp_path}")
    assert loaded.train.image_size is None
    found = loaded.train.images(np.array([2, 0]))
    assert [image.tolist() for image in found] == [different[2].tolist(), different[0].tolist()]
    assert loaded.mean == (0.485, 0.456, 0.406)


def arrays(**changes):
    return lambda folder: write_npz(folder / "a.npz", **changes)


def hub(file=None, **columns):
    """A parquet set, of which one file is another one."""

    def made(folder):
        spec = write_hub(folder)
        if file:
            write_parquet(folder / file, [png(i) for i in make_pixels(2)], **columns)
        return spec

    return made


def without_images(folder):
    for part in ("train", "test"):
        pq.write_table(pa.table({"text": ["a"], "label": [0]}), folder / f"{part}-0.parquet")
    return f"parquet:{folder}"


def torn(folder):
    spec = write_hub(folder)
    (folder / "train-00001-of-00002.parquet").write_bytes(b"not parquet")
    return spec


def with_a_cow(folder):
    spec = write_folder(folder)
    (folder / "val/cow").mkdir()
    return spec


def in_the_way(folder):
    (folder / "file").write_text("in the way")
    return f"cifar10:{folder}/file"


REFUSED = [
    (arrays(train_labels=np.array([0, 1, 4, 4, 1, 0])), MismatchError,
     r"has no training image of 2 of 5 classes: 2 \('2'\), 3 \('3'\); labels must be 0..4 without gaps: add images"),
    (arrays(train_labels=np.array([0, 1, 2, 0, 1, 2**60])), MismatchError,
     r"must be 0..C-1 without gaps; 6 images have labels up to 1152921504606846976"),
    (arrays(train_labels=np.array([0, 1, 2, -1, 1, 0])), MismatchError, r"a.npz train_images row 3 has label -1"),
    (arrays(test_labels=np.array([0, 3, 0])), MismatchError, r"a.npz test_images row 1 has label 3 .* must be 0..2"),
    (arrays(test_labels=np.array([0, 1])), MismatchError,
     r"test_labels in .* should be 3 integers; found int64 \(2,\)"),
    (arrays(train_images=np.zeros((6, 5, 4, 3))), MismatchError,
     r"train_images in .* should be uint8 \(N,H,W,C\); found float64"),
    (arrays(test_images=make_pixels(3, 6)), MismatchError, r"training and test images in .* differ in size"),
    (arrays(test_images=None), NotFoundError, r"no array test_images in .*; it holds test_labels, train_images"),
    (arrays(test_images=make_pixels(0), test_labels=np.zeros(0, np.int64)), NotFoundError,
     r"test split of 'arrays:.*' holds no images"),
    (arrays(classes=np.array([{}], dtype=object)), UnsafeError, r"a.npz is refused"),
    (lambda folder: f"arrays:{folder}/none.npz", NotFoundError, "no file at"),
    (lambda folder: f"parquet:{folder}", NotFoundError, r"no split 'train' in .*; it holds nothing"),
    (lambda folder: f"folder:{folder}", NotFoundError, r"no folder .*train; folder:DIR needs class folders"),
    (hub("train-00001-of-00002.parquet", label=[1, None]), MismatchError,
     r"train-00001-of-00002.parquet row 1 has label -1 \(a null"),
    (hub("train-00001-of-00002.parquet", other=[1, 2]), MismatchError,
     "lacks the column label that the first file has"),
    (torn, CorruptionError, r"train-00001-of-00002.parquet is not a readable parquet file"),
    (lambda folder: f"{write_hub(folder)}?train=7", SettingsError,
     r"training split of .* has 6 images; 7 were requested"),
    (two_columns, SettingsError, r"fine, coarse; choose one: write parquet:.*#COLUMN"),
    (lambda folder: f"{two_columns(folder)}#label", SettingsError, r"fine, coarse; 'label' is none of them"),
    (without_images, SettingsError, r"image columns of .*: none \(of text \(string\), label \(int64\)\); images are"),
    (with_a_cow, MismatchError, r"val has class folders that .*train lacks: 'cow'"),
    (in_the_way, NotFoundError, r"put cifar-10-python.tar.gz from https.* there, or use parquet:DIR"),
    (lambda folder: "cifar:x", SettingsError, "unknown data 'cifar' in 'cifar:x'; did you mean 'cifar10'"),
    (lambda folder: "folder", SettingsError, "data spec 'folder' needs a path: write folder:DIR"),
    (lambda folder: "digits:x", SettingsError, "'digits' is embedded and takes no path"),
    (lambda folder: "digits?trian=5", SettingsError,
     r"unknown option 'trian' in data spec 'digits\?trian=5'; did you mean 'train'"),
    (lambda folder: "digits?order=stored", SettingsError,
     r"order in data spec .* does nothing without train or test; leave it out"),
    (lambda folder: "digits?train=50&order=sorted", SettingsError, r"'order' in .*'balanced' or 'stored'"),
    (lambda folder: "digits?channels=3", SettingsError,
     r"channels in data spec .* does nothing there: it is for arrays; leave it out"),
    (arrays(train_images=make_pixels(6, 8, 9)[..., 0]), MismatchError,
     r"should be uint8 \(N,H,W,C\); found uint8 \(6, 8, 9\)"),
    (lambda folder: "digits?train=0", SettingsError,
     r"setting 'train' in data spec 'digits\?train=0': .* greater than or equal to 1; found '0'"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "said"), REFUSED)
def test_data_that_cannot_be_used_are_refused_with_place_and_remedy(tmp_path, make, error, said):
    spec = make(tmp_path)
    with pytest.raises(error, match=said):
        datasets.load(spec)


def test_folders_of_one_size_are_decoded_once(tmp_path):
    loaded = datasets.load(write_folder(tmp_path))
    assert isinstance(loaded.train.source, images.DecodedImages)
    assert loaded.classes == ("ant", "bee")
    assert loaded.train.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(loaded.train.images(np.array([3]))[0], make_pixels(1, 5, seed=1)[0])


def test_folders_of_differing_sizes_are_decoded_on_demand(tmp_path):
    loaded = datasets.load(write_folder(tmp_path, (5, 7)))
    assert loaded.train.image_size is None
    assert [image.shape for image in loaded.train.images(np.array([3, 0]))] == [(7, 4, 3), (5, 4, 3)]
    file = tmp_path / "train/bee/1.png"
    content = file.read_bytes() + (1).to_bytes(8, "little")
    assert int(loaded.train.digests()[3]) == int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
    file.write_bytes(file.read_bytes()[:70])
    with pytest.raises(CorruptionError, match=r"train/bee/1.png is not a readable image"):
        loaded.train.images(np.array([0, 3]))
    file.unlink()
    with pytest.raises(NotFoundError, match=r"train/bee/1.png has vanished"):
        loaded.train.images(np.array([3]))


def test_images_above_the_memory_limit_are_decoded_on_demand():
    payloads = [png(pixels) for pixels in make_pixels(3)]
    source = images.decode_once(images.EncodedImages(payloads, images.Origins(("f",))), limit_bytes=100)
    assert isinstance(source, images.EncodedImages)
    assert source.image_size == (5, 4)
    assert np.array_equal(source.images(np.array([2, 0])), make_pixels(3)[[2, 0]])


def test_positions_outside_a_split_are_refused(tmp_path):
    train = datasets.load(write_npz(tmp_path / "a.npz")).train
    for position in (-1, 6):
        with pytest.raises(MismatchError, match=f"index {position} is outside this split, which has 6 samples"):
            train.images(np.array([0, position]))


@pytest.mark.skipif(not CIFAR100.is_dir(), reason="no CIFAR-100 at hand (KCDCACHE_CIFAR100)")
def test_cifar100_of_the_hub_loads():
    loaded = datasets.load(f"parquet:{CIFAR100}#fine_label?train=500&test=100")
    assert np.bincount(loaded.train.labels).tolist() == [5] * 100
    assert (len(loaded.train), len(loaded.test), loaded.train.image_size) == (500, 100, (32, 32))
    assert loaded.classes[:3] == ("apple", "aquarium_fish", "baby")
    assert np.abs(np.array(loaded.mean) - (0.5071, 0.4867, 0.4408)).max() < 0.02
    with pytest.raises(SettingsError, match="fine_label, coarse_label; choose one"):
        datasets.load(f"parquet:{CIFAR100}?train=500")
