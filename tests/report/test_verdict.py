"""The verdict: its words, the rows it compares, and the same sentences on the page and on the terminal."""

import dataclasses
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from reporting import ROWS, Page, grid

from kcdcache.cli import main
from kcdcache.commands import TextTable
from kcdcache.errors import printable
from kcdcache.report import figures, load, verdict
from kcdcache.report.page import write
from kcdcache.report.verdict import Verdict

GUIDE = Path(__file__).parents[2] / "docs/pages/guides/report.md"
ONE = Verdict("KCD", "KD", True, 3, -0.46, -1.52, 0.59, 0.87)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return grid(tmp_path_factory.mktemp("verdict"))


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (-1.52, 0.59, "cannot be told apart"), (0.1, 0.9, "wins"), (-0.9, -0.1, "loses"),
        (0.0, 0.9, "cannot be told apart"), (0.0, 0.0, "equal in every pair"),
        (None, None, "one pair only, so nothing can be said"),
    ],
)  # fmt: skip
def test_the_words_follow_the_interval(low, high, outcome):
    one = ONE._replace(low=low, high=high)
    assert one.outcome == outcome
    assert one.text.endswith(f"n = 3: {outcome}")
    assert ("[" in one.text) == (low is not None)


def test_the_sentence_names_difference_interval_samples_and_pairs(place):
    known = load.read([place.folder])
    (found,) = verdict.chosen(verdict.every(known))
    paired = {seed: [] for seed in (0, 1)}
    for run in known.runs:
        if run.step in ("kd", "kcd") and run.seed in paired:
            paired[run.seed].append((run.step, run.summary))
    both = [dict(pair) for pair in paired.values()]
    mean = 50 * sum(pair["kcd"].accuracy_last - pair["kd"].accuracy_last for pair in both)
    share = sum(pair["kcd"].student_samples for pair in both) / sum(pair["kd"].student_samples for pair in both)
    assert (found.row, found.reference, found.n, found.condensed) == (ROWS["kcd"], ROWS["kd"], 2, True)
    assert (found.mean, found.share) == (pytest.approx(mean), pytest.approx(share))


def test_a_random_control_of_as_many_samples_is_compared_with_too(place):
    known = load.read([place.folder])
    runs = []
    for run in known.runs:
        runs.append(run)
        if run.step == "kcd":
            record = run.record.model_copy(update={"settings": {**run.record.settings, "ranking": "random"}})
            path = run.path.with_name(f"control-seed{run.seed}")
            runs.append(dataclasses.replace(run, step="control", path=path, record=record))
    found = verdict.every(known._replace(runs=tuple(runs)))
    pairs = {(one.row, one.reference): one for one in found}
    control = pairs[ROWS["kcd"], "control"]
    assert (control.mean, control.share, control.outcome) == (0.0, 1.0, "equal in every pair")
    assert not pairs["control", ROWS["kd"]].condensed  # a control has none of its own
    assert {one.row for one in verdict.chosen(found)} == {ROWS["kcd"]}


def test_page_json_and_terminal_say_the_same(place, tmp_path, capsys):
    out = tmp_path / "r.html"
    with pytest.raises(SystemExit):
        main.main(["report", str(place.folder), "--out", str(out), "-q"])
    printed = capsys.readouterr().out
    (sentence,) = write([place.folder], out)["verdict"]
    assert printable(sentence) in printed
    page = Page(out.read_text())
    assert printable(sentence) in [text.strip() for text in page.texts["p"]]
    assert next(attributes["id"] for tag, attributes in page.elements if tag == "h2") == "verdict"


def test_one_pair_has_no_interval_and_one_run_no_verdict(place, tmp_path):
    for name in ("kd-seed0", "kcd-seed0"):
        shutil.copytree(place.folder / name, tmp_path / "two" / name)
    (sentence,) = write([tmp_path / "two"], tmp_path / "r.html")["verdict"]
    assert re.search(r"points against .*; n = 1: one pair only, so nothing can be said$", sentence)
    assert write([tmp_path / "two" / "kd-seed0"], tmp_path / "r.html")["verdict"] == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""), ({"low": None, "high": None}, " A point without a bar is a single pair of runs."),
        (
            {"mean": 0.0, "low": 0.0, "high": 0.0},
            " A point without a bar has the same difference in every pair.",
        ),
    ],
)  # fmt: skip
def test_the_caption_explains_a_missing_bar_only_if_there_is_one(changed, said):
    assert figures.forest([ONE._replace(**changed)]).caption.endswith(f"others grey.{said}")


def test_a_figure_of_any_height_fits_its_format(monkeypatch):
    monkeypatch.setattr(figures, "TALLEST", 300)
    picture = figures.drawn("cost", 5.0, lambda figure: figure.subplots().plot([1, 2]))
    assert Image.open(io.BytesIO(picture.content)).height == 300


def test_a_wide_table_loses_columns_in_order_until_it_fits():
    table = TextTable(["", "a", "b", "c"], [["row", "1" * 20, "2" * 30, "3" * 40]], left=1, rule=True)
    assert table.fitted(["b", "a"], 99).head == ("", "a", "b", "c")
    assert table.fitted(["b", "a"], 80).head == ("", "a", "c")
    assert table.fitted(["b", "a"], 50).head == ("", "c")
    assert max(map(len, table.fitted(["b", "a"], 50).split("\n"))) <= 50


def test_the_commands_of_the_guide_run(place, tmp_path, monkeypatch):
    shutil.copytree(place.folder, tmp_path / "runs/digits")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^kcdcache (report .*)$", GUIDE.read_text(), re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main.main([*shlex.split(command), "-q"])
        assert stop.value.code == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"digits.html", "two.html", "digits.json", "digits-tables"}
    assert ONE.text in GUIDE.read_text()
