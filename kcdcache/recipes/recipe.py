"""Recipes written short: steps repeated for pairs of networks and for variants, spelled out one by one."""

import itertools
import logging
import os
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from kcdcache import settings
from kcdcache.commands import steps
from kcdcache.data import spec
from kcdcache.data.spec import extended
from kcdcache.environment import environment
from kcdcache.errors import SettingsError
from kcdcache.files import cloud
from kcdcache.files.atomic import write_atomic
from kcdcache.files.records import readable_json
from kcdcache.networks.input_transform import resolve_device
from kcdcache.progress import Progress
from kcdcache.recipes.jobs import Unit, execute
from kcdcache.runs import state
from kcdcache.settings import MachineSettings, Settings, nearest

PLACE = re.compile(r"\{(\w+)\}")
"""where a pair's entry goes, as in model = "{student}" """
Entry = Mapping[str, Any]


def spelled_out(entries: Sequence[Entry], pairs: Sequence[Mapping[str, Any]], source: str) -> list[dict[str, Any]]:
    """Return the steps of a recipe, each once, in order; `entries` are its [[step]] tables, `pairs` its [[pair]] ones.

    All steps are repeated for every pair, whose entries replace {name} in their texts; an entry that is a list stands
    for a pair with each of its items. Steps that come out equal (a teacher that two pairs share) are one.
    [[step.variant]] tables repeat their step with other settings: their name is appended to the step's with '-', their
    title to its title.

    Raises:
        SettingsError: {name} is no entry of a pair, a variant has no name, or two different steps have the same name.
    """
    found: dict[str, dict[str, Any]] = {}
    for pair in _single(pairs) or [{}]:
        for entry in entries:
            for variant in _variants(entry, source):
                step = _filled(variant, pair, bool(pairs), source)
                name = str(step.get("name"))
                if name in found and (not pairs or found[name] != step):
                    raise SettingsError(f"{source}: two steps are called '{name}'; names differ by {{...}} of a pair")
                found[name] = step
    return list(found.values())


def _single(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the pairs with every list's items one by one, the last entry changing fastest."""
    listed = [[item if isinstance(item, list) else [item] for item in pair.values()] for pair in pairs]
    return [
        dict(zip(pair, chosen, strict=True))
        for pair, items in zip(pairs, listed, strict=True)
        for chosen in itertools.product(*items)
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


def _filled(value: Any, pair: Mapping[str, str], paired: bool, source: str) -> Any:
    """Return a value with {name} replaced by the pair's entry, in all texts inside it."""
    if isinstance(value, str) and paired:
        return PLACE.sub(lambda match: _of_pair(match[1], pair, source), value)
    if isinstance(value, Mapping):
        return {key: _filled(inner, pair, paired, source) for key, inner in value.items()}
    return [_filled(inner, pair, paired, source) for inner in value] if isinstance(value, list) else value


def _of_pair(name: str, pair: Mapping[str, str], source: str) -> str:
    if name not in pair:
        raise SettingsError(f"{source}: {{{name}}} is no entry of every [[pair]]; {nearest(name, list(pair))}")
    return str(pair[name])


logger = logging.getLogger(__name__)

EMBEDDED = Path(__file__).with_name("digits.toml")
REFERENCE = re.compile(r"@([A-Za-z0-9_.-]+)(:condensed|:values)?")
PLACES = {"fit": "out", "precompute": "store", "train": "out", "condense": "out"}
"""command -> the setting that says where its result goes"""
AVERAGED = ("accuracy_last", "accuracy_best", "relative_cost", "teacher_forwards", "seconds")


class Step(Settings):
    """One step of a recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    """name of the step and of its folder; other steps refer to it as @name"""
    run: str
    """command: fit, precompute, train or condense"""
    title: str = ""
    """how the table calls it; the name if empty"""
    per_seed: bool = False
    """run once for every seed of the recipe, in its own folder"""
    data_options: str = ""
    """what is added to the recipe's data spec for this step, such as noise=0.4 or gamma=0.6"""
    settings: dict[str, Any] = Field(default_factory=dict)
    """the command's settings; @name stands for a step's result, @name:condensed for a run's condensed set"""


class Recipe(Settings):
    """A chain of steps, those of pairs and variants spelled out."""

    title: str
    """what the recipe shows"""
    data: str
    """data spec given to every step that takes one"""
    train_images: int | None = Field(default=None, ge=1)
    """use only the first so many training images, but for steps whose data_options have a `train` of their own"""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """seeds of the steps that run per seed"""
    machine: MachineSettings = Field(default_factory=MachineSettings)
    """device and threads for every step that takes them"""
    step: tuple[Step, ...]
    """the steps in order"""


def load(path: Path) -> Recipe:
    """Return a recipe read from TOML; unknown keys are refused, those of the steps' settings included.

    Raises:
        NotFoundError: there is no such file.
        SettingsError: it is not TOML, a key is unknown, a value out of range, or a reference names no earlier step.
    """
    content = settings.read_toml(path)
    entries = content.get("step", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SettingsError(f"{path}: steps are tables headed [[step]], found step = {entries!r}")
    pairs = content.pop("pair", [])
    if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
        raise SettingsError(f"{path}: pairs of networks are tables headed [[pair]], found pair = {pairs!r}")
    content["step"] = tuple(
        settings.make(Step, _nested(entry), f"{path}, step {number + 1}")
        for number, entry in enumerate(spelled_out(entries, pairs, str(path)))
    )
    recipe = settings.make(Recipe, content, str(path))
    _require_order(recipe, path)
    for step in recipe.step:  # a value out of range is found before hours are spent on the steps before it
        values = resolved(step, recipe, path.with_suffix(""), recipe.data, recipe.seeds[0] if step.per_seed else None)
        settings.make(steps.STEPS[step.run][0], values, f"{path}, step '{step.name}'")
    return recipe


def run(
    recipe: Recipe,
    out: Path,
    *,
    data: str | None = None,
    machine: Mapping[str, Any] | None = None,
    jobs: int = 1,
    command: str = "",
    progress: Progress,
) -> dict[str, Any]:
    """Execute the steps into `out`, passing over finished ones; return the table, also written to out/results.json.

    With `jobs` above 1, so many steps and seeds at once, each in a process with its share of the cores unless
    `machine` gives threads. A step that fails stops only those that need it; it is named in the result's `failed`.

    Raises:
        SettingsError: a step's settings are wrong; nothing has been done.
        InterruptedRunError: the user asked to stop; the same call resumes.
    """
    given = {**recipe.machine.model_dump(exclude_unset=True), **(machine or {})}
    share = {"threads": max(1, (os.cpu_count() or 1) // jobs)} if jobs > 1 else {}
    extra = settings.make(MachineSettings, share | given).model_dump(exclude_unset=True)
    named = {_name(step, seed): (step, seed) for step in recipe.step for seed in _seeds(step, recipe)}

    def prepare(name: str) -> Job:
        step, seed = named[name]
        values = _here(resolved(step, recipe, out, data or recipe.data, seed) | _accepted(step.run, extra))
        title = (step.title or step.name) + ("" if seed is None else f" (seed {seed})")
        where = f"step '{step.name}'"
        return Job(title=title, command=step.run, values=values, source=where, progress=progress)

    for name in named:  # what is out of range is found before the first step
        model, job = steps.STEPS[named[name][0].run][0], prepare(name)
        settings.make(model, job.values, job.source)
    units = [Unit(name=name, needs=_needs(step, recipe, seed)) for name, (step, seed) in named.items()]
    outcomes = execute(units, prepare, do, jobs=jobs, logs=out / "logs")
    found = {name: outcome.result for name, outcome in outcomes.items() if outcome.result is not None}
    failed = [
        {"run": name, "error": outcome.error, "exit_code": outcome.exit_code}
        for name, outcome in outcomes.items()
        if outcome.result is None
    ]
    threads = extra.get("threads") or torch.get_num_threads()
    results = {
        "title": recipe.title,
        "command": command,
        "data": _limited(data or recipe.data, recipe.train_images),
        "seeds": list(recipe.seeds),
        "jobs": jobs,
        "environment": environment(resolve_device(extra.get("device", "auto")), threads),
        "rows": [_row(step, recipe, found) for step in recipe.step if step.run != "condense"],
        "runs": [
            {"step": step.name, "seed": seed, **_told_data(step, recipe, data or recipe.data), **found[name]}
            for name, (step, seed) in named.items()
            if name in found
        ],
        "failed": failed,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "results.json", readable_json(cloud.shown(results)))
    return results


@dataclass(frozen=True, kw_only=True)
class Job:
    """A step for one seed, ready to be done, in this process or another."""

    title: str
    command: str
    values: dict[str, Any]
    source: str
    """where the values are from, for errors"""
    progress: Progress


def do(job: Job) -> dict[str, Any]:
    """Do a step; return its result.

    Raises:
        KcdcacheError: as for the step's command.
    """
    logger.info("%s", job.title)
    model, work = steps.STEPS[job.command]
    return work(settings.make(model, job.values, job.source), job.progress)


def planned(recipe: Recipe, out: Path, data: str | None = None) -> list[dict[str, Any]]:
    """Return every step's resolved settings, in order, without doing anything."""
    return [
        {"step": step.name, "run": step.run, **resolved(step, recipe, out, data or recipe.data, seed)}
        for step in recipe.step
        for seed in _seeds(step, recipe)
    ]


def resolved(step: Step, recipe: Recipe, out: Path, data: str, seed: int | None) -> dict[str, Any]:
    """Return a step's settings with data, seed, folder and references filled in."""
    values = {key: _resolved(value, recipe, out, seed) for key, value in step.settings.items()}
    filled: dict[str, Any] = {PLACES[step.run]: str(place(step, out, seed))}
    if "data" in steps.STEPS[step.run][0].model_fields:
        filled["data"] = _data_of(step, recipe, data)
    if seed is not None and "seed" in steps.STEPS[step.run][0].model_fields:
        filled["seed"] = seed
    return filled | values


def place(step: Step, out: Path, seed: int | None) -> Path:
    """Return where a step's result lies."""
    folder = out / _name(step, seed)
    return out / f"{folder.name}.parquet" if step.run == "condense" else folder


def table(results: Mapping[str, Any]) -> str:
    """Return the recipe's rows as aligned text: accuracy in percent, cost relative to full training."""
    head = ["", "network", "n", "accuracy %", "best %", "relative cost", "teacher forwards", "seconds"]
    lines = [head] + [_cells(row) for row in results["rows"]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    aligned = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    failures = [f"failed: {failure['run']}: {failure['error']}" for failure in results.get("failed", [])]
    shown = [results["title"], "", aligned[0], "-" * len(aligned[0]), *aligned[1:]]
    return "\n".join([*shown, *(["", *failures] if failures else [])])


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["title"],
        row.get("model", ""),
        str(row["n"]),
        _percent(row, "accuracy_last"),
        _percent(row, "accuracy_best"),
        f"{row['relative_cost']:.3f}" if "relative_cost" in row else "",
        f"{row['teacher_forwards']:,.0f}" if "teacher_forwards" in row else "",
        f"{row['seconds']:.1f}" if "seconds" in row else "",
    ]


def _percent(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        return ""
    spread = row.get(f"{name}_std")
    return f"{100 * row[name]:.2f}" + (f" ± {100 * spread:.2f}" if spread is not None else "")


def _seeds(step: Step, recipe: Recipe) -> tuple[int | None, ...]:
    return recipe.seeds if step.per_seed else (None,)


def _name(step: Step, seed: int | None) -> str:
    """Return the name of a step for one seed, which is that of its folder."""
    return step.name if seed is None else f"{step.name}-seed{seed}"


def _needs(step: Step, recipe: Recipe, seed: int | None) -> tuple[str, ...]:
    """Return the names of what a step refers to."""
    known = {other.name: other for other in recipe.step}
    matches = (REFERENCE.fullmatch(text) for text in _references(step))
    others = [known[match[1]] for match in matches if match is not None]
    return tuple(dict.fromkeys(_name(other, seed if other.per_seed else None) for other in others))


def _row(step: Step, recipe: Recipe, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean over seeds of what the table shows, with the sample standard deviation where n > 1."""
    summaries = [found[name] for seed in _seeds(step, recipe) if (name := _name(step, seed)) in found]
    row: dict[str, Any] = {"step": step.name, "title": step.title or step.name, "n": len(summaries)}
    first = summaries[0] if summaries else {}
    row |= {key: first[key] for key in ("model", "method", "kept") if key in first}
    for name in AVERAGED:
        numbers = [summary[name] for summary in summaries if name in summary]
        if numbers:
            row[name] = statistics.fmean(numbers)
            row |= {f"{name}_std": statistics.stdev(numbers)} if len(numbers) > 1 else {}
    return row


def _nested(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step's TOML table with the command's settings gathered under `settings`."""
    own = set(Step.model_fields) - {"settings"}
    return {key: entry[key] for key in entry if key in own} | {
        "settings": {key: entry[key] for key in entry if key not in own}
    }


def _require_order(recipe: Recipe, path: Path) -> None:
    known: dict[str, Step] = {}
    for step in recipe.step:
        if step.run not in steps.STEPS:
            raise SettingsError(
                f"{path}, step '{step.name}': unknown command '{step.run}'; {nearest(step.run, steps.STEPS)}"
            )
        if step.name in known:
            raise SettingsError(f"{path}: two steps are called '{step.name}'")
        _require_settings(step, path)
        for text in _references(step):
            _require_reference(text, step, known, f"{path}, step '{step.name}'")
        known[step.name] = step


def _require_reference(text: str, step: Step, known: Mapping[str, Step], place: str) -> None:
    match = REFERENCE.fullmatch(text)
    if match is None:
        raise SettingsError(f"{place}: '{text}' is no reference; write @name, @name:condensed or @name:values")
    name, of_run = match[1], match[2]
    if name not in known:
        raise SettingsError(f"{place}: @{name} names no earlier step; {nearest(name, known)}")
    if known[name].per_seed and not step.per_seed:
        raise SettingsError(f"{place}: @{name} runs per seed, so this step must too")
    if of_run and known[name].run != "train":
        raise SettingsError(f"{place}: {text} asks for what only a 'train' step has; '{name}' runs {known[name].run}")


def _require_settings(step: Step, path: Path) -> None:
    known = settings.keys(steps.STEPS[step.run][0])
    if step.per_seed and "seed" in step.settings:
        raise SettingsError(f"{path}, step '{step.name}': it runs once per seed of the recipe, so it cannot set 'seed'")
    for key in step.settings:
        if key not in known:
            raise SettingsError(f"unknown setting '{key}' in {path}, step '{step.name}'; {nearest(key, known)}")


def _references(step: Step) -> list[str]:
    return [value for value in step.settings.values() if isinstance(value, str) and value.startswith("@")]


def _resolved(value: Any, recipe: Recipe, out: Path, seed: int | None) -> Any:
    match = REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    step = next(step for step in recipe.step if step.name == match[1])
    path = place(step, out, seed if step.per_seed else None)
    if match[2] == ":condensed":
        return str(state.condensed_set(path))
    return str(path / "values.parquet" if match[2] == ":values" else path)


def _here(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step's settings with the paths of mirrors instead of URLs."""
    return {key: cloud.opened(value) for key, value in values.items()}


def _accepted(command: str, machine: Mapping[str, Any]) -> dict[str, Any]:
    fields = steps.STEPS[command][0].model_fields
    return {key: value for key, value in machine.items() if key in fields}


def _limited(spec: str, train_images: int | None) -> str:
    return spec if train_images is None else extended(spec, f"train={train_images}")


def _data_of(step: Step, recipe: Recipe, data: str) -> str:
    """Return a step's data spec; limits of the spec itself go before the step's, and those before the recipe's."""
    return _limited(spec.extended(data, step.data_options) if step.data_options else data, recipe.train_images)


def _told_data(step: Step, recipe: Recipe, data: str) -> dict[str, str]:
    """Return the data spec of a step that has its own, for the results."""
    return {"data": _data_of(step, recipe, data)} if step.data_options else {}
