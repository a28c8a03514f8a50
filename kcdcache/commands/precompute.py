"""`precompute`: the teacher's outputs as a store, on a manifest's mixes, or imported from elsewhere."""

import logging
import os

from kcdcache.commands import Result, inputs
from kcdcache.data.datasets import Dataset
from kcdcache.errors import SettingsError
from kcdcache.export.condensed_set import load_data
from kcdcache.methods import registry
from kcdcache.progress import Progress
from kcdcache.settings import MethodSettings, PrecomputeCommand, PrecomputeSettings
from kcdcache.store import reader
from kcdcache.store.identity import Knowledge
from kcdcache.store.writer import parse_shard, shard_of
from kcdcache.teacher import precompute
from kcdcache.teacher.teacher import Teacher
from kcdcache.training import requery
from kcdcache.views import rules

logger = logging.getLogger(__name__)


def run(command: PrecomputeCommand, progress: Progress, dry_run: bool = False) -> Result:
    """Run the teacher over the data into a store; return what the store holds, or with `dry_run` its plan."""
    data, settings, machine = load_data(command.data), command.precompute, command.machine
    if command.from_logits is not None:
        return precompute.import_logits(settings, data, command.from_logits, command.store, progress, dry_run=dry_run)
    settings = settings.model_copy(update=inputs.usual_views(command.given, data))
    teacher = inputs.load_teacher(command.teaching, data, settings.teacher_precision, machine.device, machine.threads)
    if command.for_ is not None:
        settings = settings.model_copy(update={"fields": _fields_for(command, settings, data, teacher)})
    if command.manifest is not None:
        return requery.write_for(
            command.manifest, reader.open(command.store), data, teacher, fields=settings.fields, mix=command.mix,
            progress=progress, dry_run=dry_run,
        )  # fmt: skip
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


def _fields_for(
    command: PrecomputeCommand, settings: PrecomputeSettings, data: Dataset, teacher: Teacher
) -> tuple[str, ...]:
    """Return the fields that the named method reads of this teacher for the named student."""
    assert command.for_ is not None
    rule = rules.rule_from(settings, data.train.image_size)
    knowledge = Knowledge(teacher=teacher.identity, data=data.identity(), views=rules.identity_of(rule))
    found = registry.reads(MethodSettings(method=command.for_), command.student, knowledge, data)
    if not found:
        raise SettingsError(f"--for {command.for_}: this method reads nothing of the teacher")
    logger.info("precompute: %s with %s reads %s", command.for_, command.student, ", ".join(found))
    return found
