"""Where a path lies: on this machine's disks, or in an object store that folders of a cache mirror."""

import importlib
import os
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import unquote

from kcdcache.errors import SettingsError

TEMPORARY_MARK = ".tmp-"
"""in the names of files and folders that are this machine's alone, wherever they lie"""
SCHEMES = ("s3", "gs", "az")
"""what a cache folder mirrors; file:// is this machine's own disks"""
_BACKEND = "kcdcache.files.mirror"
"""loaded when the first URL is met: it needs the extra `cloud`"""
_URL = re.compile(
    r"(?:(?P<kind>[a-z][a-z0-9]*):)?(?P<url>(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://[^?]*)(?P<rest>.*)", re.S
)


@runtime_checkable
class Mirror(Protocol):
    """A folder that shows what an object store holds: names and sizes of everything, contents where they are needed."""

    base: str
    """path of the folder"""
    url: str
    """what it shows"""

    def open(self, key: str, fresh: bool) -> Path:
        """Return the path of a key, after bringing all below it up to date; with `fresh` nothing cached is trusted."""
        ...

    def refresh(self, path: Path) -> None:
        """Bring all below a path up to date."""
        ...

    def bring(self, paths: Iterable[Path]) -> None:
        """Fetch the contents of files that are not here yet."""
        ...

    def bring_again(self, path: Path) -> None:
        """Fetch the content of a file, whatever is here."""
        ...

    def place(self, temporary: Path, path: Path, exclusive: bool) -> None:
        """Upload a finished temporary file, then put it in place; `exclusive`: FileExistsError on a taken name."""
        ...

    def remove(self, path: Path) -> None:
        """Delete a file there, then here."""
        ...

    def appended(self, path: Path, data: bytes) -> None:
        """Take note of what was added to a file here, to be added there soon."""
        ...

    def lock_file(self, path: Path) -> Path:
        """Return where processes of this machine lock what they would lock at `path`."""
        ...

    def held(self, path: Path) -> AbstractContextManager[None]:
        """Hold the lease that stands for a lock file, against writers on other machines."""
        ...

    def door(self, folder: Path) -> AbstractContextManager[None]:
        """Let one process on any machine at a time begin to write a folder; wait for it."""
        ...

    def share(self, lock: Path, rivals: Callable[[str], bool]) -> AbstractContextManager[bool]:
        """Hold one of several leases of a folder; yield whether nobody else holds any."""
        ...

    def require_free(self, path: Path) -> None:
        """Do nothing if nobody holds the lease that stands for a lock file."""
        ...


_mirrors: list[Mirror] = []


def register(mirror: Mirror) -> None:
    """Make a mirror known, so that what is written below its folder reaches the object store."""
    _mirrors.append(mirror)


def local(text: str, fresh: bool = False) -> str:
    """Return a user's path as one of this machine: of a URL, that of its mirror; anything else as it is.

    The mirror is brought up to date. `condensed:URL` is a data spec and stays one.

    Raises:
        SettingsError: the scheme is unknown, the URL is none of an object, or the extra `cloud` is not installed.
        RemoteError: the object store does not answer, or refuses.

    >>> local("runs/kd"), local("file:///data/runs/my%20kd"), local("condensed:file:///sets/a?train=5")
    ('runs/kd', '/data/runs/my kd', 'condensed:/sets/a?train=5')
    """
    if "://" not in text or (match := _URL.fullmatch(text)) is None:
        return text
    kind, url, scheme, rest = match.group("kind", "url", "scheme", "rest")
    if kind not in (None, "condensed"):
        raise SettingsError(
            f"{kind}: takes a path of this machine, found a URL: data sets are read from local disks; copy it here, or "
            "give condensed:URL for a set exported with its images"
        )
    if rest and kind is None:
        raise SettingsError(f"{_without_secrets(text)} has a '?'; a URL here is scheme://bucket/key and nothing more")
    path = _plain(url) if scheme == "file" else str(_mirrored(url, scheme, fresh))
    return f"{kind}:{path}{rest}" if kind else path


def locals_of(value: Any, fresh: bool = False) -> Any:
    """Return a setting's value with every text in it as `local` makes it."""
    if isinstance(value, str):
        return local(value, fresh)
    return tuple(local(part, fresh) for part in value) if isinstance(value, tuple) else value


def of(path: Path | str) -> Mirror | None:
    """Return the mirror that a path lies in, or None: costs nothing where there is no mirror."""
    if not _mirrors:
        return None
    text = os.fspath(path)
    found = next((one for one in _mirrors if text == one.base or text.startswith(one.base + os.sep)), None)
    return None if found is None or TEMPORARY_MARK in text[len(found.base) :] else found


def mirrored(url: str) -> None:
    """Mirror a bucket that another process mirrors, as `urls` names it, without looking what it holds."""
    if all(one.url != url for one in _mirrors):
        scheme, _, bucket = url.partition("://")
        register(_backend(url).mirror(scheme, bucket))


def urls() -> tuple[str, ...]:
    """Return what is mirrored so far, for another process to open."""
    return tuple(one.url for one in _mirrors)


def bring(*paths: Path) -> None:
    """Make sure that files hold their contents: in a mirror, what is only a name yet is fetched, several at once."""
    for mirror in _mirrors:
        mirror.bring([path for path in paths if of(path) is mirror])


def bring_again(path: Path) -> bool:
    """Fetch a mirrored file's content again, whatever is here; return whether the path is mirrored."""
    if (mirror := of(path)) is None:
        return False
    mirror.bring_again(path)
    return True


def refresh(path: Path) -> None:
    """Make a mirror show what other machines wrote or deleted below a path since."""
    if (mirror := of(path)) is not None:
        mirror.refresh(path)


def lock_file(path: Path) -> Path:
    """Return where processes of this machine lock what `path` stands for: beside the mirror, if it is mirrored."""
    mirror = of(path)
    return path if mirror is None else mirror.lock_file(path)


def held(path: Path) -> AbstractContextManager[None]:
    """Hold a lock file against writers on other machines too, if it is mirrored.

    Raises:
        LockedError: one of them holds it.
    """
    mirror = of(path)
    return nullcontext() if mirror is None else mirror.held(path)


def door(folder: Path) -> AbstractContextManager[None]:
    """Let one process at a time begin to write a mirrored folder."""
    mirror = of(folder)
    return nullcontext() if mirror is None else mirror.door(folder)


def share(lock: Path, rivals: Callable[[str], bool]) -> AbstractContextManager[bool]:
    """Hold one of several locks of a folder against other machines, if it is mirrored; yield whether it is alone.

    `rivals` tells of another lock's name whether both must not be held at once.

    Raises:
        LockedError: it, or a rival, is held.
    """
    mirror = of(lock)
    return nullcontext(True) if mirror is None else mirror.share(lock, rivals)


def require_free(path: Path) -> None:
    """Do nothing if no other machine holds a mirrored lock file.

    Raises:
        LockedError: one does.
    """
    if (mirror := of(path)) is not None:
        mirror.require_free(path)


def named(text: str) -> str:
    """Return a text with the URLs of mirrored files instead of their paths in the cache."""
    for mirror in _mirrors:
        text = text.replace(mirror.base, mirror.url)
    return text


def shown(value: Any) -> Any:
    """Return JSON values with every text as `named` makes it."""
    if not _mirrors:
        return value
    if isinstance(value, str):
        return named(value)
    if isinstance(value, dict):
        return {shown(key): shown(item) for key, item in value.items()}
    return [shown(item) for item in value] if isinstance(value, list | tuple) else value


def _plain(url: str) -> str:
    host, _, path = url.removeprefix("file://").partition("/")
    if host not in ("", "localhost") or not path:
        raise SettingsError(f"{url} should be file:///PATH, an absolute path of this machine")
    return "/" + unquote(path)


def _mirrored(url: str, scheme: str, fresh: bool) -> Path:
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in (*SCHEMES, "file"))
        raise SettingsError(f"{_without_secrets(url)} has the unknown scheme {scheme}://; known: {known}")
    bucket, _, key = url.removeprefix(f"{scheme}://").partition("/")
    if "@" in bucket:
        raise SettingsError(
            f"{_without_secrets(url)} holds credentials, which would be shown and recorded; set them in the "
            "environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_KEY, ...)"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
        raise SettingsError(f"{url} names no bucket; write {scheme}://BUCKET/KEY")
    mirrored(f"{scheme}://{bucket}")
    mirror = next(one for one in _mirrors if one.url == f"{scheme}://{bucket}")
    return mirror.open(key, fresh)


def _backend(url: str) -> Any:
    try:
        return importlib.import_module(_BACKEND)
    except ImportError as error:
        if error.name is None or not error.name.startswith("obstore"):
            raise
        raise SettingsError(f'{url}: object stores need the extra `cloud`: pip install "kcdcache[cloud]"') from None


def _without_secrets(url: str) -> str:
    return re.sub(r"\?.*", "?...", re.sub(r"//[^/]*@", "//...@", url), flags=re.S)
