"""Networks by name: our zoo, torchvision, timm, any importable factory, or one given as a Python object."""

import hashlib
import importlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from kcdcache.errors import SettingsError, nearest
from kcdcache.networks import taps
from kcdcache.networks.catalogue import NETWORKS, TYPED, require_known_name

logger = logging.getLogger(__name__)

# without their training-only second outputs, and without a warning about initialisation
TORCHVISION_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


def build(spec: str, classes: int, seed: int | None = None, channels: int = 3) -> nn.Module:
    """Return a network on the CPU whose initial weights depend on spec, shapes and `seed` alone.

    `spec` is a name in `NETWORKS`, `torchvision:NAME`, `timm:NAME`, a name that `adopt` returned in this process, or
    `my.module:factory`, which is imported and called, see `call`. `seed` is in [0, 2^64), 0 if None. Torch's global
    generator is not changed. Raises SettingsError if the name is unknown, its package is missing, or it does not take
    these channels.
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
    """Return whether building `spec` runs the user's code, imported or given as an object.

    >>> runs_foreign_code("my.module:factory"), runs_foreign_code("timm:resnet18"), runs_foreign_code("wrn_16_2")
    (True, False, False)
    """
    return ":" in spec and spec.partition(":")[0] not in ("torchvision", "timm")


def _maker(spec: str, classes: int, channels: int) -> Callable[[], nn.Module]:
    require_known_name(spec)
    if spec in NETWORKS:
        return partial(NETWORKS[spec], classes, channels)
    source, _, name = spec.partition(":")
    return PACKAGES.get(source, partial(_factory, source))(name, classes, channels)


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


Factory = Callable[..., nn.Module]
OWN: dict[str, Factory] = {}
"""factories given as Python objects in this process, by name without the prefix; see `adopt`"""
CLASSES, CHANNELS = ("num_classes", "classes", "n_classes", "num_labels"), ("in_channels", "channels", "in_chans")
"""names of parameters that take the number of classes, of channels"""
LIBRARIES = {"torch", "torchvision", "timm"}
"""packages whose versions are recorded, so that their sources need no digest"""


def adopt(factory: Factory, classes: int, channels: int = 3) -> str:
    """Make a factory known to this process and return its name for `build`: `python:CLASS@DIGEST`, see `name_of`.

    The factory is called as by `call`, here and for every network that is built. Raises SettingsError if it does not
    return an nn.Module.
    """
    with torch.random.fork_rng(devices=[]):
        name = name_of(call(factory, classes, channels, repr(factory)))
    OWN[name.removeprefix("python:")] = factory
    return name


def name_of(network: nn.Module) -> str:
    """Return the name of a network that was given as an object, with 12 hex digits of the SHA-256 of its code.

    The digest is over the network's structure (its `repr`) and the source of its classes, but for those of torch,
    torchvision and timm. A class whose source cannot be read counts by its name, and a warning says so.
    """
    kinds = {type(module) for module in network.modules()}
    own = sorted((kind for kind in kinds if kind.__module__.split(".")[0] not in LIBRARIES), key=_full_name)
    state = hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", repr(network)).encode())  # addresses differ from run to run
    for kind in own:
        state.update(f"\0{_full_name(kind)}\0{_source(kind)}".encode())
    return f"python:{type(network).__name__}@{state.hexdigest()[:12]}"


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        logger.warning("the source of %s cannot be read: a change of its code will not be noticed", kind.__qualname__)
        return ""


def call(factory: Factory, classes: int, channels: int, name: str) -> nn.Module:
    """Return the network of a factory, which gets the number of classes and channels as far as it takes them.

    By the first parameter of each kind in `CLASSES` and `CHANNELS`; where it names none, the classes go to the only
    parameter without a default, or as `num_classes` to a factory that takes any keyword. Raises SettingsError, with
    `name`, if it needs more than that or does not return an nn.Module.
    """
    try:
        given, parameters = dict[str, int](), inspect.signature(factory).parameters
    except ValueError:  # of a built-in
        return _require_network(factory(), name)
    for names, value in ((CLASSES, classes), (CHANNELS, channels)):
        given |= dict.fromkeys([known for known in names if known in parameters][:1], value)
    needed = [key for key, one in parameters.items() if one.default is one.empty and one.kind not in VARIABLE]
    missing, any_keyword = [key for key in needed if key not in given], inspect.Parameter.VAR_KEYWORD
    if not given.keys() & set(CLASSES):
        if len(missing) == 1:
            return _require_network(factory(classes, **given), name)
        if any(one.kind is any_keyword for one in parameters.values()):
            given["num_classes"], missing = classes, []
    if missing:
        raise SettingsError(
            f"{name} needs {', '.join(missing)}, which are not known here; a factory gets the number of classes as "
            f"{' or '.join(CLASSES[:2])} (or as its only parameter): wrap it, as in lambda num_classes: ..."
        )
    return _require_network(factory(**given), name)


VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _require_network(made: object, name: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise SettingsError(f"{name} should return a torch.nn.Module, it returned {type(made).__name__}")
    return made


def _adopted(name: str, classes: int, channels: int) -> Callable[[], nn.Module]:
    if name not in OWN:
        raise SettingsError(
            f"the network python:{name} was given as a Python object and cannot be made by its name: give the object "
            "again, from Python, or a factory that can be imported, as my.module:factory"
        )
    return partial(call, OWN[name], classes, channels, f"python:{name}")


PACKAGES: dict[str, Callable[[str, int, int], Callable[[], nn.Module]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "python": _adopted,
}
"""prefix of a spec -> function of (name, classes, channels) that returns a maker"""


def _factory(module_name: str, name: str, classes: int, channels: int) -> Callable[[], nn.Module]:
    here = f"{module_name}:{name}" in TYPED
    try:
        with _current_folder() if here else nullcontext():
            module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        places = "the current folder or on PYTHONPATH" if here else "a folder on PYTHONPATH"
        raise SettingsError(f"'{module_name}:{name}': {error}; is its file in {places}?") from None
    factory = getattr(module, name, None)
    if not callable(factory):
        hint = nearest(name, [key for key in vars(module) if not key.startswith("_")])
        raise SettingsError(f"{module_name} has no function '{name}'; {hint}")
    return partial(call, factory, classes, channels, f"{module_name}:{name}")


@contextmanager
def _current_folder() -> Iterator[None]:
    """Let modules be imported from the current folder, after all other places: it can replace no installed package."""
    folder = os.getcwd()
    sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.reverse()
        sys.path.remove(folder)  # the last one, which may be there twice
        sys.path.reverse()


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
