"""Repair a damaged store: restore records from copies, then compute only the bad parts again."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from kcdcache.datasets.datasets import Dataset
from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, SettingsError, attempt, require_same
from kcdcache.files.atomic import holds, move, remove, sha256_bytes, sha256_file, write_atomic
from kcdcache.files.records import MOST_RECORD_BYTES, canonical_json, sealed_json
from kcdcache.progress import Progress, silent
from kcdcache.store import identity, log, writer
from kcdcache.store.identity import IDENTITY_FILE, Knowledge, read_store_identity
from kcdcache.store.log import FileRecord, LogEntry
from kcdcache.store.plan import Part, StorePlan, parts, plan_from
from kcdcache.store.writer import held
from kcdcache.teacher import precompute, teacher

SCRATCH = log.FOLDER / "repair"
"""folder for parts computed again; only files equal to the log leave it"""
_whole = partial(attempt, lambda problem: None)
"""result of a reader, or None if that is damaged or missing"""


class Means(NamedTuple):
    """What a store can be made from again."""

    data: Dataset
    network: teacher.Teacher


class _Piece(NamedTuple):
    """What one log record describes."""

    growth: int
    plan: StorePlan
    name: str
    digest: str
    """SHA-256 of the record"""
    part: Part | None
    """None for the arrays that describe samples"""

    def __str__(self) -> str:
        part = self.part
        return "labels and digests" if part is None else f"view {part.view}, samples {part.start}..{part.stop - 1}"


def repair(root: Path, means: Means | None, progress: Progress = silent) -> list[str]:
    """Restore every file of a sealed store to what was written; return the replaced paths, relative to it.

    Records are restored from each other (see `CommitRecord`). Chunks and log records are computed again from the
    teacher and its data, part by part, and put in place only if they equal the log: each part ends with its original
    bytes or stays unchanged.

    Raises UnfinishedError if the store was never sealed, SettingsError if `means` are needed and missing, MismatchError
    if they are not the store's or this machine computes other bytes, CorruptionError if two records are bad that could
    only be restored from each other, LockedError if another process writes the store.
    """
    with held(root, begin=lambda alone: None):
        shutil.rmtree(root / SCRATCH, ignore_errors=True)
        replaced = _restore_records(root)
        bad = [piece for piece in _pieces(root) if not _sound(root, piece)]
        try:
            for done, piece in enumerate(bad):
                replaced += _make_again(root, piece, means)
                progress("repair", done + 1, len(bad), str(piece))
        finally:
            shutil.rmtree(root / SCRATCH, ignore_errors=True)
        return replaced + _restore_extras(root, means)


def _restore_extras(root: Path, means: Means | None) -> list[str]:
    """Restore the records of the teacher's filters and of the store's origin; return their paths.

    A missing origin is restored only if means are given.
    """
    knowledge, replaced = knowledge_of(root), list[str]()
    if bad := identity.parameters_problem(root, knowledge):
        network = _required(means, bad, root, knowledge).network
        identity.write_parameters(root, teacher.filter_profiles(network.module), knowledge)
        replaced.append(identity.PARAMETERS_FILE.as_posix())
    gone = means is not None and not (root / identity.ORIGIN_FILE).exists()
    problems = ["its origin is gone"] if gone else list[str]()
    attempt(problems.append, identity.read_origin, root)
    if problems:
        given = _required(means, problems[0], root, knowledge)
        remove(root / identity.ORIGIN_FILE)
        precompute.write_origin(root, given.data, given.network.data)
        replaced.append(identity.ORIGIN_FILE.as_posix())
    return replaced


def knowledge_of(root: Path) -> Knowledge:
    """Return the knowledge of a sealed store, from a commit if the identity file is damaged."""
    seals = (_whole(log.read_seal, root, growth) for growth in range(_sealed_growths(root)))
    known = _whole(read_store_identity, root) or next((seal.identity.knowledge for seal in seals if seal), None)
    return known or read_store_identity(root)


def _restore_records(root: Path) -> list[str]:
    """Restore identity, plans, commits and array documents from each other."""
    sealed = _sealed_growths(root)
    replaced: list[str] = []
    for growth in reversed(range(sealed)):  # a later commit confirms the previous one
        commit = log.commit_path(root, growth)
        seal, following = (_whole(log.read_seal, root, number) for number in (growth, growth + 1))
        if seal is None or (following and following.previous != sha256_file(commit, MOST_RECORD_BYTES)):
            replaced += _put(root, commit, _commit_again(root, growth))
            continue
        replaced += _put(root, root / IDENTITY_FILE, canonical_json(seal.identity.document()))
        replaced += _put(root, log.plan_path(root, growth), sealed_json(seal.plan.document()))
    growing = log.growths(root, "plan") > sealed
    plan = log.read_plan(root, sealed) if growing else log.read_seal(root, sealed - 1).plan
    return replaced + writer.write_documents(root, plan_from(plan))


def _sealed_growths(root: Path) -> int:
    numbers = [path.name.split(".")[1] for path in (root / log.FOLDER).glob("commit.*.json")]
    sealed = 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)
    if not sealed:
        raise log.unfinished(root)
    return sealed


def _commit_again(root: Path, growth: int) -> bytes:
    """Return a commit's content from identity, plan and records, all of which must be undamaged."""
    try:
        before = plan_from(log.read_plan(root, growth - 1)) if growth else None
        plan = plan_from(log.read_plan(root, growth))
        names = [] if growth else [log.SAMPLES]
        names += (part.name for part in parts(plan, before))
        for name in names:
            log.read_record(log.record_path(root, growth, name))
        return log.commit_bytes(root, growth, names)
    except KcdcacheError as error:
        raise CorruptionError(
            f"{log.commit_path(root, growth)} is damaged, and so is what it could be made from ({error}); "
            "restore one of them from a backup, or precompute a new store"
        ) from None


def _put(root: Path, path: Path, data: bytes) -> list[str]:
    if holds(path, data):
        return []
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)
    return [str(path.relative_to(root))]


def _pieces(root: Path) -> list[_Piece]:
    found, before = list[_Piece](), None
    for growth in range(_sealed_growths(root)):
        seal = log.read_seal(root, growth)
        plan = plan_from(seal.plan)
        named = {part.name: part for part in parts(plan, before)}
        found += [_Piece(growth, plan, name, digest, named.get(name)) for name, digest in seal.log]
        before = plan
    return found


def _sound(root: Path, piece: _Piece) -> bool:
    path = log.record_path(root, piece.growth, piece.name)
    if not path.exists() or _whole(sha256_file, path, MOST_RECORD_BYTES) != piece.digest:
        return False
    return not _bad_files(root, log.read_record(path))


def _bad_files(root: Path, record: LogEntry) -> list[FileRecord]:
    def as_logged(path: Path, file: FileRecord) -> bool:
        plain = path.is_file() and not path.is_symlink()
        return plain and path.stat().st_size == file.bytes and sha256_file(path) == file.sha256

    return [file for file in record.files if not as_logged(root / file.path, file)]


def _make_again(root: Path, piece: _Piece, means: Means | None) -> list[str]:
    """Compute one piece in the scratch folder, and move the bad files into place if it equals the log."""
    knowledge = log.read_seal(root, 0).identity.knowledge
    given = _required(means, f"{piece.name} of {root} is damaged", root, knowledge)
    made = _computed(root, piece, knowledge, given)
    data = sealed_json(made.document())
    if sha256_bytes(data) != piece.digest:
        raise MismatchError(
            f"{piece.name} of {root} computed here is not what was written: other versions, device or threads give "
            f"other last bits ({root / log.FOLDER / 'environment.json'} says where it was made); nothing of it was "
            "changed: repair there, or precompute a new store"
        )
    bad = [file.path for file in _bad_files(root, made)]
    for key in bad:
        move(root / SCRATCH / key, root / key)
    return bad + _put(root, log.record_path(root, piece.growth, piece.name), data)


def _required(means: Means | None, bad: str, root: Path, knowledge: Knowledge) -> Means:
    """Return the means unless they are missing, of another teacher or data, or could not have made the store."""
    if means is None:
        raise SettingsError(f"{bad}: give --teacher and --data to make it again")
    if not knowledge.whole or knowledge.teacher.imported:
        kind = "imported" if knowledge.whole else "of an exported set" if knowledge.subset else "on a manifest's mixes"
        raise SettingsError(f"the outputs in {root} were {kind}: delete the folder and run its `precompute` again")
    now = Knowledge(teacher=means.network.identity, data=means.data.identity(), views=knowledge.views).document()
    names = (f"the store at {root}", "what is given")
    require_same(knowledge.document(), now, names, "give the teacher and data it was made with")
    return means


def _computed(root: Path, piece: _Piece, knowledge: Knowledge, means: Means) -> LogEntry:
    """Write a piece's chunks, computed again, into the scratch folder; return the log record they should have."""
    part, what = piece.part, (root / SCRATCH, piece.plan, piece.growth, piece.part)
    writer.write_documents(root / SCRATCH, piece.plan)
    if part is None:
        train = means.data.train
        return writer.write_rows(*what, {"labels": train.labels, "sample_digest": train.digests()})
    precompute.use_recorded_threads(root)
    job = replace(precompute.job_for(means.data, means.network, knowledge, part.fields), may_skip=True)
    made = precompute.compute(part, piece.plan, job)
    return writer.write_rows(*what, **made._asdict())
