import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import content, creating, grown, make, many_chunks, plan_of, small_parts

from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, NotFoundError, UnfinishedError
from kcdcache.store import check, reader


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    return many_chunks(tmp_path_factory.mktemp("sealed") / "store")


@pytest.fixture
def damaged(sealed, tmp_path):
    return Path(shutil.copytree(sealed, tmp_path / "store"))


def test_unfinished_stores_are_refused_with_the_remedy(tmp_path):
    with creating(tmp_path / "s", plan_of()):
        pass
    with pytest.raises(UnfinishedError, match="run the same `kcdcache precompute` again"):
        reader.open(tmp_path / "s")
    with pytest.raises(UnfinishedError, match="no commit record"):
        check.verify(tmp_path / "s")


def test_missing_stores_are_refused(tmp_path):
    for look in (reader.open, check.verify):
        with pytest.raises(NotFoundError, match="no knowledge store at"):
            look(tmp_path / "nowhere")


def test_newer_formats_are_refused(damaged):
    identity = damaged / "_kcd/identity.json"
    identity.write_text(identity.read_text().replace('"format_version":0', '"format_version":1'))
    with pytest.raises(MismatchError, match="has format 1, this kcdcache reads 0; upgrade"):
        reader.open(damaged)


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
        opened = reader.open(sealed)
        flip(sealed / file, bit % (8 * len(data)))
        assert len(check.verify(sealed).problems) == 1
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
            everything(reader.open(damaged))
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
    with pytest.raises(
        CorruptionError, match=rf"logits/c.1.1.0 \(samples 32\.\.63 of view 1\) {message}.*verify STORE --repair"
    ):
        reader.open(damaged)
    assert len(check.verify(damaged, share=0).problems) == 1


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
    opened = reader.open(path)
    damage(path / "logits/c.1.1.0")
    with pytest.raises(CorruptionError, match=rf"logits/c.1.1.0 \(samples 32\.\.63 of view 1\) {message}"):
        opened.load(1, np.arange(150), ["logits"])


def test_swapped_chunks_are_found(damaged):
    first, second = damaged / "logits/c.0.0.0", damaged / "logits/c.0.1.0"
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    with pytest.raises(CorruptionError, match=r"samples 0\.\.31 of view 0\) is not what was written"):
        reader.open(damaged).load(0, np.arange(150), ["logits"])
    assert len(check.verify(damaged).problems) == 2


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
        reader.open(damaged)


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
        reader.open(damaged)
    assert any(file.split("/")[-1] in problem for problem in check.verify(damaged).problems)


@pytest.mark.parametrize("file", ["_kcd/plan.0.json", "_kcd/log/0/samples.json", "logits/zarr.json", "zarr.json"])
def test_missing_records_are_damage(damaged, file):
    (damaged / file).unlink()
    with pytest.raises(CorruptionError, match=f"no file at .*{file}"):
        reader.open(damaged)


def test_verification_of_a_sound_store_reads_every_byte(sealed):
    found = check.verify(sealed)
    chunks = [file for file in sealed.rglob("c.*") if file.is_file()]
    assert found == (len(chunks), len(chunks), sum(file.stat().st_size for file in chunks), ())
    assert check.verify(sealed, share=0) == (len(chunks), 0, 0, ())


def test_verification_collects_all_damage(damaged):
    (damaged / "logits/c.0.0.0").unlink()
    flip(damaged / "logits/c.1.3.0", 77)
    (damaged / "_kcd/log/0/v00001-p00000.json").write_text("{}")
    (damaged / "labels/zarr.json").write_text("{}")
    problems = "\n".join(check.verify(damaged).problems)
    for name in ("c.0.0.0 ", "c.1.3.0 ", "v00001-p00000.json", "labels/zarr.json"):
        assert name in problems


def test_a_lost_commit_between_others_is_damage(damaged):
    grown(damaged, views=3)
    (damaged / "_kcd/commit.0.json").unlink()
    with pytest.raises(CorruptionError, match=r"holds commit.1.json but not commit.0.json"):
        reader.open(damaged)
