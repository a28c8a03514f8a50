"""A table as a plain value: the same rows shown to people, written as CSV and as JSON."""

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kcdcache.condense import compare
from kcdcache.errors import SettingsError
from kcdcache.report import statistics
from kcdcache.report.load import NUMBERS, Findings, Run
from kcdcache.runs.state import latest_environment
from kcdcache.settings import nearest

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""what makes a spreadsheet take a text for a formula"""


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
    rows: Sequence[Mapping[str, Any]]

    def document(self) -> dict[str, Any]:
        """Return it as JSON values: unrounded, empty cells as null."""
        names = [column.name for column in self.columns]
        return {
            "title": self.title,
            "columns": {column.name: column.title for column in self.columns},
            "rows": [{name: row.get(name) for name in names} for row in self.rows],
        }

    def csv(self) -> str:
        """Return it as CSV, unrounded; before a text that a spreadsheet would run as a formula stands an apostrophe."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([column.name for column in self.columns])
        for row in self.rows:
            writer.writerow([_plain(row.get(column.name)) for column in self.columns])
        return stream.getvalue()

    def cells(self) -> list[list[str]]:
        """Return the rows as people see them: rounded, in the unit of the heading."""
        return [[shown(row.get(column.name), column.kind) for column in self.columns] for row in self.rows]

    def text(self) -> str:
        """Return heading and rows as aligned text."""
        lines = [[column.title for column in self.columns], *self.cells()]
        widths = [max(len(line[place]) for line in lines) for place in range(len(self.columns))]
        aligned = [
            "  ".join(
                cell.ljust(width) if column.kind == "text" else cell.rjust(width)
                for cell, width, column in zip(line, widths, self.columns, strict=True)
            )
            for line in lines
        ]
        return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])


def printable(text: str) -> str:
    """Return text in one line and without control or bidirectional characters: names from files may hold any."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


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


def _plain(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(FORMULA) else text


Key = tuple[Path, str]
USUAL_REFERENCE = "kd"
COMPARED = {
    "accuracy_last": ("percentage points", 100.0),
    "accuracy_best": ("percentage points", 100.0),
    "relative_cost": ("of N x epochs", 1.0),
}
"""entries of summaries that are compared pair by pair -> unit of their difference, and what it is multiplied by"""
PACE = {"images_per_second": "mean", "images_per_second_std": "std"}
"""columns of the cost of each row -> entry of a summary's images per second"""
COSTS = ("student_samples", "teacher_forwards", "rows_read", "bytes_read", "seconds")


def labels(findings: Findings) -> dict[Key, str]:
    """Return how each row is called, no two alike: the recipe's title for the step, with the step where two steps have
    one title, and with the grid's folder where there are several."""
    titles = {grid.path: grid.titles for grid in findings.grids}
    keys = list(findings.rows())
    named = [(titles[grid].get(step, step), step, grid) for grid, step in keys]
    several = len({grid for grid, _ in keys}) > 1
    alike = len({grid.name for grid, _ in keys}) < len({grid for grid, _ in keys})
    found = {}
    for name, step, grid in named:
        twice = [(other, of) for other, _, of in named].count((name, grid)) > 1
        called = f"{name} [{step}]" if twice else name
        found[grid, step] = f"{grid if alike else grid.name}: {called}" if several else called
    return found


def references(findings: Findings, asked: str | None = None) -> dict[Key, Key]:
    """Return row -> the row of the same grid, network and training data that it is compared with; none for that row.

    That is the one asked for, else the one called `kd` (or ...-kd), of several one that learned from as many views,
    else the first row of trained students, else the first. A row of another network than the one asked for has none.

    Raises:
        SettingsError: no grid has the row asked for.
    """
    rows = findings.rows()
    if asked is not None and asked not in (known := [step for _, step in rows]):
        raise SettingsError(f"no row '{asked}' to compare with; {nearest(asked, known)}")
    alike: dict[tuple[Path, Any, Any], list[Key]] = {}
    for key, runs in rows.items():
        alike.setdefault((key[0], runs[0].summary.get("model"), data_of(runs[0])), []).append(key)
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


def knowledge_of(run: Run) -> tuple[Any, Any]:
    """Return what a run learned from: the id of its knowledge, and the number of views it went through."""
    inputs = run.record["inputs"]
    return inputs.get("knowledge_id"), inputs.get("views")


def data_of(run: Run) -> Any:
    """Return the digest of the training data of a run."""
    return run.sets[0].data_digest if run.sets else run.record["inputs"].get("data")


def _is_usual(step: str) -> bool:
    return step == USUAL_REFERENCE or step.endswith(f"-{USUAL_REFERENCE}")


def results(findings: Findings) -> Table:
    """Return a row per step: means over its seeds and their sample standard deviations."""
    names = labels(findings)
    rows = []
    for key, runs in findings.rows().items():
        row = {"row": names[key], "n": len(runs), "seeds": ", ".join(str(run.seed) for run in runs)}
        row |= {name: _joined(run.summary.get(name) for run in runs) for name in ("model", "method")}
        for name in ("accuracy_last", "accuracy_best", "relative_cost", "seconds", "calibration_error", "kept"):
            found = statistics.spread(_numbers(runs, name))
            row |= {name: found.mean, f"{name}_std": found.std}
        rows.append(row)
    columns = (
        Column("row", "row"), Column("model", "network"), Column("method", "method"), Column("n", "n", "count"),
        Column("seeds", "seeds"), Column("accuracy_last", "accuracy %", "percent"),
        Column("accuracy_last_std", "± std", "percent"), Column("accuracy_best", "best %", "percent"),
        Column("accuracy_best_std", "± std", "percent"), Column("relative_cost", "relative cost", "share"),
        Column("relative_cost_std", "± std", "share"), Column("seconds", "seconds", "seconds"),
        Column("seconds_std", "± std", "seconds"), Column("calibration_error", "calibration error", "share"),
        Column("kept", "kept at the end", "count"),
    )  # fmt: skip
    note = (
        "Means over n seeds, with the sample standard deviation (n - 1). 'accuracy' is of the last epoch on the test "
        "split and is the result; 'best' was chosen on that split, for comparison with papers that report it. "
        "'relative cost' is student samples forwarded / (N x epochs)."
    )
    return Table(key="results", title="Accuracy and cost of each row", note=note, columns=columns, rows=rows)


def differences(findings: Findings, asked: str | None = None) -> Table:
    """Return a row per step and measure: mean difference to the reference over paired seeds, with its interval."""
    names, rows = labels(findings), findings.rows()
    found: list[dict[str, Any]] = []
    for key, reference in references(findings, asked).items():
        found += _compared(names[key], names[reference], rows[key], rows[reference])
    columns = (
        Column("row", "row"), Column("reference", "compared with"), Column("measure", "measure"),
        Column("unit", "unit"), Column("n", "pairs", "count"), Column("mean", "difference", "signed"),
        Column("std", "std", "share"), Column("low", "95 % from", "signed"), Column("high", "to", "signed"),
    )  # fmt: skip
    note = (
        "Row minus a reference of the same network, seed by seed: runs of the same seed share initialisation, order "
        "and views, so that their difference varies less than either. The interval is Student's t (95 %); where it "
        "contains 0, these seeds cannot tell the two apart. One pair has no interval, and two or three pairs that "
        "happen to agree have one that is too narrow. Intervals are not adjusted for the number of comparisons."
    )
    return Table(key="differences", title="Paired differences", note=note, columns=columns, rows=found)


def _compared(label: str, reference: str, ours: Sequence[Run], theirs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    for name, (unit, scale) in COMPARED.items():
        paired = [one for one in ours if any(comparable(one, other) for other in theirs)]
        measured, against = ({run.seed: float(run.summary[name]) for run in _having(x, name)} for x in (paired, theirs))
        if (found := statistics.difference(measured, against)) is not None:
            numbers = {key: None if value is None else scale * value for key, value in found._asdict().items()}
            row = {"row": label, "reference": reference, "measure": name.replace("_", " "), "unit": unit}
            yield row | numbers | {"n": found.n}


def comparable(one: Run, other: Run) -> bool:
    """Return whether two runs are a pair: of one seed, measured on the same test images, seeds told the same way."""
    same = one.record["inputs"].get("test") == other.record["inputs"].get("test")
    return same and one.seed == other.seed and one.seeded == other.seeded


def cost(findings: Findings) -> Table:
    """Return what each row, and each store, cost per run."""
    names, rows = labels(findings), []
    for path, told in findings.stores:
        seconds = next((grid.seconds.get(path.name) for grid in findings.grids if grid.path == path.parent), None)
        rows.append({
            "row": f"{path.name} (store)", "n": 1, "teacher_forwards": told["points"],
            "bytes_written": told["bytes"], "seconds": seconds,
        })  # fmt: skip
    for key, runs in findings.rows().items():
        means = {name: statistics.spread(_numbers(runs, name)).mean for name in COSTS}
        pace = {name: statistics.spread(_paces(runs, of)).mean for name, of in PACE.items()}
        rows.append({"row": names[key], "n": len(runs), **means, **pace, "live_forwards": _live_forwards(runs)})
    columns = (
        Column("row", "row"), Column("n", "n", "count"), Column("teacher_forwards", "teacher forwards", "count"),
        Column("live_forwards", "with a live teacher", "count"),
        Column("student_samples", "student samples", "count"), Column("rows_read", "store rows read", "count"),
        Column("bytes_read", "store bytes read", "count"), Column("bytes_written", "bytes written", "count"),
        Column("seconds", "seconds", "seconds"), Column("images_per_second", "images/s", "count"),
        Column("images_per_second_std", "± std", "count"),
    )  # fmt: skip
    note = (
        "Per run, means over its seeds. A store pays the teacher once (samples x views); students then read it. 'with "
        "a live teacher' is what the teacher would have had to see beside that student, each of its samples in each "
        "epoch (counted, not run). Kept samples and their partners are both read, so that condensation saves student "
        "steps sooner than reading. 'images/s' is the mean over epochs, evaluation included, with their standard "
        "deviation; a stage's first epoch, which waits for what is later fetched ahead, is left out."
    )
    return Table(key="cost", title="Cost of each row", note=note, columns=columns, rows=rows)


def _live_forwards(runs: Sequence[Run]) -> float | None:
    """Return the teacher forwards per run had there been no store, or None for runs that read nothing of a teacher."""
    taught = [run for run in runs if any(_numbers([run], "rows_read"))]
    return statistics.spread(_numbers(taught, "student_samples")).mean if taught else None


def curves(findings: Findings) -> Table:
    """Return a row per run and epoch: what the student had consumed, how long it took, and how good it was."""
    measures = [name for name in NUMBERS if name != "epoch"]
    names, rows = labels(findings), []
    for key, runs in findings.rows().items():
        for run in runs:
            spent = 0.0
            for epoch in run.metrics:
                spent += run.seconds.get(epoch["epoch"], 0.0)
                row = {"row": names[key], "run": run.name, "seed": run.seed, "epoch": epoch["epoch"] + 1}
                rows.append(row | {"seconds_so_far": spent} | {name: epoch.get(name) for name in measures})
    columns = tuple(Column(name, name.replace("_", " "), "text" if name in ("row", "run") else "number")
                    for name in ("row", "run", "seed", "epoch", "seconds_so_far", *measures))  # fmt: skip
    note = "Every epoch of every run; epochs count from 1."
    return Table(key="curves", title="Training curves", note=note, columns=columns, rows=rows)


def stages(findings: Findings) -> Table:
    """Return a row per set of every run that condenses: sizes, and what changed since the set before."""
    names, rows = labels(findings), []
    for key, runs in findings.rows().items():
        for run in (run for run in runs if run.condenses):
            rows += [{"row": names[key], "run": run.name, "seed": run.seed, **found} for found in _sets(run)]
    columns = (
        Column("row", "row"), Column("run", "run"), Column("stage", "stage"),
        Column("keep", "kept share of N", "share"), Column("kept", "kept", "count"),
        Column("as_is", "K_1H: as they are", "count"), Column("mixed", "K_Aug: enriched", "count"),
        Column("dropped", "dropped", "count"), Column("stayed", "stayed", "count"), Column("left", "left", "count"),
        Column("returned", "returned", "count"), Column("new", "new", "count"),
        Column("epsilon_max", "largest share mixed in", "share"), Column("class_min", "smallest class", "count"),
        Column("class_max", "largest class", "count"), Column("digest", "digest"),
    )  # fmt: skip
    note = (
        "One row per set. 'left' and 'returned' compare with the set before; partners for the enriched samples come "
        "from the dropped ones. The set after the last stage is exported: other students can train from it."
    )
    return Table(key="stages", title="Every set of every run", note=note, columns=columns, rows=rows)


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


def classes(findings: Findings) -> Table:
    """Return a row per run that condenses, set and class: how many of its samples are kept."""
    names, rows = labels(findings), []
    for key, runs in findings.rows().items():
        for run in (run for run in runs if run.condenses):
            for stage in run.stages:
                for label, kept in enumerate(stage.manifest.class_counts):
                    called = run.classes[label] if label < len(run.classes) else str(label)
                    row = {"row": names[key], "run": run.name, "stage": stage.number, "label": label}
                    rows.append(row | {"class": called, "kept": kept})
    columns = (
        Column("row", "row"), Column("run", "run"), Column("stage", "stage", "count"),
        Column("label", "label", "count"), Column("class", "class"), Column("kept", "kept samples", "count"),
    )  # fmt: skip
    note = "How many samples of each class every set keeps."
    return Table(key="classes", title="Classes in each set", note=note, columns=columns, rows=rows)


def fates(findings: Findings) -> Table:
    """Return a row per run that condenses: how many samples had which fate."""
    names, rows = labels(findings), []
    for key, runs in findings.rows().items():
        for run in (run for run in runs if run.condenses):
            found = {fate: int(mask.sum()) for fate, mask in compare.fates(compare.parts(run.sets)).items()}
            rows.append({"row": names[key], "run": run.name, "seed": run.seed, **found})
    columns = (
        Column("row", "row"), Column("run", "run"), *(Column(fate, fate, "count") for fate in compare.FATES),
    )  # fmt: skip
    note = "Over all sets of a run: " + "; ".join(f"{fate}: {text}" for fate, text in compare.FATES.items()) + "."
    return Table(key="fates", title="What became of the samples", note=note, columns=columns, rows=rows)


def condensed(findings: Findings) -> list[tuple[str, Run]]:
    """Return (name, run) of all runs that condensed; not of those that only trained on a set they were given."""
    several = len(findings.grids) > 1
    return [
        (f"{run.grid.name}/{run.name}" if several else run.name, run)
        for runs in findings.rows().values()
        for run in runs
        if run.condenses
    ]


def distances(findings: Findings) -> Table:
    """Return a row per pair of condensed runs on the same data: Hamming distance of what their last sets keep."""
    rows = []
    for group in same_data(condensed(findings)):
        matrix = compare.hamming([run.sets[-1] for _, run in group])
        for one, other in zip(*np.triu_indices(len(group), 1), strict=True):
            (left, first), (right, second) = group[one], group[other]
            chance = compare.by_chance(first.sets[-1], second.sets[-1])
            models = (first.summary.get("model"), second.summary.get("model"))
            rows.append({
                "one": left, "other": right, "distance": float(matrix[one, other]), "by_chance": chance,
                "same_network": "yes" if models[0] == models[1] else "no",
            })  # fmt: skip
    columns = (
        Column("one", "run"), Column("other", "and run"), Column("distance", "Hamming distance", "share"),
        Column("by_chance", "random sets", "share"), Column("same_network", "same network"),
    )  # fmt: skip
    note = (
        "Share of all N samples that one run's last set keeps and the other's does not: 0 for equal sets; 'random "
        "sets' is what two independent sets of those sizes would have. Well below it, runs agree on what is valuable."
    )
    return Table(key="distances", title="Distances, pair by pair", note=note, columns=columns, rows=rows)


def same_data(found: list[tuple[str, Run]]) -> list[list[tuple[str, Run]]]:
    """Return the runs grouped by the data they condensed, groups of one left out."""
    groups: dict[Any, list[tuple[str, Run]]] = {}
    for name, run in found:
        chosen = run.sets[-1]
        groups.setdefault((chosen.data_digest, chosen.count), []).append((name, run))
    return [group for group in groups.values() if len(group) > 1]


def _having(runs: Sequence[Run], name: str) -> list[Run]:
    return [run for run in runs if isinstance(run.summary.get(name), int | float)]


def _paces(runs: Sequence[Run], name: str) -> list[float]:
    """Return an entry of the images per second of those runs that tell it."""
    told = [run.summary.get("images_per_second") for run in runs]
    return [float(one[name]) for one in told if isinstance(one, dict) and isinstance(one.get(name), int | float)]


def _numbers(runs: Sequence[Run], name: str) -> list[float]:
    return [float(run.summary[name]) for run in _having(runs, name)]


def _joined(found: Iterator[Any]) -> str | None:
    return ", ".join(dict.fromkeys(str(item) for item in found if item is not None)) or None


SEEDS = ("seed", "condense_seed")
"""settings in which the runs of one row differ by design"""


def troubles(findings: Findings) -> Table:
    """Return a row per run, store or record that was asked for and is in no number, with what is wrong."""
    rows = [{"path": str(path), "state": state, "error": error} for path, state, error in findings.troubles]
    columns = (Column("path", "path"), Column("state", "state"), Column("error", "what is wrong"))
    note = "These were asked for and are in none of the numbers below."
    return Table(key="troubles", title="Not in this report", note=note, columns=columns, rows=rows)


def runs(findings: Findings) -> Table:
    """Return a row per run: where it ran, with what, and by which command."""
    names = labels(findings)
    rows = [
        {
            "row": names[key],
            "run": run.name,
            "seed": run.seed,
            "folder": f"{run.grid.name}/{run.name}",
            **_environment(run),
        }
        for key, found in findings.rows().items()
        for run in found
    ]
    columns = (
        Column("row", "row"), Column("run", "run"), Column("seed", "seed", "number"), Column("commit", "commit"),
        Column("device", "device"), Column("threads", "threads", "number"), Column("versions", "versions"),
        Column("changes", "changed while it ran", "number"), Column("command", "command"), Column("folder", "folder"),
    )  # fmt: skip
    note = "'changed' counts how often a run went on in another environment (--allow-env-change)."
    return Table(key="runs", title="Runs", note=note, columns=columns, rows=rows)


def _environment(run: Run) -> dict[str, Any]:
    told = latest_environment(run.record)
    versions = {"python": told.get("python"), **told.get("versions", {})}
    return {
        "commit": told.get("git_commit"),
        "device": f"{told.get('device')} ({told.get('device_name')})",
        "threads": told.get("threads"),
        "versions": ", ".join(f"{name} {found}" for name, found in versions.items()),
        "changes": len(run.record["changes"]),
        "command": told.get("command"),
    }


def settings(findings: Findings) -> Table:
    """Return a row per setting and row of runs: its value; seeds of a row that differ in it are joined by ' | '."""
    names, rows = labels(findings), []
    for key, found in findings.rows().items():
        rows += [{"row": names[key], "setting": name, "value": value} for name, value in _settings(found).items()]
    columns = (Column("row", "row"), Column("setting", "setting"), Column("value", "value"))
    note = "As run.json records them. A value with | differs between the row's runs."
    return Table(key="settings", title="Settings", note=note, columns=columns, rows=rows)


def _settings(found: Sequence[Run]) -> Mapping[str, str]:
    names = dict.fromkeys(name for run in found for name in run.record["settings"])
    return {
        name: " | ".join(dict.fromkeys(str(run.record["settings"].get(name, "")) for run in found)) for name in names
    }


def mixed_rows(findings: Findings) -> list[str]:
    """Return a line for each row whose runs differ in more than their seed: their mean is of different things."""
    names, lines = labels(findings), []
    for key, found in findings.rows().items():
        differing = [name for name, value in _settings(found).items() if " | " in value and name not in SEEDS]
        if differing:
            lines.append(f"the runs of '{names[key]}' differ in {', '.join(differing)}: their mean is of unlike runs")
    return lines


def identities(findings: Findings) -> Table:
    """Return a row per thing that has an id: what names this content and no other."""
    rows: list[dict[str, Any]] = []
    for path, told in findings.stores:
        rows += [{"of": path.name, "what": name, "id": told.get(name)} for name in ("id", "knowledge_id", "layout_id")]
        rows += [{"of": path.name, **found} for found in _knowledge(told["knowledge"])]
    for run in findings.runs:
        rows += [{"of": run.name, **found} for found in _ids(run)]
    columns = (Column("of", "of"), Column("what", "what"), Column("id", "id or digest (SHA-256)"))
    note = "`kcdcache inspect` shows the same ids; `--expect-id` refuses anything else."
    return Table(key="identities", title="Ids and digests", note=note, columns=columns, rows=rows)


def _ids(run: Run) -> Iterator[dict[str, Any]]:
    yield {"what": "summary", "id": run.id}
    yield {"what": "weights", "id": run.network.get("weights_sha256")}
    for name in ("knowledge_id", "data", "test", "given"):
        if run.record["inputs"].get(name):
            yield {"what": name, "id": run.record["inputs"][name]}
    for stage in run.stages:
        yield {"what": f"manifest of stage {stage.number}", "id": stage.manifest.digest}


def _knowledge(knowledge: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    teacher, views = knowledge["teacher"], knowledge["views"]
    yield {"what": f"weights of the teacher {teacher['architecture']}", "id": teacher["weights"]}
    yield {"what": "training split", "id": knowledge["data"]["digest"]}
    yield {"what": "views", "id": ", ".join(f"{name} {views[name]}" for name in sorted(views))}
