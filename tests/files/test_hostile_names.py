"""Names and frames of unknown origin: they must not lead elsewhere, steer the terminal, or forge a line of ours."""

import json
import shutil

import google_crc32c
import pytest
from forging import first_chunk, resealed, write_resealed
from numcodecs import Zstd
from PIL import Image
from pupils import distilled, school
from stores import creating, finish, make, plan_of

from kcdcache.condensation import manifest
from kcdcache.datasets.spec import DataIdentity
from kcdcache.errors import CorruptionError, MismatchError, UnsafeError
from kcdcache.files import run_files
from kcdcache.files.atomic import sha256_file
from kcdcache.files.records import canonical_json, logged_seconds, read_json, readable_json, sealed_json
from kcdcache.runs import check, state
from kcdcache.runs.folder import RunFolder
from kcdcache.settings import ViewRule
from kcdcache.store.identity import Knowledge, TeacherIdentity

NAME = "\x1b]0;owned\x07\x9b2J\r\x08\u202e\u200b\ufeffa\nproblems: 0"
"""would steer a terminal, and forge a line of ours"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    pupils = school(root / "school", views=1)
    distilled(pupils, root / "run", run={"until": 1}, epochs=2, stages=1)
    return root / "run"


@pytest.fixture
def folder(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return RunFolder(path=tmp_path / "run")


def harmless(done):
    """Whether an output steers no terminal and holds no line that a name made."""
    assert done.output
    assert all(letter.isprintable() or letter == "\n" for letter in done.output), repr(done.output)
    assert not any(line.strip() == "problems: 0" for line in done.output.splitlines()), done.output
    return True


def test_names_in_files_are_shown_escaped(run, tmp_path):
    labels = manifest.full(manifest.Samples("k" + NAME, 3))
    file = tmp_path / "m.parquet"
    changed = {key: getattr(labels, key) for key in labels.__dataclass_fields__} | {"rule": {NAME: NAME}}
    manifest.write(file, manifest.Manifest(**changed))
    assert harmless(run("inspect", file))
    assert harmless(run("inspect", file, "--json"))
    who = Knowledge(
        teacher=TeacherIdentity(architecture=NAME, weights=NAME, transform={NAME: NAME}, precision="float32"),
        data=DataIdentity(count=150, classes=(NAME, "b"), image_size=(4, 4), digest=NAME),
        views=ViewRule(rule=NAME, padding=0, fill=NAME, size=(4, 4), seed=0),
    )
    with creating(tmp_path / "s", plan_of(), who) as writing:
        finish(writing)
    told = run("inspect", tmp_path / "s")
    assert harmless(told)
    assert "owned" in told.output
    assert "a\\nproblems: 0" in told.output


def test_names_of_files_are_shown_escaped_in_errors(run, tmp_path):
    for words in (["inspect", tmp_path / NAME], [f"no{NAME}"], ["inspect", f"--{NAME}"], ["run", f"{NAME}.toml"]):
        assert harmless(run(*words))
    assert harmless(run("inspect", tmp_path / NAME, "--debug"))


def test_class_names_are_shown_escaped_in_logs_and_errors(run, tmp_path):
    for split in ("train", "val"):
        (tmp_path / "d" / split / NAME).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "d" / split / NAME / "0.png")
        (tmp_path / "d" / split / NAME / "notes.txt").write_text("no image")
    words = ["fit", "--data", f"folder:{tmp_path}/d", "--model", "resnet8", "--out", tmp_path / "out", "--dry-run"]
    logged = run(*words)
    assert logged.code == 0
    assert "files that are not images: 2" in logged.output
    assert harmless(logged)
    (tmp_path / "d/val" / f"{NAME}2").mkdir()
    refused = run(*words)
    assert (refused.code, "class folders that" in refused.output) == (4, True)
    assert harmless(refused)


def test_titles_of_a_recipe_are_shown_escaped(run, tmp_path):
    step = f'[[step]]\nname = "teacher"\nrun = "fit"\ntitle = {json.dumps(NAME)}\n'
    file = tmp_path / "r.toml"
    file.write_text(
        f'title = {json.dumps(NAME)}\ndata = {json.dumps(f"folder:{NAME}")}\n{step}settings = {{ model = "resnet8" }}'
    )
    assert harmless(run("run", file, "--out", tmp_path / "out", "--dry-run"))
    assert harmless(run("run", file, "--out", tmp_path / "out"))


def test_long_errors_are_cut(run):
    done = run("run", f"{'n' * 9000}.toml")
    assert "characters)" in done.output
    assert len(done.output) < 4200


def test_several_problems_stand_on_lines_of_their_own(run, tmp_path):
    root = make(tmp_path / "s")
    for file in sorted(root.glob("logits*/c.*")):
        file.unlink()
    lines = run("verify", root).output.splitlines()
    assert lines[0].endswith("4 problems")
    assert all(line.startswith("  - ") and line.endswith("is missing") for line in lines[1:])


SUMMARY = state.Summary(
    kind="train", model="resnet8", teacher_forwards=0, seconds=1.0, accuracy_last=0.5, accuracy_best=0.5, best_epoch=0,
    calibration_error=0.1, relative_cost=1.0, student_samples=1, epochs=1, count=1,
)  # fmt: skip
ENTRY = {"rows": None, "digest": None, "bytes": None, "sha256": None}
READERS = {
    "checkpoint/latest.json": state.load_checkpoint,
    "summary.json": lambda folder: state.condensed_set(folder.path),
    "files.json": lambda folder: run_files.read(folder.path),
}
"""record of a run that names other files -> who reads it"""


@pytest.mark.parametrize(
    ("file", "key", "name"),
    [
        ("checkpoint/latest.json", "file", "../../victim"),
        ("checkpoint/latest.json", "file", "0" * 16 + ".safetensors\n"),
        ("summary.json", "condensed_set", "stages/../../x/manifest.parquet"),
        ("summary.json", "condensed_set", "stages/0/values.parquet"),
        ("files.json", "files", {"../../victim": ENTRY}),
        ("files.json", "files", {"values.parquet": {}}),
        ("files.json", "pending", ["/etc/passwd"]),
        ("files.json", "pending", None),
    ],
)
def test_a_runs_records_name_files_in_its_folder_only(folder, file, key, name):
    if file == "summary.json":
        state.write_summary(folder, SUMMARY)
    path, form = folder.path / file, readable_json if file == "summary.json" else canonical_json
    known = {name: value for name, value in read_json(path).items() if name != "digest"}
    path.write_bytes(sealed_json(known | {key: name}, form))
    with pytest.raises(CorruptionError, match=rf"{path.name} is damaged or was changed: {key}"):
        READERS[file](folder)
    assert any(f"{path.name} is damaged" in problem for problem in check.check(folder.path).problems)


HEADERS = {
    "endless": (2**40).to_bytes(8, "little") + b"{}",
    "long": (8 * 2**20).to_bytes(8, "little") + b" " * 8 * 2**20,
    "no record": (2).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_checkpoint_with_a_hostile_header_is_refused(folder, header):
    file = folder.checkpoints / f"{0:016}.safetensors"
    file.write_bytes(HEADERS[header])
    pointer = folder.checkpoints / "latest.json"
    write_resealed(pointer, {"file": file.name, "sha256": sha256_file(file)})
    expected = UnsafeError if header in ("endless", "long") else CorruptionError
    with pytest.raises(expected, match=f"{file.name}"):
        state.load_checkpoint(folder)


def test_a_summary_that_names_its_own_condensed_set_is_followed(folder):
    state.write_summary(folder, SUMMARY)
    with pytest.raises(MismatchError, match="is a `fit` and has no condensed set; give one that `train` made"):
        state.condensed_set(folder.path)
    state.write_summary(folder, SUMMARY.model_copy(update={"condensed_set": "stages/12/manifest.parquet"}))
    assert state.condensed_set(folder.path) == folder.path / "stages/12/manifest.parquet"


@pytest.mark.parametrize("line", [b"[]", b"{}", b'{"seconds":"1"}', b'{"seconds":1e999}', b"[" * 900, b"", b"3"])
def test_odd_lines_of_clock_times_count_nothing(folder, line):
    folder.timing.write_bytes(b'{"seconds":2}\n' + line + b'\n{"seconds":1.5}\n')
    assert logged_seconds(folder.timing) == 3.5


def test_odd_lines_of_metrics_are_named(folder):
    first = folder.metrics.read_bytes()
    for line in (b"[]", b"{}", b'{"epoch":NaN}', first.replace(b'"loss"', b'"lost"').strip()):
        folder.metrics.write_bytes(first + line + b"\n")
        with pytest.raises(CorruptionError, match=r"metrics\.jsonl, line 2 is damaged or was changed: "):
            state.read_metrics(folder.path)


def payloads(size):
    """Chunk payloads that hold other frames than the one planned of `size` bytes."""
    planned, bomb = bytes(Zstd(level=1).encode(bytes(size))), bytes(Zstd(level=1).encode(bytes(2**31 - 1)))
    skippable = bytes.fromhex("502a4d18") + (8).to_bytes(4, "little") + bytes(8)
    return {
        "a bomb": bomb,
        "a bomb after the planned frame": planned + bomb,
        "a frame that lies": bomb[:6] + size.to_bytes(4, "little") + bomb[10:],
        "a skippable frame first": skippable + bomb,
        "the planned frame twice": planned * 2,
        "the planned frame cut": planned[:-3],
        "too small a frame": bytes(Zstd(level=1).encode(bytes(size - 1))),
        "nothing": b"",
    }


PAYLOADS = payloads(next(a.chunk_bytes for a in plan_of(16384, compression="zstd").arrays if a.name == "logits"))
LOAD = """
import numpy as np
from kcdcache.store import reader
opened = reader.open({path!r})
opened.load(0, np.arange(opened.count), ("logits",))
"""


@pytest.mark.parametrize("name", PAYLOADS)
def test_chunks_of_other_frames_than_planned_are_refused_in_little_memory(run, tmp_path, name):
    root, payload = make(tmp_path / "s", plan_of(count=16384, compression="zstd")), PAYLOADS[name]
    resealed(root, first_chunk(root), payload + google_crc32c.value(payload).to_bytes(4, "little"))
    done = run(text=LOAD.format(path=str(root)))
    said = "does not unpack to the" if payload else "is logged with 4 bytes"
    assert (done.code, said in done.output) == (1, True), done.output
