"""From a values file to a manifest file, standalone: of the knowledge it reads only the store's small records."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kcdcache import (
    boxes,
    condense,
    identity,
    inspection,
    ledger,
    manifest,
    partitioned,
    ranking,
    rules,
    scratch,
    sources,
    spread,
    streamed,
)
from kcdcache.commands import CondenseCommand
from kcdcache.config import CondenseSettings, part
from kcdcache.errors import LockedError, MismatchError
from kcdcache.files import create_filled
from kcdcache.schedule import kept_count
from kcdcache.team import ALONE, Team
from kcdcache.values import Source

MOST_TRIED = 2**28
"""samples up to which a dry run does everything but write; of more it only estimates"""
BASE_BYTES, BYTES_A_ROW, SECONDS_A_MILLION = 400 * 2**20, 11.5, 0.6
"""memory whatever the size, bytes of a manifest's row, and time on two cores of 2026; for the estimates of a dry run"""
BYTES_OTHERWISE = 32
"""memory for each sample of rankings at random or by class, where they lie in memory"""


def run(
    command: CondenseCommand, dry_run: bool = False, held: int = sources.HELD_SAMPLES, team: Team = ALONE
) -> dict[str, Any]:
    """Turn values into the next manifest; return its summary. Needs no torch, no zarr and no images.

    Values of up to `held` samples are held in memory; of more they are read again instead. Several processes, or one
    that may not take the memory, share the samples out. The bytes are the same in each case.

    Raises:
        MismatchError: values or previous manifest belong to other knowledge than the store's.
        LockedError: something else lies at the place of the new manifest.
    """
    if team.first:
        inspection.require_ids(
            (path for path in (command.store, command.values, command.previous) if path), command.expect_id
        )
    knowledge = identity.read_store_identity(command.store)
    each, count = _boxes(command, knowledge.data.count, team), knowledge.data.count
    sizes = {**estimate(command, count, team), "out": str(command.out)}
    if dry_run and (each or count > MOST_TRIED):
        return {"would": "condense", **sizes}
    with _values(command, count, held, each, team) as (source, document):
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
        if not dry_run and (each or count > command.partition_rows):
            return {**_in_parts(command, knowledge, source, each, team, facts), **note}
        plan = _plan(command, knowledge, source)

        def write(sink: BinaryIO | None) -> dict[str, Any]:
            return streamed.write(plan, source, sink, **facts)

        if dry_run:
            return {"would": "condense", **write(None), **note, **sizes}
        return {**_write_once(command.out, write, count), **note}


def estimate(command: CondenseCommand, count: int, team: Team = ALONE) -> dict[str, Any]:
    """Return what condensing `count` samples takes, in each of a team's processes.

    Memory, bytes on the disk beside the manifest while it is made (of all processes), and time.
    """
    kept, each = kept_count(command.keep, count), _boxes(command, count, team)
    plain, share = _is_plain(command), -(-count // (team.world * max(each, 1)))
    memory = (ranking.BYTES_A_SAMPLE if plain else BYTES_OTHERWISE) * count + rules.BYTES_A_SAMPLE * count
    if each:
        memory = (spread.BYTES_A_SAMPLE if plain else spread.BYTES_OTHERWISE) * share
    spilled = (spread.SPILLED_A_SAMPLE if plain else spread.SPILLED_OTHERWISE) * count if each > 1 else 0
    return {
        "samples": count,
        "processes": team.world,
        "shares": max(each, 1) * team.world,
        "memory_bytes": BASE_BYTES + memory,
        "temporary_bytes": max(spilled, round(BYTES_A_ROW * kept)),
        "seconds_about": round(SECONDS_A_MILLION * count / 10**6 / team.world, 1),
    }


def _is_plain(command: CondenseCommand) -> bool:
    return command.ranking == "value" and not command.stratify


def _boxes(command: CondenseCommand, count: int, team: Team) -> int:
    """Return into how many shares each process cuts its samples; 0 where one process holds all in memory."""
    room = command.memory_gb * 10**9
    plain = _is_plain(command)
    alone = (ranking.BYTES_A_SAMPLE + rules.BYTES_A_SAMPLE if plain else BYTES_OTHERWISE) * count
    if team.world == 1 and alone <= room:
        return 0
    shared = (spread.BYTES_A_SAMPLE if plain else spread.BYTES_OTHERWISE) * count / team.world
    return max(1, math.ceil(shared / room))


def _values(
    command: CondenseCommand, count: int, held: int, each: int, team: Team
) -> AbstractContextManager[sources.Opened]:
    if each:
        return sources.shared(command.values, count, team)
    return sources.opened(command.values, count, held)


def _plan(command: CondenseCommand, knowledge: identity.Knowledge, source: Source) -> condense.Plan:
    previous = None if command.previous is None else manifest.read(command.previous, knowledge.data.count)
    if previous is not None:
        manifest.require_knowledge(previous, knowledge.knowledge_id)
    return condense.plan(
        source,
        part(CondenseSettings, command),
        count=knowledge.data.count,
        stage=_stage(command, previous.stage if previous else None),
        keep=command.keep,
        previous=previous,
        excluded=ledger.read_skipped(command.store),
    )


def _stage(command: CondenseCommand, before: int | None) -> int:
    if command.stage is not None:
        return command.stage
    return 1 if before is None else before + 1


def _in_parts(
    command: CondenseCommand, knowledge: identity.Knowledge, source: Source, each: int, team: Team,
    facts: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Write a manifest part by part, each process its own; as a folder, or in the end as one file."""
    count, out = knowledge.data.count, command.out
    with scratch.beside(out, team) as place:
        made = place / "set"
        made.mkdir(exist_ok=True)
        unit = command.partition_rows
        if count <= unit:  # one file in the end; until then a part for each share
            unit = -(-count // (team.world * each))
        spans, spill = partitioned.spans(count, unit), None
        if each:
            spill = boxes.Spill(place / f"spill-{team.rank}") if each > 1 else None
            within = boxes.Boxes(team, each, spill)
            bounds = spread.bounds_of(count, unit, within.number)
            plan: streamed.Planned = _shared_plan(command, knowledge, source, within, bounds)
            start, stop = bounds[within.own.start], bounds[within.own.stop]
            mine = [span for span in spans if start <= span.first < stop]
        else:
            plan, mine = _plan(command, knowledge, source), spans
        told, content, seal = streamed.write_parts(
            plan, source, made, mine, partition_rows=unit, team=team,
            checks=rules.Rows(count) if each else rules.Blocks(count), **facts,
        )  # fmt: skip
        if team.first and count <= command.partition_rows:
            told = _write_once(out, lambda sink: streamed.join_parts(plan, content, made, spans, sink), count)
        elif team.first:
            told |= {"already": _placed(made, seal, out, count)}
        temporary = team.total(np.array([spill.most if spill else 0]))[0]
        return {**told, "shares": max(each, 1) * team.world, "temporary_bytes": int(temporary)}


def _shared_plan(
    command: CondenseCommand, knowledge: identity.Knowledge, source: Source, within: boxes.Boxes, bounds: np.ndarray
) -> spread.Shared:
    count, previous, stage = knowledge.data.count, None, None
    if command.previous is not None:
        start, stop = bounds[[within.own.start, within.own.stop]].tolist()
        document, index = manifest.read_part(command.previous, count, start, stop, checked=within.team.first)
        manifest.require_document(document, knowledge.knowledge_id)
        previous, stage = spread.Before(document["digest"], document["rows"], index), document["stage"]
    return spread.plan(
        source,
        part(CondenseSettings, command),
        count=count,
        stage=_stage(command, stage),
        keep=command.keep,
        previous=previous,
        excluded=ledger.read_skipped(command.store),
        within=within,
        bounds=bounds,
    )


def _placed(made: Path, seal: partitioned.Seal, out: Path, most_rows: int) -> bool:
    """Seal a folder of parts and put it in its place; return whether the same set lies there already.

    Raises:
        LockedError: another one does.
    """
    partitioned.seal(made, seal)
    try:
        scratch.place(made, out, partitioned.SEAL)
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
    scratch.remove_orphans(path)
    told = made[0] if made else write(None)
    if there:
        _require_same(path, told["digest"], most_rows)
    return {**told, "already": there}


def _require_same(path: Path, digest: str, most_rows: int) -> None:
    if manifest.read_digest(path, most_rows) != digest:
        raise LockedError(f"{path} holds another manifest; manifests are never overwritten: give another --out")
