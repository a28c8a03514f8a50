"""One function per command: settings in, result out; imported when called, so that wrong settings are told first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from kcdcache import settings
from kcdcache.progress import Progress, silent

Result = dict[str, Any]
"""what a command tells: JSON values by name"""


class TextTable(str):
    """Lines of aligned cells, in JSON as that text; it still knows its cells, so that a terminal can fit them."""

    above: tuple[str, ...]
    """lines of text before them"""
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int
    """columns aligned to the left, from the first on; numbers follow"""
    below: tuple[str, ...]
    """lines of text after them"""

    def __new__(
        cls,
        head: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        left: int = 0,
        above: Sequence[str] = (),
        below: Sequence[str] = (),
        rule: bool = False,
    ) -> "TextTable":
        """Align cells; with `rule` a line of dashes follows the head."""
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        sides = [str.ljust if place < left else str.rjust for place in range(len(widths))]
        lines = ["  ".join(map(lambda side, *cell: side(*cell), sides, row, widths)) for row in (head, *rows)]
        lines[1:1] = ["-" * len(lines[0])] if rule else []
        made = super().__new__(cls, "\n".join([*above, *lines, *below]))
        made.head, made.rows, made.left = tuple(head), tuple(map(tuple, rows)), left
        made.above, made.below = tuple(above), tuple(below)
        return made


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: what it takes, and where the function is that does it."""

    takes: type[settings.Settings]
    where: str
    """module and function, of (settings, progress, dry_run) where it writes and of (settings, progress) elsewhere"""
    writes: bool = True
    """whether it can be asked what it would do"""

    def __call__(self, given: Any, progress: Progress = silent, dry_run: bool = False) -> Result:
        """Do it; names and values that cannot be are refused before anything heavy is imported.

        Raises:
            KcdcacheError: as the command says.
        """
        from kcdcache.commands import checks

        checks.require_possible(given)
        checks.require_present(given)
        work = resolve_name(f"kcdcache.{self.where}")
        done: Result = work(given, progress, dry_run) if self.writes else work(given, progress)
        return done


COMMANDS: Mapping[str, Command] = {
    "fit": Command(takes=settings.FitCommand, where="commands.train:fit"),
    "precompute": Command(takes=settings.PrecomputeCommand, where="commands.precompute:run"),
    "train": Command(takes=settings.TrainCommand, where="commands.train:run"),
    "methods": Command(takes=settings.MethodsCommand, where="commands.methods:run", writes=False),
    "condense": Command(takes=settings.CondenseCommand, where="commands.condense:run"),
    "export": Command(takes=settings.ExportCommand, where="commands.results:export"),
    "diff": Command(takes=settings.DiffCommand, where="commands.results:diff", writes=False),
    "report": Command(takes=settings.ReportCommand, where="commands.results:report", writes=False),
    "seal": Command(takes=settings.SealCommand, where="commands.results:seal", writes=False),
    "inspect": Command(takes=settings.InspectCommand, where="commands.results:inspect", writes=False),
    "verify": Command(takes=settings.VerifyCommand, where="commands.verify:run", writes=False),
}
"""name -> command, in the order of a first session; `run`, which does many of them, stands above"""
STEPS = ("fit", "precompute", "train", "condense")
"""the commands that can be steps of a recipe"""
