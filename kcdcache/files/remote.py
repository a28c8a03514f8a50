"""An object store: whole objects read, written, made only where none is, and listed; the only importer of obstore."""

import itertools
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, GCSStore, S3Store

from kcdcache.errors import RemoteError, SettingsError, UnsafeError

T = TypeVar("T")

KINDS: Mapping[str, tuple[Callable[..., Any], str, str]] = {
    "s3": (
        S3Store,
        "AWS",
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    ),
    "gs": (GCSStore, "GOOGLE", "GOOGLE_APPLICATION_CREDENTIALS"),
    "az": (AzureStore, "AZURE", "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"),
}
"""scheme -> how its store is made, the beginning of its variables in the environment, and what those of access are"""
TIMEOUT, CONNECT_TIMEOUT = timedelta(seconds=120), timedelta(seconds=10)
"""of one request, 64 MiB at 4 Mbit/s; AWS_TIMEOUT and AWS_CONNECT_TIMEOUT (GOOGLE_..., AZURE_...) are used instead"""
RETRIES: dict[str, Any] = {
    "max_retries": 10,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=10), "base": 2},
}
MOST_TRIES = 10
"""of what obstore itself does not try again: a body that ends early, a conditional write whose answer was lost"""
SINGLE_BYTES = 64 * 2**20
"""largest object that is uploaded in one request, unless it may only be made where none is"""
MOST_CREATED = 2**30
"""largest object that can be made only where none is: it goes in one request, from memory"""
MOST_APPENDED = 64 * 2**20
"""largest object that lines are added to"""
MOST_CHANGES = 50
BLOCK_BYTES = 4 * 2**20
METADATA_SERVICE = "169.254.169.254"
"""where machines of a provider ask for access; who comes there elsewhere has none"""
WRITER = "kcdcachewriter"
"""metadata that tells whose object it is, should the answer to its upload be lost"""
_SECRET = re.compile(r"KEY|SECRET|TOKEN|SAS|PASSWORD|CREDENTIAL", re.I)


class Entry(NamedTuple):
    """An object in a listing."""

    key: str
    bytes: int
    tag: str
    """changes whenever the content does"""


class Version(NamedTuple):
    """Which content of an object is meant; what a conditional write compares."""

    tag: str | None
    generation: str | None


class ChangedError(Exception):
    """An object is no longer the version that was to be replaced."""


class Remote:
    """One bucket of an object store. Methods may be called from several threads.

    Every method raises RemoteError where the store does not answer, after trying again for minutes, or refuses.
    """

    def __init__(self, scheme: str, bucket: str) -> None:
        make, variables, self._access = KINDS[scheme]
        self.url = f"{scheme}://{bucket}"
        self.place = place_of(variables, os.environ)
        """where the bucket is, if its name does not tell: a digestible text, empty for the provider's own"""
        given = {name.upper() for name in os.environ}
        options = {"timeout": TIMEOUT, "connect_timeout": CONNECT_TIMEOUT}
        wanted: dict[str, Any] = {k: v for k, v in options.items() if f"{variables}_{k.upper()}" not in given}
        if "http://" in self.place:  # whoever names such an endpoint means it
            wanted["allow_http"] = True
        try:
            self._store = make(bucket, client_options=wanted, retry_config=RETRIES)
        except (BaseError, ValueError) as error:
            raise SettingsError(f"{self.url} cannot be reached: {cleaned(str(error))}; set {self._access}") from None

    def list(self, prefix: str) -> list[Entry]:
        """Return all objects below a folder (all of the bucket for an empty one)."""
        found = self._tried(
            f"list {prefix}", lambda: obstore.list(self._store, prefix or None, chunk_size=1000).collect()
        )
        return [Entry(str(one["path"]), int(one["size"]), plain(one["e_tag"])) for one in found]

    def head(self, key: str) -> Entry | None:
        """Return an object's entry, or None where there is none."""
        try:
            one = self._tried(f"look at {key}", lambda: obstore.head(self._store, key))
        except FileNotFoundError:
            return None
        return Entry(key, int(one["size"]), plain(one["e_tag"]))

    def read(self, key: str, most: int) -> tuple[bytes, Version]:
        """Return a small object.

        Raises:
            FileNotFoundError: there is none.
            UnsafeError: it has more than `most` bytes.
        """

        def once() -> tuple[bytes, Version]:
            result = obstore.get(self._store, key)
            if (size := result.meta["size"]) > most:
                raise UnsafeError(f"{self.url}/{key} has {size} bytes, expected at most {most}; it is not read")
            return bytes(result.bytes()), Version(result.meta["e_tag"], result.meta["version"])

        return self._tried(f"read {key}", once)

    def fetch(self, key: str, path: Path) -> str:
        """Write an object to a file; return its tag.

        Raises:
            FileNotFoundError: there is none.
        """

        def once() -> str:
            result = obstore.get(self._store, key)
            with open(path, "wb") as sink:
                for block in result.stream(min_chunk_size=BLOCK_BYTES):
                    sink.write(memoryview(block))
                if sink.tell() != result.meta["size"]:
                    raise ConnectionError(f"{sink.tell()} of {result.meta['size']} bytes came")
            return plain(result.meta["e_tag"])

        return self._tried(f"read {key}", once)

    def put(self, key: str, path: Path) -> str:
        """Upload a file, whatever is there; return its tag."""
        whole = path.stat().st_size <= SINGLE_BYTES
        content: Any = path.read_bytes() if whole else path
        made = self._tried(f"write {key}", lambda: obstore.put(self._store, key, content, use_multipart=not whole))
        return plain(made["e_tag"])

    def create(self, key: str, content: bytes) -> Version:
        """Upload an object only where none is: of several that race, on any machine, exactly one succeeds.

        Raises:
            FileExistsError: there is one, and it is not this call's own whose answer was lost.
        """
        mark = uuid.uuid4().hex
        attributes = {WRITER: mark}

        def once() -> Version:
            try:
                made = obstore.put(self._store, key, content, mode="create", attributes=attributes, use_multipart=False)
                return Version(made["e_tag"], made["version"])
            except (AlreadyExistsError, PreconditionError):
                return self._own(key, mark)

        return self._tried(f"write {key}", once)

    def update(self, key: str, content: bytes, version: Version) -> Version:
        """Replace one version of an object: of several that race exactly one succeeds.

        Raises:
            ChangedError: there is another version by now, or none, and it is not this call's own.
        """
        mark = uuid.uuid4().hex
        attributes = {WRITER: mark}
        given = {"e_tag": version.tag, "version": version.generation}
        condition: Any = {name: value for name, value in given.items() if value is not None}

        def once() -> Version:
            try:
                made = obstore.put(
                    self._store, key, content, mode=condition, attributes=attributes, use_multipart=False
                )
                return Version(made["e_tag"], made["version"])
            except (PreconditionError, AlreadyExistsError, FileNotFoundError):
                try:
                    return self._own(key, mark)
                except (FileExistsError, ConnectionError):
                    raise ChangedError(key) from None

        return self._tried(f"write {key}", once)

    def append(self, key: str, lines: bytes) -> None:
        """Add lines to an object that others add to as well; each of them is there in the end.

        Raises:
            UnsafeError: the object has more than MOST_APPENDED bytes.
        """
        for _ in range(MOST_CHANGES):
            try:
                before, version = self.read(key, MOST_APPENDED)
                self.update(key, before + lines, version)
                return
            except FileNotFoundError:
                with suppress(FileExistsError):
                    self.create(key, lines)
                    return
            except ChangedError:
                continue
        raise RemoteError(f"{self.url}/{key} changes faster than it can be read and written")

    def delete(self, key: str) -> None:
        """Delete an object, if there is one."""
        try:
            self._tried(f"delete {key}", lambda: obstore.delete(self._store, key))
        except FileNotFoundError:
            return

    def _own(self, key: str, mark: str) -> Version:
        """Return the version that a refused upload made after all, when it was tried before.

        Raises:
            FileExistsError: the object is another's.
            ConnectionError: there is none any more: try again.
        """
        try:
            result = obstore.get(self._store, key, options={"head": True})
        except FileNotFoundError:
            raise ConnectionError(f"{key} is gone again") from None
        if result.attributes.get(WRITER) != mark:
            raise FileExistsError(key)
        return Version(result.meta["e_tag"], result.meta["version"])

    def _tried(self, what: str, work: Callable[[], T]) -> T:
        """Return what some work gives, doing it again where a connection broke."""
        with self._telling(what):
            patient_until = time.monotonic() + RETRIES["retry_timeout"].total_seconds()
            for attempt in itertools.count():
                try:
                    return work()
                except (PermissionDeniedError, UnauthenticatedError, AlreadyExistsError, PreconditionError):
                    raise
                except (BaseError, ConnectionError) as error:
                    if attempt >= MOST_TRIES or time.monotonic() > patient_until or _final(str(error)):
                        raise
                    time.sleep(min(10.0, 0.1 * 2**attempt))
        raise AssertionError

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise RemoteError(
                f"{self.url} refuses to {what}: {cleaned(str(error))}; access is taken from the environment: set "
                f"{self._access}"
            ) from None
        except (BaseError, ConnectionError) as error:
            remedy = "what is there stays as it is, run the same command again to resume"
            if METADATA_SERVICE in str(error):
                remedy = f"no access was found in the environment: set {self._access}"
            raise RemoteError(f"{self.url}: could not {what}: {cleaned(str(error))}; {remedy}") from None


def place_of(variables: str, environment: Mapping[str, str]) -> str:
    """Return what of the environment says where buckets are: an endpoint or an account, no secrets.

    >>> place_of("AWS", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000", "AWS_SECRET_ACCESS_KEY": "s"})
    'http://127.0.0.1:9000'
    """
    names = ("ENDPOINT_URL_S3", "ENDPOINT_URL", "ENDPOINT", "STORAGE_ENDPOINT", "STORAGE_ACCOUNT_NAME")
    return " ".join(filter(None, (environment.get(f"{variables}_{name}") for name in names)))


def plain(tag: str | None) -> str:
    """Return an entity tag without its quotes, which listings and answers set differently."""
    return (tag or "").strip('"')


def cleaned(text: str) -> str:
    """Return an error's text in short: without queries of URLs (signatures) and secrets of the environment."""
    text = re.sub(r"\?[^\s<>\"')]*", "?...", text.split("\n\nDebug source")[0])
    for name, value in os.environ.items():
        if len(value) >= 4 and _SECRET.search(name):
            text = text.replace(value, "***")
    return " ".join(re.sub(r"<[^<>]*>", " ", text).split())[:400]


def _final(text: str) -> bool:
    """Return whether an answer says that asking again is in vain: the client's fault, not the connection's."""
    return re.search(r"status code: 4(?!08|09|29)\d\d", text) is not None
