"""Short commands: inspect, diff, methods, report and seal. What each needs is imported when it is called."""

from kcdcache.commands import Result
from kcdcache.errors import SettingsError
from kcdcache.progress import Progress
from kcdcache.settings import DiffCommand, MethodsCommand, PathCommand, ReportCommand


def inspect(command: PathCommand, progress: Progress) -> Result:
    """Return what lies at a path."""
    from kcdcache.report import show

    return show.inspect(command.path)


def seal(command: PathCommand, progress: Progress) -> Result:
    """Seal a store whose parts are all written; return whether that was done now."""
    from kcdcache.store import writer

    return {"store": str(command.path), "sealed": "now" if writer.seal(command.path) else "before"}


def diff(command: DiffCommand, progress: Progress) -> Result:
    """Return how two condensed sets, runs or exported sets differ."""
    from kcdcache.commands import diff

    return diff.run(command.a, command.b)


def methods(command: MethodsCommand, progress: Progress) -> Result:
    """Return every method with what it keeps for a pair of networks."""
    from kcdcache.commands import methods

    return methods.run(command.teacher, command.student, command.classes, command.size, command.encoding)


def report(command: ReportCommand, progress: Progress) -> Result:
    """Write one HTML file about finished runs; return where it lies.

    Raises:
        SettingsError: of several folders none is where the report belongs.
    """
    if command.out is None and len(command.paths) > 1:
        raise SettingsError("--out is missing: of several folders none is where the report belongs; give a file")
    from kcdcache.report import page

    out = command.out or command.paths[0] / "report.html"
    files = {"json_file": command.json_file, "csv": command.csv}
    return page.write(list(command.paths), out, data=command.data, reference=command.reference, **files)
