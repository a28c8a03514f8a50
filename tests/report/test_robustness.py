"""The report's page on wrong labels, rare classes and agreement: real runs on corrupted digits."""

import json
import math
import statistics
from dataclasses import replace

import pytest
from lessons import CPU, ON_CPU, opinionated, precomputed
from reporting import Page

from kcdcache.datasets import datasets
from kcdcache.networks import registry
from kcdcache.networks.input_transform import InputTransform
from kcdcache.report import figures, images, load
from kcdcache.report.page import write
from kcdcache.report.tables import every, fidelity, references, screening
from kcdcache.settings import TrainSettings
from kcdcache.teacher import teacher
from kcdcache.training import distill

SPECS = {"noise": "digits?train=150&test=40&noise=0.5", "gamma": "digits?gamma=0.6&n_max=60&n_min=5&test=40"}
ROWS = {"ce": {"method": "ce", "keep": 1.0}, "kd": {"keep": 1.0}, "kcd": {"keep": 0.5}}
SCHOOL = {"student": "lessons:TinyNet", "epochs": 2, "stages": 2, "batch_size": 30}
T_ONE = math.tan(math.pi * (0.975 - 0.5))
"""97.5 % point of Student's t with 1 degree of freedom"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, runs = tmp_path_factory.mktemp("robust") / "runs", []
    for name, given in SPECS.items():
        dataset = datasets.load(given)
        module = opinionated(registry.build("resnet8", 10, 1))
        made = teacher.freeze(module, InputTransform(dataset.mean, dataset.std), "resnet8", dataset.classes, CPU)
        made = replace(made, data=dataset.identity().digest if name == "noise" else "0" * 64)
        knowledge = precomputed(root / f"{name}-store", dataset, made, views=2)
        material = distill.Material(data=dataset, knowledge=knowledge, teacher=made)
        for row, changes in ROWS.items():
            for seed in (0, 1):
                settings = TrainSettings(**(SCHOOL | changes | {"seed": seed}))
                distill.run(settings, material, out=root / f"{name}-{row}-seed{seed}", machine=ON_CPU)
                runs.append({"step": f"{name}-{row}", "seed": seed, "kind": "train", "data": given})
    rows = [{"step": f"{name}-{row}", "title": f"{name}: {row}"} for name in SPECS for row in ROWS]
    results = {"title": "Corrupted digits", "data": "digits", "rows": rows, "runs": runs}
    (root / "results.json").write_text(json.dumps(results))
    return root


@pytest.fixture(scope="module")
def known(folder):
    found = load.read([folder])
    assert (len(found.runs), found.problems) == (len(SPECS) * len(ROWS) * 2, ())
    return found


@pytest.fixture(scope="module")
def tables(known):
    return every(known)


def noisy(known, but=""):
    """The runs on noisy labels, but those of one step."""
    return [run for run in known.runs if run.step.startswith("noise-") and run.step != but]


def summaries(folder, step):
    return [json.loads((folder / f"{step}-seed{seed}" / "summary.json").read_text()) for seed in (0, 1)]


def row_of(rows, name, **more):
    (found,) = [row for row in rows if row["row"] == name and all(row[k] == v for k, v in more.items())]
    return found


def test_gains_are_over_plain_training_on_the_same_data_seed_by_seed(folder, tables):
    for name in SPECS:
        plain, ours = ([run["accuracy_last"] for run in summaries(folder, f"{name}-{row}")] for row in ("ce", "kcd"))
        each = [100 * (a - b) for a, b in zip(ours, plain, strict=True)]
        row = row_of(tables["fidelity"].rows, f"{name}: kcd")
        assert row["gain"] == pytest.approx(statistics.fmean(each))
        reach = T_ONE * statistics.stdev(each) / math.sqrt(2)
        assert (row["gain_low"], row["gain_high"]) == pytest.approx((row["gain"] - reach, row["gain"] + reach))
        assert row["pairs"] == 2
        assert row_of(tables["fidelity"].rows, f"{name}: ce").get("gain") is None


def test_paired_differences_stay_within_the_same_training_data(tables):
    pairs = {(row["row"], row["reference"]) for row in tables["differences"].rows}
    assert pairs == {(f"{name}: {row}", f"{name}: kd") for name in SPECS for row in ("ce", "kcd")}


def test_shares_are_means_over_seeds_and_each_store_has_one_teacher(folder, tables):
    row = row_of(tables["fidelity"].rows, "noise: kd")
    for name in ("agreement_train", "agreement_test", "memorised", "recovered", "calibration_error"):
        assert row[name] == pytest.approx(statistics.fmean(run[name] for run in summaries(folder, "noise-kd")))
    assert row["accuracy_rare"] is None
    teachers = [row for row in tables["fidelity"].rows if row["row"].endswith(": the teacher")]
    assert [row["data"] for row in teachers] == ["noise 0.5", "other data than the students'"]
    assert teachers[0]["memorised"] == summaries(folder, "noise-ce")[0]["teacher_memorised"]


def changed(run, step=None, summary=None, settings=None, inputs=None):
    record = run.record
    given = {"settings": record.settings | (settings or {}), "inputs": record.inputs.model_copy(update=inputs)}
    summary = run.summary.model_copy(update=summary)
    return replace(run, step=step or run.step, summary=summary, record=record.model_copy(update=given))


def test_the_gain_is_over_plain_training_of_as_many_epochs_and_the_most_alike_settings(known):
    runs = noisy(known)
    plain = [run for run in runs if run.step == "noise-ce"]
    more = [changed(run, "noise-ce-long", {"accuracy_last": 0.9}, {"epochs": 40}) for run in plain]
    more += [
        changed(run, "noise-ce-wild", {"accuracy_last": 0.8}, {"learning_rate": 9.0, "momentum": 0.1}) for run in plain
    ]
    named = {row["row"]: row for row in fidelity(known._replace(runs=(*more, *runs)))}
    kcd = named["noise: kcd"]
    ours, theirs = (
        [100 * run.summary.accuracy_last for run in runs if run.step == f"noise-{name}"] for name in ("kcd", "ce")
    )
    assert kcd["over"] == "noise: ce"
    assert kcd["gain"] == pytest.approx(statistics.fmean(a - b for a, b in zip(ours, theirs, strict=True)))
    assert not any("gain" in row for name, row in named.items() if name.startswith("noise-ce") or name == "noise: ce")


def test_a_fit_of_the_students_network_is_plain_training_too(known):
    as_fit, others = {"kind": "fit", "method": None, "accuracy_last": 0.25}, noisy(known, but="noise-ce")
    fits = [changed(run, "noise-fit", as_fit) for run in known.runs if run.step == "noise-ce"]
    row = row_of(fidelity(known._replace(runs=(*fits, *others))), "noise: kcd")
    own = statistics.fmean(100 * run.summary.accuracy_last for run in others if run.step == "noise-kcd")
    assert (row["over"], row["gain"]) == ("noise-fit", pytest.approx(own - 25))


def test_rows_are_compared_with_the_usual_row_of_as_many_views(known):
    few = [changed(run, f"noise-few-{run.step[6:]}", inputs={"views": 99}) for run in noisy(known, but="noise-ce")]
    rows = references(known._replace(runs=(*noisy(known), *few)))
    named = {key[1]: reference[1] for key, reference in rows.items()}
    assert named == {
        "noise-ce": "noise-kd", "noise-kcd": "noise-kd", "noise-few-kcd": "noise-few-kd", "noise-few-kd": "noise-kd",
    }  # fmt: skip


def test_a_set_has_the_separation_of_the_values_it_was_chosen_from(folder, tables):
    rows = {row["stage"]: row for row in tables["screening"].rows if row["row"] == "noise: kcd"}
    assert rows[0].get("separation_wrong") is None
    for stage in (1, 2):
        before = [run["sets"][stage - 1]["separation_wrong"] for run in summaries(folder, "noise-kcd")]
        assert rows[stage]["separation_wrong"] == pytest.approx(statistics.fmean(before))


def test_stores_of_one_teacher_list_it_once(known, tables):
    """The teacher of a second store of the same data, as one with other fields of the same network is."""
    other = {"knowledge_id": "other"}
    moved = [changed(run, inputs=other if run.step.endswith("kcd") else None) for run in known.runs]
    assert fidelity(known._replace(runs=tuple(moved))) == tables["fidelity"].rows


def test_images_with_a_wrong_label_show_their_true_class(known):
    run = next(run for run in known.runs if run.name == "noise-kcd-seed0")
    dataset = datasets.load(SPECS["noise"])
    wrong = 0
    for strip in images.strips(run, dataset):
        for shot in (shot for shots in strip.shots for shot in shots if not shot.lines[0].startswith("mix")):
            (number,) = [int(line[1:]) for line in shot.lines if line.startswith("#")]
            given, true = dataset.train.labels[number], dataset.train.clean_labels[number]
            assert str(given) in shot.lines
            assert [line for line in shot.lines if "truly" in line] == ([] if given == true else [f"truly {true}"])
            wrong += given != true
    assert wrong > 0


def test_precision_and_recall_are_shown_with_those_of_chance(folder, tables):
    for stage in (1, 2):
        sets = [next(row for row in run["sets"] if row["stage"] == stage) for run in summaries(folder, "noise-kcd")]
        row = row_of(tables["screening"].rows, "noise: kcd", stage=stage)
        assert row["precision"] == pytest.approx(statistics.fmean(s["dropped_wrong"] / s["dropped"] for s in sets))
        wrong = sets[0]["kept_wrong"] + sets[0]["dropped_wrong"]
        assert row["recall"] == pytest.approx(statistics.fmean(s["dropped_wrong"] / wrong for s in sets))
        assert row["wrong"] == pytest.approx(wrong / 150)
        assert row["dropped"] == pytest.approx(sets[0]["dropped"] / 150)
    first = row_of(tables["screening"].rows, "noise: kcd", stage=0)
    assert (first["precision"], first["recall"], first["kept"]) == (None, None, 1.0)


def test_rare_classes_are_counted_beside_frequent_ones(folder, tables):
    counts = next(row for row in summaries(folder, "gamma-kcd")[0]["sets"] if row["stage"] == 2)
    row = row_of(tables["screening"].rows, "gamma: kcd", stage=2)
    total = counts["kept"] + counts["dropped"]
    rare = counts["kept_rare"] + counts["dropped_rare"]
    share = row["kept_rare"] * rare + row["kept_frequent"] * (total - rare)
    assert share == pytest.approx(row["kept"] * total, rel=0.02)
    assert row.get("precision") is None


def test_the_page_shows_tables_figures_and_the_images_of_the_corrupted_data(folder, tmp_path):
    report = write([folder / f"{name}-seed0" for name in ("noise-ce", "noise-kcd", "gamma-kcd")], tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert {"fidelity", "screening"} <= page.tables.keys()
    assert {"labelled", "screened", "thinned"} <= {figure["key"] for figure in report["figures"]}
    assert any(strip["title"].startswith("Most valuable") for strip in report["images"])


def test_each_corruption_and_network_has_a_figure_of_its_own(known, tables):
    others = [changed(run, f"other-{run.step}", {"model": "resnet14"}) for run in noisy(known)]
    twice = known._replace(runs=(*known.runs, *others))
    found = figures.robustness(fidelity(twice), screening(twice))
    assert [(picture.key, picture.title.rpartition("? ")[2]) for picture in found if "screened" in picture.key] == [
        ("screened-1", "noise 0.5, lessons:TinyNet"), ("screened-2", "noise 0.5, resnet14"),
    ]  # fmt: skip
    single = figures.robustness(tables["fidelity"].rows, tables["screening"].rows)
    assert [picture.key for picture in single] == ["labelled", "screened", "thinned"]
    assert not any("noise" in picture.title for picture in single)
