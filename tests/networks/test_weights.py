"""Weights and saved networks: what loads whole and unchanged, and what of unknown origin is refused and never run."""

import io
import json
import os
import pickle
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from commands import failure, outcome
from damaging import endless, flip
from lessons import CLASSES, digits
from pupils import SPEC, loaded, saved_teacher
from torch import nn

from kcdcache.errors import CorruptionError, MismatchError, NotFoundError, SettingsError, UnfinishedError, UnsafeError
from kcdcache.files.atomic import sha256_file
from kcdcache.files.records import readable_json, sealed_json
from kcdcache.networks import catalogue, registry, weights
from kcdcache.networks.input_transform import InputTransform
from kcdcache.store.identity import read_store_identity

TRANSFORM = InputTransform((0.5,) * 3, (0.25,) * 3)


def digest(network):
    return weights.digest_weights(network.state_dict())


def built(seed=1):
    return registry.build("resnet8", CLASSES, seed=seed)


# files of weights

WRAPPINGS = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 240, "accuracy": torch.tensor(75.6)},
    "state_dict": lambda state: {"state_dict": state},
    "beside other things": lambda state: {3: "three", "net": state, "statistics": {"mean": torch.zeros(3)}},
    "parallel": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    "older than batch counters": lambda state: {k: v for k, v in state.items() if not k.endswith("_batches_tracked")},
}


@pytest.mark.parametrize("wrapping", [*WRAPPINGS, "safetensors"])
def test_checkpoint_loads_from_every_wrapping(wrapping, tmp_path):
    source, target = built(1), built(2)
    if wrapping == "safetensors":
        path = tmp_path / "net.safetensors"
        safetensors.torch.save_file(source.state_dict(), path)
    else:
        path = tmp_path / "net.pth"
        torch.save(WRAPPINGS[wrapping](source.state_dict()), path)
    weights.load_into(target, weights.load_weights(path), str(path))
    assert digest(target) == digest(source)


def prefixed(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def averaged(state):
    """As torch's AveragedModel keeps them, which torchvision's training scripts store as `model_ema`."""
    return {"n_averaged": torch.tensor(9), **prefixed("module.", state)}


SEVERAL = {
    "torchvision": lambda raw, ema: {"model": raw, "model_ema": averaged(ema), "optimizer": {"state": {0: {}}}},
    "timm": lambda raw, ema: {"epoch": 3, "state_dict": raw, "state_dict_ema": ema},
    "nested": lambda raw, ema: {"model": raw, "ema": {"decay": 0.99, "shadow": prefixed("_orig_mod.", ema)}},
}
KEYS = {"torchvision": "model_ema", "timm": "state_dict_ema", "nested": "ema.shadow"}


@pytest.mark.parametrize("kind", SEVERAL)
def test_of_raw_and_averaged_weights_the_raw_are_taken_with_a_warning_and_the_others_by_their_key(
    kind, tmp_path, caplog
):
    path, (raw, ema) = tmp_path / "net.pth", (built(seed) for seed in (1, 2))
    torch.save(SEVERAL[kind](raw.state_dict(), ema.state_dict()), path)
    for key, wanted in ((None, raw), (KEYS[kind], ema)):
        caplog.clear()
        target = built(3)
        weights.load_into(target, weights.load_weights(path, key), str(path))
        assert digest(target) == digest(wanted)
        said = f"holds the weights of 2 networks; those at '{'model' if kind != 'timm' else 'state_dict'}' are taken"
        assert (said in caplog.text, f"--weights-key {KEYS[kind]}" in caplog.text) == (key is None, key is None)
    with pytest.raises(SettingsError, match=rf"--weights-key emaa: .* no weights there, but at .*'{KEYS[kind]}'"):
        weights.load_weights(path, "emaa")


@pytest.mark.parametrize("content", [
    lambda one, other: {"student": one, "teacher": other},
    lambda one, other: {"params": one, "params_ema": other},
])  # fmt: skip
def test_several_networks_at_no_usual_place_must_be_named(content, tmp_path):
    path, (one, other) = tmp_path / "net.pth", (built(seed) for seed in (1, 2))
    torch.save(made := content(one.state_dict(), other.state_dict()), path)
    names = ", ".join(f"'{name}'" for name in made)
    with pytest.raises(MismatchError, match=rf"weights of 2 networks, at {names}; name .* --weights-key {[*made][1]}"):
        weights.load_weights(path)
    assert weights.digest_weights(weights.load_weights(path, [*made][1])) == digest(other)


def test_a_key_may_be_the_beginning_of_names(tmp_path):
    state = prefixed("model.", built(1).state_dict()) | prefixed("ema_model.", built(2).state_dict())
    torch.save({"state_dict": state}, tmp_path / "net.ckpt")
    safetensors.torch.save_file(state, tmp_path / "net.safetensors")
    for name, key in (
        ("net.ckpt", "ema_model"),
        ("net.ckpt", "state_dict.ema_model"),
        ("net.safetensors", "ema_model"),
    ):
        found = weights.load_weights(tmp_path / name, key)
        assert weights.digest_weights(found) == digest(built(2))
    with pytest.raises(SettingsError, match="no weights there, but at 'ema_model', 'model'"):
        weights.load_weights(tmp_path / "net.safetensors", "raw")


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "student.", "_orig_mod.", "module._orig_mod.", "model.student."]
)
def test_a_prefix_that_all_names_share_is_left_out_and_said(prefix, tmp_path, caplog):
    caplog.set_level("INFO")
    torch.save({"state_dict": prefixed(prefix, built(1).state_dict())}, tmp_path / "net.pth")
    target = built(2)
    weights.load_into(target, weights.load_weights(tmp_path / "net.pth"), "net.pth")
    assert digest(target) == digest(built(1))
    assert all(f"'{part}.' before every name is left out" in caplog.text for part in prefix.split(".")[:-1])


def test_a_prefix_of_the_networks_own_is_kept(caplog):
    caplog.set_level("INFO")
    own, other = (nn.ModuleDict({"model": built(seed)}) for seed in (1, 2))
    weights.load_into(other, own.state_dict(), "own")
    assert (digest(other), caplog.text) == (digest(own), "")
    weights.load_into(other, prefixed("module.", own.state_dict()), "own")
    assert digest(other) == digest(own)
    weights.load_into(other := built(2), prefixed("other.", built(1).state_dict()), "net.pth")
    assert (digest(other), "'other.conv1.weight' is taken as 'conv1.weight'" in caplog.text) == (digest(built(1)), True)


class Headed(nn.Module):
    """A network with the second classifiers that inception and googlenet have while they are trained."""

    def __init__(self, heads=()):
        super().__init__()
        self.fc = nn.Linear(2, 3)
        for head in heads:
            setattr(self, head, nn.Linear(2, 3))


@pytest.mark.parametrize("heads", [("AuxLogits",), ("aux1", "aux2")])
def test_second_classifiers_are_left_out_and_said_and_no_other_layers(heads, caplog):
    caplog.set_level("INFO")
    source, target = Headed(heads), Headed()
    weights.load_into(target, prefixed("module.", source.state_dict()), "net.pth")
    assert digest(target.fc) == digest(source.fc)
    assert f"of second classifiers, which serve training only, are left out ({', '.join(heads)})" in caplog.text
    weights.load_into(Headed(heads), source.state_dict(), "net.pth")  # a network that has them keeps them
    with pytest.raises(MismatchError, match=r"2 are unexpected, first 'second\.weight'"):
        weights.load_into(target, Headed(("second",)).state_dict(), "net.pth")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_torchvisions_weights_with_second_classifiers_load(name, caplog):
    torchvision = pytest.importorskip("torchvision")
    caplog.set_level("INFO")
    source = torchvision.models.get_model(name, weights=None, aux_logits=True, init_weights=False, num_classes=CLASSES)
    target = registry.build(f"torchvision:{name}", CLASSES)
    weights.load_into(target, source.state_dict(), "net.pth")
    assert torch.equal(target.fc.weight, source.fc.weight)
    assert "torchvision's own weights of it expect --teacher-mean 0.5,0.5,0.5" in caplog.text


def saved_bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def archive_of_something_else():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24))
        archive.writestr("../../escape", b"x")
    return buffer.getvalue()


WHOLE = saved_bytes({"weight": torch.ones(10_000)})
GARBAGE = (b"", b"no weights at all\n" * 9, b"<!DOCTYPE html>", bytes(200), b"PK\x03\x04" + bytes(90))
PARTS = [WHOLE[: int(len(WHOLE) * share)] for share in (0.1, 0.5, 0.99)]
UNREADABLE = [
    *(("net.safetensors", data, CorruptionError, r"should be a safetensors file") for data in GARBAGE),
    *(("net.pth", data, CorruptionError, r"net\.pth is not a whole torch file")
      for data in (*GARBAGE, *PARTS, archive_of_something_else())),
    ("net.pth", saved_bytes({"epoch": 3}), MismatchError, "only tensors by name; 'epoch' is a int"),
    ("net.pth", saved_bytes([torch.zeros(1)]), MismatchError, "tensors by name, it holds a list"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "error", "message"), UNREADABLE)
def test_files_that_hold_no_weights_are_refused_with_what_they_are(name, data, error, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=message):
        weights.load_weights(tmp_path / name)
    assert not (tmp_path.parent.parent / "escape").exists()


def test_no_file_and_one_larger_than_any_network_are_refused(tmp_path):
    with pytest.raises(NotFoundError, match="no weights file at"):
        weights.load_weights(tmp_path / "absent.pth")
    endless(tmp_path / "net.safetensors", "sparse")
    with pytest.raises(UnsafeError, match="has 1099511627776 bytes, expected at most 17179869184; it is not read"):
        weights.load_weights(tmp_path / "net.safetensors")


def test_weight_digest_ignores_layout_and_order_but_sees_everything_else():
    state = {"a": torch.randn(2, 3, 4, 4), "b": torch.tensor(3)}
    digest = weights.digest_weights(state)
    layout = {"b": state["b"], "a": state["a"].to(memory_format=torch.channels_last)}
    assert weights.digest_weights(layout) == digest
    changes = [{"b": torch.tensor(3, dtype=torch.int32)}, {"a": state["a"].reshape(2, 3, 8, 2)}, {"c": state["b"]}]
    assert digest not in [weights.digest_weights({**state, **change}) for change in changes]


# saved networks: weights and the document beside them


def save(folder, name="model", network=None, **extra):
    network = network or built()
    names = tuple(str(label) for label in range(CLASSES))
    record = weights.NetworkRecord(architecture="resnet8", classes=names, channels=3, transform=TRANSFORM, **extra)
    weights.save_network(folder, name, network, record)
    return record


def test_saved_network_reads_back_whole_and_equal_networks_are_equal_bytes(tmp_path):
    record = save(tmp_path / "new", accuracy=0.5)
    found, state = weights.load_network(tmp_path / "new")
    assert weights.digest_weights(state) == digest(built())
    assert found == record.model_copy(update={"weights_sha256": sha256_file(tmp_path / "new/model.safetensors")})
    assert weights.load_network(tmp_path / "new/model.json")[0].document()["accuracy"] == 0.5
    save(tmp_path / "again", network=built().to(memory_format=torch.channels_last), accuracy=0.5)
    for file in ("model.safetensors", "model.json"):
        assert (tmp_path / "new" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_network_with_tied_weights_is_saved(tmp_path):
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    save(tmp_path, network=network)
    weights.load_into(network, weights.load_network(tmp_path)[1], "model")


def test_flipped_bit_in_saved_weights_is_found(tmp_path):
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(flip(path.read_bytes(), 8 * path.stat().st_size - 40))
    with pytest.raises(CorruptionError, match=r"damaged or was replaced: its SHA-256 is not the one in model\.json"):
        weights.load_network(tmp_path)


def test_incomplete_saved_networks_are_refused(tmp_path):
    with pytest.raises(NotFoundError, match="no file at"):
        weights.load_network(tmp_path)
    save(tmp_path)
    (tmp_path / "model.json").rename(tmp_path / "other.json")
    with pytest.raises(UnfinishedError, match=r"has no model\.json beside it"):
        weights.load_network(tmp_path)
    with pytest.raises(CorruptionError, match=r"describes other\.safetensors, which is not there"):
        weights.load_network(tmp_path, "other")
    (tmp_path / "model.json").write_text('{"architecture": "resnet8"}')
    with pytest.raises(CorruptionError, match="classes: Field required"):
        weights.load_network(tmp_path)


def resealed(folder, **changes):
    document = json.loads((folder / "model.json").read_bytes()) | changes
    document.pop("digest", None)
    (folder / "model.json").write_bytes(sealed_json(document, readable_json))


HOSTILE = {
    "architecture": [7, None, "os:system", "x" * 10**5, "../resnet8", "timm:../x"],
    "classes": [None, "0123456789", [["0"]] * 10, ["\x1b]0;owned\x07"] * 10, []],
    "channels": [None, "3", 10**12, -1],
    "transform": [None, {"mean": [0.5], "std": [0], "size": None}, {"mean": [0.5] * 3, "std": [0.5] * 3, "size": -1}],
}


@pytest.mark.parametrize("key", HOSTILE)
def test_a_saved_network_with_hostile_entries_is_refused(tmp_path, key):
    data = digits()
    folder = saved_teacher(tmp_path / "t", data)
    loaded(folder, data)
    for hostile in HOSTILE[key]:
        resealed(folder, **{key: hostile})
        with pytest.raises((CorruptionError, MismatchError, UnsafeError, SettingsError), match=r"\w"):
            loaded(folder, data)


# other code bases


def renamed(state):
    """As kuangliu's ResNets name their layers, saved from DataParallel."""
    return {"module." + name.replace("downsample", "shortcut").replace("fc.", "linear."): state[name] for name in state}


def test_names_of_another_code_base_are_matched_by_kind_shape_and_order_and_said(caplog):
    source, target = registry.build("resnet14", CLASSES, seed=1), registry.build("resnet14", CLASSES, seed=2)
    weights.load_into(target, renamed(source.state_dict()), "w.pth")
    assert digest(target) == digest(source)
    assert "'layer2.0.shortcut.0.weight' is taken as 'layer2.0.downsample.0.weight'" in caplog.text


@pytest.mark.parametrize("change", ["order", "kind"])
def test_other_order_or_kinds_are_not_matched(change):
    names = renamed(built().state_dict())
    pairs = list(names.items())
    if change == "order":
        pairs = [*pairs[6:], *pairs[:6]]
    else:
        pairs = [(name.replace("running_mean", "average"), value) for name, value in pairs]
    with pytest.raises(MismatchError, match="tensors are missing"):
        weights.load_into(built(), dict(pairs), "w.pth")


@pytest.mark.parametrize("rename", [dict, renamed])
def test_weights_of_another_architecture_or_number_of_classes_say_which(rename):
    state = rename(registry.build("resnet14", 7).state_dict())
    with pytest.raises(MismatchError, match=r"another architecture; .*; they fit 'resnet14'$"):
        weights.load_into(built(), state, "w.pth")
    with pytest.raises(MismatchError, match=r"they are for 7 classes, the network here has 5$"):
        weights.load_into(registry.build("resnet14", 5), state, "w.pth")


# files that would run code, or take what they only claim


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
    return {"state_dict": built().state_dict(), "note": Trap(canary)}


def precompute(path, store="s"):
    """Words of a command that reads these weights."""
    return "precompute", "--data", SPEC, "--teacher", "resnet8", "--weights", path, "--store", store


def test_the_command_says_which_weights_it_takes_and_takes_those_it_is_told_to(tmp_path, capsys, caplog):
    raw, ema = built(1).state_dict(), averaged(built(2).state_dict())
    torch.save({"model": raw, "model_ema": ema}, tmp_path / "t.pth")
    made = {}
    for name, more in (("raw", ()), ("ema", ("--weights-key", "model_ema"))):
        words = (*precompute(tmp_path / "t.pth", tmp_path / name), "--min-accuracy", 0, *more)
        caplog.clear()
        assert outcome(capsys, *words)[0] == 0
        assert ("those at 'model' are taken; others ('model_ema') with" in caplog.text) == (name == "raw")
        made[name] = read_store_identity(tmp_path / name).teacher.weights
    assert made == {"raw": digest(built(1)), "ema": digest(built(2))}
    code, said = failure(capsys, *precompute(tmp_path / "t.pth", tmp_path / "s"), "--weights-key", "optimizer")
    assert (code, "--weights-key optimizer: " in said, "'model', 'model_ema'" in said) == (2, True, True), said
    folder = saved_teacher(tmp_path / "fit", digits())
    words = ("precompute", "--data", SPEC, "--teacher", folder, "--store", tmp_path / "s", "--weights-key", "model")
    code, said = failure(capsys, *words)
    assert (code, "--weights-key does nothing here: a saved network has one set of weights" in said) == (2, True), said


def test_the_trap_works(tmp_path):
    torch.save(trap(tmp_path / "caught"), tmp_path / "t.pt")
    torch.load(tmp_path / "t.pt", weights_only=False)
    assert (tmp_path / "caught").exists()


WRITERS = {
    "zip": torch.save,
    "old": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle 4": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=4)),
    "pickle 0": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=0)),
}


@pytest.mark.parametrize(("writer", "name"), [*zip(WRITERS, ("t.pt", "t.pth", "t.bin", "t"), strict=True)])
def test_pickled_object_is_refused_and_never_run(writer, name, tmp_path, canary):
    WRITERS[writer]({"model": {"w": Trap(canary)}}, tmp_path / name)
    with pytest.raises(UnsafeError, match=r"could run any code, so it is refused.*safetensors"):
        weights.load_weights(tmp_path / name)


def test_a_command_that_is_given_a_torch_file_that_would_run_code_says_so(run, tmp_path, canary):
    torch.save(trap(canary), tmp_path / "t.pt")
    done = run(*precompute(tmp_path / "t.pt", tmp_path / "s"))
    assert (done.code, "holds Python objects besides tensors" in done.output) == (8, True), done.output
    assert "--data" not in done.output


def test_pickles_under_the_name_of_safetensors_or_arrays_run_no_code(run, tmp_path, canary):
    torch.save(trap(canary), tmp_path / "t.safetensors")
    np.save(tmp_path / "l.npy", np.array([Trap(canary)], object))
    np.savez(tmp_path / "a.npz", train_images=np.array([Trap(canary)], object))
    torch.save(trap(canary), tmp_path / "b.npz")
    torch.save(trap(canary), tmp_path / "b.npy")
    from_logits = ("precompute", "--data", SPEC, "--augment", "none", "--store", tmp_path / "s", "--from-logits")
    fit = ("fit", "--model", "resnet8", "--out", tmp_path / "s", "--data")
    for words in (
        precompute(tmp_path / "t.safetensors", tmp_path / "s"),
        *((*from_logits, tmp_path / name) for name in ("l.npy", "b.npy")),
        *((*fit, f"arrays:{tmp_path / name}") for name in ("a.npz", "b.npz")),
    ):
        done = run(*words)
        assert done.code in (2, 3, 8), done.output
        assert "internal error" not in done.output


def test_a_saved_network_cannot_name_a_module_to_import(run, tmp_path, canary):
    (tmp_path / "trap.py").write_text(f"import os\nos.system('touch {canary}')\n")
    folder = saved_teacher(tmp_path / "t", digits())
    resealed(folder, architecture="trap:Net")
    done = run("precompute", "--data", SPEC, "--teacher", folder, "--store", "s", folder=tmp_path)
    assert (done.code, "which could run any code, so only you may name it" in done.output) == (8, True), done.output


def test_only_a_name_that_was_typed_is_imported_from_the_current_folder(run, tmp_path, monkeypatch):
    (tmp_path / "typed_here.py").write_text(
        "from torch import nn\n\ndef net(classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(768, classes))\n"
    )
    torch.save({"0.weight": torch.zeros(10, 768), "0.bias": torch.zeros(10)}, tmp_path / "w.pt")
    given = ("precompute", "--data", SPEC, "--weights", "w.pt", "--min-accuracy", 0, "--views", 1, "--store", "s")
    done = run(*given, "--teacher", "typed_here:net", folder=tmp_path)
    assert done.code == 0, done.output
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=r"No module named 'typed_here'; is its file in a folder on PYTHONPATH\?"):
        registry.build("typed_here:net", 10)
    catalogue.typed(["typed_here:net"])
    before = list(sys.path)
    try:
        assert isinstance(registry.build("typed_here:net", 10), nn.Sequential)
    finally:
        catalogue.TYPED.clear()
        sys.modules.pop("typed_here", None)
    assert sys.path == before
    with pytest.raises(SettingsError, match="No module named 'typed_here'"):
        registry.build("typed_here:net", 10)


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
        text=f"from pathlib import Path\nfrom kcdcache.networks import weights\nweights.load_weights(Path('{path}'))"
    )
    assert done.output.startswith("CorruptionError"), done.output
    assert "should be a safetensors file" in done.output


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", "fifo"])
@pytest.mark.parametrize("name", ["t.pt", "t.safetensors"])
def test_weights_that_are_a_device_or_a_pipe_are_not_waited_for(run, tmp_path, target, name):
    endless(tmp_path / name, target)
    done = run(*precompute(tmp_path / name))
    assert (done.code, "is a pipe or a device" in done.output) == (8, True), done.output


def test_a_tensor_that_repeats_one_number_10_12_times_is_refused_before_it_is_copied(run, tmp_path):
    torch.save(built().state_dict() | {"fc.weight": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "t.pt")
    done = run(*precompute(tmp_path / "t.pt"))
    assert (done.code, "1000000" in done.output) == (4, True), done.output
