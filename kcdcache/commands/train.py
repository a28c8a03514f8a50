"""`fit`: train a teacher or baseline on labels. `train`: train a student from a store or exported set (Algorithm 1)."""

import logging
from pathlib import Path

from kcdcache.commands import Result
from kcdcache.condensation import manifest, schedule
from kcdcache.condensation.manifest import Manifest
from kcdcache.datasets.datasets import Dataset
from kcdcache.export import condensed_set
from kcdcache.export.condensed_set import load_data
from kcdcache.methods import catalogue
from kcdcache.progress import Progress, silent
from kcdcache.report import show
from kcdcache.runs import state
from kcdcache.runs.state import Summary
from kcdcache.settings import FitCommand, FitSettings, TrainCommand, TrainSettings
from kcdcache.store import reader
from kcdcache.teacher.teacher import Teacher, load_again
from kcdcache.training import distill, evaluation, processes, requery
from kcdcache.training import fit as fitting
from kcdcache.training.sampling import SAMPLING

logger = logging.getLogger(__name__)

FEW_VIEWS = (
    "note: %d cached views for %d epochs; fewer than a third of the epochs is known to cost accuracy "
    "(add some with `kcdcache precompute --views N` on the same store)"
)


def fit(command: FitCommand, progress: Progress = silent, dry_run: bool = False) -> Result:
    """Train a teacher or a baseline; return its summary, or with `dry_run` the plan."""
    data = load_data(command.data)
    settings = fit_settings_of(command, data)
    if dry_run:
        return {
            "would": "fit",
            "model": command.model,
            "samples": len(data.train),
            "steps": len(processes.batch_sizes(len(data.train), settings.batch_size)) * settings.epochs,
            "out": str(command.out),
            **data.corrupted(),
        }
    return fit_on(command, data, progress).document()


def fit_settings_of(command: FitCommand, data: Dataset) -> FitSettings:
    """Return a run's settings; for digits, with their usual views."""
    return command.training.model_copy(update=data.usual_views(command.given))


def fit_on(command: FitCommand, data: Dataset, progress: Progress = silent) -> Summary:
    """Train a network on loaded data; return its summary."""
    with processes.group_of() as group:
        return fitting.run(
            fit_settings_of(command, data),
            data=data,
            model=command.model,
            out=command.out,
            group=group,
            machine=command.machine,
            progress=progress,
        )


def run(command: TrainCommand, progress: Progress = silent, dry_run: bool = False) -> Result:
    """Run Algorithm 1 or a part of it; return the summary, or with `dry_run` the stages and their expected cost."""
    data = load_data(command.data or f"condensed:{command.condensed}")
    if dry_run:
        settings, material = _prepared(command, data)
        return _planned_stages(settings, material, command.out)
    return train_on(command, data, progress).document()


def train_on(
    command: TrainCommand, data: Dataset, progress: Progress = silent, given: Manifest | None = None
) -> Summary | distill.Stopped:
    """Train a student on loaded data, starting from the condensed set `given` if it is not the command's."""
    settings, material = _prepared(command, data, given)
    with processes.group_of() as group:
        return distill.run(
            settings,
            material,
            out=command.out,
            until=command.until,
            group=group,
            machine=command.machine,
            progress=progress,
        )


def _prepared(
    command: TrainCommand, data: Dataset, given: Manifest | None = None
) -> tuple[TrainSettings, distill.Material]:
    """Return a run's settings and what the student learns from; note few views."""
    settings = settings_of(command)
    material = _material(command, settings, data, given)
    if 3 * material.knowledge.views < settings.epochs and settings.method != "ce":
        logger.warning(FEW_VIEWS, material.knowledge.views, settings.epochs)
    return settings, material


def settings_of(command: TrainCommand) -> TrainSettings:
    """Return a run's settings; defaults are those of the method's authors, and one stage for exported sets."""
    asked, given = command.training, command.training.model_fields_set
    authors = catalogue.recipe(asked.method, asked.student)
    changed = {key: value for key, value in authors.items() if key not in given}
    if changed:
        listed = ", ".join(f"{key} {value}" for key, value in changed.items())
        logger.info("train: the authors' settings of %s for %s: %s", asked.method, asked.student, listed)
    if "stages" in given:
        return asked.model_copy(update=changed)
    stages = 1 if command.condensed is not None else schedule.fitting_stages(asked.epochs)
    if command.condensed is None and stages != type(asked).model_fields["stages"].default:
        logger.info("train: %d stages, which divide %d epochs (--stages)", stages, asked.epochs)
    return asked.model_copy(update=changed | {"stages": stages})


def _material(
    command: TrainCommand, settings: TrainSettings, data: Dataset, given: Manifest | None = None
) -> distill.Material:
    """Open the knowledge for some data: a store, with or without a manifest, or an exported set."""
    places = (command.store, command.manifest, command.condensed)
    show.require_ids((path for path in places if path), command.expect_id)
    knowledge: reader.Store
    mixes = None
    if command.condensed is not None:
        opened = condensed_set.open(command.condensed)
        knowledge, given, mixes = opened.knowledge, opened.manifest, opened.mixes
        if mixes is not None:
            condensed_set.require_served(opened, settings, catalogue.weights_of(settings))
    else:
        assert command.store is not None
        knowledge = reader.open(command.store)
        if command.manifest is not None:
            given = manifest.read(_file_of(command.manifest), knowledge.count)
        given = None if given is None else distill.accept(given, knowledge, command.transfer)
    return distill.Material(
        data=data,
        knowledge=knowledge,
        given=given,
        teacher=_asked_teacher(command, settings, data, knowledge),
        requeried=(requery.path_for(_file_of(command.manifest)),) if command.manifest else (),
        baked=mixes,
    )


def _file_of(chosen: Path) -> Path:
    """Return a manifest's file: the final one of a run for its folder."""
    return state.condensed_set(chosen) if (chosen / "run.json").exists() else chosen


def _asked_teacher(
    command: TrainCommand, settings: TrainSettings, data: Dataset, knowledge: reader.Store
) -> Teacher | None:
    """Return the teacher if one is given and --mix-target requery or fidelity needs it, or None."""
    compared = evaluation.fidelity_wanted(settings, data, knowledge)
    if command.teaching.teacher is None:
        return None
    if settings.mix_target != "requery" and not compared:
        logger.info("train: --teacher is not used; only --mix-target requery and --fidelity on need it")
        return None
    found = load_again(command.teaching, data, knowledge.knowledge, knowledge.path, command.machine)
    if compared:
        requery.require_own(found, knowledge)
    return found


def _planned_stages(settings: TrainSettings, material: distill.Material, out: Path) -> Result:
    count = material.knowledge.knowledge.data.count
    usable = count - len(material.knowledge.skipped)
    stages = distill.planned(settings, material)
    share = settings.sample_share if SAMPLING[settings.sampling].partial else 1.0
    return {
        "would": "train",
        "out": str(out),
        # an upper bound for infobatch, which skips samples that turn out to be easy
        "relative_cost": share * schedule.expected_cost(stages, count, settings.epochs),
        "stages": [
            {
                "stage": stage.number,
                "epochs": f"{stage.start + 1}-{stage.stop}",
                "keep": stage.keep,  # unrounded: `condense --keep` with it gives the run's own bytes
                "samples": min(schedule.kept_count(stage.keep, count), usable),
                "source": stage.source,
            }
            for stage in stages
        ],
        **material.data.corrupted(),
    }
