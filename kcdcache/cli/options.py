"""Options of the command line made from settings: flag, help and default come from the settings' own fields."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

INPUTS, OTHERS = "What goes in and out", "Options"
ARTICLES = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}


class Sectioned(click.Command):
    """A command whose help lists its options under headings, those without one last."""

    sections: Mapping[str, str] = {}
    """name of an option's value -> its heading"""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section."""
        found: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None and record[1]:  # arguments have no help here
                found.setdefault(self.sections.get(str(parameter.name), OTHERS), []).append(record)
        for heading in sorted(found, key=lambda heading: heading == OTHERS):
            with formatter.section(heading):
                formatter.write_dl(found[heading])


def sections_of(model: type[Any]) -> dict[str, str]:
    """Return setting -> heading: the first line of the docstring of the settings class that brings it."""
    found = {}
    for own in reversed(model.__mro__):
        for name in inspect.get_annotations(own).keys() & model.model_fields.keys():
            found[name] = INPUTS if own is model else (own.__doc__ or "").split("\n")[0].rstrip(".")
    return found


def option(name: str, field: Any) -> click.Option:
    """Return the option for one settings field, whose values go to the settings unparsed."""
    flag = f"--{name.rstrip('_').replace('_', '-')}"
    default = "" if field.is_required() or field.default is None else f"  [default: {shown(field.default)}]"
    text = " ".join((field.description or "").split()) + default
    if field.annotation is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=None, help=text)
    choices = _choices(field.annotation)
    kind: Any = click.Choice(choices) if choices else click.STRING
    metavar = None if choices else _metavar(field.annotation)
    split = _split if get_origin(field.annotation) is tuple or "tuple" in str(field.annotation) else None
    return click.Option(
        [flag, name], type=kind, help=text, metavar=metavar, required=field.is_required(), callback=split
    )


def _split(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(part.strip() for part in value.split(",") if part.strip())


def shown(default: Any) -> str:
    """Return a default as help shows it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(str(part) for part in default) if isinstance(default, tuple) else str(default)


def _metavar(annotation: Any) -> str:
    kinds = _kinds(annotation)
    if any(get_origin(kind) is tuple for kind in kinds):
        return "A,B,..."
    return next((word for kind in kinds for plain, word in ARTICLES.items() if kind is plain), "TEXT")


def _choices(annotation: Any) -> tuple[Any, ...] | None:
    """Return the values to choose from, or None where others are possible too."""
    kinds = [annotation] if get_origin(annotation) is Literal else get_args(annotation)
    told = [kind for kind in kinds if kind is not type(None)]
    return get_args(told[0]) if len(told) == 1 and get_origin(told[0]) is Literal else None


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """Return an annotation and, of `A | None`, what it is made of."""
    return (annotation, *get_args(annotation))
