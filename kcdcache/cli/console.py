"""Output of results, progress and log lines: with rich on a terminal, otherwise as plain lines."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import click

from kcdcache import errors
from kcdcache.commands import TextTable
from kcdcache.files import cloud
from kcdcache.files.cloud import FULL
from kcdcache.progress import EPOCH, Progress, silent

SCHEMA_VERSION = 0
LABELS = {"K_1H": "K_1H (kept as they are)", "K_Aug": "K_Aug (kept and enriched)", "K_0": "K_0 (dropped)"}
EVERY_SECONDS = 10
SPEED_SECONDS = 600
"""period over which a bar's speed and time left are measured: an epoch may take minutes"""


def printable(text: str) -> str:
    """Return `errors.printable` of a text, with URLs instead of the folders that mirror them."""
    return errors.printable(cloud.named(text))


def say(text: str) -> None:
    """Print a line on stderr; what nobody can read any more (a closed terminal, `2>&1 | head`) ends no work."""
    try:
        click.echo(text, err=True)
    except OSError as error:
        if error.errno not in FULL:  # a full disk may have space later
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def show(result: Mapping[str, Any], as_json: bool = False) -> None:
    """Print a result on stdout as one JSON object or as readable text."""
    if as_json:
        click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **result}))
    elif "toml" in result:
        click.echo(result["toml"])
    elif isinstance(table := result.get("table"), TextTable) and _is_terminal(sys.stdout):
        _show_table(table, _closing(result))
    else:
        click.echo(readable(result))


def readable(result: Mapping[str, Any], indent: str = "") -> str:
    """Return a result as text: its table, or else one line per entry, nested ones indented."""
    if "table" in result:
        return "\n".join(map(printable, [*str(result["table"]).split("\n"), "", _closing(result)]))
    lines = []
    for key, value in result.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{printable(str(key))}:", readable(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            lines += [f"{indent}{printable(str(key))}:", *(f"{indent}  {_entry(item)}" for item in value)]
        else:
            lines.append(f"{indent}{printable(f'{LABELS.get(key, key)}: {_brief(key, value)}')}")
    return "\n".join(lines)


@contextmanager
def telling(quiet: bool) -> Iterator[Progress]:
    """Log to stderr, and yield a progress function: bars on a terminal, otherwise occasional lines."""
    bars = LiveProgress()
    level = logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", handlers=[_Lines(bars.line)])
    try:
        yield silent if quiet else bars if _is_terminal(sys.stderr) else PlainProgress()
    finally:
        bars.stop()


class PlainProgress:
    """Progress lines on stderr: one per epoch, of other work one every ten seconds and the last one."""

    def __init__(self) -> None:
        self._began: dict[str, tuple[float, int]] = {}
        self._last = 0.0

    def __call__(self, what: str, done: int, total: int, remark: str) -> None:
        """Report the progress of one work."""
        now = time.monotonic()
        began, first = self._began.setdefault(what, (now, done))
        if what != EPOCH and now - self._last < EVERY_SECONDS and done < total:
            return
        self._last = now
        rate = (done - first) / (now - began) if now > began else 0
        left = f", {(total - done) / rate:,.0f} s left" if rate > 0 and done < total else ""
        line = (
            f"{what} {done:,} of {total:,}: {remark}{left}"
            if what == EPOCH
            else (f"{what}: {done:,} of {total:,} ({remark}{left})")
        )
        say(printable(line))
        if done >= total:
            self._began.pop(what)


class LiveProgress:
    """Progress bars, started by the first report; pickled for another process, plain lines."""

    def __init__(self) -> None:
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def stop(self) -> None:
        """Stop updating the bars."""
        if self._bars is not None:
            with suppress(OSError):  # the terminal may be gone
                self._bars.stop()

    def __call__(self, what: str, done: int, total: int, remark: str) -> None:
        """Report the progress of one work."""
        self._show(what, done, total, remark=printable(remark))
        if done >= total:
            self._bars.stop_task(self._tasks.pop(what))

    def inside(self, what: str, done: float, total: int) -> None:
        """Move a bar within a piece of its work, such as an epoch; see `progress.inside`."""
        self._show(what, done, total)

    def _show(self, what: str, done: float, total: int, **remark: str) -> None:
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        if what not in self._tasks:  # begun where the work is, so that a resumed one is not taken for fast
            self._tasks[what] = self._bars.add_task(printable(what), completed=done, total=total, remark="")
        self._bars.update(self._tasks[what], completed=done, total=total, **remark)

    def line(self, text: str) -> None:
        """Print a line above the bars, if there are any."""
        if self._bars is None:
            say(text)
        else:
            with suppress(OSError):
                self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __reduce__(self) -> tuple[type[PlainProgress], tuple[()]]:
        return PlainProgress, ()


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.progress import TimeRemainingColumn as Left
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(paced(task.speed))

    what, remark = (TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[remark]"))
    columns = (what, BarColumn(), MofNCompleteColumn(), Speed(), Left(), remark)
    console = Console(stderr=True, force_terminal=True)
    return Progress(*columns, console=console, speed_estimate_period=SPEED_SECONDS)


def paced(speed: float | None) -> str:
    """Return a bar's speed, per second or as seconds for one piece.

    >>> paced(1234.5), paced(2.5), paced(0.05), paced(None)
    ('1,234/s', '2.5/s', '20.0 s each', '')
    """
    if not speed:
        return ""
    return f"{speed:,.{0 if speed >= 10 else 1}f}/s" if speed >= 1 else f"{1 / speed:,.1f} s each"


class _Lines(logging.Handler):
    def __init__(self, line: Callable[[str], None]) -> None:
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        self._line(printable(self.format(record)))


def _is_terminal(stream: Any) -> bool:
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def _show_table(table: TextTable, closing: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, shown = Console(force_terminal=True), Table(box=box.SIMPLE_HEAD)
    for number, name in enumerate(table.head):
        shown.add_column(Text(printable(name)), justify="left" if number < table.left else "right")
    for row in table.rows:
        shown.add_row(*(Text(printable(cell)) for cell in row))
    above, below = ([Text(printable(line)) for line in lines] for lines in (table.above, (*table.below, "", closing)))
    console.print(*above, shown, *below, sep="\n")


def _closing(result: Mapping[str, Any]) -> str:
    if "next" in result:
        return f"next: {result['next']}"
    last = f"files: {result['files']}" if "files" in result else str(result["note"])
    report = result.get("report")
    return last if report in (None, result.get("files")) else f"{last}; report: {report}"


def _entry(item: Mapping[str, Any]) -> str:
    return printable("  ".join(f"{key}={_brief(key, value)}" for key, value in item.items()))


def _brief(key: str, value: Any) -> Any:
    """Return floats with six digits, except those meant to be passed to another command."""
    return f"{value:.6g}" if isinstance(value, float) and key != "keep" else value
