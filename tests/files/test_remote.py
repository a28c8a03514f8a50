"""The object store's client against a real S3-speaking server, through a proxy that breaks requests."""

import threading

import pytest
from cloud import SECRET, Proxy, Server, access

from kcdcache.errors import RemoteError, SettingsError, UnsafeError
from kcdcache.files import remote
from kcdcache.files.remote import ChangedError, Remote


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


@pytest.fixture
def bucket(server, proxy, monkeypatch, tmp_path):
    for name, value in access(proxy.port, tmp_path / "cache", AWS_TIMEOUT="5s").items():
        monkeypatch.setenv(name, value)
    yield Remote("s3", server.bucket)
    for key in server.listed():
        server.delete(key)


FAULTS = ("503", "cut", "lost", "half", "slow")


@pytest.mark.parametrize("fault", FAULTS)
def test_every_operation_survives_a_fault_of_its_first_request(bucket, server, proxy, tmp_path, fault):
    """Whatever goes wrong with the first request of each, the result is that of an untroubled one."""
    content = bytes(range(256)) * 400
    (tmp_path / "up").write_bytes(content)

    def troubled(work):
        first = len(proxy.seen) + 1
        proxy.faults = lambda method, path, number: fault if number == first else None
        return work()

    troubled(lambda: bucket.put("a/put", tmp_path / "up"))
    made = troubled(lambda: bucket.create("a/made", b"one"))
    changed = troubled(lambda: bucket.update("a/made", b"two", made))
    troubled(lambda: bucket.fetch("a/put", tmp_path / "down"))
    assert (tmp_path / "down").read_bytes() == content
    assert troubled(lambda: bucket.read("a/made", 100)) == (b"two", changed)
    assert [(e.key, e.bytes) for e in troubled(lambda: bucket.list("a"))] == [("a/made", 3), ("a/put", len(content))]
    troubled(lambda: bucket.delete("a/put"))
    assert server.listed() == ["a/made"]
    assert troubled(lambda: bucket.head("a/put")) is None
    assert proxy.broken == [fault] * 8


def test_of_several_that_make_an_object_exactly_one_does(bucket, server):
    won, ready = [], threading.Barrier(8)

    def race(number):
        ready.wait()
        try:
            bucket.create("k", b"%d" % number)
            won.append(number)
        except FileExistsError:
            pass

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [b"%d" % number for number in won] == [server.read("k")]


def test_the_same_content_made_by_another_is_not_taken_for_ones_own(bucket):
    bucket.create("k", b"same")
    with pytest.raises(FileExistsError):
        bucket.create("k", b"same")


def test_only_the_version_that_was_seen_is_replaced(bucket, server):
    first = bucket.create("k", b"1")
    bucket.update("k", b"2", first)
    with pytest.raises(ChangedError):
        bucket.update("k", b"3", first)
    server.delete("k")
    with pytest.raises(ChangedError):
        bucket.update("k", b"3", first)
    assert server.listed() == []


def test_what_is_too_large_is_not_read(bucket, server):
    server.write("k", b"x" * 101)
    with pytest.raises(UnsafeError, match=r"s3://bucket/k has 101 bytes, expected at most 100; it is not read"):
        bucket.read("k", 100)


def test_a_bucket_that_is_not_there_is_named_at_once(bucket, monkeypatch, proxy):
    with pytest.raises(RemoteError, match=r"s3://elsewhere: could not list .*404 Not Found.*NoSuchBucket"):
        Remote("s3", "elsewhere").list("x")
    assert len(proxy.seen) == 1


def test_a_store_that_never_answers_ends_in_an_error_that_says_what_to_do(bucket, proxy, monkeypatch):
    monkeypatch.setattr(remote, "MOST_TRIES", 1)
    monkeypatch.setitem(remote.RETRIES, "max_retries", 1)
    proxy.faults = lambda method, path, number: "503"
    with pytest.raises(RemoteError, match=r"could not write k: .*503.*run the same command again to resume"):
        Remote("s3", "bucket").create("k", b"1")


def test_secrets_are_cut_out_of_errors(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    told = remote.cleaned(
        f"GET https://x/y?sig=abc&se=1 with {SECRET}: <Error><Code>No</Code></Error>\n\nDebug source x"
    )
    assert told == "GET https://x/y?... with ***: No"


@pytest.mark.parametrize(("scheme", "variable"), [("gs", "GOOGLE"), ("az", "AZURE")])
def test_the_other_kinds_of_stores_can_be_made(scheme, variable, monkeypatch):
    """Made only: no server that speaks their protocols is at hand."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")
    assert Remote(scheme, "bucket").url == f"{scheme}://bucket"


def test_a_store_that_cannot_even_be_made_names_the_variables(monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(SettingsError, match=r"az://bucket cannot be reached: .*; set AZURE_STORAGE_ACCOUNT_NAME and"):
        Remote("az", "bucket")
