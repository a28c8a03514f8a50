"""Options of the command line made from settings: flag, help and default come from the settings' own fields."""

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

ARTICLES = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}


def option(name: str, field: Any) -> click.Option:
    """Return the option for one settings field, whose values go to the settings unparsed."""
    flag = f"--{name.rstrip('_').replace('_', '-')}"
    default = "" if field.is_required() or field.default is None else f"  [default: {shown(field.default)}]"
    text = " ".join((field.description or "").split()) + default
    if field.annotation is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=None, help=text)
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else None
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
    kinds = [annotation, *get_args(annotation)]
    if any(get_origin(kind) is tuple for kind in kinds):
        return "A,B,..."
    return next((word for kind in kinds for plain, word in ARTICLES.items() if kind is plain), "TEXT")
