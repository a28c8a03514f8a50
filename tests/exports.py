"""Exported condensed sets of a few digits, small enough to make in every test file that needs one."""

from types import SimpleNamespace

import numpy as np
from lessons import condensed as condensed_set
from pupils import SCHOOL, command, school

from kcdcache import commands, condense, config, export, manifest
from kcdcache.config import CondenseSettings
from kcdcache.values import Values

FIELDS = ("logits", "penultimate")
ONE_STAGE = SCHOOL | {"stages": 1, "epochs": 2}


def narrowed(knowledge, keep=0.4):
    """A set that needs fewer rows than there are: of 60 % kept once, two thirds, half of them with a partner."""
    first = condensed_set(knowledge, keep=0.6)
    made = Values(
        visits=np.ones(knowledge.count, np.int32), value=np.random.default_rng(1).random(knowledge.count, np.float32)
    )
    return condense.condense(
        made, CondenseSettings(candidates="current"), knowledge_id=knowledge.knowledge_id, count=knowledge.count, stage=2,
        keep=keep, labels=knowledge.labels, previous=first, classes=10, data_digest=knowledge.knowledge.data.digest,
    )  # fmt: skip


def prepared(root, **changes):
    """A school whose store has two fields, and a condensed set for it."""
    place = school(root, **({"fields": FIELDS} | changes))
    place.set = narrowed(place.knowledge)
    place.file = root / "set.parquet"
    manifest.write(place.file, place.set)
    return place


def exporting(place, out, dry_run=False, **changes):
    given = {"manifest": place.file, "store": place.knowledge.path, "out": out} | changes
    return export.run(config.make(commands.ExportCommand, given), dry_run=dry_run)


def taught(place, out, **changes):
    """Train for two epochs as the command does; return the run's folder."""
    wanted = ONE_STAGE | {"out": out, "device": "cpu"} | changes
    if "condensed" in wanted:
        place = SimpleNamespace(**{**vars(place), "knowledge": SimpleNamespace(path=None)})
    command(place, "train", **{key: value for key, value in wanted.items()})
    return out
