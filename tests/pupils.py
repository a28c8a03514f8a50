"""Whole runs on a few digits: a teacher on disk, its store, the commands that use them, and what they promise."""

import sys
from types import SimpleNamespace

import torch
from lessons import CPU, digits, precomputed, teacher_of

from kcdcache.commands import COMMANDS
from kcdcache.networks.weights import describe_network, save_network
from kcdcache.progress import silent
from kcdcache.settings import TrainSettings, fields, make
from kcdcache.store import reader
from kcdcache.teacher import teacher
from kcdcache.training import distill

TRAIN, TEST = 200, 60
SPEC = f"digits?train={TRAIN}&test={TEST}"
UNPROMISED = ("run.json", "environment.json", "timing.jsonl", "summary.json", ".lock", "lock")
"""files with clock times, host or process numbers; DESIGN.md section 4 leaves them out of the same bytes"""
SCHOOL = {"student": "lessons:TinyNet", "epochs": 6, "stages": 3, "batch_size": 32, "keep": 0.6, "cost_exponent": 0.1}
"""settings of a small run: stages of two epochs"""


def saved_teacher(path, dataset, seed=1):
    """The small untrained teacher of `lessons`, as `fit` would have left it in a folder."""
    path.mkdir(parents=True)
    made = teacher_of(dataset, seed)
    document = describe_network("resnet8", dataset.classes, 3, made.transform)
    save_network(path, "model", made.module, document)
    return path


def loaded(path, dataset):
    return teacher.load(
        str(path), weights_path=None, classes=dataset.classes, mean=dataset.mean, std=dataset.std, size=None,
        device=CPU, precision="float32",
    )  # fmt: skip


def school(root, views=3, **changes):
    """Data, a teacher in a folder, and its store: all that the commands need."""
    dataset = digits(TRAIN, TEST)
    folder = saved_teacher(root / "teacher", dataset)
    network = loaded(folder, dataset)
    knowledge = precomputed(root / "store", dataset, network, views=views, **changes)
    return SimpleNamespace(root=root, data=dataset, teacher=folder, network=network, knowledge=knowledge)


def settings(**changes):
    return TrainSettings(**(SCHOOL | changes))


def distilled(school, out, given=None, run=None, **changes):
    """Train a student through all stages in this process; `run` holds arguments of `distill.run` itself."""
    wanted = settings(**changes)
    asked = school.network if wanted.mix_target == "requery" else None
    knowledge = reader.open(school.knowledge.path)
    material = distill.Material(data=school.data, knowledge=knowledge, given=given, teacher=asked)
    return distill.run(wanted, material, out=out, device="cpu", **(run or {}))


def once(school):
    """A function like `distilled` that returns the folder of the run with some settings, made when first asked for."""
    made = {}

    def run(**changes):
        key = tuple(sorted(changes.items()))
        if key not in made:
            made[key] = school.root / "runs" / str(len(made))
            distilled(school, made[key], **changes)
        return made[key]

    return run


class BrokenOffError(Exception):
    """Raised where a test breaks work off."""


def stop_after(steps):
    """A progress report that breaks the work off when it is called for the `steps`-th time."""
    seen = []

    def progress(what, done, total, remark):
        seen.append(done)
        if len(seen) == steps:
            raise BrokenOffError

    return progress


def command(school, name, **given):
    """Call a command's function as the command line does."""
    places = {"store": school.knowledge.path, "data": SPEC, "teacher": str(school.teacher)}
    mine = {key: value for key, value in places.items() if key in fields(COMMANDS[name].takes)}
    if "from_logits" in given:
        mine.pop("teacher")
    dry_run = given.pop("dry_run", False)
    return executed(name, mine | given, dry_run)


def executed(name, given, dry_run=False):
    """Call a command's function with settings by name."""
    return COMMANDS[name](make(COMMANDS[name].takes, given), silent, dry_run)


def promised(path):
    """The files of a run or store whose bytes are promised, by name."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name not in UNPROMISED)
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def everything(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def same_files(left, right):
    """Whether two runs or stores promise the same bytes; says in the failure which files differ."""
    left, right = promised(left), promised(right)
    differing = [name for name in {*left, *right} if left.get(name) != right.get(name)]
    assert not differing, f"differ: {sorted(differing)}"
    assert left
    return True


def leftovers(path):
    return [str(file) for file in path.rglob("*.tmp-*")]


def lines(flags):
    """Settings as command line arguments."""
    words = []
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def weights_of(network):
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def same_tensors(left, right):
    assert set(left) == set(right)
    return all(torch.equal(left[name], right[name]) for name in left)


PYTHON = sys.executable
