"""What other libraries read of our files. Alone, `python readers.py LIBRARY PATH` prints it as JSON."""

import hashlib
import json
import sys


def duckdb(path):
    import duckdb as library

    found = library.sql(f"select * from read_parquet('{path}')")
    return dict(zip(found.columns, map(list, zip(*found.fetchall(), strict=True)), strict=True))


def polars(path):
    import polars as library

    return library.read_parquet(path).to_dict(as_series=False)


def fastparquet(path):
    import fastparquet as library

    return _lists(library.ParquetFile(str(path)).to_pandas())


def pandas(path):
    import pandas as library

    return _lists(library.read_parquet(path, engine="pyarrow"))


def _lists(frame):
    return {name: frame[name].astype(object).where(frame[name].notna(), None).tolist() for name in frame}


def pyarrow(path):
    import pyarrow.parquet as library

    return library.read_table(path).to_pydict()


def pyspark(path):
    from pyspark.sql import SparkSession

    alone = {"spark.ui.enabled": "false", "spark.driver.bindAddress": "127.0.0.1", "spark.driver.host": "127.0.0.1"}
    session = SparkSession.builder.master("local[1]").config(map=alone).getOrCreate()
    found = session.read.parquet(str(path))
    rows = found.collect()
    session.stop()
    return {name: [row[name] for row in rows] for name in found.columns}


def xarray(path):
    """Digests of the arrays of a store, by name."""
    import xarray as library

    with library.open_zarr(str(path), consolidated=False, mask_and_scale=False) as found:
        return {name: hashlib.sha256(found[name].values.tobytes()).hexdigest() for name in [*found.data_vars]}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](sys.argv[2])))
