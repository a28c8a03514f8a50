"""The command line: parse, call, print. With `console` the only module that prints or exits."""

import errno
import gc
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from io import TextIOWrapper
from typing import Any

import click
from click.shell_completion import CompletionItem

from kcdcache import __version__, commands, interrupt
from kcdcache.cli.console import printable, say, show, telling
from kcdcache.cli.options import BASIC, Sectioned, config_option, help_of, option, sections_of, source_of
from kcdcache.commands import Command
from kcdcache.environment import torchrun_place
from kcdcache.errors import KcdcacheError, NoSpaceError, nearest, reason
from kcdcache.files import cloud
from kcdcache.files.atomic import FULL
from kcdcache.networks.catalogue import typed

COMMANDS: Mapping[str, Command] = {
    "run": Command("run", "Run all steps of a recipe; without one, the embedded example.", "recipes.recipe:command"),
    **commands.COMMANDS,
}
COLLECTED = 100_000
"""threshold of garbage collection: imports create many objects but no garbage, which saves 0.1 s"""
MOST_SHOWN = 4000
"""maximum length of an error message: names from files may have any length"""
TOGETHER = {"fit", "train"}
"""commands that several processes run together under torchrun"""
NAMING = ("teacher", "student", "model", "peer")
"""settings that name a network"""
LONG = {"run", "fit", "precompute", "train"}
"""commands that a signal stops at a safe point, from which they resume"""


class Commands(click.Group):
    """Group whose commands are built when called, so that `--help` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(COMMANDS)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the commands that begin so, without building them."""
        return [CompletionItem(name, help=COMMANDS[name].summary) for name in COMMANDS if name.startswith(incomplete)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of this name; if unknown, fail with the nearest known name."""
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
    kcdcache run                       full example on digits, on CPU
    kcdcache COMMAND --help            options with defaults, and examples
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its exit code."""
    gc.set_threshold(COLLECTED)
    _open_streams()
    code = _outcome(list(sys.argv[1:] if arguments is None else arguments))
    _close_streams()
    sys.exit(code)


def _open_streams() -> None:
    """Open the null device in place of closed standard streams: a file of ours would get their number otherwise."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what a terminal's encoding lacks is shown escaped, and ends nothing
            stream.reconfigure(errors="backslashreplace")


def _close_streams() -> None:
    """Drop what a stream did not take: the interpreter would try again, and change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _outcome(arguments: list[str]) -> int:
    try:
        code = program.main(arguments, prog_name="kcdcache", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0
    except click.ClickException as error:
        say(_misused(error))
        return error.exit_code
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, click.Abort):
        say("interrupted; the same command resumes")
        return 130
    except KcdcacheError as error:
        return _failed(str(error), error.exit_code, arguments)
    except BrokenPipeError:
        return 128 + signal.SIGPIPE  # nobody reads the result any more, as of `| head`
    except OSError as error:
        return _failed(
            f"{reason(error)}{_remedy(error)}", NoSpaceError.exit_code if error.errno in FULL else 1, arguments
        )
    except MemoryError as error:
        return _failed(f"out of memory: {error}", 1, arguments)
    except Exception as error:
        return _failed(f"internal error: {type(error).__name__}: {error} (--debug shows where)", 1, arguments)
    return code if isinstance(code, int) else 0


def _remedy(error: OSError) -> str:
    if error.errno in FULL:
        return "; free some space and run the same command again to resume"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return "; a file is there where a folder is needed: give another path"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "; give a path that this user may read and write, or change its permissions"
    return ""


def _misused(error: click.ClickException) -> str:
    """Return click's message for a wrong command line, made printable."""
    context = getattr(error, "ctx", None)
    usage = [] if context is None else [context.get_usage(), f"Try '{context.command_path} --help' for help.", ""]
    return "\n".join([*usage, f"Error: {printable(error.format_message())}"])


def _failed(message: str, exit_code: int, arguments: Sequence[str]) -> int:
    if "--debug" in arguments:
        say("\n".join(f"| {printable(line)}" for line in traceback.format_exc().splitlines()))
    shown = message if len(message) <= MOST_SHOWN else f"{message[:MOST_SHOWN]}... ({len(message)} characters)"
    first, *others = shown.split("\n")
    # further problems are marked, so that a line break in a file name cannot forge a message
    lines = [f"error: {printable(first)}", *(f"  - {printable(line.strip())}" for line in others)]
    say("\n".join(lines))
    return exit_code


def build(name: str) -> click.Command:
    """Build the click command of a name; its options are the fields of its settings."""
    from kcdcache.commands.present import presented
    from kcdcache.settings import fields, make

    command = COMMANDS[name]
    options: list[click.Parameter] = [option(key, field) for key, field in fields(command.takes).items()]
    if command.writes:
        options.append(click.Option(["--dry-run"], is_flag=True, help="print what would be done, without doing it"))
    options += [
        config_option(),
        click.Option(["--json", "as_json"], is_flag=True, help="print the result as one JSON object"),
        click.Option(["--debug"], is_flag=True, help="print the traceback of an error"),
        click.Option(["-q", "--quiet"], is_flag=True, help="do not print progress"),
    ]

    def callback(as_json: bool, debug: bool, quiet: bool, dry_run: bool = False, **values: Any) -> None:
        follower = name in TOGETHER and torchrun_place().number > 0  # only the first process prints
        with telling(quiet or follower) as progress, interrupt.listening() if name in LONG else nullcontext():
            given = {key: value for key, value in values.items() if value is not None}
            here = {key: cloud.opened(value, fresh=name == "verify") for key, value in given.items()}
            typed(here[key] for key in NAMING if isinstance(here.get(key), str))
            asked = make(command.takes, here, source_of(click.get_current_context()))
            made = command(asked, progress, dry_run)
            result = cloud.shown(made if as_json else presented(asked, made))
        if follower:
            return
        show(result, as_json)
        if result.get("failed"):
            raise click.exceptions.Exit(result["failed"][0]["exit_code"])

    made = Sectioned(name, params=options, callback=callback, help=help_of(name, command))
    made.sections = sections_of(command.takes)
    if name in BASIC:
        made.basic = BASIC[name]
        made.params.append(made.help_all())
    return made
