"""Algorithm 1: train a stage, condense, next stage; the only place where training and condensation meet."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from kcdcache import progress
from kcdcache.condense import manifest, schedule, summary, value_files
from kcdcache.condense.manifest import Manifest, require_knowledge
from kcdcache.condense.schedule import Stage
from kcdcache.data.datasets import Dataset
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.files import cloud, timing
from kcdcache.methods import registry as methods_registry
from kcdcache.networks import registry as networks_registry
from kcdcache.networks.input_transform import resolve_device, use_threads
from kcdcache.progress import Progress, silent
from kcdcache.runs import state
from kcdcache.runs.folder import RunFolder
from kcdcache.runs.state import load_checkpoint, read_record, read_summary, write_manifest
from kcdcache.settings import TrainSettings, recorded
from kcdcache.store import check, identity, reader
from kcdcache.store.reader import Store
from kcdcache.teacher.teacher import Teacher
from kcdcache.training import batches, evaluation, requery
from kcdcache.training.processes import ALONE, Group
from kcdcache.training.stage import Lessons, run_stage, views_used

logger = logging.getLogger(__name__)


def place(folder: RunFolder, stages: Sequence[Stage], knowledge_id: str, chosen: Manifest) -> None:
    """Make a manifest condensed by hand the one of the stage that begins now; one placed before stays where it is.

    Raises:
        SettingsError: the run is inside a stage, or has another manifest for this one.
        MismatchError: the manifest is of other knowledge, or was made from another stage before; prints both ids.
    """
    manifest.require_knowledge(chosen, knowledge_id)
    if _has_placed(folder, stages, chosen):  # the command that placed it is run again, to resume
        return
    done = finished_epochs(folder)
    starting = [stage for stage in stages if stage.start == done]
    if not starting:
        raise SettingsError(
            f"the run stands at epoch {done}, inside a stage; a manifest can be given only where a stage begins: "
            f"{', '.join(str(stage.start) for stage in stages)}"
        )
    number = starting[0].number
    if chosen.stage != number:
        raise SettingsError(
            f"the run stands at the start of stage {number}, the given manifest is for stage {chosen.stage}; condense "
            f"with --stage {number}, or with the manifest of stage {number - 1} as --previous"
        )
    path = folder.manifest(number)
    if folder.stands(path):
        raise SettingsError(f"stage {number} of this run has another manifest already: {path}")
    before = manifest.read(folder.manifest(number - 1)).digest if number else None
    if chosen.parent not in (None, before):
        raise MismatchError(
            f"the given manifest was condensed from manifest {chosen.parent}, stage {number - 1} of this run trained "
            f"on {before}; condense again with that one as --previous"
        )
    write_manifest(folder, path, chosen)


def _has_placed(folder: RunFolder, stages: Sequence[Stage], chosen: Manifest) -> bool:
    for stage in stages:
        path = folder.manifest(stage.number)
        if folder.stands(path) and manifest.read(path).digest == chosen.digest:
            logger.info("train: the given set is that of stage %d already", stage.number)
            return True
    return False


def finished_epochs(folder: RunFolder) -> int:
    """Return how many epochs of a run are behind it, by its checkpoint."""
    found = load_checkpoint(folder)
    return int(found[1]["epoch"]) if found else 0


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a student learns from: open store, its data, and perhaps a given condensed set and the teacher itself."""

    data: Dataset
    knowledge: reader.Store
    given: Manifest | None = None
    """condensed set of an earlier run, or None for everything"""
    teacher: Teacher | None = None
    """needed for mix_target = requery, and to measure agreement on test images"""
    requeried: tuple[Path, ...] = ()
    """stores of the teacher's outputs on mixes, made before; used where they fit"""
    baked: Path | None = None
    """store of the targets of `given`'s mixes, made at the run's temperature; used instead of mixing"""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run while it goes on."""

    settings: TrainSettings
    material: Material
    folder: RunFolder
    device: torch.device
    stages: tuple[schedule.Stage, ...]
    views: int
    """cached views the run cycles through: those of its beginning, should the store have grown since"""
    fields: tuple[str, ...]
    """the teacher's fields it reads"""
    group: Group
    """the processes that train it; only the first of them writes"""
    progress: progress.Progress


def run(
    settings: TrainSettings,
    material: Material,
    *,
    out: Path,
    until: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    allow_env_change: bool = False,
    group: Group = ALONE,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train a student through all stages into the folder `out`, or continue; return the summary.

    With `until`, stops once that many epochs are finished and returns a summary with `finished` false; the same call
    without it continues. `material.given` is the condensed set a new run starts from (reuse); for a run that stands at
    the start of a stage it is that stage's manifest, instead of one condensed here. All processes of a `group` call
    this with the same arguments.

    Raises:
        SettingsError: the settings contradict each other or the run already in the folder.
        MismatchError: store, data and condensed set were not made for each other, or the store lacks a field.
        NonFiniteError: the loss diverged.
    """
    check.check_data(material.knowledge, material.data)
    if material.given is not None:
        manifest.require_usable(material.given, material.knowledge.skipped)
    # before a folder is made for it
    networks_registry.require_known(settings.student, len(material.data.classes), len(material.data.mean))
    fields = methods_registry.reads(settings, settings.student, material.knowledge.knowledge, material.data)
    methods_registry.require_fields(fields, identity.held(material.knowledge), settings, settings.student)
    folder = RunFolder(path=out)
    material, following = _sorted_out(material, folder)
    views = _views(settings, material, folder)
    document, inputs = _record(settings, material, views, fields)
    finished = folder.stands(folder.summary)
    group.wait()  # all have read what lies there before the first writes
    if finished:
        if group.first:
            state.start(folder, document, inputs)
        logger.info("train: %s is finished already", out)
        return evaluation.asked_later(settings, material, folder, device, group.first)
    going = _Run(
        settings=_as_reuse(settings, material),
        material=material,
        folder=folder,
        device=resolve_device(device),
        stages=planned(settings, material),
        views=views,
        fields=fields,
        group=group,
        progress=progress,
    )
    session = state.session(
        folder, document, inputs, device=going.device, threads=threads, allow_env_change=allow_env_change,
        processes=group.world,
    )  # fmt: skip
    with session if group.first else nullcontext():
        if group.first:
            _keep_given(going)
            if following is not None:
                place(folder, going.stages, material.knowledge.knowledge_id, following)
        else:
            use_threads(threads)
        group.wait()
        return _advance(going, settings.epochs if until is None else min(until, settings.epochs))


def _sorted_out(material: Material, folder: RunFolder) -> tuple[Material, Manifest | None]:
    """Return the material the run began with, and the manifest of its next stage if that is what was given."""
    if material.given is None or not folder.settings.exists():
        return material, None
    began_with = read_record(folder)["inputs"]["given"]
    if began_with == material.given.digest:
        return material, None
    first = manifest.read(folder.given) if began_with else None
    return replace(material, given=first), material.given


def _keep_given(going: _Run) -> None:
    """Keep the set a run began with beside it: stage 0 may train on a part of it only."""
    folder = going.folder
    if going.material.given is not None and not folder.stands(folder.given):
        write_manifest(folder, folder.given, going.material.given)


def _views(settings: TrainSettings, material: Material, folder: RunFolder) -> int:
    """Return the number of views the run began with, or for a new one those asked for, or all there are.

    Raises:
        SettingsError: more are asked for than the store has.
    """
    held = material.knowledge.views
    if (asked := settings.cached_views) is not None and asked > held:
        raise SettingsError(
            f"--cached-views {asked}: the store at {material.knowledge.path} has {held}; precompute more"
        )
    held = asked or held
    if not folder.settings.exists():
        return held
    began_with = int(read_record(folder)["inputs"].get("views", held))
    return min(began_with, held)


def _advance(going: _Run, until: int) -> dict[str, Any]:
    """Train stage after stage up to epoch `until`; what is finished already is passed over."""
    done = finished_epochs(going.folder)
    for stage in going.stages:
        if stage.start >= until:
            break
        # a kill may fall between a stage's last checkpoint and its values, which are its last file
        if stage.stop > done or not going.folder.stands(going.folder.stage_values(stage.number)):
            done = _teach(going, stage, until)
    if done < going.settings.epochs:
        logger.info("train: stopped at epoch %d of %d; the same command continues", done, going.settings.epochs)
        told = {"finished": False, "epochs_done": done, "epochs": going.settings.epochs, "run": str(going.folder.path)}
        return told | {"images_per_second": timing.document(timing.logged(going.folder.timing))}
    return _by_first(going, lambda: _finish(going))


def _teach(going: _Run, stage: schedule.Stage, until: int) -> int:
    current = _by_first(going, lambda: _manifest_for(going, stage))
    logger.info("stage %d: epochs %d to %d on %d samples", stage.number, stage.start, stage.stop - 1, len(current))
    settings = going.settings
    clock = schedule.stretched(going.stages, settings.epochs).tolist() if settings.clock == "samples" else None
    pupil = run_stage(
        settings,
        Lessons(
            number=stage.number,
            start=stage.start,
            stop=stage.stop,
            views=going.views,
            manifest=current,
            requeried=_by_first(going, lambda: _requery(going, stage, current)),
        ),
        data=going.material.data,
        knowledge=going.material.knowledge,
        folder=going.folder,
        device=going.device,
        until=until,
        clock=clock,
        group=going.group,
        progress=going.progress,
    )
    return pupil.epoch


def _by_first(going: _Run, work: Callable[[], T]) -> T:
    """Return what some work gives: of several processes the first does it, and the others find it done."""
    if going.group.first:
        made = work()
        going.group.wait()
        return made
    going.group.wait()
    cloud.refresh(going.folder.path)
    return work()


def _manifest_for(going: _Run, stage: schedule.Stage) -> Manifest:
    """Return the stage's manifest: from disk if it was made before, else given, random, full or condensed."""
    path = going.folder.manifest(stage.number)
    if going.folder.stands(path):
        found = manifest.read(path)
        manifest.require_knowledge(found, going.material.knowledge.knowledge_id)
        return found
    made = MAKERS[stage.source](going, stage)
    write_manifest(going.folder, path, made)
    return made


def _full(going: _Run, stage: schedule.Stage) -> Manifest:
    data, knowledge = going.material.data, going.material.knowledge
    return manifest.full(
        knowledge.knowledge_id, knowledge.count, data.train.labels, len(data.classes),
        data_digest=knowledge.knowledge.data.digest, excluded=knowledge.skipped,
    )  # fmt: skip


def _given(going: _Run, stage: schedule.Stage) -> Manifest:
    assert going.material.given is not None
    return going.material.given


def _random(going: _Run, stage: schedule.Stage) -> Manifest:
    data, knowledge = going.material.data, going.material.knowledge
    return summary.random_stage(
        knowledge_id=knowledge.knowledge_id, count=knowledge.count, keep=stage.keep,
        seed=going.settings.condense_seed, labels=data.train.labels, classes=len(data.classes),
        previous=going.material.given, data_digest=knowledge.knowledge.data.digest, excluded=knowledge.skipped,
    )  # fmt: skip


def _condensed(going: _Run, stage: schedule.Stage) -> Manifest:
    """Condense the values at the end of the stage before (the E-step)."""
    identity = going.material.knowledge.knowledge.data
    return summary.condense(
        value_files.read(going.folder.stage_values(stage.number - 1), identity.count).values,
        going.settings,
        knowledge_id=going.material.knowledge.knowledge_id,
        count=identity.count,
        stage=stage.number,
        keep=stage.keep,
        labels=going.material.data.train.labels,
        classes=len(identity.classes),
        previous=manifest.read(going.folder.manifest(stage.number - 1)),
        data_digest=identity.digest,
        excluded=going.material.knowledge.skipped,
    )


MAKERS = {"full": _full, "given": _given, "random": _random, "condensed": _condensed}
"""source of a stage's manifest -> how it is made"""


def _finish(going: _Run) -> dict[str, Any]:
    """Condense once more for export (facts.md A3), then write the summary, which marks the run finished."""
    if going.folder.stands(going.folder.summary):
        return read_summary(going.folder.path)
    settings, last = going.settings, going.stages[-1]
    keep = schedule.export_keep(settings.stages, settings.keep, _base(settings, going.material))
    exported = going.folder.manifest(last.number)
    if keep is not None:
        closing = schedule.Stage(last.number + 1, settings.epochs, settings.epochs, keep, "condensed")
        exported = going.folder.manifest(closing.number)
        _manifest_for(going, closing)
    summary = _summary(going, exported)
    state.write_summary(going.folder, summary)
    return summary


def _summary(going: _Run, exported: Path) -> dict[str, Any]:
    rows = (load_checkpoint(going.folder) or ({}, {"rows": []}))[1]["rows"]
    knowledge = going.material.knowledge
    requeries = sum(
        (made := reader.open(path)).count * made.views
        for path in sorted(going.folder.path.glob("stages/*/*.requery"))
        if path.is_dir()
    )
    return state.outcome(rows, knowledge.knowledge.data.count, going.settings.epochs) | {
        "kind": "train",
        "finished": True,
        "model": going.settings.student,
        "method": going.settings.method,
        "knowledge_id": knowledge.knowledge_id,
        "teacher_forwards": requeries,
        "store_teacher_forwards": knowledge.count * knowledge.views,
        "rows_read": sum(row["rows_read"] for row in rows),
        "bytes_read": sum(row["bytes_read"] for row in rows),
        "kept": len(manifest.read(exported)),
        "condensed_set": str(exported.relative_to(going.folder.path)),
        "seconds": state.seconds_spent(going.folder),
        "images_per_second": timing.document(timing.logged(going.folder.timing)),
        **evaluation.of_run(going.settings, going.material, going.folder, going.device),
    }


def _requery(going: _Run, stage: schedule.Stage, current: Manifest) -> Path | None:
    """Run the teacher on the stage's mixes in the views it will use, unless that is done or not asked for."""
    needs = identity.per_sample(going.fields)
    if going.material.baked is not None:
        return going.material.baked if needs and current.mixed.any() else None
    if going.settings.mix_target != "requery" or not needs or not current.mixed.any():
        return None
    knowledge, teacher = going.material.knowledge, going.material.teacher
    path = requery.path_for(going.folder.manifest(stage.number))
    mixing = batches.Mixing(mix=going.settings.mix)
    used = views_used(stage.start, stage.stop, going.views)
    for made in (path, *going.material.requeried):
        if requery.serves(made, current, mixing.mix, used, needs):
            return made
    if teacher is None:
        raise SettingsError(
            "mix_target 'requery' runs the teacher on mixed images: give --teacher (and --weights), or make them "
            "before with `kcdcache precompute --manifest`"
        )
    with batches.connect(going.material.data, knowledge, current, fields=(), mixing=mixing) as source:
        requery.write(source, teacher, knowledge, path, fields=needs, view_numbers=used, progress=going.progress)
    return path


def _base(settings: TrainSettings, material: Material) -> float:
    """Return the share of all samples a run starts from; a set condensed to `keep` counts as exactly that."""
    count = material.knowledge.count
    if material.given is None:
        return 1.0
    exact = schedule.kept_count(settings.keep, count) == len(material.given) < count
    return settings.keep if exact else len(material.given) / count


def planned(settings: TrainSettings, material: Material) -> tuple[schedule.Stage, ...]:
    """Return the stages that a run with these settings goes through.

    Raises:
        SettingsError: epochs is no multiple of stages, or more would be kept than is given.
    """
    return schedule.plan(settings.schedule, settings.epochs, settings.stages, settings.keep, _base(settings, material))


def _as_reuse(settings: TrainSettings, material: Material) -> TrainSettings:
    """Return the settings a reused set is condensed with: its own samples compete, nobody returns from outside it."""
    if material.given is None or settings.stages == 1:
        return settings
    logger.info("reuse: the candidates are the %d samples of the given set", len(material.given))
    return settings.model_copy(update={"candidates": "current"})


def _record(
    settings: TrainSettings, material: Material, views: int, fields: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return settings and inputs as run.json holds them: all that decides the run's bytes besides the environment."""
    knowledge = material.knowledge
    inputs = {
        "knowledge_id": knowledge.knowledge_id,
        "views": views,
        "encodings": {name: knowledge.fields[name].encoding.name for name in fields if name in knowledge.fields},
        "teacher_batch": knowledge.plan.batch_size,
        "test": material.data.test.digest(),
        "given": material.given.digest if material.given is not None else None,
        **({"skipped": knowledge.skipped.tolist()} if len(knowledge.skipped) else {}),
    }
    return recorded(settings), inputs


def accept(given: Manifest, knowledge: Store, transfer: bool) -> Manifest:
    """Return a condensed set bound to a store's knowledge: as it is, or with `transfer` rebound to another teacher's.

    Raises:
        MismatchError: the set was made for other knowledge and transfer is off, or for other data.
    """
    identity = knowledge.knowledge.data
    wanted = knowledge.knowledge_id
    require_knowledge(given, wanted, count=identity.count, data_digest=identity.digest, transfer=transfer)
    if given.knowledge_id == wanted:
        return given
    logger.info("transfer: a set condensed for knowledge %s is used with %s", given.knowledge_id[:12], wanted[:12])
    return replace(given, knowledge_id=wanted, parent=given.digest)
