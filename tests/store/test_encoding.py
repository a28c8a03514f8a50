import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kcdcache.errors import NonFiniteError, SettingsError
from kcdcache.store import encoding

SCALES = st.sampled_from([1e-6, 1e-3, 1.0, 7.0, 50.0, 3000.0, 1e6])


@st.composite
def logits(draw, fewest=1):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (draw(st.integers(1, 6)), draw(st.integers(fewest, 30)))
    ties = draw(st.booleans())
    z = rng.normal(0, draw(SCALES), shape) + draw(st.sampled_from([0.0, -30.0, 1e4]))
    return torch.from_numpy((np.round(z) if ties else z).astype(np.float32))


def peaked(rows=64, classes=1000, seed=0):
    """Logits with a heavy tail and a maximum probability of about 0.8, as an ImageNet teacher gives."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1.6, (rows, classes))
    z[np.arange(rows), rng.integers(0, classes, rows)] += rng.normal(13, 2, rows)
    return torch.from_numpy(z.astype(np.float32))


def round_trip(text, z, temperature=1.0, field="logits"):
    form = encoding.parse(text, field, tuple(z.shape[1:]))
    stored = {name: torch.from_numpy(rows) for name, rows in form.encode(z).items()}
    return form.decode(stored, temperature)


def soft(z, temperature=1.0):
    scaled = np.asarray(z, np.float64) / temperature
    scaled -= scaled.max(1, keepdims=True)
    return np.exp(scaled) / np.exp(scaled).sum(1, keepdims=True)


def divergence(p, q):
    terms = np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))), 0)
    return terms.sum(1)


@settings(max_examples=20)
@given(logits())
def test_float32_is_exact(z):
    assert torch.equal(round_trip("float32", z), z)


def test_uint8_keeps_whole_255ths_and_every_number_in_0_to_1_within_half_of_one():
    whole = (torch.arange(256).double() / 255).float()[None]
    assert torch.equal(round_trip("uint8", whole, field="images"), whole)
    drawn = torch.rand(4, 1000, generator=torch.Generator().manual_seed(0))
    off = (round_trip("uint8", drawn, field="images").double() - drawn.double()).abs()
    assert 0.99 / 510 < float(off.max()) <= 1 / 510 + 1e-7


@settings(max_examples=37)
@given(logits())
def test_float16_logits_keep_the_gap_bound(z):
    stored = encoding.parse("float16", "logits", (z.shape[1],)).encode(z)
    exact = z.double().numpy()
    gap = np.minimum(exact.max(1, keepdims=True) - exact, 65504)
    assert np.all(np.abs(-stored["logits"].astype(np.float64) - gap) <= 2**-11 * gap + 2**-25)
    np.testing.assert_array_equal(stored["logits_rowmax"], z.numpy().max(1))


@settings(max_examples=25)
@given(logits(), st.sampled_from([0.5, 1.0, 4.0]))
def test_float16_logits_keep_the_divergence_bound(z, temperature):
    stored = encoding.parse("float16", "logits", (z.shape[1],)).encode(z)
    p = soft(z.numpy(), temperature)
    gap = (z.double().numpy().max(1, keepdims=True) - z.double().numpy()) / temperature
    with np.errstate(over="ignore", invalid="ignore"):
        bound = 2**-23 * np.nansum(p * gap**2 * np.exp(gap / 2048), 1)
    assert np.all(divergence(p, soft(stored["logits"], temperature)) <= bound + 1e-12)


@pytest.mark.parametrize("text", ["float16", "top:3"])
def test_large_logits_are_no_fault_and_far_apart_ones_are_clipped_and_finite(text):
    assert torch.isfinite(round_trip(text, torch.tensor([[0.0, -1e30, 3e38], [-3.4e38, 3.4e38, 0.0]]))).all()
    z = torch.tensor([[0.0, -1e30, 1e6], [-3e38, 70000.0, 0.0], [1e5, 99990.0, 0.0], [-1e5, -1e5, -2e5]])
    np.testing.assert_array_equal(soft(round_trip(text, z)), soft(z))


@settings(max_examples=20)
@given(logits())
def test_float16_features_keep_the_relative_bound(z):
    x = z.clamp(-65504, 65504)
    error = (round_trip("float16", x, field="penultimate") - x).abs()
    assert torch.all(error <= 2**-11 * x.abs() + 2**-25)


@pytest.mark.parametrize("text", ["float16", "float32", "top:2"])
def test_rows_that_are_not_finite_are_named(text):
    z = torch.zeros(12, 3)
    z[[3, 11], 1] = torch.tensor([math.nan, -math.inf])
    with pytest.raises(NonFiniteError, match="'logits' is not finite for samples 3, 11 "):
        encoding.parse(text, "logits", (3,)).encode(z)
    with pytest.raises(NonFiniteError, match="0, 1, 2, 3, 4, 5, 6, 7 and 12 more"):
        encoding.parse(text, "logits", (3,)).encode(torch.full((20, 3), math.inf))


@settings(max_examples=25)
@given(logits(2), st.integers(1, 30), st.sampled_from([0.3, 1.0, 4.0, 20.0]))
def test_top_keeps_the_largest_with_ties_by_class_and_their_gaps_at_any_temperature(z, kept, temperature):
    kept = min(kept, z.shape[1])
    packed = encoding.parse(f"top:{kept}", "logits", (z.shape[1],)).encode(z)["logits"]
    for row, values in zip(packed, z.numpy(), strict=True):
        assert row[:kept].tolist() == sorted(range(len(values)), key=lambda c: (-values[c], c))[:kept]
    decoded = round_trip(f"top:{kept}", z, temperature).double().numpy()
    exact = z.double().numpy()
    order = np.argsort(-exact, 1, kind="stable")[:, :kept]
    gap = np.minimum(exact.max(1, keepdims=True) - exact, 65504)
    error = np.abs(-decoded - gap)
    assert np.all(np.take_along_axis(error - 2**-11 * gap - 2**-25, order, 1) <= 0)


def true_log_mean(z, kept, t):
    """log mean exp(t gap) of the tail in float64, the slow way."""
    gaps = -np.sort(-(z.double().numpy()), 1)
    gaps = (gaps - gaps[:, :1])[:, kept:]
    return np.array([row.max() * t + math.log(np.mean(np.exp(t * (row - row.max())))) for row in gaps])


@settings(max_examples=37)
@given(logits(3), st.integers(1, 2), st.sampled_from([0.25, 1.0, 2.0, 4.0, 50.0]))
def test_top_keeps_the_tail_within_bounds_that_hold_the_truth(z, kept, temperature):
    z = z.clamp(z.max() - 30000, z.max())
    tail = np.sort(z.double().numpy() - z.double().numpy().max(1, keepdims=True), 1)[:, : z.shape[1] - kept]
    found = round_trip(f"top:{kept}", z, temperature).double().numpy().min(1) / temperature
    t, at_one, mean = 1 / temperature, true_log_mean(z, kept, 1.0), tail.mean(1)
    largest = np.sort(z.double().numpy() - z.double().numpy().max(1, keepdims=True), 1)[:, -kept]
    low, high = (mean * t, t * at_one) if t <= 1 else (t * at_one, at_one + (t - 1) * largest)
    low = at_one if t == 1 else np.minimum(low, largest * t)  # at temperature 1 the tail's mass is kept
    slack = 2**-10 * t * (np.abs(mean) + np.abs(at_one) + np.log(30) + np.abs(largest)) + 1e-5
    assert np.all((found >= low - slack) & (found <= high + slack))
    truth = true_log_mean(z, kept, t)
    assert np.all((truth >= low - 1e-6 - 1e-9 * np.abs(low)) & (truth <= high + 1e-6 + 1e-9 * np.abs(high)))


@pytest.mark.parametrize(("temperature", "ratio"), [(1.0, 1.0), (2.0, 5.0), (4.0, 10.0), (8.0, 10.0)])
def test_top_is_far_closer_than_renormalised_top(temperature, ratio):
    z = peaked()
    p = soft(z, temperature)
    ours = divergence(p, soft(round_trip("top:16", z, temperature), temperature)).mean()
    mass = np.sort(p, 1)[:, -16:].sum(1)
    renormalised = -np.log(mass).mean()  # KL(q||p) of renormalised top-k; KL(p||q) is infinite
    assert ours * ratio < renormalised
    assert divergence(p, soft(round_trip("float16", z), temperature)).mean() < 1e-6  # of a usual teacher
    uniform_within = np.sort(p, 1)[:, :-16]
    spread = uniform_within.mean(1, keepdims=True).repeat(uniform_within.shape[1], 1)
    floor = (uniform_within * np.log(uniform_within / spread)).sum(1).mean()
    assert ours < floor + 2e-3  # nothing but the tail's inner shape is lost


def test_top_ids_beyond_the_signed_range_survive():
    z = torch.zeros(1, 2**16)
    z[0, [65535, 40000]] = torch.tensor([9.0, 8.0])
    decoded = round_trip("top:2", z)
    assert decoded[0].topk(3).indices.tolist()[:2] == [65535, 40000]
    assert decoded[0, 65535] == 0
    assert decoded[0, 40000] == -1


def test_decoding_gives_a_tensor_of_its_own():
    stored = {"logits": torch.zeros(2, 3)}
    encoding.parse("float32", "logits", (3,)).decode(stored).fill_(7)
    assert stored["logits"].abs().sum() == 0


def test_statistics_count_what_is_not_finite():
    values = torch.tensor([[1.0, math.nan], [-2.0, math.inf]])
    assert tuple(encoding.statistics(values).values()) == (4, -2.0, 1.0, 2)
    assert tuple(encoding.statistics(values[:, 1:]).values()) == (2, 0.0, 0.0, 2)


@pytest.mark.parametrize(
    ("text", "field", "shape", "message"),
    [
        ("float8", "logits", (10,), "unknown encoding 'float8' for 'logits'; known: float16, float32, uint8"),
        ("float16:3", "logits", (10,), "float16 takes no argument"),
        ("top:11", "logits", (10,), "needs 1 <= K <= classes <= 65536; found 'top:11', 10 classes"),
        ("top:x", "logits", (10,), "needs 1 <= K"),
        ("top:4", "penultimate", (10,), "top:K is for logits only, not for 'penultimate'"),
        ("float16", "logits", (10, 2), r"needs logits of shape \(classes,\)"),
        ("float16", "../x", (10,), "cannot be stored"),
    ],
)
def test_impossible_encodings_are_refused(text, field, shape, message):
    with pytest.raises(SettingsError, match=message):
        encoding.parse(text, field, shape)


def test_impossible_rows_and_temperatures_are_refused():
    form = encoding.parse("float32", "logits", (3,))
    with pytest.raises(SettingsError, match=r"should have shape \(3,\), found \(4,\)"):
        form.encode(torch.zeros(2, 4))
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(SettingsError, match="temperature should be a positive number"):
            form.decode({"logits": torch.zeros(1, 3)}, temperature)


@pytest.mark.parametrize(
    ("text", "field", "shape"),
    [("float16", "logits", (7,)), ("float16", "maps:stage1.pre", (3, 2, 2)), ("float32", "logits", (7,)),
     ("uint8", "boundary:images", (3, 4, 4)), ("top:3", "logits", (7,))],
)  # fmt: skip
def test_an_encoding_pickled_is_the_same(text, field, shape):
    made = encoding.parse(text, field, shape)
    again = pickle.loads(pickle.dumps(made))
    assert again == made
    values = torch.rand(5, *shape)
    stored, wanted = again.encode(values), made.encode(values)
    assert all(np.array_equal(stored[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("text", "field"), [("float32", "logits"), ("float16", "logits"), ("top:2", "logits"),
                                             ("float32", "penultimate"), ("float16", "penultimate")])  # fmt: skip
def test_skipped_rows_hold_what_nobody_takes_for_a_number_and_others_what_they_would(text, field):
    values = torch.arange(24, dtype=torch.float32).view(6, 4)
    form = encoding.parse(text, field, (4,))
    expected = form.encode(values)
    broken = values.clone()
    broken[1, 2], broken[4] = math.nan, math.inf
    given, skipped = broken.clone(), torch.tensor([False, True, False, False, True, True])
    stored = form.encode(broken, 0, skipped)
    assert torch.equal(broken.nan_to_num(7), given.nan_to_num(7))
    for name, rows in stored.items():
        np.testing.assert_array_equal(rows[~skipped.numpy()], expected[name][~skipped.numpy()])
        empty = rows[skipped.numpy()]
        assert (empty == 0xFFFF).all() if rows.dtype == np.uint16 else np.isnan(empty).all()
    with pytest.raises(NonFiniteError, match="is not finite for samples 11 "):
        form.encode(broken, 7, skipped & (torch.arange(6) != 4))


def test_every_fault_is_told_with_its_rows_and_its_remedy():
    values = torch.tensor([[1.0, 65504.0], [1e5, 0.0], [math.inf, 0.0], [math.nan, -1e9]])
    form = encoding.parse("float16", "penultimate", (2,))
    infinite, beyond = form.faults(values)
    assert infinite.rows.tolist() == [False, False, True, True]
    assert beyond.rows.tolist() == [False, True, False, True]
    with pytest.raises(NonFiniteError, match=r"exceeds float16's 65504 for samples 101 \(.*`--encoding float32` can"):
        form.encode(values[:2], first=100)
    for text, field in (("float32", "penultimate"), ("float16", "logits"), ("top:1", "logits")):
        (only,) = encoding.parse(text, field, (2,)).faults(values)
        assert only.rows.tolist() == [False, False, True, True]
