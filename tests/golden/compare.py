"""Compares what two checkouts make of the same commands on one machine: `python tests/golden/compare.py BASE [NEW]`.

Chunk files, weights and metrics must be the same to the byte; of parquet files columns, types and metadata; of
checkpoints tensors and records; of small JSON records the content. What may differ, and why, stands in `ALLOWED`.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    """A difference that is meant; the three are patterns of fnmatch, `[` written as `[[]`."""

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
ALLOWED: tuple[Allowed, ...] = (
    Allowed("*/zarr.json", "dimension_names", "added", "issue 15: arrays carry dimension_names, which xarray needs"),
    Allowed("export/told/*.json", "bytes_on_disk", "changed", "issue 15: array documents carry dimension_names"),
    Allowed("*/run.json", "settings.mix_base", "removed", _MIX_BASE),
    Allowed("report/*.json", "tables.settings.rows*", "removed", _MIX_BASE),
    Allowed("*/files.json", "run", "changed", _RUN_ID),
    Allowed("*/checkpoint/*.safetensors", "metadata.kcdcache.run", "changed", _RUN_ID),
    Allowed("*/checkpoint/*.safetensors", "metadata.kcdcache.optimizer*", "added", _OPTIMIZER),
    Allowed("*/checkpoint/*.safetensors", "tensor momentum.*", "renamed", _OPTIMIZER),
    Allowed("export/*/README.md", "byte *", "changed", _CARD),
    Allowed("export/told/inspect.json", "bytes", "changed", _CARD),
    Allowed("condense/told/*.json", "shares", "removed", _SORT),
    Allowed("condense/told/*.json", "temporary_bytes", "removed", _SORT),
)
TENSOR_NAMES: tuple[tuple[str, str], ...] = ((r"^head\.", "loss."),)
"""(pattern, replacement): what tensors of a checkpoint are called now; others are found by their bytes and told"""
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
    changes: tuple[Change, ...]
    """those that are not allowed"""
    allowed: tuple[tuple[Change, Allowed], ...] = ()


class Tree:
    """What one checkout made: files by name, and what a SHA-256 or digest in a record stands for."""

    def __init__(self, root: Path, folders: Sequence[str] | None = None) -> None:
        found = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
        if folders is not None:
            found = {name: path for name, path in found.items() if name.split("/")[0] in folders}
        kept = {name: path for name, path in found.items() if not any(fnmatchcase(name, p) for p in IGNORED)}
        self.root = root
        self.files = {CHECKPOINT.sub("*.safetensors", name): path for name, path in kept.items()}
        self.meant: dict[str, set[str]] = {}
        self.size: dict[str, int] = {}
        for name, path in self.files.items():
            data = path.read_bytes()
            self._learn(sha256(data).hexdigest(), name)
            self.size[sha256(data).hexdigest()] = len(data)
            if name.endswith(".json"):
                record = json.loads(data)
                for key in OWN if isinstance(record, dict) else ():
                    self._learn(str(record.get(key)), f"{name}:{key}")

    def _learn(self, digest: str, what: str) -> None:
        if HASH.fullmatch(digest):
            self.meant.setdefault(digest, set()).add(what)


class Pair(NamedTuple):
    """Two trees, and the file in both that is being compared."""

    base: Tree
    new: Tree
    file: str

    def same_meaning(self, was: str, now: str) -> bool:
        """Return whether two digests are of the same file in both trees."""
        return bool(self.base.meant.get(was, set()) & self.new.meant.get(now, set()))


def compare_trees(
    base: Path, new: Path, allowed: Sequence[Allowed] = ALLOWED, chain_names: Sequence[str] | None = None
) -> list[Item]:
    """Return one item per file of either tree, sorted by name; `chain_names` leaves out folders of other chains."""
    trees = Tree(base, chain_names), Tree(new, chain_names)
    return [_item(Pair(*trees, file), allowed) for file in sorted({*trees[0].files, *trees[1].files})]


def _item(pair: Pair, allowed: Sequence[Allowed]) -> Item:
    was, now = pair.base.files.get(pair.file), pair.new.files.get(pair.file)
    kind, compare = kind_of(pair.file)
    if was is None or now is None:
        told = now.read_text(errors="replace")[-500:] if now is not None and pair.file.endswith(".failed") else ""
        changes = [Change("", "added" if was is None else "removed", now=told)]
    else:
        changes = list(compare(was, now, pair))
    judged = [(change, _reason(pair.file, change, allowed)) for change in changes]
    return Item(
        pair.file,
        kind,
        tuple(change for change, reason in judged if reason is None),
        tuple((change, reason) for change, reason in judged if reason is not None),
    )


def _reason(file: str, change: Change, allowed: Sequence[Allowed]) -> Allowed | None:
    def fits(entry: Allowed) -> bool:
        patterns = zip((file, change.key, change.change), entry[:3], strict=True)
        return all(fnmatchcase(text, pattern) for text, pattern in patterns)

    return next((entry for entry in allowed if fits(entry)), None)


Comparison = Callable[[Path, Path, Pair], Iterable[Change]]


def kind_of(name: str) -> tuple[str, Comparison]:
    """Return what a file is called here, and how two of its kind are compared."""
    for pattern, kind, compare in KINDS:
        if fnmatchcase(name, pattern):
            return kind, compare
    return "file", compare_bytes


def compare_bytes(was: Path, now: Path, _: Pair) -> Iterator[Change]:
    """Yield a change if two files differ in any byte."""
    before, after = was.read_bytes(), now.read_bytes()
    if before != after:
        at = next(
            (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
        )
        yield Change(f"byte {at}", "changed", f"{before[at : at + 16]!r}", f"{after[at : at + 16]!r}")


def compare_json(was: Path, now: Path, pair: Pair) -> Iterator[Change]:
    """Yield what differs in the content of two records."""
    before, after = json.loads(was.read_bytes()), json.loads(now.read_bytes())
    if pair.file.endswith("/_kcd/environment.json"):  # processes that fill a store together write in any order
        before, after = (sorted(record, key=lambda entry: str(entry["command"])) for record in (before, after))
    if isinstance(before, dict) and isinstance(after, dict):
        yield from _own_digests(before, after)
    yield from differences(before, after, "", pair)


def _own_digests(before: dict[str, Any], after: dict[str, Any]) -> Iterator[Change]:
    """Take out digests of the record itself: they differ where its content does, which is told, and only there."""
    records = before, after
    both = [key for key in OWN if all(HASH.fullmatch(str(record.get(key))) for record in records)]
    digests = [(key, before.pop(key), after.pop(key)) for key in both]
    if before == after:
        yield from (Change(key, "changed", was, now) for key, was, now in digests if was != now)


def compare_lines(was: Path, now: Path, pair: Pair) -> Iterator[Change]:
    """Yield what differs in the content of two files of one record a line."""
    rows = [[json.loads(line) for line in path.read_bytes().splitlines()] for path in (was, now)]
    if pair.file.endswith("/_kcd/timing.jsonl"):  # processes that fill a store together write in any order
        rows = [sorted(lines, key=lambda line: int(line["points"])) for lines in rows]
    yield from differences(rows[0], rows[1], "", pair)


def compare_tables(was: Path, now: Path, pair: Pair) -> Iterator[Change]:
    """Yield what differs in columns, types, values (NaN and -0 by their bits) and metadata of two parquet files."""
    before, after = pq.read_table(was, partitioning=None), pq.read_table(now, partitioning=None)
    if before.column_names != after.column_names:
        yield Change("columns", "changed", str(before.column_names), str(after.column_names))
    if before.num_rows != after.num_rows:
        yield Change("rows", "changed", str(before.num_rows), str(after.num_rows))
    for name in before.column_names:
        if name in after.column_names and before.num_rows == after.num_rows:
            yield from _compare_columns(name, before, after)
    yield from differences(_metadata(before), _metadata(after), "metadata", pair)


def _compare_columns(name: str, before: pa.Table, after: pa.Table) -> Iterator[Change]:
    fields = [table.schema.field(name) for table in (before, after)]
    if not fields[0].equals(fields[1], check_metadata=True):
        yield Change(f"column {name}: type", "changed", *(str(field) for field in fields))
    columns = [_bits(table[name].combine_chunks()) for table in (before, after)]
    if not columns[0].equals(columns[1]):
        rows = zip(*(column.to_pylist() for column in columns), strict=False)
        row = next((number for number, (old, new) in enumerate(rows) if old != new), 0)
        told = [repr(table[name][row].as_py())[:60] for table in (before, after)]
        yield Change(f"column {name}: row {row}", "changed", *told)


def _bits(column: pa.Array) -> pa.Array:
    whole = {pa.float32(): pa.int32(), pa.float64(): pa.int64()}.get(column.type)
    return column if whole is None else column.view(whole)


def _metadata(table: pa.Table) -> dict[str, Any]:
    return {key.decode(): _parsed(value.decode()) for key, value in (table.schema.metadata or {}).items()}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


class Tensor(NamedTuple):
    """A tensor as it lies in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def compare_checkpoints(was: Path, now: Path, pair: Pair) -> Iterator[Change]:
    """Yield what differs in two checkpoints: tensors, known by name or else by their bytes, and the record."""
    (before, record), (after, new_record) = tensors(was), tensors(now)
    before = {_name_now(name): tensor for name, tensor in before.items()}
    missing = {name: tensor for name, tensor in before.items() if name not in after}
    extra = {name: tensor for name, tensor in after.items() if name not in before}
    for name in sorted(before.keys() & after.keys()):
        if before[name] != after[name]:
            yield Change(f"tensor {name}", "changed", _told(before[name]), _told(after[name]))
    for name, tensor in missing.items():
        place = next((other for other, candidate in extra.items() if candidate == tensor), None)
        if place is None:
            yield Change(f"tensor {name}", "removed", _told(tensor))
        else:
            del extra[place]
            yield Change(f"tensor {name}", "renamed", name, place)
    yield from (Change(f"tensor {name}", "added", now=_told(tensor)) for name, tensor in extra.items())
    yield from differences(record, new_record, "metadata", pair)


def tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a safetensors file and its metadata, JSON in it parsed."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    record = {key: _parsed(value) for key, value in header.pop("__metadata__", {}).items()}
    return {name: _tensor(entry, data[start:]) for name, entry in header.items()}, record


def _tensor(entry: dict[str, Any], data: bytes) -> Tensor:
    first, last = entry["data_offsets"]
    return Tensor(entry["dtype"], tuple(entry["shape"]), data[first:last])


def _name_now(name: str) -> str:
    for pattern, replacement in TENSOR_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _told(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} sha256 {sha256(tensor.data).hexdigest()[:12]}"


def differences(was: Any, now: Any, key: str, pair: Pair) -> Iterator[Change]:
    """Yield what differs between two JSON values; numbers must be of one type and equal to the last bit."""
    if _volatile(key, pair.file) and (was is None) == (now is None):
        return
    if _same_file(was, now, pair):
        was, now = _without_size(was), _without_size(now)
    if isinstance(was, dict) and isinstance(now, dict):
        yield from _of_objects(was, now, key, pair)
    elif isinstance(was, list) and isinstance(now, list):
        yield from _of_lists(was, now, key, pair)
    elif not _same_leaf(was, now, pair):
        yield Change(key, "changed", _short(was), _short(now))


def _same_leaf(was: Any, now: Any, pair: Pair) -> bool:
    if type(was) is not type(now):
        return False
    same = _plain(was, pair.base) == _plain(now, pair.new)
    return same or (isinstance(was, str) and pair.same_meaning(was, now))


def _of_objects(was: dict[str, Any], now: dict[str, Any], key: str, pair: Pair) -> Iterator[Change]:
    for name in sorted({*was, *now}):
        inner = f"{key}.{name}" if key else name
        if name not in now:
            yield Change(inner, "removed", _short(was[name]))
        elif name not in was:
            yield Change(inner, "added", now=_short(now[name]))
        else:
            yield from differences(was[name], now[name], inner, pair)


def _of_lists(was: list[Any], now: list[Any], key: str, pair: Pair) -> Iterator[Change]:
    """Items are compared in order; if there are more or fewer of them, those that others have no like of are told."""
    if len(was) == len(now):
        for number, (old, new) in enumerate(zip(was, now, strict=True)):
            yield from differences(old, new, f"{key}[{number}]", pair)
        return
    texts = [[json.dumps(item, sort_keys=True) for item in items] for items in (was, now)]
    for tag, i, j, m, n in SequenceMatcher(None, texts[0], texts[1], autojunk=False).get_opcodes():
        if tag != "equal":
            yield from (Change(f"{key}[]", "removed", text[:80]) for text in texts[0][i:j])
            yield from (Change(f"{key}[]", "added", now=text[:80]) for text in texts[1][m:n])


def _same_file(was: Any, now: Any, pair: Pair) -> bool:
    """Return whether both are (bytes, SHA-256) of one file of both trees, each right about its own size."""
    entries = _size_and_hash(was), _size_and_hash(now)
    if entries[0] is None or entries[1] is None or not pair.same_meaning(entries[0][1], entries[1][1]):
        return False
    trees = pair.base, pair.new
    return all(tree.size.get(digest) == size for tree, (size, digest) in zip(trees, entries, strict=True))  # type: ignore[misc]


def _size_and_hash(value: Any) -> tuple[int, str] | None:
    if isinstance(value, dict) and isinstance(value.get("bytes"), int) and isinstance(value.get("sha256"), str):
        return value["bytes"], value["sha256"]
    if isinstance(value, list) and [type(item) for item in value] == [int, str] and HASH.fullmatch(value[1]):
        return value[0], value[1]
    return None


def _without_size(value: Any) -> Any:
    return value[1:] if isinstance(value, list) else {key: inner for key, inner in value.items() if key != "bytes"}


def _volatile(key: str, file: str) -> bool:
    return bool(VOLATILE.fullmatch(key) or CLOCKED.fullmatch(f"{file}:{key}"))


def _plain(value: Any, tree: Tree) -> str:
    """Return a value as text: numbers to the last bit, paths of the tree and names of checkpoints the same in both."""
    if isinstance(value, str):
        return SHARD.sub("--shard I/", CHECKPOINT.sub("*.safetensors", value.replace(str(tree.root), "WORK")))
    return repr(value)


def _short(value: Any) -> str:
    return json.dumps(value)[:80]


KINDS: tuple[tuple[str, str, Comparison], ...] = (
    ("*/metrics.jsonl", "metrics", compare_bytes),
    ("*.jsonl", "lines", compare_lines),
    ("*/zarr.json", "array document", compare_json),
    ("*/told/*.json", "answer", compare_json),
    ("*.json", "record", compare_json),
    ("*.parquet", "table", compare_tables),
    ("*/checkpoint/*.safetensors", "checkpoint", compare_checkpoints),
    ("*.safetensors", "weights", compare_bytes),
    ("*/c.*", "chunk", compare_bytes),
    ("*.md", "text", compare_bytes),
    ("*.failed", "failure", compare_bytes),
)


def tell(items: Sequence[Item], *, quiet: bool = False) -> int:
    """Print a line per item and the counts of each kind; return the number of items that differ."""
    for item in items:
        if item.changes or not quiet:
            _tell(item)
    print()
    for kind in sorted({item.kind for item in items}):
        of_kind = [item for item in items if item.kind == kind]
        print(f"{kind:15} {len(of_kind):5} compared, {sum(bool(item.changes) for item in of_kind)} different")
    for entry in dict.fromkeys(entry for item in items for _, entry in item.allowed):
        count = sum(entry == other for item in items for _, other in item.allowed)
        print(f"allowed {count} times: {' '.join(entry[:3])}: {entry.reason}")
    different = sum(bool(item.changes) for item in items)
    print(
        f"{len(items)} items compared, {different} different, {sum(bool(item.allowed) for item in items)} with allowed"
    )
    return different


def _tell(item: Item) -> None:
    print(f"{'DIFFERENT' if item.changes else 'ok':9} {item.kind:15} {item.file}")
    for change in item.changes[:SHOWN]:
        print(f"          {change.change} {change.key}: {change.was} -> {change.now}")
    if len(item.changes) > SHOWN:
        print(f"          ... and {len(item.changes) - SHOWN} more")


def made(checkout: Path, work: Path, names: Sequence[str], *, reuse: bool) -> list[str]:
    """Make chains of a checkout in `work`; return what went wrong.

    A chain that the same commit made there before, with the same script on the same machine, is taken as it is if
    `reuse`: only the other checkout's need be made again.
    """
    now, troubles, failed = chains.state(checkout), [], set[str]()
    notes = {name: work / f"{name}.made" for name in names}
    stand = {name for name in names if reuse and notes[name].exists() and notes[name].read_text() == now}
    for name in (name for name in names if name not in stand):
        notes[name].unlink(missing_ok=True)
        for old in (work / name, *([work / "images"] if name == "folders" else [])):
            shutil.rmtree(old, ignore_errors=True)
    for name in (name for name in names if name not in stand):
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
