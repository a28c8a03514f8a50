"""The command line: parse, call, print. With `console` the only module that prints or exits."""

import gc
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import click

from kcdcache import __version__, commands, interrupt
from kcdcache.cli.console import printable, show, telling
from kcdcache.cli.options import Sectioned, help_of, option, sections_of
from kcdcache.commands import Command
from kcdcache.errors import KcdcacheError, NoSpaceError, nearest
from kcdcache.files import cloud
from kcdcache.files.atomic import FULL

COMMANDS: Mapping[str, Command] = {
    "run": Command("run", "Run all steps of a recipe; without one, the embedded example.", "recipes.recipe:command"),
    **commands.COMMANDS,
}
"""name -> command, in the order of a first session"""
COLLECTED = 100_000
"""objects made between two collections of garbage: imports make many and no garbage, 0.1 s of looking for it"""
MOST_SHOWN = 4000
"""characters of an error: names from files may have any length"""
TOGETHER = {"fit", "train"}
"""commands that several processes under torchrun do together"""
LONG = {"run", "fit", "precompute", "train"}
"""commands that stop at a safe point when asked to, and resume; the others are over at once"""


class Commands(click.Group):
    """Commands built when they are called, so that `--help` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of a first session."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of that name; an unknown one is refused with the nearest known name."""
        if cmd_name not in COMMANDS:
            ctx.fail(f"no command '{cmd_name}'; {nearest(cmd_name, COMMANDS)}")
        return build(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without building them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.summary) for name, command in COMMANDS.items()])


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


def build(name: str) -> click.Command:
    """Return a command whose options are the fields of its settings."""
    from kcdcache.settings import fields, make

    command = COMMANDS[name]
    options: list[click.Parameter] = [option(key, field) for key, field in fields(command.takes).items()]
    if command.writes:
        options.append(click.Option(["--dry-run"], is_flag=True, help="print what would be done, and do nothing"))
    options += [
        click.Option(["--json", "as_json"], is_flag=True, help="print the result as one JSON object"),
        click.Option(["--debug"], is_flag=True, help="show where an error came from"),
        click.Option(["-q", "--quiet"], is_flag=True, help="no progress on stderr"),
    ]

    def callback(as_json: bool, debug: bool, quiet: bool, dry_run: bool = False, **values: Any) -> None:
        follower = name in TOGETHER and os.environ.get("RANK", "0") != "0"  # of several processes the first one speaks
        with telling(quiet or follower) as progress, interrupt.listening() if name in LONG else nullcontext():
            given = {key: value for key, value in values.items() if value is not None}
            here = {key: cloud.opened(value, fresh=name == "verify") for key, value in given.items()}
            result = cloud.shown(command(make(command.takes, here), progress, dry_run))
        if follower:
            return
        show(result, as_json)
        if result.get("failed"):
            raise click.exceptions.Exit(result["failed"][0]["exit_code"])

    made = Sectioned(name, params=options, callback=callback, help=help_of(name, command))
    made.sections = sections_of(command.takes)
    return made
