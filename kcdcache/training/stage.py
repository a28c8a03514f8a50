"""Train a student on one manifest (the M-step): writes checkpoints, metrics and values."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kcdcache.condensation import schedule, value_files, values
from kcdcache.condensation.manifest import Manifest
from kcdcache.datasets.datasets import Dataset
from kcdcache.files import run_files
from kcdcache.methods import run_loss
from kcdcache.methods.base import Pair
from kcdcache.progress import Progress, silent
from kcdcache.runs.folder import RunFolder
from kcdcache.settings import TrainSettings
from kcdcache.store import reader
from kcdcache.store.identity import read_parameters
from kcdcache.teacher.teacher import Teacher
from kcdcache.training import batches, learner
from kcdcache.training.loop import Loop
from kcdcache.training.processes import ALONE, LEAST, Group
from kcdcache.training.sampling import SAMPLING, Sampler, require_enough

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a student learns from: a store and its data, and perhaps a condensed set and the teacher itself."""

    data: Dataset
    knowledge: reader.Store
    given: Manifest | None = None
    """condensed set of an earlier run; None for all samples"""
    teacher: Teacher | None = None
    """for mix_target = requery, and to measure agreement on test images"""
    requeried: tuple[Path, ...] = ()
    """stores of the teacher's outputs on mixes, used where they fit"""
    baked: Path | None = None
    """store of targets of `given`'s mixes at the run's temperature, used instead of mixing"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One student's run in progress."""

    settings: TrainSettings
    material: Material
    folder: RunFolder
    device: torch.device
    stages: tuple[schedule.Stage, ...]
    views: int
    """number of cached views when the run began; the store may have grown since"""
    fields: tuple[str, ...]
    """the teacher's fields it reads"""
    group: Group = ALONE
    progress: Progress = silent


def run_stage(run: Run, stage: schedule.Stage, chosen: Manifest, mixes: Path | None, until: int) -> int:
    """Train the run's student on a stage's manifest until epoch `until`; return the number of finished epochs.

    Continues from the run's checkpoint. `mixes` is the store of the teacher's outputs on the manifest's mixes, if any.
    Then writes the student and the values to the run's folder, and at the end of the stage the values to the stage's.
    Raises NonFiniteError if the loss diverged, SettingsError if the manifest has too few samples.
    """
    settings, material, world = run.settings, run.material, run.group.world
    require_enough(settings, settings.batch_size, len(chosen), world)
    weights = run_loss.weights_of(settings, settings.label_smoothing)
    loss = run_loss.make_loss(weights, lambda: _pair(run, chosen))
    count, starts = material.knowledge.knowledge.data.count, SAMPLING[settings.sampling].values
    record = learner.ValueRecord(count, settings, run.device, starts=starts)
    pupil = learner.new_learner(settings.student, material.data, settings, loss, run.device, record, run.group)
    connected = batches.connect(
        material.data,
        material.knowledge,
        chosen,
        fields=loss.fields,
        mixing=batches.Mixing(mix=settings.mix, target=settings.mix_target, temperature=weights.temperature),
        requeried=None if mixes is None else reader.open(mixes),
        memory_bytes=settings.memory_gb * GIB,
        folder=run.folder.path,
        cached_views=run.views,
    )
    stop = min(until, stage.stop)
    with connected as found:
        source = replace(found, stop=stop)
        loop = Loop(
            pupil,
            source,
            Sampler(
                manifest=chosen,
                optimizer=settings,
                settings=settings,
                started=record.at_start,
                least=LEAST * world,
            ),
            run.folder,
            details=partial(_details, run, stage, source),
            clock=schedule.stretched(run.stages, settings.epochs).tolist() if settings.clock == "samples" else None,
            progress=run.progress,
        )
        loop.run(stop)
    if run.group.first:
        _write_results(run, stage, pupil, record.now())
    run.group.wait()
    return pupil.epoch


def views_used(start: int, stop: int, count: int) -> tuple[int, ...]:
    """Return the views that epochs [start, stop) use, ascending.

    >>> views_used(3, 6, 4)
    (0, 1, 3)
    """
    return tuple(sorted({epoch % count for epoch in range(start, min(stop, start + count))}))


def _pair(run: Run, chosen: Manifest) -> Pair:
    settings, data, knowledge = run.settings, run.material.data, run.material.knowledge
    known = read_parameters(knowledge.path, knowledge.knowledge)
    return run_loss.pair_of(
        settings, settings.student, knowledge.knowledge, data, chosen.index, settings.seed, known,
        settings.label_smoothing,
    )  # fmt: skip


def _details(run: Run, stage: schedule.Stage, source: batches.Source, epoch: int) -> dict[str, Any]:
    """Return the metrics of an epoch's points, and the rows and chunk bytes that all processes, and each, read."""
    # with one view, only the stage's first epoch reads
    costs = [targets.cost for targets in source.stored] if epoch == stage.start or run.views > 1 else []
    rows, size = (run.group.joined(torch.tensor([sum(one[k] for one in costs)])).tolist() for k in (0, 1))
    found = {
        "stage": stage.number,
        "kept": len(source.manifest.index),
        "mixed": int(source.manifest.mixed.sum()),
        "rows_read": sum(rows),
        "bytes_read": sum(size),
    }
    return found if run.group.world == 1 else found | {"rows_read_by_each": rows, "bytes_read_by_each": size}


def _write_results(run: Run, stage: schedule.Stage, pupil: learner.Learner, found: values.Values) -> None:
    knowledge, student = run.material.knowledge, run.settings.student
    document = {"knowledge_id": knowledge.knowledge_id, "student": student, "epoch": pupil.epoch}
    tables = [run.folder.values]
    if pupil.epoch == stage.stop:
        tables.append(run.folder.stage_values(stage.number))
    facts = run_files.Facts(len(found.visits), values.fingerprint(found))
    made = learner.files_of(pupil, run.folder, "student")
    extra = {"epoch": pupil.epoch, **learner.size_of_views(knowledge.knowledge.views, run.material.data.train)}
    with run_files.writing(run.folder.path, made | {run.folder.name_of(path): facts for path in tables}):
        learner.save(pupil, run.folder, "student", student, run.material.data, extra)
        for path in tables:
            value_files.write(path, found, run.material.data.train.labels, document)
