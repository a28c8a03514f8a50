"""`evaluate`: accuracy, loss and calibration of a network, and its agreement with a teacher's stored outputs."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from kcdcache.commands import Result, TextTable
from kcdcache.datasets.datasets import Dataset
from kcdcache.errors import MismatchError, SettingsError, printable
from kcdcache.export.condensed_set import load_data
from kcdcache.files.records import read_object
from kcdcache.networks.catalogue import saved_network
from kcdcache.networks.input_transform import InputTransform, resolve_device, use_threads
from kcdcache.progress import Progress, silent
from kcdcache.runs.folder import RunFolder
from kcdcache.settings import Device, EvaluateCommand, MachineSettings, TeacherSettings, ViewRule, ViewSettings
from kcdcache.store import check, reader
from kcdcache.teacher import teacher as teachers
from kcdcache.teacher.teacher import Teacher
from kcdcache.training import evaluation
from kcdcache.training.evaluation import Agreement, Scores
from kcdcache.training.loop import exact_arithmetic
from kcdcache.views import rules

logger = logging.getLogger(__name__)

SPLITS: tuple[Literal["test", "train"], ...] = ("test", "train")
WORST = 5
"""classes with the lowest accuracy that are named"""
HEAD = ("split", "images", "top-1", "top-5", "loss", "ECE", "images/s")
ESTIMATOR = (
    f"expected calibration error (ECE): {evaluation.BINS} equal-width bins of the top probability (Guo et al. 2017)"
)


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation:
    """Scores of one network; printed as a table."""

    network: str
    """folder, file or name that was given"""
    architecture: str
    parameters: int
    data: str
    classes: tuple[str, ...]
    splits: Mapping[str, Scores]
    """`test` and `train`, as asked for"""
    agreement: Agreement | None = None
    """with the teacher's stored outputs; None without a store"""
    ema: "Evaluation | None" = None
    """the run's averaged weights; None if it has none"""

    def worst(self, split: str) -> list[dict[str, Any]]:
        """Return the classes with the lowest accuracy on a split, lowest first: `class`, `accuracy`; at most five."""
        known = zip(self.splits[split].class_accuracy, self.classes, strict=True)
        tested = sorted(((found, name) for found, name in known if found is not None), key=itemgetter(0))
        return [{"class": name, "accuracy": found} for found, name in tested[:WORST]]

    def document(self) -> Result:
        """Return the scores as JSON values."""
        return {
            **{name: getattr(self, name) for name in ("network", "architecture", "parameters", "data")},
            "splits": {
                name: asdict(found) | {"worst_classes": self.worst(name)} for name, found in self.splits.items()
            },
            "agreement": None if self.agreement is None else asdict(self.agreement),
            "ema": None if self.ema is None else self.ema.document(),
        }

    @property
    def table(self) -> TextTable:
        """The scores as a table, a row per split."""
        averaged = [] if self.ema is None else [[f"{row[0]} (EMA)", *row[1:]] for row in self.ema._rows()]
        told = [f"{_agreed(found)}{who}" for who, found in self._agreements() if found is not None]
        return TextTable(
            HEAD,
            [*self._rows(), *averaged],
            left=1,
            above=[
                printable(f"{self.network}: {self.architecture}, {self.parameters:,} parameters, on {self.data}"),
                "",
            ],
            below=["", *told, *map(self._worst_line, self.splits), ESTIMATOR],
        )

    def __repr__(self) -> str:
        return str(self.table)

    def _rows(self) -> list[list[str]]:
        return [[name, *_cells(found)] for name, found in self.splits.items()]

    def _agreements(self) -> list[tuple[str, Agreement | None]]:
        return [("", self.agreement), (" (EMA)", None if self.ema is None else self.ema.agreement)]

    def _worst_line(self, split: str) -> str:
        named = ", ".join(f"{row['class']} {row['accuracy']:.1%}" for row in self.worst(split))
        return printable(f"lowest accuracy per class on {split}: {named}")


def run(command: EvaluateCommand, progress: Progress = silent) -> Result:
    """Evaluate a saved network, or a named one with its weights; raises the errors of `evaluate`."""
    machine = MachineSettings(device=command.device, threads=command.threads)
    data = load_data(command.data)
    ask = partial(
        _evaluated, data=data, knowledge=_opened(command.store, data), splits=command.splits, size=command.size,
        batch_size=command.batch_size, progress=progress,
    )  # fmt: skip
    found = _with_average(command.network, data, machine, ask)
    return found.document() | {"calibration_estimator": ESTIMATOR, "table": found.table, "note": _note(command)}


def evaluate(
    network: nn.Module | Teacher | Path | str,
    data: Dataset | str,
    *,
    store: Path | str | reader.Store | None = None,
    splits: Sequence[str] = SPLITS,
    batch_size: int = evaluation.BATCH,
    size: int | None = None,
    device: Device = "auto",
    threads: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    progress: Progress = silent,
    **weights: Any,
) -> Evaluation:
    """Return accuracy, loss and calibration of a network on a data set's splits, without augmentation.

    `network` is a module that takes (batch, channels, height, width) normalised by `mean` and `std` per channel (those
    of the data if unset), the folder of a run, or the name of a network with `weights` (see `TeacherSettings`). Its
    outputs are logits, one per class in the data's order. `size` is the side of the views in pixels, by default that of
    the network's training views or of the images. With a `store` of this data, also the agreement with its teacher.

    Raises:
        MismatchError: network, data and store do not fit.
        SettingsError: a setting is wrong, or images of differing size need `size`.
        NotFoundError, UnfinishedError: there is no such network, or its run is not finished.
        NonFiniteError: an output is not finite.
    """
    dataset = load_data(data) if isinstance(data, str) else data
    if unknown := [name for name in splits if name not in SPLITS]:
        raise SettingsError(f"unknown split '{unknown[0]}'; known: {', '.join(SPLITS)}")
    machine = MachineSettings(device=device, threads=threads)
    ask = partial(
        _evaluated, data=dataset, knowledge=_opened(store, dataset), splits=splits, size=size, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    if isinstance(network, nn.Module | Teacher):
        use_threads(threads)
        return ask(_frozen(network, dataset, device, mean, std), network=type(network).__name__)
    more = {name: value for name, value in (("teacher_mean", mean), ("teacher_std", std)) if value is not None}
    return _with_average(TeacherSettings(teacher=str(network), **more, **weights), dataset, machine, ask)


def _frozen(
    network: nn.Module | Teacher, data: Dataset, device: Device, mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> Teacher:  # fmt: skip
    if isinstance(network, Teacher):
        return network
    transform = InputTransform(mean or data.mean, std or data.std)
    return teachers.freeze(network, transform, type(network).__name__, data.classes, resolve_device(device))


def _with_average(named: TeacherSettings, data: Dataset, machine: MachineSettings, ask: Any) -> Evaluation:
    """Evaluate a named network, and the averaged weights of its run if it has them."""
    assert named.teacher is not None
    by_weights = named.weights is not None and named.weights.is_dir()
    record = saved_network(str(named.weights or named.teacher)) if by_weights or named.weights is None else None
    load = partial(teachers.load_named, data=data, precision="float32", machine=machine)
    size, also = _trained_size(record), None
    if record is not None and (averaged := RunFolder(path=record.parent).averaged).is_dir():
        other = named.model_copy(
            update={"weights" if by_weights else "teacher": averaged if by_weights else str(averaged)}
        )
        also = ask(load(other), network=str(averaged), trained_size=size)
    found: Evaluation = ask(load(named), network=named.teacher, trained_size=size, ema=also)
    return found


def _trained_size(record: Path | None) -> tuple[int, int] | None:
    """Return height and width of the views that a saved network was trained on, if its images had another size."""
    size = None if record is None else read_object(record).get("view_size")
    return None if size is None else (int(size[0]), int(size[1]))


def _opened(store: Path | str | reader.Store | None, data: Dataset) -> reader.Store | None:
    """Return the store after checking that it is of this data and has logits."""
    if store is None:
        return None
    knowledge = store if isinstance(store, reader.Store) else reader.open(Path(store))
    check.check_data(knowledge, data)
    if "logits" not in knowledge.fields:
        raise MismatchError(
            f"{knowledge.path} has no logits, only {', '.join(knowledge.fields)}: agreement needs them; leave --store "
            "out, or add the field with `kcdcache precompute --fields logits` on the same store"
        )
    return knowledge


def _evaluated(
    found: Teacher,
    *,
    data: Dataset,
    knowledge: reader.Store | None,
    splits: Sequence[str],
    size: int | None,
    batch_size: int,
    progress: Progress,
    network: str,
    trained_size: tuple[int, int] | None = None,
    ema: Evaluation | None = None,
) -> Evaluation:
    pair, rule = (found.module, found.transform), _rule(size, trained_size, knowledge, data)
    views = partial(evaluation.first_views, device=found.device, batch_size=batch_size)
    with exact_arithmetic():
        _warn_of_probabilities(found, data, rule, network)
        scores = {}
        for name in splits:
            split = getattr(data, name)
            told = partial(_tell, progress, f"{network}: {name}", len(split))
            scores[name] = evaluation.score(*pair, views(split, rule), split.labels, len(data.classes), told)
        agreed = None
        if knowledge is not None:
            told = partial(_tell, progress, f"{network}: agreement", len(data.train))
            agreed = evaluation.agreement(*pair, views(data.train, knowledge.knowledge.views), knowledge, told)
    return Evaluation(
        network=network,
        architecture=found.identity.architecture,
        parameters=sum(parameter.numel() for parameter in found.module.parameters()),
        data=data.name,
        classes=data.classes,
        splits=scores,
        agreement=agreed,
        ema=ema,
    )


def _rule(size: int | None, trained: tuple[int, int] | None, knowledge: reader.Store | None, data: Dataset) -> ViewRule:
    """Return the rule of the views: of the size given, of the training views, of the store's, or of the images."""
    known = knowledge.knowledge.views.size if knowledge is not None else data.train.image_size
    if size is None and (height_width := trained or known) is not None:
        return ViewRule(rule="none", padding=0, fill="zero", size=height_width, seed=0)
    if size is None:
        raise SettingsError(
            f"the images of {data.name} differ in size: give --size, the side of the square views in pixels, or "
            "--store, whose views have one"
        )
    return rules.rule_from(ViewSettings(augment="none", size=size), data.train.image_size)


def _warn_of_probabilities(found: Teacher, data: Dataset, rule: ViewRule, network: str) -> None:
    """Log a warning if the outputs on the first test images are probabilities, from which loss has no meaning."""
    first = np.arange(min(16, len(data.test)))
    pixels = rules.show(rule, data.test.images(first), rules.parameters(rule, first, 0), found.device)
    outputs = evaluation.predict(found.module, found.transform, [pixels])
    if outputs.ndim == 2 and bool(teachers.probability_rows(outputs).all()):
        logger.warning("%s: its outputs are probabilities; accuracy holds, but loss and ECE expect logits", network)


def _tell(progress: Progress, what: str, total: int, done: int) -> None:
    progress(what, done, total, "images")


def _cells(found: Scores) -> list[str]:
    top5 = "-" if found.top5 is None else f"{found.top5:.2%}"
    numbers = (f"{found.top1:.2%}", top5, f"{found.loss:.4f}", f"{found.calibration_error:.4f}")
    return [f"{found.images:,}", *numbers, f"{found.images_per_second:,.0f}"]


def _agreed(found: Agreement) -> str:
    return (
        f"agreement with the teacher on view 0 of {found.images:,} training samples: {found.top1:.2%} same class, "
        f"mean KL {found.kl:.4f} nats"
    )


def _note(command: EvaluateCommand) -> str:
    return "per-class accuracies: --json" if command.store else "add --store for the agreement with a teacher"
