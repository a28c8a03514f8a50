"""From a values file to a manifest file, standalone: of the knowledge it reads only the store's small records."""

import glob
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from kcdcache import condense, identity, inspection, ledger, manifest, ranking, rules, streamed, values
from kcdcache.commands import CondenseCommand
from kcdcache.config import CondenseSettings, part
from kcdcache.errors import LockedError, MismatchError
from kcdcache.files import TEMPORARY_MARK, create_filled, process_runs
from kcdcache.schedule import kept_count

MOST_TRIED = 2**28
"""samples up to which a dry run does everything but write; of more it only estimates"""
BASE_BYTES, BYTES_A_ROW, SECONDS_A_MILLION = 400 * 2**20, 11.5, 0.6
"""memory whatever the size, bytes of a manifest's row, and time on two cores of 2026; for the estimates of a dry run"""


def run(command: CondenseCommand, dry_run: bool = False, held: int = values.HELD_SAMPLES) -> dict[str, Any]:
    """Turn values into the next manifest; return its summary. Needs no torch, no zarr and no images.

    Values of up to `held` samples are held in memory; of more they are read again instead, to the same bytes.

    Raises:
        MismatchError: values or previous manifest belong to other knowledge than the store's.
        LockedError: something else lies at the place of the new manifest.
    """
    inspection.require_ids(
        (path for path in (command.store, command.values, command.previous) if path), command.expect_id
    )
    knowledge = identity.read_store_identity(command.store)
    if dry_run and knowledge.data.count > MOST_TRIED:
        return {"would": "condense", **estimate(command.keep, knowledge.data.count), "out": str(command.out)}
    with values.opened(command.values, knowledge.data.count, held) as (source, document):
        if document is not None and document["knowledge_id"] != knowledge.knowledge_id:
            raise MismatchError(
                f"the values in {command.values} were measured on knowledge {document['knowledge_id']}, "
                f"the store at {command.store} holds {knowledge.knowledge_id}; give the values' own store"
            )
        plan = _plan(command, knowledge, source)
        note = {"values_from": "another tool" if document is None else "kcdcache"}

        def write(sink: BinaryIO | None) -> dict[str, Any]:
            return streamed.write(
                plan, source, sink, knowledge_id=knowledge.knowledge_id, data_digest=knowledge.data.digest,
                classes=len(knowledge.data.classes),
            )  # fmt: skip

        if dry_run:
            sizes = estimate(command.keep, knowledge.data.count)
            return {"would": "condense", **write(None), **note, **sizes, "out": str(command.out)}
        return {**_write_once(command.out, write, knowledge.data.count), **note, "out": str(command.out)}


def estimate(keep: float, count: int) -> dict[str, Any]:
    """Return what condensing `count` samples takes: memory, bytes beside the manifest while it is written, and time."""
    kept = kept_count(keep, count)
    return {
        "samples": count,
        "memory_bytes": BASE_BYTES + (ranking.BYTES_A_SAMPLE + rules.BYTES_A_SAMPLE) * count,
        "temporary_bytes": round(BYTES_A_ROW * kept),
        "seconds_about": round(SECONDS_A_MILLION * count / 10**6, 1),
    }


def _plan(command: CondenseCommand, knowledge: identity.Knowledge, source: values.Source) -> condense.Plan:
    previous = None if command.previous is None else manifest.read(command.previous, knowledge.data.count)
    if previous is not None:
        manifest.require_knowledge(previous, knowledge.knowledge_id)
    return condense.plan(
        source,
        part(CondenseSettings, command),
        count=knowledge.data.count,
        stage=command.stage if command.stage is not None else (previous.stage + 1 if previous else 1),
        keep=command.keep,
        previous=previous,
        excluded=ledger.read_skipped(command.store),
    )


def _write_once(path: Path, write: Callable[[BinaryIO | None], dict[str, Any]], most_rows: int) -> dict[str, Any]:
    """Write a manifest, or accept that the same one lies there, put by whom and whenever; return summary and which."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made: list[dict[str, Any]] = []

    def fill(temporary: Path) -> None:
        with open(temporary, "wb") as sink:
            made.append(write(sink))

    there = path.exists()
    if not there:
        try:
            create_filled(path, fill)
        except LockedError:  # another process was first, perhaps with the same
            there = True
    _remove_orphans(path)
    told = made[0] if made else write(None)
    if there and manifest.read_digest(path, most_rows) != told["digest"]:
        raise LockedError(f"{path} holds another manifest; manifests are never overwritten: give another --out")
    return {**told, "already": there}


def _remove_orphans(path: Path) -> None:
    """Delete what killed writers of this file left beside it; those that still run may need theirs."""
    for left in path.parent.glob(f"{glob.escape(path.name)}{TEMPORARY_MARK}*"):
        process = left.name.rpartition(TEMPORARY_MARK)[2].partition("-")[0]
        if process.isdecimal() and not process_runs(int(process)):
            left.unlink(missing_ok=True)
