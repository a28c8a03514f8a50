"""One function per command: settings in, result out; imported when called, so that wrong settings are told first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from kcdcache.progress import Progress, silent

if TYPE_CHECKING:
    from kcdcache.settings import Settings

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


@dataclass(frozen=True)
class Command:
    """A command: what it does, what it takes, and where the function is that does it."""

    name: str
    summary: str
    where: str
    """module and function, of (settings, progress, dry_run) where it writes and of (settings, progress) elsewhere"""
    writes: bool = True
    """whether it can be asked what it would do"""

    @property
    def takes(self) -> "type[Settings]":
        """Class of its settings; imported when asked for, so that `kcdcache --help` stays fast."""
        found: type[Settings] = resolve_name(f"kcdcache.settings:{self.name.capitalize()}Command")
        return found

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


_ALL = (
    Command("fit", "Train a teacher or a plain baseline on hard labels.", "commands.train:fit"),
    Command("precompute", "Run the teacher once and keep its outputs in a store.", "commands.precompute:run"),
    Command("train", "Train a student from a store, condensing between stages (Algorithm 1).", "commands.train:run"),
    Command(
        "methods",
        "List the distillation methods: what each reads of the teacher, bytes per sample, source.",
        "commands.methods:run",
        writes=False,
    ),
    Command("condense", "Turn values into the next condensed set (a manifest).", "commands.condense:run"),
    Command(
        "export",
        "Write a condensed set and the knowledge it needs as one folder, for another machine or the hub.",
        "commands.artifacts:export",
    ),
    Command(
        "diff",
        "Compare two condensed sets, runs stage by stage, or exported sets.",
        "commands.artifacts:diff",
        writes=False,
    ),
    Command(
        "report",
        "Write one HTML file about finished runs: tables, figures, images, provenance.",
        "commands.artifacts:report",
        writes=False,
    ),
    Command(
        "seal",
        "Seal a store whose parts are all written, should the process that would have done so have ended.",
        "commands.artifacts:seal",
        writes=False,
    ),
    Command(
        "inspect",
        "Show the contents of a store, manifest, values file, run, exported set or network.",
        "commands.artifacts:inspect",
        writes=False,
    ),
    Command(
        "verify",
        "Check that files are what was written; with a teacher, compute some points again.",
        "commands.verify:run",
        writes=False,
    ),
)
COMMANDS: Mapping[str, Command] = {command.name: command for command in _ALL}
"""name -> command, in the order of a first session; `run`, which does many of them, stands above"""
STEPS = ("fit", "precompute", "train", "condense")
"""the commands that can be steps of a recipe"""
