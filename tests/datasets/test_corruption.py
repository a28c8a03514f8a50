"""Label noise and class imbalance: the laws of facts.md section 2, on labels, on data specs and on recipes."""

import json
import math

import numpy as np
import pytest
from datasets_on_disk import write_folder, write_hub, write_npz
from hypothesis import given
from hypothesis import strategies as st

from kcdcache.cli import main
from kcdcache.datasets import datasets
from kcdcache.datasets.label_noise import Corruption, applied, class_sizes, first_of_each, frequent, noisy
from kcdcache.datasets.spec import FORMS, extended, parse
from kcdcache.errors import SettingsError
from kcdcache.recipes import recipe

MANY = 200_000

# counts of facts.md section 2: those of CIFAR-10, and the sums for 100 classes of 500 to 25
PUBLISHED = {
    0.2: [5000, 858, 557, 439, 375, 333, 304, 282, 264, 250],
    0.6: [5000, 1166, 720, 539, 440, 376, 331, 297, 271, 250],
    1.0: [5000, 1607, 957, 682, 529, 433, 366, 317, 280, 250],
    2.0: [5000, 3173, 1972, 1289, 892, 648, 490, 382, 306, 250],
}
SUMS = {1.5: 12186, 10: 35188}
SUMS_OF_100 = {0.2: 4282, 0.6: 5759, 1.0: 8072, 1.5: 11646, 2.0: 15214}


def reference_sizes(classes, gamma, n_max, n_min):
    """a and b by solving the two linear equations a - n b = n c^gamma for c = 1 and c = C."""
    (a1, b1, r1), (a2, b2, r2) = ((1, -n, n * c**gamma) for n, c in ((n_max, 1), (n_min, classes)))
    det = a1 * b2 - a2 * b1
    a, b = (r1 * b2 - r2 * b1) / det, (a1 * r2 - a2 * r1) / det
    return [round(a / (b + c**gamma)) for c in range(1, classes + 1)]


def labels_of(count, classes, seed=0):
    return np.random.default_rng(seed).integers(0, classes, count)


def test_class_sizes_are_those_of_the_protocol():
    assert {gamma: class_sizes(10, gamma, 5000, 250).tolist() for gamma in PUBLISHED} == PUBLISHED
    assert {gamma: class_sizes(10, gamma, 5000, 250).sum() for gamma in SUMS} == SUMS
    assert {gamma: class_sizes(100, gamma, 500, 25).sum() for gamma in SUMS_OF_100} == SUMS_OF_100
    assert class_sizes(4, 0.6, 7, 7).tolist() == [7, 7, 7, 7]


@given(st.integers(2, 60), st.floats(0.05, 6), st.integers(20, 900), st.integers(1, 19))
def test_class_sizes_fall_from_n_max_to_n_min_and_equal_a_solved_reference(classes, gamma, n_max, n_min):
    found = class_sizes(classes, gamma, n_max, n_min).tolist()
    assert (found[0], found[-1]) == (n_max, n_min)
    assert found == sorted(found, reverse=True)
    assert max(abs(a - b) for a, b in zip(found, reference_sizes(classes, gamma, n_max, n_min), strict=True)) <= 1


def test_the_first_samples_of_each_class_are_kept_in_their_order():
    labels, sizes = labels_of(300, 5), np.array([30, 20, 0, 7, 1])
    seen, expected = dict.fromkeys(range(5), 0), []
    for position, label in enumerate(labels.tolist()):
        if seen[label] < sizes[label]:
            expected.append(position)
        seen[label] += 1
    assert first_of_each(labels, sizes).tolist() == expected


@pytest.mark.parametrize("redraw", [True, False])
@pytest.mark.parametrize("rate", [0.2, 0.4, 0.6, 1.0])
def test_labels_become_wrong_at_the_stated_rate_and_evenly_over_the_others(rate, redraw):
    classes = 10
    labels, index = labels_of(MANY, classes), np.arange(MANY)
    found = noisy(labels, index, classes, Corruption(noise=rate, redraw=redraw))
    expected = rate * (classes - 1) / classes if redraw else rate
    deviation = 5 * math.sqrt(expected * (1 - expected) / MANY) + 1e-12
    assert abs((found != labels).mean() - expected) <= deviation
    shifts = np.bincount((found - labels)[found != labels] % classes, minlength=classes)[1:]
    assert abs(shifts / shifts.sum() - 1 / (classes - 1)).max() < 0.005
    assert found.min() >= 0
    assert found.max() < classes


def test_without_noise_nothing_changes_and_more_noise_only_adds_changes():
    labels, index = labels_of(2000, 10), np.arange(2000)
    found = {rate: noisy(labels, index, 10, Corruption(noise=rate)) for rate in (0.0, 0.2, 0.4, 0.6)}
    assert np.array_equal(found[0.0], labels)
    for low, high in ((0.2, 0.4), (0.4, 0.6)):
        changed = found[low] != labels
        assert np.array_equal(found[high][changed], found[low][changed])


def test_a_samples_noise_depends_on_its_number_and_the_seed_alone():
    labels, index = labels_of(2000, 10), np.arange(2000)
    whole, some = noisy(labels, index, 10, Corruption(noise=0.4)), np.array([5, 1999, 77])
    assert np.array_equal(noisy(labels[some], some, 10, Corruption(noise=0.4)), whole[some])
    assert np.array_equal(noisy(labels, index, 10, Corruption(noise=0.4)), whole)
    other = noisy(labels, index, 10, Corruption(noise=0.4, noise_seed=1))
    assert 0.3 < (other != whole).mean() < 0.8


def test_noise_comes_after_imbalance_and_is_that_of_the_whole_split():
    labels = labels_of(3000, 6)
    rows, given = applied(labels, 6, Corruption(noise=0.4, gamma=0.6, n_max=200, n_min=10))
    assert np.bincount(labels[rows]).tolist() == class_sizes(6, 0.6, 200, 10).tolist()
    everywhere = applied(labels, 6, Corruption(noise=0.4))[1]
    assert np.array_equal(given, everywhere[rows])


def test_the_usual_bounds_are_the_smallest_class_and_a_twentieth_of_it():
    assert Corruption(gamma=0.6).settled(np.full(10, 5000)) == Corruption(gamma=0.6, n_max=5000, n_min=250)
    assert Corruption(gamma=0.6).settled(np.array([40, 25, 33])) == Corruption(gamma=0.6, n_max=25, n_min=1)
    assert Corruption(noise=0.1).settled(np.array([3, 4])) == Corruption(noise=0.1)


def test_a_document_tells_what_is_in_force_only():
    assert Corruption().document() == {}
    assert Corruption(noise=0.4).document() == {"noise": 0.4, "noise_seed": 12345, "redraw": True}
    assert Corruption(gamma=0.6, n_max=9, n_min=1).document() == {"gamma": 0.6, "n_max": 9, "n_min": 1}


def test_frequent_classes_are_the_largest_that_hold_half_of_all():
    assert frequent(np.array([10, 50, 30, 5, 5])).tolist() == [False, True, False, False, False]
    assert frequent(np.array([10, 40, 40, 5, 5])).tolist() == [False, True, True, False, False]
    assert frequent(np.array([5, 5, 5, 5])).tolist() == [True, True, False, False]


# data specs


def test_a_corrupted_split_keeps_true_labels_and_leaves_the_test_split_alone():
    clean, found = datasets.load("digits"), datasets.load("digits?noise=0.4&noise_seed=7&redraw=false")
    assert np.array_equal(found.train.clean_labels, clean.train.labels)
    expected = noisy(clean.train.labels, np.arange(len(clean.train)), 10, found.corruption)
    assert np.array_equal(found.train.labels, expected)
    assert found.test.digest() == clean.test.digest()
    assert found.test.clean_labels is None
    assert found.corruption == Corruption(noise=0.4, noise_seed=7, redraw=False)
    assert clean.train.clean_labels is None
    assert not clean.corruption


def test_every_option_changes_the_datas_identity():
    specs = ("", "?noise=0.4", "?noise=0.2", "?noise=0.4&noise_seed=1", "?noise=0.4&redraw=false", "?gamma=0.6",
             "?gamma=0.6&n_min=2", "?gamma=0.6&noise=0.4")  # fmt: skip
    assert len({datasets.load(f"digits{spec}").identity().digest for spec in specs}) == len(specs)


WRITERS = [write_hub, write_folder, lambda path: write_npz(path / "a.npz"), lambda path: "digits"]


@pytest.mark.parametrize("write", WRITERS)
def test_any_kind_of_data_can_be_corrupted(tmp_path, write):
    spec = write(tmp_path)
    clean, found = datasets.load(spec), datasets.load(f"{spec}?noise=1&redraw=false&gamma=1&n_max=2&n_min=1")
    sizes = class_sizes(len(clean.classes), 1, 2, 1)
    rows = first_of_each(clean.train.labels, sizes)
    assert np.array_equal(found.train.clean_labels, clean.train.labels[rows])
    assert (found.train.labels != found.train.clean_labels).all()
    assert np.bincount(found.train.clean_labels).tolist() == sizes.tolist()
    assert found.train.source.place(1) == clean.train.source.place(int(rows[1]))
    pairs = zip(found.train.images(np.arange(len(rows))), clean.train.images(rows), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digits?noise=1.5", r"'noise' in data spec 'digits\?noise=1.5': .* less than or equal to 1; found '1.5'"),
        ("digits?noise=nan", r"'noise' in data spec .*: .*finite number"),
        ("digits?gamma=0", r"'gamma' in .* greater than or equal to 0.001"),
        ("digits?n_max=0&gamma=1", r"'n_max' in .* greater than or equal to 1"),
        ("digits?noise=0.4&redraw=perhaps", r"'redraw' in .* valid boolean"),
        ("digits?noise=0.4&noise=0.2", r"gives noise twice"),
        ("digits?redraw=true", r"redraw in data spec .* does nothing without noise; leave it out"),
        ("digits?noise=0.4&n_max=5", r"n_max in data spec .* does nothing without gamma; leave it out"),
        ("digits?nois=0.4", r"unknown option 'nois' in data spec .*; did you mean 'noise'"),
        ("condensed:x?noise=0.4", r"an exported set has the labels and classes its students saw"),
        ("digits?train=10&gamma=2", r"data spec 'digits\?train=10&gamma=2': gamma has nothing to thin out: class 0 has "
                                    r"only 1 samples, and n_max is the size of the smallest class"),
        ("digits?gamma=1&n_max=900", r"gamma asks for 900 samples of class 0, which has \d+; give n_max and"),
        ("digits?gamma=1&n_max=5&n_min=9", "class sizes run from n_max down to n_min; found n_max=5, n_min=9"),
    ],
)  # fmt: skip
def test_options_that_are_wrong_or_idle_or_cannot_be_met_are_refused_with_the_spec(spec, message):
    with pytest.raises(SettingsError, match=message):
        datasets.load(spec)


def test_one_class_cannot_be_corrupted():
    with pytest.raises(SettingsError, match="need two classes or more"):
        applied(np.zeros(5, np.int64), 1, Corruption(noise=0.5))


def test_a_sweep_over_rates_may_begin_at_none():
    assert not parse("digits?noise=0&noise_seed=7&redraw=false").options.corruption
    none, plain = (datasets.load(f"digits?train=50{option}") for option in ("&noise=0&noise_seed=7", ""))
    assert none.identity() == plain.identity()


def test_options_are_added_to_a_spec_whose_limits_stay():
    assert extended("digits", "") == "digits"
    assert extended("digits", "noise=0.4") == "digits?noise=0.4"
    assert extended("digits?test=9&train=50", "train=4000&noise=0.4") == "digits?test=9&train=50&noise=0.4"
    assert extended("digits?train=9", "train=4000&order=stored") == "digits?train=9"
    assert extended("digits?train=9", "test=8&order=stored") == "digits?train=9&test=8&order=stored"
    assert extended("digits?train=9&order=stored", "train=4&order=balanced") == "digits?train=9&order=stored"
    assert extended("digits", "order=stored") == "digits?order=stored"
    with pytest.raises(SettingsError, match=r"has noise already, and 'noise=0.4' is to be added; give it once"):
        extended("digits?noise=0.2", "noise=0.4")


def test_every_kind_of_data_has_a_loader_and_a_form():
    assert datasets.LOADERS.keys() | {"condensed"} == FORMS.keys()  # exported sets are opened above this room


# recipes


def planned(folder, text, data=None):
    (folder / "r.toml").write_text(text)
    loaded = recipe.load(folder / "r.toml")
    return recipe.planned(loaded.model_copy(update={"data": data or loaded.data}), folder / "out")


def test_a_steps_own_limit_stands_instead_of_train_images_and_other_options_are_added(tmp_path):
    text = 'title = "t"\ndata = "digits?test=9"\ntrain_images = 100\n'
    text += '[[step]]\nname = "a"\nrun = "fit"\nmodel = "resnet8"\n'
    text += '[[step]]\nname = "b"\nrun = "fit"\nmodel = "resnet8"\ndata_options = "train=200&noise=0.4"\n'
    text += '[[step]]\nname = "c"\nrun = "fit"\nmodel = "resnet8"\ndata_options = "noise=0.4"\n'
    found = [[step["data"] for step in planned(tmp_path, text, given)] for given in (None, "digits?train=50")]
    assert found[0] == [
        "digits?test=9&train=100", "digits?test=9&train=200&noise=0.4", "digits?test=9&noise=0.4&train=100"
    ]  # fmt: skip
    assert found[1] == ["digits?train=50", "digits?train=50&noise=0.4", "digits?train=50&noise=0.4"]


def test_lists_in_a_pair_stand_for_a_pair_with_each_item(tmp_path):
    text = 'title = "t"\ndata = "digits"\n[[pair]]\nname = "clean"\noptions = "train=9"\nwidth = ["8", "14"]\n'
    text += '[[pair]]\nname = ["n2", "n4"]\noptions = "noise=0.2"\nwidth = ["8", "14"]\n'
    text += '[[step]]\nname = "{name}-{width}"\nrun = "fit"\nmodel = "resnet{width}"\ndata_options = "{options}"\n'
    found = [(step["step"], step["model"], step["data"]) for step in planned(tmp_path, text)]
    assert found == [
        ("clean-8", "resnet8", "digits?train=9"), ("clean-14", "resnet14", "digits?train=9"),
        ("n2-8", "resnet8", "digits?noise=0.2"), ("n2-14", "resnet14", "digits?noise=0.2"),
        ("n4-8", "resnet8", "digits?noise=0.2"), ("n4-14", "resnet14", "digits?noise=0.2"),
    ]  # fmt: skip


def test_what_will_be_done_to_the_labels_is_told_before_anything_runs(capsys, tmp_path):
    words = ["fit", "--data", "digits?train=100&noise=0.5", "--model", "resnet8", "--out", str(tmp_path / "t")]
    assert main._outcome([*words, "--dry-run", "--json", "-q"]) == 0
    told = json.loads(capsys.readouterr().out)
    split = datasets.load("digits?train=100&noise=0.5").train
    assert told["mislabelled"] == int((split.labels != split.clean_labels).sum()) > 30
    assert not (tmp_path / "t").exists()
