"""Parquet files of unknown origin, manifests and values: what they claim must not eat memory, time or files."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forging import DICTIONARY, RLE_DICTIONARY, ZSTD, column, footer, one_column, page, parquet
from numcodecs import Zstd

from kcdcache.condensation import manifest
from kcdcache.errors import MismatchError
from kcdcache.files import parquet as files_parquet


def integers(*numbers):
    return np.array(numbers, "<i8").tobytes()


def table_of(path, table, **how):
    pq.write_table(pa.table(table), path, **({"compression": "zstd", "use_dictionary": False} | how))
    return path


def endless_rows(path, rows):
    """A few hundred kilobytes that decode to any number of rows."""
    batch = pa.table({"index": np.zeros(2**20, np.int64), "value": np.zeros(2**20, np.float32)})
    with pq.ParquetWriter(path, batch.schema, compression="zstd") as writer:
        for _ in range(rows // 2**20):
            writer.write_table(batch)
    return path


def refused(run, path, code, text):
    """Both commands that read a table without knowing how long it should be end with this code, and say why."""
    for command in ("inspect", "verify"):
        done = run(command, path)
        assert (done.code, text in done.output) == (code, True), done.output


def test_a_forged_file_without_a_lie_is_read(tmp_path):
    (tmp_path / "t.parquet").write_bytes(one_column([page(integers(5, 6, 7), 3)], 3))
    assert files_parquet.read(tmp_path / "t.parquet").to_pydict() == {"index": [5, 6, 7]}


@pytest.mark.parametrize("rows", [10**5, pytest.param(10**6, marks=pytest.mark.slow)])
def test_honest_rows_fit_the_memory_that_the_hostile_files_get(run, tmp_path, rows):
    manifest.write(tmp_path / "m.parquet", manifest.full(manifest.Samples("k", rows)))
    done = run("verify", tmp_path / "m.parquet")
    assert (done.code, f"rows: {rows}" in done.output) == (0, True), done.output


def test_endless_rows_are_refused_where_nobody_knows_how_many_there_should_be(run, tmp_path):
    path = endless_rows(tmp_path / "v.parquet", 2**25)
    assert path.stat().st_size < 2**20
    refused(run, path, 4, "holds 33554432 rows, expected at most 16777216 (one per sample)")


def test_a_condensed_set_that_its_size_makes_plausible_may_be_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(files_parquet, "UNKNOWN_ROWS", 10**5)
    rows = 10**5 + 1
    path = table_of(tmp_path / "t.parquet", {"index": np.random.default_rng(0).integers(0, 2**30, rows)})
    assert files_parquet.read(path).num_rows == rows


def test_a_text_that_every_row_names_stands_in_memory_once(run, tmp_path):
    columns = {"part": pa.array(["x" * 2**16] * 2**14), "index": np.arange(2**14)}  # 1 GB, were it repeated
    path = table_of(tmp_path / "t.parquet", columns, use_dictionary=["part"])
    reading = f"from kcdcache.files import parquet\nprint(parquet.read(Path({str(path)!r})).num_rows)"
    done = run(text=f"from pathlib import Path\n{reading}")
    assert (done.code, done.output.strip()) == (0, str(2**14)), done.output


CLAIMS = {
    "a page of 2 GB": [page(Zstd(1).encode(bytes(2**26)), 3, 2**31 - 1)],
    "a page that becomes more than it claims": [page(Zstd(1).encode(bytes(2**26)), 3, 24)],
    "a dictionary of 2 GB": [
        page(Zstd(1).encode(integers(1)), 1, 2**31 - 1, DICTIONARY),
        page(b"\0\6\0", 3, encoding=RLE_DICTIONARY),
    ],
    "a dictionary of 2 billion values": [
        page(Zstd(1).encode(integers(1)), 2**31 - 1, 8, DICTIONARY),
        page(b"\0\6\0", 3, encoding=RLE_DICTIONARY),
    ],
    "a page of 2 billion values": [page(Zstd(1).encode(integers(1)), 2**31 - 1, 8)],
    "fewer values than rows": [page(Zstd(1).encode(integers(1, 2)), 2, 16)],
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_pages_that_do_not_hold_what_they_claim_are_refused(run, tmp_path, claim):
    path, pages = tmp_path / "t.parquet", CLAIMS[claim]
    path.write_bytes(one_column(pages, 3, codec=ZSTD, dictionary=4 if "dictionary" in claim else None))
    done = run(text=f"from pathlib import Path\nfrom kcdcache.files import parquet\nparquet.read(Path({str(path)!r}))")
    assert done.output.startswith(("CorruptionError", "UnsafeError")), done.output


FOOTERS = {
    "200,000 row groups": lambda: footer([([], 0)] * 200_000, 0),
    "25,000 columns": lambda: footer([([column(4, 0, 1)] * 25_000, 1)], 1, names=[b"index"] * 25_000),
    "100,000 columns without data": lambda: footer([], 0, names=[b"a"] * 100_000),
    "fewer rows than its groups": lambda: footer([([column(4, 0, 10**9)], 10**9)], 1),
    "a negative number of rows": lambda: footer([([column(4, 0, -5)], -5)], -5),
    "no column of those it names": lambda: footer([([], 1)], 1),
    "rows without a page": lambda: footer([([column(4, 0, 10**9)], 1)], 1),
    "metadata of 3 MB": lambda: footer([], 0, metadata=[(b"k", b"x" * 3 * 2**20)]),
    "more groups than it lists": lambda: b"\x15\x04\x19\xfc\xff\xff\xff\xff\x0f",
}


@pytest.mark.parametrize("claim", FOOTERS)
def test_footers_that_would_take_memory_are_refused(run, tmp_path, claim):
    (tmp_path / "t.parquet").write_bytes(parquet(b"", FOOTERS[claim]()))
    refused(run, tmp_path / "t.parquet", 3, "is not an undamaged parquet file")


def test_a_footer_as_long_as_a_huge_file_is_not_read(run, tmp_path):
    with open(tmp_path / "t.parquet", "wb") as stream:
        stream.truncate(2**40)  # a sparse file: it takes no room
        stream.seek(0, 2)
        stream.write((2**31).to_bytes(4, "little") + b"PAR1")
    refused(run, tmp_path / "t.parquet", 3, "no parquet footer of at most 2097152 bytes")


def test_columns_that_are_no_numbers_are_refused_before_they_are_decoded(tmp_path):
    path = table_of(tmp_path / "t.parquet", {"index": pa.array([[1, 2]]), "value": [1.0]})
    with pytest.raises(MismatchError, match="column 'index' should hold numbers, found list"):
        files_parquet.read(path)


def test_columns_nobody_asked_for_are_not_decoded(run, tmp_path):
    path = table_of(tmp_path / "v.parquet", {"index": [0], "value": [1.5], "note": ["x" * 2**28]})
    done = run("inspect", path)
    assert (done.code, "value_range: [1.5, 1.5]" in done.output) == (0, True), done.output


def test_arrow_extension_types_run_no_code(tmp_path):
    canary = tmp_path / "canary"
    pickled = f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()
    plain = pa.field("index", pa.int64(), metadata={
        "ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickled,
    })  # fmt: skip
    schema = pa.schema([plain, ("value", pa.float32())])
    pq.write_table(pa.table([[0], [1.0]], schema=schema), tmp_path / "t.parquet")
    assert files_parquet.read(tmp_path / "t.parquet").to_pydict() == {"index": [0], "value": [1.0]}
    assert not canary.exists()


def test_metadata_that_is_hostile_json_is_refused(run, tmp_path):
    path = tmp_path / "m.parquet"
    for text, code, why in (
        ("[" + "{}," * 600_000 + "0]", 8, "holds 1200001 JSON values, expected at most 1000000"),
        ('{"keep": NaN}', 3, "it should hold JSON"),
        ('{"count": 1, "count": 2}', 4, "has format None"),
    ):
        path.write_bytes(parquet(b"", footer([], 0, metadata=[(manifest.METADATA_KEY.encode(), text.encode())])))
        refused(run, path, code, why)
