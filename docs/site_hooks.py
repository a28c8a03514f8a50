"""What MkDocs asks of us while it builds: the pages of commands, made from the code, and pictures from `pipelines/`."""

import re
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from kcdcache.cli import main
from kcdcache.cli.options import OTHERS

ROOT = Path(__file__).resolve().parent.parent
PICTURES = "pipelines/results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each command, and the pictures of the results."""
    for name in main.COMMANDS:
        files.append(File.generated(config, f"reference/commands/{name}.md", content=command_page(name)))
    for picture in sorted((ROOT / PICTURES).rglob("*.png")):
        source = str(picture.relative_to(ROOT))
        files.append(File.generated(config, source, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links to pictures of the repository, right where the text is read in it, right on the site too."""
    return re.sub(rf"\]\((?:\.\./)+({PICTURES}/)", "](" + "../" * page.file.src_uri.count("/") + r"\1", markdown)


def command_page(name: str) -> str:
    """Return the page of a command as Markdown: what it does, its arguments and examples, and all its settings."""
    command = main.build(name)
    with click.Context(command, info_name=name) as context:
        lines = [f"# kcdcache {name}", "", *_about(command, context)]
        for heading, rows in _sections(command, context).items():
            lines += ["", f"## {heading}", "", "| setting | meaning |", "|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _about(command: click.Command, context: click.Context) -> list[str]:
    usage = command.collect_usage_pieces(context)
    text, _, examples = (command.help or "").partition("\b\nExamples:\n")
    shown = [line.strip() if "\\" not in line else line for line in examples.splitlines()]
    return [text.strip(), "", "```text", " ".join(["kcdcache", command.name or "", *usage]), *shown, "```"]


def _sections(command: click.Command, context: click.Context) -> dict[str, list[str]]:
    headings = getattr(command, "sections", {})
    found: dict[str, list[str]] = {}
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option):
            found.setdefault(headings.get(str(parameter.name), OTHERS), []).append(_row(parameter, context))
    return dict(sorted(found.items(), key=lambda item: item[0] == OTHERS))


def _row(option: click.Option, context: click.Context) -> str:
    flags = ", ".join(f"`{flag}`" for flag in [*option.opts, *option.secondary_opts])
    if isinstance(option.type, click.Choice):
        taken = " " + ", ".join(f"`{choice}`" for choice in option.type.choices)
    else:
        taken = "" if option.is_flag or option.count else f" `{option.make_metavar(context)}`"
    required = " (required)" if option.required else ""
    text = (option.help or "").replace("[", "\\[").replace("|", "\\|")
    return f"| {flags}{taken} | {text}{required} |"
