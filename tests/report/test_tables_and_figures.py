"""What a report's tables show, and what its figures call their rows."""

import csv
import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kcdcache.errors import printable
from kcdcache.report import figures
from kcdcache.report.load import Loaded
from kcdcache.report.tables import SHOWN, Column, Table, every, shown


def table(rows, kind="number"):
    columns = (Column("name", "the name"), Column("value", "value (s)", kind))
    return Table(key="t", title="T", note="how to read", columns=columns, rows=rows)


def read(text):
    return list(csv.DictReader(io.StringIO(text)))


@settings(max_examples=20)
@given(st.text())
def test_a_text_is_one_printable_line_wherever_it_is_shown(text):
    made = table([{"name": text, "value": None}])
    cell = made.cells()[0][0]
    assert cell.isprintable()
    assert cell == printable(text)
    assert read(made.csv())[0]["name"].removeprefix("'") == printable(text).removeprefix("'")


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@sum"])
def test_no_text_is_a_formula_in_a_spreadsheet(text):
    assert read(table([{"name": text, "value": -1.5}]).csv()) == [{"name": f"'{text}", "value": "-1.5"}]


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("percent", 0.99537, "99.54"), ("signed", 0.1, "+0.100"), ("share", 0.8664, "0.866"),
        ("count", 25866.0, "25,866"), ("number", 0.0000012345, "1.234e-06"), ("seconds", 1234.56, "1,234.6"),
        ("text", 3, "3"), ("count", None, ""), ("percent", "many", "many"),
    ],
)  # fmt: skip
def test_how_numbers_are_shown(kind, value, text):
    assert shown(value, kind) == text


def test_every_column_is_shown_in_a_way_there_is_and_has_a_name_of_its_own():
    for made in every(Loaded((), (), (), ())).values():
        assert {column.kind for column in made.columns} <= set(SHOWN)
        assert len({column.name for column in made.columns}) == len(made.columns)


# figures


NAMES = st.text(st.sampled_from("ab :,…"), max_size=90)


@settings(max_examples=50)
@given(st.lists(NAMES, max_size=8))
def test_different_names_stay_different(names):
    called = figures.short_names(names)
    assert list(called) == list(dict.fromkeys(names))
    assert len(set(called.values())) == len(called)
    if any(len(label) > figures.LONGEST for label in called.values()):  # longer only where that tells two apart
        assert len({figures.short(label) for label in called.values()}) < len(called)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["4,000 images: KD", "4,000 images: KCD"], ["KD", "KCD"]),
        (["noise: KD", "clean: KD"], ["noise: KD", "clean: KD"]),
        (["only: this"], ["only: this"]),
        (["a: KD", "a: KD + KR", "KD"], ["a: KD", "a: KD + KR", "KD"]),
        ([f"{'x' * 40} one", f"{'x' * 40} two"], [f"{'x' * 16}…{'x' * 13} one", f"{'x' * 16}…{'x' * 13} two"]),
        ([f"{'x' * 20}{n}{'x' * 20}" for n in "12"], [f"{'x' * 20}{n}{'x' * 20}" for n in "12"]),
    ],
)
def test_a_common_beginning_is_left_out_and_the_rest_shortened(names, expected):
    assert list(figures.short_names(names).values()) == expected


@pytest.mark.parametrize("length", [3, 45, 90])
def test_a_legend_stays_inside_its_figure(length):
    with figures.styled():
        figure = plt.figure(figsize=(figures.WIDTH, 4), layout="constrained")
        axes = figure.subplots()
        for number in range(7):
            axes.plot([], [], label=f"{number}{'a' * (length - 1)}"[:length])
        figures.legend_below(figure, [axes])
        figure.canvas.draw()
        box = figure.legends[0].get_window_extent()
        plt.close(figure)
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_a_picture_is_a_webp_of_its_size():
    picture = figures.drawn("cost", 2.0, lambda figure: figure.subplots().plot([1, 2]))
    image = Image.open(io.BytesIO(picture.content))
    assert image.format == "WEBP"
    assert image.size == (figures.WIDTH * figures.DOTS, 2.0 * figures.DOTS)
    assert np.asarray(image.convert("L")).min() < 128
