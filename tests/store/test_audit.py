import json
import shutil

import numpy as np
import pytest
from damaging import DAMAGE, flip, put, swap
from stores import creating, make, plan_of, small_parts

from kcdcache.errors import CorruptionError, MismatchError, NotFoundError, UnfinishedError
from kcdcache.files.records import canonical_json
from kcdcache.store import check, reader


def test_unfinished_and_missing_stores_are_refused_with_the_remedy(tmp_path):
    with creating(tmp_path / "s", plan_of()):
        pass
    with pytest.raises(UnfinishedError, match="run the same `kcdcache precompute` again"):
        reader.open(tmp_path / "s")
    with pytest.raises(UnfinishedError, match="no commit record"):
        check.verify(tmp_path / "s")
    for look in (reader.open, check.verify):
        with pytest.raises(NotFoundError, match="no knowledge store at"):
            look(tmp_path / "nowhere")


def test_newer_formats_are_refused(damaged):
    identity = damaged / "_kcd/identity.json"
    identity.write_text(identity.read_text().replace('"format_version":0', '"format_version":1'))
    with pytest.raises(MismatchError, match="has format 1, this kcdcache reads 0; upgrade"):
        reader.open(damaged)


FILE = "logits/c.1.1.0"
LOST = {
    "deleted": "is missing",
    "emptied": "has 0 bytes, 452 were written",
    "cut in half": "has 226 bytes",
    "extended": "has 454 bytes",
    "linked": "is missing",
}


def harm(root, how):
    put(root / FILE, DAMAGE.get(how, DAMAGE["deleted"])((root / FILE).read_bytes(), 0))
    if how == "linked":
        (root / FILE).symlink_to("c.0.0.0")
    if how == "another":
        shutil.copy((root / FILE).with_name("c.0.0.0"), root / FILE)


@pytest.mark.parametrize("how", LOST)
def test_missing_and_resized_files_are_found_at_open(damaged, how):
    harm(damaged, how)
    said = rf"{FILE} \(samples 32\.\.63 of view 1\) {LOST[how]}.*verify STORE --repair"
    with pytest.raises(CorruptionError, match=said):
        reader.open(damaged)
    assert len(check.verify(damaged, share=0).problems) == 1


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_damage_after_opening_is_never_a_number(tmp_path, compression):
    opened = reader.open(make(tmp_path / "s", small_parts(150, 2, 64, 32, compression=compression)))
    whole = (opened.path / FILE).read_bytes()
    for how in ("deleted", "emptied", "one byte short", "extended", "another"):
        harm(opened.path, how)
        said = "is missing" if how == "deleted" else "is not what was written"
        with pytest.raises(CorruptionError, match=rf"{FILE} \(samples 32\.\.63 of view 1\) {said}"):
            opened.load(1, np.arange(150), ["logits"])
        put(opened.path / FILE, whole)


def test_swapped_chunks_are_found(damaged):
    swap(damaged, "logits/c.0.0.0", "logits/c.0.1.0")
    with pytest.raises(CorruptionError, match=r"samples 0\.\.31 of view 0\) is not what was written"):
        reader.open(damaged).load(0, np.arange(150), ["logits"])
    assert len(check.verify(damaged).problems) == 2


EDITS = [
    {"data_type": "int16"},
    {"shape": [10**12] * 3},
    {"fill_value": 0.0},
    {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]},
    {"codecs": [{"name": "numcodecs.pickle"}]},
    {"storage_transformers": [{"name": "x"}]},
    {"zarr_format": 2, "filters": [{"id": "pickle"}], "compressor": None},
    {"dimension_names": ["a", "b", "c"]},
    {"extra": 1},
    None,
]
"""edits of an array document; None for a document of null"""


def test_edited_array_documents_are_refused(damaged):
    file = damaged / "logits/zarr.json"
    document = json.loads(file.read_text())
    for change in EDITS:
        file.write_bytes(canonical_json(change and document | change))
        with pytest.raises(CorruptionError, match=r"zarr.json is not what this store's plan implies"):
            reader.open(damaged)
    file.write_bytes(canonical_json({name: document[name] for name in document if name != "dimension_names"}))
    assert reader.open(damaged).count == 150  # as it was written before axes had names


def test_verification_of_a_sound_store_reads_every_byte(sealed):
    found = check.verify(sealed)
    chunks = [file for file in sealed.rglob("c.*") if file.is_file()]
    assert found == (len(chunks), len(chunks), sum(file.stat().st_size for file in chunks), ())
    assert check.verify(sealed, share=0) == (len(chunks), 0, 0, ())


def test_verification_collects_all_damage(damaged):
    (damaged / "logits/c.0.0.0").unlink()
    put(damaged / "logits/c.1.3.0", flip((damaged / "logits/c.1.3.0").read_bytes(), 77))
    for name in ("_kcd/log/0/v00001-p00000.json", "labels/zarr.json"):
        put(damaged / name, b"{}")
    problems = "\n".join(check.verify(damaged).problems)
    for name in ("c.0.0.0 ", "c.1.3.0 ", "v00001-p00000.json", "labels/zarr.json"):
        assert name in problems
