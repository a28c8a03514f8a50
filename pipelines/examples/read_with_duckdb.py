"""What a run kept and why, by SQL: its values and condensed sets are plain parquet files.

python pipelines/examples/read_with_duckdb.py runs/kcd        (pip install duckdb)
"""

import sys
from pathlib import Path

import duckdb

SETS = """
    select regexp_extract(filename, '(\\d+)/manifest', 1)::int as stage, *
    from read_parquet('{run}/stages/*/manifest.parquet', filename = true)
"""


def stages(run):
    """Stage, samples kept as they are, enriched samples, mean value: of the sets that the stages trained on."""
    return duckdb.sql(f"""
        select stage, count(*) filter (part = 'K_1H') as K_1H, count(*) filter (part = 'K_Aug') as K_Aug,
            avg(value) as value
        from ({SETS.format(run=run)}) group by stage order by stage
    """)


def classes(run):
    """Label, share of its samples in the last set: what condensation finds easy has little left."""
    return duckdb.sql(f"""
        with sets as ({SETS.format(run=run)}),
        last as (select index from sets where stage = (select max(stage) from sets))
        select label, avg((index in (from last))::int) as kept
        from '{run}/values.parquet' group by label order by label
    """)


def hardest(run, count=10):
    """Index, label, value, visits of the samples worth most to the student at the end."""
    return duckdb.sql(f"""
        select index, label, value, visits from '{run}/values.parquet'
        where visits > 0 order by value desc, index limit {int(count)}
    """)


if __name__ == "__main__":
    for table in (stages, classes, hardest):
        print(table.__doc__)
        print(table(Path(sys.argv[1])))
