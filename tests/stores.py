"""Small real stores for the tests: made, grown and compared."""

import numpy as np
import torch

from kcdcache.datasets.spec import DataIdentity
from kcdcache.files.records import canonical_json, parse
from kcdcache.settings import ViewRule
from kcdcache.store import encoding, reader, writer
from kcdcache.store.identity import Knowledge, TeacherIdentity
from kcdcache.store.log import PlanRecord
from kcdcache.store.plan import plan_from, plan_store

CLASSES, WIDTH = 7, 5


def knowledge(count=150, weights="aa"):
    return Knowledge(
        teacher=TeacherIdentity(architecture="net", weights=weights, transform={"mean": (0.5,)}, precision="float32"),
        data=DataIdentity(count=count, classes=("a", "b"), image_size=(4, 4), digest="dd"),
        views=ViewRule(rule="none", padding=0, fill="zero", size=(4, 4), seed=0),
    )


def form(field="logits", text="float16"):
    return encoding.parse(text, field, (CLASSES,) if field == "logits" else (WIDTH,))


def values(field, view, count=150):
    """The float32 teacher output of a view: any fixed function of field, view and sample does."""
    shape = (count, CLASSES if field == "logits" else WIDTH)
    return torch.from_numpy(np.random.default_rng([len(field), view]).normal(0, 3, shape).astype(np.float32))


def write_part(writing, part, skipped=-1):
    """Write a part; of the sample `skipped`, if it holds that, as if the teacher had failed on it."""
    rows, statistics = {}, {}
    mask = torch.arange(part.start, part.stop) == skipped
    for field in part.fields:
        mine = values(field, part.view, writing.plan.count)[part.start : part.stop]
        rows |= writing.plan.encodings[field].encode(mine, part.start, mask if mask.any() else None)
        statistics[field] = encoding.statistics(mine)
    writing.write_part(part, rows, statistics, {"correct": part.view + 1}, (skipped,) if mask.any() else ())


def finish(writing, skipped=-1):
    for part in writing.pending():
        write_part(writing, part, skipped)
    writing.seal()


def creating(path, plan, who=None, **shard):
    labels, digests = np.arange(plan.count) % CLASSES, np.arange(plan.count, dtype=np.uint64) ** 3
    return writer.create(path, who or knowledge(plan.count), plan, labels, digests, **shard)


def plan_of(count=150, views=2, text="float16", **settings):
    return plan_store(count, views, [form(text=text)], **settings)


def make(path, plan=None):
    with creating(path, plan or plan_of()) as writing:
        finish(writing)
    return path


def plan_of_document(document):
    """The plan that a store of this plan document would have."""
    return plan_from(parse(PlanRecord, canonical_json(document), "a plan"))


def small_parts(count, views, part_rows, chunk_rows, text="float16", compression="none"):
    """A plan whose parts and chunks are far smaller than `plan_store` makes them, so that tests see many."""
    document = plan_of(count, views, text, compression=compression).document()
    document["part_rows"] = part_rows
    document["fields"][0]["chunk_rows"] = dict.fromkeys(document["fields"][0]["chunk_rows"], chunk_rows)
    return plan_of_document(document)


def content(path):
    """File -> bytes of a file or folder."""
    if path.is_file():
        return path.read_bytes()
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def many_chunks(path):
    """A sealed store of 150 samples, 2 views, 3 parts a view, 2 chunks a part."""
    return make(path, small_parts(150, 2, 64, 32))


def grown(path, **what):
    with writer.grow(path, knowledge(), **what) as growing:
        finish(growing)
    return reader.open(path)
