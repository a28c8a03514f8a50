"""`condense`: from a values file to a manifest file; of the knowledge it reads only the store's small records."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from kcdcache.commands import Result
from kcdcache.condense import large, manifest, ranking, streamed, summary, value_files
from kcdcache.condense.schedule import kept_count
from kcdcache.condense.value_files import Source
from kcdcache.errors import LockedError, MismatchError
from kcdcache.files import atomic, parquet
from kcdcache.files.atomic import create_exclusive
from kcdcache.progress import Progress, silent
from kcdcache.report import show
from kcdcache.settings import CondenseCommand
from kcdcache.store import identity, log

BASE_BYTES, BYTES_A_ROW, SECONDS_A_MILLION, SECONDS_A_MILLION_BEYOND = 400 * 2**20, 11.5, 0.6, 1.4
"""memory whatever the size, bytes of a manifest's row, and time on two cores of 2026; for the estimates of a dry run"""
BYTES_OTHERWISE = 32
"""memory for each sample of rankings at random or by class"""


def run(
    command: CondenseCommand,
    progress: Progress = silent,
    dry_run: bool = False,
    held: int = value_files.HELD_SAMPLES,
) -> Result:
    """Turn values into the next manifest; return its summary. Needs no torch, no zarr and no images.

    Values of up to `held` samples are held in memory; of more they are read again instead. What takes more memory than
    --memory-gb is planned by DuckDB with files beside --out. The bytes are the same in each case.

    Raises:
        MismatchError: values or previous manifest belong to other knowledge than the store's.
        LockedError: something else lies at the place of the new manifest.
        SettingsError: it takes more memory than --memory-gb allows, and DuckDB is missing.
    """
    show.require_ids((path for path in (command.store, command.values, command.previous) if path), command.expect_id)
    knowledge = identity.read_store_identity(command.store)
    count = knowledge.data.count
    sizes = {**estimate(command, count), "out": str(command.out)}
    if dry_run and _is_large(command, count):
        return {"would": "condense", **sizes}
    with _values(command, count, held) as (source, document):
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
        if dry_run:
            plan = _plan(command, knowledge, source)
            return {"would": "condense", **streamed.write(plan, source, None, **facts), **note, **sizes}
        return {**_made(command, knowledge, source, facts), **note}


def estimate(command: CondenseCommand, count: int) -> Result:
    """Return what condensing `count` samples takes: memory, bytes on the disk beside the manifest, and time."""
    beyond = _is_large(command, count)
    memory = max(large.LEAST_BYTES, int(command.memory_gb * 10**9)) + manifest.BYTES_A_SAMPLE * count
    spilled = large.SPILLED_A_SAMPLE * count if beyond else 0
    return {
        "samples": count,
        "memory_bytes": BASE_BYTES + (memory if beyond else _bytes_of_samples(command, count)),
        "temporary_bytes": spilled + round(BYTES_A_ROW * kept_count(command.keep, count)),
        "seconds_about": round((SECONDS_A_MILLION_BEYOND if beyond else SECONDS_A_MILLION) * count / 10**6, 1),
    }


def _is_large(command: CondenseCommand, count: int) -> bool:
    return _bytes_of_samples(command, count) > command.memory_gb * 10**9


def _values(command: CondenseCommand, count: int, held: int) -> AbstractContextManager[value_files.Opened]:
    if _is_large(command, count):
        return value_files.streamed(command.values, count)
    return value_files.opened(command.values, count, held)


def _bytes_of_samples(command: CondenseCommand, count: int) -> int:
    plain = command.rules.ranking == "value" and not command.rules.stratify
    return ((ranking.BYTES_A_SAMPLE if plain else BYTES_OTHERWISE) + manifest.BYTES_A_SAMPLE) * count


def _plan(command: CondenseCommand, knowledge: identity.Knowledge, source: Source) -> ranking.Plan:
    previous = None if command.previous is None else manifest.read(command.previous, knowledge.data.count)
    if previous is not None:
        manifest.require_knowledge(previous, knowledge.knowledge_id)
    return summary.plan(
        source,
        command.rules,
        count=knowledge.data.count,
        stage=_stage(command, previous.stage if previous else None),
        keep=command.keep,
        previous=previous,
        excluded=log.read_skipped(command.store),
    )


def _made(command: CondenseCommand, knowledge: identity.Knowledge, source: Source, facts: dict[str, Any]) -> Result:
    """Plan and write a manifest; with a folder beside it for parts and for what memory does not hold."""
    beyond, several = _is_large(command, knowledge.data.count), knowledge.data.count > command.partition_rows
    with ExitStack() as held:
        place = held.enter_context(atomic.beside(command.out)) if beyond or several else command.out
        plan: streamed.Planned = (
            held.enter_context(_large_plan(command, knowledge, source, place / "spill"))
            if beyond
            else _plan(command, knowledge, source)
        )
        if several:
            return _in_parts(command, plan, source, facts, place / "set")
        return _write_once(command.out, lambda sink: streamed.write(plan, source, sink, **facts), plan.count)


@contextmanager
def _large_plan(
    command: CondenseCommand, knowledge: identity.Knowledge, source: Source, folder: Path
) -> Iterator[large.Tabled]:
    count, before = knowledge.data.count, None
    if command.previous is not None:
        before = manifest.read_document(command.previous, count)
        manifest.require_document(before, knowledge.knowledge_id)
    with large.planned(
        source,
        command.rules,
        count=count,
        stage=_stage(command, before["stage"] if before else None),
        keep=command.keep,
        previous=command.previous,
        before=before,
        excluded=log.read_skipped(command.store),
        folder=folder,
        memory_bytes=command.memory_gb * 10**9,
    ) as plan:
        yield plan


def _stage(command: CondenseCommand, before: int | None) -> int:
    if command.stage is not None:
        return command.stage
    return 1 if before is None else before + 1


def _in_parts(
    command: CondenseCommand, plan: streamed.Planned, source: Source, facts: dict[str, Any], made: Path
) -> Result:
    """Write a manifest as a folder of parts, at first named `made`."""
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


def _write_once(path: Path, write: Callable[[BinaryIO | None], dict[str, Any]], most_rows: int) -> Result:
    """Write a manifest, or accept that the same one lies there, put by whom and whenever; return summary and which."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made: list[dict[str, Any]] = []

    def fill(temporary: Path) -> None:
        with open(temporary, "wb") as sink:
            made.append(write(sink))

    there = path.exists()
    if not there:
        try:
            create_exclusive(path, fill)
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
