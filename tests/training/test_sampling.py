"""Which points an epoch visits: held against plain loops, and against what each scheme's definition implies."""

import json
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lessons import TinyNet
from pupils import command, distilled, same_files

from kcdcache import interrupt, rng
from kcdcache.condensation import value_files
from kcdcache.condensation.manifest import Samples, full, plain
from kcdcache.condensation.values import Values
from kcdcache.errors import InterruptedRunError, SettingsError
from kcdcache.settings import OptimizerSettings, SamplingSettings, TrainSettings, make
from kcdcache.training.sampling import SAMPLING, Sampler, require_enough

COUNT = 400
NAMES = tuple(SAMPLING)


def manifest_of(count=COUNT):
    return full(Samples("knowledge", count, np.arange(count) % 10, 10))


def mixed_manifest():
    index = np.arange(0, 40, 2)
    partner = np.where(np.arange(20) < 5, index + 1, -1)
    columns = plain(index) | {
        "mixed": partner >= 0, "partner": partner, "epsilon": np.where(partner >= 0, 0.25, 0).astype(np.float32),
        "weight": np.linspace(1, 2, 20).astype(np.float32), "count": 40, "keep": 0.5, "dropped": 20,
    }  # fmt: skip
    return replace(manifest_of(20), **columns)


def values_of(count=COUNT, seed=0, unseen=0):
    drawn = np.random.default_rng(seed)
    visits = np.where(np.arange(count) < unseen, 0, 3).astype(np.int32)
    return Values(visits, np.where(visits > 0, drawn.gamma(1.0, 1.0, count), 0).astype(np.float32))


def sampler_of(name, chosen=None, values=None, seed=7, epochs=8, batch_size=48, **more):
    held = values if values is not None else values_of()
    return Sampler(
        manifest=chosen or manifest_of(),
        optimizer=OptimizerSettings(seed=seed, epochs=epochs, batch_size=batch_size),
        settings=SamplingSettings(sampling=name, **more),
        started=lambda: held if SAMPLING[name].values else None,
    )


def columns(drawn):
    return {name: column.tolist() for name, column in vars(drawn).items()}


def test_the_settings_name_exactly_the_schemes():
    field = SamplingSettings.model_fields["sampling"]
    assert set(field.annotation.__args__) == set(SAMPLING)


@pytest.mark.parametrize("name", NAMES)
def test_points_are_a_function_of_their_sampler_and_epoch_alone(name):
    one, other = (columns(sampler_of(name).points(3)) for _ in range(2))
    assert one == other
    assert columns(sampler_of(name).points(2)) != one
    assert columns(sampler_of(name, seed=8).points(3)) != one


@pytest.mark.parametrize("name", NAMES)
def test_points_are_of_the_set_each_at_most_once_and_weigh_more_than_nothing(name):
    chosen = manifest_of()
    for epoch in range(8):
        drawn = sampler_of(name, chosen).points(epoch)
        assert set(drawn.index) <= set(chosen.index)
        assert len(set(drawn.index)) == len(drawn.index) > 0
        assert (drawn.weight > 0).all()
        assert ((drawn.epsilon >= 0) & (drawn.epsilon <= 1)).all()
        assert (drawn.epsilon[drawn.partner < 0] == 0).all()
        assert {len(column) for column in vars(drawn).values()} == {len(drawn.index)}


@pytest.mark.parametrize("name", [name for name in NAMES if not SAMPLING[name].mixes])
def test_partners_shares_and_weights_are_those_of_the_manifest(name):
    chosen = mixed_manifest()
    values = values_of(40, unseen=40)
    drawn = sampler_of(name, chosen, values).points(1)
    rows = {int(i): row for row, i in enumerate(chosen.index)}
    for place, index in enumerate(drawn.index.tolist()):
        row = rows[index]
        expected = (chosen.partner[row], chosen.epsilon[row], chosen.weight[row])
        assert (drawn.partner[place], drawn.epsilon[place], drawn.weight[place]) == expected


indices = st.lists(st.integers(0, 999), min_size=1, max_size=60, unique=True)


def order(index, seed, epoch):
    """The epoch's order of a set of some samples of 1,000."""
    kept = np.sort(np.array(index, np.int64))
    columns = plain(kept) | {"rank": np.arange(len(kept)), "count": 1000, "keep": 0.5}
    return sampler_of("all", replace(full(Samples("k", len(kept))), **columns), seed=seed).points(epoch).index.tolist()


@settings(max_examples=15)
@given(indices, st.integers(0, 2**64 - 1), st.integers(0, 500), st.data())
def test_all_visits_every_sample_once_and_a_subset_keeps_the_relative_order_of_the_whole(index, seed, epoch, data):
    whole = order(index, seed, epoch)
    assert whole == rng.epoch_order(seed, epoch, np.sort(index)).tolist() == order(index, seed, epoch)
    assert sorted(whole) == sorted(index)
    part = data.draw(st.lists(st.sampled_from(index), min_size=1, unique=True))
    assert [i for i in whole if i in set(part)] == order(part, seed, epoch)


@settings(max_examples=15)
@given(st.floats(0.01, 1), st.integers(1, 300), st.integers(0, 20))
def test_a_random_share_is_of_its_size_and_keeps_the_whole_sets_order(share, count, epoch):
    chosen = manifest_of(count)
    for name in ("random_per_epoch", "random_fixed"):
        found = sampler_of(name, chosen, sample_share=share)
        if int(share * count) == 0:
            with pytest.raises(SettingsError, match=f"of {count} samples visits none; raise it to at least"):
                found.points(epoch)
            continue
        index = found.points(epoch).index.tolist()
        assert len(index) == math.floor(share * count)
        whole = [i for i in sampler_of("all", chosen).points(epoch).index.tolist() if i in set(index)]
        assert index == whole


def test_a_fixed_share_is_the_same_every_epoch_and_another_for_another_seed():
    drawn = [set(sampler_of("random_fixed").points(epoch).index) for epoch in range(5)]
    assert all(found == drawn[0] for found in drawn)
    assert set(sampler_of("random_fixed", seed=8).points(0).index) != drawn[0]


def test_a_share_per_epoch_is_new_in_every_epoch_and_fair():
    times = np.zeros(COUNT)
    epochs = 200
    for epoch in range(epochs):
        times[sampler_of("random_per_epoch", sample_share=0.25).points(epoch).index] += 1
    # each is a binomial with p = 1/4: 5 standard deviations over 400 samples
    assert np.abs(times - epochs / 4).max() < 5 * math.sqrt(epochs * 3 / 16)


def test_infobatch_thins_out_what_is_below_the_mean_and_weighs_the_rest_of_it():
    """A plain loop over the definition."""
    values = values_of(unseen=50)
    mean = np.mean([float(v) for v, n in zip(values.value, values.visits, strict=True) if n > 0])
    drawn = sampler_of("infobatch", values=values, prune_probability=0.3).points(2)
    place = {int(i): row for row, i in enumerate(drawn.index)}
    for index in range(COUNT):
        low = values.visits[index] > 0 and values.value[index] < mean
        chance = rng.words(7, index, rng.SAMPLE, view=2)[0] * 2.0**-32
        assert (index in place) == (not (low and chance < 0.3))
        if index in place:
            assert drawn.weight[place[index]] == pytest.approx(1 / 0.7 if low else 1)


def test_infobatch_visits_everything_while_nothing_is_known_and_at_the_end():
    unknown = values_of(unseen=COUNT)
    assert len(sampler_of("infobatch", values=unknown).points(0).index) == COUNT
    sizes = [len(sampler_of("infobatch", epochs=16).points(epoch).index) for epoch in range(16)]
    assert [size == COUNT for size in sizes] == [epoch >= 14 for epoch in range(16)]
    assert (sampler_of("infobatch", epochs=16).points(15).weight == 1).all()


def test_infobatch_scores_by_the_last_loss_and_keeps_everything_unless_told():
    assert [getattr(make(TrainSettings, {"sampling": "infobatch"}), name) for name in ("observed", "record", "keep")] \
        == ["loss", "last", 1.0]  # fmt: skip
    told = make(TrainSettings, {"sampling": "infobatch", "observed": "entropy", "keep": 0.5})
    assert (told.observed, told.record, told.keep) == ("entropy", "last", 0.5)
    assert make(TrainSettings, {}).observed == "entropy"


def unix_slowly(order, values, batch_size, share, clear, slope, seed, epoch):
    pool = max(1, round(batch_size / share))
    rows = []
    for number in range(math.ceil(len(order) / pool)):
        members = [int(i) for i in order[number * pool : (number + 1) * pool]]
        size = len(members)
        ranked = sorted(members, key=lambda i: -(values.value[i] if values.visits[i] else math.inf))
        strength = rng.words(seed, number, rng.SAMPLE, view=epoch, draw=1)[0] * 2.0**-32
        keys = {i: rng.words(seed, i, rng.SAMPLE, view=epoch + 1, draw=2) for i in members}
        others = sorted(members, key=lambda i: (keys[i][0], keys[i][1]))
        for r in range(max(1, round(size * share))):
            middle = (2 * clear * size - 1) / (2 * size)
            epsilon = strength / (1 + math.exp(-slope * (r / size - middle)))
            same = ranked[r] == others[r]
            rows.append((ranked[r], -1 if same else others[r], 0.0 if same else epsilon))
    return rows


@pytest.mark.parametrize(("batch_size", "share", "count"), [(48, 0.75, 400), (7, 1.0, 30), (5, 0.5, 23), (64, 0.1, 9)])
def test_unix_agrees_with_plain_loops(batch_size, share, count):
    chosen, values = manifest_of(count), values_of(count, unseen=3)
    drawn = sampler_of("unix", chosen, values, batch_size=batch_size, sample_share=share).points(4)
    order = sampler_of("all", chosen).points(4).index
    expected = unix_slowly(order, values, batch_size, share, 0.5, 10, 7, 4)
    assert [(int(i), int(p)) for i, p in zip(drawn.index, drawn.partner, strict=True)] == [row[:2] for row in expected]
    np.testing.assert_allclose(drawn.epsilon, [row[2] for row in expected], rtol=1e-6)


def test_unix_refuses_points_that_are_mixed_already():
    with pytest.raises(SettingsError, match="'unix' mixes points itself, and 5 points of this condensed set are mixed"):
        sampler_of("unix", mixed_manifest(), values_of(40))


BELL = []
"""steps until the student asks the process to stop, if any"""


class Ringing(TinyNet):
    """A student during whose forward pass the user presses Ctrl-C, once."""

    def forward(self, pixels):
        if BELL and self.training:
            BELL[0] -= 1
            if BELL[0] == 0:
                BELL.clear()
                signal.raise_signal(signal.SIGINT)
        return super().forward(pixels)


def chosen(name):
    plain = {"student": "test_sampling:Ringing", "sampling": name, "checkpoint_seconds": 1e9}
    return plain | ({"keep": 1.0} if SAMPLING[name].mixes else {})


@pytest.fixture(scope="module")
def whole(place):
    """The undisturbed run with each scheme."""
    made = {}

    def run(name):
        if name not in made:
            made[name] = place.root / name
            distilled(place, made[name], **chosen(name))
        return made[name]

    return run


@pytest.mark.parametrize("name", ["random_per_epoch", "infobatch", "unix"])
def test_a_run_stopped_inside_an_epoch_goes_on_with_the_same_points_also_on_the_device(place, whole, tmp_path, name):
    BELL[:] = [23]  # inside the fourth epoch: its points depend on values that have changed since it began
    with (
        interrupt.listening(),
        pytest.raises(InterruptedRunError, match=r"epoch [456], step [1-4] is in the checkpoint of"),
    ):
        distilled(place, tmp_path / "run", **chosen(name))
    with interrupt.listening():
        distilled(place, tmp_path / "run", **chosen(name), resident="on")
    assert same_files(whole(name), tmp_path / "run")


@pytest.mark.parametrize("name", NAMES)
def test_cost_and_values_count_what_was_visited(whole, name):
    rows = [json.loads(line) for line in (whole(name) / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((whole(name) / "summary.json").read_text())
    samples = [row["samples"] for row in rows]
    assert summary["relative_cost"] == pytest.approx(sum(samples) / (200 * 6))
    if SAMPLING[name].partial:
        assert all(abs(row["samples"] - 0.75 * row["kept"]) <= 5 for row in rows)  # of five pools, each rounded
    elif name == "infobatch":
        assert samples[0] == 200
        assert all(60 <= size < 200 for size in samples[1:5]), samples
    else:
        assert samples == [row["kept"] for row in rows]
    visits = value_files.read(whole(name) / "values.parquet", 200).values.visits
    assert visits.sum() == sum(samples)


@settings(max_examples=15)
@given(st.sampled_from(NAMES), st.floats(0.05, 1), st.integers(1, 120), st.integers(1, 40))
def test_how_many_points_an_epoch_visits_is_known_before(name, share, count, batch_size):
    """Of infobatch, at most so many, and never too few for batch statistics."""
    asked = SamplingSettings(sampling=name, sample_share=share)
    visited = SAMPLING[name].visits(asked, batch_size, count)
    if visited < 2:
        with pytest.raises(SettingsError, match=rf"a set of {count} samples? to train on.* at least 2; train on more"):
            require_enough(asked, batch_size, count)
        return
    require_enough(asked, batch_size, count)
    values = values_of(count, seed=count)
    sizes = [
        len(sampler_of(name, manifest_of(count), values, batch_size=batch_size, sample_share=share).points(epoch))
        for epoch in range(8)
    ]
    assert all(2 <= size <= visited for size in sizes)
    assert name == "infobatch" or set(sizes) == {visited}


def test_infobatch_leaves_nothing_out_where_too_little_would_be_left():
    values = Values(np.full(9, 3, np.int32), np.array([9, *[0.1] * 8], np.float32))
    found = [
        len(sampler_of("infobatch", manifest_of(9), values, prune_probability=0.99).points(epoch)) for epoch in range(7)
    ]
    assert 9 in found
    assert 1 not in found


@pytest.mark.parametrize(
    ("name", "size", "visited"),
    [("all", 199, 200), ("infobatch", 199, 200), *((name, 33, 100) for name in NAMES if SAMPLING[name].partial)],
)
def test_a_last_batch_of_one_joins_the_one_before_with_every_sampling(place, tmp_path, name, size, visited):
    given = {"keep": 1.0, "stages": 1, "epochs": 1, "sampling": name, "sample_share": 0.5, "batch_size": size}
    told = distilled(place, tmp_path / "run", student="lessons:Pooled", **given)
    assert told["student_samples"] == visited
    assert visited % size == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": 0.005, "schedule": "paper_stage"}, "a set of 1 sample to train on: batch statistics need at least 2"),
        ({"sampling": "random_fixed", "sample_share": 0.005}, "of which sampling 'random_fixed' visits 1 in an epoch"),
        ({"sampling": "unix", "sample_share": 0.001, "keep": 1.0}, "of which sampling 'unix' visits 1 in an epoch"),
        ({"sampling": "unix", "mix_target": "requery", "keep": 1.0}, "and --mix-target requery would need the teacher"),
    ],
)
def test_a_set_that_leaves_one_sample_to_an_epoch_is_refused_before_training(place, tmp_path, given, message):
    with pytest.raises(SettingsError, match=message):
        distilled(place, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "share"), [("all", 1), ("random_per_epoch", 0.5), ("unix", 0.5), ("infobatch", 1)])
def test_a_dry_run_tells_the_cost_of_the_share_that_is_visited(place, tmp_path, name, share):
    given = {"student": "resnet8", "epochs": 6, "stages": 3, "keep": 1.0, "sampling": name, "sample_share": 0.5}
    told = command(place, "train", out=tmp_path / "run", dry_run=True, **given)
    assert told["relative_cost"] == pytest.approx(share)
