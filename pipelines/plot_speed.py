"""Draw the benchmarks' results: each ratio beside its bar, and how time grows with the number of samples.

Usage: python pipelines/plot_speed.py OUT.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

RESULTS = Path(__file__).parent / "results" / "bench"
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]


def rows(name):
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def found(name, words):
    return [row for row in rows(name) if words in row["what"]]


def ratios():
    """(what, ratio, bar, whether more is better) of each question."""
    largest = max(row["rows"] for row in rows("reading"))
    reading = [row for row in rows("reading") if row["rows"] == largest]
    one = lambda table, words: next(row["ratio"] for row in table if words in row["what"])  # noqa: E731
    epochs, files = rows("epochs"), rows("files")
    bytes_ = max(row["ratio"] for row in files if "bytes" in row["what"])
    write = max(row["ratio"] for row in files if "write" in row["what"])
    read = max(row["ratio"] for row in files if "read" in row["what"])
    precompute = {row["what"].split(", ")[1]: row["throughput_ratio"] for row in rows("precompute")}
    return [
        ("precompute resnet32x4 / bare forward", precompute["resnet32x4"], 0.95, True),
        ("precompute resnet20 / bare forward", precompute["resnet20"], 0.85, True),
        ("batch in memory / np.take", one(reading, "batch of 256 in memory"), 0.95, True),
        ("batch from sidecar / np.take", one(reading, "above the memory budget"), 0.85, True),
        ("stage start, fresh memory / readinto", one(reading, "first view"), 1.75, False),
        ("stage start, later view / readinto", one(reading, "later view"), 1.75, False),
        ("plain epoch resnet20 / bare steps", one(epochs, "resnet20: plain"), 1.08, False),
        ("KD epoch resnet20 / plain", one(epochs, "resnet20: KD"), 1.04, False),
        ("KD epoch resnet8 / plain", one(epochs, "resnet8: KD"), 1.10, False),
        ("K_Aug epoch resnet20 / plain", one(epochs, "half the batch"), 1.08, False),
        ("ranking 1.28 M / argsort", one(rows("condense"), "1280000 scores"), 0.25, False),
        ("files: bytes / parquet default", bytes_, 0.55, False),
        ("files: writing / parquet default", write, 0.5, False),
        ("files: reading / parquet default", read, 0.5, False),
    ]


def draw_ratios(axes):
    questions = ratios()[::-1]
    for place, (_, ratio, bar, more) in enumerate(questions):
        met = ratio >= bar if more else ratio <= bar
        axes.barh(place, ratio, color=COLOURS[0] if met else COLOURS[1], height=0.6)
        axes.plot([bar, bar], [place - 0.42, place + 0.42], color="black", linewidth=2)
        axes.text(
            max(ratio, bar) + 0.03, place, f"{ratio:.2f} ({'at least' if more else 'at most'} {bar:g})", va="center"
        )
    axes.set_yticks(range(len(questions)), [what for what, *_ in questions])
    axes.set(
        xlim=(0, 3.4), xlabel="ratio (black: the bar; blue: met, orange: missed)", title="Against the named reference"
    )


def draw_growth(axes):
    lines = {}
    for row in json.loads((RESULTS / "condense.json").read_text())["scaled"]:
        lines.setdefault("kcdcache condense", {})[row["rows"]] = row["median_s"]
    for row in found("reading", "start:"):
        if row["median_s"]:
            what = "stage start, first view" if "first" in row["what"] else "stage start, later view"
            lines.setdefault(what, {})[row["rows"]] = row["median_s"]
    for row in rows("growth"):
        lines.setdefault(row["what"], {})[row["rows"]] = row["median_s"]
    for (what, points), colour in zip(lines.items(), COLOURS, strict=False):
        sizes, seconds = zip(*sorted(points.items()), strict=True)
        slope = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        axes.loglog(sizes, seconds, "o-", color=colour, label=f"{what}: slope {slope:.2f}")
    axes.set(xlabel="samples", ylabel="seconds (median)", title="Growth")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def main():
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.6), layout="constrained")
    draw_ratios(left)
    draw_growth(right)
    figure.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
