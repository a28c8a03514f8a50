import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets_on_disk import make_pixels, png, write_folder, write_hub, write_npz, write_parquet
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from kcdcache.data import datasets, images
from kcdcache.errors import CorruptionError, MismatchError, NotFoundError, SettingsError, UnsafeError

CIFAR100 = Path(os.environ.get("KCDCACHE_CIFAR100", Path(__file__).parents[3] / "shared/data/cifar100"))


def test_digits_are_the_real_ones_split_once():
    digits, original = datasets.load("digits"), load_digits()
    assert (len(digits.train), len(digits.test), digits.train.image_size) == (1437, 360, (16, 16))
    enlarged = datasets._enlarged(original.images.astype(np.int64))
    together = np.concatenate([part.images(np.arange(len(part))) for part in (digits.train, digits.test)])
    labels = np.concatenate([digits.train.labels, digits.test.labels])
    ours = sorted((image.tobytes(), int(label)) for image, label in zip(together, labels, strict=True))
    theirs = sorted((image.tobytes(), int(label)) for image, label in zip(enlarged, original.target, strict=True))
    assert ours == theirs


def test_digits_keep_their_digest_for_ever():
    identity = datasets.load("digits").identity()
    assert identity.digest == "33f1a886c3bd66ea0e675bb22d66f7bfd4374fe4f619c5af8ed5644110936c4a"
    assert identity.classes == tuple("0123456789")


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


def test_arrays_keep_images_labels_and_order(tmp_path):
    loaded = datasets.load(write_npz(tmp_path / "a.npz", classes=np.array(["x", "y", "z"])))
    assert np.array_equal(loaded.train.images(np.array([4, 0])), make_pixels(6)[[4, 0]])
    assert loaded.test.labels.tolist() == [2, 0, 0]
    assert loaded.classes == ("x", "y", "z")


def test_grey_arrays_stay_grey(tmp_path):
    grey = {"train_images": make_pixels(6, channels=1), "test_images": make_pixels(3, channels=1)}
    loaded = datasets.load(write_npz(tmp_path / "a.npz", **grey))
    assert loaded.train.images(np.arange(2)).shape == (2, 5, 4, 1)
    assert len(loaded.mean) == 1


@given(st.integers(0, 100), st.integers(1, 4))
def test_statistics_are_those_of_the_pixels(seed, channels):
    pixels = make_pixels(3, channels=channels, seed=seed)
    found = images.pixel_statistics(pixels)
    scaled = pixels.astype(np.float64) / 255
    assert np.allclose(found.mean, scaled.mean((0, 1, 2)), atol=5.1e-5)
    assert np.allclose(found.std, scaled.std((0, 1, 2)), atol=5.1e-5)


def test_a_constant_channel_divides_by_one():
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


def test_parquet_without_names_counts_its_classes(tmp_path):
    assert datasets.load(write_hub(tmp_path, names=None)).classes == ("0", "1", "2")


def test_a_limited_load_reads_only_the_files_it_needs(tmp_path):
    spec = write_hub(tmp_path)
    (tmp_path / "train-00001-of-00002.parquet").write_bytes(b"not parquet")
    loaded = datasets.load(f"{spec}?train=4&test=1")
    assert (len(loaded.train), len(loaded.test)) == (4, 1)
    with pytest.raises(CorruptionError, match=r"train-00001-of-00002.parquet is not a readable parquet file"):
        datasets.load(spec)


def test_a_limited_load_is_a_prefix_and_may_lack_classes(tmp_path):
    loaded = datasets.load(f"{write_hub(tmp_path)}?train=2")
    assert loaded.train.labels.tolist() == [0, 1]
    assert loaded.classes == ("cat", "dog", "owl")
    with pytest.raises(SettingsError, match=r"training split of .* has 6 images; 7 were asked for"):
        datasets.load(f"parquet:{tmp_path}?train=7")


def test_a_corrupt_image_is_named_by_file_and_row(tmp_path):
    write_hub(tmp_path)
    payloads = [png(i) for i in make_pixels(3)]
    for broken in (payloads[0][:60], b"junk", None):
        write_parquet(tmp_path / "test-00000-of-00001.parquet", [*payloads, broken], label=[0, 1, 2, 0])
        with pytest.raises(CorruptionError, match=r"test-00000-of-00001.parquet row 3"):
            datasets.load(f"parquet:{tmp_path}")


def test_an_ambiguous_or_unknown_label_column_lists_the_candidates(tmp_path):
    for part in ("train", "test"):
        write_parquet(tmp_path / f"{part}-0.parquet", [png(i) for i in make_pixels(2)], fine=[0, 1], coarse=[0, 0])
    with pytest.raises(SettingsError, match=r"fine, coarse; choose one: write parquet:.*#COLUMN"):
        datasets.load(f"parquet:{tmp_path}")
    with pytest.raises(SettingsError, match=r"fine, coarse; 'label' is none of them"):
        datasets.load(f"parquet:{tmp_path}#label")
    assert datasets.load(f"parquet:{tmp_path}#fine").train.labels.tolist() == [0, 1]


def test_parquet_without_an_image_column_lists_the_columns(tmp_path):
    for part in ("train", "test"):
        pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / f"{part}-0.parquet")
    with pytest.raises(SettingsError, match=r"one struct column .* found 0 in: text \(string\), label \(int64\)"):
        datasets.load(f"parquet:{tmp_path}")


def test_parquet_images_of_differing_size_come_as_a_list(tmp_path):
    different = [make_pixels(1, 5 + row)[0] for row in range(3)]
    for part in ("train", "validation"):
        write_parquet(tmp_path / f"{part}-0.parquet", [png(i) for i in different], label=[0, 1, 0])
    loaded = datasets.load(f"parquet:{tmp_path}")
    assert loaded.train.image_size is None
    found = loaded.train.images(np.array([2, 0]))
    assert [np.array_equal(a, b) for a, b in zip(found, (different[2], different[0]), strict=True)] == [True, True]
    assert loaded.mean == (0.485, 0.456, 0.406)


def test_labels_with_gaps_name_what_is_missing(tmp_path):
    spec = write_npz(tmp_path / "a.npz", train_labels=np.array([0, 1, 4, 4, 1, 0]))
    with pytest.raises(MismatchError, match=r"must be 0..4 without gaps; 2 have no training image: 2 \('2'\), 3"):
        datasets.load(spec)
    spec = write_npz(tmp_path / "b.npz", train_labels=np.array([0, 1, 2, -1, 1, 0]))
    with pytest.raises(MismatchError, match=r"b.npz train_images row 3 has label -1"):
        datasets.load(spec)
    spec = write_npz(tmp_path / "c.npz", test_labels=np.array([0, 3, 0]))
    with pytest.raises(MismatchError, match=r"c.npz test_images row 1 has label 3 .* must be 0..2"):
        datasets.load(spec)


def test_a_null_label_is_named_by_file_and_row(tmp_path):
    write_hub(tmp_path)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [png(i) for i in make_pixels(2)], label=[1, None])
    with pytest.raises(MismatchError, match=r"train-00001-of-00002.parquet row 1 has label -1 \(a null"):
        datasets.load(f"parquet:{tmp_path}")


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    cases = {
        r"test_labels in .* should be 3 integers; found int64 \(2,\)": {"test_labels": np.array([0, 1])},
        r"train_images in .* should be uint8 \(N,H,W,C\); found float64": {"train_images": np.zeros((6, 5, 4, 3))},
        r"training and test images in .* differ in size": {"test_images": make_pixels(3, 6)},
    }
    for number, (message, changes) in enumerate(cases.items()):
        with pytest.raises(MismatchError, match=message):
            datasets.load(write_npz(tmp_path / f"{number}.npz", **changes))


def test_missing_or_empty_splits_are_not_found(tmp_path):
    with pytest.raises(NotFoundError, match=r"no array test_images in .*; it holds test_labels, train_images"):
        datasets.load(write_npz(tmp_path / "a.npz", test_images=None))
    empty = {"test_images": make_pixels(0), "test_labels": np.zeros(0, np.int64)}
    with pytest.raises(NotFoundError, match=r"test split of 'arrays:.*' holds no images"):
        datasets.load(write_npz(tmp_path / "b.npz", **empty))
    with pytest.raises(NotFoundError, match=r"no train-\*.parquet in .*; it holds a.npz"):
        datasets.load(f"parquet:{tmp_path}")
    with pytest.raises(NotFoundError, match=r"no folder .*train; folder:DIR needs class folders"):
        datasets.load(f"folder:{tmp_path}")
    with pytest.raises(NotFoundError, match="no file at"):
        datasets.load(f"arrays:{tmp_path}/none.npz")


def test_pickles_and_broken_archives_are_refused(tmp_path):
    spec = write_npz(tmp_path / "a.npz", classes=np.array([{}], dtype=object))
    with pytest.raises(UnsafeError, match=r"a.npz is refused"):
        datasets.load(spec)
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "b.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptionError, match=r"b.npz is not a readable .npz file"):
        datasets.load(f"arrays:{tmp_path}/b.npz")


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


def test_other_files_in_a_class_folder_are_reported(tmp_path, caplog):
    spec = write_folder(tmp_path)
    (tmp_path / "train/ant/notes.txt").write_text("x")
    assert len(datasets.load(spec).train) == 4
    assert "1 files in" in caplog.text
    (tmp_path / "val/cow").mkdir()
    with pytest.raises(MismatchError, match=r"val has class folders that .*train lacks: cow"):
        datasets.load(spec)


def test_images_of_16_bits_are_refused(tmp_path):
    spec = write_folder(tmp_path)
    Image.fromarray(np.zeros((5, 4), np.uint16)).save(tmp_path / "train/ant/0.png")
    with pytest.raises(MismatchError, match=r"ant/0.png has more than 8 bits per channel"):
        datasets.load(spec)


def test_grey_and_transparent_files_become_rgb():
    payloads = [png(make_pixels(1)[0, ..., 0]), png(make_pixels(1, channels=4)[0])]
    found = images.EncodedImages(payloads, images.Origins(("f",)), (5, 4)).images(np.arange(2))
    assert np.array_equal(found[0], make_pixels(1)[0, ..., :1].repeat(3, 2))
    assert np.array_equal(found[1], make_pixels(1, channels=4)[0, ..., :3])


def test_positions_outside_a_split_are_refused(tmp_path):
    train = datasets.load(write_npz(tmp_path / "a.npz")).train
    for position in (-1, 6):
        with pytest.raises(MismatchError, match=f"index {position} is outside this split, which has 6 samples"):
            train.images(np.array([0, position]))


def test_a_split_travels_to_other_processes(tmp_path):
    train = datasets.load(write_folder(tmp_path, (5, 7))).train
    again = pickle.loads(pickle.dumps(train))
    assert np.array_equal(again.digests(), train.digests())


def test_specs_that_are_wrong_say_how_to_write_them():
    for spec, message in {
        "cifar:x": "unknown data 'cifar' in 'cifar:x'; did you mean 'cifar10'",
        "folder": "data spec 'folder' needs a path: write folder:DIR",
        "digits:x": "'digits' is embedded and takes no path",
        "digits?trian=5": r"unknown option 'trian' in data spec 'digits\?trian=5'; did you mean 'train'",
        "digits?train=0": r"setting 'train' in data spec 'digits\?train=0': .* greater than or equal to 1; found '0'",
    }.items():
        with pytest.raises(SettingsError, match=message):
            datasets.load(spec)


def test_a_failed_download_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotFoundError, match=r"put cifar-10-python.tar.gz from https.* there, or use parquet:DIR"):
        datasets.load(f"cifar10:{tmp_path}/file")


@pytest.mark.skipif(not CIFAR100.is_dir(), reason="no CIFAR-100 at hand (KCDCACHE_CIFAR100)")
def test_cifar100_of_the_hub_loads():
    loaded = datasets.load(f"parquet:{CIFAR100}#fine_label?train=500&test=100")
    assert (len(loaded.train), len(loaded.test), loaded.train.image_size) == (500, 100, (32, 32))
    assert loaded.classes[:3] == ("apple", "aquarium_fish", "baby")
    assert np.abs(np.array(loaded.mean) - (0.5071, 0.4867, 0.4408)).max() < 0.02
    with pytest.raises(SettingsError, match="fine_label, coarse_label; choose one"):
        datasets.load(f"parquet:{CIFAR100}?train=500")
