"""From a values file to a manifest file, standalone: of the knowledge it reads only the store's small records."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from kcdcache.condense import manifest, ranking, streamed, summary, value_files
from kcdcache.condense.schedule import kept_count
from kcdcache.condense.value_files import Source
from kcdcache.errors import LockedError, MismatchError, SettingsError
from kcdcache.files import atomic, parquet
from kcdcache.files.atomic import create_filled
from kcdcache.report import show
from kcdcache.settings import CondenseCommand, CondenseSettings, part
from kcdcache.store import identity, log

BASE_BYTES, BYTES_A_ROW, SECONDS_A_MILLION = 400 * 2**20, 11.5, 0.6
"""memory whatever the size, bytes of a manifest's row, and time on two cores of 2026; for the estimates of a dry run"""
BYTES_OTHERWISE = 32
"""memory for each sample of rankings at random or by class"""


def run(command: CondenseCommand, dry_run: bool = False, held: int = value_files.HELD_SAMPLES) -> dict[str, Any]:
    """Turn values into the next manifest; return its summary. Needs no torch, no zarr and no images.

    Values of up to `held` samples are held in memory; of more they are read again instead.

    Raises:
        MismatchError: values or previous manifest belong to other knowledge than the store's.
        LockedError: something else lies at the place of the new manifest.
        SettingsError: it takes more memory than --memory-gb allows.
    """
    show.require_ids((path for path in (command.store, command.values, command.previous) if path), command.expect_id)
    knowledge = identity.read_store_identity(command.store)
    count = knowledge.data.count
    sizes = {**estimate(command, count), "out": str(command.out)}
    if (needed := _bytes_of_samples(command, count)) > command.memory_gb * 10**9:
        raise SettingsError(f"condensing {count} samples takes {needed / 10**9:.3g} GB; give more with --memory-gb")
    with value_files.opened(command.values, count, held) as (source, document):
        if document is not None and document["knowledge_id"] != knowledge.knowledge_id:
            raise MismatchError(
                f"the values in {command.values} were measured on knowledge {document['knowledge_id']}, "
                f"the store at {command.store} holds {knowledge.knowledge_id}; give the values' own store"
            )
        note = {"values_from": "another tool" if document is None else "kcdcache", "out": str(command.out)}
        facts: dict[str, Any] = {
            "knowledge_id": knowledge.knowledge_id, "data_digest": knowledge.data.digest,
            "classes": len(knowledge.data.classes),
        }  # fmt: skip
        plan = _plan(command, knowledge, source)

        def write(sink: BinaryIO | None) -> dict[str, Any]:
            return streamed.write(plan, source, sink, **facts)

        if dry_run:
            return {"would": "condense", **write(None), **note, **sizes}
        if count > command.partition_rows:
            return {**_in_parts(command, plan, source, facts), **note}
        return {**_write_once(command.out, write, count), **note}


def estimate(command: CondenseCommand, count: int) -> dict[str, Any]:
    """Return what condensing `count` samples takes: memory, bytes on the disk beside the manifest, and time."""
    return {
        "samples": count,
        "memory_bytes": BASE_BYTES + _bytes_of_samples(command, count),
        "temporary_bytes": round(BYTES_A_ROW * kept_count(command.keep, count)),
        "seconds_about": round(SECONDS_A_MILLION * count / 10**6, 1),
    }


def _bytes_of_samples(command: CondenseCommand, count: int) -> int:
    plain = command.ranking == "value" and not command.stratify
    return ((ranking.BYTES_A_SAMPLE if plain else BYTES_OTHERWISE) + manifest.BYTES_A_SAMPLE) * count


def _plan(command: CondenseCommand, knowledge: identity.Knowledge, source: Source) -> ranking.Plan:
    previous = None if command.previous is None else manifest.read(command.previous, knowledge.data.count)
    if previous is not None:
        manifest.require_knowledge(previous, knowledge.knowledge_id)
    return summary.plan(
        source,
        part(CondenseSettings, command),
        count=knowledge.data.count,
        stage=_stage(command, previous.stage if previous else None),
        keep=command.keep,
        previous=previous,
        excluded=log.read_skipped(command.store),
    )


def _stage(command: CondenseCommand, before: int | None) -> int:
    if command.stage is not None:
        return command.stage
    return 1 if before is None else before + 1


def _in_parts(
    command: CondenseCommand, plan: streamed.Planned, source: Source, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write a manifest as a folder of parts."""
    with atomic.beside(command.out) as place:
        made = place / "set"
        made.mkdir()
        told, seal = streamed.write_parts(plan, source, made, partition_rows=command.partition_rows, **facts)
        return {**told, "already": _placed(made, seal, command.out, plan.count)}


def _placed(made: Path, seal: parquet.Seal, out: Path, most_rows: int) -> bool:
    """Seal a folder of parts and put it in its place; return whether the same set lies there already.

    Raises:
        LockedError: another one does.
    """
    parquet.seal(made, seal)
    try:
        atomic.place(made, out, parquet.SEAL)
    except LockedError:
        _require_same(out, seal.document["digest"], most_rows)
        return True
    return False


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
    atomic.remove_orphans(path)
    told = made[0] if made else write(None)
    if there:
        _require_same(path, told["digest"], most_rows)
    return {**told, "already": there}


def _require_same(path: Path, digest: str, most_rows: int) -> None:
    if manifest.read_digest(path, most_rows) != digest:
        raise LockedError(f"{path} holds another manifest; manifests are never overwritten: give another --out")
