"""The images of a report: most and least valuable samples, samples by fate, and mixes."""

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from PIL import Image
from torch import Tensor

from kcdcache.condensation import compare
from kcdcache.datasets import datasets
from kcdcache.datasets.datasets import Dataset
from kcdcache.datasets.spec import at_home, parse
from kcdcache.errors import KcdcacheError, MismatchError, NotFoundError
from kcdcache.export import condensed_set
from kcdcache.report.figures import short
from kcdcache.report.load import Run, Stage
from kcdcache.settings import ViewSettings
from kcdcache.views import mixing, rules

SHOWN = 12
PAIRS = 8
LARGEST = 96
"""side in pixels of a shown image of a data set with large images or mixed sizes"""
MOST_UNASKED = 200_000
"""most training images of a data set that is read without --data"""
DOWNLOADED = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
"""kind of data that would be downloaded -> its folder"""


class Shot(NamedTuple):
    """An image with its caption."""

    uri: str
    lines: tuple[str, ...]


class Strip(NamedTuple):
    """A group of images."""

    title: str
    text: str
    shots: tuple[tuple[Shot, ...], ...]
    """grouped: kept image, dropped image and mix belong together"""


def require_cheap(spec: str, count: int) -> None:
    """Raise NotFoundError if loading a data set only for its images would mean a download, or take long."""
    kind, location = parse(spec)[:2]
    if count > MOST_UNASKED:
        raise NotFoundError(f"all {count:,} images would have to be read; give --data if you want that")
    if kind in DOWNLOADED:
        folder = at_home(location or datasets.CACHE) / DOWNLOADED[kind]
        if not folder.is_dir():
            raise NotFoundError(f"{folder} does not exist; give --data to download it, or to name another place")


def collected(runs: Sequence[tuple[str, Run]], asked: str | None = None) -> tuple[list[Strip], list[str]]:
    """Return the images of the first run in each folder, and notes on runs without images; `asked` is --data."""
    found: list[Strip] = []
    notes: list[str] = []
    first = {run.grid: (name, run) for name, run in reversed(runs)}
    for name, run in reversed(first.values()):
        spec = asked or run.data
        if spec is None:
            notes.append(f"{name}: no images, because its folder has no results.json that names the data; give --data")
            continue
        try:
            if asked is None:
                require_cheap(spec, run.sets[0].count)
            own = strips(run, condensed_set.load_data(spec))
            found += [strip._replace(title=f"{strip.title} ({name})") for strip in own]
        except KcdcacheError as error:
            notes.append(f"{name}: no images, because the data '{spec}' cannot be used: {error}")
    return found, notes


def strips(run: Run, data: Dataset) -> list[Strip]:
    """Return the groups of images of a run; raise MismatchError unless it was trained on `data`."""
    wanted, own = run.sets[0].data_digest, data.identity().digest
    if wanted != own:
        raise MismatchError(
            f"'{data.name}' is not what {run.name} was trained on: its training split has the digest {own}, the run's "
            f"{wanted}; give the run's own data set as --data"
        )
    valued = next((stage for stage in reversed(run.stages) if stage.score is not None), None)
    if valued is None:
        return []
    assert valued.score is not None
    best, worst = (np.argsort(sign * valued.score, kind="stable")[:SHOWN] for sign in (-1, 1))
    found = [
        _group(data, valued, best, "Most valuable", "The student is least certain about these."),
        _group(data, valued, worst, "Least valuable", "The student is most certain about these."),
    ]
    for fate, mask in compare.fates(compare.parts(run.sets)).items():
        if mask.any():
            chosen = _evenly(np.flatnonzero(mask), SHOWN)
            title = f"{fate.capitalize()} ({int(mask.sum()):,} samples)"
            found.append(_group(data, valued, chosen, title, f"{compare.FATES[fate].capitalize()}."))
    mixed = _mixes(run, data)
    return [*found, mixed] if mixed else found


def _group(data: Dataset, stage: Stage, index: Int64[np.ndarray, " few"], title: str, text: str) -> Strip:
    assert stage.values is not None
    shots = [
        (Shot(uri(pixels), (*_labels(data, sample), f"#{sample}", f"V = {stage.values.value[sample]:.2f}")),)
        for sample, pixels in zip(index.tolist(), _pixels(data, index), strict=True)
    ]
    return Strip(title, text, tuple(shots))


def _mixes(run: Run, data: Dataset) -> Strip | None:
    """Return kept image, partner and mix for some pairs of the last set used for training that has any."""
    sets = [stage.manifest for stage in run.stages if stage.manifest.mixed.any() and stage.values is not None]
    if not sets:
        return None
    chosen = sets[-1]
    rows = np.flatnonzero(chosen.mixed)
    rows = _evenly(rows[np.argsort(chosen.epsilon[rows], kind="stable")], PAIRS)
    index, partner, epsilon = chosen.index[rows], chosen.partner[rows], chosen.epsilon[rows]
    kept, dropped = _pixels(data, index), _pixels(data, partner)
    mixed = mixing.mix_pixels(kept, dropped, torch.from_numpy(epsilon.copy()), run.record.settings["mix"])
    shots = [
        (
            Shot(uri(kept[row]), ("kept", *_labels(data, one), f"#{one}")),
            Shot(uri(dropped[row]), ("dropped", *_labels(data, other), f"#{other}")),
            Shot(uri(mixed[row]), ("mix", f"{100 * share:.0f} % of the", "dropped one")),
        )
        for row, (one, other, share) in enumerate(zip(*(a.tolist() for a in (index, partner, epsilon)), strict=True))
    ]
    text = (
        f"From the set of stage {chosen.stage}, by the share that is mixed in: the kept image, the dropped image, and "
        "the mix that the student sees (before augmentation)."
    )
    return Strip("Mixed into K_Aug", text, tuple(shots))


def _pixels(data: Dataset, index: Int64[np.ndarray, " few"]) -> Float32[Tensor, "few c h w"]:
    """Return images without augmentation, in [0, 1]."""
    size = data.train.image_size
    small = None if size and max(size) <= LARGEST else LARGEST
    rule = rules.rule_from(ViewSettings(augment="none", size=small), size)
    parameters = rules.parameters(rule, index, 0)
    return rules.show(rule, data.train.source.images(index), parameters, torch.device("cpu"))


def uri(pixels: Float32[Tensor, "c h w"]) -> str:
    """Return pixels in [0, 1] as the data URI of a lossless WebP."""
    levels = (pixels.permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    stream = io.BytesIO()
    Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels).save(stream, format="WEBP", lossless=True)
    return data_uri(stream.getvalue())


def data_uri(content: bytes) -> str:
    """Return the bytes of a WebP as a data URI."""
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}"


def _labels(data: Dataset, sample: int) -> tuple[str, ...]:
    """Return the class of a sample, and its true class if label noise changed it."""
    given, clean = int(data.train.labels[sample]), data.train.clean_labels
    true = given if clean is None else int(clean[sample])
    names = [short(data.classes[label], 24) for label in (given, true)]
    return (names[0],) if true == given else (names[0], f"truly {names[1]}")


def _evenly(index: Int64[np.ndarray, " n"], most: int) -> Int64[np.ndarray, " few"]:
    """Return at most `most` samples, evenly spaced in their order."""
    return index[np.unique(np.linspace(0, len(index) - 1, min(most, len(index))).round().astype(np.int64))]
