"""Paths in a bucket, against a real S3-speaking server and a proxy that breaks requests: one machine, or several."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cloud import SECRET, Proxy, access
from killing import environment
from stores import content, creating, finish, knowledge, make, small_parts, write_part

from kcdcache.errors import CorruptionError, LockedError, RemoteError, SettingsError, UnsafeError
from kcdcache.files import atomic, cloud
from kcdcache.store import check
from kcdcache.store.reader import open
from kcdcache.store.writer import WHOLE, Shard

PLAN = small_parts(150, 2, 64, 32)
"""3 parts a view, 2 chunks a part"""
CHUNK = "s/logits/c.0.1.0"
ALL = np.arange(150)
SIDES = (Shard(0, 2), Shard(1, 2))


@pytest.fixture
def proxy(server):
    one = Proxy(server)
    yield one
    one.close()
    for key in server.listed():
        server.delete(key)


@pytest.fixture
def machine(proxy, monkeypatch, tmp_path):
    def go(name="cache", look=True, **more):
        """Go on as on a machine with a cache of its own; return its path of s3://bucket/s, brought up to date."""
        for variable, value in access(proxy.port, tmp_path / name, **more).items():
            monkeypatch.setenv(variable, value)
        proxy.seen.clear()
        return cloud.open_path("s3://bucket/s") if look else None

    return go


@pytest.fixture
def bucket(machine):
    return cloud._bucket(machine(AWS_TIMEOUT="5s"))


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
    assert not [key for key in server.listed() if ".owner" in key]
    return True


def alike(opened, plain, view=0, rows=ALL):
    found, expected = (one.load(view, rows, ("logits",)) for one in (opened, open(plain)))
    return all(np.array_equal(found[name], expected[name]) for name in expected)


# requests


@pytest.mark.parametrize("fault", ["503", "cut", "lost", "half", "slow"])
def test_every_operation_survives_a_fault_of_its_first_request(bucket, server, proxy, tmp_path, fault):
    """Whatever goes wrong with the first request of each, the result is that of an untroubled one."""
    data, path = bytes(range(256)) * 400, bucket.base / "a" / "put"
    (tmp_path / "up").write_bytes(data)

    def troubled(work):
        first = len(proxy.seen) + 1
        proxy.faults = lambda method, where, number: fault if number == first else None
        return work()

    proxy.broken.clear()
    troubled(lambda: bucket.upload(tmp_path / "up", path, exclusive=False))
    troubled(lambda: bucket.create("a/made", b"one"))
    troubled(lambda: bucket.append(bucket.base / "a" / "made", b"two"))
    troubled(lambda: bucket.fetch(path, None))
    assert path.read_bytes() == data
    assert troubled(lambda: bucket.read("a/made", 100)).data == b"onetwo"
    assert [e[:2] for e in troubled(lambda: bucket._list("a"))] == [("a/made", 6), ("a/put", len(data))]
    troubled(lambda: bucket.delete("a/put"))
    assert server.listed() == ["a/made"]
    assert troubled(lambda: bucket._head("a/put")) is None
    assert proxy.broken == [fault] * 8


def test_of_several_that_make_an_object_exactly_one_does_unless_they_make_the_same(bucket, server):
    ready = threading.Barrier(8)

    def race(number):
        ready.wait()
        try:
            return bool(bucket.create("k", b"%d" % number)), number
        except FileExistsError:
            return False, number

    with ThreadPoolExecutor(8) as pool:
        won = [number for made, number in pool.map(race, range(8)) if made]
    assert [b"%d" % number for number in won] == [server.read("k")]
    assert bucket.create("k", b"%d" % won[0]) == bucket._head("k").tag
    with pytest.raises(FileExistsError):
        bucket.create("k", b"more than was there")


def test_a_bucket_that_is_not_there_is_named_at_once(machine, proxy):
    machine(look=False)
    with pytest.raises(RemoteError, match=r"s3://elsewhere: could not list x.*404 Not Found.*NoSuchBucket"):
        cloud.open_path("s3://elsewhere/x")
    assert len(proxy.seen) == 1


def test_a_store_that_never_answers_ends_in_an_error_that_says_what_to_do(machine, proxy, monkeypatch):
    monkeypatch.setattr(cloud, "MOST_TRIES", 1)
    monkeypatch.setitem(cloud.RETRIES, "max_retries", 1)
    proxy.faults = lambda method, path, number: "503"
    with pytest.raises(RemoteError, match=r"could not list s: .*503.*run the same command again to resume") as caught:
        machine()
    assert caught.value.exit_code == 11


def test_secrets_are_cut_out_of_errors(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    told = f"GET https://x/y?sig=abc&se=1 with {SECRET}: <Error><Code>No</Code></Error>\n\nDebug source x"
    assert cloud._cleaned(told) == "GET https://x/y?... with ***: No"


def test_the_other_kinds_of_stores_can_be_made_or_name_the_variables(tmp_path, monkeypatch):
    """Made only: no server that speaks their protocols is at hand."""
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(SettingsError, match=r"az://b cannot be reached: .*; set AZURE_STORAGE_ACCOUNT_NAME and"):
        cloud.Bucket(tmp_path, "az", "b")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")
    assert [cloud.Bucket(tmp_path, kind, "b").url for kind in ("az", "gs")] == ["az://b", "gs://b"]


# writing


def test_an_upload_that_fails_leaves_nothing_here_that_is_not_there(machine, proxy):
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


def test_a_record_that_another_machine_wrote_first_is_kept_and_the_same_counts_as_ones_own(machine, server):
    path = machine() / "made"
    server.write("s/made", b"theirs")
    with pytest.raises(LockedError, match="another process wrote it first"):
        atomic.create_exclusive(path, b"ours")
    assert path.read_bytes() == server.read("s/made") == b"theirs"
    atomic.create_exclusive(path, b"theirs")


def test_files_are_deleted_there_too(machine, server):
    path = machine() / "folder" / "file"
    atomic.write_atomic(path, b"x")
    assert server.listed() == ["s/folder/file"]
    atomic.remove(path)
    atomic.remove(path)
    assert server.listed() == []
    assert not path.parent.exists()


def test_clock_times_of_several_machines_are_all_kept_and_cost_no_work(machine, server, proxy, caplog):
    lines = [b"%d\n" % (number // 3) for number in range(9)]  # those added at once are equal
    for name, number in (("a", 0), ("b", 3), ("a", 6)):
        path = machine(name) / "timing.jsonl"
        path.parent.mkdir(exist_ok=True)
        with ThreadPoolExecutor(3) as pool:  # of several processes of each
            list(pool.map(atomic.append, [path] * 3, lines[number : number + 3]))
    proxy.faults = lambda method, where, number: "403"
    atomic.append(path, b"lost\n")
    proxy.faults = lambda method, where, number: None
    assert "the last clock times of s3://bucket/s/timing.jsonl were not uploaded" in caplog.text
    found = server.read("s/timing.jsonl")
    assert sorted(found.splitlines(keepends=True)) == lines
    assert (machine("c") / "timing.jsonl").read_bytes() == found


@pytest.mark.parametrize("work", ["write", "read"])
def test_a_full_disk_under_the_cache_is_told_as_one(machine, server, monkeypatch, work):
    server.write("s/large", bytes(2**20 + 1))
    path = machine()
    if work == "write":
        monkeypatch.setenv("KCDCACHE_CRASHPOINT", "1:ENOSPC")
        monkeypatch.setattr("kcdcache.interrupt._steps", iter(range(1, 100)))
    else:
        monkeypatch.setattr("os.utime", lambda *where, **when: os.pwrite(os.open("/dev/full", os.O_WRONLY), b"x", 0))
    with pytest.raises(OSError, match="no space left") as caught:
        atomic.write_atomic(path / "file", b"x") if work == "write" else atomic.read_bytes(path / "large")
    assert caught.value.exit_code == 7


# reading


def test_only_the_chunks_needed_are_fetched_and_none_again_by_the_next_command(machine, proxy, plain):
    make(machine("writer"), PLAN)
    opened, rows = open(machine("reader")), np.array([3, 40])
    assert fetched(proxy) == []
    for _ in range(2):
        assert alike(opened, plain, rows=rows)
        assert fetched(proxy) == ["c.0.0", "c.0.0.0", "c.0.1", "c.0.1.0"]
    assert alike(open(machine("reader")), plain, rows=rows)
    assert [method for method, _ in proxy.seen] == ["GET", "HEAD"]  # one listing, and whether the name is a file's


def flipped(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def flipped_below_the_file_system(file):
    before = file.stat().st_mtime_ns
    flipped(file)
    os.utime(file, ns=(before, before))


@pytest.mark.parametrize("damage", [flipped, flipped_below_the_file_system])
def test_a_damaged_copy_in_the_cache_is_fetched_again(machine, plain, damage):
    make(machine("writer"), PLAN)
    path = machine("reader")
    assert alike(open(path), plain)
    for file in [file for file in path.rglob("*") if file.is_file() and file.stat().st_blocks]:
        damage(file)
    assert alike(open(machine("reader")), plain)


@pytest.mark.parametrize("size", [10, 1000])
def test_a_copy_cut_or_lengthened_while_it_is_read_is_fetched_again(machine, plain, size):
    make(machine("writer"), PLAN)
    opened = open(machine("reader"))
    assert alike(opened, plain)
    os.truncate(opened.path / "logits" / "c.0.1.0", size)
    assert alike(opened, plain)


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


def test_what_killed_writers_left_in_the_cache_is_gone_at_the_next_command(machine, tmp_path):
    path = machine()
    (path / "stages" / "0").mkdir(parents=True)
    (path / "half.tmp-999999999-1").write_bytes(b"x")
    (tmp_path / "cache" / "temporary" / "file.tmp-999999999-1").write_bytes(b"x")
    mine = path / f"file.tmp-{os.getpid()}-1"
    mine.write_bytes(b"x")
    machine()
    assert list(path.rglob("*")) == [mine]
    assert not list((tmp_path / "cache" / "temporary").iterdir())


def test_a_large_file_is_fetched_when_it_is_opened(machine, server, proxy):
    server.write("s/model.safetensors", bytes(2**20 + 1))
    path = machine() / "model.safetensors"
    assert path.stat().st_size == 2**20 + 1
    assert ("GET", "/bucket/s/model.safetensors") not in proxy.seen
    assert atomic.read_bytes(path) == bytes(2**20 + 1)
    assert ("GET", "/bucket/s/model.safetensors") in proxy.seen


# writers on several machines


def refused(path, shard=WHOLE):
    told = r"s3://bucket/s is being written by \S+-[0-9a-f]{8}, or its command was killed there"
    with pytest.raises(LockedError, match=told), creating(path, PLAN, shard=shard):
        pass
    return True


def test_one_writer_at_a_time_also_between_machines(machine):
    for shard, rivals in ((WHOLE, (WHOLE, SIDES[0])), (SIDES[0], (SIDES[0], WHOLE, Shard(1, 3)))):
        with creating(machine("a"), PLAN, shard=shard):
            assert all(refused(machine("b"), rival) for rival in rivals)
            machine("a", look=False)
    with creating(machine("b"), PLAN) as writing:
        finish(writing)


@pytest.mark.parametrize("content", [None, b"not a name", b"x" * 20_000])
def test_a_killed_owners_machine_goes_on_and_another_takes_over_by_its_name(machine, server, tmp_path, content):
    machine("a", look=False)
    with cloud.owned(cloud.open_path("s3://bucket/s")):
        left = server.read("s/.owner/all")
    owner = left.decode()
    server.write("s/.owner/all", left if content is None else content)
    path, remedy = machine("b"), f"set KCDCACHE_OWNER={owner} in the environment to take over"
    if content is not None:
        remedy = "delete the object s3://bucket/s/.owner/all to take over"
    with pytest.raises(LockedError, match=remedy), atomic.locked(path / ".lock"):
        pass
    with pytest.raises(LockedError, match=remedy):
        cloud.require_free(path)
    if content is None:
        for again in ("a", "b"):
            with atomic.locked(machine(again, KCDCACHE_OWNER=owner) / ".lock"):
                assert server.read("s/.owner/all") == left
            server.write("s/.owner/all", left)


def test_shards_on_two_machines_make_the_store_of_one(machine, server, plain):
    """Each sees at its end what the other wrote; the last one seals."""
    with creating(machine("a"), PLAN, shard=SIDES[0]) as left, creating(machine("b"), PLAN, shard=SIDES[1]) as right:
        machine("a", look=False)
        for part in left.pending():
            write_part(left, part)
        assert left.seal_last() == 3
        machine("b", look=False)
        for part in right.pending():
            write_part(right, part)
        assert right.seal_last() == 0
    assert same(server, plain)


def test_a_shard_of_another_teacher_is_refused_though_it_runs_elsewhere(machine):
    with (
        creating(machine("a"), PLAN, shard=SIDES[0]),
        pytest.raises(ValueError, match="weights"),
        creating(machine("b"), PLAN, knowledge(150, weights="bb"), shard=SIDES[1]),
    ):
        pass


def test_a_reader_beside_a_writer_of_the_same_machine_disturbs_nothing(machine, server, plain):
    """Both share the cache; the reader compares it with the bucket again and again. Chunks take no room here."""
    path, over = machine(), threading.Event()

    def look():
        while not over.is_set():
            cloud.refresh(path)

    reader = threading.Thread(target=look)
    reader.start()
    try:
        make(path, PLAN)
    finally:
        over.set()
        reader.join()
    assert same(server, plain)
    chunk = (path / "logits" / "c.0.1.0").stat()
    assert (chunk.st_size, chunk.st_blocks) == (32 * 7 * 2 + 4, 0)
    assert not list(path.rglob("*.tmp-*"))
    assert alike(open(path), plain, view=1)


def test_a_server_that_ignores_conditions_is_refused(machine, proxy, server):
    proxy.deaf = True
    with pytest.raises(RemoteError, match=r"s3://bucket replaced an object .* \(it ignores If-None-Match\)"):
        make(machine(), PLAN)
    assert server.listed() == []


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
    ],
)
def test_what_is_no_url_of_an_object_is_refused_without_its_secrets(url, message):
    with pytest.raises(SettingsError, match=message) as caught:
        cloud.opened(url)
    assert "hush" not in str(caught.value)
    assert cloud.opened("KCDCACHE") == "KCDCACHE"


def test_an_owner_whose_name_is_none_is_refused(machine):
    path = machine(KCDCACHE_OWNER="some one")
    with pytest.raises(SettingsError, match="KCDCACHE_OWNER should be a name of letters, digits"):
        make(path, PLAN)


@pytest.mark.parametrize("key", ["s/../x", "s//x", "s/.", "s/a\x1bb", "s/" + "n" * 300])
def test_keys_that_are_no_paths_are_refused(machine, key):
    machine()
    with pytest.raises(UnsafeError, match="which cannot be a file's path; nothing is fetched"):
        cloud.open_path(f"s3://bucket/{key}")


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


def test_the_client_is_loaded_for_urls_only_and_without_it_the_error_says_what_to_install(tmp_path):
    text = """
import sys
from kcdcache.files import cloud, parquet
cloud.open_path("runs/x"), cloud.open_path("file:///x")
print("obstore" in sys.modules)
sys.modules["obstore"] = None
cloud.open_path("s3://bucket/x")
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, env=environment(), check=False)
    assert done.stdout == "False\n"
    assert 's3://bucket: object stores need the extra `cloud`: pip install "kcdcache[cloud]"' in done.stderr


def test_another_endpoint_has_its_own_part_of_the_cache(machine, server):
    other, path = Proxy(server), machine()
    found = machine(AWS_ENDPOINT_URL=f"http://127.0.0.1:{other.port}")
    other.close()
    assert found.parents[1] != path.parents[1]
    assert found.parents[2] == path.parents[2]
    with pytest.raises(SettingsError, match="mirrors a bucket at another endpoint"):
        atomic.write_atomic(path / "file", b"x")
