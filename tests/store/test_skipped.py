"""Samples skipped in a store: never trained on, kept or mixed in, by any schedule, by hand or resumed (M6)."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damaging import flip, put
from lessons import condensed
from pupils import SCHOOL, BrokenOffError, command, distilled, everything, once, same_files, stop_after
from touchy import EVERYONE, SKIP, TRAIN, made, place_for, white_place, whole_in

from kcdcache.cli import main
from kcdcache.commands import verify
from kcdcache.condensation import manifest, schedule, value_files
from kcdcache.errors import MismatchError
from kcdcache.runs.state import read_metrics, read_summary
from kcdcache.store import log, reader
from kcdcache.teacher import repair


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return white_place(tmp_path_factory.mktemp("white"))


@pytest.fixture(scope="module")
def runs(place):
    return once(place)


def manifests(run):
    return [manifest.read(path) for path in sorted(run.glob("stages/*/manifest.parquet"))]


SHORT = {"epochs": 3}
SCHEDULES = [
    {},
    SHORT | {"k0": "stage_slice", "unseen": "first", "cost_exponent": 0.0},
    SHORT | {"schedule": "alg1_shift", "stratify": True},
    SHORT | {"mix_target": "requery"},
    {"keep": 1.0, "stages": 1, "epochs": 1},
]
SCHEDULES += [
    pytest.param(SHORT | options, marks=pytest.mark.slow)
    for options in ({"schedule": "paper_stage"}, {"ranking": "random", "augment_kept": False}, {"keep": 0.999})
]


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_no_set_of_a_run_keeps_or_mixes_in_a_skipped_sample(place, runs, options):
    found = manifests(runs(**options))
    assert len(found) >= 2
    for chosen in found:
        assert not np.isin(place.white, chosen.index).any()
        assert not np.isin(place.white, chosen.partner).any()
        assert len(chosen) == min(schedule.kept_count(chosen.keep, TRAIN), TRAIN - 2)
        assert len(chosen) + chosen.dropped <= TRAIN - 2


def test_the_first_stage_visits_everybody_else(place, runs):
    first = value_files.read(runs() / "stages/0/values.parquet", TRAIN).values
    assert np.flatnonzero(first.visits == 0).tolist() == place.white
    assert set(first.visits[np.setdiff1d(EVERYONE, place.white)].tolist()) == {2}


def test_counters_count_what_was_really_done(runs):
    run = runs()
    rows, sets = read_metrics(run), manifests(run)
    summary = read_summary(run)
    assert [row.kept for row in rows] == [198, 198, len(sets[1]), len(sets[1]), len(sets[2]), len(sets[2])]
    assert summary.student_samples == sum(row.kept for row in rows)
    assert summary.relative_cost == summary.student_samples / (TRAIN * 6)
    assert summary.kept == len(sets[-1]) == 120
    read = [len(np.union1d(chosen.index, chosen.partner[chosen.mixed])) for chosen in sets[:3]]
    assert [row.rows_read for row in rows] == [rows for rows in read for _ in range(2)]


@pytest.mark.parametrize("epochs", [2, *(pytest.param(epochs, marks=pytest.mark.slow) for epochs in (1, 5))])
def test_a_run_without_skipped_samples_resumes_to_the_same_bytes(place, runs, tmp_path, epochs):
    with pytest.raises(BrokenOffError):
        distilled(place, tmp_path / "run", run={"progress": stop_after(epochs)})
    distilled(place, tmp_path / "run")
    assert same_files(runs(), tmp_path / "run")


@pytest.mark.parametrize("options", [{}, pytest.param({"k0": "stage_slice"}, marks=pytest.mark.slow)], ids=str)
def test_condensing_by_hand_gives_the_same_bytes(place, runs, tmp_path, options):
    run, choices = tmp_path / "run", {"cost_exponent": SCHOOL["cost_exponent"]} | options
    given = {}
    for stage in (1, 2):
        command(place, "train", data=place.spec, out=run, until=2 * stage, **(SCHOOL | options | given))
        keep = manifest.read(runs(**options) / "stages" / str(stage) / "manifest.parquet").keep
        before = run / "stages" / str(stage - 1) / "manifest.parquet"
        file = tmp_path / f"{stage}.parquet"
        command(place, "condense", values=run / "values.parquet", previous=before, keep=keep, out=file, **choices)
        given = {"manifest": file}
    command(place, "train", data=place.spec, out=run, **(SCHOOL | options | given))
    assert same_files(runs(**options), run)


def test_another_tools_values_never_bring_a_skipped_sample_back(place, tmp_path):
    """A value of its own is passed over, and it is not among the unvisited that come first."""
    tables = {
        0.5: (EVERYONE, np.where(np.isin(EVERYONE, place.white), 99.0, np.linspace(0, 1, TRAIN))),
        0.01: (seen := np.setdiff1d(EVERYONE, [*place.white, 7, 8]), np.ones(len(seen))),
    }
    told = {}
    for keep, (index, value) in tables.items():
        file, out = tmp_path / f"{keep} theirs.parquet", tmp_path / f"{keep}.parquet"
        pq.write_table(pa.table({"index": index, "value": value}), file)
        told[keep] = command(place, "condense", values=file, keep=keep, out=out)
        chosen = manifest.read(out)
        assert not np.isin(place.white, [*chosen.index, *chosen.partner]).any()
    assert (told[0.5]["kept"], told[0.5]["K_0"]) == (100, 98)
    assert (chosen.index.tolist(), told[0.01]["unseen"]) == ([7, 8], 2)


def set_with(place, column):
    """A set, made as if nothing was skipped, that keeps a skipped sample or mixes one in."""
    for seed in range(100):
        chosen = condensed(place.knowledge, seed=seed)
        kept, mixed = (np.isin(place.white, used).any() for used in (chosen.index, chosen.partner))
        if (kept, mixed) == (column == "index", column == "partner"):
            return chosen
    raise AssertionError("no such set")


@pytest.mark.parametrize("column", ["index", "partner"])
def test_a_given_set_that_uses_a_skipped_sample_is_refused_before_anything_is_made(place, tmp_path, column):
    chosen = set_with(place, column)
    row = np.flatnonzero(np.isin(getattr(chosen, column), place.white))[0]
    said = (
        rf"manifest row {row}, index {chosen.index[row]}: expected {column} to be a sample the store has outputs of, "
        rf"found {getattr(chosen, column)[row]}, one of 2 skipped"
    )
    with pytest.raises(MismatchError, match=said):
        distilled(place, tmp_path / "run", given=chosen)
    assert not (tmp_path / "run").exists()


def test_a_given_set_without_skipped_samples_is_condensed_further_without_them(place, runs, tmp_path):
    given = manifests(runs())[1]
    distilled(place, tmp_path / "run", given=given, keep=0.3, schedule="paper_stage")
    for chosen in manifests(tmp_path / "run"):
        assert set(chosen.index.tolist()) < set(given.index.tolist())


def test_a_run_whose_store_skips_more_since_is_not_continued(place, tmp_path):
    made(place, tmp_path / "store", views=1, **SKIP)
    mine = SimpleNamespace(data=place.data, knowledge=reader.open(tmp_path / "store"))
    with pytest.raises(BrokenOffError):
        distilled(mine, tmp_path / "run", run={"progress": stop_after(1)})
    made(place, tmp_path / "store", **SKIP)
    with pytest.raises(MismatchError, match=r"inputs.*skipped|skipped.*use another --out"):
        distilled(mine, tmp_path / "run")


def test_verify_computes_all_but_the_skipped_again(place):
    found = verify.recheck(place.knowledge, place.data, place.network, points=10**6)
    assert found == (3 * (TRAIN - 2), 0, 0.0)


def test_verify_passes_over_a_batch_that_was_skipped_whole(tmp_path):
    tail = place_for(tmp_path / "tail", [TRAIN - 1])
    made(tail, tmp_path / "store", augment="none", views=1, batch_size=TRAIN - 1, **SKIP)
    found = verify.recheck(reader.open(tmp_path / "store"), tail.data, tail.network, points=10**6)
    assert (found.points, found.differing) == (TRAIN - 1, 0)


def test_damaged_parts_with_skipped_samples_are_made_again(place, tmp_path):
    made(place, tmp_path / "store", **SKIP)
    before, files = everything(tmp_path / "store"), {"logits/c.0.0.0", "_kcd/log/0/v00002-p00000.json"}
    for file in files:
        put(tmp_path / "store" / file, flip((tmp_path / "store" / file).read_bytes(), 403))
    assert set(repair.repair(tmp_path / "store", repair.Means(data=place.data, network=place.network))) == files
    assert everything(tmp_path / "store") == before


def test_imported_logits_are_held_to_the_same_on_the_command_line(place, tmp_path, capsys):
    file, logits = tmp_path / "logits.npy", np.random.default_rng(0).normal(0, 3, (2, TRAIN, 10))
    logits[[0, 1, 0], [11, 5, 3], 4] = np.nan, 1e300, 1e5
    np.save(file, logits)
    words = ["precompute", "--data", place.spec, "--augment", "crop", "--min-accuracy", "0", "--encoding", "float16"]
    words += ["--from-logits", str(file), "--store", str(tmp_path / "store")]
    assert main._outcome(words) == 5
    said = "error: field 'logits' is not finite for samples 11 (rows counted from 0), in view 0; `--on-nonfinite skip`"
    assert said in capsys.readouterr().err
    assert main._outcome([*words, "--on-nonfinite", "skip", "--json"]) == 0
    assert '"skipped": 2' in capsys.readouterr().out
    knowledge = reader.open(tmp_path / "store")
    assert knowledge.skipped.tolist() == [5, 11]
    assert knowledge.read("logits", 0, np.array([3]))[0, 4] == 1e5


def test_an_unfinished_store_tells_what_it_skipped_so_far(place, tmp_path):
    with pytest.raises(BrokenOffError):
        made(place, tmp_path / "store", progress=stop_after(1), **SKIP)
    assert log.read_skipped(tmp_path / "store").tolist() == np.intersect1d(place.white, whole_in(0)).tolist() != []
    made(place, tmp_path / "store", **SKIP)
    assert log.read_skipped(tmp_path / "store").tolist() == place.white
