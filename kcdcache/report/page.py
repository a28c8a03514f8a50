"""One self-contained HTML file about finished runs, with the same numbers as JSON and CSV."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from kcdcache import __version__
from kcdcache.errors import MismatchError, SettingsError, printable
from kcdcache.files.atomic import read_bytes, write_atomic
from kcdcache.files.records import readable_json
from kcdcache.report import figures, images, load, stage_figures, tables, verdict
from kcdcache.report.load import Loaded, Run
from kcdcache.report.tables import Table
from kcdcache.report.verdict import Verdict

logger = logging.getLogger(__name__)

ABOUT = "kcdcache report"
SCHEMA_VERSION = 0
TEMPLATE = Path(__file__).with_name("report.html")
MOST_RUNS = 4
"""most runs whose stages are drawn: the first seed of each row that condenses"""


class Section(NamedTuple):
    """A chapter of the report; its title and introduction are in `tables.texts`. Empty tables are not shown."""

    key: str
    tables: Sequence[Table] = ()
    pictures: Sequence[figures.Picture | None] = ()
    strips: Sequence[images.Strip] = ()
    folded: Sequence[Table] = ()
    """tables that are closed at first"""
    notes: Sequence[str] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        rows = any(table.rows for table in (*self.tables, *self.folded))
        return not (rows or any(self.pictures) or self.strips or self.notes)


def write(
    paths: Sequence[Path],
    out: Path,
    *,
    data: str | None = None,
    reference: str | None = None,
    across: bool = False,
    json_file: Path | None = None,
    csv: Path | None = None,
) -> dict[str, Any]:
    """Write a report to `out` and return its contents as JSON values; the same runs give the same bytes.

    `paths` are run folders or folders of runs, such as a recipe's. `data` is the data spec for the images (default: the
    recipe's, if it can be loaded) and `reference` the step to compare with; with `across`, also rows of unequal data,
    epochs or batch size. `json_file` and `csv` (a folder, one file per table) get the same numbers, unrounded.

    Raises:
        NotFoundError, MismatchError: there is no run at a path, or a file to be written exists and is not a report.
        SettingsError: a file has the wrong ending, or `reference` is not a step.
    """
    _require_free(out, json_file, csv)
    loaded = load.read(paths)
    made, verdicts = tables.every(loaded, reference, across), verdict.every(loaded, reference, across)
    sections = sections_of(loaded, made, verdicts, data)
    notes = [*tables.unlike_rows(loaded), *tables.pairing(loaded, reference, across)]
    document = _document(loaded, made, sections, notes) | {"verdict": [one.text for one in verdict.chosen(verdicts)]}
    files = {out: _html(document, made, sections).encode()}
    if json_file is not None:
        files[json_file] = readable_json(document)
    if csv is not None:
        files |= {csv / f"{table.key}.csv": table.csv().encode() for table in made.values()}
    for path, content in reversed(files.items()):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    logger.info("report: %d runs in %s", len(loaded.runs), out)
    return document


def _require_free(out: Path, json_file: Path | None, csv: Path | None) -> None:
    """Check the endings, and that only an earlier report would be overwritten."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise SettingsError(f"--out is an HTML file; found {out}: end its name in .html")
    if json_file is not None and json_file.suffix.lower() != ".json":
        raise SettingsError(f"--json-file is a JSON file; found {json_file}: end its name in .json")
    for path in (out, json_file):
        if path is not None and path.exists() and ABOUT.encode() not in read_bytes(path)[:400]:
            raise MismatchError(f"{path} exists and is no report of kcdcache; give another name")
    if csv is not None and csv.exists():
        others = [path.name for path in csv.iterdir() if path.suffix != ".csv"] if csv.is_dir() else [csv.name]
        if others:
            raise MismatchError(f"--csv {csv} holds {others[0]}; give a new folder, or one with CSV files only")


def sections_of(
    loaded: Loaded, made: dict[str, Table], verdicts: Sequence[Verdict], data: str | None = None
) -> list[Section]:
    """Return the chapters that are not empty."""
    curves, fidelity = (made[key].rows for key in ("curves", "fidelity"))
    marked = ("precision", "kept_rare")  # wrong labels, rare classes
    screening = [row for row in made["screening"].rows if any(row.get(name) is not None for name in marked)]
    sections = [
        Section("verdict", pictures=[figures.forest(verdicts)], notes=[one.text for one in verdict.chosen(verdicts)]),
        Section("results", [made["results"], made["differences"]]),
        Section("method", pictures=[stage_figures.chain(loaded)]),
        Section("learning", pictures=[figures.accuracy(curves), figures.training(curves)] if curves else []),
        *_condensation(loaded, made, data),
        Section(
            "robustness",
            [made["fidelity"]],
            figures.robustness(fidelity, screening),
            folded=[made["screening"]] if screening else [],
        ),
        Section(
            "agreement",
            pictures=[stage_figures.distances(group) for group in tables.same_data(loaded)],
            folded=[made["distances"]],
        ),
        Section("cost", [made["cost"]], [figures.costs(made["cost"].rows)]),
        Section("provenance", [made["runs"]], folded=[made["settings"], made["identities"]]),
    ]
    return [section for section in sections if not section.empty]


def _condensation(loaded: Loaded, made: dict[str, Table], data: str | None) -> list[Section]:
    """Return the chapters on the first run of each row that condenses."""
    first: dict[str, Run] = {}
    for name, run in tables.condensing(loaded):
        first.setdefault(name, run)
    chosen = [(f"{name}, seed {run.seed}", run) for name, run in first.items()][:MOST_RUNS]
    if not chosen:
        return []
    patterns = [stage_figures.pattern(name, run) for name, run in chosen if any(stage.values for stage in run.stages)]
    strips, notes = images.collected(chosen, data)
    drawn = [stage_figures.sizes(chosen), stage_figures.bands(chosen), stage_figures.classes(chosen)]
    return [
        Section("condensation", pictures=drawn, folded=[made["stages"]]),
        Section("samples", [made["fates"]], [stage_figures.turnover(chosen), *patterns]),
        Section("images", strips=strips, notes=notes),
    ]


def _document(
    loaded: Loaded, made: dict[str, Table], sections: Sequence[Section], notes: Sequence[str]
) -> dict[str, Any]:
    pictures = [picture for section in sections for picture in section.pictures if picture]
    strips = [strip for section in sections for strip in section.strips]
    return {
        "about": ABOUT,
        "schema_version": SCHEMA_VERSION,
        "kcdcache": __version__,
        "title": " + ".join(dict.fromkeys(grid.title for grid in loaded.grids)),
        "summary": _summary(loaded),
        "notes": notes,
        "tables": {key: table.document() for key, table in made.items()},
        "figures": [{"key": p.key, "title": p.title, "caption": p.caption} for p in pictures],
        "images": [
            {"title": s.title, "texts": [", ".join(shot.lines) for group in s.shots for shot in group]} for s in strips
        ],
    }


def _summary(loaded: Loaded) -> str:
    count, rows = len(loaded.runs), len(loaded.rows())
    text = f"{count} finished run{'s' * (count != 1)} in {rows} row{'s' * (rows != 1)}."
    states = [problem.state for problem in loaded.problems]
    left_out = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"{text} Not included: {left_out} (listed below)." if left_out else text


def _html(document: dict[str, Any], made: dict[str, Table], sections: Sequence[Section]) -> str:
    def safe(value: Any) -> Any:  # in one line, without control or bidirectional characters
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=safe)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        document, problems=made["troubles"], sections=sections, texts=tables.texts(), uri=images.data_uri
    )
