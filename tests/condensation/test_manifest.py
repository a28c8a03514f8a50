import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kcdcache.condensation import manifest, value_files, values
from kcdcache.condensation.manifest import Manifest, Samples
from kcdcache.errors import CorruptionError, LockedError, MismatchError, NotFoundError
from kcdcache.files import parquet


def make(**changes: Any) -> Manifest:
    content: dict[str, Any] = {
        "index": np.array([1, 2, 5, 7]), "mixed": np.array([False, True, False, True]),
        "partner": np.array([-1, 0, -1, 9]), "epsilon": np.array([0, 0.25, 0, 0.125], np.float32),
        "rank": np.array([0, 3, 1, 2]), "value": np.array([2, 0.5, 0, 1], np.float32),
        "visits": np.array([3, 3, 0, 1], np.int32), "weight": np.ones(4, np.float32),
        "knowledge_id": "a" * 64, "count": 10, "stage": 1, "keep": 0.4, "dropped": 6, "rule": {"k0": "complement"},
        "parent": "b" * 64, "values": "c" * 64, "class_counts": (1, 3), "data_digest": "d" * 64,
    }  # fmt: skip
    return Manifest(**{**content, **changes})


def same(left: Manifest, right: Manifest) -> bool:
    pairs = [(getattr(left, field.name), getattr(right, field.name)) for field in fields(Manifest)]
    return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    manifest.write(tmp_path / "manifest.parquet", make())
    return tmp_path / "manifest.parquet"


@st.composite
def contents(draw: Any) -> dict[str, Any]:
    # the arguments of a manifest: making it here would call beartype, which uses the random module
    count = draw(st.integers(1, 60))
    order = draw(st.permutations(range(count)))
    kept = draw(st.integers(1, count))
    mixes = draw(st.integers(0, min(kept, count - kept)))
    floats = st.floats(0, 1, width=32)
    columns = manifest.plain(np.array(order[:kept]))
    columns["mixed"][:mixes], columns["partner"][:mixes] = True, order[kept : kept + mixes]
    columns["epsilon"][:mixes] = draw(st.lists(floats, min_size=mixes, max_size=mixes))
    columns["rank"] = np.array(draw(st.permutations(range(count)))[:kept])
    columns["visits"] = np.array(draw(st.lists(st.integers(0, 9), min_size=kept, max_size=kept)), np.int32)
    columns["value"] = np.array(draw(st.lists(floats, min_size=kept, max_size=kept)), np.float32)
    columns["value"][columns["visits"] == 0] = 0
    by_index = np.argsort(columns["index"])
    return dict(
        **{name: column[by_index] for name, column in columns.items()}, knowledge_id=draw(st.text(max_size=5)),
        count=count, stage=draw(st.integers(0, 9)), keep=kept / count, dropped=count - kept,
        rule=draw(st.dictionaries(st.text(max_size=3), floats | st.booleans() | st.text(max_size=3))),
        parent=draw(st.none() | st.just("p")), class_counts=draw(st.sampled_from([(), (kept,), (0, kept)])),
    )  # fmt: skip


@given(contents())
@settings(max_examples=25, deadline=None)
def test_reading_gives_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    original, path = Manifest(**content), tmp_path_factory.mktemp("manifest") / "m.parquet"
    manifest.write(path, original)
    found = manifest.read(path)
    assert same(found, original)
    assert found.digest == original.digest
    assert not found.index.flags.writeable
    manifest.write(path.with_name("again"), found)
    assert path.with_name("again").read_bytes() == path.read_bytes()


def test_every_change_of_content_changes_the_digest() -> None:
    changes = [
        {"index": np.array([1, 2, 5, 8])}, {"partner": np.array([-1, 0, -1, 6])}, {"rank": np.array([0, 3, 2, 1])},
        {"epsilon": np.array([0, 0.25, 0, 0.5], np.float32)}, {"weight": np.array([1, 1, 1, 2], np.float32)},
        {"value": np.array([2, 0.5, 0, 3], np.float32)}, {"visits": np.array([3, 3, 0, 2], np.int32)},
        {"mixed": np.array([False, True, False, False]), "partner": np.array([-1, 0, -1, -1]),
         "epsilon": np.array([0, 0.25, 0, 0], np.float32)},
        {"knowledge_id": "z"}, {"count": 11}, {"stage": 2}, {"keep": 0.5}, {"dropped": 5}, {"rule": {}},
        {"parent": None}, {"values": None}, {"class_counts": (2, 2)}, {"data_digest": None},
    ]  # fmt: skip
    assert len({make(**change).digest for change in changes} | {make().digest}) == len(changes) + 1


def test_other_tools_read_parts_and_nulls(written: Path) -> None:
    table = pq.read_table(written).to_pydict()
    assert table["part"] == ["K_1H", "K_Aug", "K_1H", "K_Aug"]
    assert table["partner"] == [None, 0, None, 9]
    assert table["value"] == [2, 0.5, None, 1]
    column = pq.ParquetFile(written).metadata.row_group(0).column(0)
    assert column.compression == "ZSTD"
    assert "DELTA_BINARY_PACKED" in column.encodings


def test_manifests_are_never_overwritten(written: Path) -> None:
    before = written.read_bytes()
    with pytest.raises(LockedError, match="exists already"):
        manifest.write(written, make(stage=2))
    assert written.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": np.array([1, 2, 7, 5])}, "row 3, index 5: expected index to be ascending order, each sample once"),
        ({"index": np.array([1, 2, 2, 7])}, "row 2, index 2: expected index to be ascending order, each sample once"),
        ({"index": np.array([1, 2, 5, 10])}, r"row 3, index 10: expected index to be a sample in \[0, 10\)"),
        ({"partner": np.array([4, 0, -1, 9])}, r"row 0, index 1: expected partner to be none \(-1\) in K_1H, found 4"),
        ({"partner": np.array([-1, -1, -1, 9])}, "row 1, index 2: expected partner to be a sample .* found -1"),
        ({"partner": np.array([-1, 5, -1, 9])}, "row 1, index 2: expected partner to be a dropped sample, .* found 5"),
        ({"partner": np.array([-1, 9, -1, 9])}, "row 3, index 7: expected partner to be each partner once, found 9"),
        ({"epsilon": np.array([0, 0, 0, 1.5], np.float32)}, r"row 3, index 7: expected epsilon .* \[0, 1\], found 1.5"),
        ({"epsilon": np.array([0, np.nan, 0, 0], np.float32)}, "row 1, index 2: expected epsilon .*, found nan"),
        ({"epsilon": np.array([0.5, 0, 0, 0], np.float32)}, "row 0, index 1: expected epsilon to be 0 in K_1H"),
        ({"rank": np.array([0, 3, 3, 2])}, "row 2, index 5: expected rank to be each rank once, found 3"),
        ({"rank": np.array([0, 3, 10, 2])}, r"row 2, index 5: expected rank to be a rank in \[0, 10\), found 10"),
        ({"visits": np.array([3, 3, 0, -1], np.int32)}, "row 3, index 7: expected visits to be 0 or more"),
        ({"value": np.array([2, np.inf, 0, 1], np.float32)}, "row 1, index 2: expected value to be a finite number"),
        ({"value": np.array([2, 1, 4, 1], np.float32)}, "row 2, index 5: expected value to be 0 for an unseen sample"),
        ({"weight": np.array([1, 0, 1, 1], np.float32)}, "row 1, index 2: expected weight to be a finite number above"),
        ({"count": 3}, "field 'count': expected at least its 4 rows, found 3"),
        ({"stage": -1}, "field 'stage': expected 0 or more, found -1"),
        ({"keep": 1.5}, r"field 'keep': expected a share in \(0, 1\], found 1.5"),
        ({"keep": float("nan")}, r"field 'keep': expected a share in \(0, 1\], found nan"),
        ({"keep": 0.3}, "field 'keep': expected a share of 10 that its 4 rows do not exceed, found 0.3"),
        ({"dropped": 7}, "field 'dropped': expected no more than are not kept, found 7"),
        ({"class_counts": (-1, 5)}, "field 'class_counts': expected 0 or more of each class"),
        ({"dropped": 1}, "field 'dropped': expected at least the number of mixed rows, found 1"),
        ({"class_counts": (1, 2)}, "field 'class_counts': expected 4 in all, or nothing"),
    ],
)
def test_invalid_manifests_cannot_be_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        make(**changes)
    columns = {name: changes.get(name, column) for name, column in make().columns().items()}
    if columns.keys() & changes.keys():
        with pytest.raises(MismatchError, match=f"expected {next(iter(changes))}"):
            check_row_by_row(columns)


def check_row_by_row(columns: dict[str, np.ndarray]) -> None:
    checks = manifest.Checks(10)
    for block in parquet.regrouped([columns], 1):
        checks.add(block)
    checks.end()


def test_what_breaks_a_rule_with_an_earlier_or_later_row_is_found_row_by_row() -> None:
    check_row_by_row(make().columns())
    for partner in ([-1, 0, -1, 1], [-1, 7, -1, 9]):  # kept by an earlier row, by a later one
        with pytest.raises(MismatchError, match="expected partner to be a dropped sample, not a kept one"):
            check_row_by_row(make().columns() | {"partner": np.array(partner)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": np.arange(4, dtype=np.int32)}, "column 'rank': expected int64 of shape (4,), found int32 (4,)"),
        ({"weight": np.ones(3, np.float32)}, "column 'weight': expected float32 of shape (4,), found float32 (3,)"),
        ({"visits": [0, 0, 0, 0]}, "column 'visits': expected int32 of shape (4,), found list"),
        ({"stage": "1"}, "field 'stage': expected int, found '1'"),
        ({"class_counts": (1.5, 2.5)}, "field 'class_counts': expected tuple of int, found (1.5, 2.5)"),
        ({"parent": 3}, "field 'parent': expected str or None, found 3"),
    ],
)
def test_wrong_types_and_lengths_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MismatchError, match=re.escape(f"manifest {message}")):
        make(**changes)


def test_values_of_two_lengths_are_refused_without_run_time_type_checks() -> None:
    text = "from kcdcache.condensation.values import Values as V, np; V(np.zeros(2, 'i4'), np.zeros(1, 'f4'))"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert "values need one row per sample: 2 visits, 1 values" in done.stderr


def test_full_manifest_keeps_everything_as_it_is() -> None:
    labels = np.array([0, 2, 0, 0])
    found = manifest.full(Samples("k", 4, labels, 4))
    assert (found.index.tolist(), found.mixed.any(), found.keep, len(found)) == ([0, 1, 2, 3], False, 1.0, 4)
    assert found.class_counts == (3, 0, 1, 0)
    assert manifest.full(Samples("k", 4)).class_counts == ()


def rewrite(path: Path, table: pa.Table, **document: Any) -> None:
    content = {**json.loads(pq.read_table(path).schema.metadata[b"kcdcache.manifest"]), **document}
    pq.write_table(table.replace_schema_metadata({"kcdcache.manifest": json.dumps(content)}), path)


EDITS = {
    "weight": lambda table: table.set_column(7, "weight", pa.array([1, 1, 1, 2], pa.float32())),
    "surplus": lambda table: table.append_column("colour", pa.array(["red"] * 4)),
    "missing": lambda table: table.drop_columns(["rank"]),
    "part": lambda table: table.set_column(1, "part", pa.array(["K_1H", "K_Aug", None, "K_2"])),
    "cell": lambda table: table.set_column(4, "rank", pa.array([0, 3, None, 2])),
}


@pytest.mark.parametrize(
    ("edit", "document", "error", "text"),
    [
        ("weight", {}, CorruptionError, "does not match its digest"),
        (None, {"stage": 3}, CorruptionError, "does not match its digest"),
        (None, {"surplus": 1}, CorruptionError, "does not match its digest"),
        (None, {"format_version": 7}, MismatchError, "has format 7, this kcdcache reads 0; upgrade kcdcache"),
        ("surplus", {}, CorruptionError, "look at 'colour'"),
        ("missing", {}, CorruptionError, "look at 'rank'"),
        ("part", {}, CorruptionError, "row 2: expected part K_1H or K_Aug, found None"),
        ("cell", {}, CorruptionError, "'rank' has empty cells"),
    ],
)
def test_what_was_edited_is_refused(written: Path, edit: Any, document: dict, error: type, text: str) -> None:
    table = pq.read_table(written)
    rewrite(written, EDITS[edit](table) if edit else table, **document)
    with pytest.raises(error, match=text):
        manifest.read(written)


def test_parquet_that_is_no_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    document = {"knowledge_id": "k", "student": "s", "epoch": 1}
    value_files.write(tmp_path / "values.parquet", values.start(3), None, document)
    with pytest.raises(MismatchError, match=r"is a parquet file but no manifest .*`kcdcache condense`"):
        manifest.read(tmp_path / "values.parquet")
    with pytest.raises(NotFoundError, match="no file at"):
        manifest.read(tmp_path / "nothing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CorruptionError, match="is not an undamaged parquet file"):
        manifest.read(tmp_path / "text")


def test_other_knowledge_is_refused_with_both_ids() -> None:
    manifest.require_knowledge(make(), "a" * 64)
    with pytest.raises(MismatchError, match=r"a{64}, the store holds e{64}; .*--transfer"):
        manifest.require_knowledge(make(), "e" * 64)


def test_transfer_needs_the_same_data() -> None:
    manifest.require_knowledge(make(), "e", count=10, data_digest="d" * 64, transfer=True)
    manifest.require_knowledge(make(data_digest=None), "e", count=10, data_digest="x", transfer=True)
    with pytest.raises(MismatchError, match=r"samples 10 in the manifest of a{64}, 11 in the store of e"):
        manifest.require_knowledge(make(), "e", count=11, transfer=True)
    with pytest.raises(MismatchError, match=r"data digest d{64} in the manifest"):
        manifest.require_knowledge(make(), "e", count=10, data_digest="x", transfer=True)


def test_summary_counts_the_parts() -> None:
    found = manifest.summary(make())
    expected = {"samples": 10, "kept": 4, "K_1H": 2, "K_Aug": 2, "K_0": 6, "epsilon": [0.125, 0.25], "unseen": 1}
    assert expected.items() <= found.items()
    assert (found["class_min"], found["class_max"], found["digest"]) == (1, 3, make().digest)
    assert json.loads(json.dumps(found)) == found
    assert manifest.summary(manifest.full(Samples("k", 3)))["epsilon"] is None
