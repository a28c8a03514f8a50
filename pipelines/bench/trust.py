"""What the checks cost: opening a large store, and reading it with checksums against the same code without.

python pipelines/bench/trust.py --folder /tmp/trust --rows 1280000 --classes 1000
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from measure import alternating, median, ratio, started, write

from kcdcache.datasets.spec import DataIdentity
from kcdcache.settings import ViewRule
from kcdcache.store import encoding, log, reader, writer
from kcdcache.store.identity import Knowledge, TeacherIdentity
from kcdcache.store.plan import plan_store


class Unchecked(reader.Store):
    """The same reader with the comparison of checksums left out."""

    def _copy(self, chunk, wanted, target, block):
        row_bytes, count = chunk.array.row_bytes, chunk.array.chunk_rows
        step = len(block) // row_bytes
        places = np.searchsorted(wanted, [*range(0, count, step), count]).tolist()
        with open(self.path / chunk.key, "rb", buffering=0) as stream:
            for start, low, high in zip(range(0, count, step), places, places[1:], strict=False):
                every = high - low == min(step, count - start)
                data = target[low:high].reshape(-1).view(np.uint8) if every else block[: step * row_bytes]
                stream.readinto(data.data)
                if low < high and not every:
                    rows = block[: step * row_bytes].view(target.dtype).reshape(step, *target.shape[1:])
                    np.take(rows, wanted[low:high] - start, axis=0, out=target[low:high], mode="clip")


def make(path, rows, classes, views, text):
    """A sealed store of random peaked logits; every part holds the same numbers, which no reader can tell."""
    plan = plan_store(rows, views, [encoding.parse(text, "logits", (classes,))])
    knowledge = Knowledge(
        teacher=TeacherIdentity(architecture="none", weights="none", transform={}, precision="float32"),
        data=DataIdentity(count=rows, classes=("a", "b"), image_size=(1, 1), digest="none"),
        views=ViewRule(rule="none", padding=0, fill="zero", size=(1, 1), seed=0),
    )
    values = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (plan.part_rows, classes)).astype(np.float32))
    stored, told = plan.encodings["logits"].encode(values, 0), {"logits": encoding.statistics(values)}
    labels, digests = np.zeros(rows, np.int64), np.zeros(rows, np.uint64)
    with writer.create(path, knowledge, plan, labels, digests) as writing:
        for part in writing.pending():
            length = part.stop - part.start
            writing.write_part(part, {name: array[:length] for name, array in stored.items()}, told)
        writing.seal()
    return path


def opening(path, repetitions):
    opened = reader.open(path)
    seconds = alternating(repetitions, open=lambda: reader.open(path))["open"]
    chunks, records = opened.plan.chunk_count, len(opened._records)
    return {
        "what": f"open {opened.count} rows x {opened.views} views ({chunks} chunk files, {records} records)",
        "median_s": median(seconds),
        "ratio": None,
        "reference": "-",
        "n": repetitions,
    }


def reading(path, repetitions, threads, share):
    checked = reader.open(path)
    unchecked = Unchecked(checked.path, checked.knowledge, log.read_commits(path))
    rows = np.sort(np.random.default_rng(1).permutation(checked.count)[: int(share * checked.count)])
    held = {}

    def allocate(shape, dtype):  # fresh memory costs page faults that would hide what the checks cost
        key = (shape, dtype)
        if key not in held:
            held[key] = np.zeros(shape, dtype)
        return held[key]

    seconds = alternating(
        repetitions,
        checked=lambda: checked.load(0, rows, ("logits",), threads, allocate),
        unchecked=lambda: unchecked.load(0, rows, ("logits",), threads, allocate),
    )
    return {
        "what": f"load {share:.0%} of the rows of a view, {threads} threads, checksums on",
        "median_s": median(seconds["checked"]),
        "ratio": ratio(seconds, "checked", "unchecked"),
        "reference": "the same code without checking",
        "n": repetitions,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_280_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--views", type=int, default=40, help="views of the top:4 store that is only opened")
    parser.add_argument("--repetitions", type=int, default=7)
    given = parser.parse_args()
    dense, many = given.folder / "dense", given.folder / "many"
    for path, views, text in ((dense, 1, "float16"), (many, given.views, "top:4")):
        if not path.exists():
            make(path, given.rows, given.classes, views, text)
    rows = [opening(dense, given.repetitions), opening(many, given.repetitions)]
    rows += [reading(dense, given.repetitions, threads, share) for threads in (1, 2) for share in (0.7, 1.0)]
    write("trust", started(), torch.get_num_threads(), rows)
    shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
