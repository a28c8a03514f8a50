"""Whether the files of a store are what was written."""

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kcdcache.data.datasets import Dataset
from kcdcache.data.images import sample_digest
from kcdcache.errors import CorruptionError, MismatchError, attempt, require_same
from kcdcache.files.atomic import sha256_file
from kcdcache.store import identity, log
from kcdcache.store.chunks import listed_sizes, size_problem
from kcdcache.store.identity import Knowledge, read_store_identity
from kcdcache.store.plan import Chunk, all_chunks, plan_from
from kcdcache.store.reader import Store, check_documents, check_listing, file_table, plausible


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
    report = problems.append
    knowledge = _check_identity(root, problems)
    commits = log.read_commits(root, report)
    plan = attempt(report, plan_from, commits[-1].plan) if commits else None
    if plan is None:
        return Verification(0, 0, 0, tuple(problems))
    if knowledge is not None:
        log.check_count(root, plan.count, knowledge, report)
        problems += filter(None, [identity.parameters_problem(root, knowledge)])
    attempt(report, identity.read_origin, root)
    files = file_table(commits)
    check_documents(root, plan, len(commits), report)
    check_listing(root, plan, files, report)
    chunks, sizes = all_chunks(plan) if plausible(plan, files) else [], listed_sizes(root, plan)
    whole = [chunk for chunk in chunks if not size_problem(plan, chunk, files.get(chunk.key), sizes.get(chunk.key))]
    read = _drawn(whole, share, seed) if share else []  # the others are reported already
    for chunk in read:
        if sha256_file(root / chunk.key) != files[chunk.key].sha256:
            report(f"{root}/{chunk} is not what was written: its SHA-256 differs from the log")
    return Verification(len(chunks), len(read), sum(files[chunk.key].bytes for chunk in read), tuple(problems))


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


def check_data(store: Store, data: Dataset) -> None:
    """Do nothing if the store was made for this data, and hold `data.train` to the store's digests from then on.

    Count, classes, image size and labels are compared in full, and so are decoded images. Images that are decoded on
    demand are not read here: each is compared whenever it is decoded (`Split.expect`).

    Raises:
        MismatchError: they differ; names both fingerprints, the first difference and the first differing sample.
        CorruptionError: the store's sample digests do not belong to its identity.
    """
    if store.knowledge.subset is not None:
        raise MismatchError(
            f"{store.path} is the inside of an exported set, it holds rows of that set only; give the whole folder "
            f"{store.path.parent} as --condensed"
        )
    theirs, train = store.knowledge.data, data.train
    if not train.on_demand and data.identity() == theirs:
        return
    ours = replace(theirs, count=len(train), classes=data.classes, image_size=train.image_size)
    known = "decoded on demand" if train.on_demand else data.identity().digest[:12]
    names = (f"the store at {store.path} (data {theirs.digest[:12]})", f"the data {data.name} ({known})")
    remedy = "use the data the store was made from, or precompute a new store"
    first = None if store.knowledge.mixes else _first_other(store, data)
    if ours != theirs:
        begin = "" if first is None else f"the first sample that differs is {first}; "
        require_same(vars(theirs), vars(ours), names, begin + remedy)
    if first is not None:
        sample = f"sample {first} differs (image, label or order): {_side_by_side(store, data, first)}"
        raise MismatchError(f"{names[1]} is not what the teacher of {names[0]} saw: {sample}; {remedy}")
    if store.knowledge.mixes:
        return  # its rows are mixes, for which callers have their own rules
    train.expect(store.sample_digest, f"in the store at {store.path}")
    if data.identity() != theirs:
        raise CorruptionError(f"the sample digests in {names[0]} are not those of its identity; precompute it again")


def _first_other(store: Store, data: Dataset) -> int | None:
    """Return the first sample that differs, as far as can be told without reading images; None if none does."""
    if data.train.on_demand:
        held, ours = store.labels, data.train.labels
    else:
        held, ours = store.sample_digest, data.train.digests()
    shared = min(len(held), len(ours))
    differing = np.flatnonzero(held[:shared] != ours[:shared])
    if differing.size:
        return int(differing[0])
    return None if len(held) == len(ours) else shared


def _side_by_side(store: Store, data: Dataset, sample: int) -> str:
    """Return file, label, class name and digest of a sample, here and in the store."""
    source, labels = data.train.source, (data.train.labels[sample], store.labels[sample])
    here, there = (f"label {label} ({data.classes[label]!r})" for label in labels)
    digest, expected = sample_digest(source.content(sample), labels[0]), int(store.sample_digest[sample])
    return f"{source.place(sample)} with {here} has digest {digest:016x}, {there} and {expected:016x} in the store"
