"""Images that change behind our back: every sample is held to the digest the teacher's store has of it."""

import io
import os
import pickle
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lessons import CPU, condensed, opinionated, precomputed
from PIL import Image
from pupils import same_files
from stores import finish, form

from kcdcache.cli import main
from kcdcache.condensation import manifest
from kcdcache.datasets import datasets
from kcdcache.datasets.images import EncodedImages, decode_once, sample_digest
from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, NotFoundError
from kcdcache.export import condensed_set
from kcdcache.networks import registry
from kcdcache.networks.input_transform import InputTransform
from kcdcache.networks.weights import NetworkRecord, save_network
from kcdcache.store import check, reader, writer
from kcdcache.store.plan import plan_store
from kcdcache.teacher import teacher
from kcdcache.training import batches

NAMES, PER_CLASS = ("ant", "bee", "cow"), 4
KINDS = {"decoded": 0, "on demand": 1}
"""images in memory, or decoded on demand -> pixels by which each is larger than the one before"""
DIGEST = "[0-9a-f]{16}"


def picture(seed, size=16):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def write_folder(root, growth):
    """12 training images and 3 test images in class folders, all of one size or each of its own."""
    for part, count in (("train", PER_CLASS), ("val", 1)):
        for label, name in enumerate(NAMES):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                seed = 10 * label + number
                picture(seed, 16 + growth * seed).save(root / part / name / f"{number}.png")
    return f"folder:{root}"


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """kind -> its images, a teacher on disk and the store made of them."""
    return {kind: world(tmp_path_factory.mktemp("world"), growth) for kind, growth in KINDS.items()}


def world(root, growth):
    dataset = datasets.load(write_folder(root / "images", growth))
    network = opinionated(registry.build("resnet8", len(NAMES), 1))
    made = teacher.freeze(network, InputTransform(dataset.mean, dataset.std), "resnet8", dataset.classes, CPU)
    (root / "teacher").mkdir()
    record = NetworkRecord(architecture="resnet8", classes=dataset.classes, channels=3, transform=made.transform)
    save_network(root / "teacher", "model", made.module, record)
    seen = {"augment": "resized-crop-flip", "size": 16, "views": 2, "batch_size": 8}
    knowledge = precomputed(root / "store", dataset, made, **seen)
    return SimpleNamespace(root=root, images=root / "images", teacher=root / "teacher", knowledge=knowledge)


@pytest.fixture(params=KINDS)
def place(worlds, tmp_path, request):
    return copied(worlds[request.param], tmp_path)


@pytest.fixture
def lazy(worlds, tmp_path):
    return copied(worlds["on demand"], tmp_path)


def copied(world, folder):
    """A world with images of its own, which a test may spoil."""
    shutil.copytree(world.images, folder / "images")
    return SimpleNamespace(**{**vars(world), "root": folder, "images": folder / "images"})


def load(place):
    return datasets.load(f"folder:{place.images}")


def outcome(capsys, *words):
    """Return (exit code, stderr) of a command run in this process."""
    code = main._outcome([str(word) for word in words])
    return code, capsys.readouterr().err


def train(place, *more, images=None, out="run"):
    source = images or f"folder:{place.images}"
    shared = ("--store", place.knowledge.path, "--data", source, "--out", place.root / out, "--device", "cpu")
    return "train", "--student", "resnet8", "--epochs", 2, "--stages", 1, "--batch-size", 8, *shared, *more


def precompute(place):
    seen = ("--augment", "resized-crop-flip", "--size", 16, "--min-accuracy", 0, "--device", "cpu")
    source = ("--data", f"folder:{place.images}", "--teacher", place.teacher)
    return "precompute", *source, "--store", place.root / "new", *seen


def replaced(place):
    """Another image of the same size where sample 5 (bee/1.png) is; return its file."""
    file = place.images / "train/bee/1.png"
    with Image.open(file) as image:
        size = image.height
    picture(99, size).save(file)
    return file


def truncated(place):
    file = place.images / "train/bee/1.png"
    file.write_bytes(file.read_bytes()[:-300])
    return file


def digest_of(file, label):
    return f"{sample_digest(file.read_bytes(), np.int64(label)):016x}"


def all_of(split):
    return split.images(np.arange(len(split)))


def test_data_is_as_the_tests_below_need_it(worlds):
    assert [datasets.load(f"folder:{worlds[kind].images}").train.on_demand for kind in KINDS] == [False, True]


@pytest.mark.parametrize("told", [True, False], ids=["told by a store", "computed here"])
def test_an_image_replaced_after_its_digest_was_known_is_refused_when_decoded(lazy, told):
    train, file = load(lazy).train, lazy.images / "train/bee/1.png"
    if told:
        train.expect(lazy.knowledge.sample_digest, "in the store at S")
    else:
        train.digests()
    before, first = digest_of(file, 1), file.read_bytes()
    replaced(lazy)
    where = "in the store at S" if told else "as this process first read it"
    expected = rf"sample 5 differs .*{file} with label 1 has digest {digest_of(file, 1)}, it should be {before} {where}"
    with pytest.raises(MismatchError, match=expected + "; put back the image that was there, or precompute"):
        all_of(train)
    with pytest.raises(MismatchError, match=expected):
        all_of(pickle.loads(pickle.dumps(train)))
    assert len(train.images(np.array([4, 6]))) == 2
    file.write_bytes(first)
    assert len(all_of(train)) == 12


def test_a_damaged_a_vanished_and_an_unreadable_image_are_told_apart(lazy):
    train = load(lazy).train
    train.expect(lazy.knowledge.sample_digest, "in the store at S")
    file = truncated(lazy)
    with pytest.raises(CorruptionError, match=rf"sample 5 .*{file} .*{DIGEST}.*{DIGEST}.*S; it is damaged: .*replace"):
        all_of(train)
    file.unlink()
    with pytest.raises(NotFoundError, match=rf"the image {file} has vanished since the data set was listed; put it"):
        all_of(train)
    os.symlink(file, file)
    with pytest.raises(KcdcacheError, match=rf"{file} cannot be read \(Too many levels of symbolic links\)") as caught:
        all_of(train)
    assert caught.value.exit_code == 1


def test_an_image_of_another_size_is_never_spread_over_its_place(lazy):
    files = [str(lazy.images / f"{number}.png") for number in range(3)]
    for number, file in enumerate(files):
        picture(number).save(file)
    source = decode_once(EncodedImages(files), limit_bytes=100)
    picture(0, 1).save(files[1])
    with pytest.raises(MismatchError, match=r"1.png is \(1, 1\) pixels high and wide, but \(16, 16\) when it was list"):
        source.images(np.arange(3))


def write_parquet(folder, seeds):
    rows = []
    for number, seed in enumerate(seeds):
        picture(seed, 16 + number).save(stream := io.BytesIO(), "PNG")
        rows.append({"bytes": stream.getvalue(), "path": None})
    column = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"img": column, "label": [number % 2 for number in range(len(rows))]})
    for name in ("train-0", "train-1", "test-0"):
        pq.write_table(table, folder / f"{name}.parquet")
    return datasets.load(f"parquet:{folder}").train


def test_a_row_of_a_parquet_file_is_held_to_its_digest(tmp_path):
    known = write_parquet(tmp_path, range(4)).digests()
    changed = write_parquet(tmp_path, [0, 1, 99, 3])
    changed.expect(known, "in the store at S")
    with pytest.raises(
        MismatchError, match=rf"sample 6 differs .*{tmp_path}/train-1.parquet row 2 with label 0 has dig"
    ):
        changed.images(np.array([7, 6]))


def test_the_digests_of_another_store_are_refused_and_a_wrong_guess_is_taken_back(place):
    train, right = load(place).train, place.knowledge.sample_digest
    wrong = right.copy()
    wrong[[3, 7]] += np.uint64(1)
    if train.on_demand:  # nothing is compared before an image is decoded
        train.expect(wrong, "in the store at W")
    train.expect(right, "in the store at R")
    assert len(all_of(train)) == 12
    with pytest.raises(MismatchError, match=r"sample 3 differs .*ant/3.png.* with label 0 has .*in the store at W"):
        train.expect(wrong, "in the store at W")
    assert np.array_equal(train.digests(), right)
    assert len(all_of(train)) == 12


def test_a_store_is_matched_without_reading_images_that_are_decoded_on_demand(lazy):
    dataset = load(lazy)
    for file in (lazy.images / "train").rglob("*.png"):
        file.unlink()
    check.check_data(lazy.knowledge, dataset)
    assert dataset.identity() == lazy.knowledge.knowledge.data
    with pytest.raises(NotFoundError, match="has vanished"):
        all_of(dataset.train)
    renamed = replace(dataset, classes=("bee", "ant", "cow"))
    with pytest.raises(MismatchError, match=r"differ in classes\[0\]: 'ant' against 'bee'; use the data the store"):
        check.check_data(lazy.knowledge, renamed)


def test_only_the_images_of_a_condensed_set_are_read_in_training(lazy, capsys):
    chosen = condensed(lazy.knowledge, keep=0.25)
    manifest.write(lazy.root / "set.parquet", chosen)
    given = ("--manifest", lazy.root / "set.parquet")
    assert outcome(capsys, *train(lazy, *given))[0] == 0
    left_out = np.setdiff1d(np.arange(12), batches.needed_rows(chosen))
    assert left_out.size
    for sample in left_out.tolist():
        file = lazy.images / "train" / NAMES[sample // PER_CLASS] / f"{sample % PER_CLASS}.png"
        picture(99, 20).save(file)
    assert outcome(capsys, *train(lazy, *given, out="again"))[0] == 0
    assert same_files(lazy.root / "run", lazy.root / "again")


def test_sample_digests_that_do_not_belong_to_the_stores_identity_are_corruption(lazy, tmp_path):
    dataset, held = load(lazy), lazy.knowledge
    plan = plan_store(12, 1, [form()])
    with writer.create(tmp_path / "s", held.knowledge, plan, held.labels, held.sample_digest + np.uint64(1)) as writing:
        finish(writing)
    with pytest.raises(CorruptionError, match=r"sample digests in the store at .* are not those of its identity"):
        check.check_data(reader.open(tmp_path / "s"), dataset)


FINGERPRINTS = r"the store at \S+ \(data [0-9a-f]{12}\).*the data folder:\S+ \(([0-9a-f]{12}|decoded on demand)\)"
DIFFERS = rf"\(image, label or order\): .*has digest {DIGEST}, .*{DIGEST} in the store"


def moved(*pairs):
    def move(place):
        for old, new in pairs:
            (place.images / old).rename(place.images / new)

    return move


def dropped(place):
    (place.images / "train/bee/1.png").unlink()


def looped(place):
    file = place.images / "train/bee/1.png"
    file.unlink()
    os.symlink(file, file)


ENDINGS = {
    "a bee dropped": (dropped, 4, rf"{FINGERPRINTS} differ in count: 12 against 11; .* differs is [57]; use the data"),
    "another label": (
        moved(("train/cow/0.png", "train/bee/9.png")),
        4,
        rf"the data folder:.* is not what the teacher of the store at .*\(data [0-9a-f]{{12}}\) saw.*sample 8 differs "
        rf".*train/bee/9.png.* with label 1 \('bee'\) has digest {DIGEST}, label 2 \('cow'\) and {DIGEST} in the store",
    ),
    "another image": (replaced, 4, rf"sample 5 differs .*bee/1.png.*label 1.* has digest {DIGEST}"),
    "another order": (
        moved(*((f"train/ant/{old}.png", f"train/ant/{new}.png") for old, new in ("19", "31", "93"))),
        4,
        rf"sample [13] differs {DIFFERS}",
    ),
    "class names in another order": (
        moved(("train/bee", "train/dog"), ("val/bee", "val/dog")),
        4,
        rf"{FINGERPRINTS} differ in classes\[1\]: 'bee' against 'cow'; .*precompute a new store",
    ),
    "damage": (truncated, 3, r"bee/1.png is not a readable image"),
}
"""what happens to the images between precompute and train -> how training ends, and what it says"""


@pytest.mark.parametrize("what", ENDINGS)
def test_images_changed_between_precompute_and_train_end_training(place, capsys, what):
    change, expected, said = ENDINGS[what]
    change(place)
    code, error = outcome(capsys, *train(place))
    assert (code, bool(re.search(said, error))) == (expected, True), error
    assert not list(place.root.glob("run/*.safetensors"))
    assert what != "class names in another order" or not (place.root / "run").exists()


def test_training_goes_on_to_the_same_bytes_once_the_image_is_back(lazy, capsys):
    good = (lazy.images / "train/bee/1.png").read_bytes()
    assert outcome(capsys, *train(lazy, out="undisturbed"))[0] == 0
    file = replaced(lazy)
    assert outcome(capsys, *train(lazy))[0] == 4
    assert not (lazy.root / "run/summary.json").exists()
    file.write_bytes(good)
    assert outcome(capsys, *train(lazy))[0] == 0
    assert same_files(lazy.root / "undisturbed", lazy.root / "run")


def test_precompute_reads_every_image_and_refuses_one_that_cannot_be_read(place, capsys):
    for change, expected, said in ((truncated, 3, "is not a readable image"), (looped, 1, "cannot be read")):
        change(place)
        code, error = outcome(capsys, *precompute(place))
        assert (code, f"bee/1.png {said}" in error) == (expected, True)
        assert not (place.root / "new/_kcd/commit.0.json").exists()


@pytest.mark.parametrize(("command", "left"), [(train, "run/summary.json"), (precompute, "new")])
def test_an_image_that_vanishes_after_the_listing_ends_a_command_with_10(lazy, capsys, command, left):
    condensed_set.load_data(f"folder:{lazy.images}")  # listed once per process
    file = lazy.images / "train/bee/1.png"
    file.unlink()
    code, error = outcome(capsys, *command(lazy))
    assert (code, f"the image {file} has vanished" in error) == (10, True)
    assert not (lazy.root / left).exists()
