"""Train a teacher or a plain baseline on hard labels."""

import logging
from pathlib import Path

from kcdcache.condensation import manifest
from kcdcache.datasets.datasets import Dataset
from kcdcache.files import run_files
from kcdcache.files.records import logged, logged_seconds
from kcdcache.methods import run_loss
from kcdcache.networks import registry as networks_registry
from kcdcache.progress import Progress, silent
from kcdcache.runs.folder import RunFolder
from kcdcache.runs.state import Inputs, Summary, outcome, read_summary, write_summary
from kcdcache.settings import FitSettings, MachineSettings, MethodSettings, recorded
from kcdcache.training import learner
from kcdcache.training.batches import Source
from kcdcache.training.loop import Loop
from kcdcache.training.processes import ALONE, DEFAULT_MACHINE, Group, session
from kcdcache.training.sampling import ALL, Sampler, require_enough
from kcdcache.views import rules

logger = logging.getLogger(__name__)


def run(
    settings: FitSettings,
    *,
    data: Dataset,
    model: str,
    out: Path,
    machine: MachineSettings = DEFAULT_MACHINE,
    group: Group = ALONE,
    progress: Progress = silent,
) -> Summary:
    """Train `model` on the data into the folder `out`, or continue; return the run's summary.

    The folder gets model.safetensors and model.json (usable as `--teacher`), metrics.jsonl and summary.json. All
    processes of a `group` call this with the same arguments; the first one writes. Raises SettingsError if the folder
    has a run with other settings or several processes cannot train with these, NonFiniteError if the loss diverged.
    """
    networks_registry.require_known(model, len(data.classes), len(data.mean))  # before a folder is made for it
    require_enough(ALL, settings.batch_size, len(data.train), group.world)
    folder = RunFolder(path=out)
    document = recorded(settings) | {"model": model}
    inputs = Inputs(data=data.identity().digest, test=data.test.digest())
    with session(folder, document, inputs, machine, group) as where:
        if where is None:
            logger.info("fit: %s is already finished", out)
            return read_summary(out)
        group.wait()
        weights = run_loss.weights_of(MethodSettings(method="ce"), settings.label_smoothing)
        pupil = learner.new_learner(model, data, settings, run_loss.Loss(weights, {}), where, group=group)
        source = _source(data, settings)
        sampler = Sampler(manifest=source.manifest, optimizer=settings)
        Loop(pupil, source, sampler, folder, progress=progress).run(settings.epochs)
        if group.first:
            _finish(pupil, data, settings, model, folder)
        group.wait()
    return read_summary(out)


def _source(data: Dataset, settings: FitSettings) -> Source:
    rule = rules.rule_from(settings, data.train.image_size)
    samples = manifest.Samples(data.identity().digest, len(data.train), data.train.labels, len(data.classes))
    return Source(data=data, rule=rule, views=rules.cycle(rule, settings.views), manifest=manifest.full(samples))


def _finish(pupil: learner.Learner, data: Dataset, settings: FitSettings, model: str, folder: RunFolder) -> None:
    """Write the network, then the summary, which marks the run as finished."""
    summary = Summary(
        **outcome(pupil.rows, len(data.train), settings.epochs).document(),
        kind="fit",
        model=model,
        teacher_forwards=0,
        seconds=logged_seconds(folder.timing),
        images_per_second=logged(folder.timing),
        **data.corrupted(),
    )
    with run_files.writing(folder.path, learner.files_of(pupil, folder, "model")):
        rule = rules.rule_from(settings, data.train.image_size)
        known = {"accuracy": summary.accuracy_last, "data": data.identity().digest}
        extra = known | learner.size_of_views(rule, data.train)
        learner.save(pupil, folder, "model", model, data, extra)
    write_summary(folder, summary)
