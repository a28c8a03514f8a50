"""Parquet sets as they are met: classes by name, layouts of the hub, splits, columns, images without files."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import failure
from datasets_on_disk import make_pixels, png

from kcdcache.datasets import datasets
from kcdcache.errors import MismatchError, NotFoundError, SettingsError

ANT, BEE, CAT = NAMES = ["ant", "bee", "cat"]
FIRST, SECOND, TEST = "train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"
WANTED = {FIRST: [ANT, BEE, CAT, BEE], SECOND: [CAT, ANT], TEST: [BEE, CAT, CAT]}
"""file -> the true classes of its images"""
BYTES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pictures(count, seed=0):
    return [png(image) for image in make_pixels(count, seed=seed)]


def table(labels, **changes):
    count = len(labels)
    image = pa.array([{"bytes": picture, "path": None} for picture in pictures(count)], BYTES)
    columns = {"image": image, "label": labels, **changes}
    return pa.table({name: column for name, column in columns.items() if column is not None})


def listed(labels, names, form=list, written=None):
    """Numbers in a file's own list of names, as the hub records it; `written` are the numbers, if not by name."""
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": form(names)}}
    made = table([names.index(label) for label in labels] if written is None else written)
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def categories(labels, names):
    return table(pa.DictionaryArray.from_arrays(pa.array([names.index(label) for label in labels]), pa.array(names)))


def bare(labels, names):
    return table([names.index(label) for label in labels])


def by_number(names):
    return {str(number): name for number, name in enumerate(names)}


def write(folder, **tables):
    for name, made in tables.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(made, f"{file}.parquet", row_group_size=2)
    return f"parquet:{folder}"


def save(folder, changes, usual=lambda labels: listed(labels, NAMES)):
    """The files of WANTED; `changes` give some another form."""
    for name, labels in WANTED.items():
        pq.write_table(changes.get(name, usual)(labels), folder / name, row_group_size=2)
    return f"parquet:{folder}"


def classes_of(split, classes):
    return [classes[label] for label in split.labels.tolist()]


def other_order(labels):
    return listed(labels, [CAT, ANT, BEE])


FORMS = {
    "test in another order": {TEST: other_order},
    "second training file in another order": {SECOND: other_order},
    "fewer names": {TEST: lambda labels: listed(labels, [CAT, BEE])},
    "more names, unused": {TEST: lambda labels: listed(labels, ["dog", *NAMES[::-1]])},
    "names by number": {TEST: lambda labels: listed(labels, NAMES[::-1], by_number)},
    "texts": {TEST: table},
    "all texts": dict.fromkeys(WANTED, table),
    "all large texts": dict.fromkeys(WANTED, lambda labels: table(pa.array(labels, pa.large_string()))),
    "categories in other orders": {
        FIRST: lambda labels: categories(labels, [CAT, BEE, ANT]),
        SECOND: lambda labels: categories(labels, [ANT, CAT]),
        TEST: lambda labels: categories(labels, [BEE, CAT, ANT]),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_labels_are_those_of_each_files_own_names(tmp_path, form):
    loaded = datasets.load(save(tmp_path, FORMS[form]))
    assert loaded.classes == tuple(NAMES)
    assert classes_of(loaded.train, NAMES) == WANTED[FIRST] + WANTED[SECOND]
    assert classes_of(loaded.test, NAMES) == WANTED[TEST]


def test_a_set_is_the_same_whatever_the_order_of_its_tests_names(tmp_path):
    found = []
    for changes in ({}, {TEST: other_order}, {TEST: table}):
        loaded = datasets.load(save(tmp_path, changes))
        found.append((loaded.identity(), loaded.test.digest()))
    assert found[0] == found[1] == found[2]


REFUSED = {
    "unknown name": (
        {TEST: lambda labels: listed(labels, [BEE, CAT, "dog"], written=[0, 1, 2])},
        rf"{TEST} row 2 has the label 'dog', which the classes of .*{FIRST} lack: 'ant', 'bee', 'cat'",
    ),
    "unknown name in training": (
        {SECOND: lambda labels: listed([ANT, "dog"], [ANT, "dog"])},
        rf"{SECOND} row 1 has the label 'dog', which the classes of .*{FIRST} lack",
    ),
    "unknown text": ({TEST: lambda labels: table([BEE, "cow", CAT])}, rf"{TEST} row 1 has the label 'cow', which"),
    "number beyond its list": (
        {TEST: lambda labels: listed(labels, [CAT, BEE], written=[0, 1, 2])},
        rf"{TEST} row 2 has the label 2 \(of 2 classes\), which the classes of .*{FIRST} lack",
    ),
    "texts against numbers": (
        {FIRST: lambda labels: bare(labels, NAMES), SECOND: lambda labels: bare(labels, NAMES), TEST: table},
        rf"labels in .*{TEST} are names, in .*{FIRST} bare numbers; write both in one form",
    ),
    "numbers against texts": (
        {FIRST: table, SECOND: lambda labels: bare(labels, NAMES)},
        rf"labels in .*{SECOND} are bare numbers, in .*{FIRST} names",
    ),
    "a name twice": (
        {FIRST: lambda labels: listed([ANT, BEE], [ANT, BEE, ANT])},
        rf"the classes of .*{FIRST} hold two names that look alike, 'ant' and 'ant'",
    ),
    "names that look alike": (
        {FIRST: lambda labels: table(["caf\u00e9", "cafe\u0301"]), SECOND: table, TEST: table},
        r"look alike, .*spelled 'cafe\\u0301'.* and .*spelled 'caf\\xe9'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_labels_that_no_name_tells_are_refused_with_both_files(tmp_path, case):
    changes, said = REFUSED[case]
    with pytest.raises(MismatchError, match=said):
        datasets.load(save(tmp_path, changes))


def test_a_file_without_names_is_told(tmp_path, caplog):
    loaded = datasets.load(save(tmp_path, {TEST: lambda labels: bare(labels, NAMES)}))
    assert classes_of(loaded.test, NAMES) == WANTED[TEST]
    assert f"1 files name no classes ({tmp_path / TEST}); their labels are taken as numbers in the list" in caplog.text


TRAIN, HELD = table([0, 1, 0]), table([1, 0])
LAYOUTS = {
    "hashes": {"data__train-00000-of-00001-a09b74b3ef9c3b56": TRAIN, "data__test-00000-of-00001-e5ed30a4": HELD},
    "converted": {"default__train__0000": TRAIN, "default__test__0000": HELD},
    "plain": {"train": TRAIN, "test": HELD},
    "a set's own folder": {"cifar__train-00000-of-00001": TRAIN, "cifar__val-00000-of-00001": HELD},
    "spark": {"train__part-00000-8c.snappy": TRAIN, "valid__part-00000-9d.snappy": HELD},
    "both": {"train__train-0": TRAIN, "validation__validation-0": HELD},
    "numbered": {"train_0": TRAIN, "dev_0": HELD},
    "leftovers": {"train-0": TRAIN, "test-0": HELD, ".cache__train-1": table([9]), "_old__train-1": table([9])},
    "others below": {"train-0": TRAIN, "test-0": HELD, "other__train-1": table([9]), "other__test-1": table([9])},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_usual_layouts_are_found(tmp_path, layout):
    loaded = datasets.load(write(tmp_path, **LAYOUTS[layout]))
    assert (loaded.train.labels.tolist(), loaded.test.labels.tolist()) == ([0, 1, 0], [1, 0])


def test_a_linked_folder_is_looked_into_once(tmp_path):
    write(tmp_path / "there", **LAYOUTS["plain"])
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "data").symlink_to(tmp_path / "there")
    (tmp_path / "there" / "again").symlink_to(tmp_path / "there")
    assert len(datasets.load(f"parquet:{tmp_path}/here").train) == 3


SPLITS = {"train-0": TRAIN, "validation-0": HELD, "test-0": table([-1, None]), "extra-0": table([1, 1])}


@pytest.mark.parametrize(
    ("asked", "test"),
    [("test_split=validation", [1, 0]), ("test_split=val", [1, 0]), ("test_split=extra", [1, 1])],
)
def test_a_split_is_chosen_where_the_usual_one_has_no_labels(tmp_path, asked, test):
    spec = write(tmp_path, **SPLITS)
    with pytest.raises(
        MismatchError, match=r"no labels: all are null or -1; there are extra \(1 files\), test .*SPLIT"
    ):
        datasets.load(spec)
    assert datasets.load(f"{spec}?{asked}").test.labels.tolist() == test


def test_a_training_split_is_chosen_and_one_that_is_tested_on_is_told(tmp_path, caplog):
    spec = write(tmp_path, **{"a-0": TRAIN, "b-0": HELD})
    assert datasets.load(f"{spec}?train_split=a&test_split=b").train.labels.tolist() == [0, 1, 0]
    assert caplog.text == ""
    assert len(datasets.load(f"{spec}?train_split=a&test_split=a").test) == 3
    assert "is its training split" in caplog.text


def test_files_that_are_missing_are_told_and_other_versions_refused(tmp_path, caplog):
    spec = write(tmp_path, **{"train-00000-of-00003": TRAIN, "train-00002-of-00003": TRAIN, "test": HELD})
    assert len(datasets.load(spec).train) == 6
    assert "has 2 of 3 files: number 1 left out, as they are not there" in caplog.text
    write(tmp_path, **{"train-00000-of-00004": TRAIN})
    with pytest.raises(MismatchError, match=r"train-00000-of-00004.parquet are of two versions of the split 'train'"):
        datasets.load(spec)


PIXELS = make_pixels(3)
SOURCES = {
    "binary": pa.array(pictures(3), pa.binary()),
    "large binary": pa.array(pictures(3), pa.large_binary()),
    "lists": pa.array(PIXELS.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8())))),
    "lists of int64": pa.array(PIXELS.tolist()),
    "fixed lists": pa.array(PIXELS.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8(), 3), 4), 5)),
    "large lists": pa.array(PIXELS.tolist(), pa.large_list(pa.list_(pa.list_(pa.int32())))),
    "transparent": pa.array(np.concatenate([PIXELS, PIXELS[..., :1]], axis=3).tolist()),
}


@pytest.mark.parametrize("form", SOURCES)
def test_images_are_the_same_as_bytes_and_as_numbers(tmp_path, form):
    made = table([0, 1, 0], image=SOURCES[form])
    loaded = datasets.load(write(tmp_path, train=made, test=made))
    assert np.array_equal(loaded.train.images(np.arange(3)), PIXELS)
    assert loaded.identity() == datasets.load(write(tmp_path, train=TRAIN, test=made)).identity()


@pytest.mark.parametrize("axis", [False, True])
def test_grey_numbers_are_grey_images_of_any_size(tmp_path, axis):
    images = [make_pixels(1, 3 + number, channels=1)[0] for number in range(3)]
    made = table([0, 1, 0], image=[(image if axis else image[..., 0]).tolist() for image in images])
    found = datasets.load(write(tmp_path, train=made, test=made)).train.images(np.array([2, 0]))
    assert [image.tolist() for image in found] == [np.repeat(images[row], 3, 2).tolist() for row in (2, 0)]


def test_an_image_column_is_chosen(tmp_path):
    struct = pa.array([{"bytes": picture, "path": None} for picture in pictures(3, seed=1)], BYTES)
    made = table([0, 1, 0], mask=struct)
    spec = write(tmp_path, train=made, test=made)
    with pytest.raises(
        SettingsError, match=r"image columns of .*: image, mask .*choose one: write parquet:.*\?image=COL"
    ):
        datasets.load(spec)
    for name, seed in (("image", 0), ("mask", 1)):
        assert np.array_equal(
            datasets.load(f"{spec}?image={name}").train.images(np.arange(3)), make_pixels(3, seed=seed)
        )
    with pytest.raises(SettingsError, match="'masks' is none of them"):
        datasets.load(f"{spec}?image=masks")


COLUMNS = {
    "texts beside a file name": ({"label": ["b", "a", "b"], "file": ["1", "2", "3"]}, ("a", "b"), [1, 0, 1]),
    "label beside a number": ({"label": [1, 0, 1], "id": [5, 6, 7]}, ("0", "1"), [1, 0, 1]),
    "numbers beside a file name": ({"label": None, "kind": [1, 0, 1], "file": ["1", "2", "3"]}, ("0", "1"), [1, 0, 1]),
    "yes and no": ({"label": [True, False, True]}, ("0", "1"), [1, 0, 1]),
    "only texts": ({"label": None, "kind": ["b", "a", "b"]}, ("a", "b"), [1, 0, 1]),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_a_label_column_is_found_and_texts_become_sorted_classes(tmp_path, case):
    columns, classes, labels = COLUMNS[case]
    made = table([0, 0, 0], **columns)
    loaded = datasets.load(write(tmp_path, train=made, test=made))
    assert (loaded.classes, loaded.train.labels.tolist(), loaded.test.labels.tolist()) == (classes, labels, labels)


def test_a_limit_keeps_the_classes_of_all_texts(tmp_path):
    spec = write(tmp_path, train=table(["b", "c", "a"]), test=table(["c", "a"]))
    assert datasets.load(f"{spec}?test=1").classes == ("a", "b", "c")


def odd(**columns):
    made = table([0, 1, 0], **columns)
    return {"train": made, "test": made}


def with_images(images):
    return odd(image=images)


DEAD_ENDS = {
    "channels first": (
        with_images(make_pixels(3, 6, 7).transpose(0, 3, 1, 2).tolist()), MismatchError,
        r"train.parquet row 0 is a list of 3 x 6 x 7 numbers, expected .*1, 3 or 4 channels; .*transpose\(1, 2, 0\)",
    ),
    "ragged": (with_images([[[1, 2], [3]]] * 3), MismatchError, r"row 0 is a list of 2 x \(unequal\) numbers"),
    "empty": (
        with_images(pa.array([[[]]] * 3, pa.list_(pa.list_(pa.int8())))), MismatchError,
        r"row 0 is a list of 1 x 0 numbers",
    ),
    "too bright": (with_images([[[1, 256]]] * 3), MismatchError, r"row 0 has pixels from 1 to 256, expected 0 to 255"),
    "null pixels": (with_images([[[1, None]]] * 3), MismatchError, "row 0 or a row near it has pixels that are null"),
    "no images": (odd(image=None, a=[0.5] * 3), SettingsError, r"none \(of label \(int64\), a \(double\)\); images"),
    "no labels": (odd(label=[0.5] * 3), SettingsError, r"label columns of .*: none \(of image .*label \(double\)\)"),
    "several texts": (odd(label=None, a=["x"] * 3, b=["y"] * 3), SettingsError, "a, b; choose one: write .*#COLUMN"),
    "a text each": (
        odd(label=None, caption=["a", "b", "c"]), SettingsError,
        "the column caption of .* differs in every row, so that it names images, not classes; .*#COLUMN",
    ),
    "a column twice": (
        {"train": TRAIN.append_column("label", pa.array([0, 1, 0])), "test": TRAIN}, MismatchError,
        "train.parquet has two columns named 'label'; rename one",
    ),
    "an empty split": ({"train": TRAIN, "test": TRAIN.slice(0, 0)}, NotFoundError, "test split of .* holds no images"),
    "a number each": (
        odd(label=None, id=[0, 1, 2], file=["a", "b", "c"]), SettingsError,
        "the column id of .* differs in every row, so that it names images, not classes; .*#COLUMN",
    ),
    "test without labels": (
        {"train": TRAIN, "test": table([0, 1], label=None)}, MismatchError,
        r"test.parquet lacks the column label that the first file has; it holds image .*\?test_split=SPLIT",
    ),
    "test with other images": (
        {"train": TRAIN, "test": table([0, 1], image=None, img=pictures(2))}, MismatchError,
        "test.parquet lacks the image column image of the first",
    ),
    "several sets": (
        {"en__train": TRAIN, "en__test": HELD, "fr__train": TRAIN}, SettingsError,
        r"holds several sets: en, fr; choose one: write parquet:.*/en",
    ),
    "no training split": (
        {"data__fold1": TRAIN, "data__fold2": HELD}, NotFoundError,
        r"no split 'train' in .*; there are fold1 \(1 files\), fold2 .*\?train_split=SPLIT",
    ),
    "part of a split": (
        {"default__partial-train__0000": TRAIN}, NotFoundError, r"there are partial-train \(1 files\); choose",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DEAD_ENDS)
def test_what_cannot_be_used_is_refused_with_what_is_there_and_what_to_write(tmp_path, case):
    tables, error, said = DEAD_ENDS[case]
    with pytest.raises(error, match=said):
        datasets.load(write(tmp_path, **tables))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("parquet:{}?test_split=validatoin", "no split 'validatoin' in .*did you mean 'validation'"),
        ("digits?image=mask", r"image in data spec 'digits\?image=mask' does nothing there: it is for parquet; leave"),
        ("parquet:{}?imgae=mask", "unknown option 'imgae' .*did you mean 'image'"),
        ("parquet:{}/train-0.parquet", "is a file; give the folder that holds it: write parquet:DIR"),
        ("parquet:{}/none", "none does not exist"),
    ],
)
def test_the_command_line_says_what_to_type(tmp_path, capsys, spec, said):
    write(tmp_path, **SPLITS)
    words = ["fit", "--data", spec.format(tmp_path), "--model", "resnet8", "--out", tmp_path / "out"]
    code, told = failure(capsys, *words)
    assert code in (2, 10)
    assert re.search(said, told), told
    for word in ("KeyError", "Errno", "pydantic", "internal error"):
        assert word not in told
