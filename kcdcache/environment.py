"""Where work is done: versions, device, threads and processes, which may change the last bits of a result."""

import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kcdcache.errors import require_same

COMPARED = ("python", "versions", "device", "device_name", "threads", "processes")
LIBRARIES = ("kcdcache", "torch", "torchvision", "numpy", "pyarrow")


def environment(device: torch.device, threads: int, processes: int = 1) -> dict[str, Any]:
    """Return what may change the last bits of a result: versions, device, thread count, and where the code is from."""
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": threads,
        "processes": processes,
        "git_commit": _git_commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def check_environment(known: Mapping[str, Any], now: Mapping[str, Any], allow_change: bool) -> None:
    """Do nothing if interrupted work continues where its bytes stay the same, or a change is allowed.

    Raises:
        MismatchError: device, threads or a version differ and the change was not allowed.
    """
    if not allow_change:
        was, is_now = _compared(known), _compared(now)
        names = ("the environment this was begun in", "this one")
        require_same(was, is_now, names, "results would differ in their last bits; --allow-env-change continues anyway")


def changed(first: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether two environments may give different last bits."""
    return _compared(first) != _compared(now)


def _compared(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {key: environment.get(key, 1) for key in COMPARED}  # earlier commits had one process and did not say so


def processor_name() -> str:
    """Return the processor's model name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10
        )
    except OSError:
        return None
    return result.stdout.strip() or None
