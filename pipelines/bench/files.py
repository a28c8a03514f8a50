"""Manifest and values files against parquet with default settings: bytes, and time to write and to read in memory.

python pipelines/bench/files.py
"""

import argparse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measure import alternating, median, ratio, started, write

from kcdcache import settings
from kcdcache.condensation import manifest, summary, values
from kcdcache.files import parquet

COUNT, KEEPS = 1_280_000, (0.7, 0.5)  # of the second every row is mixed: two more numbers in each


def default(table):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue()


def compared(what, table, repetitions):
    """Rows of the result for one table. Both kinds are written to and read from memory, and read as they come."""
    ours, theirs = parquet.encode(table), default(table)

    def read_ours():
        return pq.ParquetFile(pa.BufferReader(ours), page_checksum_verification=True).read()

    seconds = alternating(
        repetitions, write_ours=lambda: parquet.encode(table), write_default=lambda: default(table),
        read_ours=read_ours, read_default=lambda: pq.ParquetFile(pa.BufferReader(theirs)).read(),
    )  # fmt: skip
    rows, bytes_a_row = table.num_rows, len(ours) / table.num_rows
    common = {"rows": rows, "bytes_a_row": bytes_a_row, "n": repetitions}
    return [
        {"what": f"{what}: bytes", "ours": float(len(ours)), "default": float(theirs.size),
         "ratio": len(ours) / theirs.size, "bar": 0.55, **common},
        *(
            {"what": f"{what}: seconds to {verb}", "ours": median(seconds[f"{verb}_ours"]),
             "default": median(seconds[f"{verb}_default"]),
             "ratio": ratio(seconds, f"{verb}_ours", f"{verb}_default"), "bar": 0.5, **common}
            for verb in ("write", "read")
        ),
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--repetitions", type=int, default=11)
    given = parser.parse_args()
    random = np.random.default_rng(0)
    # what a run of 240 epochs leaves: few different counts of visits, values like entropies, any label
    visits = random.choice(np.array([40, 80, 120, 160, 200, 240], np.int32), given.count)
    found = values.Values(visits, random.gamma(1.0, 1.0, given.count).astype(np.float32))
    labels = random.integers(0, 1000, given.count)
    columns = {"index": np.arange(given.count), "visits": visits, "value": found.value, "label": labels}
    rows = []
    for keep in KEEPS:
        samples = manifest.Samples("k", given.count, labels)
        made = summary.condense(found, settings.CondenseSettings(), samples, stage=1, keep=keep)
        what = f"manifest of {len(made)} rows, {made.mixed.mean():.0%} mixed"
        rows += compared(what, manifest.cells(made.columns()), given.repetitions)
    rows += compared(f"values of {given.count} rows", pa.table(columns), given.repetitions)
    write("files", started(), 2, rows)


if __name__ == "__main__":
    main()
