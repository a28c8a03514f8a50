"""A finished student on what it learned from: agreement with the teacher, right and wrong labels, rare classes."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int64

from kcdcache import evaluate, manifest, origin, runs, screening, values, views
from kcdcache.config import TrainSettings
from kcdcache.corruption import frequent
from kcdcache.data import Dataset
from kcdcache.errors import MismatchError
from kcdcache.folder import RunFolder
from kcdcache.images import Split
from kcdcache.models import spec
from kcdcache.models.device import resolve_device
from kcdcache.models.transform import transform_from
from kcdcache.models.weights import load_into, load_network
from kcdcache.store import Store
from kcdcache.teacher import Teacher

logger = logging.getLogger(__name__)

Labels = Int64[np.ndarray, " n"]
Marks = Bool[np.ndarray, " n"]


def wanted(settings: TrainSettings, data: Dataset, knowledge: Store) -> bool:
    """Return whether a run is measured on its training samples: asked for, or `auto` and its data are corrupted.

    An exported set holds neither all samples nor their true labels: runs on one are not.
    """
    asked = settings.fidelity == "on" or (settings.fidelity == "auto" and bool(data.corruption))
    return asked and knowledge.knowledge.whole


def require_own(teacher: Teacher, knowledge: Store) -> None:
    """Do nothing if a teacher is the one whose outputs a store holds.

    Raises:
        MismatchError: it is another one.
    """
    if (found := teacher.identity) != knowledge.knowledge.teacher:
        raise MismatchError(
            f"--teacher is {found.architecture} with weights {found.weights[:16]}, the store at {knowledge.path} is of "
            f"{knowledge.knowledge.teacher.architecture} with weights {knowledge.knowledge.teacher.weights[:16]}; give "
            "the store's own teacher, or none"
        )


@runtime_checkable
class Learned(Protocol):
    """What a student learned from."""

    @property
    def data(self) -> Dataset:
        """Its images and labels."""

    @property
    def knowledge(self) -> Store:
        """The teacher's outputs on them."""

    @property
    def teacher(self) -> Teacher | None:
        """The teacher itself, if it is at hand."""


def of_run(settings: TrainSettings, material: Learned, folder: RunFolder, device: torch.device) -> dict[str, Any]:
    """Return what a run's summary says of its data, and of its student on the training samples if that is `wanted`.

    One forward pass, in eval mode, of the saved student over view 0 of every training sample, the images that the
    store's first outputs belong to, and one over the test split; of the teacher, if at hand, one over the latter.
    All are shares in [0, 1]:

    `agreement_train`: student and teacher name the same class on view 0. `agreement_test`: on test images.
    `accuracy_train`: the given label is named. `accuracy_true`: the true one. `accuracy_right`: of samples whose label
    is right. `memorised`, `recovered`: of samples whose label is wrong, the given one and the true one is named. The
    same of the teacher begins with `teacher_`. `accuracy_frequent`, `accuracy_rare`: of test images of the classes that
    have most training samples (see `corruption.frequent`) and of the others.

    `sets` tells of every stage what `screening.per_set` does.
    """
    data, knowledge = material.data, material.knowledge
    source = origin.read(knowledge.path)
    found = (source.told(knowledge.knowledge.data.digest) if source else {}) | data.corrupted()
    if not wanted(settings, data, knowledge):
        return found
    network = _saved(settings, data, folder, device)
    shown = views.rule_of(knowledge.knowledge.views)
    usable = np.setdiff1d(np.arange(len(data.train)), knowledge.skipped)
    ours = evaluate.guesses(*network, data.train, shown, device, settings.workers)[usable]
    found |= _on_train(ours, data.train, usable)
    if "logits" in knowledge.fields:
        theirs = knowledge.read("logits", 0, usable).argmax(1)
        found["agreement_train"] = _share(ours == theirs)
        found |= {f"teacher_{name}": value for name, value in _on_train(theirs, data.train, usable).items()}
    found |= _on_test(network, data, views.plain(shown), device, settings.workers, material.teacher)
    return found | {"sets": _sets(data, folder)} if data.corruption else found


def asked_later(
    settings: TrainSettings, material: Learned, folder: RunFolder, device: str, may_write: bool
) -> dict[str, Any]:
    """Return a finished run's summary, after measuring what is asked for now and was not then."""
    summary = runs.read_summary(folder.path)
    if not may_write:
        return summary
    sought = {"accuracy_train"} | ({"agreement_test"} if material.teacher is not None else set())
    if not wanted(settings, material.data, material.knowledge) or sought <= set(summary):
        return summary
    logger.info("train: measuring the finished student in %s", folder.path)
    runs.write_summary(folder, summary | of_run(settings, material, folder, resolve_device(device)))
    return runs.read_summary(folder.path)


def mislabelled(split: Split) -> Marks | None:
    """Return which samples have a wrong label; None where the split is as it was."""
    return None if split.clean_labels is None else split.labels != split.clean_labels


def rare(data: Dataset) -> Marks | None:
    """Return which training samples truly are of a rare class; None where no class was thinned out."""
    if data.corruption.gamma is None or data.train.clean_labels is None:
        return None
    sizes = np.bincount(data.train.clean_labels, minlength=len(data.classes))
    return ~frequent(sizes)[data.train.clean_labels]


def _saved(settings: TrainSettings, data: Dataset, folder: RunFolder, device: torch.device) -> tuple[Any, Any]:
    """Return the run's student and its input transform, as they lie on disk: a resumed run measures the same."""
    document, state = load_network(folder.path, "student")
    network = spec.build(settings.student, len(data.classes), channels=len(data.mean))
    load_into(network, state, str(folder.path))
    return network.to(device).to(memory_format=torch.channels_last), transform_from(document["transform"])


def _on_train(guess: Labels, split: Split, usable: Labels) -> dict[str, float | None]:
    """Return how often a network names the given and the true labels of some training samples."""
    given = split.labels[usable]
    found = {"accuracy_train": _share(guess == given)}
    wrong = mislabelled(split)
    if wrong is None or not wrong.any():
        return found
    assert split.clean_labels is not None
    true, wrong = split.clean_labels[usable], wrong[usable]
    return found | {
        "accuracy_true": _share(guess == true),
        "accuracy_right": _share((guess == given)[~wrong]),
        "memorised": _share((guess == given)[wrong]),
        "recovered": _share((guess == true)[wrong]),
    }


def _on_test(
    network: tuple[Any, Any],
    data: Dataset,
    plain: views.ViewRule,
    device: torch.device,
    workers: int | None,
    teacher: Teacher | None,
) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    if teacher is None and data.corruption.gamma is None:
        return found
    guess = evaluate.guesses(*network, data.test, plain, device, workers)
    if teacher is not None:
        theirs = evaluate.guesses(teacher.module, teacher.transform, data.test, plain, device, workers)
        found |= {"agreement_test": _share(guess == theirs), "teacher_accuracy": _share(theirs == data.test.labels)}
    if data.corruption.gamma is not None and data.train.clean_labels is not None:
        often = frequent(np.bincount(data.train.clean_labels, minlength=len(data.classes)))[data.test.labels]
        right = guess == data.test.labels
        found |= {"accuracy_frequent": _share(right[often]), "accuracy_rare": _share(right[~often])}
    return found


def _sets(data: Dataset, folder: RunFolder) -> list[Mapping[str, Any]]:
    """Return what became of wrong labels and rare classes in each of a run's sets, in order."""
    marked = mislabelled(data.train)
    wrong = marked if marked is not None and marked.any() else None
    numbers = sorted(int(path.parent.name) for path in folder.path.glob("stages/*/manifest.parquet"))
    return [
        screening.per_set(
            manifest.read(folder.manifest(number)), _value(folder.stage_values(number), data), wrong, rare(data)
        )
        for number in numbers
    ]


def _value(path: Path, data: Dataset) -> np.ndarray | None:
    """Return the samples' values at a stage's end, NaN of those never visited; None where there are none yet."""
    if not path.exists():
        return None
    found = values.read(path, len(data.train)).values
    return np.where(found.visits > 0, found.value, np.nan)


def _share(found: Marks) -> float | None:
    return float(found.mean()) if found.size else None
