"""The tables and figures of a report about wrong labels, rare classes and agreement with the teacher."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kcdcache.data.label_noise import NOISE_SEED
from kcdcache.report import statistics, tables
from kcdcache.report.figures import COLOURS, STYLES, Picture, below, drawn, legend_below, told_apart, wrapped
from kcdcache.report.load import Findings, Run
from kcdcache.report.tables import Column, Table

Row = Mapping[str, Any]

SHARES = (
    "agreement_train", "agreement_test", "accuracy_train", "accuracy_right", "memorised", "recovered",
    "accuracy_true", "accuracy_frequent", "accuracy_rare", "calibration_error",
)  # fmt: skip
"""entries of a summary that are shares and shown as percentages, the teacher's beginning with `teacher_`"""
COUNTS = ("kept", "dropped", "enriched", "partners")
SEPARATIONS = ("separation_wrong", "separation_rare")
"""entries of a set that tell how the values at its stage's end, which decide the next set, tell samples apart"""
PLAIN = "ce"
PARTS = (
    ("accuracy_right", "right labels: named", COLOURS[0]),
    ("recovered", "wrong labels: the true one named", COLOURS[2]),
    ("memorised", "wrong labels: the given one named", COLOURS[1]),
)
"""entry of a summary, how a figure calls it, its colour"""


def fidelity(findings: Findings) -> Table:
    """Return a row per step that was measured on its training samples, and one per teacher; means over seeds."""
    names, rows = tables.labels(findings), findings.rows()
    measured = {key: [run for run in runs if _number(run, "accuracy_train") is not None] for key, runs in rows.items()}
    plain = {key: runs for key, runs in rows.items() if _is_plain(runs[0])}
    found: list[Row] = []
    taught: list[Row] = []
    for key, runs in measured.items():
        if not runs:
            continue
        teacher = _of_teacher(runs[0])
        if teacher and teacher not in taught:  # of several stores of one teacher too, whose view 0 is the same
            taught.append(teacher)
            found.append({"row": _teachers_name(names[key]), **_group(runs[0]), **teacher})
        row = {"row": names[key], "n": len(runs), "data": told(runs[0]), "accuracy": _mean(runs, "accuracy_last")}
        row |= _group(runs[0])
        row |= {name: _mean(runs, name) for name in SHARES}
        base = None if key in plain else _plain_of(runs[0], plain)
        found.append(row | ({} if base is None else {"over": names[base], **_gain(runs, plain[base])}))
    columns = (
        Column("row", "row"), Column("n", "n", "count"), Column("data", "training data"),
        Column("accuracy", "test accuracy %", "percent"), Column("gain", "gain over plain training", "signed"),
        Column("gain_low", "95 % from", "signed"), Column("gain_high", "to", "signed"),
        Column("pairs", "pairs", "count"), Column("over", "plain training is"),
        Column("agreement_test", "agrees with teacher, test %", "percent"),
        Column("agreement_train", "training %", "percent"),
        Column("calibration_error", "calibration error %", "percent"),
        Column("accuracy_train", "given labels named %", "percent"),
        Column("accuracy_right", "of right labels %", "percent"),
        Column("memorised", "wrong labels: given named %", "percent"),
        Column("recovered", "true named %", "percent"),
        Column("accuracy_true", "of all: true named %", "percent"),
        Column("accuracy_frequent", "test, frequent classes %", "percent"),
        Column("accuracy_rare", "rare classes %", "percent"),
    )  # fmt: skip
    note = (
        "Means over n seeds. The gain is in percentage points of test accuracy over plain training (labels only, "
        "everything kept) of the same network on the same data for as many epochs, seed by seed, with its 95 % "
        "interval (Student's t); of several such rows, over the one whose settings differ least. Columns about labels "
        "are measured at the end on view 0 of every training sample, in eval mode: how often the given label is named, "
        "and of samples whose label is wrong, how often the wrong (memorised) and the true one is. Agreement is the "
        "share of samples on which student and teacher name the same class. Frequent classes are the largest that "
        "together hold half of the training samples; test images are balanced and clean."
    )
    return Table(key="fidelity", title="Generalisation, agreement, calibration, labels", note=note, columns=columns,
                 rows=found)  # fmt: skip


def screening(findings: Findings) -> Table:
    """Return a row per step and set: what it keeps and drops of wrong labels and of rare classes; means over seeds."""
    names, found = tables.labels(findings), []
    for key, runs in findings.rows().items():
        by_stage: dict[int, list[Row]] = {}
        for run in runs:
            told_apart_by: dict[str, Any] = {}
            for counts in sorted(_sets(run), key=lambda one: one["stage"]) if run.condenses else ():
                by_stage.setdefault(counts["stage"], []).append(_shares(counts) | told_apart_by)
                told_apart_by = {name: counts.get(name) for name in SEPARATIONS}
        for stage, each in sorted(by_stage.items()):
            means = {name: statistics.spread([one[name] for one in each if one.get(name) is not None]).mean
                     for name in dict.fromkeys(name for one in each for name in one)}  # fmt: skip
            row = {"row": names[key], "data": told(runs[0]), **_group(runs[0]), "stage": stage, "n": len(each)}
            found.append(row | means)
    columns = (
        Column("row", "row"), Column("data", "training data"), Column("stage", "set of stage", "count"),
        Column("n", "n", "count"), Column("kept", "kept", "percent"),
        Column("precision", "dropped that are wrong %", "percent"), Column("wrong", "by chance %", "percent"),
        Column("recall", "wrong that are dropped %", "percent"), Column("dropped", "by chance %", "percent"),
        Column("enriched_wrong", "enriched that are wrong %", "percent"),
        Column("partners_wrong", "mixed in that are wrong %", "percent"),
        Column("separation_wrong", "value above that of a right one", "share"),
        Column("kept_rare", "rare samples kept %", "percent"), Column("kept_frequent", "frequent kept %", "percent"),
        Column("separation_rare", "value above that of a frequent one", "share"),
    )  # fmt: skip
    note = (
        "Does dropping by value screen out wrong labels? 'dropped that are wrong' is its precision and 'wrong that are "
        "dropped' its recall, each beside what dropping at random would give. 'value above that of a right one' is the "
        "chance that a wrongly labelled sample has a higher value V than a rightly labelled one at the end of the "
        "stage before, by which this set was chosen: above 0.5, dropping the lowest values keeps wrong labels rather "
        "than right ones (sets drawn at random do not heed it). The last set is exported. Of rare classes likewise; "
        "with --stratify every class keeps the same share."
    )
    return Table(key="screening", title="What each set keeps of wrong labels and rare classes", note=note,
                 columns=columns, rows=found)  # fmt: skip


def _group(run: Run) -> dict[str, str]:
    """Return what the rows of one figure have in common: what was done to the students' data, and their network."""
    return {"condition": told(run), "network": str(run.summary.get("model"))}


def told(run: Run) -> str:
    """Return what was done to a run's training data, in words."""
    known = run.summary.get("corruption")
    if not isinstance(known, Mapping):
        return "as it is"
    redraw = "" if known.get("redraw", True) else ", the true class excluded"
    redraw += "" if known.get("noise_seed", NOISE_SEED) == NOISE_SEED else f", seed {known['noise_seed']}"
    parts = [f"noise {known['noise']}{redraw}"] if "noise" in known else []
    sizes = f"{known.get('n_max')} to {known.get('n_min')} per class"
    parts += [f"gamma {known['gamma']} ({sizes})"] if "gamma" in known else []
    return ", ".join(parts) or "as it is"


def pictures(fidelity: Table, screening: Table) -> list[Picture]:
    """Return the figures of both tables: of each kind one per corruption and network, so that rows stay comparable."""
    marked = [row for row in screening.rows if row.get("precision") is not None or row.get("kept_rare") is not None]
    found: list[Picture] = []
    for draw, rows in ((labelled, fidelity.rows), (screened, marked), (thinned, marked)):
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
        names = told_apart([row["row"] for row in chosen])
        axes.set_yticks(range(len(chosen)), [wrapped(names[row["row"]]) for row in chosen])
        axes.invert_yaxis()
        axes.set(xlabel="share of training samples of that kind (%)")
        legend_below(figure, *axes.get_legend_handles_labels())

    caption = (
        "On training samples at the end of training. A robust student names right labels and, where the label is "
        "wrong, the true one; naming wrong labels it was given is memorising noise."
    )
    return drawn("labelled", "Right, recovered and memorised labels", caption, 1.3 + 0.42 * len(chosen), draw)


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

    caption = (
        "Solid: what was dropped by value; dotted in the same colour: what as many samples dropped at random would "
        "give. Above its dotted line dropping screens wrong labels out, below it keeps them in."
    )
    return drawn("screened", "Does dropping screen out wrong labels?", caption, _tall(chosen), draw)


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

    caption = (
        "Solid: of the samples of rare classes; dotted in the same colour: of those of frequent classes. A solid line "
        "above its dotted one means that the set favours rare classes."
    )
    return drawn("thinned", "What is kept of rare classes", caption, _tall(chosen), draw)


def _by_stage(axes: Axes, rows: Sequence[Row], name: str, other: str) -> None:
    for place, (row, label) in enumerate(told_apart([row["row"] for row in rows]).items()):
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

    def alike(other: Run) -> tuple[bool, int]:
        ours, theirs = run.record["settings"], other.record["settings"]
        shared = sum(name in theirs and theirs[name] == value for name, value in ours.items())
        return tables.knowledge_of(run) == tables.knowledge_of(other), shared

    able = [key for key, runs in plain.items() if _setting(runs[0]) == _setting(run)]
    return max(able, key=lambda key: alike(plain[key][0]), default=None)


def _setting(run: Run) -> tuple[Any, ...]:
    """Return what two runs must share for one to be the other's plain training."""
    return run.grid, run.summary.get("model"), tables.data_of(run), run.record["settings"].get("epochs")


def _is_plain(run: Run) -> bool:
    """Return whether a run is plain training: a student's on labels alone with everything kept, or a `fit`."""
    alone = run.summary.get("method") == PLAIN or run.summary.get("kind") == "fit"
    return alone and not run.condenses and _number(run, "relative_cost") == 1


def _gain(ours: Sequence[Run], plain: Sequence[Run]) -> dict[str, Any]:
    """Return the paired difference in test accuracy to plain training, in percentage points."""
    here, there = ({run.seed: 100 * float(run.summary["accuracy_last"]) for run in side} for side in (ours, plain))
    found = statistics.difference(here, there)
    return (
        {} if found is None else {"gain": found.mean, "gain_low": found.low, "gain_high": found.high, "pairs": found.n}
    )


def _of_teacher(run: Run) -> Row:
    """Return what a run's summary tells of its teacher, from the store and perhaps test images; empty for nothing."""
    if _number(run, "teacher_accuracy_train") is None:
        return {}
    data = {"same": told(run), "other": "other data than the students'"}.get(str(run.summary.get("teacher_data")), "")
    row = {"n": 1, "data": data, "accuracy": _number(run, "teacher_accuracy")}
    return row | {name: _number(run, f"teacher_{name}") for name in SHARES}


def _teachers_name(student: str) -> str:
    """Return how the teacher of a row is called: as a recipe's `WHAT: variant` rows are."""
    what, colon, _ = student.rpartition(": ")
    return f"{what}: the teacher" if colon else f"teacher of {student}"


def _shares(counts: Row) -> dict[str, float | None]:
    """Return a set's counts as shares; empty where nothing of that kind is there to be counted."""
    total = counts["kept"] + counts["dropped"]
    found: dict[str, float | None] = {name: counts[name] / total for name in ("kept", "dropped")}
    if "kept_wrong" in counts:
        wrong = counts["kept_wrong"] + counts["dropped_wrong"]
        found |= {
            "wrong": wrong / total,
            "precision": _ratio(counts["dropped_wrong"], counts["dropped"]),
            "recall": _ratio(counts["dropped_wrong"], wrong) if counts["dropped"] else None,
            "enriched_wrong": _ratio(counts["enriched_wrong"], counts["enriched"]),
            "partners_wrong": _ratio(counts["partners_wrong"], counts["partners"]),
        }
    if "kept_rare" in counts:
        rare = counts["kept_rare"] + counts["dropped_rare"]
        found |= {
            "kept_rare": _ratio(counts["kept_rare"], rare),
            "kept_frequent": _ratio(counts["kept"] - counts["kept_rare"], total - rare),
        }
    return found


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _sets(run: Run) -> Iterator[Row]:
    """Yield what a summary tells of a run's sets, entries of another form than ours left out."""
    known = run.summary.get("sets")
    for counts in known if isinstance(known, list) else ():
        if not isinstance(counts, Mapping) or type(counts.get("stage")) is not int:
            continue
        kinds = [ending for ending in ("", "_wrong", "_rare") if f"kept{ending}" in counts]
        numbers = [counts.get(f"{name}{ending}") for ending in kinds for name in COUNTS]
        if "" in kinds and all(type(n) is int and n >= 0 for n in numbers) and counts["kept"] + counts["dropped"]:
            yield counts


def _number(run: Run, name: str) -> float | None:
    found = run.summary.get(name)
    return float(found) if isinstance(found, int | float) else None


def _mean(runs: Sequence[Run], name: str) -> float | None:
    return statistics.spread([found for run in runs if (found := _number(run, name)) is not None]).mean
