"""Accuracy of a recipe's rows with what each consumed, from published results: python pipelines/plot_evidence.py NAME

NAME is a folder of pipelines/results; the picture is NAME.png beside it.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from kcdcache.files.records import read_json

RESULTS = Path(__file__).parent / "results"
CONDENSED = ("kcd", "direct", "paper", "release")
COLOURS = {True: "#D55E00", False: "#0072B2"}
"""of rows that condense and of others; told apart with any colour vision"""


def main() -> None:
    (name,) = sys.argv[1:]
    results = read_json(RESULTS / name / "results.json")
    rows = [row for row in results["rows"] if row["n"] > 1]
    rows.sort(key=lambda row: row["accuracy_last"])
    figure, axes = plt.subplots(figsize=(9, 0.36 * len(rows) + 1.6), layout="constrained")
    for place, row in enumerate(rows):
        condensed = row["step"].partition("-")[2] in CONDENSED
        mean, spread = 100 * row["accuracy_last"], 100 * row["accuracy_last_std"]
        axes.errorbar(mean, place, xerr=spread, fmt="s" if condensed else "o", color=COLOURS[condensed], capsize=3)
    axes.set_yticks(range(len(rows)), [f"{row['title']}   {row['relative_cost']:.2f}" for row in rows])
    axes.set_ylabel("row, and its share of all samples x epochs")
    axes.set_xlabel(f"test accuracy of the last epoch, % (mean and standard deviation of {rows[0]['n']} seeds)")
    axes.set_title(results["title"], fontsize=10, wrap=True)
    for condensed, text in ((True, "condensation"), (False, "others")):
        axes.plot([], [], "s" if condensed else "o", color=COLOURS[condensed], label=text)
    axes.legend(loc="lower right")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(RESULTS / f"{name}.png", dpi=110)


if __name__ == "__main__":
    main()
