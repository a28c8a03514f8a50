"""What the records of a store cost as parts become many: writing one, sealing all, opening; bytes and files.

python pipelines/bench/ledger.py --folder /tmp/ledger --parts 1000 10000 100000

Chunk files are holes of the right size, so that only the records and the listing are measured.
"""

import argparse
import resource
import shutil
import time
from pathlib import Path

import numpy as np
from measure import median, started, write

from kcdcache.datasets.spec import DataIdentity
from kcdcache.errors import KcdcacheError
from kcdcache.settings import ViewRule
from kcdcache.store import encoding, log, reader, writer
from kcdcache.store.identity import Knowledge, TeacherIdentity
from kcdcache.store.log import FileRecord, LogEntry
from kcdcache.store.plan import MOST_PART_ROWS, part_chunks, plan_store

PARTS_A_VIEW = 25
CLASSES = 10
COUNT = PARTS_A_VIEW * MOST_PART_ROWS
KNOWLEDGE = Knowledge(
    teacher=TeacherIdentity(architecture="bench", weights="0" * 64, transform={}, precision="float32"),
    data=DataIdentity(count=COUNT, classes=tuple(map(str, range(CLASSES))), image_size=(32, 32), digest="0" * 64),
    views=ViewRule(rule="crop-flip", padding=4, fill="zero", size=(32, 32), seed=0),
)


def filled(root, plan):
    """Make a store of holes with all its records; return the seconds of each record."""
    seconds = []
    labels, digests = np.zeros(COUNT, np.int64), np.zeros(COUNT, np.uint64)
    with writer.create(root, KNOWLEDGE, plan, labels, digests) as made:
        for part in made.parts:
            files = []
            for chunk in part_chunks(plan, part):
                size = chunk.array.file_bytes
                with open(root / chunk.key, "wb") as stream:
                    stream.truncate(size)
                files.append(FileRecord(chunk.key, size, "0" * 64, 0))
            began = time.perf_counter()
            log.write_record(root, LogEntry(growth=0, view=part.view, part=part.number, files=tuple(files)))
            seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        made.seal()
        return seconds, time.perf_counter() - began


def measured(folder, parts):
    root = folder / f"parts{parts}"
    shutil.rmtree(root, ignore_errors=True)
    plan = plan_store(COUNT, parts // PARTS_A_VIEW, [encoding.parse("float16", "logits", (CLASSES,))])
    row = {"parts": parts, "chunk_files": plan.chunk_count, "points": plan.count * plan.views}
    try:
        seconds, seal = filled(root, plan)
        row |= {"record_ms": 1000 * median(seconds), "seal_s": seal}
        row["commit_bytes"] = log.commit_path(root, 0).stat().st_size
        row["record_bytes"] = median([path.stat().st_size for path in (root / "_kcd/log/0").glob("v*.json")])
        began = time.perf_counter()
        reader.open(root)
        row["open_s"] = time.perf_counter() - began
    except KcdcacheError as error:
        row["refused"] = str(error)[:300]
    row["peak_memory_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shutil.rmtree(root)
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--parts", type=int, nargs="*", default=[1000, 10000, 100000])
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for parts in given.parts:
        rows.append(measured(given.folder, parts))
        print(rows[-1], flush=True)
        write(
            "ledger",
            started(),
            1,
            rows,
            note="one run each; chunk files are holes; peak memory is the process's so far",
        )


if __name__ == "__main__":
    main()
