"""Jupyter notebooks run top to bottom in a fresh kernel and an empty folder.

`python tests/executing.py [NAME ...]` runs the repository's own (all unless named) and writes their outputs into them.
"""

import hashlib
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
"""what a notebook says of its kernel: nothing that differs from machine to machine"""


def read(path):
    """Return a notebook after checking it against the format's schema."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def codes(notebook):
    """Return the code cells in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(notebook):
    """Return the SHA-256 over all code, cell by cell."""
    return hashlib.sha256("\0".join(cell.source for cell in codes(notebook)).encode()).hexdigest()


def execute(notebook, folder):
    """Run a notebook's code in `folder`; its outputs take the place of the old ones. Raises: a cell raised."""
    # the kernel of this interpreter, one thread, and nothing of the user's own configuration
    own = {name: str(folder / name.lower()) for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR")}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **own}
    client = NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": folder}}, record_timing=False
    )
    client.execute(env=environment)


def texts(notebook):
    """Return all that a notebook printed."""
    outputs = (output for cell in codes(notebook) for output in cell.outputs)
    return "".join(output.text for output in outputs if output.output_type == "stream")


def write(path):
    """Run the notebook at `path` and write its outputs into it, with the digest of the code they come from."""
    notebook = read(path)
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, Path(folder))
    notebook.metadata = NotebookNode({**METADATA, "executed": digest(notebook)})
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for file in [FOLDER / name for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        write(file)
