import pytest
import torch
from lessons import digits
from torch import nn

from kcdcache.errors import MismatchError, NotFoundError, SettingsError, UnfinishedError
from kcdcache.networks import registry, weights
from kcdcache.networks.input_transform import InputTransform
from kcdcache.settings import MachineSettings, TeacherSettings
from kcdcache.teacher import teacher as teacher_
from kcdcache.teacher.teacher import freeze, outputs

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


def saved(folder, name="model", architecture="resnet8", network=None):
    network = network or trained()
    record = weights.NetworkRecord(
        architecture=architecture, classes=CLASSES, channels=3, transform=TRANSFORM, accuracy=0.9
    )
    weights.save_network(folder, name, network, record)
    return network


def logits(teacher, images=None):
    return outputs(teacher, pixels(4) if images is None else images, ["logits"])["logits"]


def load(source, file=None, classes=CLASSES, channels=3):
    data = {"classes": classes, "mean": (0.0,) * channels, "std": (1.0,) * channels, "channels": channels}
    return teacher_.load(str(source), weights_path=file, size=None, device="cpu", precision="float32", **data)


def test_outputs_are_those_of_the_network_in_eval_mode_row_by_row_and_can_be_used_in_training():
    network = trained()
    teacher = frozen(network)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    teacher.module.train()
    found = outputs(teacher, pixels(6), FIELDS)
    network.eval()
    with torch.no_grad():
        expected = network(TRANSFORM(pixels(6)))
        from_features = network.fc(found["penultimate"])
    torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(from_features, expected, rtol=1e-5, atol=1e-5)
    for row in range(6):
        torch.testing.assert_close(logits(teacher, pixels(6)[row : row + 1])[0], expected[row], rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(teacher, pixels(6).to(memory_format=torch.channels_last)), found["logits"])
    assert weights.digest_weights(teacher.module.state_dict()) == teacher.identity.weights
    student = torch.zeros(6, 3, requires_grad=True)
    (student * found["logits"]).sum().backward()
    assert torch.equal(student.grad, found["logits"])


def test_identity_sees_one_ulp_in_one_weight_transform_precision_and_running_statistics():
    network = trained()
    found = [frozen(network).identity, frozen(network, "bfloat16").identity]
    found.append(frozen(network, transform=InputTransform(TRANSFORM.mean, TRANSFORM.std, 16)).identity)
    with torch.no_grad():
        kernel = network.layer2[0].conv1.weight
        kernel[0, 0, 0, 0] = torch.nextafter(kernel[0, 0, 0, 0], torch.tensor(9.0))
    found.append(frozen(network).identity)
    assert found[-1].weights != found[0].weights
    network.bn1.running_mean[0] += 1
    found.append(frozen(network).identity)
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


def test_saved_teacher_is_the_teacher_and_brings_its_transform_also_the_student_of_a_run(tmp_path):
    network = saved(tmp_path / "fit")
    teacher = load(tmp_path / "fit")
    assert teacher.identity == frozen(network).identity
    assert teacher.transform == TRANSFORM
    assert torch.equal(logits(teacher), logits(frozen(network)))
    saved(tmp_path / "run", name="student")
    for source in (tmp_path / "run", tmp_path / "run/student.json"):
        assert load(source).identity == teacher.identity


def test_spec_with_weights_takes_the_given_transform(tmp_path):
    network = trained()
    torch.save({"model": network.state_dict()}, tmp_path / "net.pth")
    teacher = load("resnet8", tmp_path / "net.pth")
    assert teacher.transform == InputTransform((0.0,) * 3, (1.0,) * 3)
    assert teacher.identity.weights == frozen(network).identity.weights
    assert teacher.identity.architecture == "resnet8"


def unfinished(folder):
    folder.mkdir()
    (folder / "student.safetensors").write_bytes(b"")
    (folder / "run.json").write_text("{}")


REFUSED = [
    (saved, {"classes": ("ant", "cat", "bee")}, MismatchError, r"differ in classes\[1\]: 'cat' against 'bee'"),
    (saved, {"classes": ("ant", "bee")}, MismatchError, "differ in classes length: 2 against 3"),
    (saved, {"channels": 1}, MismatchError, "sees 3 channels, the images have 1"),
    (saved, {"source": "resnet8"}, SettingsError, "the teacher 'resnet8' needs its weights"),
    (lambda folder: None, {}, NotFoundError, r"no saved network at .*there"),
    (lambda folder: folder.mkdir(), {}, NotFoundError,
     r"no saved network in .*give the folder of a finished"),
    (unfinished, {}, UnfinishedError, "is not finished; run its command again to finish it"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "given", "error", "message"), REFUSED)
def test_what_cannot_teach_is_refused_with_what_it_lacks(tmp_path, make, given, error, message):
    place = tmp_path / "there"
    make(place)
    with pytest.raises(error, match=message):
        load(**({"source": place} | given))


def tiny(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))


def test_user_may_name_the_code_of_a_saved_network(tmp_path):
    saved(tmp_path / "fit", architecture="test_teacher:tiny", network=registry.build("test_teacher:tiny", 3))
    assert load("test_teacher:tiny", tmp_path / "fit").transform == TRANSFORM
    with pytest.raises(MismatchError, match="holds a network 'test_teacher:tiny', not 'resnet8'"):
        load("resnet8", tmp_path / "fit")


def test_bfloat16_gives_float32_near_the_exact_outputs():
    network = trained()
    exact = outputs(frozen(network), pixels(4), FIELDS)
    rough = outputs(frozen(network, "bfloat16"), pixels(4), FIELDS)
    for field in FIELDS:
        assert rough[field].dtype == torch.float32
        assert not torch.equal(rough[field], exact[field])
        torch.testing.assert_close(rough[field], exact[field], rtol=0.05, atol=0.05)


def test_fields_come_as_asked_in_the_shapes_of_a_row_and_wrong_ones_are_refused():
    teacher = frozen(trained())
    assert list(outputs(teacher, pixels(2), ["penultimate"])) == ["penultimate"]
    assert teacher_.tap_shapes_of(teacher, (3, 8, 12))["penultimate"] == (64,)
    with pytest.raises(SettingsError, match="unknown field 'logit'; did you mean 'logits'"):
        outputs(teacher, pixels(2), ["logit"])
    with pytest.raises(MismatchError, match="resnet8 gives 5 logits, the data has 3 classes"):
        logits(frozen(trained(classes=5)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_outputs_of_the_cpu():
    network = trained()
    on_gpu = freeze(network, TRANSFORM, "resnet8", CLASSES, "cuda")
    found = outputs(on_gpu, pixels(4), FIELDS)
    for field, expected in outputs(frozen(network), pixels(4), FIELDS).items():
        torch.testing.assert_close(found[field].cpu(), expected, rtol=1e-4, atol=1e-4)
    assert on_gpu.identity == frozen(network).identity


def test_statistics_by_name_are_the_published_numbers_and_std_follows_the_mean():
    found = TeacherSettings(teacher="resnet8", teacher_mean=("imagenet",))
    assert found == TeacherSettings(
        teacher="resnet8", teacher_mean=(0.485, 0.456, 0.406), teacher_std=(0.229, 0.224, 0.225)
    )
    assert TeacherSettings(teacher_mean="cifar100", teacher_std=(0.1, 0.2, 0.3)).teacher_std == (0.1, 0.2, 0.3)
    assert TeacherSettings(teacher_mean="cifar10", teacher_std="half").teacher_std == (0.5,)
    with pytest.raises(
        SettingsError, match=r"setting 'teacher_std' in .*: No statistics of this name; did you mean 'imagenet'"
    ):
        TeacherSettings(teacher_std="imagnet")


def test_one_number_is_for_every_channel(tmp_path):
    dataset = digits(20, 5)
    torch.save(registry.build("resnet8", len(dataset.classes)).state_dict(), tmp_path / "w.pt")
    named = TeacherSettings(teacher="resnet8", weights=tmp_path / "w.pt", teacher_mean="half")
    found = teacher_.load_named(named, dataset, "float32", MachineSettings(device="cpu", threads=1))
    assert found.transform == InputTransform((0.5,) * 3, (0.5,) * 3)
