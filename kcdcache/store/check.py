"""Check that the files of a store are what was written, and that a store belongs to the data at hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kcdcache.datasets.datasets import Dataset
from kcdcache.datasets.images import sample_digest
from kcdcache.errors import CorruptionError, MismatchError, attempt, require_same
from kcdcache.files.atomic import sha256_file
from kcdcache.progress import Progress, silent
from kcdcache.store import identity, log
from kcdcache.store.reader import Store, check


class Verification(NamedTuple):
    """What a verification checked, and every problem it found."""

    files: int
    """chunk files in the log; all are checked for presence and size"""
    read: int
    """chunk files that were read and hashed"""
    bytes: int
    """size of those"""
    problems: tuple[str, ...]
    """one line per damage, with file and samples; empty for a sound store"""


def verify(path: Path | str, *, share: float = 1.0, seed: int = 0, progress: Progress = silent) -> Verification:
    """Check records against commits, array documents against the plan, and chunk files against their sizes and SHA-256.

    All damage is collected. A `share` in [0, 1] of the chunk files, chosen by `seed`, is hashed: at least one, unless
    it is 0. Raises NotFoundError without a store, UnfinishedError if it was never sealed.
    """
    root, problems = Path(path), list[str]()
    report, knowledge = problems.append, None
    try:
        knowledge = identity.read_store_identity(root)
    except CorruptionError as error:
        report(str(error))
    commits = log.read_commits(root, report)
    store = attempt(report, Store, root, knowledge or commits[-1].knowledge, commits) if commits else None
    if store is None:
        return Verification(0, 0, 0, tuple(problems))
    if knowledge is not None and (bad := identity.parameters_problem(root, knowledge)):
        report(bad)
    attempt(report, identity.read_origin, root)
    sound = check(store, report)
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(sound))
    read = [sound[place] for place in sorted(order[: math.ceil(share * len(sound))].tolist())]
    for done, chunk in enumerate(read, 1):
        if sha256_file(root / chunk.key) != store.files[chunk.key].sha256:
            report(f"{root}/{chunk} is not what was written: its SHA-256 differs from the log")
        progress("verify", done, len(read), "chunk files")
    size = sum(store.files[chunk.key].bytes for chunk in read)
    return Verification(len(store.files), len(read), size, tuple(problems))


def check_data(store: Store, data: Dataset) -> None:
    """Raise MismatchError unless the store was made for this data; `data.train` compares its images from then on.

    Count, classes, image size, labels and decoded images are compared at once. Images that are decoded on demand are
    compared whenever they are decoded (`Split.expect`). The message has both fingerprints, the first difference and the
    first differing sample. Raises CorruptionError if the store's sample digests do not belong to its identity.
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
        return  # callers have their own rules for mixes
    train.expect(store.sample_digest, f"in the store at {store.path}")
    if data.identity() != theirs:
        raise CorruptionError(f"the sample digests in {names[0]} are not those of its identity; precompute it again")


def _first_other(store: Store, data: Dataset) -> int | None:
    """Return the first sample that differs, or None; of data decoded on demand only labels are compared."""
    train = data.train
    held, ours = (store.labels, train.labels) if train.on_demand else (store.sample_digest, train.digests())
    shared = min(len(held), len(ours))
    differing = np.flatnonzero(held[:shared] != ours[:shared])
    if differing.size:
        return int(differing[0])
    return None if len(held) == len(ours) else shared


def _side_by_side(store: Store, data: Dataset, sample: int) -> str:
    """Describe a sample by file, label, class name and digest, here and in the store."""
    source, labels = data.train.source, (data.train.labels[sample], store.labels[sample])
    here, there = (f"label {label} ({data.classes[label]!r})" for label in labels)
    digest, expected = sample_digest(source.content(sample), labels[0]), int(store.sample_digest[sample])
    return f"{source.place(sample)} with {here} has digest {digest:016x}, {there} and {expected:016x} in the store"
