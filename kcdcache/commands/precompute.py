"""`precompute`: the teacher's outputs as a store, on a manifest's mixes, or imported; the teacher a command names."""

import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from kcdcache.commands import Result
from kcdcache.condense import manifest
from kcdcache.data.datasets import Dataset
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.export.condensed_set import load_data
from kcdcache.methods import registry
from kcdcache.networks.input_transform import resolve_device, use_threads
from kcdcache.progress import Progress, silent
from kcdcache.settings import MethodSettings, Precision, PrecomputeCommand, TeacherSettings
from kcdcache.store import reader
from kcdcache.store.identity import Knowledge
from kcdcache.store.writer import parse_shard, shard_of
from kcdcache.teacher import precompute
from kcdcache.teacher import teacher as teachers
from kcdcache.training import requery
from kcdcache.views import rules

logger = logging.getLogger(__name__)


def run(command: PrecomputeCommand, progress: Progress = silent, dry_run: bool = False) -> Result:
    """Run the teacher over the data into a store; return what the store holds, or with `dry_run` its plan."""
    data, settings, machine = load_data(command.data), command.precompute, command.machine
    if command.from_logits is not None:
        return precompute.import_logits(settings, data, command.from_logits, command.store, progress, dry_run=dry_run)
    settings = settings.model_copy(update=usual_views(command.given, data))
    teacher = load_teacher(command.teaching, data, settings.teacher_precision, machine.device, machine.threads)
    if command.for_ is not None:
        rule = rules.rule_from(settings, data.train.image_size)
        planned = Knowledge(teacher=teacher.identity, data=data.identity(), views=rule)
        fields = registry.reads(MethodSettings(method=command.for_), command.student, planned, data)
        if not fields:
            raise SettingsError(f"--for {command.for_}: this method reads nothing of the teacher")
        logger.info("precompute: %s with %s reads %s", command.for_, command.student, ", ".join(fields))
        settings = settings.model_copy(update={"fields": fields})
    if command.manifest is not None:
        knowledge, path = reader.open(command.store), requery.path_for(command.manifest)
        mixes = _mixes_of(command.manifest, knowledge, settings.fields, command.mix)
        if dry_run:
            points = int(mixes.manifest.mixed.sum()) * len(mixes.views)
            return {"would": "requery", "points": points, "store": str(path)}
        requery.write(path, mixes, knowledge, data, teacher, progress)
        return precompute.describe(path)
    return precompute.run(
        settings,
        data,
        teacher,
        command.store,
        progress,
        threads=machine.threads,
        allow_env_change=machine.allow_env_change,
        shard=shard_of(os.environ) if command.shard is None else parse_shard(command.shard),
        dry_run=dry_run,
    )


def _mixes_of(file: Path, knowledge: reader.Store, fields: Sequence[str], mix: str) -> requery.Mixes:
    """Return the mixes of a manifest's file in all cached views.

    Raises:
        MismatchError: the manifest was made for other knowledge, or has no mixes.
    """
    chosen = manifest.read(file, knowledge.count)
    manifest.require_knowledge(chosen, knowledge.knowledge_id)
    if not chosen.mixed.any():
        raise MismatchError(f"{file} has no mixed points (K_Aug is empty): there is nothing to ask the teacher again")
    return requery.Mixes(manifest=chosen, fields=fields, views=range(knowledge.views), mix=mix)


def usual_views(given: Collection[str], data: Dataset) -> dict[str, Any]:
    """Return the view settings that suit the data, where the user named none."""
    return {} if "augment" in given else {key: value for key, value in data.usual_views.items() if key not in given}


def load_teacher(
    named: TeacherSettings, data: Dataset, precision: Precision, device: str, threads: int | None
) -> teachers.Teacher:
    """Return the teacher that settings name, for this data.

    Raises:
        KcdcacheError: as for `teacher.load`.
    """
    assert named.teacher is not None
    use_threads(threads)
    return teachers.load(
        named.teacher,
        weights_path=named.weights,
        classes=data.classes,
        mean=named.teacher_mean or data.mean,
        std=named.teacher_std or data.std,
        size=named.teacher_size,
        device=resolve_device(device),
        precision=precision,
        channels=len(data.mean),
    )


def precision_of(knowledge: Knowledge, path: Path) -> Precision:
    """Return the arithmetic of the teacher that the store at `path` was made with.

    Raises:
        MismatchError: its logits were imported, so that no teacher here can give them again.
    """
    made_by = knowledge.teacher
    if made_by.architecture == "imported" or made_by.precision not in get_args(Precision):
        raise MismatchError(
            f"the logits in {path} were imported from elsewhere ({made_by.precision}): no teacher here can give them "
            "again; use a store that `kcdcache precompute --teacher` made"
        )
    return cast(Precision, made_by.precision)
