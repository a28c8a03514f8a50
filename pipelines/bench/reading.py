"""Reading a store: starting a stage, steady batches in memory and beyond the memory budget, and their memory.

python pipelines/bench/reading.py --folder /tmp/reading --rows 1280000 --classes 1000

Run it with several --rows for growth; each run adds rows of its own to the JSON, and slopes over all of them.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import torch
from measure import RESULTS, alternating, median, ratio, started, write
from trust import make

from kcdcache.store import reader
from kcdcache.store.rows import StoredTargets

CPU, BATCH, VIEWS = torch.device("cpu"), 256, 3
STEP = 120  # batches of one round
PLENTY = 1e15


def kept_rows(count, share):
    return np.sort(np.random.default_rng(1).permutation(count)[: int(share * count)])


def row(what, rows, seconds, reference, value, bar, repetitions):
    return {
        "what": what,
        "rows": rows,
        "median_s": seconds,
        "reference": reference,
        "ratio": value,
        "bar": bar,
        "n": repetitions,
    }


def raw_read(opened, fields=("logits",)):
    """The reference: the same files of one view into one buffer that is used again."""
    names = {array.name for array in opened.plan.arrays_of(fields)}
    files = [opened.path / key for key in opened.files if key.split("/")[0] in names and "/c.0." in key]
    buffer = np.zeros(max(file.stat().st_size for file in files), np.uint8)

    def read():
        for file in files:
            with open(file, "rb", buffering=0) as stream:
                stream.readinto(buffer.data)

    return read


def starting(opened, kept, repetitions, folder):
    """A stage's first view into fresh memory, and a later one into the arrays of the view before the last."""
    with StoredTargets(opened, kept, ("logits",), memory_bytes=PLENTY, folder=folder) as turning:
        turning.prepare(0, None)
        turn = iter(range(1, 10**9))

        def first():
            with StoredTargets(opened, kept, ("logits",), memory_bytes=PLENTY, folder=folder) as targets:
                targets.prepare(0, None)

        def later():
            turning.prepare(next(turn) % 2, None)

        seconds = alternating(repetitions, first=first, later=later, raw=raw_read(opened))
    told = {"first": "start: first view, fresh memory", "later": "start: later view, memory used again"}
    return [
        row(
            f"{what}, 2 threads, checksums on",
            opened.count,
            median(seconds[name]),
            "readinto of the same files, one thread",
            ratio(seconds, name, "raw"),
            "<= 1.75",
            repetitions,
        )
        for name, what in told.items()
    ]


def batches(opened, kept, folder, repetitions):
    """Batches of an epoch's order, in memory and in a memory-mapped file, against np.take on an array in memory."""
    order = np.random.default_rng(2).permutation(kept)
    places, used = np.searchsorted(kept, order), np.empty((BATCH, opened.fields["logits"].row_shape[0]), np.float16)
    starts = np.random.default_rng(3)
    memory = StoredTargets(opened, kept, ("logits",), memory_bytes=PLENTY, folder=folder)
    mapped = StoredTargets(opened, kept, ("logits",), memory_bytes=0, folder=folder)
    with memory, mapped:
        memory.prepare(0, None)
        mapped.prepare(0, None)
        held = memory.rows["logits"]
        planned, planned_mapped = memory.plan(order), mapped.plan(order)

        def limit(part):
            np.take(held, places[part], 0, out=used, mode="clip")

        ways = {
            "limit": limit,
            "memory": planned.take,
            "mapped": planned_mapped.take,
            "any": lambda part: memory.take(order[part]),
            "decoded": lambda part: planned.gather(part, 4.0, CPU),
        }
        seconds = alternating(repetitions, **{name: _walk(way, len(order), starts) for name, way in ways.items()})
        grown = _allocated(planned.take, len(order))
        beside = _beside_training(planned.take, len(order))
    told = {
        "memory": ("batch of 256 in memory", ">= 0.95"),
        "mapped": ("batch of 256 above the memory budget (memory-mapped)", ">= 0.85"),
        "any": ("batch of 256 of any samples, not planned for the epoch", None),
        "decoded": ("batch of 256 in memory, decoded to float32", None),
    }
    found = [
        row(
            what,
            opened.count,
            median(seconds[name]) / STEP,
            "np.take on an array in memory",
            1 / ratio(seconds, name, "limit"),
            bar,
            repetitions,
        )
        for name, (what, bar) in told.items()
    ]
    reference = median(seconds["limit"]) / STEP
    found.append(row("np.take on an array in memory", opened.count, reference, "-", 1.0, None, repetitions))
    found.append(row("batch of 256 beside a training step", opened.count, beside, "-", None, "<= 1e-4 s", STEP))
    found.append(row("bytes allocated and kept or freed a batch (peak)", opened.count, None, "-", grown, "~0", STEP))
    return found


def _walk(way, count, random):
    """Some batches in a row, from a place that changes: the same rows again would lie in the cache."""

    def run():
        first = int(random.integers(0, max(1, count // BATCH - STEP)))
        for number in range(first, first + STEP):
            low = number * BATCH % (count - BATCH)
            way(slice(low, low + BATCH))

    return run


def _allocated(way, count):
    """Peak of bytes that Python and numpy hold beyond what they held before, over some batches after the first."""
    way(slice(0, BATCH))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(STEP):
        low = number * BATCH % (count - BATCH)
        way(slice(low, low + BATCH))
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return peak


def _beside_training(way, count):
    """Median seconds of a batch whose turn comes after a forward and backward pass that empties the caches."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3))
    images, seconds = torch.randn(BATCH, 3, 32, 32).to(memory_format=torch.channels_last), []
    for number in range(STEP):
        network(images).square().mean().backward()
        low = number * BATCH % (count - BATCH)
        began = time.perf_counter()
        way(slice(low, low + BATCH))
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def private_memory(given, turns):
    """Peak private bytes of a fresh process that starts a stage, over the bytes the bar allows without its 200 MB."""
    words = [sys.executable, __file__, "--folder", given.folder, "--rows", given.rows, "--classes", given.classes]
    words += ["--share", given.share, "--probe", turns]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def probe(given):
    """In a process of its own: what preparing views adds to the private memory at its highest, watched all the time."""
    opened = reader.open(given.folder / "store")
    kept = kept_rows(opened.count, given.share)
    with StoredTargets(opened, kept, ("logits",), memory_bytes=PLENTY, folder=given.folder) as targets:
        before = _private()
        _reset_peak()
        for view in range(given.probe):
            targets.prepare(view, view + 1 if view + 1 < given.probe else None)
            if targets._next is not None:
                targets._next[1].result()  # an epoch takes longer than fetching the next view
        print(json.dumps({"added": _peak() - before, "view": targets.view_bytes}))


def _private():
    return psutil.Process().memory_info().rss


def _reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def _peak():
    return 1024 * int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])


def memory_rows(given):
    chunk = 32 * 2**20
    for turns, views in ((1, 1), (VIEWS, 2)):
        found = private_memory(given, turns)
        allowed = views * found["view"] + 2 * chunk + 200e6
        what = f"private memory of a stage's start, {views} view(s) held: {found['added'] / 1e6:.0f} MB"
        yield row(what, given.rows, None, f"{allowed / 1e6:.0f} MB", found["added"] / allowed, "<= 1", 1)


def slopes(rows):
    """What -> slope of its seconds over the number of rows on a log-log plot, where there are several."""
    found = {}
    for what in {line["what"] for line in rows if line["median_s"]}:
        points = {line["rows"]: line["median_s"] for line in rows if line["what"] == what}
        if len(points) > 1:
            found[what] = float(np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0])
    return found


def earlier(rows):
    """Lines of earlier runs with other numbers of rows, for the slopes."""
    file = RESULTS / "reading.json"
    known = json.loads(file.read_text())["rows"] if file.exists() else []
    return [line for line in known if line["rows"] != rows]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_280_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--share", type=float, default=0.7, help="share of the rows that is kept")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--probe", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.probe:
        probe(given)
        return
    try:
        opened = reader.open(make(given.folder / "store", given.rows, given.classes, VIEWS, "float16"))
        kept = kept_rows(opened.count, given.share)
        rows = starting(opened, kept, given.repetitions, given.folder)
        rows += batches(opened, kept, given.folder, 10 * given.repetitions)
        rows += memory_rows(given)
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)
    rows = sorted(earlier(given.rows) + rows, key=lambda line: line["rows"])
    command = started()
    write("reading", command, torch.get_num_threads(), rows, slopes=slopes(rows))
    print(json.dumps(slopes(rows), indent=2))


if __name__ == "__main__":
    main()
