"""Finished runs read from their folders; what cannot be read is listed as a problem."""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from pydantic import ConfigDict, Field

from kcdcache.condensation import manifest, value_files, values
from kcdcache.condensation.manifest import Manifest
from kcdcache.condensation.values import Values
from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, NotFoundError, UnfinishedError
from kcdcache.files.atomic import read_bytes
from kcdcache.files.records import MOST_RECORD_BYTES, canonical_json, parse, read_object, timings
from kcdcache.report import show
from kcdcache.report.show import StoreReport
from kcdcache.runs import check, state
from kcdcache.runs.folder import RunFolder
from kcdcache.runs.state import MetricsRow, RunRecord, Summary
from kcdcache.settings import Settings

SEEDED = re.compile(r"(.+)-seed(\d{1,18})", re.ASCII | re.DOTALL)
RESULTS = "results.json"
T = TypeVar("T")


class Stage(NamedTuple):
    """A stage of a run, or the set it exports at the end."""

    number: int
    manifest: Manifest
    values: Values | None
    """values at the end of the stage; None for an exported set"""
    score: np.ndarray | None
    """score of all N samples by these values and the run's settings (Eq. 13); high scores are kept"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """A finished run whose files are all undamaged."""

    path: Path
    grid: Path
    data: str | None
    """data spec from results.json"""
    step: str
    """row of the run: folder name without the seed"""
    seed: int
    seeded: bool
    """whether the folder name has the seed, as in recipes"""
    id: str | None
    summary: Summary
    record: RunRecord
    metrics: Sequence[MetricsRow]
    seconds: Mapping[int, float]
    """epoch -> seconds, including work repeated after a kill"""
    stages: tuple[Stage, ...]
    classes: tuple[str, ...]
    """names in label order; empty if unknown"""
    weights: str | None

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name

    @property
    def sets(self) -> tuple[Manifest, ...]:
        """Set of each stage, the exported set last."""
        return tuple(stage.manifest for stage in self.stages)

    def class_name(self, label: int) -> str:
        """Return the name of a class, or its label if it has no name."""
        return self.classes[label] if label < len(self.classes) else str(label)

    @property
    def condenses(self) -> bool:
        """Whether the kept samples differ between sets."""
        return len({chosen.index.tobytes() for chosen in self.sets}) > 1


class Problem(NamedTuple):
    """A requested run, store or record that is left out."""

    path: Path
    state: str
    """unfinished, damaged or missing"""
    error: str


class Step(Settings):
    """A row or a run as results.json lists it."""

    model_config = ConfigDict(extra="ignore")

    step: str
    title: str | None = None
    seed: int | None = None
    kind: str | None = None
    data: str | None = None
    seconds: float | None = None


class Grid(Settings):
    """A folder of runs, with what a report needs of its results.json, if it has one."""

    model_config = ConfigDict(extra="ignore")

    path: Path
    title: str
    data: str | None = None
    rows: list[Step] = Field(default_factory=list)
    runs: list[Step] = Field(default_factory=list)

    @property
    def titles(self) -> dict[str, str]:
        """Step -> title, in the order of the recipe."""
        return {row.step: row.title or row.step for row in self.rows}

    @property
    def listed(self) -> dict[str, str | None]:
        """Folder of each training run -> its data spec, or None if it is `data`."""
        trained = [run for run in self.runs if run.kind in ("fit", "train")]
        return {run.step if run.seed is None else f"{run.step}-seed{run.seed}": run.data for run in trained}

    @property
    def seconds(self) -> dict[str, float]:
        """Step of a store -> seconds it took to fill."""
        return {run.step: run.seconds for run in self.runs if run.kind == "store" and run.seconds is not None}


class Loaded(NamedTuple):
    """Everything a report is made from."""

    grids: tuple[Grid, ...]
    runs: tuple[Run, ...]
    stores: tuple[StoreReport, ...]
    problems: tuple[Problem, ...]

    def rows(self) -> dict[tuple[Path, str], tuple[Run, ...]]:
        """Return (grid, step) -> runs sorted by seed, in the order of the grids and their steps."""
        found: dict[tuple[Path, str], list[Run]] = {}
        for run in sorted(self.runs, key=lambda run: (run.seed, run.name)):
            found.setdefault((run.grid, run.step), []).append(run)
        listed = [(grid.path, step) for grid in self.grids for step in (*grid.titles, *sorted({s for _, s in found}))]
        return {key: tuple(found[key]) for key in listed if key in found}


def read(paths: Sequence[Path]) -> Loaded:
    """Read the runs at some paths, each a run's folder or a folder of runs such as a recipe's.

    Raises:
        NotFoundError: a path does not exist.
        MismatchError: a path is neither a run nor a folder of runs.
    """
    grids: dict[Path, Grid] = {}
    folders: dict[Path, Path] = {}
    problems: list[Problem] = []
    for path in paths:
        single = is_run(path)
        place = (path.parent if single else path).resolve()
        folders |= dict.fromkeys([path.resolve()] if single else _runs_in(path), place)
        if place not in grids:
            described = _attempt(place / RESULTS, partial(_grid, place), problems)
            grids[place] = described or Grid(path=place, title=place.name)
    whole = [grids[path] for path in dict.fromkeys(path.resolve() for path in paths if not is_run(path))]
    missing = [grid.path / name for grid in whole for name in grid.listed if not is_run(grid.path / name)]
    problems += [Problem(path, "missing", f"{RESULTS} lists this run, but it does not exist") for path in missing]
    runs = [_attempt(path, partial(_run, path, grids[place]), problems) for path, place in folders.items()]
    present = [path for grid in whole for path in sorted(grid.path.iterdir()) if show.is_store(path)]
    stores = [_attempt(path, partial(show.store_report, path), problems) for path in present]
    return Loaded(
        tuple(grids.values()), tuple(filter(None, runs)), tuple(filter(None, stores)), tuple(dict.fromkeys(problems))
    )


def is_run(path: Path) -> bool:
    """Return whether a path is the folder of a run, finished or not."""
    folder = RunFolder(path=path)
    return folder.settings.exists() or folder.summary.exists()


def _runs_in(path: Path) -> list[Path]:
    if not path.exists():
        raise NotFoundError(f"nothing at {path}; give folders of runs, or of a recipe")
    found = sorted(child for child in path.iterdir() if is_run(child)) if path.is_dir() else []
    if not found and not (path / RESULTS).exists():
        raise MismatchError(f"{path} is no run and holds none; give folders that `train`, `fit` or `run` wrote")
    return [child.resolve() for child in found]


def _attempt(path: Path, work: Callable[[], T], problems: list[Problem]) -> T | None:
    """Return the result of `work`, or None after adding its error to the problems."""
    try:
        return work()
    except UnfinishedError as error:
        problems.append(Problem(path, "unfinished", str(error)))
    except (KcdcacheError, OSError) as error:
        problems.append(Problem(path, "damaged", str(error)))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        problems.append(Problem(path, "damaged", f"a record is not of the form kcdcache writes: {error!r:.200}"))
    return None


def _grid(path: Path) -> Grid:
    file = path / RESULTS
    found = read_object(file) if file.exists() else {}
    return parse(Grid, canonical_json(found | {"path": str(path), "title": found.get("title") or path.name}), file)


def _run(path: Path, grid: Grid) -> Run:
    """Read a run after checking every file against its record."""
    found = check.check(path)
    if found.problems:
        raise CorruptionError("; ".join(found.problems))
    folder = RunFolder(path=path)
    if not found.finished or found.unfinished:
        done = read_bytes(folder.metrics, MOST_RECORD_BYTES).count(b"\n") if folder.metrics.exists() else 0
        raise UnfinishedError(f"{done} epochs are done; run its command again to continue it")
    seconds = defaultdict[int, float](float)
    for line in timings(folder.timing):
        if line.epoch is not None:
            seconds[line.epoch] += line.seconds
    record = state.read_record(folder)
    seeded = SEEDED.fullmatch(path.name)
    network = next((read_object(file) for name in check.NETWORKS if (file := path / f"{name}.json").exists()), {})
    return Run(
        path=path,
        grid=grid.path,
        data=grid.listed.get(path.name) or grid.data,
        step=seeded[1] if seeded else path.name,
        seed=int(seeded[2] if seeded else record.settings["seed"]),
        seeded=seeded is not None,
        id=show.id_of(path),
        summary=state.read_summary(path),
        record=record,
        metrics=state.read_metrics(path),
        seconds=seconds,
        stages=_stages(folder, record.settings),
        classes=tuple(map(str, network.get("classes", ()))),
        weights=network.get("weights_sha256"),
    )


def _stages(folder: RunFolder, settings: Mapping[str, Any]) -> tuple[Stage, ...]:
    found = []
    for number, file in folder.manifests().items():
        chosen, known, score = manifest.read(file), None, None
        if folder.stage_values(number).exists():
            known = value_files.read(folder.stage_values(number), chosen.count).values
            score = values.score(known, float(settings["cost_exponent"]), str(settings["unseen"]))
        found.append(Stage(number, chosen, known, score))
    if len({(stage.manifest.count, len(stage.manifest.class_counts)) for stage in found}) > 1:
        raise CorruptionError(f"the sets of {folder.path} speak of different numbers of samples or classes")
    return tuple(found)
