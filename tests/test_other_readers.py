"""Values, condensed sets and stores open in the tools that people have, with the numbers that we wrote."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import readers
from condensing import condensed, labels, prepared, some_values
from stores import make, small_parts

from kcdcache.condensation import manifest
from kcdcache.store import reader

OFFLINE = ("NewConnectionError", "NameResolutionError", "ProxyError", "ConnectTimeoutError", "Temporary failure")
EXAMPLE = Path(__file__).parent.parent / "pipelines" / "examples" / "read_with_duckdb.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Values and a condensed set in the places where a run leaves them; both also in parts."""
    root = prepared(tmp_path_factory.mktemp("run"))
    (root / "stages" / "0").mkdir(parents=True)
    condensed(root, root / "stages" / "0" / "manifest.parquet", {"values": "values.parquet"})
    condensed(root, root / "set.parts", {"values": "values.parquet", "partition_rows": 40})
    return root


def written(run):
    """File -> its columns, as we hold them."""
    known, one = some_values(), manifest.read(run / "stages/0/manifest.parquet")
    assert one.mixed.any()
    values = {"index": np.arange(len(known.value)), "visits": known.visits, "value": known.value, "label": labels()}
    kept = {name: getattr(one, name) for name in manifest.ARRAYS if name != "mixed"}
    return {
        "values.parquet": values,
        "stages/0/manifest.parquet": kept | {"part": np.where(one.mixed, "K_Aug", "K_1H")},
    }


def assert_same(found, columns):
    assert found.keys() == columns.keys()
    for name, column in columns.items():
        missing = -1 if name == "partner" else 0  # of a sample without a partner, or never seen
        known = [missing if value is None else value for value in found[name]]
        assert np.array_equal(np.asarray(known).astype(column.dtype), column), name


@pytest.mark.parametrize("file", ["values.parquet", "stages/0/manifest.parquet"])
@pytest.mark.parametrize("library", ["duckdb", "polars", "fastparquet", "pandas", "pyarrow"])
def test_a_library_reads_every_column_that_we_wrote(run, library, file):
    pytest.importorskip(library)
    assert_same(getattr(readers, library)(run / file), written(run)[file])


@pytest.mark.parametrize("library", ["duckdb", "polars"])
def test_a_library_reads_a_set_in_parts_as_one(run, library):
    pytest.importorskip(library)
    found, columns = getattr(readers, library)(run / "set.parts" / "*.parquet"), written(run)
    order = np.argsort(found["index"])
    sorted_columns = {name: np.asarray(column)[order] for name, column in found.items()}
    whole = columns["stages/0/manifest.parquet"]
    assert_same(sorted_columns, {name: column[np.argsort(whole["index"])] for name, column in whole.items()})


def digests(root):
    """Array -> SHA-256 of its numbers, as we read them."""
    opened, found = reader.open(root), {}
    for array in opened.plan.arrays:
        rows = np.arange(opened.count)
        views = (
            [opened.load(view, rows, [array.field])[array.name] for view in range(opened.views)] if array.field else []
        )
        numbers = np.stack(views) if views else getattr(opened, array.name)
        found[array.name] = hashlib.sha256(numbers.tobytes()).hexdigest()
    return found


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_xarray_opens_a_store(tmp_path, compression):
    pytest.importorskip("xarray")
    root = make(tmp_path / "s", small_parts(150, 2, 64, 32, "top:3", compression))
    assert readers.xarray(root) == digests(root)


def environment(root, wanted):
    """Return a function that runs Python in an environment of its own, with readers that kcdcache does not bring."""
    python = root / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "--retries", "0", *wanted],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and any(word in done.stderr for word in OFFLINE):
        pytest.skip("no network to install other readers from")
    assert done.returncode == 0, done.stderr

    def start(*words):
        return subprocess.run([str(python), *map(str, words)], capture_output=True, text=True, check=False)

    return start


def assert_read(other, run, libraries):
    """These libraries of another environment read every column, with the numbers that we wrote."""
    for library in libraries:
        for file, columns in written(run).items():
            done = other(readers.__file__, library, run / file)
            assert done.returncode == 0, done.stderr
            assert_same(json.loads(done.stdout), columns)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java")
def test_spark_reads_what_we_wrote(run, tmp_path):
    other = environment(tmp_path, ["pyspark==3.5.*"])
    assert_read(other, run, ["pyspark"])


@pytest.mark.slow
def test_duckdb_1_fastparquet_pandas_and_xarray_read_what_we_wrote(run, tmp_path):
    other = environment(tmp_path, ["duckdb>=1,<2", "fastparquet", "pandas", "pyarrow", "xarray", "zarr>=3"])
    version = other("-c", "import duckdb; print(duckdb.__version__)").stdout
    assert version.startswith("1.")
    assert_read(other, run, ["duckdb", "fastparquet", "pandas"])
    assert other(EXAMPLE, run).returncode == 0
    for compression in ("none", "zstd"):
        root = make(tmp_path / compression, small_parts(150, 2, 64, 32, "top:3", compression))
        done = other(readers.__file__, "xarray", root)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == digests(root)
    odd = {"use_dictionary": False, "column_encoding": {"visits": "BYTE_STREAM_SPLIT"}}
    pq.write_table(pa.table({"visits": np.arange(9, dtype=np.int32)}), tmp_path / "odd.parquet", **odd)
    assert "BYTE_STREAM_SPLIT" in other(readers.__file__, "duckdb", tmp_path / "odd.parquet").stderr.upper().replace(
        " ", "_"
    )
