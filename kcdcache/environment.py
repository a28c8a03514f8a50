"""Environment of a run: versions, device, threads and processes, which can change the last bits of results."""

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
    """Return what can change the last bits of results, the git commit and the command line."""
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
    """Raise MismatchError if a change of environment would change results and is not allowed."""
    if not allow_change:
        names = ("the environment this was begun in", "this one")
        remedy = "results would differ in their last bits; --allow-env-change continues anyway"
        require_same(_compared(known), _compared(now), names, remedy)


def changed(first: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether results of two environments can differ in their last bits."""
    return _compared(first) != _compared(now)


def _compared(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {key: environment.get(key, 1) for key in COMPARED}  # earlier versions had one process and no entry for it


def processor_name() -> str:
    """Return the model name of the processor, or its architecture if the name is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except OSError:
        return None
    return result.stdout.strip() or None
