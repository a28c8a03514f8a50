"""What a run kept and why, by data frames: its values and condensed sets are plain parquet files.

python pipelines/examples/read_with_polars.py runs/kcd        (pip install polars)
"""

import sys
from pathlib import Path

import polars as pl


def sets(run):
    found = pl.scan_parquet(f"{run}/stages/*/manifest.parquet", include_file_paths="file")
    return found.with_columns(pl.col("file").str.extract(r"(\d+)/manifest").cast(pl.Int64).alias("stage"))


def stages(run):
    """Stage, samples kept as they are, enriched samples, mean value: of the sets that the stages trained on."""
    part = pl.col("part").cast(pl.String)
    return (
        sets(run)
        .group_by("stage")
        .agg((part == "K_1H").sum().alias("K_1H"), (part == "K_Aug").sum().alias("K_Aug"), pl.col("value").mean())
        .sort("stage")
        .collect()
    )


def classes(run):
    """Label, share of its samples in the last set: what condensation finds easy has little left."""
    last = sets(run).filter(pl.col("stage") == pl.col("stage").max()).select("index", kept=pl.lit(1))
    return (
        pl.scan_parquet(f"{run}/values.parquet")
        .join(last, on="index", how="left")
        .group_by("label")
        .agg(pl.col("kept").fill_null(0).mean())
        .sort("label")
        .collect()
    )


def hardest(run, count=10):
    """Index, label, value, visits of the samples worth most to the student at the end."""
    return (
        pl.scan_parquet(f"{run}/values.parquet")
        .filter(pl.col("visits") > 0)
        .sort(["value", "index"], descending=[True, False])
        .select("index", "label", "value", "visits")
        .head(count)
        .collect()
    )


if __name__ == "__main__":
    for table in (stages, classes, hardest):
        print(table.__doc__)
        print(table(Path(sys.argv[1])))
