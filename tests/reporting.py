"""A folder of real runs on images whose class names, titles and file names are hostile, and a reader of reports."""

import json
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
from lessons import CPU, ON_CPU, opinionated, precomputed
from PIL import Image

from kcdcache import settings
from kcdcache.datasets import datasets
from kcdcache.networks import registry
from kcdcache.networks.input_transform import InputTransform
from kcdcache.store import reader
from kcdcache.teacher import teacher
from kcdcache.training import distill, fit

CLASSES = ("$\\frac{1}{", "<img src=x onerror=document.title='owned'>", "<script>document.title='owned'<", "=1+1\u202e")
TITLE = "<script>document.title='owned'</script> & \"Tiny\" <b>runs\u202e"
ROWS = {"base": "plain <i>training", "kd": "KD & </td> all", "kcd": "<script>condensed</script>"}
SCHOOL = {"student": "lessons:TinyNet", "epochs": 6, "stages": 3, "batch_size": 32, "keep": 0.5, "eps_max": 0.4}
ROWS_OF_RUNS = {"kd-seed0": 0, "kd-seed1": 1, "kcd-seed0": 0, "kcd-seed1": 1, "kcd-seed2": 2}


def grid(root):
    """Runs of two rows beside a baseline, their store and the results.json of a recipe."""
    spec_ = f"folder:{images(root / 'images')}"
    dataset = datasets.load(spec_)
    network = opinionated(registry.build("resnet8", len(CLASSES), 1))
    frozen = teacher.freeze(network, InputTransform(dataset.mean, dataset.std), "resnet8", dataset.classes, CPU)
    folder = root / "runs <script>"
    precomputed(folder / "store", dataset, frozen)
    plain = settings.FitSettings(epochs=2, batch_size=32)
    fit.run(plain, data=dataset, model="lessons:TinyNet", out=folder / "base-seed0", machine=ON_CPU)
    material = distill.Material(data=dataset, knowledge=reader.open(folder / "store"))
    for name, seed in ROWS_OF_RUNS.items():
        chosen = SCHOOL | {"seed": seed, "keep": 1.0 if name.startswith("kd") else 0.5}
        distill.run(settings.TrainSettings(**chosen), material, out=folder / name, machine=ON_CPU)
    rows = [{"step": step, "title": title} for step, title in ROWS.items()]
    runs = [{"step": "store", "seed": None, "kind": "store", "seconds": 1.25}]
    runs += [{"step": name.split("-")[0], "seed": seed, "kind": "train"} for name, seed in ROWS_OF_RUNS.items()]
    results = {"title": TITLE, "data": spec_, "seeds": [0, 1, 2], "rows": rows, "runs": runs}
    (folder / "results.json").write_text(json.dumps(results))
    return SimpleNamespace(folder=folder, data=spec_)


def images(folder):
    """Class folders of 16x16 noise whose mean depends on the class, with hostile names."""
    random = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 10)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 80, (16, 16, 3)) + 50 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{number:02d}.png")
    return folder


class Page(HTMLParser):
    """A report as a browser would take it apart."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.tables, self.sources = [], {}, []
        self.texts, self._cell, self._table, self._tag = {}, None, None, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.elements.append((tag, found))
        if tag == "table":
            self._table = self.tables.setdefault(found["id"].removeprefix("table-"), [])
        if tag == "tr":
            self._table.append([])
        if tag in ("td", "th"):
            self._table[-1].append("")
            self._cell = True
        if tag == "img":
            self.sources.append(found["src"])
        self._tag = tag

    def handle_endtag(self, tag):
        self._cell = None if tag in ("td", "th") else self._cell
        self._tag = None

    def handle_data(self, text):
        if self._cell:
            self._table[-1][-1] += text
        if self._tag:
            self.texts.setdefault(self._tag, []).append(text)
