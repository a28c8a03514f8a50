"""What was tried where a bar is missed: threads for starting a stage, forms of parquet for reading,
ways to take a batch from a memory-mapped file. Figures, not claims; `reading.py` and `files.py` hold the bars.

python pipelines/bench/attempts.py --folder /tmp/attempts
"""

import argparse
import mmap
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from measure import alternating, median, ratio, started, write
from reading import BATCH, kept_rows, raw_read
from trust import make

from kcdcache import settings
from kcdcache.condensation import manifest, summary, values
from kcdcache.files import parquet
from kcdcache.store import reader


def line(what, tried, seconds, name, reference, bar, repetitions):
    return {
        "what": what, "tried": tried, "median_s": median(seconds[name]), "reference": reference,
        "ratio": ratio(seconds, name, "reference"), "bar": bar, "n": repetitions,
    }  # fmt: skip


def starting(given):
    """Starting a stage into memory that is there: one thread or two."""
    opened = reader.open(make(given.folder / "store", given.rows, 1000, 2, "float16"))
    kept = kept_rows(opened.count, 0.7)
    held = {2: np.empty((len(kept), 1000), np.float16), 1: np.empty(len(kept), np.float32)}

    def load(threads):
        return lambda: opened.load(0, kept, ("logits",), threads, lambda shape, dtype: held[len(shape)])

    ways = {f"{threads} thread(s)": load(threads) for threads in (1, 2)}
    seconds = alternating(given.repetitions, reference=raw_read(opened), **ways)
    what = f"start of a stage, {given.rows} rows, memory used again"
    return [
        line(what, tried, seconds, tried, "readinto of the same files, one thread", "<= 1.75", given.repetitions)
        for tried in ways
    ]


def rows_of_a_manifest(keep):
    """The rows that a run of 240 epochs on 1.28 M samples leaves, as a table."""
    random = np.random.default_rng(0)
    visits = random.choice(np.array([40, 80, 120, 160, 200, 240], np.int32), 1_280_000)
    found = values.Values(visits, random.gamma(1.0, 1.0, len(visits)).astype(np.float32))
    labels = random.integers(0, 1000, len(visits))
    samples = manifest.Samples("k", len(visits), labels)
    made = summary.condense(found, settings.CondenseSettings(), samples, stage=1, keep=keep)
    return manifest.cells(made.columns())


def encoded(table, level=1, compression="zstd", **encodings):
    """The table in our form but for the compression, its level, or some columns' encodings."""
    plain = {field.name: field.type for field in table.schema if not parquet._is_text(field.type)}
    kinds = {
        name: "BYTE_STREAM_SPLIT" if pa.types.is_floating(kind) else "DELTA_BINARY_PACKED"
        for name, kind in plain.items()
    } | encodings
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata(), sink, compression=compression, write_page_checksum=True, store_schema=False,
        compression_level=level if compression in ("zstd", "brotli") else None, column_encoding=kinds,
        use_dictionary=[name for name in table.schema.names if name not in plain], row_group_size=parquet.ROWS,
    )  # fmt: skip
    return sink.getvalue()


def manifest_bytes():
    """Bytes a row where every row is mixed: other levels, compressions and encodings, and each column left out."""
    table = rows_of_a_manifest(0.5)
    forms = {"ours": encoded(table), "brotli, level 5": encoded(table, 5, "brotli")}
    forms |= {f"zstd, level {level}": encoded(table, level) for level in (3, 9, 19)}
    forms |= {f"{name} split by bytes": encoded(table, **{name: "BYTE_STREAM_SPLIT"}) for name in ("partner", "rank")}
    forms |= {
        f"without {name}": encoded(table.drop_columns([name])) for name in ("partner", "rank", "value", "epsilon")
    }
    return [
        {"what": "bytes a row of a manifest whose rows are all mixed", "tried": tried, "median_s": None,
         "reference": "-", "ratio": form.size / table.num_rows, "bar": "<= 10.5", "n": 1}
        for tried, form in forms.items()
    ]  # fmt: skip


def writing(given):
    """Writing a manifest in other forms, all encodings and checksums as ours."""
    table = rows_of_a_manifest(0.7)
    ways = {f"{name}, level {level}": (lambda n=name, at=level: encoded(table, at, n))
            for name, level in (("zstd", 1), ("zstd", -5), ("lz4", 0), ("snappy", 0), ("none", 0))}  # fmt: skip

    def default():
        pq.write_table(table, pa.BufferOutputStream())

    seconds = alternating(given.repetitions, reference=default, **ways)
    return [
        line(f"writing a manifest of {table.num_rows} rows",
             f"{tried}: {way().size / table.num_rows:.1f} bytes a row", {**seconds, "this": seconds[tried]}, "this",
             "parquet with default settings", "<= 0.5", given.repetitions)
        for tried, way in ways.items()
    ]  # fmt: skip


def reading(given):
    """Reading a manifest: other compressions and encodings of the same rows, and no page checksums."""
    table = rows_of_a_manifest(0.7)
    plain = dict.fromkeys(table.schema.names, "PLAIN")

    def written(**how):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, **how)
        return sink.getvalue()

    def read(buffer, **how):
        return lambda: pq.ParquetFile(pa.BufferReader(buffer), **how).read()

    ours = parquet.encode(table)
    forms = {
        "ours": (ours, {"page_checksum_verification": True}),
        "ours, checksums not compared": (ours, {}),
        "plain, zstd": (written(compression="zstd", use_dictionary=False, column_encoding=plain), {}),
        "plain, lz4": (written(compression="lz4", use_dictionary=False, column_encoding=plain), {}),
        "plain, uncompressed": (written(compression="none", use_dictionary=False, column_encoding=plain), {}),
        "rows in groups of 131,072": (written(compression="zstd", row_group_size=2**17), {}),
    }
    ways = {name: read(buffer, **how) for name, (buffer, how) in forms.items()}
    seconds = alternating(given.repetitions, reference=read(written()), **ways)
    return [
        line(
            f"reading a manifest of {table.num_rows} rows",
            f"{name}: {len(forms[name][0]) / table.num_rows:.1f} bytes a row",
            seconds,
            name,
            "parquet with default settings",
            "<= 0.5",
            given.repetitions,
        )
        for name in ways
    ]


def mapped(given):
    """A batch of 256 random rows from a memory-mapped file: as it is, advised, in order of place, and by pread."""
    rows = given.rows
    memory = np.random.default_rng(0).integers(0, 2**15, (rows, 1000), np.int16)
    with tempfile.TemporaryFile(dir=given.folder) as stream:
        memory.tofile(stream)
        stream.flush()
        held = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
        file = np.frombuffer(held, np.int16).reshape(rows, 1000)
        file.sum()  # warm
        order, out = np.random.default_rng(1).permutation(rows), np.empty((BATCH, 1000), np.int16)
        turn = iter(range(10**9))

        def places():
            low = next(turn) * BATCH * 7 % (rows - BATCH)
            return order[low : low + BATCH]

        def take(source, sort=False):
            def work():
                for _ in range(60):
                    chosen = places()
                    np.take(source, np.sort(chosen) if sort else chosen, 0, out=out, mode="clip")

            return work

        def pread():
            for _ in range(60):
                for place, row in enumerate(places().tolist()):
                    stream.seek(row * 2000)
                    stream.readinto(out[place].data)

        ways = {"as it is": take(file), "in order of place": take(file, True), "seek and read, row by row": pread}
        seconds = alternating(10 * given.repetitions, reference=take(memory), **ways)
        for advice in ("MADV_RANDOM", "MADV_WILLNEED", "MADV_HUGEPAGE"):
            try:
                held.madvise(getattr(mmap, advice))
                tried = alternating(10 * given.repetitions, reference=take(memory), mapped=take(file))
                ways[advice] = None
                seconds[advice] = [
                    s * median(seconds["reference"]) / median(tried["reference"]) for s in tried["mapped"]
                ]
            except OSError as error:
                print(f"{advice}: {error}")
        del file
    return [
        line(f"batch of 256 from a memory-mapped file, {rows} rows", tried, seconds, tried,
             "np.take on an array in memory", "<= 1.18", 10 * given.repetitions)
        for tried in ways
    ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=640_000)
    parser.add_argument("--repetitions", type=int, default=7)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    try:
        rows = starting(given) + reading(given) + writing(given) + manifest_bytes() + mapped(given)
        write("attempts", started(), torch.get_num_threads(), rows)
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
