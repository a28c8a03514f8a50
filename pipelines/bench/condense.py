"""How long condensing takes: the ranking in memory, the whole command, and time and memory against the number of rows.

Some sizes are condensed beyond --memory-gb too, by DuckDB, and held against the set made in memory.

python pipelines/bench/condense.py

Every number comes from a process of its own, whose peak memory the system tells when it ends. The files of values lie
in --folder, which is deleted at the end.
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
from launch import measured
from measure import alternating, median, ratio, started, write

from kcdcache.condensation import ranking, value_files
from kcdcache.datasets.spec import DataIdentity
from kcdcache.files import parquet
from kcdcache.files.atomic import sha256_file, write_atomic
from kcdcache.files.records import canonical_json
from kcdcache.settings import ViewRule
from kcdcache.store.identity import FORMAT_VERSION, IDENTITY_FILE, Knowledge, TeacherIdentity

KEEP, CLASSES, MIB = 0.7, 100, 2**20


def knowledge(rows):
    return Knowledge(
        teacher=TeacherIdentity(architecture="none", weights="none", transform={}, precision="float32"),
        data=DataIdentity(count=rows, classes=tuple(map(str, range(CLASSES))), image_size=(1, 1), digest="none"),
        views=ViewRule(rule="none", padding=0, fill="zero", size=(1, 1), seed=0),
    )


def make(folder, rows):
    """Values of so many samples as a run writes them, made block by block, and the identity of a store for them."""
    whole = knowledge(rows)
    document = {"format_version": FORMAT_VERSION, "knowledge": whole.document(), "knowledge_id": whole.knowledge_id}
    path = folder / "store" / IDENTITY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, canonical_json(document))
    content = {"knowledge_id": whole.knowledge_id, "student": "none", "epoch": 1, "format_version": 0, "count": rows}
    kinds = {"index": np.int64, "visits": np.int32, "value": np.float32, "label": np.int64}
    digest, random = parquet.Digest(kinds), np.random.default_rng(0)
    with open(folder / "values.parquet", "wb") as sink:
        writer = parquet.Writer(sink, table_of(block(random, 0, 1)).schema)
        for first in range(0, rows, parquet.ROWS):
            columns = block(random, first, min(parquet.ROWS, rows - first))
            digest.add(columns)
            writer.write(table_of(columns))
        content["digest"] = digest.over(canonical_json(content))
        writer.close({value_files.METADATA_KEY: canonical_json(content)})


def table_of(columns):
    return parquet.pa.table(columns)


def block(random, first, rows):
    return {
        "index": np.arange(first, first + rows),
        "visits": random.integers(1, 41, rows).astype(np.int32),
        "value": random.gamma(1.0, 1.0, rows).astype(np.float32),
        "label": random.integers(0, CLASSES, rows),
    }


def itself(*words):
    return measured([sys.executable, __file__, *map(str, words)])[2]


def order_of(score):
    """Positions from the highest score to the lowest, as condensing orders them."""
    ranker = ranking.Ranker(len(score))
    ranker.add(np.arange(len(score)), score)
    return ranker.ranked()[0]


def rank(rows, repetitions):
    """Ours, with its result kept, against a stable argsort of the negated scores."""
    score = np.random.default_rng(0).gamma(1.0, 1.0, rows).astype(np.float32)
    negated = -score
    if rows <= 10**7 and not np.array_equal(order_of(score), np.argsort(negated, kind="stable")):
        raise SystemExit("the two orders differ")
    seconds = alternating(repetitions, ours=lambda: order_of(score), numpy=lambda: np.argsort(negated, kind="stable"))
    return {
        "what": f"exact ranking of {rows} scores in memory", "n": repetitions, "median_s": median(seconds["ours"]),
        "reference": "numpy stable argsort", "reference_s": median(seconds["numpy"]),
        "ratio": ratio(seconds, "ours", "numpy"), "bar": 0.25, "peak_MiB": None,
    }  # fmt: skip


def program(*words):
    return [sys.executable, "-m", "kcdcache", *map(str, words)]


def command(what, words, repetitions, bar, peak_bar=None, before=lambda: None):
    found = []
    for _ in range(repetitions):
        before()
        found.append(measured(words)[:2])
    return {
        "what": what, "n": repetitions, "median_s": median([one for one, _ in found]), "reference": "-",
        "reference_s": None, "ratio": None, "bar": bar, "peak_MiB": max(peak for _, peak in found),
        **({"peak_bar_MiB": peak_bar} if peak_bar else {}),
    }  # fmt: skip


def condensing(folder, rows, repetitions, bar=None, peak_bar=None, parts=None, beyond=None):
    """The whole command, with --partition-rows if given; `beyond` so many GB of memory, to the bytes made in memory."""
    here = folder / str(rows)
    if not (here / "values.parquet").exists():
        itself("--make", here, "--rows", rows)
    out = here / ("beyond.parquet" if beyond else "set.parquet")
    more = [*(["--partition-rows", parts] if parts else []), *(["--memory-gb", beyond] if beyond else [])]
    words = program("condense", "--values", here / "values.parquet", "--store", here / "store", "--keep", KEEP,
                    "--out", out, "--quiet", *more)  # fmt: skip
    what = " ".join([f"kcdcache condense of {rows} rows, keep {KEEP}", *map(str, more)])
    row = command(what, words, repetitions, bar, peak_bar, lambda: remove(out))
    if beyond and content(out) != content(here / "set.parquet"):
        raise SystemExit(f"{what}: the bytes differ from those made in memory")
    return {
        **row,
        "rows": rows,
        "values_bytes": (here / "values.parquet").stat().st_size,
        "manifest_bytes_a_row": sum(file.stat().st_size for file in files_of(out)) / math.floor(KEEP * rows),
    }


def files_of(path):
    """The files of a manifest, which of many samples is a folder."""
    return sorted(path.iterdir()) if path.is_dir() else [path]


def content(path):
    return [sha256_file(file) for file in files_of(path)]


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def slope(sizes, numbers):
    """Of the straight line through the logarithms, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(numbers), 1)[0])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench-condense"))
    parser.add_argument("--rank", type=int, nargs="*", default=[1_280_000, 100_000_000])
    parser.add_argument("--sizes", type=int, nargs="*", default=[10**4, 50_000, 10**5, 10**6, 1_280_000, 10**7, 10**8])
    parser.add_argument(
        "--beyond", type=int, nargs="*", default=[10**7], help="sizes to condense beyond --memory-gb too"
    )
    parser.add_argument("--memory-gb", type=float, default=0.05)
    parser.add_argument("--partition-rows", type=int)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--make", type=Path)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rank-one", type=int)
    given = parser.parse_args()
    if given.make:
        return make(given.make, given.rows)
    if given.rank_one:
        return print(json.dumps(rank(given.rank_one, given.repetitions)))
    fewer = lambda rows: given.repetitions if rows <= 10**7 else min(3, given.repetitions)  # noqa: E731
    rows = [json.loads(itself("--rank-one", n, "--repetitions", fewer(n))) for n in given.rank]
    rows.append(command("kcdcache --help", program("--help"), given.repetitions, 0.3))
    scaled = [
        condensing(given.folder, n, fewer(n), 60.0 if n > 10**7 else 1.0 if n <= 1_280_000 else None,
                   1.5 * 10**9 / MIB if n > 10**7 else None, given.partition_rows)
        for n in given.sizes
    ]  # fmt: skip
    scaled_beyond = [
        condensing(given.folder, n, fewer(n), parts=given.partition_rows, beyond=given.memory_gb) for n in given.beyond
    ]
    smallest = given.folder / str(given.sizes[0])
    rows.append(command("kcdcache inspect of a manifest", program("inspect", smallest / "set.parquet"),
                        given.repetitions, 1.0))  # fmt: skip
    growth = {"from": "all sizes", "time_slope": None, "memory_slope": None}
    if len(scaled) > 1:
        growth["time_slope"] = slope(given.sizes, [row["median_s"] for row in scaled])
        growth["memory_slope"] = slope(given.sizes, [row["peak_MiB"] for row in scaled])
    shown = list(rows[0])
    write("condense", started(), 2,
          [{name: row[name] for name in shown} for row in rows + scaled + scaled_beyond],
          growth=growth, scaled=scaled + scaled_beyond)  # fmt: skip
    print(json.dumps(growth))
    shutil.rmtree(given.folder)
    return None


if __name__ == "__main__":
    main()
