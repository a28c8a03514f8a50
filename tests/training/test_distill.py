"""Algorithm 1 as a whole: against a plain loop, against the same steps by hand, and reuse of what came out."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lessons import precomputed
from pupils import (
    SCHOOL,
    TRAIN,
    command,
    digits,
    distilled,
    everything,
    once,
    promised,
    same_files,
    same_tensors,
    saved_teacher,
    school,
    settings,
)
from safetensors.torch import load_file

from kcdcache import rng
from kcdcache.condense import manifest, value_files
from kcdcache.condense.schedule import expected_cost, kept_count, plan
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.networks import registry
from kcdcache.runs.state import read_metrics, read_summary
from kcdcache.store import reader
from kcdcache.training import batches, distill

TARGETS = ["linear_prob", "requery"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return school(tmp_path_factory.mktemp("school"))


@pytest.fixture(scope="module")
def runs(place):
    return once(place)


def plain_kd(data, knowledge, *, epochs, batch, views, padding=2, seed=0):
    """Knowledge distillation as a textbook writes it: no manifest, no stages; also every sample's entropies."""
    network = registry.build("resnet8", len(data.classes), seed).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scale = torch.tensor([1 / std for std in data.std]).view(1, 3, 1, 1)
    shift = torch.tensor([-mean / std for mean, std in zip(data.mean, data.std, strict=True)]).view(1, 3, 1, 1)
    everyone, T = np.arange(len(data.train)), 4.0
    images, labels = data.train.images(everyone), torch.from_numpy(data.train.labels)
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    side, (height, width) = 2 * padding + 1, images.shape[1:3]
    entropies = [[] for _ in everyone]
    for epoch in range(epochs):
        drops = sum(epoch >= share * epochs for share in (0.625, 0.75, 0.875))
        optimizer.param_groups[0]["lr"] = 0.05 * 0.1**drops
        order = rng.epoch_order(seed, epoch, everyone)
        down, right = rng.permuted(0, order, epoch % views, side, side)
        targets = torch.from_numpy(knowledge.read("logits", epoch % views, order))
        for start in range(0, len(order), batch):
            chosen = range(start, min(start + batch, len(order)))
            crops = [padded[order[i], down[i] : down[i] + height, right[i] : right[i] + width] for i in chosen]
            pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() * float(np.float32(1 / 255))
            logits = network(pixels * scale + shift)
            index = order[start : start + batch]
            teacher = (targets[start : start + batch] / T).softmax(1)
            hard = torch.nn.functional.cross_entropy(logits, labels[index], reduction="none")
            soft = torch.nn.functional.kl_div((logits / T).log_softmax(1), teacher, reduction="none").sum(1)
            optimizer.zero_grad()
            (0.1 * hard + 0.9 * T * T * soft).mean().backward()
            optimizer.step()
            p = logits.detach().double().softmax(1)
            for i, entropy in zip(index, -(p * p.log()).sum(1), strict=True):
                entropies[i].append(float(entropy))
    return network, entropies


@pytest.fixture(scope="module")
def plainly(place):
    return plain_kd(place.data, place.knowledge, epochs=6, batch=32, views=3)


@pytest.mark.parametrize("schedule", ["end_of_stage", "alg1_shift"])
def test_keeping_everything_is_plain_distillation_bit_for_bit(plainly, runs, schedule):
    run = runs(student="resnet8", keep=1.0, schedule=schedule)
    assert same_tensors(load_file(run / "student.safetensors"), plainly[0].state_dict())
    assert read_summary(run)["relative_cost"] == 1
    assert len(manifest.read(run / "stages" / "2" / "manifest.parquet")) == TRAIN


def test_condensing_changes_the_student(plainly, runs):
    assert not same_tensors(load_file(runs(student="resnet8") / "student.safetensors"), plainly[0].state_dict())


def test_a_value_is_the_mean_of_all_entropies_seen(plainly, runs):
    found = value_files.read(
        runs(student="resnet8", keep=1.0, schedule="end_of_stage") / "values.parquet", TRAIN
    ).values
    assert found.visits.tolist() == [6] * TRAIN
    np.testing.assert_allclose(found.value, [np.mean(seen) for seen in plainly[1]], rtol=1e-4, atol=1e-6)


def by_hand(place, run, target, stages, **more):
    """Algorithm 1 as a person runs it: train a stage, condense, train on what came out."""
    given = {}
    for number, stage in enumerate(stages):
        options = SCHOOL | {"mix_target": target, "until": int(stage["epochs"].split("-")[1]) + 1} | given | more
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


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", ["end_of_stage", "alg1_shift"])
def test_stages_by_hand_give_the_same_bytes_as_one_run(place, runs, tmp_path, target, schedule):
    whole = runs(mix_target=target, schedule=schedule)
    options = SCHOOL | {"mix_target": target, "schedule": schedule}
    planned = command(place, "train", out=tmp_path / "hand", dry_run=True, **options)
    last = by_hand(place, tmp_path / "hand", target, planned["stages"], schedule=schedule)
    assert same_files(whole, tmp_path / "hand")
    for name in ("values.parquet", "student.safetensors", "metrics.jsonl", "stages/2/manifest.parquet"):
        assert name in promised(tmp_path / "hand")
    told = {"seconds": 0, "images_per_second": None}  # by the clock
    assert read_summary(whole) | told == last | told


def test_targets_of_mixes_change_what_is_learned(runs):
    made = [runs(mix_target=target, schedule="end_of_stage") for target in TARGETS]
    left, right = (promised(run)["student.safetensors"] for run in made)
    assert left != right


@pytest.mark.parametrize("until", [1, 3, 5])
def test_stopping_inside_a_stage_changes_nothing(place, runs, tmp_path, until):
    stopped = distilled(place, tmp_path / "cut", run={"until": until})
    assert stopped.pop("images_per_second")["mean"] > 0
    assert stopped == {"finished": False, "epochs_done": until, "epochs": 6, "run": str(tmp_path / "cut")}
    distilled(place, tmp_path / "cut")
    assert same_files(runs(), tmp_path / "cut")


def by_hand_once(place, run):
    command(place, "train", out=run, until=2, **SCHOOL)
    made = run.parent / "mine.parquet"
    command(place, "condense", values=run / "values.parquet", keep=0.8, out=made)
    return {"out": run, "manifest": made, **SCHOOL}


def test_a_set_condensed_by_hand_may_be_another_than_ours(place, tmp_path):
    options = by_hand_once(place, tmp_path / "run")
    command(place, "train", until=4, **options)
    assert len(manifest.read(tmp_path / "run" / "stages" / "1" / "manifest.parquet")) == 160
    assert read_metrics(tmp_path / "run")[2].kept == 160


@pytest.mark.parametrize("until", [3, 4])
def test_the_command_that_gave_a_set_continues_when_it_is_run_again(place, tmp_path, until):
    options = by_hand_once(place, tmp_path / "run")
    stopped = command(place, "train", until=until, **options)
    assert command(place, "train", until=until, **options) == stopped
    assert not (tmp_path / "run" / "stages" / "2").exists()
    assert command(place, "train", **options)["finished"]
    assert command(place, "train", **options)["finished"]


def test_a_set_is_taken_only_where_a_stage_begins(place, tmp_path):
    options = by_hand_once(place, tmp_path / "run")
    command(place, "train", out=tmp_path / "run", until=3, **SCHOOL)
    with pytest.raises(
        SettingsError, match=r"stands at epoch 3, inside a stage; .* only where a stage begins: 0, 2, 4"
    ):
        command(place, "train", **options)


def test_a_stage_keeps_the_set_it_has(place, tmp_path):
    options = by_hand_once(place, tmp_path / "run")
    command(place, "train", until=2, **options)
    other = tmp_path / "other.parquet"
    command(place, "condense", values=tmp_path / "run" / "values.parquet", keep=0.7, out=other)
    with pytest.raises(SettingsError, match="stage 1 of this run has another manifest already"):
        command(place, "train", **(options | {"manifest": other}))


def test_a_runs_own_sets_name_their_data(place, runs):
    for path in sorted(runs().glob("stages/*/manifest.parquet")):
        assert manifest.read(path).data_digest == place.data.identity().digest


@pytest.mark.parametrize("change", [{}, {"schedule": "alg1_shift"}, {"schedule": "reference_linear", "keep": 0.5}])
def test_the_counted_cost_is_the_expected_one(runs, change):
    summary = read_summary(runs(**change))
    asked = settings(**change)
    stages = plan(asked.schedule, asked.epochs, asked.stages, asked.keep)
    assert summary["relative_cost"] == expected_cost(stages, TRAIN, asked.epochs)
    visits = value_files.read(runs(**change) / "values.parquet", TRAIN).values.visits
    assert visits.sum() == summary["student_samples"]


def test_the_summary_says_what_it_cost(runs):
    run, again = runs(), runs(mix_target="requery", schedule="end_of_stage")
    plain, asked = read_summary(run), read_summary(again)
    wanted = {"accuracy_last", "accuracy_best", "relative_cost", "teacher_forwards", "student_samples", "epochs"}
    assert wanted | {"seconds", "rows_read", "bytes_read"} <= set(plain)
    assert (plain["teacher_forwards"], plain["epochs"]) == (0, 6)
    sets = [manifest.read(again / "stages" / str(number) / "manifest.parquet") for number in (1, 2)]
    assert asked["teacher_forwards"] == 2 * sum(int(found.mixed.sum()) for found in sets) > 0
    assert plain["store_teacher_forwards"] == 3 * TRAIN
    rows = read_metrics(run)
    assert plain["accuracy_last"] == rows[-1].test_accuracy
    assert plain["accuracy_best"] == max(row.test_accuracy for row in rows)
    assert 0 < plain["seconds"] < 60


def test_two_seeds_are_two_students(runs):
    assert promised(runs())["student.safetensors"] != promised(runs(seed=1))["student.safetensors"]


def test_a_finished_run_says_so_and_changes_no_byte(place, tmp_path):
    first = distilled(place, tmp_path / "run")
    before = everything(tmp_path / "run")
    assert distilled(place, tmp_path / "run") == first
    assert distilled(place, tmp_path / "run", run={"until": 2}) == first
    assert everything(tmp_path / "run") == before


def test_settings_that_change_no_result_may_change(place, runs, tmp_path):
    distilled(place, tmp_path / "run", checkpoint_seconds=0, run={"until": 3})
    distilled(place, tmp_path / "run", memory_gb=1e-9)
    assert same_files(runs(), tmp_path / "run")


def test_a_missing_field_is_told_with_its_remedy_before_a_folder_is_made(place, tmp_path):
    told = (
        r"method 'rkd\+kd' for resnet8 reads logits, penultimate; the store lacks penultimate and holds logits\. "
        r"Add them with `kcdcache precompute --for rkd\+kd --student resnet8`"
    )
    with pytest.raises(MismatchError, match=told):
        distilled(place, tmp_path / "run", method="rkd+kd", student="resnet8")
    assert not (tmp_path / "run").exists()


def test_only_the_requery_target_needs_the_teacher(place, tmp_path):
    wanted = settings(preset="release")
    material = distill.Material(data=place.data, knowledge=place.knowledge)
    with pytest.raises(SettingsError, match="'requery' runs the teacher on mixed images: give --teacher"):
        distill.run(wanted, material, out=tmp_path / "run", device="cpu")


def test_the_presets_go_through(place, tmp_path):
    for preset, stages in (("paper", [200, 168, 142, 120]), ("release", [200, 173, 146])):
        summary = command(place, "train", out=tmp_path / preset, preset=preset, **SCHOOL)
        rows = read_metrics(tmp_path / preset)
        assert sorted({row.kept for row in rows}, reverse=True) == stages
        assert (summary["teacher_forwards"] > 0) == (preset == "release")
        assert summary["kept"] == 120


def test_the_release_presets_teacher_must_be_the_stores(place, tmp_path):
    other = saved_teacher(tmp_path / "teacher", place.data, seed=5)
    with pytest.raises(MismatchError, match=r"differ in weights: .*; requery needs the store's own teacher"):
        command(place, "train", out=tmp_path / "run", preset="release", teacher=str(other), **SCHOOL)


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


def test_both_clocks_agree_where_all_is_kept(runs):
    left, right = (runs(clock=clock, keep=1.0, schedule="end_of_stage") for clock in ("epochs", "samples"))
    assert promised(left)["student.safetensors"] == promised(right)["student.safetensors"]


def test_another_data_set_is_refused(place, tmp_path):
    material = distill.Material(data=digits(150, 50), knowledge=place.knowledge)
    with pytest.raises(MismatchError, match=r"count.*200.*150"):
        distill.run(settings(), material, out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_epochs_that_are_no_multiple_of_stages_are_refused(place, tmp_path):
    with pytest.raises(SettingsError, match="epochs must be a multiple of stages; found 7 epochs in 3"):
        distilled(place, tmp_path / "run", epochs=7)


def test_a_seeded_random_stage_begins_the_papers_schedule(place, tmp_path):
    distilled(place, tmp_path / "run", schedule="paper_stage", run={"until": 1})
    first = manifest.read(tmp_path / "run" / "stages" / "0" / "manifest.parquet")
    assert len(first) == kept_count(0.6 ** (1 / 3), TRAIN) < TRAIN
    assert not first.mixed.any()


@pytest.mark.parametrize("drawn", [{"schedule": "paper_stage"}, {"ranking": "random", "augment_kept": False}])
def test_sets_drawn_at_random_follow_the_runs_seed_unless_they_have_one_of_their_own(place, tmp_path, drawn):
    def sets(name, **changes):
        distilled(place, tmp_path / name, **drawn, **changes, run={"until": 3})
        return [manifest.read(tmp_path / name / f"stages/{k}/manifest.parquet").index.tolist() for k in (0, 1)]

    first, other, fixed = sets("first", seed=1), sets("other", seed=2), sets("fixed", seed=2, condense_seed=1)
    place_of_the_draw = 0 if "schedule" in drawn else 1
    assert first[place_of_the_draw] != other[place_of_the_draw]
    assert first[place_of_the_draw] == fixed[place_of_the_draw]


def test_samples_left_out_are_not_visited(runs):
    kept = manifest.read(runs() / "stages" / "1" / "manifest.parquet")
    found = pq.read_table(runs() / "stages" / "1" / "values.parquet").column("visits").to_numpy()
    expected = np.full(TRAIN, 2)
    expected[kept.index] += 2
    assert np.array_equal(found, expected)


def test_targets_are_read_for_the_stage_alone(place, tmp_path):
    knowledge = reader.open(place.knowledge.path)
    material = distill.Material(data=place.data, knowledge=knowledge)
    summary = distill.run(settings(), material, out=tmp_path / "run", device="cpu")
    assert (summary["rows_read"], summary["bytes_read"]) == (knowledge.rows_read, knowledge.bytes_read)


def test_rows_are_counted_as_the_manifests_say(place, tmp_path):
    distilled(place, tmp_path / "run", k0="stage_slice")
    for row in read_metrics(tmp_path / "run"):
        chosen = manifest.read(tmp_path / "run" / "stages" / str(row.stage) / "manifest.parquet")
        assert row.rows_read == len(batches.needed_rows(chosen))


def test_one_view_is_read_once_a_stage(place, tmp_path):
    knowledge = precomputed(tmp_path / "store", place.data, place.network, views=1)
    material = distill.Material(data=place.data, knowledge=knowledge)
    summary = distill.run(settings(), material, out=tmp_path / "run", device="cpu")
    assert [row.rows_read > 0 for row in read_metrics(tmp_path / "run")] == [True, False] * 3
    assert (summary["rows_read"], summary["bytes_read"]) == (knowledge.rows_read, knowledge.bytes_read)


def test_plain_training_reads_no_knowledge(place, tmp_path):
    knowledge = reader.open(place.knowledge.path)
    material = distill.Material(data=place.data, knowledge=knowledge)
    summary = distill.run(settings(method="ce"), material, out=tmp_path / "run", device="cpu")
    assert (summary["rows_read"], knowledge.rows_read) == (0, 0)


def test_a_run_can_use_fewer_views_than_are_cached(place, tmp_path):
    distilled(place, tmp_path / "two", cached_views=2)
    rows = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert [row["view"] for row in rows] == [0, 1, 0, 1, 0, 1]
    fewer = school(tmp_path / "fewer", views=2)
    distilled(fewer, tmp_path / "same")
    weights = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("two", "same")]
    assert weights[0] == weights[1]
    with pytest.raises(SettingsError, match=r"--cached-views 4: the store at .* has 3; precompute more"):
        distilled(place, tmp_path / "four", cached_views=4)
