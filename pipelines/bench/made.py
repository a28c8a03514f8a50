"""Data sets and stores of random numbers, made without a teacher, for benchmarks of what runs on them."""

import numpy as np
import torch

from kcdcache.condensation import manifest, summary
from kcdcache.condensation.values import Values
from kcdcache.datasets.datasets import Dataset
from kcdcache.datasets.images import DecodedImages, Origins, Split
from kcdcache.runs.folder import RunFolder
from kcdcache.settings import CondenseSettings, ViewSettings
from kcdcache.store import encoding, reader, writer
from kcdcache.store.identity import Knowledge, TeacherIdentity
from kcdcache.store.plan import plan_store
from kcdcache.training import batches
from kcdcache.training.loop import Loop
from kcdcache.training.sampling import Sampler
from kcdcache.views import rules

CPU = torch.device("cpu")


def images(count, test=64, classes=100, side=32):
    """Random images of CIFAR's size."""
    random = np.random.default_rng(0)

    def split(rows):
        labels = np.arange(rows) % classes
        return Split(
            labels, DecodedImages(random.integers(0, 256, (rows, side, side, 3), np.uint8), Origins(("random",)))
        )

    return Dataset("random", split(count), split(test), tuple(map(str, range(classes))))


def store_of(dataset, path, count_views=2, text="float16"):
    """A sealed store of random peaked logits of the data set's crop-flip views."""
    rule = rules.rule_from(ViewSettings(), dataset.train.image_size)
    teacher = TeacherIdentity(architecture="none", weights="none", transform={}, precision="float32")
    knowledge = Knowledge(teacher=teacher, data=dataset.identity(), views=rule)
    classes = len(dataset.classes)
    plan = plan_store(len(dataset.train), count_views, [encoding.parse(text, "logits", (classes,))])
    random = torch.Generator().manual_seed(0)
    with writer.create(path, knowledge, plan, dataset.train.labels, dataset.train.digests()) as writing:
        for part in writing.pending():
            values = torch.randn(part.stop - part.start, classes, generator=random) * 3
            told = {"logits": encoding.statistics(values)}
            writing.write_part(part, plan.encodings["logits"].encode(values, part.start), told)
        writing.seal()
    return reader.open(path)


def whole(knowledge):
    """The manifest of all samples, unmixed: K_1H only."""
    classes = len(knowledge.knowledge.data.classes)
    return manifest.full(manifest.Samples(knowledge.knowledge_id, knowledge.count, knowledge.labels, classes))


def half_mixed(knowledge):
    """The manifest of two thirds of the samples: the other third is mixed into half of those kept."""
    random = np.random.default_rng(1)
    values = Values(visits=np.ones(knowledge.count, np.int32), value=random.random(knowledge.count, np.float32))
    samples = manifest.Samples(knowledge.knowledge_id, knowledge.count, knowledge.labels)
    return summary.condense(values, CondenseSettings(), samples, stage=1, keep=2 / 3)


class Run:
    """A run whose epochs are trained one at a time, by the package's own loop, in a folder."""

    def __init__(self, pupil, source, settings, folder):
        folder.mkdir(parents=True)
        self._pupil = pupil
        sampler = Sampler(manifest=source.manifest, optimizer=settings)
        self._loop = Loop(pupil, source, sampler, RunFolder(path=folder))

    def __call__(self):
        self._loop.run(self._pupil.epoch + 1)


def mixing():
    return batches.Mixing(temperature=4.0)
