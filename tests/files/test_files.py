"""Files whole or absent, records in one canonical form, locks that name their holder."""

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
from kcdcache.errors import CorruptionError, LockedError, NoSpaceError, NotFoundError, UnsafeError
from kcdcache.files import atomic, records
from kcdcache.files.records import Count, Sealed

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
WRITERS = pytest.mark.parametrize("function", ["write_atomic", "create_exclusive"])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- records


@given(JSON)
def test_canonical_json_reads_back(value):
    assert json.loads(records.canonical_json(value)) == value
    assert records.parse_json(records.canonical_json(value), "here") == value


@given(st.dictionaries(st.text(), JSON, min_size=2))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value):
    assert records.canonical_json(dict(reversed(value.items()))) == records.canonical_json(value)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("write", [records.canonical_json, records.readable_json, records.digest_of])
def test_json_refuses_what_is_no_number(write, number):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write({"a": [number]})


def test_digests_are_sha256(tmp_path):
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc", FIPS 180-2
    (tmp_path / "abc").write_bytes(b"abc")
    assert atomic.sha256_bytes(b"abc") == atomic.sha256_file(tmp_path / "abc") == known
    assert records.digest_of({"b": 1, "a": None}) == atomic.sha256_bytes(b'{"a":null,"b":1}')


class Note(Sealed):
    """A record of every type."""

    count: Count
    share: float
    name: str | None = None
    items: tuple[int | float, ...] = ()


NOTE = Note(count=3, share=0.1, name="ü\x00", items=(1, 2.0, 1e300))
FORMS = pytest.mark.parametrize("form", [records.canonical_json, records.readable_json])


@FORMS
def test_a_sealed_record_reads_back_as_written(tmp_path, form):
    (tmp_path / "a").write_bytes(records.sealed_json(NOTE.document(), form))
    assert records.read_sealed(tmp_path / "a", Note, form) == NOTE
    assert records.read_sealed_object(tmp_path / "a", "count", form=form) == NOTE.document()


@FORMS
def test_every_changed_byte_of_a_sealed_record_shows(tmp_path, form):
    data, path = records.sealed_json(NOTE.document(), form), tmp_path / "a"
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        for read in (
            lambda: records.read_sealed(path, Note, form),
            lambda: records.read_sealed_object(path, form=form),
        ):
            with pytest.raises(CorruptionError, match=r"a (was changed|is damaged or was changed|should h)"):
                read()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": True}, "count: Input should be a valid integer, found True"),
        ({"count": "3"}, "count: Input should be a valid integer, found '3'"),
        ({"count": 2**63}, "count: Input should be less than 9223372036854775808"),
        ({"count": -1}, "count: Input should be greater than or equal to 0"),
        ({"share": None}, "share: Input should be a valid number"),
        ({"items": ["x"]}, "items.0"),
        ({"more": 1}, "more: Extra inputs are not permitted, found 1"),
    ],
    ids=str,
)
def test_no_type_is_guessed_and_no_key_unknown(tmp_path, change, said):
    (tmp_path / "a").write_bytes(records.sealed_json(NOTE.document() | change))
    with pytest.raises(CorruptionError, match=f"a is damaged or was changed: {said}"):
        records.read_sealed(tmp_path / "a", Note)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"nothing", b"[" * 900, b"NaN"])
def test_damaged_json_names_the_file(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(CorruptionError, match=r"a.json should hold JSON: "):
        records.read_json(tmp_path / "a.json")
    with pytest.raises(CorruptionError, match=r"a.json is damaged or was changed: "):
        records.read_sealed(tmp_path / "a.json", Note)


def test_more_values_than_any_record_has_are_not_parsed(tmp_path):
    (tmp_path / "a.json").write_bytes(b"[" + b"{}," * 10**6 + b"0]")
    for read in (records.read_json, lambda path: records.read_sealed(path, Note)):
        with pytest.raises(UnsafeError, match=r"a.json holds 2000001 JSON values, expected at most 1000000"):
            read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("data", "message"), [("[1]", "found list"), ("3", "found int"), ('{"b": 1}', "the key 'a', found b")]
)
def test_an_object_has_the_keys_it_should_have(tmp_path, data, message):
    (tmp_path / "a.json").write_text(data)
    with pytest.raises(CorruptionError, match=rf"a.json should .*{message}"):
        records.read_object(tmp_path / "a.json", "a")


def test_what_is_missing_is_not_found(tmp_path):
    for read in (atomic.sha256_file, atomic.read_bytes, records.read_json):
        with pytest.raises(NotFoundError, match=r"no file at .*nothing"):
            read(tmp_path / "nothing")


# ---- writing


def test_a_write_replaces_the_file_and_leaves_nothing_else(tmp_path):
    for data in (b"old and longer", b"new"):
        atomic.write_atomic(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def running(text, *words, **variables):
    """Return what a process of its own does with some files and this program."""
    program = (
        "import os, resource, sys; from pathlib import Path\nfrom kcdcache import errors\n"
        "from kcdcache.files import atomic\npath = Path(sys.argv[1])\n" + text
    )
    environment = {**os.environ, **variables}
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def failing(path, function, point):
    """Return what a process says that writes a file and is failed at a step of that."""
    text = (
        f"try: atomic.{function}(path, b'new')\n"
        "except OSError as error: sys.stdout.write(f'{type(error).__name__}: {error}')"
    )
    return running(text, path, **{interrupt.CRASH_POINT: point})


@pytest.mark.parametrize("point", range(1, 6))
@WRITERS
def test_a_failed_or_killed_write_leaves_the_old_file_or_the_whole_new_one(tmp_path, function, point):
    for error in (":EIO", ""):
        folder = tmp_path / f"it{error}"
        folder.mkdir()
        path, old = folder / "a", b"old" if function == "write_atomic" else None
        if old:
            path.write_bytes(old)
        done = failing(path, function, f"{point}{error}")
        assert done.stdout == (f"OSError: [Errno 5] Input/output error: '{path}'" if error else "")
        assert done.returncode == (0 if error else -signal.SIGKILL)
        found = path.read_bytes() if path.exists() else None
        assert found == (old if point < 4 else b"new")
        assert bool(atomic.remove_leftovers(folder)) <= (not error)
        assert names(folder) == ([] if found is None else ["a"])


NO_SPACE = r"NoSpaceError: no space left to write .*/a: .*{}: .* 3 bytes, [\d,]+ are free"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("ENOSPC", NO_SPACE.format("No space left on device")),
        ("EDQUOT", NO_SPACE.format("Disk quota exceeded")),
        ("EACCES", r"PermissionError: \[Errno 13\] Permission denied: '.*/a'"),
        ("EROFS", r"OSError: \[Errno 30\] Read-only file system: '.*/a'"),
    ],
)
@pytest.mark.parametrize("function", ["write_atomic", "append"])
def test_each_system_error_says_what_it_is_about(tmp_path, function, error, said):
    assert re.match(said, failing(tmp_path / "a", function, f"1:{error}").stdout)


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1:", "1:ENOSUCH", "1:errorcode", "1:ENOSPC:2", " 1"])
def test_a_malformed_crash_point_is_refused(tmp_path, text):
    done = failing(tmp_path / "a", "write_atomic", text)
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
        (winner,) = (outcome for outcome in outcomes if isinstance(outcome, int))
        assert all("another process wrote it first" in outcome for outcome in outcomes if outcome != winner)
        assert len(outcomes) == 16
        assert path.read_bytes() == str(winner).encode() * 1000
    assert len(names(tmp_path)) == 20


RACE = (
    "import sys; from pathlib import Path; from kcdcache import errors; from kcdcache.files import atomic\n"
    "sys.stdin.read()\n"
    "try: atomic.create_exclusive(Path(sys.argv[1]), sys.argv[2].encode() * 1000)\n"
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


LIMITED = (
    "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
    "try: {}\n"
    "except errors.NoSpaceError as error: sys.stdout.write(str(error))"
)
"""a process that may write files of at most 1,000 bytes"""


@WRITERS
def test_a_full_disk_says_so_and_leaves_no_half_file(tmp_path, function):
    text = running(LIMITED.format(f"atomic.{function}(path, b'x' * 5000)"), tmp_path / "a").stdout
    assert text.startswith(f"no space left to write {tmp_path}/a: free some and run the same command again to resume")
    assert re.search(r"\(File too large: this write needs 5,000 bytes, [\d,]+ are free\)", text)
    assert names(tmp_path) == []


def test_a_line_that_does_not_fit_is_not_appended_in_part(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 900)
    done = running(LIMITED.format("atomic.append(path, b'x' * 5000)"), tmp_path / "a")
    assert "this write needs 5,000 bytes" in done.stdout
    assert (tmp_path / "a").read_bytes() == b"x" * 900


def test_space_that_is_not_there_cannot_be_reserved(tmp_path):
    reserving = "[atomic.reserve(os.open(path, os.O_RDWR), size, path.parent) for size in (1000, 5000)]"
    (tmp_path / "a").write_bytes(b"")
    done = running(LIMITED.format(reserving), tmp_path / "a")
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


# ---- locks


HOLD = (
    "import sys; from pathlib import Path; from kcdcache.files import atomic\n"
    "with atomic.locked(Path(sys.argv[1])): sys.stdout.write('held'); sys.stdout.flush(); sys.stdin.read()"
)


def test_a_lock_names_its_holder_and_ends_with_it_however_it_ends(tmp_path):
    path, command = tmp_path / "run/.lock", [sys.executable, "-c", HOLD, str(tmp_path / "run/.lock")]
    assert not atomic.is_locked(path)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.read(4) == "held"
        said = rf"run is being written by process {process.pid} on .*wait for it or stop"
        with pytest.raises(LockedError, match=said), atomic.locked(path):
            pass
        assert atomic.is_locked(path)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not atomic.is_locked(path)
    with atomic.locked(path):
        assert atomic.holder(path).startswith(f"process {os.getpid()} on ")
    assert names(path.parent) == [".lock"]


def test_a_lock_is_free_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="inside"), atomic.locked(tmp_path / ".lock"):
            raise RuntimeError("inside")


@pytest.mark.parametrize("name", [".lock", ".lock.holder"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_is_written_through_what_lies_in_a_locks_place(tmp_path, name, kind):
    (tmp_path / "mine").write_bytes(b"dear to me")
    (tmp_path / name).symlink_to("mine") if kind == "link" else os.mkfifo(tmp_path / name)
    said = r"is a (symbolic link|pipe or a device); nothing is written"
    with pytest.raises(UnsafeError, match=said), atomic.locked(tmp_path / ".lock"):
        pass
    assert (tmp_path / "mine").read_bytes() == b"dear to me"
