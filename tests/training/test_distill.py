"""Algorithm 1 as a whole: against a plain loop, against the same steps by hand, resumed, and reuse of what came out."""

import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from lessons import ON_CPU, condensed, precomputed, teacher_of
from pupils import (
    SCHOOL,
    TRAIN,
    BrokenOffError,
    command,
    digits,
    distilled,
    once,
    plainly_taught,
    promised,
    same_files,
    same_tensors,
    saved_teacher,
    school,
    settings,
    stop_after,
)
from safetensors.torch import load_file

from kcdcache.condensation import manifest, value_files
from kcdcache.condensation.schedule import expected_cost, kept_count, plan
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.methods import run_loss
from kcdcache.networks import registry, weights
from kcdcache.runs.state import read_metrics, read_summary
from kcdcache.settings import TrainSettings
from kcdcache.store import reader
from kcdcache.training import batches, distill


@pytest.fixture(scope="module")
def runs(place):
    return once(place)


def set_of(run, stage):
    return manifest.read(run / "stages" / str(stage) / "manifest.parquet")


@pytest.fixture(scope="module")
def plainly(place):
    return plainly_taught(place.data, epochs=6, views=3, knowledge=place.knowledge)


@pytest.mark.parametrize("schedule", ["end_of_stage", pytest.param("alg1_shift", marks=pytest.mark.slow)])
def test_keeping_everything_is_plain_distillation_bit_for_bit(plainly, runs, schedule):
    run = runs(student="resnet8", keep=1.0, schedule=schedule)
    assert same_tensors(load_file(run / "student.safetensors"), plainly[0].state_dict())
    assert read_summary(run).relative_cost == 1
    assert len(set_of(run, 2)) == TRAIN


def test_a_value_is_the_mean_of_all_entropies_seen(plainly, runs):
    found = value_files.read(
        runs(student="resnet8", keep=1.0, schedule="end_of_stage") / "values.parquet", TRAIN
    ).values
    assert found.visits.tolist() == [6] * TRAIN
    np.testing.assert_allclose(found.value, [np.mean(seen) for seen in plainly[1]], rtol=1e-4, atol=1e-6)


def test_defaults_are_the_papers_recipe():
    plain = TrainSettings()
    assert (plain.epochs, plain.batch_size, plain.learning_rate, plain.momentum) == (240, 64, 0.05, 0.9)
    assert (plain.weight_decay, plain.keep, plain.stages, plain.cost_exponent) == (5e-4, 0.7, 6, 0.03)
    resolved = run_loss.weights_of(plain)
    assert (resolved.gamma, resolved.alpha, resolved.temperature) == (0.1, 0.9, 4.0)


# by hand, stopped and resumed


def by_hand(place, run, target, stages, **more):
    """Algorithm 1 as a person runs it: train a stage, condense, train on what came out."""
    given = {}
    for number, stage in enumerate(stages):
        options = SCHOOL | {"mix_target": target, "until": int(stage["epochs"].split("-")[1])} | given | more
        told = command(place, "train", out=run, **options)
        if number + 1 < len(stages):
            assert told["finished"] is False
            made = run.parent / f"by hand {number + 1}.parquet"
            previous = run / "stages" / str(number) / "manifest.parquet"
            keep, alpha = stages[number + 1]["keep"], SCHOOL["cost_exponent"]
            told = command(
                place, "condense", values=run / "values.parquet", previous=previous, keep=keep, out=made,
                cost_exponent=alpha,
            )  # fmt: skip
            assert told["already"] is False
            given = {"manifest": made}
    return told


@pytest.mark.parametrize(("target", "schedule"), [("linear_prob", "alg1_shift"), ("requery", "end_of_stage")])
def test_stages_by_hand_give_the_same_bytes_as_one_run(place, runs, tmp_path, target, schedule):
    whole = runs(mix_target=target, schedule=schedule)
    options = SCHOOL | {"mix_target": target, "schedule": schedule}
    planned = command(place, "train", out=tmp_path / "hand", dry_run=True, **options)
    last = by_hand(place, tmp_path / "hand", target, planned["stages"], schedule=schedule)
    assert same_files(whole, tmp_path / "hand")
    for name in ("values.parquet", "student.safetensors", "metrics.jsonl", "stages/2/manifest.parquet"):
        assert name in promised(tmp_path / "hand")
    told = {"seconds": 0, "images_per_second": None}  # by the clock
    assert read_summary(whole).document() | told == last | told


@pytest.mark.parametrize("until", [3, 4])
def test_a_stop_inside_or_after_a_stage_and_settings_that_change_no_result_change_nothing(place, runs, tmp_path, until):
    stopped = distilled(place, tmp_path / "cut", checkpoint_seconds=0, run={"until": until})
    assert stopped.pop("images_per_second")["mean"] > 0
    assert stopped == {"finished": False, "epochs_done": until, "epochs": 6, "run": str(tmp_path / "cut")}
    distilled(place, tmp_path / "cut", memory_gb=1e-9)
    assert same_files(runs(), tmp_path / "cut")


def test_broken_off_after_the_last_epoch_and_resumed_gives_the_same_bytes(place, runs, tmp_path):
    with pytest.raises(BrokenOffError):
        distilled(place, tmp_path / "run", run={"progress": stop_after(6)})
    distilled(place, tmp_path / "run")
    assert same_files(runs(), tmp_path / "run")


def test_a_requery_broken_off_inside_the_teachers_work_resumes(place, runs, tmp_path):
    for step in (3, 2, 2, 3):  # the first epochs, then one view of the mixes after the other
        with pytest.raises(BrokenOffError):
            distilled(place, tmp_path / "run", mix_target="requery", run={"progress": stop_after(step)})
    distilled(place, tmp_path / "run", mix_target="requery")
    assert same_files(runs(mix_target="requery"), tmp_path / "run")


def test_a_run_with_resident_data_writes_the_files_of_one_without(place, runs, tmp_path):
    distilled(place, tmp_path / "run", resident="on")
    assert same_files(runs(), tmp_path / "run")


def by_hand_once(place, run):
    command(place, "train", out=run, until=2, **SCHOOL)
    made = run.parent / "mine.parquet"
    command(place, "condense", values=run / "values.parquet", keep=0.8, out=made)
    return {"out": run, "manifest": made, **SCHOOL}


def test_the_command_that_gave_a_set_continues_when_it_is_run_again(place, tmp_path):
    """The set condensed by hand may be another than ours."""
    options = by_hand_once(place, tmp_path / "run")
    stopped = command(place, "train", until=3, **options)
    assert command(place, "train", until=3, **options) == stopped
    assert len(set_of(tmp_path / "run", 1)) == read_metrics(tmp_path / "run")[2].kept == 160
    assert not (tmp_path / "run" / "stages" / "2").exists()
    assert command(place, "train", **options)["finished"]
    assert command(place, "train", **options)["finished"]


def test_a_set_is_taken_only_where_a_stage_begins_and_a_stage_keeps_the_set_it_has(place, tmp_path):
    options = by_hand_once(place, tmp_path / "run")
    command(place, "train", until=2, **options)
    other = tmp_path / "other.parquet"
    command(place, "condense", values=tmp_path / "run" / "values.parquet", keep=0.7, out=other)
    with pytest.raises(SettingsError, match="stage 1 of this run has another manifest already"):
        command(place, "train", **(options | {"manifest": other}))
    command(place, "train", **(options | {"until": 3}))
    with pytest.raises(SettingsError, match=r"finished 3 epochs, inside a stage; .* stage begins, after 0, 2, 4"):
        command(place, "train", **(options | {"manifest": other}))


# what is recorded


@pytest.mark.parametrize("change", [{"record": "last"}, {"record_mixed": False}])
def test_how_values_are_recorded_decides_what_is_kept(runs, change):
    plain, other = (runs(**given) for given in ({}, change))
    assert promised(plain)["stages/0/manifest.parquet"] == promised(other)["stages/0/manifest.parquet"]
    assert promised(plain)["values.parquet"] != promised(other)["values.parquet"]


def test_values_and_sets_name_what_they_are_of(place, runs):
    for stage, epoch in ((0, 2), (1, 4), (2, 6)):
        found = value_files.read(runs() / "stages" / str(stage) / "values.parquet", TRAIN)
        assert found.document["epoch"] == epoch
        assert found.document["student"] == settings().student
        assert found.document["knowledge_id"] == place.knowledge.knowledge_id
        assert np.array_equal(found.labels, place.data.train.labels)
    assert set_of(runs(), 1).rule["candidates"] == "global"
    for stage in range(3):
        assert set_of(runs(), stage).data_digest == place.data.identity().digest


def test_the_student_saved_is_the_one_measured(place, runs):
    run = runs(student="resnet8", keep=1.0, schedule="end_of_stage")
    record, state = weights.load_network(run, "student")
    assert (record.architecture, record.document()["epoch"]) == ("resnet8", 6)
    network = registry.build("resnet8", 10)
    weights.load_into(network, state, "student")
    network.eval()
    pixels = torch.from_numpy(place.data.test.images(np.arange(60))).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (record.transform.mean, record.transform.std))
    guess = network((pixels - mean) / std).argmax(1)
    right = float((guess.numpy() == place.data.test.labels).mean())
    assert abs(right - read_summary(run).accuracy_last) < 1e-9


@pytest.mark.parametrize(
    "change", [{"mix": "additive_clip"}, {"mix_label": "mix"}, {"mix_target": "keep"}, {"mix_target": "linear_logit"}]
)
def test_each_way_of_mixing_teaches_something_else(runs, change):
    plain, other = (runs(keep=0.5, stages=2, **given) for given in ({}, change))
    before, after = (read_metrics(run) for run in (plain, other))
    assert before[:3] == after[:3]  # nothing is mixed in the first stage
    assert before[3].mixed > 0
    assert before[3].loss != after[3].loss


@pytest.mark.parametrize("change", [{}, {"schedule": "alg1_shift"}, {"schedule": "reference_linear", "keep": 0.5}])
def test_the_counted_cost_is_the_expected_one(runs, change):
    summary = read_summary(runs(**change))
    asked = settings(**change)
    stages = plan(asked.schedule, asked.epochs, asked.stages, asked.keep)
    assert summary.relative_cost == expected_cost(stages, TRAIN, asked.epochs)
    visits = value_files.read(runs(**change) / "values.parquet", TRAIN).values.visits
    assert visits.sum() == summary.student_samples


def test_the_summary_says_what_it_cost(runs):
    run, again = runs(), runs(mix_target="requery", schedule="end_of_stage")
    plain, asked = (read_summary(one).document() for one in (run, again))
    wanted = {"accuracy_last", "accuracy_best", "relative_cost", "teacher_forwards", "student_samples", "epochs"}
    assert wanted | {"seconds", "rows_read", "bytes_read"} <= set(plain)
    assert (plain["teacher_forwards"], plain["epochs"]) == (0, 6)
    sets = [set_of(again, number) for number in (1, 2)]
    assert asked["teacher_forwards"] == 2 * sum(int(found.mixed.sum()) for found in sets) > 0
    assert plain["store_teacher_forwards"] == 3 * TRAIN
    rows = read_metrics(run)
    assert plain["accuracy_last"] == rows[-1].test_accuracy
    assert plain["accuracy_best"] == max(row.test_accuracy for row in rows)
    assert 0 < plain["seconds"] < 60


@pytest.mark.parametrize(("views", "change"), [(3, {"k0": "stage_slice"}), (1, {}), (3, {"method": "ce"})], ids=str)
def test_rows_read_are_those_of_the_manifests_in_each_new_view(place, tmp_path, views, change):
    """Of one view each stage reads once, of several every epoch; plain training reads nothing."""
    made = {"augment": "crop", "padding": 2, "views": views}
    knowledge = place.knowledge if views == 3 else precomputed(tmp_path / "store", place.data, place.network, **made)
    material = distill.Material(data=place.data, knowledge=(held := reader.open(knowledge.path)))
    summary = distill.run(settings(**change), material, out=tmp_path / "run", machine=ON_CPU)
    assert (summary.rows_read, summary.bytes_read) == (held.rows_read, held.bytes_read)
    for row in read_metrics(tmp_path / "run"):
        reads = change.get("method") != "ce" and (views > 1 or row.epoch % 2 == 0)
        assert row.rows_read == reads * len(batches.needed_rows(set_of(tmp_path / "run", row.stage)))


def test_a_run_can_use_fewer_views_than_are_cached(place, tmp_path):
    distilled(place, tmp_path / "two", cached_views=2)
    rows = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["view"]) for row in rows] == [(stage, view) for stage in (0, 1, 2) for view in (0, 1)]
    fewer = school(tmp_path / "fewer", views=2)
    distilled(fewer, tmp_path / "same")
    weights = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("two", "same")]
    assert weights[0] == weights[1]
    with pytest.raises(SettingsError, match=r"--cached-views 4: the store at .* has 3; precompute more"):
        distilled(place, tmp_path / "four", cached_views=4)


def test_the_presets_go_through(place, tmp_path):
    for preset, stages in (("paper", [200, 168, 142, 120]), ("release", [200, 173, 146])):
        summary = command(place, "train", out=tmp_path / preset, preset=preset, **SCHOOL)
        rows = read_metrics(tmp_path / preset)
        assert sorted({row.kept for row in rows}, reverse=True) == stages
        assert (summary["teacher_forwards"] > 0) == (preset == "release")
        assert summary["kept"] == 120


def test_a_clock_of_samples_stretches_the_learning_rate(place, tmp_path):
    change = {"decay": "cosine", "keep": 0.3, "cost_exponent": 0.0}
    distilled(place, tmp_path / "run", clock="samples", **change)
    rows = read_metrics(tmp_path / "run")
    total = sum(row.samples for row in rows)
    before = np.cumsum([0] + [row.samples for row in rows])[:-1]
    expected = [0.05 * (1 + math.cos(math.pi * share)) / 2 for share in before / total]
    np.testing.assert_allclose([row.learning_rate for row in rows], expected, rtol=0.01)
    epochs = [0.05 * (1 + math.cos(math.pi * epoch / 6)) / 2 for epoch in range(6)]
    assert not np.allclose(expected, epochs, rtol=0.05)


@pytest.mark.parametrize("drawn", [{"schedule": "paper_stage"}, {"ranking": "random", "augment_kept": False}])
def test_sets_drawn_at_random_follow_the_runs_seed_unless_they_have_one_of_their_own(place, tmp_path, drawn):
    def sets(name, **changes):
        distilled(place, tmp_path / name, **drawn, **changes, run={"until": 3})
        return [manifest.read(tmp_path / name / f"stages/{k}/manifest.parquet").index.tolist() for k in (0, 1)]

    first, other, fixed = sets("first", seed=1), sets("other", seed=2), sets("fixed", seed=2, condense_seed=1)
    stage = 0 if "schedule" in drawn else 1
    assert first[stage] != other[stage]
    assert first[stage] == fixed[stage]
    assert len(first[0]) == (kept_count(0.6 ** (1 / 3), TRAIN) if "schedule" in drawn else TRAIN)


# refused


def test_another_data_set_a_missing_field_or_teacher_and_anothers_teacher_are_refused(place, tmp_path):
    said = (
        r"method 'rkd\+kd' for resnet8 reads logits, penultimate; the store lacks penultimate and holds logits\. "
        r"Add them with `kcdcache precompute --for rkd\+kd --student resnet8`"
    )
    with pytest.raises(MismatchError, match=said):
        distilled(place, tmp_path / "run", method="rkd+kd", student="resnet8")
    material = distill.Material(data=digits(150, 50), knowledge=place.knowledge)
    with pytest.raises(MismatchError, match=r"count.*200.*150"):
        distill.run(settings(), material, out=tmp_path / "run", machine=ON_CPU)
    assert not (tmp_path / "run").exists()
    material = distill.Material(data=place.data, knowledge=place.knowledge)
    with pytest.raises(SettingsError, match="'requery' runs the teacher on mixed images: give --teacher"):
        distill.run(settings(preset="release"), material, out=tmp_path / "run", machine=ON_CPU)
    other = saved_teacher(tmp_path / "teacher", place.data, seed=5)
    with pytest.raises(MismatchError, match=r"differ in weights: .*; give the store's own teacher"):
        command(place, "train", out=tmp_path / "other", preset="release", teacher=str(other), **SCHOOL)


# reuse of a condensed set: as it is, condensed further inside itself, or with another teacher's store


@pytest.fixture(scope="module")
def small_set(place):
    return condensed(place.knowledge, keep=0.6)


def test_a_reused_set_is_taught_as_it_is(place, small_set, tmp_path):
    summary = distilled(place, tmp_path / "run", given=small_set, stages=1, student="resnet14", epochs=4)
    assert [row.kept for row in read_metrics(tmp_path / "run")] == [120] * 4
    assert [row.mixed for row in read_metrics(tmp_path / "run")] == [int(small_set.mixed.sum())] * 4
    assert sorted(path.name for path in (tmp_path / "run" / "stages").iterdir()) == ["0"]
    assert summary["condensed_set"] == "stages/0/manifest.parquet"
    assert (summary["kept"], summary["relative_cost"]) == (120, 0.6)
    assert set_of(tmp_path / "run", 0).digest == small_set.digest
    found = value_files.read(tmp_path / "run" / "values.parquet", TRAIN).values
    assert np.array_equal(np.flatnonzero(found.visits), small_set.index)
    assert set(found.visits[small_set.index].tolist()) == {4}


def test_a_reused_set_is_condensed_inside_itself_and_cannot_grow(place, small_set, tmp_path, caplog):
    with pytest.raises(SettingsError, match=r"keep 0.8 exceeds the given set's share 0.6"):
        distilled(place, tmp_path / "run", given=small_set, keep=0.8)
    with caplog.at_level(logging.INFO, "kcdcache"):
        summary = distilled(place, tmp_path / "run", given=small_set, keep=0.3)
    assert "reuse: only the 120 samples of the given set are candidates" in caplog.text
    before = set(small_set.index.tolist())
    for number in (1, 2, 3):
        found = set_of(tmp_path / "run", number)
        assert set(found.index.tolist()) < before
        before = set(found.index.tolist())
        assert found.rule["candidates"] == "current"
    assert summary["kept"] == len(before) == 60


@pytest.fixture(scope="module")
def other_teacher(place):
    network = teacher_of(place.data, seed=2)
    return precomputed(place.root / "other", place.data, network)


def test_another_teachers_store_takes_a_set_only_by_transfer(place, small_set, other_teacher, tmp_path):
    path = tmp_path / "set.parquet"
    manifest.write(path, small_set)
    options = SCHOOL | {"stages": 1, "out": tmp_path / "run", "manifest": path, "store": other_teacher.path}
    with pytest.raises(MismatchError, match=r"the store holds .* or --transfer to use it with another teacher's"):
        command(place, "train", **options)
    assert not (tmp_path / "run").exists()
    summary = command(place, "train", transfer=True, **options)
    assert summary["knowledge_id"] == other_teacher.knowledge_id != small_set.knowledge_id
    kept = set_of(tmp_path / "run", 0)
    assert (kept.parent, kept.knowledge_id) == (small_set.digest, other_teacher.knowledge_id)
    assert np.array_equal(kept.index, small_set.index)
    assert command(place, "train", transfer=True, **options) == summary


def test_a_transfer_to_other_data_is_refused(place, small_set, tmp_path):
    dataset = digits(TRAIN, 50)
    images = dataset.train.source.pixels.copy()
    images[7, 3, 3, 0] ^= 1
    dataset = replace(dataset, train=replace(dataset.train, source=replace(dataset.train.source, pixels=images)))
    elsewhere = precomputed(tmp_path / "store", dataset, place.network)
    bound = replace(small_set, data_digest=place.data.identity().digest)
    with pytest.raises(MismatchError, match="--transfer needs a store of the same data: data digest"):
        distill.accept(bound, elsewhere, transfer=True)
    smaller = precomputed(tmp_path / "smaller", digits(150, 50), place.network)
    with pytest.raises(MismatchError, match=r"--transfer needs a store of the same data: samples 200 .* 150"):
        distill.accept(bound, smaller, transfer=True)
