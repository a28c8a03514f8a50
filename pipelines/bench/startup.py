"""How long the commands that load no torch take from the shell: --help, inspect, condense of 50,000 rows.

python pipelines/bench/startup.py --folder /tmp/startup
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from measure import median, started, write

BARS = {"--help": 0.3, "inspect": 1.0, "condense": 1.0}


def material(folder, count):
    """A store of `count` tiny images and values of all of them."""
    from made import images, store_of

    from kcdcache.condensation import value_files
    from kcdcache.condensation.values import Values

    dataset = images(count, side=1)
    held = store_of(dataset, folder / "store", 1)
    random = np.random.default_rng(2)
    found = Values(visits=np.ones(count, np.int32), value=random.random(count, np.float32))
    value_files.write(
        folder / "values.parquet",
        found,
        dataset.train.labels,
        {"knowledge_id": held.knowledge_id, "student": "none", "epoch": 1},
    )


def timed(words, repetitions, before):
    """Seconds of each run of a command in a new process, after one that warms the disk's cache."""
    seconds = []
    for _ in range(repetitions + 1):
        before()
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "kcdcache", *words], check=True, capture_output=True)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def heavy(words):
    """Which heavy libraries the command loads."""
    code = (
        "import sys\nfrom kcdcache import cli\n"
        "try:\n    cli.main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print('loaded', *[name for name in ('torch', 'zarr') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True)
    return " ".join(done.stdout.splitlines()[-1].split()[1:]) or "none"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--repetitions", type=int, default=9)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    held, values, out = (str(given.folder / name) for name in ("store", "values.parquet", "manifest.parquet"))
    commands = {
        "--help": ["--help"],
        "inspect": ["inspect", held],
        "condense": ["condense", "--values", values, "--store", held, "--keep", "0.7", "--out", out],
    }
    try:
        material(given.folder, given.count)
        rows = []
        for name, words in commands.items():
            seconds = timed(words, given.repetitions, lambda: Path(out).unlink(missing_ok=True))
            Path(out).unlink(missing_ok=True)
            row = {"what": f"kcdcache {name}", "median_s": median(seconds), "bar_s": BARS[name]}
            rows.append({**row, "torch_or_zarr": heavy(words), "n": given.repetitions})
        write("startup", started(), None, rows)
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
