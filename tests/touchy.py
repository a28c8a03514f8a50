"""A teacher whose outputs are not finite on white images: samples to skip, real digits for the rest."""

from types import SimpleNamespace

import numpy as np
import torch
from lessons import CLASSES, CPU, digits, precomputed
from torch import nn

from kcdcache.datasets import datasets
from kcdcache.networks.input_transform import InputTransform
from kcdcache.settings import PrecomputeSettings
from kcdcache.teacher import precompute, teacher
from kcdcache.views import rules

TRAIN, TEST = 200, 60
CROPS = {"augment": "crop", "padding": 2, "batch_size": 64, "min_accuracy": 0, "views": 3, "encoding": "float32"}
SKIP = {"on_nonfinite": "skip"}
EVERYONE = np.arange(TRAIN)


class Touchy(nn.Module):
    """A network that divides by how far the brightest background is from white: by zero for an all white image."""

    def __init__(self, num_classes=CLASSES):
        super().__init__()
        self.hidden = nn.Linear(3 * 16 * 16, 16)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, pixels):
        flat = pixels.flatten(1)
        return self.fc(self.hidden(flat).relu() / (1 - flat.amin(1, keepdim=True)))


def touchy(dataset):
    """The touchy teacher with hidden values of a few hundred, and logits of a few."""
    torch.manual_seed(0)
    network = Touchy()
    with torch.no_grad():
        network.hidden.weight.mul_(300)
        network.fc.weight.mul_(0.03)
    return teacher.freeze(network, InputTransform((0.0,) * 3, (1.0,) * 3), "touchy:Touchy", dataset.classes, CPU)


def whole_in(view):
    """The samples whose crop in a view is the whole image: a white one has no black border there."""
    rule = rules.ViewRule(rule="crop", size=(16, 16), padding=2, fill="zero", seed=0)
    white = torch.full((TRAIN, 16, 16, 3), 255, dtype=torch.uint8)
    pixels = rules.apply(rule, white, rules.parameters(rule, EVERYONE, view))
    return np.flatnonzero(pixels.amin((1, 2, 3)).numpy() == 1)


def place_for(root, white, level=255):
    """Digits as a file of arrays, where some samples are of one grey level, and the touchy teacher."""
    root.mkdir(exist_ok=True)
    plain, arrays = digits(TRAIN, TEST), {}
    for name, split in (("train", plain.train), ("test", plain.test)):
        arrays |= {f"{name}_images": split.images(np.arange(len(split))).copy(), f"{name}_labels": split.labels}
    arrays["train_images"][white] = level
    np.savez(root / "painted.npz", **arrays)
    text = f"arrays:{root / 'painted.npz'}"
    dataset = datasets.load(text)
    return SimpleNamespace(root=root, spec=text, data=dataset, network=touchy(dataset), white=sorted(white))


def white_place(root):
    """Two white samples, one that shows in view 0 and one that shows in view 2; and their store."""
    found = place_for(root, [a_white_sample(0), a_white_sample(2)])
    found.knowledge = precomputed(root / "store", found.data, found.network, padding=2, **SKIP)
    found.teacher = "none"
    return found


def a_white_sample(view, place=0):
    """A sample that, if white, is so in this view and in no other of the first three."""
    others = np.concatenate([whole_in(other) for other in range(3) if other != view])
    return int(np.setdiff1d(whole_in(view), others)[place])


def made(place, path, progress=None, **changes):
    wanted = PrecomputeSettings(**(CROPS | changes))
    more = {} if progress is None else {"progress": progress}
    return precompute.run(wanted, place.data, place.network, path, **more)


def live(place, view, index, field="logits"):
    """The teacher's outputs in the batches the store was made with."""
    rule = place.knowledge.knowledge.views
    parts = [
        precompute.view_pixels(place.data, rule, part, view, CPU) for part in np.split(index, range(64, TRAIN, 64))
    ]
    return torch.cat([teacher.outputs(place.network, pixels, [field])[field] for pixels in parts]).numpy()
