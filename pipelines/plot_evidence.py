"""Accuracy against what was consumed, from published results: python pipelines/plot_evidence.py NAME [NAME ...]

NAME is a folder of pipelines/results; its rows with a spread become points with bars of one standard deviation.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from kcdcache.files import read_json

RESULTS = Path(__file__).parent / "results"
GROUPS = {  # of colour-blind safe colours
    "#0072B2": ("everything", ("kd", "eakd", "ce")),
    "#D55E00": ("condensation", ("kcd", "direct", "paper", "release")),
    "#009E73": ("random controls", ("random", "rs2", "fixed", "rs2-paper")),
    "#CC79A7": ("other sampling", ("infobatch", "unix")),
}


def drawn(axes, rows, prefix):
    """Draw the rows whose step is `prefix` and a known name; return how many."""
    count = 0
    for colour, (group, names) in GROUPS.items():
        found = [row for row in rows if row["step"] in {f"{prefix}-{name}" for name in names} and row["n"]]
        for place, row in enumerate(found):
            point = (row["relative_cost"], 100 * row["accuracy_last"])
            spread = 100 * row.get("accuracy_last_std", 0)
            axes.errorbar(*point, spread, fmt="o", color=colour, capsize=3, label=None if place else group)
            axes.annotate(row["step"].removeprefix(f"{prefix}-"), point, (5, 4), textcoords="offset points", fontsize=8)
            count += 1
    return count


def main() -> None:
    names = sys.argv[1:]
    figure, frames = plt.subplots(1, len(names), figsize=(6.5 * len(names), 4.6), squeeze=False)
    for axes, name in zip(frames[0], names, strict=True):
        results = read_json(RESULTS / name / "results.json")
        if not drawn(axes, results["rows"], "resnet8"):
            raise SystemExit(f"{name} has no rows to draw")
        axes.set_title(results["title"], fontsize=9, wrap=True)
        axes.set_xlabel("student samples forwarded / (N x epochs)")
        axes.set_ylabel("test accuracy in the last epoch, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{names[0]}.png", dpi=110)


if __name__ == "__main__":
    main()
