"""The input transform of networks; device, threads and errors about memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn.functional import interpolate

from kcdcache.errors import KcdcacheError, MismatchError, SettingsError, require_known
from kcdcache.settings import Device

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "ALLOC_FAILED")
"""in errors of torch's device and CPU allocators, the C++ library or cuBLAS"""


@contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Raise KcdcacheError, with a remedy, if the host or the device runs out of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(phrase in str(error) for phrase in OUT_OF_MEMORY):
            raise
        first = next(iter(str(error).splitlines()), "MemoryError")
        raise KcdcacheError(f"out of memory: {remedy} ({first})") from error


def resolve_device(name: str) -> torch.device:
    """Return the device for 'auto' (a GPU if there is one), 'cpu' or 'cuda'; raises SettingsError without a GPU."""
    require_known("device", name, get_args(Device))
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise SettingsError("--device cuda: torch sees no GPU here; use --device cpu or install a CUDA build of torch")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def use_threads(count: int | None) -> int:
    """Set torch's thread count if one is given; return the current one."""
    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()


@dataclass(frozen=True)
class InputTransform:
    """Turns pixels in [0, 1] into a network's input: (pixels - mean) / std per channel, after an optional resize."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    """above 0"""
    size: int | None = None
    """side of the square input; None to keep the image's size"""

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise SettingsError(f"mean {self.mean} and std {self.std} should have one number per channel each")
        if not all(math.isfinite(value) for value in self.mean + self.std) or min(self.std) <= 0:
            raise SettingsError(f"mean {self.mean} should be finite and std {self.std} above 0")
        if self.size is not None and self.size < 1:
            raise SettingsError(f"input size {self.size} should be at least 1")

    def __call__(self, pixels: Float32[Tensor, "b c h w"]) -> Float32[Tensor, "b c h2 w2"]:
        """Return pixels * scale + shift with the same constants on every device; MismatchError for other channels."""
        if pixels.shape[1] != len(self.mean):
            raise MismatchError(f"the input transform has {len(self.mean)} channels, the images {pixels.shape[1]}")
        scale, shift = _constants(self, pixels.device)
        if self.size is not None and tuple(pixels.shape[2:]) != (self.size, self.size):
            pixels = interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        return (pixels * scale).add_(shift)  # in place: fresh memory costs more than the sum

    def document(self) -> dict[str, Any]:
        """Return the transform as JSON values."""
        return {"mean": [*map(float, self.mean)], "std": [*map(float, self.std)], "size": self.size}


@lru_cache(maxsize=64)
def _constants(
    transform: InputTransform, device: torch.device
) -> tuple[Float[Tensor, "1 c 1 1"], Float[Tensor, "1 c 1 1"]]:
    pairs = list(zip(transform.mean, transform.std, strict=True))
    # normal tensors even if the first caller is in inference mode, as later ones may train
    with torch.inference_mode(False):
        scale = torch.tensor([1 / std for _, std in pairs], dtype=torch.float32)
        shift = torch.tensor([-mean / std for mean, std in pairs], dtype=torch.float32)
        return scale.view(1, -1, 1, 1).to(device), shift.view(1, -1, 1, 1).to(device)
