"""Condensing by the processes that torchrun started: the only way to condense that loads torch."""

from typing import Any

from kcdcache import condenser, together
from kcdcache.commands import CondenseCommand
from kcdcache.gloo import Gloo


def run(command: CondenseCommand, dry_run: bool = False) -> dict[str, Any]:
    """Do what `condenser.run` does, each process a share of it; return the summary.

    Raises:
        SettingsError: this process has no place in a group.
    """
    with together.group_of() as group:
        return condenser.run(command, dry_run=dry_run, team=Gloo(group.rank, group.world))
