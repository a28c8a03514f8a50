"""`precompute`: store the teacher's outputs on the data or on a manifest's mixes, or import them."""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from kcdcache.commands import Result
from kcdcache.condensation import manifest
from kcdcache.datasets.datasets import Dataset
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.export.condensed_set import load_data
from kcdcache.methods import run_loss
from kcdcache.progress import Progress, silent
from kcdcache.settings import MethodSettings, Mix, PrecomputeCommand, values_of
from kcdcache.store import reader
from kcdcache.store.identity import Knowledge
from kcdcache.store.writer import WHOLE, Shard, shard_of
from kcdcache.teacher import precompute
from kcdcache.teacher import teacher as teachers
from kcdcache.teacher.teacher import Teacher
from kcdcache.training import requery
from kcdcache.training.processes import take_own_gpu
from kcdcache.views import rules

logger = logging.getLogger(__name__)


def run(command: PrecomputeCommand, progress: Progress = silent, dry_run: bool = False) -> Result:
    """Run the teacher and store its outputs; return the contents of the store, or with `dry_run` its plan."""
    take_own_gpu()
    shard = shard_of(command.shard)
    data, settings, machine = load_data(command.data), command.precompute, command.machine
    probabilities = bool(command.from_probabilities)
    if (file := command.imported) is not None:
        return precompute.import_logits(settings, data, file, command.store, progress, dry_run, probabilities)
    teacher = teachers.load_named(command.teaching, data, settings.teacher_precision, machine, probabilities)
    made = store_with(command, data, teacher, progress, dry_run, shard)
    return made if made.get("finished", True) else made | {"unsealed": _remedy(command, made["parts_left"])}


def store_with(
    command: PrecomputeCommand,
    data: Dataset,
    teacher: Teacher,
    progress: Progress = silent,
    dry_run: bool = False,
    shard: Shard = WHOLE,
) -> Result:
    """Store a teacher's outputs on loaded data; return the contents of the store, or with `dry_run` its plan."""
    settings, machine = command.precompute.model_copy(update=data.usual_views(command.given)), command.machine
    if command.for_ is not None:
        rule = rules.rule_from(settings, data.train.image_size)
        planned = Knowledge(teacher=teacher.identity, data=data.identity(), views=rule)
        fields = run_loss.reads(MethodSettings(method=command.for_), command.student, planned, data)
        if not fields:
            raise SettingsError(f"--for {command.for_}: this method uses no teacher outputs")
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
    more = machine.model_dump(exclude={"device"})
    return precompute.run(settings, data, teacher, command.store, progress, shard=shard, dry_run=dry_run, **more)


def _remedy(command: PrecomputeCommand, left: int) -> str:
    """Return what ends a store that one shard has left unsealed."""
    flags: list[str] = []
    for name, value in values_of(command).items():
        if name in command.given - {"shard"}:
            flag = name.rstrip("_").replace("_", "-")
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            flags += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", shown]
    return (
        f"{left} parts are left for the other shards, the last of which seals the store; one process finishes it with "
        f"`{shlex.join(['kcdcache', 'precompute', *flags])}`"
    )


def _mixes_of(file: Path, knowledge: reader.Store, fields: Sequence[str], mix: Mix) -> requery.Mixes:
    """Return the mixes of a manifest in all cached views; raises MismatchError if it has none."""
    chosen = manifest.read(file, knowledge.count)
    manifest.require_knowledge(chosen, knowledge.knowledge_id)
    if not chosen.mixed.any():
        raise MismatchError(f"{file} has no mixed points (K_Aug is empty): there is nothing to run the teacher on")
    return requery.Mixes(manifest=chosen, fields=fields, views=range(knowledge.views), mix=mix)
