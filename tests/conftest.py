"""Shared set-up: shapes and types are checked at run time where numbers are made, while the tests run."""

import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook
from killing import confined, nursery

NUMERIC = (
    "methods", "networks", "views", "condensation.ranking", "condensation.summary", "condensation.values",
    "store.encoding", "training.sampling", "rng",
)  # fmt: skip
"""where numbers are made; everywhere, the check would take more than half of the suite's time"""
install_import_hook([f"kcdcache.{name}" for name in NUMERIC], "typechecking.check")
torch.set_num_threads(1)
hypothesis.settings.register_profile("suite", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def start():
    """Starts commands in forks of one process that has imported everything."""
    with nursery() as starting:
        yield starting


@pytest.fixture(scope="session")
def run(start, tmp_path_factory):
    """Runs commands on hostile files, in little memory and time."""
    return confined(start, tmp_path_factory.mktemp("confined") / "log")


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Data, a teacher and its store, which tests leave as they are; many files have one of their own."""
    from pupils import school

    return school(tmp_path_factory.mktemp("school"))


@pytest.fixture(scope="session")
def server():
    """A bucket of a real server that speaks S3."""
    from cloud import Server

    one = Server()
    yield one
    one.close()


@pytest.fixture(scope="session")
def here(start):
    """A teacher and what each command makes of it undisturbed; another user may look there, not so in pytest's own."""
    from commands import place

    with tempfile.TemporaryDirectory(prefix="kcdcache-") as folder:
        Path(folder).chmod(0o755)
        yield place(Path(folder), start)
