"""What every benchmark shares: alternating repetitions, medians, the machine, a JSON file and a table."""

import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

from kcdcache.environment import processor_name

RESULTS = Path(__file__).resolve().parent.parent / "results" / "bench"
LIBRARIES = ("kcdcache", "torch", "zarr", "numpy", "pyarrow", "awscrt")


def alternating(repetitions, **work):
    """Run each function once per round, so that a slow moment of the machine hits all; return name -> seconds."""
    seconds = {name: [] for name in work}
    for function in work.values():
        function()
    for _ in range(repetitions):
        for name, function in work.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def started():
    """The command line of this run, as one would type it in the repository's root."""
    return f"python pipelines/bench/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"


def median(values):
    return statistics.median(values)


def ratio(seconds, name, reference):
    """Median over rounds of one function's time over another's in the same round."""
    return median([mine / its for mine, its in zip(seconds[name], seconds[reference], strict=True)])


def machine(threads):
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "load_before": os.getloadavg()[0],
    }


def write(name, command, threads, rows, **more):
    """Write rows (dictionaries with equal keys) to results/bench/NAME.json and print them as a table."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    document = {"command": command, **machine(threads), "rows": rows, **more}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    print(table(rows))


def table(rows):
    names = list(rows[0])
    cells = [names, *([_shown(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(names))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _shown(value):
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
