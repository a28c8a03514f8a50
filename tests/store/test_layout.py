import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import plan_of_document

from kcdcache.errors import CorruptionError, SettingsError
from kcdcache.store import encoding
from kcdcache.store import plan as plan_
from kcdcache.store.plan import all_chunks, grow_plan, part_chunks, plan_store

COUNTS = st.one_of(st.integers(1, 1100), st.integers(1024, 70_000), st.integers(70_000, 2_000_000))
TEXTS = st.sampled_from(["float16", "float32", "top:1"])


def planned(count=50_000, views=2, classes=100, text="float16", **settings):
    return plan_store(count, views, [encoding.parse(text, "logits", (classes,))], **settings)


@settings(max_examples=75)
@given(COUNTS, TEXTS, st.integers(1, 50_000), st.integers(1, 400_000), st.integers(1, 40))
def test_every_plan_keeps_its_promises(count, text, classes, width, views):
    features = encoding.parse("float16", "penultimate", (width,))
    plan = plan_store(count, views, [encoding.parse(text, "logits", (classes,)), features])
    assert plan.part_rows <= 16384
    assert plan.part_rows >= 4096 or plan.parts_per_view == 1
    assert count > 16384 or plan.parts_per_view == 1
    for array in plan.arrays:
        assert plan.part_rows % array.chunk_rows == 0
        assert array.chunk_bytes <= max(8 * 2**20, array.row_bytes)
        padding = -(-count // array.chunk_rows) * array.chunk_rows - count
        assert padding <= 0.02 * count


@settings(max_examples=25)
@given(st.integers(1, 70_000), st.integers(1, 3), TEXTS, st.integers(1, 200_000))
def test_parts_and_their_chunks_cover_everything_once(count, views, text, width):
    plan = plan_store(count, views, [encoding.parse("float16", "penultimate", (width,))])
    parts = plan_.parts(plan)
    assert [(part.view, part.start) for part in parts] == sorted((part.view, part.start) for part in parts)
    covered = [chunk for part in parts for chunk in part_chunks(plan, part)] + part_chunks(plan, None)
    assert sorted(covered) == sorted(all_chunks(plan))
    assert len({chunk.key for chunk in covered}) == len(covered)
    assert sum(chunk.stop - chunk.start for chunk in covered) == count * (
        views * len(plan.arrays_of(plan.encodings)) + 2
    )


@settings(max_examples=20)
@given(COUNTS, st.integers(1, 5), TEXTS, st.sampled_from(["none", "zstd"]), st.integers(1, 999))
def test_reading_back_a_plans_document_gives_the_plan(count, views, text, compression, batch):
    plan = planned(count, views, 10, text, compression=compression, batch_size=batch)
    again = plan_of_document(plan.document())
    assert again == plan
    assert again.layout_id == plan.layout_id


def test_imagenet_takes_seventy_nine_parts_a_view_in_chunks_of_eight_mebibytes():
    plan = planned(1_281_167, 1, 1000)
    assert plan.parts_per_view == 79
    assert 7 * 2**20 < plan.arrays[0].chunk_bytes <= 8 * 2**20
    assert plan.bytes == pytest.approx(1_281_167 * (2004 + 16), rel=0.003)


def test_plans_print_what_they_will_cost():
    text = str(planned(1000, 3, 10))
    assert "1000 samples x 3 views; logits (10,) as float16; 1 parts of 1008 rows" in text
    assert f"{1008 * 24} bytes a view, {1008 * 24 * 3 + 1008 * 16} in all" in text


def test_batches_split_a_part_where_it_starts():
    plan = planned(20_000, 1, 10, batch_size=6000)
    last = plan_.parts(plan)[-1]
    assert plan.batches(last) == [(10048, 16048), (16048, 20000)]


@pytest.mark.parametrize("change", [{"views": 3}, {"text": "float32"}, {"batch_size": 64}, {"compression": "zstd"}])
def test_layout_id_changes_with_every_setting(change):
    assert planned(**change).layout_id != planned().layout_id


def test_growing_writes_only_what_is_new():
    before = planned(100, 2, 10)
    plan = grow_plan(before, 3, [encoding.parse("float32", "penultimate", (4,))])
    fields = [(part.view, part.fields) for part in plan_.parts(plan, before)]
    assert fields == [(0, ("penultimate",)), (1, ("penultimate",)), (2, ("logits", "penultimate"))]
    assert plan_.parts(before, before) == []


def test_stores_do_not_shrink_or_change_encodings():
    with pytest.raises(SettingsError, match="holds 2 views, 1 were requested"):
        grow_plan(planned(), 1)
    with pytest.raises(SettingsError, match=r"'logits' is stored as float16 \(100,\), not float32"):
        grow_plan(planned(), 2, [encoding.parse("float32", "logits", (100,))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "found 0 samples"),
        ({"views": 0}, "0 views"),
        ({"compression": "lz4"}, "unknown compression 'lz4'; known: none, zstd"),
        ({"classes": 2**24 + 1}, r"one row of 'logits' \(16777217,\) takes 33554434 bytes"),
    ],
)
def test_impossible_plans_are_refused(change, message):
    with pytest.raises(SettingsError, match=message):
        planned(**change)
    forms = [encoding.parse("float32", field, (3,)) for field in ("logits", "labels")]
    with pytest.raises(SettingsError, match="two arrays of a store would be called 'labels'"):
        plan_store(10, 1, forms)


@pytest.mark.parametrize("key", ["count", "views", "part_rows", "fields", "compression", "batch_size"])
def test_damaged_plans_are_refused(key):
    for value in (None, -1, "x", [{}], True):
        with pytest.raises(CorruptionError, match=r"plan is damaged"):
            plan_of_document({**planned().document(), key: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sharding": True}, r"a plan is damaged or was changed: sharding: "),
        ({"encoding": "top:04"}, "holds entries this kcdcache does not know"),
        ({"chunk_rows": {"logits": 128, "other": 128}}, "holds entries this kcdcache does not know"),
        ({"chunk_rows": {}}, "a store's plan is damaged: 'logits'"),
        ({"chunk_rows": {"logits": 5}}, "chunks of 5 rows of 'logits' in parts of 128 rows"),
    ],
    ids=str,
)
def test_plans_with_unknown_or_missing_entries_are_refused(change, said):
    document = planned(128, text="top:4").document()
    known = change.keys() & document["fields"][0].keys()
    changed = {"fields": [document["fields"][0] | change]} if known else change
    with pytest.raises(CorruptionError, match=said):
        plan_of_document(document | changed)


def test_more_samples_or_parts_than_a_store_takes_are_refused_before_anything_is_computed():
    said, field = (
        "a store takes 100000000 samples and 330000 parts at most, found",
        encoding.parse("float16", "a", (9,)),
    )
    most = plan_store(10**8, 54, [field])
    assert most.views * most.parts_per_view == 329_616
    for ask in (lambda: plan_store(10**8, 55, [field]), lambda: grow_plan(most, 55)):
        with pytest.raises(SettingsError, match=f"{said} 55 views in 335720 parts"):
            ask()
    with pytest.raises(SettingsError, match=f"{said} 100000001 samples"):
        plan_store(10**8 + 1, 1, [field])
    for change in ({"count": 10**8 + 1, "views": 1}, {"views": 55}):
        with pytest.raises(CorruptionError, match=said):
            plan_of_document(most.document() | change)
