"""How two condensed sets differ: samples, parts and rankings; told of manifests, of runs stage by stage, of exports."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64, Shaped

from kcdcache.condense import manifest
from kcdcache.condense.manifest import Manifest
from kcdcache.errors import MismatchError, NotFoundError
from kcdcache.export import record
from kcdcache.report import show
from kcdcache.runs.folder import RunFolder

Found = dict[str, Any]

COLUMNS = ("kept_a", "kept_b", "both", "only_a", "only_b", "jaccard", "hamming", "rank_correlation", "parts_moved")
"""what the table shows of each pair of sets"""


TERMS = (
    "(jaccard: share of what either keeps that both keep; hamming: share of all samples that only one of them keeps;",
    "rank_correlation: Spearman's, over what both keep; parts_moved: kept by both, but enriched in one only)",
)


def run(first: Path, second: Path) -> Found:
    """Return how two manifests, runs or exported sets differ, as JSON values with a `table` for people.

    Two runs are compared stage by stage, where both have the stage; beside anything else a run stands for its last set.

    Raises:
        NotFoundError: nothing is there, or a run has no set yet.
        MismatchError: one of them is something else, or they are sets of different data.
    """
    kinds = {path: show.kind_of(path) for path in (first, second)}
    if all(kind == "run" for kind in kinds.values()):
        return _of_runs(first, second)
    sets = [_set_of(path, kinds[path]) for path in (first, second)]
    found = compare(manifest.read(sets[0]), manifest.read(sets[1]), (str(sets[0]), str(sets[1])))
    return _told(first, second, {"set": found}) | found


def compare(a: Manifest, b: Manifest, names: tuple[str, str] = ("A", "B")) -> Found:
    """Return how two condensed sets of the same data differ.

    `jaccard` = |A and B| / |A or B| in [0, 1]; `hamming` = |A xor B| / N in [0, 1], the share of all samples that one
    set keeps and the other does not; correlations are Spearman's, in [-1, 1], over the samples kept in both (values:
    over those visited in both), None where fewer than two or all alike; `class_difference` is kept in B minus kept in A
    per class.

    Raises:
        MismatchError: they are sets of different data.
    """
    _require_same_data(a, b, names)
    common, at_a, at_b = np.intersect1d(a.index, b.index, assume_unique=True, return_indices=True)
    either, both = len(a) + len(b) - len(common), len(common)
    seen = (a.visits[at_a] > 0) & (b.visits[at_b] > 0)
    return {
        "samples": a.count,
        "kept_a": len(a),
        "kept_b": len(b),
        "both": both,
        "only_a": len(a) - both,
        "only_b": len(b) - both,
        "dropped_by_both": a.count - either,
        "jaccard": both / either if either else 1.0,
        "hamming": (either - both) / a.count,
        "rank_correlation": spearman(a.rank[at_a], b.rank[at_b]),
        "value_correlation": spearman(a.value[at_a][seen], b.value[at_b][seen]),
        **_parts(a, b, at_a, at_b),
        "class_difference": _classes(a, b, names),
        "same_knowledge": a.knowledge_id == b.knowledge_id,
        "identical": a.digest == b.digest,
    }


def spearman(x: Shaped[np.ndarray, " n"], y: Shaped[np.ndarray, " n"]) -> float | None:
    """Return Spearman's rank correlation in [-1, 1], ties at their mean rank; None below two or where all are alike.

    Source: Spearman 1904; Pearson's correlation of the ranks.
    """
    if len(x) < 2:
        return None
    u, v = (ranks - ranks.mean() for ranks in (mean_ranks(x), mean_ranks(y)))
    scale = float(np.sqrt((u @ u) * (v @ v)))
    return float(np.clip(u @ v / scale, -1, 1)) if scale else None


def mean_ranks(x: Shaped[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Return each number's place in ascending order from 0, equal ones at the mean of their places.

    >>> mean_ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [1.5, 0.0, 1.5]
    """
    _, group, sizes = np.unique(x, return_inverse=True, return_counts=True)
    last: Int64[np.ndarray, " groups"] = np.cumsum(sizes)
    return (last - (sizes + 1) / 2)[group]


def _parts(a: Manifest, b: Manifest, at_a: np.ndarray, at_b: np.ndarray) -> Found:
    """Return how the samples kept in both moved between K_1H and K_Aug, and whom they share as partner."""
    was, now = a.mixed[at_a], b.mixed[at_b]
    same = was & now & (a.partner[at_a] == b.partner[at_b])
    gained, lost = int((~was & now).sum()), int((was & ~now).sum())
    return {
        "parts_moved": gained + lost,
        "K_1H_to_K_Aug": gained,
        "K_Aug_to_K_1H": lost,
        "mixed_in_both": int((was & now).sum()),
        "same_partner": int(same.sum()),
    }


def _classes(a: Manifest, b: Manifest, names: tuple[str, str]) -> list[int] | None:
    if not a.class_counts or not b.class_counts:
        return None
    if len(a.class_counts) != len(b.class_counts):
        raise MismatchError(
            f"{names[0]} counts {len(a.class_counts)} classes, {names[1]} {len(b.class_counts)}: they are sets of "
            "different data; compare sets of one data set"
        )
    return [after - before for before, after in zip(a.class_counts, b.class_counts, strict=True)]


def _require_same_data(a: Manifest, b: Manifest, names: tuple[str, str]) -> None:
    for what, one, other in (("samples", a.count, b.count), ("data digest", a.data_digest, b.data_digest)):
        if one is not None and other is not None and one != other:
            raise MismatchError(
                f"{names[0]} is a set of data with {what} {one}, {names[1]} with {other}; compare sets of one data set"
            )


def _set_of(path: Path, kind: str) -> Path:
    """Return the manifest that a path stands for."""
    if kind == "condensed":
        return record.read(path).place(record.MANIFEST)
    if kind == "run":
        stages = _stages(path)
        if not stages:
            raise NotFoundError(f"the run in {path} has no condensed set yet; give a manifest, or continue the run")
        return stages[max(stages)]
    if kind != "manifest":
        raise MismatchError(f"{path} is a {kind}; diff compares manifests, runs and exported sets")
    return path


def _stages(path: Path) -> dict[int, Path]:
    folders = [file.parent.name for file in path.glob("stages/*/manifest.parquet")]
    numbers = sorted(int(name) for name in folders if name.isdecimal())
    return {number: RunFolder(path=path).manifest(number) for number in numbers}


def _of_runs(first: Path, second: Path) -> Found:
    ours, theirs = _stages(first), _stages(second)
    if not (shared := sorted(ours.keys() & theirs.keys())):
        raise NotFoundError(f"the runs in {first} and {second} have no stage in common; continue them")
    pairs = {number: (ours[number], theirs[number]) for number in shared}
    stages = {
        str(number): compare(manifest.read(a), manifest.read(b), (str(a), str(b))) for number, (a, b) in pairs.items()
    }
    lonely = {"only_in_a": sorted(ours.keys() - theirs.keys()), "only_in_b": sorted(theirs.keys() - ours.keys())}
    return _told(first, second, stages) | {"stages": stages, **lonely}


def _told(first: Path, second: Path, sets: Mapping[str, Found]) -> Found:
    """Return the two paths, a table with a line for each pair of sets, and a note on the classes of the last."""
    heads = ["stage" if "set" not in sets else "", *COLUMNS]
    rows = [[name if name != "set" else "", *(_shown(found[key]) for key in COLUMNS)] for name, found in sets.items()]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in (heads, *rows)]
    table = "\n".join([f"a = {first}", f"b = {second}", *lines, *TERMS])
    return {"a": str(first), "b": str(second), "table": table, "note": _note(list(sets.values())[-1])}


def _note(found: Found) -> str:
    moved = f"{found['K_1H_to_K_Aug']} moved from K_1H to K_Aug, {found['K_Aug_to_K_1H']} back"
    partners = f"{found['same_partner']} of {found['mixed_in_both']} mixed in both have the same partner"
    classes = found["class_difference"]
    largest = "" if not classes else f"; classes differ by {min(classes):+d} to {max(classes):+d} samples"
    same = "the sets are identical; " if found["identical"] else ""
    return (
        f"{same}of {found['samples']} samples {found['dropped_by_both']} are in neither; {moved}; {partners}{largest}"
    )


def _shown(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
