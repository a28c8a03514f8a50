"""The tables of a report: the same rows shown to people, written as CSV and as JSON."""

import csv
import io
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kcdcache import statistics
from kcdcache.condense import compare
from kcdcache.errors import SettingsError, printable
from kcdcache.report.load import Loaded, Run
from kcdcache.report.show import StoreReport
from kcdcache.settings import nearest

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""what makes a spreadsheet take a text for a formula"""
USUAL_REFERENCE = "kd"
SEEDS = ("seed", "condense_seed")
"""settings in which the runs of one row differ by design"""
COMPARED = {
    "accuracy_last": ("percentage points", 100.0),
    "accuracy_best": ("percentage points", 100.0),
    "relative_cost": ("of N x epochs", 1.0),
}
"""entries of summaries that are compared pair by pair -> unit of their difference, and what it is multiplied by"""
COSTS = ("student_samples", "teacher_forwards", "rows_read", "bytes_read", "seconds")

Row = Mapping[str, Any]
Key = tuple[Path, str]
"""grid and step of a row"""


class Column(NamedTuple):
    """One column."""

    name: str
    """key in rows, CSV and JSON"""
    title: str
    """heading, with the unit as shown"""
    kind: str = "text"
    """one of SHOWN"""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of numbers and texts under named columns; a cell may be empty (None)."""

    key: str
    """its name in JSON and of its CSV file"""
    title: str
    note: str
    """how to read it"""
    columns: tuple[Column, ...]
    rows: Sequence[Row]

    def document(self) -> dict[str, Any]:
        """Return it as JSON values: unrounded, empty cells as null."""
        return {
            "title": self.title,
            "columns": {column.name: column.title for column in self.columns},
            "rows": [{column.name: row.get(column.name) for column in self.columns} for row in self.rows],
        }

    def csv(self) -> str:
        """Return it as CSV, unrounded; before a text that a spreadsheet would run as a formula stands an apostrophe."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([column.name for column in self.columns])
        for row in self.rows:
            writer.writerow([_harmless(row.get(column.name)) for column in self.columns])
        return stream.getvalue()

    def cells(self) -> list[list[str]]:
        """Return the rows as people see them: rounded, in the unit of the heading."""
        return [[shown(row.get(column.name), column.kind) for column in self.columns] for row in self.rows]

    def text(self) -> str:
        """Return heading and rows as aligned text."""
        lines = [[column.title for column in self.columns], *self.cells()]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        aligned = [
            "  ".join(
                cell.ljust(width) if column.kind == "text" else cell.rjust(width)
                for cell, width, column in zip(line, widths, self.columns, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])


@cache
def texts() -> dict[str, Any]:
    """Return what a report says in words: texts.toml."""
    return tomllib.loads(Path(__file__).with_name("texts.toml").read_text(encoding="utf-8"))


def worded(key: str, rows: Sequence[Row], **values: str) -> Table:
    """Return a table with its title, note and columns from `texts`; `values` are filled into the note."""
    text = texts()["tables"][key]
    columns = tuple(Column(*column) for column in text["columns"])
    return Table(key=key, title=text["title"], note=text["note"].format(**values), columns=columns, rows=rows)


def shown(value: Any, kind: str) -> str:
    """Return a cell as people see it.

    >>> shown(0.99537, "percent"), shown(-0.1, "signed"), shown(None, "count")
    ('99.54', '-0.100', '')
    """
    if value is None:
        return ""
    return SHOWN[kind](value) if not isinstance(value, str) else printable(value)


SHOWN: Mapping[str, Callable[[Any], str]] = {
    "text": lambda value: printable(str(value)),
    "percent": lambda value: f"{100 * value:.2f}",
    "signed": lambda value: f"{value:+.3f}",
    "share": lambda value: f"{value:.3f}",
    "count": lambda value: f"{value:,.0f}",
    "number": lambda value: f"{value:.4g}",
    "seconds": lambda value: f"{value:,.1f}",
}
"""kind of a column -> how its numbers are shown; percent is a share times 100"""


def _harmless(value: Any) -> Any:
    text = printable(value) if isinstance(value, str) else value
    return f"'{text}" if isinstance(text, str) and text.startswith(FORMULA) else text


def labels(loaded: Loaded) -> dict[Key, str]:
    """Return how each row is called, no two alike: the recipe's title for the step, with the step where two steps have
    one title, and with the grid's folder where there are several."""
    titles = {grid.path: grid.titles for grid in loaded.grids}
    named = {(grid, step): titles[grid].get(step, step) for grid, step in loaded.rows()}
    every = [(grid, name) for (grid, _), name in named.items()]
    grids = {grid for grid, _ in named}
    several, alike = len(grids) > 1, len({grid.name for grid in grids}) < len(grids)
    found = {}
    for (grid, step), name in named.items():
        called = f"{name} [{step}]" if every.count((grid, name)) > 1 else name
        found[grid, step] = f"{grid if alike else grid.name}: {called}" if several else called
    return found


def named_rows(loaded: Loaded) -> list[tuple[str, tuple[Run, ...]]]:
    """Return (name, runs by seed) of each row, in order."""
    names = labels(loaded)
    return [(names[key], runs) for key, runs in loaded.rows().items()]


def condensing(loaded: Loaded) -> list[tuple[str, Run]]:
    """Return (row's name, run) of all runs that condensed; not of those that only trained on a set they were given."""
    return [(name, run) for name, runs in named_rows(loaded) for run in runs if run.condenses]


def references(loaded: Loaded, asked: str | None = None) -> dict[Key, Key]:
    """Return row -> the row of the same grid, network and training data that it is compared with; none for that row.

    That is the one asked for, else the one called `kd` (or ...-kd), of several one that learned from as many views,
    else the first row of trained students, else the first. A row of another network than the one asked for has none.

    Raises:
        SettingsError: no grid has the row asked for.
    """
    rows = loaded.rows()
    if asked is not None and asked not in (known := [step for _, step in rows]):
        raise SettingsError(f"no row '{asked}' to compare with; {nearest(asked, known)}")
    alike: dict[tuple[Path, str, str | None], list[Key]] = {}
    for key, runs in rows.items():
        alike.setdefault((key[0], runs[0].summary.model, data_of(runs[0])), []).append(key)
    found: dict[Key, Key] = {}
    for own in alike.values():
        trained = [key for key in own if rows[key][0].stages]
        usual = [key for key in own if (key[1] == asked if asked else _is_usual(key[1]))]
        if best := usual or ([] if asked else trained or own):
            near = {knowledge_of(rows[key][0]): key for key in reversed(best)}
            found |= {
                key: best[0] if key in best else near.get(knowledge_of(rows[key][0]), best[0])
                for key in own if key != best[0]
            }  # fmt: skip
    return found


def _is_usual(step: str) -> bool:
    return step == USUAL_REFERENCE or step.endswith(f"-{USUAL_REFERENCE}")


def knowledge_of(run: Run) -> tuple[str | None, int | None]:
    """Return what a run learned from: the id of its knowledge, and the number of views it went through."""
    return run.record.inputs.knowledge_id, run.record.inputs.views


def data_of(run: Run) -> str | None:
    """Return the digest of the training data of a run."""
    return run.sets[0].data_digest if run.sets else run.record.inputs.data


def mean(runs: Iterable[Run], name: str) -> float | None:
    """Return the mean of an entry of the summaries that have it."""
    return statistics.spread(numbers(runs, name)).mean


def numbers(runs: Iterable[Run], name: str) -> list[float]:
    """Return an entry of the summaries that have it."""
    return [float(value) for run in runs if (value := getattr(run.summary, name)) is not None]


def problems(loaded: Loaded) -> Table:
    """Return a row per run, store or record that was asked for and is in no number, with what is wrong."""
    rows = [{"path": str(path), "state": state, "error": error} for path, state, error in loaded.problems]
    return worded("troubles", rows)


def results(loaded: Loaded) -> Table:
    """Return a row per step: means over its seeds and their sample standard deviations."""
    rows = []
    for label, runs in named_rows(loaded):
        row: dict[str, Any] = {"row": label, "n": len(runs), "seeds": ", ".join(str(run.seed) for run in runs)}
        for name in ("model", "method"):
            row[name] = ", ".join(dict.fromkeys(filter(None, (getattr(run.summary, name) for run in runs)))) or None
        for name in ("accuracy_last", "accuracy_best", "relative_cost", "seconds", "calibration_error", "kept"):
            found = statistics.spread(numbers(runs, name))
            row |= {name: found.mean, f"{name}_std": found.std}
        rows.append(row)
    return worded("results", rows)


def differences(loaded: Loaded, asked: str | None = None) -> Table:
    """Return a row per step and measure: mean difference to the reference over paired seeds, with its interval."""
    names, runs = labels(loaded), loaded.rows()
    rows = [
        {"row": names[key], "reference": names[reference], **found}
        for key, reference in references(loaded, asked).items()
        for found in _compared(runs[key], runs[reference])
    ]
    return worded("differences", rows)


def _compared(ours: Sequence[Run], theirs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    paired = [one for one in ours if any(_is_pair(one, other) for other in theirs)]
    for name, (unit, scale) in COMPARED.items():
        measured, against = ({run.seed: float(getattr(run.summary, name)) for run in some} for some in (paired, theirs))
        if (found := statistics.difference(measured, against)) is not None:
            scaled = {key: None if value is None else scale * value for key, value in found._asdict().items()}
            yield {"measure": name.replace("_", " "), "unit": unit, **scaled, "n": found.n}


def _is_pair(one: Run, other: Run) -> bool:
    """Return whether two runs are of one seed, measured on the same test images, seeds told the same way."""
    same = one.record.inputs.test == other.record.inputs.test
    return same and one.seed == other.seed and one.seeded == other.seeded


def cost(loaded: Loaded) -> Table:
    """Return what each row, and each store, cost per run."""
    seconds = {grid.path / name: spent for grid in loaded.grids for name, spent in grid.seconds.items()}
    rows: list[Row] = [
        {
            "row": f"{store.path.name} (store)", "n": 1, "teacher_forwards": store.points,
            "bytes_written": store.bytes, "seconds": seconds.get(store.path),
        }
        for store in loaded.stores
    ]  # fmt: skip
    for label, runs in named_rows(loaded):
        speeds = [run.summary.images_per_second for run in runs if run.summary.images_per_second is not None]
        taught = [run for run in runs if run.summary.rows_read]
        rows.append({
            "row": label, "n": len(runs), **{name: mean(runs, name) for name in COSTS},
            "live_forwards": mean(taught, "student_samples"),
            "images_per_second": statistics.spread([speed.mean for speed in speeds]).mean,
            "images_per_second_std": statistics.spread([s.std for s in speeds if s.std is not None]).mean,
        })  # fmt: skip
    return worded("cost", rows)


def curves(loaded: Loaded) -> Table:
    """Return a row per run and epoch: what the student had consumed, how long it took, and how good it was."""
    rows = []
    for label, run in ((label, run) for label, runs in named_rows(loaded) for run in runs):
        spent = 0.0
        for epoch in run.metrics:
            spent += run.seconds.get(epoch.epoch, 0.0)
            own = {"row": label, "run": run.name, "seed": run.seed, "epoch": epoch.epoch + 1, "seconds_so_far": spent}
            rows.append(epoch.model_dump() | own)
    return worded("curves", rows)


def stages(loaded: Loaded) -> Table:
    """Return a row per set of every run that condenses: sizes, and what changed since the set before."""
    rows = [{"row": label, "run": run.name, **found} for label, run in condensing(loaded) for found in _sets(run)]
    return worded("stages", rows)


def _sets(run: Run) -> Iterator[dict[str, Any]]:
    for stage, change in zip(run.stages, compare.turnover(compare.parts(run.sets)), strict=True):
        chosen, mixed = stage.manifest, int(stage.manifest.mixed.sum())
        exported = stage.values is None and stage is run.stages[-1] and len(run.stages) > 1
        yield {
            "stage": f"{stage.number} (exported)" if exported else str(stage.number),
            "keep": len(chosen) / chosen.count, "kept": len(chosen), "as_is": len(chosen) - mixed, "mixed": mixed,
            "dropped": chosen.count - len(chosen), **change._asdict(),
            "epsilon_max": float(chosen.epsilon.max()) if mixed else None,
            "class_min": min(chosen.class_counts, default=None), "class_max": max(chosen.class_counts, default=None),
            "digest": chosen.digest,
        }  # fmt: skip


def classes(loaded: Loaded) -> Table:
    """Return a row per run that condenses, set and class: how many of its samples are kept."""
    rows = [
        {
            "row": name, "run": run.name, "stage": stage.number, "label": label,
            "class": run.classes[label] if label < len(run.classes) else str(label), "kept": kept,
        }
        for name, run in condensing(loaded)
        for stage in run.stages
        for label, kept in enumerate(stage.manifest.class_counts)
    ]  # fmt: skip
    return worded("classes", rows)


def fates(loaded: Loaded) -> Table:
    """Return a row per run that condenses: how many samples had which fate."""
    rows = []
    for label, run in condensing(loaded):
        found = {fate: int(mask.sum()) for fate, mask in compare.fates(compare.parts(run.sets)).items()}
        rows.append({"row": label, "run": run.name, **found})
    return worded("fates", rows, fates="; ".join(f"{fate}: {text}" for fate, text in compare.FATES.items()))


def distances(loaded: Loaded) -> Table:
    """Return a row per pair of condensed runs on the same data: Hamming distance of what their last sets keep."""
    rows = []
    for group in same_data(loaded):
        matrix = compare.hamming([run.sets[-1] for _, run in group])
        for one, other in zip(*np.triu_indices(len(group), 1), strict=True):
            (left, first), (right, second) = group[one], group[other]
            rows.append({
                "one": left, "other": right, "distance": float(matrix[one, other]),
                "by_chance": compare.by_chance(first.sets[-1], second.sets[-1]),
                "same_network": "yes" if first.summary.model == second.summary.model else "no",
            })  # fmt: skip
    return worded("distances", rows)


def same_data(loaded: Loaded) -> list[list[tuple[str, Run]]]:
    """Return (folder's name, run) of the condensing runs grouped by the data they condensed, groups of one left out."""
    groups: dict[tuple[str | None, int], list[tuple[str, Run]]] = {}
    for _, run in condensing(loaded):
        name = f"{run.grid.name}/{run.name}" if len(loaded.grids) > 1 else run.name
        groups.setdefault((run.sets[-1].data_digest, run.sets[-1].count), []).append((name, run))
    return [group for group in groups.values() if len(group) > 1]


def runs(loaded: Loaded) -> Table:
    """Return a row per run: where it ran, with what, and by which command."""
    rows = [
        {"row": label, "run": run.name, "seed": run.seed, "folder": f"{run.grid.name}/{run.name}", **_environment(run)}
        for label, found in named_rows(loaded)
        for run in found
    ]
    return worded("runs", rows)


def _environment(run: Run) -> Row:
    latest = run.record.latest
    return {
        "commit": latest.git_commit,
        "device": f"{latest.device} ({latest.device_name})",
        "threads": latest.threads,
        "versions": ", ".join(
            f"{name} {found}" for name, found in {"python": latest.python, **latest.versions}.items()
        ),
        "changes": len(run.record.changes),
        "command": latest.command,
    }


def settings(loaded: Loaded) -> Table:
    """Return a row per setting and row of runs: its value; seeds of a row that differ in it are joined by ' | '."""
    rows = [
        {"row": label, "setting": name, "value": value}
        for label, found in named_rows(loaded)
        for name, value in _settings(found).items()
    ]
    return worded("settings", rows)


def _settings(found: Sequence[Run]) -> dict[str, str]:
    names = dict.fromkeys(name for run in found for name in run.record.settings)
    return {name: " | ".join(dict.fromkeys(str(run.record.settings.get(name, "")) for run in found)) for name in names}


def unlike_rows(loaded: Loaded) -> list[str]:
    """Return a line for each row whose runs differ in more than their seed: their mean is of different things."""
    lines = []
    for label, found in named_rows(loaded):
        differing = [name for name, value in _settings(found).items() if " | " in value and name not in SEEDS]
        if differing:
            lines.append(f"the runs of '{label}' differ in {', '.join(differing)}: their mean is of unlike runs")
    return lines


def identities(loaded: Loaded) -> Table:
    """Return a row per thing that has an id: what names this content and no other."""
    rows = [
        {"of": store.path.name, "what": what, "id": id} for store in loaded.stores for what, id in _store_ids(store)
    ]
    rows += [{"of": run.name, "what": what, "id": id} for run in loaded.runs for what, id in _run_ids(run)]
    return worded("identities", rows)


def _store_ids(store: StoreReport) -> Iterator[tuple[str, str | None]]:
    yield from (("id", store.id), ("knowledge_id", store.knowledge_id), ("layout_id", store.layout_id))
    yield f"weights of the teacher {store.knowledge.teacher.architecture}", store.knowledge.teacher.weights
    yield "training split", store.knowledge.data.digest
    views = store.knowledge.document()["views"]
    yield "views", ", ".join(f"{name} {value}" for name, value in sorted(views.items()))


def _run_ids(run: Run) -> Iterator[tuple[str, str | None]]:
    inputs = run.record.inputs
    yield from (("summary", run.id), ("weights", run.weights))
    for name in ("knowledge_id", "data", "test", "given"):
        if value := getattr(inputs, name):
            yield name, value
    for stage in run.stages:
        yield f"manifest of stage {stage.number}", stage.manifest.digest
