"""Draw what a recipe's finished runs did: what each stage kept, and test accuracy against samples consumed.

Usage: python pipelines/plot_condensation.py RECIPE_FOLDER OUT.png [RUN ...]

The first RUN (default: kcd-seed0) is drawn stage by stage; all of them are curves.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from kcdcache.condensation import manifest
from kcdcache.runs import state

# Okabe and Ito's palette: told apart with any colour vision
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
PARTS = (("kept as they are (K_1H)", "#0072B2"), ("kept, enriched (K_Aug)", "#56B4E9"), ("dropped (K_0)", "#D9D9D9"))


def draw_stages(axes: Axes, run: Path) -> None:
    files = sorted((run / "stages").glob("*/manifest.parquet"), key=lambda file: int(file.parent.name))
    sets = [manifest.read(file) for file in files]
    mixed = [int(chosen.mixed.sum()) for chosen in sets]
    heights = (
        [len(s) - m for s, m in zip(sets, mixed, strict=True)],
        mixed,
        [s.count - len(s) for s in sets],
    )
    bottom = [0] * len(sets)
    for (label, colour), height in zip(PARTS, heights, strict=True):
        axes.bar(range(len(sets)), height, bottom=bottom, label=label, color=colour, edgecolor="white")
        bottom = [a + b for a, b in zip(bottom, height, strict=True)]
    axes.set_xticks(range(len(sets)), [*(str(n) for n in range(len(sets) - 1)), "exported"])
    axes.set(xlabel="stage", ylabel="training samples", title="What each stage keeps")
    axes.legend(loc="lower left", framealpha=0.95)


def draw_curves(axes: Axes, folders: list[Path]) -> None:
    for folder, colour in zip(folders, COLOURS, strict=False):
        rows = [row for row in state.read_metrics(folder) if row.test_accuracy is not None]
        samples = [row.samples_so_far / 1000 for row in rows]
        accuracy = [100 * row.test_accuracy for row in rows]
        axes.plot(samples, accuracy, marker="o", markersize=4, color=colour, label=folder.name)
    axes.set(
        xlabel="student samples consumed (thousands)", ylabel="test accuracy (%)", title="Accuracy against consumption"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")


def main() -> None:
    folder, out, *names = sys.argv[1:]
    chosen = [Path(folder) / name for name in (names or ["kcd-seed0", "kd-seed0", "baseline-seed0"])]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    draw_stages(left, chosen[0])
    draw_curves(right, chosen)
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main()
