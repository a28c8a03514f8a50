import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kcdcache.errors import UnsafeError
from kcdcache.store import reader

ROWS, WIDTH = 50, 6
VALUES = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float16)
PAYLOAD = VALUES.tobytes()
CHECKSUM = google_crc32c.value(PAYLOAD)
CONTENT = PAYLOAD + CHECKSUM.to_bytes(4, "little")


@pytest.fixture(scope="module")
def chunk(tmp_path_factory):
    path = tmp_path_factory.mktemp("chunks") / "c.0.0"
    path.write_bytes(CONTENT)
    return path


def copied(path, wanted, block_bytes=100, target=None):
    """Whether the file was sound, and the rows copied through a block of so many bytes (100: eight rows)."""
    wanted = np.array(wanted, np.int64)
    target = np.zeros((len(wanted), WIDTH), np.float16) if target is None else target
    block = np.empty(block_bytes, np.uint8)
    return reader.copy_rows(path, len(CONTENT), CHECKSUM, wanted, target, block), target


@settings(max_examples=60)
@given(st.sets(st.integers(0, ROWS - 1)), st.sampled_from([12, 13, 100, 300, 599, 600, 2**19]))
def test_any_rows_through_blocks_of_any_size_are_the_files(chunk, wanted, block_bytes):
    sound, found = copied(chunk, sorted(wanted), block_bytes)
    assert sound
    assert np.array_equal(found, VALUES[sorted(wanted)])


@pytest.mark.parametrize("wanted", [range(ROWS), range(8, 16), [0], []])
def test_every_flipped_byte_shows_whichever_rows_are_wanted(tmp_path, wanted):
    path = tmp_path / "c.0.0"
    for place in range(len(CONTENT)):
        damaged = bytearray(CONTENT)
        damaged[place] ^= 16
        path.write_bytes(damaged)
        assert not copied(path, wanted)[0], f"byte {place}"


@pytest.mark.parametrize("content", [b"", CONTENT[:-1], CONTENT + b"\0", CONTENT[:300], CONTENT[12:]])
def test_a_file_of_another_size_shows(tmp_path, content):
    path = tmp_path / "c.0.0"
    path.write_bytes(content)
    assert not copied(path, range(ROWS))[0]


def test_a_sound_file_of_other_rows_shows(tmp_path):
    path, other = tmp_path / "c.0.0", VALUES[::-1].tobytes()
    path.write_bytes(other + google_crc32c.value(other).to_bytes(4, "little"))
    assert not copied(path, [3])[0]


def test_rows_next_to_the_target_are_left_alone(chunk):
    around = np.full((ROWS + 2, WIDTH), 7, np.float16)
    assert copied(chunk, range(ROWS), target=around[1:-1])[0]
    assert np.array_equal(around[1:-1], VALUES)
    assert (around[[0, -1]] == 7).all()


def test_a_row_larger_than_a_block_still_fits_into_new_scratch_memory():
    assert len(reader.new_block(3)) == reader.BLOCK_BYTES
    assert len(reader.new_block(reader.BLOCK_BYTES + 1)) == reader.BLOCK_BYTES + 1


def test_a_symbolic_link_is_refused(tmp_path, chunk):
    (tmp_path / "link").symlink_to(chunk)
    with pytest.raises(UnsafeError, match=r"link is a symbolic link; a store's files are plain files"):
        copied(tmp_path / "link", [0])


def test_a_missing_file_is_told_from_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        copied(tmp_path / "gone", [0])
