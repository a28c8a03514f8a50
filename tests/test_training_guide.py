"""The guide on training: its commands, read from the page, run as written; what it says of their results is true."""

import csv
import re
import shlex
from pathlib import Path

import pytest

from kcdcache.cli import main
from kcdcache.networks.catalogue import saved_network
from kcdcache.runs.state import read_metrics, read_summary

GUIDE = (Path(__file__).resolve().parent.parent / "docs/pages/guides/training.md").read_text()
BLOCKS = re.findall(r"(<!-- not run.*?-->\n)?```(\w+)\n(.*?)```", GUIDE, re.S)
LINES = [line for mark, kind, text in BLOCKS if kind == "sh" and not mark for line in text.splitlines()]
SETTINGS = next(text for _, kind, text in BLOCKS if kind == "toml")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder `runs` after all commands of the page."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / "student.toml").write_text(SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in LINES:
            command, _, file = line.partition(" > ")
            with open(file.strip() or "told", "w") as stream:
                patch.setattr("sys.stdout", stream)
                assert main._outcome([*shlex.split(command)[1:], "-q"]) == 0, line
    return folder / "runs"


def test_the_commands_of_the_guide_run_as_written(runs):
    assert {path.name for path in runs.iterdir()} == {"teacher", "store", "adamw", "ema", "logged", "config", "again"}
    assert len(read_metrics(runs / "config")) == 2
    assert len(read_metrics(runs / "again")) == 2


def test_averaged_weights_and_logs_are_where_the_guide_says(runs):
    assert saved_network(str(runs / "ema" / "ema")) == runs / "ema" / "ema" / "student.json"
    assert read_summary(runs / "ema").accuracy_ema == read_metrics(runs / "ema")[-1].ema_test_accuracy
    with (runs / "logged" / "metrics.csv").open(newline="") as stream:
        columns = next(csv.reader(stream))
    table = [line.split("|")[1] for line in GUIDE.splitlines() if re.match(r"\| `", line)]
    told = {name for cell in table for name in re.findall(r"`([a-z_]+)`", cell)}
    assert set(columns) <= told | {"loss_hard", "loss_soft"}
    assert columns[:3] == ["epoch", "stage", "learning_rate"]
