"""Class folders as they are found on disks: what is a class, what is a sample, and what is said of the rest."""

import json
import logging
import os

import numpy as np
import pytest
from commands import failure, outcome
from datasets_on_disk import write_hub, write_npz
from PIL import Image

from kcdcache.datasets import datasets
from kcdcache.errors import KcdcacheError, MismatchError, UnsafeError

CLASSES = ("ant", "bee", "cat")
HIDDEN = (".ipynb_checkpoints", ".git", "@eaDir", "__MACOSX", "#recycle", "lost+found", "$RECYCLE.BIN", ".Trash-1000")


@pytest.fixture
def root(tmp_path):
    """Class folders, four images of a class in train and two in val; the first pixel tells class and number."""
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(CLASSES):
            put(tmp_path / "d" / split / name, label, range(count))
    return tmp_path / "d"


def put(folder, label, numbers, ending="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.fromarray(np.full((8, 8, 3), 20 * label + number, np.uint8)).save(folder / f"{number}.{ending}")


def found(root, caplog):
    """Return the class names, the first pixel of every image by label and split, and what was said."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        data = datasets.load(f"folder:{root}")
    pixels = {}
    for name, split in (("train", data.train), ("val", data.test)):
        levels = np.array(split.images(np.arange(len(split))))[:, 0, 0, 0].tolist()
        pixels[name] = sorted(zip(split.labels.tolist(), levels, strict=True))
    return data.classes, pixels, caplog.messages


PLAIN = {
    name: [(label, 20 * label + number) for label in range(3) for number in range(count)]
    for name, count in (("train", 4), ("val", 2))
}


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("places", [["train"], ["val"], ["train", "val"], ["train/bee", "val/ant"]])
def test_hidden_and_system_folders_are_neither_classes_nor_samples_and_named(root, caplog, name, places):
    for place in places:
        put(root / place / name, 9, range(3))
    classes, pixels, said = found(root, caplog)
    assert (classes, pixels) == (CLASSES, PLAIN)
    listed = ", ".join(f"{place}/{name}" for place in places)
    assert said == [f"left out of {root}: hidden or system files and folders: {len(places)} ({listed})"]


def test_files_that_are_no_samples_are_counted_and_named_once(root, caplog):
    for name in ("train/ant/._0.png", "train/ant/.DS_Store", "val/.DS_Store"):
        (root / name).write_bytes(b"Mac OS X")
    for name in ("train/bee/boxes.txt", "train/bee/photo.heic", "train/labels.csv", "val/7.png"):
        (root / name).write_bytes(b"-")
    classes, pixels, said = found(root, caplog)
    assert (classes, pixels) == (CLASSES, PLAIN)
    assert said == [
        f"left out of {root}: hidden or system files and folders: 3 (train/ant/.DS_Store, train/ant/._0.png, "
        "val/.DS_Store); files that are not images: 2 (train/bee/boxes.txt, train/bee/photo.heic); files outside the "
        "class folders: 2 (train/labels.csv, val/7.png)"
    ]


def test_many_names_are_shortened(root, caplog):
    for number in range(14):
        (root / f"train/ant/{number:02d}.txt").touch()
    said = found(root, caplog)[2][0]
    assert "files that are not images: 14 (train/ant/00.txt, " in said
    assert said.endswith("train/ant/09.txt, ...)")


def test_folders_within_a_class_are_of_the_class(root, caplog):
    put(root / "train/cat/more/still more", 2, [7, 8])
    _, pixels, said = found(root, caplog)
    assert (pixels["train"], said) == (PLAIN["train"] + [(2, 47), (2, 48)], [])


def test_links_to_folders_are_followed(root, caplog):
    """One within a class, one that is a class, and one in a linked folder."""
    put(root.parent / "more", 0, [7])
    put(root.parent / "further", 0, [8])
    put(root.parent / "dogs", 3, [0])
    (root / "train/ant/more").symlink_to(root.parent / "more")
    (root.parent / "more/further").symlink_to("../further")
    (root / "train/dog").symlink_to(root.parent / "dogs")
    classes, pixels, said = found(root, caplog)
    assert classes == (*CLASSES, "dog")
    assert pixels["train"] == sorted([*PLAIN["train"], (0, 7), (0, 8), (3, 60)])
    assert said == [f"'folder:{root}' has no test image of 1 of 4 classes: 3 ('dog'); test accuracy is of the others"]


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "../bee", "../../train/cat"])
def test_a_link_to_what_is_read_already_leads_nowhere_and_is_named(root, caplog, target):
    (root / "train/ant/again").symlink_to(target)
    _, pixels, said = found(root, caplog)
    assert pixels == PLAIN
    assert said == [f"left out of {root}: links to folders already read: 1 (train/ant/again)"]


def test_a_folder_is_read_once_however_many_links_lead_there(root, caplog):
    put(root.parent / "more", 0, [7])
    (root.parent / "more/back").symlink_to("../more")
    for name in ("a", "b"):
        (root / "train/ant" / name).symlink_to(root.parent / "more")
    _, pixels, said = found(root, caplog)
    assert pixels["train"] == sorted([*PLAIN["train"], (0, 7)])
    assert "links to folders already read: 2 (train/ant/a/back, train/ant/b)" in said[0]


def test_both_splits_may_lead_to_the_same_folder(root, caplog):
    (root / "val/cat/1.png").unlink()
    (root / "val/cat/0.png").unlink()
    (root / "val/cat").rmdir()
    (root / "val/cat").symlink_to("../train/cat")
    assert found(root, caplog)[1]["val"] == PLAIN["val"][:4] + PLAIN["train"][8:]


@pytest.mark.parametrize("name", ["loop", "loop.png"])
def test_a_link_to_itself_is_left_out_or_refused_by_name(root, caplog, name):
    (root / "train/ant" / name).symlink_to(name)
    if name.endswith("png"):
        with pytest.raises(KcdcacheError, match=r"train/ant/loop\.png cannot be read \("):
            found(root, caplog)
    else:
        assert "files that are not images: 1 (train/ant/loop)" in found(root, caplog)[2][0]


def test_a_pipe_in_a_hidden_folder_is_no_trouble_one_among_images_is(root, caplog):
    (root / "train/ant/.cache").mkdir()
    os.mkfifo(root / "train/ant/.cache/pipe")
    assert found(root, caplog)[1] == PLAIN
    os.mkfifo(root / "train/ant/pipe")
    with pytest.raises(UnsafeError, match=r"train/ant/pipe is a pipe or a device"):
        found(root, caplog)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_named(root, caplog):
    (root / "train/bee").chmod(0)
    with pytest.raises(KcdcacheError, match=r"the folder .*train/bee cannot be read \(Permission denied\); see to"):
        found(root, caplog)


def absent(root):
    for number in range(2):
        (root / f"val/cat/{number}.png").unlink()
    (root / "val/cat").rmdir()


def emptied(root):
    absent(root)
    (root / "val/cat").mkdir()


def hidden_only(root):
    emptied(root)
    put(root / "val/cat/.thumbnails", 2, [0])


@pytest.mark.parametrize("change", [absent, emptied, hidden_only])
def test_a_class_that_a_test_split_lacks_has_no_test_image_and_it_is_said(root, caplog, change):
    change(root)
    classes, pixels, said = found(root, caplog)
    assert (classes, pixels["val"]) == (CLASSES, PLAIN["val"][:4])
    told = f"'folder:{root}' has no test image of 1 of 3 classes: 2 ('cat'); test accuracy is of the others"
    assert said[-1] == told


@pytest.mark.parametrize(
    ("make", "missing"),
    [
        (lambda folder: write_npz(folder / "a.npz"), "1 of 3 classes: 1 ('1')"),
        (write_hub, "1 of 3 classes: 1 ('dog')"),
        (lambda folder: "digits?test=8", "2 of 10 classes: 4 ('4'), 7 ('7')"),
    ],
)
def test_other_kinds_of_data_say_it_too(tmp_path, caplog, make, missing):
    spec = make(tmp_path)
    datasets.load(spec)
    assert caplog.messages == [f"'{spec}' has no test image of {missing}; test accuracy is of the others"]


def test_a_class_that_the_training_split_lacks_is_refused(root):
    (root / "train/cat/.hidden").mkdir()
    for number in range(4):
        (root / f"train/cat/{number}.png").rename(root / f"train/cat/.hidden/{number}.png")
    with pytest.raises(MismatchError, match=r"has no training image of 1 of 3 classes: 2 \('cat'\); .* add images, or"):
        datasets.load(f"folder:{root}")


def fit(root, out, *more):
    words = ["fit", "-q", "--data", f"folder:{root}", "--model", "resnet8", "--epochs", 1, "--threads", 1]
    return [*words, "--batch-size", 4, "--augment", "crop", "--out", out, *more]


def test_a_command_learns_from_the_classes_alone_and_says_what_it_left_out(root, capsys, caplog, tmp_path):
    put(root / "train/.ipynb_checkpoints", 9, [0])
    put(root / "train/ant/@eaDir", 9, [0])
    absent(root)
    assert outcome(capsys, *fit(root, tmp_path / "f"))[::2] == (0, "")
    said = "\n".join(caplog.messages)
    assert json.loads((tmp_path / "f/model.json").read_text())["classes"] == list(CLASSES)
    assert "hidden or system files and folders: 2 (train/.ipynb_checkpoints, train/ant/@eaDir)" in said
    assert "no test image of 1 of 3 classes: 2 ('cat')" in said


ENDINGS = ("tif", "TIFF", "avif", "jp2", "j2k", "gif", "bmp", "webp", "jpeg", "JPG", "jfif")


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_of_every_format_that_is_read_are_samples(root, caplog, ending):
    put(root / "train/bee", 1, [6], ending)
    _, pixels, said = found(root, caplog)
    assert said == []
    assert len(pixels["train"]) == 13
    assert min(abs(level - 26) for label, level in pixels["train"] if label == 1) <= 3


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is HEIC, read are AVIF, BMP, "),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "it is JPEG XL, read"),
        (b"P6\n2 2\n255\n" + bytes(12), "it is PPM, read"),
        (b"<!DOCTYPE html><title>404</title>", "it is HTML or SVG, read"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00",
            "it is a pointer of Git LFS (see `git lfs pull`)",
        ),
        (b"", "it is empty"),
        (b"no picture", "it is of no format we know"),
        (b"\0\0\0\x1cftypavif" + bytes(40), "it begins as AVIF does, but is damaged"),
    ],
)
def test_a_file_that_cannot_be_decoded_is_named_with_its_format_and_without_an_address(
    root, capsys, tmp_path, content, named
):
    (root / "train/bee/9.png").write_bytes(content)
    code, said = failure(capsys, *fit(root, tmp_path / "f"))
    assert (code, "train/bee/9.png is not a readable image (" in said, named in said) == (3, True, True), said
    assert "0x" not in said
