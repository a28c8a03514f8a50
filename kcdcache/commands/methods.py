"""Every method for a pair of networks: what it reads of a store, and how many bytes that takes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kcdcache.commands.tables import TextTable
from kcdcache.errors import SettingsError
from kcdcache.methods import catalogue, registry
from kcdcache.methods.base import Pair
from kcdcache.methods.catalogue import METHODS
from kcdcache.networks.registry import tap_shapes
from kcdcache.settings import MethodSettings
from kcdcache.store import encoding, plan
from kcdcache.teacher import fields
from kcdcache.training.sampling import SAMPLING


def run(teacher: str, student: str, classes: int, size: int, encoded: str = "float16") -> dict[str, Any]:
    """Return every method for a pair on square colour images, with the bytes it keeps per sample and view.

    A method that this pair cannot use has the reason in place of its fields. Vectors and maps count in float16 where
    `encoded` is top:K, images of BSS as bytes.

    Raises:
        SettingsError: a network is unknown or cannot see such images.
    """
    pair = Pair(
        teacher=teacher,
        student=student,
        teacher_taps=tap_shapes(teacher, classes, 3, size, size),
        student_taps=tap_shapes(student, classes, 3, size, size),
        image=(3, size, size),
        labels=np.arange(classes),
        kept=np.arange(classes),
        settings=MethodSettings(),
        seed=0,
    )
    found = [_method(name, pair, encoded) for name in METHODS]
    return {
        "teacher": teacher,
        "student": student,
        "classes": classes,
        "size": size,
        "table": _table(found),
        "note": (
            f"bytes per sample and view for {teacher} -> {student}, {classes} classes, {size}x{size}; "
            f"join methods with +, as in crd+kd; --sampling is one of {', '.join(SAMPLING)}"
        ),
        "methods": found,
        "sampling": [
            {"sampling": name, "about": scheme.about, "source": scheme.source} for name, scheme in SAMPLING.items()
        ],
    }


def _method(name: str, pair: Pair, encoded: str) -> dict[str, Any]:
    method = METHODS[name]
    settings = MethodSettings(method=name)
    weights = catalogue.weights_of(settings)
    row: dict[str, Any] = {
        "method": name,
        "about": method.about,
        "source": method.source,
        "live": method.live,
        "gamma": weights.gamma,
        "alpha": weights.alpha,
        "beta": weights.parts[name],
        "temperature": weights.temperature,
        "recipe": catalogue.recipe(name, pair.student),
        "reads": [],
        "bytes": None,
        "problem": None,
    }
    try:
        reads = registry.make_loss(weights, lambda: pair).fields
        return row | {"reads": list(reads), "bytes": bytes_of(reads, pair.teacher_taps, pair.image, encoded)}
    except SettingsError as error:
        return row | {"problem": f"not for this pair: {error}"}


def bytes_of(names: Sequence[str], taps: fields.Taps, image: tuple[int, int, int], encoded: str) -> int:
    """Return the bytes of one sample's rows of some fields in one view, before padding."""
    total = 0
    for name in names:
        form = encoding.parse(fields.encoding_for(name, encoded), name, fields.row_shape(name, taps, image))
        total += sum(plan.row_bytes(spec.row_shape, spec.dtype) for spec in form.arrays)
    return total


def _table(rows: Sequence[dict[str, Any]]) -> TextTable:
    cells = []
    for row in rows:
        reads = row["problem"] or ", ".join(row["reads"]) or "-"
        size = "-" if row["bytes"] is None else f"{row['bytes']:,}"
        cells.append([row["method"], size, "live" if row["live"] else "cached", reads, row["source"]])
    return TextTable(("method", "bytes", "teacher", "reads", "source"), cells, left=5)
