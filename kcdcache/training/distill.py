"""Algorithm 1: train a stage, condense, next stage; the only place where training and condensation meet."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from kcdcache.condensation import manifest, schedule, summary, value_files
from kcdcache.condensation.manifest import Manifest, Samples
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.files import cloud
from kcdcache.files.records import Rate, Sparse, logged, logged_seconds
from kcdcache.methods import run_loss
from kcdcache.networks import registry as networks_registry
from kcdcache.networks.input_transform import resolve_device
from kcdcache.progress import Progress, silent
from kcdcache.runs import state
from kcdcache.runs.folder import RunFolder
from kcdcache.settings import MachineSettings, TrainSettings, recorded
from kcdcache.store import check, identity, reader
from kcdcache.training import evaluation, requery
from kcdcache.training.processes import ALONE, DEFAULT_MACHINE, Group, session
from kcdcache.training.sampling import SAMPLING, require_enough
from kcdcache.training.stage import Material, Run, run_stage, views_used

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Stopped(Sparse):
    """The state of a run that was stopped before its end."""

    finished: Literal[False]
    epochs_done: int
    epochs: int
    run: str
    """folder"""
    images_per_second: Rate | None


def run(
    settings: TrainSettings,
    material: Material,
    *,
    out: Path,
    until: int | None = None,
    machine: MachineSettings = DEFAULT_MACHINE,
    group: Group = ALONE,
    progress: Progress = silent,
) -> state.Summary | Stopped:
    """Train a student through all stages into the folder `out`, or continue; return the summary.

    With `until`, stop after that many epochs; the same call without it continues. `material.given` is the condensed set
    a new run starts from (reuse), or the manifest of the stage that a run in the folder has reached. All processes of a
    `group` call this with the same arguments.

    Raises:
        SettingsError: the settings contradict each other or the run already in the folder.
        MismatchError: store, data and condensed set were not made for each other, or the store lacks a field.
        NonFiniteError: the loss diverged.
    """
    fields = _checked(settings, material)  # before a folder is made
    folder = RunFolder(path=out)
    material, following = _sorted_out(material, folder)
    views = _views(settings, material, folder)
    record = recorded(settings), _inputs(material, views, fields)
    stages = planned(settings, material, group.world)
    with session(folder, *record, machine, group) as where:
        if where is None:
            logger.info("train: %s is already finished", out)
            return _measured_later(settings, material, folder, machine) if group.first else state.read_summary(out)
        going = Run(
            settings=_within_given(settings, material),
            material=material,
            folder=folder,
            device=where,
            stages=stages,
            views=views,
            fields=fields,
            group=group,
            progress=progress,
        )
        if group.first:
            _keep_given(going, following)
        group.wait()
        return _all_stages(going, settings.epochs if until is None else min(until, settings.epochs))


def planned(settings: TrainSettings, material: Material, world: int = 1) -> tuple[schedule.Stage, ...]:
    """Return a run's stages.

    Raises SettingsError if epochs is no multiple of stages, keep is more than is given, or a stage would have fewer
    than two samples for each of `world` processes.
    """
    base, knowledge = _base(settings, material), material.knowledge
    found = schedule.plan(settings.schedule, settings.epochs, settings.stages, settings.keep, base)
    usable = knowledge.count - len(knowledge.skipped)
    for stage in found:
        count = min(schedule.kept_count(stage.keep, knowledge.count), usable)
        require_enough(settings, settings.batch_size, count, world)
    return found


def _base(settings: TrainSettings, material: Material) -> float:
    """Return the share of all samples a run starts from: exactly `keep` for a set condensed to `keep`."""
    count = material.knowledge.count
    if material.given is None:
        return 1.0
    exact = schedule.kept_count(settings.keep, count) == len(material.given) < count
    return settings.keep if exact else len(material.given) / count


def _all_stages(run: Run, until: int) -> state.Summary | Stopped:
    """Train the unfinished stages up to epoch `until`."""
    done = finished_epochs(run.folder)
    for stage in run.stages:
        if stage.start >= until:
            break
        # a kill may fall between a stage's last checkpoint and its values, which are its last file
        if stage.stop > done or not run.folder.is_complete(run.folder.stage_values(stage.number)):
            chosen = _by_first(run, partial(_manifest_for, run, stage))
            mixes = _by_first(run, partial(_outputs_on_mixes, run, stage, chosen))
            first, last = stage.start + 1, stage.stop  # counted from 1, as everywhere that people look
            logger.info("stage %d: epochs %d to %d on %d samples", stage.number, first, last, len(chosen))
            done = run_stage(run, stage, chosen, mixes, until)
    if done < run.settings.epochs:
        logger.info("train: stopped after epoch %d of %d; the same command resumes", done, run.settings.epochs)
        return Stopped(
            finished=False,
            epochs_done=done,
            epochs=run.settings.epochs,
            run=str(run.folder.path),
            images_per_second=logged(run.folder.timing),
        )
    return _by_first(run, partial(_finish, run))


def finished_epochs(folder: RunFolder) -> int:
    """Return the number of finished epochs in a run's checkpoint."""
    found = state.load_checkpoint(folder)
    return found[1].epoch if found else 0


def _by_first(run: Run, work: Callable[[], T]) -> T:
    """Return the result of some work; the first process does it, then the others, which find it done."""
    if run.group.first:
        made = work()
        run.group.wait()
        return made
    run.group.wait()
    cloud.refresh(run.folder.path)
    return work()


def _manifest_for(run: Run, stage: schedule.Stage) -> Manifest:
    """Return the stage's manifest from disk, or make it: given, random, full or condensed."""
    path, knowledge = run.folder.manifest(stage.number), run.material.knowledge
    if run.folder.is_complete(path):
        found = manifest.read(path)
        manifest.require_knowledge(found, knowledge.knowledge_id)
        return found
    data, given, before = run.material.data, run.material.given, stage.number - 1
    samples = Samples(
        knowledge.knowledge_id, knowledge.count, data.train.labels, len(data.classes),
        knowledge.knowledge.data.digest, knowledge.skipped,
    )  # fmt: skip
    if stage.source == "condensed":  # the E-step, from the values at the end of the previous stage
        values = value_files.read(run.folder.stage_values(before), samples.count).values
        previous = manifest.read(run.folder.manifest(before))
        made = summary.condense(values, run.settings, samples, stage=stage.number, keep=stage.keep, previous=previous)
    elif stage.source == "random":
        made = summary.random_stage(samples, keep=stage.keep, seed=run.settings.condense_seed, previous=given)
    elif stage.source == "given":
        assert given is not None
        made = given
    else:
        made = manifest.full(samples)
    state.write_manifest(run.folder, path, made)
    return made


def _outputs_on_mixes(run: Run, stage: schedule.Stage, chosen: Manifest) -> Path | None:
    """Run the teacher on the stage's mixes in the views it uses, if needed; return the store, or None."""
    needs, material = identity.per_sample(run.fields), run.material
    if not needs or not chosen.mixed.any():
        return None
    if material.baked is not None or run.settings.mix_target != "requery":
        return material.baked
    used = views_used(stage.start, stage.stop, run.views)
    mixes = requery.Mixes(manifest=chosen, fields=needs, views=used, mix=run.settings.mix)
    path = requery.path_for(run.folder.manifest(stage.number))
    for made in (path, *material.requeried):
        if mixes.held_at(made):
            return made
    if material.teacher is None:
        raise SettingsError(
            "mix_target 'requery' runs the teacher on mixed images: give --teacher (and --weights), or make them "
            "before with `kcdcache precompute --manifest`"
        )
    requery.write(path, mixes, material.knowledge, material.data, material.teacher, run.progress)
    return path


def _finish(run: Run) -> state.Summary:
    """Condense once more for export (facts.md A3), then write the summary, which marks the run as finished."""
    if run.folder.is_complete(run.folder.summary):
        return state.read_summary(run.folder.path)
    settings, last = run.settings, run.stages[-1]
    keep = schedule.export_keep(settings.stages, settings.keep, _base(settings, run.material))
    exported = run.folder.manifest(last.number)
    if keep is not None:
        closing = schedule.Stage(last.number + 1, settings.epochs, settings.epochs, keep, "condensed")
        exported = run.folder.manifest(closing.number)
        _manifest_for(run, closing)
    state.write_summary(run.folder, _summary(run, exported))
    return state.read_summary(run.folder.path)


def _summary(run: Run, exported: Path) -> state.Summary:
    found = state.load_checkpoint(run.folder)
    rows = found[1].rows if found else []
    data, knowledge, teacher = run.material.data, run.material.knowledge, run.material.teacher
    requeries = sum(
        (made := reader.open(path)).count * made.views
        for path in sorted(run.folder.path.glob("stages/*/*.requery"))
        if path.is_dir()
    )
    return state.Summary(
        **state.outcome(rows, knowledge.knowledge.data.count, run.settings.epochs).document(),
        kind="train",
        finished=True,
        model=run.settings.student,
        method=run.settings.method,
        knowledge_id=knowledge.knowledge_id,
        teacher_forwards=requeries,
        store_teacher_forwards=0 if knowledge.knowledge.teacher.imported else knowledge.count * knowledge.views,
        rows_read=sum(row.rows_read or 0 for row in rows),
        bytes_read=sum(row.bytes_read or 0 for row in rows),
        kept=len(manifest.read(exported)),
        condensed_set=str(exported.relative_to(run.folder.path)),
        seconds=logged_seconds(run.folder.timing),
        images_per_second=logged(run.folder.timing),
        **evaluation.fidelity(run.settings, data, knowledge, teacher, run.folder, run.device),
    )


def _measured_later(
    settings: TrainSettings, material: Material, folder: RunFolder, machine: MachineSettings
) -> state.Summary:
    """Return a finished run's summary; measure fidelity if it is asked for only now."""
    data, knowledge, teacher = material.data, material.knowledge, material.teacher
    found = state.read_summary(folder.path)
    sought = {"accuracy_train"} | ({"agreement_test"} if teacher is not None else set())
    if not evaluation.fidelity_wanted(settings, data, knowledge) or sought <= found.model_fields_set:
        return found
    logger.info("train: measuring the finished student in %s", folder.path)
    measured = evaluation.fidelity(settings, data, knowledge, teacher, folder, resolve_device(machine.device))
    state.write_summary(folder, state.Summary(**found.document() | measured))
    return state.read_summary(folder.path)


def _checked(settings: TrainSettings, material: Material) -> tuple[str, ...]:
    """Check that a run can be trained from this material; return the teacher's fields that it reads."""
    data, knowledge = material.data, material.knowledge
    if SAMPLING[settings.sampling].mixes and settings.mix_target == "requery":
        raise SettingsError(
            f"sampling '{settings.sampling}' mixes other points in every epoch, and --mix-target requery would need "
            "the teacher's outputs on each of them; give another --mix-target (linear_prob, linear_logit, keep), or "
            "another --sampling"
        )
    check.check_data(knowledge, data)
    if material.given is not None:
        manifest.require_usable(material.given, knowledge.skipped)
    networks_registry.require_known(settings.student, len(data.classes), len(data.mean))
    fields = run_loss.reads(settings, settings.student, knowledge.knowledge, data)
    run_loss.require_fields(fields, knowledge.kept, settings, settings.student)
    return fields


def _within_given(settings: TrainSettings, material: Material) -> TrainSettings:
    """Return the settings for a reused set, of which only its own samples are candidates."""
    if material.given is None or settings.stages == 1:
        return settings
    logger.info("reuse: only the %d samples of the given set are candidates", len(material.given))
    return settings.model_copy(update={"candidates": "current"})


def _views(settings: TrainSettings, material: Material, folder: RunFolder) -> int:
    """Return the number of views the run began with; for a new run those asked for, or all in the store."""
    held = material.knowledge.views
    if (asked := settings.cached_views) is not None and asked > held:
        raise SettingsError(
            f"--cached-views {asked}: the store at {material.knowledge.path} has {held}; precompute more"
        )
    begun = state.begun_record(folder)
    return min(asked or held, (begun.inputs.views if begun else None) or held)


def _inputs(material: Material, views: int, fields: tuple[str, ...]) -> state.Inputs:
    """Return everything besides settings and environment that decides the run's bytes."""
    knowledge, given = material.knowledge, material.given
    return state.Inputs(
        knowledge_id=knowledge.knowledge_id,
        views=views,
        encodings={name: knowledge.fields[name].name for name in fields if name in knowledge.fields},
        teacher_batch=knowledge.plan.batch_size,
        test=material.data.test.digest(),
        given=given.digest if given is not None else None,
        **({"skipped": knowledge.skipped.tolist()} if len(knowledge.skipped) else {}),
    )


def accept(given: Manifest, knowledge: reader.Store, transfer: bool) -> Manifest:
    """Return a condensed set for a store's knowledge; `transfer` rebinds a set made for another teacher.

    Raises MismatchError if the set was made for other knowledge and transfer is off, or for other data.
    """
    known, wanted = knowledge.knowledge.data, knowledge.knowledge_id
    manifest.require_knowledge(given, wanted, count=known.count, data_digest=known.digest, transfer=transfer)
    if given.knowledge_id == wanted:
        return given
    logger.info("transfer: a set condensed for knowledge %s is used with %s", given.knowledge_id[:12], wanted[:12])
    return replace(given, knowledge_id=wanted, parent=given.digest)


def _sorted_out(material: Material, folder: RunFolder) -> tuple[Material, Manifest | None]:
    """Return the material the run began with, and the given manifest if it is the next stage's."""
    if material.given is None or (begun := state.begun_record(folder)) is None:
        return material, None
    began_with = begun.inputs.given
    if began_with == material.given.digest:
        return material, None
    return replace(material, given=manifest.read(folder.given) if began_with else None), material.given


def _keep_given(run: Run, following: Manifest | None) -> None:
    """Save the set a run began with (stage 0 may train on a part only), and the next stage's manifest if given."""
    given, folder = run.material.given, run.folder
    if given is not None and not folder.is_complete(folder.given):
        state.write_manifest(folder, folder.given, given)
    if following is not None:
        _place(run, following)


def _place(run: Run, chosen: Manifest) -> None:
    """Save a manifest condensed by hand for the stage that begins now, unless a stage has it already."""
    folder, done = run.folder, finished_epochs(run.folder)
    manifest.require_knowledge(chosen, run.material.knowledge.knowledge_id)
    standing = [path for stage in run.stages if folder.is_complete(path := folder.manifest(stage.number))]
    if any(manifest.read(path).digest == chosen.digest for path in standing):
        # the same command is run again, to resume
        logger.info("train: a stage of this run already trains on the given set")
        return
    starts = {stage.start: stage.number for stage in run.stages}
    if done not in starts:
        raise SettingsError(
            f"--manifest: the run has finished {done} epochs, inside a stage; a manifest can be given only where a "
            f"stage begins, after {', '.join(map(str, starts))} epochs"
        )
    number = starts[done]
    if chosen.stage != number:
        raise SettingsError(
            f"--manifest: the run is at the start of stage {number}, the manifest is for stage {chosen.stage}; "
            f"condense again with --stage {number}, or with the manifest of stage {number - 1} as --previous"
        )
    path = folder.manifest(number)
    if path in standing:
        raise SettingsError(f"stage {number} of this run has another manifest already: {path}")
    before = manifest.read(folder.manifest(number - 1)).digest if number else None
    if chosen.parent not in (None, before):
        raise MismatchError(
            f"the given manifest was condensed from manifest {chosen.parent}, stage {number - 1} of this run trained "
            f"on {before}; condense again with that one as --previous"
        )
    state.write_manifest(folder, path, chosen)
