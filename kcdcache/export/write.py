"""The export of a condensed set: its samples' knowledge, manifest, images and dataset card in one folder."""

import io
import json
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int64
from PIL import Image

from kcdcache.condense import manifest
from kcdcache.condense.manifest import Manifest
from kcdcache.data.datasets import Dataset
from kcdcache.data.images import DECODED_BYTES, DecodedImages, Split
from kcdcache.environment import LIBRARIES
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.export import condensed_set, record
from kcdcache.export.condensed_set import PartialImages
from kcdcache.export.record import IMAGES, MANIFEST, Baked, Content, Images
from kcdcache.files import parquet
from kcdcache.files.atomic import create_exclusive, read_bytes, remove, remove_leftovers, require_no_links, write_atomic
from kcdcache.files.records import canonical_json
from kcdcache.progress import Progress, silent
from kcdcache.runs import state
from kcdcache.settings import ExportCommand
from kcdcache.store import check, encoding, identity, log, plan, reader, writer
from kcdcache.store.identity import Knowledge
from kcdcache.store.plan import CHECKSUM_BYTES, Part, StorePlan
from kcdcache.training import batches
from kcdcache.views.mixing import mix_probabilities

logger = logging.getLogger(__name__)

CARD_TEMPLATE = Path(__file__).with_name("card.md")
SIZES = (10**3, 10**4, 10**5, 10**6, 10**7)
"""ends of the size categories of the Hugging Face hub"""
Rows = dict[str, np.ndarray]
MODES = {1: "L", 3: "RGB"}
"""channels -> what Pillow calls such images"""
GROUP_ROWS = 1000
"""images a row group"""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What will be written, decided before anything is."""

    command: ExportCommand
    source: reader.Store
    chosen: Manifest
    needed: Int64[np.ndarray, " needed"]
    """samples whose images training looks at: kept ones and partners"""
    held: Int64[np.ndarray, " rows"]
    """samples whose own outputs it holds"""
    store: StorePlan
    baked: Baked | None
    mixes: StorePlan | None
    """plan of the baked targets"""
    data: Dataset | None


def run(command: ExportCommand, progress: Progress = silent, dry_run: bool = False) -> dict[str, Any]:
    """Write a condensed set with the knowledge it needs into one folder; return rows and bytes against the full store.

    The record condensed.json is written last: before it, nothing accepts the folder, and the same command goes on and
    ends in the same bytes. A finished export is left as it is.

    Raises:
        MismatchError: set, store and data were not made for each other.
        SettingsError: settings contradict each other, or the folder holds something else.
    """
    plan = _planned(command)
    figures = _figures(plan)
    _tell_spared(plan, figures)
    if dry_run:
        return {"would": "export", **figures, "out": str(command.out)}
    if (found := _finished(plan)) is not None:
        logger.info("export: %s is finished already", command.out)
        sizes = _written(command.out)
        return {"kind": "condensed", "id": found.id, **figures, **sizes, "out": str(command.out), "already": True}
    _require_place(plan)
    made = _write(plan, progress)
    return {"kind": "condensed", "id": made, **figures, **_written(command.out), "out": str(command.out)}


def card(
    content: Content, knowledge: Knowledge, summary: Mapping[str, Any], command: str, corruption: Mapping[str, Any]
) -> bytes:
    """Return README.md, with the front matter the Hugging Face hub reads: the same bytes for the same set.

    No clock time, host or version is in it. `corruption` is what its store tells of the labels, empty for nothing.
    """
    files = [("train", MANIFEST)]
    if content.images is not None:
        files = [(split, f"{IMAGES}/{split}-*.parquet") for split in record.SPLITS]
    options = corruption.get("corruption") or {}
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False
    )  # Markdown: texts from elsewhere go through `quoted`
    environment.filters |= {"json": json.dumps, "quoted": _quoted}  # JSON texts are YAML texts
    return (
        environment.from_string(CARD_TEMPLATE.read_text(encoding="utf-8"))
        .render(
            content=content, data=knowledge.data, teacher=knowledge.teacher, views=knowledge.views, summary=summary,
            command=command, files=files, size=_size(int(summary["kept"])),
            corrupted=", ".join(f"{name} {value}" for name, value in sorted(options.items())),
            mislabelled=corruption.get("mislabelled", 0),
        )
        .encode()
    )  # fmt: skip


def _tell_spared(plan: _Plan, figures: Mapping[str, Any]) -> None:
    """Say so where the set needs the outputs on all samples, so that exporting it saves nothing."""
    if figures["rows"] < figures["rows_full"] or figures["views"] < figures["views_full"]:
        return
    logger.warning(
        "export: the set's %d kept samples and their %d partners need the outputs on all %d samples: nothing is saved. "
        "Smaller are --bake (the mixed targets instead of the partners' outputs), fewer --views, and sets condensed "
        "with a smaller --keep or --k0 stage_slice",
        figures["kept"], figures["partners"], figures["samples"],
    )  # fmt: skip


def _planned(command: ExportCommand) -> _Plan:
    source = reader.open(command.store)
    if not source.knowledge.whole:
        raise MismatchError(f"{source.path} does not hold the samples of a whole data set; export from the full store")
    path = command.manifest
    of_run = path.is_dir() and not parquet.is_folder(path)
    chosen = manifest.read(state.condensed_set(path) if of_run else path, source.count)
    manifest.require_knowledge(chosen, source.knowledge_id)
    manifest.require_usable(chosen, source.skipped)
    baked = _baked(command, chosen, source)
    needed = batches.needed_rows(chosen)
    # a store has at least one row, also where all targets are baked
    held = needed if baked is None else (chosen.index[~chosen.mixed] if not chosen.mixed.all() else needed[:1])
    views = source.views if command.views is None else command.views
    if views > source.views:
        raise SettingsError(f"--views {views}: {source.path} holds {source.views} views")
    data = _data(command, source)
    form = partial(plan.plan_store, compression=command.compression, batch_size=source.plan.batch_size)
    forms = list(source.plan.fields.values()) if baked is None else [source.plan.fields["logits"]]
    mixed = None if baked is None else form(int(chosen.mixed.sum()), views, [source.plan.fields["logits"]])
    return _Plan(
        command=command, source=source, chosen=chosen, needed=needed, held=held, baked=baked, data=data, mixes=mixed,
        store=form(len(held), views, forms),
    )  # fmt: skip


def _baked(command: ExportCommand, chosen: Manifest, source: reader.Store) -> Baked | None:
    if not command.bake:
        if command.temperature is not None:
            raise SettingsError("--temperature does nothing without --bake: any temperature can be applied later")
        return None
    if command.temperature is None:
        raise SettingsError("--bake needs --temperature: the distillation temperature the set will serve")
    if not chosen.mixed.any():
        raise SettingsError("--bake: the set has no mixed points (K_Aug is empty), there is nothing to bake")
    if "logits" not in source.fields:
        raise MismatchError(f"--bake mixes softened logits, {source.path} holds {', '.join(source.fields)}")
    if (form := source.plan.fields["logits"].name) not in ("float16", "float32"):
        raise SettingsError(
            f"--bake: {source.path} keeps logits as {form}, mixed targets need whole rows and would take more "
            "than they save; export without --bake"
        )
    return Baked(temperature=command.temperature, target=command.mix_target, mix=command.mix)


def _data(command: ExportCommand, source: reader.Store) -> Dataset | None:
    if command.data is None:
        if command.with_images:
            raise SettingsError("--with-images needs --data: the data set whose images are exported")
        return None
    data = condensed_set.load_data(command.data)
    check.check_data(source, data)
    if command.with_images:
        for split in (data.train, data.test):
            _require_exportable(split)
    return data


def _require_exportable(split: Split) -> None:
    found = split.source
    if isinstance(found, PartialImages):
        raise SettingsError("--with-images needs the whole data set, not the images of an exported one")
    if isinstance(found, DecodedImages):
        if (channels := found.pixels.shape[3]) not in MODES:
            raise SettingsError(f"--with-images writes PNG of 1 or 3 channels, these images have {channels}")
        if found.pixels.nbytes > DECODED_BYTES:
            raise SettingsError(
                f"--with-images takes images of up to {DECODED_BYTES:,} bytes, found {found.pixels.nbytes:,}"
            )


def _figures(plan: _Plan) -> dict[str, Any]:
    """Return rows and bytes of knowledge against the full store's."""
    plans = [plan.store] if plan.mixes is None else [plan.store, plan.mixes]
    rows, views = sum(each.count for each in plans), plan.store.views
    size = sum(each.bytes + CHECKSUM_BYTES * each.chunk_count for each in plans)  # before compression
    full, held = plan.source.plan, log.stored_bytes(plan.source.path)
    return {
        "samples": plan.source.count,
        "kept": len(plan.chosen),
        "partners": int(plan.chosen.mixed.sum()),
        "rows": rows,
        "rows_full": full.count,
        "views": views,
        "views_full": full.views,
        "points": rows * views,
        "points_full": full.count * full.views,
        "bytes": size,
        "bytes_full": held,
        "images": len(plan.needed) if plan.command.with_images else 0,
    }


def _written(out: Path) -> dict[str, int]:
    """Return the bytes of an export's knowledge as it was written, and of everything in the folder."""
    inside = [out / part for part in (record.STORE, record.MIXES) if (out / part).exists()]
    everything = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {"bytes": sum(log.stored_bytes(part) for part in inside), "bytes_on_disk": everything}


def _finished(plan: _Plan) -> record.Record | None:
    """Return the record of this export if it was made before.

    Raises:
        SettingsError: another one was made there.
    """
    out = plan.command.out
    if not (out / record.RECORD).exists():
        return None
    found = record.read(out)
    held, asked = ({key: getattr(side, key) for key in _ASKED} for side in (found.content, _content(plan, None, {})))
    held["images"], asked["images"] = found.content.images is not None, plan.command.with_images
    if other := [key for key in held if held[key] != asked[key]]:
        raise SettingsError(f"{out} holds another export, with a different {other[0]}; exports are never overwritten")
    return found


_ASKED = ("knowledge_id", "manifest", "rows", "views", "layout", "baked", "licence")


def _require_place(plan: _Plan) -> None:
    """Refuse a folder that holds anything but what a killed export of this kind left."""
    out, own = plan.command.out, {record.CARD, record.MANIFEST, record.SAMPLES, record.STORE}
    own |= {record.MIXES} if plan.mixes else set()
    own |= {record.IMAGES} if plan.command.with_images else set()
    if out.is_file():
        raise SettingsError(f"{out} is a file; give a new folder as --out")
    if out.is_dir():
        require_no_links(out)
        remove_leftovers(out)
        if others := sorted(path.name for path in out.iterdir() if path.name not in own):
            raise SettingsError(
                f"{out} holds {others[0]}, which this export does not write; give a new folder as --out"
            )


def _write(plan: _Plan, progress: Progress) -> str:
    """Write every file, the record last; return the id."""
    out, source, chosen = plan.command.out, plan.source, plan.chosen
    out.mkdir(parents=True, exist_ok=True)
    row = np.full(source.count, -1)
    row[plan.held] = np.arange(len(plan.held))
    samples = record.Samples(source.labels, source.sample_digest, row)
    write_atomic(out / record.SAMPLES, record.encode_samples(samples))
    remove(out / record.MANIFEST)
    manifest.write(out / record.MANIFEST, chosen)
    subset = replace(source.knowledge, subset={"manifest": chosen.digest, "rows": len(plan.held)})
    fields = list(plan.store.fields)
    _fill(
        plan, record.STORE, subset, plan.store, plan.held,
        lambda part: source.load(part.view, plan.held[part.start : part.stop], fields), progress,
    )  # fmt: skip
    kept = _write_optional(plan)
    if plan.mixes is not None and plan.baked is not None:
        mixes = replace(source.knowledge, mixes=condensed_set.mixes_of(chosen, plan.baked, plan.mixes.views))
        index = chosen.index[chosen.mixed]
        _fill(plan, record.MIXES, mixes, plan.mixes, index, lambda part: _mixed(plan, part), progress)
    images = _write_images(plan) if plan.command.with_images and plan.data is not None else None
    bare = _content(plan, images, {})
    text = card(bare, source.knowledge, manifest.summary(chosen), _command(bare), identity.corruption_of(source.path))
    write_atomic(out / record.CARD, text)
    names = [record.CARD, record.MANIFEST, record.SAMPLES, record.SEALS[record.STORE], *kept]
    names += [record.SEALS[record.MIXES]] if plan.mixes else []
    names += record.SPLITS.values() if images else []
    content = _content(plan, images, {name: record.entry_of(out, name) for name in names})
    made = {"python": platform.python_version(), "versions": {name: version(name) for name in LIBRARIES}}
    return record.write(out, content, made)


def _write_optional(plan: _Plan) -> tuple[str, ...]:
    """Bring what the store tells of its origin and, if they can serve, the teacher's parameters; return the names."""
    root = plan.source.path
    served = plan.baked is None and identity.read_parameters(root, plan.source.knowledge) is not None
    for name in (found := (record.PARAMETERS,) * served + (record.ORIGIN,) * (identity.read_origin(root) is not None)):
        write_atomic(plan.command.out / name, read_bytes(root / Path(name).relative_to(record.STORE)))
    return found


def _content(plan: _Plan, images: Images | None, files: Mapping[str, tuple[int, str]]) -> Content:
    return Content(
        knowledge=plan.source.knowledge.document(),
        knowledge_id=plan.source.knowledge_id,
        manifest=plan.chosen.digest,
        rows=len(plan.held),
        views=plan.store.views,
        layout=plan.store.document(),
        skipped=plan.source.skipped.tolist(),
        baked=plan.baked,
        images=images,
        licence=plan.command.license,
        files=dict(files),
    )


def _command(content: Content) -> str:
    data = "condensed:DIR" if content.images else "DATA"
    rest = "" if content.baked is None else f" --method kd --temperature {content.baked.temperature:g}"
    rest += "" if content.baked is None else f" --mix-target {content.baked.target} --mix {content.baked.mix}"
    return f"kcdcache train --condensed DIR --data {data} --student resnet8x4 --out runs/student{rest}"


def _fill(
    plan: _Plan,
    name: str,
    knowledge: Knowledge,
    layout_plan: StorePlan,
    index: Int64[np.ndarray, " rows"],
    rows_of: Callable[[Part], Rows],
    progress: Progress,
) -> None:
    """Write a store of the rows of some samples, or what of it a killed export left to do, and seal it."""
    labels, digests = plan.source.labels[index], plan.source.sample_digest[index]
    with writer.create(plan.command.out / name, knowledge, layout_plan, labels, digests) as writing:
        for part in writing.pending():
            stored = rows_of(part)
            tensors = {array: torch.from_numpy(rows) for array, rows in stored.items()}
            values = {field: layout_plan.fields[field].decode(tensors) for field in part.fields}
            statistics = {field: encoding.statistics(found) for field, found in values.items()}
            writing.write_part(part, stored, statistics, _measured(values, labels[part.start : part.stop]))
            progress(f"export {name}", part.view * len(index) + part.stop, len(index) * layout_plan.views, "rows")
        writing.seal()


def _measured(values: Mapping[str, torch.Tensor], labels: np.ndarray) -> dict[str, float]:
    if "logits" not in values:
        return {}
    return {"correct": float((values["logits"].argmax(1).numpy() == labels).sum())}


def _mixed(plan: _Plan, part: Part) -> Rows:
    """Return T log p of a part's mixed targets p: whose softmax at T is p, so that they are stored as logits are."""
    chosen, baked = plan.chosen, plan.baked
    assert baked is not None
    rows = np.flatnonzero(chosen.mixed)[part.start : part.stop]
    own, other = (
        torch.from_numpy(plan.source.read("logits", part.view, column[rows], baked.temperature)).double()
        for column in (chosen.index, chosen.partner)
    )
    epsilon = torch.from_numpy(chosen.epsilon[rows]).double()
    mixed = mix_probabilities(own, other, epsilon, baked.target, baked.temperature)
    values = (baked.temperature * mixed.clamp_min(torch.finfo(torch.float32).tiny).log()).float()
    return plan.source.plan.fields["logits"].encode(values, part.start)


def _write_images(plan: _Plan) -> Images:
    assert plan.data is not None
    data, everything = plan.data, np.arange(len(plan.data.test))
    kinds = {}
    for name, split, index in (("train", data.train, plan.needed), ("test", data.test, everything)):
        path = plan.command.out / record.SPLITS[name]
        path.parent.mkdir(exist_ok=True)
        remove(path)
        create_exclusive(path, partial(_write_split, split=split, index=index, classes=data.classes))
        kinds[name] = "pixels" if isinstance(split.source, DecodedImages) else "files"
    return Images.model_validate(
        kinds | {"mean": list(data.mean), "std": list(data.std), "test_digest": data.test.digest()}
    )


def _write_split(path: Path, split: Split, index: Int64[np.ndarray, " n"], classes: Sequence[str]) -> None:
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(classes), "_type": "ClassLabel"},
        "index": {"dtype": "int64", "_type": "Value"},
    }
    told = {"huggingface": canonical_json({"info": {"features": features}})}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64()), ("index", pa.int64())], metadata=told)
    with pq.ParquetWriter(path, schema, compression="none", write_page_checksum=True) as target:
        for start in range(0, len(index), GROUP_ROWS):
            some = index[start : start + GROUP_ROWS]
            rows = [{"bytes": _image(split, position), "path": None} for position in some.tolist()]
            columns = [pa.array(rows, image), pa.array(split.labels[some]), pa.array(some)]
            target.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=GROUP_ROWS)


def _image(split: Split, position: int) -> bytes:
    """Return an image's file: PNG of what is decoded, whose digest is of pixels; else the file as it was."""
    source = split.source
    if not isinstance(source, DecodedImages):
        return source.content(position)
    pixels, stream = source.pixels[position], io.BytesIO()
    Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).save(stream, "PNG")
    return stream.getvalue()


def _quoted(text: str) -> str:
    """Return text from elsewhere as Markdown shows it: nothing in it can end the line or make markup."""
    return f"`{json.dumps(text)[1:-1].replace('`', '')}`"


def _size(rows: int) -> str:
    for low, high in zip((0, *SIZES), SIZES, strict=False):
        if rows < high:
            return f"n<{_short(high)}" if not low else f"{_short(low)}<n<{_short(high)}"
    return f"n>{_short(SIZES[-1])}"


def _short(number: int) -> str:
    return f"{number // 10**6}M" if number >= 10**6 else f"{number // 10**3}K"
