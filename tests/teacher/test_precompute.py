"""Data and teacher to store: resumed, grown, imported, guarded, checked again."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import failure, outcome
from killing import finished
from lessons import CLASSES, CPU, condensed, digits, teacher_of, wide
from pupils import (
    SPEC,
    TRAIN,
    BrokenOffError,
    command,
    everything,
    leftovers,
    promised,
    same_files,
    school,
    stop_after,
)
from torch import nn
from torch.nn import functional

from kcdcache.commands import verify
from kcdcache.condensation import manifest
from kcdcache.errors import MismatchError, SettingsError, UnfinishedError
from kcdcache.progress import silent
from kcdcache.settings import PrecomputeSettings
from kcdcache.store import encoding, reader
from kcdcache.teacher import precompute, teacher
from kcdcache.training import requery
from kcdcache.views import rules

FIELDS = ("logits", "penultimate")
CROPS = {"augment": "crop", "padding": 2, "batch_size": 64, "min_accuracy": 0}
IMPORT = {"augment": "crop", "padding": 2, "encoding": "float32", "min_accuracy": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return school(tmp_path_factory.mktemp("school"), fields=FIELDS)


def run(place, path, network=None, progress=silent, data=None, **changes):
    wanted = PrecomputeSettings(**(CROPS | {"views": 3, "encoding": "float32", "fields": FIELDS} | changes))
    return precompute.run(wanted, data or place.data, network or place.network, path, progress)


def crops(place, index, view):
    rule, images = place.knowledge.knowledge.views, torch.from_numpy(place.data.train.images(index))
    return rules.apply(rule, images, rules.parameters(rule, index, view))


def said_by(network, pixels):
    """The teacher's outputs on the store's fixed batches, computed here."""
    batched = [teacher.outputs(network, part, FIELDS) for part in pixels.split(64)]
    return {field: torch.cat([part[field] for part in batched]).numpy() for field in FIELDS}


def test_the_store_holds_what_the_teacher_says_and_tells_what_is_there(place):
    everyone, right = np.arange(TRAIN), []
    for view in range(3):
        expected = said_by(place.network, crops(place, everyone, view))
        right.append(float((expected["logits"].argmax(1) == place.data.train.labels).mean()))
        for field in FIELDS:
            assert np.array_equal(place.knowledge.read(field, view, everyone), expected[field]), field
    told = precompute.describe(place.knowledge.path)
    assert (told["count"], told["views"], told["teacher_forwards"]) == (TRAIN, 3, 3 * TRAIN)
    assert told["teacher_accuracy"] == right
    assert told["fields"] == {"logits": "float32", "penultimate": "float32"}
    assert told["knowledge_id"] == place.knowledge.knowledge_id


def test_broken_off_and_resumed_gives_the_same_bytes_and_computes_only_what_is_missing(place, tmp_path):
    with pytest.raises(BrokenOffError):
        run(place, tmp_path / "store", progress=stop_after(2))
    with pytest.raises(UnfinishedError, match="run the same `kcdcache precompute` again"):
        reader.open(tmp_path / "store")
    done = []
    run(place, tmp_path / "store", progress=lambda what, now, total, remark: done.append((now, total)))
    assert done[-1] == (3 * TRAIN, 3 * TRAIN)
    assert done[0][0] >= 2 * TRAIN
    assert same_files(place.knowledge.path, tmp_path / "store")
    assert not leftovers(tmp_path)


def test_views_and_fields_grow_to_the_same_values(place, tmp_path):
    first = run(place, tmp_path / "store", views=1, fields=("logits",))
    run(place, tmp_path / "store", views=2, fields=("logits",))
    told = run(place, tmp_path / "store", views=3)
    assert run(place, tmp_path / "store", views=2) == told  # fewer views than there are
    grown, everyone = reader.open(tmp_path / "store"), np.arange(TRAIN)
    assert (grown.views, len(grown.commits)) == (3, 3)
    for field in FIELDS:
        for view in range(3):
            expected = place.knowledge.read(field, view, everyone)
            assert np.array_equal(grown.read(field, view, everyone), expected)
    assert grown.knowledge_id == first["knowledge_id"] == place.knowledge.knowledge_id
    assert grown.plan.layout_id != first["layout_id"]
    assert told["teacher_accuracy"][:1] == first["teacher_accuracy"]  # the field that was added later counts nothing


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"padding": 1}, r"views\.padding"),
        ({"view_seed": 1}, r"views\.seed"),
        ({"encoding": "float16"}, "'logits' is stored as float32"),
    ],
)
def test_another_store_at_the_place_is_refused(place, tmp_path, change, said):
    run(place, tmp_path / "store", views=1)
    with pytest.raises((MismatchError, SettingsError), match=said):
        run(place, tmp_path / "store", **({"views": 1} | change))


def one_ulp_off(network):
    module = copy.deepcopy(network.module)
    with torch.no_grad():
        weight = module.fc.weight.view(-1)[:1]
        weight.copy_(torch.nextafter(weight, torch.tensor([torch.inf])))
    return module, network.transform


def brighter(network):
    return network.module, replace(network.transform, mean=tuple(m + 0.01 for m in network.transform.mean))


OTHER_TEACHERS = {
    "another": (lambda network: (teacher_of(digits(), seed=9).module, network.transform), r"teacher\.weights"),
    "one ulp off": (one_ulp_off, r"teacher\.weights"),
    "another transform": (brighter, r"teacher\.transform\.mean"),
}


@pytest.mark.parametrize("which", OTHER_TEACHERS)
def test_another_teacher_at_the_place_is_refused(place, tmp_path, which):
    change, said = OTHER_TEACHERS[which]
    run(place, tmp_path / "store", views=1)
    other = teacher.freeze(*change(place.network), "resnet8", place.data.classes, CPU)
    with pytest.raises(MismatchError, match=said):
        run(place, tmp_path / "store", network=other, views=1)


def trained(place, path):
    """A teacher that knows its digits by way of least squares: a linear network on pixels."""
    images = place.data.train.images(np.arange(TRAIN)).astype(np.float64) / 255
    inputs = ((images - place.data.mean) / place.data.std).transpose(0, 3, 1, 2).reshape(TRAIN, -1)
    wanted = np.eye(CLASSES)[place.data.train.labels]
    solved = np.linalg.solve(inputs.T @ inputs + 100 * np.eye(inputs.shape[1]), inputs.T @ wanted)
    network = linear(CLASSES)
    with torch.no_grad():
        network[1].weight.copy_(torch.from_numpy(solved.T))
        network[1].bias.zero_()
    torch.save(network.state_dict(), path)
    return path


def linear(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes))


def test_a_wrong_normalisation_is_refused(place, tmp_path):
    path = trained(place, tmp_path / "linear.pt")
    options = {"teacher": "test_precompute:linear", "weights": path, "augment": "none", "store": tmp_path / "store"}
    wrong = {"teacher_mean": (125.3, 123.0, 113.9), "teacher_std": (63.0, 62.1, 66.7)}  # of pixels in [0, 255]
    with pytest.raises(
        MismatchError, match=r"right on .*% of the first 200 samples of view 0, expected at least 30.00%"
    ):
        command(place, "precompute", **(options | wrong))
    assert not (tmp_path / "store" / "logits" / "c.0.0.0").exists()
    told = command(place, "precompute", **(options | {"store": tmp_path / "good"}))
    assert told["teacher_accuracy"][0] > 0.9
    told = command(place, "precompute", min_accuracy=0.0, **(options | wrong | {"store": tmp_path / "weak"}))
    assert told["teacher_accuracy"][0] < 0.3


def test_the_demanded_accuracy_and_the_number_of_views_are_the_users(place, tmp_path):
    for changes, error, said in (
        ({"min_accuracy": 0.99}, MismatchError, r"expected at least 99.00%"),
        ({"views": 26}, SettingsError, "25"),
        ({"views": "all", "augment": "resized-crop-flip"}, SettingsError, "has no end; give a number"),
    ):
        with pytest.raises(error, match=said):
            run(place, tmp_path / "store", **changes)
    assert run(place, tmp_path / "all", padding=1, views="all", fields=("logits",))["views"] == 9


def imported(place, path, logits, **changes):
    file = path.with_suffix(".npy")
    np.save(file, logits)
    return command(place, "precompute", store=path, from_logits=file, **(IMPORT | changes))


def test_imported_logits_are_the_computed_ones(place, tmp_path):
    everyone = np.arange(TRAIN)
    logits = np.stack([place.knowledge.read("logits", view, everyone) for view in range(3)])
    told = imported(place, tmp_path / "store", logits)
    found = reader.open(tmp_path / "store")
    for view in range(3):
        assert np.array_equal(found.read("logits", view, everyone), logits[view])
        assert found.measurements(view)["correct"] == place.knowledge.measurements(view)["correct"]
    assert (told["views"], told["teacher_forwards"]) == (3, 0)
    assert promised(tmp_path / "store")["logits/c.0.0.0"] == promised(place.knowledge.path)["logits/c.0.0.0"]
    imported(place, tmp_path / "one", logits[0].astype(np.float64))  # a single view may come without its axis
    found = reader.open(tmp_path / "one")
    assert found.views == 1
    assert np.array_equal(found.read("logits", 0, everyone), logits[0])
    with pytest.raises(MismatchError, match="were imported from elsewhere"):
        verify.verify(tmp_path / "store", data=SPEC, teacher=str(place.teacher))


@pytest.mark.parametrize(
    ("array", "error", "said"),
    [
        (np.zeros((TRAIN, 9), np.float32), MismatchError,
         r"holds float32 \(1, 200, 9\), expected floats of shape \(views, 200, 10\)"),
        (np.zeros((3, 199, 10), np.float32), MismatchError, r"\(3, 199, 10\)"),
        (np.zeros((TRAIN, 10), np.int64), MismatchError, "holds int64"),
        (np.zeros((1, 1, TRAIN, 10), np.float32), MismatchError, r"\(1, 1, 200, 10\)"),
        (np.random.default_rng(0).normal(size=(TRAIN, 10)).astype(np.float32), MismatchError,
         r"right on .* expected at least 30\.00%"),
        (b"not an array", SettingsError, "is not a plain .npy array"),
    ],
)  # fmt: skip
def test_what_are_no_logits_of_these_data_is_refused(place, tmp_path, array, error, said):
    file = tmp_path / "store.npy"
    if isinstance(array, bytes):
        file.write_bytes(array)
    else:
        np.save(file, array)
    with pytest.raises(error, match=said):
        command(place, "precompute", store=tmp_path / "store", from_logits=file, **IMPORT | {"min_accuracy": None})
    assert not (tmp_path / "store/_kcd/commit.0.json").exists()


def test_recheck_computes_all_points_if_asked_and_sees_a_teacher_whose_identity_lies(place):
    """A changed library would say other things under the same identity."""
    found = verify.recheck(place.knowledge, place.data, place.network, points=10**9)
    assert (found.points, found.differing) == (3 * TRAIN, 0)
    changed = teacher_of(place.data)
    with torch.no_grad():
        changed.module.fc.weight[2, :4] += 0.5
    found = verify.recheck(place.knowledge, place.data, replace(changed, identity=place.network.identity), points=150)
    assert (found.differing, found.largest > 0.01) == (found.points, True)


def test_requery_says_what_the_teacher_says_of_the_mixes_and_changes_no_byte_when_asked_again(place, tmp_path):
    chosen, file = condensed(place.knowledge, keep=0.6), tmp_path / "set.parquet"
    rows = np.flatnonzero(chosen.mixed)
    manifest.write(file, chosen)
    assert command(place, "precompute", manifest=file, dry_run=True)["points"] == 3 * len(rows)
    assert list(tmp_path.iterdir()) == [file]
    told = command(place, "precompute", manifest=file, fields=FIELDS)
    found = reader.open(requery.path_for(file))
    for view in range(3):
        kept, dropped = (crops(place, index[rows], view) for index in (chosen.index, chosen.partner))
        share = torch.from_numpy(chosen.epsilon[rows]).view(-1, 1, 1, 1)
        for field, expected in said_by(place.network, (1 - share) * kept + share * dropped).items():
            assert np.array_equal(found.read(field, view, np.arange(len(rows))), expected)
    assert told["teacher_forwards"] == 3 * len(rows)
    before = everything(tmp_path)
    assert command(place, "precompute", manifest=file, fields=FIELDS) == told
    assert everything(tmp_path) == before
    manifest.write(tmp_path / "plain.parquet", replace(chosen, **manifest.plain(chosen.index)))
    with pytest.raises(MismatchError, match=r"no mixed points \(K_Aug is empty\)"):
        command(place, "precompute", manifest=tmp_path / "plain.parquet")


# probabilities, and teachers that change their minds


def softmax(logits):
    return torch.from_numpy(logits).softmax(-1).numpy()


PROBABILITIES = {
    "a softmax": softmax,
    "in half precision": lambda logits: softmax(logits).astype(np.float16),
    "in percent": lambda logits: 100 * softmax(logits),
    "one-hot": lambda logits: np.eye(CLASSES, dtype=np.float32)[logits.argmax(-1)],
    "smoothed": lambda logits: 0.9 * softmax(logits).astype(np.float64) + 0.01,
}


def words(store, *more):
    return ["precompute", "-q", "--data", SPEC, "--augment", "none", "--min-accuracy", 0, "--store", store,
            "--encoding", "float32", *more]  # fmt: skip


@pytest.mark.parametrize("kind", PROBABILITIES)
def test_probabilities_given_as_logits_are_refused_and_their_logarithm_is_stored_in_the_same_place(
    place, tmp_path, capsys, kind
):
    file, everyone = tmp_path / "p.npy", np.arange(TRAIN)
    given = PROBABILITIES[kind](place.knowledge.read("logits", 0, everyone))
    np.save(file, given)
    code, said = failure(capsys, *words(tmp_path / "store", "--from-logits", file))
    assert (code, f"give `--from-probabilities {file}` instead" in said) == (4, True), said
    assert "probabilities, not logits: 200 of the rows of samples 0 to 199 in view 0" in said
    assert outcome(capsys, *words(tmp_path / "store", "--from-probabilities", file))[0] == 0
    found = reader.open(tmp_path / "store")
    wanted = given.astype(np.float64) / given.astype(np.float64).sum(1, keepdims=True)
    assert softmax(found.read("logits", 0, everyone)) == pytest.approx(wanted, abs=1e-6)
    assert outcome(capsys, *words(tmp_path / "same", "--from-logits", file, "--from-probabilities"))[0] == 0
    assert reader.open(tmp_path / "same").knowledge_id == found.knowledge_id


def test_what_only_looks_like_probabilities_in_some_rows_or_views_is_told_apart(place, tmp_path, capsys):
    everyone = np.arange(TRAIN)
    logits = place.knowledge.read("logits", 0, everyone)
    mixed = softmax(logits)
    mixed[:3] = logits[:3]  # 98.5 % of the rows
    np.save(tmp_path / "mixed.npy", mixed)
    assert outcome(capsys, *words(tmp_path / "mixed", "--from-logits", tmp_path / "mixed.npy"))[0] == 0
    code, said = failure(capsys, *words(tmp_path / "m", "--from-probabilities", tmp_path / "mixed.npy"))
    assert (code, "gives a row of numbers from -" in said, "give --from-logits" in said) == (4, True, True), said
    np.save(tmp_path / "second.npy", np.stack([logits, softmax(logits)]))
    crops = ["crop" if word == "none" else word for word in words(tmp_path / "second")]
    code, said = failure(capsys, *crops, "--from-logits", tmp_path / "second.npy")
    assert (code, "in view 1" in said) == (4, True), said
    np.save(tmp_path / "logarithm.npy", np.log(softmax(logits)))
    assert outcome(capsys, *words(tmp_path / "log", "--from-logits", tmp_path / "logarithm.npy"))[0] == 0


BETWEEN = {
    "a sigmoid": (lambda logits: 1 / (1 + np.exp(-logits)), True),
    "a sigmoid in half precision": (lambda logits: (1 / (1 + np.exp(-logits))).astype(np.float16), True),
    "labels of several classes": (lambda logits: (logits > np.sort(logits)[:, -3:-2]).astype(np.float32), True),
    "all but one row": (lambda logits: np.where(np.arange(TRAIN)[:, None], 1 / (1 + np.exp(-logits)), logits), False),
    "cosines": (lambda logits: logits / np.linalg.norm(logits, axis=1, keepdims=True), False),
    "logits": (lambda logits: logits, False),
}
"""outputs made of logits -> whether they are taken for those of a sigmoid"""


@pytest.mark.parametrize("kind", BETWEEN)
def test_outputs_that_all_lie_between_0_and_1_are_warned_of_once_and_stored(place, tmp_path, capsys, caplog, kind):
    make, warned = BETWEEN[kind]
    given = make(place.knowledge.read("logits", 0, np.arange(TRAIN)))
    np.save(tmp_path / "p.npy", np.stack([given, given]))
    crops = ["crop" if word == "none" else word for word in words(tmp_path / "store")]
    assert outcome(capsys, *crops, "--from-logits", tmp_path / "p.npy")[0] == 0
    assert caplog.text.count("outputs on samples 0 to 199 in view 0 lie in [0, 1], as a sigmoid's do") == warned


def ends(module, path):
    """A file of weights, and the words that name them with the network of this module that they are for."""
    torch.manual_seed(0)
    made = module(CLASSES)
    torch.save(made.state_dict(), path)
    return made, ("--teacher", f"test_precompute:{module.__name__}", "--weights", path)


def soft(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, num_classes), nn.Softmax(1))


def test_a_teacher_that_ends_in_a_softmax_is_refused_or_gives_its_logarithm_in_every_field(place, tmp_path, capsys):
    module, named = ends(soft, tmp_path / "soft.pt")
    asked = words(tmp_path / "store", *named, "--fields", "logits,rotations,boundary")
    code, said = failure(capsys, *asked)
    assert (code, "give --from-probabilities, which takes their logarithm" in said) == (4, True), said
    assert outcome(capsys, *asked, "--from-probabilities")[0] == 0
    found, rule = reader.open(tmp_path / "store"), rules.rule_from(PrecomputeSettings(augment="none"), (16, 16))
    pixels = precompute.view_pixels(place.data, rule, np.arange(TRAIN), 0, CPU)
    plain = teacher.freeze(module[:2], place.network.transform, "plain", place.data.classes, CPU)
    for field, values in teacher.outputs(plain, pixels, ["logits", "rotations:logits"]).items():
        read = torch.from_numpy(found.read(field, 0, np.arange(TRAIN)))
        assert torch.allclose(read, values.log_softmax(-1), atol=1e-5), field
    assert found.read("boundary:logits", 0, np.arange(9)).max() <= 0
    code, out, _ = outcome(capsys, "verify", tmp_path / "store", *named, "--data", SPEC, "--points", 64)
    assert (code, "differing: 0" in out) == (0, True), out


class Unsteady(nn.Module):
    """A linear network whose logits are changed by a function."""

    def __init__(self, change):
        super().__init__()
        self.inner, self.change, self.calls = linear(CLASSES), change, 0

    def forward(self, pixels):
        self.calls += 1
        return self.change(self, self.inner(pixels))


PASSES, BATCH = "between two passes over the same images", "it normalises by the statistics of the batch"
CHANGES = {
    "dropout": (lambda own, z: functional.dropout(z, 0.1, training=True), PASSES),
    "noise": (lambda own, z: z + 0.1 * torch.randn_like(z), PASSES),
    "a counter": (lambda own, z: z * own.calls, PASSES),
    "stochastic depth": (lambda own, z: z * (1 + torch.rand(len(z), 1)), PASSES),
    "batch statistics": (lambda own, z: functional.batch_norm(z, None, None, training=True), BATCH),
    "the mean of the batch": (lambda own, z: z - z.mean(0), BATCH),
    "the first of the batch": (lambda own, z: z + z.flip(0), BATCH),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_teacher_whose_outputs_change_is_refused_before_anything_is_written(place, tmp_path, change):
    torch.manual_seed(0)
    module = Unsteady(CHANGES[change][0])
    network = teacher.freeze(module, place.network.transform, "unsteady", place.data.classes, CPU)
    with pytest.raises(MismatchError, match=rf"teacher's logits on samples 0 to 31 of view 0 .*{CHANGES[change][1]}"):
        run(place, tmp_path / "store", network, fields=("logits",))
    assert [file.name for file in (tmp_path / "store/_kcd/log/0").glob("v*")] == []
    run(place, tmp_path / "store", fields=("logits",))


def dropping(num_classes):
    return nn.Sequential(linear(num_classes), AlwaysDropout())


class AlwaysDropout(nn.Module):
    def forward(self, pixels):
        return functional.dropout(pixels, 0.3, training=True)


def test_the_command_refuses_an_unsteady_teacher_in_a_dry_run_too(tmp_path, capsys):
    asked = words(tmp_path / "store", *ends(dropping, tmp_path / "d.pt")[1])
    for more in ((), ("--dry-run",)):
        code, said = failure(capsys, *asked, *more)
        assert (code, "dropout or noise is active" in said) == (4, True), said


def test_layers_that_look_at_one_image_alone_are_steady(place, tmp_path):
    alone = nn.Sequential(
        nn.InstanceNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(768, CLASSES), nn.BatchNorm1d(10)
    )
    network = teacher.freeze(alone, place.network.transform, "alone", place.data.classes, CPU)
    assert run(place, tmp_path / "store", network, fields=("logits",))["count"] == TRAIN


# memory


@pytest.mark.parametrize("how", [{"encoding": "float32"}, {"encoding": "top:3"}, {"encoding": "float16"}], ids=str)
def test_a_part_encoded_in_many_blocks_has_the_same_bytes(place, tmp_path, monkeypatch, how):
    run(place, tmp_path / "whole", **how)
    monkeypatch.setattr(encoding, "BLOCK_BYTES", 1)
    run(place, tmp_path / "blocks", **how)
    assert same_files(tmp_path / "whole", tmp_path / "blocks")


MEASURED = """
import resource
from kcdcache.cli import main
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
code = main._outcome({words!r})
print("PEAK", code, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "count"), [("top:16", 20_000), ("float16", 8_000), ("--from-logits", 8_000)])
def test_many_classes_take_three_times_a_parts_dense_rows_and_300_mb_at_most(start, tmp_path, how, count):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (count, 8, 8, 3), np.uint8), np.arange(count)
    arrays = {"train_images": images, "train_labels": labels, "test_images": images[:50], "test_labels": labels[:50]}
    np.savez(tmp_path / "d.npz", **arrays)
    torch.manual_seed(0)
    torch.save(wide(count).state_dict(), tmp_path / "w.pt")
    source = ["--teacher", "lessons:wide", "--weights", tmp_path / "w.pt", "--encoding", how]
    if how == "--from-logits":
        np.save(tmp_path / "z.npy", random.normal(size=(count, count)).astype(np.float16))
        source = [how, tmp_path / "z.npy", "--encoding", "top:16"]
    data, store, file = f"arrays:{tmp_path / 'd.npz'}", tmp_path / "store", tmp_path / "set.parquet"
    asked = ["precompute", "--data", data, "--store", store, "--min-accuracy", 0, "--augment", "none", *source]
    used = [peak_of(start, tmp_path, asked)]
    knowledge = reader.open(store)
    manifest.write(file, condensed(knowledge, keep=0.6))
    baked = ["--bake", "--temperature", 4] if how == "float16" else []
    export = ["export", "--manifest", file, "--store", store, "--out", tmp_path / "set", *baked]
    used.append(peak_of(start, tmp_path, export))
    assert max(used) < 3 * 4 * knowledge.plan.part_rows * count + 300 * 2**20, used


def peak_of(start, folder, command):
    """Bytes that a command takes beyond what an interpreter has after all imports."""
    (folder / "log").unlink(missing_ok=True)
    finished(start, MEASURED.format(words=list(map(str, command))), folder / "log")
    said = (folder / "log").read_text()
    _, code, peak = next(line for line in said.splitlines() if line.startswith("PEAK")).split()
    assert code == "0", said
    return int(peak)
