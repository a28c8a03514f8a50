"""Commands on finished runs, sets and stores: inspect, diff, report, export, seal. Slow imports are in functions."""

from collections.abc import Mapping
from pathlib import Path

from kcdcache.commands import Result, TextTable
from kcdcache.condensation import manifest
from kcdcache.condensation.compare import Difference, compare
from kcdcache.errors import MismatchError, NotFoundError, SettingsError, printable
from kcdcache.export import record
from kcdcache.progress import Progress, silent
from kcdcache.report import show
from kcdcache.runs.folder import RunFolder
from kcdcache.settings import DiffCommand, ExportCommand, InspectCommand, ReportCommand, SealCommand

COLUMNS = ("kept_a", "kept_b", "both", "only_a", "only_b", "jaccard", "hamming", "rank_correlation", "parts_moved")
RESULTS = {
    "row": "text", "model": "text", "n": "count", "accuracy_last": "percent", "accuracy_last_std": "percent",
    "accuracy_best": "percent", "relative_cost": "share", "student_samples": "count", "seconds": "seconds",
}  # fmt: skip
"""kinds of the columns of the table of `report`"""
EXPENDABLE = ("accuracy_best", "seconds", "relative_cost", "model")
"""its columns that are left out, in this order, if it is too wide"""
TERMS = (
    "(jaccard: share of what either keeps that both keep; hamming: share of all samples that only one of them keeps;",
    "rank_correlation: Spearman's, over what both keep; parts_moved: kept by both, but enriched in one only)",
)


def inspect(command: InspectCommand, progress: Progress = silent) -> Result:
    """Show the contents of a path; see `report.show.inspect`. With `toml`, the settings of a run as a file."""
    if command.toml:
        return {"toml": show.settings_file(command.path)}
    return show.inspect(command.path)


def seal(command: SealCommand, progress: Progress = silent) -> Result:
    """Seal a complete store; return whether it was sealed now or before."""
    from kcdcache.store import writer

    return {"store": str(command.path), "sealed": "now" if writer.seal(command.path) else "before"}


def export(command: ExportCommand, progress: Progress = silent, dry_run: bool = False) -> Result:
    """Write a condensed set with its knowledge into one folder; see `export.write.run`."""
    from kcdcache.export import write

    show.require_ids((command.manifest, command.store), command.expect_id)
    return write.run(command, progress, dry_run)


def report(command: ReportCommand, progress: Progress = silent) -> Result:
    """Write one HTML file about finished runs; raises SettingsError if several folders are given without --out."""
    if command.out is None and len(command.paths) > 1:
        raise SettingsError("--out is missing: several folders are given, name a file for the report")
    from kcdcache.report import page, tables

    out = command.out or command.paths[0] / "report.html"
    written = page.write(out=out, **command.model_dump(exclude={"out"}))
    results, left_out = (written["tables"][key] for key in ("results", "troubles"))
    table = TextTable(
        [results["columns"][name] for name in RESULTS],
        [[tables.shown(row[name], kind) for name, kind in RESULTS.items()] for row in results["rows"]],
        left=2,
        above=(printable(written["title"]), ""),
        below=[
            *(["", *map(printable, written["verdict"])] if written["verdict"] else []),
            *([""] if left_out["rows"] or written["notes"] else []),
            *(printable(f"not included: {row['path']} is {row['state']} ({row['error']})") for row in left_out["rows"]),
            *(printable(f"note: {note}") for note in written["notes"]),
        ],
        rule=True,
    ).fitted([results["columns"][name] for name in EXPENDABLE])
    return {"report": str(out), "table": table, "files": str(out), **written}


def diff(command: DiffCommand, progress: Progress = silent) -> Result:
    """Compare two manifests, runs or exported sets, as JSON values and a `table`.

    Two runs are compared in all stages that both have; compared with anything else, a run is its last condensed set.

    Raises:
        NotFoundError: a run has no condensed set yet, or two runs have no stage in common.
        MismatchError: one of the paths is something else.
    """
    places = command.a, command.b
    kinds = [show.kind_of(path) for path in places]
    if kinds == ["run", "run"]:
        return _runs(*places)
    found = _compare(*map(_manifest_of, places, kinds))
    return _shown(*places, {"": found}) | found.model_dump()


def _runs(first: Path, second: Path) -> Result:
    ours, theirs = (RunFolder(path=path).manifests() for path in (first, second))
    stages = {str(number): _compare(ours[number], theirs[number]) for number in ours if number in theirs}
    if not stages:
        raise NotFoundError(f"the runs in {first} and {second} have no stage in common; continue them")
    return _shown(first, second, stages, "stage") | {
        "stages": {number: found.model_dump() for number, found in stages.items()},
        "only_in_a": [number for number in ours if number not in theirs],
        "only_in_b": [number for number in theirs if number not in ours],
    }


def _compare(a: Path, b: Path) -> Difference:
    return compare(manifest.read(a), manifest.read(b), (str(a), str(b)))


def _manifest_of(path: Path, kind: str) -> Path:
    if kind == "condensed":
        return record.read(path).path / record.MANIFEST
    if kind == "run":
        stages = RunFolder(path=path).manifests()
        if not stages:
            raise NotFoundError(f"the run in {path} has no condensed set yet; give a manifest, or continue the run")
        return stages[max(stages)]
    if kind != "manifest":
        raise MismatchError(f"{path} is a {kind}; diff compares manifests, runs and exported sets")
    return path


def _shown(first: Path, second: Path, sets: Mapping[str, Difference], heading: str = "") -> Result:
    """Return both paths, a table with a row per pair of sets, and a note on the last pair."""
    rows = [[name, *(_cell(getattr(found, column)) for column in COLUMNS)] for name, found in sets.items()]
    table = TextTable((heading, *COLUMNS), rows, above=(f"a = {first}", f"b = {second}"), below=TERMS)
    return {"a": str(first), "b": str(second), "table": table, "note": _note(list(sets.values())[-1])}


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _note(found: Difference) -> str:
    same = "the sets are identical; " if found.identical else ""
    classes = found.class_difference
    largest = f"; classes differ by {min(classes):+d} to {max(classes):+d} samples" if classes else ""
    return (
        f"{same}of {found.samples} samples {found.dropped_by_both} are in neither; {found.K_1H_to_K_Aug} moved from "
        f"K_1H to K_Aug, {found.K_Aug_to_K_1H} back; {found.same_partner} of {found.mixed_in_both} mixed in both have "
        f"the same partner{largest}"
    )
