"""A run's folder: settings, environment, checkpoints, metrics and summary."""

import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from kcdcache.errors import CorruptionError, MismatchError, NotFoundError, SettingsError, UnfinishedError
from kcdcache.files import (
    canonical_json,
    locked,
    read_json,
    read_object,
    readable_json,
    remove_leftovers,
    sha256_bytes,
    write_atomic,
)
from kcdcache.identity import first_difference, require_same

RECORD_KEY = "kcdcache"
COMPARED = ("python", "versions", "device", "device_name", "threads")
LIBRARIES = ("kcdcache", "torch", "torchvision", "zarr", "numpy", "pyarrow")


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The folder of one run and the file names in it."""

    path: Path

    @property
    def settings(self) -> Path:
        """Settings, inputs and environment, written first."""
        return self.path / "run.json"

    @property
    def summary(self) -> Path:
        """What came out, written last: a run with a summary is finished."""
        return self.path / "summary.json"

    @property
    def values(self) -> Path:
        """The value estimate at the run's latest stop."""
        return self.path / "values.parquet"

    @property
    def checkpoints(self) -> Path:
        """Folder of the one current checkpoint."""
        return self.path / "checkpoint"

    @property
    def scratch(self) -> Path:
        """Folder of memory-mapped knowledge."""
        return self.path

    @property
    def lock(self) -> Path:
        """Held by the process that trains here."""
        return self.path / ".lock"

    def stage(self, number: int) -> Path:
        """Return the folder of one stage's manifest and values."""
        return self.path / "stages" / str(number)

    def manifest(self, number: int) -> Path:
        """Return the path of the manifest that stage `number` trains on (or that a finished run exports)."""
        return self.stage(number) / "manifest.parquet"


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """Return what may change the last bits of a result: versions, device, thread count, and where the code is from."""
    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": threads,
        "git_commit": _git_commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


@contextmanager
def session(
    folder: RunFolder,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Any],
    *,
    device: torch.device,
    threads: int | None,
    allow_env_change: bool,
) -> Iterator[None]:
    """Hold a run's folder for training: lock it, begin or continue its record, put its thread count in force.

    Raises:
        LockedError: another process trains here.
        SettingsError, MismatchError: the folder holds another run, or this machine is not the run's.
    """
    with locked(folder.lock):
        record = start(folder, settings, inputs)
        _remove_other_checkpoints(folder)  # a kill may fall between a new checkpoint and the old one's removal
        before = torch.get_num_threads()
        wanted = threads or (latest_environment(record)["threads"] if record else before)
        torch.set_num_threads(wanted)
        try:
            now = environment(device, wanted)
            known = [record["environment"], *record["changes"]] if record else []
            if not known or changed(known[-1], now):
                if known:
                    check_environment(known[-1], now, allow_env_change)
                write_record(folder, settings, inputs, [*known, now])
            yield
        finally:
            torch.set_num_threads(before)


def start(folder: RunFolder, settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record of the run already in this folder, or None where a new one begins.

    Raises:
        SettingsError: the folder holds a run with other settings; names the first.
        MismatchError: the folder holds a run on other inputs; names the first.
    """
    remove_leftovers(folder.path)
    if not folder.settings.exists():
        require_folder_free(folder)
        return None
    record = read_object(folder.settings, "settings", "inputs", "environment", "changes")
    if difference := first_difference(record["settings"], json.loads(canonical_json(settings))):
        name, was, now = difference
        raise SettingsError(
            f"{folder.path} holds a run with {name} = {was!r}, asked for now: {now!r}; "
            "give the same settings to continue it, or another --out"
        )
    asked = json.loads(canonical_json(inputs))
    require_same(record["inputs"], asked, (f"the run in {folder.path}", "what was given now"), "use another --out")
    return record


def latest_environment(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return where a run went on last: its first environment, or the last change that was allowed."""
    latest: dict[str, Any] = [record["environment"], *record["changes"]][-1]
    return latest


def check_environment(known: Mapping[str, Any], now: Mapping[str, Any], allow_change: bool) -> None:
    """Do nothing if interrupted work continues where its bytes stay the same, or a change is allowed.

    Raises:
        MismatchError: device, threads or a version differ and the change was not allowed.
    """
    if not allow_change:
        was, is_now = ({key: side[key] for key in COMPARED} for side in (known, now))
        names = ("the environment this was begun in", "this one")
        require_same(was, is_now, names, "results would differ in their last bits; --allow-env-change continues anyway")


def outcome(rows: Sequence[Mapping[str, Any]], count: int, epochs: int) -> dict[str, Any]:
    """Return what every summary holds, from a finished run's metrics.

    relative_cost is C of Eq. 16, counted: student samples forwarded / (N * epochs). The last accuracy is the result;
    the best one was chosen on the test split and is for comparison with papers that report it.
    """
    measured = [row for row in rows if "test_accuracy" in row]
    best = max(measured, key=lambda row: row["test_accuracy"])
    samples = rows[-1]["samples_so_far"]
    return {
        "accuracy_last": rows[-1]["test_accuracy"],
        "accuracy_best": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "calibration_error": rows[-1]["test_calibration_error"],
        "relative_cost": samples / (count * epochs),
        "student_samples": samples,
        "epochs": epochs,
        "count": count,
    }


def write_record(
    folder: RunFolder, settings: Mapping[str, Any], inputs: Mapping[str, Any], environments: Sequence[Mapping[str, Any]]
) -> None:
    """Write run.json; `environments` lists the first one and every change that was allowed."""
    changes = list(environments[1:])
    document = {"settings": dict(settings), "inputs": dict(inputs), "environment": environments[0], "changes": changes}
    write_atomic(folder.settings, readable_json(document))


def save_checkpoint(folder: RunFolder, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Replace the run's checkpoint; a kill at any moment leaves the old one or the new one."""
    folder.checkpoints.mkdir(exist_ok=True)
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    data = safetensors.torch.save(owned, metadata={RECORD_KEY: canonical_json(record).decode()})
    digest = sha256_bytes(data)
    name = f"{digest[:16]}.safetensors"
    write_atomic(folder.checkpoints / name, data)
    write_atomic(folder.checkpoints / "latest.json", readable_json({"file": name, "sha256": digest}))
    _remove_other_checkpoints(folder)


def load_checkpoint(folder: RunFolder) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors and the record of the run's checkpoint, or None if there is none yet.

    Raises:
        CorruptionError: the file is missing or does not match its SHA-256.
    """
    pointer = folder.checkpoints / "latest.json"
    if not pointer.exists():
        return None
    entry = read_json(pointer)
    path = folder.checkpoints / Path(str(entry["file"])).name
    data = path.read_bytes() if path.exists() else b""
    if sha256_bytes(data) != entry["sha256"]:
        raise CorruptionError(
            f"checkpoint {path} is damaged: its SHA-256 is not the one in {pointer}; start the run anew"
        )
    length = int.from_bytes(data[:8], "little")
    record = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][RECORD_KEY])
    return safetensors.torch.load(data), record


def write_metrics(folder: RunFolder, rows: Sequence[Mapping[str, Any]]) -> None:
    """Make metrics.jsonl hold exactly these rows, one epoch a line."""
    write_atomic(folder.path / "metrics.jsonl", b"".join(canonical_json(row) + b"\n" for row in rows))


def add_timing(folder: RunFolder, row: Mapping[str, Any]) -> None:
    """Append a line of clock times, which differ from run to run and so stand apart from the metrics."""
    with open(folder.path / "timing.jsonl", "ab") as stream:
        stream.write(canonical_json(row) + b"\n")


def seconds_spent(folder: RunFolder) -> float:
    """Return the training seconds logged so far, repeated work after a kill included."""
    return logged_seconds(folder.path / "timing.jsonl")


def logged_seconds(file: Path) -> float:
    """Return the sum of `seconds` over a file of clock times; a line torn by a power loss counts nothing."""
    return sum(_seconds(line) for line in file.read_bytes().splitlines()) if file.exists() else 0.0


def read_summary(path: Path) -> dict[str, Any]:
    """Return a finished run's summary.

    Raises:
        NotFoundError: there is no run.
        UnfinishedError: the run has not ended.
    """
    folder = RunFolder(path=path)
    if folder.summary.exists():
        summary: dict[str, Any] = read_json(folder.summary)
        return summary
    if folder.settings.exists():
        raise UnfinishedError(f"the run in {path} is not finished; run its command again to continue it")
    raise NotFoundError(f"no run at {path}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl, one per epoch.

    Raises:
        NotFoundError: the run has none.
    """
    file = path / "metrics.jsonl"
    if not file.exists():
        raise NotFoundError(f"no metrics at {file}")
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def processor_name() -> str:
    """Return the processor's model name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def require_folder_free(folder: RunFolder) -> None:
    """Do nothing if a new run may be started here.

    Raises:
        MismatchError: the folder holds files of something else.
    """
    others = [p.name for p in folder.path.iterdir() if p.name != folder.lock.name] if folder.path.exists() else []
    if others:
        raise MismatchError(f"{folder.path} holds {others[0]} but no run.json; give an empty or new folder as --out")


def changed(first: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether two environments may give different last bits."""
    return any(first[key] != now[key] for key in COMPARED)


def _seconds(line: bytes) -> float:
    try:
        return float(json.loads(line)["seconds"])
    except ValueError:
        return 0.0


def _remove_other_checkpoints(folder: RunFolder) -> None:
    pointer = folder.checkpoints / "latest.json"
    current = read_json(pointer)["file"] if pointer.exists() else None
    for path in folder.checkpoints.glob("*.safetensors"):
        if path.name != current:
            path.unlink()


def _git_commit() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10
        )
    except OSError:
        return None
    return result.stdout.strip() or None
