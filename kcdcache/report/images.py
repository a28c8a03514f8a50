"""The images themselves: most and least valuable samples, those that left, returned and stayed, and what was mixed."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from PIL import Image
from torch import Tensor

from kcdcache.condense import compare
from kcdcache.data import datasets
from kcdcache.data.datasets import Dataset
from kcdcache.data.spec import parse
from kcdcache.errors import KcdcacheError, MismatchError, NotFoundError, printable
from kcdcache.export import condensed_set
from kcdcache.report.load import Run, Stage
from kcdcache.settings import ViewSettings
from kcdcache.views import mixing, rules

SHOWN = 12
"""images of a group, at most"""
PAIRS = 8
"""mixes shown, at most"""
LARGEST = 96
"""side of a shown image of a data set whose images differ in size, in pixels"""
MOST_UNASKED = 200_000
"""training images of a data set that is read without being asked for"""
DOWNLOADED = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
"""kind of data that is downloaded where it is missing -> its folder"""
CPU = torch.device("cpu")


class Shot(NamedTuple):
    """One image with what is said below it."""

    uri: str
    """data URI of a PNG"""
    lines: tuple[str, ...]


class Strip(NamedTuple):
    """A group of images."""

    title: str
    text: str
    """what they have in common"""
    shots: tuple[tuple[Shot, ...], ...]
    """images that belong together stand together"""


def require_cheap(spec: str, count: int) -> None:
    """Do nothing if a data set that nobody asked for here may be loaded for its pictures alone.

    Raises:
        SettingsError: the spec is wrong.
        NotFoundError: it would have to be downloaded, or is so large that to hash it takes long.
    """
    kind, location = parse(spec)[:2]
    if count > MOST_UNASKED:
        raise NotFoundError(f"all {count:,} images would have to be read; give --data if you want that")
    if kind in DOWNLOADED:
        folder = Path(location or datasets.CACHE).expanduser() / DOWNLOADED[kind]
        if not folder.is_dir():
            raise NotFoundError(f"{folder} is not there; give --data to download it, or to name another place")


def collected(runs: Sequence[tuple[str, Run]], asked: str | None = None) -> tuple[list[Strip], list[str]]:
    """Return the images of the first of the named runs in each folder, and lines that say why a run has none.

    `asked` is the data spec that somebody named for all of them.
    """
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
    """Return the groups of images that tell what a run's condensation did.

    Raises:
        MismatchError: the data set is not the one the run was trained on; prints both digests.
    """
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
        _group(data, valued, best, "Most valuable", "The student is least sure of these."),
        _group(data, valued, worst, "Least valuable", "The student is surest of these."),
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
        (Shot(png(pixels), (*_labels(data, sample), f"#{sample}", f"V = {stage.values.value[sample]:.2f}")),)
        for sample, pixels in zip(index.tolist(), _pixels(data, index), strict=True)
    ]
    return Strip(title, text, tuple(shots))


def _mixes(run: Run, data: Dataset) -> Strip | None:
    """Return kept image, partner and mix of some pairs of the last set that was trained on and has any."""
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
            Shot(png(kept[row]), ("kept", *_labels(data, one), f"#{one}")),
            Shot(png(dropped[row]), ("dropped", *_labels(data, other), f"#{other}")),
            Shot(png(mixed[row]), ("mix", f"{100 * share:.0f} % of the", "dropped one")),
        )
        for row, (one, other, share) in enumerate(zip(*(a.tolist() for a in (index, partner, epsilon)), strict=True))
    ]
    text = (
        f"From the set of stage {chosen.stage}, from the smallest share mixed in to the largest: the kept image, the "
        "dropped one that enriches it, and what the student sees (before augmentation)."
    )
    return Strip("Mixed into K_Aug", text, tuple(shots))


def _pixels(data: Dataset, index: Int64[np.ndarray, " few"]) -> Float32[Tensor, "few c h w"]:
    """Return images without augmentation, in [0, 1]."""
    size = data.train.image_size
    small = None if size and max(size) <= LARGEST else LARGEST
    rule = rules.rule_from(ViewSettings(augment="none", size=small), size)
    return rules.show(rule, data.train.source.images(index), rules.parameters(rule, index, 0), CPU)


def png(pixels: Float32[Tensor, "c h w"]) -> str:
    """Return pixels in [0, 1] as the data URI of a PNG."""
    levels = (pixels.permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    stream = io.BytesIO()
    Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels).save(stream, format="PNG")
    return data_uri(stream.getvalue())


def data_uri(content: bytes) -> str:
    """Return a PNG's bytes as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _labels(data: Dataset, sample: int) -> tuple[str, ...]:
    """Return the class that a sample is given, and in a second line its true one where label noise changed it."""
    given, clean = int(data.train.labels[sample]), data.train.clean_labels
    true = given if clean is None else int(clean[sample])
    return (_class(data, given),) if true == given else (_class(data, given), f"truly {_class(data, true)}")


def _class(data: Dataset, label: int) -> str:
    name = printable(data.classes[label])
    return name if len(name) <= 24 else f"{name[:23]}…"


def _evenly(index: Int64[np.ndarray, " n"], most: int) -> Int64[np.ndarray, " few"]:
    """Return at most so many of some samples, evenly spaced in their order."""
    return index[np.unique(np.linspace(0, len(index) - 1, min(most, len(index))).round().astype(np.int64))]
