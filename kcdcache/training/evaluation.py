"""Accuracy, calibration, agreement with the teacher, and how a student fits wrong labels (fidelity)."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor, nn
from torch.nn import functional

from kcdcache.condensation import compare, manifest, value_files
from kcdcache.datasets.datasets import Dataset
from kcdcache.datasets.images import Split
from kcdcache.datasets.label_noise import frequent
from kcdcache.errors import MismatchError, NonFiniteError
from kcdcache.methods.losses import cross_entropy
from kcdcache.networks import registry
from kcdcache.networks.input_transform import InputTransform
from kcdcache.networks.weights import load_into, load_network
from kcdcache.runs.folder import RunFolder
from kcdcache.settings import TrainSettings
from kcdcache.store import encoding, identity
from kcdcache.store.reader import Store
from kcdcache.teacher.teacher import Teacher
from kcdcache.views import prefetch, rules

BATCH = 512
BINS = 15
"""equal-width bins of the expected calibration error"""
TOP = 5
"""of top-5 accuracy, which needs more classes than that"""

Labels = Int64[np.ndarray, " n"]
Marks = Bool[np.ndarray, " n"]


def first_views(
    split: Split, rule: rules.ViewRule, device: torch.device, workers: int | None = None,
    held: rules.HeldImages | None = None, batch_size: int | None = None,
) -> Iterator[Float[Tensor, "batch c h w"]]:  # fmt: skip
    """Return view 0 of every sample of a split, batch by batch, on the device (`workers`: see `prefetch.shown`).

    For test images, give `rules.plain` of the training rule; `held` are the split's images if the device holds them.
    """
    if held is not None:
        every = held.parameters(0)
        return (held.views(block, every) for block in torch.arange(len(held), device=every.device).split(BATCH))
    size = batch_size or BATCH
    blocks = (np.arange(low, min(low + size, len(split))) for low in range(0, len(split), size))
    asked = (prefetch.Asked(block, rules.parameters(rule, block, 0)) for block in blocks)
    return prefetch.shown(split, rule, asked, device, workers)


def predict(
    network: nn.Module, transform: InputTransform, views: Iterable[Float[Tensor, "batch c h w"]]
) -> Float[Tensor, "n classes"]:
    """Return the float32 logits of some views in eval mode, on the device."""
    with _evaluating(network):
        return torch.cat([network(transform(pixels)).float() for pixels in views])


def guesses(network: nn.Module, transform: InputTransform, views: Iterable[Float[Tensor, "batch c h w"]]) -> Labels:
    """Return the predicted class of each view in eval mode, from float32 logits."""
    with _evaluating(network):
        return torch.cat([network(transform(pixels)).float().argmax(1).cpu() for pixels in views]).numpy()


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        network.train(was_training)


def calibration_error(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"], bins: int = BINS) -> float:
    """Return the expected calibration error, with equal-width bins. Source: Guo et al. 2017, Eq. 3."""
    confidence, guess = logits.double().cpu().softmax(1).max(1)  # on a GPU index_add_ has no fixed order
    return _calibration_error(confidence, (guess == labels.cpu()).double(), bins)


def _calibration_error(confidence: Float64[Tensor, " n"], right: Float64[Tensor, " n"], bins: int) -> float:
    which = (confidence * bins).long().clamp_max(bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, confidence - right)
    return float(gaps.abs().sum() / len(right))


def measure(logits: Float[Tensor, "n classes"], labels: Int64[np.ndarray, " n"]) -> dict[str, float]:
    """Return test accuracy in [0, 1], mean cross-entropy in nats, and expected calibration error in [0, 1]."""
    known = torch.from_numpy(labels).to(logits.device)
    return {
        "test_accuracy": float((logits.argmax(1) == known).double().mean()),
        "test_loss": float(cross_entropy(logits, known).double().mean()),
        "test_calibration_error": calibration_error(logits, known),
    }


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A network's predictions on the images of one split, without augmentation; accuracies in [0, 1]."""

    images: int
    top1: float
    """accuracy: the class with the largest logit is the label"""
    top5: float | None
    """the label is among the five largest logits; None with at most five classes"""
    loss: float
    """mean cross-entropy in nats"""
    calibration_error: float
    """expected calibration error in [0, 1]: 15 equal-width bins of the largest probability (Guo et al. 2017, Eq. 3)"""
    class_accuracy: tuple[float | None, ...]
    """accuracy per class, in label order; None for a class without images"""
    images_per_second: float
    """including reading and decoding"""


def score(
    network: nn.Module,
    transform: InputTransform,
    views: Iterable[Float[Tensor, "batch c h w"]],
    labels: Int64[np.ndarray, " n"],
    classes: int,
    told: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Return a network's scores on some views, batch by batch; `told` is called with the number of images done.

    Raises MismatchError if the network does not give one logit per class, NonFiniteError if a logit is not finite.
    """
    began, parts, done = time.perf_counter(), list[Tensor](), 0
    for pixels in views:
        logits = predict(network, transform, [pixels])
        _require_logits(logits, len(pixels), classes, done)
        parts.append(_judged(logits, torch.from_numpy(labels[done : done + len(pixels)])))
        done += len(pixels)
        told(done)
    right, among, loss, confidence = torch.cat(parts).unbind(1)
    return Scores(
        images=done,
        top1=float(right.mean()),
        top5=float(among.mean()) if classes > TOP else None,
        loss=float(loss.mean()),
        calibration_error=_calibration_error(confidence, right, BINS),
        class_accuracy=tuple(_share(right.numpy()[labels == label]) for label in range(classes)),
        images_per_second=done / (time.perf_counter() - began),
    )


def _judged(logits: Float[Tensor, "batch classes"], labels: Int64[Tensor, " batch"]) -> Float64[Tensor, "batch 4"]:
    """Return for each sample whether the label is the first and among the first five, loss, and confidence."""
    known = labels.to(logits.device)
    among = (logits.topk(min(TOP, logits.shape[1])).indices == known[:, None]).any(1)
    columns = (logits.argmax(1) == known, among, cross_entropy(logits, known), logits.double().softmax(1).amax(1))
    return torch.stack([column.double().cpu() for column in columns], 1)


def _require_logits(logits: Tensor, images: int, classes: int, first: int) -> None:
    if logits.shape != (images, classes):
        raise MismatchError(
            f"the network gives outputs of shape {tuple(logits.shape)} for {images} images of {classes} classes; "
            f"expected is one logit per class: ({images}, {classes})"
        )
    if len(bad := (~logits.isfinite().all(1)).nonzero()):
        raise NonFiniteError(f"the network's outputs for image {first + int(bad[0])} are not finite (NaN or infinity)")


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A network's agreement with the teacher's stored outputs on view 0 of the training samples."""

    images: int
    """samples with stored outputs"""
    top1: float
    """fraction with the same predicted class, in [0, 1]"""
    kl: float
    """mean KL(teacher || network) at temperature 1, in nats"""


def agreement(
    network: nn.Module,
    transform: InputTransform,
    views: Iterable[Float[Tensor, "batch c h w"]],
    knowledge: Store,
    told: Callable[[int], None] = lambda done: None,
) -> Agreement:
    """Return the agreement with a store's logits; `views` are view 0 of all its samples, in order."""
    done, same, divergence = 0, list[Tensor](), list[Tensor]()
    for pixels in views:
        index = np.arange(done, done + len(pixels))
        usable = ~np.isin(index, knowledge.skipped)
        logits = predict(network, transform, [pixels])[torch.from_numpy(usable)].double().cpu()
        theirs = torch.from_numpy(knowledge.read("logits", 0, index[usable])).double()
        same.append(logits.argmax(1) == theirs.argmax(1))
        ours, target = (z.log_softmax(1) for z in (logits, theirs))
        divergence.append(functional.kl_div(ours, target, reduction="none", log_target=True).sum(1))
        done += len(pixels)
        told(done)
    agreed = torch.cat(same).double()
    return Agreement(images=len(agreed), top1=float(agreed.mean()), kl=float(torch.cat(divergence).mean()))


def fidelity_wanted(settings: TrainSettings, data: Dataset, knowledge: Store) -> bool:
    """Return whether to measure a run on its training samples: if on, or auto and the data are corrupted."""
    # an exported set lacks samples and true labels
    asked = settings.fidelity == "on" or (settings.fidelity == "auto" and bool(data.corruption))
    return asked and knowledge.knowledge.whole


def fidelity(
    settings: TrainSettings,
    data: Dataset,
    knowledge: Store,
    teacher: Teacher | None,
    folder: RunFolder,
    device: torch.device,
) -> dict[str, Any]:
    """Return a summary's entries on the data, and if wanted on the student's predictions for training samples.

    Takes one forward pass, in eval mode, of the saved student over view 0 of the training split and over the test
    split, and of the teacher, if given, over the test split. Shares in [0, 1]:

    `agreement_train`, `agreement_test`: student and teacher predict the same class. `accuracy_train`, `accuracy_true`:
    the student predicts the given or the true label; `accuracy_right`: the given label where it is right; `memorised`,
    `recovered`: the given or the true label where the given one is wrong. With `teacher_`: the same for the teacher.
    `accuracy_frequent`, `accuracy_rare`: test accuracy on the classes with most training samples (see
    `label_noise.frequent`) and on the others.

    `sets` are the `compare.SetCounts` of every stage.
    """
    source = identity.read_origin(knowledge.path)
    found = (source.told(knowledge.knowledge.data.digest) if source else {}) | data.corrupted()
    if not fidelity_wanted(settings, data, knowledge):
        return found
    network = _saved(settings, data, folder, device)
    rule = knowledge.knowledge.views
    usable = np.setdiff1d(np.arange(len(data.train)), knowledge.skipped)
    ours = guesses(*network, first_views(data.train, rule, device, settings.workers))[usable]
    found |= _on_train(ours, data.train, usable)
    if "logits" in knowledge.fields:
        blocks = encoding.blocks(len(usable), knowledge.fields["logits"].row_shape)
        theirs = np.concatenate([knowledge.read("logits", 0, usable[block]).argmax(1) for block in blocks])
        found["agreement_train"] = _share(ours == theirs)
        found |= {f"teacher_{name}": value for name, value in _on_train(theirs, data.train, usable).items()}
    if teacher is not None or data.corruption.gamma is not None:
        pairs = [network] if teacher is None else [network, (teacher.module, teacher.transform)]
        shown = rules.plain(rule)
        found |= _on_test(data, *(guesses(*p, first_views(data.test, shown, device, settings.workers)) for p in pairs))
    return found | {"sets": _sets(data, folder)} if data.corruption else found


def _saved(
    settings: TrainSettings, data: Dataset, folder: RunFolder, device: torch.device
) -> tuple[nn.Module, InputTransform]:
    """Return the run's saved student and its input transform, the same in a resumed run."""
    record, state = load_network(folder.path, "student")
    network = registry.build(settings.student, len(data.classes), channels=len(data.mean))
    load_into(network, state, str(folder.path))
    return network.to(device).to(memory_format=torch.channels_last), record.transform


def _on_train(guess: Labels, split: Split, usable: Labels) -> dict[str, float | None]:
    """Return how often a network predicts the given and the true labels of some training samples."""
    given = split.labels[usable]
    found = {"accuracy_train": _share(guess == given)}
    if (marked := _wrong(split)) is None or split.clean_labels is None:
        return found
    true, wrong = split.clean_labels[usable], marked[usable]
    return found | {
        "accuracy_true": _share(guess == true),
        "accuracy_right": _share((guess == given)[~wrong]),
        "memorised": _share((guess == given)[wrong]),
        "recovered": _share((guess == true)[wrong]),
    }


def _on_test(data: Dataset, guess: Labels, theirs: Labels | None = None) -> dict[str, float | None]:
    """Return agreement and accuracies on test images from the classes that student and teacher predict."""
    found: dict[str, float | None] = {}
    if theirs is not None:
        found |= {"agreement_test": _share(guess == theirs), "teacher_accuracy": _share(theirs == data.test.labels)}
    if (often := _frequent(data)) is not None:
        right, of_frequent = guess == data.test.labels, often[data.test.labels]
        found |= {"accuracy_frequent": _share(right[of_frequent]), "accuracy_rare": _share(right[~of_frequent])}
    return found


def _frequent(data: Dataset) -> Marks | None:
    """Return which classes have most training samples, or None if no class was thinned out."""
    if data.corruption.gamma is None or data.train.clean_labels is None:
        return None
    return frequent(np.bincount(data.train.clean_labels, minlength=len(data.classes)))


def _wrong(split: Split) -> Marks | None:
    """Return which samples have a wrong label, or None if none has."""
    wrong = None if split.clean_labels is None else split.labels != split.clean_labels
    return wrong if wrong is not None and wrong.any() else None


def _sets(data: Dataset, folder: RunFolder) -> list[dict[str, Any]]:
    """Return counts of wrong labels and rare classes in each of a run's sets, in order."""
    wrong, often, found = _wrong(data.train), _frequent(data), []
    rare = None if often is None else ~often[data.train.clean_labels]
    for number, file in folder.manifests().items():
        path, value = folder.stage_values(number), None
        if path.exists():  # not after the last condensation
            values = value_files.read(path, len(data.train)).values
            value = np.where(values.visits > 0, values.value, np.nan)
        found.append(compare.count_set(manifest.read(file), value, wrong, rare).model_dump(exclude_unset=True))
    return found


def _share(found: Marks) -> float | None:
    return float(found.mean()) if found.size else None
