"""The folder of a run: what its files are called, and which of them stand."""

from dataclasses import dataclass
from pathlib import Path

from kcdcache.files import run_files


class _File:
    """A file, or folder, of fixed name in a run's folder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: "RunFolder", owner: type) -> Path:
        return folder.path / self._name


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The folder of one run and the file names in it."""

    path: Path

    settings = _File("run.json")
    """settings, inputs and environment, written first"""
    summary = _File("summary.json")
    """what came out, written last: a run with a summary is finished"""
    values = _File("values.parquet")
    """the value estimate at the run's latest stop"""
    given = _File("given.parquet")
    """the condensed set that the run began with, if one was given"""
    metrics = _File("metrics.jsonl")
    """one line per finished epoch"""
    timing = _File("timing.jsonl")
    """clock times, one line per epoch trained"""
    checkpoints = _File("checkpoint")
    """folder of the one current checkpoint"""
    pointer = _File("checkpoint/latest.json")
    """which checkpoint that is"""
    lock = _File(".lock")
    """held by the process that trains here"""

    def stage(self, number: int) -> Path:
        """Return the folder of one stage's manifest and values."""
        return self.path / "stages" / str(number)

    def manifest(self, number: int) -> Path:
        """Return the path of the manifest that stage `number` trains on (or that a finished run exports)."""
        return self.stage(number) / "manifest.parquet"

    def manifests(self) -> dict[int, Path]:
        """Return number of a stage -> its manifest, of all that there are, in order."""
        return {number: self.manifest(number) for number in self._numbers("manifest")}

    def stage_values(self, number: int) -> Path:
        """Return the path of the value estimate at the end of a stage."""
        return self.stage(number) / "values.parquet"

    def all_stage_values(self) -> list[Path]:
        """Return the value estimates at the end of stages, of all that there are, in order."""
        return [self.stage_values(number) for number in self._numbers("values")]

    def _numbers(self, kind: str) -> list[int]:
        names = [file.parent.name for file in self.path.glob(f"stages/*/{kind}.parquet")]
        return sorted(int(name) for name in names if name.isdecimal())

    def name_of(self, path: Path) -> str:
        """Return the name of a file in the folder, as its record has it."""
        return path.relative_to(self.path).as_posix()

    def stands(self, path: Path) -> bool:
        """Return whether a file is there for good: not cut short by a kill before the run recorded it."""
        return path.exists() and not run_files.cut_short(self.path, self.name_of(path))
