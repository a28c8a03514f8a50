"""Whether a store was made for a data set, sample by sample, and a condensed set for a store."""

import logging
from dataclasses import replace

import numpy as np

from kcdcache.data import Dataset
from kcdcache.errors import CorruptionError, MismatchError
from kcdcache.identity import require_same
from kcdcache.images import sample_digest
from kcdcache.manifest import Manifest, require_knowledge
from kcdcache.store import Store

logger = logging.getLogger(__name__)


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


def accept(given: Manifest, knowledge: Store, transfer: bool) -> Manifest:
    """Return a condensed set bound to a store's knowledge: as it is, or with `transfer` rebound to another teacher's.

    Raises:
        MismatchError: the set was made for other knowledge and transfer is off, or for other data.
    """
    identity = knowledge.knowledge.data
    wanted = knowledge.knowledge_id
    require_knowledge(given, wanted, count=identity.count, data_digest=identity.digest, transfer=transfer)
    if given.knowledge_id == wanted:
        return given
    logger.info("transfer: a set condensed for knowledge %s is used with %s", given.knowledge_id[:12], wanted[:12])
    return replace(given, knowledge_id=wanted, parent=given.digest)
