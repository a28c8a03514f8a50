"""An S3-speaking server on this machine, a proxy before it that breaks requests, and what commands need for them."""

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import obstore
from obstore.store import S3Store
from pupils import UNPROMISED

SECRET = "never-to-be-seen-4711"
"""the secret key; no output and no file may hold it"""
SLOW_SECONDS = 0.3
"""what a slow answer of the proxy takes"""
CONDITIONS = ("If-Match", "If-None-Match")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A bucket of moto's S3, which is a process of its own, or that of the one it is `beside`."""

    def __init__(self, bucket="bucket", beside=None):
        self.bucket, self.port = bucket, beside.port if beside else free_port()
        if beside is None:
            words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
            self._process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self._wait()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{bucket}", method="PUT")
        urllib.request.urlopen(request, timeout=10).read()
        access = {"access_key_id": "somebody", "secret_access_key": SECRET, "region": "us-east-1"}
        self.store = S3Store(
            bucket, endpoint=f"http://127.0.0.1:{self.port}", client_options={"allow_http": True}, **access
        )
        """the bucket itself, past any proxy"""

    def _wait(self):
        for _ in range(600):
            assert self._process.poll() is None, "moto's server did not start"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.1):
                return
            threading.Event().wait(0.05)
        raise AssertionError("moto's server does not answer")

    def close(self):
        self._process.kill()
        self._process.wait()

    def listed(self, prefix=""):
        return sorted(one["path"] for one in obstore.list(self.store, prefix or None).collect())

    def read(self, key):
        return bytes(obstore.get(self.store, key).bytes())

    def write(self, key, content):
        obstore.put(self.store, key, content)

    def delete(self, key):
        obstore.delete(self.store, key)

    def upload(self, folder, prefix):
        for file in (path for path in folder.rglob("*") if path.is_file()):
            self.write(f"{prefix}/{file.relative_to(folder)}", file.read_bytes())

    def promised(self, prefix):
        """The objects below a prefix whose bytes are promised, by name; see `pupils.promised`."""
        names = [key for key in self.listed(prefix) if ".owner" not in key.split("/")]
        return {k.removeprefix(f"{prefix}/"): self.read(k) for k in names if k.rsplit("/", 1)[-1] not in UNPROMISED}


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # of five, connections beyond would wait for seconds


class Proxy:
    """Passes requests on to a server; `faults(method, path, number)` names what goes wrong with one, or None.

    503, 403: it is refused. cut: the connection ends before it is passed on. lost: it is passed on, the answer is not.
    half: the connection ends in the middle of the answer. slow: the answer comes late.
    """

    def __init__(self, server, faults=lambda method, path, number: None):
        self.faults, self.seen, self.broken = faults, [], []
        self.deaf = False
        """whether conditions of requests are not passed on"""
        self._server, self._turn, self._conditional = server, threading.Lock(), threading.Lock()
        self._http = _Listener(("127.0.0.1", 0), self._handler())
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()

    def _handler(proxy):  # noqa: N805 -- the handler's own self is another
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle(self):
                with contextlib.suppress(OSError):  # the other side was killed
                    super().handle()

            def answer(self):
                proxy.handle(self)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815

            def log_message(self, *arguments):
                pass

        return Handler

    def handle(self, asked):
        body = asked.rfile.read(int(asked.headers.get("Content-Length", 0)))
        with self._turn:
            self.seen.append((asked.command, asked.path))
            fault = self.faults(asked.command, asked.path, len(self.seen))
            if fault is not None:
                self.broken.append(fault)
        if fault == "cut":
            return self._end(asked)
        if fault in ("503", "403"):
            return self._tell(asked, int(fault), {}, b"<Error><Code>SlowDown</Code></Error>")
        status, headers, content = self._passed_on(asked, body)
        if fault == "lost":
            return self._end(asked)
        if fault == "slow":
            threading.Event().wait(SLOW_SECONDS)
        return self._tell(asked, status, headers, content, half=fault == "half")

    def _passed_on(self, asked, body):
        # moto looks and then writes; a real store does both at once
        conditional = any(name in asked.headers for name in CONDITIONS)
        with self._conditional if conditional else contextlib.nullcontext():
            there = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=60)
            headers = {k: v for k, v in asked.headers.items() if not (self.deaf and k.title() in CONDITIONS)}
            there.request(asked.command, asked.path, body, headers)
            answer = there.getresponse()
            content = answer.read()
            there.close()
        return answer.status, dict(answer.getheaders()), content

    def _tell(self, asked, status, headers, content, half=False):
        asked.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                asked.send_header(name, value)
        length = headers.get("Content-Length", str(len(content))) if asked.command == "HEAD" else str(len(content))
        asked.send_header("Content-Length", length)
        asked.end_headers()
        if asked.command != "HEAD":
            asked.wfile.write(content[: len(content) // 2] if half else content)
        if half:
            self._end(asked)

    def _end(self, asked):
        asked.close_connection = True
        with contextlib.suppress(OSError):
            asked.connection.shutdown(socket.SHUT_RDWR)


def access(port, cache, **more):
    """The environment of a command that reaches the server, with a cache of its own."""
    return {
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_TIMEOUT": "20s",
        "KCDCACHE_CACHE": str(cache),
    } | {name: str(value) for name, value in more.items()}


def forgotten(cache):
    """Delete a cache: what follows is like another machine."""
    shutil.rmtree(cache, ignore_errors=True)


def everything(folder):
    """All bytes of all files below a folder, with their paths."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return b"\n".join(os.fsencode(path) + b"\n" + path.read_bytes() for path in files)
