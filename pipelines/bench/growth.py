"""How the time of precompute and of an epoch grows with the number of samples: slopes on a log-log plot.

python pipelines/bench/growth.py --folder /tmp/growth

Condensing, ranking and starting a stage have theirs in condense.py and reading.py.
"""

import argparse
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from epochs import connected, run_of
from made import images, store_of, whole
from measure import median, started, write
from precompute import network_of

from kcdcache.settings import PrecomputeSettings
from kcdcache.teacher import precompute

NETWORK = "resnet8"


def timed(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def precomputing(given, count):
    dataset, path = images(count), given.folder / "grown"
    settings = PrecomputeSettings(views=1, min_accuracy=0)
    network = network_of(NETWORK, dataset)

    def work():
        shutil.rmtree(path, ignore_errors=True)
        precompute.run(settings, dataset, network, path, threads=given.threads)

    return work


def epoch(given, count, held):
    dataset = images(count)
    knowledge = store_of(dataset, given.folder / f"store{count}")
    source = held.enter_context(connected(dataset, knowledge, whole(knowledge)))
    return run_of(given, source, NETWORK, "kd", f"kd{count}", True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--resident", default="off")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True)
    rows = []
    try:
        with ExitStack() as held:
            for count in given.sizes:
                for what, work in (
                    (f"precompute, {NETWORK}, one view", precomputing(given, count)),
                    (f"epoch, {NETWORK}, KD from the store", epoch(given, count, held)),
                ):
                    work()
                    seconds = [timed(work) for _ in range(given.repetitions)]
                    rows.append({"what": what, "rows": count, "median_s": median(seconds), "n": given.repetitions})
        slopes = {}
        for what in {row["what"] for row in rows}:
            mine = [row for row in rows if row["what"] == what]
            logs = np.log([row["rows"] for row in mine]), np.log([row["median_s"] for row in mine])
            slopes[what] = float(np.polyfit(*logs, 1)[0])
        write("growth", started(), given.threads, rows, slopes=slopes)
        print(slopes)
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
