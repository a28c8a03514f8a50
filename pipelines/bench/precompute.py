"""Precompute, all of it, against the bare forward pass of its teacher over the same batches already in memory.

python pipelines/bench/precompute.py --folder /tmp/precompute
"""

import argparse
import shutil
from pathlib import Path

import torch
from made import CPU, images
from measure import alternating, median, ratio, started, write

from kcdcache.networks import registry
from kcdcache.networks.input_transform import InputTransform
from kcdcache.settings import PrecomputeSettings
from kcdcache.teacher import precompute, teacher
from kcdcache.views import rules


def network_of(name, dataset):
    module = registry.build(name, len(dataset.classes), 0)
    return teacher.freeze(module, InputTransform(dataset.mean, dataset.std), name, dataset.classes, CPU)


def bare_forward(network, dataset, settings):
    """Return what runs the network over one view's batches, transformed and laid out beforehand; keeps no output."""
    rule = rules.rule_from(settings, dataset.train.image_size)
    starts = range(0, len(dataset.train), settings.batch_size)
    index = torch.arange(len(dataset.train)).numpy()
    shown = [index[start : start + starts.step] for start in starts]
    ready = [network.transform(precompute.view_pixels(dataset, rule, rows, 0, CPU)) for rows in shown]
    assert all(pixels.is_contiguous(memory_format=torch.channels_last) for pixels in ready)

    def work():
        with torch.inference_mode():
            for _ in range(settings.views):
                for pixels in ready:
                    network.module(pixels)

    return work


def row(given, name, count):
    dataset = images(count)
    settings = PrecomputeSettings(views=given.views, batch_size=given.batch, min_accuracy=0, encoding=given.encoding)
    network, path = network_of(name, dataset), given.folder / name

    def whole():
        shutil.rmtree(path, ignore_errors=True)
        precompute.run(settings, dataset, network, path, threads=given.threads)

    seconds = alternating(given.repetitions, bare=bare_forward(network, dataset, settings), whole=whole)
    points = count * given.views
    return {
        "what": f"precompute, {name}, {points} points, {given.encoding}",
        "points_per_s": points / median(seconds["whole"]),
        "bare_points_per_s": points / median(seconds["bare"]),
        "throughput_ratio": 1 / ratio(seconds, "whole", "bare"),
        "n": given.repetitions,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--encoding", default="float16")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--counts", default="resnet32x4=512,resnet20=8192", help="NETWORK=SAMPLES,...")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    counts = dict(part.split("=") for part in given.counts.split(","))
    try:
        rows = [row(given, name, int(count)) for name, count in counts.items()]
        write("precompute", started(), given.threads, rows)
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
