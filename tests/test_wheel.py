"""A wheel, installed in a fresh environment away from the source, does the whole job (slow: downloads torch)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SECOND = Path.home() / ".pyenv/versions/3.13.0/bin/python3.13"
PYTHONS = {"this": sys.executable, "3.13": str(SECOND)}
ALONE = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}


def done(*command, where):
    return subprocess.run(command, cwd=where, env=ALONE, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("python", PYTHONS)
def test_a_wheel_away_from_the_source_runs_the_first_example(python, tmp_path):
    if not Path(PYTHONS[python]).exists():
        pytest.skip(f"no Python at {PYTHONS[python]}")
    done(sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-q", "-w", str(tmp_path), where=tmp_path)
    [wheel] = tmp_path.glob("*.whl")
    done(PYTHONS[python], "-m", "venv", "env", where=tmp_path)
    done("env/bin/pip", "install", "-q", str(wheel), where=tmp_path)
    (tmp_path / "empty").mkdir()
    where = done("../env/bin/python", "-c", "import kcdcache; print(kcdcache.__file__)", where=tmp_path / "empty")
    assert str(tmp_path / "env") in where
    table = done("../env/bin/kcdcache", "run", "-q", where=tmp_path / "empty")
    assert "KCD, condensed to 70 %" in table
    assert (tmp_path / "empty/runs/digits/report.html").is_file()
