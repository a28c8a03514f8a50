"""Bytes a point of every encoding, on disk and before padding, and what each loses against float32 at T = 1 and 4.

python pipelines/bench/sizes.py --folder /tmp/sizes
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from measure import started, write
from trust import make

from kcdcache.store import encoding, reader

SHAPES = (
    (1_280_000, 1000, "float16"),
    (1_280_000, 1000, "top:16"),
    (50_000, 100, "float16"),
    (50_000, 100, "float32"),
    (50_000, 10, "float16"),
    (1_797, 10, "float16"),
)
TESTED = 20_000


def peaked(rows, classes):
    """Logits as a trained network gives them: a heavy tail, one class far above it for most rows."""
    random = np.random.default_rng(0)
    values = random.normal(0, 1.5, (rows, classes)).astype(np.float32)
    values[np.arange(rows), random.integers(classes, size=rows)] += random.gamma(6, 2.2, rows).astype(np.float32)
    return torch.from_numpy(values + random.normal(0, 4, (rows, 1)).astype(np.float32))


def divergence(values, form, temperature):
    """KL in float64 of the softened stored rows to the softened float32 ones: mean and maximum."""
    found = []
    for part in values.split(2000):
        stored = {name: torch.from_numpy(rows) for name, rows in form.encode(part).items()}
        mine = (form.decode(stored, temperature).double() / temperature).log_softmax(1)
        theirs = (part.double() / temperature).log_softmax(1)
        found.append((theirs.exp() * (theirs - mine)).sum(1))
    every = torch.cat(found)
    return float(every.mean()), float(every.max())


def losses(text, classes, rows):
    values = peaked(rows, classes)
    form = encoding.parse(text, "logits", (classes,))
    found = {f"kl_T{t}": divergence(values, form, float(t)) for t in (1, 4)}
    named = {
        f"{key}_{what}": value[place] for key, value in found.items() for place, what in enumerate(("mean", "max"))
    }
    return named | {"mean_max_probability": float(values.softmax(1).amax(1).mean())}


def limit(text, classes):
    """Bytes a point the bar allows, before padding."""
    if text == "float16":
        return 2 * classes + 4
    return 70 if text == "top:16" else None


def measured(folder, count, classes, text, tested):
    opened = reader.open(make(folder / "store", count, classes, 1, text))
    arrays = opened.plan.arrays_of(("logits",))
    places = [folder / "store" / array.name for array in arrays]
    disk = sum(file.stat().st_size for place in places for file in place.glob("c.*"))
    everything = sum(file.stat().st_size for file in (folder / "store").rglob("*") if file.is_file())
    rows = opened.row_bytes(("logits",))
    shutil.rmtree(folder / "store")
    return {
        "what": f"{count} x {classes} {text}",
        "bytes_a_point": rows,
        "bar": limit(text, classes),
        "of_raw_float16": rows / (2 * classes),
        "padding": disk / (rows * count) - 1,
        "padding_bar": 0.02,
        "all_files_a_point": everything / count,
        **losses(text, classes, tested),
        "bound": opened.fields["logits"].bound,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tested", type=int, default=TESTED, help="rows whose KL is measured")
    given = parser.parse_args()
    try:
        rows = [measured(given.folder, *shape, given.tested) for shape in SHAPES]
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)
    bounds = {line["what"]: line.pop("bound") for line in rows}
    command = started()
    write("sizes", command, torch.get_num_threads(), rows, bounds=bounds)


if __name__ == "__main__":
    main()
