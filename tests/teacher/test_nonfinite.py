"""A teacher whose outputs are not finite on some samples: refused, or skipped in its store (M6)."""

import logging

import numpy as np
import pytest
import stores
import torch
from lessons import CLASSES
from pupils import BrokenOffError, same_files, stop_after
from touchy import EVERYONE, SKIP, TRAIN, a_white_sample, live, made, place_for, white_place, whole_in

from kcdcache.errors import NonFiniteError, SettingsError, UnfinishedError
from kcdcache.report import show
from kcdcache.store import encoding, log, reader


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return white_place(tmp_path_factory.mktemp("white"))


def shown_in(place, view):
    """The white samples that are white all over in a view."""
    return [index for index in place.white if index in whole_in(view)]


def test_it_is_refused_by_default_with_sample_view_and_remedy(place, tmp_path):
    first = shown_in(place, 0)[0]
    said = rf"'logits' is not finite for samples {first} .*, in view 0; `--on-nonfinite skip` leaves such samples out"
    with pytest.raises(NonFiniteError, match=said):
        made(place, tmp_path / "store")
    with pytest.raises(UnfinishedError, match="not finished"):
        reader.open(tmp_path / "store")


def test_skipping_says_which_samples_and_where(place, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "kcdcache"):
        told = made(place, tmp_path / "store", fields=("logits", "penultimate"), **SKIP)
    assert told["skipped"] == 2
    assert reader.open(tmp_path / "store").skipped.tolist() == place.white
    assert show.inspect(tmp_path / "store")["skipped"] == 2
    for field in ("logits", "penultimate"):
        for view in (0, 2):
            shown = shown_in(place, view)
            said = f"view {view}, field '{field}' is not finite for 1 samples, which are skipped: {shown[0]}"
            assert said in caplog.text
    assert len(caplog.records) == 4


def test_the_log_names_the_skipped_of_each_part_and_counts_only_finite_values(place):
    records = {record.view: record for record in log.read_log(place.knowledge.path, 0)}
    for view, count in enumerate((1, 0, 1)):
        shown = shown_in(place, view)
        outputs = live(place, view, EVERYONE)
        assert np.flatnonzero(~np.isfinite(outputs).all(1)).tolist() == shown
        assert len(shown) == count
        finite = outputs[np.isfinite(outputs)]
        assert records[view].skipped == tuple(shown)
        assert records[view].statistics["logits"] == {
            "count": TRAIN * CLASSES,
            "minimum": float(finite.min()),
            "maximum": float(finite.max()),
            "non_finite": outputs.size - finite.size,
        }
        right = (outputs.argmax(1) == place.data.train.labels) & np.isfinite(outputs).all(1)
        assert records[view].measurements["correct"] == right.sum()


def test_a_skipped_sample_is_never_read_and_all_others_are(place):
    others = np.setdiff1d(EVERYONE, place.white)
    said = rf"sample {place.white[0]} was skipped when .*leave out the 2 samples of `Store.skipped`, as `train` does"
    for view in range(3):
        assert np.array_equal(place.knowledge.read("logits", view, others), live(place, view, EVERYONE)[others])
        with pytest.raises(NonFiniteError, match=said):
            place.knowledge.read("logits", view, EVERYONE[::-1])
        with pytest.raises(NonFiniteError, match=said):
            place.knowledge.load(view, np.array(place.white), ("logits",))


def test_skipping_broken_off_and_resumed_gives_the_same_bytes(place, tmp_path):
    with pytest.raises(BrokenOffError):
        made(place, tmp_path / "store", progress=stop_after(2), **SKIP)
    made(place, tmp_path / "store", **SKIP)
    assert same_files(place.knowledge.path, tmp_path / "store")


def test_skipping_block_by_block_gives_the_same_bytes(place, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BLOCK_BYTES", 1)
    made(place, tmp_path / "store", **SKIP)
    assert same_files(place.knowledge.path, tmp_path / "store")


def test_a_growth_may_skip_more(place, tmp_path):
    made(place, tmp_path / "store", views=1, **SKIP)
    first = reader.open(tmp_path / "store").skipped.tolist()
    with pytest.raises(NonFiniteError, match="in view 2"):
        made(place, tmp_path / "store")
    assert reader.open(tmp_path / "store").skipped.tolist() == first
    made(place, tmp_path / "store", **SKIP)
    assert (len(first), reader.open(tmp_path / "store").skipped.tolist()) == (1, place.white)


def test_where_all_is_finite_skipping_changes_no_byte(tmp_path):
    fine = place_for(tmp_path / "fine", [])
    for name, choice in (("refuse", {}), ("skip", SKIP)):
        assert made(fine, tmp_path / name, **choice)["skipped"] == 0
    assert same_files(tmp_path / "refuse", tmp_path / "skip")


def test_more_than_one_in_a_hundred_is_refused_however_they_are_spread(tmp_path):
    many = place_for(tmp_path / "many", [a_white_sample(view) for view in range(3)])
    said = (
        rf"3 of 200 samples have outputs that cannot be stored \(the first: {many.white[0]}, {many.white[1]}, "
        rf"{many.white[2]}\), at most 1% may be skipped: the teacher is broken"
    )
    with pytest.raises(NonFiniteError, match=said):
        made(many, tmp_path / "store", **SKIP)
    with pytest.raises(BrokenOffError):
        made(many, tmp_path / "cut", progress=stop_after(2), **SKIP)
    with pytest.raises(NonFiniteError, match=said):  # the two of the views written before count
        made(many, tmp_path / "cut", **SKIP)
    assert not log.commit_path(tmp_path / "cut", 0).exists()
    assert [record.view for record in log.read_log(tmp_path / "cut", 0)] == [None, 0, 1]


def test_a_broken_teacher_cannot_be_skipped_over_and_is_refused_at_its_first_part(tmp_path):
    broken = place_for(tmp_path / "white", EVERYONE)
    with pytest.raises(NonFiniteError, match=rf"{len(whole_in(0))} of 200 samples have outputs that cannot be stored"):
        made(broken, tmp_path / "store", **SKIP)
    assert [record.view for record in log.read_log(tmp_path / "store", 0)] == [None]


def test_a_writer_that_skips_too_much_is_never_sealed(tmp_path):
    with stores.creating(tmp_path / "store", stores.plan_of(views=1)) as writing:
        (part,) = writing.pending()
        mine = stores.values("logits", 0)
        skipped = torch.arange(150) < 2
        mine[skipped] = torch.nan
        with pytest.raises(SettingsError, match="holds no sample 150 that could be skipped"):
            writing.write_part(part, stores.form().encode(mine, 0, skipped), {}, {}, [150])
        writing.write_part(part, stores.form().encode(mine, 0, skipped), {}, {}, [0, 1])
        with pytest.raises(NonFiniteError, match=r"2 of 150 samples .* at most 1% may be skipped"):
            writing.seal()


def test_features_beyond_float16_are_refused_with_the_way_out(tmp_path, caplog):
    """Almost white in every view that shows it whole: hidden values 255 times the usual, beyond 65504 but finite."""
    bright = place_for(tmp_path / "bright", [a_white_sample(0)], level=254)
    fields = {"fields": ("logits", "penultimate"), "views": 1}
    said = (
        rf"field 'penultimate' exceeds float16's 65504 for samples {bright.white[0]} .*; `--encoding float32` can hold "
        r"it, in view 0; `--on-nonfinite skip` leaves"
    )
    with pytest.raises(NonFiniteError, match=said):
        made(bright, tmp_path / "half", encoding="float16", **fields)
    with caplog.at_level(logging.WARNING, "kcdcache"):
        made(bright, tmp_path / "skip", encoding="float16", **fields, **SKIP)
    assert "exceeds float16's 65504 for 1 samples, which are skipped" in caplog.text
    assert reader.open(tmp_path / "skip").skipped.tolist() == bright.white
    assert made(bright, tmp_path / "whole", encoding="float32", **fields)["skipped"] == 0
    assert reader.open(tmp_path / "whole").read("penultimate", 0, np.array(bright.white)).max() > 65504
