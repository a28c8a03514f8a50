"""One self-contained HTML file of finished runs, with the same numbers as JSON and CSV; made from their files alone."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from kcdcache import __version__
from kcdcache.errors import MismatchError, SettingsError, printable
from kcdcache.files.atomic import read_bytes, write_atomic
from kcdcache.files.records import readable_json
from kcdcache.report import figures, images, load, stage_figures, tables
from kcdcache.report.figures import Picture
from kcdcache.report.images import Strip
from kcdcache.report.load import Loaded, Run
from kcdcache.report.tables import Table

logger = logging.getLogger(__name__)

ABOUT = "kcdcache report"
SCHEMA_VERSION = 0
TEMPLATE = Path(__file__).with_name("report.html")
MOST_RUNS = 4
"""runs whose stages are drawn: the first seed of each row that condenses"""
BRIEF = ("row", "model", "n", "accuracy_last", "accuracy_last_std", "accuracy_best", "relative_cost", "seconds")
"""columns of the results that fit a terminal"""


class Section(NamedTuple):
    """A chapter of the report; what is empty of the given is not shown."""

    key: str
    """its title and what to look at are those of `tables.texts`"""
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture | None] = ()
    strips: Sequence[Strip] = ()
    folded: Sequence[Table] = ()
    """tables shown when asked for"""
    notes: Sequence[str] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing in it."""
        rows = any(table.rows for table in (*self.tables, *self.folded))
        return not (rows or any(self.pictures) or self.strips or self.notes)


def write(
    paths: Sequence[Path],
    out: Path,
    *,
    data: str | None = None,
    reference: str | None = None,
    json_file: Path | None = None,
    csv: Path | None = None,
) -> dict[str, Any]:
    """Write the report of the runs at some paths to `out`; return all its numbers, its path and its main table.

    `paths` are run folders, or folders of runs such as a recipe's. `data` is the data spec for the images (by default
    the recipe's, where it can be loaded); `reference` the step others are compared with. `json_file` and `csv` (a
    folder, one file per table) get the same numbers, unrounded. The same runs give the same bytes.

    Raises:
        NotFoundError, MismatchError: a path holds no run; `out` holds something else than a report.
        SettingsError: `out` does not end in .html, or the reference is no row.
    """
    _require_free(out, json_file, csv)
    loaded = load.read(paths)
    made = tables.every(loaded, reference)
    sections = sections_of(loaded, made, data)
    document = _document(loaded, made, sections)
    files = {out: _html(document, made, sections).encode()}
    if json_file is not None:
        files[json_file] = readable_json(document)
    if csv is not None:
        files |= {csv / f"{table.key}.csv": table.csv().encode() for table in made.values()}
    for path, content in reversed(files.items()):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    logger.info("report: %d runs in %s", len(loaded.runs), out)
    return {"report": str(out), "table": _brief(loaded, made), "files": str(out), **document}


def _require_free(out: Path, json_file: Path | None, csv: Path | None) -> None:
    """Refuse to overwrite anything but a report of ours."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise SettingsError(f"--out is an HTML file; found {out}: end its name in .html")
    if json_file is not None and json_file.suffix.lower() != ".json":
        raise SettingsError(f"--json-file is a JSON file; found {json_file}: end its name in .json")
    for path in (out, json_file):
        if path is not None and path.exists() and ABOUT.encode() not in read_bytes(path)[:400]:
            raise MismatchError(f"{path} is there already and is no report of kcdcache; give another name")
    if csv is not None and csv.exists():
        others = [path.name for path in csv.iterdir() if path.suffix != ".csv"] if csv.is_dir() else [csv.name]
        if others:
            raise MismatchError(f"--csv {csv} holds {others[0]}; give a new folder, or one with CSV files only")


def sections_of(loaded: Loaded, made: dict[str, Table], data: str | None = None) -> list[Section]:
    """Return the chapters of a report that have something to say."""
    curves = made["curves"].rows
    told = ("precision", "kept_rare")  # of wrong labels, of rare classes
    screening = [row for row in made["screening"].rows if any(row.get(name) is not None for name in told)]
    sections = [
        Section(key="method", pictures=[stage_figures.chain(loaded)]),
        Section(
            key="results",
            tables=[made["results"], made["differences"]],
            pictures=[figures.forest(made["differences"].rows)],
        ),
        Section(key="learning", pictures=[figures.accuracy(curves), figures.training(curves)] if curves else []),
        *_condensation(loaded, made, data),
        Section(
            key="robustness",
            tables=[made["fidelity"]],
            pictures=figures.robustness(made["fidelity"].rows, screening),
            folded=[made["screening"]] if screening else [],
        ),
        Section(
            key="agreement",
            pictures=[stage_figures.distances(group) for group in tables.same_data(loaded)],
            folded=[made["distances"]],
        ),
        Section(key="cost", tables=[made["cost"]], pictures=[figures.costs(made["cost"].rows)]),
        Section(key="provenance", tables=[made["runs"]], folded=[made["settings"], made["identities"]]),
    ]
    return [section for section in sections if not section.empty]


def _condensation(loaded: Loaded, made: dict[str, Table], data: str | None) -> list[Section]:
    """Return the chapters on the first run of each row that condenses: what it kept, which samples, their images."""
    first: dict[str, Run] = {}
    for name, run in tables.condensing(loaded):
        first.setdefault(name, run)
    chosen = [(f"{name}, seed {run.seed}", run) for name, run in first.items()][:MOST_RUNS]
    if not chosen:
        return []
    patterns = [stage_figures.pattern(name, run) for name, run in chosen if any(stage.values for stage in run.stages)]
    strips, notes = images.collected(chosen, data)
    return [
        Section(
            key="condensation",
            pictures=[stage_figures.sizes(chosen), stage_figures.bands(chosen), stage_figures.classes(chosen)],
            folded=[made["stages"]],
        ),
        Section(key="samples", tables=[made["fates"]], pictures=[stage_figures.turnover(chosen), *patterns]),
        Section(key="images", strips=strips, notes=notes),
    ]


def _document(loaded: Loaded, made: dict[str, Table], sections: Sequence[Section]) -> dict[str, Any]:
    """Return all that the report says as JSON values."""
    pictures = [picture for section in sections for picture in section.pictures if picture]
    strips = [strip for section in sections for strip in section.strips]
    return {
        "about": ABOUT,
        "schema_version": SCHEMA_VERSION,
        "kcdcache": __version__,
        "title": _title(loaded),
        "summary": _summary(loaded),
        "notes": tables.unlike_rows(loaded),
        "tables": {key: table.document() for key, table in made.items()},
        "figures": [{"key": p.key, "title": p.title, "caption": p.caption} for p in pictures],
        "images": [
            {"title": s.title, "texts": [", ".join(shot.lines) for group in s.shots for shot in group]} for s in strips
        ],
    }


def _title(loaded: Loaded) -> str:
    return " + ".join(dict.fromkeys(grid.title for grid in loaded.grids))


def _summary(loaded: Loaded) -> str:
    count, rows = len(loaded.runs), len(loaded.rows())
    text = f"{count} finished run{'s' * (count != 1)} in {rows} row{'s' * (rows != 1)}."
    states = [problem.state for problem in loaded.problems]
    left_out = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"{text} Not in the numbers: {left_out} (listed below)." if left_out else text


def _html(document: dict[str, Any], made: dict[str, Table], sections: Sequence[Section]) -> str:
    def safe(value: Any) -> Any:  # in one line, without control or bidirectional characters
        return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=safe)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=document["title"], summary=document["summary"], notes=document["notes"], problems=made["troubles"],
        sections=sections, texts=tables.texts(), version=__version__, uri=images.data_uri,
    )  # fmt: skip


def _brief(loaded: Loaded, made: dict[str, Table]) -> str:
    """Return title, main table and what is not in it, as text for a terminal."""
    results = made["results"]
    brief = replace(results, columns=tuple(column for column in results.columns if column.name in BRIEF))
    left_out = [f"not in it: {problem.path} is {problem.state} ({problem.error})" for problem in loaded.problems]
    return "\n".join([printable(_title(loaded)), "", brief.text(), *map(printable, left_out)])
