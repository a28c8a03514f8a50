"""Files of a run that are swapped, stale, missing, damaged or of another run: each refused by name, by every reader."""

import json
import re
import shutil

import pytest
from damaging import flip, read_manifest
from pupils import SCHOOL, command, distilled, school

from kcdcache.commands import verify
from kcdcache.condensation import manifest, value_files, values
from kcdcache.errors import CorruptionError, KcdcacheError, MismatchError
from kcdcache.files.records import sealed_json
from kcdcache.runs import check, state
from kcdcache.runs.folder import RunFolder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Of one store: a finished run, one that stopped inside its last stage, one with another keep; and a fitted one."""
    place = school(tmp_path_factory.mktemp("school"))
    distilled(place, place.root / "run", mix_target="requery")
    distilled(place, place.root / "begun", mix_target="requery", run={"until": 5})
    distilled(place, place.root / "other", keep=0.5)
    command(place, "fit", model="resnet8", epochs=1, out=place.root / "fit")
    return place


class Copies:
    """A folder in which each of the runs above appears, to be damaged, when it is first named."""

    def __init__(self, source, target):
        self.source, self.target = source, target

    def __truediv__(self, name):
        run = name.split("/")[0]
        if (self.source / run).exists() and not (self.target / run).exists():
            shutil.copytree(self.source / run, self.target / run)
        return self.target / name


@pytest.fixture
def place(made, tmp_path):
    return Copies(made.root, tmp_path)


# ---- swapped for another valid file of the same knowledge


def test_a_stale_manifest_is_refused_by_every_reader_with_both_digests(made, place):
    path, theirs = (place / f"{name}/stages/2/manifest.parquet" for name in ("begun", "other"))
    was, now = manifest.read(path).digest, manifest.read(theirs).digest
    shutil.copy(theirs, path)
    said = rf"holds {now} with \d+ rows, the run wrote {was} with \d+ rows: another file was put in its place"
    given = {"values": place / "begun/values.parquet", "keep": 0.4, "out": place / "out.parquet"}
    readers = {
        "read": lambda: manifest.read(path),
        "resume": lambda: distilled(made, place / "begun", mix_target="requery"),
        "condense": lambda: command(made, "condense", previous=path, **given),
        "reuse": lambda: command(made, "train", manifest=path, out=place / "new", **SCHOOL),
        "requery": lambda: command(made, "precompute", manifest=path),
    }
    for name, reader in readers.items():
        with pytest.raises(MismatchError, match=said):
            reader()
        assert name == "read" or not (place / "new").exists()
    with pytest.raises(CorruptionError, match=said):
        verify.verify(place / "begun")
    assert not (place / "out.parquet").exists()


def test_the_next_stage_is_not_condensed_from_a_swapped_manifest(made, place):
    """What the run reads to condense is not only the stage it trains on."""
    distilled(made, place / "short", run={"until": 2})
    said = r"0/manifest\.parquet holds \w{64} .* another file was put in its place"
    shutil.copy(place / "other/stages/1/manifest.parquet", place / "short/stages/0/manifest.parquet")
    with pytest.raises(MismatchError, match=said):
        distilled(made, place / "short")


@pytest.mark.parametrize("name", ["values.parquet", "stages/1/values.parquet"])
def test_values_of_another_run_are_refused_with_both_digests(made, place, name):
    mine, theirs = place / "begun" / name, place / "other" / name
    was, now = (values.fingerprint(value_files.read(path, 200).values) for path in (mine, theirs))
    shutil.copy(theirs, mine)
    said = rf"{name} holds {now} with 200 rows, the run wrote {was} with 200 rows"
    given = {"values": mine, "keep": 0.4, "out": place / "out.parquet"}
    for reader in (lambda: value_files.read(mine, 200), lambda: command(made, "condense", **given)):
        with pytest.raises(MismatchError, match=said):
            reader()
    with pytest.raises(CorruptionError, match=said):
        verify.verify(place / "begun")


def test_the_set_a_run_began_with_is_held_to_its_record(made, place):
    given = manifest.read(place / "other/stages/3/manifest.parquet")
    distilled(made, place / "reuse", given=given, keep=0.3, run={"until": 2})
    assert manifest.read(place / "reuse/given.parquet").digest == given.digest
    shutil.copy(place / "other/stages/2/manifest.parquet", place / "reuse/given.parquet")
    with pytest.raises(CorruptionError, match=r"given\.parquet holds \w{64} .* the run wrote " + given.digest):
        verify.verify(place / "reuse")


@pytest.mark.parametrize("name", ["summary.json", "run.json", "files.json", "checkpoint"])
def test_a_part_of_another_run_is_refused(place, name):
    if name == "checkpoint":
        shutil.rmtree(place / "run" / name)
        shutil.copytree(place / "other" / name, place / "run" / name)
        with pytest.raises(MismatchError, match=r"checkpoint .* is of run \w{64}, .*run\.json of \w{64}"):
            state.load_checkpoint(RunFolder(path=place / "run"))  # its tensors would fit
    else:
        shutil.copy(place / "other" / name, place / "run" / name)
    said = r"holds \w{64} .*the run wrote \w{64}" if name == "summary.json" else r"is of run \w{64}, .* of \w{64}"
    with pytest.raises(CorruptionError, match=said):
        verify.verify(place / "run")


def test_a_manifest_condensed_from_another_stage_is_no_next_stage(made, place):
    """The run waits at the start of stage 1; what is given was condensed from another run's stage."""
    distilled(made, place / "waiting", run={"until": 2})
    stale = manifest.read(place / "other/stages/2/manifest.parquet").digest
    path = place / "given.parquet"
    command(
        made, "condense", values=place / "waiting/values.parquet", stage=1, keep=0.8, out=path,
        previous=place / "other/stages/2/manifest.parquet",
    )  # fmt: skip
    own = manifest.read(place / "waiting/stages/0/manifest.parquet").digest
    said = f"was condensed from manifest {stale}, stage 0 of this run trained on {own}; condense again"
    with pytest.raises(MismatchError, match=said):
        distilled(made, place / "waiting", given=manifest.read(path))
    assert not (place / "waiting/stages/1/manifest.parquet").exists()


# ---- without a record, or with a wrong one


def test_files_without_a_record_are_refused(made, place):
    (place / "begun/files.json").unlink()
    said = r"manifest\.parquet is not in files\.json, the record of what the run wrote: an older kcdcache made it"
    with pytest.raises(CorruptionError, match=said):
        distilled(made, place / "begun", mix_target="requery")
    with pytest.raises(CorruptionError, match=rf"(?s){said}.*student\.safetensors is not in files\.json"):
        verify.verify(place / "begun")


@pytest.mark.parametrize("key", ["rows", "digest", "sha256", "bytes"])
def test_every_entry_of_the_record_counts(place, key):
    file = place / "run/files.json"
    record = json.loads(file.read_bytes())
    del record["digest"]
    entry = record["files"]["stages/1/manifest.parquet"]
    entry[key] = entry[key] + 1 if isinstance(entry[key], int) else "0" * 64
    file.write_bytes(sealed_json(record))
    with pytest.raises(KcdcacheError, match=r"stages/1/manifest\.parquet .*the run wrote|recorded was 0{64}"):
        manifest.read(place / "run/stages/1/manifest.parquet")
    with pytest.raises(CorruptionError, match=r"stages/1/manifest\.parquet"):
        verify.verify(place / "run")


# ---- damage anywhere in the folder


DAMAGE = {
    "metrics.jsonl": r"metrics.jsonl, line 4: not what the checkpoint has for that epoch",
    "summary.json": r"run/summary\.json ",
    "student.json": "student.json",
    "student.safetensors": "student.safetensors is not what the run wrote",
    "values.parquet": "run/values.parquet",
    "stages/2/values.parquet": "stages/2/values.parquet",
    "stages/3/manifest.parquet": "stages/3/manifest.parquet",
    "stages/2/manifest.requery/labels/c.0": r"manifest.requery/labels/c.0 \(samples",
}
"""file -> what is said when a bit in its middle is flipped; `test_damage_matrix` has every kind of damage to each"""


def damage(path):
    data = path.read_bytes()
    path.write_bytes(flip(data, len(data) * 4 + 1))


def test_all_damage_is_told_at_once(place):
    assert [verify.verify(place / run)["finished"] for run in ("run", "begun")] == [True, False]
    for name in DAMAGE:
        damage(place / "run" / name)
    problems = check.check(place / "run").problems
    for said in DAMAGE.values():
        assert any(re.search(said, problem) for problem in problems), said
    with pytest.raises(CorruptionError, match=rf"{len(problems)} problems\n"):
        verify.verify(place / "run")


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("run.json", MismatchError, "is not a store, manifest, values file, run or network"),
        ("files.json", CorruptionError, "is not in files.json"),
        ("checkpoint", CorruptionError, "checkpoint/latest.json is missing"),
    ],
)
def test_a_measure_of_the_others_that_is_missing_is_told(place, name, error, said):
    (place / "run" / name).rename(place / "elsewhere")
    with pytest.raises(error, match=said):
        verify.verify(place / "run")


def test_a_summary_is_held_to_what_it_sums_up(place):
    """Its own digest and its entry in the record made to fit: the files it sums up still tell otherwise."""
    folder = RunFolder(path=place / "run")
    true = state.read_summary(folder.path)
    changes = {"accuracy_last": 0.99, "kept": 3, "condensed_set": "stages/1/manifest.parquet", "seconds": 1e-3}
    for name, wrong in changes.items():
        state.write_summary(folder, true.model_copy(update={name: wrong}))
        with pytest.raises(CorruptionError, match=rf"summary.json, {name}: {wrong}, but the run's other files give"):
            verify.verify(folder.path)
    state.write_summary(folder, true)
    assert verify.verify(folder.path)["problems"] == 0


def test_a_store_of_mixes_belongs_to_the_manifest_beside_it(place):
    shutil.rmtree(place / "run/stages/2/manifest.requery")
    shutil.copytree(place / "run/stages/1/manifest.requery", place / "run/stages/2/manifest.requery")
    with pytest.raises(CorruptionError, match=r"the teacher's outputs on manifest \w{64}, next to it is \w{64}"):
        verify.verify(place / "run")


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "summary.json", "metrics.jsonl"])
def test_damage_of_a_fitted_run_is_found(place, name):
    assert verify.verify(place / "fit")["problems"] == 0
    damage(place / "fit" / name)
    with pytest.raises(CorruptionError, match=name):
        verify.verify(place / "fit")


# ---- crafted files


CRAFTED = {
    "two magics": lambda data: b"PAR1PAR1",
    "footer cut": lambda data: data[:-9],
    "length too long": lambda data: data[:-8] + (2**31 - 1).to_bytes(4, "little") + data[-4:],
    "length negative": lambda data: data[:-8] + b"\xff\xff\xff\xff" + data[-4:],
    "encrypted": lambda data: b"PARE" + data[4:-4] + b"PARE",
    "footer of garbage": lambda data: data[:-200] + b"\x15" * 192 + data[-8:],
    "two joined": lambda data: data + data,
    "something before": lambda data: b"more" + data,
}
"""in the manner of parquet-testing's bad_data: name -> a file made of a good one"""


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_files_are_never_wrong_rows(place, name):
    inside, outside = place / "run/stages/2/manifest.parquet", place / "copy.parquet"
    good, data = read_manifest(inside), CRAFTED[name](inside.read_bytes())
    for path in (inside, outside):
        path.write_bytes(data)
    with pytest.raises(KcdcacheError, match=r"manifest\.parquet"):
        manifest.read(inside)
    if name == "two joined":  # its last footer is good and tells of the first half
        assert read_manifest(outside) == good
    else:
        with pytest.raises(KcdcacheError, match=r"copy\.parquet"):
            manifest.read(outside)
    with pytest.raises(CorruptionError, match=r"stages/2/manifest\.parquet"):
        verify.verify(place / "run")
