"""One function per command: settings in, result out. Imported on call, so that wrong settings are reported first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from kcdcache.progress import Progress, silent

if TYPE_CHECKING:
    from kcdcache.settings import Settings

Result = dict[str, Any]
"""result of a command: JSON values by name"""


MOST_COLUMNS = 100
"""characters per line of a table of results"""


class TextTable(str):
    """A table as text with aligned columns; it keeps its cells for display on a terminal."""

    above: tuple[str, ...]
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int
    """number of left-aligned columns; the others are right-aligned"""
    below: tuple[str, ...]

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
        """Align the cells; with `rule`, a line of dashes follows the head."""
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        sides = [str.ljust if place < left else str.rjust for place in range(len(widths))]
        lines = ["  ".join(map(lambda side, *cell: side(*cell), sides, row, widths)).rstrip() for row in (head, *rows)]
        lines[1:1] = ["-" * max(map(len, lines))] if rule else []
        made = super().__new__(cls, "\n".join([*above, *lines, *below]))
        made.head, made.rows, made.left = tuple(head), tuple(map(tuple, rows)), left
        made.above, made.below = tuple(above), tuple(below)
        return made

    def fitted(self, expendable: Sequence[str], width: int = MOST_COLUMNS) -> "TextTable":
        """Return the table without the first of the `expendable` columns that make it wider than `width`."""
        made = self
        for name in expendable:
            if max(map(len, made.split("\n")[len(made.above) :][: len(made.rows) + 1])) <= width:
                break
            kept = [place for place, title in enumerate(made.head) if title != name]
            rows = [[row[place] for place in kept] for row in made.rows]
            left = sum(place < made.left for place in kept)
            head = [made.head[place] for place in kept]
            made = TextTable(head, rows, left=left, above=made.above, below=made.below, rule=True)
        return made


@dataclass(frozen=True)
class Command:
    """A command and the place of its function."""

    name: str
    summary: str
    where: str
    """module:function, called with (settings, progress), and dry_run if `writes`"""
    writes: bool = True
    """whether it has --dry-run"""

    @property
    def takes(self) -> "type[Settings]":
        """Class of its settings; imported on access, so that `kcdcache --help` stays fast."""
        found: type[Settings] = resolve_name(f"kcdcache.settings:{self.name.capitalize()}Command")
        return found

    def __call__(self, given: Any, progress: Progress = silent, dry_run: bool = False) -> Result:
        """Check the settings before anything heavy is imported, then run the command."""
        from kcdcache.commands import checks

        checks.require_possible(given)
        checks.require_present(given)
        result: Result = resolve_name(f"kcdcache.{self.where}")(given, progress, *([dry_run] if self.writes else []))
        return result


READ_ONLY = {"methods", "evaluate", "diff", "report", "seal", "inspect", "verify"}
"""commands without --dry-run"""
_TABLE = {
    "fit": ("train:fit", "Train a teacher or a plain baseline on hard labels."),
    "precompute": ("precompute:run", "Run the teacher once and store its outputs."),
    "train": ("train:run", "Train a student from a store, condensing between stages (Algorithm 1)."),
    "evaluate": ("evaluate:run", "Measure a network: accuracy, loss, calibration, agreement with a store."),
    "methods": ("methods:run", "List the distillation methods: fields they read, bytes per sample, source."),
    "condense": ("condense:run", "Turn values into the next condensed set (a manifest)."),
    "export": ("artifacts:export", "Write a condensed set and its knowledge into one folder, to train elsewhere."),
    "diff": ("artifacts:diff", "Compare two condensed sets, runs (stage by stage) or exported sets."),
    "report": ("artifacts:report", "Write one HTML file about finished runs: tables, figures, images, provenance."),
    "seal": ("artifacts:seal", "Seal a complete store that its last writer did not seal."),
    "inspect": (
        "artifacts:inspect",
        "Show the contents of a store, manifest, values file, run, exported set or network.",
    ),
    "verify": ("verify:run", "Check files for damage; with a teacher, recompute some samples."),
}
COMMANDS: Mapping[str, Command] = {
    name: Command(name, summary, f"commands.{where}", writes=name not in READ_ONLY)
    for name, (where, summary) in _TABLE.items()
}
"""commands by name, in the order of a first session; the command line adds `run`"""
STEPS = ("fit", "precompute", "train", "condense")
"""commands that can be steps of a recipe"""
