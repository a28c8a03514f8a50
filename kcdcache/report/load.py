"""What finished runs left in their folders, read into plain values; what cannot be read is told, never left out."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kcdcache.condense import manifest, value_files, values
from kcdcache.condense.manifest import Manifest
from kcdcache.condense.values import Values
from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, NotFoundError
from kcdcache.files import timing
from kcdcache.files.atomic import MOST_JSON_BYTES, parse_json, read_bytes, read_object
from kcdcache.report import show
from kcdcache.runs import check, state
from kcdcache.runs.folder import RunFolder

SEEDED = re.compile(r"(.+)-seed(\d{1,18})", re.ASCII | re.DOTALL)
RESULTS = "results.json"
NETWORKS = ("student", "model")
NUMBERS = (
    "epoch", "stage", "learning_rate", "samples", "samples_so_far", "loss", "train_accuracy", "agreement", "test_loss",
    "test_accuracy", "test_calibration_error", "kept", "mixed",
)  # fmt: skip
"""entries of an epoch's metrics that a report uses, where a run has them"""


class Stage(NamedTuple):
    """One stage of a run, or the set it exports at the end."""

    number: int
    manifest: Manifest
    values: Values | None
    """at its end; None for an exported set"""
    score: np.ndarray | None
    """score of each of all N samples by these values and the run's settings (Eq. 13), the higher the likelier kept"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """One finished run, every file of which was what it wrote."""

    path: Path
    grid: Path
    """folder it lies in"""
    step: str
    """its row: name of the folder without the seed"""
    seed: int
    seeded: bool
    """whether the folder's name tells the seed, as a recipe's do"""
    id: str | None
    """SHA-256 of its summary"""
    summary: Mapping[str, Any]
    record: Mapping[str, Any]
    """settings, inputs, environment and changes to it"""
    metrics: Sequence[Mapping[str, Any]]
    """one row per epoch"""
    seconds: Mapping[int, float]
    """epoch -> seconds spent on it, repeated work after a kill included"""
    stages: tuple[Stage, ...]
    network: Mapping[str, Any]
    """what the record beside its weights says"""

    @property
    def name(self) -> str:
        """Folder's name."""
        return self.path.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order; empty where the record has none."""
        found = self.network.get("classes")
        return tuple(map(str, found)) if isinstance(found, list) else ()

    @property
    def sets(self) -> tuple[Manifest, ...]:
        """Set of each stage, the exported one last."""
        return tuple(stage.manifest for stage in self.stages)

    @property
    def condenses(self) -> bool:
        """Whether some stage, or the exported set, keeps other samples than the first one."""
        return len({chosen.index.tobytes() for chosen in self.sets}) > 1


class Trouble(NamedTuple):
    """Something that was asked for and is not in the numbers."""

    path: Path
    state: str
    """unfinished, damaged or missing"""
    error: str


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A folder of runs, with what its results.json says of them, if it has one."""

    path: Path
    title: str
    data: str | None = None
    """data spec"""
    titles: Mapping[str, str] = field(default_factory=dict)
    """step -> how the recipe calls it, in the recipe's order"""
    listed: tuple[str, ...] = ()
    """folders of the training runs it lists"""
    specs: Mapping[str, str] = field(default_factory=dict)
    """folder of a run -> its data spec, where that is another than `data`"""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """store's step -> seconds that filling it took"""


class Findings(NamedTuple):
    """All that a report tells of."""

    grids: tuple[Grid, ...]
    runs: tuple[Run, ...]
    stores: tuple[tuple[Path, Mapping[str, Any]], ...]
    """stores beside the runs, as `inspect` tells them"""
    troubles: tuple[Trouble, ...]

    def rows(self) -> dict[tuple[Path, str], tuple[Run, ...]]:
        """Return (grid, step) -> its runs in order of their seeds; grids and steps in order."""
        found: dict[tuple[Path, str], list[Run]] = {}
        for run in self.runs:
            found.setdefault((run.grid, run.step), []).append(run)
        order = {grid.path: (place, list(grid.titles)) for place, grid in enumerate(self.grids)}
        keys = sorted(found, key=lambda key: (order[key[0]][0], _place(key[1], order[key[0]][1])))
        return {key: tuple(sorted(found[key], key=lambda run: (run.seed, run.name))) for key in keys}


def read(paths: Sequence[Path]) -> Findings:
    """Return what the runs at some paths left: each a run's folder, or a folder of runs such as a recipe's.

    Raises:
        NotFoundError: there is nothing at a path.
        MismatchError: a path is neither a run nor a folder of runs.
    """
    grids: dict[Path, Grid] = {}
    folders: dict[Path, Path] = {}
    troubles: list[Trouble] = []
    whole = [path for path in paths if not is_run(path)]
    for path in paths:
        grid, children = (path.parent, [path]) if is_run(path) else (path, _children(path))
        if grid.resolve() not in grids:
            grids[grid.resolve()], trouble = _grid(grid)
            troubles += trouble
        folders |= {child.resolve(): grid.resolve() for child in children}
    found = [_run(path, grid) for path, grid in folders.items()]
    asked = [grids[path.resolve()] for path in whole]
    troubles += [trouble for grid in asked for trouble in _missing(grid, folders)]
    troubles += [item for item in found if isinstance(item, Trouble)]
    stores, bad = _stores(asked)
    kept = tuple(item for item in found if isinstance(item, Run))
    return Findings(tuple(grids.values()), kept, stores, tuple(dict.fromkeys([*troubles, *bad])))


def is_run(path: Path) -> bool:
    """Return whether a path is a run's folder, finished or not."""
    return (path / "run.json").exists() or (path / "summary.json").exists()


def _place(step: str, known: list[str]) -> tuple[int, str]:
    return (known.index(step) if step in known else len(known)), step


def _children(path: Path) -> list[Path]:
    if not path.exists():
        raise NotFoundError(f"nothing at {path}; give folders of runs, or of a recipe")
    children = sorted(child for child in path.iterdir() if is_run(child)) if path.is_dir() else []
    if not children and not (path / RESULTS).exists():
        raise MismatchError(f"{path} is no run and holds none; give folders that `train`, `fit` or `run` wrote")
    return children


def _grid(path: Path) -> tuple[Grid, list[Trouble]]:
    file, plain = path / RESULTS, Grid(path=path.resolve(), title=path.resolve().name)
    if not file.exists():
        return plain, []
    try:
        return _described(plain, read_object(file)), []
    except KcdcacheError as error:
        return plain, [Trouble(file, "damaged", str(error))]


def _described(plain: Grid, results: Mapping[str, Any]) -> Grid:
    """Return a grid with what results.json says of it; entries of another form than ours are passed over."""
    entries = [entry for entry in _objects(results.get("runs")) if isinstance(entry.get("step"), str)]
    rows = [row for row in _objects(results.get("rows")) if isinstance(row.get("step"), str)]
    trained = [entry for entry in entries if entry.get("kind") in ("fit", "train")]
    stores = [entry for entry in entries if entry.get("kind") == "store"]
    title, data = results.get("title"), results.get("data")
    return Grid(
        path=plain.path,
        title=title if isinstance(title, str) and title else plain.title,
        data=data if isinstance(data, str) else None,
        titles={row["step"]: str(row.get("title") or row["step"]) for row in rows},
        listed=tuple(_folder_name(entry) for entry in trained),
        specs={_folder_name(entry): entry["data"] for entry in trained if isinstance(entry.get("data"), str)},
        seconds={e["step"]: float(e["seconds"]) for e in stores if isinstance(e.get("seconds"), int | float)},
    )


def _objects(found: Any) -> list[dict[str, Any]]:
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _folder_name(entry: Mapping[str, Any]) -> str:
    seed = entry.get("seed")
    return entry["step"] if seed is None else f"{entry['step']}-seed{seed}"


def _missing(grid: Grid, folders: Mapping[Path, Path]) -> Iterator[Trouble]:
    there = {path.name for path, of in folders.items() if of == grid.path}
    for name in grid.listed:
        if name not in there:
            yield Trouble(grid.path / name, "missing", f"{RESULTS} lists this run, but it is not there")


def _run(path: Path, grid: Path) -> Run | Trouble:
    """Return a run, or what is wrong with it; every file is held against the run's record before a number is used."""
    try:
        found = check.check(path)
        if found.problems:
            return Trouble(path, "damaged", "; ".join(found.problems))
        if not found.finished or found.unfinished:
            done = _epochs_done(path)
            return Trouble(path, "unfinished", f"{done} epochs are done; run its command again to continue it")
        return _finished(path, grid)
    except KcdcacheError as error:
        return Trouble(path, "damaged", str(error))
    except OSError as error:
        return Trouble(path, "damaged", str(error))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        return Trouble(path, "damaged", f"a record is not of the form kcdcache writes: {error!r:.200}")


def _finished(path: Path, grid: Path) -> Run:
    record, summary = _record(path), dict(state.read_summary(path))
    match = SEEDED.fullmatch(path.name)
    networks = [path / f"{name}.json" for name in NETWORKS if (path / f"{name}.json").exists()]
    return Run(
        path=path,
        grid=grid,
        step=match[1] if match else path.name,
        seed=int(match[2]) if match else int(record["settings"]["seed"]),
        seeded=match is not None,
        id=show.id_of(path),
        summary=summary,
        record=record,
        metrics=_metrics(path),
        seconds=_seconds(path),
        stages=_stages(path, record["settings"]),
        network=read_object(networks[0]) if networks else {},
    )


def _record(path: Path) -> dict[str, Any]:
    record = state.read_record(RunFolder(path=path))
    told = [record["settings"], record["inputs"], state.latest_environment(record)]
    if not all(isinstance(found, dict) for found in [*told, told[-1]["versions"]]):
        raise CorruptionError(f"{path / 'run.json'}: settings, inputs, environment and versions should be objects")
    return record


def _epochs_done(path: Path) -> int:
    file = RunFolder(path=path).metrics
    return read_bytes(file, MOST_JSON_BYTES).count(b"\n") if file.exists() else 0


def _seconds(path: Path) -> dict[int, float]:
    file, found = RunFolder(path=path).timing, dict[int, float]()
    if not file.exists():
        return found
    for number, line in enumerate(read_bytes(file, MOST_JSON_BYTES).splitlines()[: timing.MOST_LINES], 1):
        try:
            row = parse_json(line, f"{file}, line {number}")
            found[int(row["epoch"])] = found.get(int(row["epoch"]), 0.0) + float(row["seconds"])
        except (KcdcacheError, KeyError, TypeError, ValueError):
            continue  # a line torn by a power loss counts nothing, as in the summary
    return found


def _metrics(path: Path) -> list[dict[str, Any]]:
    rows = state.read_metrics(path)
    for number, row in enumerate(rows, 1):
        odd = [name for name in NUMBERS if not isinstance(row.get(name, 0), int | float)]
        if odd or not isinstance(row.get("epoch"), int):
            name = (odd or ["epoch"])[0]
            raise CorruptionError(
                f"{path}, metrics, line {number}: '{name}' should be a number, is {row.get(name)!r:.40}"
            )
    return rows


def _stages(path: Path, settings: Mapping[str, Any]) -> tuple[Stage, ...]:
    folder = RunFolder(path=path)
    names = [file.parent.name for file in path.glob("stages/*/manifest.parquet")]
    found = [_stage(folder, number, settings) for number in sorted(int(name) for name in names if name.isdecimal())]
    if len({(stage.manifest.count, len(stage.manifest.class_counts)) for stage in found}) > 1:
        raise CorruptionError(f"the sets of {path} speak of different numbers of samples or classes")
    return tuple(found)


def _stage(folder: RunFolder, number: int, settings: Mapping[str, Any]) -> Stage:
    chosen = manifest.read(folder.manifest(number))
    file = folder.stage_values(number)
    if not file.exists():
        return Stage(number, chosen, None, None)
    known = value_files.read(file, chosen.count).values
    score = values.score(known, float(settings["cost_exponent"]), str(settings["unseen"]))
    return Stage(number, chosen, known, score)


def _stores(grids: Iterable[Grid]) -> tuple[tuple[tuple[Path, Mapping[str, Any]], ...], list[Trouble]]:
    found, bad = [], []
    for grid in grids:
        for path in sorted(child for child in grid.path.iterdir() if show.KINDS["store"](child)):
            try:
                found.append((path, show.inspect(path)))
            except KcdcacheError as error:
                bad.append(Trouble(path, "damaged", str(error)))
    return tuple(found), bad
