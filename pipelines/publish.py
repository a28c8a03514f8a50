"""Copy what a finished recipe found into pipelines/results: table, report, and every run's settings and figures.

python pipelines/publish.py RECIPE_FOLDER NAME [--results FILE]

FILE is the recipe's results.json; where several recipes share a folder, a copy of it made after that recipe. runs.jsonl
has a line a run: name, run.json, summary.json and the rows of metrics.jsonl.
"""

import argparse
import json
import shutil
from pathlib import Path

from kcdcache.files.records import read_json
from kcdcache.recipes.recipe import table
from kcdcache.report import page

RESULTS = Path(__file__).parent / "results"


def line_of(run: Path) -> str:
    """Return all that a run's small files say, as one line of JSON."""
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    said = {"run": run.name, "record": read_json(run / "run.json"), "summary": read_json(run / "summary.json")}
    return json.dumps({**said, "metrics": rows})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    out = RESULTS / given.name
    results = read_json(given.results or given.folder / "results.json")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "table.txt").write_text(table(results) + "\n")
    names = [entry["step"] + ("" if entry["seed"] is None else f"-seed{entry['seed']}") for entry in results["runs"]]
    runs = [given.folder / name for name in names if (given.folder / name / "metrics.jsonl").exists()]
    (out / "runs.jsonl").write_text("".join(f"{line_of(run)}\n" for run in runs))
    page.write(runs, out / "report.html")


if __name__ == "__main__":
    main()
