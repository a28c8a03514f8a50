import json
import os
import shutil
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kcdcache import audit, encoding, layout, ledger, store, writer
from kcdcache.errors import (
    CorruptionError,
    KcdcacheError,
    LockedError,
    MismatchError,
    NotFoundError,
    SettingsError,
    UnfinishedError,
)
from kcdcache.identity import DataIdentity, Knowledge, TeacherIdentity, ViewIdentity

CLASSES, WIDTH = 7, 5


def knowledge(count=150, weights="aa"):
    return Knowledge(
        teacher=TeacherIdentity(architecture="net", weights=weights, transform={"mean": (0.5,)}, precision="float32"),
        data=DataIdentity(count=count, classes=("a", "b"), image_size=(4, 4), digest="dd"),
        views=ViewIdentity(rule="none", padding=0, fill="zero", size=(4, 4), seed=0),
    )


def form(field="logits", text="float16"):
    return encoding.parse(text, field, (CLASSES,) if field == "logits" else (WIDTH,))


def values(field, view, count=150):
    """The float32 teacher output of a view: any fixed function of field, view and sample does."""
    shape = (count, CLASSES if field == "logits" else WIDTH)
    return torch.from_numpy(np.random.default_rng([len(field), view]).normal(0, 3, shape).astype(np.float32))


def write_part(writing, part):
    rows, statistics = {}, {}
    for field in part.fields:
        mine = values(field, part.view, writing.plan.count)[part.start : part.stop]
        rows |= writing.plan.fields[field].encode(mine, part.start)
        statistics[field] = encoding.statistics(mine)
    writing.write_part(part, rows, statistics, {"correct": part.view + 1})


def finish(writing):
    for part in writing.pending():
        write_part(writing, part)
    writing.seal()


def creating(path, plan, who=None):
    labels = np.arange(plan.count) % CLASSES
    return writer.create(path, who or knowledge(plan.count), plan, labels, np.arange(plan.count, dtype=np.uint64) ** 3)


def plan_of(count=150, views=2, text="float16", **settings):
    return layout.plan_store(count, views, [form(text=text)], **settings)


def make(path, plan=None):
    with creating(path, plan or plan_of()) as writing:
        finish(writing)
    return path


def small_parts(count, views, part_rows, chunk_rows, text="float16", compression="none"):
    """A plan whose parts and chunks are far smaller than `plan_store` makes them, so that tests see many."""
    document = plan_of(count, views, text, compression=compression).document()
    document["part_rows"] = part_rows
    document["fields"][0]["chunk_rows"] = dict.fromkeys(document["fields"][0]["chunk_rows"], chunk_rows)
    return layout.plan_from(document)


def content(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """A sealed store of 150 samples, 2 views, 3 parts a view, 2 chunks a part; tests copy what they damage."""
    return make(tmp_path_factory.mktemp("sealed") / "store", small_parts(150, 2, 64, 32))


@pytest.fixture
def damaged(sealed, tmp_path):
    return Path(shutil.copytree(sealed, tmp_path / "store"))


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 90), st.sampled_from(["float16", "float32", "top:3", "top:7"]), st.sampled_from(["none", "zstd"]))
def test_what_is_written_is_read_whatever_the_size(tmp_path_factory, count, text, compression):
    plan = small_parts(count, 2, 32, 8, text, compression)
    opened = store.open(make(tmp_path_factory.mktemp("any") / "store", plan))
    for view in range(2):
        expected = plan.fields["logits"].encode(values("logits", view, count))
        found = opened.load(view, np.arange(count), ["logits"])
        assert all(found[name].tobytes() == rows.tobytes() for name, rows in expected.items())
        assert {name: rows.dtype for name, rows in found.items()} == {n: r.dtype for n, r in expected.items()}
    np.testing.assert_array_equal(opened.labels, np.arange(count) % CLASSES)
    np.testing.assert_array_equal(opened.sample_digest, np.arange(count, dtype=np.uint64) ** 3)


def test_an_open_store_tells_what_it_holds(sealed):
    opened = store.open(sealed)
    assert (opened.count, opened.views, opened.path) == (150, 2, sealed)
    assert opened.fields == {"logits": store.Field(form(), (CLASSES,))}
    assert opened.knowledge == store.read_store_identity(sealed)
    assert opened.knowledge_id == knowledge().knowledge_id
    assert opened.layout_id == small_parts(150, 2, 64, 32).layout_id
    assert opened.row_bytes(["logits"]) == 2 * CLASSES + 4
    assert opened.measurements(1) == {"samples": 150, "correct": 6}


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_wanted_rows_come_in_order_and_only_their_chunks_are_read(sealed, threads):
    opened = store.open(sealed)
    rows = np.array([0, 5, 31, 33, 149])
    found = opened.load(1, rows, ["logits"], threads=threads)
    expected = form().encode(values("logits", 1))
    assert all(np.array_equal(found[name], expected[name][rows]) for name in expected)
    assert opened.rows_read == 5
    assert opened.bytes_read == 3 * (32 * (2 * CLASSES + 4) + 8)


def test_the_caller_may_bring_the_memory(sealed, tmp_path):
    def allocate(shape, dtype):
        return np.memmap(tmp_path / f"{dtype}", dtype=dtype, mode="w+", shape=shape)

    found = store.open(sealed).load(0, np.arange(10, 20), ["logits"], allocate=allocate)
    assert isinstance(found["logits"], np.memmap)
    np.testing.assert_array_equal(found["logits"], form().encode(values("logits", 0))["logits"][10:20])


def test_no_rows_are_no_reads(sealed):
    opened = store.open(sealed)
    assert opened.load(0, np.arange(0), ["logits"])["logits"].shape == (0, CLASSES)
    assert opened.bytes_read == 0


def test_decoded_values_come_in_any_order_with_duplicates(sealed):
    index = np.array([149, 3, 3, 77])
    found = store.open(sealed).read("logits", 0, index)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, values("logits", 0).numpy()[index], atol=0.02)


@pytest.mark.parametrize(
    ("view", "rows", "field", "message"),
    [
        (2, [1], "logits", r"no view 2 in .*; it holds views 0\.\.1"),
        (0, [150], "logits", r"rows should increase strictly within 0\.\.149"),
        (0, [-1], "logits", "rows should increase strictly"),
        (0, [4, 4], "logits", "rows should increase strictly"),
        (0, [1], "penultimate", "no field 'penultimate' in .*; it holds logits"),
    ],
)
def test_what_a_store_does_not_hold_is_refused(sealed, view, rows, field, message):
    with pytest.raises(SettingsError, match=message):
        store.open(sealed).load(view, np.array(rows), [field])


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("text", ["float16", "float32", "top:3"])
def test_zarr_itself_reads_the_same_bits(tmp_path, text, compression):
    path = make(tmp_path / "store", small_parts(150, 2, 64, 32, text, compression))
    opened, group = store.open(path), zarr.open_group(path, mode="r")
    for array in opened.plan.arrays:
        found = group[array.name]
        if array.field is None:
            assert found[:].tobytes() == getattr(opened, array.name).tobytes()
        else:
            loaded = opened.load(1, np.arange(150), ["logits"])
            assert found[1].tobytes() == loaded[array.name].tobytes()
            assert found.shape == (2, 150, *array.row_shape)


def test_zarr_lists_the_arrays_as_a_group(sealed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr warns of our _kcd folder, which is no array
        assert sorted(zarr.open_group(sealed, mode="r").array_keys()) == [
            "labels",
            "logits",
            "logits_rowmax",
            "sample_digest",
        ]


def test_padding_holds_the_fill_value(sealed):
    rows = np.frombuffer((sealed / "logits/c.0.4.0").read_bytes()[:-4], np.float16).reshape(32, CLASSES)
    assert np.isfinite(rows[:22]).all()
    assert np.isnan(rows[22:]).all()


def test_constant_values_are_written_too(tmp_path):
    plan = plan_of(10, 1, "float32")
    with creating(tmp_path / "s", plan) as writing:
        writing.write_part(writing.pending()[0], {"logits": np.zeros((10, CLASSES), np.float32)}, {})
        writing.seal()
    assert store.open(tmp_path / "s").read("logits", 0, np.arange(10)).sum() == 0


def test_writing_twice_gives_the_same_bytes(sealed, tmp_path):
    assert content(make(tmp_path / "again", small_parts(150, 2, 64, 32))) == content(sealed)


def test_parts_written_in_any_order_give_the_same_bytes(sealed, tmp_path):
    with creating(tmp_path / "s", small_parts(150, 2, 64, 32)) as writing:
        for part in reversed(writing.pending()):
            write_part(writing, part)
        writing.seal()
    assert content(tmp_path / "s") == content(sealed)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_half_written_part_is_written_again_to_the_same_bytes(tmp_path, compression):
    plan = small_parts(150, 2, 64, 32, compression=compression)
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


@pytest.mark.parametrize("fault", ["missing file", "short file", "damaged record"])
def test_a_log_record_alone_is_not_trusted(tmp_path, sealed, fault):
    path = tmp_path / "s"
    with creating(path, small_parts(150, 2, 64, 32)) as writing:
        for part in writing.pending():
            write_part(writing, part)
    {
        "missing file": lambda: (path / "logits/c.0.2.0").unlink(),
        "short file": lambda: (path / "logits/c.0.2.0").write_bytes(b"short"),
        "damaged record": lambda: (path / "_kcd/log/0/v00000-p00001.json").write_text("{"),
    }[fault]()
    with creating(path, small_parts(150, 2, 64, 32)) as writing:
        assert [(part.view, part.number) for part in writing.pending()] == [(0, 1)]
        with pytest.raises(UnfinishedError, match=r"1 of 6 parts of .* are not written yet"):
            writing.seal()
        finish(writing)
    assert content(path) == content(sealed)


def test_finished_work_is_not_done_again(damaged):
    before = content(damaged)
    with creating(damaged, small_parts(150, 2, 64, 32)) as writing:
        assert writing.sealed
        assert writing.pending() == []
        writing.seal()
        with pytest.raises(SettingsError, match="is sealed; grow it"):
            write_part(writing, writing.parts[0])
    assert content(damaged) == before


def test_unfinished_stores_are_refused_with_the_remedy(tmp_path):
    with creating(tmp_path / "s", plan_of()):
        pass
    with pytest.raises(UnfinishedError, match="run the same `kcdcache precompute` again"):
        store.open(tmp_path / "s")
    with pytest.raises(UnfinishedError, match="no commit record"):
        audit.verify(tmp_path / "s")


def test_missing_stores_are_refused(tmp_path):
    for look in (store.open, audit.verify, audit.describe):
        with pytest.raises(NotFoundError, match="no knowledge store at"):
            look(tmp_path / "nowhere")


def test_newer_formats_are_refused(damaged):
    identity = damaged / "_kcd/identity.json"
    identity.write_text(identity.read_text().replace('"format_version":0', '"format_version":1'))
    with pytest.raises(MismatchError, match="has format 1, this kcdcache reads 0; upgrade"):
        store.open(damaged)


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
    with creating(tmp_path / "s", plan_of()):
        pass
    with pytest.raises(MismatchError, match=message), creating(tmp_path / "s", plan, who):
        pass


def test_other_peoples_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with (
        pytest.raises(SettingsError, match="is there already and is not a knowledge store"),
        creating(tmp_path, plan_of()),
    ):
        pass
    assert content(tmp_path) == {"thesis.tex": b"precious"}


def test_a_second_writer_is_turned_away(tmp_path):
    with (
        creating(tmp_path / "s", plan_of()),
        pytest.raises(LockedError, match="is being written by process"),
        creating(tmp_path / "s", plan_of()),
    ):
        pass


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, r"needs the arrays \['logits'\], found \[\]"),
        ({"logits": np.zeros((9, CLASSES), np.float32)}, "needs 10 rows of 'logits', found 9"),
        ({"logits": np.zeros((10, CLASSES))}, r"should be float32 \(7,\), found float64 \(7,\)"),
        ({"logits": np.zeros((10, 3), np.float32)}, r"found float32 \(3,\)"),
    ],
)
def test_rows_that_do_not_fit_the_plan_are_refused(tmp_path, rows, message):
    with creating(tmp_path / "s", plan_of(10, 1, "float32")) as writing:
        with pytest.raises(SettingsError, match=message):
            writing.write_part(writing.pending()[0], rows, {})
        assert len(writing.pending()) == 1


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def everything(opened):
    arrays = [opened.load(view, np.arange(opened.count), ["logits"]) for view in range(opened.views)]
    return arrays, opened.labels, opened.sample_digest


FILES = st.sampled_from(["logits/c.0.1.0", "logits_rowmax/c.1.2", "labels/c.1", "sample_digest/c.0"])


@settings(deadline=None, max_examples=25)
@given(FILES, st.integers(0, 10**6))
def test_any_flipped_bit_of_a_chunk_is_found(sealed, file, bit):
    data = (sealed / file).read_bytes()
    try:
        opened = store.open(sealed)
        flip(sealed / file, bit % (8 * len(data)))
        assert len(audit.verify(sealed).problems) == 1
        with pytest.raises(CorruptionError, match=rf"{file} \(samples \d+\.\.\d+.*is not what was written"):
            everything(opened)
    finally:
        (sealed / file).write_bytes(data)


def test_random_flips_anywhere_are_never_silent(damaged):
    before, rng = content(damaged), np.random.default_rng(0)
    names = [name for name in before if before[name]]
    for _ in range(100):
        name = names[rng.integers(len(names))]
        flip(damaged / name, int(rng.integers(8 * len(before[name]))))
        with pytest.raises(KcdcacheError, match=r"\w"):
            everything(store.open(damaged))
        (damaged / name).write_bytes(before[name])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(b""), "has 0 bytes, 452 were written"),
        (lambda file: file.write_bytes(file.read_bytes()[:200]), "has 200 bytes"),
        (lambda file: file.write_bytes(file.read_bytes() + b"ab"), "has 454 bytes"),
        (lambda file: (file.unlink(), file.symlink_to("c.0.0.0")), "is missing"),
    ],
)
def test_missing_and_resized_files_are_found_at_open(damaged, damage, message):
    damage(damaged / "logits/c.1.1.0")
    with pytest.raises(CorruptionError, match=rf"logits/c.1.1.0 \(samples 32\.\.63 of view 1\) {message}"):
        store.open(damaged)
    assert len(audit.verify(damaged, read_data=False).problems) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(b""), "is not what was written"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is not what was written"),
        (lambda file: file.write_bytes(file.read_bytes() + b"ab"), "is not what was written"),
        (lambda file: shutil.copy(file.with_name("c.0.0.0"), file), "is not what was written"),
    ],
)
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_damage_after_opening_is_never_a_number(tmp_path, damage, message, compression):
    path = make(tmp_path / "s", small_parts(150, 2, 64, 32, compression=compression))
    opened = store.open(path)
    damage(path / "logits/c.1.1.0")
    with pytest.raises(CorruptionError, match=rf"logits/c.1.1.0 \(samples 32\.\.63 of view 1\) {message}"):
        opened.load(1, np.arange(150), ["logits"])


def test_swapped_chunks_are_found(damaged):
    first, second = damaged / "logits/c.0.0.0", damaged / "logits/c.0.1.0"
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    with pytest.raises(CorruptionError, match=r"samples 0\.\.31 of view 0\) is not what was written"):
        store.open(damaged).load(0, np.arange(150), ["logits"])
    assert len(audit.verify(damaged).problems) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_type", "int16"),
        ("shape", [2, 149, 7]),
        ("shape", [3, 150, 7]),
        ("fill_value", 0.0),
        ("codecs", [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]),
        ("extra", 1),
    ],
)
def test_edited_array_documents_are_refused(damaged, key, value):
    file = damaged / "logits/zarr.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(CorruptionError, match=r"zarr.json is not what this store's plan implies"):
        store.open(damaged)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("_kcd/identity.json", "was changed: its content does not match its knowledge_id"),
        ("_kcd/plan.0.json", "plan.0.json is not the file that commit.0.json sealed"),
        ("_kcd/log/0/v00001-p00002.json", "v00001-p00002.json is not the file that commit.0.json sealed"),
        ("_kcd/commit.0.json", "was changed: its content does not match its digest"),
    ],
)
def test_edited_records_are_refused(damaged, file, message):
    text = (damaged / file).read_text()
    (damaged / file).write_text(text.replace("aa", "ab", 1) if "aa" in text else text.replace("2", "1", 1))
    with pytest.raises(CorruptionError, match=message):
        store.open(damaged)
    assert any(file.split("/")[-1] in problem for problem in audit.verify(damaged).problems)


@pytest.mark.parametrize("file", ["_kcd/plan.0.json", "_kcd/log/0/samples.json", "logits/zarr.json", "zarr.json"])
def test_missing_records_are_damage(damaged, file):
    (damaged / file).unlink()
    with pytest.raises(CorruptionError, match=f"no file at .*{file}"):
        store.open(damaged)


def test_verification_of_a_sound_store_reads_every_byte(sealed):
    found = audit.verify(sealed)
    chunks = [file for file in sealed.rglob("c.*") if file.is_file()]
    assert found == (len(chunks), sum(file.stat().st_size for file in chunks), ())
    assert audit.verify(sealed, read_data=False) == (len(chunks), 0, ())


def test_verification_collects_all_damage(damaged):
    (damaged / "logits/c.0.0.0").unlink()
    flip(damaged / "logits/c.1.3.0", 77)
    (damaged / "_kcd/log/0/v00001-p00000.json").write_text("{}")
    (damaged / "labels/zarr.json").write_text("{}")
    problems = "\n".join(audit.verify(damaged).problems)
    for name in ("c.0.0.0 ", "c.1.3.0 ", "v00001-p00000.json", "labels/zarr.json"):
        assert name in problems


def grown(path, **what):
    with writer.grow(path, knowledge(), **what) as growing:
        finish(growing)
    return store.open(path)


def test_growing_by_views_keeps_the_old_ones(damaged):
    before = content(damaged)
    opened = grown(damaged, views=4)
    assert (opened.views, len(opened.commits)) == (4, 2)
    for view in range(4):
        np.testing.assert_allclose(
            opened.read("logits", view, np.arange(150)), values("logits", view).numpy(), atol=0.02
        )
    changed = {name for name, data in before.items() if content(damaged)[name] != data}
    assert changed == {"logits/zarr.json", "logits_rowmax/zarr.json"}
    assert audit.verify(damaged).problems == ()
    assert opened.measurements(3) == {"samples": 150, "correct": 12}


def test_growing_by_a_field_keeps_the_old_ones(damaged):
    opened = grown(damaged, fields=[form("penultimate", "float32")])
    assert list(opened.fields) == ["logits", "penultimate"]
    for view in range(2):
        np.testing.assert_array_equal(
            opened.read("penultimate", view, np.arange(150)), values("penultimate", view).numpy()
        )
    assert audit.verify(damaged).problems == ()
    assert opened.measurements(0) == {"samples": 150, "correct": 3}


def test_growing_twice_and_in_both_ways(damaged):
    grown(damaged, views=3)
    opened = grown(damaged, views=4, fields=[form(), form("penultimate")])
    assert (opened.views, list(opened.fields), len(opened.commits)) == (4, ["logits", "penultimate"], 3)
    loaded = opened.load(3, np.arange(150), ["penultimate", "logits"])
    assert set(loaded) == {"logits", "logits_rowmax", "penultimate"}
    assert zarr.open_group(damaged, mode="r")["penultimate"].shape == (4, 150, WIDTH)


def test_the_sealed_state_stays_readable_while_growing(damaged):
    old = store.open(damaged).read("logits", 1, np.arange(150))
    with writer.grow(damaged, knowledge(), views=3) as growing:
        write_part(growing, growing.pending()[0])
    opened = store.open(damaged)
    assert opened.views == 2
    np.testing.assert_array_equal(opened.read("logits", 1, np.arange(150)), old)
    assert audit.verify(damaged).problems == ()
    assert audit.describe(damaged)["growing"]
    with pytest.raises(MismatchError, match=r"the growth under way at .* differ in views: 3 against 4"):
        grown(damaged, views=4)
    assert grown(damaged, views=3).views == 3


def test_a_growth_asked_for_again_is_done(damaged):
    grown(damaged, views=3)
    before = content(damaged)
    with writer.grow(damaged, knowledge(), views=3, fields=[form()]) as growing:
        assert growing.sealed
        assert growing.pending() == []
    assert content(damaged) == before


def test_only_the_same_knowledge_grows_a_store(damaged, tmp_path):
    with pytest.raises(MismatchError, match=r"teacher.weights"), writer.grow(damaged, knowledge(weights="x"), views=3):
        pass
    with creating(tmp_path / "s", plan_of()):
        pass
    with pytest.raises(UnfinishedError, match="not finished"), writer.grow(tmp_path / "s", knowledge(), views=3):
        pass


def test_a_lost_commit_between_others_is_damage(damaged):
    grown(damaged, views=3)
    (damaged / "_kcd/commit.0.json").unlink()
    with pytest.raises(CorruptionError, match=r"holds commit.1.json but not commit.0.json"):
        store.open(damaged)


def test_readers_beside_a_growing_writer_see_whole_states(damaged):
    expected = {view: values("logits", view).numpy() for view in range(3)}
    seen, done = [], threading.Event()

    def watch():
        while not done.is_set():
            opened = store.open(damaged)
            last = opened.views - 1
            seen.append(np.abs(opened.read("logits", last, np.arange(150)) - expected[last]).max())

    watcher = threading.Thread(target=watch)
    watcher.start()
    grown(damaged, views=3)
    done.set()
    watcher.join()
    assert seen
    assert max(seen) < 0.02


def test_descriptions_tell_what_is_done_and_measured(damaged, tmp_path):
    found = audit.describe(damaged)
    assert (found["sealed"], found["growing"], found["parts"]) == (True, False, {"done": 6, "pending": 0})
    assert found["fields"]["logits"]["bound"] == form().bound
    assert found["measurements"][1]["accuracy"] == 6 / 150
    with creating(tmp_path / "s", small_parts(150, 2, 64, 32)) as writing:
        write_part(writing, writing.pending()[0])
    found = audit.describe(tmp_path / "s")
    assert (found["sealed"], found["parts"]) == (False, {"done": 1, "pending": 5})
    assert found["measurements"][0] == {"samples": 64, "correct": 1, "accuracy": 1 / 64}
    json.dumps(found, allow_nan=False)


def test_log_records_keep_statistics_and_no_clock_or_host(sealed):
    record = ledger.read_record(ledger.record_path(sealed, 0, "v00001-p00002"))
    mine = values("logits", 1)[128:]
    assert record.statistics["logits"] == {
        "count": 22 * CLASSES,
        "minimum": float(mine.min()),
        "maximum": float(mine.max()),
        "non_finite": 0,
    }
    assert os.uname().nodename.encode() not in b"".join(content(sealed).values())
    assert [file.path for file in record.files] == ["logits/c.1.4.0", "logits_rowmax/c.1.4"]
