"""A run's metrics for other tools: a CSV file, and events for TensorBoard. Both are made from the checkpoint's rows."""

import csv
import io
import shutil
from collections.abc import Sequence
from typing import Any

from kcdcache.errors import SettingsError
from kcdcache.files import atomic, cloud
from kcdcache.runs.folder import RunFolder
from kcdcache.runs.state import MetricsRow

Entries = dict[str, int | float]
"""column -> number of an epoch"""
TERM = "loss_"
"""beginning of the columns of the loss's terms, which add up to `loss`"""
MEASURED = ("agreement", *(f"{who}test_{what}" for who in ("", "ema_") for what in (
    "accuracy", "loss", "calibration_error",
)))  # fmt: skip


class Logs:
    """The logs that a run was asked for. Written whole from the rows, so that a resumed run doubles none."""

    def __init__(self, folder: RunFolder, kinds: Sequence[str], count: int) -> None:
        """Log as `kinds` say (csv, tensorboard) for a training split of `count` samples.

        Raises SettingsError for events of a run in a bucket.
        """
        self._folder, self._kinds, self._count = folder, kinds, count
        self._events: Any = None
        self._logged = 0
        if "tensorboard" in kinds and cloud.is_mirrored(folder.path):
            raise SettingsError(
                f"--log tensorboard writes to a local folder, and the run is at {cloud.named(str(folder.path))}; give "
                "--log csv"
            )

    def write(self, rows: Sequence[MetricsRow]) -> None:
        """Log all finished epochs of the run."""
        found = [entries(row, self._count) for row in rows]
        if "csv" in self._kinds and rows:
            atomic.write_atomic(self._folder.table, as_csv(found))
        if "tensorboard" in self._kinds and rows:
            self._write_events(found)

    def close(self) -> None:
        """End the events."""
        if self._events is not None:
            self._events.close()

    def _write_events(self, found: Sequence[Entries]) -> None:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            shutil.rmtree(self._folder.events, ignore_errors=True)  # an earlier part of the run is written again
            self._events = SummaryWriter(str(self._folder.events))
        for one in found[self._logged :]:
            for name, value in one.items():
                if name != "epoch":
                    self._events.add_scalar(name, value, one["epoch"])
        self._logged = len(found)
        self._events.flush()


def entries(row: MetricsRow, count: int) -> Entries:
    """Return an epoch's columns that are known, in their order; epochs count from 1.

    `keep` is the fraction of all `count` samples in the condensed set, `samples` the points consumed in the epoch.
    """
    terms = row.terms or {}
    found = {
        "epoch": row.epoch + 1,
        "stage": row.stage,
        "learning_rate": row.learning_rate,
        "keep": 1.0 if row.kept is None else row.kept / count,
        "samples": row.samples,
        "samples_so_far": row.samples_so_far,
        "loss": row.loss,
        **{f"{TERM}{name}": terms[name] for name in sorted(terms, key=_place)},
        "train_accuracy": row.train_accuracy,
        **{name: getattr(row, name) for name in MEASURED},
    }
    return {name: value for name, value in found.items() if value is not None}


def as_csv(found: Sequence[Entries]) -> bytes:
    """Return rows as CSV with one header; what an epoch lacks is left empty."""
    columns = list(dict.fromkeys(name for one in found for name in one))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue().encode()


def _place(term: str) -> tuple[bool, str]:
    """Order the terms: hard and soft labels, then the methods' own."""
    return term not in ("hard", "soft"), term
