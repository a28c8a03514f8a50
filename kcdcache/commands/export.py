"""`export`: a condensed set with the knowledge it needs, as one folder."""

from kcdcache.commands import Result
from kcdcache.export import write
from kcdcache.progress import Progress, silent
from kcdcache.report import show
from kcdcache.settings import ExportCommand


def run(command: ExportCommand, progress: Progress = silent, dry_run: bool = False) -> Result:
    """Write a condensed set with the knowledge it needs into one folder; see `export.write.run`.

    Raises:
        MismatchError: set or store is not what was expected, or they were not made for each other.
    """
    show.require_ids((command.manifest, command.store), command.expect_id)
    return write.run(command, progress, dry_run)
