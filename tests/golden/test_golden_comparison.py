"""The golden comparison reports every kind of difference, and none between equal trees."""

import json
import shutil
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

sys.path.insert(0, str(Path(__file__).parent))
import chains
import compare
from compare import Allowed

CHUNK, LOG, ARRAY = "store/logits/c.0.0", "store/_kcd/log/0/v0.json", "store/logits/zarr.json"
TABLE, FILES, SET = "run/values.parquet", "run/files.json", "set/condensed.json"
CHECKPOINT, WEIGHTS = "run/checkpoint/0123456789abcdef.safetensors", "run/student.safetensors"
METRICS, SUMMARY, TIMING = "run/metrics.jsonl", "run/summary.json", "run/timing.jsonl"
TENSORS = {"momentum.w": np.arange(3, dtype=np.float32), "network.w": np.ones(3, np.float32)}
COLUMNS = {"index": np.arange(4), "value": np.array([0.5, np.nan, -0.0, 2], np.float32), "part": list("abab")}


def write_table(path, columns=COLUMNS, *, digest="1" * 64, **options):
    meta = {"kcdcache.values": json.dumps({"digest": digest, "epoch": 3})}
    pq.write_table(pa.table(columns).replace_schema_metadata(meta), path, **options)


def write_checkpoint(path, tensors=TENSORS, **record):
    safetensors.numpy.save_file(tensors, path, {"kcdcache": json.dumps({"epoch": 3, "step": 0} | record)})


def write_record(path, content):
    path.write_text(json.dumps(content))


def write_sizes(root):
    """Write the records that name another file by its bytes and SHA-256, with digests of their own."""
    table = (root / TABLE).read_bytes()
    entry = {"bytes": len(table), "sha256": sha256(table).hexdigest(), "digest": "1" * 64, "rows": 4}
    write_record(root / FILES, {"files": {"values.parquet": entry}, "digest": sha256(repr(entry).encode()).hexdigest()})
    files = {"values.parquet": [entry["bytes"], entry["sha256"]]}
    write_record(root / SET, {"files": files, "id": sha256(repr(files).encode()).hexdigest()})


@pytest.fixture
def trees(tmp_path):
    """Return two equal trees with a file of each kind."""
    root = tmp_path / "base"
    for name in (CHUNK, LOG, TABLE, CHECKPOINT, SET):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / CHUNK).write_bytes(bytes(range(64)))
    write_record(root / LOG, {"files": [{"path": "logits/c.0.0", "bytes": 64}], "minimum": -1.5, "skipped": []})
    write_record(root / ARRAY, {"shape": [4, 2], "fill_value": "NaN"})
    write_table(root / TABLE)
    write_checkpoint(root / CHECKPOINT)
    safetensors.numpy.save_file({"w": TENSORS["network.w"]}, root / WEIGHTS)
    (root / METRICS).write_text('{"epoch":0,"loss":0.25}\n')
    write_record(root / SUMMARY, {"accuracy": 0.5, "seconds": 1.25, "count": 4, "out": f"{root}/run"})
    (root / TIMING).write_text('{"epoch":0,"samples":4,"seconds":0.5}\n')
    write_sizes(root)
    shutil.copytree(root, tmp_path / "new")
    edit(tmp_path / "new" / SUMMARY, out=f"{tmp_path}/new/run")
    return root, tmp_path / "new"


def found(trees, allowed=()):
    """Return the changes that are not allowed: (file, change, key)."""
    items = compare.compare_trees(*trees, allowed)
    return [(item.file, change.change, change.key) for item in items for change in item.changes]


def edit(path, **entries):
    write_record(path, json.loads(path.read_text()) | entries)


def flip(path, at=20):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_equal_trees_agree_file_by_file(trees, capsys):
    items = compare.compare_trees(*trees)
    assert len(items) == 11
    assert compare.tell(items) == 0
    assert capsys.readouterr().out.count("\nok ") == 10


@pytest.mark.parametrize("name", [CHUNK, LOG, TABLE, SUMMARY])
def test_a_missing_and_an_extra_file_are_told(trees, name):
    (trees[1] / name).unlink()
    assert (name, "removed", "") in found(trees)
    assert (name, "added", "") in found(trees[::-1])


def logged(**entries):
    return LOG, lambda root: edit(root / LOG, **entries)


def column(**columns):
    return TABLE, lambda root: write_table(root / TABLE, COLUMNS | columns)


def fewer_rows(root):
    write_table(root / TABLE, {name: content[:3] for name, content in COLUMNS.items()}, digest="2" * 64)


def trained_further(root):
    changed = {"momentum.w": TENSORS["momentum.w"] * 2, "network.w": np.ones(3, np.int32)}
    write_checkpoint(root / CHECKPOINT, changed, epoch=4)


CASES = [
    *(((name, lambda root, name=name: flip(root / name)), "changed byte 20") for name in (CHUNK, WEIGHTS, METRICS)),
    (logged(minimum=-1.5000000000000002), "changed minimum"),
    (logged(minimum="-1.5"), "changed minimum"),
    (logged(skipped=[3]), "added skipped[]"),
    (logged(files=[{"path": "logits/c.0.1", "bytes": 64}]), "changed files[0].path"),
    (logged(files=[{"path": "logits/c.0.0", "bytes": 64.0}]), "changed files[0].bytes"),
    (logged(files=[{"path": "logits/c.0.0"}]), "removed files[0].bytes"),
    (logged(more=None), "added more"),
    (column(value=np.array([0.5, np.nan, 0.0, 2], np.float32)), "changed columns.value.rows[2]"),
    (column(value=np.array([0.5, 1.0, -0.0, 2], np.float32)), "changed columns.value.rows[1]"),
    (column(part=list("abaa")), "changed columns.part.rows[3]"),
    (column(index=np.arange(4, dtype=np.int32)), "changed columns.index.type"),
    (column(more=np.arange(4)), "added names[]", "added columns.more"),
    ((TABLE, fewer_rows), "changed metadata.kcdcache.values.digest",
     *(f"removed columns.{name}.rows[]" for name in COLUMNS)),
    ((CHECKPOINT, trained_further), "changed tensors.momentum.w", "changed tensors.network.w",
     "changed metadata.kcdcache.epoch"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "expected"), [(case, set(expected)) for case, *expected in CASES])
def test_whatever_differs_in_a_file_is_told_with_its_place(trees, case, expected):
    name, change = case
    change(trees[1])
    name = compare.CHECKPOINT.sub("*.safetensors", name)
    assert {f"{how} {key}" for file, how, key in found(trees) if file == name} == expected


def test_order_of_keys_paths_and_clock_times_are_no_difference(trees):
    write_record(trees[1] / SUMMARY, {"out": f"{trees[1]}/run", "count": 4, "seconds": 9.75, "accuracy": 0.5})
    (trees[1] / TIMING).write_text('{"epoch":0,"samples":4,"seconds":7}\n')
    assert found(trees) == []
    write_record(trees[1] / SUMMARY, {"out": f"{trees[1]}/run", "count": 4, "accuracy": 0.5})
    (trees[1] / TIMING).write_text('{"epoch":0,"samples":5,"seconds":7}\n')
    assert found(trees) == [(SUMMARY, "removed", "seconds"), (TIMING, "changed", "[0].samples")]


def test_a_table_written_in_another_way_is_none_and_neither_are_the_digests_that_follow(trees):
    write_table(trees[1] / TABLE, use_dictionary=False, compression="none")
    write_sizes(trees[1])
    assert (trees[0] / FILES).read_text() != (trees[1] / FILES).read_text()
    assert found(trees) == []


def test_a_record_that_names_no_file_of_its_tree_or_a_wrong_size_is_told(trees):
    write_table(trees[1] / TABLE, use_dictionary=False, compression="none")
    write_sizes(trees[1])
    entry = json.loads((trees[1] / FILES).read_text())["files"]["values.parquet"]
    edit(trees[1] / FILES, files={"values.parquet": entry | {"bytes": 1}})
    edit(trees[1] / SET, files={"values.parquet": [entry["bytes"], "4" * 64]})
    assert found(trees) == [
        (FILES, "changed", "files.values.parquet.bytes"),
        (SET, "changed", "files.values.parquet[0]"),
        (SET, "changed", "files.values.parquet[1]"),
    ]


def test_a_digest_that_changes_over_the_same_content_is_told_and_one_that_follows_is_not(trees):
    edit(trees[1] / FILES, digest="3" * 64)
    assert found(trees) == [(FILES, "changed", "digest")]
    edit(trees[1] / FILES, more=1)
    assert found(trees) == [(FILES, "added", "more")]


def test_a_tensor_of_another_name_is_found_by_its_bytes_and_still_told(trees):
    renamed = {"optimizer.0": TENSORS["momentum.w"], "network.w": TENSORS["network.w"], "lr": np.zeros(1)}
    write_checkpoint(trees[1] / CHECKPOINT, renamed)
    (trees[1] / CHECKPOINT).rename(trees[1] / "run/checkpoint/00000000000000ff.safetensors")
    name = "run/checkpoint/*.safetensors"
    assert set(found(trees)) == {(name, "renamed", "tensors.momentum.w"), (name, "added", "tensors.lr")}


def test_what_is_allowed_is_counted_with_its_reason_and_nothing_else_passes(trees, capsys):
    edit(trees[1] / ARRAY, dimension_names=["sample", "class"], shape=[4, 3])
    assert found(trees, compare.ALLOWED) == [(ARRAY, "changed", "shape[1]")]
    edit(trees[1] / ARRAY, shape=[4, 2])
    assert compare.tell(compare.compare_trees(*trees)) == 0
    assert "allowed 1 times: */zarr.json dimension_names added: issue 15" in capsys.readouterr().out
    assert found(trees, [Allowed("*/zarr.json", "dimension_names", "removed", "")]) == [
        (ARRAY, "added", "dimension_names")
    ]


def test_the_script_ends_with_1_where_something_differs_or_nothing_was_made(trees, capsys):
    words = [str(trees[0]), str(trees[1]), "--work", str(trees[0].parent), "--compare-only"]
    assert compare.main(words) == 0
    flip(trees[1] / CHUNK)
    assert compare.main(words) == 1
    assert f"DIFFERENT chunk           {CHUNK}" in capsys.readouterr().out
    shutil.rmtree(trees[0])
    shutil.rmtree(trees[1])
    assert compare.main(words) == 1


def test_chains_that_are_not_asked_for_are_left_out(trees):
    flip(trees[1] / CHUNK)
    assert not any(item.changes for item in compare.compare_trees(*trees, chain_names=["run", "set"]))
    assert len(compare.compare_trees(*trees, chain_names=["store"])) == 3


def test_a_command_that_fails_is_left_as_a_failure(tmp_path, monkeypatch):
    broken = tmp_path / "checkout" / "kcdcache"
    broken.mkdir(parents=True)
    (broken / "__main__.py").write_text("raise SystemExit('no such thing')")
    monkeypatch.setitem(chains.CHAINS, "broken", chains.Chain((), "fit fit --threads 1"))
    assert "exit code 1\nno such thing" in chains.make("broken", broken.parent, tmp_path)
    assert (tmp_path / "broken" / "told" / "fit.failed").exists()
