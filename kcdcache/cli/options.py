"""Options and help of the command line, generated from the fields of the settings."""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click

from kcdcache.commands import Command

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from kcdcache.settings import Settings

EXAMPLES = {
    "run": ("kcdcache run", "kcdcache run pipelines/cifar100_small.toml --data cifar100"),
    "fit": ("kcdcache fit --data cifar100 --model wrn_40_2 --out runs/teacher",),
    "precompute": (
        "kcdcache precompute --data cifar100 --teacher runs/teacher --store runs/store --views 40",
        "kcdcache precompute --data cifar100 --teacher runs/teacher --store runs/store --fields penultimate",
    ),
    "train": (
        "kcdcache train --store runs/store --data cifar100 --student wrn_16_2 --out runs/kcd",
        "kcdcache train --store runs/store --data cifar100 --student resnet8x4 --out runs/reuse \\\n"
        "      --manifest runs/kcd/stages/6/manifest.parquet --stages 1",
    ),
    "evaluate": (
        "kcdcache evaluate runs/kcd --data cifar100",
        "kcdcache evaluate runs/kcd --data cifar100 --store runs/store",
        "kcdcache evaluate resnet56 --weights resnet56.pth --data cifar100",
    ),
    "methods": ("kcdcache methods", "kcdcache methods --teacher resnet32x4 --student ShuffleV2 --encoding top:16"),
    "condense": (
        "kcdcache condense --values runs/kcd/values.parquet --store runs/store --keep 0.5 --out half.parquet",
    ),
    "export": (
        "kcdcache export --manifest runs/kcd --store runs/store --out runs/set --license cc-by-4.0",
        "kcdcache export --manifest half.parquet --store runs/store --out runs/set --data cifar100 --with-images",
        "kcdcache train --condensed runs/set --data cifar100 --student resnet8x4 --out runs/student",
    ),
    "diff": ("kcdcache diff runs/kcd runs/other", "kcdcache diff half.parquet runs/kcd/stages/6/manifest.parquet"),
    "report": (
        "kcdcache report runs/digits --out digits.html",
        "kcdcache report runs/kd runs/kcd --out both.html --data cifar100 --json-file both.json --csv both",
    ),
    "seal": ("kcdcache seal runs/store",),
    "inspect": ("kcdcache inspect runs/store",),
    "verify": (
        "kcdcache verify runs/store --read-data",
        "kcdcache verify runs/store --teacher runs/teacher --data cifar100",
        "kcdcache verify runs/store --repair --teacher runs/teacher --data cifar100",
    ),
}
INPUTS, OTHERS = "Input and output", "Options"
ARTICLES = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}


class Sectioned(click.Command):
    """A command whose help groups its options under headings; options without a heading come last."""

    sections: Mapping[str, str] = {}
    """name of a parameter -> its heading"""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section."""
        found: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None and record[1]:  # arguments have no help here
                found.setdefault(self.sections.get(str(parameter.name), OTHERS), []).append(record)
        for heading in sorted(found, key=lambda heading: heading == OTHERS):
            with formatter.section(heading):
                formatter.write_dl(found[heading])


def help_of(name: str, command: Command) -> str:
    """Return the help of a command: summary, arguments and examples."""
    from kcdcache.settings import fields

    arguments = [
        f"{str(field.json_schema_extra['argument']).strip('[].')} is {field.description}."
        for field in fields(command.takes).values()
        if isinstance(field.json_schema_extra, dict)
    ]
    return "\n\n".join([command.summary, *arguments, "\b\nExamples:\n  " + "\n  ".join(EXAMPLES[name])])


def sections_of(model: "type[Settings]") -> dict[str, str]:
    """Return the heading of each setting: the first docstring line of the model that defines it."""
    from kcdcache.settings import parts

    found = dict.fromkeys(model.model_fields, INPUTS)
    for part in parts(model).values():
        for own in reversed(part.__mro__):
            for name in inspect.get_annotations(own).keys() & part.model_fields.keys():
                found[name] = (own.__doc__ or "").split("\n")[0].rstrip(".")
    return found


def option(name: str, field: "FieldInfo") -> click.Parameter:
    """Return the option or argument of a settings field; values are passed to the settings unparsed."""
    kinds = _kinds(field.annotation)
    several = any(get_origin(kind) is tuple for kind in kinds)
    if isinstance(field.json_schema_extra, dict):
        metavar = str(field.json_schema_extra["argument"])
        return click.Argument([name], required=field.is_required(), nargs=-1 if several else 1, metavar=metavar)
    flag = f"--{name.rstrip('_').replace('_', '-')}"
    default = "" if field.is_required() or field.default in (None, "") else f"  [default: {shown(field.default)}]"
    text = re.sub(r"\s*\n\s*", " ", field.description or "") + default
    if field.annotation is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=None, help=text)
    if bool in kinds:  # alone or with a value
        kind = click.UNPROCESSED
        return click.Option([flag, name], is_flag=False, flag_value=True, type=kind, metavar="[PATH]", help=text)
    choices = get_args(kinds[0]) if len(kinds) == 1 and get_origin(kinds[0]) is Literal else None
    word = "A,B,..." if several else next((ARTICLES[kind] for kind in kinds if kind in ARTICLES), "TEXT")
    return click.Option(
        [flag, name],
        type=click.Choice(choices) if choices else click.STRING,
        help=text,
        metavar=None if choices else word,
        required=field.is_required(),
        callback=_split if several else None,
    )


def shown(default: Any) -> str:
    """Return a default as shown in help."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(str(part) for part in default) if isinstance(default, tuple) else str(default)


def _kinds(annotation: Any) -> list[Any]:
    """Return the members of a union without None, or the annotation itself."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return [kind for kind in members if kind is not NoneType]


def _split(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(part.strip() for part in value.split(",") if part.strip())
