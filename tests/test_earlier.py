"""mix_base = cumulative: samples keep what earlier stages mixed into them, against plain loops over single samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lessons import CPU, condensed
from pupils import distilled, school

from kcdcache import config, manifest, resident, views
from kcdcache.batches import Mixing, connect, iterate
from kcdcache.earlier import Earlier
from kcdcache.errors import SettingsError

T = 4.0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return school(tmp_path_factory.mktemp("school"), fields=("logits", "penultimate"))


@pytest.fixture(scope="module")
def sets(place):
    """Three stages of condensed sets: a sample's part and partner change from one to the next."""
    return [condensed(place.knowledge, keep=keep, seed=seed) for seed, keep in enumerate((0.8, 0.6, 0.5))]


def by_hand(place, sets, index, view, mix, target):
    """Pixels in view space and probabilities of one sample after all rounds, in float64."""
    rule = views.rule_of(place.knowledge.knowledge.views)

    def seen(sample):
        one = np.array([sample])
        images = place.data.train.images(one)
        return views.show(rule, images, views.parameters(rule, one, view), CPU)[0].double()

    def outputs(sample):
        return torch.from_numpy(place.knowledge.read("logits", view, np.array([sample])))[0].double()

    pixels, logits = seen(index), outputs(index)
    probabilities = (logits / T).softmax(0)
    for chosen in sets:
        row = {int(i): r for r, i in enumerate(chosen.index)}.get(index)
        if row is None or not chosen.mixed[row]:
            continue
        partner, share = int(chosen.partner[row]), float(chosen.epsilon[row])
        kept = 1 - share if mix == "convex" else 1
        pixels = (kept * pixels + share * seen(partner)).clamp(0, 1)
        logits = (1 - share) * logits + share * outputs(partner)
        if target == "linear_prob":
            probabilities = (1 - share) * probabilities + share * (outputs(partner) / T).softmax(0)
        elif target == "linear_logit":
            probabilities = (logits / T).softmax(0)
    return pixels, probabilities


@pytest.mark.parametrize("mix", ["convex", "additive_clip"])
@pytest.mark.parametrize("target", ["linear_prob", "linear_logit", "keep"])
def test_every_point_is_what_all_stages_made_of_it(place, sets, mix, target):
    mixing = Mixing(mix=mix, target=target, temperature=T)
    touched = 0
    with connect(place.data, place.knowledge, sets[-1], mixing=mixing, earlier=Earlier(sets[:-1])) as source:
        for batch in iterate(source, 1, batch_size=32):
            for row, index in enumerate(batch.index.tolist()):
                pixels, probabilities = by_hand(place, sets, index, 1, mix, target)
                torch.testing.assert_close(batch.pixels[row].double(), pixels, atol=1e-6, rtol=0)
                torch.testing.assert_close(batch.probabilities[row].double(), probabilities, atol=1e-5, rtol=0)
                touched += any(index in chosen.index[chosen.mixed] for chosen in sets[:-1])
    assert touched > 20  # the law above is about them


def test_without_earlier_mixes_nothing_changes(place, sets):
    unmixed = replace(sets[0], **manifest.plain(sets[0].index))
    mixing = Mixing(temperature=T)
    found = []
    for earlier in (Earlier(), Earlier([unmixed])):
        assert not earlier
        with connect(place.data, place.knowledge, sets[-1], mixing=mixing, earlier=earlier) as source:
            found.append(next(iterate(source, 0, batch_size=64)))
    assert torch.equal(found[0].pixels, found[1].pixels)
    assert torch.equal(found[0].probabilities, found[1].probabilities)


def test_partners_of_all_stages_are_read(place, sets):
    earlier = Earlier(sets[:-1])
    kept = set(sets[-1].index.tolist())
    expected = {
        int(partner)
        for chosen in sets[:-1]
        for index, partner, mixed in zip(chosen.index, chosen.partner, chosen.mixed, strict=True)
        if mixed and int(index) in kept
    }
    assert earlier.partners(sets[-1].index).tolist() == sorted(expected)
    assert Earlier().partners(sets[-1].index).tolist() == []


def test_other_fields_are_mixed_round_by_round(place, sets):
    with connect(place.data, place.knowledge, sets[-1], fields=("penultimate",), earlier=Earlier(sets[:-1])) as source:
        batch = next(iterate(source, 2, batch_size=200))
    for row, index in enumerate(batch.index.tolist()):
        value = place.knowledge.read("penultimate", 2, np.array([index]))[0].astype(np.float64)
        for chosen in sets:
            place_of = np.flatnonzero((chosen.index == index) & chosen.mixed)
            for at in place_of:
                other = place.knowledge.read("penultimate", 2, chosen.partner[at : at + 1])[0].astype(np.float64)
                value = (1 - float(chosen.epsilon[at])) * value + float(chosen.epsilon[at]) * other
        np.testing.assert_allclose(batch.knowledge["penultimate"][row].numpy(), value, atol=2e-5)


def test_batches_are_not_made_on_the_device(place, sets):
    with connect(place.data, place.knowledge, sets[-1], earlier=Earlier(sets[:-1])) as source:
        assert resident.obstacle(source, CPU) == "its samples keep the mixes of earlier stages"


def test_a_run_with_cumulative_mixes_resumes_to_the_same_bytes_and_differs_from_a_fresh_one(place, tmp_path):
    whole = distilled(place, tmp_path / "whole", mix_base="cumulative")
    distilled(place, tmp_path / "parts", mix_base="cumulative", run={"until": 5})
    parts = distilled(place, tmp_path / "parts", mix_base="cumulative")
    fresh = distilled(place, tmp_path / "fresh")
    weights = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("whole", "parts", "fresh")]
    assert weights[0] == weights[1] != weights[2]
    assert whole["accuracy_last"] == parts["accuracy_last"]
    assert fresh["finished"]


@pytest.mark.parametrize(("name", "value"), [("mix_target", "requery"), ("mix_label", "mix")])
def test_what_knows_one_partner_is_refused(name, value):
    with pytest.raises(SettingsError, match=f"several partners into a sample, {name} '{value}' knows one"):
        config.make(config.TrainSettings, {"mix_base": "cumulative", name: value})
