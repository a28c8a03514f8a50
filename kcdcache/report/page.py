"""One self-contained HTML file of finished runs, with the same numbers as JSON and CSV; made from their files alone."""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from kcdcache import __version__
from kcdcache.condense import compare
from kcdcache.errors import MismatchError, SettingsError, printable
from kcdcache.files.atomic import read_bytes, readable_json, write_atomic
from kcdcache.report import figures, images, load, robustness, stage_figures, tables
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
WORDS = {
    "teacher, student": "the big network that knows, and the small one that learns from its answers",
    "view": "one augmented version (crop, flip) of a training image; the same number gives the same version anywhere",
    "knowledge point": "one augmented view of one training image, with what the teacher says of it",
    "store": "the file store of all knowledge points: the teacher runs once, students read from it",
    "stage": "some epochs on one set of samples; between stages the set is made anew from the samples' values",
    "value V": "mean entropy (in nats) of the student's answers on a sample so far: how unsure it still is",
    "K_1H": "samples of a set that are kept as they are",
    "K_Aug": "less valuable samples of a set that are kept, but enriched with a share (epsilon) of a dropped sample",
    "K_0": "dropped samples, from which those shares come",
    "epsilon": "the share of a dropped sample that is mixed into a kept one: from 0 to 0.3, most into the least"
    " valuable",
    "relative cost": "student samples forwarded, divided by samples x epochs of full training",
    "seed": "start of all random choices; runs of the same seed are paired",
}


@dataclass(frozen=True, kw_only=True)
class Section:
    """A chapter of the report."""

    key: str
    title: str
    look: str
    """what a newcomer should look at"""
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    strips: Sequence[Strip] = ()
    folded: Sequence[Table] = ()
    """tables shown when asked for"""
    notes: Sequence[str] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing in it."""
        return not (self.tables or self.pictures or self.strips or self.folded or self.notes)


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
    made = tables_of(loaded, reference)
    sections = [section for section in _sections(loaded, made, data) if not section.empty]
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


def tables_of(loaded: Loaded, reference: str | None = None) -> dict[str, Table]:
    """Return every table of a report by its key.

    Raises:
        SettingsError: the reference is no row.
    """
    made = (
        tables.problems(loaded), tables.results(loaded), tables.differences(loaded, reference), tables.cost(loaded),
        tables.curves(loaded), tables.stages(loaded), tables.fates(loaded), tables.classes(loaded),
        tables.distances(loaded), robustness.fidelity(loaded), robustness.screening(loaded), tables.runs(loaded),
        tables.settings(loaded), tables.identities(loaded),
    )  # fmt: skip
    return {table.key: table for table in made}


def _sections(loaded: Loaded, made: dict[str, Table], data: str | None) -> list[Section]:
    chosen = _chosen(loaded)
    return [
        _method(loaded),
        _results(made),
        _learning(made),
        *([_condensation(made, chosen), _samples(made, chosen), _images(loaded, chosen, data)] if chosen else []),
        robustness_section(made),
        _agreement(loaded, made),
        _cost(made),
        _provenance(made),
    ]


def _chosen(loaded: Loaded) -> list[tuple[str, Run]]:
    """Return (row's name, run) of the first run of each row whose sets differ from stage to stage."""
    first: dict[str, Run] = {}
    for name, run in tables.condensing(loaded):
        first.setdefault(name, run)
    return [(f"{name}, seed {run.seed}", run) for name, run in first.items()][:MOST_RUNS]


def _method(loaded: Loaded) -> Section:
    return Section(
        key="method", title="What was done",
        look="Follow the arrows. The teacher is paid once; what it says is kept; each student reads it, and what a "
        "sample is still worth to the student decides whether the next stage sees it.",
        pictures=[picture] if (picture := stage_figures.chain(loaded)) else [],
    )  # fmt: skip


def _results(made: dict[str, Table]) -> Section:
    forest = figures.forest(made["differences"].rows)
    return Section(
        key="results", title="Results",
        look="Compare the accuracy of the condensed student with that of the row that keeps everything, and with its "
        "relative cost: condensation pays where it loses no accuracy, or little, at a clearly lower cost. Then see in "
        "the differences whether the seeds suffice to say so.",
        tables=[table for name in ("results", "differences") if (table := made[name]).rows],
        pictures=[forest] if forest else [],
    )  # fmt: skip


def _learning(made: dict[str, Table]) -> Section:
    rows = made["curves"].rows
    return Section(
        key="learning", title="How the students learned",
        look="Where do the lines end, and how far to the right? A line that ends as high but further left reached the "
        "same accuracy with fewer samples.",
        pictures=[figures.accuracy(rows), figures.training(rows)] if rows else [],
    )  # fmt: skip


def _condensation(made: dict[str, Table], chosen: list[tuple[str, Run]]) -> Section:
    pictures = [stage_figures.sizes(chosen), stage_figures.bands(chosen), stage_figures.classes(chosen)]
    return Section(
        key="condensation", title="What condensation kept",
        look="After each stage the samples are ranked by their value, the best are kept, and the worst of those kept "
        "are enriched with a little of a dropped one. See the kept share shrink, the values part, and whether some "
        "classes are thinned more than others (classes the student knows well are).",
        pictures=[picture for picture in pictures if picture], folded=[made["stages"]],
    )  # fmt: skip


def _samples(made: dict[str, Table], chosen: list[tuple[str, Run]]) -> Section:
    valued = [(name, run) for name, run in chosen if any(stage.values is not None for stage in run.stages)]
    patterns = [stage_figures.pattern(name, run) for name, run in valued]
    return Section(
        key="samples", title="Which samples leave, return and stay",
        look="Dropping is not for ever: all samples compete again in each stage (unless `candidates` is current). A "
        "dropped one keeps its value while those of others fall; it is back once theirs lie below.",
        tables=[made["fates"]], pictures=[stage_figures.turnover(chosen), *patterns],
    )  # fmt: skip


def _images(loaded: Loaded, chosen: list[tuple[str, Run]], data: str | None) -> Section:
    specs = {grid.path: grid.data for grid in loaded.grids}
    specs |= {grid.path / name: spec for grid in loaded.grids for name, spec in grid.listed.items()}
    strips, notes = images.collected(chosen, specs, data)
    return Section(
        key="images", title="The images themselves",
        look="Valuable images should look hard, atypical or ambiguous, the least valuable ones plain. Below each stand "
        "its class, its number in the training split and its value in nats. Of several runs in a folder only the first "
        "is shown; give another one alone to see its images.",
        strips=strips, notes=notes,
    )  # fmt: skip


def robustness_section(made: dict[str, Table]) -> Section:
    """Return the chapter on wrong labels, rare classes and agreement; empty where no run was measured for it."""
    fidelity, screening = made["fidelity"], made["screening"]
    return Section(
        key="robustness", title="Wrong labels, rare classes, agreement with the teacher",
        look="First: does each method gain over plain training on the same data, and does its interval exclude 0? "
        "Then, where labels are wrong: which rows name the true label, and which the wrong one they were given? Last, "
        "whether dropping by value screens out wrong labels or rare classes, against what chance would do.",
        tables=[fidelity] if fidelity.rows else [], pictures=robustness.pictures(fidelity, screening),
        folded=[screening] if robustness.marked(screening) else [],
    )  # fmt: skip


def _agreement(loaded: Loaded, made: dict[str, Table]) -> Section:
    pictures = []
    for group in tables.same_data(loaded):
        names, sets = [name for name, _ in group], [run.sets[-1] for _, run in group]
        chance = [compare.by_chance(one, other) for one, other in itertools.combinations(sets, 2)]
        pictures.append(figures.distance_matrix(names, compare.hamming(sets), chance))
    return Section(
        key="agreement", title="Do runs keep the same samples?",
        look="Value is what a sample is worth to one student. If two seeds, or two students, keep nearly the same set "
        "(dark), that set can be reused for others. Compare with what chance would give, above the matrix.",
        pictures=pictures, folded=[made["distances"]] if pictures else [],
    )  # fmt: skip


def _cost(made: dict[str, Table]) -> Section:
    rows = made["cost"].rows
    return Section(
        key="cost", title="What it cost",
        look="Without a store the teacher would be paid again in every epoch of every student. Which of the columns is "
        "the large one here, and which does condensation make smaller?",
        tables=[made["cost"]] if rows else [], pictures=[figures.costs(rows)] if rows else [],
    )  # fmt: skip


def _provenance(made: dict[str, Table]) -> Section:
    return Section(
        key="provenance", title="Where the numbers come from",
        look="Every number above was computed from files whose digests were checked first. With the commit, command "
        "and settings below the runs can be made again.",
        tables=[made["runs"]] if made["runs"].rows else [],
        folded=[table for name in ("settings", "identities") if (table := made[name]).rows],
    )  # fmt: skip


def _document(loaded: Loaded, made: dict[str, Table], sections: Sequence[Section]) -> dict[str, Any]:
    """Return all that the report says as JSON values."""
    pictures = [picture for section in sections for picture in section.pictures]
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
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_safe)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=document["title"], summary=document["summary"], notes=document["notes"], problems=made["troubles"],
        sections=sections, words=WORDS, version=__version__, uri=images.data_uri,
    )  # fmt: skip


def _safe(value: Any) -> Any:
    """Return what the template shows: texts in one line, without control or bidirectional characters."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _brief(loaded: Loaded, made: dict[str, Table]) -> str:
    """Return title, main table and what is not in it, as text for a terminal."""
    results = made["results"]
    brief = replace(results, columns=tuple(column for column in results.columns if column.name in BRIEF))
    left_out = [f"not in it: {problem.path} is {problem.state} ({problem.error})" for problem in loaded.problems]
    return "\n".join([printable(_title(loaded)), "", brief.text(), *map(printable, left_out)])
