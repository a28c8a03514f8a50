"""`verify`: is what lies at a path what was written, and does the teacher still say the same?"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kcdcache import (
    audit,
    batches,
    config,
    inspection,
    layout,
    manifest,
    precompute,
    runs,
    steps,
    store,
    teacher,
    values,
    views,
)
from kcdcache.data import Dataset
from kcdcache.errors import CorruptionError, SettingsError
from kcdcache.identity import require_same
from kcdcache.models import weights

TOLERANCE = 2e-3
"""largest |recomputed - stored| / (1 + |stored|) that another machine or library version explains: about one unit in
the last place of float16 where the gap to the row's maximum is largest"""


def verify(
    path: Path, *, data: str | None = None, points: int = 512, sample_seed: int = 0, **named: Any
) -> dict[str, Any]:
    """Return what was checked and found in order.

    A store is checked file by file against its log; with a teacher and its data, at least `points` random points are
    computed again. Manifests and values are checked against their digests, runs and networks against theirs.

    Raises:
        CorruptionError: something is not what was written; lists all of it.
        MismatchError: teacher or data are not the store's.
    """
    kind = inspection.kind_of(path)
    result = {"kind": kind, "path": str(path), **CHECKS[kind](path)}
    device = named.pop("device", None) or "auto"
    given = config.make(config.TeacherSettings, {key: value for key, value in named.items() if value is not None})
    if given.teacher is None and data is None:
        return result
    if kind != "store" or given.teacher is None or data is None:
        raise SettingsError("to compute points again give a store, its --teacher and its --data")
    return result | {"recomputed": _recompute(path, given, data, device, points, sample_seed)}


def _recompute(
    path: Path, named: config.TeacherSettings, spec: str, device: str, points: int, seed: int
) -> dict[str, Any]:
    knowledge, data = store.open(path), steps.load_data(spec)
    network = steps.load_teacher(named, data, steps.precision_of(knowledge), device, None)
    found = recheck(knowledge, data, network, points=points, seed=seed)
    if found["largest"] > TOLERANCE:
        raise CorruptionError(
            f"the teacher no longer gives what {path} holds: {found['differing']} of {found['points']} points differ, "
            f"up to {found['largest']:.3g} (relative; at most {TOLERANCE} is explained by other hardware or versions)"
        )
    return found


def recheck(
    knowledge: store.Store, data: Dataset, network: teacher.Teacher, *, points: int, seed: int = 0
) -> dict[str, Any]:
    """Run the teacher again on randomly chosen teacher batches and compare with the store, field by field.

    On the same kind of machine and versions the result is exact; `largest` is the largest |difference| / (1 + |value|).

    Raises:
        MismatchError: teacher or data are not the store's.
    """
    batches.check_data(knowledge, data)
    if knowledge.knowledge.mixes is not None:
        raise SettingsError(
            f"{knowledge.path} holds outputs on a manifest's mixes; only plain views are computed again"
        )
    identity = replace(knowledge.knowledge, teacher=network.identity)
    require_same(
        knowledge.knowledge.document()["teacher"],
        identity.document()["teacher"],
        (f"the teacher of {knowledge.path}", "the given teacher"),
        "give the teacher the store was made with",
    )
    rule = views.rule_of(knowledge.knowledge.views)
    parts = layout.parts(knowledge.plan)
    chosen = [(part, bounds) for part in parts for bounds in knowledge.plan.batches(part)]
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(chosen))
    checked, wrong, largest = 0, 0, 0.0
    for number in order:
        if checked >= points:
            break
        part, (start, stop) = chosen[number]
        pixels = precompute.view_pixels(data, rule, np.arange(start, stop), part.view, network.device)
        differing, difference = _compare(knowledge, network, pixels, part.view, start, stop)
        checked, wrong, largest = checked + stop - start, wrong + differing, max(largest, difference)
    return {"points": checked, "differing": wrong, "largest": largest}


def _compare(
    knowledge: store.Store, network: teacher.Teacher, pixels: Tensor, view: int, start: int, stop: int
) -> tuple[int, float]:
    """Return how many rows differ in any stored bit, and the largest |difference| / (1 + |stored value|)."""
    index = np.arange(start, stop)
    differing, largest = np.zeros(stop - start, bool), 0.0
    for field, fresh in teacher.outputs(network, pixels, list(knowledge.fields)).items():
        form = knowledge.fields[field].encoding
        held = knowledge.load(view, index, (field,))
        for name, rows in form.encode(fresh, start).items():
            differing |= (rows.view(np.uint8) != held[name].view(np.uint8)).reshape(stop - start, -1).any(1)
        decoded = [form.decode({name: torch.from_numpy(rows) for name, rows in held.items()})]
        decoded.append(form.decode({n: torch.from_numpy(r) for n, r in form.encode(fresh, start).items()}))
        largest = max(largest, float(((decoded[0] - decoded[1]).abs() / (1 + decoded[0].abs())).max()))
    return int(differing.sum()), largest


def _store(path: Path) -> dict[str, Any]:
    found = audit.verify(path)
    if found.problems:
        shown = "\n  ".join(found.problems[:20])
        raise CorruptionError(f"{path}: {len(found.problems)} problems\n  {shown}")
    return {"files": found.files, "bytes": found.bytes, "problems": 0}


def _run(path: Path) -> dict[str, Any]:
    folder = runs.RunFolder(path=path)
    files = sorted(path.glob("stages/*/manifest.parquet"))
    sets = [manifest.read(file) for file in files]
    runs.load_checkpoint(folder)
    networks = [name for name in teacher.SAVED_NAMES if (path / f"{name}.json").exists()]
    for name in networks:
        weights.load_network(path, name)
    tables = [file for file in (folder.values, *sorted(path.glob("stages/*/values.parquet"))) if file.exists() and sets]
    for file in tables:
        values.read(file, sets[0].count)
    requeried = sorted(path.glob("stages/*/*.requery"))
    for made in requeried:
        _store(made)
    counted: dict[str, list[Any]] = {"manifests": sets, "values": tables, "networks": networks, "requeried": requeried}
    return {name: len(found) for name, found in counted.items()} | {"finished": folder.summary.exists(), "problems": 0}


def _network(path: Path) -> dict[str, Any]:
    weights.load_network(path.with_suffix(".json"))
    return {"problems": 0}


CHECKS: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "store": _store,
    "run": _run,
    "manifest": lambda path: {"rows": len(manifest.read(path)), "problems": 0},
    "values": lambda path: {"rows": inspection.inspect(path)["samples"], "problems": 0},
    "network": _network,
}
"""kind -> how it is checked"""
