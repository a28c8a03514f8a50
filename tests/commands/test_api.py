"""The Python API on real datasets and modules; the guide's code runs as it stands."""

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset as TorchDataset

import kcdcache as kc
from kcdcache.datasets import datasets
from kcdcache.errors import KcdcacheError, MismatchError, NotFoundError, SettingsError
from kcdcache.networks import registry

GUIDE = Path(__file__).parents[2] / "docs/pages/guides/python.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.convolution, self.classifier = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, classes)

    def forward(self, images):
        return self.classifier(self.convolution(images).relu().mean((2, 3)))


class Items(TorchDataset):
    """Given items as a dataset; `change` is applied each time one is read."""

    def __init__(self, items, change=lambda item: item, **more):
        self.items, self.change = items, change
        vars(self).update(more)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        return self.change(self.items[row])


def pixels(count=12, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def labelled(images, classes=3):
    return [(image, row % classes) for row, image in enumerate(images)]


AS_GIVEN = {
    "array": lambda image: image,
    "PIL image": Image.fromarray,
    "uint8 tensor": lambda image: torch.from_numpy(image.transpose(2, 0, 1).copy()),
    "float tensor": lambda image: torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255,
}


@pytest.mark.parametrize("kind", AS_GIVEN)
def test_images_of_every_kind_are_the_same_data_as_in_an_array_file(kind, tmp_path):
    images, others = pixels(), pixels(6, seed=1)
    names = {"train_images": images, "test_images": others, "classes": np.array(["a", "b", "c"])}
    labels = {"train_labels": np.arange(12) % 3, "test_labels": np.arange(6) % 3}
    np.savez(tmp_path / "same.npz", **names, **labels)
    convert = AS_GIVEN[kind]
    found = kc.data(
        train=Items(labelled([convert(image) for image in images])),
        test=Items(labelled([convert(image) for image in others])),
        classes=["a", "b", "c"],
    )
    expected = datasets.load(f"arrays:{tmp_path / 'same.npz'}")
    assert found.identity() == expected.identity()
    assert found.test.digest() == expected.test.digest()
    assert (found.mean, found.std) == (expected.mean, expected.std)


def test_texts_mappings_class_names_and_label_tensors():
    images = pixels(4)
    texts = [{"img": Image.fromarray(image), "kind": name} for image, name in zip(images, "baba", strict=True)]
    assert kc.data(train=Items(texts), test=Items(texts)).classes == ("a", "b")
    both = [{**item, "other": 1 - row % 2, "label": row % 2} for row, item in enumerate(texts)]
    assert kc.data(train=Items(both), test=Items(both)).train.labels.tolist() == [0, 1, 0, 1]  # the usual name
    assert kc.data(train=Items(both), test=Items(both), label="other").train.labels.tolist() == [1, 0, 1, 0]
    tensors = [(image, torch.tensor(row % 2)) for row, image in enumerate(images)]
    named = Items(tensors, classes=["no", "yes"])
    assert kc.data(train=named, test=named).classes == ("no", "yes")


def test_images_of_different_sizes_are_kept_without_loss():
    images = [pixels(1, side, side)[0] for side in (8, 9, 10, 8)]
    found = kc.data(train=Items(labelled(images, 2)), test=Items(labelled(images, 2)))
    assert found.train.image_size is None
    assert all(np.array_equal(*pair) for pair in zip(found.train.images(np.arange(4)), images, strict=True))


def noisy(item):
    return np.random.default_rng().integers(0, 256, (8, 8, 3), np.uint8), item[1]


GOOD = labelled(pixels())
WRONG = {
    "random": (Items(GOOD, noisy), {}, r"train\[0\] is another image when it is read again.*augment"),
    "normalised": (
        Items([(torch.randn(3, 8, 8), row % 2) for row in range(4)]), {}, r"train\[0\] has float32.*normalisation"
    ),
    "not a dataset": (iter(GOOD), {}, "map-style dataset.*list_iterator"),
    "no items": (Items([]), {}, "without items"),
    "channels first": (Items(labelled(pixels().transpose(0, 3, 1, 2))), {}, r"uint8 array.*\(3, 8, 8\)"),
    "a label of 1.5": (Items([(image, 1.5) for image in pixels(3)]), {}, "whole number or a text.*1.5"),
    "a label too large": (Items(GOOD), {"classes": ["a", "b"]}, r"train\[2\] has the label 2; there are 2 classes"),
    "a class without images": (Items(GOOD), {"classes": list("abcd")}, r"no image of 1 of 4 classes \(d\)"),
    "several labels": (Items([{"i": i, "x": 0, "y": 1} for i in pixels(3)]), {}, "several keys.*x, y.*label=KEY"),
    "no such key": (Items([{"i": i, "x": 0} for i in pixels(3)]), {"image": "im"}, "has no 'im'"),
    "a mean alone": (Items(GOOD), {"mean": (0.5, 0.5, 0.5)}, "mean and std belong together"),
    "a mean too short": (Items(GOOD), {"mean": (0.5,), "std": (0.5,)}, "one number for each"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_datasets_that_cannot_be_used_are_refused_with_what_was_found(case):
    train, options, told = WRONG[case]
    with pytest.raises(KcdcacheError, match=f"(?s){told}"):
        kc.data(train=train, test=Items(GOOD), **options)


def test_hugging_face_splits_are_datasets():
    hub = pytest.importorskip("datasets", minversion="2")  # not the folder of tests
    kinds = hub.Features({"img": hub.Image(), "fine": hub.ClassLabel(names=["x", "y"]), "id": hub.Value("string")})
    files = []
    for image in pixels(4):
        Image.fromarray(image).save(file := io.BytesIO(), "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    table = pa.table({"img": files, "fine": [0, 1, 0, 1], "id": list("abcd")}, schema=kinds.arrow_schema)
    # with a fingerprint of its own, since datasets 5.2 cannot make one with pyarrow 26
    split = hub.Dataset(hub.table.InMemoryTable(table), info=hub.DatasetInfo(features=kinds), fingerprint="own")
    found = kc.data(train=split, test=split, label="fine")
    assert (found.classes, found.train.labels.tolist()) == (("x", "y"), [0, 1, 0, 1])
    assert np.array_equal(found.train.images(np.arange(4)), pixels(4))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set, a teacher that is a module, its store and a condensed student, all from Python objects."""
    folder = tmp_path_factory.mktemp("api")
    items = Items(labelled(pixels(48)))
    data = kc.data(train=items, test=items)
    teacher = registry.build(registry.adopt(Net, 3), 3, seed=5)
    store = kc.precompute(teacher, data, folder / "store", views=2, min_accuracy=0.0)
    run = kc.train(Net, data, store, folder / "run", keep=0.5, epochs=2, stages=2, batch_size=16, threads=1)
    return data, teacher, store, run


def test_a_module_continues_its_store_and_another_one_is_refused(made):
    data, teacher, store, _ = made
    assert re.fullmatch("python:Net@[0-9a-f]{12}", store.knowledge.teacher.architecture)
    assert kc.precompute(teacher, data, store.path, views=3, min_accuracy=0.0).views == 3
    with torch.no_grad():
        other = registry.build("python:" + next(iter(registry.OWN)), 3, seed=6)
    with pytest.raises(MismatchError, match="weights"):
        kc.precompute(other, data, store.path, views=3, min_accuracy=0.0)


def test_stored_outputs_are_those_of_the_module_on_the_normalised_view(made):
    data, teacher, store, _ = made
    batch = next(kc.loader(data, store, epoch=0, batch_size=8, fields=("logits",)))
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (data.mean, data.std))
    with torch.no_grad():
        live = teacher.eval()((batch.pixels - mean) / std)
    torch.testing.assert_close(batch.probabilities, live.softmax(1), atol=1e-4, rtol=0)


def test_a_run_shows_what_it_made_and_gives_its_student(made):
    data, _, store, run = made
    assert len(kc.open_condensed(run)) == run.summary.kept == 24
    images = torch.from_numpy(data.test.images(np.arange(48))).permute(0, 3, 1, 2).float() / 255
    student = run.student
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (student.mean, student.std))
    with torch.no_grad():
        right = student((images - mean) / std).argmax(1).numpy() == data.test.labels
    assert right.mean() == run.accuracy
    for given in (run, student, run.folder):
        found = kc.evaluate(given, data, store=store)
        assert found.splits["test"].top1 == run.accuracy
        assert 0 <= found.agreement.top1 <= 1
    assert "accuracy" in repr(run)
    assert f"{run.accuracy:.2%}" in run._repr_html_()
    assert repr(store).startswith(f"Store('{store.path}': 48 samples x ")
    assert len(run.metrics) == 2


def test_a_student_whose_code_has_changed_does_not_continue_a_run(made):
    data, _, store, run = made

    class Changed(Net):
        def forward(self, images):
            return 2 * super().forward(images)

    with pytest.raises(SettingsError, match="student"):
        kc.train(Changed, data, store, run.folder, keep=0.5, epochs=2, stages=2, batch_size=16, threads=1)
    told = kc.train(Net, data, store, run.folder, keep=0.5, epochs=2, stages=2, batch_size=16, threads=1)
    assert told.summary == run.summary


def test_condense_agrees_with_the_command(made, tmp_path):
    _, _, store, run = made
    half = kc.condense(run, store, keep=0.25, previous=run.condensed, out=tmp_path / "half.parquet")
    words = ["--values", run.values, "--store", store.path, "--keep", "0.25", "--previous", run.condensed]
    command = [sys.executable, "-m", "kcdcache", "condense", *words, "--out", tmp_path / "same.parquet"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    assert (len(half), half.digest) == (12, kc.open_condensed(tmp_path / "same.parquet").digest)
    assert (tmp_path / "half.parquet").read_bytes() == (tmp_path / "same.parquet").read_bytes()


def test_a_network_given_as_an_object_cannot_be_made_by_name_elsewhere(made):
    _, _, _, run = made
    code = f"import kcdcache as kc; kc.open_run({str(run.folder)!r}).student"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "was given as a Python object and cannot be made by its name" in done.stderr


def test_a_networks_name_has_no_address_and_its_own_normalising_layer_is_no_statement_of_statistics(made, caplog):
    class Shown(Net):
        def extra_repr(self):
            return repr(object())

    assert registry.name_of(Shown(3)) == registry.name_of(Shown(3))
    network = Net(3)
    network.register_buffer("mean", torch.zeros(1, 3, 1, 1))
    network.register_buffer("std", torch.ones(1, 3, 1, 1))
    kc.evaluate(network, made[0])
    assert "no mean and std are known of Net" in caplog.text


def test_factories_get_what_they_take():
    takers = [
        lambda num_classes: Net(num_classes),
        lambda classes: Net(classes),
        lambda n: Net(n),
        lambda **given: Net(given["num_classes"]),
        lambda: Net(7),
        lambda in_channels, num_classes: Net(num_classes),
    ]
    assert [registry.call(taker, 7, 3, "it").classifier.out_features for taker in takers] == [7] * 6
    with pytest.raises(SettingsError, match="it needs depth, width"):
        registry.call(lambda depth, width: Net(7), 7, 3, "it")
    with pytest.raises(SettingsError, match=r"it should return a torch\.nn\.Module, it returned int"):
        registry.call(lambda: 7, 7, 3, "it")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            lambda data, store, folder: kc.train("resnet8", data, store, folder, epoch=3),
            "unknown setting 'epoch'",
        ),
        (lambda data, store, folder: kc.train("resnet9", data, store, folder), "unknown network 'resnet9'"),
        (lambda data, store, folder: kc.train(Net(3), data, store, folder), "give `lambda: Net"),
        (lambda data, store, folder: kc.train(3, data, store, folder), "a network's name or a function"),
        (lambda data, store, folder: kc.precompute(3, data, folder), "teacher should be an nn.Module"),
        (lambda data, store, folder: kc.precompute(Net(4), data, folder), "gives 4 logits, the data has 3 classes"),
        (lambda data, store, folder: kc.condense(folder / "no.parquet", store, keep=2), "keep in kc.condense"),
        (lambda data, store, folder: next(kc.loader(data, store, epoch=0, field="logits")), "unknown setting 'field'"),
        (lambda data, store, folder: kc.data(), "a spec, as in"),
        (lambda data, store, folder: kc.open_run(folder), "no run in"),
    ],
)
def test_wrong_arguments_are_named(made, tmp_path, call, told):
    with pytest.raises(KcdcacheError, match=told):
        call(made[0], made[2], tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_package_offers_its_functions_and_names_what_is_missing():
    assert set(kc.__all__) <= set(dir(kc))
    assert all(callable(getattr(kc, name)) for name in kc.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'precompte'; it has .*precompute"):
        getattr(kc, "precompte")  # noqa: B009
    with pytest.raises(NotFoundError, match="no knowledge store"):
        kc.open_store("/nonexistent")


def test_the_guides_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page: dict[str, Any] = {"__name__": "__main__"}
    for block in BLOCKS:
        exec(block, page)
    assert page["run"].summary.finished
    assert len(page["half"]) == 160
    assert page["taught"].shape[1] == 10
