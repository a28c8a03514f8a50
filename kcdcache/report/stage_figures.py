"""Figures of condensing runs: the chain from teacher to set, what each stage keeps, and how values change."""

import itertools
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch, Rectangle

from kcdcache.condensation import compare
from kcdcache.report import tables
from kcdcache.report.figures import AS_IS, COLOURS, ENRICHED, LEFT_OUT, Picture, drawn, legend_below, short, short_names
from kcdcache.report.load import Loaded, Run

Named = Sequence[tuple[str, Run]]
"""(name in the figure, run) of each run"""
MOST_LINES = 600
MOST_CLASSES = 24
TITLE = 38
"""characters per line of a panel's title, with two panels side by side"""
PARTS = (("kept unchanged (K_1H)", AS_IS), ("kept and enriched (K_Aug)", ENRICHED), ("dropped (K_0)", LEFT_OUT))
SHARE_OF_CLASS = "samples kept, relative to the set that keeps most of the class (%)"
TURNS = (("left", COLOURS[1], -0.27, ""), ("returned", COLOURS[2], 0.0, "//"), ("new", COLOURS[4], 0.27, ".."))
"""change of samples, with colour, offset and hatching of its bars"""
ACROSS, BOX_WIDTH, BOX_HEIGHT = (0.1, 0.3, 0.5, 0.7, 0.9), 0.165, 0.36
FILLS = ("#56B4E9", "#D9D9D9", "#D9D9D9", "#009E73", "#E69F00")
"""boxes of the chain: centres, width, height, colours"""


def chain(loaded: Loaded) -> Picture | None:
    """Return the chain teacher, views, store, student, condensed set, or None if no run condensed from a store."""
    students = tables.condensing(loaded)
    if not students or not loaded.stores:
        return None
    row, run = students[0]
    runs = [one for name, one in students if name == row]
    known = run.record.inputs.knowledge_id
    store = next((store for store in loaded.stores if store.knowledge_id == known), loaded.stores[0])
    last, teacher = run.sets[-1], store.knowledge.teacher.architecture
    lasts = [one.sets[-1] for one in runs]
    mixed = [int(chosen.mixed.sum()) for chosen in lasts]
    boxes = (
        ("teacher", teacher, _accuracy(loaded, teacher)),
        ("views", f"{store.samples:,} images", f"x {store.views} views each"),
        ("store", f"{store.points:,} points", f"{store.bytes / 2**20:,.1f} MiB, read by all"),
        ("student", run.summary.model, f"{100 * (tables.mean(runs, 'accuracy_last') or 0):.1f} % accuracy"),
        ("condensed set", f"{_mean(map(len, lasts)):,.0f} of {last.count:,}", f"{_mean(mixed):,.0f} of them enriched"),
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.axis("off")
        for centre, (title, *lines), fill in zip(ACROSS, boxes, FILLS, strict=True):
            corner = (centre - BOX_WIDTH / 2, 0.6 - BOX_HEIGHT / 2)
            axes.add_patch(Rectangle(corner, BOX_WIDTH, BOX_HEIGHT, facecolor=fill, edgecolor="black", alpha=0.55))
            axes.text(centre, 0.69, title, ha="center", va="center", size=11, weight="bold")
            axes.text(centre, 0.54, "\n".join(map(short, filter(None, lines))), ha="center", va="center", size=9)
        for left, right in itertools.pairwise(ACROSS):
            _arrow(axes, (left + BOX_WIDTH / 2, 0.6), (right - BOX_WIDTH / 2, 0.6))
        _arrow(axes, (ACROSS[4], 0.6 - BOX_HEIGHT / 2), (ACROSS[3], 0.6 - BOX_HEIGHT / 2), curve=-0.45)
        below = (ACROSS[3] + ACROSS[4]) / 2
        axes.text(below, 0.15, "next stage trains on the set", ha="center", size=9)
        axes.plot((ACROSS[0] - BOX_WIDTH / 2, ACROSS[2] + BOX_WIDTH / 2), (0.3, 0.3), color="black", linewidth=1)
        axes.text(ACROSS[1], 0.15, "paid once, for any number of students", ha="center", size=9)
        axes.text(below, 0.84, "value of each sample to the student", ha="center", size=9)

    return drawn("chain", 2.9, draw, row=row, n=len(runs))


def _mean(numbers: Iterable[int]) -> float:
    return statistics.fmean(numbers)


def _accuracy(loaded: Loaded, teacher: str) -> str:
    """Return the teacher's accuracy as text, empty unless the run that trained it is loaded too."""
    rows = [runs for runs in loaded.rows().values() if not runs[0].stages and runs[0].summary.model == teacher]
    mean = tables.mean(rows[0], "accuracy_last") if rows else None
    return "" if mean is None else f"{100 * mean:.1f} % accuracy"


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], curve: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.4, "connectionstyle": f"arc3,rad={curve}"}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def set_names(run: Run) -> list[str]:
    """Return the names of a run's sets on an axis: stage numbers, and `end` for an exported set."""
    names = [str(stage.number) for stage in run.stages]
    exported = run.stages[-1].values is None and len(names) > 1
    return [*names[:-1], "end"] if exported else names


def sizes(found: Named) -> Picture:
    """Return how many samples each set keeps as they are, keeps enriched, and drops."""

    def panel(axes: Axes, run: Run) -> None:
        parts = compare.parts(run.sets)
        bottom = np.zeros(len(parts))
        for (label, colour), code in zip(PARTS, (compare.KEPT, compare.MIXED, compare.DROPPED), strict=True):
            share = 100 * (parts == code).mean(axis=1)
            axes.bar(range(len(parts)), share, bottom=bottom, label=label, color=colour, edgecolor="white")
            bottom += share
        for place, kept in enumerate(100 * (parts > compare.DROPPED).mean(axis=1)):
            axes.text(place, kept + 1, f"{kept:.0f} %", ha="center", va="bottom", size=9)
        axes.set_ylim(0, 108)
        _stage_axis(axes, run, "share of all samples (%)")

    return _panels("sizes", found, 3.3, panel)


def bands(found: Named) -> Picture:
    """Return the values of the samples that the next set keeps, and of those that it drops."""

    def panel(axes: Axes, run: Run) -> None:
        parts = compare.parts(run.sets)
        for code, (label, colour) in enumerate((("dropped next", COLOURS[1]), ("kept next", COLOURS[0]))):
            rows = {
                place: np.quantile(stage.values.value[chosen], compare.BAND)
                for place, stage in enumerate(run.stages[:-1])
                if stage.values is not None and (chosen := (parts[place + 1] > 0) == bool(code)).any()
            }
            if rows:
                places, (low, middle, high) = list(rows), np.array(list(rows.values())).T
                axes.plot(places, middle, "-o" if code else "--s", color=colour, label=label, markersize=4)
                axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
        _stage_axis(axes, run, "value V (nats)", len(run.stages) - 1)
        axes.set_xlabel("end of stage")

    return _panels("values", found, 3.3, panel)


def pattern(name: str, run: Run) -> Picture:
    """Return samples x stages: rank by value at the end of each stage, and membership in each set.

    Source: Fig. 3b of Knowledge Condensation Distillation (arXiv 2207.05409).
    """
    parts = compare.parts(run.sets)
    scores = [stage.score for stage in run.stages if stage.score is not None]
    ranks = np.array([compare.percentiles(score) for score in scores])
    order = np.argsort(-ranks[-1], kind="stable")
    order = order[np.unique(np.linspace(0, len(order) - 1, min(len(order), MOST_LINES)).round().astype(int))]

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 3, width_ratios=(1, 1, 1.15), height_ratios=(1, 0.03))
        left, middle, right = upper
        image = _rows(left, 100 * ranks[:, order], 100)
        figure.colorbar(image, cax=lower[0], label="rank (100 = most valuable)", orientation="horizontal")
        _rows(middle, parts[:, order], 2, ListedColormap([LEFT_OUT, AS_IS, ENRICHED]))
        lower[1].legend(handles=[Patch(color=c, label=label) for label, c in PARTS], loc="upper center", fontsize=8)
        for axes, title, count in ((left, "rank by value", len(scores)), (middle, "in the set?", len(parts))):
            axes.set(title=title, yticks=[])
            axes.set_xticks(range(count), set_names(run)[:count])
        left.set(xlabel="end of stage", ylabel="samples, by value at the end")
        middle.set_xlabel("set of stage")
        _movers(right, ranks, set_names(run)[: len(scores)])
        lower[2].legend(*right.get_legend_handles_labels(), loc="upper center", ncols=2, fontsize=8)
        for axes in lower[1:]:
            axes.set_axis_off()

    picture = drawn("pattern", 5.6, draw, run=name, shown=len(order), count=run.sets[0].count)
    return picture._replace(key=f"pattern-{run.name}")


def _rows(axes: Axes, shown: np.ndarray, most: float, colours: Colormap | str = "cividis") -> AxesImage:
    """Draw stages x rows in colours, 0 to `most`, with a column per stage."""
    axes.grid(False)
    return axes.imshow(shown.T, aspect="auto", cmap=colours, vmin=0, vmax=most, interpolation="none")


def _movers(axes: Axes, ranks: np.ndarray, names: Sequence[str]) -> None:
    change = ranks[-1] - ranks[0]
    order = np.argsort(change, kind="stable")
    few = min(5, len(order) // 2)
    kinds = ((order[-few:], COLOURS[0], "-o", "rose most"), (order[:few], COLOURS[1], "--s", "fell most"))
    for chosen, colour, style, label in kinds if few else ():
        lines = axes.plot(100 * ranks[:, chosen], style, color=colour, markersize=3, alpha=0.8)
        lines[0].set_label(label)
    axes.set_xticks(range(len(names)), names)
    axes.set(title="largest rank changes", xlabel="end of stage", ylabel="rank (100 = most valuable)")
    axes.set_ylim(-3, 103)


def turnover(found: Named) -> Picture:
    """Return how many samples leave, return and are new in each set."""

    def panel(axes: Axes, run: Run) -> None:
        rows = compare.turnover(compare.parts(run.sets))[1:]
        places = np.arange(1, len(rows) + 1)
        for kind, colour, shift, hatch in TURNS:
            share = np.array([100 * getattr(row, kind) / run.sets[0].count for row in rows])
            axes.bar(places + shift, share, 0.27, color=colour, label=kind, hatch=hatch, edgecolor="white")
        axes.set_xticks(places, set_names(run)[1:])
        axes.set(xlabel="set of stage", ylabel="share of all samples (%)")

    return _panels("turnover", found, 2.9, panel)


def classes(found: Named) -> Picture | None:
    """Return the share of each class that every set keeps, or None if no run knows the classes of its sets."""
    known = [(name, run) for name, run in found if all(chosen.class_counts for chosen in run.sets)]
    if not known:
        return None
    most = max(len(run.sets[0].class_counts) for _, run in known)

    def panel(axes: Axes, run: Run) -> None:
        counts = np.array([chosen.class_counts for chosen in run.sets], float)
        share = 100 * counts / np.maximum(counts.max(axis=0), 1)
        order = np.argsort(-share[-1], kind="stable")
        _rows(axes, share[:, order], 100)
        step = -(-len(order) // MOST_CLASSES)
        called = [short(run.class_name(label), 24) for label in order[::step]]
        axes.set_yticks(range(0, len(order), step), called, fontsize=8)
        _stage_axis(axes, run, "class")

    height = 1.4 + 0.15 * min(most, MOST_CLASSES)
    return _panels("classes", known, max(2.9, height), panel, SHARE_OF_CLASS)


def distances(found: Named) -> Picture:
    """Return the Hamming distances between the last sets of runs on the same data, compared with random sets."""
    sets, called = [run.sets[-1] for _, run in found], short_names([name for name, _ in found])
    matrix = compare.hamming(sets)
    chance = list(itertools.starmap(compare.by_chance, itertools.combinations(sets, 2)))
    ends = dict.fromkeys((f"{min(chance):.2f}", f"{max(chance):.2f}"))
    count, labels = len(found), [called[name] for name, _ in found]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        image = axes.imshow(matrix, cmap="cividis", vmin=0, vmax=max(0.5, float(matrix.max())))
        axes.grid(False)
        axes.set_title(f"random sets of these sizes: {' to '.join(ends)}")
        axes.set_yticks(range(count), labels)
        axes.set_xticks(range(count), labels, rotation=40, ha="right")
        for row, column in np.ndindex(count, count) if count <= 16 else ():
            colour = "white" if matrix[row, column] < 0.3 else "black"
            axes.text(column, row, f"{matrix[row, column]:.2f}", ha="center", va="center", color=colour, size=8)
        figure.colorbar(image, ax=axes, label="share of samples kept by only one run", shrink=0.8)

    return drawn("distances", min(11.0, 2.6 + 0.42 * count), draw)


def _panels(
    key: str, found: Named, each: float, panel: Callable[[Axes, Run], None], colours: str | None = None
) -> Picture:
    """Return a picture with a panel per run, `each` inches high, with a common legend or a colour bar `colours`."""

    def draw(figure: Figure) -> None:
        across = min(2, len(found))
        grid = list(figure.subplots(-(-len(found) // across), across, squeeze=False).flat)
        names = short_names([name for name, _ in found], TITLE * (3 - across))
        for axes, (name, run) in zip(grid, found, strict=False):
            axes.set_title(textwrap.fill(names[name], TITLE * (3 - across)), fontsize=10)
            panel(axes, run)
        for unused in grid[len(found) :]:
            unused.remove()
        if colours is None:
            legend_below(figure, figure.axes)
        else:
            image = figure.axes[-1].images[0]
            figure.colorbar(image, ax=figure.axes, label=colours, location="bottom", shrink=0.5, aspect=50)

    height = 0.6 + each * -(-len(found) // 2)
    return drawn(key, height if colours is None else height + 0.4, draw)


def _stage_axis(axes: Axes, run: Run, label: str, count: int | None = None) -> None:
    names = set_names(run)[:count]
    axes.set_xticks(range(len(names)), names)
    axes.set(xlabel="stage", ylabel=label)
