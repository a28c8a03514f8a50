"""The best 60 % of a billion samples, streamed, exact, ties by index: time, memory, and their growth with the number.

python pipelines/bench/selection.py

The parts (`index`, `value`, parquet) are made here, some 4 bytes a sample, and deleted. Every size runs in a process
of its own. Where a size is small enough the selection is held against a sort.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from launch import measured

from kcdcache import ranking, selection, tables

KEEP, PART, CHECKED = 0.6, 2**24, 2 * 10**7


def make(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number, first in enumerate(range(0, rows, PART)):
        with open(folder / f"{number:05}.parquet", "wb") as sink:
            writer = None
            for start in range(first, min(first + PART, rows), tables.ROWS):
                size = min(tables.ROWS, rows - start)
                value = random.random(size, np.float32)  # 24 bits: equal values are common at this size
                table = pa.table({"index": np.arange(start, start + size), "value": value})
                writer = writer or tables.Writer(sink, table.schema)
                writer.write(table)
            writer.close({})


def run(folder, rows):
    parts, out, size = sorted(folder.glob("*.parquet")), folder / "chosen" / "selected.parquet", int(KEEP * rows)
    out.parent.mkdir()
    began = time.perf_counter()
    told = selection.select(parts, out, size=size)
    seconds = time.perf_counter() - began
    if told["kept"] != size:
        raise SystemExit(f"{told['kept']} samples were selected, asked for were {size}")
    return {"rows": rows, "kept": size, "checked": rows <= CHECKED, "seconds": seconds}


def check(folder, rows):
    score = np.concatenate(
        [pq.read_table(part, columns=["value"])["value"] for part in sorted(folder.glob("*.parquet"))]
    )
    expected = np.sort(ranking.order_of(score)[: int(KEEP * rows)])
    if not np.array_equal(pq.read_table(folder / "chosen" / "selected.parquet")["index"].to_numpy(), expected):
        raise SystemExit("the selection differs from that of a sort")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench-select"))
    parser.add_argument("--sizes", type=int, nargs="*", default=[10**6, 10**7, 10**8, 10**9])
    parser.add_argument("--one", type=int)
    parser.add_argument("--make", type=int)
    parser.add_argument("--check", type=int)
    given = parser.parse_args()
    if given.make:
        return make(given.folder, given.make)
    if given.check:
        return check(given.folder, given.check)
    if given.one:
        return print(json.dumps(run(given.folder, given.one)))
    rows = [_size(given.folder / str(size), size) for size in given.sizes]
    growth = {}
    if len(rows) > 1:
        sizes = np.log(given.sizes)
        growth = {f"{name}_slope": float(np.polyfit(sizes, np.log([row[name] for row in rows]), 1)[0])
                  for name in ("seconds", "peak_MiB")}  # fmt: skip
    _write(rows, growth)
    shutil.rmtree(given.folder)
    return None


def _size(folder, size):
    def itself(*words):
        return measured([sys.executable, __file__, "--folder", folder, *words])

    itself("--make", size)
    _, peak, output = itself("--one", size)
    if size <= CHECKED:
        itself("--check", size)
    shutil.rmtree(folder)
    row = json.loads(output)
    return {**row, "peak_MiB": peak, "bar_s": 300 if size == 10**9 else None, "bar_MiB": 10**9 / 2**20}


def _write(rows, growth):
    from measure import write  # loads torch, whose memory is not what the children should be measured with

    name = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    write("selection", f"python pipelines/bench/{name}", 2, rows, growth=growth)
    print(json.dumps(growth))


if __name__ == "__main__":
    main()
