"""Names of networks and paths of saved networks, without torch."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from kcdcache.errors import NotFoundError, SettingsError, UnfinishedError, nearest
from kcdcache.files.atomic import found_at


def _made(where: str, *arguments: Any) -> Any:
    return resolve_name(f"kcdcache.networks.{where}")(*arguments)


NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)
DEPTHS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""vgg layers -> convolutions per block"""

NETWORKS: dict[str, Callable[..., Any]] = {
    **{f"resnet{depth}": partial(_made, "resnet:ResNet", depth, NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(_made, "resnet:ResNet", depth, WIDE) for depth in (8, 32)},
    "ResNet50": partial(_made, "resnet:ResNet50"),
    **{
        f"wrn_{depth}_{factor}": partial(_made, "resnet:WideResNet", depth, factor)
        for depth, factor in ((10, 2), (16, 1), (16, 2), (28, 2), (40, 1), (40, 2))
    },
    **{f"vgg{layers}": partial(_made, "vgg:VGG", depths) for layers, depths in DEPTHS.items()},
    "MobileNetV2": partial(_made, "mobilenet:MobileNetV2"),
    "ShuffleV1": partial(_made, "shufflenet:ShuffleV1"),
    "ShuffleV2": partial(_made, "shufflenet:ShuffleV2"),
}
"""name -> network made from (classes, channels)"""
SAVED_NAMES = ("model", "student")
"""names of the networks that `fit` and `train` save"""

TYPED: set[str] = set()
"""specs that were typed in this very command: their modules may lie in the current folder"""


def typed(specs: Iterable[str]) -> None:
    """Let these specs, typed by the user in this command, be imported from the current folder, too.

    Names that were read from a file never come here.
    """
    TYPED.update(spec for spec in specs if ":" in spec)


def require_known_name(spec: str) -> None:
    """Raise SettingsError unless a spec names a network here, or one of another package, which is not checked."""
    if ":" not in spec and spec not in NETWORKS:
        raise SettingsError(
            f"unknown network '{spec}'; {nearest(spec, NETWORKS)} (or torchvision:NAME, timm:NAME, my.module:factory)"
        )


def saved_network(spec: str) -> Path:
    """Return the record (.json) of a network that `fit` or `train` saved, from its path or its run's folder.

    Raises UnfinishedError if the run is not finished, and NotFoundError or SettingsError if there is none.
    """
    path = Path(spec)
    if path.suffix == ".json" and path.is_file():
        return path
    records = [path / f"{name}.json" for name in SAVED_NAMES]
    for record in records:
        if record.exists() or record.with_suffix(".safetensors").exists():
            if (path / "run.json").exists() and not (path / "summary.json").exists():
                raise UnfinishedError(f"the run in {path} is not finished; run its command again to finish it")
            return record
    if path.is_dir():
        raise NotFoundError(
            f"no saved network in {path} ({found_at(path)}); give the folder of a finished `kcdcache fit` or `train`, "
            "or a network's name with --weights"
        )
    if spec in NETWORKS or ":" in spec:
        raise SettingsError(f"the teacher '{spec}' needs its weights: a safetensors or torch file, or a `fit` folder")
    hint = nearest(spec, NETWORKS)
    raise NotFoundError(
        f"no saved network at {path}; give the folder of a finished `fit`, or a network's name ({hint})"
    )
