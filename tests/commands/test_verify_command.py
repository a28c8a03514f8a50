import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from exports import exporting
from pupils import SCHOOL, SPEC, command, everything, school

from kcdcache.commands import verify
from kcdcache.condense import manifest
from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, SettingsError
from kcdcache.files.records import readable_json, sealed_json


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A teacher, its store, and a run that distils from it."""
    place = school(tmp_path_factory.mktemp("checks"))
    command(place, "train", out=place.root / "run", **SCHOOL)
    place.file = place.root / "run"
    exporting(place, place.root / "exported")
    return place.root


@pytest.fixture
def place(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "place"))


def flip(path, position=None):
    """Flip a bit: of the first page of a table (a flip between pages may change nothing), of the middle elsewhere."""
    data = bytearray(path.read_bytes())
    usual = 100 if path.suffix == ".parquet" else len(data) // 2
    data[usual if position is None else position] ^= 4
    path.write_bytes(data)


WHOLE = {
    "store": "store",
    "run": "run",
    "manifest": "run/stages/1/manifest.parquet",
    "values": "run/values.parquet",
    "network": "teacher/model.safetensors",
    "condensed": "exported",
}


@pytest.mark.parametrize("kind", verify.CHECKS)
def test_what_was_written_is_in_order_and_stays_as_it_is(made, kind):
    before = everything(made)
    found = verify.verify(made / WHOLE[kind])
    assert (found["kind"], found["problems"]) == (kind, 0)
    assert everything(made) == before


def test_a_run_is_counted_whole(made):
    found = verify.verify(made / "run")
    assert found["finished"] is True
    assert found["manifests"] == len(list((made / "run/stages").glob("*/manifest.parquet"))) == 4
    assert found["values"] == 4
    assert found["networks"] == 1


@pytest.mark.parametrize(
    ("kind", "file", "name"),
    [
        ("store", "store/logits/c.1.0.0", "c.1.0.0"),
        ("store", "store/labels/c.0", "labels/c.0"),
        ("store", "store/logits/zarr.json", "zarr.json"),
        ("store", "store/_kcd/commit.0.json", "commit.0.json"),
        ("store", "store/_kcd/log/0/samples.json", "samples.json"),
        *((kind, WHOLE[kind], Path(WHOLE[kind]).stem) for kind in ("manifest", "values", "network")),
    ],
)
def test_damage_is_found_by_name(place, kind, file, name):
    flip(place / file)
    with pytest.raises(CorruptionError, match=rf"(?s)(problems\n.*|){name}"):
        verify.verify(place / WHOLE[kind], read_data=True)


def test_random_damage_of_any_file_of_a_run_is_an_error_of_ours(place):
    """Only what nobody promises may change unseen: who holds the lock, and clock times that change no sum."""
    random, files = np.random.default_rng(0), sorted(path for path in (place / "run").rglob("*") if path.stat().st_size)
    for path in [path for path in files if path.is_file()]:
        whole = path.read_bytes()
        flip(path, int(random.integers(len(whole))))
        try:
            verify.verify(place / "run")
        except KcdcacheError:
            assert path.name != ".lock"
        else:
            assert path.name in (".lock", "timing.jsonl")
        path.write_bytes(whole)
    assert verify.verify(place / "run")["problems"] == 0


@pytest.mark.parametrize(("path", "given"), [("run", {"data": SPEC}), ("store", {})])
def test_points_are_computed_again_for_stores_only_and_with_their_data(made, path, given):
    with pytest.raises(SettingsError, match="give a store, its --teacher and its --data"):
        verify.verify(made / path, teacher=str(made / "teacher"), **given)


def test_another_teacher_than_the_stores_is_refused(place):
    record = place / "teacher/model.json"
    document = json.loads(record.read_text())
    document["transform"]["mean"][0] += 0.1
    record.write_bytes(sealed_json({key: document[key] for key in document if key != "digest"}, readable_json))
    with pytest.raises(MismatchError, match=r"differ in transform.mean\[0\]"):
        verify.verify(place / "store", teacher=str(place / "teacher"), data=SPEC)


def test_a_set_changed_by_another_tool_is_corruption(place):
    path = place / WHOLE["manifest"]
    data = path.read_bytes()
    assert manifest.read(path).knowledge_id.encode() in data
    path.write_bytes(data.replace(manifest.read(path).knowledge_id.encode()[:8], b"00000000"))
    with pytest.raises(CorruptionError, match=r"manifest.parquet was changed after it was written"):
        verify.verify(path)
