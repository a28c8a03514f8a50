"""The Python API: the functions behind the commands, for data, networks and sets that are Python objects.

`import kcdcache as kc` gives them as `kc.data`, `kc.fit`, `kc.precompute`, `kc.train`, `kc.condense`, `kc.evaluate`,
`kc.loader` and `kc.points`. Settings are keyword arguments with the names of the flags.
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field
from torch import nn

from kcdcache.commands import checks
from kcdcache.commands import precompute as precomputing
from kcdcache.commands import train as training
from kcdcache.commands.evaluate import Evaluation
from kcdcache.commands.evaluate import evaluate as measured
from kcdcache.condensation import manifest, summary, value_files
from kcdcache.condensation.manifest import Manifest, Samples
from kcdcache.datasets import torch_datasets
from kcdcache.datasets.datasets import Dataset
from kcdcache.environment import torchrun_place
from kcdcache.errors import MismatchError, NotFoundError, SettingsError
from kcdcache.export.condensed_set import load_data
from kcdcache.files import cloud
from kcdcache.methods.base import Batch
from kcdcache.networks import registry
from kcdcache.networks.catalogue import SAVED_NAMES
from kcdcache.networks.input_transform import InputTransform, resolve_device, use_threads
from kcdcache.networks.weights import load_into, load_network
from kcdcache.progress import Progress, silent
from kcdcache.runs import state
from kcdcache.runs.folder import RunFolder
from kcdcache.settings import (
    CondenseSettings,
    FitCommand,
    PrecomputeCommand,
    Settings,
    TrainCommand,
    make,
    with_presets,
)
from kcdcache.store import reader
from kcdcache.store.reader import Store
from kcdcache.teacher import teacher as teachers
from kcdcache.training import batches

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=Settings)
Place = str | Path
"""a path, or the URL of an object in a bucket"""
Network = str | nn.Module | Callable[..., nn.Module]


@dataclass(frozen=True)
class Run:
    """A run folder of `fit` or `train`: its results, and what it made."""

    folder: Path

    @property
    def summary(self) -> state.Summary:
        """Results; raises UnfinishedError before the run's end."""
        return state.read_summary(self.folder)

    @property
    def metrics(self) -> list[state.MetricsRow]:
        """One row per epoch."""
        return state.read_metrics(self.folder)

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last epoch, in [0, 1]."""
        return self.summary.accuracy_last

    @property
    def values(self) -> Path:
        """File of the value of each sample, as last recorded; raises MismatchError for a `fit`, which has none."""
        found = RunFolder(path=self.folder).values
        if not found.exists():
            raise MismatchError(f"the run in {self.folder} has no values: only `train` records them, after an epoch")
        return found

    @property
    def condensed(self) -> Path:
        """File of the final condensed set; raises UnfinishedError before the run's end, MismatchError for a `fit`."""
        self.summary  # noqa: B018  # raises unless the run is finished
        return state.condensed_set(self.folder)

    @property
    def student(self) -> nn.Module:
        """The trained network on the CPU in eval mode, with its input's `mean`, `std` and `size` as attributes.

        It takes normalised images: (pixels in [0, 1] - mean) / std. A network that was given as a Python object can be
        made in the process that was given it; SettingsError elsewhere.
        """
        for name in SAVED_NAMES:
            if (self.folder / f"{name}.json").exists():
                return _loaded(self.folder, name)
        raise NotFoundError(f"no network is saved in {self.folder}; a run saves one at its end")

    def __repr__(self) -> str:
        told = ", ".join(f"{name} {value}" for name, value in self._shown().items())
        return f"Run({str(self.folder)!r}: {told})"

    def _repr_html_(self) -> str:
        cells = {"run": str(self.folder), **self._shown()}
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in cells.items())
        return f"<table>{rows}</table>"

    def _shown(self) -> dict[str, str]:
        if not (self.folder / "summary.json").exists():
            return {"state": "not finished; the same call resumes it"}
        found = self.summary
        shown = {"network": found.model, "accuracy": f"{found.accuracy_last:.2%}", "cost": f"{found.relative_cost:.3f}"}
        if found.kept is not None:
            shown |= {"method": str(found.method), "condensed set": f"{found.kept:,} of {found.count:,} samples"}
        return shown


def data(spec: Place | None = None, *, train: Any = None, test: Any = None, **options: Any) -> Dataset:
    """Return the data set of a spec such as `cifar100` or `folder:photos`, or of two Python datasets.

    `train` and `test` are map-style datasets: torch's, torchvision's, or splits of Hugging Face `datasets`; for what
    they may hold, and the options `classes`, `mean`, `std`, `image` and `label`, see `torch_datasets.load`. They are
    read into memory once.

    Raises SettingsError unless there is a spec or two datasets, and what the loaders raise.
    """
    if (spec is None) == (train is None or test is None) or (spec is not None and (options or train or test)):
        raise SettingsError('kc.data takes a spec, as in kc.data("folder:photos"), or datasets: train= and test=')
    if spec is not None:
        return load_data(cloud.opened(str(spec)))
    return torch_datasets.load(train, test, **options)


def fit(model: Network, data: Dataset | str, out: Place, *, progress: Progress = silent, **settings: Any) -> Run:
    """Train a network on labels into the folder `out`, as a teacher or a baseline, or continue; return the run.

    `model` is a network's name, or a function that makes an nn.Module (see `registry.call`). Settings are those of
    `kcdcache fit`.
    """
    known = _data(data)
    given = {"data": known.name, "model": _network(model, known, "model"), "out": out, **settings}
    command = _command(FitCommand, "kc.fit(...)", given)
    training.fit_on(command, known, progress)
    return Run(command.out)


def precompute(
    teacher: Network | Run,
    data: Dataset | str,
    store: Place,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    teacher_size: int | None = None,
    progress: Progress = silent,
    **settings: Any,
) -> Store:
    """Run a teacher once over the views of all training images into a store, or continue; return the store.

    `teacher` is an nn.Module that gives logits, a run of `fit` or `train`, its folder, or a network's name with
    `weights=FILE`. `mean`, `std` (per channel, of pixels in [0, 1]) and `teacher_size` (pixels) are its input's; those
    that the module has as attributes `mean` and `std`, or in timm's `pretrained_cfg`, if unset, and else the data's.
    The store knows a module by its weights and by its class and code (see `registry.name_of`): the same one continues
    it. Settings are those of `kcdcache precompute`.

    Raises MismatchError if the store is of another teacher, of other data or views.
    """
    if torchrun_place().total > 1:
        raise SettingsError(
            "kc.precompute is work for one process; under torchrun use `torchrun -m kcdcache precompute`"
        )
    known, own = _data(data), isinstance(teacher, nn.Module)
    name = registry.name_of(teacher) if isinstance(teacher, nn.Module) else _teacher_name(teacher)
    inputs = {} if own else {"teacher_mean": mean, "teacher_std": std, "teacher_size": teacher_size}
    given = {key: value for key, value in inputs.items() if value is not None} | settings
    command = _command(
        PrecomputeCommand, "kc.precompute(...)", {"data": known.name, "teacher": name, "store": store, **given}
    )
    probabilities, precision = bool(command.from_probabilities), command.precompute.teacher_precision
    if isinstance(teacher, nn.Module):
        use_threads(command.machine.threads)
        transform = _transform(teacher, known, mean, std, teacher_size)
        device = resolve_device(command.machine.device)
        frozen = teachers.freeze(teacher, transform, name, known.classes, device, precision, probabilities)
    else:
        checks.require_present(command)
        frozen = teachers.load_named(command.teaching, known, precision, command.machine, probabilities)
    precomputing.store_with(command, known, frozen, progress)
    return reader.open(command.store)


def train(
    student: Network,
    data: Dataset | str,
    store: Store | Place,
    out: Place,
    *,
    condensed: Manifest | Run | Place | None = None,
    progress: Progress = silent,
    **settings: Any,
) -> Run:
    """Train a student from a store into the folder `out`, condensing between stages, or continue; return the run.

    `student` is a network's name, or a function that makes an nn.Module (see `registry.call`): a run makes it with
    its own seed. `condensed` is the set to start from: of another run, read by `kc.condense`, or a file; all samples
    if unset. Settings are those of `kcdcache train`.

    Raises MismatchError if store, data and condensed set do not belong together.
    """
    known = _data(data)
    names = {"data": known.name, "student": _network(student, known, "student"), "store": _place(store), "out": out}
    kept = condensed.condensed if isinstance(condensed, Run) else condensed
    given = kept if isinstance(kept, Manifest) else None
    names |= {"manifest": kept} if kept is not None and given is None else {}
    command = _command(TrainCommand, "kc.train(...)", {**names, **settings})
    training.train_on(command, known, progress, given)
    return Run(command.out)


def evaluate(
    network: nn.Module | Run | Place,
    data: Dataset | str,
    *,
    store: Store | Place | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **settings: Any,
) -> Evaluation:
    """Return a network's accuracy, loss and calibration on test and training images, without augmentation.

    `network` is an nn.Module that gives logits (`mean` and `std` as for `precompute`), a run, its folder, or a
    network's name with `weights=FILE`. With a `store` of this data, also its agreement with the teacher's stored
    outputs. Further settings as for `kcdcache.commands.evaluate.evaluate`, whose errors it raises.
    """
    known, knowledge = _data(data), None if store is None else _store(store)
    if isinstance(network, nn.Module):
        shown = _transform(network, known, mean, std, None)
        return measured(network, known, store=knowledge, mean=shown.mean, std=shown.std, **settings)
    given: dict[str, Any] = {} if mean is None or std is None else {"mean": tuple(mean), "std": tuple(std)}
    place = network.folder if isinstance(network, Run) else str(cloud.opened(str(network)))
    return measured(place, known, store=knowledge, **given, **settings)


def condense(
    values: Run | Place,
    store: Store | Place,
    *,
    keep: float,
    previous: Manifest | Run | Place | None = None,
    stage: int | None = None,
    out: Place | None = None,
    **settings: Any,
) -> Manifest:
    """Return the condensed set of floor(keep N) samples that values give, and write it to `out` if that is given.

    `values` is a run or a values file; `previous` the set on which they were last updated, all samples if unset;
    `stage` that of `previous` plus one. Settings are those of `kcdcache condense`. What does not fit in memory is work
    for the command.

    Raises MismatchError if values or the previous set are of other knowledge, LockedError if `out` is another set.
    """
    opened = _store(store)
    if not 0 < keep <= 1:
        raise SettingsError(f"keep in kc.condense(...) is a fraction above 0 and at most 1; found {keep}")
    rules = make(CondenseSettings, _without_preset(settings), "kc.condense(...)")
    source = value_files.read(_place(values.values if isinstance(values, Run) else values), opened.count)
    if source.document is not None and source.document["knowledge_id"] != opened.knowledge_id:
        raise MismatchError(
            f"the values were measured on knowledge {source.document['knowledge_id']}, the store at {opened.path} "
            f"holds {opened.knowledge_id}; give the values' own store"
        )
    before = None if previous is None else _set(previous, opened)
    stage = stage if stage is not None else 1 if before is None else before.stage + 1
    draft = summary.plan(source, rules, _samples(opened), stage=stage, keep=keep, previous=before).draft(source)
    made = draft.held()
    if out is not None:
        manifest.write(_place(out), made)
    return made


def loader(
    data: Dataset | str,
    store: Store | Place,
    condensed: Manifest | Run | Place | None = None,
    *,
    epoch: int,
    batch_size: int = 64,
    seed: int = 0,
    device: str = "cpu",
    **settings: Any,
) -> Iterator[Batch]:
    """Yield the batches of one epoch of a condensed set (of all samples if unset), with the teacher's outputs on them.

    `epoch` (from 0) decides the order and the view; `seed` in [0, 2^64) is that of the order. Each batch has `pixels`
    in [0, 1] (batch, channels, height, width), `labels`, the teacher's `probabilities` at the `temperature`, its
    `knowledge` by field, and `weight`. Settings: `fields` (those to read, "logits" alone if unset), `temperature` (1 if
    unset), `mix` and `target` of mixed samples, see `batches.Mixing`; `cached_views` and `memory_gb` as for `train`.
    """
    with _connected(data, store, condensed, settings) as source:
        yield from batches.iterate(source, epoch, batch_size=batch_size, seed=seed, device=resolve_device(device))


def points(
    data: Dataset | str,
    store: Store | Place,
    condensed: Manifest | Run | Place | None = None,
    *,
    seed: int = 0,
    **settings: Any,
) -> batches.KnowledgePoints:
    """Return a condensed set's points (all samples if unset) as a map-style dataset for torch's DataLoader.

    Do not shuffle; call `set_epoch` before each epoch, also with workers that stay. Settings as for `loader`.
    """
    stack = ExitStack()
    found = batches.KnowledgePoints(stack.enter_context(_connected(data, store, condensed, settings)), seed=seed)
    weakref.finalize(found, stack.close)
    return found


def open_run(folder: Place) -> Run:
    """Return the run in a folder; raises NotFoundError if there is none."""
    path = cloud.open_path(str(folder))
    if not RunFolder(path=path).settings.exists():
        raise NotFoundError(f"no run in {path}: it has no run.json; give a folder that `fit` or `train` wrote")
    return Run(path)


def open_store(folder: Place) -> Store:
    """Return the sealed store in a folder; raises NotFoundError or UnfinishedError if there is none, or not yet."""
    return reader.open(cloud.open_path(str(folder)))


def open_condensed(file: Place | Run) -> Manifest:
    """Return the condensed set of a file or of a finished run."""
    return manifest.read(file.condensed if isinstance(file, Run) else cloud.open_path(str(file)))


def _command(kind: type[S], source: str, values: Mapping[str, Any]) -> S:
    """Return a command's settings from keyword arguments, checked as those of the command line are."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    made = make(kind, {key: cloud.opened(value) for key, value in plain.items() if value is not None}, source)
    checks.require_consistent(made)
    return made


def _without_preset(settings: Mapping[str, Any]) -> dict[str, Any]:
    completed = dict(with_presets(CondenseSettings, settings))
    completed.pop("preset", None)
    return completed


def _data(given: Dataset | str) -> Dataset:
    return given if isinstance(given, Dataset) else data(given)


def _network(given: Network, known: Dataset, what: str) -> str:
    """Return the name of a network for this data; a function that makes one gets a name."""
    if isinstance(given, str):
        return given
    if isinstance(given, nn.Module):
        raise SettingsError(
            f"{what} should be a name or a function that makes the network, so that the run's seed decides its "
            f"weights; found a {type(given).__name__} object: give `lambda: {type(given).__name__}(...)`"
        )
    if not callable(given):
        raise SettingsError(f"{what} should be a network's name or a function that makes one; found {given!r:.80}")
    return registry.adopt(given, len(known.classes), len(known.mean))


def _teacher_name(given: Any) -> str:
    if isinstance(given, Run):
        return str(given.folder)
    if isinstance(given, str | Path):
        return str(cloud.opened(str(given)))
    raise SettingsError(
        f"teacher should be an nn.Module with trained weights, a run, its folder, or a network's name; "
        f"found {given!r:.80}"
    )


def _transform(
    module: nn.Module, known: Dataset, mean: Sequence[float] | None, std: Sequence[float] | None, size: int | None
) -> InputTransform:
    """Return the input transform of a module: given, its own, timm's, or the data's."""
    if (mean is None) != (std is None):
        raise SettingsError("mean and std belong together: give both, one number a channel, or neither")
    timms = getattr(module, "pretrained_cfg", None) or {}
    own = tuple(getattr(module, name, timms.get(name)) for name in ("mean", "std"))
    if not all(isinstance(numbers, tuple | list) for numbers in own):  # a tensor is the network's own first layer
        own = (None, None)
    chosen = (mean, std) if mean is not None else own if None not in own else (known.mean, known.std)
    if mean is None and None in own:
        logger.warning(
            "no mean and std are known of %s: its images are normalised by the data's; give mean= and std=",
            type(module).__name__,
        )
    means, stds = (tuple(float(value) for value in numbers) for numbers in chosen)  # type: ignore[union-attr]
    known_size = getattr(module, "size", None)
    return InputTransform(means, stds, size or (known_size if isinstance(known_size, int) else None))


def _loaded(folder: Path, name: str) -> nn.Module:
    record, weights = load_network(folder, name)
    network = registry.build(record.architecture, len(record.classes), channels=record.channels)
    load_into(network, weights, str(folder))
    shown = record.transform
    network.mean, network.std, network.size = shown.mean, shown.std, shown.size  # type: ignore[assignment]
    return network.eval()


def _place(given: Store | Place) -> Path:
    return given.path if isinstance(given, Store) else cloud.open_path(str(given))


def _store(given: Store | Place) -> Store:
    return given if isinstance(given, Store) else open_store(given)


def _set(given: Manifest | Run | Place | None, knowledge: Store) -> Manifest:
    """Return a condensed set for a store, that of all samples for None."""
    if given is None:
        return manifest.full(_samples(knowledge))
    found = given if isinstance(given, Manifest) else open_condensed(given)
    manifest.require_knowledge(found, knowledge.knowledge_id)
    return found


def _samples(knowledge: Store) -> Samples:
    facts = knowledge.knowledge.data
    return Samples(
        knowledge.knowledge_id, knowledge.count, classes=len(facts.classes), data_digest=facts.digest,
        excluded=knowledge.skipped,
    )  # fmt: skip


def _connected(
    given: Dataset | str, store: Store | Place, condensed: Manifest | Run | Place | None, settings: Mapping[str, Any]
) -> AbstractContextManager[batches.Source]:
    """Return what connects data, store and condensed set; raises SettingsError for an unknown setting."""
    knowledge = _store(store)
    asked = make(LoaderSettings, settings, "kc.loader(...) or kc.points(...)")
    mixing = batches.Mixing(mix=asked.mix, target=asked.target, temperature=asked.temperature)
    return batches.connect(
        _data(given),
        knowledge,
        _set(condensed, knowledge),
        fields=asked.fields,
        mixing=mixing,
        memory_bytes=asked.memory_gb * 10**9,
        cached_views=asked.cached_views,
    )


class LoaderSettings(batches.Mixing):
    """What `loader` and `points` read, beside how mixed points are made."""

    fields: tuple[str, ...] = ("logits",)
    """teacher's outputs to read"""
    cached_views: int | None = Field(default=None, ge=1)
    """number of views used; all if unset"""
    memory_gb: float = Field(default=8, gt=0)
    """memory for the teacher's outputs in GB"""
