"""The device a stage runs on, and its thread count."""

import torch

from kcdcache.errors import SettingsError


def resolve_device(name: str) -> torch.device:
    """Return the device for 'auto', 'cpu' or 'cuda'; 'auto' takes a GPU where there is one.

    Raises:
        SettingsError: a GPU was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise SettingsError("--device cuda: torch sees no GPU here; use --device cpu or install a CUDA build of torch")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def use_threads(count: int | None) -> int:
    """Set torch's thread count where one is given; return the count in force."""
    if count is not None:
        torch.set_num_threads(count)
    return torch.get_num_threads()
