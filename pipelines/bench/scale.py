"""Condensing many samples: time and peak memory against their number.

python pipelines/bench/scale.py

Full condensation with pairing from partitioned parquet, each in a process of its own. Inputs are made part by part
under --folder, and deleted. Results are written after each row.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from launch import measured

from kcdcache import settings
from kcdcache.condensation import value_files
from kcdcache.files import parquet
from kcdcache.files.atomic import write_atomic
from kcdcache.files.records import canonical_json
from kcdcache.store.identity import FORMAT_VERSION, IDENTITY_FILE

KEEP, CLASSES = 0.7, 100
KINDS = {"index": np.int64, "visits": np.int32, "value": np.float32, "label": np.int64}


def make(folder, rows, labelled):
    """Values of so many samples in parts as `values.write` writes them, and the identity of a store for them."""
    from condense import knowledge  # loads torch, whose memory should not be measured

    whole = knowledge(rows)
    document = {"format_version": FORMAT_VERSION, "knowledge": whole.document(), "knowledge_id": whole.knowledge_id}
    path = folder / "store" / IDENTITY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, canonical_json(document))
    kinds = {name: kind for name, kind in KINDS.items() if labelled or name != "label"}
    schema = parquet.pa.schema([(name, parquet.pa.from_numpy_dtype(kind)) for name, kind in kinds.items()])
    digest, random, parts = parquet.Digest(kinds), np.random.default_rng(0), []
    (folder / "values").mkdir()

    def blocks(span):
        for first in range(span.first, span.stop, parquet.ROWS):
            columns = block(random, first, min(parquet.ROWS, span.stop - first), labelled)
            digest.add(columns)
            yield parquet.pa.table(columns)

    for span in parquet.spans(rows, settings.PART_ROWS):
        parts.append(parquet.write_part(folder / "values", span, schema, blocks(span)))
    content = {"knowledge_id": whole.knowledge_id, "student": "none", "epoch": 1, "format_version": 0, "count": rows}
    content["digest"] = digest.over(canonical_json(content))
    fingerprint = digest.over(b"", ("visits", "value"))
    parquet.seal(
        folder / "values",
        parquet.Seal(
            key=value_files.METADATA_KEY,
            samples=rows,
            partition_rows=settings.PART_ROWS,
            document=content,
            fingerprint=fingerprint,
            parts=tuple(parts),
        ),
    )


def block(random, first, rows, labelled):
    columns = {
        "index": np.arange(first, first + rows),
        "visits": random.integers(1, 41, rows).astype(np.int32),
        "value": random.standard_gamma(1.0, rows, np.float32),  # of so many 24-bit fractions some are equal
    }
    return columns | ({"label": random.integers(0, CLASSES, rows)} if labelled else {})


def size_of(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def condense(folder, rows, memory_gb):
    out = folder / f"set-{memory_gb}"
    words = ["condense", "--values", folder / "values", "--store", folder / "store", "--keep", KEEP, "--out", out,
             "--partition-rows", min(settings.PART_ROWS, max(2**16, rows // 8)), "--memory-gb", memory_gb,
             "--quiet", "--json"]  # fmt: skip
    seconds, peak, output = measured([sys.executable, "-m", "kcdcache", *words])
    told = json.loads(output.splitlines()[-1])
    row = {
        "what": "condense with pairing", "rows": rows, "memory_gb": memory_gb, "seconds": seconds, "peak_MiB": peak,
        "input_bytes": size_of(folder / "values"), "output_bytes": size_of(out), "digest": told["digest"],
    }  # fmt: skip
    shutil.rmtree(out)
    return row


def work(given):
    """Yield a row for everything asked for."""
    for rows in sorted(given.condense):
        folder = given.folder / str(rows)
        shutil.rmtree(folder, ignore_errors=True)
        measured([sys.executable, __file__, "--make", folder, "--rows", str(rows),
                  "--labelled"])  # fmt: skip
        yield condense(folder, rows, 8)
        shutil.rmtree(folder)


def slopes(rows):
    """Of the straight lines through the logarithms, by least squares, of each way with several sizes."""
    found = {}
    for key in {row["memory_gb"] for row in rows}:
        mine = [row for row in rows if row["memory_gb"] == key]
        if len(mine) > 1:
            sizes = np.log([row["rows"] for row in mine])
            found[f"{key} GB"] = {
                name: float(np.polyfit(sizes, np.log([row[name] for row in mine]), 1)[0])
                for name in ("seconds", "peak_MiB")
            }
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench-scale"))
    parser.add_argument("--condense", type=int, nargs="*", default=[10**6, 10**7, 10**8])
    parser.add_argument("--make", type=Path, dest="made")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--labelled", action="store_true")
    given = parser.parse_args()
    if given.made:
        return make(given.made, given.rows, given.labelled)
    name, rows = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]), []
    for row in work(given):
        rows.append(row)
        _write(name, rows)
    shutil.rmtree(given.folder, ignore_errors=True)
    return None


def _write(name, rows):
    from measure import write  # loads torch, whose memory is not what the children should be measured with

    write("scale", f"python pipelines/bench/{name}", 2, rows, growth=slopes(rows))


if __name__ == "__main__":
    main()
