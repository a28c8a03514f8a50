"""`verify`: is what lies at a path what was written, and does the teacher still say the same?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kcdcache.commands import Result, inputs
from kcdcache.commands.checks import parse_share
from kcdcache.condense import manifest
from kcdcache.data.datasets import Dataset
from kcdcache.errors import CorruptionError, SettingsError, require_same
from kcdcache.export import condensed_set
from kcdcache.export.condensed_set import load_data
from kcdcache.networks import weights
from kcdcache.progress import Progress, silent
from kcdcache.report import show
from kcdcache.runs import check as runs_check
from kcdcache.settings import VerifyCommand, make
from kcdcache.store import check as store_check
from kcdcache.store import identity, log, plan, reader
from kcdcache.teacher import precompute, repair, teacher
from kcdcache.views import rules

TOLERANCE = 2e-3
"""largest |recomputed - stored| / (1 + |stored|) that another machine or library version explains: about one unit in
the last place of float16 where the gap to the row's maximum is largest"""


def run(command: VerifyCommand, progress: Progress = silent) -> Result:
    """Return what was checked and found in order, or with --repair what was made again.

    A store is checked against its records and listing, and as much of its chunk files as asked for; with its data,
    whether they are those it was made from; with a teacher too, some points are computed again. Manifests, values,
    networks and runs are read whole and checked against their digests.

    Raises:
        CorruptionError: something is not what was written; lists all of it.
        MismatchError: teacher or data are not the store's.
        SettingsError: what is asked for is done for stores alone.
    """
    if command.repair:
        return _repaired(command, progress)
    path = command.path
    show.require_ids([path], [command.expect_id] if command.expect_id else None)
    kind = show.kind_of(path)
    result = {"kind": kind, "path": str(path), "id": show.id_of(path), **CHECKS[kind](command)}
    if command.teaching.teacher is None and command.data is None:
        return result
    if kind != "store" or command.data is None:
        raise SettingsError("to compute points again give a store, its --teacher and its --data")
    knowledge, data = reader.open(path), load_data(command.data)
    store_check.check_data(knowledge, data)
    result["data"] = "the store's"
    return result if command.teaching.teacher is None else result | {"recomputed": _recompute(command, knowledge, data)}


def verify(path: Path, **given: Any) -> Result:
    """Return what `run` finds at a path, with other settings of `kcdcache verify` by name."""
    return run(make(VerifyCommand, {"path": path, **given}))


def _repaired(command: VerifyCommand, progress: Progress) -> Result:
    """Make what is damaged in a store again, check all of it, and return what was replaced."""
    path = command.path
    if (kind := show.kind_of(path)) != "store":
        raise SettingsError(f"--repair makes stores again, {path} is a {kind}: {REMEDIES[kind]}")
    means = None
    if command.teaching.teacher is not None and command.data is not None:
        data = load_data(command.data)
        precision = inputs.precision_of(repair.knowledge_of(path), path)
        network = inputs.load_teacher(command.teaching, data, precision, command.device, None)
        means = repair.Means(data=data, network=network)
    replaced = repair.repair(path, means, progress)
    whole = command.model_copy(update={"read_data": True})
    return {"kind": kind, "path": str(path), "repaired": replaced, **_store(whole)}


REMEDIES: Mapping[str, str] = {
    "condensed": "fetch the folder again, or export it again into a new one",
    "run": "run its command again, which resumes from the checkpoint; where that is damaged, into a new folder",
    "manifest": "condense again from the values it was made from",
    "values": "run the command of its run again",
    "network": "run its `fit` or `train` again, or fetch the file again",
}
"""kind -> what to do with one that is damaged"""


def _recompute(command: VerifyCommand, knowledge: reader.Store, data: Dataset) -> Result:
    precision = inputs.precision_of(knowledge.knowledge, knowledge.path)
    network = inputs.load_teacher(command.teaching, data, precision, command.device, None)
    found = recheck(knowledge, data, network, points=command.points, seed=command.sample_seed)
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


def recheck(knowledge: reader.Store, data: Dataset, network: teacher.Teacher, *, points: int, seed: int = 0) -> Result:
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


def _store(command: VerifyCommand) -> Result:
    path = command.path
    found = store_check.verify(path, share=_share(command), seed=command.sample_seed)
    _require_none(path, found.problems)
    told: Result = {"files": found.files, "files_read": found.read, "bytes_read": found.bytes, "problems": 0}
    if not found.read:
        told["compared"] = "records, listing and sizes; no chunk was read, --read-data reads all and --sample 5% some"
    if log.growths(path, "plan") > log.growths(path, "commit"):
        told["growth"] = "begun and not sealed; the `kcdcache precompute` that began it resumes it"
    return told


def _run(command: VerifyCommand) -> Result:
    found = runs_check.check(command.path)
    _require_none(command.path, found.problems)
    cut = {"cut_short": list(found.unfinished)} if found.unfinished else {}
    return found.counts | {"finished": found.finished, "problems": 0} | cut


def _condensed(command: VerifyCommand) -> Result:
    path = command.path
    _require_none(path, condensed_set.problems(path, share=_share(command), seed=command.sample_seed))
    opened = condensed_set.open(path)
    return {"rows": opened.knowledge.plan.count, "kept": len(opened.manifest), "problems": 0}


def _network(command: VerifyCommand) -> Result:
    weights.load_network(command.path.with_suffix(".json"))
    return {"problems": 0}


def _share(command: VerifyCommand) -> float:
    """Return the share of the chunk files that is read and hashed, in [0, 1]."""
    return 1.0 if command.read_data else parse_share(command.sample) if command.sample else 0.0


def _require_none(path: Path, problems: Sequence[str]) -> None:
    if problems:
        shown = "\n  ".join(problems[:20])
        raise CorruptionError(f"{path}: {len(problems)} problems\n  {shown}")


CHECKS: Mapping[str, Callable[[VerifyCommand], Result]] = {
    "condensed": _condensed,
    "store": _store,
    "run": _run,
    "manifest": lambda command: {"rows": len(manifest.read(command.path)), "problems": 0},
    "values": lambda command: {"rows": show.inspect(command.path)["samples"], "problems": 0},
    "network": _network,
}
"""kind -> how it is checked"""
