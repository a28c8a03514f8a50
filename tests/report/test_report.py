"""A report of real runs whose names are hostile: its numbers against their files, its page, what is left out."""

import base64
import csv
import dataclasses
import io
import json
import math
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from lessons import ON_CPU
from PIL import Image
from reporting import CLASSES, ROWS, ROWS_OF_RUNS, SCHOOL, TITLE, Page, grid
from stores import content

from kcdcache import settings
from kcdcache.cli import main
from kcdcache.datasets import datasets
from kcdcache.errors import MismatchError, NotFoundError, SettingsError, printable
from kcdcache.files.records import digest_of, readable_json
from kcdcache.report import images, load, tables
from kcdcache.report.page import write
from kcdcache.store import reader
from kcdcache.training import distill

T_ONE = math.tan(math.pi * (0.975 - 0.5))
"""97.5 % point of Student's t with 1 degree of freedom, which is Cauchy's distribution"""
FIGURES = [
    "differences", "chain", "accuracy", "training", "sizes", "values", "classes", "turnover", "pattern-kcd-seed0",
    "distances", "cost",
]  # fmt: skip
SECTIONS = [
    "verdict", "results", "method", "learning", "condensation", "samples", "images", "agreement", "cost", "provenance",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return grid(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def made(place, tmp_path_factory):
    """A report of the whole grid with everything beside it: what `write` returned, and the files."""
    folder = tmp_path_factory.mktemp("made")
    return folder, write([place.folder], folder / "r.html", json_file=folder / "r.json", csv=folder / "tables")


@pytest.fixture(scope="module")
def page(made):
    return Page((made[0] / "r.html").read_text())


@pytest.fixture(scope="module")
def known(place):
    """All that is known of the whole grid."""
    return load.read([place.folder])


@pytest.fixture
def copy(place, tmp_path):
    return Path(shutil.copytree(place.folder, tmp_path / "copy"))


@pytest.fixture
def few(place, tmp_path):
    """The grid with its baseline alone, and the store."""
    left_out = shutil.ignore_patterns("k*-seed*")
    return Path(shutil.copytree(place.folder, tmp_path / "few", ignore=left_out))


def rows(report, table, **only):
    """Rows of a table whose cells are these."""
    return [row for row in report["tables"][table]["rows"] if only.items() <= row.items()]


def numbers(*paths, **more):
    """The tables of a report of some paths."""
    found = tables.every(load.read([Path(path) for path in paths]), **more)
    return {"tables": {key: table.document() for key, table in found.items()}}


def summaries(place, step, name):
    """An entry of the summaries of a row's runs, by seed."""
    runs = [run for run in ("base-seed0", *ROWS_OF_RUNS) if run.startswith(f"{step}-")]
    return [json.loads((place.folder / run / "summary.json").read_text())[name] for run in runs]


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def kept_of(place, name):
    """Kept indices of each set of a run, from parquet alone."""
    files = sorted((place.folder / name / "stages").glob("*/manifest.parquet"), key=lambda file: int(file.parent.name))
    return [set(pq.read_table(file)["index"].to_pylist()) for file in files]


# numbers


def test_results_are_means_over_the_summaries(place, made):
    for row, step in zip(rows(made[1], "results"), ROWS, strict=True):
        for measure in ("accuracy_last", "accuracy_best", "relative_cost", "seconds"):
            found = summaries(place, step, measure)
            assert (row["row"], row["n"]) == (ROWS[step], len(found))
            assert row[measure] == pytest.approx(statistics.fmean(found))
            std = pytest.approx(statistics.stdev(found)) if len(found) > 1 else None
            assert row[f"{measure}_std"] == std


def test_differences_are_of_paired_seeds(place, made):
    found = {(row["row"], row["measure"]): row for row in rows(made[1], "differences")}
    assert {row["reference"] for row in found.values()} == {ROWS["kd"]}
    ours, theirs = (summaries(place, step, "accuracy_last") for step in ("kcd", "kd"))
    pairs = [100 * (a - b) for a, b in zip(ours, theirs, strict=False)]
    row, std = found[ROWS["kcd"], "accuracy last"], statistics.stdev(pairs)
    ends = [statistics.fmean(pairs) + sign * T_ONE * std / math.sqrt(2) for sign in (-1, 1)]
    assert (row["n"], row["mean"], row["std"]) == (2, pytest.approx(statistics.fmean(pairs)), pytest.approx(std))
    assert [row["low"], row["high"]] == pytest.approx(ends)
    costs, samples = (
        [statistics.fmean(summaries(place, step, name)[:2]) for step in ("kcd", "kd")]
        for name in ("relative_cost", "student_samples")
    )
    assert found[ROWS["kcd"], "relative cost"]["mean"] == pytest.approx(costs[0] - costs[1])
    assert found[ROWS["kcd"], "student samples"]["mean"] == pytest.approx(samples[0] - samples[1])
    assert {row["row"] for row in found.values()} == {ROWS["kcd"]}  # the baseline has other epochs


def altered(run, settings=None, inputs=None, data=None, **summary):
    """The run as if it had been made with other settings, inputs or data."""
    record = run.record
    given = {"settings": record.settings | (settings or {}), "inputs": record.inputs.model_copy(update=inputs or {})}
    stages = tuple(
        stage._replace(manifest=dataclasses.replace(stage.manifest, data_digest=data)) if data else stage
        for stage in run.stages
    )
    return dataclasses.replace(
        run, record=record.model_copy(update=given), stages=stages, summary=run.summary.model_copy(update=summary)
    )


UNLIKE = {
    "epochs (10 and 6)": {"settings": {"epochs": 10}, "epochs": 10},
    "batch size (64 and 32)": {"settings": {"batch_size": 64}},
    "test data": {"inputs": {"test": "other"}},
    "training data": {"data": "other"},
    "training data, epochs (10 and 6)": {"data": "other", "settings": {"epochs": 10}, "count": 60},
}


@pytest.mark.parametrize("what", UNLIKE)
def test_rows_of_unequal_data_epochs_or_batch_size_are_compared_only_across(known, what):
    runs = tuple(altered(run, **UNLIKE[what]) if run.step == "kcd" else run for run in known.runs)
    loaded = known._replace(runs=tuple(run for run in runs if run.step != "base"))
    note = f"'{ROWS['kcd']}' and '{ROWS['kd']}' differ in {what}"
    assert (tables.differences(loaded), tables.pairing(loaded)) == ([], [f"{note}: not compared without --across"])
    found = {row["measure"]: row for row in tables.differences(loaded, across=True)}
    shares = {"relative cost"} if {"epochs", "count"}.isdisjoint(UNLIKE[what]) else set()
    assert found.keys() == {"accuracy last", "accuracy best", "student samples"} | shares
    assert {row["n"] for row in found.values()} == {2}
    assert tables.pairing(loaded, across=True) == [f"{note} and are compared all the same"]
    assert tables.pairing(known, "kd")[-1].endswith("differ in epochs (2 and 6): not compared without --across")


def test_of_a_row_of_unlike_runs_only_those_like_the_references_are_paired(known):
    runs = tuple(altered(run, {"epochs": 10}) if run.name == "kcd-seed1" else run for run in known.runs)
    found = {row["row"]: row["n"] for row in tables.differences(known._replace(runs=runs))}
    assert found == {ROWS["kcd"]: 1}


def test_rows_are_compared_with_those_of_their_own_network_and_the_reference_can_be_named(known):
    other = {"model": "other"}
    runs = tuple(
        dataclasses.replace(run, summary=run.summary.model_copy(update=other if run.step == "kcd" else {}))
        for run in known.runs
    )
    found = tables.every(known._replace(runs=runs), across=True)["differences"].rows
    assert {(row["row"], row["reference"]) for row in found} == {(ROWS["base"], ROWS["kd"])}
    named = tables.every(known, "base", across=True)["differences"].rows
    assert {row["reference"] for row in named} == {ROWS["base"]}
    with pytest.raises(SettingsError, match=r"no row 'kdd' to compare with; did you mean 'kd'\?"):
        tables.every(known, "kdd")


def test_curves_are_the_epochs_of_metrics_and_timing(place, made):
    spent = 0.0
    metrics, timing = (lines(place.folder / "kcd-seed1" / f"{name}.jsonl") for name in ("metrics", "timing"))
    for row, epoch, clock in zip(rows(made[1], "curves", run="kcd-seed1"), metrics, timing, strict=True):
        spent += clock["seconds"]
        assert (row["seconds_so_far"], row["epoch"]) == (pytest.approx(spent), epoch["epoch"] + 1)
        for name in ("test_accuracy", "samples_so_far", "loss", "stage", "kept"):
            assert row[name] == epoch[name]


def test_stages_fates_classes_and_distances_are_counted_from_the_parquet_files(place, made):
    sets, labels = kept_of(place, "kcd-seed0"), datasets.load(place.data).train.labels
    seen, before = set(), set()
    for row, now in zip(rows(made[1], "stages", run="kcd-seed0"), sets, strict=True):
        counts = [len(now & before), len(before - now), len((now - before) & seen), len(now - seen)]
        assert [row[key] for key in ("kept", "stayed", "left", "returned", "new")] == [len(now), *counts]
        seen, before = seen | now, now
    (fates,) = rows(made[1], "fates", run="kcd-seed0")
    assert fates["stayed"] == len(set.intersection(*sets))
    assert sum(fates[key] for key in ("stayed", "left", "returned", "unsteady", "joined", "never")) == 120
    for stage, kept in enumerate(sets):
        found = rows(made[1], "classes", run="kcd-seed0", stage=stage)
        assert [row["kept"] for row in found] == np.bincount(labels[sorted(kept)], minlength=4).tolist()
        assert {row["class"] for row in found} == set(CLASSES)
    distances = {(row["one"], row["other"]): row["distance"] for row in rows(made[1], "distances")}
    assert len(distances) == 3  # of the three condensed runs; those that keep everything are all alike
    other = kept_of(place, "kcd-seed2")[-1]
    assert distances["kcd-seed0", "kcd-seed2"] == pytest.approx(len(sets[-1] ^ other) / 120)


def test_costs_are_those_of_store_and_runs(place, made):
    found = {row["row"]: row for row in rows(made[1], "cost")}
    assert [found["store (store)"][name] for name in ("teacher_forwards", "seconds")] == [3 * 120, 1.25]
    for name in ("student_samples", "rows_read", "bytes_read"):
        assert found[ROWS["kcd"]][name] == pytest.approx(statistics.fmean(summaries(place, "kcd", name)))
    assert found[ROWS["kd"]]["live_forwards"] == statistics.fmean(summaries(place, "kd", "student_samples")) == 6 * 120
    assert found[ROWS["base"]]["live_forwards"] is None  # nobody taught it
    for column, entry in (("images_per_second", "mean"), ("images_per_second_std", "std")):
        speeds = [speed[entry] for speed in summaries(place, "kcd", "images_per_second") if speed[entry] is not None]
        assert found[ROWS["kcd"]][column] == (pytest.approx(statistics.fmean(speeds)) if speeds else None)


def test_a_stores_forwards_are_shown_once_where_they_were_paid(place, known):
    def paid(report):
        rows_ = report["tables"]["cost"]["rows"]
        return [(row["row"], row["teacher_forwards"]) for row in rows_ if row["teacher_forwards"]]

    assert paid(numbers(place.folder)) == [("store (store)", 3 * 120)]
    runs = [place.folder / name for name in ("kd-seed0", "kd-seed1", "kcd-seed0")]
    name = known.stores[0].knowledge_id[:12]
    assert paid(numbers(*runs)) == [(f"store {name} (elsewhere)", 3 * 120)]
    (store,) = known.stores
    elsewhere = dataclasses.replace(store.knowledge.teacher, architecture="imported")
    computed = store.model_copy(update={"knowledge": dataclasses.replace(store.knowledge, teacher=elsewhere)})
    assert tables.cost(known._replace(stores=(computed,)))[0]["teacher_forwards"] == 0


def test_provenance_names_settings_commit_versions_and_digests(place, made):
    record = json.loads((place.folder / "kcd-seed0" / "run.json").read_text())
    (row,) = rows(made[1], "runs", run="kcd-seed0")
    assert (row["commit"], row["threads"]) == (record["environment"]["git_commit"], record["environment"]["threads"])
    assert f"torch {record['environment']['versions']['torch']}" in row["versions"]
    report = {row["setting"]: row["value"] for row in rows(made[1], "settings", row=ROWS["kcd"])}
    assert {name: report[name] for name in ("seed", "keep")} == {"seed": "0 | 1 | 2", "keep": "0.5"}
    assert len(report) == len(record["settings"])
    ids = {row["id"] for row in rows(made[1], "identities", of="kcd-seed0")}
    network = json.loads((place.folder / "kcd-seed0" / "student.json").read_text())
    assert {record["inputs"]["knowledge_id"], record["inputs"]["test"], network["weights_sha256"]} < ids


# one file


def test_json_and_csv_hold_the_numbers_of_the_page(made, page):
    folder, report = made
    assert json.loads((folder / "r.json").read_text())["tables"] == report["tables"]
    for key, table in report["tables"].items():
        written = list(csv.DictReader(io.StringIO((folder / "tables" / f"{key}.csv").read_text())))
        for row, plain in zip(table["rows"], written, strict=True):
            for name, value in row.items():
                found = plain[name].removeprefix("'")
                is_text = value is None or isinstance(value, str)
                assert found == printable(value or "") if is_text else float(found) == value
    drawn_or_empty = {"troubles", "curves", "classes", "fidelity", "screening"}
    assert {*report["tables"]} - {*page.tables} == drawn_or_empty


def test_the_page_shows_the_rounded_numbers_of_the_tables(made, page):
    for key, (head, *cells) in page.tables.items():
        table = made[1]["tables"][key]
        assert head == list(table["columns"].values())
        for row, line in zip(table["rows"], cells, strict=True):
            for value, title, cell in zip(row.values(), head, line, strict=True):
                if isinstance(value, str) or value is None:
                    assert cell == printable(value or "")
                else:
                    digits = cell.replace(",", "").partition(".")[2] if "e" not in cell else ""
                    scale = 100 if title.endswith("%") or (title == "± std" and len(digits) == 2) else 1
                    shown = float(cell.replace(",", ""))
                    assert shown == pytest.approx(scale * value, rel=1e-3, abs=0.51 * 10.0 ** -len(digits))


def test_the_page_loads_nothing_and_runs_nothing(made, page):
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "link", "form", "base", "b", "i", "svg", "video", "audio"}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "action", "data", "srcset", "background", "style"):
            if (target := attributes.get(name)) is not None:
                assert (name, tag) in {("src", "img"), ("href", "a")}
                assert target.startswith("data:image/webp;base64," if tag == "img" else "#")
    links = [attributes["href"][1:] for tag, attributes in page.elements if tag == "a"]
    assert links == [attributes["id"] for tag, attributes in page.elements if tag == "h2"] == SECTIONS
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", (made[0] / "r.html").read_text())
    assert not re.search(r"url\(|@import|https?:", text)


def test_hostile_names_are_text_and_nothing_else(made, page):
    assert page.texts["title"] == page.texts["h1"] == [printable(TITLE)]
    assert {row[0] for row in page.tables["results"][1:]} == set(ROWS.values())
    shown = {text.strip() for text in page.texts["div"] + page.texts["br"]}
    assert shown >= {printable(name) for name in CLASSES if len(name) <= 24}
    assert "\u202e" not in (made[0] / "r.html").read_text()


def test_every_figure_shows_something_and_a_caption_says_how_to_read_it(made, page):
    figures = made[1]["figures"]
    assert [figure["key"] for figure in figures] == FIGURES
    assert min(len(figure["caption"]) for figure in figures) > 80
    assert len(page.texts["figcaption"]) == len(FIGURES)
    pictures = [Image.fromarray(decoded(source).astype(np.uint8)) for source in page.sources]
    titles = {strip["title"].rpartition(" (")[2] for strip in made[1]["images"]}
    assert titles == {f"{ROWS['kcd']}, seed 0)"}  # of the folder's first run alone
    large = [picture for picture in pictures if picture.width > 500]
    assert (len(pictures) > 40, len(large)) == (True, len(FIGURES))
    assert min(len(picture.convert("RGB").getcolors(2**24)) for picture in large) > 20


# images


def decoded(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2], validate=True))), np.float64)


def test_a_mix_shown_is_the_mix_of_the_images_shown(place, known):
    run = next(run for run in known.runs if run.name == "kcd-seed0")
    strip = images.strips(run, datasets.load(place.data))[-1]
    assert strip.title == "Mixed into K_Aug"
    shares = []
    for kept, dropped, mix in strip.shots:
        one, other, mixed = (decoded(shot.uri) for shot in (kept, dropped, mix))
        share = int(re.match(r"\d+", mix.lines[1])[0]) / 100
        shares.append(share)
        assert np.abs((1 - share) * one + share * other - mixed).max() <= 0.5 + 0.005 * 255
    assert shares == sorted(shares)
    assert shares[-1] > 0.2


def test_the_images_shown_are_those_of_the_numbers_below_them(place, known):
    run = next(run for run in known.runs if run.name == "kcd-seed1")
    dataset = datasets.load(place.data)
    best, worst, *_ = images.strips(run, dataset)
    file = pq.read_table(place.folder / "kcd-seed1" / "stages" / "2" / "values.parquet").to_pydict()
    score = [value * visits**0.03 for value, visits in zip(file["value"], file["visits"], strict=True)]
    ranked = sorted(range(120), key=lambda sample: -score[sample])
    for strip, expected in ((best, ranked[:12]), (worst, ranked[::-1][:12])):
        shown = [int(shots[0].lines[1].removeprefix("#")) for shots in strip.shots]
        assert set(shown) == set(expected)
        for sample, (shot,) in zip(shown, strip.shots, strict=True):
            assert (decoded(shot.uri) == dataset.train.source.images(np.array([sample]))[0]).all()
            assert shot.lines[2] == f"V = {file['value'][sample]:.2f}"


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("digits?train=120", r"the data 'digits\?train=120' cannot be used: .* is not what kcd-seed0 was trained on"),
        ("folder:/nowhere", r"the data 'folder:/nowhere' cannot be used: no folder"),
        ("condensed:/nowhere", r"the data 'condensed:/nowhere' cannot be used: no exported set"),
        (None, r"no results.json that names the data; give --data"),
    ],
)
def test_a_note_says_why_there_are_no_images(known, spec, why):
    run = next(run for run in known.runs if run.name == "kcd-seed0")
    strips, (note,) = images.collected([("the run", dataclasses.replace(run, data=None))], spec)
    assert strips == []
    assert re.match(f"the run: no images, because .*{why}", note)


@pytest.mark.parametrize(("spec", "count"), [("cifar100:/nowhere", 100), ("folder:/any", 200_001)])
def test_nothing_is_downloaded_and_nothing_huge_is_read_for_pictures_nobody_asked_for(spec, count):
    with pytest.raises(NotFoundError, match="give --data"):
        images.require_cheap(spec, count)


# what is not in the numbers


def problems(report):
    return {Path(row["path"]).name: (row["state"], row["error"]) for row in rows(report, "troubles")}


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def test_unfinished_damaged_and_missing_runs_are_listed_and_the_rest_is_used(place, copy, tmp_path):
    material = distill.Material(data=datasets.load(place.data), knowledge=reader.open(copy / "store"))
    distill.run(settings.TrainSettings(**SCHOOL), material, out=copy / "kcd-seed9", until=3, machine=ON_CPU)
    (copy / "kcd-seed0" / "summary.json").unlink()
    for name in ("kcd-seed1", "kcd-seed2"):
        flip(copy / name / "stages" / "1" / "values.parquet")
    shutil.rmtree(copy / "kd-seed1")
    (copy / "kd-seed0" / "metrics.jsonl").write_text("")
    report = write([copy], tmp_path / "r.html")
    found = problems(report)
    assert {name: state for name, (state, _) in found.items()} == {
        "kcd-seed0": "damaged", "kcd-seed1": "damaged", "kcd-seed2": "damaged", "kd-seed0": "damaged",
        "kd-seed1": "missing", "kcd-seed9": "unfinished",
    }  # fmt: skip
    assert "values.parquet" in found["kcd-seed1"][1]
    assert "3 epochs are done; run its command again" in found["kcd-seed9"][1]
    assert [(row["row"], row["n"]) for row in rows(report, "results")] == [(ROWS["base"], 1)]
    page = Page((tmp_path / "r.html").read_text())
    assert {tuple(line[1:]) for line in page.tables["troubles"][1:]} == {
        (state, printable(error)) for state, error in found.values()
    }
    assert "1 finished run in 1 row. Not included: 1 missing, 4 damaged, 1 unfinished" in page.texts["p"][0]


@pytest.mark.parametrize("results", ['{"title": "half', '{"rows": 3, "runs": [4]}'])
def test_a_damaged_store_or_results_json_is_listed_and_the_runs_are_used(few, results):
    (few / "results.json").write_text(results)
    flip(next((few / "store" / "_kcd").glob("plan*")))
    report = numbers(few)
    assert [problems(report)[name][0] for name in ("results.json", "store")] == ["damaged"] * 2
    assert len(rows(report, "runs")) == 1


def test_without_any_sound_run_there_still_is_a_page(few, tmp_path):
    file = few / "base-seed0" / "run.json"
    record = json.loads(file.read_text())
    record["environment"]["versions"] = ["torch"]
    del record["digest"]
    file.write_bytes(readable_json({**record, "digest": digest_of(record)}))
    report = write([few], tmp_path / "r.html")
    assert "environment.versions: Input should be an object" in problems(report)["base-seed0"][1]
    assert rows(report, "runs") == []
    assert "0 finished runs in 0 rows. Not included: 5 missing, 1 damaged" in (tmp_path / "r.html").read_text()


def test_without_results_json_runs_are_found_and_mixed_rows_are_noted(copy):
    (copy / "results.json").unlink()
    (copy / "kd-seed1").rename(copy / "kcd-seed7")
    report = numbers(copy)
    assert [(row["row"], row["n"]) for row in rows(report, "results")] == [("base", 1), ("kcd", 4), ("kd", 1)]
    assert {row["reference"] for row in rows(report, "differences")} == {"kd"}
    unlike = tables.unlike_rows(load.read([copy]))
    assert unlike == ["the runs of 'kcd' differ in keep: their mean is of unlike runs"]


# what it is asked


def test_one_run_alone_and_given_twice(place):
    run = place.folder / "kcd-seed0"
    report = numbers(run, run, run / ".." / "kcd-seed0")
    assert [(row["row"], row["n"]) for row in rows(report, "results")] == [(ROWS["kcd"], 1)]
    assert rows(report, "differences") == []


def test_runs_of_several_folders_are_kept_apart(place, few):
    report = numbers(place.folder / "base-seed0", few)
    names = [f"{name}: {ROWS['base']}" for name in (place.folder.name, "few")]
    assert [row["row"] for row in rows(report, "results")] == names


def test_nothing_but_a_report_is_overwritten(place, tmp_path):
    (tmp_path / "mine.html").write_text("<p>mine")
    (tmp_path / "mine.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    before = content(tmp_path)
    for given, match in (
        ({"out": tmp_path / "mine.html"}, "is no report"),
        ({"out": tmp_path / "r.html", "json_file": tmp_path / "mine.json"}, "is no report"),
        ({"out": tmp_path / "r.html", "csv": tmp_path / "folder"}, "holds mine.txt"),
        ({"out": tmp_path / "r.txt"}, "end its name in .html"),
        ({"out": tmp_path / "r.html", "json_file": tmp_path / "r.txt"}, "end its name in .json"),
    ):
        with pytest.raises((MismatchError, SettingsError), match=match):
            write([place.folder / "kd-seed0"], **given)
    for path, match in ((tmp_path / "absent", r"nothing at .*absent"), (tmp_path, "is no run and holds none")):
        with pytest.raises((NotFoundError, MismatchError), match=match):
            write([path], tmp_path / "r.html")
    assert content(tmp_path) == before


def test_the_command_writes_the_page_and_prints_the_table(place, tmp_path, capsys):
    arguments = ["report", str(place.folder / "base-seed0"), "--out", str(tmp_path / "r.html"), "-q"]
    with pytest.raises(SystemExit) as stop:
        main.main(arguments)
    printed = capsys.readouterr().out.splitlines()
    assert (stop.value.code, printed[0], printed[-1]) == (0, printable(TITLE), f"files: {tmp_path / 'r.html'}")
    first = (tmp_path / "r.html").read_bytes()
    with pytest.raises(SystemExit):
        main.main([*arguments, "--json", "--json-file", str(tmp_path / "r.json")])
    assert (tmp_path / "r.html").read_bytes() == first  # the same runs give the same bytes
    report = json.loads(capsys.readouterr().out)
    assert report["tables"] == json.loads((tmp_path / "r.json").read_text())["tables"]


def test_the_command_says_what_it_does_not_compare_and_does_so_across(place, tmp_path, capsys):
    runs = [str(place.folder / name) for name in ("base-seed0", "kd-seed0")]
    said = f"note: '{ROWS['base']}' and '{ROWS['kd']}' differ in epochs (2 and 6)"
    for more, end, compared in (([], ": not compared without --across", 0), (["--across"], " and are compared", 3)):
        with pytest.raises(SystemExit) as stop:
            main.main(["report", *runs, "--out", str(tmp_path / "r.html"), "-q", *more])
        printed = capsys.readouterr().out
        assert (stop.value.code, f"{said}{end}" in printed, "student samples" in printed) == (0, True, True)
        assert f"{2 * 120:,}" in printed
        assert f"{6 * 120:,}" in printed
        page = Page((tmp_path / "r.html").read_text())
        assert len(page.tables.get("differences", [None])) - 1 == compared


# in a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browsed(page, folder, *arguments):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000"]
    command = [BROWSER, *flags, f"--user-data-dir={folder / 'profile'}", *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_shows_the_page_and_runs_nothing_of_it(made, tmp_path):
    dom = Page(browsed(made[0] / "r.html", tmp_path, "--dump-dom"))
    assert dom.texts["title"] == [printable(TITLE)]
    assert "script" not in {tag for tag, _ in dom.elements}
    assert dom.tables == Page((made[0] / "r.html").read_text()).tables
    browsed(made[0] / "r.html", tmp_path, f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1200,9000")
    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB")).reshape(-1, 3)
    for colour in ((0, 114, 178), (86, 180, 233), (213, 94, 0)):  # figures are there: their own blues and red
        assert (pixels == colour).all(axis=1).sum() > 200
