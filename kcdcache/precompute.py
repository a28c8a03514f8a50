"""Data + teacher -> store, part by part, resumable; also imports logits made elsewhere."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kcdcache import encoding, layout, ledger, runs, signals, store, teacher, views, writer
from kcdcache.config import PrecomputeSettings
from kcdcache.data import Dataset
from kcdcache.errors import MismatchError, NotFoundError, SettingsError
from kcdcache.files import read_json, readable_json, sha256_file, write_atomic
from kcdcache.identity import Knowledge, TeacherIdentity
from kcdcache.layout import Part, StorePlan
from kcdcache.loop import Progress, silent

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")

Outputs = Callable[[int, int, int], dict[str, Tensor]]
"""(view, first row, last row + 1) -> field -> float32 outputs of those rows"""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where outputs are computed: it decides their last bits, so a store is finished where it was begun."""

    device: torch.device = CPU
    threads: int | None = None
    """CPU threads asked for; those the store was begun with if None"""
    allow_change: bool = False
    """continue although device, threads or versions changed; recorded"""


ANYWHERE = Place(allow_change=True)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What fills a store: rows, what they should be, and who says it is plausible."""

    outputs: Outputs
    labels: np.ndarray
    digests: np.ndarray
    least_accuracy: float
    """accuracy on a view below which the outputs cannot be right; 0 where none is demanded"""
    place: Place
    """where the outputs are computed"""


def run(
    settings: PrecomputeSettings,
    data: Dataset,
    network: teacher.Teacher,
    path: Path,
    progress: Progress = silent,
    *,
    threads: int | None = None,
    allow_env_change: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write the teacher's outputs on every view of every sample, or what of them is missing; return what is there.

    On a sealed store of the same knowledge, more views or further fields are added. Teacher batches are a fixed
    partition of each part, and writing overlaps the forward pass; a killed run resumes to the same bytes.

    Raises:
        MismatchError: the store at `path` is of other knowledge, or the teacher is barely better than chance.
        SettingsError: the rule has fewer views than asked for.
        NonFiniteError: the teacher gave NaN or infinity; names the samples.
    """
    rule = views.rule_from(settings, data.train.image_size)
    knowledge = Knowledge(teacher=network.identity, data=data.identity(), views=views.identity_of(rule))
    shapes = teacher.field_shapes(network, rule.height, rule.width, settings.fields, len(data.mean))
    forms = [encoding.parse(_encoding_of(field, settings), field, shapes[field]) for field in settings.fields]
    plan = _plan(settings, len(data.train), views_wanted(rule, settings.views), forms, path)
    if dry_run:
        return _planned(plan, knowledge, path)

    def outputs(view: int, start: int, stop: int) -> dict[str, Tensor]:
        index = np.arange(start, stop)
        # the logits cost nothing more, and tell whether the other fields can be right
        wanted = dict.fromkeys(("logits", *settings.fields))
        return teacher.outputs(network, view_pixels(data, rule, index, view, network.device), list(wanted))

    job = Job(
        outputs=outputs,
        labels=data.train.labels,
        digests=data.train.digests(),
        least_accuracy=least_accuracy(settings.min_accuracy, len(data.classes)),
        place=Place(device=network.device, threads=threads, allow_change=allow_env_change),
    )
    fill(path, knowledge, plan, job, progress)
    return describe(path)


def import_logits(
    settings: PrecomputeSettings,
    data: Dataset,
    file: Path,
    path: Path,
    progress: Progress = silent,
    *,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Make a store of logits computed elsewhere: an .npy file of shape (views, N, C), or (N, C) for one view.

    The caller vouches that view v of the file was made by view v of the rule the settings name.

    Raises:
        MismatchError: the array's shape does not fit the data, or its accuracy is barely better than chance.
    """
    logits = _read_npy(file, len(data.train), len(data.classes))
    rule = views.rule_from(settings, data.train.image_size)
    views_wanted(rule, len(logits))
    source = TeacherIdentity(
        architecture="imported", weights=sha256_file(file), transform={}, precision=str(logits.dtype)
    )
    knowledge = Knowledge(teacher=source, data=data.identity(), views=views.identity_of(rule))
    forms = [encoding.parse(settings.encoding, "logits", (len(data.classes),))]
    plan = _plan(settings, len(data.train), len(logits), forms, path)
    if dry_run:
        return _planned(plan, knowledge, path)
    job = Job(
        outputs=lambda view, a, b: {"logits": torch.from_numpy(np.array(logits[view, a:b], np.float32))},
        labels=data.train.labels,
        digests=data.train.digests(),
        least_accuracy=least_accuracy(settings.min_accuracy, len(data.classes)),
        place=ANYWHERE,
    )
    fill(path, knowledge, plan, job, progress)
    return describe(path)


def describe(path: Path) -> dict[str, Any]:
    """Return what a sealed store holds and what it cost, as JSON values."""
    found = store.open(path)
    measured = [found.measurements(view) for view in range(found.views)]
    return {
        "kind": "store",
        "store": str(path),
        "count": found.count,
        "views": found.views,
        "fields": {name: field.encoding.name for name, field in found.fields.items()},
        "bounds": {name: field.encoding.bound for name, field in found.fields.items()},
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "knowledge_id": found.knowledge_id,
        "layout_id": found.layout_id,
        "teacher_accuracy": [sums["correct"] / found.count for sums in measured if "correct" in sums],
        "teacher_forwards": 0 if found.knowledge.teacher.architecture == "imported" else found.forwards,
        "seconds": runs.logged_seconds(path / ledger.FOLDER / "timing.jsonl"),
    }


def views_wanted(rule: views.ViewRule, asked: int | str) -> int:
    """Return the number of views to cache.

    Raises:
        SettingsError: 'all' of an endless rule, or more views than the rule has.
    """
    wanted = views.cycle(rule, asked)
    if wanted is None:
        raise SettingsError(f"--views all: the rule {rule.name} has no end; give a number of views")
    return wanted


def least_accuracy(asked: float | None, classes: int) -> float:
    """Return the accuracy a teacher must reach: three times chance, but at most half way from chance to perfect.

    >>> least_accuracy(None, 100), least_accuracy(None, 2), least_accuracy(0.5, 100)
    (0.03, 0.75, 0.5)
    """
    return min(3 / classes, (1 + 1 / classes) / 2) if asked is None else asked


def _encoding_of(field: str, settings: PrecomputeSettings) -> str:
    """Vectors take float16 where the logits are cut to their top: only logits have a top."""
    return "float16" if field != "logits" and settings.encoding.startswith("top") else settings.encoding


def _plan(
    settings: PrecomputeSettings, count: int, wanted: int, forms: Sequence[encoding.Encoding], path: Path
) -> StorePlan:
    if ledger.commit_path(path, 0).exists():
        held = store.open(path).plan
        return layout.grow_plan(held, max(held.views, wanted), forms)
    return layout.plan_store(count, wanted, forms, settings.compression, settings.batch_size)


def _planned(plan: StorePlan, knowledge: Knowledge, path: Path) -> dict[str, Any]:
    return {
        "would": "precompute",
        "store": str(path),
        "plan": str(plan),
        "points": plan.count * plan.views,
        "bytes": plan.bytes,
        "knowledge_id": knowledge.knowledge_id,
        "layout_id": plan.layout_id,
    }


def _opened(path: Path, knowledge: Knowledge, plan: StorePlan, job: Job) -> AbstractContextManager[writer.Writer]:
    if not ledger.commit_path(path, 0).exists():
        return writer.create(path, knowledge, plan, job.labels, job.digests)
    return writer.grow(path, knowledge, views=plan.views, fields=list(plan.fields.values()))


def fill(path: Path, knowledge: Knowledge, plan: StorePlan, job: Job, progress: Progress) -> None:
    """Make or continue a store: write all pending parts, one being written while the next is computed, then seal."""
    path.mkdir(parents=True, exist_ok=True)
    with _opened(path, knowledge, plan, job) as open_writer, ThreadPoolExecutor(1) as pool:
        pending = open_writer.pending()
        if not pending:
            logger.info("precompute: %s is complete already", path)
        else:
            _settle(path, job.place)
        rows = sum(part.stop - part.start for part in open_writer.parts)
        done = rows - sum(part.stop - part.start for part in pending)
        if open_writer.sealed:
            logger.info("precompute: %s is finished already", path)
        if done and pending:
            logger.info("precompute: resuming at %d of %d points", done, rows)
        written: Future[None] | None = None
        right: dict[int, tuple[float, int]] = {}
        for part in pending:
            began = time.perf_counter()
            stored, statistics, correct = _compute(part, plan, job)
            if written is not None:
                written.result()
            _check_accuracy(part, correct, right, job.least_accuracy)
            written = pool.submit(open_writer.write_part, part, stored, statistics, {"correct": correct})
            done += part.stop - part.start
            seconds = time.perf_counter() - began
            rate = (part.stop - part.start) / seconds
            _add_timing(path, seconds, part.stop - part.start)
            if signals.requested():
                written.result()
                signals.stop(f"{done:,} of {rows:,} points are in the store")
            progress("precompute", done, rows, f"view {part.view}, {rate:,.0f} points/s")
        if written is not None:
            written.result()
        open_writer.seal()


def _settle(path: Path, place: Place) -> None:
    """Compute where the store was begun: put its thread count in force, refuse another device or other versions.

    Raises:
        MismatchError: the environment changed and that was not allowed.
    """
    file = path / ledger.FOLDER / "environment.json"
    known = read_json(file) if file.exists() else []
    torch.set_num_threads(place.threads or (known[-1]["threads"] if known else torch.get_num_threads()))
    now = runs.environment(place.device, torch.get_num_threads())
    if not known or runs.changed(known[-1], now):
        if known:
            runs.check_environment(known[-1], now, place.allow_change)
        write_atomic(file, readable_json([*known, now]))


def _compute(
    part: Part, plan: StorePlan, job: Job
) -> tuple[dict[str, np.ndarray], dict[str, encoding.Statistics], float]:
    """Return a part's encoded arrays, the statistics of its fields, and how often the teacher was right."""
    pieces: dict[str, list[Tensor]] = {field: [] for field in part.fields}
    correct = 0.0
    for start, stop in plan.batches(part):
        outputs = job.outputs(part.view, start, stop)
        for field in part.fields:
            pieces[field].append(outputs[field])
        if "logits" in outputs:
            labels = torch.from_numpy(job.labels[start:stop]).to(outputs["logits"].device)
            correct += float((outputs["logits"].argmax(1) == labels).sum())
    whole = {field: torch.cat(values) for field, values in pieces.items()}
    stored: dict[str, np.ndarray] = {}
    for field, values in whole.items():
        stored |= plan.fields[field].encode(values, part.start)
    return stored, {field: encoding.statistics(values) for field, values in whole.items()}, correct


def _check_accuracy(part: Part, correct: float, right: dict[int, tuple[float, int]], least: float) -> None:
    """Refuse early: a wrong normalisation or class order shows in the first part."""
    before, seen = right.get(part.view, (0.0, 0))
    before, seen = before + correct, seen + part.stop - part.start
    right[part.view] = before, seen
    if before < least * seen:
        raise MismatchError(
            f"the teacher is right on {before / seen:.2%} of the first {seen} samples of view {part.view}, expected at "
            f"least {least:.2%}: its normalisation, input size or class order does not fit this data; check "
            "--teacher-mean/--teacher-std/--teacher-size, or lower --min-accuracy if the teacher really is that weak"
        )


def view_pixels(data: Dataset, rule: views.ViewRule, index: np.ndarray, view: int, device: torch.device) -> Tensor:
    """Return one view of some training samples as the teacher sees them: pixels in [0, 1], (batch, c, h, w)."""
    return views.show(rule, data.train.images(index), views.parameters(rule, index, view), device)


def _read_npy(file: Path, count: int, classes: int) -> np.ndarray:
    try:
        logits = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise NotFoundError(f"--from-logits: no file at {file}") from None
    except ValueError as error:
        raise SettingsError(f"--from-logits: {file} is not a plain .npy array: {error}") from None
    if logits.ndim == 2:
        logits = logits[None]
    if logits.ndim != 3 or logits.shape[1:] != (count, classes) or logits.dtype.kind != "f":
        raise MismatchError(
            f"{file} holds {logits.dtype} {logits.shape}, expected floats of shape (views, {count}, {classes})"
        )
    return logits


def _add_timing(path: Path, seconds: float, points: int) -> None:
    with open(path / ledger.FOLDER / "timing.jsonl", "a") as stream:
        stream.write(json.dumps({"seconds": round(seconds, 4), "points": points}) + "\n")
