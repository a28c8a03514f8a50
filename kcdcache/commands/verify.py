"""`verify`: is what lies at a path what was written, and does the teacher still say the same?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kcdcache import settings
from kcdcache.commands import steps
from kcdcache.condense import manifest
from kcdcache.data.datasets import Dataset
from kcdcache.errors import CorruptionError, SettingsError, require_same
from kcdcache.export import condensed_set
from kcdcache.networks import weights
from kcdcache.progress import Progress, silent
from kcdcache.report import show
from kcdcache.runs import check as runs_check
from kcdcache.store import check as store_check
from kcdcache.store import identity, log, plan, reader
from kcdcache.teacher import precompute, repair, teacher
from kcdcache.views import rules

TOLERANCE = 2e-3
"""largest |recomputed - stored| / (1 + |stored|) that another machine or library version explains: about one unit in
the last place of float16 where the gap to the row's maximum is largest"""


@dataclass(frozen=True, kw_only=True)
class Depth:
    """How closely `verify` looks."""

    share: float = 0.0
    """share of a store's chunk files that is read and hashed, in [0, 1]"""
    points: int = 512
    """points to compute again, at least, where a teacher is given"""
    seed: int = 0
    """of the choice of files and points"""


FAST = Depth()


def verify(path: Path, *, depth: Depth = FAST, data: str | None = None, **named: Any) -> dict[str, Any]:
    """Return what was checked and found in order.

    A store is checked against its records and listing, and as much of its chunk files as `depth` says; with its data,
    whether they are those it was made from; with a teacher too, some points are computed again. Manifests, values,
    networks and runs are read whole and checked against their digests.

    Raises:
        CorruptionError: something is not what was written; lists all of it.
        MismatchError: teacher or data are not the store's.
    """
    kind = show.kind_of(path)
    result = {"kind": kind, "path": str(path), "id": show.id_of(path), **CHECKS[kind](path, depth)}
    given, device = _given(named)
    if given.teacher is None and data is None:
        return result
    if kind != "store" or data is None:
        raise SettingsError("to compute points again give a store, its --teacher and its --data")
    knowledge = reader.open(path)
    dataset = condensed_set.load_data(data)
    store_check.check_data(knowledge, dataset)
    result["data"] = "the store's"
    return (
        result
        if given.teacher is None
        else result | {"recomputed": _recompute(knowledge, given, dataset, device, depth)}
    )


def mend(path: Path, *, data: str | None = None, progress: Progress = silent, **named: Any) -> dict[str, Any]:
    """Make what is damaged in a store again, check all of it, and return what was replaced.

    Raises:
        SettingsError: the path is no store, or its teacher and data are needed and not given.
        CorruptionError, MismatchError: it cannot be made again from what is given (see `repair`).
    """
    if (kind := show.kind_of(path)) != "store":
        raise SettingsError(f"--repair makes stores again, {path} is a {kind}: {REMEDIES[kind]}")
    given, device = _given(named)
    means = None
    if given.teacher is not None and data is not None:
        dataset = condensed_set.load_data(data)
        precision = steps.precision_of(repair.knowledge_of(path), path)
        means = repair.Means(data=dataset, network=steps.load_teacher(given, dataset, precision, device, None))
    replaced = repair.repair(path, means, progress)
    return {"kind": kind, "path": str(path), "repaired": replaced, **_store(path, Depth(share=1.0))}


REMEDIES: Mapping[str, str] = {
    "condensed": "fetch the folder again, or export it again into a new one",
    "run": "run its command again, which resumes from the checkpoint; where that is damaged, into a new folder",
    "manifest": "condense again from the values it was made from",
    "values": "run the command of its run again",
    "network": "run its `fit` or `train` again, or fetch the file again",
}
"""kind -> what to do with one that is damaged"""


def _given(named: Mapping[str, Any]) -> tuple[settings.TeacherSettings, str]:
    device = named.get("device") or "auto"
    plain = {key: value for key, value in named.items() if value is not None and key != "device"}
    return settings.make(settings.TeacherSettings, plain), device


def parse_share(text: str) -> float:
    """Return a share in (0, 1] from a text such as `5%` or `0.05`.

    Raises:
        SettingsError: it is none.

    >>> parse_share("5%")
    0.05
    """
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise SettingsError(f"--sample takes a share above 0 and at most 100%, such as 5%; found {text!r}")
    return share


def _recompute(
    knowledge: reader.Store, named: settings.TeacherSettings, data: Dataset, device: str, depth: Depth
) -> dict[str, Any]:
    precision = steps.precision_of(knowledge.knowledge, knowledge.path)
    network = steps.load_teacher(named, data, precision, device, None)
    found = recheck(knowledge, data, network, points=depth.points, seed=depth.seed)
    if found["largest"] > TOLERANCE:
        raise CorruptionError(
            f"the teacher no longer gives what {knowledge.path} holds: {found['differing']} of {found['points']} "
            f"points differ, up to {found['largest']:.3g} (relative; other hardware or versions explain at most "
            f"{TOLERANCE})"
        )
    if identity.PARAMETERS in identity.held(knowledge):
        own = teacher.filter_profiles(network.module)
        if bad := identity.parameters_problem(knowledge.path, knowledge.knowledge, own):
            raise CorruptionError(bad)
    return found


def recheck(
    knowledge: reader.Store, data: Dataset, network: teacher.Teacher, *, points: int, seed: int = 0
) -> dict[str, Any]:
    """Run the teacher again on randomly chosen teacher batches and compare with the store, field by field.

    On the same kind of machine and versions the result is exact; `largest` is the largest |difference| / (1 + |value|).

    Raises:
        MismatchError: teacher or data are not the store's.
    """
    store_check.check_data(knowledge, data)
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
    rule = rules.rule_of(knowledge.knowledge.views)
    parts = plan.parts(knowledge.plan)
    chosen = [(part, bounds) for part in parts for bounds in knowledge.plan.batches(part)]
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(chosen))
    checked, wrong, largest = 0, 0, 0.0
    for number in order:
        if checked >= points:
            break
        part, (start, stop) = chosen[number]
        pixels = precompute.view_pixels(data, rule, np.arange(start, stop), part.view, network.device)
        differing, difference = _compare(knowledge, network, pixels, part.view, start, stop)
        compared = len(_usable(knowledge, start, stop))
        checked, wrong, largest = checked + compared, wrong + differing, max(largest, difference)
    return {"points": checked, "differing": wrong, "largest": largest}


def _compare(
    knowledge: reader.Store, network: teacher.Teacher, pixels: Tensor, view: int, start: int, stop: int
) -> tuple[int, float]:
    """Return how many rows differ in any stored bit, and the largest |difference| / (1 + |stored value|).

    Skipped samples are left out: nothing is stored of them.
    """
    index = _usable(knowledge, start, stop)
    differing, largest = np.zeros(len(index), bool), 0.0
    for field, fresh in teacher.outputs(network, pixels, list(knowledge.fields)).items() if len(index) else ():
        form = knowledge.fields[field].encoding
        held = knowledge.load(view, index, (field,))
        skipped = torch.from_numpy(~np.isin(np.arange(start, stop), index)).to(fresh.device)
        again = {name: rows[index - start] for name, rows in form.encode(fresh, start, skipped).items()}
        for name, rows in again.items():
            differing |= (rows.view(np.uint8) != held[name].view(np.uint8)).reshape(len(index), -1).any(1)
        decoded = [form.decode({n: torch.from_numpy(r) for n, r in side.items()}) for side in (held, again)]
        largest = max(largest, float(((decoded[0] - decoded[1]).abs() / (1 + decoded[0].abs())).max()))
    return int(differing.sum()), largest


def _usable(knowledge: reader.Store, start: int, stop: int) -> np.ndarray:
    return np.setdiff1d(np.arange(start, stop), knowledge.skipped)


def _store(path: Path, depth: Depth) -> dict[str, Any]:
    found = store_check.verify(path, share=depth.share, seed=depth.seed)
    if found.problems:
        shown = "\n  ".join(found.problems[:20])
        raise CorruptionError(f"{path}: {len(found.problems)} problems\n  {shown}")
    told: dict[str, Any] = {"files": found.files, "files_read": found.read, "bytes_read": found.bytes, "problems": 0}
    if not found.read:
        told["compared"] = "records, listing and sizes; no chunk was read, --read-data reads all and --sample 5% some"
    if log.growths(path, "plan") > log.growths(path, "commit"):
        told["growth"] = "begun and not sealed; the `kcdcache precompute` that began it resumes it"
    return told


def _run(path: Path, depth: Depth) -> dict[str, Any]:
    found = runs_check.check(path)
    if found.problems:
        shown = "\n  ".join(found.problems[:20])
        raise CorruptionError(f"{path}: {len(found.problems)} problems\n  {shown}")
    cut = {"cut_short": list(found.unfinished)} if found.unfinished else {}
    return found.counts | {"finished": found.finished, "problems": 0} | cut


def _network(path: Path, depth: Depth) -> dict[str, Any]:
    weights.load_network(path.with_suffix(".json"))
    return {"problems": 0}


def _condensed(path: Path, depth: Depth) -> dict[str, Any]:
    if found := condensed_set.problems(path, share=depth.share, seed=depth.seed):
        shown = "\n  ".join(found[:20])
        raise CorruptionError(f"{path}: {len(found)} problems\n  {shown}")
    opened = condensed_set.open(path)
    return {"rows": opened.knowledge.plan.count, "kept": len(opened.manifest), "problems": 0}


CHECKS: Mapping[str, Callable[[Path, Depth], dict[str, Any]]] = {
    "condensed": _condensed,
    "store": _store,
    "run": _run,
    "manifest": lambda path, depth: {"rows": len(manifest.read(path)), "problems": 0},
    "values": lambda path, depth: {"rows": show.inspect(path)["samples"], "problems": 0},
    "network": _network,
}
"""kind -> how it is checked"""
