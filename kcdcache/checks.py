"""`verify`: is what lies at a path what was written, and does the teacher still say the same?"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kcdcache import audit, config, inspection, manifest, precompute, runs, steps, store, values
from kcdcache.errors import CorruptionError, SettingsError
from kcdcache.models import weights

TOLERANCE = 2e-3
"""largest |recomputed - stored| / (1 + |stored|) that another machine or library version explains: about one unit in
the last place of float16 where the gap to the row's maximum is largest"""


def verify(
    path: Path, *, data: str | None = None, points: int = 512, sample_seed: int = 0, **teacher: Any
) -> dict[str, Any]:
    """Return what was checked and found in order.

    A store is checked file by file against its log; with a teacher and its data, at least `points` random points are
    computed again. Manifests and values are checked against their digests, runs and networks against theirs.

    Raises:
        CorruptionError: something is not what was written; lists all of it.
        MismatchError: teacher or data are not the store's.
    """
    kind = inspection.inspect(path)["kind"]
    result = {"kind": kind, "path": str(path), **CHECKS[kind](path)}
    device = teacher.pop("device", None) or "auto"
    named = config.make(config.TeacherSettings, {key: value for key, value in teacher.items() if value is not None})
    if named.teacher is None and data is None:
        return result
    if kind != "store" or named.teacher is None or data is None:
        raise SettingsError("to compute points again give a store, its --teacher and its --data")
    return result | {"recomputed": _recompute(path, named, data, device, points, sample_seed)}


def _recompute(
    path: Path, named: config.TeacherSettings, spec: str, device: str, points: int, seed: int
) -> dict[str, Any]:
    knowledge, data = store.open(path), steps.load_data(spec)
    network = steps.load_teacher(named, data, knowledge.knowledge.teacher.precision, device, None)
    found = precompute.recheck(knowledge, data, network, points=points, seed=seed)
    if found["largest"] > TOLERANCE:
        raise CorruptionError(
            f"the teacher no longer gives what {path} holds: {found['differing']} of {found['points']} points differ, by "
            f"up to {found['largest']:.3g} (relative; at most {TOLERANCE} is explained by other hardware or versions)"
        )
    return found


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
    if (path / "student.json").exists():
        weights.load_network(path, "student")
    if folder.values.exists() and sets:
        values.read(folder.values, sets[0].count)
    return {"manifests": len(sets), "finished": folder.summary.exists(), "problems": 0}


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
