"""The teacher: a frozen network that owns its input transform, and the fields it gives."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from kcdcache.errors import CorruptionError, MismatchError, UnsafeError, first_difference
from kcdcache.networks import registry, taps
from kcdcache.networks.catalogue import saved_network
from kcdcache.networks.input_transform import InputTransform, transform_from
from kcdcache.networks.weights import digest_weights, load_into, load_network, load_weights
from kcdcache.settings import Precision
from kcdcache.store.identity import TeacherIdentity
from kcdcache.teacher import boundary_images, fields
from kcdcache.teacher.fields import aggregated


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen network with everything that decides its outputs; made by `load` or `freeze`."""

    module: nn.Module
    """the network: in eval mode, without gradients, channels_last, on `device`"""
    transform: InputTransform
    """what it does to pixels in [0, 1]"""
    architecture: str
    """model spec"""
    classes: tuple[str, ...]
    """class names, in the order of its logits"""
    identity: TeacherIdentity
    """digest of all the above; binds its knowledge to it"""
    device: torch.device
    """where it runs"""
    precision: Precision
    """arithmetic of its forward pass"""
    data: str | None = None
    """digest of the training split it learned from, where its folder tells"""


def load(
    spec: str,
    *,
    weights_path: Path | None,
    classes: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    size: int | None,
    device: torch.device | str,
    precision: Precision,
    channels: int = 3,
) -> Teacher:
    """Return a frozen teacher for data with these classes and channels.

    Without `weights_path`, `spec` is the folder of a finished `fit` or `train`, or the JSON file of a saved network; it
    brings its own architecture and input transform, and `mean`, `std` and `size` are not used. With `weights_path`,
    `spec` is a model spec, and `weights_path` a safetensors or torch file, or such a folder of the same architecture.

    Raises:
        NotFoundError: there is nothing at a path.
        SettingsError: the model spec is unknown, or needs weights.
        MismatchError: the weights, classes or channels are others than expected; names the first difference.
        UnsafeError: the weights, or a saved network's spec, could run code the user did not name.
        CorruptionError: a file is damaged.
    """
    if weights_path is None or weights_path.is_dir():
        record = saved_network(str(weights_path or spec))
        document, state = load_network(record)
        _check_saved(document, record, classes, channels, None if weights_path is None else spec)
        spec, transform, where = document["architecture"], transform_from(document["transform"]), str(record)
        learned = document.get("data")
    else:
        learned = None
        state, where = load_weights(weights_path), str(weights_path)
        transform = InputTransform(mean, std, size)
    module = registry.build(spec, len(classes), channels=channels)
    load_into(module, state, where)
    found = _frozen(module, transform, spec, classes, torch.device(device), precision)
    return replace(found, data=learned if isinstance(learned, str) else None)


def freeze(
    module: nn.Module,
    transform: InputTransform,
    architecture: str,
    classes: tuple[str, ...],
    device: torch.device | str,
    precision: Precision = "float32",
) -> Teacher:
    """Return a teacher made from a copy of a network; the network itself stays as it is."""
    return _frozen(copy.deepcopy(module), transform, architecture, classes, torch.device(device), precision)


def outputs(
    teacher: Teacher, pixels: Float32[Tensor, "batch channels h w"], names: Sequence[str]
) -> dict[str, Float32[Tensor, "batch ..."]]:
    """Return the named fields for a batch of pixels in [0, 1], in float32 on the teacher's device.

    Each row depends on its own image alone, up to rounding. The tensors may be used in training. The names are those
    of `fields.parse`.

    Raises:
        SettingsError: a field is unknown, or this network cannot give it.
        MismatchError: the network gives another number of logits than the data has classes.
    """
    wanted = {name: fields.parse(name) for name in names}
    teacher.module.eval()
    found: dict[str, Tensor] = {}
    pixels = pixels.to(teacher.device)
    with _deterministic(), _autocast(teacher):
        for look in dict.fromkeys(field.look for field in wanted.values()):
            seen = [field for field in wanted.values() if field.look == look]
            values = LOOKS[look](teacher, pixels, list(dict.fromkeys(tap for field in seen for tap in field.taps)))
            found |= {field.name: field.derive(*(values[tap] for tap in field.taps)) for field in seen}
    # copied outside inference mode, whose tensors autograd refuses, and laid out as rows of a store are: sums over
    # another layout round differently
    return {name: found[name].to(torch.float32, copy=True, memory_format=torch.contiguous_format) for name in names}


def tap_shapes_of(teacher: Teacher, height: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return tap -> shape of one sample's value for images of this size, found by a forward pass on a black image."""
    pixels = torch.zeros(1, len(teacher.transform.mean), height, width, device=teacher.device)
    found = _plain(teacher, pixels, list(taps.stage_taps(teacher.module)))
    return {name: tuple(value.shape[1:]) for name, value in found.items()}


def field_shapes(
    teacher: Teacher, height: int, width: int, names: Sequence[str], channels: int = 3
) -> dict[str, tuple[int, ...]]:
    """Return the shape of one row of each field for images of this size, found by a forward pass on a black image.

    Raises:
        SettingsError: a field is unknown, or this network cannot give it.
    """
    rows = outputs(teacher, torch.zeros(1, channels, height, width), names)
    return {name: tuple(row.shape[1:]) for name, row in rows.items()}


def _frozen(
    module: nn.Module,
    transform: InputTransform,
    architecture: str,
    classes: tuple[str, ...],
    device: torch.device,
    precision: Precision,
) -> Teacher:
    digest = digest_weights(module.state_dict())
    module = module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Teacher(
        module=module.eval().requires_grad_(False),
        transform=transform,
        architecture=architecture,
        classes=classes,
        identity=TeacherIdentity(
            architecture=architecture, weights=digest, transform=transform.document(), precision=precision
        ),
        device=device,
        precision=precision,
    )


def filter_profiles(network: nn.Module) -> dict[str, list[float]]:
    """Return stage -> quantiles of the norms of a network's filters (see `fields.aggregated`), computed on the CPU.

    Raises:
        SettingsError: the network's stages are not known.
    """
    found = taps.filters(network)
    return {stage: aggregated([weight.detach().cpu() for weight in layers]).tolist() for stage, layers in found.items()}


def _check_saved(
    document: dict[str, Any], record: Path, classes: tuple[str, ...], channels: int, spec: str | None
) -> None:
    architecture, names = document["architecture"], document["classes"]
    if not isinstance(architecture, str) or not isinstance(names, list):
        raise CorruptionError(f"{record} should give the architecture as text and the classes as a list")
    if spec is None and registry.runs_foreign_code(architecture):
        raise UnsafeError(
            f"{record} asks to import '{architecture}', which could run any code, so only you may name it: give "
            f"'{architecture}' as the network and {record.parent} as its weights"
        )
    if spec is not None and spec != architecture:
        raise MismatchError(f"{record} holds a network '{architecture}', not '{spec}'")
    if document["channels"] != channels:
        raise MismatchError(f"the network in {record} sees {document['channels']} channels, the images have {channels}")
    if difference := first_difference(list(classes), names, "classes"):
        place, data, network = difference
        raise MismatchError(f"the data and the network in {record} differ in {place}: {data!r} against {network!r}")


def _plain(teacher: Teacher, pixels: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Return inner values of one forward pass, and the logits, which tell whether the network fits the data."""
    with torch.inference_mode():
        values = taps.run(teacher.module, _inputs(teacher, pixels), list(dict.fromkeys(("logits", *names))))
    if values["logits"].shape[1] != len(teacher.classes):
        found = values["logits"].shape[1]
        raise MismatchError(f"{teacher.architecture} gives {found} logits, the data has {len(teacher.classes)} classes")
    return values


def _rotated(teacher: Teacher, pixels: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    return _plain(teacher, fields.rotated(pixels), names)


def _boundary(teacher: Teacher, pixels: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    std = torch.tensor(teacher.transform.std, dtype=torch.float32, device=teacher.device).view(-1, 1, 1)
    made = boundary_images.boundary(lambda shown: teacher.module(_inputs(teacher, shown)).float(), pixels, std)
    return made._asdict()


LOOKS: Mapping[fields.Look, Callable[[Teacher, Tensor, Sequence[str]], dict[str, Tensor]]] = {
    "plain": _plain,
    "rotated": _rotated,
    "boundary": _boundary,
}
"""which images the teacher sees -> the named values on them"""


def _inputs(teacher: Teacher, pixels: Tensor) -> Tensor:
    return teacher.transform(pixels).contiguous(memory_format=torch.channels_last)


def _autocast(teacher: Teacher) -> AbstractContextManager[Any]:
    return torch.autocast(teacher.device.type, dtype=torch.bfloat16, enabled=teacher.precision == "bfloat16")


def _deterministic() -> AbstractContextManager[Any]:
    # cuDNN would use TF32 for float32, and pick algorithms by racing them: neither float32 nor repeatable
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
