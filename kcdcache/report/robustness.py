"""The tables and figures of a report about wrong labels, rare classes and agreement with the teacher."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kcdcache import statistics
from kcdcache.condense.compare import SetCounts
from kcdcache.data.label_noise import NOISE_SEED
from kcdcache.report import tables
from kcdcache.report.figures import COLOURS, STYLES, Picture, below, drawn, legend_below, name_bars, short_names
from kcdcache.report.load import Loaded, Run
from kcdcache.report.tables import Row, Table

SHARES = (
    "agreement_train", "agreement_test", "accuracy_train", "accuracy_right", "memorised", "recovered",
    "accuracy_true", "accuracy_frequent", "accuracy_rare", "calibration_error",
)  # fmt: skip
"""entries of a summary that are shares and shown as percentages"""
OF_TEACHER = ("accuracy_train", "accuracy_right", "memorised", "recovered", "accuracy_true")
"""those that it has of the teacher too, beginning with `teacher_`"""
PLAIN = "ce"
PARTS = (
    ("accuracy_right", "right labels: named", COLOURS[0]),
    ("recovered", "wrong labels: the true one named", COLOURS[2]),
    ("memorised", "wrong labels: the given one named", COLOURS[1]),
)
"""entry of a summary, how a figure calls it, its colour"""


def fidelity(loaded: Loaded) -> Table:
    """Return a row per step that was measured on its training samples, and one per teacher; means over seeds."""
    names, rows = tables.labels(loaded), loaded.rows()
    plain = {key: runs for key, runs in rows.items() if _is_plain(runs[0])}
    found: list[Row] = []
    teachers: list[Row] = []
    for key, every in rows.items():
        runs = [run for run in every if run.summary.accuracy_train is not None]
        if not runs:
            continue
        teacher = _teacher(runs[0])
        if teacher and teacher not in teachers:  # of several stores of one teacher too, whose view 0 is the same
            teachers.append(teacher)
            found.append({"row": teachers_name(names[key]), **_group(runs[0]), **teacher})
        row = {"row": names[key], "n": len(runs), "data": corruption(runs[0]), **_group(runs[0])}
        row |= {"accuracy": tables.mean(runs, "accuracy_last")} | {name: tables.mean(runs, name) for name in SHARES}
        base = None if key in plain else _plain_of(runs[0], plain)
        found.append(row | ({} if base is None else {"over": names[base], **_gain(runs, plain[base])}))
    return tables.worded("fidelity", found)


def screening(loaded: Loaded) -> Table:
    """Return a row per step and set: what it keeps and drops of wrong labels and of rare classes; means over seeds."""
    rows: list[Row] = []
    for label, runs in tables.named_rows(loaded):
        by_stage: dict[int, list[Row]] = {}
        for run in (run for run in runs if run.condenses):
            for stage, shares in _sets(run):
                by_stage.setdefault(stage, []).append(shares)
        for stage, each in sorted(by_stage.items()):
            means = {
                name: statistics.spread([one[name] for one in each if one[name] is not None]).mean for name in each[0]
            }
            row = {"row": label, "data": corruption(runs[0]), **_group(runs[0]), "stage": stage, "n": len(each)}
            rows.append(row | means)
    return tables.worded("screening", rows)


def _group(run: Run) -> dict[str, str]:
    """Return what the rows of one figure have in common: what was done to the students' data, and their network."""
    return {"condition": corruption(run), "network": run.summary.model}


def corruption(run: Run) -> str:
    """Return what was done to a run's training data, in words."""
    known = run.summary.corruption
    if known is None:
        return "as it is"
    redraw = "" if known.redraw else ", the true class excluded"
    redraw += "" if known.noise_seed == NOISE_SEED else f", seed {known.noise_seed}"
    noise = [] if known.noise is None else [f"noise {known.noise}{redraw}"]
    gamma = [] if known.gamma is None else [f"gamma {known.gamma} ({known.n_max} to {known.n_min} per class)"]
    return ", ".join([*noise, *gamma]) or "as it is"


def pictures(fidelity: Table, screening: Table) -> list[Picture]:
    """Return the figures of both tables: of each kind one per corruption and network, so that rows stay comparable."""
    found: list[Picture] = []
    for draw, rows in ((labelled, fidelity.rows), (screened, marked(screening)), (thinned, marked(screening))):
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            groups.setdefault((row["condition"], row["network"]), []).append(row)
        made = {group: picture for group, some in groups.items() if (picture := draw(some)) is not None}
        found += [
            picture if len(made) == 1 else
            picture._replace(key=f"{picture.key}-{number}", title=f"{picture.title} {', '.join(group)}")
            for number, (group, picture) in enumerate(made.items(), 1)
        ]  # fmt: skip
    return found


def marked(screening: Table) -> list[Row]:
    """Return the rows of a screening table that tell of wrong labels or rare classes."""
    return [row for row in screening.rows if row.get("precision") is not None or row.get("kept_rare") is not None]


def labelled(rows: Sequence[Row]) -> Picture | None:
    """Return how often each row names right labels, true ones that it was not given, and wrong ones that it was."""
    chosen = [row for row in rows if row.get("memorised") is not None]
    if not chosen:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (name, label, colour) in enumerate(PARTS):
            places = [place + 0.27 * (number - 1) for place in range(len(chosen))]
            axes.barh(places, [100 * (row[name] or 0) for row in chosen], 0.25, color=colour, label=label)
        name_bars(axes, chosen)
        axes.set(xlabel="share of training samples of that kind (%)")
        legend_below(figure, *axes.get_legend_handles_labels())

    return drawn("labelled", 1.3 + 0.42 * len(chosen), draw)


def screened(rows: Sequence[Row]) -> Picture | None:
    """Return precision and recall of dropping against wrong labels, stage by stage, with what chance would give."""
    panels = (("precision", "wrong", "of the dropped, wrongly labelled (%)"),
              ("recall", "dropped", "of the wrongly labelled, dropped (%)"))  # fmt: skip
    chosen = [row for row in rows if row.get("precision") is not None]
    if not chosen:
        return None

    def draw(figure: Figure) -> None:
        for axes, (name, chance, label) in zip(figure.subplots(1, 2), panels, strict=True):
            _by_stage(axes, chosen, name, chance)
            axes.set(xlabel="set of stage", ylabel=label)
        legend_below(figure, *figure.axes[0].get_legend_handles_labels())

    return drawn("screened", _tall(chosen), draw)


def thinned(rows: Sequence[Row]) -> Picture | None:
    """Return the share that each set keeps of the samples of rare classes, and of those of frequent ones."""
    chosen = [row for row in rows if row.get("kept_rare") is not None]
    if not chosen:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _by_stage(axes, chosen, "kept_rare", "kept_frequent")
        axes.set(xlabel="set of stage", ylabel="share kept (%)")
        legend_below(figure, *axes.get_legend_handles_labels())

    return drawn("thinned", _tall(chosen), draw)


def _by_stage(axes: Axes, rows: Sequence[Row], name: str, other: str) -> None:
    for place, (row, label) in enumerate(short_names([row["row"] for row in rows]).items()):
        own = [one for one in rows if one["row"] == row and one.get(name) is not None]
        stages, colour = [one["stage"] for one in own], COLOURS[place % len(COLOURS)]
        style = STYLES[0] if place < len(COLOURS) else STYLES[1]
        axes.plot(stages, [100 * one[name] for one in own], style, marker="o", markersize=4, color=colour, label=label)
        axes.plot(stages, [100 * (one.get(other) or 0) for one in own], ":", color=colour)
    axes.set_xticks(sorted({row["stage"] for row in rows}))


def _tall(rows: Sequence[Row]) -> float:
    return 3.6 + below([row["row"] for row in rows])


def _plain_of(run: Run, plain: Mapping[tables.Key, Sequence[Run]]) -> tables.Key | None:
    """Return the row of plain training that a run is to be compared with: same network, data, epochs, then settings."""

    def alike(key: tables.Key) -> tuple[bool, int]:
        other = plain[key][0]
        ours, theirs = run.record.settings, other.record.settings
        shared = sum(name in theirs and theirs[name] == value for name, value in ours.items())
        return tables.knowledge_of(run) == tables.knowledge_of(other), shared

    return max((key for key, runs in plain.items() if _task(runs[0]) == _task(run)), key=alike, default=None)


def _task(run: Run) -> tuple[Any, ...]:
    """Return what two runs must share for one to be the other's plain training."""
    return run.grid, run.summary.model, tables.data_of(run), run.record.settings.get("epochs")


def _is_plain(run: Run) -> bool:
    """Return whether a run is plain training: a student's on labels alone with everything kept, or a `fit`."""
    alone = run.summary.method == PLAIN or run.summary.kind == "fit"
    return alone and not run.condenses and run.summary.relative_cost == 1


def _gain(ours: Sequence[Run], plain: Sequence[Run]) -> Row:
    """Return the paired difference in test accuracy to plain training, in percentage points."""
    here, there = ({run.seed: 100 * run.summary.accuracy_last for run in side} for side in (ours, plain))
    found = statistics.difference(here, there)
    if found is None:
        return {}
    return {"gain": found.mean, "gain_low": found.low, "gain_high": found.high, "pairs": found.n}


def _teacher(run: Run) -> Row:
    """Return what a run's summary tells of its teacher, from the store and perhaps test images; empty for nothing."""
    summary = run.summary
    if summary.teacher_accuracy_train is None:
        return {}
    data = {"same": corruption(run), "other": "other data than the students'"}.get(summary.teacher_data or "", "")
    shares = {name: getattr(summary, f"teacher_{name}") for name in OF_TEACHER}
    return {"n": 1, "data": data, "accuracy": summary.teacher_accuracy, **shares}


def teachers_name(student: str) -> str:
    """Return how the teacher of a row is called: as a recipe's `WHAT: variant` rows are.

    >>> teachers_name("noise 0.4: KD, everything"), teachers_name("resnet8-kd")
    ('noise 0.4: the teacher', 'teacher of resnet8-kd')
    """
    what, colon, _ = student.rpartition(": ")
    return f"{what}: the teacher" if colon else f"teacher of {student}"


def _sets(run: Run) -> Iterator[tuple[int, dict[str, float | None]]]:
    """Yield (stage, shares) of a run's sets, each with how the values it was chosen by tell marked samples apart."""
    before: dict[str, float | None] = {"separation_wrong": None, "separation_rare": None}
    for counts in sorted(run.summary.sets or (), key=lambda one: one.stage):
        yield counts.stage, _shares(counts) | before
        before = {name: getattr(counts, name) for name in before}


def _shares(counts: SetCounts) -> dict[str, float | None]:
    """Return a set's counts as shares; None where nothing of that kind is there to be counted."""
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
