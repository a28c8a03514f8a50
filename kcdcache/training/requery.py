"""The teacher's outputs on a manifest's mixed images, in a small store beside the manifest (mix_target = requery)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
from torch import Tensor

from kcdcache.condensation.manifest import Manifest
from kcdcache.datasets.datasets import Dataset
from kcdcache.errors import MismatchError, require_known, require_same
from kcdcache.progress import Progress, silent
from kcdcache.settings import Mix
from kcdcache.store import log, reader
from kcdcache.store.plan import plan_store
from kcdcache.teacher import precompute, teacher
from kcdcache.training import batches


@dataclass(frozen=True, kw_only=True)
class Mixes:
    """The mixed images of a manifest's K_Aug in some views, and the teacher's fields wanted for them."""

    manifest: Manifest
    fields: Sequence[str]
    views: Sequence[int]
    mix: Mix = "convex"

    def __post_init__(self) -> None:
        require_known("mix", self.mix, get_args(Mix))

    def held_at(self, path: Path) -> bool:
        """Return whether a sealed store at `path` has the teacher's outputs on these mixes, perhaps in more views."""
        if not log.commit_path(path, 0).exists():
            return False
        held = reader.open(path)
        there = held.knowledge.mixes or {}
        same = there.get("manifest") == self.manifest.digest and there.get("mix") == self.mix
        return same and set(self.views) <= set(there["views"]) and set(self.fields) <= set(held.fields)


def write(
    path: Path,
    mixes: Mixes,
    knowledge: reader.Store,
    data: Dataset,
    network: teacher.Teacher,
    progress: Progress = silent,
) -> None:
    """Write the teacher's outputs on mixed images into a small store, unless it has them.

    Row j is the j-th K_Aug point by index; position s on the view axis is views[s]. Raises MismatchError if the teacher
    is not the store's, the manifest is for other knowledge, or there is another store at `path`.
    """
    require_own(network, knowledge)
    if mixes.held_at(path):
        return
    chosen, fields = mixes.manifest, mixes.fields
    rows = np.flatnonzero(chosen.mixed)
    if missing := [field for field in fields if field not in knowledge.fields]:
        held = ", ".join(knowledge.fields)
        raise MismatchError(f"the store at {knowledge.path} has no field '{missing[0]}', only {held}")
    forms = [knowledge.fields[field] for field in fields]
    plan = plan_store(len(rows), len(mixes.views), forms, batch_size=knowledge.plan.batch_size)
    identity = {"manifest": chosen.digest, "mix": mixes.mix, "views": list(mixes.views)}
    with batches.connect(data, knowledge, chosen, fields=(), mixing=batches.Mixing(mix=mixes.mix)) as source:

        def outputs(slot: int, start: int, stop: int) -> dict[str, Tensor]:
            pixels = batches.mixed_views(source, rows[start:stop], mixes.views[slot], network.device)
            return teacher.outputs(network, pixels, fields)

        index = chosen.index[rows]
        labels, digests = data.train.labels[index], data.train.digests()[index]
        job = precompute.Job(outputs=outputs, labels=labels, digests=digests, device=network.device)
        precompute.fill(path, replace(knowledge.knowledge, mixes=identity), plan, job, progress)


def require_own(network: teacher.Teacher, knowledge: reader.Store) -> None:
    """Raise MismatchError, with the first difference, unless the teacher is the store's."""
    names = (f"the teacher of {knowledge.path}", "--teacher")
    known, given = (asdict(one) for one in (knowledge.knowledge.teacher, network.identity))
    require_same(known, given, names, "give the store's own teacher, or none where no mixes are requested")


def path_for(file: Path) -> Path:
    """Return the path of the store of a manifest's mixes, beside the manifest."""
    return file.with_suffix(".requery")
