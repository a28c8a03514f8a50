"""The teacher: a frozen network with its input transform, the images it sees and the fields it gives."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn

from kcdcache.datasets.datasets import Dataset
from kcdcache.errors import MismatchError, UnsafeError, against, first_difference, require_known
from kcdcache.networks import registry, taps
from kcdcache.networks.catalogue import saved_network
from kcdcache.networks.input_transform import InputTransform, resolve_device, use_threads
from kcdcache.networks.weights import NetworkRecord, digest_weights, load_into, load_network, load_weights
from kcdcache.settings import MachineSettings, Precision, TeacherSettings
from kcdcache.store.identity import Knowledge, TeacherIdentity
from kcdcache.teacher import fields
from kcdcache.teacher.fields import aggregated

STEPS, RATE, SLACK = 10, 0.3, 1e-4
"""of the search for a boundary image"""
OF_PROBABILITIES: dict[str, Any] = {"outputs": "probabilities"}
"""entry of a teacher's recorded transform if the logits are the logarithm of its outputs"""
Scores = Callable[[Float32[Tensor, "batch c h w"]], Float32[Tensor, "batch classes"]]
"""pixels in [0, 1] -> logits, differentiable"""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen network with everything that decides its outputs; made by `load` or `freeze`."""

    module: nn.Module
    """in eval mode, without gradients, channels_last, on `device`"""
    transform: InputTransform
    """applied to pixels in [0, 1]"""
    classes: tuple[str, ...]
    """class names, in the order of its logits"""
    identity: TeacherIdentity
    device: torch.device
    data: str | None = None
    """digest of the training split it learned from, if known"""


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
    weights_key: str | None = None,
    probabilities: bool = False,
) -> Teacher:
    """Return a frozen teacher for data with these classes and channels.

    Without `weights_path`, `spec` is the folder of a finished `fit` or `train`, or the JSON file of a saved network; it
    has its own architecture and input transform, and `mean`, `std` and `size` are not used. With `weights_path`, `spec`
    is a model spec, and `weights_path` a safetensors or torch file, or such a folder of the same architecture;
    `weights_key` names the weights to take of a file that has several. For `probabilities` see `freeze`.

    Raises SettingsError if the model spec is unknown or needs weights, MismatchError if the weights, classes or
    channels do not fit, UnsafeError if the weights or a saved network's spec could run code that the user did not name.
    """
    learned = None
    if weights_path is None or weights_path.is_dir():
        path = saved_network(str(weights_path or spec))
        record, state = load_network(path)
        _check_saved(record, path, classes, channels, None if weights_path is None else spec)
        spec, transform, where = record.architecture, record.transform, str(path)
        learned = (record.model_extra or {}).get("data")
    else:
        state, where = load_weights(weights_path, weights_key), str(weights_path)
        transform = InputTransform(mean, std, size)
    module = registry.build(spec, len(classes), channels=channels)
    load_into(module, state, where)
    found = freeze(module, transform, spec, classes, device, precision, probabilities)
    return replace(found, data=learned if isinstance(learned, str) else None)


def load_named(
    named: TeacherSettings, data: Dataset, precision: Precision, machine: MachineSettings, probabilities: bool = False
) -> Teacher:
    """Return the teacher that the settings name, for this data."""
    assert named.teacher is not None
    use_threads(machine.threads)
    return load(
        named.teacher,
        weights_path=named.weights,
        classes=data.classes,
        mean=_per_channel(named.teacher_mean, data.mean),
        std=_per_channel(named.teacher_std, data.std),
        size=named.teacher_size,
        device=resolve_device(machine.device),
        precision=precision,
        channels=len(data.mean),
        weights_key=named.weights_key,
        probabilities=probabilities,
    )


def _per_channel(given: tuple[float, ...] | None, usual: tuple[float, ...]) -> tuple[float, ...]:
    """Return the numbers given, one of them for every channel; those of the data for None."""
    if given is None:
        return usual
    return given * len(usual) if len(given) == 1 else given


def load_again(
    named: TeacherSettings, data: Dataset, knowledge: Knowledge, path: Path, machine: MachineSettings
) -> Teacher:
    """Return the teacher that the settings name, to run as the one that made a store; see `precision_of`."""
    probabilities = OF_PROBABILITIES.items() <= knowledge.teacher.transform.items()
    return load_named(named, data, precision_of(knowledge, path), machine, probabilities)


def precision_of(knowledge: Knowledge, path: Path) -> Precision:
    """Return the precision of the teacher that made a store; raises MismatchError if its logits were imported."""
    made_by = knowledge.teacher
    if made_by.imported or made_by.precision not in get_args(Precision):
        raise MismatchError(
            f"the logits in {path} were imported from elsewhere ({made_by.precision}): no teacher here can give them "
            "again; use a store that `kcdcache precompute --teacher` made"
        )
    return cast(Precision, made_by.precision)


def freeze(
    module: nn.Module,
    transform: InputTransform,
    architecture: str,
    classes: tuple[str, ...],
    device: torch.device | str,
    precision: Precision = "float32",
    probabilities: bool = False,
) -> Teacher:
    """Return a teacher made from a copy of a network; with `probabilities`, its logits are their logarithm.

    Raises SettingsError for an unknown precision.
    """
    require_known("precision", precision, get_args(Precision))
    frozen = copy.deepcopy(module).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights, shown = digest_weights(module.state_dict()), transform.document()
    if probabilities:
        frozen.register_forward_hook(partial(_take_logarithm, architecture))
        shown |= OF_PROBABILITIES
    return Teacher(
        module=frozen.eval().requires_grad_(False),
        transform=transform,
        classes=classes,
        identity=TeacherIdentity(architecture=architecture, weights=weights, transform=shown, precision=precision),
        device=torch.device(device),
    )


def probability_rows(values: Float[Tensor, "batch classes"], slack: float = 1e-3) -> Bool[Tensor, " batch"]:
    """Return which rows are probabilities or percentages: nothing below 0, and the sum 1 or 100 up to that share."""
    total = values.sum(1)
    return (values.amin(1) >= -1e-6) & (((total - 1).abs() <= slack) | ((total - 100).abs() <= 100 * slack))


def log_probabilities(values: Float[Tensor, "batch classes"], source: str) -> Float32[Tensor, "batch classes"]:
    """Return the logarithm of probabilities or percentages; that of 0 is about -87, and what is not finite is NaN.

    Raises MismatchError, naming their source, if a row is neither.
    """
    values, finite = values.float(), torch.isfinite(values)
    wrong = finite.all(1) & ~probability_rows(values, 1e-2)
    if wrong.any():
        row = values[wrong][0]
        raise MismatchError(
            f"--from-probabilities: {source} gives a row of numbers from {float(row.min()):.4g} to "
            f"{float(row.max()):.4g} with the sum {float(row.sum()):.4g}, expected are numbers from 0 to 1 (or 100) "
            "with that sum; if these are logits, give --from-logits or leave --from-probabilities out"
        )
    return values.clamp_min(torch.finfo(torch.float32).tiny).log().where(finite, torch.nan)


def _take_logarithm(architecture: str, module: nn.Module, inputs: object, found: Tensor) -> Tensor:
    """Forward hook; what is no batch of rows is refused where the network is first used."""
    rows = isinstance(found, Tensor) and found.ndim == 2
    return log_probabilities(found, f"the teacher {architecture}") if rows else found


def outputs(
    teacher: Teacher, pixels: Float32[Tensor, "batch channels h w"], names: Sequence[str]
) -> dict[str, Float32[Tensor, "batch ..."]]:
    """Return the named fields for a batch of pixels in [0, 1], in float32 on the teacher's device.

    Each row depends on its own image alone, up to rounding. The tensors may be used in training. Raises SettingsError
    if the network cannot give a field, MismatchError if it gives another number of logits than the data has classes.
    """
    wanted = {name: fields.parse(name) for name in names}
    teacher.module.eval()
    found: dict[str, Tensor] = {}
    pixels, device = pixels.to(teacher.device), teacher.device.type
    with (
        # cuDNN would use TF32 for float32, and pick algorithms by racing them: neither float32 nor repeatable
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        torch.autocast(device, dtype=torch.bfloat16, enabled=teacher.identity.precision == "bfloat16"),
    ):
        for look in dict.fromkeys(field.look for field in wanted.values()):
            seen = [field for field in wanted.values() if field.look == look]
            values = LOOKS[look](teacher, pixels, list(dict.fromkeys(tap for field in seen for tap in field.taps)))
            found |= {field.name: field.derive(*(values[tap] for tap in field.taps)) for field in seen}
    # copied outside inference mode, whose tensors autograd refuses, and contiguous as in a store: sums over another
    # layout round differently
    return {name: found[name].to(torch.float32, copy=True, memory_format=torch.contiguous_format) for name in names}


def tap_shapes_of(teacher: Teacher, image: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """Return tap -> shape of one sample's value for images (channels, h, w), by a forward pass on black ones."""
    found = _plain(teacher, torch.zeros(2, *image, device=teacher.device), list(taps.stage_taps(teacher.module)))
    return {name: tuple(value.shape[1:]) for name, value in found.items()}


def filter_profiles(network: nn.Module) -> dict[str, list[float]]:
    """Return stage -> quantiles of the norms of a network's filters (see `fields.aggregated`), computed on the CPU."""
    found = taps.filters(network)
    return {stage: aggregated([weight.detach().cpu() for weight in layers]).tolist() for stage, layers in found.items()}


def _check_saved(record: NetworkRecord, path: Path, classes: tuple[str, ...], channels: int, spec: str | None) -> None:
    architecture = record.architecture
    if spec is None and architecture.startswith("python:"):
        registry.require_known(architecture, len(classes), channels)
    elif spec is None and registry.runs_foreign_code(architecture):
        raise UnsafeError(
            f"{path} asks to import '{architecture}', which could run any code, so only you may name it: give "
            f"'{architecture}' as the network and {path.parent} as its weights"
        )
    if spec is not None and spec != architecture:
        raise MismatchError(f"{path} holds a network '{architecture}', not '{spec}'")
    if record.channels != channels:
        raise MismatchError(f"the network in {path} sees {record.channels} channels, the images have {channels}")
    if difference := first_difference(list(classes), list(record.classes), "classes"):
        place, data, network = difference
        raise MismatchError(f"the data and the network in {path} differ in {place}: {against(data, network)}")


def _plain(teacher: Teacher, pixels: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Return tap values of one forward pass, and always the logits, to check that the network fits the data."""
    with torch.inference_mode():
        values = taps.run(teacher.module, _inputs(teacher, pixels), list(dict.fromkeys(("logits", *names))))
    if values["logits"].shape[1] != len(teacher.classes):
        found = values["logits"].shape[1]
        raise MismatchError(
            f"{teacher.identity.architecture} gives {found} logits, the data has {len(teacher.classes)} classes"
        )
    return values


def _boundary(teacher: Teacher, pixels: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    std = torch.tensor(teacher.transform.std, dtype=torch.float32, device=teacher.device).view(-1, 1, 1)
    return boundary(lambda shown: teacher.module(_inputs(teacher, shown)).float(), pixels, std)


LOOKS: Mapping[fields.Look, Callable[[Teacher, Tensor, Sequence[str]], dict[str, Tensor]]] = {
    "plain": _plain,
    "rotated": lambda teacher, pixels, names: _plain(teacher, fields.rotated(pixels), names),
    "boundary": _boundary,
}
"""look -> the tap values on the images of that look"""


def _inputs(teacher: Teacher, pixels: Tensor) -> Tensor:
    return teacher.transform(pixels).contiguous(memory_format=torch.channels_last)


def boundary(
    scores: Scores, pixels: Float32[Tensor, "batch c h w"], std: Float32[Tensor, "c 1 1"]
) -> dict[str, Float32[Tensor, "batch ..."]]:
    """Return every image pushed just over the decision boundary to another class, and the teacher's logits on it.

    Up to 10 steps of 0.3 (gap + 1e-4) g / ||g|| along the gradient g of score(target) - score(base), in units of the
    normalised input (`std` per channel); gap is the absolute difference of the two scores. An image stays where its
    class first changes. The target is drawn by the teacher's probabilities of the other classes, from a hash of the
    image, so that a row depends on its own image alone. Images stay in [0, 1] and are rounded to whole 255ths before
    the final logits.

    Source: Heo et al., AAAI 2019 (arXiv 1805.05532), section 3.1, Eq. 4-6, and facts.md section 4; the original clips
    the normalised input at +-2.5 instead, and draws the target anew every time.
    """
    with torch.inference_mode(False), torch.enable_grad():
        start = pixels.clone()
        first = scores(start).detach()
        base = first.argmax(1)
        target = draw_target(first, base, image_hash(start))
        images = start
        still = torch.ones(len(start), dtype=torch.bool, device=start.device)
        for _ in range(STEPS):
            images, still = _pushed(scores, images, still, base, target, std)
        images = (images * 255).round() / 255
        return {"images": images, "logits": scores(images).detach()}


def draw_target(
    logits: Float32[Tensor, "batch classes"], base: Int64[Tensor, " batch"], draw: Float32[Tensor, " batch"]
) -> Int64[Tensor, " batch"]:
    """Draw for each row a class other than `base` by the row's probabilities; `draw` in [0, 1) is the random number."""
    others = logits.double().scatter(1, base[:, None], -torch.inf).softmax(1)
    reached = others.cumsum(1)
    chosen = torch.searchsorted(reached, draw.double()[:, None] * reached[:, -1:], right=True)[:, 0]
    chosen = chosen.clamp_max(logits.shape[1] - 1)
    # rounding may let the last draws reach a class without mass, such as base
    return torch.where(others.gather(1, chosen[:, None])[:, 0] > 0, chosen, others.argmax(1))


def image_hash(pixels: Float32[Tensor, "batch c h w"]) -> Float32[Tensor, " batch"]:
    """Return a number in [0, 1) per image, a function of its pixels in 65535ths alone, the same on every device."""
    values = (pixels.flatten(1) * 65535).round().long()
    place = torch.arange(values.shape[1], device=pixels.device)
    weight = (place * 2654435761 + 40503) & 0xFFFFFFFF | 1
    mixed = ((values + 1) * weight) & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 15)) * 2246822519 & 0xFFFFFFFF
    total = mixed.sum(1) & 0xFFFFFFFF
    total = ((total ^ (total >> 16)) * 3266489917) & 0xFFFFFFFF
    return ((total >> 8).float()) / 2**24


def _pushed(
    scores: Scores, images: Tensor, still: Tensor, base: Tensor, target: Tensor, std: Tensor
) -> tuple[Tensor, Tensor]:
    """Move the images that are still of their class by one step; return them, and a mask of those."""
    images = images.detach().requires_grad_(True)
    logits = scores(images)
    still = still & (logits.argmax(1) == base)
    gap = logits.gather(1, target[:, None])[:, 0] - logits.gather(1, base[:, None])[:, 0]
    gradient = torch.autograd.grad(gap.sum(), images)[0] * std
    norm = gradient.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    step = RATE * (gap.detach().abs() + SLACK) / norm
    moved = (images.detach() + std * step.view(-1, 1, 1, 1) * gradient).clamp(0, 1)
    return torch.where(still.view(-1, 1, 1, 1), moved, images.detach()), still
