"""Real digits, a small teacher, its stores and condensed sets: what the tests of the student's side learn from."""

import numpy as np
import torch
from torch import nn

from kcdcache.condensation import summary
from kcdcache.condensation.manifest import Samples
from kcdcache.condensation.values import Values
from kcdcache.datasets import datasets
from kcdcache.networks import registry
from kcdcache.networks.input_transform import InputTransform
from kcdcache.progress import silent
from kcdcache.settings import CondenseSettings, MachineSettings, PrecomputeSettings
from kcdcache.store import reader
from kcdcache.teacher import precompute, teacher

CPU = torch.device("cpu")


def on_cpu(**more):
    return MachineSettings(device="cpu", **more)


ON_CPU = on_cpu()
TRAIN, TEST, CLASSES = 150, 40, 10


def digits(train=TRAIN, test=TEST):
    return datasets.load(f"digits?train={train}&test={test}&order=stored")


def opinionated(network):
    """The same network with logits spread as a trained one's are."""
    with torch.no_grad():
        network.fc.weight.mul_(25)
    return network


def teacher_of(dataset, seed=1):
    network = opinionated(registry.build("resnet8", CLASSES, seed))
    return teacher.freeze(network, InputTransform(dataset.mean, dataset.std), "resnet8", dataset.classes, CPU)


def precomputed(path, dataset, network, progress=silent, **changes):
    given = {"augment": "crop", "padding": 2, "views": 3, "batch_size": 64, "encoding": "float32", "min_accuracy": 0}
    precompute.run(PrecomputeSettings(**(given | changes)), dataset, network, path, progress)
    return reader.open(path)


def condensed(knowledge, keep=0.6, seed=0, **changes):
    """A condensed set of random values: dropped points are mixed into its lowest kept ones, the first by epsilon 0."""
    count = knowledge.count
    random = np.random.default_rng(seed).random(count, np.float32)
    settings = CondenseSettings(**changes)
    made = Values(visits=np.ones(count, np.int32), value=random)
    samples = Samples(knowledge.knowledge_id, count, knowledge.labels)
    return summary.condense(made, settings, samples, stage=1, keep=keep)


class Pooled(nn.Module):
    """A small student, `lessons:Pooled`, that takes batch statistics of one number a sample: a batch needs two."""

    def __init__(self, num_classes=CLASSES):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, pixels):
        return self.fc(torch.relu(self.norm(self.conv(pixels).mean((2, 3), keepdim=True))).flatten(1))


class TinyNet(nn.Module):
    """A small student, `lessons:TinyNet`, with all that can go wrong on resume: batch statistics and dropout."""

    def __init__(self, num_classes=CLASSES):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(4 * 49, num_classes)

    def forward(self, pixels):
        return self.fc(self.dropout(torch.relu(self.norm(self.conv(pixels))).flatten(1)))


def wide(num_classes):
    """A linear network on images of 8x8, `lessons:wide`, for any number of classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_classes))
