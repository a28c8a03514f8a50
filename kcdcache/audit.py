"""Whether every byte of a store is what was written."""

from pathlib import Path
from typing import NamedTuple

from kcdcache import layout, ledger
from kcdcache.errors import CorruptionError, KcdcacheError
from kcdcache.files import sha256_file
from kcdcache.identity import Knowledge, read_store_identity
from kcdcache.layout import Chunk, StorePlan
from kcdcache.ledger import Commit, FileRecord
from kcdcache.store import check_documents, check_listing, file_table, listed_sizes, plausible, size_problem


class Verification(NamedTuple):
    """What a verification looked at, and all it found wrong."""

    files: int
    """chunk files compared"""
    bytes: int
    """bytes of chunk files read; 0 if only records and sizes were compared"""
    problems: tuple[str, ...]
    """one line per damage, each naming file and samples; empty for a sound store"""


def verify(path: Path | str, *, read_data: bool = True) -> Verification:
    """Compare records with commits, array documents with the plan, and every chunk file with its size and SHA-256.

    All damage is collected. Without `read_data` only records, documents and sizes are compared.

    Raises:
        NotFoundError: there is no store.
        UnfinishedError: it was never sealed.
        MismatchError: it was written by a newer format.
    """
    root, problems = Path(path), list[str]()
    _check_identity(root, problems)
    commits = ledger.read_commits(root, problems.append)
    plan = _plan(commits, problems)
    if plan is None:
        return Verification(0, 0, tuple(problems))
    files = file_table(commits)
    check_documents(root, plan, len(commits), problems.append)
    check_listing(root, plan, files, problems.append)
    chunks = layout.all_chunks(plan) if plausible(plan, files) else []
    sound = _sound_chunks(root, plan, chunks, files) if read_data else []
    for chunk in sound:
        if sha256_file(root / chunk.key) != files[chunk.key].sha256:
            problems.append(f"{root}/{chunk} is not what was written: its SHA-256 differs from the log")
    return Verification(len(chunks), sum(files[chunk.key].bytes for chunk in sound), tuple(problems))


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
