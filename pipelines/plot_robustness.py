"""Noise and imbalance: gains over plain training, and what condensed sets keep, from published results.

python pipelines/plot_robustness.py PICTURE.png NOISE GAMMA

NOISE and GAMMA are folders of pipelines/results with a runs.jsonl each (see publish.py).
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from kcdcache import statistics

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
SETS = {
    "kcd": "KCD",
    "kcd-stratified": "KCD, same share of every class",
    "direct": "direct selection",
    "random": "random",
}
"""variant that condenses -> how the picture calls it"""

Runs = Mapping[str, list[Mapping[str, Any]]]
"""variant -> the summaries of its runs, by seed"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("noise", type=Path)
    parser.add_argument("gamma", type=Path)
    given = parser.parse_args()
    noise, gamma = read(given.noise), read(given.gamma)
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.8), layout="constrained", width_ratios=(1.5, 1, 1))
    gains(panels[0], {"noise 0.4": noise, "gamma 0.6": gamma})
    shares(panels[1], noise, "dropped_wrong", "dropped", "of the dropped, wrongly labelled (%)")
    panels[1].set_title("noise 0.4: does dropping screen?", fontsize=10)
    shares(panels[2], gamma, "kept_rare", "rare", "of rare classes' samples, kept (%)")
    panels[2].set_title("gamma 0.6: are rare classes kept?", fontsize=10)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower right", ncols=4, fontsize=8)
    figure.savefig(given.picture, dpi=100)


def read(folder: Path) -> Runs:
    """Return the students' summaries of a published recipe, variants in the order of its runs."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for line in (folder / "runs.jsonl").read_text().splitlines():
        run = json.loads(line)
        if "resnet8-" in run["run"]:
            variant = run["run"].partition("resnet8-")[2].rpartition("-seed")[0].removeprefix("of-")
            found.setdefault(variant, []).append(run["summary"])
    return found


def gains(axes: Axes, conditions: Mapping[str, Runs]) -> None:
    """Draw every variant's gain over labels only, seed by seed, with its 95 % interval."""
    names = list(dict.fromkeys(name for runs in conditions.values() for name in runs if name != "ce"))
    for number, (title, runs) in enumerate(conditions.items()):
        for place, name in enumerate(names):
            if len(runs.get(name, ())) < len(runs["ce"]):
                continue
            ours, plain = ({k: 100 * s["accuracy_last"] for k, s in enumerate(runs[v])} for v in (name, "ce"))
            found = statistics.difference(ours, plain)
            assert found is not None
            y = place + 0.3 * number - 0.15
            axes.plot([found.low, found.high], [y, y], color=COLOURS[number], linewidth=2)
            axes.plot([found.mean], [y], "o", color=COLOURS[number], label=title if place == 0 else None)
    axes.axvline(0, color="#444444", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy minus labels only (points), 95 %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def shares(axes: Axes, runs: Runs, part: str, whole: str, label: str) -> None:
    """Draw a share of each stage's set, means over seeds, and dotted what sets drawn without looking would give."""
    for number, (variant, title) in enumerate(SETS.items()):
        stages = range(1, len(runs[variant][0]["sets"]))
        y = [mean(100 * ratio(summary["sets"][k], part, whole) for summary in runs[variant]) for k in stages]
        axes.plot(list(stages), y, "o-", markersize=4, color=COLOURS[number], label=title)
    stages = range(1, len(runs["kcd"][0]["sets"]))
    chance = [blind(runs["kcd"][0]["sets"][k], part) for k in stages]
    axes.plot(list(stages), chance, ":", color="#444444", label="by chance")
    axes.set(xlabel="set of stage", ylabel=label)
    axes.set_xticks(list(stages))
    axes.grid(alpha=0.3)


def ratio(counts: Mapping[str, int], part: str, whole: str) -> float:
    """Return a share of a set's counts; `rare` is all samples of rare classes."""
    total = counts["kept_rare"] + counts["dropped_rare"] if whole == "rare" else counts[whole]
    return counts[part] / total


def blind(counts: Mapping[str, int], part: str) -> float:
    """Return what the same share would be of a set that is drawn without looking, in percent."""
    total = counts["kept"] + counts["dropped"]
    return 100 * (counts["kept"] if part == "kept_rare" else counts["kept_wrong"] + counts["dropped_wrong"]) / total


def mean(numbers: Iterable[float]) -> float:
    """Return the mean of at least one number."""
    found: Sequence[float] = list(numbers)
    return sum(found) / len(found)


if __name__ == "__main__":
    main()
