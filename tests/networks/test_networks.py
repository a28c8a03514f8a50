"""The networks of the paper and from elsewhere: names, shapes, forward passes, initial weights, taps, their input."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from kcdcache.errors import MismatchError, SettingsError
from kcdcache.networks import registry, taps, weights
from kcdcache.networks.input_transform import InputTransform

PARAMETERS = {
    "resnet8": 83892, "resnet14": 181108, "resnet20": 278324, "resnet32": 472756, "resnet44": 667188,
    "resnet56": 861620, "resnet110": 1736564, "resnet8x4": 1233540, "resnet32x4": 7433860, "ResNet50": 23705252,
    "wrn_10_2": 315316, "wrn_16_1": 180916, "wrn_16_2": 703284, "wrn_28_2": 1479220, "wrn_40_1": 569780,
    "wrn_40_2": 2255156, "vgg8": 3965028, "vgg11": 9277284, "vgg13": 9462180, "vgg16": 14774436, "vgg19": 20086692,
    "MobileNetV2": 812836, "ShuffleV1": 949258, "ShuffleV2": 1355528,
}  # fmt: skip
FAMILIES = ("resnet8", pytest.param("ResNet50", marks=pytest.mark.slow), "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1",
            "ShuffleV2")  # fmt: skip
"""one network of each family"""
UNPUBLISHED = {"wrn_10_2", "wrn_28_2"}  # of the capacity study; no checkpoint of CRD's authors
CHECKPOINTS = Path(__file__).parents[3] / "shared/data/published_checkpoints.json"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stages(network):
    return [name for name in taps.stage_taps(network) if name.startswith("stage") and not name.endswith(".pre")]


def settled(name, classes=10):
    """Return a network in evaluation whose normalisations all differ, as after training."""
    network = registry.build(name, classes, seed=3).eval()
    generator = torch.Generator().manual_seed(1)
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        for values in (norm.weight, norm.running_var):
            nn.init.uniform_(values, 0.5, 1.5, generator=generator)
        nn.init.uniform_(norm.running_mean, -0.3, 0.3, generator=generator)
        nn.init.uniform_(norm.bias, -0.3, 0.3, generator=generator)
    return network


def test_every_network_of_the_zoo_has_its_known_number_of_parameters():
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in registry.build(name, 100).parameters()) for name in registry.NETWORKS}
    assert counts == PARAMETERS


@pytest.mark.skipif(not CHECKPOINTS.exists(), reason="the published shapes are not beside us")
@pytest.mark.parametrize("name", sorted(PARAMETERS.keys() - UNPUBLISHED))
def test_names_and_shapes_are_those_of_the_published_checkpoints(name):
    expected, network = json.loads(CHECKPOINTS.read_text())[name], registry.build(name, 100)
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == expected["state_dict"]
    assert stages(network) == [f"stage{n}" for n in range(len(expected["features"]) - 1)]
    with torch.no_grad():
        found = taps.run(network.eval(), noise(1, 3, 32, 32), [*stages(network), "penultimate"])
    assert [list(value.shape[1:]) for value in found.values()] == expected["features"]


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_other_classes_are_told_as_that(name):
    network, state = registry.build(name, 10), registry.build(name, 7).state_dict()
    with pytest.raises(MismatchError, match=r"^the weights in net\.pth do not fit .*: they are for 7 classes, .* 10$"):
        weights.load_into(network, state, "net.pth")


def test_weights_of_another_architecture_get_one_clear_error():
    network = registry.build("resnet8", 10)
    lacking = network.state_dict()
    del lacking["layer3.0.bn2.running_var"]
    vgg, wide = (registry.build(name, 10).state_dict() for name in ("vgg8", "resnet8x4"))
    for state, message in (
        (vgg, r"\d+ tensors are missing, first 'conv1.weight'; \d+ are unexpected"),
        (wide, r"'conv1\.weight': \[16, 3, 3, 3\] expected, \[32, 3, 3, 3\] found"),
        (lacking, r"1 tensors are missing, first 'layer3\.0\.bn2\.running_var'$"),
    ):
        with pytest.raises(MismatchError, match="do not fit ResNet: another architecture; .*" + message):
            weights.load_into(network, state, "net.pth")


@pytest.mark.parametrize(
    ("name", "side", "last"),
    [
        ("resnet8", 16, (64, 4, 4)), ("resnet8x4", 16, (256, 4, 4)), ("wrn_16_2", 16, (128, 4, 4)),
        ("ResNet50", 17, (2048, 3, 3)), ("vgg8", 8, (512, 1, 1)), ("vgg8", 63, (512, 7, 7)), ("vgg8", 64, (512, 4, 4)),
        ("vgg8", 96, (512, 6, 6)), ("MobileNetV2", 8, (160, 1, 1)), ("MobileNetV2", 96, (160, 6, 6)),
        ("ShuffleV1", 20, (960, 3, 3)), ("ShuffleV2", 64, (464, 8, 8)),
    ],
)  # fmt: skip
def test_other_sides_and_channels_work(name, side, last):
    network = registry.build(name, 10, channels=1).eval()
    found = taps.run(network, noise(2, 1, side, side), [stages(network)[-1], "logits"])
    assert [tuple(value.shape) for value in found.values()] == [(2, *last), (2, 10)]


class Layers:
    """The layers of a state dict by name, applied with plain functions."""

    def __init__(self, state):
        self.state = state

    def conv(self, name, x, **options):
        return functional.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **options)

    def norm(self, name, x):
        keys = ("running_mean", "running_var", "weight", "bias")
        mean, variance, scale, shift = (self.state[f"{name}.{key}"].view(1, -1, 1, 1) for key in keys)
        return (x - mean) / torch.sqrt(variance + 1e-5) * scale + shift

    def conv_norm(self, conv, norm, x, **options):
        return self.norm(norm, self.conv(conv, x, **options))

    def active(self, conv, norm, x, **options):
        return torch.relu(self.conv_norm(conv, norm, x, **options))

    def classify(self, name, vector):
        logits = vector @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]
        return {"penultimate": vector, "logits": logits}


def basic_branch(layers, at, x, stride):
    hidden = layers.active(f"{at}.conv1", f"{at}.bn1", x, stride=stride, padding=1)
    return layers.conv_norm(f"{at}.conv2", f"{at}.bn2", hidden, padding=1)


def bottleneck_branch(layers, at, x, stride):
    hidden = layers.active(f"{at}.conv1", f"{at}.bn1", x)
    hidden = layers.active(f"{at}.conv2", f"{at}.bn2", hidden, stride=stride, padding=1)
    return layers.conv_norm(f"{at}.conv3", f"{at}.bn3", hidden)


def rows(features, counts, block, halving=1):
    """Stages of blocks (place, features, stride) -> (before activation, features), halving from that stage on."""
    values = {"stage0": features}
    for n, count in enumerate(counts, start=1):
        for number in range(count):
            before, features = block(f"layer{n}.{number}", features, 2 if n >= halving and number == 0 else 1)
        values |= {f"stage{n}": features, f"stage{n}.pre": before}
    return values


def resnet(counts, branch, shortcut="downsample", classifier="fc", pooled=False):
    """A network of such blocks; one for larger images halves them twice before the first."""

    def by_hand(layers, pixels):
        def block(at, x, stride):
            known = f"{at}.{shortcut}.0.weight" in layers.state
            identity = layers.conv_norm(f"{at}.{shortcut}.0", f"{at}.{shortcut}.1", x, stride=stride) if known else x
            before = branch(layers, at, x, stride) + identity
            return before, torch.relu(before)

        stem = layers.active("conv1", "bn1", pixels, stride=2 if pooled else 1, padding=3 if pooled else 1)
        stem = functional.max_pool2d(stem, 3, stride=2, padding=1) if pooled else stem
        values = rows(stem, counts, block, halving=2)
        return values | layers.classify(classifier, values[f"stage{len(counts)}"].mean((2, 3)))

    return by_hand


def wrn_16_2(layers, pixels):
    features = layers.conv("conv1", pixels, padding=1)
    values = {"stage0": features}
    for n in (1, 2, 3):
        for number in range(2):
            at, stride = f"block{n}.layer.{number}", 2 if n > 1 and number == 0 else 1
            before = layers.norm(f"{at}.bn1", features)
            if n > 1 and number == 0:
                values[f"stage{n - 1}.pre"] = before
            active = torch.relu(before)
            branch = layers.conv_norm(f"{at}.conv1", f"{at}.bn2", active, stride=stride, padding=1)
            widened = layers.conv(f"{at}.convShortcut", active, stride=stride) if number == 0 else features
            features = layers.conv(f"{at}.conv2", torch.relu(branch), padding=1) + widened
        values[f"stage{n}"] = features
    values["stage3.pre"] = layers.norm("bn1", features)
    return values | layers.classify("fc", torch.relu(values["stage3.pre"]).mean((2, 3)))


def vgg11(layers, pixels):
    features, values = pixels, {}
    for n, depth in enumerate((1, 1, 2, 2, 2)):
        for number in range(depth):
            at = 3 * number
            before = layers.conv_norm(f"block{n}.{at}", f"block{n}.{at + 1}", features, padding=1)
            features = torch.relu(before)
        values |= {f"stage{n}": features, f"stage{n}.pre": before}
        if n < 3:
            features = functional.max_pool2d(features, 2)
    del values["stage0.pre"]
    return values | layers.classify("classifier", features.mean((2, 3)))


def inverted_residual(layers, at, x, stride):
    hidden = layers.active(f"{at}.0", f"{at}.1", x)
    options = {"stride": stride, "padding": 1, "groups": hidden.shape[1]}
    hidden = layers.active(f"{at}.3", f"{at}.4", hidden, **options)
    found = layers.conv_norm(f"{at}.6", f"{at}.7", hidden)
    return found + x if found.shape == x.shape else found


def mobilenet_v2(layers, pixels):
    features = layers.active("conv1.0", "conv1.1", pixels, stride=2, padding=1)
    values, ends = {"stage0": features}, {1: 1, 2: 2, 4: 3, 6: 4}
    for stage, (count, stride) in enumerate(zip((1, 2, 3, 4, 3, 3, 1), (1, 1, 2, 2, 1, 2, 1), strict=True)):
        for number in range(count):
            at = f"blocks.{stage}.{number}.conv"
            features = inverted_residual(layers, at, features, stride if number == 0 else 1)
        if stage in ends:
            values |= {f"stage{ends[stage]}": features, f"stage{ends[stage]}.pre": features}
    features = layers.active("conv2.0", "conv2.1", features)
    return values | layers.classify("classifier.0", features.mean((2, 3)))


def shuffled(x, groups):
    size = x.shape[1] // groups
    return x[:, [part * size + place for place in range(size) for part in range(groups)]]


def shuffle_v1(layers, pixels):
    def block(at, x, stride):
        groups = 1 if x.shape[1] == 24 else 3
        hidden = shuffled(layers.active(f"{at}.conv1", f"{at}.bn1", x, groups=groups), groups)
        options = {"stride": stride, "padding": 1, "groups": hidden.shape[1]}
        hidden = layers.active(f"{at}.conv2", f"{at}.bn2", hidden, **options)
        hidden = layers.conv_norm(f"{at}.conv3", f"{at}.bn3", hidden, groups=3)
        before = hidden + x if stride == 1 else torch.cat([hidden, functional.avg_pool2d(x, 3, 2, 1)], 1)
        return before, torch.relu(before)

    values = rows(layers.active("conv1", "bn1", pixels), (4, 8, 4), block)
    return values | layers.classify("linear", values["stage3"].mean((2, 3)))


def halving_block(layers, at, x):
    left = layers.conv_norm(f"{at}.conv1", f"{at}.bn1", x, stride=2, padding=1, groups=x.shape[1])
    left = layers.active(f"{at}.conv2", f"{at}.bn2", left)
    right = layers.active(f"{at}.conv3", f"{at}.bn3", x)
    right = layers.conv_norm(f"{at}.conv4", f"{at}.bn4", right, stride=2, padding=1, groups=right.shape[1])
    right = layers.active(f"{at}.conv5", f"{at}.bn5", right)
    return shuffled(torch.cat([left, right], 1), 2)


def shuffle_v2(layers, pixels):
    def block(at, x, stride):
        if stride == 2:
            return None, halving_block(layers, at, x)
        kept, branch = x.chunk(2, dim=1)
        branch = layers.active(f"{at}.conv1", f"{at}.bn1", branch)
        branch = layers.conv_norm(f"{at}.conv2", f"{at}.bn2", branch, padding=1, groups=branch.shape[1])
        branch = layers.conv_norm(f"{at}.conv3", f"{at}.bn3", branch)
        return torch.cat([kept, branch], 1), shuffled(torch.cat([kept, torch.relu(branch)], 1), 2)

    values = rows(layers.active("conv1", "bn1", pixels), (4, 8, 4), block)
    features = layers.active("conv2", "bn2", values["stage3"])
    return values | layers.classify("linear", features.mean((2, 3)))


FORWARD = {
    "resnet14": resnet((2, 2, 2), basic_branch),
    "wrn_16_2": wrn_16_2,
    "ResNet50": resnet((3, 4, 6, 3), bottleneck_branch, "shortcut", "linear"),
    "vgg11": vgg11,
    "MobileNetV2": mobilenet_v2,
    "ShuffleV1": shuffle_v1,
    "ShuffleV2": shuffle_v2,
    "torchvision:resnet18": resnet((2, 2, 2, 2), basic_branch, pooled=True),
    "torchvision:resnet50": resnet((3, 4, 6, 3), bottleneck_branch, pooled=True),
}


@pytest.mark.parametrize("name", FORWARD)
def test_every_tap_is_the_value_of_the_published_forward_pass(name):
    network, pixels = settled(name), noise(2, 3, 32, 32)
    with torch.no_grad():
        expected = FORWARD[name](Layers(network.state_dict()), pixels)
        assert set(expected) == set(taps.stage_taps(network))
        for tap, found in taps.run(network, pixels, list(expected)).items():
            scale = expected[tap].abs().max().item()
            torch.testing.assert_close(found, expected[tap], rtol=1e-4, atol=1e-5 * scale, msg=tap)


@pytest.mark.parametrize("name", FAMILIES)
def test_tapping_changes_neither_logits_nor_gradients_and_taps_reach_every_parameter(name):
    results, every = [], list(taps.stage_taps(registry.build(name, 10)))
    for names in (["logits"], every):
        network = registry.build(name, 10, seed=1).train()
        found = taps.run(network, noise(4, 3, 16, 16), names)
        found["logits"].square().sum().backward(retain_graph=True)
        results.append([found["logits"], *(parameter.grad.clone() for parameter in network.parameters())])
    assert all(torch.equal(plain, tapped) for plain, tapped in zip(*results, strict=True))
    assert all(value.requires_grad for value in found.values())
    network.zero_grad()
    sum(value.square().mean() for value in found.values()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "kernel", "spread"),
    [
        ("resnet56", "layer3.4.conv1", (2 / (64 * 9)) ** 0.5), ("wrn_40_2", "block3.layer.1.conv1", (2 / 1152) ** 0.5),
        ("ResNet50", "layer3.2.conv3", (2 / 1024) ** 0.5), ("vgg8", "block3.0", (2 / (512 * 9)) ** 0.5),
        ("vgg8", "classifier", 0.01), ("MobileNetV2", "blocks.5.1.conv.3", (2 / (480 * 9)) ** 0.5),
        ("MobileNetV2", "classifier.0", 0.01),
        # torch's own: uniform within 1 / sqrt(fan in)
        ("ShuffleV1", "layer3.1.conv1", (1 / (3 * 320)) ** 0.5), ("ShuffleV2", "layer3.1.conv3", (1 / 696) ** 0.5),
    ],
)  # fmt: skip
def test_weights_start_with_the_published_spread_biases_at_zero_and_normalisations_at_identity(name, kernel, spread):
    network = registry.build(name, 100, seed=1)
    weight = network.get_submodule(kernel).weight
    assert weight.std().item() == pytest.approx(spread, rel=0.03)
    assert weight.mean().item() == pytest.approx(0, abs=spread / 20)
    assert all(torch.all(module.weight == 1) for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    if name[:3] in ("wrn", "vgg", "Mob"):  # the others leave their classifier as torch makes it
        assert all(torch.all(value == 0) for key, value in network.named_parameters() if key.endswith("bias"))


def test_weights_are_a_function_of_the_seed_and_the_global_generator_is_untouched():
    before = torch.get_rng_state()
    digests = [weights.digest_weights(registry.build("resnet8", 10, seed=s).state_dict()) for s in (7, 7, 8, 7 + 2**32)]
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    assert weights.digest_weights(registry.build("resnet8", 10, seed=7).state_dict()) == digests[0] == digests[1]
    assert len(set(digests)) == 3


# networks from elsewhere


def test_a_torchvision_network_that_warns_by_itself_is_built_and_its_channels_are_checked():
    noisy = registry.build("torchvision:googlenet", 7)
    assert taps.run(noisy, noise(2, 3, 64, 64), ["logits"])["logits"].shape == (2, 7)
    with pytest.raises(SettingsError, match="takes 3 channels, the images have 1"):
        registry.build("torchvision:resnet18", 10, channels=1)


def test_timm_networks_are_built_by_name_or_the_extra_is_named():
    if importlib.util.find_spec("timm") is None:
        with pytest.raises(SettingsError, match=r"kcdcache\[timm\]"):
            registry.build("timm:resnet18", 10)
    else:
        found = taps.run(registry.build("timm:resnet18", 10, channels=1).eval(), noise(1, 1, 64, 64), ["penultimate"])
        assert found["penultimate"].shape == (1, 512)


def tiny(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))


def test_users_own_factory_is_imported_and_called():
    found = taps.run(registry.build("test_networks:tiny", 5), noise(2, 3, 2, 2), ["logits"])["logits"]
    assert found.shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_networks:tinny", "no function 'tinny'; did you mean 'tiny'"),
        ("builtins:dict", r"builtins:dict should return a torch\.nn\.Module.* dict"),
        ("wrn_40_3", "unknown network 'wrn_40_3'; did you mean 'wrn_40_"),
        ("torchvision:resnet19", "did you mean 'resnet1"),
        ("no_such_module_here:net", "No module named 'no_such_module_here'; is its file in a folder on PYTHONPATH"),
    ],
)
def test_unknown_network_gets_a_hint(name, message):
    with pytest.raises(SettingsError, match=message):
        registry.build(name, 10)


class HeadFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.body = nn.Linear(12, 4)

    def forward(self, pixels):
        return self.head(self.body(pixels.flatten(1)))


@pytest.mark.parametrize(
    ("network", "tap", "message"),
    [
        (registry.build("resnet8", 10), "stage9", "no value 'stage9'; did you mean 'stage"),
        (HeadFirst(), "penultimate",
         r"'body' turns \(2, 12\) into 4 values.* 3 logits, so it is not the class"),
        (nn.Conv2d(3, 4, 1), "logits", r"should return logits of shape \(batch, classes\)"),
    ],
)  # fmt: skip
def test_values_that_a_network_does_not_have_are_refused(network, tap, message):
    with pytest.raises(SettingsError, match=message):
        taps.run(network, noise(2, 3, 2, 2), [tap])
    assert ("penultimate" in taps.stage_taps(network)) == (not isinstance(network, nn.Conv2d))


def test_hooks_are_removed_also_when_the_network_fails():
    network = registry.build("resnet8", 10)
    taps.run(network, noise(1, 3, 8, 8), ["stage1", "penultimate"])
    with pytest.raises(RuntimeError, match="channels"):
        taps.run(network, noise(1, 2, 8, 8), ["stage1", "penultimate"])
    assert not any(hook for module in network.modules() for hook in (module._forward_hooks, module._forward_pre_hooks))


# what happens to images before a network


def test_transform_normalises_per_channel():
    transform = InputTransform((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    pixels = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    mean, std = (np.array(values).reshape(1, 3, 1, 1) for values in (transform.mean, transform.std))
    np.testing.assert_allclose(transform(pixels).numpy(), (pixels.numpy() - mean) / std, rtol=1e-5, atol=1e-6)


def test_transform_resizes_with_antialiasing_and_leaves_images_of_its_size_alone():
    transform = InputTransform((0.0,), (1.0,), size=2)
    ramp = torch.arange(64, dtype=torch.float32).view(1, 1, 8, 8) / 64
    small = transform(ramp)
    assert small.shape == (1, 1, 2, 2)
    assert small.mean().item() == pytest.approx(ramp.mean().item(), abs=1e-6)
    # one bright pixel that plain bilinear sampling would miss
    dot = torch.zeros(1, 1, 8, 8)
    dot[0, 0, 0, 0] = 1
    assert transform(dot).max() > 0
    assert torch.equal(InputTransform((0.1,), (0.3,), size=8)(ramp), InputTransform((0.1,), (0.3,))(ramp))


def test_transform_first_used_in_inference_mode_can_train_later():
    transform = InputTransform((0.123,), (0.456,))
    with torch.inference_mode():
        transform(torch.zeros(1, 1, 2, 2))
    pixels = torch.zeros(1, 1, 2, 2, requires_grad=True)
    transform(pixels).sum().backward()
    assert pixels.grad is not None


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda: InputTransform((0.5,), (0.0,)), SettingsError, r"std .* above 0"),
        (lambda: InputTransform((0.5, 0.5), (0.1,)), SettingsError, "one number per channel each"),
        (lambda: InputTransform((0.5,), (0.1,), 0), SettingsError, "input size 0"),
        (lambda: InputTransform((0.5,) * 3, (0.1,) * 3)(noise(1, 1, 2, 2)), MismatchError, "3 channels, the images 1"),
    ],
)  # fmt: skip
def test_impossible_transforms_are_refused(made, error, message):
    with pytest.raises(error, match=message):
        made()
