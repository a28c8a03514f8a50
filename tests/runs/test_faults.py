"""Writes that fail at any step, requests to stop, memory that runs out, workers that die, clocks that jump."""

import json
import os
import re
import signal
from functools import cache
from itertools import count

import numpy as np
import pytest
import torch
from commands import NAMES, complete, logged_files_are_whole, same, same_result, words
from killing import finished, succeeds
from pupils import leftovers, lines, promised, saved_teacher
from stores import content, creating, finish, make, small_parts

from kcdcache.datasets import datasets
from kcdcache.errors import KcdcacheError
from kcdcache.networks.input_transform import enough_memory
from kcdcache.store import reader
from kcdcache.store.log import read_log

CODES = {"ENOSPC": 7, "EIO": 1}


def fails(here, name, path, point, error):
    """Fail one step of a command's writing and then let it finish; return whether it has that many steps."""
    log, command = path.with_suffix(".log"), words(here.root, name, path)
    code = finished(here.start, command, log, KCDCACHE_CRASHPOINT=f"{point}:{error}")
    text = log.read_text()
    if code == 0:
        return False
    assert code == CODES[error], text
    told = next(line for line in text.splitlines() if line.startswith("error: "))
    assert str(path) in told
    assert "internal error" not in text
    assert "Traceback" not in text
    if error == "ENOSPC":
        assert re.search(r"run the same command again to resume \(.*( needs [\d,]+ bytes,|:) [\d,]+ are free\)", told)
    assert not complete(name, path) or same_result(here.root, name, path)
    if name == "precompute" and (path / "_kcd" / "log").exists():
        assert logged_files_are_whole(path)
    succeeds(here.start, command, log)
    assert same(here.root, name, path)
    assert not leftovers(path.parent)
    return True


POINTS = {"precompute": (2, 44, 96), "train": (5, 60, 199), "fit": (17, 53), "condense": (1, 5)}
"""some steps, spread over everything a command writes; by default every other of them for each kind of error"""


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("error", CODES)
@pytest.mark.parametrize("name", NAMES)
def test_any_write_that_fails_ends_with_a_reason_and_resumes_to_the_same_bytes(here, tmp_path, name, error, every):
    """If `every`: the first step, the second, and so on, until the command does not have that many."""
    points = count(1) if every else POINTS[name][list(CODES).index(error) :: 2]
    last = next((point for point in points if not fails(here, name, tmp_path / str(point), point, error)), None)
    assert last > max(POINTS[name]) if every else last is None


WRITING = """
import os, sys
from pathlib import Path
from stores import creating, finish, small_parts
from kcdcache.errors import NoSpaceError
path = Path({path!r})
try:
    with creating(path, small_parts(150, 2, 64, 4)) as writing:
        os.environ["KCDCACHE_CRASHPOINT"] = "{point}:ENOSPC"
        finish(writing)
except NoSpaceError:
    sys.exit(7)
"""


def test_other_chunks_are_written_after_a_failure_and_the_part_is_not_logged(here, tmp_path):
    """Sixteen chunks a part, written several at a time: what comes after the failed one counts for nothing."""
    whole = make(tmp_path / "whole", small_parts(150, 2, 64, 4))
    more = []
    for point in (1, 38):
        path = tmp_path / str(point)
        text = WRITING.format(path=str(path), point=point)
        assert finished(here.start, text, tmp_path / "log") == 7, (tmp_path / "log").read_text()
        logged = {file.path for record in read_log(path, 0) for file in record.files}
        there = {name for name in content(path) if name.startswith("logits") and "/c." in name}
        more.append(len(there - logged))
        assert logged_files_are_whole(path)
        assert not complete("precompute", path)
        with creating(path, small_parts(150, 2, 64, 4)) as writing:
            finish(writing)
        assert content(path) == content(whole)
    assert max(more) > 0


LONG = {"precompute": {"views": 8}, "fit": {"epochs": 4}, "train": {"epochs": 4, "batch_size": 64}}
"""settings that give a command work to be stopped in"""
BEGUN = {"precompute": "v00001*.json", "fit": "metrics.jsonl", "train": "metrics.jsonl", "run": "v00001*.json"}
RECIPE = """
title = "stopped"
data = "digits?train=200&test=60"
machine = {device = "cpu", threads = 1}

[[step]]
name = "teacher"
run = "fit"
model = "resnet8"
epochs = 1
batch_size = 128

[[step]]
name = "store"
run = "precompute"
teacher = "@teacher"
views = 8
min_accuracy = 0
"""


def long_command(here, folder, name, path):
    if name != "run":
        return words(here.root, name, path, **LONG[name])
    (folder / "recipe.toml").write_text(RECIPE)
    return ["run", folder / "recipe.toml", "--out", path]


@pytest.fixture(scope="module")
def long_whole(here):
    """name -> what the long command makes when nobody stops it."""

    @cache
    def whole(name):
        succeeds(here.start, long_command(here, here.root, name, here.root / f"long {name}"), here.root / "log")
        return here.root / f"long {name}"

    return whole


def signalled(here, command, log, folder, pattern, *numbers):
    """Start a command, send it signals when it has begun its work, and return its exit code."""
    process = here.start(command, log)
    while not process.ended(0.002) and not list(folder.rglob(pattern)):
        pass
    process.signal(signal.SIGSTOP)
    for number in numbers:
        process.signal(number)
    process.signal(signal.SIGCONT)
    assert process.ended(60)
    return process.code


def same_work(left, right):
    """Whether two folders promise the same bytes; a recipe's table and report have clock times."""
    told = ("results.json", "report.html")
    kept = [{name: data for name, data in promised(path).items() if name not in told} for path in (left, right)]
    return kept[0] == kept[1]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("precompute", signal.SIGTERM),
        ("fit", signal.SIGINT),
        ("run", signal.SIGINT),
        pytest.param("train", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_command_asked_to_stop_ends_cleanly_and_resumes(here, long_whole, tmp_path, name, number):
    command, log = long_command(here, tmp_path, name, tmp_path / "it"), tmp_path / "log"
    code = signalled(here, command, log, tmp_path / "it", BEGUN[name], number)
    assert code == 128 + number, log.read_text()
    assert f"stopped by {signal.Signals(number).name}: " in log.read_text()
    assert "the same command resumes" in log.read_text()
    assert not leftovers(tmp_path)
    succeeds(here.start, command, log)
    assert same_work(long_whole(name), tmp_path / "it")
    if name == "fit":  # what was done of an epoch is timed as that, not as all of it
        rows, timed = ([json.loads(line) for line in (tmp_path / f"it/{file}.jsonl").read_text().splitlines()]
                       for file in ("metrics", "timing"))  # fmt: skip
        assert sum(row["samples"] for row in timed) == rows[-1]["samples_so_far"]


@pytest.mark.parametrize("name", ["precompute", pytest.param("run", marks=pytest.mark.slow)])
def test_a_second_request_to_stop_aborts_at_once(here, long_whole, tmp_path, name):
    """Both are waiting when the process goes on; which of them is served first is the system's choice."""
    command, log = long_command(here, tmp_path, name, tmp_path / "it"), tmp_path / "log"
    code = signalled(here, command, log, tmp_path / "it", BEGUN[name], signal.SIGINT, signal.SIGTERM)
    assert code in (-signal.SIGTERM, -signal.SIGINT), log.read_text()
    assert "stopping at the next safe point; once more aborts" in log.read_text()
    succeeds(here.start, command, log)
    assert same_work(long_whole(name), tmp_path / "it")


def outlived(path):
    """Set the times of everything below a folder to 1970 and to far in the future, by turns."""
    for number, file in enumerate(sorted([path, *path.rglob("*")])):
        os.utime(file, (0, 0) if number % 2 else (2**33, 2**33))


@pytest.mark.parametrize("name", ["precompute", "train"])
def test_nothing_depends_on_the_times_of_files(here, tmp_path, name):
    command, log, path = words(here.root, name, tmp_path / "it"), tmp_path / "log", tmp_path / "it"
    for point in (30, 20):
        assert finished(here.start, command, log, KCDCACHE_CRASHPOINT=str(point)) == -signal.SIGKILL
        outlived(tmp_path)
    assert not complete(name, path)
    succeeds(here.start, command, log)
    assert same(here.root, name, path)
    outlived(tmp_path)
    before = content(path)
    assert complete(name, path)
    succeeds(here.start, command, log)
    if name == "precompute":
        succeeds(here.start, ["verify", path, "--read-data"], log)
        reader.open(path).load(1, np.arange(200), ("logits",))
    assert content(path) == before


WORKERS = """
import multiprocessing
import os
from pathlib import Path
import numpy as np
from torch.utils.data import DataLoader
from pupils import SPEC
from kcdcache.condensation import manifest
from kcdcache.datasets import datasets
from kcdcache.store import reader
from kcdcache.training import batches

knowledge, digits = reader.open(Path({path!r})), datasets.load(SPEC)
whole = manifest.full(manifest.Samples(knowledge.knowledge_id, 200, digits.train.labels, 10))
with batches.connect(digits, knowledge, whole) as source:
    points = batches.KnowledgePoints(source)

    def read(workers, kill=False):
        seen = []
        context = "fork" if workers else None
        for batch in DataLoader(points, batch_size=10, num_workers=workers, multiprocessing_context=context):
            seen.append(batch["index"].numpy())
            if kill and len(seen) == 2:
                for worker in multiprocessing.active_children():
                    worker.kill()
        return np.concatenate(seen)

    if {kill}:
        try:
            read(2, kill=True)
        except Exception as error:
            os.write(1, repr(error).encode())
            os._exit(3)
    print("the same:", (read(2) == read(0)).all(), len(read(2)))
"""


def test_the_death_of_a_loading_process_is_an_error_and_no_wait(here, tmp_path):
    """Torch tells of it where it notices first, and again wherever the main thread then is: even while it reports."""
    path, log = str(here.root / "precompute"), tmp_path / "log"
    code = finished(here.start, WORKERS.format(path=path, kill=True), log)
    said = log.read_text()
    assert code in (1, 3), said
    assert "the same" not in said
    if code == 3:
        died = r"DataLoader worker \(pid(\(s\))? [\d, ]+\) (exited unexpectedly|is killed by signal: Killed)"
        assert re.search(rf"{died}|EOFError|Connection\w+Error|FileNotFoundError", said), said
    log.unlink()
    succeeds(here.start, WORKERS.format(path=path, kill=False), log)
    assert "the same: True 200" in log.read_text()


TAKES = {
    "Unable to allocate": lambda: np.empty(2**50),
    "can't allocate memory": lambda: torch.empty(2**60),
    "MemoryError": lambda: bytearray(2**62),
    "CUDA out of memory": lambda: torch.empty(2**42, device="cuda"),
}


@pytest.mark.parametrize("said", TAKES)
def test_every_way_to_run_out_of_memory_is_one_error(said):
    if "CUDA" in said and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    wanted = rf"^out of memory: take less \(.*{said}"
    with pytest.raises(KcdcacheError, match=wanted) as caught, enough_memory("take less"):
        TAKES[said]()
    assert caught.value.exit_code == 1
    with pytest.raises(RuntimeError, match="must match the size") as other, enough_memory("take less"):
        torch.ones(2) + torch.ones(3)
    assert not isinstance(other.value, KcdcacheError)


COUNT, SIDE, MEMORY = 400, 64, 250 * 2**20


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of which a network holds a few in the memory given, but not all at once."""
    root = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), np.uint8)
    labels = np.arange(COUNT) % 10
    np.savez(
        root / "images.npz", train_images=pixels, train_labels=labels, test_images=pixels[:20], test_labels=labels[:20]
    )
    spec = f"arrays:{root / 'images.npz'}"
    saved_teacher(root / "teacher", datasets.load(spec))
    return root, spec


def test_a_teacher_batch_beyond_memory_says_what_to_lower(here, images, tmp_path):
    """And a student's."""
    root, spec = images
    given, log = {"data": spec, "augment": "none"}, tmp_path / "log"
    store = lines(given | {"teacher": root / "teacher", "store": tmp_path / "store", "min_accuracy": 0})
    fit = lines(given | {"model": "resnet8", "epochs": 1, "threads": 1, "out": tmp_path / "run"})
    for name, words_, told in (
        ("precompute", store, f"it is part of a store's plan, so if {tmp_path}/store"),
        ("fit", fit, "other settings need another --out once the run has a checkpoint"),
    ):
        limits = {"memory": MEMORY}
        assert finished(here.start, [name, *words_, "--batch-size", COUNT], log, limits=limits) == 1
        assert f"error: out of memory: lower --batch-size ({COUNT} now)" in log.read_text()
        assert told in log.read_text()
        assert finished(here.start, [name, *words_, "--batch-size", 4], log, limits=limits) == 0, log.read_text()
    assert complete("precompute", tmp_path / "store")
