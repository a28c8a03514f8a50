"""Data sets on disk, as users have them: class folders, hub parquet, arrays."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def write_npz(file: Path, **changes) -> str:
    arrays = {
        "train_images": make_pixels(6), "train_labels": np.arange(6) % 3,
        "test_images": make_pixels(3, seed=1), "test_labels": np.array([2, 0, 0]),
    }  # fmt: skip
    np.savez(file, **{name: value for name, value in {**arrays, **changes}.items() if value is not None})
    return f"arrays:{file}"


def write_hub(folder: Path, **changes) -> str:
    train, test = make_pixels(6), make_pixels(3, seed=1)
    options = {"names": ["cat", "dog", "owl"], **changes}
    write_parquet(folder / "train-00000-of-00002.parquet", [png(i) for i in train[:4]], label=[0, 1, 2, 0], **options)
    write_parquet(folder / "train-00001-of-00002.parquet", [png(i) for i in train[4:]], label=[1, 2], **options)
    write_parquet(folder / "test-00000-of-00001.parquet", [png(i) for i in test], label=[2, 0, 0], **options)
    return f"parquet:{folder}"


def write_folder(root: Path, sizes: tuple[int, ...] = (5, 5)) -> str:
    for part in ("train", "val"):
        for name, size in zip(("ant", "bee"), sizes, strict=True):
            (root / part / name).mkdir(parents=True)
            for number in range(2):
                Image.fromarray(make_pixels(1, size, seed=number)[0]).save(root / part / name / f"{number}.png")
    return f"folder:{root}"


def make_pixels(count: int, height: int = 5, width: int = 4, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_parquet(file: Path, payloads: list, names: list[str] | None = None, **labels: list) -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": payload, "path": None} for payload in payloads], struct)
    table = pa.table({"img": column, **labels})
    if names:
        features = {name: {"names": names, "_type": "ClassLabel"} for name in labels}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    pq.write_table(table, file, row_group_size=2)
