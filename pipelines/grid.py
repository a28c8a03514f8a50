"""Run a recipe one run at a time and keep the record of each finished run, so that it can span many sittings.

python pipelines/grid.py pipelines/evidence.toml --records pipelines/results/evidence/runs --out runs/evidence

Runs go seed by seed, so that every arm has its first seed before any has its second. A run whose record exists is
skipped, whether its folder still exists or not; an interrupted one resumes. Stores are made again where they are gone.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

RECORD = ("run.json", "metrics.jsonl", "summary.json")


def main():
    """Make what is missing, in order; end with the exit code of the first command that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of stores and runs")
    parser.add_argument("--records", type=Path, required=True, help="folder of the records to keep")
    parser.add_argument("--data", help="data spec to use instead of the recipe's")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    data = [] if given.data is None else ["--data", given.data]
    told = kcdcache("run", str(given.recipe), "--out", str(given.out), *data, "--dry-run", "--json", capture=True)
    steps = json.loads(told)["steps"]
    for step in sorted(steps, key=lambda step: step.get("seed", -1)):
        make(step, given)


def make(step, given):
    """Run one step of the grid unless its record exists, and keep its record if it trains a student."""
    command, settings = step["run"], {key: value for key, value in step.items() if key not in ("run", "step")}
    trains = command == "train"
    record = given.records / Path(settings["out"]).name if trains else None
    if trains and (record / "summary.json").exists():
        return
    kcdcache(command, *flags(settings), "--threads", str(given.threads))
    if trains:
        record.mkdir(parents=True, exist_ok=True)
        for name in RECORD:  # the summary last: with it the record is complete
            shutil.copyfile(Path(settings["out"]) / name, record / name)
        print("finished", record, flush=True)


def flags(settings):
    """Return settings as the options of a command line."""
    for key, value in settings.items():
        name = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            yield name if value else f"--no-{name[2:]}"
        else:
            yield from (name, ",".join(map(str, value)) if isinstance(value, list) else str(value))


def kcdcache(*words, capture=False):
    """Run a command of kcdcache; return what it printed, if captured."""
    done = subprocess.run(
        [sys.executable, "-m", "kcdcache", *words], stdout=subprocess.PIPE if capture else None, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


if __name__ == "__main__":
    main()
