"""`verify`: check files for damage, recompute teacher outputs, and repair stores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from kcdcache.commands import Result
from kcdcache.commands.checks import parse_share
from kcdcache.condensation import manifest
from kcdcache.datasets.datasets import Dataset
from kcdcache.errors import CorruptionError, SettingsError, require_same
from kcdcache.export import condensed_set
from kcdcache.export.condensed_set import load_data
from kcdcache.networks import weights
from kcdcache.progress import Progress, silent
from kcdcache.report import show
from kcdcache.runs import check as runs_check
from kcdcache.settings import MachineSettings, VerifyCommand, make
from kcdcache.store import check as store_check
from kcdcache.store import identity, log, plan, reader
from kcdcache.store.identity import Knowledge
from kcdcache.teacher import precompute, repair, teacher
from kcdcache.teacher.teacher import Teacher, load_again

TOLERANCE = 2e-3
"""largest |recomputed - stored| / (1 + |stored|) between machines or versions: about one unit in the last place of
float16 at the largest gap to the row's maximum"""


def run(command: VerifyCommand, progress: Progress = silent) -> Result:
    """Return what was checked, or with --repair what was replaced.

    A store is checked against its records and listing, its chunk files as far as requested, with --data against the
    data, and with a teacher too by recomputing some points. Everything else is read and checked against its digests.

    Raises:
        CorruptionError: damage was found; lists all of it.
        MismatchError: the id is not the expected one, or teacher or data are not those of the store.
        SettingsError: --data, --teacher or --repair were given for something that is not a store.
    """
    path, taught = command.path, command.teaching.teacher is not None
    show.require_ids([path], [command.expect_id] if command.expect_id else None)
    if command.repair:
        return _repaired(command, progress)
    kind = show.kind_of(path)
    result = {"kind": kind, "path": str(path), "id": show.id_of(path), **CHECKS[kind](command, progress)}
    if not taught and command.data is None:
        return result
    if kind != "store" or command.data is None:
        raise SettingsError("to compute points again give a store, its --teacher and its --data")
    knowledge, data = reader.open(path), load_data(command.data)
    store_check.check_data(knowledge, data)
    result["data"] = "the store's"
    return result | {"recomputed": _recompute(command, knowledge, data, progress)._asdict()} if taught else result


def verify(path: Path, **given: Any) -> Result:
    """Call `run` for a path; other settings of `kcdcache verify` are given by name."""
    return run(make(VerifyCommand, {"path": path, **given}))


def _repaired(command: VerifyCommand, progress: Progress) -> Result:
    """Repair a store, check all of it, and return what was replaced."""
    path = command.path
    if (kind := show.kind_of(path)) != "store":
        raise SettingsError(f"--repair makes stores again, {path} is a {kind}: {REMEDIES[kind]}")
    means = None
    if command.teaching.teacher is not None and command.data is not None:
        data = load_data(command.data)
        means = repair.Means(data=data, network=_teacher(command, data, repair.knowledge_of(path)))
    replaced = repair.repair(path, means, progress)
    whole = command.model_copy(update={"read_data": True})
    return {"kind": kind, "path": str(path), "repaired": replaced, **_store(whole, progress)}


REMEDIES: Mapping[str, str] = {
    "condensed": "fetch the folder again, or export it again into a new one",
    "run": "run its command again, which resumes from the checkpoint; where that is damaged, into a new folder",
    "manifest": "condense again from the values it was made from",
    "values": "run the command of its run again",
    "network": "run its `fit` or `train` again, or fetch the file again",
}


class Recheck(NamedTuple):
    """Result of running the teacher again."""

    points: int
    differing: int
    """points that differ in any stored bit"""
    largest: float
    """largest |difference| / (1 + |stored value|); 0 on the same kind of machine and versions"""


def _teacher(command: VerifyCommand, data: Dataset, knowledge: Knowledge) -> Teacher:
    return load_again(command.teaching, data, knowledge, command.path, MachineSettings(device=command.device))


def _recompute(command: VerifyCommand, knowledge: reader.Store, data: Dataset, progress: Progress) -> Recheck:
    network = _teacher(command, data, knowledge.knowledge)
    found = recheck(knowledge, data, network, points=command.points, seed=command.sample_seed, progress=progress)
    if found.largest > TOLERANCE:
        raise CorruptionError(
            f"the teacher's outputs differ from those in {knowledge.path}: {found.differing} of {found.points} points "
            f"differ, up to {found.largest:.3g} (relative; other hardware or versions explain at most {TOLERANCE})"
        )
    if identity.PARAMETERS in knowledge.kept:
        own = teacher.filter_profiles(network.module)
        if bad := identity.parameters_problem(knowledge.path, knowledge.knowledge, own):
            raise CorruptionError(bad)
    return found


def recheck(
    knowledge: reader.Store,
    data: Dataset,
    network: Teacher,
    *,
    points: int,
    seed: int = 0,
    progress: Progress = silent,
) -> Recheck:
    """Run the teacher again on random batches and compare with the store; raises MismatchError for another teacher."""
    if knowledge.knowledge.mixes is not None:
        raise SettingsError(
            f"{knowledge.path} holds outputs on a manifest's mixes; only plain views are computed again"
        )
    require_same(
        knowledge.knowledge.document()["teacher"],
        replace(knowledge.knowledge, teacher=network.identity).document()["teacher"],
        (f"the teacher of {knowledge.path}", "the given teacher"),
        "give the teacher the store was made with",
    )
    parts = plan.parts(knowledge.plan)
    batches = [(part.view, np.arange(*bounds)) for part in parts for bounds in knowledge.plan.batches(part)]
    found = Recheck(0, 0, 0.0)
    for number in np.random.Generator(np.random.Philox(seed)).permutation(len(batches)):
        if found.points >= points:
            break
        more = _compared(knowledge, data, network, *batches[number])
        found = Recheck(found.points + more.points, found.differing + more.differing, max(found.largest, more.largest))
        progress("recompute", min(found.points, points), points, f"{found.differing} differ")
    return found


def _compared(
    knowledge: reader.Store, data: Dataset, network: Teacher, view: int, batch: Int64[np.ndarray, " batch"]
) -> Recheck:
    """Compare a teacher batch without its skipped samples."""
    skips = np.isin(batch, knowledge.skipped)
    index, differing, largest = batch[~skips], np.zeros((~skips).sum(), bool), 0.0
    if skips.all():
        return Recheck(0, 0, 0.0)
    pixels = precompute.view_pixels(data, knowledge.knowledge.views, batch, view, network.device)
    for field, fresh in teacher.outputs(network, pixels, list(knowledge.fields)).items():
        form, held = knowledge.fields[field], knowledge.load(view, index, (field,))
        encoded = form.encode(fresh, int(batch[0]), torch.from_numpy(skips).to(fresh.device))
        again = {name: rows[~skips] for name, rows in encoded.items()}
        for name, rows in again.items():
            differing |= (rows.view(np.uint8) != held[name].view(np.uint8)).reshape(len(index), -1).any(1)
        stored, now = (form.decode({n: torch.from_numpy(r) for n, r in side.items()}) for side in (held, again))
        largest = max(largest, float(((stored - now).abs() / (1 + stored.abs())).max()))
    return Recheck(len(index), int(differing.sum()), largest)


def _store(command: VerifyCommand, progress: Progress) -> Result:
    path = command.path
    found = store_check.verify(path, share=_share(command), seed=command.sample_seed, progress=progress)
    _require_none(path, found.problems)
    result: Result = {"files": found.files, "files_read": found.read, "bytes_read": found.bytes, "problems": 0}
    if not found.read:
        result["compared"] = "records, listing and sizes; no chunk was read, --read-data reads all and --sample 5% some"
    if log.growths(path, "plan") > log.growths(path, "commit"):
        result["growth"] = "begun and not sealed; the `kcdcache precompute` that began it resumes it"
    return result


def _run(command: VerifyCommand, progress: Progress) -> Result:
    found = runs_check.check(command.path)
    _require_none(command.path, found.problems)
    cut = {"cut_short": list(found.unfinished)} if found.unfinished else {}
    return found.counts | {"finished": found.finished, "problems": 0} | cut


def _condensed(command: VerifyCommand, progress: Progress) -> Result:
    path = command.path
    _require_none(path, condensed_set.problems(path, share=_share(command), seed=command.sample_seed))
    opened = condensed_set.open(path)
    return {"rows": opened.knowledge.plan.count, "kept": len(opened.manifest), "problems": 0}


def _network(command: VerifyCommand, progress: Progress) -> Result:
    weights.load_network(command.path.with_suffix(".json"))
    return {"problems": 0}


def _share(command: VerifyCommand) -> float:
    """Return the fraction of chunk files to read and hash, in [0, 1]."""
    return 1.0 if command.read_data else parse_share(command.sample) if command.sample else 0.0


def _require_none(path: Path, problems: Sequence[str]) -> None:
    if problems:
        shown = "\n  ".join(problems[:20])
        raise CorruptionError(f"{path}: {len(problems)} problems\n  {shown}")


CHECKS: Mapping[str, Callable[[VerifyCommand, Progress], Result]] = {
    "condensed": _condensed,
    "store": _store,
    "run": _run,
    "manifest": lambda command, progress: {"rows": len(manifest.read(command.path)), "problems": 0},
    "values": lambda command, progress: {"rows": show.inspect(command.path)["samples"], "problems": 0},
    "network": _network,
}
