"""Real disks: small ones that fill up, one that loses sectors, folders and files that may not be touched."""

import fcntl
import os
import shutil
import signal
import struct
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import complete, logged_files_are_whole, same, words
from killing import finished, succeeds
from pupils import leftovers

PAGE = 4096
"""bytes: what a file on such a disk takes is a multiple of it"""
NOBODY = {"user": 65534} if os.geteuid() == 0 else {}
"""limits under which a command obeys the permissions of files: root does not"""


@pytest.fixture
def folder(here):
    """An empty folder of this test, where another user may look."""
    with tempfile.TemporaryDirectory(dir=here.root) as made:
        Path(made).chmod(0o755)
        yield Path(made)


def mount(*words):
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing may be mounted here: {done.stderr.strip()}")


@contextmanager
def mounted(at, *words):
    at.mkdir()
    mount(*words, str(at))
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def small_disk(at, size):
    return mounted(at, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")


def refused(here, name, path, log, code=7, **how):
    """Run a command that should end with `code`; check what it left and return what it said."""
    log.unlink(missing_ok=True)
    found = finished(here.start, words(here.root, name, path, **how.pop("changes", {})), log, **how)
    text = log.read_text()
    if found == 0:
        return None
    assert found == code, text
    assert "internal error" not in text
    assert "Traceback" not in text
    assert not complete(name, path)
    if name == "precompute" and (path / "_kcd" / "log" / "0").exists():
        assert logged_files_are_whole(path)
    return next(line for line in text.splitlines() if line.startswith("error: "))


def filled(here, name, folder, steps):
    """Run a command on a disk that is too small, and larger each time, until it is done; return what it said."""
    with small_disk(folder / "disk", steps[0]) as disk:
        told = []
        for size in steps:
            mount("-o", f"remount,size={size}", str(disk))
            said = refused(here, name, disk / "it", folder / "log")
            if said is None:
                break
            told.append(said)
        assert same(here.root, name, disk / "it")
        assert not leftovers(disk)
        return told


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "pages"), [("precompute", 100), ("train", 100)])
def test_a_full_disk_that_grows_ends_in_the_same_bytes(here, folder, name, pages, step):
    """Page by page, or by a share of them at a time."""
    steps = max(1, (step - 1) * pages // 100)
    told = filled(here, name, folder, range(4 * PAGE, pages * PAGE, steps * PAGE))
    assert len(told) >= (3 if step > 1 else 20)
    assert all("No space left on device" in said and str(folder / "disk" / "it") in said for said in told)
    assert any("run the same command again to resume (No space left on device: this write needs" in s for s in told)


def test_a_full_disk_under_mapped_memory_is_an_error_and_no_signal(here, folder):
    """The run's scratch files lie on the full disk: filling them would end the process with SIGBUS."""
    changes = {"memory_gb": 1e-9, "mix_target": "linear_prob"}
    with small_disk(folder / "disk", "8m") as disk:
        run, filler, log = disk / "it", disk / "filler", folder / "log"
        succeeds(here.start, words(here.root, "train", run, until=1, **changes), log)
        filler.write_bytes(bytes(shutil.disk_usage(disk).free))
        told = []
        while (said := refused(here, "train", run, log, changes=changes)) is not None:
            told.append(said)
            os.truncate(filler, filler.stat().st_size - PAGE)
            assert len(told) < 1000
            if "(a temporary file)" in said:
                os.truncate(filler, 0)
        assert any(f"no space left to write {run}/(a temporary file): " in said for said in told)


@pytest.mark.parametrize("name", ["train", pytest.param("precompute", marks=pytest.mark.slow)])
def test_a_file_beyond_the_limit_for_files_is_like_a_full_disk(here, folder, name):
    said = refused(here, name, folder / "it", folder / "log", limits={"file": 20_000})
    assert f"no space left to write {folder}/it" in said
    assert "File too large: this write needs " in said
    succeeds(here.start, words(here.root, name, folder / "it"), folder / "log")
    assert same(here.root, name, folder / "it")
    assert not leftovers(folder)


def test_a_disk_mounted_read_only_is_named_and_resumed(here, folder):
    with small_disk(folder / "disk", "8m") as disk:
        for name in ("precompute", "train"):
            path, log = disk / name, folder / "log"
            code = finished(here.start, words(here.root, name, path), log, KCDCACHE_CRASHPOINT="60")
            assert code == -signal.SIGKILL
            mount("-o", "remount,ro", str(disk))
            said = refused(here, name, path, log, code=1)
            assert f"Read-only file system: '{path}/" in said
            mount("-o", "remount,rw", str(disk))
            succeeds(here.start, words(here.root, name, path), log)
            assert same(here.root, name, path)


def given_away(path):
    """Let the user of the limits own everything below a folder."""
    if NOBODY:
        for file in [path, *path.rglob("*")]:
            os.chown(file, NOBODY["user"], NOBODY["user"])


@contextmanager
def without(path, mode):
    """Take permissions from a file or folder while the context lasts."""
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        yield
    finally:
        path.chmod(before)


@pytest.mark.parametrize("closed", ["logits", "_kcd/log/0", "."])
def test_a_folder_that_may_not_be_written_is_named_and_nothing_is_sealed(here, folder, closed):
    path, log = folder / "it", folder / "log"
    given_away(folder)
    code = finished(here.start, words(here.root, "precompute", path), log, KCDCACHE_CRASHPOINT="50", limits=NOBODY)
    assert code == -signal.SIGKILL
    if closed == ".":
        (path / "_kcd" / "identity.json").unlink()
        (path / "zarr.json").unlink()
    with without(path / closed, 0o555):
        said = refused(here, "precompute", path, log, code=1, limits=NOBODY)
    assert f"Permission denied: '{path / closed}/" in said
    assert finished(here.start, words(here.root, "precompute", path), log, limits=NOBODY) == 0, log.read_text()
    assert same(here.root, "precompute", path)
    assert not leftovers(path)


@pytest.mark.parametrize("name", ["precompute", "condense"])
def test_a_place_that_may_not_be_written_is_named_and_stays_empty(here, folder, name):
    given_away(folder)
    with without(folder, 0o555):
        log = here.root / f"log of {folder.name}"
        said = refused(here, name, folder / "it", log, code=1, limits=NOBODY)
    assert f"Permission denied: '{folder}/it" in said
    assert not any(folder.iterdir())


def read_by_train(here, folder):
    """A copy of the store, and what `train` needs to read it."""
    copy = shutil.copytree(here.root / "precompute", folder / "store")
    return copy, {"store": copy}


def test_a_chunk_that_may_not_be_read_is_named(here, folder):
    copy, changes = read_by_train(here, folder)
    given_away(folder)
    with without(copy / "logits/c.1.0.0", 0):
        said = refused(here, "train", folder / "it", folder / "log", code=1, changes=changes, limits=NOBODY)
    remedy = "give a path that this user may read and write, or change its permissions"
    assert said == f"error: Permission denied: '{copy}/logits/c.1.0.0'; {remedy}"
    again = words(here.root, "train", folder / "it", **changes)
    assert finished(here.start, again, folder / "log", limits=NOBODY) == 0
    assert same(here.root, "train", folder / "it")


def lose(image, path):
    """Cut a disk's image before the first sector of one of its files, and forget what was read of that file."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
        number, size = (struct.unpack("i", fcntl.ioctl(stream, what, struct.pack("i", 0)))[0] for what in (1, 2))
        os.truncate(image, number * size // PAGE * PAGE)
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize(
    ("name", "lost"),
    [("train", "store/logits/c.1.0.0"), ("precompute", "model.safetensors"), ("condense", "values.parquet")],
)
def test_a_disk_that_cannot_read_a_file_any_more_is_an_error_that_names_it(here, folder, name, lost):
    """An ext2 file system on an image that is then cut: the kernel answers EIO, as for a lost sector."""
    image = folder / "image"
    image.write_bytes(bytes(4 * 2**20))
    if not shutil.which("mkfs.ext2") or os.geteuid():
        pytest.skip("making a file system needs mkfs.ext2 and root")
    subprocess.run(["mkfs.ext2", "-q", str(image)], check=True)
    with mounted(folder / "disk", "-o", "loop", str(image)) as disk:
        copy, changes = read_by_train(here, disk)
        if name != "train":
            source = here.root / {"precompute": "teacher", "condense": "train"}[name] / lost
            file = shutil.copy(source, disk)
            changes = {"values": file} if name == "condense" else {"weights": file, "teacher": "resnet8"}
        os.sync()
        lose(image, disk / lost)
        said = refused(here, name, folder / "it", folder / "log", code=1, changes=changes)
        assert said == f"error: Input/output error: '{disk / lost}'"
        if name == "train":
            assert finished(here.start, ["verify", copy, "--read-data"], folder / "verify") in (1, 3)
            assert lost in (folder / "verify").read_text()
    succeeds(here.start, words(here.root, name, folder / "it"), folder / "log")
    assert same(here.root, name, folder / "it")
