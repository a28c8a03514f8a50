"""Ways to damage a file, and everything that can be read from what kcdcache wrote, as values to compare."""

import os
import re
from dataclasses import astuple

import numpy as np
import pytest

from kcdcache.condensation import manifest, value_files
from kcdcache.files import run_files
from kcdcache.networks.weights import load_network
from kcdcache.runs import state
from kcdcache.runs.folder import RunFolder
from kcdcache.store import reader
from kcdcache.store.plan import all_chunks

PAGE = 4096
TENTH = (0.1, pytest.param(1.0, marks=pytest.mark.slow))
"""shares of all the damage that is done: a tenth by default, the rest under `slow`"""
KINDS = (
    r"(\w+)/c\.[\d.]+",
    r"\w+/zarr.json",
    r"_kcd/log/\d+/v.*json",
    r"_kcd/(plan|commit)\.\d+\.json",
    r"stages/\d+/(manifest|values).parquet",
)


def flip(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def zeroed(data, place):
    start = place // PAGE * PAGE
    return data[:start] + bytes(len(data[start : start + PAGE])) + data[start + PAGE :]


DAMAGE = {
    "deleted": lambda data, place: None,
    "emptied": lambda data, place: b"",
    "cut in half": lambda data, place: data[: len(data) // 2],
    "one byte short": lambda data, place: data[:-1],
    "extended": lambda data, place: data + b"\0\0",
    "zeroed page": zeroed,
    "flipped": lambda data, place: flip(data, 8 * place + place % 8),
}
"""name -> function of a file's bytes and a place in them that returns what is left, None for no file"""


def put(path, data):
    """Make a file hold some bytes, or be absent."""
    if data is None:
        path.unlink(missing_ok=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def endless(path, what):
    """Put in the place of a file what never ends or never comes: a pipe, a device, a sparse file of a terabyte."""
    path.unlink(missing_ok=True)
    if what == "fifo":
        os.mkfifo(path)
    elif what == "sparse":
        path.touch()
        os.truncate(path, 2**40)
    else:
        path.symlink_to(what)


def files_of(root):
    return sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file())


def kind_of(name):
    """What files have in common that could be mistaken for each other: chunks of one array, plans, manifests, ..."""
    found = next((match for pattern in KINDS if (match := re.fullmatch(pattern, name))), None)
    return (found.re.pattern, *found.groups()) if found else (name,)


def sibling(root, name):
    """Another file of the same kind, to swap with, or None."""
    alike = [other for other in files_of(root) if kind_of(other) == kind_of(name)]
    other = alike[(alike.index(name) + 1) % len(alike)]
    return None if other == name else other


def swap(root, one, other):
    first, second = (root / one).read_bytes(), (root / other).read_bytes()
    (root / one).write_bytes(second)
    (root / other).write_bytes(first)


def place_of(plan, name):
    """How an error about a file of a store names it: a chunk with its samples and view, others by their path."""
    return next((str(chunk) for chunk in all_chunks(plan) if chunk.key == name), name)


def bits(array):
    return str(array.dtype), array.shape, array.tobytes()


def read_store(root):
    """All that a store says: who made it, how, every stored row, every decoded value, labels, digests, counts."""
    opened = reader.open(root)
    rows = np.setdiff1d(np.arange(opened.count), opened.skipped)
    stored = {}
    for view in range(opened.views):
        for name, array in opened.load(view, rows, list(opened.fields)).items():
            stored[name, view] = bits(array)
        for field in opened.fields:
            stored["decoded", field, view] = bits(opened.read(field, view, rows))
    logged = [
        (record.name, record.statistics, record.measurements, [astuple(file) for file in record.files])
        for record in opened._records
    ]
    return {
        "knowledge": opened.knowledge.document(),
        "ids": (opened.knowledge_id, opened.plan.layout_id, opened.commits),
        "plan": opened.plan.document(),
        "labels": bits(opened.labels),
        "digests": bits(opened.sample_digest),
        "skipped": opened.skipped.tolist(),
        "measured": [opened.measurements(view) for view in range(opened.views)],
        "forwards": opened.forwards,
        "logged": logged,
        "rows": stored,
    }


def read_manifest(path):
    found = manifest.read(path)
    return {"document": found.document(), "digest": found.digest} | {
        name: bits(column) for name, column in found.columns().items()
    }


def read_values(path, count):
    found = value_files.read(path, count)
    labels = None if found.labels is None else bits(found.labels)
    return bits(found.values.visits), bits(found.values.value), labels, found.document, found.document is None


def read_checkpoint(path):
    found = state.load_checkpoint(RunFolder(path=path))
    return found and ({name: bits(tensor.numpy()) for name, tensor in found[0].items()}, found[1].document())


def read_run(path, names):
    """All that later commands take from a run's files: record, checkpoint, manifests, values, networks, summary."""
    folder = RunFolder(path=path)
    sets = {name: read_manifest(path / name) for name in names if name.endswith("manifest.parquet")}
    count = next(iter(sets.values()))["document"]["count"]
    network, weights = load_network(path, "student")
    files = run_files.read(path)
    return {
        "record": state.read_record(folder).document(),
        "files": ({name: [*vars(entry).values()] for name, entry in files.files.items()}, sorted(files.pending)),
        "checkpoint": read_checkpoint(path),
        "manifests": sets,
        "values": {name: read_values(path / name, count) for name in names if name.endswith("values.parquet")},
        "network": (network.document(), {name: bits(tensor.numpy()) for name, tensor in weights.items()}),
        "summary": state.read_summary(path).document() if "summary.json" in names else None,
    }
