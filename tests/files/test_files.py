"""Files whole or absent, records in one canonical form, locks that name their holder."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from damaging import endless
from forging import TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import finished

from kcdcache import interrupt
from kcdcache.errors import CorruptionError, LockedError, NotFoundError, UnsafeError
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


@given(st.dictionaries(st.text(), JSON, min_size=2))
@settings(max_examples=30)
def test_canonical_json_reads_back_and_does_not_depend_on_the_order_of_keys(value):
    data = records.canonical_json(value)
    assert json.loads(data) == records.parse_json(data, "here") == value
    assert records.canonical_json(dict(reversed(value.items()))) == data


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
def test_a_sealed_record_reads_back_as_written_and_every_changed_byte_shows(tmp_path, form):
    data, path = records.sealed_json(NOTE.document(), form), tmp_path / "a"
    readers = (lambda: records.read_sealed(path, Note, form), lambda: records.read_sealed_object(path, form=form))
    path.write_bytes(data)
    assert [read() for read in readers] == [NOTE, NOTE.document()]
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        for read in readers:
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


@pytest.mark.parametrize("text", [text for text in TEXTS if text not in ("a NUL", "null", "a key twice")])
def test_hostile_json_has_no_value_and_names_the_file(tmp_path, text):
    """Those left out are JSON; models and digests refuse them."""
    (tmp_path / "a.json").write_bytes(TEXTS[text])
    for read in (records.read_json, lambda path: records.read_sealed(path, Note)):
        said = r"a\.json (should hold JSON|is damaged or was changed|holds \d+ JSON values, expected at most 1000000)"
        with pytest.raises((CorruptionError, UnsafeError), match=said):
            read(tmp_path / "a.json")


def test_a_record_too_large_is_not_read(tmp_path):
    endless(tmp_path / "large.json", "sparse")
    with pytest.raises(UnsafeError, match=r"large\.json has 1099511627776 bytes, expected at most 67108864"):
        records.read_json(tmp_path / "large.json")


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


def test_a_write_replaces_the_file_a_line_is_added_and_nothing_else_is_left(tmp_path):
    for data in (b"old and longer", b"new\n"):
        atomic.write_atomic(tmp_path / "a", data)
    atomic.append(tmp_path / "a", b"more\n")
    assert (tmp_path / "a").read_bytes() == b"new\nmore\n"
    assert names(tmp_path) == ["a"]


@pytest.fixture
def does(start, tmp_path_factory):
    """What a process of its own says that does something with a `path`, and its exit code."""

    def run(text, path, limits=None, **variables):
        log = tmp_path_factory.mktemp("log") / "log"
        text = f"""
import os, sys
from pathlib import Path
from kcdcache.files import atomic
path = Path({str(path)!r})
try:
    {text}
except OSError as error:
    sys.stdout.write(f"{{type(error).__name__}}: {{error}}")
"""
        return finished(start, text, log, limits=limits, **variables), log.read_text()

    return run


@pytest.mark.parametrize("point", range(1, 6))
@WRITERS
def test_a_failed_or_killed_write_leaves_the_old_file_or_the_whole_new_one(does, tmp_path, function, point):
    for error in (":EIO", ""):
        folder = tmp_path / f"it{error}"
        folder.mkdir()
        path, old = folder / "a", b"old" if function == "write_atomic" else None
        if old:
            path.write_bytes(old)
        code, said = does(f"atomic.{function}(path, b'new')", path, **{interrupt.CRASH_POINT: f"{point}{error}"})
        told = f"OSError: [Errno 5] Input/output error: '{path}'" if error else ""
        assert (code, said) == (0 if error else -signal.SIGKILL, told)
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
def test_each_system_error_says_what_it_is_about(does, tmp_path, function, error, said):
    crash = {interrupt.CRASH_POINT: f"1:{error}"}
    assert re.match(said, does(f"atomic.{function}(path, b'new')", tmp_path / "a", **crash)[1])


@pytest.mark.parametrize("text", ["", "0", "x", "1:errorcode", "1:ENOSPC:2"])
def test_a_malformed_crash_point_is_refused(does, tmp_path, text):
    said = does("atomic.write_atomic(path, b'new')", tmp_path / "a", **{interrupt.CRASH_POINT: text})[1]
    assert "SettingsError: KCDCACHE_CRASHPOINT should be n or n:NAME (be killed at the n-th step" in said
    assert names(tmp_path) == []


def test_leftovers_are_removed_at_any_depth_and_nothing_else(tmp_path):
    (tmp_path / "x/y").mkdir(parents=True)
    kept = [tmp_path / "a", tmp_path / "x/tmp-1"]
    left = [tmp_path / "a.tmp-12-3", tmp_path / "x/y/b.json.tmp-9-9"]
    for path in kept + left:
        path.write_bytes(b"")
    assert atomic.remove_leftovers(tmp_path) == left
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in left)


def test_of_racing_threads_exactly_one_creates_the_file(tmp_path):
    def create(number):
        ready.wait()
        try:
            atomic.create_exclusive(path, b"%d" % number * 1000)
        except LockedError as error:
            return str(error)
        return number

    ready = threading.Barrier(16)
    for attempt in range(5):
        path = tmp_path / f"a{attempt}"
        with ThreadPoolExecutor(16) as pool:
            outcomes = list(pool.map(create, range(16)))
        (winner,) = (outcome for outcome in outcomes if isinstance(outcome, int))
        assert all("another process wrote it first" in outcome for outcome in outcomes if outcome != winner)
        assert path.read_bytes() == b"%d" % winner * 1000
    assert len(names(tmp_path)) == 5


LIMITED = {"file": 1000}
"""a process that may write files of at most 1,000 bytes"""


@WRITERS
def test_a_full_disk_says_so_and_leaves_no_half_file(does, tmp_path, function):
    _, said = does(f"atomic.{function}(path, b'x' * 5000)", tmp_path / "a", LIMITED)
    wanted = rf"NoSpaceError: no space left to write {tmp_path}/a: free some and run the same command again to resume "
    assert re.match(wanted + r"\(File too large: this write needs 5,000 bytes, [\d,]+ are free\)", said)
    assert names(tmp_path) == []


def test_a_line_that_does_not_fit_is_not_appended_in_part(does, tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 900)
    assert "this write needs 5,000 bytes" in does("atomic.append(path, b'x' * 5000)", tmp_path / "a", LIMITED)[1]
    assert (tmp_path / "a").read_bytes() == b"x" * 900


def test_space_that_is_not_there_cannot_be_reserved(does, tmp_path):
    (tmp_path / "a").write_bytes(b"")
    reserving = "[atomic.reserve(os.open(path, os.O_RDWR), size, path.parent) for size in (1000, 5000)]"
    said = does(reserving, tmp_path / "a", LIMITED)[1]
    assert said.startswith(f"NoSpaceError: no space left to write {tmp_path}/(a temporary file): ")
    assert (tmp_path / "a").stat().st_size == 1000
    assert (tmp_path / "a").stat().st_blocks


def test_a_system_error_while_reading_names_the_file():
    """The start of the address space is not mapped, which the system calls an input/output error."""
    with pytest.raises(OSError, match=r"Input/output error: '/proc/self/mem'"):
        atomic.sha256_file(Path("/proc/self/mem"))


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
    for _ in range(2):
        with suppress(RuntimeError), atomic.locked(path):
            assert atomic.holder(path).startswith(f"process {os.getpid()} on ")
            raise RuntimeError
        assert names(path.parent) == [".lock"]


@pytest.mark.parametrize("name", [".lock", ".lock.holder"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_is_written_through_what_lies_in_a_locks_place(tmp_path, name, kind):
    (tmp_path / "mine").write_bytes(b"dear to me")
    (tmp_path / name).symlink_to("mine") if kind == "link" else os.mkfifo(tmp_path / name)
    said = r"is a (symbolic link|pipe or a device); nothing is written"
    with pytest.raises(UnsafeError, match=said), atomic.locked(tmp_path / ".lock"):
        pass
    assert (tmp_path / "mine").read_bytes() == b"dear to me"
