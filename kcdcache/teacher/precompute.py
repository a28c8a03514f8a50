"""Fill a store with a teacher's outputs: plan it, compute part by part, write, seal."""

import logging
import mmap
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kcdcache import environment, interrupt
from kcdcache.datasets.datasets import Dataset
from kcdcache.errors import MismatchError, NonFiniteError, NotFoundError, SettingsError
from kcdcache.files import cloud
from kcdcache.files.atomic import append, sha256_file, write_atomic
from kcdcache.files.records import Rate, canonical_json, logged, logged_seconds, rate_of, read_json, readable_json
from kcdcache.networks.input_transform import enough_memory
from kcdcache.progress import Progress, silent
from kcdcache.settings import PrecomputeSettings
from kcdcache.store import encoding, identity, log, plan, reader, writer
from kcdcache.store.identity import Knowledge, TeacherIdentity
from kcdcache.store.plan import Part, StorePlan, file_bytes, part_chunks
from kcdcache.store.writer import WHOLE, Shard, Writer
from kcdcache.teacher import fields, teacher
from kcdcache.views import prefetch, rules
from kcdcache.views.prefetch import Rows

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
ENVIRONMENT, TIMING = log.FOLDER / "environment.json", log.FOLDER / "timing.jsonl"
"""files of a store: the environments it was computed in, and the time each part took"""
UNTIMED_BATCHES, TIMED_BATCHES, MOST_SECONDS = 2, 8, 20.0
"""of a dry run: first teacher batches, which prefetching and setup distort, those it times, and its time limit"""

STEADY_ROWS, FEW_ROWS = 32, 2
"""samples on which a teacher is compared with itself, and those that it sees again in a batch of their own"""
STEADY, STEADY_ALONE = 1e-3, 0.05
"""largest change of its logits, as a share of their range: in the same batch, and in a smaller one (other rounding)"""
MOST_PROBABLE = 0.99
"""share of a part's rows that are probabilities above which none of them are taken for logits"""
FEWEST_CLASSES = 3
"""classes from which outputs that all lie in [0, 1] are warned of"""
SIGMOID = (
    "precompute: all the teacher's outputs on samples 0 to %d in view 0 lie in [0, 1], as a sigmoid's do and logits "
    "hardly ever; a softmax of them is almost uniform, and students learn little from it. If the teacher ends in a "
    "sigmoid, let it return what goes into it, or give log(p / (1 - p)) of its outputs p to --from-logits"
)

Outputs = Callable[[int, int, int], dict[str, Tensor]]
"""(view, first row, last row + 1) -> field -> float32 outputs of those rows"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """How to fill a store: the source of its rows, what they should be, and where they are computed.

    The device decides the outputs' last bits, so a store is finished where it was begun.
    """

    outputs: Outputs
    labels: np.ndarray
    digests: np.ndarray
    announced: Callable[[Iterable[Rows]], AbstractContextManager[None]] = lambda rows: nullcontext()
    """receives the rows that will be asked for, in order; within its context they may be prepared ahead"""
    least_accuracy: float = 0.0
    """accuracy on a view below which the outputs cannot be right; 0 for no check"""
    truth: np.ndarray | None = None
    """labels for the accuracy, if `labels` are partly wrong"""
    if_probabilities: str | None = None
    """what to do if the outputs are probabilities instead of logits; None if they are not checked"""
    may_skip: bool | None = None
    """whether samples with outputs that cannot be stored are skipped; None if the user has no such choice"""
    device: torch.device = CPU
    threads: int | None = None
    """CPU threads; None for those the store was begun with"""
    allow_change: bool = True
    """continue although device, threads or versions changed; the change is recorded"""
    shard: Shard = WHOLE


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
    """Write the missing teacher outputs on every view of every sample; return the store's summary.

    Only the parts of `shard` are written; the process that finds all parts written seals. A sealed store of the same
    knowledge grows by further views or fields. Teacher batches are a fixed partition of each part, so a killed run
    resumes to the same bytes. With `images` 'on', images are on the device and views are made there; 'auto' does so on
    a GPU where they fit. `dry_run` writes nothing: it times a few batches and returns the expected cost.

    Raises MismatchError if the store is of other knowledge or the teacher is barely better than chance, SettingsError
    if the rule has fewer views than asked for or the store would exceed the budget, NonFiniteError if an output cannot
    be stored (with on_nonfinite = skip: more than `log.MOST_SKIPPED`). MismatchError too if the teacher gives
    probabilities instead of logits, or outputs that change from pass to pass or with the batch.
    """
    rule = rules.rule_from(settings, data.train.image_size)
    knowledge = Knowledge(teacher=network.identity, data=data.identity(), views=rule)
    forms = _encodings(settings, network, (len(data.mean), *rule.size))
    plan = _plan(settings, len(data.train), _views_wanted(rule, settings.views), forms, path)
    _require_budget(plan, settings.budget_gb)
    # new views of a grown store have its older fields too
    job = replace(
        job_for(data, network, knowledge, list(plan.encodings), images=images, workers=settings.workers),
        least_accuracy=_least_accuracy(settings.min_accuracy, len(data.classes)),
        if_probabilities=(
            f"let {network.identity.architecture} return what goes into its softmax, or give --from-probabilities, "
            "which takes their logarithm"
        ),
        may_skip=settings.on_nonfinite == "skip",
        threads=threads,
        allow_change=allow_env_change,
        shard=shard,
    )
    profiles = teacher.filter_profiles(network.module) if identity.PARAMETERS in settings.fields else None
    if network.data not in (None, knowledge.data.digest):
        logger.info("precompute: the teacher was trained on other data; the store and its runs record it")
    if dry_run:
        return _described_plan(plan, knowledge, path) | expected_cost(path, knowledge, plan, job)

    def describe_source() -> None:
        write_origin(path, data, network.data)
        if profiles is not None:
            identity.write_parameters(path, profiles, knowledge)

    if left := fill(path, knowledge, plan, job, progress, describe_source):
        logger.info("precompute: shard %s is written; %d parts are left for the other shards", shard, left)
        return {"kind": "store", "store": str(path), "finished": False, "shard": str(shard), "parts_left": left}
    return describe(path)


def write_origin(path: Path, data: Dataset, teacher_data: str | None) -> None:
    """Write a store's origin: what was done to the data's labels, and what the teacher learned from."""
    identity.write_origin(path, identity.Origin(corruption=data.corrupted(), teacher_data=teacher_data))


def import_logits(
    settings: PrecomputeSettings,
    data: Dataset,
    file: Path,
    path: Path,
    progress: Progress = silent,
    dry_run: bool = False,
    probabilities: bool = False,
) -> dict[str, Any]:
    """Make a store of logits computed elsewhere: an .npy file of shape (views, N, C), or (N, C) for one view.

    The caller vouches that view v of the file is view v of the rule in the settings. A number beyond float32 counts as
    infinite. With `probabilities`, the logarithm of the file's numbers is stored. Raises MismatchError if the array's
    shape does not fit the data, it holds probabilities instead of logits or the other way round, or its accuracy is
    barely better than chance.
    """
    flag = "--from-probabilities" if probabilities else "--from-logits"
    logits = _read_npy(file, len(data.train), len(data.classes), flag)
    rule = rules.rule_from(settings, data.train.image_size)
    _views_wanted(rule, len(logits))
    precision = str(logits.dtype)
    source = TeacherIdentity(
        architecture="imported",
        weights=sha256_file(file),
        transform=teacher.OF_PROBABILITIES if probabilities else {},
        precision=precision,
    )
    knowledge = Knowledge(teacher=source, data=data.identity(), views=rule)
    forms = [encoding.parse(settings.encoding, "logits", (len(data.classes),))]
    plan = _plan(settings, len(data.train), len(logits), forms, path)
    if dry_run:
        return _described_plan(plan, knowledge, path)

    def outputs(view: int, start: int, stop: int) -> dict[str, Tensor]:
        rows = _as_float32(logits[view, start:stop])
        logits._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]  # else all that was read stays in memory
        return {"logits": teacher.log_probabilities(rows, str(file)) if probabilities else rows}

    job = Job(
        outputs=outputs,
        if_probabilities=f"give `--from-probabilities {file}` instead of --from-logits, which takes their logarithm",
        labels=data.train.labels,
        truth=data.train.clean_labels,
        digests=data.train.digests(),
        least_accuracy=_least_accuracy(settings.min_accuracy, len(data.classes)),
        may_skip=settings.on_nonfinite == "skip",
    )
    fill(path, knowledge, plan, job, progress, lambda: write_origin(path, data, None))
    return describe(path)


def job_for(
    data: Dataset,
    network: teacher.Teacher,
    knowledge: Knowledge,
    names: Sequence[str],
    images: str = "auto",
    workers: int | None = None,
) -> Job:
    """Return the job of computing a teacher's outputs on the views of a training split.

    `images` is 'on', 'off' or 'auto', as in `run`; if images are not on the device, `workers` threads make views ahead.
    """
    rule = knowledge.views
    held = prefetch.held_views(images, data.train, rule, network.device)
    shown = prefetch.RowsAhead(data.train, rule, network.device, workers)
    # always with logits: they cost nothing more and give the accuracy
    wanted = list(dict.fromkeys(("logits", *names)))

    def outputs(view: int, start: int, stop: int) -> dict[str, Tensor]:
        pixels = shown(view, start, stop) if held is None else held(view, start, stop)
        return teacher.outputs(network, pixels, wanted)

    return Job(
        outputs=outputs,
        labels=data.train.labels,
        truth=data.train.clean_labels,
        digests=data.train.digests(),
        device=network.device,
        announced=shown.announced if held is None else lambda rows: nullcontext(),
    )


def view_pixels(data: Dataset, rule: rules.ViewRule, index: np.ndarray, view: int, device: torch.device) -> Tensor:
    """Return a view of some training samples as the teacher sees it: pixels in [0, 1], (batch, c, h, w)."""
    return rules.show(rule, data.train.images(index), rules.parameters(rule, index, view), device)


def describe(path: Path) -> dict[str, Any]:
    """Return a sealed store's summary: its contents and cost, as JSON values."""
    found = reader.open(path)
    measured, rate = [found.measurements(view) for view in range(found.views)], logged(path / TIMING)
    return {
        "kind": "store",
        "store": str(path),
        "count": found.count,
        "views": found.views,
        "fields": {name: form.name for name, form in found.fields.items()},
        "bounds": {name: form.bound for name, form in found.fields.items()},
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "knowledge_id": found.knowledge_id,
        "layout_id": found.plan.layout_id,
        "skipped": len(found.skipped),
        "teacher_accuracy": [sums["correct"] / found.count for sums in measured if "correct" in sums],
        "teacher_forwards": 0 if found.knowledge.teacher.imported else found.forwards,
        "seconds": logged_seconds(path / TIMING),
        "images_per_second": rate and rate.document(),
    }


def _encodings(
    settings: PrecomputeSettings, network: teacher.Teacher, image: tuple[int, int, int]
) -> list[encoding.Encoding]:
    asked = identity.per_sample(settings.fields) or ("logits",)
    names = fields.expand(asked, lambda: teacher.tap_shapes_of(network, image))
    black = teacher.outputs(network, torch.zeros(FEW_ROWS, *image), names)  # batch statistics need two
    return [
        encoding.parse(fields.encoding_for(name, settings.encoding), name, tuple(row.shape[1:]))
        for name, row in black.items()
    ]


def _plan(
    settings: PrecomputeSettings, count: int, wanted: int, forms: Sequence[encoding.Encoding], path: Path
) -> StorePlan:
    if log.commit_path(path, 0).exists():
        held = reader.open(path).plan
        return plan.grow_plan(held, max(held.views, wanted), forms)
    return plan.plan_store(count, wanted, forms, settings.compression, settings.batch_size)


def _views_wanted(rule: rules.ViewRule, asked: int | str) -> int:
    """Return the number of views to store; raise SettingsError for 'all' of an endless rule."""
    wanted = rules.cycle(rule, asked)
    if wanted is None:
        raise SettingsError(f"--views all: the rule {rule.name} has no end; give a number of views")
    return wanted


def _least_accuracy(asked: float | None, classes: int) -> float:
    """Return the accuracy required of a teacher: three times chance, but at most half way from chance to perfect.

    >>> _least_accuracy(None, 100), _least_accuracy(None, 2), _least_accuracy(0.5, 100)
    (0.03, 0.75, 0.5)
    """
    return min(3 / classes, (1 + 1 / classes) / 2) if asked is None else asked


def _require_budget(plan: StorePlan, budget_gb: float) -> None:
    """Log the size of a store, and raise SettingsError if it exceeds the budget."""
    rows = ", ".join(f"{name} {form.row_bytes:,}" for name, form in plan.encodings.items())
    logger.info("precompute: %s bytes in all; bytes a sample and view: %s", f"{plan.bytes:,}", rows)
    if plan.bytes > budget_gb * 1e9:
        raise SettingsError(
            f"the store would take {plan.bytes / 1e9:,.1f} GB ({plan.count:,} samples, {plan.views} views, bytes a "
            f"sample and view: {rows}), more than --budget-gb {budget_gb:g}; keep fewer fields or views, or raise it"
        )


def _described_plan(plan: StorePlan, knowledge: Knowledge, path: Path) -> dict[str, Any]:
    """Return the planned store's summary, as JSON values.

    `bytes` is the total size of its chunk files, exact without compression and an upper bound with it; records take
    about a kilobyte a part more.
    """
    per_field = file_bytes(plan)
    return {
        "would": "precompute",
        "store": str(path),
        "plan": str(plan),
        "points": plan.count * plan.views,
        "bytes": sum(per_field.values()),
        "bytes_per_field": per_field,
        "free_bytes": _free_bytes(path),
        "knowledge_id": knowledge.knowledge_id,
        "layout_id": plan.layout_id,
    }


def expected_cost(path: Path, knowledge: Knowledge, plan: StorePlan, job: Job) -> dict[str, Any]:
    """Return what is left to do, in total and for the job's shard, with the hours it takes at a rate measured now.

    Runs the teacher on a few batches and writes nothing.
    """
    everything = writer.missing(path, knowledge, plan)
    mine = everything if job.shard == WHOLE else writer.missing(path, knowledge, plan, job.shard)
    _require_steady(job, plan, mine)
    rate = measured(job, plan, mine)
    to_do, free = _to_do(plan, everything, rate), _free_bytes(path)
    if to_do["bytes"] > free:
        logger.warning(f"precompute: {to_do['bytes']:,} bytes are still to be written, but only {free:,} are free")
    found = {"images_per_second": rate and rate.document(), "to_do": to_do}
    return found if job.shard == WHOLE else found | {f"shard {job.shard}": _to_do(plan, mine, rate)}


def measured(job: Job, plan: StorePlan, parts: Sequence[Part]) -> Rate | None:
    """Return the images per second of the first few teacher batches, decoding included; None without parts."""
    rows: list[Rows] = list(islice(_batches(plan, parts), UNTIMED_BATCHES + TIMED_BATCHES))
    untimed = min(UNTIMED_BATCHES, max(0, len(rows) - 1))
    found: list[float] = []
    with job.announced(rows):
        for number, (view, start, stop) in enumerate(rows):
            began = time.perf_counter()
            values = job.outputs(view, start, stop)
            float(next(iter(values.values())).reshape(-1)[0])  # waits for the GPU
            if number >= untimed:
                found.append((stop - start) / (time.perf_counter() - began))
            if sum(1 / rate for rate in found) * plan.batch_size > MOST_SECONDS and len(found) > 1:
                break
    return rate_of(found)


def _to_do(plan: StorePlan, parts: Sequence[Part], rate: Rate | None) -> dict[str, Any]:
    points = _points(parts)
    hours = spread = None
    if rate is not None:
        hours = float(f"{points / rate.mean / 3600:.3g}")
        spread = None if rate.std is None else float(f"{points / rate.mean / 3600 * rate.std / rate.mean:.2g}")
    return {
        "parts": len(parts),
        "teacher_forwards": points,
        "bytes": sum(chunk.array.file_bytes for part in parts for chunk in part_chunks(plan, part)),
        "teacher_hours": hours,
        "teacher_hours_std": spread,
    }


def _points(parts: Iterable[Part]) -> int:
    return sum(part.stop - part.start for part in parts)


def _batches(plan: StorePlan, parts: Iterable[Part]) -> Iterable[Rows]:
    return ((part.view, *batch) for part in parts for batch in plan.batches(part))


def _free_bytes(path: Path) -> int:
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(place).free


def fill(
    path: Path,
    knowledge: Knowledge,
    plan: StorePlan,
    job: Job,
    progress: Progress,
    finish: Callable[[], None] = lambda: None,
) -> int:
    """Make or continue a store: write the shard's pending parts, each while the next is computed, then seal.

    `finish` writes the records beside the parts. It is called before the seal, so that a sealed store has them, and
    while the shard is held: a process that is alone in a store removes temporary files of others. Return the number of
    parts left to other shards; 0 if the store is sealed.
    """
    path.mkdir(parents=True, exist_ok=True)
    remedy = (
        f"lower --batch-size ({plan.batch_size} now); it is part of a store's plan, so if {path} holds points already, "
        "give the smaller one with another --store, or continue here where there is more memory"
    )
    if log.commit_path(path, 0).exists():
        begun = writer.grow(path, knowledge, views=plan.views, fields=list(plan.encodings.values()), shard=job.shard)
    else:
        begun = writer.create(path, knowledge, plan, job.labels, job.digests, job.shard)
    with begun as opened, enough_memory(remedy):
        if pending := opened.pending():
            _settle_environment(path, job)
            _require_steady(job, opened.plan, pending)
            _write_parts(opened, pending, job, progress)
        else:
            logger.info("precompute: %s is already %s", path, "finished" if opened.sealed else "complete")
        finish()
        return opened.seal_last()


def _write_parts(opened: Writer, pending: Sequence[Part], job: Job, progress: Progress) -> None:
    interrupt.begin()
    plan, timings = opened.plan, opened.path / TIMING
    rows = _points(opened.mine)
    if done := rows - _points(pending):
        logger.info("precompute: resuming at %d of %d points", done, rows)
    right = _right_so_far(opened, pending)
    skipped = log.logged_skips(opened.path)
    with ThreadPoolExecutor(1) as pool, job.announced(_batches(plan, pending)):
        written: Future[None] = pool.submit(lambda: None)
        for part in pending:
            began = time.perf_counter()
            made = compute(part, plan, job)
            written.result()
            try:
                _require_accuracy(part, made.measurements["correct"], right, job.least_accuracy)
            except MismatchError:
                opened.refuse(part.view)
                raise
            skipped |= set(made.skipped)
            log.require_few_skipped(skipped, plan.count)
            written = pool.submit(opened.write_part, part, *made)
            points, seconds = _points([part]), time.perf_counter() - began
            done += points
            append(timings, canonical_json({"seconds": round(seconds, 4), "points": points}) + b"\n")
            if interrupt.requested():
                written.result()
                interrupt.stop(f"{done:,} of {rows:,} points are in the store")
            progress("precompute", done, rows, f"view {part.view}, {rate_of([points / seconds])} images/s")
        written.result()


class Computed(NamedTuple):
    """A part ready to be written: its encoded arrays, and the values for its log record."""

    rows: dict[str, np.ndarray]
    statistics: Mapping[str, log.Numbers]
    measurements: dict[str, float]
    """`correct`: number of correct predictions of the teacher"""
    skipped: tuple[int, ...]


def compute(part: Part, plan: StorePlan, job: Job) -> Computed:
    """Return a part's arrays and counts.

    Raises NonFiniteError if an output cannot be stored and may not be skipped, MismatchError for probabilities.
    """
    arrays = [spec for field in part.fields for spec in plan.encodings[field].arrays]
    stored = {spec.name: np.empty((_points([part]), *spec.row_shape), spec.dtype) for spec in arrays}
    statistics: dict[str, log.Numbers] = {}
    correct, probable, bounded, skipped = 0.0, 0, 0, list[int]()
    for first, outputs in _blocks(part, plan, job):
        if (logits := outputs.get("logits")) is not None:
            correct += _correct(logits, first, job)
            probable += int(teacher.probability_rows(logits).sum())
            bounded += int(((logits >= 0) & (logits <= 1)).all(1).sum()) if logits.shape[1] >= FEWEST_CLASSES else 0
        values = {field: outputs[field] for field in part.fields}
        mask = _unusable(part.view, first, values, plan) if job.may_skip else None
        skipped += [] if mask is None else (first + mask.nonzero().flatten()).tolist()
        for name, encoded in _encoded(part.view, first, values, mask, plan, job).items():
            stored[name][first - part.start :][: len(encoded)] = encoded
        for field, rows in values.items():
            found = encoding.statistics(rows)
            statistics[field] = encoding.merged(statistics[field], found) if field in statistics else found
    _require_logits(part, probable, bounded, job)
    return Computed(stored, statistics, {"correct": correct}, tuple(skipped))


def _blocks(part: Part, plan: StorePlan, job: Job) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield the first row and the outputs of some teacher batches, of which the logits if the part has them or not.

    One block after the other is encoded, so that a part of many classes is never in memory as a whole; blocks are large
    enough that a GPU is rarely waited for.
    """
    wanted, held, first = dict.fromkeys((*part.fields, "logits")), list[dict[str, Tensor]](), part.start
    for start, stop in plan.batches(part):
        outputs = job.outputs(part.view, start, stop)
        held.append({field: outputs[field] for field in wanted if field in outputs})
        if stop == part.stop or sum(rows.nbytes for each in held for rows in each.values()) >= encoding.BLOCK_BYTES:
            joined = {field: torch.cat([each[field] for each in held]) for field in held[0]}
            held.clear()
            yield first, joined
            first = stop


def _correct(logits: Tensor, first: int, job: Job) -> float:
    """Return the number of correct predictions among some rows; one with a NaN, whose maximum is that, is wrong."""
    truth = (job.labels if job.truth is None else job.truth)[first : first + len(logits)]
    right = logits.argmax(1) == torch.from_numpy(truth).to(logits.device)
    return float((right & torch.isfinite(logits).all(1)).sum())


def _encoded(
    view: int, first: int, values: Mapping[str, Tensor], mask: Tensor | None, plan: StorePlan, job: Job
) -> dict[str, np.ndarray]:
    stored: dict[str, np.ndarray] = {}
    try:
        for field, rows in values.items():
            stored |= plan.encodings[field].encode(rows, first, mask)
    except NonFiniteError as error:
        hint = "; `--on-nonfinite skip` leaves such samples out of the store and of all training"
        raise NonFiniteError(f"{error}, in view {view}{hint if job.may_skip is False else ''}") from None
    return stored


def _unusable(view: int, first: int, values: Mapping[str, Tensor], plan: StorePlan) -> Tensor | None:
    """Log the samples with a field that cannot be stored; return their mask (rows,), or None without any."""
    faults = [fault for field, rows in values.items() for fault in plan.encodings[field].faults(rows)]
    for fault in faults:
        if rows := fault.rows.nonzero().flatten().tolist():
            named = encoding.name_some([first + row for row in rows])
            complaint = f"{fault.complaint} for {len(rows)} samples, which are skipped: {named}{fault.remedy}"
            logger.warning("precompute: view %d, %s", view, complaint)
    mask = torch.stack([fault.rows for fault in faults]).any(0)
    return mask if mask.any() else None


def _require_logits(part: Part, probable: int, bounded: int, job: Job) -> None:
    """Raise MismatchError if nearly all rows of a part are probabilities, whose softmax is almost uniform.

    If instead all `bounded` rows of the first part lie in [0, 1], warn: a head of cosines may do so too.
    """
    if job.if_probabilities is None:
        return
    if probable > MOST_PROBABLE * (rows := _points([part])):
        raise MismatchError(
            f"the outputs are probabilities, not logits: {probable:,} of the rows of samples {part.start} to "
            f"{part.stop - 1} in view {part.view} ({rows:,}) have no negative number and the sum 1 (or 100), and "
            f"students would learn from a second, almost uniform softmax of them; {job.if_probabilities}"
        )
    if part.view == part.start == 0 and bounded == rows:
        logger.warning(SIGMOID, part.stop - 1)


def _require_steady(job: Job, plan: StorePlan, pending: Sequence[Part]) -> None:
    """Raise MismatchError if the teacher's logits on some samples change from pass to pass, or with their batch."""
    if job.if_probabilities is None or not pending:
        return
    view, start, stop = next(iter(_batches(plan, pending)))
    stop = min(stop, start + STEADY_ROWS)
    whole, again, few = (job.outputs(view, start, end)["logits"] for end in (stop, stop, min(stop, start + FEW_ROWS)))
    span = f"samples {start} to {stop - 1} of view {view}"
    if (change := _change(whole, again)) > STEADY:
        raise MismatchError(
            f"the teacher's logits on {span} change by {change:.1%} of their range between two passes over the same "
            "images, so no store can hold them: dropout or noise is active; let its forward pass do without them when "
            "`training` is off (eval() is called here)"
        )
    if (change := _change(whole[: len(few)], few)) > STEADY_ALONE:
        raise MismatchError(
            f"the teacher's logits on {span} change by {change:.1%} of their range with the other images of the batch, "
            "so no store can hold them: it normalises by the statistics of the batch; train it with running statistics "
            "(track_running_stats), and let its forward pass use those when `training` is off (eval() is called here)"
        )


def _change(one: Tensor, other: Tensor) -> float:
    """Return the largest difference between finite logits of the same samples, as a share of their range."""
    finite = torch.isfinite(one) & torch.isfinite(other)
    if not finite.any():
        return 0.0
    known = one[finite]
    change = (known - other[finite]).abs().max()
    return float(change / (known.max() - known.min()).clamp_min(1e-6))


def _right_so_far(opened: Writer, pending: Sequence[Part]) -> dict[int, tuple[float, int]]:
    """Return view -> (correct predictions, samples) of the parts that are written already."""
    right: dict[int, tuple[float, int]] = {}
    for part in sorted({*opened.mine} - {*pending}):
        correct = log.read_record(log.record_path(opened.path, opened.growth, part.name)).measurements.get(
            "correct", 0.0
        )
        before, seen = right.get(part.view, (0.0, 0))
        right[part.view] = before + correct, seen + _points([part])
    return right


def _require_accuracy(part: Part, correct: float, right: dict[int, tuple[float, int]], least: float) -> None:
    """Raise MismatchError early: a wrong normalisation or class order shows in the first part."""
    before, seen = right.get(part.view, (0.0, 0))
    before, seen = before + correct, seen + _points([part])
    right[part.view] = before, seen
    if before < least * seen:
        raise MismatchError(
            f"the teacher is right on {before / seen:.2%} of the first {seen} samples of view {part.view}, expected at "
            f"least {least:.2%}: its normalisation, input size or class order does not fit this data; check "
            "--teacher-mean/--teacher-std/--teacher-size, or lower --min-accuracy if the teacher really is that weak"
        )


def use_recorded_threads(path: Path) -> None:
    """Set the thread count that a store was last computed with, if recorded."""
    if known := _environments(path):
        torch.set_num_threads(known[-1]["threads"])


def _settle_environment(path: Path, job: Job) -> None:
    """Set the thread count the store was begun with, compare the environment with the recorded one, and record it."""
    known = _environments(path)
    torch.set_num_threads(job.threads or (known[-1]["threads"] if known else torch.get_num_threads()))
    now = environment.environment(job.device, torch.get_num_threads())
    if known and not environment.changed(known[-1], now):
        return
    if known:
        environment.check_environment(known[-1], now, job.allow_change)
    write_atomic(path / ENVIRONMENT, readable_json([*known, now]))


def _environments(path: Path) -> list[Any]:
    return read_json(path / ENVIRONMENT) if (path / ENVIRONMENT).exists() else []


def _read_npy(file: Path, count: int, classes: int, flag: str) -> np.ndarray:
    cloud.bring(file)
    try:
        logits: np.ndarray = np.lib.format.open_memmap(file, mode="r")  # not np.load, which takes archives too
    except FileNotFoundError:
        raise NotFoundError(f"{flag}: no file at {file}") from None
    except ValueError as error:
        raise SettingsError(f"{flag}: {file} is not a plain .npy array: {error}") from None
    if logits.ndim == 2:
        logits = logits[None]
    if logits.ndim != 3 or logits.shape[1:] != (count, classes) or logits.dtype.kind != "f":
        raise MismatchError(
            f"{file} holds {logits.dtype} {logits.shape}, expected floats of shape (views, {count}, {classes})"
        )
    return logits


def _as_float32(rows: np.ndarray) -> Tensor:
    with np.errstate(over="ignore"):  # an infinity is found and named later
        return torch.from_numpy(np.array(rows, np.float32))
