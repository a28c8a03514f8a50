"""Where a report's numbers come from: every run with its settings, versions, device, commit and digests."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kcdcache.accounts import labels
from kcdcache.findings import Findings, Run
from kcdcache.runs import latest_environment
from kcdcache.tabular import Column, Table

SEEDS = ("seed", "condense_seed")
"""settings in which the runs of one row differ by design"""


def troubles(findings: Findings) -> Table:
    """Return a row per run, store or record that was asked for and is in no number, with what is wrong."""
    rows = [{"path": str(path), "state": state, "error": error} for path, state, error in findings.troubles]
    columns = (Column("path", "path"), Column("state", "state"), Column("error", "what is wrong"))
    note = "These were asked for and are in none of the numbers below."
    return Table(key="troubles", title="Not in this report", note=note, columns=columns, rows=rows)


def runs(findings: Findings) -> Table:
    """Return a row per run: where it ran, with what, and by which command."""
    names = labels(findings)
    rows = [
        {
            "row": names[key],
            "run": run.name,
            "seed": run.seed,
            "folder": f"{run.grid.name}/{run.name}",
            **_environment(run),
        }
        for key, found in findings.rows().items()
        for run in found
    ]
    columns = (
        Column("row", "row"), Column("run", "run"), Column("seed", "seed", "number"), Column("commit", "commit"),
        Column("device", "device"), Column("threads", "threads", "number"), Column("versions", "versions"),
        Column("changes", "changed while it ran", "number"), Column("command", "command"), Column("folder", "folder"),
    )  # fmt: skip
    note = "'changed' counts how often a run went on in another environment (--allow-env-change)."
    return Table(key="runs", title="Runs", note=note, columns=columns, rows=rows)


def _environment(run: Run) -> dict[str, Any]:
    told = latest_environment(run.record)
    versions = {"python": told.get("python"), **told.get("versions", {})}
    return {
        "commit": told.get("git_commit"),
        "device": f"{told.get('device')} ({told.get('device_name')})",
        "threads": told.get("threads"),
        "versions": ", ".join(f"{name} {found}" for name, found in versions.items()),
        "changes": len(run.record["changes"]),
        "command": told.get("command"),
    }


def settings(findings: Findings) -> Table:
    """Return a row per setting and row of runs: its value; seeds of a row that differ in it are joined by ' | '."""
    names, rows = labels(findings), []
    for key, found in findings.rows().items():
        rows += [{"row": names[key], "setting": name, "value": value} for name, value in _settings(found).items()]
    columns = (Column("row", "row"), Column("setting", "setting"), Column("value", "value"))
    note = "As run.json records them. A value with | differs between the row's runs."
    return Table(key="settings", title="Settings", note=note, columns=columns, rows=rows)


def _settings(found: Sequence[Run]) -> Mapping[str, str]:
    names = dict.fromkeys(name for run in found for name in run.record["settings"])
    return {
        name: " | ".join(dict.fromkeys(str(run.record["settings"].get(name, "")) for run in found)) for name in names
    }


def mixed_rows(findings: Findings) -> list[str]:
    """Return a line for each row whose runs differ in more than their seed: their mean is of different things."""
    names, lines = labels(findings), []
    for key, found in findings.rows().items():
        differing = [name for name, value in _settings(found).items() if " | " in value and name not in SEEDS]
        if differing:
            lines.append(f"the runs of '{names[key]}' differ in {', '.join(differing)}: their mean is of unlike runs")
    return lines


def identities(findings: Findings) -> Table:
    """Return a row per thing that has an id: what names this content and no other."""
    rows: list[dict[str, Any]] = []
    for path, told in findings.stores:
        rows += [{"of": path.name, "what": name, "id": told.get(name)} for name in ("id", "knowledge_id", "layout_id")]
        rows += [{"of": path.name, **found} for found in _knowledge(told["knowledge"])]
    for run in findings.runs:
        rows += [{"of": run.name, **found} for found in _ids(run)]
    columns = (Column("of", "of"), Column("what", "what"), Column("id", "id or digest (SHA-256)"))
    note = "`kcdcache inspect` shows the same ids; `--expect-id` refuses anything else."
    return Table(key="identities", title="Ids and digests", note=note, columns=columns, rows=rows)


def _ids(run: Run) -> Iterator[dict[str, Any]]:
    yield {"what": "summary", "id": run.id}
    yield {"what": "weights", "id": run.network.get("weights_sha256")}
    for name in ("knowledge_id", "data", "test", "given"):
        if run.record["inputs"].get(name):
            yield {"what": name, "id": run.record["inputs"][name]}
    for stage in run.stages:
        yield {"what": f"manifest of stage {stage.number}", "id": stage.manifest.digest}


def _knowledge(knowledge: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    teacher, views = knowledge["teacher"], knowledge["views"]
    yield {"what": f"weights of the teacher {teacher['architecture']}", "id": teacher["weights"]}
    yield {"what": "training split", "id": knowledge["data"]["digest"]}
    yield {"what": "views", "id": ", ".join(f"{name} {views[name]}" for name in sorted(views))}
