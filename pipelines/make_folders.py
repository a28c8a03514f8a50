"""Export CIFAR-100 as class folders of JPEGs of differing sizes, as photographs lie: small, real, decoded on demand.

python pipelines/make_folders.py PARQUET_FOLDER OUT --classes 5 --train 60 --test 30
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from kcdcache import rng
from kcdcache.datasets import datasets

LEAST, MOST = 64, 80
"""pixels of a side: images are enlarged (bicubic) to the most, then cut to sides drawn between the two"""
QUALITY = 90


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="folder of the hub's parquet files")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--classes", type=int, default=5, help="the first so many classes")
    parser.add_argument("--train", type=int, default=60, help="training images of each")
    parser.add_argument("--test", type=int, default=30, help="test images of each")
    chosen = parser.parse_args()
    loaded = datasets.load(f"parquet:{chosen.source}#fine_label")
    for split, name, count in ((loaded.train, "train", chosen.train), (loaded.test, "val", chosen.test)):
        for label in range(chosen.classes):
            folder = chosen.out / name / loaded.classes[label]
            folder.mkdir(parents=True)
            for index in np.flatnonzero(split.labels == label)[:count].tolist():
                write(split.images(np.array([index]))[0], index, folder / f"{index:05}.jpg")


def write(pixels: np.ndarray, index: int, file: Path) -> None:
    """Write one image, enlarged and cut to its own size about the centre."""
    words = rng.words(0, np.array([index]), rng.CROP, 0)
    high, wide = (LEAST + int(rng.below(word, MOST - LEAST + 1)[0]) for word in words[:2])
    top, left = (MOST - high) // 2, (MOST - wide) // 2
    enlarged = Image.fromarray(pixels).resize((MOST, MOST), Image.Resampling.BICUBIC)
    enlarged.crop((left, top, left + wide, top + high)).save(file, "JPEG", quality=QUALITY)


if __name__ == "__main__":
    main()
