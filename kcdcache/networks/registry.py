"""Networks by name: our zoo, torchvision, timm, or any importable factory."""

import hashlib
import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from kcdcache.errors import SettingsError, nearest
from kcdcache.networks import taps
from kcdcache.networks.catalogue import NETWORKS, require_known_name

# without their training-only second outputs, and without a warning about initialisation
TORCHVISION_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def build(spec: str, classes: int, seed: int | None = None, channels: int = 3) -> nn.Module:
    """Return a network on the CPU whose initial weights depend on spec, shapes and `seed` alone.

    `spec` is a name in `NETWORKS`, `torchvision:NAME`, `timm:NAME`, or `my.module:factory`, which is imported and
    called with `num_classes=classes`. `seed` is in [0, 2^64), 0 if None. Torch's global generator is not changed.
    Raises SettingsError if the name is unknown, its package is missing, or it does not take these channels.
    """
    make = _maker(spec, classes, channels)
    with torch.random.fork_rng(devices=[]):
        # only the CPU's generator: torch.manual_seed would reseed the GPUs for the whole process
        torch.default_generator.manual_seed(torch_seed(seed or 0))
        return make()


def require_known(spec: str, classes: int, channels: int = 3) -> None:
    """Raise SettingsError unless `build` can make this network."""
    _maker(spec, classes, channels)


def runs_foreign_code(spec: str) -> bool:
    """Return whether building `spec` imports the user's code.

    >>> runs_foreign_code("my.module:factory"), runs_foreign_code("timm:resnet18"), runs_foreign_code("wrn_16_2")
    (True, False, False)
    """
    return ":" in spec and spec.partition(":")[0] not in PACKAGES


def _maker(spec: str, classes: int, channels: int) -> Callable[[], nn.Module]:
    require_known_name(spec)
    if spec in NETWORKS:
        return partial(NETWORKS[spec], classes, channels)
    source, _, name = spec.partition(":")
    return PACKAGES[source](name, classes, channels) if source in PACKAGES else _factory(source, name, classes)


def _torchvision(name: str, classes: int, channels: int) -> Callable[[], nn.Module]:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise SettingsError(f"unknown network 'torchvision:{name}'; {nearest(name, known)}")
    if channels != 3:
        raise SettingsError(f"torchvision:{name} takes 3 channels, the images have {channels}; use timm:NAME instead")
    options = TORCHVISION_OPTIONS.get(name, {})
    return partial(torchvision.models.get_model, name, weights=None, num_classes=classes, **options)


def _timm(name: str, classes: int, channels: int) -> Callable[[], nn.Module]:
    try:
        import timm
    except ImportError:
        raise SettingsError(f"timm:{name} needs the package timm: pip install 'kcdcache[timm]'") from None
    if not timm.is_model(name):
        raise SettingsError(f"unknown network 'timm:{name}'; {nearest(name, timm.list_models())}")
    return partial(timm.create_model, name, pretrained=False, num_classes=classes, in_chans=channels)


PACKAGES: dict[str, Callable[[str, int, int], Callable[[], nn.Module]]] = {"torchvision": _torchvision, "timm": _timm}
"""prefix of a spec -> function of (name, classes, channels) that returns a maker"""


def _factory(module_name: str, name: str, classes: int) -> Callable[[], nn.Module]:
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise SettingsError(f"'{module_name}:{name}': {error}; is its folder on PYTHONPATH?") from None
    factory = getattr(module, name, None)
    if not callable(factory):
        hint = nearest(name, [key for key in vars(module) if not key.startswith("_")])
        raise SettingsError(f"{module_name} has no function '{name}'; {hint}")

    def make() -> nn.Module:
        network = factory(num_classes=classes)
        if not isinstance(network, nn.Module):
            found = type(network).__name__
            raise SettingsError(f"{module_name}:{name} should return a torch.nn.Module, it returned {found}")
        return network

    return make


def torch_seed(seed: int) -> int:
    """Return a seed for torch's CPU generator from one in [0, 2^64), hashed as torch keeps only the low 32 bits."""
    return int.from_bytes(hashlib.sha256(f"kcdcache weights {seed}".encode()).digest()[:8], "little")


@lru_cache(maxsize=32)
def tap_shapes(name: str, classes: int, channels: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return tap -> shape of one sample, (channels, h, w) or (size,), for images of this size.

    Raises SettingsError if the network is unknown or cannot take such images.
    """
    with torch.device("meta"):
        network = build(name, classes, channels=channels).eval()
        names = list(taps.stage_taps(network))
        try:
            found = taps.run(network, torch.empty(2, channels, height, width), names)
        except RuntimeError as error:
            first = str(error).split("\n")[0]
            raise SettingsError(f"{name} cannot see images of {channels}x{height}x{width} pixels: {first}") from None
    return {tap: tuple(value.shape[1:]) for tap, value in found.items()}
