import json

import pytest
import torch
from torch import nn

from kcdcache.errors import CorruptionError, MismatchError, NotFoundError, SettingsError, UnfinishedError, UnsafeError
from kcdcache.files.atomic import digest_of
from kcdcache.networks import registry, weights
from kcdcache.networks.input_transform import InputTransform
from kcdcache.teacher import teacher as teacher_
from kcdcache.teacher.teacher import field_shapes, freeze, outputs

CLASSES = ("ant", "bee", "cat")
TRANSFORM = InputTransform((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
FIELDS = ("logits", "penultimate")


def pixels(batch: int, side: int = 8) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def trained(seed: int = 1, classes: int = 3) -> nn.Module:
    """A network whose running statistics are not those of its start, left in train mode."""
    network = registry.build("resnet8", classes, seed=seed).train()
    for _ in range(3):
        network(TRANSFORM(pixels(8)))
    return network


def frozen(network: nn.Module, precision="float32", transform=TRANSFORM):
    return freeze(network, transform, "resnet8", CLASSES, "cpu", precision)


def saved(folder, name="model", architecture="resnet8", classes=CLASSES, channels=3, network=None):
    network = network or trained()
    weights.save_network(
        folder, name, network, weights.describe_network(architecture, classes, channels, TRANSFORM, accuracy=0.9)
    )
    return network


def load(source, file=None, classes=CLASSES, channels=3, precision="float32"):
    mean, std = (0.0,) * channels, (1.0,) * channels
    return teacher_.load(
        str(source), weights_path=file, classes=classes, mean=mean, std=std, size=None, device="cpu",
        precision=precision, channels=channels,
    )  # fmt: skip


def test_outputs_are_those_of_the_network_in_eval_mode():
    network = trained()
    found = outputs(frozen(network), pixels(4), FIELDS)
    network.eval()
    with torch.no_grad():
        expected = network(TRANSFORM(pixels(4)))
        from_features = network.fc(found["penultimate"])
    torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(from_features, expected, rtol=1e-5, atol=1e-5)


def test_row_does_not_depend_on_its_batch_and_statistics_stay():
    network = trained()
    assert network.training
    teacher = frozen(network)
    teacher.module.train()
    together = outputs(teacher, pixels(6), ["logits"])["logits"]
    for row in range(6):
        alone = outputs(teacher, pixels(6)[row : row + 1], ["logits"])["logits"][0]
        torch.testing.assert_close(alone, together[row], rtol=1e-5, atol=1e-5)
    assert weights.digest_weights(teacher.module.state_dict()) == teacher.identity.weights


def test_freezing_leaves_the_network_trainable():
    network = trained()
    teacher = frozen(network)
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_one_ulp_in_one_weight_changes_the_identity():
    network = trained()
    before = frozen(network).identity
    with torch.no_grad():
        kernel = network.layer2[0].conv1.weight
        kernel[0, 0, 0, 0] = torch.nextafter(kernel[0, 0, 0, 0], torch.tensor(9.0))
    assert frozen(network).identity != before
    assert frozen(network).identity.weights != before.weights


def test_identity_sees_transform_precision_and_running_statistics():
    network = trained()
    identities = [frozen(network).identity, frozen(network, "bfloat16").identity]
    identities.append(frozen(network, transform=InputTransform(TRANSFORM.mean, TRANSFORM.std, 16)).identity)
    network.bn1.running_mean[0] += 1
    identities.append(frozen(network).identity)
    assert all(a != b for i, a in enumerate(identities) for b in identities[:i])


def test_saved_teacher_is_the_teacher_and_brings_its_transform(tmp_path):
    network = saved(tmp_path)
    teacher = load(tmp_path)
    assert teacher.identity == frozen(network).identity
    assert teacher.transform == TRANSFORM
    expected = outputs(frozen(network), pixels(4), ["logits"])["logits"]
    assert torch.equal(outputs(teacher, pixels(4), ["logits"])["logits"], expected)


def test_student_of_a_run_and_a_json_file_are_teachers_too(tmp_path):
    network = saved(tmp_path, name="student")
    assert load(tmp_path).identity == load(tmp_path / "student.json").identity == frozen(network).identity


def test_spec_with_weights_takes_the_given_transform(tmp_path):
    network = trained()
    torch.save({"model": network.state_dict()}, tmp_path / "net.pth")
    teacher = load("resnet8", tmp_path / "net.pth")
    assert teacher.transform == InputTransform((0.0,) * 3, (1.0,) * 3)
    assert teacher.identity.weights == frozen(network).identity.weights
    assert teacher.identity.architecture == "resnet8"


def test_other_class_order_is_named(tmp_path):
    saved(tmp_path)
    with pytest.raises(MismatchError, match=r"differ in classes\[1\]: 'cat' against 'bee'"):
        load(tmp_path, classes=("ant", "cat", "bee"))
    with pytest.raises(MismatchError, match="differ in classes length: 2 against 3"):
        load(tmp_path, classes=("ant", "bee"))


def test_other_channels_are_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(MismatchError, match="sees 3 channels, the images have 1"):
        load(tmp_path, channels=1)


def test_weights_of_another_class_count_are_refused(tmp_path):
    torch.save(trained(classes=5).state_dict(), tmp_path / "net.pth")
    with pytest.raises(
        MismatchError, match=r"net\.pth do not fit ResNet: they are for 5 classes, the network here has 3"
    ):
        load("resnet8", tmp_path / "net.pth")


def test_spec_without_weights_asks_for_them():
    with pytest.raises(SettingsError, match="the teacher 'resnet8' needs its weights"):
        load("resnet8")


def test_missing_teacher_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match=r"no saved network at .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match=r"no saved network in .*neither model\.json nor student\.json"):
        load(tmp_path)


def test_saved_network_may_not_name_code_to_import(tmp_path):
    saved(tmp_path, architecture="canary_module:run")
    with pytest.raises(UnsafeError, match="asks to import 'canary_module:run', which could run any code"):
        load(tmp_path)


FACTORY = """
from torch import nn

def tiny(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))
"""


def test_user_may_name_the_code_of_a_saved_network(tmp_path, monkeypatch):
    (tmp_path / "teacher_of_mine.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    saved(tmp_path / "fit", architecture="teacher_of_mine:tiny", network=registry.build("teacher_of_mine:tiny", 3))
    assert load("teacher_of_mine:tiny", tmp_path / "fit").transform == TRANSFORM
    with pytest.raises(MismatchError, match="holds a network 'teacher_of_mine:tiny', not 'resnet8'"):
        load("resnet8", tmp_path / "fit")


def test_document_of_the_wrong_type_is_corruption(tmp_path):
    saved(tmp_path)
    document = json.loads((tmp_path / "model.json").read_text()) | {"classes": "abc"}
    document["digest"] = digest_of({key: value for key, value in document.items() if key != "digest"})
    (tmp_path / "model.json").write_text(json.dumps(document))
    with pytest.raises(CorruptionError, match="the classes as a list"):
        load(tmp_path)


def test_bfloat16_gives_float32_near_the_exact_outputs():
    network = trained()
    exact = outputs(frozen(network), pixels(4), FIELDS)
    rough = outputs(frozen(network, "bfloat16"), pixels(4), FIELDS)
    for field in FIELDS:
        assert rough[field].dtype == torch.float32
        assert not torch.equal(rough[field], exact[field])
        torch.testing.assert_close(rough[field], exact[field], rtol=0.05, atol=0.05)


def test_outputs_can_be_used_in_training():
    logits = outputs(frozen(trained()), pixels(4), ["logits"])["logits"]
    student = torch.zeros(4, 3, requires_grad=True)
    (student * logits).sum().backward()
    assert torch.equal(student.grad, logits)


def test_memory_layout_of_the_pixels_does_not_change_a_bit():
    teacher = frozen(trained())
    plain = outputs(teacher, pixels(4), ["logits"])["logits"]
    last = outputs(teacher, pixels(4).to(memory_format=torch.channels_last), ["logits"])["logits"]
    assert torch.equal(plain, last)


def test_fields_come_as_asked_and_unknown_ones_get_a_hint():
    teacher = frozen(trained())
    assert list(outputs(teacher, pixels(2), ["penultimate"])) == ["penultimate"]
    with pytest.raises(SettingsError, match="unknown field 'logit'; did you mean 'logits'"):
        outputs(teacher, pixels(2), ["logit"])


def test_field_shapes_are_those_of_a_row():
    shapes = field_shapes(frozen(trained()), 8, 12, FIELDS)
    assert shapes == {"logits": (3,), "penultimate": (64,)}


def test_network_with_another_number_of_logits_is_refused():
    with pytest.raises(MismatchError, match="resnet8 gives 5 logits, the data has 3 classes"):
        outputs(frozen(trained(classes=5)), pixels(2), ["logits"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_outputs_of_the_cpu():
    network = trained()
    on_gpu = freeze(network, TRANSFORM, "resnet8", CLASSES, "cuda")
    found = outputs(on_gpu, pixels(4), FIELDS)
    for field, expected in outputs(frozen(network), pixels(4), FIELDS).items():
        torch.testing.assert_close(found[field].cpu(), expected, rtol=1e-4, atol=1e-4)
    assert on_gpu.identity == frozen(network).identity


def test_the_student_of_an_unfinished_run_does_not_teach(tmp_path):
    (tmp_path / "student.safetensors").write_bytes(b"")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UnfinishedError, match="is not finished; run its command again before it teaches"):
        teacher_.load(
            str(tmp_path), weights_path=None, classes=("a", "b"), mean=(0.5,), std=(0.5,), size=None, device="cpu",
            precision="float32", channels=1,
        )  # fmt: skip
