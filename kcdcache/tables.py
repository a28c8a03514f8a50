"""Parquet tables as deterministic bytes: page checksums on, a digest over header and columns, damage refused."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Shaped

from kcdcache.errors import CorruptionError, MismatchError, NotFoundError


def digest(header: bytes, columns: Mapping[str, Shaped[np.ndarray, " rows"]]) -> str:
    """Return the SHA-256 over a header and columns: their names, types, lengths and bytes (little endian), in order."""
    state = hashlib.sha256(len(header).to_bytes(8, "little") + header)
    for name, column in columns.items():
        little = np.ascontiguousarray(column, dtype=column.dtype.newbyteorder("<"))
        state.update(f"{name}:{little.dtype.str}:{little.size};".encode())
        state.update(little.view(np.uint8).data)
    return state.hexdigest()


def encode(table: pa.Table) -> bytes:
    """Return a table as parquet bytes, equal whenever the tables are (same pyarrow version).

    Integers are DELTA_BINARY_PACKED, floats BYTE_STREAM_SPLIT, strings dictionary encoded; zstd level 1; every page
    carries a checksum.
    """
    types = {field.name: field.type for field in table.schema}
    sink = pa.BufferOutputStream()
    pq.write_table(
        table, sink, compression="zstd", compression_level=1, write_page_checksum=True,
        use_dictionary=[name for name, kind in types.items() if pa.types.is_string(kind)],
        column_encoding={name: _encoding(kind) for name, kind in types.items() if not pa.types.is_string(kind)},
    )  # fmt: skip
    return sink.getvalue().to_pybytes()


def read(path: Path, most_rows: int | None = None) -> pa.Table:
    """Return a parquet file's table, every page checked against its checksum where it has one.

    Raises:
        NotFoundError: there is no such file.
        CorruptionError: the file is not parquet, or damaged.
        MismatchError: it has more than `most_rows` rows (found before they are decoded).
    """
    data = _bytes_of(path)
    try:
        parquet = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        rows = parquet.metadata.num_rows
        if most_rows is None or rows <= most_rows:
            return parquet.read()
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).strip()
        raise CorruptionError(f"{path} is not an undamaged parquet file: {reason}; write it again") from error
    raise MismatchError(f"{path} holds {rows} rows, expected at most {most_rows} (one per sample); give the right file")


def document(table: pa.Table, key: str, path: Path) -> dict[str, Any] | None:
    """Return the JSON object kept under a metadata key of a table, or None where the key is absent.

    Raises:
        CorruptionError: what stands there is not a JSON object.
    """
    text = (table.schema.metadata or {}).get(key.encode())
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise CorruptionError(f"{path}: its metadata '{key}' is damaged: {error}; write the file again") from None
    if not isinstance(found, dict):
        raise CorruptionError(f"{path}: its metadata '{key}' should be a JSON object; write the file again")
    return found


def require_schema(table: pa.Table, expected: pa.Schema, path: Path) -> None:
    """Do nothing if a table has exactly the expected columns and types.

    Raises:
        CorruptionError: a column is missing, unknown, or of another type; names the first one.
    """
    found = [(field.name, str(field.type)) for field in table.schema]
    wanted = [(field.name, str(field.type)) for field in expected]
    if found == wanted:
        return
    odd = [item for item in found if item not in wanted] or [item for item in wanted if item not in found] or found
    raise CorruptionError(
        f"{path} was changed after it was written: expected the columns {_listed(wanted)}, found {_listed(found)}; "
        f"look at '{odd[0][0]}', or write the file again"
    )


def _listed(columns: list[tuple[str, str]]) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in columns)


def _encoding(kind: pa.DataType) -> str:
    return "BYTE_STREAM_SPLIT" if pa.types.is_floating(kind) else "DELTA_BINARY_PACKED"


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"no file at {path}") from None
