"""Augmented views: their parameters as a pure function of (seed, index, view), and their application to a batch.

Views are float32 pixels in [0, 1], channels first, in channels_last memory. Their bits do not depend on the order and
the batches, and for crops not on the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from kcdcache import rng
from kcdcache.errors import MismatchError, SettingsError, nearest, require_known
from kcdcache.settings import ViewRule, ViewSettings

Index = TypeVar("Index", np.ndarray, Tensor)
Images = UInt8[Tensor, "batch _ _ c"] | list[UInt8[Tensor, "_ _ _"]]
"""a batch of images of one size, or a list of images (height, width, channels)"""
Parameters = Int64[np.ndarray, "batch _"] | Int64[Tensor, "batch _"]
Pixels = Float32[Tensor, "batch c height width"]
"""in [0, 1], in channels_last memory"""

_LEVEL = float(np.float32(1 / 255))  # a factor, as CPU and GPU round quotients differently
_ATTEMPTS = 10
_SCALE = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
_EVALUATION_SCALE = 256 / 224


def rule_from(settings: ViewSettings, image_size: tuple[int, int] | None) -> ViewRule:
    """Return the settings' rule for images of (height, width), or of differing size (None).

    Settings that the rule does not use get fixed values, so that equal views have equal rules. Raises SettingsError if
    the rule cannot be used for such images.
    """
    name = settings.augment
    size = (settings.size, settings.size) if settings.size else image_size
    if size is None:
        raise SettingsError(f"images of differing size need --size, for example --augment {_for_any_size(name)}")
    if not name.startswith("crop"):
        seed = 0 if name == "none" else settings.view_seed
        return ViewRule(rule=name, padding=0, fill="zero", size=size, seed=seed)
    if size != image_size:
        found = f"images are {image_size[0]}x{image_size[1]}" if image_size else "images differ in size"
        raise SettingsError(f"'{name}' keeps an image's size, but {found}; use --augment {_for_any_size(name)}")
    if settings.fill == "reflect" and settings.padding >= min(size):
        limit = min(size) - 1
        raise SettingsError(f"reflected padding is at most {limit} on these images; found padding {settings.padding}")
    fill = settings.fill if settings.padding else "zero"
    return ViewRule(rule=name, padding=settings.padding, fill=fill, size=size, seed=settings.view_seed)


def plain(rule: ViewRule) -> ViewRule:
    """Return the rule for evaluation: views of the same size without augmentation."""
    return replace(rule, rule="none", padding=0, fill="zero", seed=0)


def cycle(rule: ViewRule, asked: int | str) -> int | None:
    """Return the number of views that a run without a store cycles through, or None for an endless 'all'.

    Raises SettingsError if more views are asked for than the rule has.
    """
    known = count(rule)
    if asked == "all":
        return known
    if known is not None and int(asked) > known:
        raise SettingsError(f"{asked} views: the rule {rule.name} with padding {rule.padding} has only {known}")
    return int(asked)


def count(rule: ViewRule) -> int | None:
    """Return the number of views: 1 for none, (2p+1)^2 for crop, 2(2p+1)^2 for crop-flip, None if endless."""
    return _kind(rule).views(rule)


def parameters(rule: ViewRule, index: Index, view: int) -> Index:
    """Return the parameters of a view of each sample: element `view` of the sample's own permutation.

    int64 (batch, k), an array or a tensor on the device as `index` is. none: no column; crop: dy, dx in [0, 2p];
    crop-flip: dy, dx, flip in {0, 1}; resized-crop-flip: four random words. Raises SettingsError for an unknown view.
    """
    known = count(rule)
    if view < 0 or (known is not None and view >= known):
        raise SettingsError(f"view {view} does not exist: '{rule.name}' with padding {rule.padding} has {known} views")
    found: Index = _kind(rule).parameters(rule, index, view)
    return found


def apply(rule: ViewRule, images: Images, parameters: Parameters) -> Pixels:
    """Return the views of a batch with these parameters, on the images' device.

    Crops are one gather for the whole batch, without waiting if parameters are on the device. Images of other sizes
    than the view are resized: by resized-crop-flip as torchvision's RandomResizedCrop, by none to 256/224 of a view
    and cropped at the centre, as in ImageNet evaluation. Raises MismatchError if crops get images of another size than
    the rule's, or batch sizes differ.
    """
    if len(images) != len(parameters):
        raise MismatchError(f"{len(images)} images came with parameters for {len(parameters)}")
    return _kind(rule).apply(rule, images, parameters)


def show(
    rule: ViewRule, images: Sequence[np.ndarray] | np.ndarray, parameters: np.ndarray, device: torch.device
) -> Pixels:
    """Return `apply` on the device for images from a `Split`: one array, or a list if sizes differ."""
    if isinstance(images, np.ndarray):
        return apply(rule, torch.from_numpy(images).to(device), torch.from_numpy(parameters))
    return apply(rule, [torch.from_numpy(image).to(device) for image in images], torch.from_numpy(parameters))


class HeldImages:
    """All images of a split on one device, padded once, so that views are one gather, with the bits of `apply`.

    Takes count x (height + 2 padding) x (width + 2 padding) x channels bytes.
    """

    def __init__(self, rule: ViewRule, images: UInt8[np.ndarray, "n h w c"], device: torch.device) -> None:
        """Hold the images; `can_hold` must be true for the rule."""
        _kind(rule)
        self._rule = rule
        self._pixels = FILLS[rule.fill](torch.from_numpy(images).to(device), rule.padding).contiguous()

    def __len__(self) -> int:
        return len(self._pixels)

    def parameters(self, view: int) -> Int64[Tensor, "n k"]:
        """Return the parameters of one view of every image, on the device."""
        return parameters(self._rule, torch.arange(len(self), device=self._pixels.device), view)

    def views(self, index: Int64[Tensor, " batch"], parameters: Int64[Tensor, "n k"]) -> Pixels:
        """Return the views of some images from the parameters of all, without waiting for the device."""
        chosen = parameters.index_select(0, index)
        if not chosen.shape[1]:
            chosen = chosen.new_zeros(len(index), 2)
        return _gathered(self._rule, self._pixels, chosen, index)


def can_hold(rule: ViewRule, image_size: tuple[int, int] | None) -> bool:
    """Return whether `HeldImages` can make views of such images: if they need no resizing."""
    return rule.name != "resized-crop-flip" and image_size == rule.size


class _Kind(NamedTuple):
    views: Callable[[ViewRule], int | None]
    parameters: Callable[[ViewRule, Any, int], Any]
    apply: Callable[[ViewRule, Images, Parameters], Pixels]


def _kind(rule: ViewRule) -> _Kind:
    if rule.name not in RULES:
        raise SettingsError(f"unknown view rule '{rule.name}'; {nearest(rule.name, list(RULES))}")
    require_known("fill of a view rule", rule.fill, FILLS)
    return RULES[rule.name]


def _for_any_size(name: str) -> str:
    return "none --size 224" if name == "none" else "resized-crop-flip --size 224"


def _no_parameters(rule: ViewRule, index: Any, view: int) -> Any:
    return index[:, None][:, :0]


def _columns(found: Sequence[Any]) -> Any:
    return torch.stack(list(found), 1) if isinstance(found[0], Tensor) else np.stack(found, axis=1)


def _crop_parameters(rule: ViewRule, index: Any, view: int) -> Any:
    side = 2 * rule.padding + 1
    return _columns(rng.permuted(rule.seed, index, view, side, side))


def _crop_flip_parameters(rule: ViewRule, index: Any, view: int) -> Any:
    side = 2 * rule.padding + 1
    down, rest = rng.permuted(rule.seed, index, view, side, 2 * side)
    return _columns([down, rest // 2, rest % 2])


def _resized_crop_parameters(rule: ViewRule, index: Any, view: int) -> Any:
    return _columns(rng.words(rule.seed, index, rng.CROP, view))


def _scaled(pixels: UInt8[Tensor, "batch height width c"]) -> Pixels:
    # in place, as new memory takes longer than the product
    return pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last).mul_(_LEVEL)


def _apply_none(rule: ViewRule, images: Images, parameters: Parameters) -> Pixels:
    if isinstance(images, Tensor) and images.shape[1:3] == rule.size:
        return _scaled(images)
    return _batched(rule, [_centre_crop(rule, image) for image in images])


def _apply_crop(rule: ViewRule, images: Images, parameters: Parameters) -> Pixels:
    if isinstance(images, list) or images.shape[1:3] != rule.size:
        found = "a list" if isinstance(images, list) else f"{images.shape[1]}x{images.shape[2]}"
        raise MismatchError(f"'{rule.name}' was made for {rule.size[0]}x{rule.size[1]} images; found {found}")
    sample = torch.arange(len(images), device=images.device)
    chosen = torch.as_tensor(parameters, device=images.device)
    return _gathered(rule, FILLS[rule.fill](images, rule.padding), chosen, sample)


def _gathered(
    rule: ViewRule, padded: UInt8[Tensor, "n h2 w2 c"], chosen: Int64[Tensor, "batch k"],
    sample: Int64[Tensor, " batch"],
) -> Pixels:  # fmt: skip
    """Return crops of some padded images."""
    (height, width), (high, wide) = rule.size, padded.shape[1:3]
    down = torch.arange(height, device=chosen.device)
    across = torch.arange(width, device=chosen.device).expand(len(chosen), -1)
    if chosen.shape[1] == 3:
        across = torch.where(chosen[:, 2:] == 1, width - 1 - across, across)
    rows = sample[:, None] * high + chosen[:, 0:1] + down
    places = rows[:, :, None] * wide + (chosen[:, 1:2] + across)[:, None, :]
    # one gather of whole pixels is four times as fast as indexing with three broadcast tensors
    pixels = padded.reshape(-1, padded.shape[3]).index_select(0, places.reshape(-1))
    return _scaled(pixels.reshape(len(sample), height, width, padded.shape[3]))


def _pad_zero(images: UInt8[Tensor, "batch h w c"], padding: int) -> UInt8[Tensor, "batch h2 w2 c"]:
    return torch.nn.functional.pad(images, (0, 0, padding, padding, padding, padding))


def _pad_reflect(images: UInt8[Tensor, "batch h w c"], padding: int) -> UInt8[Tensor, "batch h2 w2 c"]:
    rows, columns = (
        side - 1 - (side - 1 - torch.arange(-padding, side + padding, device=images.device).abs()).abs()
        for side in images.shape[1:3]
    )
    return images[:, rows[:, None], columns]


def _apply_resized_crop(rule: ViewRule, images: Images, parameters: Parameters) -> Pixels:
    heights, widths = (np.array([image.shape[axis] for image in images], np.float64) for axis in (0, 1))
    drawn = parameters.cpu().numpy() if isinstance(parameters, Tensor) else parameters
    boxes, flips = _boxes(drawn, heights, widths)
    views = []
    for image, (top, left, high, wide), flip in zip(images, boxes.tolist(), flips.tolist(), strict=True):
        crop = _interpolated(image[top : top + high, left : left + wide], rule.size)
        views.append(crop.flip(2) if flip else crop)
    return _batched(rule, views)


def _boxes(
    drawn: Int64[np.ndarray, "batch 4"], heights: np.ndarray, widths: np.ndarray
) -> tuple[Int64[np.ndarray, "batch 4"], Int64[np.ndarray, " batch"]]:
    """Return per image the crop (top, left, height, width) and whether it is flipped.

    The four words of a view give ten attempts at a box of random area and aspect; the first that fits is used.
    Source: torchvision.transforms.RandomResizedCrop.get_params.
    """
    wide = np.minimum(widths, np.round(heights * _RATIO[1]))
    high = np.minimum(heights, np.round(widths / _RATIO[0]))
    boxes = np.stack([(heights - high) // 2, (widths - wide) // 2, high, wide], axis=1).astype(np.int64)
    for attempt in reversed(range(_ATTEMPTS)):  # backwards: the earliest fitting attempt is written last
        area, aspect, top, left = (rng.unit(word) for word in _attempt_words(drawn, attempt))
        target = heights * widths * (_SCALE[0] + (_SCALE[1] - _SCALE[0]) * area)
        ratio = np.exp(np.log(_RATIO[0]) + (np.log(_RATIO[1]) - np.log(_RATIO[0])) * aspect)
        wide, high = np.round(np.sqrt(target * ratio)), np.round(np.sqrt(target / ratio))
        fits = (wide > 0) & (wide <= widths) & (high > 0) & (high <= heights)
        offsets = np.floor(top * (heights - high + 1)), np.floor(left * (widths - wide + 1))
        boxes[fits] = np.stack([*offsets, high, wide], axis=1)[fits].astype(np.int64)
    return boxes, np.asarray(rng.below(_attempt_words(drawn, _ATTEMPTS)[0], 2))


def _attempt_words(drawn: Int64[np.ndarray, "batch 4"], attempt: int) -> rng.Words:
    first, second, third, fourth = drawn.T
    return rng.philox((first, second, third, fourth), (attempt, rng.CROP))


def _centre_crop(rule: ViewRule, image: UInt8[Tensor, "h w c"]) -> Float32[Tensor, "c height width"]:
    (height, width), (high, wide) = rule.size, image.shape[:2]
    scale = _EVALUATION_SCALE * max(height / high, width / wide)
    size = round(high * scale), round(wide * scale)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return _interpolated(image, size)[:, top : top + height, left : left + width]


def _interpolated(image: UInt8[Tensor, "h w c"], size: tuple[int, int]) -> Float32[Tensor, "c height width"]:
    pixels = image.permute(2, 0, 1)[None].to(torch.float32) * _LEVEL
    resized = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
    return resized[0].clamp(0, 1)


def _batched(rule: ViewRule, views: list[Tensor]) -> Pixels:
    if not views:
        return torch.zeros((0, 3, *rule.size))
    return torch.stack(views).contiguous(memory_format=torch.channels_last)


FILLS: dict[str, Callable[[Tensor, int], Tensor]] = {"zero": _pad_zero, "reflect": _pad_reflect}
RULES: dict[str, _Kind] = {
    "none": _Kind(lambda rule: 1, _no_parameters, _apply_none),
    "crop": _Kind(lambda rule: (2 * rule.padding + 1) ** 2, _crop_parameters, _apply_crop),
    "crop-flip": _Kind(lambda rule: 2 * (2 * rule.padding + 1) ** 2, _crop_flip_parameters, _apply_crop),
    "resized-crop-flip": _Kind(lambda rule: None, _resized_crop_parameters, _apply_resized_crop),
}
