"""Train a student on one manifest (the M-step): checkpoints, metrics, values out; knows nothing of condensation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kcdcache.condense import value_files, values
from kcdcache.condense.manifest import Manifest
from kcdcache.data.datasets import Dataset
from kcdcache.files import records
from kcdcache.methods import registry
from kcdcache.methods.base import Pair
from kcdcache.progress import Progress, silent
from kcdcache.runs.folder import RunFolder
from kcdcache.settings import TrainSettings
from kcdcache.store import reader
from kcdcache.store.identity import read_parameters
from kcdcache.store.rows import StoredTargets
from kcdcache.training import batches, device_batches, learner, loop, sampling
from kcdcache.training.processes import ALONE, Group

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What one stage learns from."""

    number: int
    """the stage's number"""
    start: int
    """first epoch of the stage"""
    stop: int
    """first epoch after the stage"""
    views: int
    """cached views to cycle through"""
    manifest: Manifest
    requeried: Path | None = None
    """store of the teacher's outputs on this manifest's mixes, if it was asked for them"""


def run_stage(
    settings: TrainSettings,
    lessons: Lessons,
    *,
    data: Dataset,
    knowledge: reader.Store,
    folder: RunFolder,
    device: torch.device,
    until: int,
    clock: Sequence[float] | None = None,
    group: Group = ALONE,
    progress: Progress = silent,
) -> learner.Learner:
    """Train the run's student on one manifest until epoch `until` of its stage; return the learner.

    Continues from the run's checkpoint. At the stop it writes the student's weights and the values, in the run's
    folder and, at the end of the stage, in the stage's.

    Raises:
        MismatchError: the store lacks a field the method needs.
        NonFiniteError: the loss diverged.
    """
    count = knowledge.knowledge.data.count
    record = learner.new_record(count, device, settings, sampling.scheme_named(settings.sampling).values)
    choice = registry.choose(settings, settings.label_smoothing)
    head = registry.make_head(choice, lambda: _pair(settings, lessons, knowledge, data))
    pupil = learner.new_learner(settings.student, data, settings, device, record, head, group)
    weights = choice.weights
    connected = batches.connect(
        data,
        knowledge,
        lessons.manifest,
        fields=registry.needed_fields(choice, head),
        mixing=batches.Mixing(mix=settings.mix, target=settings.mix_target, temperature=weights.temperature),
        requeried=None if lessons.requeried is None else reader.open(lessons.requeried),
        memory_bytes=settings.memory_gb * GIB,
        folder=folder.scratch,
        cached_views=lessons.views,
    )
    with connected as source:
        stop = min(until, lessons.stop)
        task = _task(settings, lessons, replace(source, stop=stop), pupil, choice, clock)
        loop.run(pupil, task, settings, folder, stop, progress)
    if group.first:
        _write_results(settings, lessons, pupil, data, knowledge, folder)
    group.wait()
    return pupil


def views_used(start: int, stop: int, count: int) -> tuple[int, ...]:
    """Return the numbers of the views that epochs [start, stop) use, ascending.

    >>> views_used(3, 6, 4)
    (0, 1, 3)
    """
    return tuple(sorted({epoch % count for epoch in range(start, min(stop, start + count))}))


def _pair(settings: TrainSettings, lessons: Lessons, knowledge: reader.Store, data: Dataset) -> Pair:
    identity, kept = knowledge.knowledge, lessons.manifest.index
    known = read_parameters(knowledge.path, identity)
    smoothing = settings.label_smoothing
    return registry.pair_of(settings, settings.student, identity, data, kept, settings.seed, known, smoothing)


def _task(
    settings: TrainSettings,
    lessons: Lessons,
    source: batches.Source,
    pupil: learner.Learner,
    choice: registry.Choice,
    clock: Sequence[float] | None,
) -> loop.Task:
    assert pupil.record is not None
    sampler = sampling.Sampler(
        manifest=source.manifest, settings=settings, seed=settings.seed, epochs=settings.epochs,
        batch_size=settings.batch_size, started=pupil.record.started,
    )  # fmt: skip
    return loop.Task(
        **device_batches.supply(settings, source, pupil, sampler)._asdict(),
        loss=registry.loss_of(choice.weights, pupil.head),
        details=lambda epoch: {
            "stage": lessons.number,
            "view": source.view_of(epoch),
            "kept": len(lessons.manifest.index),
            "mixed": int(lessons.manifest.mixed.sum()),
            **_rows_read(epoch, lessons, source, pupil.group),
        },
        clock=clock,
    )


def _rows_read(epoch: int, lessons: Lessons, source: batches.Source, group: Group) -> dict[str, Any]:
    """Return the store rows, and the bytes of their chunk files, that an epoch's view took all processes, and each."""
    held = [targets for targets in (source.targets, source.requeried) if isinstance(targets, StoredTargets)]
    # with one view, only the stage's first epoch reads
    costs = [targets.cost for targets in held] if epoch == lessons.start or lessons.views > 1 else []
    rows, size = (group.joined(torch.tensor([sum(one[place] for one in costs)])).tolist() for place in (0, 1))
    found = {"rows_read": sum(rows), "bytes_read": sum(size)}
    return found if group.world == 1 else found | {"rows_read_by_each": rows, "bytes_read_by_each": size}


def _write_results(
    settings: TrainSettings,
    lessons: Lessons,
    pupil: learner.Learner,
    data: Dataset,
    knowledge: reader.Store,
    folder: RunFolder,
) -> None:
    assert pupil.record is not None
    found = values.Values(visits=pupil.record.visits.cpu().numpy(), value=pupil.record.value.cpu().numpy())
    document = {"knowledge_id": knowledge.knowledge_id, "student": settings.student, "epoch": pupil.epoch}
    tables = [folder.values]
    if pupil.epoch == lessons.stop:
        tables.append(folder.stage_values(lessons.number))
    facts = records.Facts(len(found.visits), values.fingerprint(found))
    made = dict.fromkeys(("student.safetensors", "student.json"), records.Facts())
    with records.writing(folder.path, made | {folder.name_of(path): facts for path in tables}):
        learner.save(pupil, folder, "student", settings.student, data, {"epoch": pupil.epoch})
        for path in tables:
            value_files.write(path, found, data.train.labels, document)
