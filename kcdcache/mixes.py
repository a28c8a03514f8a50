"""The teacher's outputs on a manifest's mixes as targets: whether a store holds them, and which row is whose."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kcdcache.identity import require_same
from kcdcache.knowledge import StoredTargets
from kcdcache.manifest import Manifest
from kcdcache.store import Store


def targets(
    mixes: Store, manifest: Manifest, mix: str, fields: Sequence[str], *, memory_bytes: float, folder: Path
) -> StoredTargets:
    """Return the targets of the mixed points: row j of their store is the j-th K_Aug point by index.

    Raises:
        MismatchError: the store holds the outputs on other mixes, or lacks a field.
    """
    held = {key: (mixes.knowledge.mixes or {}).get(key) for key in ("manifest", "mix")}
    names = (f"the mixes of the store at {mixes.path}", "those asked for")
    remedy = "make them with `kcdcache precompute --manifest` for this manifest and mix"
    require_same(held, {"manifest": manifest.digest, "mix": mix}, names, remedy)
    numbers = (mixes.knowledge.mixes or {})["views"]
    index = manifest.index[manifest.mixed]
    return StoredTargets(
        mixes,
        index,
        fields,
        memory_bytes=memory_bytes,
        folder=folder,
        rows=np.arange(len(index)),
        slots={view: slot for slot, view in enumerate(numbers)},
        count=manifest.count,
    )
