"""Sets planned in shares, with boxes in memory and in files, are those planned in memory: every row, every option."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_condense import OPTIONS, parent_of, slow_condense, slow_order
from test_condense import cases as slow_cases

from kcdcache import boxes, config, manifest, spread, values
from kcdcache.team import ALONE

FACTS = {"knowledge_id": "k", "data_digest": "d", "classes": 5}


@pytest.fixture(params=[1, 3, 2**20])
def block_rows(request, monkeypatch):
    monkeypatch.setattr(boxes, "ROWS", request.param)


def shared(found, labels, option, each, unit, spill, *, count, stage, keep, previous=None, excluded=()):
    """The plan made in `each` shares by one process."""
    source = values.Held(found, labels)
    within = boxes.Boxes(ALONE, each, spill)
    before = None if previous is None else spread.Before(previous.digest, len(previous), previous.index)
    return spread.plan(
        source, option, count=count, stage=stage, keep=keep, previous=before, excluded=np.array(excluded, np.int64),
        within=within, bounds=spread.bounds_of(count, unit, each),
    )  # fmt: skip


def by_share(plan, source, bounds):
    blocks = [plan.columns(block) for start, stop in pairwise(bounds.tolist()) for block in source.blocks(start, stop)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in manifest.ARRAYS}


@given(slow_cases(), st.fixed_dictionaries(OPTIONS), st.integers(1, 9), st.integers(1, 50), st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_number_of_shares_gives_the_rows_of_the_slow_reference(
    tmp_path_factory, block_rows, case, options, each, unit, spilled
):
    option = config.CondenseSettings(**options)
    count, competing = case["count"], len(slow_order(case, option))
    assume(competing > 0)
    case["size"] = min(case["size"], competing)
    found = values.Values(np.array(case["visits"], np.int32), np.array(case["value"], np.float32))
    spill = boxes.Spill(tmp_path_factory.mktemp("spill")) if spilled else None
    plan = shared(
        found, np.array(case["labels"]), option, each, unit, spill, count=count, stage=2, keep=case["size"] / count,
        previous=parent_of(case), excluded=case["excluded"],
    )  # fmt: skip
    rows = by_share(plan, values.Held(found), spread.bounds_of(count, unit, each))
    expected, dropped = slow_condense(case, option)
    assert plan.dropped == dropped
    for position, name in enumerate(("index", "mixed", "partner")):
        assert rows[name].tolist() == [row[position] for row in expected]
    np.testing.assert_array_equal(rows["epsilon"], np.array([row[3] for row in expected], np.float32))
    for position, name in enumerate(("rank", "value", "visits")):
        assert rows[name].tolist() == [row[4 + position] for row in expected]
