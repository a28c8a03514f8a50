"""The command line: parse, call, print. The only module that prints or exits, and that imports inside functions."""

import difflib
import gc
import importlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from kcdcache import __version__, interrupt
from kcdcache.cli.console import printable, readable
from kcdcache.cli.help import ARGUMENTS, EXAMPLES, SUMMARIES
from kcdcache.cli.options import Sectioned, option, sections_of
from kcdcache.errors import KcdcacheError, NoSpaceError, SettingsError
from kcdcache.files import cloud
from kcdcache.files.atomic import FULL
from kcdcache.settings import COMMANDS, make

SCHEMA_VERSION = 0
COLLECTED = 100_000
"""objects made between two collections of garbage: imports make many and no garbage, 0.1 s of looking for it"""
MOST_SHOWN = 4000
"""characters of an error: names from files may have any length"""
TOGETHER = {"fit", "train"}
"""commands that several processes under torchrun do together"""
LONG = {"run", "fit", "precompute", "train"}
"""commands that stop at a safe point when asked to, and resume; the others are over at once"""


JOBS = "runs done at once, each in a process with its share of the cores; several share one GPU"


class Commands(click.Group):
    """Commands built when they are called, so that `--help` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of a first session."""
        return list(SUMMARIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of that name."""
        return BUILDERS[cmd_name]() if cmd_name in BUILDERS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the named command; an unknown name is refused with the nearest known one."""
        if args and args[0] not in SUMMARIES and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], SUMMARIES, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(SUMMARIES)}"
            ctx.fail(f"no command '{args[0]}'; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without building them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(__version__, prog_name="kcdcache")
def program() -> None:
    """Run the teacher once. Keep what matters. Teach any student.

    \b
    kcdcache run                       the whole job on embedded digits, on CPU
    kcdcache COMMAND --help            options, with their defaults, and examples
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process with its exit code."""
    gc.set_threshold(COLLECTED)
    sys.exit(_outcome(list(sys.argv[1:] if arguments is None else arguments)))


def _outcome(arguments: list[str]) -> int:
    try:
        code = program.main(arguments, prog_name="kcdcache", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        click.echo(_misused(error), err=True)
        return error.exit_code
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; the same command resumes", err=True)
        return 130
    except KcdcacheError as error:
        return _failed(str(error), error.exit_code, arguments)
    except OSError as error:
        if error.errno in FULL:
            remedy = "free some space and run the same command again to resume"
            return _failed(f"{error}; {remedy}", NoSpaceError.exit_code, arguments)
        return _failed(str(error), 1, arguments)
    except MemoryError as error:
        return _failed(f"out of memory: {error}", 1, arguments)
    except Exception as error:
        return _failed(f"internal error: {type(error).__name__}: {error} (--debug shows where)", 1, arguments)
    return code if isinstance(code, int) else 0


def _misused(error: click.ClickException) -> str:
    """Return what click would show of a wrong command line, made printable: it may hold names of files."""
    context = getattr(error, "ctx", None)
    usage = [] if context is None else [context.get_usage(), f"Try '{context.command_path} --help' for help.", ""]
    return "\n".join([*usage, f"Error: {printable(error.format_message())}"])


def _failed(message: str, exit_code: int, arguments: Sequence[str]) -> int:
    if "--debug" in arguments:
        click.echo("\n".join(f"| {printable(line)}" for line in traceback.format_exc().splitlines()), err=True)
    shown = message if len(message) <= MOST_SHOWN else f"{message[:MOST_SHOWN]}... ({len(message)} characters)"
    first, *others = shown.split("\n")
    # of several problems each has its line, marked as such: no line break in a name can forge one of ours
    click.echo(
        "\n".join([f"error: {printable(first)}", *(f"  - {printable(line.strip())}" for line in others)]), err=True
    )
    return exit_code


def _command(
    name: str,
    options: list[click.Parameter],
    work: Callable[..., dict[str, Any]],
    sections: Mapping[str, str] | None = None,
) -> click.Command:
    """Return a command with the common options, which logs, calls `work` and prints its result."""

    def callback(as_json: bool, debug: bool, quiet: bool, **values: Any) -> None:
        follower = name in TOGETHER and os.environ.get("RANK", "0") != "0"  # of several processes the first one speaks
        _log_to_stderr(quiet or follower)
        with interrupt.listening() if name in LONG else nullcontext():
            here = {key: cloud.opened(value, fresh=name == "verify") for key, value in values.items()}
            result = cloud.shown(work(**here))
        if follower:
            return
        click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **result}) if as_json else readable(result))
        if result.get("failed"):
            raise click.exceptions.Exit(result["failed"][0]["exit_code"])

    common: list[click.Parameter] = [
        click.Option(["--json", "as_json"], is_flag=True, help="print the result as one JSON object"),
        click.Option(["--debug"], is_flag=True, help="show where an error came from"),
        click.Option(["-q", "--quiet"], is_flag=True, help="no progress on stderr"),
    ]
    told = "\n\n".join([SUMMARIES[name], *([ARGUMENTS[name]] if name in ARGUMENTS else [])])
    text = told + "\n\n\b\nExamples:\n" + "\n".join(f"  {line}" for line in EXAMPLES[name])
    command = Sectioned(name, params=options + common, callback=callback, help=text)
    command.sections = sections or {}
    return command


def _settings_command(name: str) -> click.Command:
    """Return a command whose options are the fields of its settings model."""

    model = COMMANDS[name]
    own = sorted(model.model_fields, key=lambda key: key not in model.__annotations__)  # inputs before what modifies
    options: list[click.Parameter] = [option(key, model.model_fields[key]) for key in own]
    options.append(click.Option(["--dry-run"], is_flag=True, help="print what would be done, and do nothing"))

    def work(dry_run: bool, **values: Any) -> dict[str, Any]:
        settings = make(model, {key: value for key, value in values.items() if value is not None})
        if name == "condense":  # stays free of torch
            if os.environ.get("WORLD_SIZE", "1") != "1":
                raise SettingsError("condense is work for one process; start it without torchrun")
            return importlib.import_module("kcdcache.commands.condenser").run(settings, dry_run=dry_run)
        if name == "export":
            return importlib.import_module("kcdcache.commands.steps").export(settings, _Reporter(), dry_run=dry_run)
        return importlib.import_module("kcdcache.commands.steps").STEPS[name][1](settings, _Reporter(), dry_run=dry_run)

    return _command(name, options, work, sections_of(model))


def _run_command() -> click.Command:
    from kcdcache import settings

    def work(
        recipe: str | None, data: str | None, out: str | None, jobs: int, dry_run: bool, **machine: Any
    ) -> dict[str, Any]:
        recipes = importlib.import_module("kcdcache.recipes.recipe")
        path = Path(recipe) if recipe else recipes.EMBEDDED
        chain, folder = recipes.load(path), Path(out) if out else Path("runs") / path.stem
        if dry_run:
            return {"would": "run", "recipe": str(path), "steps": recipes.planned(chain, folder, data)}
        given = {key: value for key, value in machine.items() if value is not None}
        command = "kcdcache " + " ".join(sys.argv[1:])
        results = recipes.run(
            chain, folder, data=data, machine=given, jobs=jobs, command=command, progress=_Reporter()
        )  # fmt: skip
        return {"table": recipes.table(results), "files": str(folder), "report": _reported(folder), **results}

    machine = settings.MachineSettings.model_fields
    options: list[click.Parameter] = [
        click.Argument(["recipe"], required=False),
        click.Option(["--data"], help="data spec to use instead of the recipe's"),
        click.Option(["--out"], help="folder of the results  [default: runs/<recipe's name>]"),
        option("device", machine["device"]),
        option("threads", machine["threads"]),
        click.Option(["--jobs"], type=click.IntRange(1), default=1, show_default=True, help=JOBS),
        click.Option(["--dry-run"], is_flag=True, help="print every step's settings, and do nothing"),
    ]
    return _command("run", options, work)


def _reported(folder: Path) -> str | None:
    """Write the report of a recipe's folder; return its path, or None where none could be made, which is told."""
    path = folder / "report.html"
    try:
        importlib.import_module("kcdcache.report.page").write([folder], path)
    except KcdcacheError as error:
        logging.getLogger("kcdcache").warning("no report: %s", error)
        return None
    return str(path)


def _methods_command() -> click.Command:
    def work(**values: Any) -> dict[str, Any]:
        found: dict[str, Any] = importlib.import_module("kcdcache.commands.methods").run(**values)
        return found

    options: list[click.Parameter] = [
        click.Option(["--teacher"], default="wrn_40_2", show_default=True, help="network of the teacher"),
        click.Option(["--student"], default="wrn_16_2", show_default=True, help="network of the student"),
        click.Option(["--classes"], type=click.IntRange(2), default=100, show_default=True, help="number of classes"),
        click.Option(["--size"], type=click.IntRange(1), default=32, show_default=True, help="side of views in pixels"),
        click.Option(["--encoding", "encoded"], default="float16", show_default=True, help="as for precompute"),
    ]
    return _command("methods", options, work)


def _report_command() -> click.Command:
    def work(
        paths: tuple[str, ...], out: str | None, json_file: str | None, csv: str | None, **values: Any
    ) -> dict[str, Any]:
        if out is None and len(paths) > 1:
            raise SettingsError("--out is missing: of several folders none is where the report belongs; give a file")
        found: dict[str, Any] = importlib.import_module("kcdcache.report.page").write(
            [Path(path) for path in paths],
            Path(out) if out else Path(paths[0]) / "report.html",
            json_file=Path(json_file) if json_file else None,
            csv=Path(csv) if csv else None,
            **values,
        )
        return found

    options: list[click.Parameter] = [
        click.Argument(["paths"], nargs=-1, required=True, metavar="RUN_OR_FOLDER..."),
        click.Option(["--out"], help="HTML file; a report there is replaced  [default: report.html in the one folder]"),
        click.Option(["--data"], help="data spec for the images; the recipe's if unset, where it can be loaded"),
        click.Option(
            ["--reference"], help="row that the others are compared with  [default: kd, or the first trained]"
        ),
        click.Option(["--json-file"], help="JSON file for all numbers of the report"),
        click.Option(["--csv"], help="folder for one CSV file per table"),
    ]
    return _command("report", options, work)


def _seal_command() -> click.Command:
    def work(path: str) -> dict[str, Any]:
        done = importlib.import_module("kcdcache.store.writer").seal(Path(path))
        return {"store": path, "sealed": "now" if done else "before"}

    return _command("seal", [click.Argument(["path"])], work)


def _inspect_command() -> click.Command:
    def work(path: str) -> dict[str, Any]:
        found: dict[str, Any] = importlib.import_module("kcdcache.report.show").inspect(Path(path))
        return found

    return _command("inspect", [click.Argument(["path"])], work)


def _diff_command() -> click.Command:
    def work(a: str, b: str) -> dict[str, Any]:
        found: dict[str, Any] = importlib.import_module("kcdcache.commands.diff").run(Path(a), Path(b))
        return found

    return _command("diff", [click.Argument(["a"]), click.Argument(["b"])], work)


def _verify_command() -> click.Command:
    from kcdcache import settings

    fields = settings.TeacherSettings.model_fields
    options: list[click.Parameter] = [
        click.Argument(["path"]),
        click.Option(["--read-data"], is_flag=True, help="read and hash every chunk file of a store"),
        click.Option(["--sample"], metavar="SHARE", help="read and hash a share of the chunk files, such as 5%"),
        click.Option(["--data"], help="data spec of the store: are they the ones it was made from?"),
        click.Option(["--points"], type=int, default=512, show_default=True, help="points to compute again, at least"),
        click.Option(["--sample-seed"], type=int, default=0, show_default=True, help="seed of their choice"),
        click.Option(["--repair"], is_flag=True, help="make what is damaged again, with --teacher and --data"),
        click.Option(["--expect-id"], help="refuse what has another id (inspect shows it)"),
        *(option(name, field) for name, field in fields.items()),
        option("device", settings.MachineSettings.model_fields["device"]),
    ]

    def work(path: str, repair: bool, expect_id: str | None, **values: Any) -> dict[str, Any]:
        checks = importlib.import_module("kcdcache.commands.verify")
        if repair:
            unused = [values.pop(name) for name in ("read_data", "sample", "points", "sample_seed")]
            del unused  # a repair reads everything
            done: dict[str, Any] = checks.mend(Path(path), progress=_Reporter(), **values)
            return done
        read_data, sample = values.pop("read_data"), values.pop("sample")
        share = 1.0 if read_data else checks.parse_share(sample) if sample else 0.0
        depth = checks.Depth(share=share, points=values.pop("points"), seed=values.pop("sample_seed"))
        importlib.import_module("kcdcache.report.show").require_ids([Path(path)], [expect_id] if expect_id else None)
        result: dict[str, Any] = checks.verify(Path(path), depth=depth, **values)
        return result

    return _command("verify", options, work)


BUILDERS: Mapping[str, Callable[[], click.Command]] = {
    "run": _run_command,
    "fit": lambda: _settings_command("fit"),
    "precompute": lambda: _settings_command("precompute"),
    "train": lambda: _settings_command("train"),
    "condense": lambda: _settings_command("condense"),
    "methods": _methods_command,
    "export": lambda: _settings_command("export"),
    "diff": _diff_command,
    "report": _report_command,
    "seal": _seal_command,
    "inspect": _inspect_command,
    "verify": _verify_command,
}


class _Plain(logging.Formatter):
    """A log line is its message, made printable."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _log_to_stderr(quiet: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain("%(message)s"))
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, handlers=[handler])


class _Reporter:
    """Shows progress on stderr: one rewritten line on a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self._began: dict[str, tuple[float, int]] = {}
        self._last = 0.0
        self._live = sys.stderr.isatty() and "NO_COLOR" not in os.environ

    def __call__(self, what: str, done: int, total: int, remark: str) -> None:
        if not logging.getLogger("kcdcache").isEnabledFor(logging.INFO):
            return
        now = time.monotonic()
        began, first = self._began.setdefault(what, (now, done))
        if now - self._last < (0.2 if self._live else 10) and done < total:
            return
        self._last = now
        rate = (done - first) / (now - began) if now > began else 0
        eta = f", {(total - done) / rate:,.0f} s left" if rate > 0 and done < total else ""
        text = printable(f"{what}: {done:,} of {total:,} ({remark}{eta})")
        click.echo(
            f"\r\033[K{text}" + ("\n" if done >= total else "") if self._live else text, err=True, nl=not self._live
        )
        if done >= total:
            self._began.pop(what)
