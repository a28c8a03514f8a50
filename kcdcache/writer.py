"""Creating, resuming, growing and sealing a store, part by part: data, then log record, then commit."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64

from kcdcache import layout, ledger
from kcdcache.encoding import Encoding, Statistics
from kcdcache.errors import CorruptionError, NotFoundError, SettingsError, UnfinishedError
from kcdcache.files import canonical_json, locked, read_json, remove_leftovers, sync_directory, write_atomic
from kcdcache.identity import FORMAT_VERSION, IDENTITY_FILE, Knowledge, read_store_identity, require_same
from kcdcache.layout import Chunk, Part, StorePlan
from kcdcache.ledger import FileRecord, Numbers, Record
from kcdcache.store import ChunkWriter, listed_sizes, size_problem

REMEDY = "continue with the settings it was begun with, or write to another path"


class Writer:
    """One growth of a store being written by this process; made by `create` and `grow`."""

    def __init__(self, path: Path, plan: StorePlan, growth: int, before: StorePlan | None) -> None:
        self.path = path
        self.plan = plan
        self.growth = growth
        """0 while the store is created"""
        self.parts = tuple(layout.parts(plan, before))
        """all parts of this growth, in order"""
        self._chunks = ChunkWriter(path)

    @property
    def sealed(self) -> bool:
        """Whether nothing is left to do."""
        return ledger.commit_path(self.path, self.growth).exists()

    def pending(self) -> list[Part]:
        """Return the parts still to write: those without a log record whose files are all there in the logged size."""
        if self.sealed:
            return []
        sizes = listed_sizes(self.path, self.plan)
        return [part for part in self.parts if not self._done(_name(part), self._part_chunks(part), sizes)]

    def write_part(
        self,
        part: Part,
        rows: Mapping[str, np.ndarray],
        statistics: Mapping[str, Statistics],
        measurements: Numbers | None = None,
    ) -> None:
        """Write all rows of a part (array name -> encoded rows), then log it; what was there of it is replaced.

        Raises:
            SettingsError: the part or its arrays are not those of the plan.
            NoSpaceError: the disk or quota is full; finished parts are kept.
        """
        self._require_planned(part, rows)
        if self.sealed:
            raise SettingsError(f"the store at {self.path} is sealed; grow it to add views or fields")
        logged = {name: asdict(values) for name, values in statistics.items()}
        self._write(part.view, part.number, part.start, self._part_chunks(part), rows, logged, measurements or {})

    def write_samples(self, labels: np.ndarray, sample_digest: np.ndarray) -> None:
        """Write labels and digests of all samples, unless they are logged already."""
        chunks = layout.sample_chunks(self.plan)
        if not self._done(ledger.SAMPLES, chunks, listed_sizes(self.path, self.plan)):
            self._write(None, None, 0, chunks, {"labels": labels, "sample_digest": sample_digest}, {}, {})

    def seal(self) -> None:
        """Write the commit record that makes everything readable; does nothing on a sealed growth.

        Raises:
            UnfinishedError: parts are pending.
        """
        if self.sealed:
            return
        if left := self.pending():
            raise UnfinishedError(f"{len(left)} of {len(self.parts)} parts of {self.path} are not written yet")
        names = [] if self.growth else [ledger.SAMPLES]
        ledger.write_commit(self.path, self.growth, [*names, *(_name(part) for part in self.parts)])

    def _write(
        self,
        view: int | None,
        number: int | None,
        start: int,
        chunks: Sequence[Chunk],
        rows: Mapping[str, np.ndarray],
        statistics: Mapping[str, Numbers],
        measurements: Numbers,
    ) -> None:
        name = Record(view, number, ()).name
        ledger.record_path(self.path, self.growth, name).unlink(missing_ok=True)
        for chunk in chunks:  # zarr would merge an old last chunk into the new one
            (self.path / chunk.key).unlink(missing_ok=True)
        for array in dict.fromkeys(chunk.array for chunk in chunks):
            self._chunks.write(array, view, start, rows[array.name])
        record = Record(view, number, self._chunks.take(chunks), statistics, measurements)
        ledger.write_record(self.path, self.growth, record)

    def _part_chunks(self, part: Part) -> list[Chunk]:
        return layout.part_chunks(self.plan, part)

    def _done(self, name: str, chunks: Sequence[Chunk], sizes: Mapping[str, int]) -> bool:
        try:
            record = ledger.read_record(ledger.record_path(self.path, self.growth, name))
        except (NotFoundError, CorruptionError):
            return False
        files: dict[str, FileRecord] = {file.path: file for file in record.files}
        return not any(size_problem(self.plan, chunk, files.get(chunk.key), sizes.get(chunk.key)) for chunk in chunks)

    def _require_planned(self, part: Part, rows: Mapping[str, np.ndarray]) -> None:
        if part not in self.parts:
            raise SettingsError(f"{part} is not a part of the plan of {self.path}: {self.plan}")
        expected = {array.name for array in self.plan.arrays_of(part.fields)}
        if set(rows) != expected:
            raise SettingsError(f"{part} needs the arrays {sorted(expected)}, found {sorted(rows)}")
        if short := [name for name, values in rows.items() if len(values) != part.stop - part.start]:
            raise SettingsError(
                f"{part} needs {part.stop - part.start} rows of '{short[0]}', found {len(rows[short[0]])}"
            )


@contextmanager
def create(
    path: Path | str,
    knowledge: Knowledge,
    plan: StorePlan,
    labels: Int64[np.ndarray, " n"],
    sample_digest: UInt64[np.ndarray, " n"],
) -> Iterator[Writer]:
    """Yield the writer of a new store, of the same store unfinished, or (with nothing pending) of the same one sealed.

    Raises:
        MismatchError: another store lies there; names the first difference.
        SettingsError: the folder holds something else, or there are not N labels and digests.
        LockedError: another process writes it.
    """
    root = Path(path)
    _require_place(root)
    count = plan.count if knowledge.mixes else knowledge.data.count
    if not len(labels) == len(sample_digest) == plan.count == count:
        raise SettingsError(
            f"a store of {count} samples needs a plan, labels and digests for as many; found "
            f"{plan.count}, {len(labels)} and {len(sample_digest)}"
        )
    with _held(root):
        _begin(root, knowledge, plan)
        writer = Writer(root, plan, 0, None)
        if not writer.sealed:
            _prepare(root, plan, 0)
            writer.write_samples(labels, sample_digest)
        yield writer


@contextmanager
def grow(
    path: Path | str, knowledge: Knowledge, *, views: int | None = None, fields: Sequence[Encoding] = ()
) -> Iterator[Writer]:
    """Yield the writer that adds views (`views` in all) or fields to a sealed store, begun now or before.

    The sealed state stays readable. If the store holds all that already, nothing is pending.

    Raises:
        NotFoundError: there is no store.
        UnfinishedError: the store itself was never finished.
        MismatchError: another teacher, data set, view rule, or another growth under way; names the first difference.
        LockedError: another process writes it.
    """
    root = Path(path)
    _require_same_knowledge(root, knowledge)
    with _held(root):
        commits = ledger.read_commits(root)
        before = layout.plan_from(commits[-1].plan)
        plan = layout.grow_plan(before, views or before.views, fields)
        begun = ledger.growths(root, "plan") > len(commits)
        if plan == before and not begun:
            yield Writer(root, plan, len(commits) - 1, None)
            return
        _write_or_compare(ledger.plan_path(root, len(commits)), plan.document(), f"the growth under way at {root}")
        _prepare(root, plan, len(commits))
        yield Writer(root, plan, len(commits), before)


@contextmanager
def _held(root: Path) -> Iterator[None]:
    lock = root / ledger.FOLDER / "lock"
    with locked(lock):
        remove_leftovers(root)  # also where nothing is left to do: a kill may fall just after the commit
        try:
            yield
        finally:
            lock.write_bytes(b"")  # who held it must not make two equal stores differ


def _require_place(root: Path) -> None:
    if root.is_file() or (root.exists() and not (root / ledger.FOLDER).is_dir() and any(root.iterdir())):
        raise SettingsError(f"{root} is there already and is not a knowledge store; choose a new folder")


def _begin(root: Path, knowledge: Knowledge, plan: StorePlan) -> None:
    if not any((root / ledger.FOLDER / "log" / "0").glob("v*.json")):
        _forget(root)  # nothing was computed yet, so whoever comes next decides what this store is
    if (root / IDENTITY_FILE).exists():
        _require_same_knowledge(root, knowledge)
    else:
        document = {"format_version": FORMAT_VERSION, "knowledge": knowledge.document()}
        write_atomic(root / IDENTITY_FILE, canonical_json(document | {"knowledge_id": knowledge.knowledge_id}))
    _write_or_compare(ledger.plan_path(root, 0), plan.document(), f"the plan of the store at {root}")


def _forget(root: Path) -> None:
    for path in (IDENTITY_FILE, ledger.plan_path(Path(), 0), ledger.record_path(Path(), 0, ledger.SAMPLES)):
        (root / path).unlink(missing_ok=True)


def _require_same_knowledge(root: Path, knowledge: Knowledge) -> None:
    found = read_store_identity(root).document()
    require_same(found, knowledge.document(), (f"the store at {root}", "what is asked for"), REMEDY)


def _write_or_compare(path: Path, document: Mapping[str, Any], name: str) -> None:
    if path.exists():
        require_same(read_json(path), document, (name, "what is asked for"), REMEDY)
    else:
        write_atomic(path, canonical_json(document))


def _prepare(root: Path, plan: StorePlan, growth: int) -> None:
    """Make folders and array documents."""
    log = ledger.record_path(root, growth, "").parent
    log.mkdir(parents=True, exist_ok=True)
    documents = {"": layout.GROUP_DOCUMENT, **{a.name: layout.array_document(plan, a) for a in plan.arrays}}
    for name, document in documents.items():
        (root / name).mkdir(exist_ok=True)
        file = root / name / "zarr.json"
        data = canonical_json(document)
        if not file.exists() or file.read_bytes() != data:
            write_atomic(file, data)
    for folder in (log.parent, root / ledger.FOLDER, root, root.absolute().parent):
        sync_directory(folder)


def _name(part: Part) -> str:
    return Record(part.view, part.number, ()).name
