"""Whole runs on a few digits: a teacher on disk, its store, the commands that use them, and what they promise."""

import sys
from types import SimpleNamespace

import numpy as np
import torch
from lessons import CPU, ON_CPU, digits, precomputed, teacher_of
from torch.nn import functional

from kcdcache import rng
from kcdcache.commands import COMMANDS
from kcdcache.networks import registry
from kcdcache.networks.weights import NetworkRecord, save_network
from kcdcache.progress import silent
from kcdcache.settings import TrainSettings, fields, make
from kcdcache.store import reader
from kcdcache.teacher import teacher
from kcdcache.training import distill

TRAIN, TEST = 200, 60
SPEC = f"digits?train={TRAIN}&test={TEST}&order=stored"
UNPROMISED = ("run.json", "environment.json", "timing.jsonl", "summary.json", ".lock", "lock", ".lock.holder")
"""files with clock times, host or process numbers; DESIGN.md section 4 leaves them out of the same bytes"""
SCHOOL = {"student": "lessons:TinyNet", "epochs": 6, "stages": 3, "batch_size": 32, "keep": 0.6, "cost_exponent": 0.1}
"""settings of a small run: stages of two epochs"""


def saved_teacher(path, dataset, seed=1):
    """The small untrained teacher of `lessons`, as `fit` would have left it in a folder."""
    path.mkdir(parents=True)
    made = teacher_of(dataset, seed)
    record = NetworkRecord(architecture="resnet8", classes=dataset.classes, channels=3, transform=made.transform)
    save_network(path, "model", made.module, record)
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
    """Train a student through all stages in this process; `run` holds arguments of `distill.run` itself. Return the
    summary as JSON values."""
    wanted = settings(**changes)
    asked = school.network if wanted.mix_target == "requery" else None
    knowledge = reader.open(school.knowledge.path)
    material = distill.Material(data=school.data, knowledge=knowledge, given=given, teacher=asked)
    return distill.run(wanted, material, out=out, **({"machine": ON_CPU} | (run or {}))).document()


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


def plainly_taught(data, *, epochs, views, knowledge=None):
    """A resnet8 as a textbook trains it on crops of digits, from labels or by Hinton's distillation, and every sample's
    entropies: no manifest, no stages, nothing of `kcdcache.training`."""
    network = registry.build("resnet8", len(data.classes), 0).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scale = torch.tensor([1 / std for std in data.std]).view(1, 3, 1, 1)
    shift = torch.tensor([-mean / std for mean, std in zip(data.mean, data.std, strict=True)]).view(1, 3, 1, 1)
    everyone, T = np.arange(len(data.train)), 4.0
    padded = np.pad(data.train.images(everyone), ((0, 0), (2, 2), (2, 2), (0, 0)))
    entropies = [[] for _ in everyone]
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.1 ** sum(epoch >= share * epochs for share in (0.625, 0.75, 0.875))
        order = rng.epoch_order(0, epoch, everyone)
        columns = order, *rng.permuted(0, order, epoch % views, 5, 5)
        for index, dy, dx in zip(*(np.split(one, range(32, len(order), 32)) for one in columns), strict=True):
            crops = [padded[i, y : y + 16, x : x + 16] for i, y, x in zip(index, dy, dx, strict=True)]
            pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() * float(np.float32(1 / 255))
            logits = network(pixels * scale + shift)
            loss = functional.cross_entropy(logits, torch.from_numpy(data.train.labels[index]), reduction="none")
            if knowledge is not None:
                teacher = (torch.from_numpy(knowledge.read("logits", epoch % views, index)) / T).softmax(1)
                soft = functional.kl_div((logits / T).log_softmax(1), teacher, reduction="none").sum(1)
                loss = 0.1 * loss + 0.9 * T * T * soft
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            p = logits.detach().double().softmax(1)
            for i, entropy in zip(index, -(p * p.log()).sum(1), strict=True):
                entropies[i].append(float(entropy))
    return network, entropies


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
