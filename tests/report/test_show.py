import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import creating, finish, form, grown, knowledge, many_chunks, small_parts, write_part

from kcdcache.condensation import manifest, value_files, values
from kcdcache.errors import CorruptionError, MismatchError, NotFoundError, UnfinishedError
from kcdcache.files.records import digest_of
from kcdcache.report import show
from kcdcache.store import plan, reader, writer
from kcdcache.store.log import read_commits

DOCUMENT = {"knowledge_id": "kk", "student": "resnet8", "epoch": 3}


@pytest.fixture
def small(tmp_path):
    return many_chunks(tmp_path / "store")


def some_values(path, count=4):
    found = values.Values(np.array([0, 1, 2, 3][:count], np.int32), np.array([0, 0.5, 1, 1.5][:count], np.float32))
    value_files.write(path, found, np.zeros(count, np.int64), DOCUMENT)
    return path


def test_a_sealed_store_is_described(small):
    found, opened = show.store_report(small), reader.open(small)
    assert (found.sealed, found.growing_to, found.growths) == (True, None, 1)
    assert (found.samples, found.views, found.points, found.fields) == (150, 2, 300, {"logits": "float16"})
    assert (found.layout_id, found.knowledge_id) == (opened.plan.layout_id, knowledge().knowledge_id)
    assert found.teacher_accuracy == {"0": 3 / 150, "1": 6 / 150}
    chunks = [file for file in small.rglob("c.*") if file.is_file()]
    assert (found.files, found.bytes) == (len(chunks), sum(file.stat().st_size for file in chunks))
    shown = show.inspect(small)
    assert (shown["kind"], shown["id"], shown["layout_id"]) == ("store", show.id_of(small), found.layout_id)
    assert digest_of(shown["knowledge"]) == found.knowledge_id
    json.dumps(shown, allow_nan=False)


def test_an_unfinished_store_shows_what_is_done_and_pending(tmp_path):
    with creating(tmp_path / "s", small_parts(150, 2, 64, 32)) as writing:
        write_part(writing, writing.pending()[0])
    found = show.store_report(tmp_path / "s")
    assert (found.sealed, found.id, found.parts) == (False, None, {"done": 1, "pending": 5})
    assert found.teacher_accuracy == {"0": 1 / 64}


def test_a_growing_store_shows_both_sizes_and_can_be_finished(small):
    with writer.grow(small, knowledge(), views=3, fields=[form("penultimate")]) as growing:
        write_part(growing, growing.pending()[0])
    found = show.store_report(small)
    assert (found.sealed, found.views, found.growing_to.views) == (True, 2, 3)
    assert (list(found.fields), list(found.growing_to.fields)) == (["logits"], ["logits", "penultimate"])
    assert found.parts == {"done": 7, "pending": len(growing.parts) - 1}
    with writer.grow(small, knowledge(), views=3, fields=[form("penultimate")]) as growing:
        finish(growing)
    assert show.store_report(small).views == 3


@pytest.mark.parametrize(("views", "fields"), [(2, ["penultimate"]), (5, []), (5, ["penultimate"])])
def test_parts_are_counted_as_the_layout_lists_them(small, views, fields):
    grown(small, views=views, fields=[form(name) for name in fields])
    found = show.store_report(small)
    last, first = (plan.plan_from(commit.plan) for commit in reversed(read_commits(small)))
    assert found.parts == {"done": len(plan.parts(first)) + len(plan.parts(last, first)), "pending": 0}
    assert [found.teacher_accuracy[view] for view in "01"] == [3 / 150, 6 / 150]  # a part logged twice counts once


def test_a_store_killed_before_its_plan_says_what_to_do(small):
    for file in [*small.glob("_kcd/commit.*"), *small.glob("_kcd/plan.*")]:
        file.unlink()
    with pytest.raises(UnfinishedError, match="no plan yet; run the same `kcdcache precompute` again"):
        show.inspect(small)


def test_a_changed_store_is_not_described(small):
    log = small / "_kcd/log/0/v00000-p00000.json"
    log.write_text(log.read_text().replace('"correct":1', '"correct":9'))
    with pytest.raises(CorruptionError, match=r"v00000-p00000.json is not the file that commit.0.json sealed"):
        show.inspect(small)


def test_values_are_shown_with_their_range(tmp_path):
    found = show.inspect(some_values(tmp_path / "v.parquet"))
    assert (found["kind"], found["from"], found["samples"], found["visited"]) == ("values", "kcdcache", 4, 3)
    assert (found["visits"], found["value_range"], found["value_mean"]) == ([0, 3], [0.5, 1.5], 1.0)
    assert (found["student"], found["epoch"]) == ("resnet8", 3)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("index", "shown"), [([2, 0, 1], (3, 3, [1, 1])), ([1000, 20], (1001, 2, [0, 1])), ([], (0, 0, None))]
)
def test_values_of_another_tool_are_named_as_such(tmp_path, index, shown):
    columns = {"index": pa.array(index, pa.int64()), "value": pa.array([0.5] * len(index), pa.float32())}
    pq.write_table(pa.table(columns), tmp_path / "v.parquet")
    found = show.inspect(tmp_path / "v.parquet")
    assert tuple(found[key] for key in ("from", "samples", "visited", "visits")) == ("another tool", *shown)
    assert found["value_range"] == ([0.5, 0.5] if index else None)


@pytest.mark.parametrize("index", [[-1, 0], [0, 10**12], [float("nan"), 1.0], ["a", "b"]])
def test_values_of_another_tool_with_a_wrong_index_are_refused(tmp_path, index):
    pq.write_table(pa.table({"index": index, "value": [0.1, 0.2]}), tmp_path / "v.parquet")
    with pytest.raises(MismatchError, match=r"v.parquet.*'?index'?"):
        show.inspect(tmp_path / "v.parquet")


def test_a_manifest_is_shown_as_its_summary(tmp_path):
    made = manifest.full(manifest.Samples("kk", 6, np.array([0, 1, 2, 0, 1, 0]), 3))
    manifest.write(tmp_path / "m.parquet", made)
    found = show.inspect(tmp_path / "m.parquet")
    place = {"path": str(tmp_path / "m.parquet"), "id": made.digest}
    assert found == {"kind": "manifest", **place, **manifest.summary(made)}
    assert (found["kept"], found["class_min"], found["class_max"]) == (6, 1, 3)
    json.dumps(found, allow_nan=False)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(NotFoundError, match=r"nothing at .*nowhere"):
        show.inspect(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path / "notes.txt", tmp_path):
        with pytest.raises(MismatchError, match=f"{path.name} is not a store, manifest, values file, run or network"):
            show.inspect(path)
    (tmp_path / "v.parquet").write_bytes(np.random.default_rng(0).bytes(500))
    with pytest.raises(CorruptionError, match=r"v.parquet is not an undamaged parquet file"):
        show.inspect(tmp_path / "v.parquet")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(NotFoundError, match=r"has no model.json beside it"):
        show.inspect(tmp_path / "model.safetensors")


def test_a_recipes_folder_is_recognised(tmp_path):
    for name in ("kd-seed0", "kd-seed1", "teacher", "wide"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    (tmp_path / "store" / "_kcd").mkdir(parents=True)
    expected = (
        r"is a folder of 4 runs \(kd-seed0, kd-seed1, teacher, ...\): name one of them, or make a report of all with"
    )
    with pytest.raises(MismatchError, match=expected):
        show.inspect(tmp_path)
