"""Compares what two checkouts make of the same commands on one machine: `python tests/golden/compare.py BASE [NEW]`.

Chunk files, weights and metrics must be the same to the byte; of parquet files columns, types and metadata; of
checkpoints tensors and records; of small JSON records the content. What may differ, and why, is in `ALLOWED`.

A SHA-256 or digest in a record may differ where it names the same file and that file was compared by its content: a
record whose file was written in another way is no difference of its own.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parent))
import chains

HERE = Path(__file__).resolve().parents[2]
SHOWN = 8
"""changes shown of one file"""


class Allowed(NamedTuple):
    """A difference that is meant; the first three are patterns of fnmatch, `[` written as `[[]`."""

    file: str
    key: str
    change: str
    """added, removed, changed or renamed"""
    reason: str


_MIX_BASE = "issue 15: mix_base = cumulative is gone, and with it the setting"
_RUN_ID = "digest of a run's settings, which lost mix_base"
_OPTIMIZER = "issue 15: the optimizer's own state_dict instead of momentum saved by hand"
_CARD = "issue 15: the card of an exported set names the module where it is now"
_SORT = "issue 15: DuckDB sorts and spills instead of our own shares"
_TEXTS = "issue 15: the texts of the report"
_REPORT_TEXTS = ("tables.*.title", "tables.*.note", "tables.*.columns.*", "figures*.title", "figures*.caption")
_SAMPLES = "issue 16: absolute samples beside the relative cost"
_FORWARDS = "issue 16: the forwards of a store in a row of its own, and none in the rows of its runs"
_VERDICT = "issue 17: the verdict of a report in words"
_VIEWS = "issue 17: the size of a network's training views, where images differ from it, for `evaluate`"
ALLOWED: tuple[Allowed, ...] = (
    Allowed("*/zarr.json", "dimension_names", "added", "issue 15: arrays carry dimension_names, which xarray needs"),
    Allowed("export/told/*.json", "bytes_on_disk", "changed", "issue 15: array documents carry dimension_names"),
    Allowed("*/run.json", "settings.mix_base", "removed", _MIX_BASE),
    Allowed("report/*.json", "tables.settings.rows*", "removed", _MIX_BASE),
    Allowed("*/files.json", "run", "changed", _RUN_ID),
    Allowed("*/checkpoint/*.safetensors", "metadata.kcdcache.run", "changed", _RUN_ID),
    Allowed("*/checkpoint/*.safetensors", "metadata.kcdcache.optimizer*", "added", _OPTIMIZER),
    Allowed("*/checkpoint/*.safetensors", "tensors.momentum.*", "renamed", _OPTIMIZER),
    Allowed("export/*/README.md", "byte *", "changed", _CARD),
    Allowed("export/told/inspect.json", "bytes", "changed", _CARD),
    Allowed("condense/told/*.json", "shares", "removed", _SORT),
    Allowed("condense/told/*.json", "temporary_bytes", "removed", _SORT),
    Allowed("*/results.json", "rows*.student_samples", "added", _SAMPLES),
    Allowed("*/told/run.json", "rows*.student_samples", "added", _SAMPLES),
    *(Allowed("report/*.json", "tables.results.*.student_samples", kind, _SAMPLES) for kind in ("added", "changed")),
    *(Allowed("report/*.json", "tables.cost.rows*", kind, _FORWARDS) for kind in ("added", "removed")),
    *(Allowed("report/*.json", key, "changed", _TEXTS) for key in _REPORT_TEXTS),
    *(Allowed(place, "verdict", "added", _VERDICT) for place in ("*/told/run.json", "report/*.json")),
    *(Allowed(f"*/{name}.json", "view_size", "added", _VIEWS) for name in ("model", "student")),
)
TENSOR_NAMES = (r"^head\.", "loss.")
"""(pattern, replacement): what tensors of the base's checkpoints are called now; others are found by their bytes"""
IGNORED = {
    "*.lock": "who holds a folder, or held it",
    "*/_kcd/lock": "who holds a store, or held it",
    "*/_kcd/lock.*": "who holds a share of a store",
    "*.holder": "who held a folder when it was killed",
    "*.html": "pictures with clock times; the report's JSON is compared",
    "*.toml": "recipes of this script",
    "images/*": "written by this script, once for both",
    "cache/*": "the cache of object stores",
    "*.made": "this script's notes",
}
VOLATILE = re.compile(
    r"(.*\.)?(seconds\w*|images_per_second(_std|\.mean|\.std|\.warm_up)?|(git_)?commit|device_name|python|versions(\.\w+)?)"
)
"""keys whose values the clock, the versions or the machine decide: that they are there is compared"""
CLOCKED = re.compile(
    r"\w+/told/(run|report)\.json:table"  # shows seconds
    r"|\w+/told/(precompute|first|views|fields|fill)\.json:bytes"  # counts a store's clock times, as text
    r"|\w+/(run/results|told/run)\.json:runs\[\d+\]\.bytes"
    r"|report/(numbers|told/report)\.json:kcdcache"  # the version
)
"""FILE:KEY of other such values"""
UNORDERED = {"*/_kcd/environment.json": "command", "*/_kcd/timing.jsonl": "points"}
"""file -> key to sort by: processes that fill a store together write in any order"""
SHARD = re.compile(r"--shard \d/")
"""which of two processes was the first to write down its command"""
HASH = re.compile(r"[0-9a-f]{64}")
CHECKPOINT = re.compile(r"\b[0-9a-f]{16}\.safetensors")
OWN = ("digest", "id")
"""keys at the top of a record that cover the record itself"""


class Change(NamedTuple):
    """One difference inside a file."""

    key: str
    change: str
    was: str = ""
    now: str = ""


class Item(NamedTuple):
    """One file compared."""

    file: str
    kind: str
    changes: list[Change]
    """those that are not allowed"""
    allowed: list[Allowed]
    """the entry of each change that is"""


class Tree:
    """What one checkout made: files by name, what a SHA-256 or digest in a record stands for, bytes by SHA-256."""

    def __init__(self, root: Path, folders: Sequence[str] | None = None) -> None:
        self.root = root
        self.files: dict[str, Path] = {}
        self.meant: dict[str, set[str]] = {}
        self.size: dict[str, int] = {}
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            name = path.relative_to(root).as_posix()
            if folders is not None and name.split("/")[0] not in folders:
                continue
            if not any(fnmatchcase(name, pattern) for pattern in IGNORED):
                self._add(CHECKPOINT.sub("*.safetensors", name), path)

    def _add(self, name: str, path: Path) -> None:
        data = path.read_bytes()
        digest = sha256(data).hexdigest()
        self.files[name], self.size[digest] = path, len(data)
        self.meant.setdefault(digest, set()).add(name)
        record = json.loads(data) if name.endswith(".json") else None
        for key in OWN if isinstance(record, dict) else ():
            if HASH.fullmatch(str(record.get(key))):
                self.meant.setdefault(record[key], set()).add(f"{name}:{key}")

    def plain(self, value: Any) -> Any:
        """Return a JSON value without what two equal trees differ in: their paths, sizes that fit a file's SHA-256."""
        if isinstance(value, str):
            shown = value.replace(str(self.root), "WORK").replace(chains.STORED, "")
            return SHARD.sub("--shard I/", CHECKPOINT.sub("*.safetensors", shown))
        if isinstance(value, dict):
            fits = "bytes" in value and self._fits(value["bytes"], value.get("sha256"))
            return {key: self.plain(inner) for key, inner in value.items()} | ({"bytes": "fits"} if fits else {})
        if isinstance(value, list):
            fits = len(value) == 2 and self._fits(*value)
            return ["fits", value[1]] if fits else [self.plain(inner) for inner in value]
        return value

    def _fits(self, size: Any, digest: Any) -> bool:
        return type(size) is int and self.size.get(str(digest)) == size


def compare_trees(
    base: Path, new: Path, allowed: Sequence[Allowed] = ALLOWED, chain_names: Sequence[str] | None = None
) -> list[Item]:
    """Return one item per file of either tree, sorted by name; `chain_names` leaves out folders of other chains."""
    trees = Tree(base, chain_names), Tree(new, chain_names)
    items = []
    for file in sorted({*trees[0].files, *trees[1].files}):
        kind, read = next((kind, read) for pattern, kind, read in KINDS if fnmatchcase(file, pattern))
        item = Item(file, kind, [], [])
        for change in _changes(file, read, *trees):
            texts = file, change.key, change.change
            reasons = (entry for entry in allowed if all(map(fnmatchcase, texts, entry[:3])))
            if reason := next(reasons, None):
                item.allowed.append(reason)
            else:
                item.changes.append(change)
        items.append(item)
    return items


def _changes(file: str, read: "Reader | None", base: Tree, new: Tree) -> Iterator[Change]:
    was, now = base.files.get(file), new.files.get(file)
    if was is None or now is None:
        told = now.read_text(errors="replace")[-500:] if now is not None and file.endswith(".failed") else ""
        yield Change("", "added" if was is None else "removed", now=told)
    elif read is None:
        yield from _bytes(was.read_bytes(), now.read_bytes())
    else:
        before, after = read(was), read(now)
        if by := next((key for pattern, key in UNORDERED.items() if fnmatchcase(file, pattern)), None):
            before, after = (sorted(record, key=lambda entry: str(entry[by])) for record in (before, after))
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _own_digests(before, after)
            yield from _renamed(before.get("tensors", {}), after.get("tensors", {}))
        yield from Differences(file, base.meant, new.meant).of(base.plain(before), new.plain(after), "")


def _bytes(before: bytes, after: bytes) -> Iterator[Change]:
    if before != after:
        shared = min(len(before), len(after))
        at = next((i for i in range(shared) if before[i] != after[i]), shared)
        yield Change(f"byte {at}", "changed", f"{before[at : at + 16]!r}", f"{after[at : at + 16]!r}")


def _own_digests(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
    """Take out digests of the record itself: they differ where its content does, which is told, and only there."""
    both = [key for key in OWN if all(HASH.fullmatch(str(record.get(key))) for record in (before, after))]
    digests = [(key, before.pop(key), after.pop(key)) for key in both]
    if before == after:
        yield from (Change(key, "changed", was, now) for key, was, now in digests if was != now)


def _renamed(before: dict[str, str], after: dict[str, str]) -> Iterator[Change]:
    """Take out tensors of the same bytes under another name."""
    for name in sorted(before.keys() - after.keys()):
        same = (other for other in after if other not in before and after[other] == before[name])
        if place := next(same, None):
            del before[name], after[place]
            yield Change(f"tensors.{name}", "renamed", name, place)


class Differences(NamedTuple):
    """What differs between two JSON values of one file; numbers must be of one type and equal to the last bit."""

    file: str
    base: dict[str, set[str]]
    """what a digest stands for in the base's tree"""
    new: dict[str, set[str]]

    def of(self, was: Any, now: Any, key: str) -> Iterator[Change]:
        """Yield the changes of a value and what is in it."""
        volatile = VOLATILE.fullmatch(key) or CLOCKED.fullmatch(f"{self.file}:{key}")
        if volatile and (was is None) == (now is None):
            return
        if isinstance(was, dict) and isinstance(now, dict):
            for name in sorted({*was, *now}):
                inner = f"{key}.{name}" if key else name
                if name not in now:
                    yield Change(inner, "removed", _short(was[name]))
                elif name not in was:
                    yield Change(inner, "added", now=_short(now[name]))
                else:
                    yield from self.of(was[name], now[name], inner)
        elif isinstance(was, list) and isinstance(now, list):
            yield from self._of_lists(was, now, key)
        elif repr(was) != repr(now) and not (self.base.get(str(was), set()) & self.new.get(str(now), set())):
            yield Change(key, "changed", _short(was), _short(now))

    def _of_lists(self, was: list[Any], now: list[Any], key: str) -> Iterator[Change]:
        """Compare items in order; if there are more or fewer, yield those that have no like in the other list."""
        if len(was) == len(now):
            for number, (old, new) in enumerate(zip(was, now, strict=True)):
                yield from self.of(old, new, f"{key}[{number}]")
            return
        old, new = ([json.dumps(item, sort_keys=True, default=repr) for item in items] for items in (was, now))
        for tag, i, j, m, n in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            if tag != "equal":
                yield from (Change(f"{key}[]", "removed", text[:80]) for text in old[i:j])
                yield from (Change(f"{key}[]", "added", now=text[:80]) for text in new[m:n])


def _short(value: Any) -> str:
    return json.dumps(value, default=repr)[:80]


Reader = Callable[[Path], Any]


def read_record(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_bytes())


def read_lines(path: Path) -> list[Any]:
    """Return the records of a file of one a line."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def read_table(path: Path) -> dict[str, Any]:
    """Return names, types, rows and metadata of a parquet file; floats with their bits, which tell NaN and -0 apart."""
    table = pq.read_table(path, partitioning=None)
    columns = {}
    for field, column in zip(table.schema, table.columns, strict=True):
        rows = column.to_pylist()
        if bits := {pa.float32(): pa.int32(), pa.float64(): pa.int64()}.get(field.type):
            rows = [
                f"{row!r} = {whole}"
                for row, whole in zip(rows, column.combine_chunks().view(bits).to_pylist(), strict=True)
            ]
        columns[field.name] = {"type": f"{field}", "metadata": _texts(field.metadata), "rows": rows}
    return {"names": table.column_names, "columns": columns, "metadata": _texts(table.schema.metadata)}


def _texts(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    return {key.decode(): _parsed(value.decode()) for key, value in (metadata or {}).items()}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return types, shapes and SHA-256 of the tensors of a safetensors file, and its metadata, JSON in it parsed."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = {key: _parsed(value) for key, value in header.pop("__metadata__", {}).items()}
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        digest = sha256(data[start + first : start + last]).hexdigest()
        tensors[re.sub(*TENSOR_NAMES, name)] = f"{entry['dtype']} {entry['shape']} sha256 {digest}"
    return {"tensors": tensors, "metadata": metadata}


KINDS: tuple[tuple[str, str, Reader | None], ...] = (
    ("*/metrics.jsonl", "metrics", None),
    ("*.jsonl", "lines", read_lines),
    ("*/zarr.json", "array document", read_record),
    ("*/told/*.json", "answer", read_record),
    ("*.json", "record", read_record),
    ("*.parquet", "table", read_table),
    ("*/checkpoint/*.safetensors", "checkpoint", read_checkpoint),
    ("*.safetensors", "weights", None),
    ("*/c.*", "chunk", None),
    ("*.md", "text", None),
    ("*.failed", "failure", None),
    ("*", "file", None),
)
"""(pattern of the name, what it is called here, how it is read); files that None reads are compared byte by byte"""


def tell(items: Sequence[Item], *, quiet: bool = False) -> int:
    """Print a line per item and the counts of each kind; return the number of items that differ."""
    for item in items:
        if item.changes or not quiet:
            print(f"{'DIFFERENT' if item.changes else 'ok':9} {item.kind:15} {item.file}")
        for change in item.changes[:SHOWN]:
            print(f"          {change.change} {change.key}: {change.was} -> {change.now}")
        if len(item.changes) > SHOWN:
            print(f"          ... and {len(item.changes) - SHOWN} more")
    print()
    for kind in sorted({item.kind for item in items}):
        of_kind = [item for item in items if item.kind == kind]
        print(f"{kind:15} {len(of_kind):5} compared, {sum(bool(item.changes) for item in of_kind)} different")
    for entry, count in Counter(entry for item in items for entry in item.allowed).items():
        print(f"allowed {count} times: {' '.join(entry[:3])}: {entry.reason}")
    different, allowed = sum(bool(item.changes) for item in items), sum(bool(item.allowed) for item in items)
    print(f"{len(items)} items compared, {different} different, {allowed} with allowed")
    return different


def made(checkout: Path, work: Path, names: Sequence[str], *, reuse: bool) -> list[str]:
    """Make chains of a checkout in `work`; return what went wrong.

    A chain that the same commit made there before, with the same script on the same machine, is taken as it is if
    `reuse`: only the other checkout's need be made again.
    """
    now, troubles, failed = chains.state(checkout), [], set[str]()
    notes = {name: work / f"{name}.made" for name in names}
    names = [name for name in names if not (reuse and notes[name].exists() and notes[name].read_text() == now)]
    for name in names:
        notes[name].unlink(missing_ok=True)
        for old in (work / name, *([work / "images"] if name == "folders" else [])):
            shutil.rmtree(old, ignore_errors=True)
    for name in names:
        if failed & set(chains.CHAINS[name].needs):
            failed.add(name)
            continue
        start = time.monotonic()
        if trouble := chains.make(name, checkout, work):
            failed.add(name)
            troubles.append(f"{name}: {trouble}")
        else:
            notes[name].write_text(now)
        print(f"made {name} of {checkout} in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    return troubles


def main(words: Sequence[str] | None = None) -> int:
    """Make both trees, compare them, tell; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="checkout to compare with")
    parser.add_argument(
        "new", type=Path, nargs="?", default=HERE, help="checkout to compare; this script's own if unset"
    )
    parser.add_argument("--work", type=Path, help="folder to keep; what the same base made there is not made again")
    parser.add_argument("--only", choices=chains.CHAINS, help="one chain, with those it needs")
    parser.add_argument("--compare-only", action="store_true", help="compare what lies in --work")
    parser.add_argument("--quiet", action="store_true", help="one line only for what differs")
    given = parser.parse_args(words)
    names = None if given.compare_only and given.only is None else chains.wanted(given.only)
    with tempfile.TemporaryDirectory() as unkept:
        work = (given.work or Path(unkept)).resolve()
        folders = {"base": given.base.resolve(), "new": given.new.resolve()}
        for side, checkout in () if given.compare_only else folders.items():
            (work / side).mkdir(parents=True, exist_ok=True)
            for trouble in made(checkout, work / side, names or (), reuse=side == "base"):
                print(f"FAILED in {side}: {trouble}", file=sys.stderr)
                if side == "base":
                    return 2
        items = compare_trees(work / "base", work / "new", chain_names=names)
        return 1 if tell(items, quiet=given.quiet) or not items else 0


if __name__ == "__main__":
    sys.exit(main())
