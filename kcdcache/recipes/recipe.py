"""Recipes: chains of commands, repeated for seeds, pairs of networks and variants."""

import itertools
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from kcdcache import settings, statistics
from kcdcache.commands import COMMANDS, STEPS, Result, TextTable, checks
from kcdcache.datasets import spec
from kcdcache.errors import KcdcacheError, SettingsError, UnfinishedError, nearest
from kcdcache.files import cloud
from kcdcache.files.atomic import write_atomic
from kcdcache.files.records import readable_json
from kcdcache.progress import Progress
from kcdcache.recipes.jobs import Outcome, execute
from kcdcache.settings import MachineSettings, RunCommand, Settings

logger = logging.getLogger(__name__)

EMBEDDED = Path(__file__).with_name("digits.toml")
REFERENCE = re.compile(r"@([A-Za-z0-9_.-]+)(:condensed|:values)?")
PLACE = re.compile(r"\{(\w+)\}")
"""placeholder for an entry of a pair, as in model = "{student}" """
PLACES = {"fit": "out", "precompute": "store", "train": "out", "condense": "out"}
"""command -> setting for the path of its result"""
PERCENTS = ("accuracy_last", "accuracy_best")
NUMBERS = {"relative_cost": ".3f", "student_samples": ",.0f", "teacher_forwards": ",.0f", "seconds": ".1f"}
"""entries of summaries that the table averages: those shown in percent, and the formats of the others"""
HEAD = ("", "network", "n", "accuracy %", "best %", "relative cost", "student samples", "teacher forwards", "seconds")
EXPENDABLE = ("teacher forwards", "best %", "seconds", "relative cost", "network")
Entry = Mapping[str, Any]


class Step(Settings):
    """A step of a recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    """name of the step and its folder; other steps refer to it as @name"""
    run: str
    """command: fit, precompute, train or condense"""
    title: str = ""
    """name in the table; default: `name`"""
    per_seed: bool = False
    """run once for every seed of the recipe, in its own folder"""
    data_options: str = ""
    """options added to the data spec for this step, such as noise=0.4 or gamma=0.6"""
    settings: dict[str, Any] = Field(default_factory=dict)
    """settings of the command; @name is the result of a step, @name:condensed the condensed set of a run"""


class Recipe(Settings):
    """A chain of steps, with pairs and variants expanded."""

    title: str
    data: str
    """data spec of every step that takes one"""
    train_images: int | None = Field(default=None, ge=1)
    """use only `train_images` training images, except in steps whose data_options have their own `train`"""
    train_order: Literal["balanced", "stored"] = "balanced"
    """which those are: every class's share, or the first in stored order (`order` of a data spec)"""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    machine: MachineSettings = Field(default_factory=MachineSettings)
    """device and threads of every step that takes them"""
    step: tuple[Step, ...]

    def limited(self, text: str) -> str:
        """Return a data spec limited to `train_images`, unless it has its own limit."""
        order = "" if self.train_order == "balanced" else f"&order={self.train_order}"
        return text if self.train_images is None else spec.extended(text, f"train={self.train_images}{order}")

    def data_of(self, step: Step) -> str:
        """Return the data spec of a step; its limits are those of the recipe's spec, else the step's, else ours."""
        return self.limited(spec.extended(self.data, step.data_options) if step.data_options else self.data)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A step for one seed, or for all seeds (None)."""

    step: Step
    seed: int | None

    @property
    def name(self) -> str:
        """Name of the piece and its folder."""
        return self.step.name if self.seed is None else f"{self.step.name}-seed{self.seed}"

    def place(self, out: Path) -> Path:
        """Return the path of its result."""
        return out / (f"{self.name}.parquet" if self.step.run == "condense" else self.name)


def pieces(step: Step, recipe: Recipe) -> list[Piece]:
    """Return the pieces of a step, one per seed if it runs per seed."""
    return [Piece(step=step, seed=seed) for seed in (recipe.seeds if step.per_seed else (None,))]


def command(given: RunCommand, progress: Progress, dry_run: bool = False) -> Result:
    """Run a recipe and write its report; return its results, or with `dry_run` the settings of every step."""
    path = given.recipe or EMBEDDED
    recipe, out = load(path), given.out or Path("runs") / path.stem
    machine = recipe.machine.model_copy(update=given.machine.model_dump(exclude_unset=True))
    recipe = recipe.model_copy(update={"data": given.data or recipe.data, "machine": machine})
    if dry_run:
        return {"would": "run", "recipe": str(path), "steps": planned(recipe, out)}
    results = run(recipe, out, jobs=given.jobs, command=" ".join(["kcdcache", *sys.argv[1:]]), progress=progress)
    from kcdcache.report import page

    report: str | None = str(out / "report.html")
    verdict: list[str] = []
    try:
        verdict = page.write([out], out / "report.html")["verdict"]
    except KcdcacheError as error:
        logger.warning("no report: %s", error)
        report = None
    return {"table": table(results, verdict), "files": str(out), "report": report, "verdict": verdict, **results}


def load(path: Path) -> Recipe:
    """Read a recipe from TOML and check it, including the settings of its steps.

    Raises:
        NotFoundError: the file does not exist.
        SettingsError: it is not TOML, a key is unknown, a value out of range, or a reference names no earlier step.
    """
    content = settings.read_toml(path)
    for name, what in (("step", "steps"), ("pair", "pairs of networks")):
        found = content.setdefault(name, [])
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise SettingsError(f"{path}: {what} are tables headed [[{name}]], found {name} = {found!r}")
    content["step"] = tuple(
        settings.make(Step, _nested(entry), f"{path}, step {number}")
        for number, entry in enumerate(spelled_out(content["step"], content.pop("pair"), str(path)), 1)
    )
    recipe = settings.make(Recipe, content, str(path))
    if recipe.train_images is None and "train_order" in recipe.model_fields_set:
        raise SettingsError(f"train_order in {path} does nothing without train_images; leave it out")
    _require_order(recipe, path)
    for step in recipe.step:  # find mistakes before hours are spent on earlier steps
        first = pieces(step, recipe)[0]
        _possible(step, resolved(first, recipe, path.with_suffix("")), f"{path}, step '{step.name}'")
    return recipe


def run(recipe: Recipe, out: Path, *, jobs: int = 1, command: str = "", progress: Progress) -> Result:
    """Run the unfinished steps into `out`; return the results, which are also written to out/results.json.

    With `jobs` above 1, that many steps and seeds run at once, each in a process with its share of the cores unless
    the recipe sets threads. If a step fails, only those that need it are skipped; both are listed under `failed`.

    Raises:
        SettingsError: the settings of a step are wrong; nothing has been done.
        InterruptedRunError: the user asked to stop; the same call resumes.
    """
    share = {"threads": max(1, (os.cpu_count() or 1) // jobs)} if jobs > 1 else {}
    extra = share | recipe.machine.model_dump(exclude_unset=True)
    named = {piece.name: piece for step in recipe.step for piece in pieces(step, recipe)}

    def prepare(name: str) -> Job:
        step = named[name].step
        own = {key: value for key, value in extra.items() if key in settings.fields(COMMANDS[step.run].takes)}
        values = {key: cloud.opened(value) for key, value in resolved(named[name], recipe, out).items()} | own
        title = (step.title or step.name) + ("" if named[name].seed is None else f" (seed {named[name].seed})")
        return Job(title, step.run, _possible(step, values, f"step '{step.name}'"), progress)

    for name in named:  # find wrong settings before the first step
        prepare(name)
    modules = sorted({f"kcdcache.{COMMANDS[step.run].where.partition(':')[0]}" for step in recipe.step})
    modules.append("torch._dynamo")  # saves 1.6 s in the first training step of every process
    needs = {
        name: dict.fromkeys(_referred(match[1], piece, recipe).name for match in _references(piece.step).values())
        for name, piece in named.items()
    }
    outcomes = execute(needs, prepare, do, jobs=jobs, logs=out / "logs", preload=modules)
    results = {
        "title": recipe.title,
        "command": command,
        "data": recipe.limited(recipe.data),
        "seeds": list(recipe.seeds),
        "jobs": jobs,
        "environment": _environment(extra),
        **_told(recipe, named, outcomes),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "results.json", readable_json(cloud.shown(results)))
    return results


class Job(NamedTuple):
    """A piece with its settings, ready to run in this process or another."""

    title: str
    command: str
    given: Settings
    progress: Progress


def do(job: Job) -> Result:
    """Run a step; return the result of its command."""
    logger.info("%s", job.title)
    made = COMMANDS[job.command](job.given, job.progress)
    if "unsealed" in made:
        raise UnfinishedError(f"the store at {made['store']} is not sealed: {made['unsealed']}")
    return made


def planned(recipe: Recipe, out: Path) -> list[dict[str, Any]]:
    """Return the resolved settings of every step, in order."""
    return [
        {"step": step.name, "run": step.run, **resolved(piece, recipe, out)}
        for step in recipe.step
        for piece in pieces(step, recipe)
    ]


def resolved(piece: Piece, recipe: Recipe, out: Path) -> dict[str, Any]:
    """Return the settings of a step with data, seed, folder and references filled in."""
    step = piece.step
    known = settings.fields(COMMANDS[step.run].takes)
    filled: dict[str, Any] = {PLACES[step.run]: str(piece.place(out))}
    if "data" in known:
        filled["data"] = recipe.data_of(step)
    if piece.seed is not None and "seed" in known:
        filled["seed"] = piece.seed
    filled |= step.settings
    for key, match in _references(step).items():
        place = _referred(match[1], piece, recipe).place(out)
        if match[2] == ":condensed":
            from kcdcache.runs import state

            place = state.condensed_set(place)
        filled[key] = str(place / "values.parquet" if match[2] == ":values" else place)
    return filled


def table(results: Mapping[str, Any], verdict: Sequence[str] = ()) -> TextTable:
    """Return the rows of a recipe as a table: accuracy in percent, cost relative to full training.

    It ends with the `verdict` of the report. Columns of EXPENDABLE are left out, in this order, as its width demands.
    """
    failures = [f"failed: {failure['run']}: {failure['error']}" for failure in results.get("failed", [])]
    return TextTable(
        HEAD,
        [_cells(row) for row in results["rows"]],
        left=2,
        above=(results["title"], ""),
        below=[line for some in (verdict, failures) if some for line in ("", *some)],
        rule=True,
    ).fitted(EXPENDABLE)


def _cells(row: Mapping[str, Any]) -> list[str]:
    cells = [row["title"], row.get("model", ""), str(row["n"])]
    for name in PERCENTS:
        std = row.get(f"{name}_std")
        spread = "" if std is None else f" ± {100 * std:.2f}"
        cells.append(f"{100 * row[name]:.2f}{spread}" if name in row else "")
    return cells + [format(row[name], form) if name in row else "" for name, form in NUMBERS.items()]


def _possible(step: Step, values: Mapping[str, Any], source: str) -> Settings:
    given = settings.make(COMMANDS[step.run].takes, values, source)
    checks.require_possible(given)
    return given


def _environment(machine: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from kcdcache.environment import environment
    from kcdcache.networks.input_transform import resolve_device

    threads = machine.get("threads") or torch.get_num_threads()
    return environment(resolve_device(machine.get("device", "auto")), threads)


def _told(
    recipe: Recipe, named: Mapping[str, Piece], outcomes: Mapping[str, Outcome]
) -> dict[str, list[dict[str, Any]]]:
    found = {name: outcome.result for name, outcome in outcomes.items() if outcome.result is not None}
    runs = []
    for name, result in found.items():
        step = named[name].step
        data = {"data": recipe.data_of(step)} if step.data_options else {}
        runs.append({"step": step.name, "seed": named[name].seed, **data, **result})
    failed = {name: outcome for name, outcome in outcomes.items() if outcome.result is None}
    return {
        "rows": [_row(step, recipe, found) for step in recipe.step if step.run != "condense"],
        "runs": runs,
        "failed": [{"run": name, "error": one.error, "exit_code": one.exit_code} for name, one in failed.items()],
    }


def _row(step: Step, recipe: Recipe, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means over seeds, with sample standard deviations for n > 1."""
    summaries = [found[piece.name] for piece in pieces(step, recipe) if piece.name in found]
    row: dict[str, Any] = {"step": step.name, "title": step.title or step.name, "n": len(summaries)}
    first = summaries[0] if summaries else {}
    row |= {key: first[key] for key in ("model", "method", "kept") if key in first}
    for name in (*PERCENTS, *NUMBERS):
        _, mean, std = statistics.spread([summary[name] for summary in summaries if name in summary])
        row |= {key: value for key, value in ((name, mean), (f"{name}_std", std)) if value is not None}
    return row


def spelled_out(entries: Sequence[Entry], pairs: Sequence[Mapping[str, Any]], source: str) -> list[dict[str, Any]]:
    """Expand the [[step]] tables `entries` of a recipe for its [[pair]] tables and their [[step.variant]] tables.

    The steps are repeated for every pair, whose entries replace {name} in their texts; a list as an entry means a pair
    with each of its items. Equal steps (such as a teacher shared by two pairs) are merged. A variant repeats its step
    with other settings; its name is appended to the step's with '-', and its title to the step's title.

    Raises SettingsError if {name} is no entry of a pair, a variant has no name, or different steps have the same name.
    """
    found: dict[str, dict[str, Any]] = {}
    for pair in _single(pairs) or [{}]:
        for entry in entries:
            for variant in _variants(entry, source):
                step = _filled(variant, pair, source) if pairs else variant
                name = str(step.get("name"))
                if name in found and (not pairs or found[name] != step):
                    raise SettingsError(f"{source}: two steps are called '{name}'; names differ by {{...}} of a pair")
                found[name] = step
    return list(found.values())


def _single(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Expand the lists in pairs, the last entry changing fastest."""
    return [
        dict(zip(pair, chosen, strict=True))
        for pair in pairs
        for chosen in itertools.product(*(item if isinstance(item, list) else [item] for item in pair.values()))
    ]


def _variants(entry: Entry, source: str) -> Iterator[dict[str, Any]]:
    plain = {key: value for key, value in entry.items() if key != "variant"}
    if "variant" not in entry:
        yield plain
        return
    for variant in entry["variant"]:
        if not isinstance(variant, Mapping) or "name" not in variant:
            raise SettingsError(
                f"{source}, step '{entry.get('name')}': variants are tables headed [[step.variant]] with a name"
            )
        title = " ".join(part for part in (entry.get("title"), variant.get("title", variant["name"])) if part)
        yield {**plain, **variant, "name": f"{entry.get('name')}-{variant['name']}", "title": title}


def _filled(value: Any, pair: Entry, source: str) -> Any:
    """Replace {name} by the entry of the pair in all texts of a value."""

    def entry(match: re.Match[str]) -> str:
        if match[1] not in pair:
            raise SettingsError(f"{source}: {match[0]} is not a key of every [[pair]]; {nearest(match[1], list(pair))}")
        return str(pair[match[1]])

    if isinstance(value, str):
        return PLACE.sub(entry, value)
    if isinstance(value, Mapping):
        return {key: _filled(inner, pair, source) for key, inner in value.items()}
    return [_filled(inner, pair, source) for inner in value] if isinstance(value, list) else value


def _nested(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the TOML table of a step with the settings of its command under `settings`."""
    own = Step.model_fields.keys() - {"settings"}
    given = {key: value for key, value in entry.items() if key not in own}
    return {key: value for key, value in entry.items() if key in own} | {"settings": given}


def _require_order(recipe: Recipe, path: Path) -> None:
    """Raise SettingsError unless every step runs a command and refers to earlier steps only."""
    known: dict[str, Step] = {}
    for step in recipe.step:
        place = f"{path}, step '{step.name}'"
        if step.run not in STEPS:
            raise SettingsError(f"{place}: unknown command '{step.run}'; {nearest(step.run, STEPS)}")
        if step.name in known:
            raise SettingsError(f"{path}: two steps are called '{step.name}'")
        if step.per_seed and "seed" in step.settings:
            raise SettingsError(f"{place}: it runs once per seed of the recipe, so it cannot set 'seed'")
        for text in step.settings.values():
            if isinstance(text, str) and text.startswith("@"):
                _require_reference(text, step, known, place)
        known[step.name] = step


def _require_reference(text: str, step: Step, known: Mapping[str, Step], place: str) -> None:
    match = REFERENCE.fullmatch(text)
    if match is None:
        raise SettingsError(f"{place}: '{text}' is not a reference; write @name, @name:condensed or @name:values")
    name, of_run = match[1], match[2]
    if name not in known:
        raise SettingsError(f"{place}: @{name} names no earlier step; {nearest(name, known)}")
    if known[name].per_seed and not step.per_seed:
        raise SettingsError(f"{place}: @{name} runs per seed, so this step must too")
    if of_run and known[name].run != "train":
        raise SettingsError(f"{place}: {text} asks for what only a 'train' step has; '{name}' runs {known[name].run}")


def _references(step: Step) -> dict[str, re.Match[str]]:
    texts = {key: value for key, value in step.settings.items() if isinstance(value, str)}
    return {key: match for key, text in texts.items() if (match := REFERENCE.fullmatch(text))}


def _referred(name: str, piece: Piece, recipe: Recipe) -> Piece:
    """Return the piece that a reference of `piece` names, for the same seed."""
    step = next(step for step in recipe.step if step.name == name)
    return Piece(step=step, seed=piece.seed if step.per_seed else None)
