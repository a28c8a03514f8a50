"""What networks are measured by, and what a finished student makes of wrong labels, rare classes and its sets."""

import json
import statistics

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lessons import CPU, ON_CPU, TinyNet, digits, precomputed, teacher_of
from torch import nn

from kcdcache.condensation import compare, manifest, value_files
from kcdcache.datasets import datasets
from kcdcache.methods.losses import cross_entropy
from kcdcache.networks import registry
from kcdcache.networks.input_transform import InputTransform
from kcdcache.networks.weights import load_network
from kcdcache.settings import TrainSettings, ViewSettings
from kcdcache.training import distill, evaluation
from kcdcache.training.device_batches import hold
from kcdcache.views import rules

UNSCALED = InputTransform((0.0,) * 3, (1.0,) * 3)
RULE = rules.plain(rules.rule_from(ViewSettings(augment="crop", padding=2), (16, 16)))


@pytest.fixture(scope="module")
def split():
    return digits(20, 30).test


@pytest.fixture
def network():
    torch.manual_seed(3)
    return TinyNet()


def views_of(split):
    return evaluation.first_views(split, RULE, CPU)


def some_logits(count, classes, seed, spread=3.0):
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(seed)) * spread


def reference_calibration_error(logits, labels, bins):
    """Sum over bins of |bin| / n times |accuracy - mean confidence|, with bin b holding [b, b+1) / bins."""
    members = [[] for _ in range(bins)]
    for row, label in zip(logits.double(), labels, strict=True):
        p = torch.softmax(row, 0)
        confidence = float(p.max())
        members[min(int(confidence * bins), bins - 1)].append((confidence, float(p.argmax() == label)))
    gaps = [abs(np.mean([r for _, r in bin]) - np.mean([c for c, _ in bin])) * len(bin) for bin in members if bin]
    return sum(gaps) / len(labels)


@given(st.integers(1, 60), st.integers(2, 8), st.integers(1, 20), st.integers(0, 999), st.sampled_from([0.1, 3, 50]))
def test_calibration_error_equals_a_slow_reference(count, classes, bins, seed, spread):
    logits = some_logits(count, classes, seed, spread)
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, classes, count))
    found = evaluation.calibration_error(logits, labels, bins)
    assert found == pytest.approx(reference_calibration_error(logits, labels, bins), abs=1e-9)
    assert 0 <= found <= 1


def test_measurements_by_hand():
    logits, given = torch.eye(4)[[0, 1, 2, 2]], torch.tensor([0, 1, 2, 3])
    found = evaluation.measure(logits, given.numpy())
    assert found["test_accuracy"] == 0.75
    assert found["test_loss"] == pytest.approx(float(cross_entropy(logits, given).mean()))
    assert found["test_calibration_error"] == pytest.approx(abs(0.75 - float(logits.softmax(1).max())))
    sure, unsure = torch.tensor([100.0, 0.0]), torch.tensor([0.0, 0.0])
    labels = torch.tensor([0, 1, 0, 1])
    assert evaluation.calibration_error(torch.stack([sure] * 4), labels) == pytest.approx(0.5)
    assert evaluation.calibration_error(torch.stack([unsure] * 4), labels) == pytest.approx(0)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_network_as_it_was_also_where_it_fails(network, split, training):
    network.train(training)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    evaluation.predict(network, UNSCALED, views_of(split))
    assert network.training == training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    wrong = nn.Sequential(nn.Flatten(), nn.Linear(5, 2)).train(training)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        evaluation.predict(wrong, UNSCALED, views_of(split))
    assert wrong.training == training


def test_predictions_are_those_of_single_plain_images_in_eval_mode(network, split, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 7)
    transform = InputTransform((0.3, 0.2, 0.1), (0.5, 0.4, 0.3))
    found = evaluation.predict(network.train(), transform, views_of(split))
    held = evaluation.first_views(split, RULE, CPU, held=hold(split, RULE, CPU))
    assert torch.equal(evaluation.predict(network, transform, held), found)
    assert np.array_equal(evaluation.guesses(network, transform, views_of(split)), found.argmax(1))
    network.eval()
    for i in range(len(split)):
        pixels = torch.from_numpy(split.images(np.array([i]))).permute(0, 3, 1, 2) / 255
        torch.testing.assert_close(found[i : i + 1], network(transform(pixels)), atol=1e-5, rtol=1e-5)


NOISY = "digits?train=180&test=50&noise=0.5"
SETTINGS = {"student": "lessons:TinyNet", "epochs": 4, "stages": 2, "batch_size": 30, "keep": 0.6}


def trained(root, spec_, **changes):
    dataset = datasets.load(spec_)
    network = teacher_of(dataset)
    knowledge = precomputed(root / "store", dataset, network, views=2)
    with_teacher = changes.pop("with_teacher", False)
    material = distill.Material(data=dataset, knowledge=knowledge, teacher=network if with_teacher else None)
    summary = distill.run(TrainSettings(**(SETTINGS | changes)), material, out=root / "run", machine=ON_CPU)
    return dataset, knowledge, network, summary.document(), root / "run"


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("noisy"), NOISY, with_teacher=True)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("uneven"), "digits?gamma=0.6&test=50")


def named_by(module, transform, dataset, split, rule):
    """The class a network names for view 0 of each sample, one image after the other."""
    module.eval()
    found = []
    for position in range(len(split)):
        index = np.array([position])
        pixels = rules.show(rule, split.images(index), rules.parameters(rule, index, 0), CPU)
        with torch.no_grad():
            found.append(int(module(transform(pixels)).argmax()))
    return found


@pytest.fixture(scope="module")
def named(noisy):
    """What student and teacher name on training samples, and what both name on test samples."""
    dataset, knowledge, network, _, run = noisy
    pairs, rule = (student_of(run, dataset), (network.module, network.transform)), knowledge.knowledge.views
    of_splits = ((dataset.train, rule), (dataset.test, rules.plain(rule)))
    return [[named_by(*pair, dataset, *split) for pair in pairs] for split in of_splits]


def student_of(run, dataset):
    module = registry.build("lessons:TinyNet", 10)
    module.load_state_dict(load_network(run, "student")[1])
    return module, InputTransform(dataset.mean, dataset.std)


def share(pairs):
    found = [a == b for a, b in pairs]
    return sum(found) / len(found)


def test_shares_on_training_samples_equal_a_plain_reference(noisy, named):
    dataset, _, _, summary, _ = noisy
    given_, true = dataset.train.labels.tolist(), dataset.train.clean_labels.tolist()
    wrong = [a != b for a, b in zip(given_, true, strict=True)]
    for prefix, guess in zip(("", "teacher_"), named[0], strict=True):
        told = list(zip(guess, given_, true, wrong, strict=True))
        expected = {
            "accuracy_train": share((g, a) for g, a, _, _ in told),
            "accuracy_true": share((g, t) for g, _, t, _ in told),
            "accuracy_right": share((g, a) for g, a, _, w in told if not w),
            "memorised": share((g, a) for g, a, _, w in told if w),
            "recovered": share((g, t) for g, _, t, w in told if w),
        }
        assert {name: summary[f"{prefix}{name}"] for name in expected} == pytest.approx(expected, abs=0.006)


def test_agreement_is_the_share_of_samples_on_which_both_name_the_same_class(noisy, named):
    dataset, _, _, summary, _ = noisy
    on_train, on_test = named
    assert summary["agreement_train"] == pytest.approx(share(zip(*on_train, strict=True)), abs=0.006)
    assert summary["agreement_test"] == pytest.approx(share(zip(*on_test, strict=True)), abs=0.021)
    assert summary["teacher_accuracy"] == pytest.approx(
        share(zip(on_test[1], dataset.test.labels, strict=True)), abs=0.021
    )


def test_the_summary_tells_what_was_done_to_the_data_and_counts_each_set_as_its_files_say(noisy):
    dataset, _, _, summary, run = noisy
    wrong = dataset.train.labels != dataset.train.clean_labels
    assert summary["corruption"] == {"noise": 0.5, "noise_seed": 12345, "redraw": True}
    assert summary["mislabelled"] == int(wrong.sum()) > 50
    assert sum(summary["class_sizes"]) == 180
    assert [row["stage"] for row in summary["sets"]] == [0, 1, 2]
    for row in summary["sets"]:
        chosen = manifest.read(run / "stages" / str(row["stage"]) / "manifest.parquet")
        kept = set(chosen.index.tolist())
        dropped = [sample for sample in range(180) if sample not in kept]
        mixed = chosen.index[chosen.mixed].tolist()
        assert (row["kept"], row["dropped"], row["enriched"]) == (len(kept), len(dropped), len(mixed))
        assert row["dropped_wrong"] == sum(bool(wrong[sample]) for sample in dropped)
        assert row["kept_wrong"] == sum(bool(wrong[sample]) for sample in kept)
        assert row["enriched_wrong"] == sum(bool(wrong[sample]) for sample in mixed)
        partners = set(chosen.partner[chosen.mixed].tolist())
        assert row["partners_wrong"] == sum(bool(wrong[sample]) for sample in partners)
        file = run / "stages" / str(row["stage"]) / "values.parquet"
        if file.exists():
            value = value_files.read(file, 180).values.value
            assert row["separation_wrong"] == pytest.approx(reference_separation(value.tolist(), wrong.tolist()))
            assert row["value_wrong"] == pytest.approx(np.quantile(value[wrong], (0.1, 0.5, 0.9)))
    assert summary["sets"][-1]["dropped"] == 72


def test_rare_classes_are_measured_where_classes_were_thinned_out(uneven):
    dataset, knowledge, _, summary, run = uneven
    sizes = np.bincount(dataset.train.clean_labels, minlength=10)
    order = sorted(range(10), key=lambda label: (-sizes[label], label))
    often, held = set(), 0
    for label in order:
        if 2 * held < sizes.sum():
            often.add(label)
        held += sizes[label]
    guess = named_by(*student_of(run, dataset), dataset, dataset.test, rules.plain(knowledge.knowledge.views))
    pairs = list(zip(guess, dataset.test.labels.tolist(), strict=True))
    assert summary["accuracy_frequent"] == pytest.approx(share(p for p in pairs if p[1] in often), abs=0.05)
    assert summary["accuracy_rare"] == pytest.approx(share(p for p in pairs if p[1] not in often), abs=0.05)
    assert "memorised" not in summary
    assert summary["mislabelled"] == 0
    first = summary["sets"][0]
    assert first["kept_rare"] == sum(int(sizes[label]) for label in range(10) if label not in often)
    assert "kept_wrong" not in first


@pytest.mark.parametrize(
    ("spec", "change", "there", "missing"),
    [
        ("", {}, set(), {"agreement_train"}),
        ("", {"fidelity": "on"}, {"agreement_train"}, {"sets", "corruption", "memorised", "agreement_test"}),
        ("&noise=0.5", {"fidelity": "off"}, {"corruption"}, {"agreement_train", "accuracy_train", "sets"}),
        ("", {"fidelity": "on", "with_teacher": True}, {"agreement_train", "agreement_test"}, {"sets"}),
    ],
)  # fmt: skip
def test_clean_data_are_measured_only_where_asked(tmp_path, spec, change, there, missing):
    summary = trained(tmp_path, f"digits?train=60&test=20{spec}", epochs=2, **change)[3]
    assert there <= summary.keys()
    assert not missing & summary.keys()


def test_samples_never_visited_have_no_value_to_be_told_apart_by(tmp_path):
    dataset, _, _, summary, run = trained(
        tmp_path, "digits?train=200&test=20&noise=0.5", schedule="paper_stage", keep=0.4, epochs=4
    )
    found = pq.read_table(run / "stages" / "0" / "values.parquet").to_pydict()
    wrong = (dataset.train.labels != dataset.train.clean_labels).tolist()
    seen = [(v, w) for v, n, w in zip(found["value"], found["visits"], wrong, strict=True) if n > 0]
    assert 0 < len(seen) < 200
    pairs = [(a > b) + (a == b) / 2 for a, w in seen for b, x in seen if w and not x]
    first = summary["sets"][0]
    assert first["separation_wrong"] == pytest.approx(statistics.fmean(pairs))
    assert min(first["value_wrong"]) > 0


def test_asking_for_it_or_not_is_no_other_run(tmp_path):
    dataset, knowledge, _, summary, run = trained(tmp_path, "digits?train=60&test=20&noise=0.5", epochs=2)
    material = distill.Material(data=dataset, knowledge=knowledge)
    settings = TrainSettings(**(SETTINGS | {"epochs": 2, "fidelity": "off"}))
    assert distill.run(settings, material, out=run, machine=ON_CPU).document() == summary
    assert "fidelity" not in json.loads((run / "run.json").read_text())["settings"]


def reference_separation(score, marked):
    ones = [s for s, m in zip(score, marked, strict=True) if m]
    others = [s for s, m in zip(score, marked, strict=True) if not m]
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in ones for b in others)
    return wins / (len(ones) * len(others))


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_separation_counts_won_pairs(rows):
    score, marked = np.array([float(s) for s, _ in rows]), np.array([m for _, m in rows])
    found = compare.separation(score, marked)
    if marked.all() or not marked.any():
        assert found is None
        return
    assert found == pytest.approx(reference_separation(score.tolist(), marked.tolist()))
    assert compare.separation(-score, marked) == pytest.approx(1 - found)
    assert compare.separation(np.exp(score), marked) == pytest.approx(found)
