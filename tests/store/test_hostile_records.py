"""Stores and runs of unknown origin: their records and links must not stall, fill the memory, or write elsewhere."""

import os
import shutil
from contextlib import suppress

import numpy as np
import pytest
from damaging import endless
from forging import TEXTS, THOROUGH, first_chunk, write_resealed
from pupils import SCHOOL, SPEC, command, distilled, lines, school
from stores import content, creating, grown, make, plan_of

from kcdcache.commands import verify
from kcdcache.errors import CorruptionError, UnsafeError
from kcdcache.files.records import canonical_json, digest_of, read_json
from kcdcache.report import show
from kcdcache.store import log, reader
from kcdcache.teacher.repair import repair


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    pupils = school(root / "school")
    distilled(pupils, root / "run", epochs=2, stages=1)
    distilled(pupils, root / "half", run={"until": 1}, epochs=2, stages=1)
    chosen = root / "run/stages/0/manifest.parquet"
    command(pupils, "export", manifest=chosen, with_images=True, out=root / "set")
    made = {kind: root / kind for kind in ("run", "half", "set")}
    return made | {"store": pupils.knowledge.path, "network": pupils.teacher}


RECORDS = {
    "store": ["_kcd/identity.json", "_kcd/commit.0.json", "_kcd/plan.0.json", "_kcd/log/0/v00000-p00000.json"],
    "run": ["run.json", "summary.json", "metrics.jsonl"],
    "network": ["model.json"],
    "set": ["condensed.json"],
}
OTHERS = {"store": ["logits/c.0.0.0"], "set": ["samples.parquet", "data/train-00000-of-00001.parquet"]}
"""files that are no JSON"""


def places(made, folder, *named, most=None):
    """Yield (copy of what one of these files lies in, its kind, the file), for the first `most` of each kind."""
    listed = [(kind, name) for files in named for kind, names in files.items() for name in names[:most]]
    for number, (kind, name) in enumerate(listed):
        root = copied(made, kind, folder / str(number))
        assert (root / name).is_file()
        yield root, kind, root / name


def copied(made, kind, folder):
    shutil.copytree(made[kind], folder / kind)
    return folder / kind


def refused(run, root, kind, codes):
    path = root / "model.json" if kind == "network" else root
    for look in ("inspect", "verify"):
        done = run(look, path)
        if look == "verify" or done.code:
            assert done.code in codes, done.output
        assert "internal error" not in done.output
        assert "out of memory" not in done.output


LONG = [text for text in TEXTS if len(TEXTS[text]) > 10**5]
CASES = [(text, 1 if text in LONG else None) for text in TEXTS if text not in THOROUGH]
CASES += [pytest.param(text, None, marks=pytest.mark.slow) for text in (*THOROUGH, *LONG)]


@pytest.mark.parametrize(("text", "most"), CASES)
def test_records_of_hostile_json_are_refused_in_little_memory(run, made, tmp_path, text, most):
    for root, kind, file in places(made, tmp_path, RECORDS, most=most):
        file.write_bytes(TEXTS[text])
        refused(run, root, kind, (3, 4, 8, 9))


@pytest.mark.parametrize("what", ["fifo", "/dev/zero", "sparse"])
def test_files_that_never_end_are_not_waited_for(run, made, tmp_path, what):
    for root, kind, file in places(made, tmp_path, RECORDS, OTHERS, most=None if what == "fifo" else 1):
        endless(file, what)
        refused(run, root, kind, (3, 8, 9))


def replanned(root, **changes):
    """Change a store's plan and everything that vouches for it."""
    plan = read_json(log.plan_path(root, 0))
    field = changes.pop("field", {})
    plan["fields"][0] |= field
    plan = {key: value for key, value in (plan | changes).items() if key != "digest"}
    write_resealed(log.plan_path(root, 0), plan)
    commit = read_json(log.commit_path(root, 0))
    write_resealed(log.commit_path(root, 0), commit | {"plan": plan})
    return root


def test_a_plan_of_endless_chunks_is_refused_before_they_are_listed(tmp_path):
    root = replanned(make(tmp_path / "s"), views=10**5)
    with pytest.raises(CorruptionError, match=r"was changed or belongs to another store|chunk files, its log names"):
        reader.open(root)


@pytest.mark.parametrize(
    "changes",
    [
        {"count": 10**15}, {"views": 10**15}, {"count": -1}, {"views": True}, {"part_rows": 10**15},
        {"field": {"row_shape": [2**33, 2**31]}}, {"field": {"row_shape": [1] * 1000}},
        {"field": {"row_shape": [1.5]}}, {"field": {"name": "../../x"}}, {"field": {"encoding": "pickle"}},
        {"compression": "numcodecs.pickle"},
    ],
    ids=str,
)  # fmt: skip
def test_plans_that_claim_the_impossible_are_refused(run, tmp_path, changes):
    root = replanned(make(tmp_path / "s"), **changes)
    done = run("verify", root)
    assert (done.code, "plan" in done.output) == (3, True), done.output
    with suppress(CorruptionError):
        show.inspect(root)


def test_linked_chunks_are_refused_and_hard_links_are_plain_files(tmp_path):
    root = make(tmp_path / "s")
    chunk = root / first_chunk(root)
    os.link(chunk, tmp_path / "other")
    opened = reader.open(root)
    chunk.unlink()
    chunk.symlink_to(tmp_path / "other")
    with pytest.raises(UnsafeError, match="is a symbolic link"):
        opened.load(0, np.arange(opened.count), ("logits",))
    (root / "logits").rename(tmp_path / "elsewhere")
    (root / "logits").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptionError, match="is missing"):
        reader.open(root)


def training(made, out):
    words = ["train", "--store", made["store"], "--data", SPEC, "--student", "lessons:TinyNet", "--out", out]
    rest = lines(SCHOOL | {"student": "lessons:TinyNet", "epochs": 2, "stages": 1})
    return [*words, *rest[2:], "--device", "cpu"]


@pytest.mark.parametrize("name", [".lock", "checkpoint", "timing.jsonl", "stages"])
def test_continuing_a_run_writes_and_deletes_nothing_through_links(run, made, tmp_path, name):
    root = copied(made, "half", tmp_path)
    precious = tmp_path / "precious"
    if name in ("checkpoint", "stages"):
        precious.mkdir()
        (precious / "mine.safetensors").write_bytes(b"dear to me")
    else:
        precious.write_bytes(b"dear to me")
    shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink(missing_ok=True)
    (root / name).symlink_to(precious)
    done = run(*training(made, root))
    assert (done.code, "is a symbolic link" in done.output) == (8, True), done.output
    kept = precious / "mine.safetensors" if precious.is_dir() else precious
    assert kept.read_bytes() == b"dear to me"


def test_an_unharmed_run_continues(run, made, tmp_path):
    done = run(*training(made, copied(made, "half", tmp_path)))
    assert done.code == 0, done.output


def finish_again(root):
    with creating(root, plan_of()):
        pass


WRITERS = {
    "grow": (lambda root: grown(root, views=3), "nothing is written in a folder that holds one"),
    "resume": (finish_again, "nothing is written in a folder that holds one"),
    "repair": (lambda root: repair(root, None), "nothing is written"),
}


@pytest.mark.parametrize("name", ["_kcd/lock", "_kcd/identity.json", "logits", "_kcd/log"])
def test_growing_resuming_or_repairing_a_store_writes_nothing_through_links(tmp_path, name):
    root, victim = make(tmp_path / "s"), tmp_path / "victim"
    if (root / name).is_dir():
        (root / name).rename(victim)
    else:
        (root / name).unlink(missing_ok=True)
        victim.write_bytes(b"dear to me")
    (root / name).symlink_to(victim)
    before = content(victim) if victim.is_dir() else victim.read_bytes()
    for how, (begin, said) in WRITERS.items():
        if how != "repair" or name in ("_kcd/lock", "logits"):
            with pytest.raises(UnsafeError, match=f"is a symbolic link; .*{said}"):
                begin(root)
    assert (content(victim) if victim.is_dir() else victim.read_bytes()) == before


@pytest.mark.parametrize("name", ["lock", "lock.0-2"])
def test_a_lock_that_is_a_pipe_is_not_waited_for(run, tmp_path, name):
    root = make(tmp_path / "s")
    endless(root / "_kcd" / name, "fifo")
    shard = "" if name == "lock" else ", writer.Shard(0, 3)"
    text = f"""
from pathlib import Path
from kcdcache.store import writer
with writer.held(Path({str(root)!r}), lambda alone: None{shard}):
    pass
"""
    done = run(text=text)
    assert (done.code, "is a pipe or a device" in done.output) == (1, True), done.output


def named(number):
    return [[f"v{n:05}-p00000", "0" * 64] for n in range(number)]


@pytest.mark.parametrize(
    ("entries", "code", "said"),
    [
        (lambda log: log[:1] * 100_000, 3, "its log names a record twice"),
        pytest.param(lambda log: named(10**6), 8, "expected at most 67108864", marks=pytest.mark.slow),
        pytest.param(lambda log: named(300_000), 3, "no file at", marks=pytest.mark.slow),
    ],
    ids=["one again and again", "a million", "many that are not there"],
)
def test_a_commit_of_endless_log_entries_is_refused_in_little_memory(run, tmp_path, entries, code, said):
    root = make(tmp_path / "s")
    path = log.commit_path(root, 0)
    commit = read_json(path)
    write_resealed(path, commit | {"log": entries(commit["log"])})
    done = run("verify", root)
    assert (done.code, said in done.output, len(done.output) < 5000) == (code, True, True), done.output


@pytest.mark.parametrize(
    "change",
    [
        {"identity": None}, {"identity": []}, {"plan": []}, {"plan": {}}, {"log": {}}, {"log": [1]},
        {"log": [["samples"]]},
        {"log": [["samples", 1]]}, {"log": [["samples", "0" * 63]]},
        *({"log": [[elsewhere, "0" * 64]]} for elsewhere in ("../../x", "/etc/passwd", "http://example.org/x", "a\0b")),
    ],
    ids=str,
)  # fmt: skip
def test_commits_of_wrong_types_or_of_files_elsewhere_are_damaged(tmp_path, change):
    root = make(tmp_path / "s")
    path = log.commit_path(root, 0)
    write_resealed(path, read_json(path) | change)
    for look in (show.inspect, reader.open, verify.verify):
        with pytest.raises(CorruptionError, match=r"commit\.0\.json is damaged or was changed: "):
            look(root)


def test_a_store_of_fewer_samples_than_its_data_is_refused(run, tmp_path):
    root = make(tmp_path / "s")
    commit = read_json(log.commit_path(root, 0))
    data = commit["identity"]["knowledge"]["data"] | {"count": 151}
    claimed = commit["identity"]["knowledge"] | {"data": data}
    document = commit["identity"] | {"knowledge": claimed, "knowledge_id": digest_of(claimed)}
    (root / "_kcd/identity.json").write_bytes(canonical_json(document))
    write_resealed(log.commit_path(root, 0), commit | {"identity": document})
    with pytest.raises(CorruptionError, match="has 150 samples, its identity 151"):
        reader.open(root)
    assert "has 150 samples, its identity 151" in run("verify", root).output
