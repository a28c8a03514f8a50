"""Accuracy against the gap between teacher and student: python pipelines/plot_capacity.py FOLDER [PICTURE.png]

FOLDER holds the results.json of capacity.toml or capacity_small.toml. A student's gap is told in two ways: how many
times as many parameters the teacher has, and how much better it is than the student trained alone.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from kcdcache.files.records import read_json
from kcdcache.networks import registry

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = {"kd": "o-", "kcd": "s--", "kd-unit": "^:", "kd-kr": "d-."}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path, nargs="?", help="FOLDER/capacity.png if not given")
    given = parser.parse_args()
    results = read_json(given.folder / "results.json")
    rows = {row["step"]: row for row in results["rows"]}
    students = sorted({step.removeprefix("plain-") for step in rows if step.startswith("plain-")}, key=size)
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout="constrained")
    for number, student in enumerate(students):
        colour, alone = COLOURS[number % len(COLOURS)], rows[f"plain-{student}"]
        for axes in panels:
            label = f"{student} alone" if axes is panels[0] else None
            axes.axhline(100 * alone["accuracy_last"], color=colour, linewidth=1, alpha=0.6, label=label)
        for variant, mark in MARKS.items():
            draw(panels, rows, student, variant, colour, mark)
    panels[0].set_xlabel("parameters of the teacher / of the student")
    panels[0].set_xscale("log", base=2)
    panels[0].xaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5)))
    panels[0].xaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("test accuracy of the student (%), mean and std")
    panels[1].set_xlabel("accuracy of the teacher minus that of the student alone (points)")
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.suptitle(results["title"], fontsize=10)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(given.picture or given.folder / "capacity.png", dpi=110)


def draw(panels: Any, rows: dict[str, Any], student: str, variant: str, colour: str, mark: str) -> None:
    """Draw one variant of a student over both gaps, its teachers in order of the gap."""
    found = {step.partition("-to-")[0]: row for step, row in rows.items() if step.endswith(f"-to-{student}-{variant}")}
    gaps = [
        {teacher: size(teacher) / size(student) for teacher in found},
        {teacher: 100 * (rows[f"teacher-{teacher}"]["accuracy_last"] - rows[f"plain-{student}"]["accuracy_last"])
         for teacher in found},
    ]  # fmt: skip
    for axes, gap in zip(panels, gaps, strict=True) if found else ():
        order = sorted(found, key=gap.__getitem__)
        y = [100 * found[teacher]["accuracy_last"] for teacher in order]
        spread = [100 * found[teacher].get("accuracy_last_std", 0) for teacher in order]
        label = f"{student}, {variant}" if axes is panels[0] else None
        axes.errorbar([gap[t] for t in order], y, yerr=spread, fmt=mark, color=colour, capsize=3, label=label)


def size(network: str) -> int:
    """Return a network's parameters for 100 classes."""
    return sum(parameter.numel() for parameter in registry.build(network, 100).parameters())


if __name__ == "__main__":
    main()
