"""The guide on own teachers: its commands, read from the page, run as written; its table is that of the settings."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from kcdcache.cli import main
from kcdcache.networks import catalogue
from kcdcache.settings import STATISTICS
from kcdcache.store import reader

GUIDE = (Path(__file__).resolve().parent.parent / "docs/pages/guides/own-teacher.md").read_text()
BLOCKS = re.findall(r"(<!-- not run.*?-->\n)?```(\w+)\n(.*?)```", GUIDE, re.S)
LINES = [line for mark, kind, text in BLOCKS if kind == "sh" and not mark for line in text.splitlines()]


def test_the_commands_of_the_guide_run_as_written(tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text(next(text for _, kind, text in BLOCKS if kind == "python"))
    monkeypatch.chdir(tmp_path)
    try:
        for line in LINES:
            assert main._outcome([*shlex.split(line)[1:], "-q"]) == 0, line
    finally:
        catalogue.TYPED.clear()
        sys.modules.pop("my_networks", None)
    assert reader.open(tmp_path / "runs" / "store").knowledge.teacher.architecture == "my_networks:small"


@pytest.mark.parametrize("name", STATISTICS)
def test_the_table_of_statistics_is_that_of_the_settings(name):
    row = next(line for line in GUIDE.splitlines() if line.startswith(f"| `{name}` |"))
    for cell, numbers in zip(row.split("|")[2:4], STATISTICS[name], strict=True):
        assert [float(number) for number in cell.split(",")] == [round(number, 4) for number in numbers]
