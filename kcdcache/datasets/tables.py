"""Images in parquet files as the Hugging Face hub lays them out: splits, columns, rows, and classes by name."""

import io
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int64
from PIL import Image

from kcdcache.datasets.images import EncodedImages, Origins, Split
from kcdcache.datasets.spec import DataSpec
from kcdcache.errors import (
    CorruptionError,
    KcdcacheError,
    MismatchError,
    NotFoundError,
    SettingsError,
    UnsafeError,
    nearest,
    spelled,
)
from kcdcache.files.records import parse_json

logger = logging.getLogger(__name__)

ALIASES = (
    ("train", "training"),
    ("test", "testing", "eval", "evaluation"),
    ("validation", "valid", "val", "dev"),
)
"""names of the usual splits; those of a line are the same split"""
_KNOWN = [name for names in ALIASES for name in names]
OPTIONS: Mapping[str, Sequence[str]] = {"train_split": ALIASES[0], "test_split": _KNOWN[2:]}
"""option that names a split -> the splits that are looked for without it, in order"""
_KNOWN_STEM = re.compile(rf"({'|'.join(sorted(_KNOWN, reverse=True))})(?=$|[-. ]|_\d)", re.IGNORECASE)
_STEM = re.compile(r"\w+(?:\.\w+)*")
_SHARD = re.compile(r"-(\d+)-of-(\d+)\b")
_HIDDEN = (".", "_")
"""first letters of names that are no data: caches of the hub, records of Spark"""
_CHANNELS = (1, 3, 4)
_IMAGES = ("a struct with `bytes`, encoded bytes", "rows of pixels (nested lists of integers)")


def load(spec: DataSpec) -> tuple[Split, Split, tuple[str, ...] | None]:
    """Return the training and test split of a parquet spec, and the class names if there are any.

    Raises:
        NotFoundError: the folder or a split is missing; lists what is there.
        SettingsError: a column is unknown or not the only one of its kind; lists them.
        MismatchError: files do not belong together, or a split has no labels.
        CorruptionError: a file is damaged.
    """
    splits = _splits(spec)
    train, test = (_files(splits, option, spec) for option in OPTIONS)
    if train == test:
        logger.warning("the test split of '%s' is its training split: accuracies are of images trained on", spec.path)
    schema = _opened(train[0]).schema_arrow
    image, label = _image_column(schema, spec, train[0]), _label_column(schema, spec)
    parts = [[_part(file, label, files[0]) for file in files] for files in (train, test)]
    if spec.column is None and label not in _sure_labels(schema, spec):
        _require_no_numbering(parts[0], label, spec)
    classes, source = _classes(*parts)
    _say_unnamed([*parts[0], *parts[1]], source)
    labels = [np.concatenate([_mapped(part, classes, source) for part in some]) for some in parts]
    for option, numbers in zip(OPTIONS, labels, strict=True):
        if len(numbers) and numbers.max() < 0:
            told = f"the split of images for {option} has no labels: all are null or -1"
            raise MismatchError(f"{told}; {_listed(splits, spec, option)}")
    images = (_split(files, image, numbers) for files, numbers in zip((train, test), labels, strict=True))
    return next(images), next(images), classes


# ---- files


def _splits(spec: DataSpec) -> dict[str, list[Path]]:
    """Return the files of each split of the set in a folder; raises SettingsError if it holds several sets."""
    folder, sets = spec.path, dict[str, dict[str, list[Path]]]()
    if not folder.is_dir():
        what = "is a file; give the folder that holds it" if folder.exists() else "does not exist"
        raise NotFoundError(f"{folder} {what}: write parquet:DIR, a folder of parquet files")
    for file in _tables(folder):
        name, split = _place(file.relative_to(folder))
        sets.setdefault(name, {}).setdefault(split, []).append(file)
    if not sets:
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
        raise NotFoundError(f"no split 'train' in {folder}: no *.parquet there or in folders below; it holds {held}")
    own = [name for name, splits in sets.items() if _chosen(splits, "train_split", spec)]
    if len(own) > 1 and "" not in own:
        raise SettingsError(
            f"{folder} holds several sets: {', '.join(own[:10])}; choose one: write parquet:{spec.location}/{own[0]}"
        )
    if not own and len(sets) > 1:
        return {f"{name}/{split}".strip("/"): files for name, splits in sets.items() for split, files in splits.items()}
    return sets["" if "" in own else (own or [*sets])[0]]


def _files(splits: Mapping[str, list[Path]], option: str, spec: DataSpec) -> list[Path]:
    """Return the files of the split that an option of the spec names."""
    name = _chosen(splits, option, spec)
    if name is None:
        asked = getattr(spec.options, option)
        hint = f" ({nearest(asked, splits)})" if asked else ""
        told = f"no split '{asked or OPTIONS[option][0]}' in {spec.path}{hint}"
        raise NotFoundError(f"{told}; {_listed(splits, spec, option)}")
    _require_whole(name, splits[name])
    return splits[name]


def _tables(folder: Path) -> list[Path]:
    """Return all parquet files below a folder in order, except hidden ones; a linked folder is looked into once."""
    seen, found = set[str](), list[Path]()
    for root, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(_HIDDEN))
        found += (Path(root, name) for name in names if name.endswith(".parquet") and not name.startswith(_HIDDEN))
    return sorted(found)


def _place(file: Path) -> tuple[str, str]:
    """Return the set and the split of a file, by its path.

    >>> _place(Path("data/train-00000-of-00002.parquet")), _place(Path("default/train/0000.parquet"))
    (('data', 'train'), ('default', 'train'))
    """
    folders, parent = file.parts[:-1], file.parent.name
    usual, own = _KNOWN_STEM.match(file.stem), _STEM.match(file.stem)
    split = usual[1] if usual else own[0] if own else file.stem
    in_folder = _alike(parent, split) or (not usual and (parent.lower() in _KNOWN or split[0].isdigit()))
    if parent and in_folder:
        return "/".join(folders[:-1]), parent
    return "/".join(folders), split


def _alike(first: str, second: str) -> bool:
    return any(first.lower() in names and second.lower() in names for names in ALIASES) or first == second


def _chosen(splits: Mapping[str, Any], option: str, spec: DataSpec) -> str | None:
    """Return the split that an option names, under this or another usual name, else the first of the usual ones."""
    asked = getattr(spec.options, option)
    wanted = [asked, *(name for name in _KNOWN if _alike(name, asked))] if asked else OPTIONS[option]
    return next((split for name in wanted for split in splits if split.lower() == name.lower()), None)


def _require_whole(split: str, files: Sequence[Path]) -> None:
    """Raise MismatchError for files `I-of-N` of several versions of a split; say which are missing."""
    shards = [(file, int(mark[1]), int(mark[2])) for file in files if (mark := _SHARD.search(file.name))]
    others = [file for file in files if shards and not _SHARD.search(file.name)]
    others += [file for (_, number, of), (file, *rest) in pairwise(shards) if rest[1] != of or rest[0] == number]
    if others:
        raise MismatchError(
            f"{shards[0][0]} and {others[0]} are of two versions of the split '{split}'; keep the files of one"
        )
    if shards and (missing := sorted(set(range(shards[0][2])) - {number for _, number, _ in shards})):
        numbers = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        told = "split '%s' in %s has %d of %d files: number %s left out, as they are not there"
        logger.warning(told, split, files[0].parent, len(shards), shards[0][2], numbers)


def _listed(splits: Mapping[str, Sequence[Path]], spec: DataSpec, option: str) -> str:
    found = ", ".join(f"{split} ({len(files)} files)" for split, files in sorted(splits.items())[:20])
    return f"there are {found}; choose one: write {_spelt(spec)}?{option}=SPLIT"


def _spelt(spec: DataSpec) -> str:
    return f"parquet:{spec.location}{f'#{spec.column}' if spec.column else ''}"


def _opened(file: Path) -> pq.ParquetFile:
    if not file.is_file():
        raise UnsafeError(f"{file} is a pipe, a device or a folder, expected a plain file; it is not read")
    try:
        opened = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise _trouble(error, f"{file} is not a readable parquet file", file) from None
    names = opened.schema_arrow.names
    if twice := [name for name in names if names.count(name) > 1]:
        raise MismatchError(f"{file} has two columns named '{twice[0]}'; rename one")
    return opened


def _read(opened: pq.ParquetFile, file: Path, column: str, group: int | None = None) -> pa.ChunkedArray:
    """Return a column of a file, or of one row group."""
    groups = range(opened.num_row_groups) if group is None else [group]
    try:
        table = opened.read_row_groups([*groups], columns=[column])
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        what = f"{file}" if group is None else f"row group {group} of {file}"
        raise _trouble(error, f"{what} cannot be read", file) from None
    return table[0]


def _trouble(error: Exception, told: str, file: Path) -> KcdcacheError:
    """Return what an error means: the system's, too little memory, or damage."""
    if number := getattr(error, "errno", None):
        return KcdcacheError(f"{file} cannot be read ({os.strerror(number)}); check its permissions or its disk")
    if isinstance(error, MemoryError):
        return UnsafeError(f"{file} asks for more memory than there is: {error}; it is not read")
    return CorruptionError(f"{told}: {error}")


# ---- columns


def _image_rank(kind: pa.DataType) -> int:
    """Return how likely a column of a type holds images, from 1 down; 0 if it cannot."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return 1
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return 2
    depth = 0
    while _is_list(kind):
        kind, depth = kind.value_type, depth + 1
    return 3 if depth in (2, 3) and pa.types.is_integer(kind) else 0


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _image_column(schema: pa.Schema, spec: DataSpec, file: Path) -> str:
    ranks = {field.name: rank for field in schema if (rank := _image_rank(field.type))}
    asked, found = spec.options.image, [name for name, rank in ranks.items() if rank == min(ranks.values())]
    marked = [name for name in found if _features(schema, file).get(name, {}).get("_type") == "Image"]
    if asked in ranks or (len(found) == 1 and asked is None):
        return str(asked or found[0])
    if asked is None and len(marked) == 1:
        return str(marked[0])
    listed = f"{', '.join(ranks) or 'none'} (of {_fields(schema)})"
    told = f"'{asked}' is none of them" if asked else "choose one" if ranks else f"images are {' or '.join(_IMAGES)}"
    raise SettingsError(f"image columns of {file}: {listed}; {told}: write {_spelt(spec)}?image=COLUMN")


def _label_columns(schema: pa.Schema, integer: bool = False) -> list[str]:
    """Return the columns that may be labels, or of these only the integers."""
    found = {field.name: _values_of(field.type) for field in schema}
    numbers = [name for name, kind in found.items() if pa.types.is_integer(kind) or pa.types.is_boolean(kind)]
    return numbers if integer else [name for name, kind in found.items() if name in numbers or _is_text(kind)]


def _values_of(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _sure_labels(schema: pa.Schema, spec: DataSpec) -> list[str]:
    """Return the columns that are labels by the hub's metadata or by name, or the only integers."""
    features, integers = _features(schema, spec.path), _label_columns(schema, integer=True)
    marked = [name for name in integers if features.get(name, {}).get("_type") == "ClassLabel"]
    named = [name for name in integers if name.lower() == "label"]
    texts = [name for name in _label_columns(schema) if name.lower() == "label" and not integers]
    return marked or named or texts or (integers if _label_columns(schema) == integers else [])


def _label_column(schema: pa.Schema, spec: DataSpec) -> str:
    """Return the asked column, else the only one that is surely of labels, of integers, or of texts."""
    known = _label_columns(schema)
    if spec.column in known:
        return str(spec.column)
    usual = _sure_labels(schema, spec) or _label_columns(schema, integer=True) or known
    if spec.column is None and len(usual) == 1:
        return usual[0]
    listed = ", ".join(known) or f"none (of {_fields(schema)})"
    found = f"'{spec.column}' is none of them" if spec.column else "choose one"
    raise SettingsError(f"label columns of {spec.path}: {listed}; {found}: write parquet:{spec.location}#COLUMN")


def _fields(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type!s:.60})" for field in schema)


def _features(schema: pa.Schema, file: Path) -> dict[str, Any]:
    """Return what the hub's metadata say of each column."""
    found = parse_json((schema.metadata or {}).get(b"huggingface", b"{}"), f"the metadata 'huggingface' of {file}")
    for key in ("info", "features"):
        found = found.get(key) if isinstance(found, dict) else None
    return {key: value for key, value in found.items() if isinstance(value, dict)} if isinstance(found, dict) else {}


# ---- labels


class _Part(NamedTuple):
    """Labels of one file: numbers, in its own list of names if it has one."""

    file: Path
    numbers: Int64[np.ndarray, " rows"]
    names: tuple[str, ...] | None
    text: bool
    """whether the labels are texts, of which `names` are the sorted ones"""


def _part(file: Path, label: str, first: Path) -> _Part:
    opened = _opened(file)
    schema = opened.schema_arrow
    if label not in _label_columns(schema):
        raise MismatchError(
            f"{file} lacks the column {label} that the first file has; it holds {_fields(schema)}; "
            "choose another split (?test_split=SPLIT), or write labels there"
        )
    column = _read(opened, file, label)
    column = column.cast(_values_of(column.type), safe=False).combine_chunks()
    if _is_text(column.type):
        names = sorted(value for value in column.unique().to_pylist() if value is not None)
        found = pc.index_in(column, pa.array(names, column.type))
        return _Part(file, found.cast(pa.int64()).fill_null(-1).to_numpy(), tuple(names), True)
    listed = _features(schema, file).get(label, {}).get("names")
    if isinstance(listed, dict):  # {"0": "ant", "1": "bee"}
        listed = [listed[key] for key in sorted(listed, key=lambda key: (len(key), key))]
    own = tuple(map(str, listed)) if isinstance(listed, list) and listed else None
    return _Part(file, column.cast(pa.int64(), safe=False).fill_null(-1).to_numpy(), own, False)


def _require_no_numbering(parts: Sequence[_Part], label: str, spec: DataSpec) -> None:
    numbers = np.concatenate([part.numbers for part in parts])
    if len(numbers) > 2 and len(np.unique(numbers)) == len(numbers):
        raise SettingsError(
            f"the column {label} of {spec.path} differs in every row, so that it names images, not classes; "
            f"name the column of labels: write parquet:{spec.location}#COLUMN"
        )


def _classes(train: Sequence[_Part], test: Sequence[_Part]) -> tuple[tuple[str, ...] | None, _Part]:
    """Return the class names, None for bare numbers, and the part that they are from.

    They are those that the first file lists; of texts, all in the training split, sorted.
    """
    listed = [part for part in (*train, *test) if part.names is not None and not part.text]
    texts = [part for part in train if part.text]
    if listed and (not texts or any(listed[0] is part for part in train)):
        return listed[0].names, listed[0]
    if not texts:
        return None, train[0]
    names = sorted({name for part in texts for name in part.names or ()})
    require_distinct(names, f"the labels of the training split, {texts[0].file} and others,")
    return tuple(names), texts[0]


def _say_unnamed(parts: Sequence[_Part], source: _Part) -> None:
    unnamed = [part.file for part in parts if part.names is None]
    if unnamed and source.names is not None and not source.text:
        told = "%d files name no classes (%s); their labels are taken as numbers in the list of %s"
        logger.warning(told, len(unnamed), unnamed[0], source.file)


def _mapped(part: _Part, classes: tuple[str, ...] | None, source: _Part) -> Int64[np.ndarray, " rows"]:
    """Return the labels of a file as numbers in `classes`, by name; `source` is where these are from.

    Raises MismatchError, naming both files, for a label that they lack.
    """
    names, numbers = part.names, part.numbers
    if names == classes or names == () or (names is None and not source.text):
        return numbers
    if names is None or classes is None:
        what = ("bare numbers", "names") if names is None else ("names", "bare numbers")
        raise MismatchError(f"labels in {part.file} are {what[0]}, in {source.file} {what[1]}; write both in one form")
    require_distinct(classes, f"the classes of {source.file}")
    own = np.array(numbered(names, classes))
    found = np.where(numbers < 0, -1, own[np.clip(numbers, 0, len(names) - 1)])
    for row in np.flatnonzero((numbers >= len(names)) | ((numbers >= 0) & (found < 0)))[:1].tolist():
        number = int(numbers[row])
        label = spelled(names[number]) if number < len(names) else f"{number} (of {len(names)} classes)"
        raise MismatchError(
            f"{part.file} row {row} has the label {label}, which the classes of {source.file} lack: "
            f"{', '.join(map(spelled, classes[:10]))}{', ...' if len(classes) > 10 else ''}; write both with one list"
        )
    return found


def numbered(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Return the number of each name among classes, -1 if it is none; composed and decomposed letters are the same.

    >>> numbered(["b", "cafe\u0301", "c"], ["caf\u00e9", "b"])
    [1, 0, -1]
    """
    exact = {name: number for number, name in enumerate(classes)}
    composed = {unicodedata.normalize("NFC", name): number for number, name in enumerate(classes)}
    return [exact.get(name, composed.get(unicodedata.normalize("NFC", name), -1)) for name in names]


def require_distinct(names: Sequence[str], where: str) -> None:
    """Raise MismatchError for two names that are equal, or differ only in how their letters are composed."""
    seen = dict[str, int]()
    for number, name in enumerate(names):
        other = seen.setdefault(unicodedata.normalize("NFC", name), number)
        if other != number:
            both = f"{spelled(names[other])} and {spelled(name)}"
            raise MismatchError(f"{where} hold two names that look alike, {both}; rename or join them")


# ---- images


class Group(NamedTuple):
    """A row group of a parquet file."""

    file: Path
    number: int
    start: int
    """position of its first row in the split"""


@dataclass(frozen=True, eq=False)
class ParquetImages(EncodedImages):
    """An image column of parquet files; `taken` reads the row groups that hold the rows, which must ascend."""

    column: str = field(kw_only=True)
    groups: tuple[Group, ...] = field(kw_only=True)

    def taken(self, rows: Int64[np.ndarray, " kept"]) -> EncodedImages:
        """Return the images of the given rows, read now."""
        payloads: list[bytes | None] = []
        bounds = np.searchsorted(rows, [group.start for group in self.groups] + [np.iinfo(np.int64).max]).tolist()
        for group, low, high in zip(self.groups, bounds, bounds[1:], strict=False):
            if low < high:
                payloads += _payloads(group, self.column, rows[low:high] - group.start, self.place)
        return EncodedImages(payloads, self.origins and self.origins.taken(rows))


def _split(files: Sequence[Path], image: str, labels: Int64[np.ndarray, " n"]) -> Split:
    """Return the images of files with their labels; the images are not read yet."""
    groups, starts, count = list[Group](), list[int](), 0
    for file in files:
        metadata = _opened(file).metadata
        starts.append(count)
        for number in range(metadata.num_row_groups):
            groups.append(Group(file, number, count))
            count += metadata.row_group(number).num_rows
    if count != len(labels):
        raise CorruptionError(f"{files[0].parent} changed while it was read; run the command again")
    origins = Origins(tuple(map(str, files)), tuple(starts))
    return Split(labels, ParquetImages((), origins, column=image, groups=tuple(groups)))


def _payloads(
    group: Group, image: str, rows: Int64[np.ndarray, " kept"], place: Callable[[int], str]
) -> Iterator[bytes | None]:
    """Yield some images of a row group, encoded."""
    opened = _opened(group.file)
    schema = opened.schema_arrow
    rank = _image_rank(schema.field(image).type) if image in schema.names else 0
    if rank == 0:
        raise MismatchError(f"{group.file} lacks the image column {image} of the first; it holds {_fields(schema)}")
    column, start = _read(opened, group.file, f"{image}.bytes" if rank == 1 else image, group.number), 0
    for chunk in column.chunks:
        own = rows[(rows >= start) & (rows < start + len(chunk))]
        found = chunk.take(own - start)
        if rank == 3:
            yield from _bitmaps(found, [place(group.start + row) for row in own.tolist()])
        else:
            yield from (value["bytes"] if isinstance(value, dict) else value for value in found.to_pylist())
        start += len(chunk)


def _bitmaps(column: pa.Array, places: Sequence[str]) -> Iterator[bytes | None]:
    """Yield images that are nested lists as BMP files, which have the same bytes everywhere."""
    offsets, values = list[np.ndarray](), column
    while _is_list(values.type):
        if pa.types.is_fixed_size_list(values.type):
            offsets.append((np.arange(len(values) + 1) + values.offset) * values.type.list_size)
        else:
            offsets.append(values.offsets.to_numpy())
        values = values.values
        if values.null_count:
            raise MismatchError(f"{places[0]} or a row near it has pixels that are null; write a number for each")
    numbers = values.to_numpy()
    for row, missing in enumerate(column.is_null().to_pylist()):
        yield None if missing else _bitmap(*_shaped(offsets, row), numbers, places[row])


def _shaped(offsets: Sequence[np.ndarray], row: int) -> tuple[tuple[int, ...], int]:
    """Return the shape of an image of nested lists, -1 for an axis of different lengths, and its first number."""
    start, stop = int(offsets[0][row]), int(offsets[0][row + 1])
    shape = [stop - start]
    for inner in offsets[1:]:
        lengths = np.unique(np.diff(inner[start : stop + 1]))
        shape.append(int(lengths[0]) if len(lengths) == 1 else -1 if len(lengths) else 0)
        start, stop = int(inner[start]), int(inner[stop])
    return tuple(shape), start


def _bitmap(shape: tuple[int, ...], start: int, numbers: np.ndarray, place: str) -> bytes:
    if min(shape) < 1 or (len(shape) == 3 and shape[2] not in _CHANNELS):
        raise MismatchError(
            f"{place} is a list of {' x '.join(str(size) if size >= 0 else '(unequal)' for size in shape)} numbers, "
            "expected height x width, or height x width x channels with 1, 3 or 4 channels; write it with this order "
            "of axes (numpy: image.transpose(1, 2, 0))"
        )
    found = numbers[start : start + int(np.prod(shape))].reshape(*shape[:2], -1)
    if found.min() < 0 or found.max() > 255:
        raise MismatchError(f"{place} has pixels from {found.min()} to {found.max()}, expected 0 to 255; rescale them")
    stream = io.BytesIO()
    pixels = np.repeat(found, 3, axis=2) if found.shape[2] == 1 else found[..., :3]
    Image.fromarray(np.ascontiguousarray(pixels, np.uint8)).save(stream, "BMP")
    return stream.getvalue()
