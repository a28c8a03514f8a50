"""Options and help of the command line, generated from the fields of the settings."""

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from pkgutil import resolve_name
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click
from click.shell_completion import CompletionItem

from kcdcache.commands import Command
from kcdcache.errors import SettingsError, nearest

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
    "inspect": ("kcdcache inspect runs/store", "kcdcache inspect runs/kcd --toml > again.toml"),
    "verify": (
        "kcdcache verify runs/store --read-data",
        "kcdcache verify runs/store --teacher runs/teacher --data cifar100",
        "kcdcache verify runs/store --repair --teacher runs/teacher --data cifar100",
    ),
}
CONFIG = "kcdcache.config"
"""place of the settings file's path in click's context"""
INPUTS, MAIN, OTHERS = "Input and output", "Main options", "Other options"
BASIC: Mapping[str, tuple[str, ...]] = {
    "fit": ("data", "model", "out", "epochs", "batch_size", "learning_rate", "optimizer", "augment", "seed", "device"),
    "precompute": (
        "data", "teacher", "weights", "teacher_mean", "teacher_std", "store", "views", "augment", "for_", "student",
        "encoding", "batch_size", "device",
    ),
    "train": (
        "data", "store", "student", "out", "condensed", "manifest", "keep", "epochs", "stages", "method", "preset",
        "stratify", "batch_size", "learning_rate", "seed", "device",
    ),
}  # fmt: skip
"""command -> the settings that its --help shows; --help-all shows all"""
DATA_HELP = """\b
Data:
  digits, cifar10, cifar100          embedded, or downloaded by torchvision
  photos, or folder:photos           class folders: photos/train/CLASS/IMAGE,
                                     photos/val/CLASS/IMAGE (or test)
  images, or parquet:images#label    parquet files of the Hugging Face hub
  file.npz, or arrays:file.npz       arrays train_images, train_labels, ...
  cifar100?train=4000&test=1000      a balanced subset of any of them"""
NETWORK_HELP = """\b
Networks:
  resnet8 14 20 32 44 56 110 8x4 32x4, wrn_16_1 16_2 28_2 40_1 40_2 10_2,
  vgg8 11 13 16 19, MobileNetV2, ShuffleV1, ShuffleV2, ResNet50,
  torchvision:NAME, timm:NAME, my.module:factory"""
ARTICLES = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}
WORDS: Mapping[str, str] = {
    "model": "networks.catalogue:NETWORKS", "student": "networks.catalogue:NETWORKS",
    "teacher": "networks.catalogue:NETWORKS", "peer": "networks.catalogue:NETWORKS",
    "method": "methods.catalogue:METHODS", "for_": "methods.catalogue:METHODS", "data": "datasets.spec:FORMS",
}  # fmt: skip
"""setting -> where the names are that a shell offers for it"""


ALL = "kcdcache.help_all"
"""key of the context's notes: show all options"""


class Sectioned(click.Command):
    """A command whose help groups its options under headings; options without a heading come last."""

    sections: Mapping[str, str] = {}
    """name of a parameter -> its heading"""
    basic: tuple[str, ...] = ()
    """parameters that --help shows; all if empty"""

    def help_all(self) -> click.Option:
        """Return the option that shows the help with all parameters."""

        def show(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
            if wanted:
                ctx.meta[ALL] = True
                click.echo(ctx.get_help(), color=ctx.color)
                ctx.exit()

        return click.Option(
            ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=show,
            help="show this help with all options",
        )  # fmt: skip

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, section by section; the basic ones alone in one section, in their own order."""
        short = bool(self.basic) and not ctx.meta.get(ALL)
        found: dict[str, dict[str, tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record, name = parameter.get_help_record(ctx), str(parameter.name)
            if record is not None and record[1]:  # arguments have no help here
                heading = MAIN if short and name in self.basic else self.sections.get(name, OTHERS)
                found.setdefault(heading, {})[name] = record
        if short:
            left = sum(len(records) for heading, records in found.items() if heading not in (MAIN, OTHERS))
            found = {MAIN: {name: found[MAIN][name] for name in self.basic}, OTHERS: found[OTHERS]}
        for heading in sorted(found, key=lambda heading: heading == OTHERS):
            with formatter.section(heading):
                formatter.write_dl(list(found[heading].values()))
        if short:
            formatter.write(f"\n{left} more options: {ctx.command_path} --help-all\n")


def help_of(name: str, command: Command) -> str:
    """Return the help of a command: summary, arguments and examples."""
    from kcdcache.settings import fields

    arguments = [
        f"{str(field.json_schema_extra['argument']).strip('[].')} is {field.description}."
        for field in fields(command.takes).values()
        if isinstance(field.json_schema_extra, dict)
    ]
    more = [DATA_HELP, NETWORK_HELP] if name in BASIC else []
    return "\n\n".join([command.summary, *arguments, "\b\nExamples:\n  " + "\n  ".join(EXAMPLES[name]), *more])


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
        return click.Argument(
            [name],
            required=field.is_required(),
            nargs=-1 if several else 1,
            metavar=metavar,
            shell_complete=offered(name, field),
        )
    flag = f"--{name.rstrip('_').replace('_', '-')}"
    default = "" if field.is_required() or field.default in (None, "") else f"  [default: {shown(field.default)}]"
    text = re.sub(r"\s*\n\s*", " ", field.description or "") + default
    if field.annotation is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}"], default=None, help=text)
    if bool in kinds:  # alone or with a value
        kind = click.UNPROCESSED
        return click.Option(
            [flag, name],
            is_flag=False,
            flag_value=True,
            type=kind,
            metavar="[PATH]",
            help=text,
            shell_complete=offered(name, field),
        )
    choices = get_args(kinds[0]) if len(kinds) == 1 and get_origin(kinds[0]) is Literal else None
    word = "A,B,..." if several else next((ARTICLES[kind] for kind in kinds if kind in ARTICLES), "TEXT")
    return click.Option(
        [flag, name],
        type=click.Choice(choices) if choices else click.STRING,
        help=text,
        metavar=None if choices else word,
        required=field.is_required(),
        callback=_split if several else None,
        shell_complete=None if choices else offered(name, field),
    )


Offer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def offered(name: str, field: "FieldInfo") -> Offer:
    """Return what a shell offers for a setting: names that begin so, the words of a list, or paths."""
    kinds = _kinds(field.annotation)
    listed = [word for kind in kinds if get_origin(kind) is tuple for word in get_args(get_args(kind)[0])]
    paths = Path in kinds or any(Path in get_args(kind) for kind in kinds)

    def offer(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        known = listed or (resolve_name(f"kcdcache.{WORDS[name]}") if name in WORDS else ())
        # of a sum of methods or a list of words, the last one is completed
        begun = incomplete.removesuffix(re.split("[+,]", incomplete)[-1]) if name not in ("data", "teacher") else ""
        found = [CompletionItem(begun + word) for word in known if (begun + word).startswith(incomplete)]
        files = paths or (name == "teacher" and not found)
        return [CompletionItem(incomplete, type="file")] if files else found

    return offer


def config_option() -> click.Option:
    """Return the option `--config`, which is read before the others and gives what they do not."""
    return click.Option(
        ["--config"],
        metavar="FILE.toml",
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="TOML file of settings by the names of these options; options given here take precedence",
        shell_complete=lambda ctx, parameter, incomplete: [CompletionItem(incomplete, type="file")],
    )


def _read_config(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """Take the settings of a file as defaults of the command.

    Raises NotFoundError or SettingsError for a file that is missing or no TOML, an unknown key, or a wrong word.
    """
    if value is None or ctx.resilient_parsing:
        return
    from kcdcache.settings import read_toml

    named = {key: one for one in ctx.command.params if one is not parameter for key in _keys(one)}
    found: dict[str, Any] = {}
    for key, given in read_toml(Path(value), "settings file").items():
        if (one := named.get(key.replace("_", "-"))) is None:
            raise SettingsError(f"unknown setting '{key}' in {value}; {nearest(key.replace('_', '-'), named)}")
        found[str(one.name)] = _as_flag(ctx, one, key, given, value)
    ctx.default_map, ctx.meta[CONFIG] = found, value


def source_of(ctx: click.Context) -> str:
    """Return where a command's settings are from, for messages."""
    return f"{ctx.meta[CONFIG]} or the command line" if CONFIG in ctx.meta else "the command line"


def _keys(parameter: click.Parameter) -> list[str]:
    """Return a parameter's names in a settings file: its long flags without dashes, or an argument's own name."""
    if isinstance(parameter, click.Argument):
        return [str(parameter.name)]
    return [flag.removeprefix("--") for flag in parameter.opts if flag.startswith("--")]


def _as_flag(ctx: click.Context, parameter: click.Parameter, key: str, given: Any, path: str) -> Any:
    """Return a value of a settings file as the command line would have it."""
    if isinstance(given, dict):
        raise SettingsError(f"setting '{key}' in {path} is a table: give `name = value` lines without [headings]")
    several = isinstance(given, list)
    if several and parameter.nargs != 1:
        return [str(one) for one in given]
    text = ",".join(map(str, given)) if several else given
    try:
        parameter.type_cast_value(ctx, [text] if parameter.nargs != 1 else text)
    except click.BadParameter as error:
        raise SettingsError(f"setting '{key}' in {path}: {error.message}") from None
    return text


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
