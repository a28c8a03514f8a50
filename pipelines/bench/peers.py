"""Random batches of 256 rows out of what others use to store them, as rows per second of np.take in memory.

python pipelines/bench/peers.py --folder /tmp/peers

All peers from PyPI (none is a dependency; one that is missing is named as skipped):
pip install tensorstore h5py lmdb pyarrow safetensors matplotlib
"""

import argparse
import functools
import importlib
import itertools
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.dataset
import pyarrow.parquet
import torch
import zarr
from measure import RESULTS, alternating, median, started, write
from trust import make

from kcdcache.store import reader
from kcdcache.store.rows import StoredTargets

BATCH, CPU = 256, torch.device("cpu")


def keys(index):
    return [int(number).to_bytes(8, "big") for number in index]


class Ours:
    """Batches as `iterate` reads them: those of an epoch are planned at once, before the first."""

    def __init__(self, folder, values, memory_bytes):
        rows = reader.open(folder / "store")
        every = np.arange(rows.count)
        self.targets = StoredTargets(rows, every, ("logits",), memory_bytes=memory_bytes, folder=folder)
        self.targets.prepare(0, None)

    def __call__(self, index):
        return self.targets.take(index)["logits"]

    def planned(self, batches):
        epoch = self.targets.plan(np.concatenate(batches))
        parts = [slice(number * BATCH, (number + 1) * BATCH) for number in range(len(batches))]
        return [functools.partial(epoch.take, part) for part in parts]


def numpy_memmap(folder, values):
    np.save(folder / "rows.npy", values)
    mapped = np.load(folder / "rows.npy", mmap_mode="r")
    out = np.empty((BATCH, values.shape[1]), values.dtype)
    return lambda index: np.take(mapped, index, 0, out=out, mode="clip")


def zarr_oindex(folder, values):
    array = zarr.open_array(folder / "store" / "logits", mode="r")
    return lambda index: array.oindex[0, np.sort(index)]


def tensorstore_read(folder, values):
    tensorstore = importlib.import_module("tensorstore")
    place = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / "store" / "logits")}}
    pool = tensorstore.Context({"cache_pool": {"total_bytes_limit": 4 * values.nbytes}})
    opened = tensorstore.open(place, context=pool, read=True).result()
    return lambda index: opened[0][index].read().result()


def h5py_fancy(folder, values):
    h5py = importlib.import_module("h5py")
    with h5py.File(folder / "rows.h5", "w") as file:
        file.create_dataset("logits", data=values)
    rows = h5py.File(folder / "rows.h5", "r")["logits"]
    return lambda index: rows[np.sort(index)]


def lmdb_get(folder, values):
    lmdb = importlib.import_module("lmdb")
    where = lmdb.open(str(folder / "lmdb"), map_size=4 * values.nbytes + 2**24, sync=False)
    with where.begin(write=True) as writing:
        writing.cursor().putmulti(zip(keys(np.arange(len(values))), values, strict=True), append=True)
    reading = where.begin(buffers=True)
    return lambda index: np.stack([np.frombuffer(reading.get(key), values.dtype) for key in keys(index)])


def as_table(values):
    bytes_a_row = values.dtype.itemsize * values.shape[1]
    column = pyarrow.FixedSizeBinaryArray.from_buffers(
        pyarrow.binary(bytes_a_row), len(values), [None, pyarrow.py_buffer(values)]
    )
    return pyarrow.table({"logits": column})


def parquet_take(folder, values):
    pyarrow.parquet.write_table(as_table(values), folder / "rows.parquet", row_group_size=4096, compression="none")
    rows = pyarrow.dataset.dataset(folder / "rows.parquet")
    return lambda index: rows.take(pyarrow.array(index))


def arrow_take(folder, values):
    with pyarrow.OSFile(str(folder / "rows.arrow"), "wb") as sink:
        table = as_table(values)
        with pyarrow.ipc.new_file(sink, table.schema) as writing:
            writing.write_table(table)
    rows = pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / "rows.arrow"))).read_all()["logits"].chunk(0)
    return lambda index: rows.take(pyarrow.array(index))


def file_a_sample(folder, values):
    (folder / "files").mkdir()
    count = min(len(values), 8192)  # a part of the rows suffices: a file costs the same however many there are
    for number in range(count):
        torch.save(torch.from_numpy(values[number]), folder / "files" / f"{number}.pt")
    return lambda index: torch.stack([torch.load(folder / "files" / f"{number % count}.pt") for number in index])


def safetensors_slices(folder, values):
    numpy_files = importlib.import_module("safetensors.numpy")
    numpy_files.save_file({"logits": values}, folder / "rows.safetensors")
    opened = importlib.import_module("safetensors").safe_open(folder / "rows.safetensors", framework="np")
    rows = opened.get_slice("logits")
    return lambda index: np.stack([rows[int(number)] for number in index])


PEERS = {
    "kcdcache, in memory": (functools.partial(Ours, memory_bytes=1e15), "kcdcache", 200),
    "kcdcache, above the memory budget": (functools.partial(Ours, memory_bytes=0), "kcdcache", 200),
    "numpy.memmap, np.take": (numpy_memmap, "numpy", 200),
    "Arrow IPC, memory-mapped, take": (arrow_take, "pyarrow", 200),
    "LMDB": (lmdb_get, "lmdb", 20),
    "safetensors, slices": (safetensors_slices, "safetensors", 20),
    "tensorstore, zarr3, chunks cached": (tensorstore_read, "tensorstore", 5),
    "h5py, fancy index": (h5py_fancy, "h5py", 5),
    "one torch.save file a sample": (file_a_sample, "torch", 2),
    "parquet, dataset.take": (parquet_take, "pyarrow", 1),
    "zarr oindex": (zarr_oindex, "zarr", 1),
}
"""name -> (what opens it, its package, batches of one round: as many as take long enough to be measured)"""


def opened(name, folder, values):
    """The function that reads a batch, or None where the peer is not installed; the first batch is compared."""
    opening, package, _ = PEERS[name]
    try:
        importlib.import_module(package)
    except ImportError:
        return None
    read = opening(folder, values)
    index = np.random.default_rng(5).choice(min(len(values), 8192), BATCH, replace=False)
    found, told = read(np.sort(index)), values[np.sort(index)]
    if isinstance(found, pyarrow.Table | pyarrow.Array | pyarrow.ChunkedArray):
        column = found["logits"].combine_chunks() if isinstance(found, pyarrow.Table) else found
        found = np.stack([np.frombuffer(row, values.dtype) for row in column.to_pylist()])
    if not np.array_equal(np.asarray(found).view(np.uint16), told.view(np.uint16)):
        raise ValueError(f"{name} returned other rows")
    return read


def several(reads, turn, length):
    def run():
        for number in itertools.islice(turn, length):
            reads[number]()

    return run


def measure(name, read, values, repetitions):
    """Rows per second, and the median over rounds of its share of np.take's."""
    random, batches_a_round = np.random.default_rng(6), PEERS[name][2]
    batches = [random.choice(len(values), BATCH, replace=False) for _ in range(1000)]
    out = np.empty((BATCH, values.shape[1]), values.dtype)
    reads = read.planned(batches) if isinstance(read, Ours) else [functools.partial(read, b) for b in batches]
    limits = [functools.partial(np.take, values, index, 0, out=out, mode="clip") for index in batches]
    turn, other = (itertools.cycle(random.permutation(len(batches)).tolist()) for _ in range(2))
    seconds = alternating(repetitions, peer=several(reads, turn, batches_a_round), limit=several(limits, other, 200))
    share = [
        (limit / 200) / (peer / batches_a_round) for peer, limit in zip(seconds["peer"], seconds["limit"], strict=True)
    ]
    return {
        "peer": name,
        "version": version(PEERS[name][1]),
        "rows_a_second": BATCH * batches_a_round / median(seconds["peer"]),
        "share_of_np_take": median(share),
        "n": repetitions,
    }


def skipped(name):
    return {"peer": name, "version": "skipped", "rows_a_second": None, "share_of_np_take": None, "n": 0}


def plot(rows, path):
    pyplot = importlib.import_module("matplotlib.pyplot")
    rows = sorted((line for line in rows if line["share_of_np_take"]), key=lambda line: line["share_of_np_take"])
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(rows) + 1))
    colours = ["tab:orange" if line["peer"].startswith("kcdcache") else "tab:blue" for line in rows]
    bars = axes.barh([line["peer"] for line in rows], [line["share_of_np_take"] for line in rows], color=colours)
    axes.bar_label(bars, [f"{line['share_of_np_take']:.2g}" for line in rows], padding=3)
    axes.set(xscale="log", xlabel="rows per second, as a share of np.take on an array in memory", xlim=(None, 3))
    figure.savefig(path, bbox_inches="tight", dpi=150)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=262_144)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--repetitions", type=int, default=7)
    given = parser.parse_args()
    try:
        path = make(given.folder / "store", given.rows, given.classes, 1, "float16")
        values = reader.open(path).load(0, np.arange(given.rows), ("logits",))["logits"]
        rows = []
        for name in PEERS:
            read = opened(name, given.folder, values)
            if read is None:
                rows.append(skipped(name))
            else:
                rows.append(measure(name, read, values, given.repetitions))
            print(rows[-1], file=sys.stderr)
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)
    command = started()
    write("peers", command, torch.get_num_threads(), rows)
    plot(rows, RESULTS / "peers.png")


if __name__ == "__main__":
    main()
