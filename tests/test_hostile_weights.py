"""Weights and networks of unknown origin: they must not run code, and must not take what they only claim."""

import json
import os
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from lessons import CLASSES, digits
from pupils import SPEC, loaded, saved_teacher

from kcdcache.errors import CorruptionError, MismatchError, SettingsError, UnsafeError
from kcdcache.files.atomic import canonical_json, digest_of, sha256_file
from kcdcache.networks import registry, weights


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, canary):
        self._canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self._canary}",)


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def trap(canary):
    state = registry.build("resnet8", CLASSES).state_dict()
    return {"state_dict": state, "note": Trap(canary)}


def test_the_trap_works(tmp_path):
    torch.save(trap(tmp_path / "caught"), tmp_path / "t.pt")
    torch.load(tmp_path / "t.pt", weights_only=False)
    assert (tmp_path / "caught").exists()


@pytest.mark.parametrize("name", ["t.pt", "t.pth", "t.bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_that_would_run_code_is_refused_and_runs_none(run, tmp_path, canary, name, zipped):
    torch.save(trap(canary), tmp_path / name, _use_new_zipfile_serialization=zipped)
    done = run(
        "precompute", "--data", SPEC, "--teacher", "resnet8", "--weights", tmp_path / name, "--store", tmp_path / "s"
    )
    assert (done.code, "holds Python objects besides tensors" in done.output) == (8, True), done.output
    assert "--data" not in done.output


def test_pickles_under_the_name_of_safetensors_or_arrays_run_no_code(run, tmp_path, canary):
    torch.save(trap(canary), tmp_path / "t.safetensors")
    np.save(tmp_path / "l.npy", np.array([Trap(canary)], object))
    np.savez(tmp_path / "a.npz", train_images=np.array([Trap(canary)], object))
    torch.save(trap(canary), tmp_path / "b.npz")
    torch.save(trap(canary), tmp_path / "b.npy")
    store = ["--store", tmp_path / "s"]
    for words in (
        ["precompute", "--data", SPEC, "--teacher", "resnet8", "--weights", tmp_path / "t.safetensors", *store],
        *(
            ["precompute", "--data", SPEC, "--from-logits", tmp_path / name, "--augment", "none", *store]
            for name in ("l.npy", "b.npy")
        ),
        *(["fit", "--data", f"arrays:{tmp_path / n}", "--model", "resnet8", *store[1:]] for n in ("a.npz", "b.npz")),
    ):
        done = run(*words)
        assert done.code in (2, 3, 8), done.output
        assert "internal error" not in done.output


def test_student_weights_and_checkpoints_that_would_run_code_are_refused(run, tmp_path, canary):
    folder = saved_teacher(tmp_path / "n", digits())
    torch.save(trap(canary), folder / "model.safetensors")
    document = json.loads((folder / "model.json").read_bytes()) | {
        "weights_sha256": sha256_file(folder / "model.safetensors")
    }
    document.pop("digest", None)
    (folder / "model.json").write_bytes(canonical_json(document | {"digest": digest_of(document)}))
    done = run("verify", folder / "model.json")
    assert (done.code, "should be a safetensors file" in done.output) == (3, True), done.output


def safetensors_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(shape, start, stop):
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


HEADERS = {
    "a header of 2^60 bytes": (b"{}", b"", 2**60),
    "a header of 64 MB": (b"{" + b" " * 2**26 + b"}", b"", None),
    "a million tensors": (
        b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**5)) + b"}",
        b"", None,
    ),
    "tensors that overlap": ({"a": entry([4], 0, 16), "b": entry([4], 0, 16)}, bytes(16), None),
    "a shape of 10^9 on 16 bytes": ({"a": entry([10**9], 0, 16)}, bytes(16), None),
    "shapes whose product overflows": ({"a": entry([2**32, 2**32], 0, 0)}, b"", None),
    "offsets beyond the file": ({"a": entry([2**28], 0, 2**30)}, bytes(16), None),
    "offsets backwards": ({"a": entry([4], 16, 0)}, bytes(16), None),
    "a hole": ({"a": entry([4], 16, 32)}, bytes(32), None),
    "deep JSON": (b'{"a":' * 10**5, b"", None),
    "no JSON": (b"\xff" * 64, b"", None),
}  # fmt: skip


@pytest.mark.parametrize("claim", HEADERS)
def test_hostile_safetensors_headers_are_refused_in_little_memory(run, tmp_path, claim):
    header, data, length = HEADERS[claim]
    path = safetensors_file(tmp_path / "t.safetensors", header, data, length)
    done = run(
        text=f"from pathlib import Path\nfrom kcdcache.models import weights\nweights.load_weights(Path('{path}'))"
    )
    assert done.output.startswith("CorruptionError"), done.output
    assert "should be a safetensors file" in done.output


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/random", "/dev/stdin", "fifo"])
def test_weights_that_are_a_device_or_a_pipe_are_not_waited_for(run, tmp_path, target):
    for name in ("t.pt", "t.safetensors"):
        if target == "fifo":
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).symlink_to(target)
        done = run("precompute", "--data", SPEC, "--teacher", "resnet8", "--weights", tmp_path / name, "--store", "s")
        assert (done.code, "is a pipe or a device" in done.output) == (8, True), done.output


def test_weights_larger_than_any_network_are_not_read(tmp_path):
    with open(tmp_path / "t.safetensors", "wb") as stream:
        stream.truncate(2**40)  # a sparse file: it takes no room
    with pytest.raises(UnsafeError, match="has 1099511627776 bytes, expected at most 17179869184; it is not read"):
        weights.load_weights(tmp_path / "t.safetensors")


def test_a_tensor_that_repeats_one_number_10_12_times_is_refused_before_it_is_copied(run, tmp_path):
    state = registry.build("resnet8", CLASSES).state_dict()
    torch.save(state | {"fc.weight": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "t.pt")
    done = run("precompute", "--data", SPEC, "--teacher", "resnet8", "--weights", tmp_path / "t.pt", "--store", "s")
    assert (done.code, "[1000000, 1000000]" in done.output or "1000000 classes" in done.output) == (4, True), (
        done.output
    )


def test_an_archive_that_is_no_torch_file_is_damage(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24))
        archive.writestr("../../escape", b"x")
    with pytest.raises(CorruptionError, match=r"t\.pt is not a whole torch file"):
        weights.load_weights(tmp_path / "t.pt")
    assert not (tmp_path.parent.parent / "escape").exists()


def resealed(folder, **changes):
    document = json.loads((folder / "model.json").read_bytes()) | changes
    document.pop("digest", None)
    (folder / "model.json").write_bytes(canonical_json(document | {"digest": digest_of(document)}))


HOSTILE = {
    "architecture": [["resnet8"], 7, None, "os:system", "posix:system", "x" * 10**5, "../resnet8", "timm:../x"],
    "classes": [None, "0123456789", {"0": 1}, [["0"]] * 10, [0] * 10, ["\x1b]0;owned\x07"] * 10, []],
    "channels": [None, "3", 10**12, -1, 3.5],
    "transform": [
        None, [], {"mean": [0.5], "std": [0], "size": None},
        {"mean": "abc", "std": "abc", "size": None}, {"mean": [0.5] * 3, "std": [0.5] * 3, "size": -1},
    ],
}  # fmt: skip


@pytest.mark.parametrize("key", HOSTILE)
def test_a_saved_network_with_hostile_entries_is_refused(tmp_path, key):
    data = digits()
    folder = saved_teacher(tmp_path / "t", data)
    loaded(folder, data)
    for hostile in HOSTILE[key]:
        resealed(folder, **{key: hostile})
        with pytest.raises((CorruptionError, MismatchError, UnsafeError, SettingsError), match=r"\w"):
            loaded(folder, data)


def test_a_saved_network_cannot_name_a_module_to_import(run, tmp_path, canary):
    (tmp_path / "trap.py").write_text(f"import os\nos.system('touch {canary}')\n")
    folder = saved_teacher(tmp_path / "t", digits())
    resealed(folder, architecture="trap:Net")
    done = run("precompute", "--data", SPEC, "--teacher", folder, "--store", "s", folder=tmp_path)
    assert (done.code, "which could run any code, so only you may name it" in done.output) == (8, True), done.output


def test_tensors_of_a_good_file_still_load(tmp_path):
    state = registry.build("resnet8", CLASSES).state_dict()
    torch.save({"model": state}, tmp_path / "t.pt")
    (tmp_path / "t.safetensors").write_bytes(safetensors.torch.save(state))
    for name in ("t.pt", "t.safetensors"):
        assert set(weights.load_weights(tmp_path / name)) == set(state)
