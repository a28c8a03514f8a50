"""What stages of a run hand on: a manifest condensed by hand to the one that begins now."""

import logging
from collections.abc import Sequence

from kcdcache import manifest
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.manifest import Manifest
from kcdcache.runs import RunFolder, load_checkpoint, write_manifest
from kcdcache.schedule import Stage

logger = logging.getLogger(__name__)


def place(folder: RunFolder, stages: Sequence[Stage], knowledge_id: str, chosen: Manifest) -> None:
    """Make a manifest condensed by hand the one of the stage that begins now; one placed before stays where it is.

    Raises:
        SettingsError: the run is inside a stage, or has another manifest for this one.
        MismatchError: the manifest is of other knowledge, or was made from another stage before; prints both ids.
    """
    manifest.require_knowledge(chosen, knowledge_id)
    if _has_placed(folder, stages, chosen):  # the command that placed it is run again, to resume
        return
    done = finished_epochs(folder)
    starting = [stage for stage in stages if stage.start == done]
    if not starting:
        raise SettingsError(
            f"the run stands at epoch {done}, inside a stage; a manifest can be given only where a stage begins: "
            f"{', '.join(str(stage.start) for stage in stages)}"
        )
    number = starting[0].number
    if chosen.stage != number:
        raise SettingsError(
            f"the run stands at the start of stage {number}, the given manifest is for stage {chosen.stage}; condense "
            f"with --stage {number}, or with the manifest of stage {number - 1} as --previous"
        )
    path = folder.manifest(number)
    if folder.stands(path):
        raise SettingsError(f"stage {number} of this run has another manifest already: {path}")
    before = manifest.read(folder.manifest(number - 1)).digest if number else None
    if chosen.parent not in (None, before):
        raise MismatchError(
            f"the given manifest was condensed from manifest {chosen.parent}, stage {number - 1} of this run trained "
            f"on {before}; condense again with that one as --previous"
        )
    write_manifest(folder, path, chosen)


def _has_placed(folder: RunFolder, stages: Sequence[Stage], chosen: Manifest) -> bool:
    for stage in stages:
        path = folder.manifest(stage.number)
        if folder.stands(path) and manifest.read(path).digest == chosen.digest:
            logger.info("train: the given set is that of stage %d already", stage.number)
            return True
    return False


def finished_epochs(folder: RunFolder) -> int:
    """Return how many epochs of a run are behind it, by its checkpoint."""
    found = load_checkpoint(folder)
    return int(found[1]["epoch"]) if found else 0
