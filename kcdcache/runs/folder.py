"""The folder of a run: what its files are called, and which of them stand."""

from dataclasses import dataclass
from pathlib import Path

from kcdcache.files import run_files


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
    def given(self) -> Path:
        """The condensed set that the run began with, if one was given."""
        return self.path / "given.parquet"

    @property
    def metrics(self) -> Path:
        """One line per finished epoch."""
        return self.path / "metrics.jsonl"

    @property
    def timing(self) -> Path:
        """Clock times, one line per epoch trained."""
        return self.path / "timing.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the one current checkpoint."""
        return self.path / "checkpoint"

    @property
    def pointer(self) -> Path:
        """Which checkpoint that is."""
        return self.checkpoints / "latest.json"

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
