"""The teacher's outputs on a manifest's mixed images, in a small store beside the manifest (mix_target = requery)."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kcdcache.condense import manifest
from kcdcache.condense.manifest import Manifest
from kcdcache.data.datasets import Dataset
from kcdcache.errors import MismatchError, require_same
from kcdcache.progress import Progress, silent
from kcdcache.store import log, reader
from kcdcache.store.plan import plan_store
from kcdcache.teacher import precompute, teacher
from kcdcache.training import batches


def write(
    path: Path,
    chosen: Manifest,
    knowledge: reader.Store,
    data: Dataset,
    network: teacher.Teacher,
    *,
    fields: Sequence[str],
    view_numbers: Sequence[int],
    mix: str = "convex",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the teacher's outputs on the mixed images of a manifest's K_Aug, in the given views, into a small store.

    Row j is the j-th K_Aug point by index; place s on the view axis is view_numbers[s].

    Raises:
        MismatchError: the teacher is not the one of the store, the manifest is of other knowledge, or another store
            lies at `path`.
    """
    require_own(network, knowledge)
    if serves(path, chosen, mix, view_numbers, fields):
        return precompute.describe(path)
    rows = np.flatnonzero(chosen.mixed)
    if missing := [field for field in fields if field not in knowledge.fields]:
        held = ", ".join(knowledge.fields)
        raise MismatchError(f"the store at {knowledge.path} has no field '{missing[0]}', only {held}")
    forms = [knowledge.fields[field] for field in fields]
    plan = plan_store(len(rows), len(view_numbers), forms, batch_size=knowledge.plan.batch_size)
    mixes = {"manifest": chosen.digest, "mix": mix, "views": list(view_numbers)}
    with batches.connect(data, knowledge, chosen, fields=(), mixing=batches.Mixing(mix=mix)) as source:

        def outputs(slot: int, start: int, stop: int) -> dict[str, Tensor]:
            pixels = batches.mixed_views(source, rows[start:stop], view_numbers[slot], network.device)
            return teacher.outputs(network, pixels, fields)

        index = chosen.index[rows]
        job = precompute.Job(
            outputs=outputs,
            labels=data.train.labels[index],
            digests=data.train.digests()[index],
            device=network.device,
        )
        precompute.fill(path, replace(knowledge.knowledge, mixes=mixes), plan, job, progress)
    return precompute.describe(path)


def require_own(network: teacher.Teacher, knowledge: reader.Store) -> None:
    """Do nothing if a teacher is the one whose outputs a store holds.

    Raises:
        MismatchError: it is another one; names the first difference.
    """
    names = (f"the teacher of {knowledge.path}", "--teacher")
    known, given = (asdict(one) for one in (knowledge.knowledge.teacher, network.identity))
    require_same(known, given, names, "give the store's own teacher, or none where no mixes are asked for")


def path_for(file: Path) -> Path:
    """Return where the teacher's outputs on a manifest's mixes lie: beside the manifest."""
    return file.with_suffix(".requery")


def write_for(
    file: Path,
    knowledge: reader.Store,
    data: Dataset,
    network: teacher.Teacher,
    *,
    fields: Sequence[str],
    mix: str,
    progress: Progress = silent,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write the teacher's outputs on a manifest's mixes, in all cached views, beside the manifest.

    Raises:
        MismatchError: the manifest was made for other knowledge, or has no mixes.
    """
    chosen = manifest.read(file, knowledge.count)
    manifest.require_knowledge(chosen, knowledge.knowledge_id)
    if not chosen.mixed.any():
        raise MismatchError(f"{file} has no mixed points (K_Aug is empty): there is nothing to ask the teacher again")
    path = path_for(file)
    points = int(chosen.mixed.sum()) * knowledge.views
    if dry_run:
        return {"would": "requery", "points": points, "store": str(path)}
    numbers = range(knowledge.views)
    return write(
        path, chosen, knowledge, data, network, fields=fields, view_numbers=numbers, mix=mix, progress=progress
    )


def serves(path: Path, chosen: Manifest, mix: str, view_numbers: Sequence[int], fields: Sequence[str]) -> bool:
    """Return whether a sealed store at `path` has the outputs on a manifest's mixes, perhaps in more views."""
    if not log.commit_path(path, 0).exists():
        return False
    held = reader.open(path)
    there = held.knowledge.mixes or {}
    same = there.get("manifest") == chosen.digest and there.get("mix") == mix
    return same and set(view_numbers) <= set(there["views"]) and set(fields) <= set(held.fields)
