"""What a dry run tells of a store, against the store that is made after it."""

import json

import numpy as np
import pytest
import torch
from lessons import precomputed
from pupils import TRAIN, BrokenOffError, command, everything, school, stop_after

from kcdcache.errors import MismatchError
from kcdcache.files.records import Rate, logged, rate_of
from kcdcache.settings import PrecomputeSettings
from kcdcache.store import plan, reader
from kcdcache.teacher import precompute
from kcdcache.teacher.precompute import Job

CROPS = {"augment": "crop", "padding": 2, "batch_size": 32, "min_accuracy": 0}
FIELDS = ("logits", "penultimate")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return school(tmp_path_factory.mktemp("school"), fields=FIELDS)


def planned(place, path, **changes):
    return command(place, "precompute", dry_run=True, store=path, **(CROPS | {"views": 3, "fields": FIELDS} | changes))


def chunk_bytes(path, names):
    """Bytes of an array's files on disk, its document left out."""
    files = [file for name in names for file in (path / name).iterdir()]
    return sum(file.stat().st_size for file in files if file.name != "zarr.json")


@pytest.mark.parametrize("how", [{"encoding": "top:3"}, {"compression": "zstd"}], ids=str)
def test_planned_bytes_are_those_of_the_store_made_after_and_the_most_of_a_compressed_one(
    place, tmp_path, monkeypatch, how
):
    monkeypatch.setattr(plan, "MOST_PART_ROWS", 64)
    path = tmp_path / "new" / "store"
    told = planned(place, path, **how)
    assert list(tmp_path.iterdir()) == []
    assert 0 < told["free_bytes"] < 2**60
    command(place, "precompute", store=path, **CROPS, views=3, fields=FIELDS, **how)
    made = reader.open(path)
    assert (told["knowledge_id"], told["layout_id"]) == (made.knowledge_id, made.plan.layout_id)
    assert set(told["bytes_per_field"]) == {*FIELDS, "labels and digests"}
    for field, planned_bytes in told["bytes_per_field"].items():
        names = [array.name for array in made.plan.arrays if (array.field or "labels and digests") == field]
        found = chunk_bytes(path, names)
        assert found <= planned_bytes if "compression" in how else found == planned_bytes
    assert told["bytes"] == sum(told["bytes_per_field"].values())
    assert ("compression" in how) == (chunk_bytes(path, [array.name for array in made.plan.arrays]) < told["bytes"])
    assert told["to_do"]["bytes"] == told["bytes"] - told["bytes_per_field"]["labels and digests"]
    rate, to_do = told["images_per_second"], told["to_do"]
    assert to_do["teacher_forwards"] == told["points"] == made.forwards == 3 * TRAIN
    assert rate["n"] == precompute.TIMED_BATCHES
    assert to_do["teacher_hours"] == pytest.approx(3 * TRAIN / rate["mean"] / 3600, rel=0.01)
    assert to_do["teacher_hours_std"] == pytest.approx(to_do["teacher_hours"] * rate["std"] / rate["mean"], rel=0.1)


def test_shards_plans_add_up_to_the_whole_stores(place, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MOST_PART_ROWS", 64)
    whole = planned(place, tmp_path / "store")["to_do"]
    parts = [planned(place, tmp_path / "store", shard=f"{number}/3") for number in range(3)]
    for key in ("parts", "teacher_forwards", "bytes"):
        assert sum(told[f"shard {number}/3"][key] for number, told in enumerate(parts)) == whole[key]
        assert all(told["to_do"][key] == whole[key] for told in parts)


def test_only_what_is_missing_is_to_do(place, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MOST_PART_ROWS", 64)
    made = tmp_path / "store", place.data, place.network
    with pytest.raises(BrokenOffError):
        precomputed(*made, stop_after(5), batch_size=32, fields=FIELDS, encoding="float16")
    before = everything(tmp_path / "store")
    whole = planned(place, tmp_path / "other")["to_do"]["parts"]
    assert planned(place, tmp_path / "store")["to_do"]["parts"] == whole - 5
    assert everything(tmp_path / "store") == before
    precomputed(*made, batch_size=32, fields=FIELDS, encoding="float16")
    done = planned(place, tmp_path / "store")
    assert (done["to_do"]["teacher_forwards"], done["images_per_second"]) == (0, None)
    assert planned(place, tmp_path / "store", views=5)["to_do"]["teacher_forwards"] == 2 * TRAIN


def test_another_store_at_the_place_is_refused_by_a_dry_run(place, tmp_path):
    with pytest.raises(MismatchError, match=r"views\.padding"):
        planned(place, place.knowledge.path, padding=1, encoding="float32")


def test_a_disk_with_too_little_room_is_told(place, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(precompute.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    told = planned(place, tmp_path / "store")
    assert told["free_bytes"] == 1000
    assert f"{told['to_do']['bytes']:,} bytes are still to be written, but only 1,000 are free" in caplog.text


def test_the_first_batches_are_not_timed(place, monkeypatch):
    """A teacher whose first batches take long: set-up is no part of the rate."""
    clock, asked = [0.0], []
    monkeypatch.setattr(precompute.time, "perf_counter", lambda: clock[0])

    def outputs(view, start, stop):
        clock[0] += 100.0 if len(asked) < precompute.UNTIMED_BATCHES else 0.5
        asked.append((view, start, stop))
        return {"logits": torch.zeros(stop - start, 10)}

    job = Job(outputs=outputs, labels=np.zeros(1), digests=np.zeros(1))
    forms = list(place.knowledge.fields.values())
    long = plan.plan_store(TRAIN, 9, forms, batch_size=100)
    found = precompute.measured(job, long, plan.parts(long))
    assert found == Rate(n=precompute.TIMED_BATCHES, mean=200.0, std=0.0)
    assert asked[:3] == [(0, 0, 100), (0, 100, 200), (1, 0, 100)]


def test_rates_are_mean_and_sample_deviation_of_whole_logged_lines(tmp_path):
    assert (rate_of([]), rate_of([4.0])) == (None, Rate(n=1, mean=4.0, std=None))
    file = tmp_path / "timing.jsonl"
    assert logged(file) is None
    lines = ['{"epoch":0,"samples":100,"seconds":2}', '{"points":30,"seconds":1}', '{"samples":5,"seconds":0}',
             '{"samples":"x","seconds":1}', "[1]", '{"samples":10,"sec']  # fmt: skip
    file.write_text("\n".join(lines))
    assert tuple(dict(logged(file)).values())[1:] == (2, 40.0, pytest.approx(200**0.5), None)


def test_an_epoch_in_pieces_is_one_stretch_and_what_came_first_is_told_apart(tmp_path):
    file = tmp_path / "timing.jsonl"
    rows = [(0, 60, 6, True), (1, 100, 2, False), (2, 30, 1, False), (2, 70, 4, True), (3, 100, 1, False)]
    names = ("epoch", "samples", "seconds", "warm_up")
    file.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows[:1]))
    assert logged(file) == Rate(n=1, mean=10.0, std=None)
    file.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    assert logged(file).document() == {"n": 2, "mean": 75.0, "std": 35.36, "warm_up": 15.0}


def test_commands_tell_images_per_second_of_what_they_logged(place, tmp_path, caplog):
    heard = []
    made = precompute.run(
        PrecomputeSettings(**CROPS, views=3), place.data, place.network, tmp_path / "store",
        lambda what, done, total, remark: heard.append(remark),
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "store/_kcd/timing.jsonl").read_text().splitlines()]
    speeds = [row["points"] / row["seconds"] for row in rows]
    assert made["images_per_second"]["n"] == len(rows) == 3
    assert made["images_per_second"]["mean"] == pytest.approx(np.mean(speeds), abs=0.01)
    assert made["images_per_second"]["std"] == pytest.approx(np.std(speeds, ddof=1), abs=0.01)
    assert all(remark.endswith(" images/s") for remark in heard)
    trained = command(
        place, "train", out=tmp_path / "run", student="lessons:TinyNet", epochs=4, stages=1, batch_size=32
    )
    rows = [json.loads(line) for line in (tmp_path / "run/timing.jsonl").read_text().splitlines()]
    first, *others = (row["samples"] / row["seconds"] for row in rows)
    assert trained["images_per_second"] == pytest.approx(
        {"n": 3, "mean": np.mean(others), "std": np.std(others, ddof=1), "warm_up": first}, abs=0.01
    )
    assert json.loads((tmp_path / "run/summary.json").read_text())["images_per_second"] == trained["images_per_second"]
