"""Results of commands as people read them: a short table in a fixed order, and the command that is run next."""

import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kcdcache import settings
from kcdcache.commands import Result, TextTable
from kcdcache.errors import printable

Rows = Iterator[tuple[str, str]]
AGAIN = "the same command, which resumes"


def presented(command: settings.Settings, result: Result) -> Result:
    """Return a result with a `table` and the `next` command, unless it is a plan or has a table already."""
    kind = type(command)
    if kind not in TABLES or result.keys() & {"table", "would", "unsealed"}:
        return result
    whole = result.get("finished", True)
    head, *rows = [tuple(map(printable, row)) for row in (TABLES[kind] if whole else _stopped)(command, result)]
    return {"table": TextTable(head, rows, left=2), "next": NEXT[kind](command, result) if whole else AGAIN}


def line(*words: Any) -> str:
    """Return words as a command line of kcdcache; None is left out.

    >>> line("train", "--data", "folder:my photos", None)
    "kcdcache train --data 'folder:my photos'"
    """
    return shlex.join(["kcdcache", *(str(word) for word in words if word is not None)])


def _fit(command: settings.FitCommand, result: Result) -> Rows:
    yield result["model"], str(command.out)
    yield from _accuracy(result)


def _train(command: settings.TrainCommand, result: Result) -> Rows:
    yield f"{result['model']}, {result['method']}", str(command.out)
    yield from _accuracy(result)
    share = f"{result['relative_cost']:.1%} of training on everything"
    yield "cost", f"{share}: {result['student_samples']:,} samples forwarded"
    yield "condensed set", f"{result['kept']:,} of {result['count']:,} samples: {command.out / result['condensed_set']}"


def _stopped(command: settings.Settings, result: Result) -> Rows:
    yield "stopped", str(result["run"])
    yield "epochs", f"{result['epochs_done']} of {result['epochs']} are done"


def _accuracy(result: Result) -> Rows:
    best = f"best {result['accuracy_best']:.2%} in epoch {result['best_epoch'] + 1}"
    yield "test accuracy", f"{result['accuracy_last']:.2%} after {result['epochs']} epochs ({best})"
    yield "time", f"{result['seconds']:,.1f} s"


def _precompute(command: settings.PrecomputeCommand, result: Result) -> Rows:
    yield "store", str(result["store"])
    fields = ", ".join(f"{name} ({form})" for name, form in result["fields"].items())
    yield "contents", f"{result['count']:,} samples x {result['views']} views: {fields}"
    yield "size", _bytes(result["bytes"])
    if right := [share for share in result.get("teacher_accuracy") or () if share is not None]:
        yield "teacher", f"{sum(right) / len(right):.2%} right on the training views"
    yield "id", str(result["knowledge_id"])


def _condense(command: settings.CondenseCommand, result: Result) -> Rows:
    yield "condensed set", f"{command.out}{' (was there already)' if result['already'] else ''}"
    parts = f"{result['K_1H']:,} as they are, {result['K_Aug']:,} with a dropped sample mixed in"
    yield "samples", f"{result['kept']:,} of {result['samples']:,}: {parts}"
    if result["classes"]:
        yield "per class", f"{result['class_min']:,} to {result['class_max']:,} samples"
    yield "digest", str(result["digest"])


def _export(command: settings.ExportCommand, result: Result) -> Rows:
    yield "exported set", str(command.out)
    yield "samples", f"{result['kept']:,} kept and {result['partners']:,} mixed in, of {result['samples']:,}"
    saved = 1 - result["bytes"] / result["bytes_full"]
    yield "teacher outputs", f"{_bytes(result['bytes'])}, {saved:.0%} less than the store's"
    yield "images", f"{result['images']:,}" if command.with_images else "not included (--with-images adds them)"
    yield "size", _bytes(result["bytes_on_disk"])


def _bytes(count: int) -> str:
    """Return a number of bytes with a unit.

    >>> _bytes(512), _bytes(1_640_000)
    ('512 bytes', '1.6 MB')
    """
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if count >= 10**power:
            return f"{count / 10**power:,.1f} {unit}"
    return f"{count} bytes"


def _after_fit(command: settings.FitCommand, result: Result) -> str:
    views = max(1, command.training.epochs // 3)
    return line(
        "precompute", "--data", command.data, "--teacher", command.out, "--store", command.out.parent / "store",
        "--views", views,
    )  # fmt: skip


def _after_precompute(command: settings.PrecomputeCommand, result: Result) -> str:
    out = command.store.parent / "student"
    return line("train", "--data", command.data, "--store", command.store, "--student", "resnet8", "--out", out)


def _after_train(command: settings.TrainCommand, result: Result) -> str:
    if command.condensed is not None:
        return line("report", command.out)
    reused = command.out / result["condensed_set"]
    return line(
        "train", "--data", command.data, "--store", command.store, "--student", command.training.student,
        "--manifest", reused, "--stages", 1, "--out", command.out.parent / f"{command.out.name}-reuse",
    )  # fmt: skip


def _after_condense(command: settings.CondenseCommand, result: Result) -> str:
    return line("train", "--data", "DATA", "--store", command.store, "--student", "NETWORK", "--manifest", command.out,
                "--stages", 1, "--out", "RUN")  # fmt: skip


def _after_export(command: settings.ExportCommand, result: Result) -> str:
    data = ("--data", command.data or "DATA") if not command.with_images else ()
    return line("train", "--condensed", command.out, *data, "--student", "NETWORK", "--out", "RUN")


TABLES: Mapping[type[settings.Settings], Callable[[Any, Result], Rows]] = {
    settings.FitCommand: _fit,
    settings.PrecomputeCommand: _precompute,
    settings.TrainCommand: _train,
    settings.CondenseCommand: _condense,
    settings.ExportCommand: _export,
}
NEXT: Mapping[type[settings.Settings], Callable[[Any, Result], str]] = {
    settings.FitCommand: _after_fit,
    settings.PrecomputeCommand: _after_precompute,
    settings.TrainCommand: _after_train,
    settings.CondenseCommand: _after_condense,
    settings.ExportCommand: _after_export,
}
