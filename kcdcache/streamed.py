"""A manifest made block by block: checked, digested, told of and, if asked for, written, but never whole in memory."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int64

from kcdcache import manifest, rules, tables
from kcdcache.condense import Plan
from kcdcache.facts import Totals, told
from kcdcache.files import canonical_json
from kcdcache.values import Source


def write(
    plan: Plan, source: Source, sink: BinaryIO | None, *, classes: int, rows: int = tables.ROWS, **facts: Any
) -> dict[str, Any]:
    """Write the manifest of a plan; return its summary. Without `sink` nothing is written, and all else is the same.

    `source` holds the values the plan was made of, `classes` is the number of classes, `facts` are those the plan does
    not know. The bytes are those of `manifest.write`; `rows` is the number of rows in memory at once.

    Raises:
        MismatchError: a row or fact breaks the rules of a manifest.
        CorruptionError, NonFiniteError: the source was changed since the plan was made.
        OSError: the system refuses to write.
    """
    checks, digest, totals = rules.Blocks(plan.count), tables.Digest(manifest.ARRAYS), Totals()
    counts = np.zeros(classes if source.labelled else 0, np.int64)
    writer = None if sink is None else tables.Writer(sink, manifest.SCHEMA_WRITTEN)
    with ThreadPoolExecutor(1) as pool:
        for columns in tables.regrouped(_rows(plan, source), rows):
            label = columns.pop("label", None)
            beside = [pool.submit(work, columns) for work in (checks.add, digest.add)]
            if writer is not None:
                writer.write(manifest.cells(columns))
            totals = totals.plus(columns)
            counts = counts if label is None else _counted(counts, label)
            for work in beside:
                work.result()
    checks.end()
    made = plan.facts(values=source.fingerprint(), class_counts=tuple(counts.tolist()), **facts)
    made.require_fit(totals.rows, totals.mixed)
    document = made.document_of(totals.rows)
    name = digest.over(canonical_json(document))
    if writer is not None:
        writer.close(manifest.metadata(document, name))
    return told(made, totals, name)


def _rows(plan: Plan, source: Source) -> Iterator[dict[str, np.ndarray]]:
    for block in source.blocks():
        columns = plan.columns(block)
        if block.labels is not None:
            columns["label"] = block.labels[columns["index"] - block.first]
        yield columns


def _counted(counts: Int64[np.ndarray, " classes"], label: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " more"]:
    """Return how many samples each class has, with some more of them."""
    more = np.bincount(label, minlength=len(counts))
    more[: len(counts)] += counts
    return more
