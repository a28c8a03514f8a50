"""Copy what a finished recipe found into pipelines/results: table, figures of every run, settings and environment.

Usage: python pipelines/publish.py RECIPE_FOLDER NAME
"""

import shutil
import sys
from pathlib import Path

from kcdcache.files import read_json
from kcdcache.recipe import table

RESULTS = Path(__file__).parent / "results"
KEPT = ("run.json", "metrics.jsonl", "summary.json")


def main() -> None:
    folder, out = Path(sys.argv[1]), RESULTS / sys.argv[2]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copy(folder / "results.json", out)
    (out / "table.txt").write_text(table(read_json(folder / "results.json")) + "\n")
    for run in sorted(path.parent for path in folder.glob("*/summary.json")):
        (out / run.name).mkdir()
        for name in KEPT:
            shutil.copy(run / name, out / run.name)


if __name__ == "__main__":
    main()
