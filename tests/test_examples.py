"""The examples for clusters: shell scripts that run, and readers of values and condensed sets that agree."""

import os
import runpy
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from killing import environment
from pupils import PYTHON, SPEC, command, distilled, same_files, school

from kcdcache.condensation import manifest
from kcdcache.runs.state import read_summary
from kcdcache.store import reader

EXAMPLES = Path(__file__).parent.parent / "pipelines" / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.iterdir() if path.suffix in (".sh", ".sbatch"))
SMALL = {"DATA": SPEC, "EPOCHS": "2", "STAGES": "1", "VIEWS": "2", "PROCESSES": "2", "BATCH": "32"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    made = school(tmp_path_factory.mktemp("examples"))
    distilled(made, made.root / "run")
    return made


def script(name, *more, first=EXAMPLES, **variables):
    """Run a script with the commands of a folder and of the virtual environment at hand."""
    path = os.pathsep.join([str(first), str(Path(PYTHON).parent), os.environ["PATH"]])
    words, given = ["bash", str(EXAMPLES / name), *more], environment(**SMALL) | {"PATH": path} | variables
    ended = subprocess.run(words, capture_output=True, text=True, check=False, env=given)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound_bash_that_ends_at_an_error(path):
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert path.read_text().count("set -euo pipefail") == 1


def kept(run):
    """Stage, samples kept as they are, enriched ones: as our own reader has them."""
    sets = [manifest.read(run / f"stages/{stage}/manifest.parquet") for stage in range(4)]
    return [(stage, int((~one.mixed).sum()), int(one.mixed.sum())) for stage, one in enumerate(sets)]


@pytest.mark.parametrize("library", ["duckdb", "polars"])
def test_readers_of_plain_parquet_see_what_kcdcache_does(place, library):
    pytest.importorskip(library)
    run, read = place.root / "run", runpy.run_path(str(EXAMPLES / f"read_with_{library}.py"))
    rows = {name: [*map(tuple, _rows(read[name](run)))] for name in ("stages", "classes", "hardest")}
    assert [row[:3] for row in rows["stages"]] == kept(run)
    table = pq.read_table(run / "values.parquet").to_pylist()
    last = set(manifest.read(run / "stages/3/manifest.parquet").index.tolist())
    for label, share in rows["classes"]:
        own = [row["index"] for row in table if row["label"] == label]
        assert share == pytest.approx(sum(index in last for index in own) / len(own))
    best = sorted((row for row in table if row["visits"]), key=lambda row: (-row["value"], row["index"]))[:10]
    assert [row[0] for row in rows["hardest"]] == [row["index"] for row in best]


def _rows(table):
    return table.fetchall() if hasattr(table, "fetchall") else table.rows()


@pytest.mark.slow
def test_an_array_of_jobs_fills_the_store_of_one(place, tmp_path):
    for task in ("2", "1"):
        places = {"TEACHER": str(place.teacher), "STORE": str(tmp_path / "two")}
        array = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "1"}
        script("precompute_array.sbatch", "--min-accuracy", "0", **places, **array)
    command(place, "precompute", store=tmp_path / "one", views=2, min_accuracy=0, device="cpu", threads=1)
    assert same_files(tmp_path / "one", tmp_path / "two")
    assert reader.open(tmp_path / "two").views == 2


@pytest.mark.slow
def test_one_node_goes_from_data_to_a_student(tmp_path):
    for _ in range(2):  # the second time all is there
        given = {"OUT": str(tmp_path), "TEACHER": "resnet8", "DATA": "digits?train=600&test=60", "EPOCHS": "4"}
        script("torchrun_one_node.sh", **given)
    assert read_summary(tmp_path / "student").finished


SRUN = """#!/usr/bin/env bash
# two nodes on this machine: every srun starts its command once for each
shift
for node in 1 2; do "$@" & done
wait -n && wait -n
"""


@pytest.mark.slow
def test_two_nodes_train_one_student(place, tmp_path):
    """With SLURM's own commands played by small scripts, the nodes being two torchruns on this machine."""
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": "#!/usr/bin/env bash\necho localhost\n"}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "PORT": "29577",
           "STORE": str(place.knowledge.path), "OUT": str(tmp_path / "run"), "STUDENT": "resnet8"}  # fmt: skip
    script("torchrun_slurm.sbatch", first=tmp_path / "bin", **job)
    assert read_summary(tmp_path / "run").finished
    assert '"processes": 4' in (tmp_path / "run" / "run.json").read_text()
