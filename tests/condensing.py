"""Values and a store's records for condensing."""

import random
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st
from stores import knowledge

from kcdcache import settings
from kcdcache.commands import condense as condense_command
from kcdcache.condensation import manifest, value_files, values
from kcdcache.files import parquet, records

COUNT = 150


def some_values(seed=0, count=COUNT):
    """Many equal values, some samples unseen."""
    random = np.random.default_rng(seed)
    visits = random.integers(0, 4, count).astype(np.int32)
    return values.Values(visits, np.where(visits > 0, random.integers(0, 12, count), 0).astype(np.float32))


def labels(count=COUNT):
    return np.arange(count) * 7 % 2


def identify(store, who):
    """What condensing reads of a store: whose knowledge it is."""
    (store / "_kcd").mkdir(parents=True)
    known = {"format_version": 0, "knowledge": who.document(), "knowledge_id": who.knowledge_id}
    (store / "_kcd/identity.json").write_bytes(records.canonical_json(known))


def prepared(root):
    """A store's records; values as one file, in parts and as another tool's files; and a manifest to come from."""
    identify(root / "store", knowledge())
    document = {"knowledge_id": knowledge().knowledge_id, "student": "resnet8", "epoch": 3}
    value_files.write(root / "values.parquet", some_values(), labels(), document)
    in_parts(root / "values.parts", root / "values.parquet", 32)
    theirs(root / "theirs", some_values(), labels(), [50, 53, 0, 47])
    left_out = np.arange(0, 150, 5)
    before = manifest.full(manifest.Samples(knowledge().knowledge_id, COUNT, labels(), 2, "dd", left_out))
    manifest.write(root / "before.parquet", before)
    manifest.write(root / "before.parts", before, partition_rows=40)
    return root


def in_parts(folder, file, rows):
    """Our values file as a folder of parts of so many samples."""
    table, found = pq.read_table(file), value_files.read(file, COUNT)
    folder.mkdir()
    schema, parts = table.schema.remove_metadata(), []
    for span in parquet.spans(COUNT, rows):
        parts.append(parquet.write_part(folder, span, schema, [table.slice(span.first, span.stop - span.first)]))
    seal = parquet.Seal(
        key=value_files.METADATA_KEY, samples=COUNT, partition_rows=rows, document=found.document,
        fingerprint=found.fingerprint(), parts=tuple(parts),
    )  # fmt: skip
    parquet.seal(folder, seal)


def theirs(folder, found, marks, sizes):
    """Files of another tool, of so many rows each, in an order that is not that of their names."""
    folder.mkdir()
    first = 0
    for number, size in enumerate(sizes):
        some = slice(first, first + size)
        columns = {"index": np.arange(first, first + size), "value": found.value[some].astype(float)}
        table = pa.table({**columns, "visits": found.visits[some], "label": marks[some]})
        pq.write_table(table, folder / f"{9 - number}.parquet", row_group_size=20)
        first += size


def condensed(root, out, case):
    """What `kcdcache condense` tells, with the settings of a case; names of inputs are those of `prepared`."""
    inputs = {name: root / case[name] for name in ("values", "previous") if case.get(name)}
    given = {"store": root / "store", "keep": 0.6, **case, **inputs, "out": out}
    return condense_command.run(settings.make(settings.CondenseCommand, given))


def cases(number, seed=7):
    """So many ways to condense, over all settings and forms of input."""
    pick = random.Random(seed).choice
    fields = {name: get_args(field.annotation) for name, field in settings.CondenseSettings.model_fields.items()}
    return [
        {name: pick(choices) for name, choices in fields.items() if choices}
        | {name: pick([True, False]) for name in ("augment_kept", "stratify")}
        | {
            "values": pick(["values.parquet", "values.parts", "theirs", "theirs/*.parquet"]),
            "previous": pick([None, "before.parquet", "before.parts"]),
            "keep": pick([0.01, 0.3, 0.55, 0.79]),
            "eps_max": pick([0.0, 0.3]),
            "condense_seed": pick([0, 2**63]),
            "partition_rows": pick([13, 40, 1000]),
        }
        for _ in range(number)
    ]


OPTIONS = {
    name: st.sampled_from(get_args(field.annotation))
    for name, field in settings.CondenseSettings.model_fields.items()
    if get_args(field.annotation)
}
