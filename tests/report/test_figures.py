"""What a report's figures call their rows."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kcdcache.report import figures

NAMES = st.text(st.sampled_from("ab :,…"), max_size=90)


@settings(max_examples=50)
@given(st.lists(NAMES, max_size=8))
def test_names_that_differ_are_called_differently(names):
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
def test_what_all_begin_with_is_left_out_and_the_rest_cut_in_its_middle(names, expected):
    assert list(figures.short_names(names).values()) == expected


@pytest.mark.parametrize("length", [3, 20, 45, 90])
def test_a_legend_stays_inside_its_figure(length):
    labels = [f"{number}{'m' * (length - 1)}"[:length] for number in range(7)]
    handles = [plt.Line2D([], []) for _ in labels]
    with figures.styled():
        figure = plt.figure(figsize=(figures.WIDTH, 4), layout="constrained")
        figures.legend_below(figure, handles, [label.replace("m", "a") for label in labels])
        figure.canvas.draw()
        box = figure.legends[0].get_window_extent()
        plt.close(figure)
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_a_picture_is_a_png_of_its_size():
    picture = figures.drawn("cost", 2.0, lambda figure: figure.subplots().plot([1, 2]))
    image = Image.open(io.BytesIO(picture.png))
    assert image.size == (figures.WIDTH * figures.DOTS, 2.0 * figures.DOTS)
    assert np.asarray(image.convert("L")).min() < 128
