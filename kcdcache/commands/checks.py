"""Checks of settings without torch or data: unknown names, and settings that contradict each other."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from kcdcache import settings
from kcdcache.condensation import schedule
from kcdcache.datasets import spec
from kcdcache.environment import torchrun_place
from kcdcache.errors import SettingsError, nearest
from kcdcache.methods.catalogue import named, weights_of
from kcdcache.networks.catalogue import require_known_name, saved_network

ENCODINGS = ("float16", "float32", "uint8", "top")
"""names of encodings, before any colon"""
FIELDS = ("logits", "penultimate", "attention", "fsp", "maps", "pooled", "rotations", "boundary", "parameters")
"""names of fields, before any colon"""
NOT_IMPORTED = {
    "teacher", "weights", "weights_key", "teacher_mean", "teacher_std", "teacher_size", "teacher_precision", "manifest",
    "mix", "views", "fields", "for_", "student", "batch_size", "budget_gb", "shard", "workers",
}  # fmt: skip
"""settings of `precompute` that do not apply to imported outputs"""


def require_possible(command: settings.Settings) -> None:
    """Raise SettingsError if a network, method, data set, field or encoding is unknown, or settings contradict."""
    if data := settings.values_of(command).get("data"):
        spec.parse(data)
    require_consistent(command)


def require_consistent(command: settings.Settings) -> None:
    """Raise SettingsError as `require_possible` does, but for the data, which may be loaded already."""
    values = settings.values_of(command)
    for network in filter(None, map(values.get, ("model", "student", "peer"))):
        require_known_name(network)
    _require_known("encoding", [values.get("encoding", "float32")], ENCODINGS)
    _require_known("field", values.get("fields", ()), FIELDS)
    own = [name for name in ("teacher_mean", "teacher_std", "teacher_size") if values.get(name) is not None]
    if own and values["teacher"] is not None and values["weights"] is None:
        flag = f"--{own[0].replace('_', '-')}"
        raise SettingsError(f"{flag} does nothing here: {values['teacher']} brings its own input transform")
    if values.get("weights_key") is not None and (values["weights"] is None or values["weights"].is_dir()):
        what = "a saved network has one set of weights" if values["teacher"] else "it chooses among those of --weights"
        raise SettingsError(f"--weights-key does nothing here: {what}; leave it out, or give a file as --weights")
    if type(command) in CHECKS:
        CHECKS[type(command)](command)


def require_present(command: settings.Settings) -> None:
    """Raise NotFoundError, UnfinishedError or SettingsError if the saved teacher of a command is missing."""
    if isinstance(command, settings.PrecomputeCommand | settings.VerifyCommand | settings.EvaluateCommand):
        named = command.network if isinstance(command, settings.EvaluateCommand) else command.teaching
        if named.teacher is not None and named.weights is None:
            saved_network(named.teacher)


def parse_share(text: str) -> float:
    """Parse a fraction in (0, 1] such as `5%` or `0.05`; raises SettingsError otherwise.

    >>> parse_share("5%")
    0.05
    """
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise SettingsError(f"--sample takes a share above 0 and at most 100%, such as 5%; found {text!r}")
    return share


def _require_known(what: str, texts: Sequence[str], known: tuple[str, ...]) -> None:
    for text in texts:
        if (word := text.partition(":")[0]) not in known:
            raise SettingsError(f"unknown {what} '{text}'; {nearest(word, known)}")


def _precompute(command: settings.PrecomputeCommand) -> None:
    _require_one_shard(command)
    if command.imported is not None:
        _require_importable(command)
    elif command.teaching.teacher is None:
        raise SettingsError("--teacher is missing: a folder written by `kcdcache fit`, or a network with --weights")
    if command.for_ is None and not command.student:
        return
    if command.for_ is None or not command.student:
        raise SettingsError("--for METHOD and --student NETWORK go together: feature sizes depend on both networks")
    if "fields" in command.given:
        raise SettingsError("--for works out the fields; leave --fields out")
    named(command.for_)


def _require_one_shard(command: settings.PrecomputeCommand) -> None:
    """Raise SettingsError where a shard, or several processes, are given work for one."""
    files = {"manifest": command.manifest, "from_logits": command.from_logits, "from_probabilities": command.imported}
    for name in [name for name, file in files.items() if name in command.given and file is not None]:
        flag = f"--{name.replace('_', '-')}"
        if command.shard is not None:
            raise SettingsError(f"--shard does nothing beside {flag}, which is work for one process; leave it out")
        _alone(f"precompute {flag}")(command)


def _require_importable(command: settings.PrecomputeCommand) -> None:
    """Raise SettingsError for two files, settings that do not apply to imported outputs, or without --augment."""
    given, source = command.given, "--from-logits" if command.from_logits is not None else "--from-probabilities"
    if command.imported != (command.from_logits or command.imported):
        raise SettingsError("--from-logits and --from-probabilities name two files; give one of them")
    if ignored := given & NOT_IMPORTED:
        flag = f"--{min(ignored).rstrip('_').replace('_', '-')}"
        raise SettingsError(f"{flag} does nothing beside {source}: the file decides it; leave it out")
    if "augment" not in given:
        raise SettingsError(
            f"{source} needs --augment: say which views the logits belong to (--augment none for images as they "
            "are); logits of other images than the student sees are the known failure of offline distillation"
        )


def _optimizer(command: settings.FitCommand | settings.TrainCommand) -> None:
    """Raise SettingsError for settings of another optimizer than the chosen one, and for a log that cannot be kept."""
    chosen, given = command.training.optimizer, command.given
    for optimizer, names in settings.OF_OPTIMIZER.items():
        if optimizer != chosen and (idle := sorted(names & given)):
            flag = f"--{idle[0].replace('_', '-')}"
            raise SettingsError(
                f"{flag} does nothing with --optimizer {chosen}; leave it out, or give --optimizer {optimizer}"
            )
    if "tensorboard" in command.training.log and find_spec("tensorboard") is None:
        raise SettingsError(
            '--log tensorboard needs the extra `tensorboard`: pip install "kcdcache[tensorboard]"; or give --log csv'
        )


def _train(command: settings.TrainCommand) -> None:
    training = command.training
    _optimizer(command)
    if not training.student:
        raise SettingsError("--student is missing: name the network to train, for example --student resnet8")
    weights_of(training)
    if command.condensed is not None:
        if ignored := command.given & {"store", "manifest", "transfer"}:
            raise SettingsError(f"--{min(ignored)} does nothing beside --condensed, which brings its own; leave it out")
        return
    if command.store is None:
        raise SettingsError(
            "train needs knowledge: --store with the folder of a store, or --condensed with that of an exported set"
        )
    if command.data is None:
        raise SettingsError("--data is missing: name the images of the store, for example --data folder:photos")
    if "stages" in command.given:
        schedule.require_whole_stages(training.epochs, training.stages)
    else:
        schedule.fitting_stages(training.epochs)


def _alone(name: str, remedy: str = "") -> Callable[[settings.Settings], None]:
    """Return a check that refuses several processes of torchrun for a command that is work for one."""

    def check(command: settings.Settings) -> None:
        if (processes := torchrun_place().total) > 1:
            raise SettingsError(
                f"{name} is work for one process, and torchrun has started {processes}: run `kcdcache {name}` without "
                f"torchrun{remedy}"
            )

    return check


def _condense(command: settings.CondenseCommand) -> None:
    _alone("condense", "; what takes more memory than --memory-gb is sorted with files on the disk")(command)
    if command.run is None and command.values is None:
        raise SettingsError("--run with a run folder is missing, or --values with a file of values")
    if command.run is not None and (beside := command.given & {"values", "previous", "stage"}):
        raise SettingsError(f"--{min(beside)} does nothing beside --run, which brings its own; leave one of them out")


def _verify(command: settings.VerifyCommand) -> None:
    if command.sample is not None:
        parse_share(command.sample)


CHECKS: Mapping[type[settings.Settings], Callable[[Any], None]] = {
    settings.PrecomputeCommand: _precompute,
    settings.FitCommand: _optimizer,
    settings.TrainCommand: _train,
    settings.CondenseCommand: _condense,
    settings.RunCommand: _alone("run", "; --jobs N does several of its steps at once"),
    settings.ExportCommand: _alone("export"),
    settings.ReportCommand: _alone("report"),
    settings.MethodsCommand: lambda command: require_known_name(command.teacher),
    settings.VerifyCommand: _verify,
}
"""further checks by class of settings"""
