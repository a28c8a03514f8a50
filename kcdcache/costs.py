"""What a store will cost, before anything is written: bytes, room on the disk, teacher hours at a rate measured now."""

import logging
import shutil
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from kcdcache import layout, rates, writer
from kcdcache.identity import Knowledge
from kcdcache.jobs import Job
from kcdcache.layout import Part, StorePlan
from kcdcache.prefetch import Rows

logger = logging.getLogger(__name__)

BATCHES = 8
"""teacher batches that are timed, at most"""
BEFORE = 2
"""teacher batches before those: what is made ahead would make the first look fast, what is set up once, slow"""
MOST_SECONDS = 20.0
"""time after which no further batch is timed"""


def sizes(path: Path, plan: StorePlan) -> dict[str, Any]:
    """Return what a store will hold, as JSON values.

    `bytes` are those of all its chunk files, exact for a store without compression and the most for one with; records
    beside them take about a kilobyte a part. `free_bytes` is the room where it will lie.
    """
    per_field = layout.file_bytes(plan)
    return {
        "points": plan.count * plan.views,
        "bytes": sum(per_field.values()),
        "bytes_per_field": per_field,
        "free_bytes": _free(path),
    }


def expected(path: Path, knowledge: Knowledge, plan: StorePlan, job: Job) -> dict[str, Any]:
    """Return what is still to do, in all and for the job's shard, with the hours it takes at a rate measured now.

    Runs the teacher on a few batches and writes nothing.

    Raises:
        MismatchError: another store is at the place.
    """
    shard = job.place.shard
    everything = writer.missing(path, knowledge, plan)
    mine = everything if shard.total == 1 else writer.missing(path, knowledge, plan, shard)
    rate = measured(job, plan, mine)
    found = {"images_per_second": rates.document(rate), "to_do": _to_do(plan, everything, rate)}
    if shard.total > 1:
        found[f"shard {shard}"] = _to_do(plan, mine, rate)
    missing, free = found["to_do"]["bytes"], _free(path)  # type: ignore[index]
    if missing > free:
        logger.warning("precompute: %s bytes are still to be written, but %s are free", f"{missing:,}", f"{free:,}")
    return found


def measured(job: Job, plan: StorePlan, parts: Sequence[Part]) -> rates.Rate | None:
    """Return the images per second of the first few teacher batches of some parts, decoding included; None of none."""
    every = ((part.view, *batch) for part in parts for batch in plan.batches(part))
    rows: list[Rows] = list(islice(every, BEFORE + BATCHES))
    before = min(BEFORE, max(0, len(rows) - 1))
    found: list[float] = []
    with job.announced(rows):
        for number, (view, start, stop) in enumerate(rows):
            began = time.perf_counter()
            values = job.outputs(view, start, stop)
            float(next(iter(values.values())).reshape(-1)[0])  # on a GPU the batch may only have been asked for
            if number >= before:
                found.append((stop - start) / (time.perf_counter() - began))
            if sum(1 / rate for rate in found) * plan.batch_size > MOST_SECONDS and len(found) > 1:
                break
    return rates.rate_of(found)


def _to_do(plan: StorePlan, parts: Sequence[Part], rate: rates.Rate | None) -> dict[str, Any]:
    points = sum(part.stop - part.start for part in parts)
    hours = None if rate is None else points / rate.mean / 3600
    spread = None if rate is None or rate.std is None or hours is None else hours * rate.std / rate.mean
    return {
        "parts": len(parts),
        "teacher_forwards": points,
        "bytes": sum(
            layout.chunk_file_bytes(chunk.array) for part in parts for chunk in layout.part_chunks(plan, part)
        ),
        "teacher_hours": None if hours is None else float(f"{hours:.3g}"),
        "teacher_hours_std": None if spread is None else float(f"{spread:.2g}"),
    }


def _free(path: Path) -> int:
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(place).free
