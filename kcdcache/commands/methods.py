"""`methods`: all methods for a pair of networks, with the fields they read and their bytes."""

from typing import Any

import numpy as np

from kcdcache.commands import Result, TextTable
from kcdcache.errors import SettingsError
from kcdcache.methods import catalogue, run_loss
from kcdcache.methods.base import Pair
from kcdcache.methods.catalogue import METHODS
from kcdcache.networks.registry import tap_shapes
from kcdcache.progress import Progress, silent
from kcdcache.settings import MethodsCommand, MethodSettings
from kcdcache.store import encoding
from kcdcache.teacher import fields
from kcdcache.training.sampling import SAMPLING


def run(command: MethodsCommand, progress: Progress = silent) -> Result:
    """Return all methods for a pair of networks on square colour images, with bytes per sample and view.

    A method that does not fit the pair has the reason instead of its fields. With encoding top:K, vectors and maps
    count as float16; images of BSS count as bytes. Raises SettingsError if a network cannot process such images.
    """
    teacher, student, classes, size = command.teacher, command.student, command.classes, command.size
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
    found = [_method(name, pair, command.encoding) for name in METHODS]
    return {
        **command.model_dump(exclude={"encoding"}),
        "table": TextTable(("method", "bytes", "teacher", "reads", "source"), [*map(_cells, found)], left=5),
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
    method, weights = METHODS[name], catalogue.weights_of(MethodSettings(method=name))
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
    }
    try:
        reads = run_loss.make_loss(weights, lambda: pair).fields
        size = sum(_row_bytes(field, pair, encoded) for field in reads)
        return row | {"reads": list(reads), "bytes": size, "problem": None}
    except SettingsError as error:
        return row | {"reads": [], "bytes": None, "problem": f"not for this pair: {error}"}


def _row_bytes(field: str, pair: Pair, encoded: str) -> int:
    shape = fields.row_shape(field, pair.teacher_taps, pair.image)
    return encoding.parse(fields.encoding_for(field, encoded), field, shape).row_bytes


def _cells(row: dict[str, Any]) -> list[str]:
    reads = row["problem"] or ", ".join(row["reads"]) or "-"
    size = "-" if row["bytes"] is None else f"{row['bytes']:,}"
    return [row["method"], size, "live" if row["live"] else "cached", reads, row["source"]]
