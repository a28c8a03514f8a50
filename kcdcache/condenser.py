"""From a values file to a manifest file, standalone: the store's identity is all it reads of the knowledge."""

from pathlib import Path
from typing import Any

from kcdcache import condense, identity, manifest, values
from kcdcache.config import CondenseCommand, CondenseSettings, part
from kcdcache.errors import LockedError, MismatchError


def run(command: CondenseCommand, dry_run: bool = False) -> dict[str, Any]:
    """Turn values into the next manifest; return its summary. Needs no torch, no zarr and no images.

    Raises:
        MismatchError: values or previous manifest belong to other knowledge than the store's.
        LockedError: something else lies at the place of the new manifest.
    """
    knowledge = identity.read_store_identity(command.store)
    found = values.read(command.values, knowledge.data.count)
    if found.document is not None and found.document["knowledge_id"] != knowledge.knowledge_id:
        raise MismatchError(
            f"the values in {command.values} were measured on knowledge {found.document['knowledge_id']}, "
            f"the store at {command.store} holds {knowledge.knowledge_id}; give the values' own store"
        )
    previous = None if command.previous is None else manifest.read(command.previous, knowledge.data.count)
    if previous is not None:
        manifest.require_knowledge(previous, knowledge.knowledge_id)
    stage = command.stage if command.stage is not None else (previous.stage + 1 if previous else 1)
    made = condense.condense(
        found.values,
        part(CondenseSettings, command),
        knowledge_id=knowledge.knowledge_id,
        count=knowledge.data.count,
        stage=stage,
        keep=command.keep,
        labels=found.labels,
        classes=len(knowledge.data.classes),
        previous=previous,
        data_digest=knowledge.data.digest,
    )
    note = {"values_from": "another tool" if found.foreign else "kcdcache"}
    if dry_run:
        return {"would": "condense", **manifest.summary(made), **note, "out": str(command.out)}
    return manifest.summary(made) | note | {"already": _write_once(command.out, made), "out": str(command.out)}


def _write_once(path: Path, made: manifest.Manifest) -> bool:
    """Write the manifest, or accept that the same one lies there; return whether it did."""
    if path.exists():
        if manifest.read(path).digest == made.digest:
            return True
        raise LockedError(f"{path} holds another manifest; manifests are never overwritten: give another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest.write(path, made)
    return False
