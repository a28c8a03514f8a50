"""The export of a condensed set: knowledge, manifest, images and dataset card in one folder."""

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

from kcdcache.condensation import manifest
from kcdcache.condensation.manifest import Manifest
from kcdcache.datasets.datasets import Dataset
from kcdcache.datasets.images import DECODED_BYTES, DecodedImages, Split
from kcdcache.environment import LIBRARIES
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.export import condensed_set, record
from kcdcache.export.record import Baked, Content, Images
from kcdcache.files import cloud, parquet
from kcdcache.files.atomic import (
    TEMPORARY_MARK,
    create_exclusive,
    locked,
    read_bytes,
    remove,
    remove_leftovers,
    require_no_links,
    write_atomic,
)
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
SIZES = {
    10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M",
}  # fmt: skip
"""upper end of a size category of the Hugging Face hub -> name"""
Rows = dict[str, np.ndarray]
GROUP_ROWS = 1000
LOADS, MIXED_SHARE = 4, 8
"""of a part's mixed targets: most reads of the store, and the share of a block that float64 numbers are mixed in"""
NOTHING_SPARED = (
    "export: the set's %d kept samples and their %d partners need the outputs on all %d samples: nothing is saved. "
    "Smaller are --bake (the mixed targets instead of the partners' outputs), fewer --views, and sets condensed with a "
    "smaller --keep or --k0 stage_slice"
)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    command: ExportCommand
    source: reader.Store
    chosen: Manifest
    needed: Int64[np.ndarray, " needed"]
    """samples whose images training uses: kept samples and partners"""
    held: Int64[np.ndarray, " rows"]
    """samples whose own outputs are exported"""
    store: StorePlan
    baked: Baked | None
    mixes: StorePlan | None
    data: Dataset | None

    @property
    def stores(self) -> dict[str, StorePlan]:
        return {record.STORE: self.store} | ({} if self.mixes is None else {record.MIXES: self.mixes})


def run(command: ExportCommand, progress: Progress = silent, dry_run: bool = False) -> dict[str, Any]:
    """Write a condensed set with the knowledge it needs into one folder; return its size and that of the full store.

    The record condensed.json is written last: without it the folder is not accepted, and the same command resumes to
    the same bytes. A finished export is left unchanged.

    Raises:
        MismatchError: set, store and data do not belong together.
        SettingsError: settings contradict each other, or the folder has other contents.
        LockedError: another process exports into the folder.
    """
    plan, out = _planned(command), command.out
    figures = _figures(plan)
    if figures["rows"] == figures["rows_full"] and figures["views"] == figures["views_full"]:
        logger.warning(NOTHING_SPARED, figures["kept"], figures["partners"], figures["samples"])
    if dry_run:
        return {"would": "export", **figures, "out": str(out)}
    found = _finished(plan)
    if found is not None:
        logger.info("export: %s is already finished", out)
    name = _write_alone(plan, progress) if found is None else found.id
    figures["bytes"] = sum(log.stored_bytes(out / part) for part in plan.stores)  # after compression
    figures["bytes_on_disk"] = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return {"kind": "condensed", "id": name, **figures, "out": str(out)} | ({} if found is None else {"already": True})


def card(content: Content, summary: Mapping[str, Any], corruption: Mapping[str, Any]) -> bytes:
    """Return README.md with the front matter of the Hugging Face hub; without times, hosts and versions.

    `corruption` describes the labels of the source store; empty if they are clean.
    """
    files = [("train", record.MANIFEST)]
    if content.images is not None:
        files = [(split, f"{record.IMAGES}/{split}-*.parquet") for split in record.SPLITS]
    kept, options, knowledge = int(summary["kept"]), corruption.get("corruption") or {}, content.knowledge
    # Markdown, not HTML: foreign texts go through `quoted`; JSON strings are YAML strings
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"json": json.dumps, "quoted": _quoted}
    text = environment.from_string(CARD_TEMPLATE.read_text(encoding="utf-8")).render(
        content=content, data=knowledge.data, teacher=knowledge.teacher, views=knowledge.views, summary=summary,
        command=_command(content), files=files,
        size=next((name for end, name in SIZES.items() if kept < end), "n>10M"),
        corrupted=", ".join(f"{name} {value}" for name, value in sorted(options.items())),
        mislabelled=corruption.get("mislabelled", 0),
    )  # fmt: skip
    return text.encode()


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
    # a store has at least one row, even if all targets are baked
    held = needed if baked is None else chosen.index[~chosen.mixed] if not chosen.mixed.all() else needed[:1]
    views = source.views if command.views is None else command.views
    if views > source.views:
        raise SettingsError(f"--views {views}: {source.path} holds {source.views} views")
    data = _data(command, source)
    form = partial(plan.plan_store, compression=command.compression, batch_size=source.plan.batch_size)
    forms = list(source.plan.encodings.values()) if baked is None else [source.plan.encodings["logits"]]
    mixed = None if baked is None else form(int(chosen.mixed.sum()), views, [source.plan.encodings["logits"]])
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
    if (form := source.plan.encodings["logits"].name) not in ("float16", "float32"):
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
    for found in (data.train.source, data.test.source) if command.with_images else ():
        if isinstance(found, condensed_set.PartialImages):
            raise SettingsError("--with-images needs the whole data set, not the images of an exported one")
        if isinstance(found, DecodedImages):
            channels, size = found.pixels.shape[3], found.pixels.nbytes
            if channels not in (1, 3):
                raise SettingsError(f"--with-images writes PNG of 1 or 3 channels, these images have {channels}")
            if size > DECODED_BYTES:
                raise SettingsError(f"--with-images takes images of up to {DECODED_BYTES:,} bytes, found {size:,}")
    return data


def _figures(plan: _Plan) -> dict[str, Any]:
    """Return rows and bytes of knowledge, with those of the full store."""
    plans, views, full = plan.stores.values(), plan.store.views, plan.source.plan
    rows = sum(each.count for each in plans)
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
        "bytes": sum(each.bytes + CHECKSUM_BYTES * each.chunk_count for each in plans),  # before compression
        "bytes_full": log.stored_bytes(plan.source.path),
        "images": len(plan.needed) if plan.command.with_images else 0,
    }


def _finished(plan: _Plan) -> record.Record | None:
    """Return the record if this export is finished; raise SettingsError if another one is."""
    out = plan.command.out
    if not (out / record.RECORD).exists():
        return None
    found, asked = record.read(out), _content(plan, None)
    names = ("knowledge_id", "manifest", "rows", "views", "layout", "baked", "licence")
    other = [name for name in names if getattr(found.content, name) != getattr(asked, name)]
    other += ["images"] * ((found.content.images is not None) != plan.command.with_images)
    if other:
        raise SettingsError(f"{out} holds another export, with a different {other[0]}; exports are never overwritten")
    return found


def _require_place(plan: _Plan) -> None:
    """Raise SettingsError if the folder has anything but the files of an unfinished export like this."""
    out, own = plan.command.out, [record.CARD, record.MANIFEST, record.SAMPLES, *plan.stores]
    own += [record.LOCK, f"{record.LOCK}.holder"]
    own += [record.IMAGES] * plan.command.with_images
    if out.is_file():
        raise SettingsError(f"{out} is a file; give a new folder as --out")
    if out.is_dir():
        require_no_links(out)
        names = sorted(path.name for path in out.iterdir() if TEMPORARY_MARK not in path.name)
        if others := [name for name in names if name not in own]:
            raise SettingsError(
                f"{out} holds {others[0]}, which this export does not write; give a new folder as --out"
            )


def _write_alone(plan: _Plan, progress: Progress) -> str:
    """Write the export while no other process writes into its folder; return its id."""
    out = plan.command.out
    _require_place(plan)
    with locked(out / record.LOCK):
        if (found := _finished(plan)) is not None:  # by another process, meanwhile
            return found.id
        remove_leftovers(out)
        name = _write(plan, progress)
        cloud.lock_file(out / record.LOCK).unlink(missing_ok=True)  # nobody writes into what is finished
        return name


def _write(plan: _Plan, progress: Progress) -> str:
    out, source, chosen = plan.command.out, plan.source, plan.chosen
    out.mkdir(parents=True, exist_ok=True)
    row = np.full(source.count, -1)
    row[plan.held] = np.arange(len(plan.held))
    samples = record.Samples(source.labels, source.sample_digest, row)
    write_atomic(out / record.SAMPLES, record.encode_samples(samples))
    remove(out / record.MANIFEST)
    manifest.write(out / record.MANIFEST, chosen)
    _write_stores(plan, progress)
    kept = _write_optional(plan)
    images = _write_images(plan) if plan.command.with_images and plan.data is not None else None
    bare = _content(plan, images)
    write_atomic(out / record.CARD, card(bare, manifest.summary(chosen), identity.corruption_of(source.path)))
    names = [record.CARD, record.MANIFEST, record.SAMPLES, *kept, *(record.SEALS[part] for part in bare.stores)]
    names += record.SPLITS.values() if images else []
    content = bare.model_copy(update={"files": {name: record.entry_of(out, name) for name in names}})
    made = {"python": platform.python_version(), "versions": {name: version(name) for name in LIBRARIES}}
    return record.write(out, content, made)


def _write_stores(plan: _Plan, progress: Progress) -> None:
    """Write the store of sample outputs and, if targets are baked, the store of targets."""
    source, chosen, fields = plan.source, plan.chosen, list(plan.store.encodings)
    subset = replace(source.knowledge, subset={"manifest": chosen.digest, "rows": len(plan.held)})
    _fill(
        plan, record.STORE, subset, plan.store, plan.held,
        lambda part: source.load(part.view, plan.held[part.start : part.stop], fields), progress,
    )  # fmt: skip
    if (mixes := plan.mixes) is not None and (baked := plan.baked) is not None:
        knowledge = replace(source.knowledge, mixes=condensed_set.mixes_of(chosen, baked, mixes.views))
        index = chosen.index[chosen.mixed]
        _fill(plan, record.MIXES, knowledge, mixes, index, lambda part: _mixed(plan, baked, part), progress)


def _write_optional(plan: _Plan) -> tuple[str, ...]:
    """Copy the store's origin and, unless targets are baked, the teacher's parameters; return the names."""
    root = plan.source.path
    served = plan.baked is None and identity.read_parameters(root, plan.source.knowledge) is not None
    for name in (found := (record.PARAMETERS,) * served + (record.ORIGIN,) * (identity.read_origin(root) is not None)):
        write_atomic(plan.command.out / name, read_bytes(root / Path(name).relative_to(record.STORE)))
    return found


def _content(plan: _Plan, images: Images | None) -> Content:
    return Content(
        knowledge=plan.source.knowledge,
        knowledge_id=plan.source.knowledge_id,
        manifest=plan.chosen.digest,
        rows=len(plan.held),
        views=plan.store.views,
        layout=plan.store.record(),
        skipped=tuple(plan.source.skipped.tolist()),
        baked=plan.baked,
        images=images,
        licence=plan.command.license,
        files={},
    )


def _command(content: Content) -> str:
    data, rest = "condensed:DIR" if content.images else "DATA", ""
    if (baked := content.baked) is not None:
        rest = f" --method kd --temperature {baked.temperature:g} --mix-target {baked.target} --mix {baked.mix}"
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
    """Write and seal a store of some samples, or what an interrupted export has left to write."""
    labels, digests = plan.source.labels[index], plan.source.sample_digest[index]
    with writer.create(plan.command.out / name, knowledge, layout_plan, labels, digests) as writing:
        for part in writing.pending():
            stored = rows_of(part)
            writing.write_part(part, stored, *_described(stored, part, layout_plan, labels[part.start : part.stop]))
            del stored  # before the next part comes
            progress(f"export {name}", part.view * len(index) + part.stop, len(index) * layout_plan.views, "rows")
        writing.seal()


def _described(
    stored: Rows, part: Part, layout: StorePlan, labels: Int64[np.ndarray, " rows"]
) -> tuple[dict[str, log.Numbers], dict[str, float]]:
    """Return the statistics of a part's decoded fields, and its number of correct predictions if it has logits."""
    tensors, statistics = {array: torch.from_numpy(rows) for array, rows in stored.items()}, dict[str, log.Numbers]()
    measured = {"correct": 0.0} if "logits" in part.fields else {}
    for field in part.fields:
        form = layout.encodings[field]
        for block in encoding.blocks(len(labels), form.row_shape):
            values = form.decode({spec.name: tensors[spec.name][block] for spec in form.arrays})
            found = encoding.statistics(values)
            statistics[field] = encoding.merged(statistics[field], found) if field in statistics else found
            if field == "logits":
                measured["correct"] += float((values.argmax(1).numpy() == labels[block]).sum())
    return statistics, measured


def _mixed(plan: _Plan, baked: Baked, part: Part) -> Rows:
    """Return T log p for the mixed targets p of a part: logits whose softmax at temperature T is p."""
    form, rows = plan.source.plan.encodings["logits"], np.flatnonzero(plan.chosen.mixed)[part.start : part.stop]
    stored = {spec.name: np.empty((len(rows), *spec.row_shape), spec.dtype) for spec in form.arrays}
    loads = min(LOADS, len(list(encoding.blocks(len(rows), form.row_shape))))
    for few in np.array_split(np.arange(len(rows)), loads):
        for name, encoded in _mixed_rows(plan, baked, part.view, rows[few], part.start + int(few[0])).items():
            stored[name][few[0] : few[-1] + 1] = encoded
    return stored


def _mixed_rows(plan: _Plan, baked: Baked, view: int, rows: Int64[np.ndarray, " rows"], first: int) -> Rows:
    """Return the encoded targets of some points of the set, given their positions; each row is read once."""
    chosen, form = plan.chosen, plan.source.plan.encodings["logits"]
    pairs = np.stack([chosen.index[rows], chosen.partner[rows]])
    index, place = np.unique(pairs, return_inverse=True)
    held = {name: torch.from_numpy(found) for name, found in plan.source.load(view, index, ["logits"]).items()}
    made = []
    for block in encoding.blocks(len(rows), form.row_shape, MIXED_SHARE):
        own, other = (
            form.decode({name: found[torch.from_numpy(side[block])] for name, found in held.items()}, baked.temperature)
            for side in place.reshape(pairs.shape)
        )
        epsilon = torch.from_numpy(chosen.epsilon[rows[block]]).double()
        mixed = mix_probabilities(own.double(), other.double(), epsilon, baked.target, baked.temperature)
        values = (baked.temperature * mixed.clamp_min(torch.finfo(torch.float32).tiny).log()).float()
        made.append(form.encode(values, first + block.start))
    return {name: np.concatenate([encoded[name] for encoded in made]) for name in held}


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
    return Images.model_validate(kinds | {"mean": data.mean, "std": data.std, "test_digest": data.test.digest()})


def _write_split(path: Path, split: Split, index: Int64[np.ndarray, " n"], classes: Sequence[str]) -> None:
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(classes), "_type": "ClassLabel"},
        "index": {"dtype": "int64", "_type": "Value"},
    }
    metadata = {"huggingface": canonical_json({"info": {"features": features}})}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64()), ("index", pa.int64())], metadata=metadata)
    with pq.ParquetWriter(path, schema, compression="none", write_page_checksum=True) as target:
        for start in range(0, len(index), GROUP_ROWS):
            some = index[start : start + GROUP_ROWS]
            rows = [{"bytes": _image(split, position), "path": None} for position in some.tolist()]
            columns = [pa.array(rows, image), pa.array(split.labels[some]), pa.array(some)]
            target.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=GROUP_ROWS)


def _image(split: Split, position: int) -> bytes:
    """Return the file of an image: a PNG if its digest is of pixels, else the original file."""
    source = split.source
    if not isinstance(source, DecodedImages):
        return source.content(position)
    pixels, stream = source.pixels[position], io.BytesIO()
    Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).save(stream, "PNG")
    return stream.getvalue()


def _quoted(text: str) -> str:
    """Quote foreign text for Markdown, so that it cannot end the line or become markup."""
    return f"`{json.dumps(text)[1:-1].replace('`', '')}`"
