import os

import numpy as np
import pytest
from damaging import put
from stores import (
    CLASSES,
    content,
    creating,
    finish,
    form,
    grown,
    knowledge,
    make,
    plan_of,
    small_parts,
    values,
    write_part,
)

from kcdcache.errors import MismatchError, SettingsError, UnfinishedError
from kcdcache.store import check, log, reader, writer


def test_a_half_written_part_is_written_again_to_the_same_bytes(tmp_path):
    plan = small_parts(150, 2, 64, 32, compression="zstd")
    expected = content(make(tmp_path / "whole", plan))
    path = tmp_path / "resumed"
    with creating(path, plan) as writing:
        write_part(writing, writing.pending()[0])
        write_part(writing, writing.pending()[1])
    (path / "_kcd/log/0/v00000-p00002.json").unlink()
    (path / "logits/c.0.4.0").write_bytes(b"torn by an older tool")
    (path / "logits/c.0.5.0.tmp-123").write_bytes(b"left by a killed writer")
    with creating(path, plan) as writing:
        assert [(part.view, part.number) for part in writing.pending()] == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
        finish(writing)
    assert content(path) == expected


def test_a_log_record_alone_is_not_trusted(tmp_path, sealed):
    path, plan = tmp_path / "s", small_parts(150, 2, 64, 32)
    with creating(path, plan) as writing:
        for part in writing.pending():
            write_part(writing, part)
    for damaged, data in (
        ("logits/c.0.2.0", None),
        ("logits/c.0.2.0", b"short"),
        ("_kcd/log/0/v00000-p00001.json", b"{"),
    ):
        put(path / damaged, data)
        with creating(path, plan) as writing:
            assert [(part.view, part.number) for part in writing.pending()] == [(0, 1)]
            with pytest.raises(UnfinishedError, match=r"1 of 6 parts of .* are not written yet"):
                writing.seal()
            write_part(writing, writing.pending()[0])
    with creating(path, plan) as writing:
        writing.seal()
    assert content(path) == content(sealed)


def test_finished_work_and_a_growth_asked_for_again_are_not_done_again(damaged):
    before = content(damaged)
    with creating(damaged, small_parts(150, 2, 64, 32)) as writing:
        assert (writing.sealed, writing.pending()) == (True, [])
        writing.seal()
        with pytest.raises(SettingsError, match="is sealed; grow it"):
            write_part(writing, writing.parts[0])
    assert content(damaged) == before
    grown(damaged, views=3)
    before = content(damaged)
    with writer.grow(damaged, knowledge(), views=3, fields=[form()]) as growing:
        assert (growing.sealed, growing.pending()) == (True, [])
    assert content(damaged) == before


@pytest.mark.parametrize(
    ("plan", "who", "message"),
    [
        (plan_of(), knowledge(weights="bb"), "differ in teacher.weights: 'aa' against 'bb'; continue with"),
        (plan_of(views=3), knowledge(), "differ in views: 2 against 3"),
        (plan_of(text="float32"), knowledge(), r"differ in fields\[0\].chunk_rows.logits_rowmax"),
        (plan_of(batch_size=8), knowledge(), "differ in batch_size: 256 against 8"),
    ],
)
def test_a_store_is_not_continued_with_other_settings(tmp_path, plan, who, message):
    with creating(tmp_path / "s", plan_of()) as writing:
        write_part(writing, writing.parts[0])
    with pytest.raises(MismatchError, match=message), creating(tmp_path / "s", plan, who):
        pass


def test_a_store_in_which_nothing_was_computed_is_begun_anew(tmp_path):
    with creating(tmp_path / "s", plan_of()):
        pass
    other = knowledge(weights="bb")
    with creating(tmp_path / "s", plan_of(views=3), other) as writing:
        finish(writing)
    assert reader.open(tmp_path / "s").knowledge_id == other.knowledge_id
    assert reader.open(tmp_path / "s").views == 3


def test_other_peoples_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with (
        pytest.raises(SettingsError, match="is there already and is not a knowledge store"),
        creating(tmp_path, plan_of()),
    ):
        pass
    assert content(tmp_path) == {"thesis.tex": b"precious"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, r"needs the arrays \['logits'\], found \[\]"),
        (
            {"logits": np.zeros((9, CLASSES), np.float32)},
            r"rows of 'logits' should be float32 \(10, 7\), found float32 \(9, 7\)",
        ),
        ({"logits": np.zeros((10, CLASSES))}, r"should be float32 \(10, 7\), found float64 \(10, 7\)"),
        ({"logits": np.zeros((10, 3), np.float32)}, r"found float32 \(10, 3\)"),
    ],
)
def test_rows_that_do_not_fit_the_plan_are_refused(tmp_path, rows, message):
    with creating(tmp_path / "s", plan_of(10, 1, "float32")) as writing:
        with pytest.raises(SettingsError, match=message):
            writing.write_part(writing.pending()[0], rows, {})
        assert len(writing.pending()) == 1


def test_growing_by_views_and_fields_keeps_what_was_there(damaged):
    before = content(damaged)
    opened = grown(damaged, views=3)
    changed = {name for name, data in before.items() if content(damaged)[name] != data}
    assert changed == {"logits/zarr.json", "logits_rowmax/zarr.json"}
    assert opened.measurements(2) == {"samples": 150, "correct": 9}
    opened = grown(damaged, views=4, fields=[form(), form("penultimate", "float32")])
    assert (opened.views, list(opened.fields), len(opened.commits)) == (4, ["logits", "penultimate"], 3)
    for view in range(4):
        assert np.array_equal(opened.read("penultimate", view, np.arange(150)), values("penultimate", view).numpy())
        np.testing.assert_allclose(
            opened.read("logits", view, np.arange(150)), values("logits", view).numpy(), atol=0.02
        )
    assert set(opened.load(3, np.arange(150), opened.fields)) == {"logits", "logits_rowmax", "penultimate"}
    assert check.verify(damaged).problems == ()
    assert opened.measurements(0) == {"samples": 150, "correct": 3}


def test_while_a_store_grows_readers_see_the_sealed_state(damaged):
    before, rows = reader.open(damaged), np.arange(150)
    old = before.read("logits", 1, rows)
    with writer.grow(damaged, knowledge(), views=3, fields=[form("penultimate")]) as growing:
        for part in growing.pending():
            write_part(growing, part)
            for opened in (before, reader.open(damaged)):
                assert (opened.views, list(opened.fields)) == (2, ["logits"])
                np.testing.assert_array_equal(opened.read("logits", 1, rows), old)
    assert check.verify(damaged).problems == ()
    with pytest.raises(MismatchError, match=r"the growth under way at .* differ in views: 3 against 4"):
        grown(damaged, views=4, fields=[form("penultimate")])
    assert grown(damaged, views=3, fields=[form("penultimate")]).views == 3
    np.testing.assert_array_equal(before.read("logits", 1, rows), old)


def test_only_the_same_knowledge_grows_a_store(damaged, tmp_path):
    with pytest.raises(MismatchError, match=r"teacher.weights"), writer.grow(damaged, knowledge(weights="x"), views=3):
        pass
    with creating(tmp_path / "s", plan_of()):
        pass
    with pytest.raises(UnfinishedError, match="not finished"), writer.grow(tmp_path / "s", knowledge(), views=3):
        pass


def test_log_records_keep_statistics_and_no_clock_or_host(sealed):
    record = log.read_record(log.record_path(sealed, 0, "v00001-p00002"))
    mine = values("logits", 1)[128:]
    assert record.statistics["logits"] == {
        "count": 22 * CLASSES,
        "minimum": float(mine.min()),
        "maximum": float(mine.max()),
        "non_finite": 0,
    }
    assert os.uname().nodename.encode() not in b"".join(content(sealed).values())
    assert [file.path for file in record.files] == ["logits/c.1.4.0", "logits_rowmax/c.1.4"]


@pytest.mark.parametrize(
    "first", [{"views": 9}, {"fields": [form("penultimate")]}, {"views": 4, "fields": [form("map")]}]
)
def test_a_growth_of_which_nothing_is_computed_gives_way_to_another(tmp_path, first):
    plain, other = make(tmp_path / "plain"), make(tmp_path / "other")
    with writer.grow(plain, knowledge(), views=3) as growing:
        finish(growing)
    with writer.grow(other, knowledge(), **first):
        pass
    with writer.grow(other, knowledge(), views=3) as growing:
        finish(growing)
    assert content(other) == content(plain)


def test_a_growth_with_a_part_keeps_its_plan(tmp_path):
    path = make(tmp_path / "s")
    with writer.grow(path, knowledge(), views=9) as growing:
        write_part(growing, growing.pending()[0])
    with (
        pytest.raises(MismatchError, match=r"the growth under way at .* differ in views"),
        writer.grow(path, knowledge(), views=3),
    ):
        pass
