"""Exported sets that are damaged or hostile: refused with the place, or read as they were; no code, links or memory."""

import io
import json
import random
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damaging import DAMAGE, TENTH, bits, files_of, put
from exports import exporting, prepared
from PIL import Image
from pupils import SPEC

from kcdcache.commands import verify
from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError, UnsafeError
from kcdcache.export import condensed_set, record
from kcdcache.files.atomic import sha256_file
from kcdcache.files.records import digest_of, sealed_json
from kcdcache.store import reader

IMAGES = {"data": SPEC, "with_images": True}
UNREAD = "_kcd/lock"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An export with images, one with baked targets, and another one of the same store."""
    place = prepared(tmp_path_factory.mktemp("exports"))
    exporting(place, place.root / "pictures", **IMAGES)
    exporting(place, place.root / "baked", bake=True, temperature=4.0)
    exporting(place, place.root / "other", views=2)
    return place


@pytest.fixture
def root(made, tmp_path):
    return Path(shutil.copytree(made.root / "pictures", tmp_path / "set"))


def names_of(folder):
    return [name for name in files_of(folder) if not name.endswith(UNREAD)]


def everything(folder):
    """All that training takes from an exported set: rows, samples, manifest, baked targets, images."""
    opened = condensed_set.open(folder)
    found = {"manifest": opened.manifest.digest, "labels": bits(opened.knowledge.labels)}
    stores = {"own": (opened.knowledge, opened.knowledge.held)}
    if opened.mixes is not None:
        mixes = reader.open(opened.mixes)
        stores["mixes"] = mixes, np.arange(mixes.count)
    for kind, (held, rows) in stores.items():
        for view in range(held.views):
            for name, values in held.load(view, rows, list(held.fields)).items():
                found[kind, name, view] = bits(values)
    if opened.record.content.images is not None:
        dataset = condensed_set.read_data(f"condensed:{folder}")
        found["images"] = bits(dataset.train.images(opened.knowledge.held)), dataset.identity()
        found["test"] = dataset.test.digest(), dataset.mean, dataset.std
    return found


# damage


@pytest.mark.parametrize("share", TENTH)
@pytest.mark.parametrize("export", ["pictures", "baked"])
def test_no_damage_of_any_file_is_silent(made, tmp_path, export, share):
    folder, chance = Path(shutil.copytree(made.root / export, tmp_path / "set")), random.Random(7)
    whole, every = everything(folder), [(name, how) for name in names_of(folder) for how in DAMAGE]
    assert len(every) > 15 * len(DAMAGE)
    for name, how in chance.sample(every, int(share * len(every))):
        content = (folder / name).read_bytes()
        put(folder / name, DAMAGE[how](content, chance.randrange(len(content))))
        if not (folder / name).exists() or (folder / name).read_bytes() != content:
            with pytest.raises(KcdcacheError, match=r"\w"):
                verify.verify(folder, read_data=True)
            with suppress(KcdcacheError):
                assert everything(folder) == whole, name  # what it damaged is not read for training
        put(folder / name, content)
    verify.verify(folder, read_data=True)


def test_files_of_another_export_are_refused(made, root):
    for name in names_of(made.root / "other"):
        if (made.root / "other" / name).read_bytes() == (root / name).read_bytes() or name == record.RECORD:
            continue
        content = (root / name).read_bytes()
        shutil.copy(made.root / "other" / name, root / name)
        with pytest.raises(KcdcacheError):
            verify.verify(root, read_data=True)
        put(root / name, content)


def test_all_damage_is_listed_at_once(root):
    for name in ("README.md", "samples.parquet"):
        put(root / name, (root / name).read_bytes()[:-1])
    (root / "store/logits/c.0.0.0").unlink()
    with pytest.raises(CorruptionError, match=r"3 problems") as caught:
        verify.verify(root)
    for name in ("README.md has", "samples.parquet has", "c.0.0.0 (samples 0..119 of view 0) is missing"):
        assert name in str(caught.value)


# forged records


def reseal(root, change=lambda content: None, files=True, **more):
    """Change a record as an attacker would who knows the format: its digests fit again."""
    document = json.loads((root / record.RECORD).read_bytes())
    document.pop("digest")
    content = document["content"]
    if files:
        content["files"] = {name: list(record.entry_of(root, name)) for name in content["files"]}
    change(content)
    document["id"] = digest_of(content)
    (root / record.RECORD).write_bytes(sealed_json(document | more))


def setting(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def recalled(change):
    """A change of the knowledge whose id fits again."""

    def changed(content):
        change(content["knowledge"])
        content["knowledge_id"] = digest_of(content["knowledge"])

    return changed


HOSTILE = {
    "a path outside": setting("files", "../outside", value=[1, "0" * 64]),
    "a file fewer": lambda content: content["files"].pop("README.md"),
    "a size that is true": setting("files", "README.md", value=[True, "0" * 64]),
    "no views": setting("views", value=0),
    "a temperature below zero": setting("baked", value={"temperature": -1.0, "target": "keep", "mix": "convex"}),
    "baked without its store": setting("baked", value={"temperature": 1.0, "target": "keep", "mix": "convex"}),
    "images of another kind": setting("images", "train", value="pickle"),
    "no images after all": setting("images", value=None),
    "statistics of unlike channels": setting("images", "mean", value=[0.5]),
    "another manifest": setting("manifest", value="0" * 64),
    "another teacher": recalled(setting("teacher", "weights", value="0" * 64)),
    "a huge count": recalled(setting("data", "count", value=10**12)),
    "another count": recalled(setting("data", "count", value=100)),
    "other classes": recalled(setting("data", "classes", value=["a"] * 10)),
    "a huge image": recalled(setting("data", "image_size", value=[10**9, 10**9])),
    "a set of mixes": recalled(setting("mixes", value={"manifest": "m"})),
    "a plan of nothing": setting("layout", value={}),
    "a plan of more": setting("layout", "count", value=10**8),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_forged_record_is_refused(root, change):
    reseal(root, change, files=False)
    for look in (verify.verify, everything):
        with pytest.raises((CorruptionError, MismatchError, UnsafeError)):
            look(root)


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"format_version": 1}, MismatchError, "has format 1, this kcdcache reads 0; upgrade kcdcache"),
        ({"id": "0" * 64}, CorruptionError, "does not have the id '000"),
        ({"surprise": 1}, CorruptionError, "surprise: Extra inputs are not permitted"),
        ({"made": []}, CorruptionError, "made: Input should be an object"),
        ({"content": []}, CorruptionError, "was changed"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_forged_frame_is_refused(root, more, error, said):
    reseal(root, **more)
    with pytest.raises(error, match=said):
        record.read(root)


def rewritten(root, change):
    """Change the table of all samples, and the record that vouches for it."""
    table = pq.read_table(root / record.SAMPLES)
    columns = {name: table[name].to_numpy().copy() for name in table.column_names}
    change(columns)
    (root / record.SAMPLES).write_bytes(record.encode_samples(record.Samples(**columns)))
    reseal(root)


def cell(columns, name, place, value):
    columns[name][place] = value


def swapped_rows(columns):
    held = np.flatnonzero(columns["row"] >= 0)[:2]
    columns["row"][held] = columns["row"][held][::-1]


def moved_row(columns):
    held, free = np.flatnonzero(columns["row"] >= 0), np.flatnonzero(columns["row"] < 0)
    columns["row"][held[-1]] = -1
    columns["row"][free[free > held[-2]][0] if (free > held[-2]).any() else free[-1]] = len(held) - 1


FORGED = {
    "another digest": lambda columns: cell(columns, "digest", 3, 5),
    "a label beyond": lambda columns: cell(columns, "label", 3, 10),
    "a label below": lambda columns: cell(columns, "label", 3, -1),
    "rows in another order": swapped_rows,
    "a row of another sample": moved_row,
    "a row too many": lambda columns: cell(columns, "row", np.flatnonzero(columns["row"] < 0)[-1], 120),
    "a row far below": lambda columns: cell(columns, "row", np.flatnonzero(columns["row"] < 0)[0], -7),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_a_forged_table_of_samples_is_refused(root, change):
    rewritten(root, change)
    with pytest.raises(CorruptionError, match=r"samples.parquet|store holds no row of sample|store has \d+ rows"):
        condensed_set.open(root)


def test_labels_that_are_not_the_stores_are_found(root):
    def relabel(columns):
        held = np.flatnonzero(columns["row"] >= 0)[0]
        columns["label"][held] = (columns["label"][held] + 1) % 10

    rewritten(root, relabel)
    with pytest.raises(CorruptionError, match=r"its labels are not those in samples\.parquet"):
        verify.verify(root)
    with pytest.raises(CorruptionError, match=r"has other labels than samples\.parquet"):
        condensed_set.read_data(f"condensed:{root}")


# forged images


def repictured(root, change, split):
    """Change the table of images, and the record that vouches for it."""
    path = root / record.SPLITS[split]
    table = pq.read_table(path)
    rows = {name: table[name].to_pylist() for name in table.column_names}
    change(rows)
    schema = table.schema
    pq.write_table(pa.table({name: pa.array(rows[name], schema.field(name).type) for name in rows}, schema), path)
    reseal(root)


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


def put_image(number, pixels):
    return lambda rows: cell(rows, "image", number, png(pixels))


BLACK = np.zeros((16, 16, 3), np.uint8)
PICTURES = {
    "another image": (put_image(4, BLACK), "is not the image that the teacher saw"),
    "another size": (put_image(4, np.zeros((17, 16, 3), np.uint8)), "has another size"),
    "a large first image": (put_image(0, np.zeros((3500, 3500, 3), np.uint8)), "would take .* bytes decoded"),
    "no image": (lambda rows: cell(rows, "image", 4, None), "is not a readable image"),
    "no PNG": (lambda rows: cell(rows, "image", 4, {"bytes": b"%!PS", "path": None}), "not a readable image"),
    "an index twice": (lambda rows: cell(rows, "index", 4, rows["index"][3]), "its index should ascend in 0..199"),
    "an index beyond": (lambda rows: cell(rows, "index", -1, 200), "its index should ascend in 0..199"),
    "no index": (lambda rows: cell(rows, "index", 0, None), "its index should ascend in 0..199"),
    "another label": (lambda rows: cell(rows, "label", 0, (rows["label"][0] + 1) % 10), "has other labels than"),
    "a label beyond": (lambda rows: cell(rows, "label", 0, 10), r"a label in 0\.\.9 and an index"),
    "another test image": (put_image(0, BLACK), "is not the test split that was exported"),
    "no rows": (lambda rows: [rows[name].clear() for name in rows], "should hold an image, a label"),
}


@pytest.mark.parametrize("how", PICTURES)
def test_forged_images_are_refused(root, how):
    change, said = PICTURES[how]
    repictured(root, change, "test" if "test" in how else "train")
    with pytest.raises((CorruptionError, UnsafeError), match=said):
        condensed_set.read_data(f"condensed:{root}")


# never followed


def test_nothing_is_read_or_written_behind_a_link(made, root, tmp_path):
    mine, chunk = tmp_path / "mine", root / "store/logits/c.0.0.0"
    shutil.move(chunk, mine)
    chunk.symlink_to(mine)
    content = mine.read_bytes()
    with pytest.raises(CorruptionError, match=r"c\.0\.0\.0 .*is missing"):
        condensed_set.open(root)
    (root / record.RECORD).unlink()
    with pytest.raises(UnsafeError, match="is a symbolic link; nothing is written in a folder that holds one"):
        exporting(made, root, **IMAGES)
    assert mine.read_bytes() == content


def test_a_pinned_id_finds_what_was_rewritten_with_fitting_digests(made, root):
    promised = record.read(root).id
    put(root / record.CARD, b"# forged")
    reseal(root)
    verify.verify(root, read_data=True)
    assert everything(root) == everything(made.root / "pictures")
    assert record.read(root).id != promised
    assert sha256_file(root / record.MANIFEST) == sha256_file(made.root / "pictures/manifest.parquet")
