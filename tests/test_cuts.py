"""Places in the order of many keys, found by counting, are those of a sort; boxes keep their rows."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kcdcache import boxes, cuts, hashing, tables
from kcdcache.errors import SettingsError
from kcdcache.team import ALONE

FEW = st.sampled_from([0, 1, 2**16, 2**16 + 1, 2**31, 2**32 - 1])


def blocks_of(keys, step):
    return lambda: (keys[first : first + step] for first in range(0, len(keys), step))


@given(st.lists(FEW | st.integers(0, 2**32 - 1), min_size=1, max_size=60), st.integers(1, 20), st.data())
@settings(max_examples=100, deadline=None)
def test_every_key_falls_between_the_cuts_that_its_place_lies_between(found, step, data):
    keys = np.array(found, np.uint64) << np.uint64(data.draw(st.sampled_from([0, 32])))
    bits = 64 if keys.max() >= 2**32 else 32
    at = np.array(sorted(data.draw(st.lists(st.integers(0, len(found) - 1), max_size=6))), np.int64)
    sieve = cuts.Sieve(cuts.find(blocks_of(keys, step), bits, at))
    order = sorted(range(len(found)), key=lambda row: (found[row], row))
    expected = [int((at <= order.index(row)).sum()) for row in range(len(found))]
    assert np.concatenate([sieve.sorted(block) for block in blocks_of(keys, step)()]).tolist() == expected


@given(st.lists(FEW | st.integers(0, 2**32 - 1), min_size=1, max_size=60), st.data())
@settings(max_examples=50, deadline=None)
def test_a_cut_tells_its_key_and_how_many_are_below(found, data):
    at = np.array(sorted(data.draw(st.lists(st.integers(0, len(found) - 1), min_size=1, max_size=6))), np.int64)
    made = cuts.find(blocks_of(np.array(found, np.uint64), 7), 32, at)
    assert made.of.tolist() == [sorted(found)[place] for place in at]
    assert made.keys.tolist() == sorted(set(made.of.tolist()))
    assert made.before.tolist() == [sum(key < mine for key in found) for mine in made.keys.tolist()]


@pytest.mark.parametrize("at", [[3], [-1], [0, 7]])
def test_places_beyond_the_keys_are_refused(at):
    with pytest.raises(SettingsError, match="of 3 samples; ask for at least 1 and at most all"):
        cuts.find(blocks_of(np.arange(3, dtype=np.uint64), 2), 32, np.array(at))


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 99), min_size=4, max_size=4))
def test_rows_are_numbered_within_their_groups(groups, first):
    seen = list(first)
    expected = []
    for group in groups:
        expected.append(seen[group])
        seen[group] += 1
    assert cuts.numbered(np.array(groups, np.int64), np.array(first)).tolist() == expected


@pytest.mark.parametrize("spilled", [False, True])
@given(sizes=st.lists(st.integers(0, 9), max_size=8))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_box_gives_back_what_it_took_in_order(tmp_path_factory, spilled, sizes):
    spill = boxes.Spill(tmp_path_factory.mktemp("spill")) if spilled else None
    box = boxes.Boxes(ALONE, 1, spill).box({"a": np.uint32, "b": np.int64}, sum(sizes))
    everything = np.arange(sum(sizes))
    for stop, size in zip(np.cumsum(sizes), sizes, strict=True):
        box.add({"a": everything[stop - size : stop], "b": -everything[stop - size : stop]})
    assert box.rows == sum(sizes)
    for found in ([*box.blocks()], [box.whole()]):
        assert np.concatenate([[], *(block["a"] for block in found)]).tolist() == everything.tolist()
        assert np.concatenate([[], *(block["b"] for block in found)]).tolist() == (-everything).tolist()
    if spill is not None:
        assert (spill.bytes, spill.most) == (12 * sum(sizes), 12 * sum(sizes))
        assert sum(file.stat().st_size for file in spill.folder.iterdir()) == spill.bytes
    box.drop()
    assert box.rows == 0
    if spill is not None:
        assert (spill.bytes, spill.most, list(spill.folder.iterdir())) == (0, 12 * sum(sizes), [])


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_rows_are_dealt_into_the_boxes_they_are_for(to, step):
    rows = np.arange(len(to))
    blocks = [(np.array(to[first : first + step], np.int64), {"row": rows[first : first + step]})
              for first in range(0, len(to), step)]  # fmt: skip
    within = boxes.Boxes(ALONE, 5, None)
    found = within.dealt({"row": np.uint32}, np.bincount(to, minlength=5), iter(blocks), len(blocks))
    assert [box.whole()["row"].tolist() for box in found] == [
        [row for row in range(len(to)) if to[row] == box] for box in range(5)
    ]


def test_column_digests_are_those_of_the_whole_table():
    columns = {"a": np.arange(9), "b": np.arange(9, dtype=np.float32)}
    halves = [{name: column[some] for name, column in columns.items()} for some in (slice(4), slice(4, 9))]
    kinds = {name: column.dtype for name, column in columns.items()}
    found = hashing.column_digests(ALONE, kinds, lambda names: halves)
    whole = tables.combined(b"x", {name: (kinds[name], 9, found[name]) for name in kinds})
    assert whole == tables.digest(b"x", columns)
