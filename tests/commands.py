"""Commands of every kind, so short that writing is most of what they do; what they make; what readers say of it."""

import subprocess
import sys
from types import SimpleNamespace

from killing import environment, succeeds
from pupils import SPEC, digits, lines, promised, same_files, saved_teacher

from kcdcache.cli import main
from kcdcache.condensation import manifest
from kcdcache.errors import NotFoundError, UnfinishedError
from kcdcache.files.atomic import sha256_file
from kcdcache.runs.state import read_summary
from kcdcache.store import log, reader

CROPS = {"augment": "crop", "padding": 2}
STORE = CROPS | {"views": 2, "batch_size": 64, "min_accuracy": 0, "fields": "logits,penultimate"}
TRAIN = {
    "student": "lessons:TinyNet", "epochs": 2, "stages": 2, "batch_size": 128, "keep": 0.6, "threads": 1,
    "checkpoint_seconds": 60, "mix_target": "requery",
}  # fmt: skip
FIT = CROPS | {"model": "lessons:TinyNet", "epochs": 1, "batch_size": 128, "threads": 1, "data": SPEC}
NAMES = ("precompute", "train", "fit", "condense")


def words(root, name, path, **changes):
    """A command that writes to `path`, with what the place `root` has for it."""
    given = {"data": SPEC, "teacher": root / "teacher"}
    settings = {
        "precompute": STORE | given | {"store": path},
        "train": TRAIN | given | {"store": root / "precompute", "out": path},
        "fit": FIT | {"out": path},
        "condense": {
            "values": root / "train" / "values.parquet", "store": root / "precompute", "keep": 0.5, "out": path
        },
    }  # fmt: skip
    return [name, *lines(settings[name] | changes)]


def place(root, start):
    """A teacher, and beside it what each command makes when nothing disturbs it, in folders of their names."""
    saved_teacher(root / "teacher", digits(200, 60))
    for name in NAMES:
        succeeds(start, words(root, name, root / name), root / "log")
    return SimpleNamespace(root=root, start=start)


def same(root, name, path):
    """Whether a command made at `path` what it makes undisturbed."""
    if name == "condense":
        return path.read_bytes() == (root / name).read_bytes()
    return same_files(root / name, path)


def same_result(root, name, path):
    """Whether what lies at `path` is the whole result; a run's record of its files is written before and after it."""
    if name == "condense":
        return same(root, name, path)
    kept = [{file: data for file, data in promised(at).items() if file != "files.json"} for at in (root / name, path)]
    return kept[0] == kept[1]


def complete(name, path):
    """Whether readers take what a command left at `path` for finished."""
    read = {"precompute": reader.open, "condense": manifest.read}.get(name, read_summary)
    try:
        read(path)
    except (UnfinishedError, NotFoundError):
        return False
    return True


def logged_files_are_whole(path):
    """Whether every file that a store's log vouches for is what was written."""
    logged = [file for record in log.read_log(path, 0) for file in record.files]
    return all(sha256_file(path / file.path) == file.sha256 for file in logged)


def outcome(capsys, *words):
    """Return (exit code, stdout, stderr) of a command run in this process."""
    code = main._outcome([str(word) for word in words])
    return code, *capsys.readouterr()


def failure(capsys, *words):
    """Return (exit code, message) of a command that fails: nothing on stdout, no traceback."""
    code, out, err = outcome(capsys, *words)
    assert out == ""
    assert "Traceback" not in err
    return code, err


def alone(*words):
    """Run the command line in a process of its own, which afterwards names the heavy modules it has loaded."""
    code = (
        "import sys\nfrom kcdcache.cli import main\ncode = main._outcome(sys.argv[1:])\n"
        f"print('loaded:', *[m for m in {HEAVY} if m in sys.modules], file=sys.stderr)\nsys.exit(code)"
    )
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)


HEAVY = ("torch", "torchvision", "zarr", "sklearn", "matplotlib", "scipy")
