import json
import os
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from kcdcache.errors import CorruptionError, MismatchError, NotFoundError, SettingsError, UnfinishedError, UnsafeError
from kcdcache.networks import registry, taps, weights
from kcdcache.networks.input_transform import InputTransform, transform_from


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_weights_are_a_function_of_the_seed_and_the_global_generator_is_untouched():
    before = torch.get_rng_state()
    digests = [weights.digest_weights(registry.build("resnet8", 10, seed=s).state_dict()) for s in (7, 7, 8, 7 + 2**32)]
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    again = weights.digest_weights(registry.build("resnet8", 10, seed=7).state_dict())
    assert again == digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_torchvision_network_is_built_by_name_with_its_penultimate():
    network = registry.build("torchvision:resnet18", 7, seed=1).eval()
    found = taps.run(network, noise(1, 3, 64, 64), ["stage4", "penultimate", "logits"])
    assert [tuple(value.shape[1:]) for value in found.values()] == [(512, 2, 2), (512,), (7,)]
    torch.testing.assert_close(network.fc(found["penultimate"]), found["logits"])


def test_torchvision_network_that_warns_by_itself_is_built():
    assert taps.run(registry.build("torchvision:googlenet", 7), noise(2, 3, 64, 64), ["logits"])["logits"].shape == (
        2,
        7,
    )


@pytest.mark.skipif(registry.timm is not None, reason="timm is installed")
def test_missing_timm_names_the_extra():
    with pytest.raises(SettingsError, match=r"kcdcache\[timm\]"):
        registry.build("timm:resnet18", 10)


@pytest.mark.skipif(registry.timm is None, reason="timm is not installed")
def test_timm_network_is_built_by_name():
    found = taps.run(registry.build("timm:resnet18", 10, channels=1).eval(), noise(1, 1, 64, 64), ["penultimate"])
    assert found["penultimate"].shape == (1, 512)


FACTORIES = """
from torch import nn

def tiny(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))

def number(num_classes):
    return num_classes
"""


def test_users_own_factory_is_imported_and_called(tmp_path, monkeypatch):
    (tmp_path / "networks_of_mine.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    assert taps.run(registry.build("networks_of_mine:tiny", 5), noise(2, 3, 2, 2), ["logits"])["logits"].shape == (2, 5)
    with pytest.raises(SettingsError, match="no function 'tinny'; did you mean 'tiny'"):
        registry.build("networks_of_mine:tinny", 5)
    with pytest.raises(SettingsError, match=r"networks_of_mine:number should return a torch\.nn\.Module.* int"):
        registry.build("networks_of_mine:number", 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrn_40_3", "unknown network 'wrn_40_3'; did you mean 'wrn_40_"),
        ("resnet50", "did you mean 'ResNet50'"),
        ("VGG8", "did you mean 'vgg8'"),
        ("torchvision:resnet19", "did you mean 'resnet1"),
        ("no_such_module_here:net", "No module named 'no_such_module_here'; is its folder on PYTHONPATH"),
    ],
)
def test_unknown_network_gets_a_hint(name, message):
    with pytest.raises(SettingsError, match=message):
        registry.build(name, 10)


def test_torchvision_refuses_other_channels():
    with pytest.raises(SettingsError, match="takes 3 channels, the images have 1"):
        registry.build("torchvision:resnet18", 10, channels=1)


def test_unknown_tap_gets_a_hint():
    with pytest.raises(SettingsError, match=r"no value 'stage9'; did you mean 'stage"):
        taps.run(registry.build("resnet8", 10), noise(1, 3, 8, 8), ["stage9"])


def hooks_of(network):
    return [hook for module in network.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def test_hooks_are_removed_also_when_the_network_fails():
    network = registry.build("resnet8", 10)
    taps.run(network, noise(1, 3, 8, 8), ["stage1", "penultimate"])
    with pytest.raises(RuntimeError, match="channels"):
        taps.run(network, noise(1, 2, 8, 8), ["stage1", "penultimate"])
    assert hooks_of(network) == []


class HeadFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.body = nn.Linear(12, 4)

    def forward(self, pixels):
        return self.head(self.body(pixels.flatten(1)))


def test_a_last_linear_layer_that_is_not_the_classifier_is_refused():
    with pytest.raises(SettingsError, match=r"'body' turns \(2, 12\) into 4 values.* 3 logits, so it is not the class"):
        taps.run(HeadFirst(), noise(2, 3, 2, 2), ["penultimate"])


def test_network_without_linear_classifier_has_no_penultimate():
    assert "penultimate" not in taps.stage_taps(nn.Conv2d(3, 4, 1))
    with pytest.raises(SettingsError, match=r"should return logits of shape \(batch, classes\)"):
        taps.run(nn.Conv2d(3, 4, 1), noise(1, 3, 2, 2), ["logits"])


def test_transform_normalises_per_channel():
    transform = InputTransform((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    pixels = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    mean, std = (np.array(values).reshape(1, 3, 1, 1) for values in (transform.mean, transform.std))
    np.testing.assert_allclose(transform(pixels).numpy(), (pixels.numpy() - mean) / std, rtol=1e-5, atol=1e-6)


def test_transform_resizes_with_antialiasing():
    transform = InputTransform((0.0,), (1.0,), size=2)
    ramp = torch.arange(64, dtype=torch.float32).view(1, 1, 8, 8) / 64
    small = transform(ramp)
    assert small.shape == (1, 1, 2, 2)
    assert small.mean().item() == pytest.approx(ramp.mean().item(), abs=1e-6)
    # one bright pixel that plain bilinear sampling would miss
    dot = torch.zeros(1, 1, 8, 8)
    dot[0, 0, 0, 0] = 1
    assert transform(dot).max() > 0


def test_transform_leaves_images_of_its_size_alone():
    pixels = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(InputTransform((0.1,), (0.3,), size=4)(pixels), InputTransform((0.1,), (0.3,))(pixels))


def test_transform_first_used_in_inference_mode_can_train_later():
    transform = InputTransform((0.123,), (0.456,))
    with torch.inference_mode():
        transform(torch.zeros(1, 1, 2, 2))
    pixels = torch.zeros(1, 1, 2, 2, requires_grad=True)
    transform(pixels).sum().backward()
    assert pixels.grad is not None


@pytest.mark.parametrize("size", [None, 224])
def test_transform_survives_its_document(size):
    transform = InputTransform((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), size)
    assert transform_from(json.loads(json.dumps(transform.document()))) == transform


def test_impossible_transforms_are_refused():
    with pytest.raises(SettingsError, match=r"std .* above 0"):
        InputTransform((0.5,), (0.0,))
    with pytest.raises(SettingsError, match="one number per channel each"):
        InputTransform((0.5, 0.5), (0.1,))
    with pytest.raises(SettingsError, match="input size 0"):
        InputTransform((0.5,), (0.1,), 0)
    with pytest.raises(CorruptionError, match="needs mean, std and size"):
        transform_from({"mean": [0.5]})
    with pytest.raises(MismatchError, match="has 3 channels, the images 1"):
        InputTransform((0.5,) * 3, (0.1,) * 3)(torch.zeros(1, 1, 2, 2))


def save_torch(path, content):
    torch.save(content, path)
    return path


WRAPPINGS = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 240, "accuracy": torch.tensor(75.6)},
    "state_dict": lambda state: {"state_dict": state},
    "parallel": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_checkpoint_loads_from_every_wrapping(wrapping, tmp_path):
    source, target = registry.build("resnet8", 10, seed=1), registry.build("resnet8", 10, seed=2)
    path = save_torch(tmp_path / "net.pth", WRAPPINGS[wrapping](source.state_dict()))
    weights.load_into(target, weights.load_weights(path), str(path))
    assert weights.digest_weights(target.state_dict()) == weights.digest_weights(source.state_dict())


def test_safetensors_file_loads(tmp_path):
    state = registry.build("resnet8", 10, seed=1).state_dict()
    safetensors.torch.save_file(state, tmp_path / "net.safetensors")
    assert weights.digest_weights(weights.load_weights(tmp_path / "net.safetensors")) == weights.digest_weights(state)


def test_checkpoint_older_than_batch_counters_loads():
    source, target = registry.build("resnet8", 10, seed=1), registry.build("resnet8", 10, seed=2)
    old = {name: value for name, value in source.state_dict().items() if not name.endswith("num_batches_tracked")}
    weights.load_into(target, old, "old.pth")
    assert weights.digest_weights(target.state_dict()) == weights.digest_weights(source.state_dict())


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def write_raw_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=4))


def write_old_torch(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_oldest_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=0))


@pytest.mark.parametrize("write", [torch.save, write_old_torch, write_raw_pickle, write_oldest_pickle])
def test_pickled_object_is_refused_and_never_run(write, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "net.pth"
    write({"model": {"w": Canary(canary)}}, path)
    with pytest.raises(UnsafeError, match=r"could run any code, so it is refused.*safetensors"):
        weights.load_weights(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    "data", [b"", b"no weights at all\n" * 9, b"<!DOCTYPE html>", bytes(200), b"PK\x03\x04" + bytes(90)]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_garbage_is_corruption(data, suffix, tmp_path):
    path = tmp_path / f"net{suffix}"
    path.write_bytes(data)
    with pytest.raises(
        CorruptionError, match=r"net\.(pth is not a whole torch|safetensors should be a safetensors) file"
    ):
        weights.load_weights(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_checkpoint_is_corruption(share, tmp_path):
    path = save_torch(tmp_path / "net.pth", registry.build("resnet8", 10).state_dict())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CorruptionError, match="not a whole torch file"):
        weights.load_weights(path)


def test_missing_weights_are_not_found(tmp_path):
    with pytest.raises(NotFoundError, match="no weights file at"):
        weights.load_weights(tmp_path / "absent.pth")


def test_checkpoint_without_weights_says_what_it_holds(tmp_path):
    with pytest.raises(MismatchError, match="only tensors by name; 'epoch' is a int"):
        weights.load_weights(save_torch(tmp_path / "net.pth", {"epoch": 3}))
    with pytest.raises(MismatchError, match="tensors by name, it holds a list"):
        weights.load_weights(save_torch(tmp_path / "net.pth", [torch.zeros(1)]))


def test_wrong_class_count_is_named():
    state = registry.build("wrn_16_2", 100).state_dict()
    with pytest.raises(MismatchError, match="they are for 100 classes, the network here has 10"):
        weights.load_into(registry.build("wrn_16_2", 10), state, "net.pth")


def test_wrong_architecture_names_the_first_differences():
    with pytest.raises(
        MismatchError, match=r"another architecture; 27 .* missing, first 'bn1\.weight'|another arch.* first"
    ):
        weights.load_into(registry.build("resnet20", 10), registry.build("wrn_16_2", 10).state_dict(), "net.pth")
    with pytest.raises(MismatchError, match=r"first 'conv1\.weight': \[16, 3, 3, 3\] expected, \[32, 3, 3, 3\] found"):
        weights.load_into(registry.build("resnet8", 10), registry.build("resnet8x4", 10).state_dict(), "net.pth")


def test_weight_digest_ignores_layout_and_order_but_sees_everything_else():
    state = {"a": noise(2, 3, 4, 4), "b": torch.tensor(3)}
    digest = weights.digest_weights(state)
    layout = {"b": state["b"], "a": state["a"].to(memory_format=torch.channels_last)}
    assert weights.digest_weights(layout) == digest
    changes = [{"b": torch.tensor(3, dtype=torch.int32)}, {"a": state["a"].reshape(2, 3, 8, 2)}, {"c": state["b"]}]
    assert digest not in [weights.digest_weights({**state, **change}) for change in changes]


TRANSFORM = InputTransform((0.5,) * 3, (0.25,) * 3)


def save(folder, name="model", seed=1, **extra):
    network = registry.build("resnet8", 3, seed=seed)
    weights.save_network(folder, name, network, weights.describe_network("resnet8", "abc", 3, TRANSFORM, **extra))
    return network


def test_saved_network_reads_back_whole(tmp_path):
    network = save(tmp_path / "new", accuracy=0.5)
    document, state = weights.load_network(tmp_path / "new")
    assert weights.digest_weights(state) == weights.digest_weights(network.state_dict())
    assert document.pop("weights_sha256")
    expected = {"architecture": "resnet8", "classes": ["a", "b", "c"], "channels": 3, "accuracy": 0.5}
    assert document == {**expected, "transform": TRANSFORM.document()}
    assert weights.load_network(tmp_path / "new/model.json")[0]["accuracy"] == 0.5


def test_equal_networks_are_saved_as_equal_bytes(tmp_path):
    network = save(tmp_path / "a")
    document = weights.describe_network("resnet8", "abc", 3, TRANSFORM)
    weights.save_network(tmp_path / "b", "model", network.to(memory_format=torch.channels_last), document)
    for file in ("model.safetensors", "model.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_network_with_tied_weights_is_saved(tmp_path):
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    weights.save_network(tmp_path, "model", network, weights.describe_network("x", "abc", 3, TRANSFORM))
    weights.load_into(network, weights.load_network(tmp_path)[1], "model")


def test_flipped_bit_in_saved_weights_is_found(tmp_path):
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
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
    with pytest.raises(CorruptionError, match="it lacks 'classes'"):
        weights.load_network(tmp_path)
