"""Check of a run folder: every file is as the run wrote it, and all files belong together."""

from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kcdcache.condensation import manifest, value_files
from kcdcache.condensation.manifest import Manifest
from kcdcache.condensation.value_files import Held
from kcdcache.errors import LockedError, attempt
from kcdcache.files import cloud, run_files
from kcdcache.files.atomic import is_locked, read_bytes
from kcdcache.files.records import MOST_RECORD_BYTES, logged_seconds
from kcdcache.files.run_files import RunFiles
from kcdcache.networks import weights
from kcdcache.runs import state
from kcdcache.runs.folder import RunFolder
from kcdcache.runs.state import Inputs, MetricsRow, RunRecord
from kcdcache.store import check as store_check
from kcdcache.store import reader

T = TypeVar("T")
NETWORKS = ("student", "model", "ema/student", "ema/model")
SUMS = ("rows_read", "bytes_read")
"""entries of a summary that are sums over the epochs"""


class Found(NamedTuple):
    """Result of checking a run."""

    counts: dict[str, int]
    """number of manifests, values files, networks and stores of mixes that were read"""
    unfinished: tuple[str, ...]
    """files cut short by a kill, which the run's command writes again"""
    finished: bool
    problems: tuple[str, ...]
    """one line per problem, with file and place; empty for an undamaged run"""


class _Look:
    """Reads files and collects the problems with them, each once."""

    def __init__(self, path: Path) -> None:
        self.folder = RunFolder(path=path)
        self.problems: dict[str, None] = {}

    def at(self, read: Callable[..., T], *arguments: Any) -> T | None:
        return attempt(self.add, read, *arguments)

    def add(self, problem: str) -> None:
        self.problems[problem] = None


def check(path: Path) -> Found:
    """Read all files of a run and compare them with its record and each other; collect all problems.

    Raises LockedError if there are problems while a process is writing the run.
    """
    look, folder = _Look(path), RunFolder(path=path)
    record = look.at(state.read_record, folder)
    files = look.at(run_files.read, path) or RunFiles()
    rows = _progress(look)
    sets = {number: look.at(manifest.read, file) for number, file in folder.manifests().items()}
    whole = {number: found for number, found in sets.items() if found is not None}
    tables = _values(look, whole)
    if record is not None:
        _chain(look, record.inputs, whole, tables)
    networks = [name for name in NETWORKS if (path / f"{name}.json").exists() and f"{name}.json" not in files.pending]
    for name in networks:
        look.at(weights.load_network, path, name)
    mixes = sorted(path.glob("stages/*/*.requery"))
    for made in mixes:
        _mixes(look, made, whole.get(int(made.parent.name)))
    finished = folder.summary.exists()
    if finished and folder.summary.name not in files.pending:
        _summary(look, rows, record, whole)
    for file, problem in run_files.problems(path, files).items():
        if not any(str(file) in known for known in look.problems):
            look.add(f"{file} {problem}")
    if look.problems:
        cloud.require_free(path)
        if is_locked(cloud.lock_file(folder.lock)):
            raise LockedError(f"{path} is being written: verify it when its command has ended")
    counts = {"manifests": len(sets), "values": len(tables), "networks": len(networks), "requeried": len(mixes)}
    return Found(counts, tuple(sorted(files.pending)), finished, tuple(look.problems))


def _progress(look: _Look) -> list[MetricsRow]:
    """Check the checkpoint and metrics.jsonl against each other; return the rows of the checkpoint."""
    folder = look.folder
    found = look.at(state.load_checkpoint, folder)
    if found is None:
        if folder.metrics.exists() and not folder.pointer.exists():
            look.add(f"{folder.pointer} is missing, but {folder.metrics.name} has finished epochs; start a new run")
        return []
    rows = found[1].rows
    written = read_bytes(folder.metrics, MOST_RECORD_BYTES) if folder.metrics.exists() else b""
    behind = not folder.summary.exists() and written == state.metrics_lines(rows[:-1])
    if written != (expected := state.metrics_lines(rows)) and not behind:  # a kill leaves metrics an epoch behind
        pairs = zip_longest(written.splitlines(keepends=True), expected.splitlines(keepends=True))
        line = next(number for number, (ours, theirs) in enumerate(pairs, 1) if ours != theirs)
        remedy = "run the run's command again, which writes it again"
        look.add(f"{folder.metrics}, line {line}: not what the checkpoint has for that epoch; {remedy}")
    return rows


def _values(look: _Look, sets: dict[int, Manifest]) -> dict[str, Held]:
    """Check all values files; return the readable ones by their name in the run."""
    folder, most, found = look.folder, max((chosen.count for chosen in sets.values()), default=0), {}
    for path in (folder.values, *folder.all_stage_values()):
        if path.exists() and most and (read := look.at(value_files.read, path, most)) is not None:
            found[folder.name_of(path)] = read
    return found


def _chain(look: _Look, inputs: Inputs, sets: dict[int, Manifest], tables: dict[str, Held]) -> None:
    """Check that manifests and values belong to the run's knowledge, and each manifest to the one before."""
    folder, knowledge = look.folder, inputs.knowledge_id
    given = look.at(manifest.read, folder.given) if folder.given.exists() else None
    if given is not None and given.digest != inputs.given:
        look.add(f"{folder.given} holds manifest {given.digest}, the run began with {inputs.given}")
    for number, found in sets.items():
        for problem in _links(folder, number, found, sets, knowledge):
            look.add(f"{folder.manifest(number)} {problem}")
    for name, table in tables.items():
        of = None if table.document is None else table.document["knowledge_id"]
        if of is None or of != knowledge:
            look.add(f"{folder.path / name} was measured on knowledge {of}, the run is on {knowledge}")


def _links(
    folder: RunFolder, number: int, found: Manifest, sets: dict[int, Manifest], knowledge: str | None
) -> Iterator[str]:
    if found.knowledge_id != knowledge:
        yield f"is for knowledge {found.knowledge_id}, the run is on {knowledge}"
    if number == 0:  # full, random or given: it has no previous manifest
        return
    if found.stage != number:
        yield f"is for stage {found.stage}, found in the folder of stage {number}"
    if number - 1 not in sets and not folder.manifest(number - 1).exists():
        yield f"follows a manifest that is missing: {folder.manifest(number - 1)}"
    before = sets.get(number - 1)
    if before is not None and found.parent not in (None, before.digest):
        yield f"was condensed from manifest {found.parent}, stage {number - 1} has {before.digest}"


def _mixes(look: _Look, path: Path, of: Manifest | None) -> None:
    found = look.at(store_check.verify, path)
    for problem in found.problems if found else ():
        look.add(problem)
    opened = look.at(reader.open, path) if found and not found.problems else None
    made_for = (opened.knowledge.mixes or {}).get("manifest") if opened else None
    if opened and of is not None and made_for != of.digest:
        look.add(f"{path} holds the teacher's outputs on manifest {made_for}, next to it is {of.digest}")


def _summary(look: _Look, rows: list[MetricsRow], record: RunRecord | None, sets: dict[int, Manifest]) -> None:
    folder = look.folder
    found = look.at(state.read_summary, folder.path)
    if found is None or record is None or not rows:
        return
    expected = state.outcome(rows, found.count, record.settings["epochs"]).document()
    expected["seconds"] = logged_seconds(folder.timing)
    if found.condensed_set is not None:
        expected |= {name: sum(getattr(row, name) for row in rows) for name in SUMS}
        if not sets:
            look.add(f"no readable manifest in {folder.path / 'stages'}, but a summary that names one")
        elif found.count != sets[last := max(sets)].count:
            look.add(f"{folder.summary} counts {found.count} samples, the set {sets[last].count}")
        else:
            expected |= {"condensed_set": folder.name_of(folder.manifest(last)), "kept": len(sets[last])}
    for name, wanted in expected.items():
        if getattr(found, name) != wanted:
            look.add(f"{folder.summary}, {name}: {getattr(found, name)}, but the run's other files give {wanted}")
