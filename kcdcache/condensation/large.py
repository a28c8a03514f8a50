"""Condensed sets planned by DuckDB, which spills to disk what does not fit memory; the same rows as `summary.plan`.

Candidates go into a table with their ranking key. SQL ranks, splits and pairs them; the rows are then read range by
range. Values are read and manifests written by our own code.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kcdcache import rng
from kcdcache.condensation import manifest, ranking, summary
from kcdcache.condensation.manifest import Samples
from kcdcache.condensation.value_files import Block, Source
from kcdcache.condensation.values import score
from kcdcache.errors import CorruptionError, NoSpaceError, SettingsError
from kcdcache.files.atomic import FULL
from kcdcache.settings import CondenseSettings

LEAST_BYTES = 128 * 10**6
"""least memory for DuckDB"""
BYTES_A_THREAD = 64 * 10**6
"""memory for each of its threads"""
SPILLED_A_SAMPLE = 50
"""peak bytes on disk per sample"""

_RANKED = """CREATE TABLE ranked AS
SELECT * EXCLUDE key, (row_number() OVER (ORDER BY key, sample) - 1)::UINTEGER AS rank FROM candidate"""
_PLACED = """CREATE TABLE placed AS
SELECT sample, rank, rank < {size} AS kept, (rank - if(rank < {size}, 0, {size}))::UINTEGER AS place FROM ranked"""
_PLACED_BY_CLASS = """CREATE TABLE placed AS WITH split AS (
    SELECT sample, rank, row_number() OVER (PARTITION BY label ORDER BY rank) <= quota AS kept
    FROM ranked JOIN quota USING (label))
SELECT *, (row_number() OVER (PARTITION BY kept ORDER BY rank) - 1)::UINTEGER AS place FROM split"""
_CHOSEN = """CREATE TABLE chosen AS
SELECT sample, place, rank, coalesce(partner, 0)::UINTEGER AS partner
FROM (SELECT * FROM placed WHERE kept)
LEFT JOIN (SELECT sample AS partner, place + {first} AS place FROM placed WHERE NOT kept AND place < {pairs})
USING (place) ORDER BY sample"""


@dataclass(frozen=True, eq=False, kw_only=True)
class Tabled(ranking.Outline):
    """A condensed set whose rows are in a DuckDB table."""

    connection: Any

    def columns(self, block: Block) -> dict[str, np.ndarray]:
        """Return the manifest columns of the kept samples in a block, ascending."""
        ends = [block.first, block.first + len(block.values.visits)]
        query = "SELECT * FROM chosen WHERE sample >= ? AND sample < ? ORDER BY sample"
        found = self.connection.execute(query, ends).fetchnumpy()
        sample, place, rank, partner = (found[name].astype(np.int64) for name in ("sample", "place", "rank", "partner"))
        return self.rows(block, sample - block.first, place, partner[place >= self.first], rank)


@contextmanager
def planned(
    source: Source, settings: CondenseSettings, samples: Samples, *, stage: int, keep: float,
    previous: Path | None = None, before: manifest.Head | None = None, folder: Path, memory_bytes: float,
) -> Iterator[Tabled]:  # fmt: skip
    """Yield the set that `summary.plan` returns, using about `memory_bytes` and a new spill `folder`.

    `previous` is the manifest the values were last updated on, `before` its head.

    Raises:
        SettingsError: as `summary.plan`; or DuckDB is missing, or needs more memory.
        CorruptionError: the previous manifest changed since its head was read.
        NoSpaceError: the disk is full.
    """
    summary.require_labelled(source, settings)
    with _connected(folder, memory_bytes) as connection:
        _record(connection, source, settings, samples, stage)
        if previous is not None and before is not None and settings.candidates == "current":
            _keep_within(connection, previous, before.digest, samples.count)
        candidates = int(connection.execute("SELECT count(*) FROM candidate").fetchone()[0])
        size = summary.size_of(keep, samples, candidates)
        used = summary.K0[settings.k0](candidates - size, (before.rows if before else samples.count) - size)
        summary.log_sizes(size, used, settings)
        pairs = min(size, used) if settings.augment_kept else 0
        _choose(connection, settings, size, pairs)
        yield Tabled(
            samples=samples, settings=settings, stage=stage, keep=keep, parent=before.digest if before else None,
            kept=size, pairs=pairs, dropped=used, connection=connection,
        )  # fmt: skip


@contextmanager
def _connected(folder: Path, memory_bytes: float) -> Iterator[Any]:
    try:
        import duckdb
    except ModuleNotFoundError as error:
        if error.name != "duckdb":
            raise
        raise SettingsError(
            'condensing beyond --memory-gb needs the extra `large`: pip install "kcdcache[large]"; or give more memory'
        ) from None
    limit = max(LEAST_BYTES, int(memory_bytes))
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{limit}B", "temp_directory": str(folder), "autoload_known_extensions": False,
        "autoinstall_known_extensions": False, "threads": max(1, min(os.cpu_count() or 1, limit // BYTES_A_THREAD)),
    }  # fmt: skip
    folder.mkdir(parents=True)
    with duckdb.connect(config=config) as connection:
        try:
            yield connection
        except (duckdb.OutOfMemoryException, duckdb.IOException) as error:
            raise _explained(str(error), folder, limit) from error
        except RuntimeError as error:
            if str(error) != "Query interrupted":
                raise
            raise KeyboardInterrupt from None  # what DuckDB makes of Ctrl-C while it works


def _explained(text: str, folder: Path, limit: int) -> Exception:
    """Return our error for DuckDB's when memory or disk are too small."""
    if "max_temp_directory_size" in text or any(os.strerror(code) in text for code in FULL):
        return NoSpaceError(f"no space left for files of {folder}: free some, or give more memory with --memory-gb")
    if "memory" in text:
        return SettingsError(f"condensing takes more than {limit / 10**9:g} GB here; give more with --memory-gb")
    return OSError(text)


def _record(connection: Any, source: Source, settings: CondenseSettings, samples: Samples, stage: int) -> None:
    """Fill the table of candidates, each with its ranking key."""
    key = "UBIGINT" if settings.ranking == "random" else "UINTEGER"
    label = ", label BIGINT" if settings.stratify else ""
    connection.execute(f"CREATE TABLE candidate (key {key}, sample UINTEGER{label})")
    for block in source.blocks():
        everyone = np.arange(block.first, block.first + len(block.values.visits))
        sample = np.setdiff1d(everyone, samples.excluded, assume_unique=True)
        columns = {"key": _keys(block, settings, stage)[sample - block.first], "sample": sample}
        if settings.stratify:
            assert block.labels is not None
            columns["label"] = block.labels[sample - block.first]
            summary.require_labels(columns["label"])
        _insert(connection, "candidate", columns)


def _keys(block: Block, settings: CondenseSettings, stage: int) -> np.ndarray:
    """Return the ranking keys of a block's samples, the best having the lowest."""
    scores = score(block.values, settings.cost_exponent, settings.unseen, block.first)
    if settings.ranking == "value":
        return ranking.keys(scores)
    everyone = np.arange(block.first, block.first + len(scores))
    return summary.random_keys(everyone, settings.condense_seed, rng.RANKING, stage)


def _keep_within(connection: Any, previous: Path, digest: str, count: int) -> None:
    """Delete the candidates that a manifest does not keep."""
    connection.execute("CREATE TABLE before (sample UINTEGER)")
    found = manifest.read_head(previous, count, lambda index: _insert(connection, "before", {"sample": index}))
    if found.digest != digest:
        raise CorruptionError(f"{previous} was changed meanwhile; run the same command again")
    connection.execute("DELETE FROM candidate WHERE sample NOT IN (SELECT sample FROM before)")
    connection.execute("DROP TABLE before")


def _choose(connection: Any, settings: CondenseSettings, size: int, pairs: int) -> None:
    """Make the table of kept samples: place among them, rank among all candidates, and partner."""
    connection.execute(_RANKED)
    connection.execute("DROP TABLE candidate")
    if settings.stratify:
        found = connection.execute("SELECT label, count(*) AS n FROM ranked GROUP BY label ORDER BY label").fetchnumpy()
        connection.execute("CREATE TABLE quota (label BIGINT, quota BIGINT)")
        _insert(connection, "quota", {"label": found["label"], "quota": summary.quotas(found["n"], size)})
    connection.execute((_PLACED_BY_CLASS if settings.stratify else _PLACED).format(size=size))
    connection.execute("DROP TABLE ranked")
    connection.execute(_CHOSEN.format(first=size - pairs, pairs=pairs))
    connection.execute("DROP TABLE placed")


def _insert(connection: Any, table: str, columns: Mapping[str, np.ndarray]) -> None:
    connection.register("rows", pa.table(dict(columns)))
    connection.execute(f"INSERT INTO {table} SELECT * FROM rows")
    connection.unregister("rows")
