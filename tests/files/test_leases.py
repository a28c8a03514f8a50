"""Leases between real processes: one holder at a time, whoever dies, sleeps or races."""

import json
import os
import signal
import threading
import time

import pytest
from cloud import Proxy, Server, access
from killing import Cold

from kcdcache.errors import LockedError, RemoteError, SettingsError
from kcdcache.files import leases
from kcdcache.files.leases import Lease
from kcdcache.files.remote import Remote

KEY = "store/_kcd/.leases/lock"
ELSEWHERE = "from kcdcache import leases\nleases._machine = lambda: 'another machine'\n"
"""makes a process take itself for one of another machine, whose processes cannot be looked at from here"""
HOLD = """
import pathlib, threading
from kcdcache import leases, remote
lease = leases.Lease(remote.Remote("s3", "bucket"), {key!r}, "it")
lease.take()
pathlib.Path({told!r}).write_text("held")
{then}
"""


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
def variables(proxy, monkeypatch, tmp_path):
    found = access(proxy.port, tmp_path / "cache", KCDCACHE_LEASE_SECONDS="1.2")
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    leases._honest.clear()
    return found


@pytest.fixture
def bucket(variables):
    return Remote("s3", "bucket")


def holding(variables, tmp_path, then="threading.Event().wait(100)", where=""):
    """A process that holds the lease; returns when it does."""
    told = tmp_path / "held"
    text = where + HOLD.format(key=KEY, told=str(told), then=then)
    process = Cold(text, tmp_path / "log", **variables)
    while not told.exists():
        assert not process.ended(0.02) or told.exists(), (tmp_path / "log").read_text()
    return process


def test_a_process_that_lives_keeps_its_lease(variables, bucket, tmp_path):
    process = holding(variables, tmp_path)
    with pytest.raises(LockedError, match=r"it is being written by process \d+ on .*; wait for it or stop it"):
        Lease(bucket, KEY, "it").take()
    process.kill()


def test_of_a_killed_process_of_this_machine_it_is_taken_at_once(variables, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("KCDCACHE_LEASE_SECONDS", "1000")
    holding(variables | {"KCDCACHE_LEASE_SECONDS": "1000"}, tmp_path).kill()
    lease = Lease(bucket, KEY, "it")
    lease.take()  # a wait would end in the test's own limit of time
    lease.require()
    lease.give_back()


def test_on_another_machine_a_holder_that_lives_keeps_it_and_a_killed_one_loses_it(variables, bucket, tmp_path):
    process = holding(variables, tmp_path, where=ELSEWHERE)
    with pytest.raises(LockedError, match="it is being written by process"):
        Lease(bucket, KEY, "it").take()
    process.kill()
    lease = Lease(bucket, KEY, "it")
    began = time.monotonic()
    lease.take()
    assert time.monotonic() - began > 1.1
    lease.give_back()


def test_given_back_it_is_free(variables, bucket, server, tmp_path):
    process = holding(variables, tmp_path, then="lease.give_back()", where=ELSEWHERE)
    assert process.ended(30)
    assert json.loads(server.read(KEY))["free"] is True
    began = time.monotonic()
    lease = Lease(bucket, KEY, "it")
    lease.take()
    assert time.monotonic() - began < 1
    lease.give_back()


def test_a_holder_that_slept_too_long_learns_that_it_lost(variables, bucket, tmp_path):
    """Stopped and continued, as a machine that was suspended: it writes no more."""
    then = f"""
while not pathlib.Path({str(tmp_path / "go")!r}).exists():
    threading.Event().wait(0.02)
try:
    lease.require()
    text = "still mine"
except Exception as error:
    text = f"{{type(error).__name__}}: {{error}}"
pathlib.Path({str(tmp_path / "said")!r}).write_text(text)
lease.give_back()
"""
    process = holding(variables, tmp_path, then=then, where=ELSEWHERE)
    process.signal(signal.SIGSTOP)
    lease = Lease(bucket, KEY, "it")
    lease.take()
    (tmp_path / "go").touch()
    process.signal(signal.SIGCONT)
    assert process.ended(30)
    said = (tmp_path / "said").read_text()
    assert said.startswith(f"LockedError: it was taken over by process {os.getpid()} on ")
    assert "not heard of for 1.2 s; it writes no more" in said
    lease.require()  # and it did not disturb the one that holds it now
    lease.give_back()


def test_of_several_that_take_over_from_the_dead_exactly_one_does(variables, bucket, tmp_path):
    holding(variables, tmp_path, where=ELSEWHERE).kill()
    won, lost = [], []

    def take():
        lease = Lease(bucket, KEY, "it")
        try:
            lease.take()
            won.append(lease)
        except LockedError:
            lost.append(lease)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 5)
    won[0].give_back()


def test_the_patient_enter_one_after_the_other(variables, bucket, tmp_path):
    """Three processes add to a counter that only the lease protects."""
    (tmp_path / "count").write_text("0")
    text = f"""
import pathlib
from kcdcache import leases, remote
bucket, count = remote.Remote("s3", "bucket"), pathlib.Path({str(tmp_path / "count")!r})
for _ in range(4):
    lease = leases.Lease(bucket, {KEY!r}, "it")
    lease.take(patient=True)
    number = int(count.read_text())
    lease.require()
    count.write_text(str(number + 1))
    lease.give_back()
"""
    logs = [tmp_path / f"log{number}" for number in range(3)]
    for process in [Cold(text, log, **variables) for log in logs]:
        assert process.ended(60)
        assert process.code == 0, [log.read_text() for log in logs]
    assert (tmp_path / "count").read_text() == "12"


@pytest.mark.parametrize("fault", ["503", "cut", "lost", "half", "slow"])
def test_no_fault_of_one_request_loses_a_lease(variables, bucket, proxy, fault):
    for broken in range(1, 9):
        proxy.seen.clear()
        proxy.faults = lambda method, path, number, broken=broken: fault if number == broken else None
        lease = Lease(bucket, KEY, "it")
        lease.take()
        lease._renew()
        lease.require()
        with pytest.raises(LockedError):
            Lease(bucket, KEY, "it").take()
        lease.give_back()


def test_what_is_no_lease_is_taken_after_the_wait(variables, bucket, server):
    for content in (b"not JSON", b"[]", b"{}", b"x" * 20_000):
        server.write(KEY, content)
        lease = Lease(bucket, KEY, "it")
        lease.take()
        assert json.loads(server.read(KEY))["id"] == lease._me["id"]
        lease.give_back()


def test_a_server_that_ignores_conditions_is_refused(variables, proxy):
    proxy.deaf = True
    with pytest.raises(RemoteError, match=r"s3://bucket replaced an object .* \(it ignores If-None-Match\)"):
        Lease(Remote("s3", "bucket"), KEY, "it").take()


def test_a_dead_process_whose_number_another_has_is_dead():
    own = leases.this_process()
    assert leases.here_and_alive(own) is True
    assert leases.here_and_alive(own | {"began": "1"}) is False
    assert leases.here_and_alive(own | {"machine": "another"}) is None
    assert leases.here_and_alive({}) is None


@pytest.mark.parametrize("text", ["0", "-1", "soon", "nan", "inf"])
def test_a_patience_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("KCDCACHE_LEASE_SECONDS", text)
    with pytest.raises(SettingsError, match="KCDCACHE_LEASE_SECONDS should be a positive number of seconds, found"):
        leases.patience()
