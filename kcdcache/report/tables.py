"""The tables of a report: the same rows on the page, in CSV and in JSON."""

import csv
import io
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kcdcache import statistics
from kcdcache.condensation import compare
from kcdcache.condensation.compare import SetCounts
from kcdcache.datasets.label_noise import NOISE_SEED
from kcdcache.errors import SettingsError, nearest, printable
from kcdcache.report.load import Loaded, Run
from kcdcache.report.show import StoreReport

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""first characters that make a spreadsheet read a text as a formula"""
USUAL_REFERENCE = "kd"
SEEDS = ("seed", "condense_seed")
"""settings that may differ between the runs of a row"""
COMPARED = {
    "accuracy_last": ("percentage points", 100.0),
    "accuracy_best": ("percentage points", 100.0),
    "relative_cost": ("of N x epochs", 1.0),
    "student_samples": ("samples", 1.0),
}
"""entry of a summary that is compared pair by pair -> unit of the difference, and its factor"""
COSTS = ("student_samples", "teacher_forwards", "rows_read", "bytes_read", "seconds")
OF_TEACHER = ("accuracy_train", "accuracy_right", "memorised", "recovered", "accuracy_true")
"""entries of a summary that also exist for the teacher, as `teacher_...`"""
SHARES = (*OF_TEACHER, "agreement_train", "agreement_test", "accuracy_frequent", "accuracy_rare", "calibration_error")
"""entries of a summary that are shown as percentages"""
PLAIN = "ce"

Row = Mapping[str, Any]
Key = tuple[Path, str]
"""grid and step of a row"""


class Column(NamedTuple):
    """A column of a table."""

    name: str
    """key in rows, CSV and JSON"""
    title: str
    kind: str = "text"
    """key of SHOWN"""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of numbers and texts under named columns; None is an empty cell."""

    key: str
    """name in JSON and of the CSV file"""
    title: str
    note: str
    """how to read it"""
    columns: tuple[Column, ...]
    rows: Sequence[Row]

    def document(self) -> dict[str, Any]:
        """Return the table as JSON values, unrounded."""
        return {
            "title": self.title,
            "columns": {column.name: column.title for column in self.columns},
            "rows": [{column.name: row.get(column.name) for column in self.columns} for row in self.rows],
        }

    def csv(self) -> str:
        """Return the table as CSV, unrounded; texts that a spreadsheet would run as a formula get an apostrophe."""
        stream, names = io.StringIO(), [column.name for column in self.columns]
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(names)
        for row in self.rows:
            texts = [printable(cell) if isinstance(cell := row.get(name), str) else cell for name in names]
            writer.writerow([f"'{c}" if isinstance(c, str) and c.startswith(FORMULA) else c for c in texts])
        return stream.getvalue()

    def cells(self) -> list[list[str]]:
        """Return the rows as they are shown: rounded, in the unit of the heading."""
        return [[shown(row.get(column.name), column.kind) for column in self.columns] for row in self.rows]


@cache
def texts() -> dict[str, Any]:
    """Return the texts of a report, from texts.toml."""
    return tomllib.loads(Path(__file__).with_name("texts.toml").read_text(encoding="utf-8"))


def every(loaded: Loaded, reference: str | None = None, across: bool = False) -> dict[str, Table]:
    """Return every table of a report by its key, with titles, notes and columns from `texts`.

    For `reference` and `across` see `references`.
    """
    made = {}
    fates = "; ".join(f"{fate}: {text}" for fate, text in compare.FATES.items())
    for key, text in texts()["tables"].items():
        columns, note = tuple(Column(*column) for column in text["columns"]), text["note"].format(fates=fates)
        rows = differences(loaded, reference, across) if key == "differences" else ROWS[key](loaded)
        made[key] = Table(key=key, title=text["title"], note=note, columns=columns, rows=rows)
    return made


def shown(value: Any, kind: str) -> str:
    """Return a cell as it is shown.

    >>> shown(0.99537, "percent"), shown(-0.1, "signed"), shown(None, "count")
    ('99.54', '-0.100', '')
    """
    if value is None:
        return ""
    return SHOWN[kind](value) if not isinstance(value, str) else printable(value)


SHOWN: Mapping[str, Callable[[Any], str]] = {
    "text": lambda value: printable(str(value)),
    "percent": lambda value: f"{100 * value:.2f}",
    "signed": lambda value: f"{value:+,.3f}",
    "share": lambda value: f"{value:.3f}",
    "count": lambda value: f"{value:,.0f}",
    "number": lambda value: f"{value:.4g}",
    "seconds": lambda value: f"{value:,.1f}",
}
"""kind of a column -> how its values are shown; percent is a share times 100"""


def labels(loaded: Loaded) -> dict[Key, str]:
    """Return a unique name for each row: the recipe's title of the step, if needed with the step or the folder."""
    titles = {grid.path: grid.titles for grid in loaded.grids}
    named = {(grid, step): titles[grid].get(step, step) for grid, step in loaded.rows()}
    seen, grids = Counter((grid, name) for (grid, _), name in named.items()), {grid for grid, _ in named}
    alike, found = len({grid.name for grid in grids}) < len(grids), {}
    for (grid, step), name in named.items():
        called = f"{name} [{step}]" if seen[grid, name] > 1 else name
        found[grid, step] = f"{grid if alike else grid.name}: {called}" if len(grids) > 1 else called
    return found


def named_rows(loaded: Loaded) -> list[tuple[str, tuple[Run, ...]]]:
    """Return (name, runs by seed) of each row, in order."""
    names = labels(loaded)
    return [(names[key], runs) for key, runs in loaded.rows().items()]


def named_runs(loaded: Loaded) -> list[tuple[str, Run]]:
    """Return (name of its row, run) for each run, in order of the rows."""
    return [(name, run) for name, runs in named_rows(loaded) for run in runs]


def condensing(loaded: Loaded) -> list[tuple[str, Run]]:
    """Return (name of its row, run) for each run that condensed, leaving out those that only used a given set."""
    return [(name, run) for name, run in named_runs(loaded) if run.condenses]


def task(run: Run) -> dict[str, Any]:
    """Return what runs must share to be compared, by name: data, epochs and batch size."""
    settings = run.record.settings
    return {
        "training data": data_of(run), "test data": run.record.inputs.test,
        "epochs": settings.get("epochs"), "batch size": settings.get("batch_size"),
    }  # fmt: skip


def references(loaded: Loaded, asked: str | None = None, across: bool = False) -> dict[Key, Key]:
    """Return row -> reference row of the same grid, network and `task`; the references have none themselves.

    With `across`, the task may differ.

    The reference is `asked`, else the row named `kd` or ...-kd (if there are several, one with the same knowledge and
    number of views), else the first row of trained students, else the first row. Rows of another network than `asked`
    have none. Raises SettingsError if no grid has a row `asked`.
    """
    rows = loaded.rows()
    if asked is not None and asked not in (known := [step for _, step in rows]):
        raise SettingsError(f"no row '{asked}' to compare with; {nearest(asked, known)}")
    alike: dict[tuple[Any, ...], list[Key]] = {}
    for key, runs in rows.items():
        shared = () if across else tuple(task(runs[0]).values())
        alike.setdefault((key[0], runs[0].summary.model, *shared), []).append(key)
    found: dict[Key, Key] = {}
    for own in alike.values():
        trained = [key for key in own if rows[key][0].stages]
        usual = [key for key in own if (key[1] == asked if asked else f"-{key[1]}".endswith(f"-{USUAL_REFERENCE}"))]
        if best := usual or ([] if asked else trained or own):
            near = {knowledge_of(rows[key][0]): key for key in reversed(best)}
            for key in own:
                found[key] = best[0] if key in best else near.get(knowledge_of(rows[key][0]), best[0])
            del found[best[0]]
    return found


def pairing(loaded: Loaded, asked: str | None = None, across: bool = False) -> list[str]:
    """Return a note for each row without any to compare with that has its task, or with `across`, another task."""
    names, runs = labels(loaded), loaded.rows()
    usual, wide = references(loaded, asked), references(loaded, asked, across=True)
    notes = []
    for key, other in wide.items():
        ours, theirs = (task(runs[one][0]) for one in (key, other))
        unlike = [name for name, value in ours.items() if value != theirs[name]]
        if not unlike or (not across and (key in usual or key in usual.values())):
            continue
        what = ", ".join(name if "data" in name else f"{name} ({ours[name]} and {theirs[name]})" for name in unlike)
        text = f"'{names[key]}' and '{names[other]}' differ in {what}"
        notes.append(f"{text} and are compared all the same" if across else f"{text}: not compared without --across")
    return notes


def knowledge_of(run: Run) -> tuple[str | None, int | None]:
    """Return the id of the knowledge a run learned from, and the number of views it used."""
    return run.record.inputs.knowledge_id, run.record.inputs.views


def data_of(run: Run) -> str | None:
    """Return the digest of a run's training data."""
    return run.sets[0].data_digest if run.sets else run.record.inputs.data


def spread(values: Iterable[float | None]) -> statistics.Spread:
    """Return the spread of the values that are not None."""
    return statistics.spread([float(value) for value in values if value is not None])


def mean(runs: Iterable[Run], name: str) -> float | None:
    """Return the mean of an entry over the summaries that have it."""
    return spread(getattr(run.summary, name) for run in runs).mean


def problems(loaded: Loaded) -> Sequence[Row]:
    """Return a row for each run, store or record that is left out, with the reason."""
    return [{"path": str(path), "state": state, "error": error} for path, state, error in loaded.problems]


def results(loaded: Loaded) -> Sequence[Row]:
    """Return a row per step: means over seeds with sample standard deviations."""
    rows = []
    for label, runs in named_rows(loaded):
        row: dict[str, Any] = {"row": label, "n": len(runs), "seeds": ", ".join(str(run.seed) for run in runs)}
        for name in ("model", "method"):
            row[name] = ", ".join(dict.fromkeys(filter(None, (getattr(run.summary, name) for run in runs)))) or None
        for name in (*COMPARED, "seconds", "calibration_error", "kept"):
            _, row[name], row[f"{name}_std"] = spread(getattr(run.summary, name) for run in runs)
        rows.append(row)
    return rows


def differences(loaded: Loaded, asked: str | None = None, across: bool = False) -> Sequence[Row]:
    """Return a row per step and measure: mean difference from the reference over paired seeds, with its interval."""
    names, runs = labels(loaded), loaded.rows()
    return [
        {"row": names[key], "reference": names[reference], **found}
        for key, reference in references(loaded, asked, across).items()
        for found in compared(runs[key], runs[reference], across)
    ]


def compared(ours: Sequence[Run], theirs: Sequence[Run], across: bool) -> Iterator[dict[str, Any]]:
    """Yield the mean difference of two rows over paired seeds, with its interval, for each measure of COMPARED."""

    def pair(run: Run) -> tuple[Any, ...]:  # same task, same seed from the same source
        return () if across else tuple(task(run).values()), run.seed, run.seeded

    paired = [run for run in ours if pair(run) in set(map(pair, theirs))]
    budgets = {(run.summary.count, run.summary.epochs) for run in (*paired, *theirs)}
    for name, (unit, scale) in COMPARED.items():
        if name == "relative_cost" and len(budgets) > 1:  # shares of unlike wholes
            continue
        measured, against = ({run.seed: float(getattr(run.summary, name)) for run in some} for some in (paired, theirs))
        if (found := statistics.difference(measured, against)) is not None:
            scaled = {key: None if value is None else scale * value for key, value in found._asdict().items()}
            yield {"measure": name.replace("_", " "), "unit": unit, **scaled, "n": found.n}


def cost(loaded: Loaded) -> Sequence[Row]:
    """Return the cost of each store, where the teacher's forwards were paid, and the cost per run of each row."""
    seconds = {grid.path / name: spent for grid in loaded.grids for name, spent in grid.seconds.items()}
    rows: list[Row] = [
        {
            "row": f"{store.path.name} (store)", "n": 1, "teacher_forwards": _forwards(store),
            "bytes_written": store.bytes, "seconds": seconds.get(store.path),
        }
        for store in loaded.stores
    ]  # fmt: skip
    rows += _stores_elsewhere(loaded)
    for label, runs in named_rows(loaded):
        speeds = [rate for run in runs if (rate := run.summary.images_per_second) is not None]
        taught = [run for run in runs if run.summary.rows_read]
        rows.append({
            "row": label, "n": len(runs), **{name: mean(runs, name) for name in COSTS},
            "live_forwards": mean(taught, "student_samples"),
            "images_per_second": spread(speed.mean for speed in speeds).mean,
            "images_per_second_std": spread(speed.std for speed in speeds).mean,
        })  # fmt: skip
    return rows


def _forwards(store: StoreReport) -> int:
    return 0 if store.knowledge.teacher.imported else store.points


def _stores_elsewhere(loaded: Loaded) -> list[Row]:
    """Return a row for each store that runs learned from and that is in none of the folders, each once."""
    known, found = {store.knowledge_id for store in loaded.stores}, dict[str, int]()
    for run in loaded.runs:
        name, paid = run.record.inputs.knowledge_id, run.summary.store_teacher_forwards
        if name is not None and name not in known and paid is not None:
            found[name] = max(paid, found.get(name, 0))  # a store may grow between runs
    return [{"row": f"store {name[:12]} (elsewhere)", "n": 1, "teacher_forwards": paid} for name, paid in found.items()]


def curves(loaded: Loaded) -> Sequence[Row]:
    """Return a row per run and epoch: its metrics, with the training time so far."""
    rows = []
    for label, run in named_runs(loaded):
        spent = 0.0
        for epoch in run.metrics:
            spent += run.seconds.get(epoch.epoch, 0.0)
            own = {"row": label, "run": run.name, "seed": run.seed, "epoch": epoch.epoch + 1, "seconds_so_far": spent}
            rows.append(epoch.model_dump() | own)
    return rows


def stages(loaded: Loaded) -> Sequence[Row]:
    """Return a row per set of each condensing run: sizes, and changes from the previous set."""
    rows = []
    for label, run in condensing(loaded):
        for stage, change in zip(run.stages, compare.turnover(compare.parts(run.sets)), strict=True):
            chosen, mixed = stage.manifest, int(stage.manifest.mixed.sum())
            exported = stage.values is None and stage is run.stages[-1] and len(run.stages) > 1
            rows.append({
                "row": label, "run": run.name, "stage": f"{stage.number} (exported)" if exported else str(stage.number),
                "keep": len(chosen) / chosen.count, "kept": len(chosen), "as_is": len(chosen) - mixed, "mixed": mixed,
                "dropped": chosen.count - len(chosen), **change._asdict(), "digest": chosen.digest,
                "epsilon_max": float(chosen.epsilon.max()) if mixed else None,
                "class_min": min(chosen.class_counts, default=None),
                "class_max": max(chosen.class_counts, default=None),
            })  # fmt: skip
    return rows


def classes(loaded: Loaded) -> Sequence[Row]:
    """Return a row per condensing run, set and class: how many samples of the class are kept."""
    return [
        {"row": name, "run": run.name, "stage": number, "label": label, "class": run.class_name(label), "kept": kept}
        for name, run in condensing(loaded)
        for number, chosen, _, _ in run.stages
        for label, kept in enumerate(chosen.class_counts)
    ]


def fates(loaded: Loaded) -> Sequence[Row]:
    """Return a row per condensing run: how many samples had each fate."""
    return [
        {"row": label, "run": run.name, **{fate: int(mask.sum()) for fate, mask in found.items()}}
        for label, run in condensing(loaded)
        for found in [compare.fates(compare.parts(run.sets))]
    ]


def distances(loaded: Loaded) -> Sequence[Row]:
    """Return a row per pair of condensing runs on the same data: Hamming distance between their last sets."""
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
    return rows


def same_data(loaded: Loaded) -> list[list[tuple[str, Run]]]:
    """Return (folder name, run) of the condensing runs, grouped by their data; groups of one are left out."""
    groups: dict[tuple[str | None, int], list[tuple[str, Run]]] = {}
    for _, run in condensing(loaded):
        name = f"{run.grid.name}/{run.name}" if len(loaded.grids) > 1 else run.name
        groups.setdefault((run.sets[-1].data_digest, run.sets[-1].count), []).append((name, run))
    return [group for group in groups.values() if len(group) > 1]


def runs(loaded: Loaded) -> Sequence[Row]:
    """Return a row per run: its environment and command."""
    rows = []
    for label, run in named_runs(loaded):
        latest = run.record.latest
        libraries = {"python": latest.python, **latest.versions}
        rows.append({
            "row": label, "run": run.name, "seed": run.seed, "folder": f"{run.grid.name}/{run.name}",
            "commit": latest.git_commit, "device": f"{latest.device} ({latest.device_name})",
            "threads": latest.threads, "versions": ", ".join(f"{name} {found}" for name, found in libraries.items()),
            "changes": len(run.record.changes), "command": latest.command,
        })  # fmt: skip
    return rows


def settings(loaded: Loaded) -> Sequence[Row]:
    """Return a row per setting of each row of runs; values that differ between its runs are joined by ' | '."""
    return [
        {"row": label, "setting": name, "value": value}
        for label, found in named_rows(loaded)
        for name, value in _settings(found).items()
    ]


def _settings(found: Sequence[Run]) -> dict[str, str]:
    names = dict.fromkeys(name for run in found for name in run.record.settings)
    return {name: " | ".join(dict.fromkeys(str(run.record.settings.get(name, "")) for run in found)) for name in names}


def unlike_rows(loaded: Loaded) -> list[str]:
    """Return a warning for each row whose runs differ in more than their seed."""
    return [
        f"the runs of '{label}' differ in {', '.join(differing)}: their mean is of unlike runs"
        for label, found in named_rows(loaded)
        if (differing := [name for name, value in _settings(found).items() if " | " in value and name not in SEEDS])
    ]


def identities(loaded: Loaded) -> Sequence[Row]:
    """Return a row per id or digest of each store and run."""
    named = [(store.path.name, _store_ids(store)) for store in loaded.stores]
    named += [(run.name, _run_ids(run)) for run in loaded.runs]
    return [{"of": of, "what": what, "id": id} for of, ids in named for what, id in ids.items()]


def _store_ids(store: StoreReport) -> dict[str, str | None]:
    knowledge, views = store.knowledge, store.knowledge.document()["views"]
    return {
        "id": store.id, "knowledge_id": store.knowledge_id, "layout_id": store.layout_id,
        f"weights of the teacher {knowledge.teacher.architecture}": knowledge.teacher.weights,
        "training split": knowledge.data.digest,
        "views": ", ".join(f"{name} {value}" for name, value in sorted(views.items())),
    }  # fmt: skip


def _run_ids(run: Run) -> dict[str, str | None]:
    inputs = {name: getattr(run.record.inputs, name) for name in ("knowledge_id", "data", "test", "given")}
    return {
        "summary": run.id, "weights": run.weights, **{name: value for name, value in inputs.items() if value},
        **{f"manifest of stage {stage.number}": stage.manifest.digest for stage in run.stages},
    }  # fmt: skip


def fidelity(loaded: Loaded) -> Sequence[Row]:
    """Return a row per step that was measured on its training samples, and per teacher; means over seeds."""
    names, rows = labels(loaded), loaded.rows()
    plain = {key: runs for key, runs in rows.items() if _is_plain(runs[0])}
    found: list[Row] = []
    teachers: list[Row] = []
    for key, every in rows.items():
        runs = [run for run in every if run.summary.accuracy_train is not None]
        if not runs:
            continue
        teacher = _teacher(runs[0])
        if teacher and teacher not in teachers:  # stores of the same teacher share view 0
            teachers.append(teacher)
            found.append({"row": teachers_name(names[key]), **_group(runs[0]), **teacher})
        row = {"row": names[key], "n": len(runs), "data": corruption(runs[0]), **_group(runs[0])}
        row |= {"accuracy": mean(runs, "accuracy_last")} | {name: mean(runs, name) for name in SHARES}
        base = None if key in plain else _plain_of(runs[0], plain)
        if base is not None:
            ours, theirs = (
                {run.seed: 100 * run.summary.accuracy_last for run in side if task(run) == task(runs[0])}
                for side in (runs, plain[base])
            )
            row["over"] = names[base]
            if (gain := statistics.difference(ours, theirs)) is not None:  # in percentage points
                row |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high, "pairs": gain.n}
        found.append(row)
    return found


def screening(loaded: Loaded) -> Sequence[Row]:
    """Return a row per step and set: how it treats wrong labels and rare classes; means over seeds."""
    rows: list[Row] = []
    for label, runs in named_rows(loaded):
        by_stage: dict[int, list[Row]] = {}
        for run in (run for run in runs if run.condenses):
            before: dict[str, float | None] = {"separation_wrong": None, "separation_rare": None}
            for counts in sorted(run.summary.sets or (), key=lambda one: one.stage):  # chosen from the values before
                by_stage.setdefault(counts.stage, []).append(_shares(counts) | before)
                before = {name: getattr(counts, name) for name in before}
        for stage, each in sorted(by_stage.items()):
            row = {"row": label, "data": corruption(runs[0]), **_group(runs[0]), "stage": stage, "n": len(each)}
            rows.append(row | {name: spread(one[name] for one in each).mean for name in each[0]})
    return rows


def _group(run: Run) -> dict[str, str]:
    """Return what the rows of one figure share: the corruption of the training data, and the network."""
    return {"condition": corruption(run), "network": run.summary.model}


def corruption(run: Run) -> str:
    """Describe the corruption of a run's training data."""
    known = run.summary.corruption
    if known is None:
        return "as it is"
    redraw = "" if known.redraw else ", the true class excluded"
    redraw += "" if known.noise_seed == NOISE_SEED else f", seed {known.noise_seed}"
    noise = [] if known.noise is None else [f"noise {known.noise}{redraw}"]
    gamma = [] if known.gamma is None else [f"gamma {known.gamma} ({known.n_max} to {known.n_min} per class)"]
    return ", ".join([*noise, *gamma]) or "as it is"


def _plain_of(run: Run, plain: Mapping[Key, Sequence[Run]]) -> Key | None:
    """Return the row of plain training with the same network and task, and the most similar settings."""

    def kind(run: Run) -> tuple[Any, ...]:
        return run.grid, run.summary.model, task(run)

    def alike(key: Key) -> tuple[bool, int]:
        other = plain[key][0]
        ours, theirs = run.record.settings, other.record.settings
        shared = sum(name in theirs and theirs[name] == value for name, value in ours.items())
        return knowledge_of(run) == knowledge_of(other), shared

    return max((key for key, runs in plain.items() if kind(runs[0]) == kind(run)), key=alike, default=None)


def _is_plain(run: Run) -> bool:
    """Return whether a run trained on labels alone and kept everything."""
    alone = run.summary.method == PLAIN or run.summary.kind == "fit"
    return alone and not run.condenses and run.summary.relative_cost == 1


def _teacher(run: Run) -> Row:
    """Return the teacher's measurements in a run's summary; empty if it has none."""
    summary = run.summary
    if summary.teacher_accuracy_train is None:
        return {}
    data = {"same": corruption(run), "other": "other data than the students'"}.get(summary.teacher_data or "", "")
    shares = {name: getattr(summary, f"teacher_{name}") for name in OF_TEACHER}
    return {"n": 1, "data": data, "accuracy": summary.teacher_accuracy, **shares}


def teachers_name(student: str) -> str:
    """Name the teacher of a row, in the style of a recipe's `WHAT: variant` rows.

    >>> teachers_name("noise 0.4: KD, everything"), teachers_name("resnet8-kd")
    ('noise 0.4: the teacher', 'teacher of resnet8-kd')
    """
    what, colon, _ = student.rpartition(": ")
    return f"{what}: the teacher" if colon else f"teacher of {student}"


def _shares(counts: SetCounts) -> dict[str, float | None]:
    """Return a set's counts as shares; None if there is nothing of that kind."""
    total = counts.kept + counts.dropped
    wrong, rare = _sum(counts.kept_wrong, counts.dropped_wrong), _sum(counts.kept_rare, counts.dropped_rare)
    return {
        "kept": counts.kept / total,
        "dropped": counts.dropped / total,
        "wrong": _ratio(wrong, total),
        "precision": _ratio(counts.dropped_wrong, counts.dropped),
        "recall": _ratio(counts.dropped_wrong, wrong) if counts.dropped else None,
        "enriched_wrong": _ratio(counts.enriched_wrong, counts.enriched),
        "partners_wrong": _ratio(counts.partners_wrong, counts.partners),
        "kept_rare": _ratio(counts.kept_rare, rare),
        "kept_frequent": None if rare is None else _ratio(counts.kept - (counts.kept_rare or 0), total - rare),
    }


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def _ratio(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


ROWS: Mapping[str, Callable[[Loaded], Sequence[Row]]] = {
    "troubles": problems, "results": results, "differences": differences, "cost": cost, "curves": curves,
    "stages": stages, "fates": fates, "classes": classes, "distances": distances, "fidelity": fidelity,
    "screening": screening, "runs": runs, "settings": settings, "identities": identities,
}  # fmt: skip
"""table -> function that makes its rows"""
