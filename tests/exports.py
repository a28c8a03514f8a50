"""Exported condensed sets of a few digits, small enough to make in every test file that needs one."""

import numpy as np
from pupils import SCHOOL, SPEC, executed, school

from kcdcache.condensation import manifest, summary
from kcdcache.condensation.manifest import Samples
from kcdcache.condensation.values import Values
from kcdcache.files.atomic import sha256_file
from kcdcache.settings import CondenseSettings

FIELDS = ("logits", "penultimate")
ONE_STAGE = SCHOOL | {"stages": 1, "epochs": 2}


def narrowed(knowledge, keep=0.4):
    """A set that needs fewer rows than there are: of 60 % kept once, two thirds, half of them with a partner."""
    identity = knowledge.knowledge.data
    random = np.random.default_rng(1).random((2, knowledge.count), np.float32)
    previous = None
    for stage, (share, values) in enumerate(zip((0.6, keep), random, strict=True), 1):
        previous = summary.condense(
            Values(visits=np.ones(knowledge.count, np.int32), value=values), CondenseSettings(candidates="current"),
            Samples(
                knowledge.knowledge_id, knowledge.count, knowledge.labels, 10, identity.digest, knowledge.skipped
            ),
            stage=stage, keep=share, previous=previous,
        )  # fmt: skip
    return previous


def prepared(root, **changes):
    """A school whose store has two fields, and a condensed set for it."""
    place = school(root, **({"fields": FIELDS} | changes))
    place.set = narrowed(place.knowledge)
    place.file = root / "set.parquet"
    manifest.write(place.file, place.set)
    return place


def exporting(place, out, dry_run=False, **changes):
    given = {"manifest": place.file, "store": place.knowledge.path, "out": out} | changes
    return executed("export", given, dry_run)


def trained(out, **changes):
    """Train as the command does; return the SHA-256 of the student's weights."""
    given = ONE_STAGE | {"data": SPEC, "device": "cpu", "out": out} | changes
    executed("train", given)
    return sha256_file(out / "student.safetensors")
