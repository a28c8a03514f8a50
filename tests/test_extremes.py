"""Huge numbers, extreme temperatures, equal logits, one class, hardly any samples (M7)."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from lessons import CPU, opinionated, precomputed
from pupils import distilled

from kcdcache.condensation import manifest, value_files
from kcdcache.datasets import datasets
from kcdcache.errors import SettingsError
from kcdcache.methods.losses import cross_entropy, entropy, soft_divergence
from kcdcache.networks import registry
from kcdcache.networks.input_transform import InputTransform
from kcdcache.runs.state import read_metrics
from kcdcache.store import encoding
from kcdcache.teacher import teacher
from kcdcache.views.mixing import mix_probabilities

TEMPERATURES = [1e-3, 0.5, 1.0, 4.0, 1e3, 1e6]
ENCODINGS = ["float32", "float16", "top:1", "top:all"]
HUGE = float(np.finfo(np.float32).max)


def tables(limit):
    shapes = st.tuples(st.integers(1, 4), st.integers(1, 7))
    return shapes.flatmap(lambda shape: arrays(np.float32, shape, elements=st.floats(-limit, limit, width=32)))


def form(text, classes):
    return encoding.parse(text.replace("all", str(classes)), "logits", (classes,))


def decoded(text, z, temperature=1.0):
    made = form(text, z.shape[1])
    return made.decode({name: torch.from_numpy(rows) for name, rows in made.encode(z).items()}, temperature)


@settings(max_examples=30)
@given(tables(HUGE), st.sampled_from(ENCODINGS), st.sampled_from(TEMPERATURES))
def test_no_finite_logits_are_stored_or_read_as_anything_else(z, text, temperature):
    made = form(text, z.shape[1])
    stored = made.encode(torch.from_numpy(z))
    for array in made.arrays:
        if array.dtype != "uint16":
            assert np.isfinite(stored[array.name]).all()
    assert torch.isfinite(decoded(text, torch.from_numpy(z), temperature)).all()


@pytest.mark.parametrize("text", ENCODINGS)
def test_equal_logits_are_uniform_and_one_class_is_certain_in_every_encoding(text):
    kept = 1e-3 if text == "top:1" else 1e-6  # the logarithm of six classes' mass is stored within 2^-11 of itself
    for level, temperature in product((0.0, -7.5, 1e5, -3e38, 3e38), TEMPERATURES):
        target = decoded(text, torch.full((3, 7), level), temperature) / max(temperature, 1.0)  # no float32 is 3e41
        torch.testing.assert_close(target.softmax(1), torch.full((3, 7), 1 / 7), rtol=kept, atol=0)
        z = torch.full((4, 1), level)
        assert torch.equal(decoded(text, z).softmax(1), torch.ones(4, 1))
        assert torch.equal(entropy(z), torch.zeros(4))
        assert torch.equal(cross_entropy(z, torch.zeros(4, dtype=torch.long), 0.1), torch.zeros(4))
        assert torch.equal(soft_divergence(z, torch.ones(4, 1), 4.0), torch.zeros(4))


@settings(max_examples=30)
@given(tables(1e6), st.sampled_from(TEMPERATURES), st.integers(0, 99))
def test_the_divergence_is_that_of_float64_at_extreme_temperatures(z, temperature, seed):
    drawn = np.random.default_rng(seed).normal(0, 3, z.shape)
    target = reference.softmax(drawn, axis=1).astype(np.float32)
    found = soft_divergence(torch.from_numpy(z), torch.from_numpy(target), temperature).double().numpy()
    expected = reference.soft(z.astype(np.float64), target.astype(np.float64), temperature)
    scale = temperature**2 + temperature * np.abs(z).max(1)  # what float32 rounds
    assert np.all(np.abs(found - expected) <= 2e-6 * scale * len(z[0]))


@given(tables(1e4), st.sampled_from(TEMPERATURES), st.sampled_from([0.0, 0.3, 1.0]))
def test_mixed_targets_are_probabilities_at_every_temperature(z, temperature, share):
    one, other = torch.from_numpy(z), torch.from_numpy(z[:, ::-1].copy())
    epsilon = torch.full((len(z),), share)
    for rule in ("linear_prob", "linear_logit", "keep"):
        found = mix_probabilities(one, other, epsilon, rule, temperature)
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found.sum(1), torch.ones(len(z)))
    soft, mirrored = (reference.softmax(rows.astype(np.float64) / temperature, axis=1) for rows in (z, other.numpy()))
    expected = (1 - share) * soft + share * mirrored
    linear = mix_probabilities(one, other, epsilon, "linear_prob", temperature)
    rounding = 1e-6 + min(2.0**-22 * float(np.abs(z).max()) / temperature, 1.0)
    np.testing.assert_allclose(linear, expected, atol=rounding)


def few(root, count, classes):
    """Data of `count` random images, a teacher and its store."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count + 4, 16, 16, 3), np.uint8)
    labels = np.arange(count + 4) % classes
    columns = {"train_images": images[:count], "train_labels": labels[:count]}
    np.savez(root / "few.npz", **columns, test_images=images[count:], test_labels=labels[count:])
    dataset = datasets.load(f"arrays:{root / 'few.npz'}")
    module = opinionated(registry.build("resnet8", classes, 0))
    network = teacher.freeze(module, InputTransform(dataset.mean, dataset.std), "resnet8", dataset.classes, CPU)
    return SimpleNamespace(data=dataset, knowledge=precomputed(root / "store", dataset, network))


@pytest.mark.parametrize(("count", "classes", "keep"), [(2, 1, 1.0), (5, 2, 0.4), (40, 1, 0.5)])
def test_a_whole_run_on_hardly_anything_ends_with_numbers(tmp_path, count, classes, keep):
    """Fewer samples than a batch or a chunk holds; of one class, whose losses and values are all zero."""
    place = few(tmp_path, count, classes)
    summary = distilled(place, tmp_path / "run", keep=keep, epochs=2, stages=2)
    rows = read_metrics(tmp_path / "run")
    numbers = [number for row in rows for number in row.document().values() if isinstance(number, float)]
    assert len(numbers) > 4
    assert np.isfinite(numbers).all()
    assert summary["kept"] == int(keep * count)
    found = value_files.read(tmp_path / "run" / "values.parquet", count).values
    assert np.isfinite(found.value).all()
    if classes == 1:
        assert (found.value == 0).all()
        last = manifest.read(tmp_path / "run" / summary["condensed_set"])
        assert last.index.tolist() == list(range(len(last)))


@pytest.mark.parametrize(("count", "keep"), [(1, 1.0), (3, 0.4)])
def test_a_set_of_one_sample_is_refused_before_training(tmp_path, count, keep):
    place = few(tmp_path, count, 1)
    with pytest.raises(SettingsError, match="a set of 1 sample to train on: batch statistics need at least 2"):
        distilled(place, tmp_path / "run", keep=keep, epochs=2, stages=2)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
