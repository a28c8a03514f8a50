"""The commands of README and of the pages, read from them and run as written on a few tiny images."""

import contextlib
import io
import itertools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_readme import BLOCKS, ROOT, TEXTS, Block, lines_of

from kcdcache.cli import main
from kcdcache.condensation import manifest
from kcdcache.runs.state import read_metrics
from kcdcache.store import reader

ELSEWHERE = {
    "guides/training": "tests/test_training_guide.py", "guides/evaluate": "tests/commands/test_evaluate.py",
    "guides/own-teacher": "tests/test_own_teacher_guide.py", "guides/command-line": "tests/cli/test_messages.py",
    "guides/report": "tests/report/test_verdict.py", "guides/python": "tests/commands/test_api.py",
}  # fmt: skip
"""page -> the test that runs it"""
MARKED = ("not run: ", "run by: ")
RUN = [block for block in BLOCKS if block.kind in ("sh", "python", "toml") and not block.mark.startswith(MARKED)]
CHECKOUT = "python3 -m venv"
"""begins README's first block: what CI does"""
PAGES = {}
"""page -> its blocks, in order"""
for block in RUN:
    if block.page.removeprefix("docs/pages/").removesuffix(".md") not in ELSEWHERE and CHECKOUT not in block.text:
        PAGES.setdefault(block.page, []).append(block)
SMALL = {
    "fit": ["--epochs", "1"], "train": ["--epochs", "2", "--threads", "1"], "precompute": ["--min-accuracy", "0"],
}  # fmt: skip
"""command -> flags that make it small, where they are not given; as many epochs as stages"""
NAMES = {
    "cifar100": "arrays:tiny.npz", "wrn_40_2": "resnet14", "wrn_16_2": "resnet8", "resnet8x4": "resnet8",
    "resnet20": "resnet14",
}  # fmt: skip
"""word -> a smaller one"""
FEW = "train=60&test=20"
BEFORE = {
    "docs/pages/understanding/store.md": ["kcdcache fit --data digits --model resnet8 --out runs/teacher"],
    "docs/pages/understanding/condensation.md": [
        "kcdcache fit --data digits --model resnet8 --out runs/teacher",
        "kcdcache precompute --data digits --teacher runs/teacher --store runs/store --views 2",
    ],
    "docs/pages/reference/methods.md": [
        "kcdcache fit --data cifar100 --model resnet14 --out runs/teacher",
        "kcdcache precompute --data cifar100 --teacher runs/teacher --store runs/store --views 2",
    ],
}
"""page -> what its reader has done before"""


def tiny(folder):
    """Images of 3 classes, each brighter in a channel of its own, as arrays and as class folders of differing sizes."""
    random, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 48), ("test", 12)):
        labels = np.arange(count) % 3
        images = random.integers(0, 128, (count, 8, 8, 3), np.uint8)
        images[np.arange(count), :, :, labels] += 100
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
        for number, (label, image) in enumerate(zip(labels, images, strict=True)):
            place = folder / "photos" / {"train": "train", "test": "val"}[split] / ("ant", "bee", "cat")[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).resize((30 + number % 5, 28)).save(place / f"{number}.png")
    np.savez(folder / "tiny.npz", **arrays)


def smaller(word):
    """Return a word of a command with names and sizes of here."""
    if word.split("?")[0] == "digits":
        options = [option for option in word.partition("?")[2].split("&") if not re.match("train=|test=|$", option)]
        return "digits?" + "&".join([FEW, *options])
    return NAMES.get(word, word)


def as_here(line):
    """Return the words of a command with names and sizes of here."""
    name, *words = [smaller(word) for word in shlex.split(line, comments=True)[1:]]
    given = dict(itertools.pairwise(words))
    if "--epochs" in given and name in SMALL:
        words[words.index("--epochs") + 1] = given.get("--stages", "2" if name == "train" else "1")
    if "--views" in given and given["--views"] != "all":
        words[words.index("--views") + 1] = "2"
    small = zip(SMALL.get(name, [])[::2], SMALL.get(name, [])[1::2], strict=True)
    cropped = name in ("fit", "precompute") and "--augment" not in given and "--from-logits" not in given
    crop = ["--augment", "crop", "--padding", "2"] if cropped else []
    return [name, *words, *crop, *(word for flag, value in small if flag not in given for word in (flag, value))]


def code_as_here(code):
    """Return Python with sizes of here."""
    return re.sub(r"views=\d+", "views=2", re.sub(r"epochs=\d+", "epochs=2", code)).replace(
        "views=2)", "views=2, min_accuracy=0)"
    )


def run(block):
    """Run a block in the current folder."""
    if block.mark.startswith("save as: "):
        Path(block.mark.removeprefix("save as: ")).write_text(block.text)
    elif block.kind == "python":
        exec(compile(code_as_here(block.text), block.page, "exec"), {})
    else:
        for line in lines_of(block):
            assert line.startswith("kcdcache "), f"{line}: no command of ours; mark the block `not run: WHY`"
            assert main._outcome([*as_here(line), "-q"]) == 0, line


@pytest.fixture
def folder(tmp_path, monkeypatch):
    tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", PAGES)
def test_a_pages_blocks_run_in_order(name, folder):
    with contextlib.redirect_stdout(io.StringIO()):
        run(Block(name, "sh", "\n".join(BEFORE.get(name, [])), ""))
        for block in PAGES[name]:
            run(block)
    if name in HOLDS:
        HOLDS[name](folder)


def readme_holds(folder):
    reused = manifest.read(folder / "runs/kcd/stages/2/manifest.parquet")
    assert len(reused) == 33  # of 48 with keep 0.7
    assert {row.kept for row in read_metrics(folder / "runs/reuse")} == {33}
    assert (folder / "runs/set/data/train-00000-of-00001.parquet").is_file()
    assert reader.open(folder / "photos.store").plan.views == 2


def methods_hold(folder):
    store = reader.open(folder / "runs/store")
    attention = [f"attention:stage{stage}:{side}x{side}" for stage, side in ((1, 8), (2, 4), (3, 2))]
    assert sorted(store.fields) == sorted(["logits", "penultimate", *attention])
    assert all(np.isfinite(values).all() for values in store.load(1, np.arange(48), list(store.fields)).values())
    assert [np.isfinite(row.loss) for row in read_metrics(folder / "runs/crd")] == [True] * 2


HOLDS = {"README.md": readme_holds, "docs/pages/reference/methods.md": methods_hold}
"""page -> what is true after its commands"""


@pytest.mark.parametrize("name", ELSEWHERE)
def test_pages_that_others_run_are_named_there(name):
    assert f"docs/pages/{name}.md" in TEXTS
    assert f"docs/pages/{name}.md" in (ROOT / ELSEWHERE[name]).read_text()
