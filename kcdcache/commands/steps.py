"""One function per command that writes: its settings in, its result out; shared by recipes and the command line."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast, get_args

from kcdcache import settings
from kcdcache.commands import condenser
from kcdcache.condense import manifest, schedule
from kcdcache.data import datasets
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.export import condensed_set as export_condensed_set
from kcdcache.export import write
from kcdcache.export.condensed_set import load_data
from kcdcache.files import timing
from kcdcache.methods import catalogue, registry
from kcdcache.networks.input_transform import resolve_device, use_threads
from kcdcache.progress import Progress, silent
from kcdcache.report import show
from kcdcache.runs.folder import RunFolder
from kcdcache.settings import (
    FitCommand,
    FitSettings,
    MethodSettings,
    Precision,
    PrecomputeCommand,
    PrecomputeSettings,
    TeacherSettings,
    TrainCommand,
    TrainSettings,
    part,
)
from kcdcache.store import reader
from kcdcache.store.identity import Knowledge
from kcdcache.store.writer import parse_shard, shard_of
from kcdcache.teacher import precompute, teacher
from kcdcache.training import distill, evaluation, processes, requery, sampling
from kcdcache.training import fit as training_fit
from kcdcache.views import rules

logger = logging.getLogger(__name__)

Result = dict[str, Any]

NOT_IMPORTED = {
    "teacher", "weights", "teacher_mean", "teacher_std", "teacher_size", "teacher_precision", "manifest", "mix",
    "views", "fields", "for_", "student", "batch_size", "budget_gb", "shard", "workers",
}  # fmt: skip
"""settings of `precompute` that logits made elsewhere decide or have no part in"""

FEW_VIEWS = (
    "note: %d cached views for %d epochs; fewer than a third of the epochs is known to cost accuracy "
    "(add some with `kcdcache precompute --views N` on the same store)"
)


def fit(command: FitCommand, progress: Progress, dry_run: bool = False) -> Result:
    """Train a teacher or a baseline; return its summary, or with `dry_run` what would be trained."""
    data = load_data(command.data)
    settings = part(FitSettings, command)
    settings = settings.model_copy(update=_usual_views(command, data))
    if dry_run:
        steps = -(-len(data.train) // settings.batch_size) * settings.epochs
        return {
            "would": "fit",
            "model": command.model,
            "samples": len(data.train),
            "steps": steps,
            "out": str(command.out),
            **data.corrupted(),
        }
    with processes.group_of() as group:
        return training_fit.run(
            settings,
            data=data,
            model=command.model,
            out=command.out,
            device=command.device,
            threads=command.threads,
            allow_env_change=command.allow_env_change,
            group=group,
            progress=_paced(progress, command.out),
        )


def precompute_store(command: PrecomputeCommand, progress: Progress, dry_run: bool = False) -> Result:
    """Run the teacher over the data into a store; return what the store holds, or with `dry_run` its plan."""
    data = load_data(command.data)
    settings = part(PrecomputeSettings, command)
    if command.from_logits is not None:
        _require_import(command)
        return precompute.import_logits(settings, data, command.from_logits, command.store, progress, dry_run=dry_run)
    settings = settings.model_copy(update=_usual_views(command, data))
    network = load_teacher(command, data, settings.teacher_precision, command.device, command.threads)
    if command.for_ is not None or command.student:
        settings = settings.model_copy(update={"fields": _fields_for(command, settings, data, network)})
    if command.manifest is not None:
        return _requery(command, settings.fields, data, network, progress, dry_run)
    return precompute.run(
        settings,
        data,
        network,
        command.store,
        progress,
        threads=command.threads,
        allow_env_change=command.allow_env_change,
        shard=shard_of(os.environ) if command.shard is None else parse_shard(command.shard),
        dry_run=dry_run,
    )


def train(command: TrainCommand, progress: Progress, dry_run: bool = False) -> Result:
    """Run Algorithm 1, or a part of it; return the summary, or with `dry_run` the stages and their expected cost."""
    places = (command.store, command.manifest, command.condensed)
    show.require_ids((path for path in places if path), command.expect_id)
    if command.condensed is not None and "stages" not in command.model_fields_set:
        command = command.model_copy(update={"stages": 1})
    settings = _with_recipe(part(TrainSettings, command), command.model_fields_set)
    if not settings.student:
        raise SettingsError("--student is missing: name the network to train, for example --student resnet8")
    material = _material(command, settings)
    knowledge = material.knowledge
    if 3 * knowledge.views < settings.epochs and settings.method != "ce":
        logger.warning(FEW_VIEWS, knowledge.views, settings.epochs)
    if dry_run:
        return _planned_stages(settings, material, command.out)
    with processes.group_of() as group:
        return distill.run(
            settings,
            material,
            out=command.out,
            until=command.until,
            device=command.device,
            threads=command.threads,
            allow_env_change=command.allow_env_change,
            group=group,
            progress=_paced(progress, command.out),
        )


def _paced(progress: Progress, out: Path) -> Progress:
    """Return a report of progress that tells images per second with every epoch."""

    def told(what: str, done: int, total: int, remark: str) -> None:
        rate = timing.logged(RunFolder(path=out).timing) if what == "train" else None
        progress(what, done, total, remark if rate is None else f"{remark}, {rate} images/s")

    return told


def _material(command: TrainCommand, settings: TrainSettings) -> distill.Material:
    """Return what a student learns from: a store, perhaps with a manifest, or an exported set.

    Raises:
        SettingsError: neither is named, or both are.
    """
    if command.condensed is not None:
        return _exported_material(command, settings, command.condensed)
    if command.store is None:
        raise SettingsError("train needs knowledge: --store with the folder of a store, or --condensed with that of an "
                            "exported set")  # fmt: skip
    data, knowledge = load_data(command.data), reader.open(command.store)
    given = None
    if command.manifest is not None:
        given = distill.accept(manifest.read(command.manifest, knowledge.count), knowledge, command.transfer)
    made = (requery.path_for(command.manifest),) if command.manifest else ()
    return distill.Material(
        data=data,
        knowledge=knowledge,
        given=given,
        teacher=_asked_teacher(command, settings, data, knowledge),
        requeried=made,
    )


def _exported_material(command: TrainCommand, settings: TrainSettings, path: Path) -> distill.Material:
    """Return what a student learns from an exported set.

    Raises:
        SettingsError: something is given beside it that it brings itself, or its baked targets do not fit.
    """
    if ignored := command.model_fields_set & {"store", "manifest", "transfer"}:
        raise SettingsError(f"--{min(ignored)} does nothing beside --condensed, which brings its own; leave it out")
    opened, data = export_condensed_set.open(path), load_data(command.data)
    if opened.mixes is not None:
        export_condensed_set.require_served(opened, settings, registry.weights_of(settings))
    return distill.Material(
        data=data,
        knowledge=opened.knowledge,
        given=opened.manifest,
        teacher=_asked_teacher(command, settings, data, opened.knowledge),
        baked=opened.mixes,
    )


def _asked_teacher(
    command: TrainCommand, settings: TrainSettings, data: datasets.Dataset, knowledge: reader.Store
) -> teacher.Teacher | None:
    """Return the teacher if mixed images are to be shown to it, or test images, and one is named."""
    compared = evaluation.fidelity_wanted(settings, data, knowledge)
    if command.teacher is None or (settings.mix_target != "requery" and not compared):
        if command.teacher is not None:
            logger.info("train: --teacher is not used; it serves --mix-target requery and --fidelity on")
        return None
    precision = precision_of(knowledge.knowledge, knowledge.path)
    found = load_teacher(command, data, precision, command.device, command.threads)
    if compared:
        evaluation.require_own(found, knowledge)
    return found


def condense(command: settings.CondenseCommand, progress: Progress, dry_run: bool = False) -> Result:
    """Turn values into the next manifest; see `condenser.run`."""
    return condenser.run(command, dry_run=dry_run)


def export(command: settings.ExportCommand, progress: Progress = silent, dry_run: bool = False) -> Result:
    """Write a condensed set with the knowledge it needs into one folder; see `export.write.run`.

    Raises:
        MismatchError: set or store is not what was expected, or they were not made for each other.
    """
    show.require_ids((command.manifest, command.store), command.expect_id)
    return write.run(command, progress, dry_run)


STEPS: Mapping[str, tuple[type[settings.Settings], Callable[..., Result]]] = {
    "fit": (settings.FitCommand, fit),
    "precompute": (settings.PrecomputeCommand, precompute_store),
    "train": (settings.TrainCommand, train),
    "condense": (settings.CondenseCommand, condense),
}
"""command -> the settings it takes and the function that does it"""


def _fields_for(
    command: PrecomputeCommand,
    settings: PrecomputeSettings,
    data: datasets.Dataset,
    network: teacher.Teacher,
) -> tuple[str, ...]:
    """Return the fields that the named method reads of this teacher for the named student."""
    if command.for_ is None or not command.student:
        raise SettingsError("--for METHOD and --student NETWORK go together: feature sizes depend on both networks")
    if "fields" in command.model_fields_set:
        raise SettingsError("--for works out the fields; leave --fields out")
    rule = rules.rule_from(settings, data.train.image_size)
    knowledge = Knowledge(teacher=network.identity, data=data.identity(), views=rules.identity_of(rule))
    found = registry.reads(MethodSettings(method=command.for_), command.student, knowledge, data)
    if not found:
        raise SettingsError(f"--for {command.for_}: this method reads nothing of the teacher")
    logger.info("precompute: %s with %s reads %s", command.for_, command.student, ", ".join(found))
    return found


def _with_recipe(settings: TrainSettings, given: set[str]) -> TrainSettings:
    """Return settings in which the method's authors' own training recipe holds wherever the user gave nothing."""
    changed = {
        key: value for key, value in catalogue.recipe(settings.method, settings.student).items() if key not in given
    }
    if changed:
        told = ", ".join(f"{key} {value}" for key, value in changed.items())
        logger.info("train: the authors' settings of %s for %s: %s", settings.method, settings.student, told)
    return settings.model_copy(update=changed)


def _usual_views(command: settings.FitCommand | settings.PrecomputeCommand, data: datasets.Dataset) -> dict[str, Any]:
    """Return the views that suit the data, where the user named none."""
    given = command.model_fields_set
    return {} if "augment" in given else {key: value for key, value in data.usual_views.items() if key not in given}


def _require_import(command: settings.PrecomputeCommand) -> None:
    """Refuse what an import cannot follow, and logits of which nobody says what view they are of."""
    ignored = command.model_fields_set & NOT_IMPORTED
    if ignored:
        flag = f"--{min(ignored).rstrip('_').replace('_', '-')}"
        raise SettingsError(f"{flag} does nothing beside --from-logits: the file decides it; leave it out")
    if "augment" not in command.model_fields_set:
        raise SettingsError(
            "--from-logits needs --augment: say which views the logits belong to (--augment none for images as they "
            "are); logits of other images than the student sees are the known failure of offline distillation"
        )


def load_teacher(
    settings: TeacherSettings,
    data: datasets.Dataset,
    precision: Precision,
    device: str,
    threads: int | None,
) -> teacher.Teacher:
    """Return the teacher that settings name, for this data.

    Raises:
        SettingsError: no teacher is named.
    """
    if settings.teacher is None:
        raise SettingsError("--teacher is missing: a folder written by `kcdcache fit`, or a network with --weights")
    use_threads(threads)
    own = {"--teacher-mean": settings.teacher_mean, "--teacher-std": settings.teacher_std}
    given = [flag for flag, value in (own | {"--teacher-size": settings.teacher_size}).items() if value is not None]
    if given and settings.weights is None:
        raise SettingsError(f"{given[0]} does nothing here: {settings.teacher} brings its own input transform")
    return teacher.load(
        settings.teacher,
        weights_path=settings.weights,
        classes=data.classes,
        mean=settings.teacher_mean or data.mean,
        std=settings.teacher_std or data.std,
        size=settings.teacher_size,
        device=resolve_device(device),
        precision=precision,
        channels=len(data.mean),
    )


def precision_of(knowledge: Knowledge, path: Path) -> settings.Precision:
    """Return the arithmetic of the teacher that the store at `path` was made with.

    Raises:
        MismatchError: its logits were imported, so that no teacher here can give them again.
    """
    made_by = knowledge.teacher
    if made_by.architecture == "imported" or made_by.precision not in get_args(settings.Precision):
        raise MismatchError(
            f"the logits in {path} were imported from elsewhere ({made_by.precision}): no teacher here can give them "
            "again; use a store that `kcdcache precompute --teacher` made"
        )
    return cast(settings.Precision, made_by.precision)


def _requery(
    command: settings.PrecomputeCommand,
    fields: tuple[str, ...],
    data: datasets.Dataset,
    network: teacher.Teacher,
    progress: Progress,
    dry_run: bool,
) -> Result:
    knowledge = reader.open(command.store)
    assert command.manifest is not None
    return requery.write_for(
        command.manifest, knowledge, data, network, fields=fields, mix=command.mix, progress=progress,
        dry_run=dry_run,
    )  # fmt: skip


def _planned_stages(settings: TrainSettings, material: distill.Material, out: Path) -> Result:
    count = material.knowledge.knowledge.data.count
    usable = count - len(material.knowledge.skipped)
    stages = distill.planned(settings, material)
    share = settings.sample_share if sampling.scheme_named(settings.sampling).partial else 1.0
    return {
        "would": "train",
        "out": str(out),
        # of infobatch, which leaves out what turns out to be easy, the most it can be
        "relative_cost": share * schedule.expected_cost(stages, count, settings.epochs),
        "stages": [
            {
                "stage": stage.number,
                "epochs": f"{stage.start}-{stage.stop - 1}",
                "keep": stage.keep,  # unrounded: `condense --keep` with it gives the run's own bytes
                "samples": min(schedule.kept_count(stage.keep, count), usable),
                "source": stage.source,
            }
            for stage in stages
        ],
        **material.data.corrupted(),
    }
