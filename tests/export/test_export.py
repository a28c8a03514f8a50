"""Exported condensed sets: what they hold, what is trained from them, and how they are written."""

import json
import pickle
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets_on_disk import make_pixels, write_npz
from exports import FIELDS, ONE_STAGE, exporting, narrowed, prepared, trained
from killing import POLL, finished, succeeds
from lessons import CPU, precomputed, teacher_of
from lessons import condensed as halved
from PIL import Image
from pupils import SPEC, executed, lines
from stores import content

from kcdcache.commands import verify
from kcdcache.condensation import manifest
from kcdcache.datasets import datasets
from kcdcache.errors import LockedError, MismatchError, NotFoundError, SettingsError, UnfinishedError
from kcdcache.export import condensed_set, write
from kcdcache.export import record as records
from kcdcache.files.atomic import sha256_file
from kcdcache.networks import registry
from kcdcache.networks.input_transform import InputTransform
from kcdcache.report import show
from kcdcache.runs import state
from kcdcache.runs.folder import RunFolder
from kcdcache.store import reader
from kcdcache.teacher import teacher

EVERYTHING = np.arange(200)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = prepared(tmp_path_factory.mktemp("exports"))
    exporting(place, place.root / "plain")
    exporting(place, place.root / "pictures", data=SPEC, with_images=True)
    exporting(place, place.root / "baked", bake=True, temperature=4.0)
    return place


# what it holds


def test_rows_and_bytes_are_counted_against_the_full_store(place, tmp_path, caplog):
    found = exporting(place, tmp_path / "e", dry_run=True)
    assert (found["would"], found["kept"], found["partners"]) == ("export", 80, 40)
    assert (found["rows"], found["rows_full"], found["points"], found["points_full"]) == (120, 200, 360, 600)
    assert "nothing is saved" not in caplog.text
    assert not (tmp_path / "e").exists()
    made = exporting(place, tmp_path / "e")
    assert {key: made[key] for key in found if key in made} == {key: found[key] for key in found if key in made}
    chunks = [sum(f.stat().st_size for f in root.rglob("c.*")) for root in (tmp_path / "e/store", place.knowledge.path)]
    assert [made["bytes"], made["bytes_full"]] == chunks
    assert made["bytes_on_disk"] == sum(f.stat().st_size for f in (tmp_path / "e").rglob("*") if f.is_file())
    manifest.write(tmp_path / "half.parquet", halved(place.knowledge, keep=0.5))  # with the other half as partners
    exporting(place, tmp_path / "half", manifest=tmp_path / "half.parquet", dry_run=True)
    assert "100 kept samples and their 100 partners need the outputs on all 200 samples: nothing is" in caplog.text


def test_an_opened_set_and_its_images_pickled_read_the_same(place):
    ours, data = (
        condensed_set.open(place.root / "pictures").knowledge,
        condensed_set.load_data(f"condensed:{place.root / 'pictures'}"),
    )
    store, images = pickle.loads(pickle.dumps((ours, data)))
    some = ours.held[[5, 0, 9]]
    assert np.array_equal(store.read("logits", 1, some), ours.read("logits", 1, some))
    assert np.array_equal(images.train.images(some), data.train.images(some))


def test_it_has_the_knowledge_of_the_full_store(place):
    opened = condensed_set.open(place.root / "plain")
    assert sha256_file(place.root / "plain/manifest.parquet") == sha256_file(place.file)
    ours, theirs = opened.knowledge, place.knowledge
    assert (ours.count, ours.views, ours.knowledge_id) == (theirs.count, theirs.views, theirs.knowledge_id)
    assert np.array_equal(ours.labels, theirs.labels)
    assert np.array_equal(ours.sample_digest, theirs.sample_digest)
    chunk = place.root / "plain/store/logits/c.0.0.0"
    assert ours.chunk_bytes(ours.held[-2:], ("logits",)) == chunk.stat().st_size
    expected = sorted({*place.set.index.tolist(), *place.set.partner[place.set.mixed].tolist()})
    assert ours.held.tolist() == expected
    for view in range(3):
        held, full = (side.load(view, ours.held, FIELDS) for side in (ours, theirs))
        assert set(held) == set(full)
        assert all(held[name].tobytes() == full[name].tobytes() for name in full)
        some = np.array([expected[7], expected[2], expected[7]])
        assert np.array_equal(ours.read("logits", view, some), theirs.read("logits", view, some))
    missing = np.setdiff1d(EVERYTHING, ours.held)
    with pytest.raises(MismatchError, match=rf"holds nothing of sample {missing[0]}: an exported set has the 120 of 2"):
        ours.load(0, np.sort(np.append(ours.held[:3], missing[:2])), ("logits",))


def test_a_runs_folder_means_its_last_set(place, tmp_path):
    trained(tmp_path / "run", store=place.knowledge.path, stages=2, keep=0.5)
    exporting(place, tmp_path / "e", manifest=tmp_path / "run")
    wanted = state.read_summary(tmp_path / "run").condensed_set
    assert condensed_set.open(tmp_path / "e").manifest.digest == manifest.read(tmp_path / "run" / wanted).digest


def test_fewer_views_are_the_first_ones(place, tmp_path):
    exporting(place, tmp_path / "e", views=2, compression="zstd")
    knowledge = condensed_set.open(tmp_path / "e").knowledge
    assert (knowledge.views, knowledge.plan.compression) == (2, "zstd")
    found = knowledge.read("penultimate", 1, knowledge.held)
    assert np.array_equal(found, place.knowledge.read("penultimate", 1, knowledge.held))


def test_skipped_samples_stay_known(place, tmp_path):
    logits = 5 * np.eye(10, dtype=np.float32)[place.data.train.labels]
    logits[17] = np.nan
    np.save(tmp_path / "logits.npy", logits)
    given = {"data": SPEC, "store": tmp_path / "store", "from_logits": tmp_path / "logits.npy", "augment": "none"}
    executed("precompute", given | {"on_nonfinite": "skip"})
    knowledge = reader.open(tmp_path / "store")
    manifest.write(tmp_path / "set.parquet", narrowed(knowledge))
    exporting(SimpleNamespace(file=tmp_path / "set.parquet", knowledge=knowledge), tmp_path / "e")
    part = condensed_set.open(tmp_path / "e").knowledge
    assert part.skipped.tolist() == knowledge.skipped.tolist() == [17]
    assert 17 not in part.held


def test_a_set_of_other_knowledge_or_data_is_refused(place, tmp_path):
    other = precomputed(tmp_path / "s", place.data, teacher_of(place.data, seed=2))
    with pytest.raises(MismatchError, match="the manifest was made for knowledge"):
        exporting(place, tmp_path / "e", store=other.path)
    with pytest.raises(MismatchError, match="differ"):
        exporting(place, tmp_path / "e", data="digits?train=199&test=60&order=stored")
    with pytest.raises(MismatchError, match="does not hold the samples of a whole data set; export from the full"):
        exporting(place, tmp_path / "e", store=place.root / "plain/store")


# training


@pytest.mark.parametrize(
    "changes",
    [{"method": "pkt+kd", "student": "resnet8"}, {"epochs": 4, "stages": 2, "keep": 0.25}],
    ids=["both fields", "condensed further"],
)
def test_training_from_it_gives_the_weights_of_training_from_the_store(place, tmp_path, changes):
    full = trained(tmp_path / "full", store=place.knowledge.path, manifest=place.file, **changes)
    assert trained(tmp_path / "part", condensed=place.root / "plain", **changes) == full
    sets = [
        sorted(p.read_bytes() for p in (tmp_path / name).glob("stages/*/manifest.parquet")) for name in ("full", "part")
    ]
    assert sets[0] == sets[1]
    assert len(sets[0]) == 3 if "epochs" in changes else 1


def test_a_set_with_images_trains_and_tests_without_the_data(place, tmp_path):
    full = trained(tmp_path / "full", store=place.knowledge.path, manifest=place.file)
    given = {"data": f"condensed:{place.root / 'pictures'}", "condensed": place.root / "pictures"}
    assert trained(tmp_path / "part", **given) == full
    metrics = [state.read_metrics(tmp_path / name) for name in ("full", "part")]
    assert [row.test_accuracy for row in metrics[0]] == [row.test_accuracy for row in metrics[1]]
    records = [state.read_record(RunFolder(path=tmp_path / name)).inputs for name in ("full", "part")]
    assert records[0] == records[1]


def test_a_run_continues_from_it_to_the_same_bytes(place, tmp_path):
    given = {"condensed": place.root / "plain"}
    settings = {key: value for key, value in ONE_STAGE.items() if key != "stages"} | {"data": SPEC} | given
    planned = executed("train", settings | {"out": tmp_path / "run"}, dry_run=True)
    assert [(stage["samples"], stage["source"]) for stage in planned["stages"]] == [(80, "given")]  # one unless given
    begun = executed("train", settings | {"out": tmp_path / "run", "until": 1})
    assert begun["finished"] is False
    assert trained(tmp_path / "run", **given) == trained(tmp_path / "once", **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "train needs knowledge: --store .* or --condensed"),
        ({"condensed": "plain", "store": "store"}, "--store does nothing beside --condensed"),
        ({"condensed": "plain", "manifest": "set.parquet"}, "--manifest does nothing beside --condensed"),
        ({"condensed": "plain", "transfer": True}, "--transfer does nothing beside --condensed"),
    ],
)
def test_the_source_of_training_is_given_once(place, tmp_path, given, said):
    named = {key: place.root / value if isinstance(value, str) else value for key, value in given.items()}
    with pytest.raises(SettingsError, match=said):
        trained(tmp_path / "run", **named)
    assert not (tmp_path / "run").exists()


def test_the_store_inside_is_no_store_by_itself(place, tmp_path):
    said = r"is the inside of an exported set.*give the whole folder .*plain as --condensed"
    with pytest.raises(MismatchError, match=said):
        trained(tmp_path / "run", store=place.root / "plain/store")
    with pytest.raises(MismatchError, match=said):
        verify.verify(place.root / "plain/store", data=SPEC)
    assert not (tmp_path / "run").exists()


# images


def test_an_image_that_is_not_there_is_refused_and_never_made_up(place, tmp_path):
    dataset = condensed_set.read_data(f"condensed:{place.root / 'pictures'}")
    missing = np.setdiff1d(EVERYTHING, condensed_set.open(place.root / "pictures").knowledge.held)
    with pytest.raises(MismatchError, match=rf"sample {missing[0]} is not among the 120 of 200 images"):
        dataset.train.images(missing[:2])
    with pytest.raises(MismatchError, match=r"is not among the 120 of 200 images that the exported set holds"):
        executed("fit", {"data": dataset.name, "model": "resnet8", "out": tmp_path / "fit", "epochs": 1})
    with pytest.raises(MismatchError, match="was exported without images: give the data set it was made from"):
        condensed_set.read_data(f"condensed:{place.root / 'plain'}")


def test_images_lie_as_the_hub_serves_them(place):
    folder = place.root / "pictures/data"
    loaded = datasets.load(f"parquet:{folder}#label")
    held = condensed_set.open(place.root / "pictures").knowledge.held
    assert np.array_equal(loaded.train.images(np.arange(120)), place.data.train.images(held))
    assert np.array_equal(loaded.train.labels, place.data.train.labels[held])
    assert loaded.classes == place.data.classes
    assert pq.read_table(next(folder.glob("train-*")), columns=["index"])["index"].to_pylist() == held.tolist()


def photographs(folder):
    """A data set of JPEG files of differing sizes, which are decoded on demand."""
    random = np.random.default_rng(1)
    for split, count in (("train", 6), ("val", 2)):
        for label in range(10):
            (folder / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (14 + number, 15, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / f"class{label}" / f"{number}.jpg")
    return f"folder:{folder}"


def grey(folder):
    images = {f"{part}_images": make_pixels(count, 12, 12, 1) for part, count in (("train", 60), ("test", 20))}
    return write_npz(folder / "grey.npz", train_labels=np.arange(60) % 10, test_labels=np.arange(20) % 10, **images)


KINDS = {"grey": (grey, "crop"), "files": (photographs, "resized-crop-flip")}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_comes_back_as_it_was(tmp_path, kind):
    make, rule = KINDS[kind]
    whole = make(tmp_path)
    dataset = condensed_set.read_data(whole)
    network = registry.build("resnet8", 10, 1, channels=len(dataset.mean))
    frozen = teacher.freeze(network, InputTransform(dataset.mean, dataset.std), "resnet8", dataset.classes, CPU)
    knowledge = precomputed(tmp_path / "store", dataset, frozen, views=1, size=12, augment=rule)
    manifest.write(tmp_path / "set.parquet", narrowed(knowledge))
    place = SimpleNamespace(file=tmp_path / "set.parquet", knowledge=knowledge)
    exporting(place, tmp_path / "e", data=whole, with_images=True)
    ours, held = (
        condensed_set.read_data(f"condensed:{tmp_path / 'e'}"),
        condensed_set.open(tmp_path / "e").knowledge.held,
    )
    assert 0 < len(held) < len(dataset.train)
    for found, wanted in zip(ours.train.images(held), dataset.train.images(held), strict=True):
        assert np.array_equal(found, wanted)
    assert np.array_equal(ours.train.labels, dataset.train.labels)
    assert (ours.mean, ours.std, ours.classes) == (dataset.mean, dataset.std, dataset.classes)
    assert (ours.identity(), ours.test.digest()) == (dataset.identity(), dataset.test.digest())


# writing


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bake": True}, "--bake needs --temperature"),
        ({"temperature": 4.0}, "--temperature does nothing without --bake"),
        ({"with_images": True}, "--with-images needs --data"),
        ({"views": 4}, r"--views 4: .* holds 3 views"),
        ({"views": 2}, "holds another export, with a different views; exports are never overwritten"),
        ({"license": "mit"}, "different licence"),
        ({"compression": "zstd"}, "different layout"),
        ({"bake": True, "temperature": 1.0}, "different rows"),
        ({"with_images": True, "data": SPEC}, "different images"),
    ],
)
def test_contradictory_settings_and_a_place_that_holds_another_export_are_refused(place, changes, said):
    with pytest.raises(SettingsError, match=said):
        exporting(place, place.root / "plain", **changes)


def test_a_folder_of_something_else_is_refused(place, tmp_path):
    (tmp_path / "e/data").mkdir(parents=True)
    (tmp_path / "e/data/train.parquet").write_text("mine")
    with pytest.raises(SettingsError, match="e holds data, which this export does not write"):
        exporting(place, tmp_path / "e")
    assert content(tmp_path / "e") == {"data/train.parquet": b"mine"}


def words(place, out, *more):
    given = {"manifest": place.file, "store": place.knowledge.path, "out": out, "data": SPEC, "temperature": 4.0}
    return ["export", *lines(given), "--with-images", "--bake", *more]


@pytest.mark.parametrize(
    "steps", [(60,), pytest.param((2, *range(1, 180, 7)), marks=pytest.mark.slow)], ids=["one", "many"]
)
def test_a_killed_export_is_accepted_by_nobody_and_ends_in_the_same_bytes(place, start, tmp_path, steps):
    exporting(place, tmp_path / "whole", data=SPEC, with_images=True, bake=True, temperature=4.0)
    whole, out = content(tmp_path / "whole"), tmp_path / "killed"
    died = 0
    for step in steps:
        shutil.rmtree(out, ignore_errors=True)
        code = finished(start, words(place, out), tmp_path / "log", KCDCACHE_CRASHPOINT=str(step))
        if code == 0:
            assert content(out) == whole
            continue
        assert code == -signal.SIGKILL
        died += 1
        for look in (condensed_set.open, show.inspect, verify.verify) if not (out / records.RECORD).exists() else ():
            with pytest.raises((NotFoundError, UnfinishedError, MismatchError)):
                look(out)
        succeeds(start, words(place, out), tmp_path / "log")
        assert content(out) == whole, step
    assert died


def test_a_second_export_into_a_folder_that_is_being_written_is_refused_and_harms_nothing(place, start, tmp_path):
    exporting(place, tmp_path / "whole", data=SPEC, with_images=True, bake=True, temperature=4.0)
    out, log = tmp_path / "out", tmp_path / "log"
    first = start(words(place, out), tmp_path / "first")
    while not (out / records.SAMPLES).exists():
        assert not first.ended(POLL), (tmp_path / "first").read_text()
    first.signal(signal.SIGSTOP)
    try:
        left = out / "manifest.parquet.tmp-1-1"  # as if the first one were in the middle of this file
        left.write_bytes(b"half")
        assert finished(start, words(place, out), log) == LockedError("").exit_code
        assert re.search("out is being written by process [0-9]+ on .*; wait for it or stop it", log.read_text())
        assert left.read_bytes() == b"half"
        left.unlink()
    finally:
        first.signal(signal.SIGCONT)
    assert first.ended(300)
    assert first.code == 0
    assert content(out) == content(tmp_path / "whole")
    assert exporting(place, out, data=SPEC, with_images=True, bake=True, temperature=4.0)["already"]


# what is shown of it


def test_the_card_has_the_hubs_front_matter_and_nothing_that_changes(place, tmp_path):
    exporting(place, tmp_path / "e", data=SPEC, with_images=True, license='x"\n---\ninjected: true')
    text = (tmp_path / "e/README.md").read_text()
    front = text.split("\n---\n")[0].split("\n")
    assert front[0] == "---"
    assert json.loads(front[1].removeprefix("license: ")) == 'x"\n---\ninjected: true'
    assert "- image-classification" in front
    assert "    path: data/train-*.parquet" in front
    assert place.set.digest in text
    assert place.knowledge.knowledge_id in text
    assert "80 of the 200 training samples of a data set with 10 classes" in text
    assert str(place.root) not in text


def test_the_python_of_the_card_runs(place):
    folder = place.root / "plain"
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace("DIR", str(folder)), names)
    assert names["opened"].manifest.digest == place.set.digest


@pytest.mark.parametrize(("rows", "said"), [(999, "n<1K"), (1000, "1K<n<10K"), (10**8, "n>10M")])
def test_the_cards_size_is_one_of_the_hubs(place, rows, said):
    content, summary = records.read(place.root / "plain").content, manifest.summary(place.set)
    assert f"size_categories:\n- {said}\n" in write.card(content, summary | {"kept": rows}, {}).decode()


def test_inspect_shows_it_and_its_id_can_be_expected(place):
    found = show.inspect(place.root / "baked")
    assert (found["kind"], found["rows"], found["samples"]) == ("condensed", 40, 200)
    assert found["baked"] == {"temperature": 4.0, "target": "linear_prob", "mix": "convex"}
    assert found["manifest"]["kept"] == 80
    json.dumps(found, allow_nan=False)
    show.require_ids([place.root / "baked"], [found["id"]])


def test_an_expected_id_is_compared_before_training(place, tmp_path):
    with pytest.raises(MismatchError, match=r"plain has the id \w{64}, expected 00; get it again"):
        trained(tmp_path / "run", condensed=place.root / "plain", expect_id=("00",))
    assert not (tmp_path / "run").exists()


def test_versions_are_not_part_of_the_id(place, tmp_path):
    shutil.copytree(place.root / "plain", tmp_path / "e")
    record = records.read(tmp_path / "e")
    assert records.write(tmp_path / "e", record.content, {"python": "4"}) == record.id
    assert records.read(tmp_path / "e").made == {"python": "4"}
    changed = record.content.model_copy(update={"licence": "mit"})
    assert records.write(tmp_path / "e", changed, {}) != record.id
