"""The figures of a report as WebP, in colours that can be distinguished with any colour vision."""

import io
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from kcdcache.errors import printable
from kcdcache.report.tables import Row, texts
from kcdcache.report.verdict import Verdict

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
AS_IS, ENRICHED, LEFT_OUT = "#0072B2", "#56B4E9", "#D9D9D9"
LEFT_OUT_LINE = "#666666"
"""colour of rows that are not condensed"""
WIDTH = 9.5
DOTS = 120
TALLEST = 16_000
"""most pixels of a figure's height: WebP allows 16,383"""
SHADES = 128
"""colours of a figure: fewer make the file smaller, and its colours less exact"""
LONGEST = 34
"""most characters of a name in a figure"""
LABELLED = (
    ("accuracy_right", "right labels predicted", COLOURS[0]),
    ("recovered", "wrong labels: true one predicted", COLOURS[2]),
    ("memorised", "wrong labels: given one predicted", COLOURS[1]),
)
SCREENED = {
    "screened": (
        ("precision", "wrong", "dropped samples with wrong label (%)"),
        ("recall", "dropped", "wrong labels dropped (%)"),
    ),
    "thinned": (("kept_rare", "kept_frequent", "share kept (%)"),),
}
"""figure of the screening table -> its panels: column, column to compare with, axis label"""


class Picture(NamedTuple):
    """A finished figure."""

    key: str
    title: str
    caption: str
    content: bytes
    """lossless WebP of at most SHADES colours"""


@contextmanager
def styled() -> Iterator[None]:
    """Draw with our fonts and sizes; names are never read as formulas, and may have glyphs that the font lacks."""
    ours: dict[Any, Any] = {
        "text.parse_math": False, "font.size": 10, "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "axes.formatter.useoffset": False,
        "legend.framealpha": 0.9, "figure.facecolor": "white",
    }  # fmt: skip
    with matplotlib.rc_context(ours), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph|Matplotlib currently does not support")
        yield


def drawn(key: str, height: float, draw: Callable[[Figure], None], **values: Any) -> Picture:
    """Return what `draw` draws on a figure `height` inches high; title and caption are `texts` filled with `values`."""
    text = texts()["figures"][key]
    with styled():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        figure.set_dpi(min(DOTS, TALLEST / height))
        content = _rendered(figure)
    return Picture(key, text["title"].format(**values), text["caption"].format(**values), content)


def _rendered(figure: Figure) -> bytes:
    """Return a figure as a lossless WebP in few colours."""
    canvas, stream = FigureCanvasAgg(figure), io.BytesIO()
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(SHADES, dither=Image.Dither.NONE).convert("RGB").save(stream, "WEBP", lossless=True, quality=80)
    return stream.getvalue()


def short(name: str, most: int = LONGEST) -> str:
    """Shorten a name to one line of at most `most` characters: its beginning and its end."""
    text = printable(name)
    half = most // 2
    return text if len(text) <= most else f"{text[: most - half - 1]}…{text[-half:]}"


def short_names(names: Sequence[str], most: int = LONGEST) -> dict[str, str]:
    """Return name -> short name: without a common `WHAT:` at the beginning, and shortened to `most` characters.

    Different names stay different: `most` is doubled until they are.

    >>> short_names(["noise 0.4, small: KD", "noise 0.4, small: KCD", "teacher"])
    {'noise 0.4, small: KD': 'KD', 'noise 0.4, small: KCD': 'KCD', 'teacher': 'teacher'}
    """
    different = dict.fromkeys(names)
    heads = {name.rpartition(": ")[0] for name in different if ": " in name}
    common = f"{heads.pop()}: " if len(heads) == 1 and len(different) > 1 else ""
    rest = {name: name.removeprefix(common) for name in different}
    rest = rest if len(set(rest.values())) == len(rest) else {name: name for name in different}
    longest = max(map(len, rest.values()), default=0)
    while True:
        found = {name: short(text, most) for name, text in rest.items()}
        if len(set(found.values())) == len(found) or most >= longest:
            return found
        most *= 2


def name_bars(axes: Axes, rows: Sequence[Row], ending: str = "") -> None:
    """Write the names of rows next to their bars, the first on top; `ending` is formatted with the row."""
    names = short_names([row["row"] for row in rows])
    labels = [textwrap.fill(names[row["row"]] + ending.format(**row), LONGEST) for row in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()


class Line(NamedTuple):
    """Mean and range over the seeds of a row."""

    name: str
    n: int
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


def lines(rows: Sequence[Row], x: str, y: str, scale: float = 1.0) -> list[Line]:
    """Return a line per row: means over seeds of y (times `scale`) and x, epoch by epoch."""
    points: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for row in rows:
        if row.get(x) is not None and row.get(y) is not None:
            by_epoch = points.setdefault(row["row"], {})
            by_epoch.setdefault(row["epoch"], []).append((float(row[x]), scale * float(row[y])))
    found = []
    for name, by_epoch in points.items():
        groups = [np.array(by_epoch[epoch]) for epoch in sorted(by_epoch)]
        columns = [[g[:, 0].mean(), g[:, 1].mean(), g[:, 1].min(), g[:, 1].max()] for g in groups]
        found.append(Line(name, max(map(len, groups)), *np.array(columns).T))
    return found


def plot(axes: Axes, found: Sequence[Line], order: Sequence[str], xscale: float = 1.0) -> None:
    """Draw lines, each in the colour of its row, with the range over seeds as a band."""
    names = short_names(order)
    for name, n, x, y, low, high in found:
        place = order.index(name)
        colour, style = COLOURS[place % len(COLOURS)], STYLES[place // len(COLOURS) % len(STYLES)]
        label, marker = names[name] + (f" (n = {n})" if n > 1 else ""), "o" if len(x) <= 30 else ""
        axes.plot(x * xscale, y, style, color=colour, label=label, linewidth=1.6, marker=marker, markersize=3.5)
        if n > 1:
            axes.fill_between(x * xscale, low, high, color=colour, alpha=0.15, linewidth=0)


def accuracy(rows: Sequence[Row]) -> Picture:
    """Return test error against student samples consumed, and against wall time."""
    order = list(dict.fromkeys(row["row"] for row in rows))
    errors = [{**row, "error": 1 - row["test_accuracy"]} for row in rows if row.get("test_accuracy") is not None]
    log = all(row["error"] > 0 for row in errors)

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        most = max((row["samples_so_far"] for row in rows), default=0)
        unit, scale = ("thousands", 1e-3) if most < 2e6 else ("millions", 1e-6)
        plot(left, lines(errors, "samples_so_far", "error", 100), order, scale)
        left.set(xlabel=f"student samples consumed ({unit})", ylabel="test error (%)")
        plot(right, lines(errors, "seconds_so_far", "error", 100), order)
        right.set(xlabel="training time (s)")
        if log and errors:
            log_axis(left)
        legend_below(figure, [left])

    return drawn("accuracy", 4.2 + below(order), draw, axis="logarithmic" if log else "linear")


def log_axis(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers as labels."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def training(rows: Sequence[Row]) -> Picture:
    """Return losses, training accuracy and agreement with the teacher by epoch."""
    order = list(dict.fromkeys(row["row"] for row in rows))
    panels = (
        ("loss", 1.0, "training loss (nats)"), ("train_accuracy", 100.0, "training accuracy (%)"),
        ("test_loss", 1.0, "test loss (nats)"), ("agreement", 100.0, "agreement with the teacher (%)"),
    )  # fmt: skip

    def draw(figure: Figure) -> None:
        for axes, (name, scale, label) in zip(figure.subplots(2, 2, sharex=True).flat, panels, strict=True):
            plot(axes, lines(rows, "epoch", name, scale), order)
            axes.set(ylabel=label)
            low, high = axes.dataLim.intervaly
            if name.endswith("loss") and 0 < 10 * low < high:
                log_axis(axes)
        for axes in figure.axes[2:]:
            axes.set(xlabel="epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_below(figure, figure.axes[:1])

    return drawn("training", 6.2 + below(order), draw)


def forest(found: Sequence[Verdict]) -> Picture | None:
    """Return the paired differences in accuracy with their intervals, or None if there are none."""
    if not found:
        return None
    rows = [one._asdict() for one in found]
    references = list(dict.fromkeys(one.reference for one in found))
    called = short_names(references) if len(references) > 1 else dict.fromkeys(references, "")

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, one in enumerate(found):
            colour = COLOURS[0] if one.condensed else LEFT_OUT_LINE
            if one.low is not None and one.high is not None:
                axes.plot([one.low, one.high], [place, place], color=colour, linewidth=2)
            axes.plot([one.mean], [place], "o", color=colour, markersize=7)
        axes.axvline(0, color="#444444", linewidth=1)
        axes.set(ylim=(-0.6, len(found) - 0.4), xlabel="test accuracy minus the other row's (percentage points)")
        name_bars(axes, [row | {"against": called[row["reference"]]} for row in rows], ending)

    ending = (" against {against}" if len(references) > 1 else "") + " (n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{n})"
    named = ", ".join(f"'{name}'" for name in references)
    return drawn("differences", 1.3 + 0.6 * len(found), draw, references=named, bare=_bare(found))


def _bare(found: Sequence[Verdict]) -> str:
    """Return what a caption says of the points without a bar, empty if all have one."""
    single, equal = any(one.low is None for one in found), any(one.low == one.high == one.mean for one in found)
    kinds = ["is a single pair of runs"] * single + ["has the same difference in every pair"] * equal
    return f" A point without a bar {' or '.join(kinds)}." if kinds else ""


def costs(rows: Sequence[Row]) -> Picture | None:
    """Return the cost of each row and store, a panel per kind of cost, or None without rows."""
    if not rows:
        return None
    panels = (
        ("teacher_forwards", "teacher forwards\n(samples)"), ("student_samples", "student samples\nforwarded"),
        ("rows_read", "rows read\nfrom the store"), ("bytes_read", "bytes read\nfrom the store"),
        ("seconds", "seconds"),
    )  # fmt: skip

    def draw(figure: Figure) -> None:
        every = figure.subplots(1, len(panels), sharey=True)
        for axes, colour, (name, label) in zip(every, COLOURS, panels, strict=False):
            numbers = [row.get(name) or 0 for row in rows]
            bars = axes.barh(range(len(rows)), numbers, color=colour)
            axes.bar_label(bars, map(_brief, numbers), padding=3, size=8)
            axes.set(title=label, xlim=(0, 1.5 * max([*numbers, 1e-9])), xticks=[])
            axes.grid(False)
            axes.spines["bottom"].set_visible(False)
        name_bars(figure.axes[0], rows)

    return drawn("cost", 1.2 + 0.34 * len(rows), draw)


def _brief(size: float) -> str:
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if size >= limit:
            return f"{size / limit:.3g}{unit}"
    return f"{size:.3g}"


def legend_below(figure: Figure, every: Iterable[Axes]) -> None:
    """Put a common legend of some axes below a figure, each label once, in as many columns as fit."""
    entries: dict[str, Any] = {}
    for axes in every:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        across = min(columns(entries), len(entries))
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=across, fontsize=9)


def columns(labels: Iterable[str]) -> int:
    """Return how many legend columns with these labels fit into a figure, 1 to 3."""
    longest = max(map(len, labels), default=0)
    return max(1, min(3, int((WIDTH - 0.3) / (0.65 + 0.072 * longest))))


def below(names: Sequence[str]) -> float:
    """Return the height of a legend of rows, in inches."""
    labels = [f"{name} (n = 3)" for name in short_names(names).values()]
    return 0.22 * -(-len(labels) // columns(labels))


def robustness(fidelity: Sequence[Row], screening: Sequence[Row]) -> list[Picture]:
    """Return the figures of both tables, each once per corruption and network."""
    found: list[Picture] = []
    kinds: list[tuple[Callable[[Sequence[Row]], Picture | None], Sequence[Row]]] = [(labelled, fidelity)]
    kinds += [(partial(screened, key), screening) for key in SCREENED]
    for draw, rows in kinds:
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            groups.setdefault((row["condition"], row["network"]), []).append(row)
        made = {group: picture for group, some in groups.items() if (picture := draw(some)) is not None}
        for number, (group, picture) in enumerate(made.items(), 1):
            key, title = f"{picture.key}-{number}", f"{picture.title} {', '.join(group)}"
            found.append(picture if len(made) == 1 else picture._replace(key=key, title=title))
    return found


def labelled(rows: Sequence[Row]) -> Picture | None:
    """Return how often each row predicts right labels, and for wrong ones the true or the given label."""
    chosen = [row for row in rows if row.get("memorised") is not None]
    if not chosen:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (name, label, colour) in enumerate(LABELLED):
            places = [place + 0.27 * (number - 1) for place in range(len(chosen))]
            axes.barh(places, [100 * (row[name] or 0) for row in chosen], 0.25, color=colour, label=label)
        name_bars(axes, chosen)
        axes.set(xlabel="share of training samples of that kind (%)")
        legend_below(figure, [axes])

    return drawn("labelled", 1.3 + 0.42 * len(chosen), draw)


def screened(key: str, rows: Sequence[Row]) -> Picture | None:
    """Return columns of the screening table by stage, each with the column to compare with (dotted)."""
    panels = SCREENED[key]
    chosen = [row for row in rows if row.get(panels[0][0]) is not None]
    if not chosen:
        return None
    names = short_names([row["row"] for row in chosen])

    def draw(figure: Figure) -> None:
        for axes, (name, other, label) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
            for place, (row, called) in enumerate(names.items()):
                own = [one for one in chosen if one["row"] == row and one.get(name) is not None]
                stages, colour = [one["stage"] for one in own], COLOURS[place % len(COLOURS)]
                style, shares = STYLES[place >= len(COLOURS)], [100 * one[name] for one in own]
                axes.plot(stages, shares, style, marker="o", markersize=4, color=colour, label=called)
                axes.plot(stages, [100 * (one.get(other) or 0) for one in own], ":", color=colour)
            axes.set_xticks(sorted({row["stage"] for row in chosen}))
            axes.set(xlabel="set of stage", ylabel=label)
        legend_below(figure, figure.axes[:1])

    return drawn(key, 3.6 + below(list(names)), draw)
