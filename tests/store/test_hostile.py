"""A downloaded store or set is untrusted: what it claims must not run code, escape its folder or eat memory."""

import resource

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damaging import endless
from forging import first_chunk, resealed, write_resealed
from numcodecs import Zstd
from stores import make, plan_of

from kcdcache.condense import manifest
from kcdcache.errors import CorruptionError, MismatchError, UnsafeError
from kcdcache.files.records import read_json
from kcdcache.store import log, reader
from kcdcache.store.plan import plan_from


@pytest.mark.parametrize("size", [1, 200, 255, 256, 300, 65791, 65792, 70000, 2**20])
def test_claimed_size_of_a_zstd_frame_is_read_from_its_header(size):
    frame = bytes(Zstd(level=1).encode(bytes(size)))
    assert reader.content_bytes(frame) == size
    for other in (frame[:-1], frame + b"\0", frame * 2, frame[:8], b"", bytes(100), frame[1:]):
        assert reader.content_bytes(other) is None


def test_a_resealed_harmless_chunk_is_read(tmp_path):
    root = make(tmp_path / "s", plan_of(compression="zstd"))
    key = first_chunk(root)
    resealed(root, key, (root / key).read_bytes())
    opened = reader.open(root)
    assert len(opened.load(0, np.arange(opened.count), ("logits",))["logits"]) == opened.count


def test_a_chunk_turned_into_a_link_after_opening_is_refused(tmp_path):
    root = make(tmp_path / "s")
    opened = reader.open(root)
    chunk = root / first_chunk(root)
    chunk.rename(tmp_path / "elsewhere")
    chunk.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeError, match="is a symbolic link"):
        opened.load(0, np.arange(opened.count), ("logits",))


def test_a_plan_of_endless_chunks_is_refused_before_they_are_listed(tmp_path):
    root = make(tmp_path / "s")
    plan = log.read_plan(root, 0) | {"views": 10**5}
    log.write_plan(root, 0, plan)
    write_resealed(log.commit_path(root, 0), read_json(log.commit_path(root, 0)) | {"plan": plan})
    with pytest.raises(CorruptionError, match=r"was changed or belongs to another store|chunk files, its log names"):
        reader.open(root)


def test_a_parquet_file_of_endless_rows_is_refused_before_they_are_decoded(tmp_path):
    rows = 200_000_001
    batch = pa.table({"index": pa.array(np.zeros(2**20, np.int64))})
    with pq.ParquetWriter(tmp_path / "bomb.parquet", batch.schema, compression="zstd") as writer:
        for _ in range(-(-rows // 2**20)):
            writer.write_table(batch)
    assert (tmp_path / "bomb.parquet").stat().st_size < 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MismatchError, match=r"holds \d+ rows, expected at most 100000000"):
        manifest.read(tmp_path / "bomb.parquet")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB; decoded it takes 1.6 GB


def test_a_manifest_longer_than_the_data_is_refused(tmp_path):
    manifest.write(tmp_path / "m.parquet", manifest.full("k", 50))
    with pytest.raises(MismatchError, match="holds 50 rows, expected at most 40"):
        manifest.read(tmp_path / "m.parquet", 40)


def test_a_record_too_large_or_too_deep_is_not_read(tmp_path):
    deep, large = tmp_path / "deep.json", tmp_path / "large.json"
    deep.write_bytes(b"[" * 200_000)
    with pytest.raises(CorruptionError, match=r"deep\.json should hold JSON: it is nested too deeply"):
        read_json(deep)
    endless(large, "sparse")
    with pytest.raises(UnsafeError, match=r"large\.json has 1099511627776 bytes, expected at most 67108864"):
        read_json(large)


@pytest.mark.parametrize("change", [{"count": 10**8 + 1, "part_rows": 128 * 10**4}, {"views": 10**6 + 1}], ids=str)
def test_a_plan_of_more_than_any_data_set_has_is_refused(change):
    document = plan_of(count=128).document()
    plan_from(document | {"count": 10**8, "part_rows": 128 * 10**4, "views": 1})
    with pytest.raises(CorruptionError, match=r"takes 100000000 samples and 330000 parts at most"):
        plan_from(document | {"views": 1} | change)
