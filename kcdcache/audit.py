"""Whether the files of a store are what was written."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kcdcache import layout, ledger, origin, parameters
from kcdcache.errors import CorruptionError, KcdcacheError
from kcdcache.files import sha256_file
from kcdcache.identity import Knowledge, read_store_identity
from kcdcache.layout import Chunk, StorePlan
from kcdcache.ledger import Commit, FileRecord
from kcdcache.store import check_documents, check_listing, file_table, listed_sizes, plausible, size_problem


class Verification(NamedTuple):
    """What a verification looked at, and all it found wrong."""

    files: int
    """chunk files whose presence and size were compared"""
    read: int
    """chunk files that were read whole"""
    bytes: int
    """bytes of those"""
    problems: tuple[str, ...]
    """one line per damage, each naming file and samples; empty for a sound store"""


def verify(path: Path | str, *, share: float = 1.0, seed: int = 0) -> Verification:
    """Compare records with commits, array documents with the plan, and chunk files with their sizes and SHA-256.

    All damage is collected. `share` in [0, 1] of the chunk files, chosen by `seed`, is read and hashed; with 0 only
    records, documents and sizes are compared, above 0 at least one file is read.

    Raises:
        NotFoundError: there is no store.
        UnfinishedError: it was never sealed.
        MismatchError: it was written by a newer format.
    """
    root, problems = Path(path), list[str]()
    knowledge = _check_identity(root, problems)
    commits = ledger.read_commits(root, problems.append)
    plan = _plan(commits, problems)
    if plan is None:
        return Verification(0, 0, 0, tuple(problems))
    if knowledge is not None:
        ledger.check_count(root, plan.count, knowledge, problems.append)
    if knowledge is not None and (bad := parameters.problem(root, knowledge)) is not None:
        problems.append(bad)
    if (bad := origin.problem(root)) is not None:
        problems.append(bad)
    files = file_table(commits)
    check_documents(root, plan, len(commits), problems.append)
    check_listing(root, plan, files, problems.append)
    chunks = layout.all_chunks(plan) if plausible(plan, files) else []
    sound = _drawn(_sound_chunks(root, plan, chunks, files), share, seed) if share else []
    for chunk in sound:
        if sha256_file(root / chunk.key) != files[chunk.key].sha256:
            problems.append(f"{root}/{chunk} is not what was written: its SHA-256 differs from the log")
    read = sum(files[chunk.key].bytes for chunk in sound)
    return Verification(len(chunks), len(sound), read, tuple(problems))


def _drawn(chunks: list[Chunk], share: float, seed: int) -> list[Chunk]:
    """Return a share of some chunks, in order."""
    number = math.ceil(share * len(chunks))
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(chunks))
    return [chunks[place] for place in sorted(order[:number].tolist())]


def _check_identity(root: Path, problems: list[str]) -> Knowledge | None:
    try:
        return read_store_identity(root)
    except CorruptionError as error:
        problems.append(str(error))
        return None


def _plan(commits: list[Commit], problems: list[str]) -> StorePlan | None:
    try:
        return layout.plan_from(commits[-1].plan) if commits else None
    except KcdcacheError as error:
        problems.append(str(error))
        return None


def _sound_chunks(root: Path, plan: StorePlan, chunks: list[Chunk], files: dict[str, FileRecord]) -> list[Chunk]:
    """Return the chunks worth reading: those of the logged size; the others are reported already."""
    sizes = listed_sizes(root, plan)
    return [chunk for chunk in chunks if not size_problem(plan, chunk, files.get(chunk.key), sizes.get(chunk.key))]
