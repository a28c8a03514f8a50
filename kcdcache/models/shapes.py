"""What shapes a network's inner values have, found without weights, memory or time."""

from functools import lru_cache

import torch

from kcdcache.errors import SettingsError
from kcdcache.models import spec, taps


@lru_cache(maxsize=32)
def tap_shapes(name: str, classes: int, channels: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return tap -> shape of one sample's value, (channels, h, w) or (size,), for images of this size.

    Raises:
        SettingsError: the network is unknown, or cannot see such images.
    """
    with torch.device("meta"):
        network = spec.build(name, classes, channels=channels).eval()
        names = list(taps.stage_taps(network))
        try:
            found = taps.run(network, torch.empty(2, channels, height, width), names)
        except RuntimeError as error:
            first = str(error).split("\n")[0]
            raise SettingsError(f"{name} cannot see images of {channels}x{height}x{width} pixels: {first}") from None
    return {tap: tuple(value.shape[1:]) for tap, value in found.items()}
