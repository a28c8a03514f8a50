from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import knowledge, make

from kcdcache import errors
from kcdcache.errors import CorruptionError, MismatchError
from kcdcache.files.records import canonical_json, parse
from kcdcache.store import identity

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)
CHANGES = {
    "teacher": {"architecture": "other", "weights": "bb", "transform": {"mean": (0.4,)}, "precision": "bfloat16"},
    "data": {"count": 151, "classes": ("b", "a"), "image_size": None, "digest": "de"},
    "views": {"rule": "crop", "padding": 1, "fill": "reflect", "size": (4, 5), "seed": 1},
}


def test_every_field_decides_the_knowledge_id():
    ours = knowledge()
    told = {part: set(fields) for part, fields in asdict(ours).items() if part not in ("mixes", "subset")}
    assert {part: set(fields) for part, fields in CHANGES.items()} == told
    for part, name in ((part, name) for part, fields in CHANGES.items() for name in fields):
        changed = replace(ours, **{part: replace(getattr(ours, part), **{name: CHANGES[part][name]})})
        assert changed.knowledge_id != ours.knowledge_id
        assert errors.first_difference(ours.document(), changed.document())[0].startswith(f"{part}.{name}")


def test_the_knowledge_id_is_stable():
    assert knowledge().knowledge_id == "68eddf55283cf0376497e40d16110e0c47f73af2dcc7b2a2f1dc61280f6e47dd"


def read_back(document):
    written = canonical_json({"knowledge": document, "knowledge_id": "k"})
    return parse(identity.IdentityRecord, written, "an identity").knowledge


@pytest.mark.parametrize("image_size", [None, (4, 7)])
@pytest.mark.parametrize(
    "part",
    [{}, {"mixes": {"manifest": "m", "mix": "convex", "views": [0, 3]}}, {"subset": {"manifest": "m", "rows": 3}}],
)
def test_an_identity_reads_back_from_json_and_parts_have_ids_of_their_own(image_size, part):
    ours = knowledge()
    ours = replace(ours, data=replace(ours.data, image_size=image_size))
    ours = replace(ours, teacher=replace(ours.teacher, transform={"mean": [0.5]}))
    found = replace(ours, **part)
    assert read_back(found.document()) == found
    assert (found.knowledge_id == ours.knowledge_id) == found.whole == (not part)


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("data", {"digest": None}, "data.digest: Input should be a valid string"),
        ("data", {"count": "150"}, "data.count: Input should be a valid integer"),
        ("views", {"size": [4]}, "views.size.1: Field required"),
        ("teacher", {"extra": 1}, "teacher.extra: Unexpected keyword argument"),
    ],
)
def test_a_damaged_identity_is_refused(part, changes, said):
    document = knowledge().document()
    with pytest.raises(CorruptionError, match=rf"identity is damaged or was changed: knowledge\.{part}: Field req"):
        read_back({key: value for key, value in document.items() if key != part})
    with pytest.raises(CorruptionError, match=rf"knowledge\.{said}"):
        read_back(document | {part: document[part] | changes})


@settings(max_examples=10)
@given(VALUES, VALUES)
def test_there_is_a_first_difference_exactly_where_values_differ(left, right):
    assert errors.first_difference(left, left) is None
    assert (errors.first_difference(left, right) is None) == (left == right)


@pytest.mark.parametrize(
    ("left", "right", "found"),
    [
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, ("b", 2, 3)),
        ({"b": 1, "a": 1}, {"b": 2, "a": 2}, ("a", 1, 2)),
        ({"a": 1}, {}, ("a", 1, "absent")),
        ({}, {"a": None}, ("a", "absent", None)),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, ("a.b[1]", 2, 3)),
        ({"a": [1, 2]}, {"a": [1]}, ("a length", 2, 1)),
        ([1, (2,)], [1, [2]], None),
    ],
)
def test_the_first_difference_is_named_by_its_place(left, right, found):
    assert errors.first_difference(left, right) == found


def test_a_mismatch_prints_both_sides_and_the_remedy():
    with pytest.raises(MismatchError, match=r"the store and the run differ in a\.b: 1 against 'x'; start anew"):
        errors.require_same({"a": {"b": 1}}, {"a": {"b": "x"}}, ("the store", "the run"), "start anew")


def test_a_stores_identity_is_read_without_its_arrays(tmp_path):
    path = make(tmp_path / "store")
    for file in path.rglob("c.*"):
        file.unlink()
    found = identity.read_store_identity(path)
    assert errors.first_difference(knowledge().document(), found.document()) is None
    assert found.knowledge_id == knowledge().knowledge_id
