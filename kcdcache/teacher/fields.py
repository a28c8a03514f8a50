"""The teacher's fields by name: the values they are made from, their encoding, and how two of them are mixed.

The reductions below are applied to the teacher's values when a store is filled, and to the student's in every step.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional

from kcdcache.errors import SettingsError, nearest
from kcdcache.store.identity import QUANTILES
from kcdcache.views.mixing import mix_values

Look = Literal["plain", "rotated", "boundary"]
"""which images the teacher sees: a view, the view in four rotations, or a sample just beyond its decision boundary"""

Taps = Mapping[str, tuple[int, ...]]
"""tap of a network -> shape of one sample's value there"""

STAGE = r"(stage\d+(?:\.pre)?)"
SIDE = r"([1-9]\d{0,3})"
TURNS = 4


@dataclass(frozen=True, kw_only=True)
class Field:
    """How one field is made."""

    name: str
    look: Look = "plain"
    taps: tuple[str, ...] = ()
    """values of the teacher's forward pass that it is made from"""
    derive: Callable[..., Tensor] = lambda value: value
    """those values, batch first -> the field, batch first"""
    encoding: str | None = None
    """the only encoding it may have; None if the user chooses"""


def parse(name: str) -> Field:
    """Return the field of that name; raises SettingsError if it is unknown.

    `logits`; `penultimate` (the classifier's input); `attention:STAGE:HxW` (the stage's normalised attention map at
    that size); `fsp:STAGE:STAGE` (the Gram matrix of two stages); `maps:STAGE` (the whole feature map, of `STAGE.pre`
    before its last ReLU); `pooled:STAGE` (the mean of each of its channels); `rotations:logits`,
    `rotations:penultimate` (on the view turned by 0, 90, 180 and 270 degrees); `boundary:images`, `boundary:logits` (an
    adversarial image just beyond the decision boundary).
    """
    for form, described in KINDS.items():
        if match := re.fullmatch(form, name):
            return Field(name=name, **described(*match.groups()))
    raise SettingsError(f"unknown field '{name}'; {nearest(name, EXAMPLES)}")


def expand(names: Iterable[str], teacher: Callable[[], Taps]) -> tuple[str, ...]:
    """Return field names with the short ones expanded, each once, in order.

    Short are `rotations` and `boundary` (both parts), `attention` (every stage but the stem, at its own size), `fsp`
    (consecutive stages), `maps` and `pooled` (every stage but the stem). `teacher` returns the teacher's taps; it is
    called only if needed, since some networks lack some of their taps. Raises SettingsError if a name is unknown.
    """
    found: dict[str, None] = {}
    for name in names:
        for part in SHORT[name](teacher()) if name in SHORT else [name]:
            found[parse(part).name] = None
    return tuple(found)


def encoding_for(name: str, asked: str) -> str:
    """Return the encoding of a field: images are stored as bytes, and `top` is for logits only."""
    if (only := parse(name).encoding) is not None:
        return only
    return "float16" if name != "logits" and asked.startswith("top") else asked


def row_shape(name: str, taps: Taps, image: tuple[int, int, int]) -> tuple[int, ...]:
    """Return the shape of one sample's row of a field, from the teacher's taps and the image (channels, h, w).

    Raises SettingsError if the teacher lacks a tap that the field is made from.
    """
    field = parse(name)
    known = {**taps, "images": image} if field.look == "boundary" else taps
    rows = TURNS if field.look == "rotated" else 1
    for tap in field.taps:
        if tap not in known:
            raise SettingsError(f"field '{name}' is made from '{tap}', which this teacher lacks ({', '.join(taps)})")
    values = [torch.zeros(rows, *known[tap]) for tap in field.taps]
    return tuple(field.derive(*values).shape[1:])


def stages(taps: Taps) -> list[str]:
    """Return a network's stages in order, starting with its stem `stage0`.

    Raises SettingsError if there are none: its family has no known stages.
    """
    names = [tap for tap in taps if re.fullmatch(r"stage\d+", tap)]
    if not names:
        raise SettingsError(
            "this network's stages are not known, so no field or method that reads feature maps can use it; take a "
            "network of the zoo, or add its family to TAPS (kcdcache/networks/taps.py)"
        )
    return sorted(names, key=lambda tap: int(tap.removeprefix("stage")))


def rotated(pixels: Float32[Tensor, "batch c h w"]) -> Float32[Tensor, "batch4 c h w"]:
    """Return all images turned by 0, 90, 180 and 270 degrees: first all unturned, then all turned once, ...

    Raises SettingsError unless the images are square.
    """
    if pixels.shape[2] != pixels.shape[3]:
        raise SettingsError(f"rotations need square views, found {pixels.shape[2]}x{pixels.shape[3]}; set --size")
    return torch.cat([torch.rot90(pixels, turn, (2, 3)) for turn in range(TURNS)])


def unrotated(values: Float[Tensor, "batch4 ..."]) -> Float[Tensor, "batch 4 ..."]:
    """Rearrange values computed on `rotated` images into one row per original image."""
    return values.reshape(TURNS, len(values) // TURNS, *values.shape[1:]).transpose(0, 1)


def mix(
    name: str, kept: Float[Tensor, "batch ..."], dropped: Float[Tensor, "batch ..."], epsilon: Float[Tensor, " batch"]
) -> Float[Tensor, "batch ..."]:
    """Return a field of mixed points from both points' own.

    Linear for vectors, maps and Gram matrices: not exact, but what a network linear between the two images would give,
    as in `linear_prob` (facts.md A10). Attention maps are normalised again, since the loss compares unit vectors. A
    boundary sample stays that of the kept point: the mean of two adversarial images is not adversarial.
    """
    kind = name.partition(":")[0]
    if kind == "boundary":
        return kept
    mixed = mix_values(kept, dropped, epsilon)
    return functional.normalize(mixed, dim=1) if kind == "attention" else mixed


KINDS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "(logits|penultimate)": lambda tap: {"taps": (tap,)},
    f"attention:{STAGE}:{SIDE}x{SIDE}": lambda stage, height, width: {
        "taps": (stage,), "derive": lambda value: attention(value, (int(height), int(width)))
    },
    f"fsp:{STAGE}:{STAGE}": lambda low, high: {"taps": (low, high), "derive": fsp_matrix},
    f"maps:{STAGE}": lambda stage: {"taps": (stage,)},
    f"pooled:{STAGE}": lambda stage: {"taps": (stage,), "derive": pooled},
    "rotations:(logits|penultimate)": lambda tap: {"look": "rotated", "taps": (tap,), "derive": unrotated},
    "boundary:(logits)": lambda tap: {"look": "boundary", "taps": (tap,)},
    "boundary:(images)": lambda tap: {"look": "boundary", "taps": (tap,), "encoding": "uint8"},
}  # fmt: skip
"""pattern of a field's name -> its `Field`, from the groups of the pattern"""

EXAMPLES = (
    "logits", "penultimate", "attention:stage1:32x32", "fsp:stage0:stage1", "maps:stage1", "pooled:stage1", "rotations",
    "boundary",
)  # fmt: skip
"""one name of each kind, for messages"""

SHORT: Mapping[str, Callable[[Taps], list[str]]] = {
    "rotations": lambda taps: ["rotations:logits", "rotations:penultimate"],
    "boundary": lambda taps: ["boundary:images", "boundary:logits"],
    "attention": lambda taps: [f"attention:{stage}:{taps[stage][1]}x{taps[stage][2]}" for stage in stages(taps)[1:]],
    "fsp": lambda taps: [f"fsp:{first}:{then}" for first, then in pairwise(stages(taps))],
    "maps": lambda taps: [f"maps:{stage}" for stage in stages(taps)[1:]],
    "pooled": lambda taps: [f"pooled:{stage}" for stage in stages(taps)[1:]],
}
"""short name -> the fields it stands for, from a teacher's taps"""


def product(left: Float[Tensor, "*stack m k"], right: Float[Tensor, "*stack k n"]) -> Float[Tensor, "*stack m n"]:
    """Return the matrix product in float32, even inside autocast, which would round both sides to half."""
    with torch.autocast(left.device.type, enabled=False):
        return left.float() @ right.float()


def length(x: Float[Tensor, "*stack dim"]) -> Float[Tensor, "*stack"]:
    """Return the Euclidean length of the last axis; its gradient at the zero vector is zero, not NaN."""
    squared = x.float().square().sum(dim=-1)
    positive = squared > 0
    return torch.where(positive, squared, 1).sqrt() * positive


def unit(x: Float[Tensor, "*stack dim"]) -> Float[Tensor, "*stack dim"]:
    """Return x divided by its length along the last axis; the zero vector stays zero and passes no gradient."""
    x = x.float()  # once: gradients of two casts would meet in half precision
    size = length(x).unsqueeze(-1)
    positive = size > 0
    return x * (positive / torch.where(positive, size, 1))


def attention(
    features: Float[Tensor, "batch channels height width"], side: tuple[int, int] | None = None
) -> Float[Tensor, "batch positions"]:
    """Return Q = q / ||q||_2 with q the mean over channels of f^2, flattened row by row; a zero map gives zeros.

    `side` is (height, width) of the result: the FEATURES are average-pooled to it before squaring, which differs from
    pooling the map. So a teacher's map is stored at the student's size.

    Source: Zagoruyko and Komodakis 2017, Eq. 2 (p = 2), and the released loss, which takes the mean for the sum.
    """
    pooled = features.float() if side is None else functional.adaptive_avg_pool2d(features.float(), side)
    return unit(pooled.square().mean(dim=1).flatten(1))


def fsp_matrix(
    bottom: Float[Tensor, "batch low h w"], top: Float[Tensor, "batch high h2 w2"]
) -> Float[Tensor, "batch low high"]:
    """Return the flow matrix G_ij = mean over positions of bottom_i * top_j; the larger map is average-pooled first.

    Source: Yim et al. 2017 (A Gift from Knowledge Distillation), Sec. 3: FSP matrix.
    """
    side = (min(bottom.shape[2], top.shape[2]), min(bottom.shape[3], top.shape[3]))
    low, high = (functional.adaptive_avg_pool2d(f.float(), side).flatten(2) for f in (bottom, top))
    return product(low, high.mT) / low.shape[2]


def filter_quantiles(weight: Float[Tensor, "filters ..."], count: int = QUANTILES) -> Float[Tensor, " count"]:
    """Return `count` >= 2 quantiles of the filters' L2 norms, from the smallest to the largest, in float32.

    Between two norms a quantile is interpolated linearly. The order of the filters does not matter, and networks with
    different numbers of filters can be compared. Differentiable.
    """
    norms = torch.linalg.vector_norm(weight.float().flatten(1), dim=1).sort().values
    place = torch.linspace(0, len(norms) - 1, count, device=norms.device, dtype=torch.float32)
    below = place.floor().long().clamp_max(max(0, len(norms) - 2))
    above = (below + 1).clamp_max(len(norms) - 1)
    return torch.lerp(norms[below], norms[above], place - below)


def aggregated(layers: Sequence[Float[Tensor, "_ ..."]], count: int = QUANTILES) -> Float[Tensor, " count"]:
    """Return the mean of the layers' filter quantiles: one profile for a group of any number of layers."""
    return torch.stack([filter_quantiles(weight, count) for weight in layers]).mean(0)


def pooled(value: Float[Tensor, "batch channels h w"]) -> Float[Tensor, "batch channels"]:
    """Return each channel's mean over all positions."""
    return value.mean((2, 3))
