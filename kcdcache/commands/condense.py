"""`condense`: from values to a manifest; reads only the small records of the store."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from kcdcache.commands import Result
from kcdcache.condensation import large, manifest, ranking, summary, value_files
from kcdcache.condensation.manifest import Samples
from kcdcache.condensation.schedule import kept_count
from kcdcache.condensation.value_files import Source
from kcdcache.errors import LockedError, MismatchError, NotFoundError
from kcdcache.files import atomic, parquet
from kcdcache.progress import Progress, silent
from kcdcache.report import show
from kcdcache.runs.folder import RunFolder
from kcdcache.settings import CondenseCommand
from kcdcache.store import identity, log

logger = logging.getLogger(__name__)

BASE_BYTES, BYTES_A_ROW, SECONDS_A_MILLION, SECONDS_A_MILLION_BEYOND = 400 * 2**20, 11.5, 0.6, 1.4
"""estimates of a dry run: constant memory, bytes per row of a manifest, and time on two cores of 2026"""
BYTES_OTHERWISE = 32
"""memory per sample for random and stratified rankings"""


def run(
    command: CondenseCommand, progress: Progress = silent, dry_run: bool = False, held: int = value_files.HELD_SAMPLES
) -> Result:
    """Turn values into the next manifest and return its summary, without torch, zarr or images.

    Values of more than `held` samples are not kept in memory but read again. If --memory-gb is not enough, DuckDB is
    used with files next to --out. The bytes of the manifest are the same in each case.

    Raises:
        MismatchError: the values or the previous manifest are of other knowledge than the store.
        LockedError: --out holds another manifest.
    """
    command = _of_run(command)
    show.require_ids((path for path in (command.store, command.values, command.previous) if path), command.expect_id)
    knowledge = identity.read_store_identity(command.store)
    count, values = knowledge.data.count, command.values
    assert values is not None
    beyond, sizes = _is_large(command, count), {**estimate(command, count), "out": str(command.out)}
    if dry_run and beyond:
        return {"would": "condense", **sizes}
    opened = value_files.streamed(values, count) if beyond else value_files.opened(values, count, held)
    with opened as source:
        document = source.document
        if document is not None and document["knowledge_id"] != knowledge.knowledge_id:
            raise MismatchError(
                f"the values in {values} were measured on knowledge {document['knowledge_id']}, "
                f"the store at {command.store} holds {knowledge.knowledge_id}; give the values' own store"
            )
        note = {"values_from": "another tool" if document is None else "kcdcache", "out": str(command.out)}
        samples = Samples(
            knowledge.knowledge_id, count, classes=len(knowledge.data.classes), data_digest=knowledge.data.digest,
            excluded=log.read_skipped(command.store),
        )  # fmt: skip
        if dry_run:
            return {"would": "condense", **_plan(command, samples, source).draft(source).summary(), **note, **sizes}
        return {**_made(command, samples, source, progress), **note}


def _of_run(command: CondenseCommand) -> CondenseCommand:
    """Return the command with the values of its run, and the set and stage that they were updated on."""
    if command.run is None:
        return command
    folder = RunFolder(path=command.run)
    if not folder.values.exists():
        found = "a run without values" if folder.settings.exists() else "no run"
        raise NotFoundError(f"--run {command.run}: {found}; give a folder in which `train` has finished a stage")
    last = max((path for path in folder.all_stage_values()), key=lambda path: int(path.parent.name), default=None)
    if last is None:
        raise NotFoundError(f"--run {command.run} has finished no stage; run its command again, which resumes")
    stage = int(last.parent.name)
    logger.info("condense: the values of %s, last updated in stage %d", last, stage)
    found_set = folder.manifest(stage)
    return command.model_copy(update={"run": None, "values": last, "previous": found_set})


def estimate(command: CondenseCommand, count: int) -> Result:
    """Estimate memory, temporary disk space and time for condensing `count` samples."""
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


def _bytes_of_samples(command: CondenseCommand, count: int) -> int:
    plain = command.rules.ranking == "value" and not command.rules.stratify
    return ((ranking.BYTES_A_SAMPLE if plain else BYTES_OTHERWISE) + manifest.BYTES_A_SAMPLE) * count


def _plan(command: CondenseCommand, samples: Samples, source: Source) -> ranking.Plan:
    previous = None if command.previous is None else manifest.read(command.previous, samples.count)
    if previous is not None:
        manifest.require_knowledge(previous, samples.knowledge_id)
    stage = _stage(command, previous)
    return summary.plan(source, command.rules, samples, stage=stage, keep=command.keep, previous=previous)


def _made(command: CondenseCommand, samples: Samples, source: Source, progress: Progress) -> Result:
    """Plan and write a manifest, or accept an existing one if it is the same.

    Parts under construction and spilled data are in a folder next to it.
    """
    out, beyond, several = command.out, _is_large(command, samples.count), samples.count > command.partition_rows
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic.beside(out) if beyond or several else nullcontext(out) as place:
        large_plan = _large_plan(command, samples, source, place / "spill")
        with large_plan if beyond else nullcontext(_plan(command, samples, source)) as plan:
            progress("condense", 1, 3, "ranked")
            draft = plan.draft(source)
            there = (out / parquet.SEAL if out.is_dir() else out).exists()
            if not there:
                try:
                    draft.write(out, command.partition_rows, place)
                except LockedError:  # another process was first, perhaps with the same manifest
                    there = True
            progress("condense", 2, 3, "written")
            made = draft.summary()
            progress("condense", 3, 3, f"{samples.count:,} samples")
    atomic.remove_orphans(out)
    if there and manifest.read_head(out, samples.count).digest != made["digest"]:
        raise LockedError(f"{out} holds another manifest; manifests are never overwritten: give another --out")
    return {**made, "already": there}


@contextmanager
def _large_plan(command: CondenseCommand, samples: Samples, source: Source, folder: Path) -> Iterator[large.Tabled]:
    before = None
    if command.previous is not None:
        before = manifest.read_head(command.previous, samples.count)
        manifest.require_knowledge(before.facts, samples.knowledge_id)
    with large.planned(
        source, command.rules, samples, stage=_stage(command, before and before.facts), keep=command.keep,
        previous=command.previous, before=before, folder=folder, memory_bytes=command.memory_gb * 10**9,
    ) as plan:  # fmt: skip
        yield plan


def _stage(command: CondenseCommand, before: manifest.Facts | None) -> int:
    if command.stage is not None:
        return command.stage
    return 1 if before is None else before.stage + 1
