"""How fast photographs become views ahead of a consumer: in its own thread, by threads, by processes.

python pipelines/bench/decoding.py --folder /tmp/decoding
"""

import argparse
import io
import os
import shutil
import statistics
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from measure import started, write
from PIL import Image

from kcdcache.datasets import images
from kcdcache.settings import ViewSettings
from kcdcache.views import prefetch, rules

CPU = torch.device("cpu")
BLOCK = prefetch.BLOCK


def photographs(folder, count):
    """JPEGs of about 500x375 and 100 kB, as ImageNet's are: coarse colour patches with noise, quality 90."""
    random, files = np.random.default_rng(0), []
    for number in range(count):
        high, wide = (375 + int(random.integers(-40, 40)), 500 + int(random.integers(-40, 40)))
        coarse = Image.fromarray(random.integers(0, 256, (high // 8, wide // 8, 3), np.uint8))
        pixels = np.asarray(coarse.resize((wide, high), Image.Resampling.BICUBIC)) + random.normal(
            0, 10, (high, wide, 1)
        )
        stream = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
        files.append(folder / f"{number}.jpg")
        files[-1].write_bytes(stream.getvalue())
    return images.Split(np.zeros(count, np.int64), images.EncodedImages([str(file) for file in files]))


def asked(rule, count, batch):
    index = np.arange(count)
    return [
        prefetch.Asked(part, rules.parameters(rule, part, 0)) for part in np.split(index, range(batch, count, batch))
    ]


def by_itself(split, rule, batches):
    """One after the other, in the consumer's thread."""
    for index, parameters in batches:
        yield rules.show(rule, split.images(index, threads=1), parameters, CPU)


def before(split, rule, batches):
    """As before views were made ahead: a batch is decoded by threads, and resized in the consumer's thread."""
    for index, parameters in batches:
        yield rules.show(rule, split.images(index), parameters, CPU)


def by_threads(workers):
    return lambda split, rule, batches: prefetch.shown(split, rule, batches, CPU, workers)


class Processes:
    """The same work by processes, whose views come back through shared memory; started once, which is not timed."""

    def __init__(self, split, rule, workers):
        self._workers, self._rule = workers, rule
        context = torch.multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, context, begin, (split, rule))
        list(self._pool.map(abs, range(8 * workers)))

    def __call__(self, split, rule, batches):
        """Yield the views of the batches, with as many blocks ahead as threads have."""
        waiting, pieces = deque(), []
        depth = self._workers + -(-len(batches[0].samples) // BLOCK)
        blocks = list(prefetch._blocks(batches))
        for number, block in enumerate([*blocks, *[None] * depth]):
            if block is not None:
                index, parameters, ends = block
                waiting.append((ends, self._pool.submit(made, index, parameters)))
            if number >= depth:
                last, future = waiting.popleft()
                pieces.append(future.result())
                if last:
                    yield torch.cat(pieces)
                    pieces.clear()

    def seconds(self):
        """Processor time of all processes so far."""
        stats = [
            Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split() for number in self._pool._processes
        ]
        return sum(int(found[11]) + int(found[12]) for found in stats) / os.sysconf("SC_CLK_TCK")

    def close(self):
        self._pool.shutdown()


def begin(split, rule):
    global HELD
    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_system")
    HELD = split, rule


def made(index, parameters):
    split, rule = HELD
    return rules.show(rule, split.images(index, threads=1), parameters, CPU).share_memory_()


def consumed(way, supply, step):
    """Return clock and processor seconds."""
    others = way.seconds if isinstance(way, Processes) else lambda: 0.0
    began, spent = time.perf_counter(), time.process_time() + others()
    for pixels in supply:
        step(pixels)
    return time.perf_counter() - began, time.process_time() + others() - spent


def busy(seconds):
    """A consumer that holds the interpreter's lock for a fifth of its time and computes in the rest, as a loop does."""
    matrix = torch.ones(300, 300)

    def step(pixels):
        began = time.thread_time()
        while time.thread_time() - began < seconds:
            until = time.thread_time() + seconds / 50
            while time.thread_time() < until:
                pass
            until = time.thread_time() + 4 * seconds / 50
            while time.thread_time() < until:
                torch.mm(matrix, matrix)

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/decoding"))
    parser.add_argument("--count", type=int, default=192)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--step", type=float, default=0.25, help="processor seconds of the busy consumer per batch")
    chosen = parser.parse_args()
    shutil.rmtree(chosen.folder, ignore_errors=True)
    chosen.folder.mkdir(parents=True)
    split = photographs(chosen.folder, chosen.count)
    rule = rules.rule_from(ViewSettings(augment="resized-crop-flip", size=224), None)
    batches = asked(rule, chosen.count, chosen.batch)
    torch.set_num_threads(1)  # with more, threads of torch would fight with those that decode
    ways = {"in the consumer's thread": by_itself, "as before (decoded by threads, resized by the consumer)": before}
    for workers in chosen.workers:
        ways[f"{workers} threads ahead"] = by_threads(workers)
        ways[f"{workers} processes ahead"] = Processes(split, rule, workers)
    expected = torch.cat(list(by_itself(split, rule, batches)))
    for name, way in ways.items():
        assert torch.equal(torch.cat(list(way(split, rule, batches))), expected), name
    consumers = {"idle": lambda pixels: None, "busy": busy(chosen.step)}
    rates = {(name, consumer): [] for name in ways for consumer in consumers}
    for _ in range(chosen.repetitions):
        for name, consumer in rates:
            rates[name, consumer].append(consumed(ways[name], ways[name](split, rule, batches), consumers[consumer]))
    rows = [
        {
            "way": name,
            "consumer": consumer,
            "images_per_second": statistics.fmean(chosen.count / clock for clock, _ in found),
            "variance": statistics.variance(chosen.count / clock for clock, _ in found),
            "median": statistics.median(chosen.count / clock for clock, _ in found),
            "processor_ms_per_image": statistics.median(1000 * spent / chosen.count for _, spent in found),
            "n": len(found),
        }
        for (name, consumer), found in rates.items()
    ]
    bytes_each = statistics.fmean(Path(file).stat().st_size for file in split.source.payloads)
    more = {"jpeg_bytes": bytes_each, "view": "resized-crop-flip to 224", "busy_seconds_per_batch": chosen.step}
    write("decoding", started(), 1, rows, batch=chosen.batch, images=chosen.count, **more)
    for way in ways.values():
        if isinstance(way, Processes):
            way.close()
    shutil.rmtree(chosen.folder)


if __name__ == "__main__":
    main()
