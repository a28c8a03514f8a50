"""Stores and files in a bucket, through its mirror: what reaches it, what is fetched, and what damage does."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from cloud import Proxy, Server, access
from killing import environment
from stores import content, creating, finish, knowledge, make, small_parts, write_part

from kcdcache.errors import CorruptionError, LockedError, RemoteError, SettingsError, UnsafeError
from kcdcache.files import atomic, places
from kcdcache.store import check
from kcdcache.store.reader import open
from kcdcache.store.writer import Shard

PLAN = small_parts(150, 2, 64, 32)
"""3 parts a view, 2 chunks a part"""
CHUNK = "s/logits/c.0.1.0"
ALL = np.arange(150)


@pytest.fixture(scope="module")
def server():
    one = Server()
    yield one
    one.close()


@pytest.fixture
def proxy(server):
    one = Proxy(server)
    yield one
    one.close()
    for key in server.listed():
        server.delete(key)


@pytest.fixture
def machine(proxy, monkeypatch, tmp_path):
    monkeypatch.setattr(places, "_mirrors", [])

    def arrive(name="cache", **more):
        """Go on as on a machine with a cache of its own; return its path of s3://bucket/s."""
        for variable, value in access(proxy.port, tmp_path / name, **more).items():
            monkeypatch.setenv(variable, value)
        before = places._mirrors
        monkeypatch.setattr(places, "_mirrors", [])
        proxy.seen.clear()
        path = Path(places.local("s3://bucket/s"))
        places._mirrors.extend(before)  # those of the other machines go on
        return path

    return arrive


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same store on a local disk."""
    return make(tmp_path_factory.mktemp("plain") / "s", PLAN)


def fetched(proxy):
    """The chunk files that were asked for, by name."""
    return sorted(path.rsplit("/", 1)[1] for method, path in proxy.seen if method == "GET" and "/c." in path)


def same(server, plain):
    found = {name: data for name, data in content(plain).items() if not name.endswith("lock")}
    assert server.promised("s") == found
    return True


# writing


def test_a_store_in_a_bucket_has_the_bytes_of_a_local_one(machine, server, plain):
    path = make(machine(), PLAN)
    assert same(server, plain)
    assert not list(path.rglob("*.tmp-*"))


def test_chunks_that_were_written_take_no_room_here(machine):
    path = make(machine(), PLAN)
    chunk = path / "logits" / "c.0.1.0"
    assert chunk.stat().st_size == 32 * 7 * 2 + 4
    assert chunk.stat().st_blocks == 0


def test_an_upload_that_fails_leaves_nothing_here_that_is_not_there(machine, server, proxy, monkeypatch):
    path = machine()
    with creating(path, PLAN) as writing:
        first, second = writing.pending()[:2]
        write_part(writing, first)
        proxy.faults = lambda method, where, number: "403" if method == "PUT" and "/logits/" in where else None
        with pytest.raises(RemoteError, match=r"s3://bucket refuses to write s/logits/c\.0\.[23]\.0: .*403"):
            write_part(writing, second)
        proxy.faults = lambda method, where, number: None
        assert writing.pending()[0] == second
        finish(writing)


def test_a_record_that_another_machine_wrote_first_is_kept(machine, server):
    path = machine() / "made"
    server.write("s/made", b"theirs")
    with pytest.raises(LockedError, match="another process wrote it first"):
        atomic.create_exclusive(path, b"ours")
    assert path.read_bytes() == server.read("s/made") == b"theirs"


def test_files_are_deleted_there_too(machine, server):
    path = machine() / "folder" / "file"
    atomic.write_atomic(path, b"x")
    assert server.listed() == ["s/folder/file"]
    atomic.remove(path)
    atomic.remove(path)
    assert server.listed() == []
    assert not path.parent.exists()


def test_clock_times_of_several_machines_are_all_kept(machine, server, tmp_path):
    for name in ("a", "b", "a"):
        path = machine(name) / "timing.jsonl"
        with atomic.locked(path.with_name(".lock")):
            atomic.append(path, f"{name}\n".encode())
    assert server.read("s/timing.jsonl") == b"a\nb\na\n"
    assert (machine("c") / "timing.jsonl").read_bytes() == b"a\nb\na\n"


def test_a_full_disk_under_the_cache_is_told_as_one(machine, monkeypatch):
    path = machine() / "file"
    monkeypatch.setenv("KCDCACHE_CRASHPOINT", "1:ENOSPC")
    monkeypatch.setattr("kcdcache.files.atomic._steps", iter(range(1, 100)))
    with pytest.raises(OSError, match="no space left to write") as caught:
        atomic.write_atomic(path, b"x")
    assert caught.value.exit_code == 7
    assert errno.ENOSPC  # the mirror passes it on as it is


# reading


def test_opening_fetches_no_chunk_and_loading_those_it_needs(machine, proxy, plain):
    make(machine("writer"), PLAN)
    path = machine("reader")
    opened = open(path)
    assert fetched(proxy) == []
    rows = np.array([3, 40])
    found = opened.load(0, rows, ("logits",))
    assert fetched(proxy) == ["c.0.0", "c.0.0.0", "c.0.1", "c.0.1.0"]
    for name, values in open(plain).load(0, rows, ("logits",)).items():
        assert np.array_equal(found[name], values)
    opened.load(0, rows, ("logits",))
    assert len(fetched(proxy)) == 4  # they are kept


def test_what_the_cache_holds_is_not_fetched_by_the_next_command(machine, proxy):
    make(machine("writer"), PLAN)
    open(machine("reader")).load(0, ALL, ("logits",))
    open(machine("reader")).load(0, ALL, ("logits",))
    assert fetched(proxy) == []
    assert [method for method, _ in proxy.seen] == ["GET", "HEAD"]  # one listing, and whether the name is a file's


def test_a_damaged_copy_in_the_cache_is_fetched_again(machine, server, plain):
    make(machine("writer"), PLAN)
    path = machine("reader")
    expected = open(path).load(0, ALL, ("logits",))
    for file in path.rglob("*"):
        if file.is_file():
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(bytes(data))
    found = open(machine("reader")).load(0, ALL, ("logits",))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("size", [0, 10, 1000])
def test_a_cut_or_lengthened_copy_in_the_cache_is_fetched_again(machine, size):
    make(machine("writer"), PLAN)
    path = machine("reader")
    opened = open(path)
    expected = opened.load(0, ALL, ("logits",))
    with open(path / "logits" / "c.0.1.0", "r+b") as stream:
        stream.truncate(size)
    found = opened.load(0, ALL, ("logits",))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_damage_in_the_bucket_is_found_as_on_a_disk(machine, server):
    make(machine("writer"), PLAN)
    whole = server.read(CHUNK)
    server.write(CHUNK, whole[:-1])
    with pytest.raises(CorruptionError, match=r"logits/c\.0\.1\.0 .* has \d+ bytes, \d+ were written"):
        open(machine("a"))
    server.delete(CHUNK)
    with pytest.raises(CorruptionError, match=r"logits/c\.0\.1\.0 .* is missing"):
        open(machine("b"))
    server.write(CHUNK, bytes([whole[0] ^ 1]) + whole[1:])
    opened = open(machine("c"))
    with pytest.raises(CorruptionError, match=r"logits/c\.0\.1\.0 .* is not what was written"):
        opened.load(0, ALL, ("logits",))
    assert len(check.verify(opened.path).problems) == 1
    server.delete(CHUNK)
    with pytest.raises(CorruptionError, match="is missing"):
        opened.load(0, ALL, ("logits",))


def test_what_others_replaced_is_seen_by_the_next_command(machine, server):
    atomic.write_atomic(machine("a") / "file", b"one")
    assert (machine("b") / "file").read_bytes() == b"one"
    server.write("s/file", b"two")
    server.write("s/more", b"x")
    assert (machine("b") / "file").read_bytes() == b"two"
    server.delete("s/file")
    assert sorted(path.name for path in machine("b").iterdir()) == ["more"]


def test_what_killed_writers_left_in_the_cache_is_gone_at_the_next_command(machine, server):
    path = machine()
    (path / "stages" / "0").mkdir(parents=True)
    (path / "half.tmp-999999999-1").write_bytes(b"x")
    mine = path / f"file.tmp-{os.getpid()}-1"
    mine.write_bytes(b"x")
    machine()
    assert list(path.rglob("*")) == [mine]


def test_a_large_file_is_fetched_when_it_is_opened(machine, server, proxy):
    server.write("s/model.safetensors", bytes(2**20 + 1))
    path = machine() / "model.safetensors"
    assert path.stat().st_size == 2**20 + 1
    assert ("GET", "/bucket/s/model.safetensors") not in proxy.seen
    assert atomic.read_bytes(path) == bytes(2**20 + 1)
    assert ("GET", "/bucket/s/model.safetensors") in proxy.seen


def test_the_cache_keeps_to_its_limit_and_reading_goes_on(machine, monkeypatch, plain):
    monkeypatch.setattr("kcdcache.files.cachefiles.SPARED", 2)
    make(machine("writer"), PLAN)
    path = machine("reader", KCDCACHE_CACHE_BYTES=40_000)
    kept = []
    for round_ in range(3):
        for view in (0, 1):
            found, expected = (open(p).load(view, ALL, ("logits",)) for p in (path, plain))
            assert all(np.array_equal(found[name], expected[name]) for name in expected)
        kept.append(sum(f.stat().st_blocks for f in path.rglob("c.*")))
        assert round_ < 3
    assert kept[0] > 0


def test_the_least_recently_used_contents_go_first(machine, server, monkeypatch):
    monkeypatch.setattr("kcdcache.files.cachefiles.SPARED", 1)
    for name in ("a", "b", "c", "d"):
        server.write(f"s/x/c.{ord(name)}", os.urandom(10_000))
    path = machine(KCDCACHE_CACHE_BYTES=25_000)
    chunks = [path / "x" / f"c.{ord(name)}" for name in ("a", "b", "c", "d")]
    for chunk in (chunks[0], chunks[1], chunks[0], chunks[2], chunks[3]):
        atomic.read_bytes(chunk)
    assert [chunk.stat().st_mtime_ns == 0 for chunk in chunks] == [True, True, False, False]
    assert atomic.read_bytes(chunks[1]) == server.read(f"s/x/c.{ord('b')}")


# writers on several machines


def test_one_writer_at_a_time_also_between_machines(machine):
    with creating(machine("a"), PLAN):
        other = machine("b")
        with (
            pytest.raises(LockedError, match=r"s3://bucket/s is being written by process \d+ on"),
            creating(other, PLAN),
        ):
            pass
    with creating(other, PLAN) as writing:
        finish(writing)


def test_shards_on_two_machines_make_the_store_of_one(machine, server, plain):
    """Each sees at its end what the other wrote; the last one seals."""
    with (
        creating(machine("a"), PLAN, shard=Shard(0, 2)) as left,
        creating(machine("b"), PLAN, shard=Shard(1, 2)) as right,
    ):
        for part in left.pending():
            write_part(left, part)
        assert left.seal_last() == 3
        for part in right.pending():
            write_part(right, part)
        assert right.seal_last() == 0
    assert same(server, plain)


def test_rival_shards_on_another_machine_are_refused(machine):
    with creating(machine("a"), PLAN, shard=Shard(0, 2)):
        for shard in (Shard(0, 2), Shard(), Shard(1, 3)):
            with (
                pytest.raises(LockedError, match=r"is being written by process"),
                creating(machine("b"), PLAN, shard=shard),
            ):
                pass


def test_a_shard_of_another_teacher_is_refused_though_it_runs_elsewhere(machine):
    with (
        creating(machine("a"), PLAN, shard=Shard(0, 2)),
        pytest.raises(ValueError, match="weights"),
        creating(machine("b"), PLAN, knowledge(150, weights="bb"), shard=Shard(1, 2)),
    ):
        pass


def test_a_reader_beside_a_writer_of_the_same_machine_disturbs_nothing(machine, server, plain):
    """Both share the cache; the reader compares it with the bucket again and again."""
    path = machine()
    over = threading.Event()

    def look():
        while not over.is_set():
            places.refresh(path)

    reader = threading.Thread(target=look)
    reader.start()
    try:
        make(path, PLAN)
    finally:
        over.set()
        reader.join()
    assert same(server, plain)
    open(path).load(1, ALL, ("logits",))


# names


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://x/y", r"ftp://x/y has the unknown scheme ftp://; known: s3://, gs://, az://, file://"),
        ("s3://", r"s3:// names no bucket; write s3://BUCKET/KEY"),
        ("s3://key:hush@bucket/x", r"^s3://\.\.\.@bucket/x holds credentials"),
        ("s3://bucket/x?sig=hush", r"^s3://bucket/x\?\.\.\. has a '\?'"),
        ("folder:s3://bucket/x", r"folder: takes a path of this machine, found a URL"),
        ("file://elsewhere/x", r"should be file:///PATH"),
        ("KCDCACHE", None),
    ],
)
def test_what_is_no_url_of_an_object_is_refused_without_its_secrets(url, message):
    if message is None:
        assert places.local(url) == url
        return
    with pytest.raises(SettingsError, match=message) as caught:
        places.local(url)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("key", ["s/../x", "s//x", "s/.", "s/a\x1bb", "s/" + "n" * 300])
def test_keys_that_are_no_paths_are_refused(machine, key):
    machine()
    with pytest.raises(UnsafeError, match="which cannot be a file's path; nothing is fetched"):
        places.local(f"s3://bucket/{key}")


def test_objects_that_cannot_lie_in_a_folder_are_refused(machine, server):
    server.write("s/a", b"1")
    server.write("s/a/b", b"2")
    with pytest.raises(UnsafeError, match="has objects at and below s/a; a path is a file or a folder"):
        machine()


def test_a_link_put_into_the_cache_is_not_followed(machine, server, tmp_path):
    path = machine()
    (tmp_path / "other").write_bytes(b"untouched")
    path.mkdir(parents=True, exist_ok=True)
    (path / "file").symlink_to(tmp_path / "other")
    server.write("s/file", b"new")
    assert (machine() / "file").read_bytes() == b"new"
    assert (tmp_path / "other").read_bytes() == b"untouched"


def test_without_the_extra_the_error_says_what_to_install(tmp_path):
    text = "import sys; sys.modules['obstore'] = None; from kcdcache import places; places.local('s3://bucket/x')"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment(), check=False)
    assert (
        'SettingsError: s3://bucket: object stores need the extra `cloud`: pip install "kcdcache[cloud]"' in done.stderr
    )


def test_paths_of_this_machine_load_no_client(tmp_path):
    text = """
import sys
from kcdcache import places, values
places.local("runs/x"), places.local("file:///x")
print("obstore" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout == "False\n"


def test_a_limit_that_is_no_number_is_refused(machine):
    with pytest.raises(SettingsError, match="KCDCACHE_CACHE_BYTES should be a number of bytes, found 'much'"):
        machine(KCDCACHE_CACHE_BYTES="much")


def test_another_endpoint_has_its_own_part_of_the_cache(machine, server):
    other = Proxy(server)
    places_of = [machine(), machine(AWS_ENDPOINT_URL=f"http://127.0.0.1:{other.port}")]
    other.close()
    assert len({path.parents[1] for path in places_of}) == 2
    assert len({path.parents[2] for path in places_of}) == 1
