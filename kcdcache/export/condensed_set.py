"""Exported condensed sets: opening one for training, its images, and finding damage."""

from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt8

from kcdcache.condensation import manifest
from kcdcache.condensation.manifest import Manifest
from kcdcache.datasets import datasets, images
from kcdcache.errors import CorruptionError, MismatchError, SettingsError, UnsafeError, attempt, require_same
from kcdcache.export import record as records
from kcdcache.export.record import MANIFEST, MIXES, SAMPLES, SEALS, SPLITS, STORE, Baked, Images, Record, require_file
from kcdcache.methods.run_loss import Weights
from kcdcache.settings import TrainSettings
from kcdcache.store import check, log, reader
from kcdcache.store.identity import read_store_identity
from kcdcache.store.log import Commit


@dataclass(frozen=True, eq=False)
class PartialImages(images.EncodedImages):
    """Images of some positions only; reading another position raises MismatchError."""

    held: images.DecodedImages | images.EncodedImages = field(kw_only=True)
    row: Int64[np.ndarray, " n"] = field(kw_only=True)
    """position -> row in `held`, -1 if it has no image"""

    def __len__(self) -> int:
        return len(self.row)

    def taken(self, rows: Int64[np.ndarray, " kept"]) -> "PartialImages":
        """Return the images of some positions."""
        return replace(self, row=self.row[rows])

    def images(
        self, index: Int64[np.ndarray, " batch"], check: images.Check | None = None, threads: int | None = None
    ) -> UInt8[np.ndarray, "batch height width channels"] | images.ImageList:
        """Return the images at some positions: an array if they have one size, else a list."""
        rows = self._rows(index)
        if isinstance(self.held, images.DecodedImages):
            return self.held.images(rows)  # their digests were compared at loading
        back = dict(zip(rows.tolist(), index.tolist(), strict=True))
        return self.held.images(rows, check and (lambda row, content: check(back[row], content)), threads)

    def place(self, position: int) -> str:
        """Return the file and row of an image, for messages."""
        return self.held.place(self._row(position))

    def content(self, position: int) -> bytes:
        """Return the bytes that identify an image, as in the original data set."""
        return self.held.content(self._row(position))

    def decoded(self, position: int, content: bytes) -> UInt8[np.ndarray, "_ _ channels"]:
        """Return an image from its content."""
        row = self._row(position)
        return self.held.pixels[row] if isinstance(self.held, images.DecodedImages) else self.held.decoded(row, content)

    def _row(self, position: int) -> int:
        return int(self._rows(np.array([position]))[0])

    def _rows(self, index: Int64[np.ndarray, " some"]) -> Int64[np.ndarray, " some"]:
        rows = self.row[index]
        if len(missing := index[rows < 0]):
            raise MismatchError(
                f"sample {missing[0]} is not among the {int((self.row >= 0).sum())} of {len(self)} images that the "
                "exported set holds: it is only for `kcdcache train --condensed` with the same set; otherwise give "
                "the whole data set"
            )
        return rows


def load_images(path: Path) -> datasets.Loaded:
    """Load the splits of a set that was exported with images, and check every image against its digest.

    Labels and digests are those of the whole training split.

    Raises:
        MismatchError: the set was exported without images.
        CorruptionError: a file differs from the export.
    """
    record = records.read(path)
    kinds, data = record.content.images, record.content.knowledge.data
    if kinds is None:
        raise MismatchError(f"{path} was exported without images: give the data set it was made from as --data")
    samples, file = records.read_samples(record), path / SPLITS["train"]
    some, index = _split(record, kinds, "train")
    if index[0] < 0 or index[-1] >= data.count or np.any(np.diff(index) <= 0):
        raise CorruptionError(f"{file}: its index should ascend in 0..{data.count - 1}")
    if not np.array_equal(some.labels, samples.label[index]):
        raise CorruptionError(f"{file} has other labels than {SAMPLES}")
    if isinstance(some.source, images.DecodedImages) and some.image_size != data.image_size:
        raise CorruptionError(f"{path} holds images of {some.image_size} pixels, its record says {data.image_size}")
    if len(wrong := np.flatnonzero(some.digests() != samples.digest[index])):  # damaged or forged
        place = some.source.place(int(wrong[0]))
        raise CorruptionError(f"{place} in {path} is not the image that the teacher saw; export it again")
    row = np.full(data.count, -1)
    row[index] = np.arange(len(index))
    train = images.Split(samples.label, PartialImages((), image_size=data.image_size, held=some.source, row=row))
    train.expect(samples.digest, f"in the exported set {path}")
    test, _ = _split(record, kinds, "test")
    if test.digest() != kinds.test_digest:
        raise CorruptionError(f"{path / SPLITS['test']} is not the test split that was exported")
    return datasets.Loaded(train, test, data.classes, images.Statistics(kinds.mean, kinds.std))


def _split(record: Record, kinds: Images, name: str) -> tuple[images.Split, Int64[np.ndarray, " n"]]:
    """Return the images and labels of a split's file, and their positions in the whole split."""
    require_file(record, SPLITS[name])
    path, payloads = record.path / SPLITS[name], list[bytes]()
    try:
        with pq.ParquetFile(path) as opened:
            for group in range(opened.num_row_groups):
                table = opened.read_row_group(group, columns=["image.bytes"])
                payloads += [(row or {}).get("bytes") or b"" for row in table["image"].to_pylist()]
            numbers = opened.read(columns=["label", "index"])
        labels, index = (
            np.array(numbers[column].cast(pa.int64()).fill_null(-1).to_numpy()) for column in ("label", "index")
        )
    except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
        raise CorruptionError(f"{path} is not a readable parquet file of images: {error}") from None
    classes = len(record.content.knowledge.data.classes)
    if not len(payloads) == len(labels) == len(index) > 0 or labels.min() < 0 or labels.max() >= classes:
        raise CorruptionError(f"{path} should hold an image, a label in 0..{classes - 1} and an index in every row")
    origins = images.Origins((str(path),))
    if getattr(kinds, name) == "files":
        return images.Split(labels, images.EncodedImages(payloads, origins)), index
    return images.Split(labels, _decoded(payloads, origins, len(kinds.mean))), index


def _decoded(payloads: list[bytes], origins: images.Origins, channels: int) -> images.DecodedImages:
    first = images.rgb(payloads[0], origins.place(0))
    if (needed := len(payloads) * first.size) > images.DECODED_BYTES:
        most = f"at most {images.DECODED_BYTES:,} are allowed"
        raise UnsafeError(f"{origins.files[0]} would take {needed:,} bytes decoded, {most}")
    pixels = np.empty((len(payloads), *first.shape[:2], channels), np.uint8)
    for number, payload in enumerate(payloads):
        image = images.rgb(payload, origins.place(number))
        if image.shape != first.shape:
            raise CorruptionError(f"{origins.place(number)} has another size than the image before it")
        pixels[number] = image[..., :channels]
    return images.DecodedImages(pixels, origins)


@dataclass(frozen=True, kw_only=True)
class Condensed:
    """An opened exported set."""

    record: Record
    manifest: Manifest
    knowledge: reader.Store
    """an excerpt, indexed as the whole data set"""
    mixes: Path | None


def open(path: Path | str) -> Condensed:
    """Open an exported set and check its records, manifest and samples; chunks are checked when they are read.

    Raises:
        NotFoundError, UnfinishedError: there is no exported set, or its export was interrupted.
        CorruptionError, UnsafeError: a file differs from the export.
        MismatchError: it has a newer format, or its parts do not belong together.
    """
    record = records.read(Path(path))
    content, samples, chosen = record.content, records.read_samples(record), _manifest(record)
    blank = np.zeros(len(samples.row), np.bool_)
    blank[chosen.index[chosen.mixed]] = content.baked is not None
    commits, excerpt = _commits(record), reader.Excerpt(*samples, blank, content.skipped)
    knowledge = reader.Store(record.path / STORE, content.knowledge, commits, excerpt)
    for name in records.OPTIONAL:
        if name in content.files:
            require_file(record, name)
        elif (record.path / name).exists():
            raise CorruptionError(f"{record.path / name} was not exported with the rest; delete it")
    reader.check(knowledge)
    _require_held(knowledge, chosen, content.baked is not None)
    if content.baked is not None:
        _require_mixes(record, content.baked, chosen)
    mixes = record.path / MIXES if content.baked else None
    return Condensed(record=record, manifest=chosen, knowledge=knowledge, mixes=mixes)


def require_served(opened: Condensed, settings: TrainSettings, weights: Weights) -> None:
    """Raise SettingsError unless a run can learn from the baked targets of an exported set.

    It must have their temperature and mix, one stage, and a method that reads softened outputs only.
    """
    baked = opened.record.content.baked
    assert baked is not None
    if weights.alpha == 0 and not weights.terms:
        return  # the method does not use the teacher
    asked = {
        "temperature": (weights.temperature, baked.temperature),
        "mix-target": (settings.mix_target, baked.target),
        "mix": (settings.mix, baked.mix),
        "stages": (settings.stages, 1),
    }
    for name, (wanted, made) in asked.items():
        if wanted != made:
            raise SettingsError(
                f"the targets in {opened.record.path} are baked for --{name} {made}, the run asks for {wanted}; give "
                f"--{name} {made}, or a set exported without --bake, which fits any"
            )
    if weights.terms:
        raise SettingsError(
            f"the targets in {opened.record.path} are baked: they serve methods that read softened outputs alone (kd), "
            f"'{settings.method}' reads more; use a set exported without --bake"
        )


def problems(path: Path, share: float = 1.0, seed: int = 0) -> list[str]:
    """Return everything that is wrong with an exported set, reading every file and a share of its stores' chunks."""
    record, found = records.read(path), list[str]()
    found += [problem for name in record.content.files if (problem := records.problem_of(record, name))]
    for part in record.content.stores:
        verified = attempt(found.append, partial(check.verify, share=share, seed=seed), path / part)
        found += verified.problems if verified else ()
    if not found:
        found += attempt(found.append, _disagreements, path) or ()
    return found


def _disagreements(path: Path) -> list[str]:
    """Return where the store inside differs from the table of samples; check the images too."""
    opened = open(path)
    inside, knowledge = reader.open(opened.knowledge.path), opened.knowledge
    found = [
        f"{inside.path}: its {name} are not those in {SAMPLES}; export it again"
        for name in ("labels", "sample_digest")
        if not np.array_equal(getattr(inside, name), getattr(knowledge, name)[knowledge.held])
    ]
    if opened.record.content.images is not None and not found:
        load_images(path)
    return found


def _manifest(record: Record) -> Manifest:
    require_file(record, MANIFEST)
    path = record.path / MANIFEST
    chosen = manifest.read(path, record.content.knowledge.data.count)
    if chosen.digest != record.content.manifest:
        raise CorruptionError(f"{path} has the digest {chosen.digest}, but {record.content.manifest} was exported")
    manifest.require_knowledge(chosen, record.content.knowledge_id)
    if chosen.count != record.content.knowledge.data.count:
        raise CorruptionError(f"{path} counts {chosen.count} samples, its data {record.content.knowledge.data.count}")
    return chosen


def _commits(record: Record) -> list[Commit]:
    """Read the commits of the store inside, and check its identity and plan against the record."""
    require_file(record, SEALS[STORE])
    root = record.path / STORE
    commits = log.read_commits(root)
    subset = {"manifest": record.content.manifest, "rows": record.content.rows}
    expected = replace(record.content.knowledge, subset=subset).document()
    names = (f"the record of {record.path}", "the store in an exported set")
    require_same(expected, read_store_identity(root).document(), names, "export it again")
    if len(commits) != 1 or commits[0].plan != record.content.layout:
        raise CorruptionError(f"{root} has another plan than its record says; export it again")
    return commits


def _require_held(knowledge: reader.Store, chosen: Manifest, baked: bool) -> None:
    """Raise CorruptionError unless the store has the rows of `samples.parquet` and those the manifest needs."""
    held, plan = knowledge.held, knowledge.plan
    if len(held) != plan.count:
        raise CorruptionError(f"{knowledge.path} has {plan.count} rows, {SAMPLES} names {len(held)}")
    needed = chosen.index[~chosen.mixed] if baked else np.union1d(chosen.index, chosen.partner[chosen.mixed])
    if len(missing := np.setdiff1d(needed, held)):
        raise CorruptionError(f"{knowledge.path} holds no row of sample {missing[0]}, which its manifest needs")
    manifest.require_usable(chosen, knowledge.skipped)


def _require_mixes(record: Record, baked: Baked, chosen: Manifest) -> None:
    require_file(record, SEALS[MIXES])
    mixes = reader.open(record.path / MIXES)
    expected = replace(record.content.knowledge, mixes=mixes_of(chosen, baked, record.content.views)).document()
    names = (f"the record of {record.path}", "its store of baked targets")
    require_same(expected, mixes.knowledge.document(), names, "export it again")
    if (mixes.count, mixes.views) != (int(chosen.mixed.sum()), record.content.views):
        raise CorruptionError(f"{mixes.path} has {mixes.count} rows in {mixes.views} views; export it again")


def mixes_of(chosen: Manifest, baked: Baked, views: int) -> dict[str, object]:
    """Return the identity of the baked targets of a manifest: manifest, mix, views and settings."""
    how = {"temperature": baked.temperature, "target": baked.target}
    return {"manifest": chosen.digest, "mix": baked.mix, "views": list(range(views)), "baked": how}


def read_data(spec: str) -> datasets.Dataset:
    """Load the data set of a spec, including `condensed:DIR`, the images of an exported set."""
    return datasets.load(spec, {"condensed": lambda parsed: load_images(parsed.path)})


@lru_cache(maxsize=4)
def load_data(spec: str) -> datasets.Dataset:
    """Return `read_data(spec)`, loaded once per process."""
    return read_data(spec)
