"""The picture a newcomer sees first: from teacher to condensed set, with the numbers of the runs at hand."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kcdcache import figures, pairing
from kcdcache.figures import Picture
from kcdcache.findings import Findings, Run

ACROSS, BOX_WIDTH, BOX_HEIGHT = (0.1, 0.3, 0.5, 0.7, 0.9), 0.165, 0.36
FILLS = ("#56B4E9", "#D9D9D9", "#D9D9D9", "#009E73", "#E69F00")


class _Box(NamedTuple):
    title: str
    lines: tuple[str, ...]


def drawn_of(found: Findings) -> Picture | None:
    """Return the chain teacher, views, store, student, condensed set, or None where no run condensed from a store."""
    students = [run for runs in found.rows().values() for run in runs if run.condenses]
    stores = [told for _, told in found.stores]
    if not students or not stores:
        return None
    knowledge = next((told for told in stores if told.get("knowledge_id") == _knowledge_of(students[0])), stores[0])
    boxes = _boxes(knowledge, students[0], _accuracy(found, _teacher_of(knowledge)))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.axis("off")
        for centre, box, fill in zip(ACROSS, boxes, FILLS, strict=True):
            _draw_box(axes, centre, box, fill)
        for left, right in itertools.pairwise(ACROSS):
            _arrow(axes, (left + BOX_WIDTH / 2, 0.6), (right - BOX_WIDTH / 2, 0.6))
        _arrow(axes, (ACROSS[4], 0.6 - BOX_HEIGHT / 2), (ACROSS[3], 0.6 - BOX_HEIGHT / 2), curve=-0.45)
        below = (ACROSS[3] + ACROSS[4]) / 2
        axes.text(below, 0.15, "next stage trains on the set", ha="center", size=9)
        axes.plot((ACROSS[0] - BOX_WIDTH / 2, ACROSS[2] + BOX_WIDTH / 2), (0.3, 0.3), color="black", linewidth=1)
        axes.text(ACROSS[1], 0.15, "paid once, for any number of students", ha="center", size=9)
        axes.text(below, 0.84, "each sample's value to the student", ha="center", size=9)

    caption = (
        "The chain with this folder's numbers. Teacher, views and store are paid once, for any number of students; the "
        "loop on the right is the method: online value estimation (OGVE) and knowledge summary (VAKS)."
    )
    return figures.drawn("chain", "From teacher to condensed set", caption, 2.9, draw)


def _knowledge_of(run: Run) -> Any:
    return run.record["inputs"].get("knowledge_id")


def _teacher_of(knowledge: Mapping[str, Any]) -> str:
    return str(knowledge["knowledge"]["teacher"]["architecture"])


def _accuracy(found: Findings, teacher: str) -> str:
    """Return the teacher's accuracy as text, where a run that trained it lies beside the store."""
    rows = [runs for runs in found.rows().values() if not runs[0].stages and runs[0].summary.get("model") == teacher]
    mean = pairing.spread([float(run.summary["accuracy_last"]) for run in rows[0]]).mean if rows else None
    return "" if mean is None else f"{100 * mean:.1f} % right"


def _boxes(knowledge: Mapping[str, Any], run: Run, accuracy: str) -> Sequence[_Box]:
    last = run.sets[-1]
    mixed = int(last.mixed.sum())
    return (
        _Box("teacher", (_teacher_of(knowledge), accuracy)),
        _Box("views", (f"{knowledge['samples']:,} images", f"x {knowledge['views']} views each")),
        _Box("store", (f"{knowledge['points']:,} points", f"{knowledge['bytes'] / 2**20:,.1f} MiB, read by all")),
        _Box(
            "student", (str(run.summary.get("model", "")), f"{100 * float(run.summary['accuracy_last']):.1f} % right")
        ),
        _Box("condensed set", (f"{len(last):,} of {last.count:,}", f"{mixed:,} of them enriched")),
    )


def _draw_box(axes: Axes, centre: float, box: _Box, fill: str) -> None:
    corner = (centre - BOX_WIDTH / 2, 0.6 - BOX_HEIGHT / 2)
    axes.add_patch(Rectangle(corner, BOX_WIDTH, BOX_HEIGHT, facecolor=fill, edgecolor="black", alpha=0.55))
    axes.text(centre, 0.69, box.title, ha="center", va="center", size=11, weight="bold")
    axes.text(centre, 0.54, "\n".join(map(figures.short, filter(None, box.lines))), ha="center", va="center", size=9)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], curve: float = 0.0) -> None:
    style = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.4, "connectionstyle": f"arc3,rad={curve}"}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)
