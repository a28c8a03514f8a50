"""Data + teacher -> store, part by part, resumable; also imports logits made elsewhere."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kcdcache import (
    costs,
    encoding,
    fields,
    layout,
    ledger,
    origin,
    parameters,
    places,
    prefetch,
    rates,
    resident,
    runs,
    signals,
    store,
    surroundings,
    teacher,
    views,
    writer,
)
from kcdcache.config import PrecomputeSettings
from kcdcache.data import Dataset
from kcdcache.errors import MismatchError, NotFoundError, SettingsError
from kcdcache.files import append, canonical_json, read_json, readable_json, sha256_file, write_atomic
from kcdcache.holding import WHOLE, Shard
from kcdcache.identity import Knowledge, TeacherIdentity
from kcdcache.jobs import ANYWHERE, Job, Place, compute
from kcdcache.layout import Part, StorePlan
from kcdcache.loop import Progress, enough_memory, silent

logger = logging.getLogger(__name__)


def run(
    settings: PrecomputeSettings,
    data: Dataset,
    network: teacher.Teacher,
    path: Path,
    progress: Progress = silent,
    *,
    threads: int | None = None,
    allow_env_change: bool = False,
    shard: Shard = WHOLE,
    images: str = "auto",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write the teacher's outputs on every view of every sample, or what of them is missing; return what is there.

    With a `shard`, only its parts are written; whoever finds all parts written seals. On a sealed store of the same
    knowledge, more views or further fields are added. Teacher batches are a fixed partition of each part, and writing
    overlaps the forward pass; a killed run resumes to the same bytes. Views are made on the device from `images` that
    lie there: 'on', 'off', or 'auto' for on a GPU where they fit. `dry_run` writes nothing: it measures the teacher on
    a few batches and returns what all would cost.

    Raises:
        MismatchError: the store at `path` is of other knowledge, or the teacher is barely better than chance.
        SettingsError: the rule has fewer views than asked for, or the store would be larger than the budget.
        NonFiniteError: the teacher gave NaN, infinity or more than the encoding holds; names the samples. With
            on_nonfinite = skip only where more than `ledger.MOST_SKIPPED` of all would be skipped.
    """
    rule = views.rule_from(settings, data.train.image_size)
    knowledge = Knowledge(teacher=network.identity, data=data.identity(), views=views.identity_of(rule))
    asked = parameters.per_sample(settings.fields) or parameters.DEFAULT
    names = fields.expand(asked, lambda: teacher.tap_shapes_of(network, rule.height, rule.width))
    shapes = teacher.field_shapes(network, rule.height, rule.width, names, len(data.mean))
    forms = [encoding.parse(fields.encoding_for(name, settings.encoding), name, shapes[name]) for name in names]
    plan = _plan(settings, len(data.train), views_wanted(rule, settings.views), forms, path)
    _require_budget(plan, settings.budget_gb)
    job = job_for(
        data,
        network,
        knowledge,
        list(plan.fields),  # new views of a grown store have its older fields too
        least_accuracy=least_accuracy(settings.min_accuracy, len(data.classes)),
        place=Place(device=network.device, threads=threads, allow_change=allow_env_change, shard=shard),
        may_skip=settings.on_nonfinite == "skip",
        images=images,
        workers=settings.workers,
    )
    profiles = teacher.filter_profiles(network.module) if parameters.NAME in settings.fields else None
    if network.data not in (None, knowledge.data.digest):
        logger.info("precompute: the teacher learned from other data than these; the store and its runs tell so")
    if dry_run:
        return _planned(plan, knowledge, path) | costs.expected(path, knowledge, plan, job)
    left = fill(path, knowledge, plan, job, progress)
    origin.write(path, origin.Origin(data.corrupted(), network.data))
    if profiles is not None:
        parameters.write(path, profiles, knowledge)
    if left:
        logger.info("precompute: shard %s is written; %d parts are left to the other shards", shard, left)
        return {"kind": "store", "store": str(path), "finished": False, "shard": str(shard), "parts_left": left}
    return describe(path)


def job_for(
    data: Dataset,
    network: teacher.Teacher,
    knowledge: Knowledge,
    names: Sequence[str],
    least_accuracy: float = 0.0,
    place: Place = ANYWHERE,
    may_skip: bool | None = None,
    images: str = "auto",
    workers: int | None = None,
) -> Job:
    """Return the job of a teacher's outputs on the views of a data set's training split.

    `images` is as for `run`; else `workers` threads make views ahead, as for `prefetch.shown`.
    """
    rule = views.rule_of(knowledge.views)
    held = resident.held_views(images, data.train, rule, network.device)
    shown = prefetch.RowsAhead(data.train, rule, network.device, workers)
    # the logits cost nothing more, and tell whether the other fields can be right
    wanted = list(dict.fromkeys(("logits", *names)))

    def outputs(view: int, start: int, stop: int) -> dict[str, Tensor]:
        pixels = shown(view, start, stop) if held is None else held(view, start, stop)
        return teacher.outputs(network, pixels, wanted)

    return Job(
        outputs=outputs,
        labels=data.train.labels,
        truth=data.train.clean_labels,
        digests=data.train.digests(),
        least_accuracy=least_accuracy,
        place=place,
        may_skip=may_skip,
        **({"announced": shown.announced} if held is None else {}),
    )


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
        NonFiniteError: as for `run`; a number beyond float32 counts as infinite.
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
        outputs=lambda view, a, b: {"logits": _as_float32(logits[view, a:b])},
        labels=data.train.labels,
        truth=data.train.clean_labels,
        digests=data.train.digests(),
        least_accuracy=least_accuracy(settings.min_accuracy, len(data.classes)),
        place=ANYWHERE,
        may_skip=settings.on_nonfinite == "skip",
    )
    fill(path, knowledge, plan, job, progress)
    origin.write(path, origin.Origin(data.corrupted(), None))
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
        "skipped": len(found.skipped),
        "teacher_accuracy": [sums["correct"] / found.count for sums in measured if "correct" in sums],
        "teacher_forwards": 0 if found.knowledge.teacher.architecture == "imported" else found.forwards,
        "seconds": runs.logged_seconds(_timing(path)),
        "images_per_second": rates.document(rates.logged(_timing(path))),
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


def _require_budget(plan: StorePlan, budget_gb: float) -> None:
    """Say what a store will take, and refuse what nobody may have meant to write."""
    sizes = {
        name: sum(layout.row_bytes(spec.row_shape, spec.dtype) for spec in form.arrays)
        for name, form in plan.fields.items()
    }
    told = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    logger.info("precompute: %s bytes in all; bytes a sample and view: %s", f"{plan.bytes:,}", told)
    if plan.bytes > budget_gb * 1e9:
        raise SettingsError(
            f"the store would take {plan.bytes / 1e9:,.1f} GB ({plan.count:,} samples, {plan.views} views, bytes a "
            f"sample and view: {told}), more than --budget-gb {budget_gb:g}; keep fewer fields or views, or raise it"
        )


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
        **costs.sizes(path, plan),
        "knowledge_id": knowledge.knowledge_id,
        "layout_id": plan.layout_id,
    }


def _opened(path: Path, knowledge: Knowledge, plan: StorePlan, job: Job) -> AbstractContextManager[writer.Writer]:
    if not ledger.commit_path(path, 0).exists():
        return writer.create(path, knowledge, plan, job.labels, job.digests, job.place.shard)
    forms = list(plan.fields.values())
    return writer.grow(path, knowledge, views=plan.views, fields=forms, shard=job.place.shard)


def fill(path: Path, knowledge: Knowledge, plan: StorePlan, job: Job, progress: Progress) -> int:
    """Make or continue a store: write the shard's pending parts, one while the next is computed, then seal.

    Return the number of parts that other shards have yet to write; 0 if the store is sealed.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (
        _opened(path, knowledge, plan, job) as open_writer,
        ThreadPoolExecutor(1) as pool,
        enough_memory(_remedy(plan, path)),
    ):
        pending = open_writer.pending()
        if not pending:
            logger.info("precompute: %s is complete already", path)
        else:
            _settle(path, job.place)
        rows = sum(part.stop - part.start for part in open_writer.mine)
        done = rows - sum(part.stop - part.start for part in pending)
        if open_writer.sealed:
            logger.info("precompute: %s is finished already", path)
        if done and pending:
            logger.info("precompute: resuming at %d of %d points", done, rows)
        written: Future[None] | None = None
        right: dict[int, tuple[float, int]] = {}
        skipped = ledger.logged_skips(path) if pending else set()
        with job.announced((part.view, *batch) for part in pending for batch in plan.batches(part)):
            for part in pending:
                began = time.perf_counter()
                made = compute(part, plan, job)
                if written is not None:
                    written.result()
                _check_accuracy(part, made.correct, right, job.least_accuracy)
                skipped |= set(made.skipped)
                ledger.require_few_skipped(skipped, plan.count)
                counted = {"correct": made.correct}
                written = pool.submit(open_writer.write_part, part, made.stored, made.statistics, counted, made.skipped)
                done += part.stop - part.start
                _add_timing(path, time.perf_counter() - began, part.stop - part.start)
                if signals.requested():
                    written.result()
                    signals.stop(f"{done:,} of {rows:,} points are in the store")
                progress("precompute", done, rows, f"view {part.view}, {rates.logged(_timing(path))} images/s")
        if written is not None:
            written.result()
        return open_writer.seal_last()


def use_recorded_threads(path: Path) -> None:
    """Put the thread count in force that a store was last computed with, if it is recorded."""
    file = path / ledger.FOLDER / "environment.json"
    if file.exists():
        torch.set_num_threads(read_json(file)[-1]["threads"])


def _remedy(plan: StorePlan, path: Path) -> str:
    return (
        f"lower --batch-size ({plan.batch_size} now); it is part of a store's plan, so if {path} holds points already, "
        "give the smaller one with another --store, or continue here where there is more memory"
    )


def _settle(path: Path, place: Place) -> None:
    """Compute where the store was begun: put its thread count in force, refuse another device or other versions.

    Raises:
        MismatchError: the environment changed and that was not allowed.
    """
    file = path / ledger.FOLDER / "environment.json"
    known = read_json(file) if file.exists() else []
    torch.set_num_threads(place.threads or (known[-1]["threads"] if known else torch.get_num_threads()))
    now = surroundings.environment(place.device, torch.get_num_threads())
    if not known or surroundings.changed(known[-1], now):
        if known:
            surroundings.check_environment(known[-1], now, place.allow_change)
        write_atomic(file, readable_json([*known, now]))


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


def _as_float32(rows: np.ndarray) -> Tensor:
    with np.errstate(over="ignore"):  # an infinity is found and named later
        return torch.from_numpy(np.array(rows, np.float32))


def _read_npy(file: Path, count: int, classes: int) -> np.ndarray:
    places.bring(file)
    try:
        logits: np.ndarray = np.lib.format.open_memmap(file, mode="r")  # not np.load, which takes archives too
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
    row = {"seconds": round(seconds, 4), "points": points}
    append(_timing(path), canonical_json(row) + b"\n")


def _timing(path: Path) -> Path:
    return path / ledger.FOLDER / "timing.jsonl"
