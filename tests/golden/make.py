"""Write tiny files of every format into tests/golden/v0, with what must be read from them.

Run by hand: `python tests/golden/make.py`. Formats are version 0 until every issue that shapes them is closed; until
then a change of a format means: run this again, commit what it wrote, and add a line to CHANGELOG.md. The day the
version becomes 1 the files of v1 are frozen, and every later kcdcache must read them.
"""

# ruff: noqa: E402

import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import numpy as np
import torch
from damaging import files_of, read_manifest, read_run, read_store, read_values
from lessons import CPU, condensed, digits, on_cpu, precomputed
from stores import creating, finish, form, knowledge, make, small_parts, write_part

from kcdcache.condensation import manifest, value_files
from kcdcache.condensation import values as condense_values
from kcdcache.files.atomic import sha256_bytes
from kcdcache.files.records import canonical_json
from kcdcache.networks.weights import load_network
from kcdcache.settings import FitSettings, TrainSettings
from kcdcache.store import reader, writer
from kcdcache.teacher import teacher
from kcdcache.training import distill, fit

FOLDER = HERE / "v0"
ENCODINGS, COMPRESSIONS = ("float16", "float32", "top:3"), ("none", "zstd")
COUNT, TRAIN, TEST = 24, 60, 20
EPOCHS = 6
STUDENT = {"student": "lessons:TinyNet", "epochs": EPOCHS, "stages": 3, "batch_size": 32, "keep": 0.6}
RUNS = {"linear": {}, "requery": {"mix_target": "requery"}}
STORES = [f"stores/{text.replace(':', '')}-{how}" for text in ENCODINGS for how in COMPRESSIONS]
STORES += ["stores/grown", "stores/skipped", "stores/digits"]
MANIFESTS = ["manifests/full.parquet", "manifests/condensed.parquet", "manifests/random.parquet"]
UNFINISHED = "stores/unfinished"
"""holds the first of the parts of stores/float16-none"""


def plan(text="float16", how="none", count=COUNT):
    return small_parts(count, 2, 16, 8, text, how)


def write_stores(root):
    for text in ENCODINGS:
        for how in COMPRESSIONS:
            make(root / f"{text.replace(':', '')}-{how}", plan(text, how))
    make(root / "grown", plan())
    for growth in ({"fields": [form("penultimate")]}, {"views": 3}):
        grow_small(root / "grown", growth)
    with creating(root / "skipped", small_parts(100, 1, 64, 32)) as writing:
        finish(writing, skipped=40)
    with creating(root / "unfinished", plan()) as writing:
        write_part(writing, writing.pending()[0])


def grow_small(path, growth):
    with writer.grow(path, knowledge(COUNT), **growth) as growing:
        finish(growing)


def write_learning(root):
    """A fitted network, a store it made of digits, condensed sets, values, and runs that learned from them."""
    data = digits(TRAIN, TEST)
    fitting = FitSettings(augment="crop", padding=2, epochs=2, batch_size=32)
    fit.run(fitting, data=data, model="lessons:TinyNet", out=root / "fitted", machine=on_cpu(threads=1))
    network = teacher_in(root, data)
    known = precomputed(root / "stores/digits", data, network, views=2, encoding="float16")
    (root / "manifests").mkdir()
    sets = (
        manifest.full(manifest.Samples(known.knowledge_id, known.count, known.labels)),
        condensed(known),
        condensed(known, ranking="random"),
    )
    for name, chosen in zip(MANIFESTS, sets, strict=True):
        manifest.write(root / name, chosen)
    random = np.random.default_rng(0).random(TRAIN, np.float32)
    known_by = {"knowledge_id": known.knowledge_id, "student": "lessons:TinyNet", "epoch": 1}
    measured = condense_values.Values(np.arange(TRAIN, dtype=np.int32), np.where(np.arange(TRAIN) > 0, random, 0))
    value_files.write(root / "values.parquet", measured, known.labels, known_by)
    for name in RUNS:
        train(root, root / "finished" / name, name, until=EPOCHS // 2)
        shutil.copytree(root / "finished" / name, root / "interrupted" / name)
        train(root, root / "finished" / name, name)


def teacher_in(root, data):
    """The fitted network; as it is not one of kcdcache's own, its class is named here and not by its document."""
    return teacher.load(
        "lessons:TinyNet", weights_path=root / "fitted", classes=data.classes, mean=data.mean, std=data.std, size=None,
        device=CPU, precision="float32",
    )  # fmt: skip


def train(root, out, name, **more):
    """Train, or continue, one of the runs; `more` says how; return the summary."""
    data = digits(TRAIN, TEST)
    asked = teacher_in(root, data) if name == "requery" else None
    material = distill.Material(data=data, knowledge=reader.open(root / "stores/digits"), given=None, teacher=asked)
    settings = TrainSettings(**STUDENT, **RUNS[name])
    return distill.run(settings, material, out=out, machine=on_cpu(threads=1, **more))


def requeried(root):
    return sorted(str(path.relative_to(root)) for path in root.glob("finished/*/stages/*/*.requery"))


def read_all(root):
    """What today's code reads: path -> facts that people may compare, and digests of everything."""
    found = {name: told_of_store(root / name) for name in [*STORES, *requeried(root)]}
    found |= {name: told(read_manifest(root / name)) for name in MANIFESTS}
    found["values.parquet"] = told(read_values(root / "values.parquet", TRAIN))
    for folder in ("finished", "interrupted"):
        for name in RUNS:
            path = root / folder / name
            found[f"{folder}/{name}"] = told(read_run(path, files_of(path)))
    network, weights = load_network(root / "fitted")
    tensors = {name: tensor.numpy().tobytes() for name, tensor in weights.items()}
    return found | {"fitted": told({"document": network.document(), "weights": tensors})}


def told_of_store(path):
    opened, said = reader.open(path), read_store(path)
    said["rows"] = {str(key): value for key, value in said["rows"].items() if key[0] != "decoded"}
    first = {field: opened.read(field, 0, np.array([0]))[0].ravel()[:3].tolist() for field in opened.fields}
    return {"samples": opened.count, "views": opened.views, "first_values": first} | told(said)


def told(said):
    """Return the digest of every entry."""
    entries = said if isinstance(said, dict) else dict(enumerate(said))
    return {"sha256": {str(key): sha256_bytes(canonical_json(plain(value))) for key, value in entries.items()}}


def plain(value):
    """Return JSON values: arrays' bytes as their digest, paths relative to the golden folder."""
    if isinstance(value, bytes):
        return sha256_bytes(value)
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def main():
    torch.set_num_threads(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    (FOLDER / "stores").mkdir(parents=True)
    write_stores(FOLDER / "stores")
    write_learning(FOLDER)
    for name in files_of(FOLDER):
        if Path(name).name in (".lock", "lock"):
            (FOLDER / name).unlink()
    text = json.dumps(read_all(FOLDER), indent=1, sort_keys=True)
    (FOLDER / "expected.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
