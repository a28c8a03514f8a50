"""The files of a run folder."""

from dataclasses import dataclass
from pathlib import Path

from kcdcache.files import run_files


class _File:
    """A file or folder with a fixed name in a run folder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: "RunFolder", owner: type) -> Path:
        return folder.path / self._name


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The folder of a run and the paths in it."""

    path: Path

    settings = _File("run.json")
    """settings, inputs and environment, written first"""
    summary = _File("summary.json")
    """results, written last: a run with a summary is finished"""
    values = _File("values.parquet")
    """values at the last stop"""
    given = _File("given.parquet")
    """manifest that the run started from, if one was given"""
    averaged = _File("ema")
    """folder of the network with averaged weights, if the run averages them"""
    metrics = _File("metrics.jsonl")
    table = _File("metrics.csv")
    """what `--log csv` writes"""
    events = _File("tensorboard")
    """folder that `--log tensorboard` writes"""
    timing = _File("timing.jsonl")
    """clock times, one line per epoch trained"""
    checkpoints = _File("checkpoint")
    """folder of the current checkpoint"""
    pointer = _File("checkpoint/latest.json")
    """record of the current checkpoint"""
    lock = _File(".lock")
    """held by the process that trains"""

    def manifest(self, number: int) -> Path:
        """Return the path of the manifest that stage `number` trains on; after the last stage, the final one."""
        return self.path / f"stages/{number}/manifest.parquet"

    def manifests(self) -> dict[int, Path]:
        """Return the existing manifests by stage, in order."""
        return {number: self.manifest(number) for number in self._numbers("manifest")}

    def stage_values(self, number: int) -> Path:
        """Return the path of the values at the end of a stage."""
        return self.path / f"stages/{number}/values.parquet"

    def all_stage_values(self) -> list[Path]:
        """Return the existing values files of stages, in order."""
        return [self.stage_values(number) for number in self._numbers("values")]

    def _numbers(self, kind: str) -> list[int]:
        names = [file.parent.name for file in self.path.glob(f"stages/*/{kind}.parquet")]
        return sorted(int(name) for name in names if name.isdecimal())

    def name_of(self, path: Path) -> str:
        """Return the name of a file relative to the folder."""
        return path.relative_to(self.path).as_posix()

    def is_complete(self, path: Path) -> bool:
        """Return whether a file exists and was not cut short by a kill."""
        return path.exists() and not run_files.cut_short(self.path, self.name_of(path))
