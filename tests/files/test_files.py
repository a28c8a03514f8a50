import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcdcache import interrupt
from kcdcache.errors import CorruptionError, LockedError, NoSpaceError, NotFoundError
from kcdcache.files import atomic

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@given(JSON)
def test_canonical_json_reads_back(value):
    assert json.loads(atomic.canonical_json(value)) == value


@given(st.dictionaries(st.text(), JSON, min_size=2))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value):
    assert atomic.canonical_json(dict(reversed(value.items()))) == atomic.canonical_json(value)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("write", [atomic.canonical_json, atomic.readable_json, atomic.digest_of])
def test_json_refuses_what_is_no_number(write, number):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write({"a": [number]})


def test_digests_are_sha256(tmp_path):
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc", FIPS 180-2
    (tmp_path / "abc").write_bytes(b"abc")
    assert atomic.sha256_bytes(b"abc") == atomic.sha256_file(tmp_path / "abc") == known
    assert atomic.digest_of({"b": 1, "a": None}) == atomic.sha256_bytes(b'{"a":null,"b":1}')


def test_a_missing_file_has_no_digest(tmp_path):
    with pytest.raises(NotFoundError, match=r"no file at .*nothing"):
        atomic.sha256_file(tmp_path / "nothing")


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    for data in (b"old and longer", b"new"):
        atomic.write_atomic(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


FAILING = (
    "import sys; from pathlib import Path; from kcdcache.files import atomic as files\n"
    "try: getattr(files, sys.argv[2])(Path(sys.argv[1]), b'new')\n"
    "except OSError as error: sys.stdout.write(f'{type(error).__name__}: {error}')"
)


def failing(path, function, point):
    """Return what a process says that writes `path` and is failed at a step of that."""
    environment = {**os.environ, interrupt.CRASH_POINT: point}
    words = [sys.executable, "-c", FAILING, str(path), function]
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=True).stdout


@pytest.mark.parametrize("point", range(1, 6))
@pytest.mark.parametrize("function", ["write_atomic", "create_exclusive"])
def test_a_failed_write_leaves_the_old_file_or_the_whole_new_one_and_names_it(tmp_path, function, point):
    path = tmp_path / "a"
    if function == "write_atomic":
        path.write_bytes(b"old")
    assert failing(path, function, f"{point}:EIO") == f"OSError: [Errno 5] Input/output error: '{path}'"
    found = path.read_bytes() if path.exists() else None
    assert found == ((b"old" if function == "write_atomic" else None) if point < 4 else b"new")
    assert names(tmp_path) == ([] if found is None else ["a"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "ENOSPC",
            r"NoSpaceError: no space left to write .*/a: .*No space left on device: .* 3 bytes, [\d,]+ are free",
        ),
        ("EDQUOT", r"NoSpaceError: no space left to write .*/a: .*Disk quota exceeded: .* 3 bytes, [\d,]+ are free"),
        ("EACCES", r"PermissionError: \[Errno 13\] Permission denied: '.*/a'"),
        ("EROFS", r"OSError: \[Errno 30\] Read-only file system: '.*/a'"),
    ],
)
@pytest.mark.parametrize("function", ["write_atomic", "append"])
def test_each_system_error_says_what_it_is_about(tmp_path, function, error, said):
    assert re.match(said, failing(tmp_path / "a", function, f"1:{error}"))


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1:", "1:ENOSUCH", "1:errorcode", "1:ENOSPC:2", " 1"])
def test_a_malformed_crash_point_is_refused(tmp_path, text):
    environment = {**os.environ, interrupt.CRASH_POINT: text}
    words = [sys.executable, "-c", FAILING, str(tmp_path / "a"), "write_atomic"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert "SettingsError: KCDCACHE_CRASHPOINT should be n or n:NAME (be killed at the n-th step" in done.stderr
    assert names(tmp_path) == []


def test_lines_are_appended(tmp_path):
    for line in (b"one\n", b"two\n"):
        atomic.append(tmp_path / "a", line)
    assert (tmp_path / "a").read_bytes() == b"one\ntwo\n"


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, contents = tmp_path / "a", [bytes([letter]) * 100_000 for letter in range(20)]
    atomic.write_atomic(path, contents[0])
    writer = threading.Thread(target=lambda: [atomic.write_atomic(path, data) for data in contents])
    writer.start()
    seen = []
    while writer.is_alive():
        seen.append(path.read_bytes())
    writer.join()
    assert all(data in contents for data in seen)
    assert path.read_bytes() == contents[-1]


@pytest.mark.parametrize("point", range(1, 6))
@pytest.mark.parametrize("function", ["write_atomic", "create_exclusive"])
def test_a_killed_writer_leaves_the_old_file_or_the_whole_new_one(tmp_path, function, point):
    path = tmp_path / "a"
    if function == "write_atomic":
        path.write_bytes(b"old")
    code = (
        "import sys; from pathlib import Path; from kcdcache.files import atomic as files; "
        f"files.{function}(Path(sys.argv[1]), b'new')"
    )
    environment = {**os.environ, interrupt.CRASH_POINT: str(point)}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    found = path.read_bytes() if path.exists() else None
    assert found == ((b"old" if function == "write_atomic" else None) if point < 4 else b"new")
    atomic.remove_leftovers(tmp_path)
    assert names(tmp_path) == ([] if found is None else ["a"])


def test_leftovers_are_removed_at_any_depth_and_nothing_else(tmp_path):
    (tmp_path / "x/y").mkdir(parents=True)
    kept = [tmp_path / "a", tmp_path / "x/tmp-1"]
    left = [tmp_path / "a.tmp-12-3", tmp_path / "x/y/b.json.tmp-9-9"]
    for path in kept + left:
        path.write_bytes(b"")
    assert atomic.remove_leftovers(tmp_path) == left
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in left)


def create(path, number, outcomes):
    try:
        atomic.create_exclusive(path, str(number).encode() * 1000)
    except LockedError as error:
        outcomes.append(str(error))
    else:
        outcomes.append(number)


def test_of_racing_threads_exactly_one_creates_the_file(tmp_path):
    for attempt in range(20):
        path, outcomes = tmp_path / f"a{attempt}", []
        threads = [threading.Thread(target=create, args=(path, number, outcomes)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [outcome for outcome in outcomes if isinstance(outcome, int)]
        assert len(winners) == 1
        assert len(outcomes) == 16
        assert path.read_bytes() == str(winners[0]).encode() * 1000
    assert len(names(tmp_path)) == 20


RACE = (
    "import sys; from pathlib import Path; from kcdcache import errors; from kcdcache.files import atomic as files\n"
    "sys.stdin.read()\n"
    "try: files.create_exclusive(Path(sys.argv[1]), sys.argv[2].encode() * 1000)\n"
    "except errors.LockedError: sys.exit(6)"
)


def test_of_racing_processes_exactly_one_creates_the_file(tmp_path):
    path = tmp_path / "a"
    racing = [
        subprocess.Popen([sys.executable, "-c", RACE, str(path), str(number)], stdin=subprocess.PIPE)
        for number in range(16)
    ]
    for process in racing:  # all wait for this
        process.stdin.close()
    codes = [process.wait() for process in racing]
    assert sorted(codes) == [0] + [6] * 15
    assert path.read_bytes() == str(codes.index(0)).encode() * 1000
    assert names(tmp_path) == ["a"]


def test_an_existing_file_is_never_overwritten(tmp_path):
    atomic.create_exclusive(tmp_path / "a", b"first")
    with pytest.raises(LockedError, match=r"a exists already: another process wrote it first"):
        atomic.create_exclusive(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert names(tmp_path) == ["a"]


def limited(tmp_path, function):
    """Return what a process that may write files of at most 1,000 bytes says when it writes 5,000."""
    code = (
        "import resource, sys; from pathlib import Path; from kcdcache import errors\n"
        "from kcdcache.files import atomic as files\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"try: files.{function}(Path(sys.argv[1]), b'x' * 5000)\n"
        "except errors.NoSpaceError as error: sys.stdout.write(str(error))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("function", ["write_atomic", "create_exclusive"])
def test_a_full_disk_says_so_and_leaves_no_half_file(tmp_path, function):
    text = limited(tmp_path, function)
    assert text.startswith(f"no space left to write {tmp_path}/a: free some and run the same command again to resume")
    assert re.search(r"\(File too large: this write needs 5,000 bytes, [\d,]+ are free\)", text)
    assert names(tmp_path) == []


def test_a_line_that_does_not_fit_is_not_appended_in_part(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 900)
    assert "this write needs 5,000 bytes" in limited(tmp_path, "append")
    assert (tmp_path / "a").read_bytes() == b"x" * 900


def test_space_that_is_not_there_cannot_be_reserved(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; from kcdcache import errors\n"
        "from kcdcache.files import atomic as files\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "stream = open(sys.argv[1], 'wb'); files.reserve(stream.fileno(), 1000, Path(sys.argv[1]).parent)\n"
        "try: files.reserve(stream.fileno(), 5000, Path(sys.argv[1]).parent)\n"
        "except errors.NoSpaceError as error: sys.stdout.write(str(error))"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "a")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"no space left to write {tmp_path}/(a temporary file): ")
    assert (tmp_path / "a").stat().st_size == 1000
    assert (tmp_path / "a").stat().st_blocks


def test_a_system_error_while_reading_names_the_file():
    """The start of the address space is not mapped, which the system calls an input/output error."""
    with pytest.raises(OSError, match=r"Input/output error: '/proc/self/mem'"):
        atomic.sha256_file(Path("/proc/self/mem"))


def test_other_system_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file") as caught:
        atomic.write_atomic(tmp_path / "nowhere/a", b"")
    assert not isinstance(caught.value, NoSpaceError)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"nothing"])
def test_damaged_json_names_the_file(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(CorruptionError, match=r"a.json should hold JSON: "):
        atomic.read_json(tmp_path / "a.json")


def test_missing_json_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match=r"no file at .*a.json"):
        atomic.read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("data", "message"), [("[1]", "found list"), ("3", "found int"), ('{"b": 1}', "the key 'a', found b")]
)
def test_an_object_has_the_keys_it_should_have(tmp_path, data, message):
    (tmp_path / "a.json").write_text(data)
    with pytest.raises(CorruptionError, match=rf"a.json should .*{message}"):
        atomic.read_object(tmp_path / "a.json", "a")


def test_an_object_reads_back_as_written(tmp_path):
    value = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}
    atomic.write_atomic(tmp_path / "a.json", atomic.readable_json(value))
    assert atomic.read_object(tmp_path / "a.json", "a", "b") == value


HOLD = (
    "import sys; from pathlib import Path; from kcdcache.files import atomic as files\n"
    "with files.locked(Path(sys.argv[1])): sys.stdout.write('held'); sys.stdout.flush(); sys.stdin.read()"
)


def holding(path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.read(4) == "held"
    return process


def test_a_lock_names_its_holder_and_ends_with_it_however_it_ends(tmp_path):
    with holding(tmp_path / "run/.lock") as process:
        with (
            pytest.raises(
                LockedError, match=rf"run is being written by process {process.pid} on .*wait for it or stop"
            ),
            atomic.locked(tmp_path / "run/.lock"),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with atomic.locked(tmp_path / "run/.lock"):
        assert (tmp_path / "run/.lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_lock_is_free_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="inside"), atomic.locked(Path(tmp_path / ".lock")):
            raise RuntimeError("inside")
