"""A manifest made block by block: checked, digested, told of and, if asked for, written, but never whole in memory."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from kcdcache.condense import manifest
from kcdcache.condense.manifest import Facts, Totals, summary_of
from kcdcache.condense.value_files import Block, Source
from kcdcache.condense.values import Values
from kcdcache.errors import MismatchError
from kcdcache.files import parquet
from kcdcache.files.parquet import Seal
from kcdcache.files.records import canonical_json


@runtime_checkable
class Planned(Protocol):
    """A condensed set whose rows are known before they are written down, as those of `ranking.Plan` are."""

    @property
    def kept(self) -> int:
        """Its rows."""

    @property
    def pairs(self) -> int:
        """Its mixed rows."""

    @property
    def count(self) -> int:
        """Samples of the whole data set."""

    def columns(self, block: Block) -> dict[str, np.ndarray]:
        """Return the rows of the kept ones among some samples, ascending, as the columns of a manifest."""

    def facts(self, **others: Any) -> Facts:
        """Return what the manifest says beside its rows, with what only the caller knows."""


class Tally:
    """What becomes known of rows while they are written: whether they are valid, their totals and their digest."""

    def __init__(self, checks: manifest.Blocks, classes: int) -> None:
        """Begin; `classes` is the number of classes, 0 where labels are not known."""
        self._checks = checks
        self.totals = Totals()
        self.counts: Int64[np.ndarray, " classes"] = np.zeros(classes, np.int64)
        self.digest = parquet.Digest(manifest.ARRAYS)

    def tables(self, blocks: Iterable[Mapping[str, np.ndarray]], rows: int = parquet.ROWS) -> Iterator[pa.Table]:
        """Yield rows, `label` beside their columns where it is known, as they stand in a file.

        Raises:
            MismatchError: a row breaks the rules of a manifest.
        """
        with ThreadPoolExecutor(1) as pool:
            for columns in parquet.regrouped(blocks, rows):
                label = columns.pop("label", None)
                beside = [pool.submit(work, columns) for work in (self._checks.add, self.digest.add)]
                yield manifest.cells(columns)  # which the caller writes meanwhile
                self.totals = self.totals.plus(columns)
                self.counts = self.counts if label is None else _counted(self.counts, label)
                for work in beside:
                    work.result()

    def made(self, plan: Planned, **facts: Any) -> Facts:
        """Return what the manifest says beside its rows, all of which were gone through.

        Raises:
            MismatchError: rows or facts do not fit together, or not the plan.
        """
        self._checks.end()
        if (self.totals.rows, self.totals.mixed) != (plan.kept, plan.pairs):
            raise MismatchError(
                f"{self.totals.rows} rows were written, {self.totals.mixed} of them mixed, expected {plan.kept} and "
                f"{plan.pairs}: the values were changed meanwhile; run the same command again"
            )
        found = plan.facts(class_counts=tuple(self.counts.tolist()), **facts)
        found.require_fit(self.totals.rows, self.totals.mixed)
        return found


def write(
    plan: Planned, source: Source, sink: BinaryIO | None, *, classes: int, rows: int = parquet.ROWS, **facts: Any
) -> dict[str, Any]:
    """Write the manifest of a plan; return its summary. Without `sink` nothing is written, and all else is the same.

    `source` holds the values the plan was made of, `classes` is the number of classes, `facts` are those the plan does
    not know. The bytes are those of `manifest.write`; `rows` is the number of rows in memory at once.

    Raises:
        MismatchError: a row or fact breaks the rules of a manifest.
        CorruptionError, NonFiniteError: the source was changed since the plan was made.
        OSError: the system refuses to write.
    """
    tally = Tally(manifest.Blocks(plan.count), classes if source.labelled else 0)
    writer = _written(tally.tables(_rows(plan, source.blocks()), rows), sink)
    return _ended(writer, tally, tally.made(plan, values=source.fingerprint(), **facts))


def write_parts(
    plan: Planned, source: Source, folder: Path, *, partition_rows: int, classes: int, **facts: Any
) -> tuple[dict[str, Any], Seal]:
    """Write the parts of a plan's manifest; return its summary and the record to seal the folder with.

    Raises:
        MismatchError, CorruptionError, NonFiniteError, OSError: as for `write`.
    """
    tally = Tally(manifest.Blocks(plan.count), classes if source.labelled else 0)
    parts, blocks = [], source.blocks()
    waiting: list[Block] = []
    for span in parquet.spans(plan.count, partition_rows):
        rows = _rows(plan, _until(span.stop, blocks, waiting))
        parts.append(parquet.write_part(folder, span, manifest.SCHEMA, tally.tables(rows)))
    next(blocks, None)  # the source compares digests at its end
    made = tally.made(plan, values=source.fingerprint(), **facts)
    document = made.document_of(plan.kept)
    name = tally.digest.over(canonical_json(document))
    content = manifest.seal_of(document, name, plan.count, partition_rows, parts)
    return summary_of(made, tally.totals, name), content


def _written(blocks: Iterable[pa.Table], sink: BinaryIO | None) -> parquet.Writer | None:
    writer = None if sink is None else parquet.Writer(sink, manifest.SCHEMA)
    for table in blocks:
        if writer is not None:
            writer.write(table)
    return writer


def _ended(writer: parquet.Writer | None, tally: Tally, made: Facts) -> dict[str, Any]:
    document = made.document_of(tally.totals.rows)
    name = tally.digest.over(canonical_json(document))
    if writer is not None:
        writer.close(manifest.metadata(document, name))
    return summary_of(made, tally.totals, name)


def _rows(plan: Planned, blocks: Iterable[Block]) -> Iterator[dict[str, np.ndarray]]:
    for block in blocks:
        columns = plan.columns(block)
        if block.labels is not None:
            columns["label"] = block.labels[columns["index"] - block.first]
        yield columns


def _until(stop: int, blocks: Iterator[Block], waiting: list[Block]) -> Iterator[Block]:
    """Yield the samples up to `stop`; the rest of a block that goes on beyond is left `waiting` for the next call."""
    reached = 0
    while reached < stop and (block := waiting.pop() if waiting else next(blocks, None)) is not None:
        reached = block.first + len(block.values.visits)
        if reached > stop:
            waiting.append(_part(block, stop - block.first, reached - block.first))
            block = _part(block, 0, stop - block.first)
        yield block


def _part(block: Block, start: int, stop: int) -> Block:
    some = slice(start, stop)
    labels = None if block.labels is None else block.labels[some]
    return Block(block.first + start, Values(block.values.visits[some], block.values.value[some]), labels)


def _counted(counts: Int64[np.ndarray, " classes"], label: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " more"]:
    """Return how many samples each class has, with some more of them."""
    more = np.bincount(label, minlength=len(counts))
    more[: len(counts)] += counts
    return more
