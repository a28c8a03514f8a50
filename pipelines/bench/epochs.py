"""What an epoch costs: with knowledge, with mixes, in our trainer at all, with the teacher in the loop, with values.

python pipelines/bench/epochs.py --folder /tmp/epochs
"""

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from made import CPU, Run, half_mixed, images, mixing, store_of, whole
from measure import alternating, median, ratio, started, write
from torch.nn import functional

from kcdcache.condensation import manifest
from kcdcache.methods import run_loss
from kcdcache.networks import registry
from kcdcache.networks.input_transform import InputTransform
from kcdcache.settings import MethodSettings, OptimizerSettings
from kcdcache.teacher import teacher
from kcdcache.training import batches, learner
from kcdcache.views import rules

PAIRS = (("resnet32x4", "resnet8x4"), ("wrn_40_2", "wrn_16_2"), ("resnet56", "resnet20"))
EPOCHS = 10**6  # never the last one: the test split is measured at the end only


class LiveTargets:
    """The teacher in the loop: its logits on the student's own views, batch by batch."""

    def __init__(self, network, dataset, rule):
        self._network, self._dataset, self._rule = network, dataset, rule

    def prepare(self, view, following):
        self._view = view

    def gather(self, index, temperature, device):
        shown = self._dataset.train.images(index)
        pixels = rules.show(self._rule, shown, rules.parameters(self._rule, index, self._view), device)
        return teacher.outputs(self._network, pixels, ("logits",))


def settings_of(given):
    return OptimizerSettings(
        epochs=EPOCHS, evaluate_every=EPOCHS, batch_size=given.batch, checkpoint_seconds=1e9,
        learning_rate=1e-3, milestones=(), resident=given.resident,
    )  # fmt: skip


def run_of(given, source, student, method, name, values):
    """A run of one student; `values` says whether it records the value of every sample, as `train` does."""
    settings, dataset = settings_of(given), source.data
    record = learner.ValueRecord(len(dataset.train), MethodSettings(), CPU) if values else None
    loss = run_loss.Loss(run_loss.weights_of(MethodSettings(method=method)), {})
    pupil = learner.new_learner(student, dataset, settings, loss, CPU, record)
    return Run(pupil, source, settings, given.folder / "runs" / name)


def connected(dataset, knowledge, chosen, fields=("logits",)):
    return batches.connect(dataset, knowledge, chosen, fields=fields, mixing=mixing())


def bare_steps(given, student, classes, count):
    """Forward, backward and step of the same student on one batch in memory, as often as an epoch has batches."""
    network = registry.build(student, classes, 0).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    pixels = torch.randn(given.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(given.batch) % classes

    def work():
        for _ in range(count // given.batch):
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(network(pixels), labels).backward()
            optimizer.step()

    return work


def knowledge_rows(given, student, with_mixes):
    """Plain cross-entropy against bare steps, and KD from the store against plain cross-entropy."""
    dataset = images(given.count)
    knowledge = store_of(dataset, given.folder / f"store-{student}")
    one_hot, half = whole(knowledge), half_mixed(knowledge)
    unmixed = replace(half, **manifest.plain(half.index))
    with (
        connected(dataset, knowledge, one_hot, ()) as plain,
        connected(dataset, knowledge, one_hot) as stored,
        connected(dataset, knowledge, unmixed, ()) as fewer,
        connected(dataset, knowledge, half) as mixed,
    ):
        work = {
            "bare": bare_steps(given, student, len(dataset.classes), given.count),
            "plain": run_of(given, plain, student, "ce", f"{student}-plain", False),
            "stored": run_of(given, stored, student, "kd", f"{student}-stored", True),
        }
        if with_mixes:
            work["fewer"] = run_of(given, fewer, student, "ce", f"{student}-fewer", False)
            work["mixed"] = run_of(given, mixed, student, "kd", f"{student}-mixed", True)
        seconds = alternating(given.repetitions, **work)
    asked = [
        ("plain", "bare", f"{student}: plain cross-entropy epoch", "bare steps on one batch in memory"),
        ("stored", "plain", f"{student}: KD from the store, K_1H, values recorded", "plain cross-entropy epoch"),
        ("mixed", "fewer", f"{student}: the same, half the batch in K_Aug", "plain cross-entropy epoch"),
    ]
    return [
        row(what, median(seconds[name]), ratio(seconds, name, other), reference, None, given.repetitions)
        for name, other, what, reference in asked
        if name in work
    ]


def live_row(given, teacher_name, student):
    """The epoch with the teacher in the loop against the one from the store, and what forward passes predict."""
    dataset = images(given.live_count)
    knowledge = store_of(dataset, given.folder / f"store-{teacher_name}")
    module = registry.build(teacher_name, len(dataset.classes), 0)
    network = teacher.freeze(module, InputTransform(dataset.mean, dataset.std), teacher_name, dataset.classes, CPU)
    forwards = alternating(given.repetitions, teacher=forward(given, teacher_name), student=forward(given, student))
    with connected(dataset, knowledge, whole(knowledge)) as stored:
        live = replace(stored, targets=LiveTargets(network, dataset, stored.rule))
        seconds = alternating(
            given.repetitions,
            stored=run_of(given, stored, student, "kd", f"{teacher_name}-stored", False),
            live=run_of(given, live, student, "kd", f"{teacher_name}-live", False),
        )
    predicted = (3 + ratio(forwards, "teacher", "student")) / 3
    what = f"{teacher_name} -> {student}: KD epoch, teacher in the loop"
    measured = ratio(seconds, "live", "stored")
    return row(what, median(seconds["live"]), measured, "the epoch from the store", predicted, given.repetitions)


def forward(given, name):
    network = registry.build(name, 100, 0).to(memory_format=torch.channels_last).eval()
    pixels = torch.randn(given.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)

    def work():
        with torch.inference_mode():
            network(pixels)

    return work


def value_row(given, student):
    """Recording in every step and condensing once, of 50,000 samples in every epoch, against that epoch's steps."""
    count = 50_000
    record = learner.ValueRecord(count, MethodSettings(), CPU)
    index, mixed = torch.randperm(count)[: given.batch], torch.zeros(given.batch, dtype=torch.bool)
    logits = torch.randn(given.batch, 100)
    knowledge = store_of(images(count, side=1), given.folder / "store-values", 1)
    seconds = alternating(
        given.repetitions,
        observe=lambda: [record.observe(logits, logits[:, 0], index, mixed) for _ in range(100)],
        condense=lambda: half_mixed(knowledge),
        step=bare_steps(given, student, 100, given.batch),
    )
    steps = count / given.batch
    found = zip(*(seconds[name] for name in ("observe", "condense", "step")), strict=True)
    shares = [(steps * observe / 100 + condense) / (steps * step) for observe, condense, step in found]
    spent = steps * median(seconds["observe"]) / 100 + median(seconds["condense"])
    what = f"{student}: values recorded and condensed, every epoch of 50,000"
    return row(what, spent, median(shares), "the epoch's steps", None, given.repetitions)


def row(what, seconds, share, reference, predicted, repetitions):
    return {
        "what": what,
        "median_s": seconds,
        "ratio": share,
        "reference": reference,
        "predicted": predicted,
        "n": repetitions,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--count", type=int, default=2048, help="samples of an epoch")
    parser.add_argument("--live-count", type=int, default=256, help="the same with the teacher in the loop")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--resident", default="auto", choices=("auto", "on", "off"))
    parser.add_argument("--students", default="resnet20,resnet8")
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="how many teacher and student pairs")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    began = time.perf_counter()
    try:
        rows = []
        for student in given.students.split(","):
            rows += knowledge_rows(given, student, with_mixes=student == "resnet20")
        rows += [live_row(given, *pair) for pair in PAIRS[: given.pairs]]
        rows.append(value_row(given, "resnet20"))
        command = started()
        write("epochs", command, given.threads, rows, seconds=time.perf_counter() - began)
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
