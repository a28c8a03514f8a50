"""One function per command: settings in, result out; imported when called, so that wrong settings are told first."""

from collections.abc import Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from kcdcache import settings
from kcdcache.progress import Progress, silent

Result = dict[str, Any]
"""what a command tells: JSON values by name"""


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
    "fit": Command(takes=settings.FitCommand, where="commands.fit:run"),
    "precompute": Command(takes=settings.PrecomputeCommand, where="commands.precompute:run"),
    "train": Command(takes=settings.TrainCommand, where="commands.train:run"),
    "condense": Command(takes=settings.CondenseCommand, where="commands.condense:run"),
    "export": Command(takes=settings.ExportCommand, where="commands.export:run"),
    "methods": Command(takes=settings.MethodsCommand, where="commands.reading:methods", writes=False),
    "diff": Command(takes=settings.DiffCommand, where="commands.reading:diff", writes=False),
    "report": Command(takes=settings.ReportCommand, where="commands.reading:report", writes=False),
    "seal": Command(takes=settings.PathCommand, where="commands.reading:seal", writes=False),
    "inspect": Command(takes=settings.PathCommand, where="commands.reading:inspect", writes=False),
    "verify": Command(takes=settings.VerifyCommand, where="commands.verify:run", writes=False),
}
"""name -> command; `run`, which does many of them, stands above"""
STEPS = ("fit", "precompute", "train", "condense")
"""the commands that can be steps of a recipe"""
