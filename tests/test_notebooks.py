"""The notebooks run top to bottom on a bare machine, and what they say of their numbers holds."""

import re

import executing
import pytest
from killing import finished

FIRST, VALUES, REUSE = "01_first_look", "02_what_values_say", "03_reuse_and_transfer"
EVERY = sorted(path.stem for path in executing.FOLDER.glob("*.ipynb"))
LARGEST = 300_000
"""bytes of a notebook with its outputs"""


def committed(name):
    return executing.read(executing.FOLDER / f"{name}.ipynb")


def number(text, pattern):
    """Return the number in the first group of the only place that the pattern fits."""
    found = re.findall(pattern, text)
    assert len(found) == 1, f"{pattern} fits {len(found)} times in:\n{text}"
    return float(found[0].replace(",", ""))


def check_first_look(text):
    assert number(text, r"teacher: test accuracy ([\d.]+) %") > 80
    assert number(text, r"([\d,]+) knowledge points") == 1437 * 4
    assert number(text, r"student: test accuracy ([\d.]+) %") > 80
    assert number(text, r"relative cost: ([\d.]+)") == 0.866
    assert number(text, r"teacher forwards during training: (\d+)") == 0
    # keep 0.7 of 1437, every dropped one mixed into one that is kept
    assert "1005 of 1437 samples kept: 573 in K_1H, 432 in K_Aug" in text


def check_values(text):
    assert number(text, r"value and teacher entropy: ([-\d.]+)") > 0.5
    assert number(text, r"right in all views: \d+ samples, median value ([\d.]+)") < number(
        text, r"wrong in some view: \d+ samples, median value ([\d.]+)"
    )
    fates = [int(count) for count in re.findall(r"^\w+ +(\d+) of 700 ", text, re.M)]
    assert (len(fates), sum(fates)) == (6, 700)
    for other in ("resnet8-seed1", "resnet14-seed0"):
        told = rf"resnet8-seed0 and {other}: rank correlation "
        assert number(text, told + r"([-\d.]+)") > 0.5
        assert number(text, told + r"[-\d.]+, sets differ by ([\d.]+)") < 0.3
    entropy, loss, teacher = (
        number(text, rf"{name} +AUC ([\d.]+)") for name in ("value by entropy", "value by loss", "teacher")
    )
    assert 0.4 < entropy < 0.75
    assert entropy < loss < teacher
    assert teacher > 0.9
    assert number(text, r"noisy-loss +keeps half of all samples, and (\d+)") > 40


def check_reuse(text):
    assert number(text, r"kept: (\d+) of 400") == 240
    assert number(text, r"rows of knowledge: (\d+) of 400") == 400
    assert "same weights, byte by byte: True" in text
    at = {
        (kind, int(keep)): float(mean)
        for kind, keep, mean in re.findall(r"^([\w ]+?) +(\d+) %: test accuracy ([\d.]+) ", text, re.M)
    }
    assert len(at) == 6
    assert min(at, key=at.get) == ("condensed", 30)
    assert at["condensed", 60] > at["everything", 100] - 8
    assert at["stratified", 30] > at["condensed", 30] + 10
    assert at["stratified", 30] < at["random", 30] + 5
    assert number(text, r"condensed minus random at 60 %: ([-+\d.]+) points") > 0
    assert number(text, r"condensed minus random at 30 %: ([-+\d.]+) points") < -5
    assert number(text, r"jaccard +([\d.]+)\n") > 0.5


CHECKS = {FIRST: check_first_look, VALUES: check_values, REUSE: check_reuse}
EPOCHS = {FIRST: 6, VALUES: 6, REUSE: 4}
"""in place of its 12, and 100 images in place of all: enough for every call, too few for what it says of its numbers"""


def test_every_notebook_is_run_and_checked():
    assert list(CHECKS) == EVERY


@pytest.mark.parametrize("name", EVERY)
def test_its_code_runs_on_a_few_images(start, tmp_path, name):
    code = "\n".join(cell.source for cell in executing.codes(committed(name)))
    small, places = re.subn(r'"digits(\?train=\d+&order=stored)?"', '"digits?train=100&test=60"', code)
    short, lengths = re.subn(r"\b(epochs\W+)12\b", rf"\g<1>{EPOCHS[name]}", small)
    assert places * lengths > 0
    short = re.sub("resnet(14|20)", "resnet8", short).replace("range(3)", "range(2)").replace("] * 3", "] * 2")
    short = short.replace("PrecomputeSettings(", "PrecomputeSettings(min_accuracy=0, ")  # it is a poor teacher
    how = {"MPLBACKEND": "Agg", "limits": {"folder": str(tmp_path)}}
    assert finished(start, short, tmp_path / "log", **how) == 0, (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", EVERY)
def test_run_anew_it_prints_and_draws_in_the_same_places_nothing_on_stderr_and_what_it_says_holds(tmp_path, name):
    def places(cells):
        return [(cell.id, [output.output_type for output in cell.outputs]) for cell in cells]

    notebook = committed(name)
    executing.execute(notebook, tmp_path)
    cells = executing.codes(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert {out.name for cell in cells for out in cell.outputs if out.output_type == "stream"} == {"stdout"}
    assert places(cells) == places(executing.codes(committed(name)))
    CHECKS[name](executing.texts(notebook))


@pytest.mark.parametrize("name", EVERY)
def test_its_outputs_are_of_the_code_it_shows_and_what_it_says_of_them_holds(name):
    notebook = committed(name)
    CHECKS[name](executing.texts(notebook))
    assert notebook.metadata["executed"] == executing.digest(notebook), "run `python tests/executing.py` and commit"
    cells = executing.codes(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


@pytest.mark.parametrize("name", EVERY)
def test_it_is_small_and_says_nothing_of_the_machine_it_was_run_on(name):
    text = (executing.FOLDER / f"{name}.ipynb").read_text()
    assert len(text) < LARGEST
    assert set(committed(name).metadata) == {*executing.METADATA, "executed"}
    assert re.findall(r"/(?:tmp|home|root|work|Users)/[^\"\\ ]*", text) == []
