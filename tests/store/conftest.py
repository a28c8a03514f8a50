"""A store of many chunks that tests of this room read, or damage a copy of."""

import shutil
from pathlib import Path

import pytest
from stores import many_chunks


@pytest.fixture(scope="session")
def sealed(tmp_path_factory):
    return many_chunks(tmp_path_factory.mktemp("sealed") / "store")


@pytest.fixture
def damaged(sealed, tmp_path):
    return Path(shutil.copytree(sealed, tmp_path / "store"))
