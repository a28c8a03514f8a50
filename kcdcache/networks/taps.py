"""Feature taps: inner values of a network, with the same names for every family."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kcdcache.errors import SettingsError, nearest
from kcdcache.networks.mobilenet import MobileNetV2
from kcdcache.networks.resnet import ResNet, ResNet50, WideResNet
from kcdcache.networks.shufflenet import ShuffleV1, ShuffleV2
from kcdcache.networks.vgg import VGG

T = TypeVar("T")

FILTERS = "filters:"
"""prefix of the profile of a stage's own filters, among a student's taps"""


class Tap(NamedTuple):
    """The input or output of one submodule ("" is the network itself)."""

    path: str
    side: Literal["input", "output"]


def _layer_taps(module: Any, stem: str, relu: str, count: int = 3) -> dict[str, Tap]:
    """Return the taps of `layer1` to `layer<count>`, whose last blocks end in the ReLU of that name."""
    layers = {n: len(module.get_submodule(f"layer{n}")) for n in range(1, count + 1)}
    stages = {f"stage{n}": Tap(f"layer{n}", "output") for n in layers}
    before = {f"stage{n}.pre": Tap(f"layer{n}.{blocks - 1}.{relu}", "input") for n, blocks in layers.items()}
    return {"stage0": Tap(stem, "output"), **stages, **before}


def _wide_resnet_taps(module: Any) -> dict[str, Tap]:
    stages = {f"stage{n}": Tap(f"block{n}", "output") for n in (1, 2, 3)}
    norms = ("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1")
    before = {f"stage{n}.pre": Tap(path, "output") for n, path in enumerate(norms, start=1)}
    return {"stage0": Tap("conv1", "output"), **stages, **before}


def _vgg_taps(module: Any) -> dict[str, Tap]:
    stages = {f"stage{n}": Tap(f"block{n}", "output") for n in range(5)}
    relus = {n: len(module.get_submodule(f"block{n}")) - 1 for n in range(1, 5)}
    return {**stages, **{f"stage{n}.pre": Tap(f"block{n}.{relu}", "input") for n, relu in relus.items()}}


def _mobilenet_taps(module: Any) -> dict[str, Tap]:
    ends = {f"stage{n}": Tap(f"blocks.{index}", "output") for n, index in enumerate((1, 2, 4, 6), start=1)}
    # its blocks end without activation; RepDistiller gives the same with and without preact, too
    return {"stage0": Tap("conv1", "output"), **ends, **{f"{name}.pre": tap for name, tap in ends.items()}}


TAPS: dict[type[nn.Module] | str, Callable[[Any], dict[str, Tap]]] = {
    ResNet: partial(_layer_taps, stem="relu", relu="relu2"),
    ResNet50: partial(_layer_taps, stem="relu", relu="relu3", count=4),
    WideResNet: _wide_resnet_taps,
    VGG: _vgg_taps,
    MobileNetV2: _mobilenet_taps,
    ShuffleV1: partial(_layer_taps, stem="relu", relu="relu3"),
    ShuffleV2: partial(_layer_taps, stem="relu", relu="relu3"),
    "torchvision.models.resnet.ResNet": partial(_layer_taps, stem="maxpool", relu="relu", count=4),
}
"""family -> its stages: `stage0` is the stem, `stageN` RepDistiller's feature N with preact=False, and `stageN.pre` the
same with preact=True: the value before the ReLU of `stageN` (ShuffleV2: of `stageN` before its shuffle; wide networks:
before that of the next stage; MobileNetV2: the same, as it activates no stage)"""


def of_family(table: Mapping[Any, T], module: nn.Module) -> T | None:
    """Return a table's entry for a network's class, or its name for classes of libraries that need not be loaded."""
    family = type(module)
    return table.get(family, table.get(f"{family.__module__}.{family.__qualname__}"))


def stage_taps(module: nn.Module) -> dict[str, Tap]:
    """Return all taps of a network by name.

    Every network has `logits` (its output) and, if it has a linear classifier, `penultimate` (the input of the last
    `nn.Linear`). The families in `TAPS` have stages, too.
    """
    family = of_family(TAPS, module)
    stages = {} if family is None else family(module)
    linear = [path for path, inner in module.named_modules() if isinstance(inner, nn.Linear)]
    penultimate = {"penultimate": Tap(linear[-1], "input")} if linear else {}
    return {**stages, **penultimate, "logits": Tap("", "output")}


def filters(module: nn.Module) -> dict[str, list[Tensor]]:
    """Return stage -> weights of its convolutions, shortcuts included, in the network's order.

    A stage has all convolutions after the previous stage, up to its own tap. Raises SettingsError for families without
    known stages.
    """
    paths = [path for path, _ in module.named_modules()]
    ends = {
        name: max(place for place, path in enumerate(paths) if f"{path}.".startswith(f"{tap.path}."))
        for name, tap in stage_taps(module).items()
        if name.startswith("stage") and not name.endswith(".pre")
    }
    if not ends:
        raise SettingsError(f"the stages of {type(module).__name__} are not known, so its filters have no groups")
    found: dict[str, list[Tensor]] = {name: [] for name in ends}
    for place, (_, inner) in enumerate(module.named_modules()):
        following = [name for name, end in ends.items() if place <= end]
        if isinstance(inner, nn.Conv2d) and following:
            found[min(following, key=lambda name: ends[name])].append(inner.weight)
    return {name: layers for name, layers in found.items() if layers}


def run(
    module: nn.Module, pixels: Float[Tensor, "batch channels h w"], names: Sequence[str]
) -> dict[str, Float[Tensor, "batch ..."]]:
    """Return the values of some taps in one forward pass over transformed pixels.

    The values have gradients if the pass does. The network is left without hooks, also after an exception. Raises
    SettingsError if a name is not a tap of this network, or the network does not fit the tap.
    """
    taps, found = stage_taps(module), dict[str, Any]()
    with ExitStack() as hooks:
        for name in dict.fromkeys(names):
            if name not in taps:
                raise SettingsError(f"{type(module).__name__} has no value '{name}'; {nearest(name, list(taps))}")
            hooks.enter_context(_listen(module.get_submodule(taps[name].path), taps[name].side, name, found))
        logits = module(pixels)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise SettingsError(f"{type(module).__name__} should return logits of shape (batch, classes)")
    for name in names:
        _check(module, name, taps[name], found.get(name), logits.shape[1])
    return {name: found[name] for name in names}


def _listen(module: nn.Module, side: Literal["input", "output"], name: str, found: dict[str, Any]) -> RemovableHandle:
    def keep_input(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # torchvision blocks share one in-place ReLU, of which the last call counts
        found[name] = inputs[0].clone() if getattr(module, "inplace", False) else inputs[0]

    def keep_output(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        found[name] = output

    if side == "input":
        return module.register_forward_pre_hook(keep_input)
    return module.register_forward_hook(keep_output)


def _check(module: nn.Module, name: str, tap: Tap, value: Any, classes: int) -> None:
    network = type(module).__name__
    if not isinstance(value, Tensor):
        raise SettingsError(f"'{name}' of {network}: its forward pass gives no tensor at '{tap.path}'")
    if name != "penultimate":
        return
    size = module.get_submodule(tap.path).out_features
    if size != classes or value.ndim != 2:
        raise SettingsError(
            f"'penultimate' of {network}: its last linear layer '{tap.path}' turns {tuple(value.shape)} into {size} "
            f"values, but the network gives {classes} logits, so it is not the classifier; define the classifier last"
        )
