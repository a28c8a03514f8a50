"""Rows and numbers that may not be, in files whose digests fit: the first offending row is named, no NaN gets in."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pupils import distilled, school

from kcdcache import rng
from kcdcache import settings as kcdcache_settings
from kcdcache.condensation import manifest, summary, values
from kcdcache.errors import MismatchError, NonFiniteError
from kcdcache.files import parquet
from kcdcache.files.records import canonical_json
from kcdcache.runs import state
from kcdcache.runs.folder import RunFolder

COUNT = 40
ORDER = ("index", "mixed", "partner", "epsilon", "rank", "value", "visits", "weight")


def chosen(seed):
    """A condensed set of random values: half of 40 samples, all of them mixed but one."""
    random = np.random.default_rng(seed)
    found = values.Values(np.ones(COUNT, np.int32), random.random(COUNT, np.float32))
    samples = manifest.Samples("k", COUNT, np.arange(COUNT) % 4, 4)
    kept = summary.condense(found, kcdcache_settings.CondenseSettings(), samples, stage=1, keep=0.55)
    assert 0 < kept.mixed.sum() < len(kept)
    return kept


def forge(path, columns, document):
    """Write a manifest file of any content, with a digest that fits it: what a skilled hand would leave."""
    document = {key: value for key, value in document.items() if key != "digest"}
    digest = parquet.digest(canonical_json(document), {name: columns[name] for name in ORDER})
    empty = columns["partner"] == -1
    cells = {
        "index": columns["index"], "part": np.where(columns["mixed"], "K_Aug", "K_1H"),
        "partner": pa.array(columns["partner"], mask=empty), "epsilon": columns["epsilon"], "rank": columns["rank"],
        "value": pa.array(columns["value"], mask=columns["visits"] == 0), "visits": columns["visits"],
        "weight": columns["weight"],
    }  # fmt: skip
    metadata = {"kcdcache.manifest": canonical_json(document | {"digest": digest})}
    table = pa.table({name: pa.array(cell) for name, cell in cells.items()}).replace_schema_metadata(metadata)
    path.write_bytes(parquet.encode(table))


def copies(kept):
    return {name: column.copy() for name, column in kept.columns().items()}


BREAKS = {
    "index negative": ("index", -1, r"index to be a sample in \[0, 40\)"),
    "index too high": ("index", COUNT, r"index to be a sample in \[0, 40\)"),
    "partner too high": ("partner", COUNT, "partner to be"),
    "epsilon NaN": ("epsilon", np.nan, "epsilon to be"),
    "rank too high": ("rank", COUNT, r"rank to be a rank in \[0, 40\)"),
    "visits negative": ("visits", -1, "visits to be 0 or more"),
    "value NaN": ("value", np.nan, "value to be a finite number"),
    "weight zero": ("weight", 0, "weight to be a finite number above 0"),
}
"""name -> column, what stands there, what is expected; of the rules themselves see test_manifest"""


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 5), st.integers(0, 10**6))
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_row_is_named(tmp_path, name, seed, where):
    column, number, expected = BREAKS[name]
    columns = copies(kept := chosen(seed))
    row = 1 + where % (len(kept) - 1)
    columns[column][row] = number
    forge(tmp_path / "m.parquet", columns, kept.document())
    with pytest.raises(MismatchError, match=rf"manifest row {row}, index -?\d+: expected {expected}"):
        manifest.read(tmp_path / "m.parquet")


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(["weight zero", "rank too high", "value NaN", "visits negative"]), st.integers(0, 10**6))
def test_of_many_broken_rows_the_first_is_named(tmp_path, names, where):
    columns = copies(kept := chosen(2))
    rows = np.sort(np.random.default_rng(where).choice(np.arange(len(kept)), len(names), replace=False))
    for name, row in zip(names, rows.tolist(), strict=True):
        columns[BREAKS[name][0]][row] = BREAKS[name][1]
    forge(tmp_path / "m.parquet", columns, kept.document())
    with pytest.raises(MismatchError, match=rf"manifest row {rows[0]}, index \d+: expected {names[0].split()[0]} "):
        manifest.read(tmp_path / "m.parquet")


def test_facts_that_do_not_fit_the_rows_are_refused(tmp_path):
    kept = chosen(3)
    forge(tmp_path / "m.parquet", kept.columns(), kept.document())
    assert manifest.read(tmp_path / "m.parquet").digest == kept.digest
    forge(tmp_path / "m.parquet", kept.columns(), kept.document() | {"class_counts": [5, 5, 5, 5]})
    with pytest.raises(MismatchError, match="manifest field 'class_counts': expected 22 in all, or nothing"):
        manifest.read(tmp_path / "m.parquet")


def test_a_manifest_longer_than_the_data_is_refused(tmp_path):
    manifest.write(tmp_path / "m.parquet", manifest.full(manifest.Samples("k", 50)))
    with pytest.raises(MismatchError, match="holds 50 rows, expected at most 40"):
        manifest.read(tmp_path / "m.parquet", 40)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return school(tmp_path_factory.mktemp("school"))


def test_a_set_of_values_that_are_no_numbers_cannot_be_made():
    wrong = np.ones(COUNT, np.float32)
    wrong[5] = np.nan
    found = values.Values(np.ones(COUNT, np.int32), wrong)
    samples, common = manifest.Samples("k", COUNT), {"stage": 1, "keep": 1.0}
    with pytest.raises(NonFiniteError, match="the value of index 5 is nan"):
        summary.condense(found, kcdcache_settings.CondenseSettings(), samples, **common)
    with pytest.raises(MismatchError, match="row 5, index 5: expected value to be a finite number, found nan"):
        summary.condense(found, kcdcache_settings.CondenseSettings(ranking="random"), samples, **common)


# ---- a loss that is no number


def test_a_diverged_run_names_epoch_step_and_the_samples_of_its_first_bad_batch(place, tmp_path):
    wild = {"learning_rate": 1e30, "warmup_epochs": 0, "student": "resnet8", "checkpoint_seconds": 60}
    with pytest.raises(
        NonFiniteError, match=r"in epoch 1, step 7; .*the first such loss was that of step \d"
    ) as caught:
        distilled(place, tmp_path / "run", **wild)
    told = str(caught.value)
    step = int(told.split("the first such loss was that of step ")[1][0])
    batch = rng.epoch_order(0, 0, np.arange(200))[step * 32 : (step + 1) * 32]
    named = [int(word) for word in told.rpartition("samples: ")[2].removesuffix(", ...").split(", ")]
    assert 0 < step < 7
    assert named == sorted(batch.tolist())[:16]
    assert state.load_checkpoint(RunFolder(path=tmp_path / "run")) is None
    assert not list((tmp_path / "run").glob("values.parquet"))


def test_nothing_of_a_run_holds_a_number_that_is_none(place, tmp_path):
    distilled(place, tmp_path / "run")
    for path in tmp_path.rglob("*.parquet"):
        for column in pq.read_table(path).columns:
            if pa.types.is_floating(column.type):
                assert np.isfinite(column.drop_null().to_numpy()).all(), path
    tensors, record = state.load_checkpoint(RunFolder(path=tmp_path / "run"))
    assert all(torch.isfinite(value).all() for value in tensors.values())
    json.dumps(record.document(), allow_nan=False)
