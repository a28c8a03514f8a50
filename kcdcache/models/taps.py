"""Feature taps: inner values of a network by names that are the same for every family."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torchvision
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kcdcache.config import nearest
from kcdcache.errors import SettingsError
from kcdcache.models.resnet import ResNet
from kcdcache.models.wrn import WideResNet


class Tap(NamedTuple):
    """Where a value is read: the input or the output of one submodule ("" is the network itself)."""

    path: str
    side: Literal["input", "output"]


def _resnet_taps(module: Any) -> dict[str, Tap]:
    last = len(module.layer1) - 1
    stages = {f"stage{n}": Tap(f"layer{n}", "output") for n in (1, 2, 3)}
    before = {f"stage{n}.pre": Tap(f"layer{n}.{last}.relu2", "input") for n in (1, 2, 3)}
    return {"stage0": Tap("relu", "output"), **stages, **before}


def _wide_resnet_taps(module: Any) -> dict[str, Tap]:
    stages = {f"stage{n}": Tap(f"block{n}", "output") for n in (1, 2, 3)}
    norms = ("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1")
    before = {f"stage{n}.pre": Tap(path, "output") for n, path in enumerate(norms, start=1)}
    return {"stage0": Tap("conv1", "output"), **stages, **before}


def _torchvision_resnet_taps(module: Any) -> dict[str, Tap]:
    return {"stage0": Tap("maxpool", "output"), **{f"stage{n}": Tap(f"layer{n}", "output") for n in (1, 2, 3, 4)}}


TAPS: dict[type[nn.Module], Callable[[Any], dict[str, Tap]]] = {
    ResNet: _resnet_taps,
    WideResNet: _wide_resnet_taps,
    torchvision.models.ResNet: _torchvision_resnet_taps,
}
"""family -> its stages: `stage0` is the stem, `stageN` what RepDistiller calls feature N with preact=False, and
`stageN.pre` the same with preact=True (the value a ReLU turns into the next input)"""


def stage_taps(module: nn.Module) -> dict[str, Tap]:
    """Return all taps of a network by name.

    Every network has `logits` (its output) and, where it ends in a linear classifier, `penultimate` (the vector that
    classifier reads: the input of the last `nn.Linear`). The families in `TAPS` have stages besides.
    """
    stages = TAPS[type(module)](module) if type(module) in TAPS else {}
    linear = [path for path, inner in module.named_modules() if isinstance(inner, nn.Linear)]
    penultimate = {"penultimate": Tap(linear[-1], "input")} if linear else {}
    return {**stages, **penultimate, "logits": Tap("", "output")}


def run(
    module: nn.Module, pixels: Float[Tensor, "batch channels h w"], names: Sequence[str]
) -> dict[str, Float[Tensor, "batch ..."]]:
    """Return the named values of one forward pass over transformed pixels, in the order asked for.

    The values carry gradients if the pass does. The network is left without hooks, also after an exception.

    Raises:
        SettingsError: a name is not a tap of this network, or the network does not do what the tap assumes.
    """
    taps = _known(module, names)
    found: dict[str, Any] = {}
    with ExitStack() as hooks:
        for name, tap in taps.items():
            hooks.enter_context(_listen(module.get_submodule(tap.path), tap.side, name, found))
        logits = module(pixels)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise SettingsError(f"{type(module).__name__} should return logits of shape (batch, classes)")
    for name, tap in taps.items():
        _check(module, name, tap, found, logits.shape[1])
    return {name: found[name] for name in names}


def _known(module: nn.Module, names: Sequence[str]) -> dict[str, Tap]:
    taps = stage_taps(module)
    for name in names:
        if name not in taps:
            raise SettingsError(f"{type(module).__name__} has no value '{name}'; {nearest(name, list(taps))}")
    return {name: taps[name] for name in names}


def _listen(module: nn.Module, side: Literal["input", "output"], name: str, found: dict[str, Any]) -> RemovableHandle:
    def keep_input(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        found[name] = inputs[0]

    def keep_output(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        found[name] = output

    if side == "input":
        return module.register_forward_pre_hook(keep_input)
    return module.register_forward_hook(keep_output)


def _check(module: nn.Module, name: str, tap: Tap, found: dict[str, Any], classes: int) -> None:
    network = type(module).__name__
    if not isinstance(found.get(name), Tensor):
        raise SettingsError(f"'{name}' of {network}: its forward pass gives no tensor at '{tap.path}'")
    if name != "penultimate":
        return
    size = module.get_submodule(tap.path).out_features
    if size != classes or found[name].ndim != 2:
        shape = tuple(found[name].shape)
        raise SettingsError(
            f"'penultimate' of {network}: its last linear layer '{tap.path}' turns {shape} into {size} values, but the "
            f"network gives {classes} logits, so it is not the classifier; define the classifier last"
        )
