"""Environment of a run: versions, device, threads, and its place among the processes that a launcher started."""

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kcdcache.errors import SettingsError, require_same

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

COMPARED = ("python", "versions", "device", "device_name", "threads", "processes")
LIBRARIES = ("kcdcache", "torch", "torchvision", "numpy", "pyarrow")


def environment(device: "torch.device", threads: int, processes: int = 1) -> dict[str, Any]:
    """Return what can change the last bits of results, the git commit and the command line."""
    from importlib.metadata import version  # slow to import, like torch, and the command line needs this module

    import torch

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


# ---- the place that a launcher gives to a process


TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
"""variables that torchrun sets for each process, always together; some of them alone mean nothing"""
STEP = {"SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"}
"""variables of a step of srun, which a batch script itself does not have"""
ARRAY = tuple(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "MAX", "STEP"))
"""of a task of an array: its number, how many there are, the first, the last and the step between two"""


class Place(NamedTuple):
    """A process's number, from 0, among all that a launcher started."""

    number: int
    total: int
    launcher: str


ALONE = Place(0, 1, "")


def torchrun_place(variables: Mapping[str, str] = os.environ) -> Place:
    """Return the place that torchrun gave this process, ALONE without torchrun; raises SettingsError if it is none.

    >>> torchrun_place({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1"})
    Place(number=3, total=8, launcher='torchrun')
    >>> torchrun_place({"RANK": "3", "WORLD_SIZE": "8"}) == ALONE
    True
    """
    if not set(TORCHRUN) <= variables.keys():
        return ALONE
    return _place("torchrun", variables, "RANK", "WORLD_SIZE")


def slurm_place(variables: Mapping[str, str] = os.environ) -> Place:
    """Return the place that srun, or else a SLURM array, gave this process, ALONE without either.

    Raises SettingsError if it is no place among equals, or if both give one.
    """
    srun = array = ALONE
    if "SLURM_PROCID" in variables and STEP & variables.keys():
        total = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS"
        srun = _place("srun", variables, "SLURM_PROCID", total)
    if set(ARRAY[:2]) <= variables.keys():
        array = _place("a SLURM array", variables, *ARRAY)
    if srun.total > 1 and array.total > 1:
        raise SettingsError(
            f"srun made this process {srun.number} of {srun.total}, in task {array.number} of {array.total} of a SLURM "
            "array: which of both is its share is not to be guessed; give --shard I/N yourself"
        )
    return max(srun, array, key=lambda place: place.total)


def _place(
    launcher: str, variables: Mapping[str, str], number: str, total: str, low: str = "", high: str = "", step: str = ""
) -> Place:
    given = {name: variables[name] for name in (number, total, low, high, step) if name in variables}
    try:
        numbers = {name: int(text) for name, text in given.items()}
        width, first = numbers.get(step, 1), numbers.get(low, 0)
        place, rest = divmod(numbers[number] - first, width)
        gaps = numbers.get(high, first + width * (numbers[total] - 1)) - first != width * (numbers[total] - 1)
        if not rest and not gaps and 0 <= place < numbers[total]:
            return Place(place, numbers[total], launcher)
    except (ValueError, KeyError, ZeroDivisionError):
        pass
    remedy = "give --shard I/N yourself (the numbers of an array should be in equal steps)"
    if launcher == "torchrun":
        remedy = "start the command with `torchrun --nproc-per-node N -m kcdcache ...`, or unset them"
    raise SettingsError(f"the environment has {given}, which names no place of 0 to N - 1 of {launcher}; {remedy}")


def note_unused(variables: Mapping[str, str] = os.environ) -> None:
    """Log that some variables of torchrun are there, but not all, so that this process works alone."""
    absent = [name for name in TORCHRUN if name not in variables]
    if absent and variables.get("WORLD_SIZE", "1") != "1":
        there = ", ".join(f"{name}={variables[name]}" for name in TORCHRUN if name in variables)
        logger.warning(
            "note: this process works alone: %s is set, but not %s, and torchrun sets them together; for several "
            "processes start `torchrun --nproc-per-node N -m kcdcache ...`",
            there, ", ".join(absent),
        )  # fmt: skip
