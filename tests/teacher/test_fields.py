"""The teacher's fields beyond logits: names, shapes, what they are, how they are mixed, stored and asked for."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lessons import CPU, digits, opinionated, precomputed, teacher_of
from pupils import command, executed, saved_teacher

from kcdcache import settings
from kcdcache.errors import SettingsError
from kcdcache.networks import registry, taps
from kcdcache.networks.input_transform import InputTransform
from kcdcache.networks.registry import tap_shapes
from kcdcache.recipes import recipe
from kcdcache.store import reader
from kcdcache.teacher import fields, teacher

COUNT = 20
"""samples of the stores"""
WRN = tap_shapes("wrn_40_2", 100, 3, 32, 32)
EVERY = (
    "logits", "penultimate", "attention:stage1:8x8", "attention:stage2:2x2", "fsp:stage0:stage1", "fsp:stage1:stage2",
    "maps:stage2", "maps:stage3.pre", "rotations:logits", "rotations:penultimate", "boundary:images", "boundary:logits",
)  # fmt: skip


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network():
    module = opinionated(registry.build("resnet8", 10, 1))
    return teacher.freeze(module, InputTransform((0.4,) * 3, (0.3, 0.2, 0.5)), "resnet8", tuple("abcdefghij"), CPU)


@pytest.mark.parametrize(
    "name",
    ["logits:2", "attention:stage1:0x8", "fsp:stage1", "maps:stage1.post", "rotations:maps", "maps:../x", ""],
)
def test_what_is_no_field_is_refused(name):
    with pytest.raises(SettingsError, match=f"unknown field '{name}'"):
        fields.parse(name)


def test_short_names_stand_for_the_teachers_own_stages():
    assert fields.expand(["attention"], lambda: WRN) == (
        "attention:stage1:32x32", "attention:stage2:16x16", "attention:stage3:8x8",
    )  # fmt: skip
    assert fields.expand(["fsp"], lambda: WRN) == ("fsp:stage0:stage1", "fsp:stage1:stage2", "fsp:stage2:stage3")
    assert fields.expand(["maps", "maps:stage1"], lambda: WRN) == ("maps:stage1", "maps:stage2", "maps:stage3")
    assert fields.expand(["logits", "rotations", "logits", "boundary"], dict) == (
        "logits", "rotations:logits", "rotations:penultimate", "boundary:images", "boundary:logits",
    )  # fmt: skip
    with pytest.raises(SettingsError, match="this network's stages are not known"):
        fields.expand(["maps"], lambda: {"logits": (10,)})


def test_shapes_without_a_network_are_those_of_the_network(network):
    with_weights = {name: row.shape[1:] for name, row in teacher.outputs(network, noise(1, 3, 16, 16), EVERY).items()}
    known = tap_shapes("resnet8", 10, 3, 16, 16)
    assert {name: fields.row_shape(name, known, (3, 16, 16)) for name in EVERY} == with_weights
    assert known == teacher.tap_shapes_of(network, (3, 16, 16))
    with pytest.raises(SettingsError, match="is made from 'stage9', which this teacher lacks"):
        fields.row_shape("maps:stage9", known, (3, 16, 16))


def test_fields_are_what_their_names_say(network):
    pixels = noise(5, 3, 16, 16)
    found = teacher.outputs(network, pixels, EVERY)
    with torch.no_grad():
        inputs = network.transform(pixels)
        inner = taps.run(network.module, inputs, ["stage0", "stage1", "stage2", "stage3.pre", "penultimate", "logits"])
    pooled, second = torch.nn.functional.adaptive_avg_pool2d(inner["stage1"], (8, 8)), inner["stage2"].flatten(2)
    wanted = pooled.square().mean(1).flatten(1)
    torch.testing.assert_close(found["attention:stage1:8x8"], wanted / wanted.norm(dim=1, keepdim=True))
    torch.testing.assert_close(found["fsp:stage1:stage2"], pooled.flatten(2) @ second.mT / 64)
    for name, tap in (("maps:stage2", "stage2"), ("maps:stage3.pre", "stage3.pre"), ("penultimate", "penultimate")):
        assert torch.equal(found[name], inner[tap])
    for turn in range(4):
        turned = torch.from_numpy(np.rot90(pixels.numpy(), turn, (2, 3)).copy())  # quarter turns to the left
        alone = teacher.outputs(network, turned, ["logits", "penultimate"])
        torch.testing.assert_close(found["rotations:logits"][:, turn], alone["logits"])
        torch.testing.assert_close(found["rotations:penultimate"][:, turn], alone["penultimate"])
    again = teacher.outputs(network, found["boundary:images"], ["logits"])["logits"]
    torch.testing.assert_close(found["boundary:logits"], again)


def test_views_that_are_not_square_have_no_rotations(network):
    with pytest.raises(SettingsError, match="rotations need square views, found 8x12"):
        teacher.outputs(network, noise(2, 3, 8, 12), ["rotations:logits"])


def pushed_one_by_one(network, image):
    """The attack of facts.md section 4 for one image, step by step, in the units of the normalised input."""
    std, mean = (torch.tensor(network.transform.__dict__[key]).view(3, 1, 1) for key in ("std", "mean"))
    with torch.no_grad():
        logits = network.module(network.transform(image[None]))[0]
    base = int(logits.argmax())
    draw = float(teacher.image_hash(image[None])[0])
    others = logits.double().softmax(0).numpy().copy()
    others[base] = 0.0
    target = int(np.argmax(draw * others.sum() < np.cumsum(others)))
    for _ in range(10):
        x = ((image - mean) / std).requires_grad_(True)
        z = network.module(x[None])[0]
        if int(z.argmax()) != base:
            break
        gap = z[target] - z[base]
        gradient = torch.autograd.grad(gap, x)[0]
        x = x.detach() + 0.3 * (abs(float(gap.detach())) + 1e-4) * gradient / gradient.norm()
        image = (x * std + mean).clamp(0, 1)
    return (image * 255).round() / 255, base


def test_boundary_samples_equal_the_attack_done_one_by_one(network):
    pixels = noise(12, 3, 16, 16, seed=3)
    std = torch.tensor(network.transform.std).view(3, 1, 1)
    made = teacher.boundary(lambda x: network.module(network.transform(x)), pixels, std)
    flipped = 0
    for row, image in enumerate(pixels):
        wanted, base = pushed_one_by_one(network, image)
        off = (made["images"][row] - wanted).abs()  # rounding to 255ths may fall to either side
        assert (off.max() <= 1.01 / 255, off.mean() <= 0.02 / 255) == (True, True)
        flipped += int(made["logits"][row].argmax()) != base
    assert flipped >= 3  # it really leads across the boundary
    assert torch.equal(made["images"] * 255, (made["images"] * 255).round())
    assert (made["images"].min() >= 0, made["images"].max() <= 1) == (True, True)
    assert not made["logits"].requires_grad


def test_targets_are_other_classes_drawn_by_their_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1)
    draw = (torch.arange(4000) + 0.5) / 4000
    found = teacher.draw_target(logits, torch.zeros(4000, dtype=torch.long), draw).bincount(minlength=4)
    share = torch.tensor([0.0, *np.exp([1, 0, -1]) / np.exp([1, 0, -1]).sum()])
    assert (found / 4000 - share).abs().max() < 1e-3
    certain = torch.tensor([[200.0, -200.0, -200.0], [0.0, -1e4, 50.0]])
    ends = teacher.draw_target(certain, certain.argmax(1), torch.tensor([0.0, 1 - 2**-24]))
    assert (ends != certain.argmax(1)).all()


def test_the_hash_of_images_is_even_and_sees_every_pixel():
    images = noise(3000, 3, 8, 8, seed=5)
    found = teacher.image_hash(images)
    assert found.min() >= 0
    assert found.max() < 1
    counts = (found * 10).long().bincount(minlength=10)
    assert counts.min() > 200  # 300 expected
    changed = images[0].repeat(192, 1, 1, 1)
    changed.view(192, -1)[range(192), range(192)] += 1 / 255
    assert len({float(value) for value in teacher.image_hash(changed)} | {float(found[0])}) == 193


def test_mixing_is_what_is_said_for_each_kind():
    kept, dropped, share = noise(4, 6), noise(4, 6, seed=1), torch.tensor([0.0, 0.1, 0.2, 1.0])
    linear = torch.stack([(1 - e) * a + e * b for a, b, e in zip(kept, dropped, share, strict=True)])
    for name in ("penultimate", "maps:stage1", "fsp:stage0:stage1", "rotations:logits"):
        torch.testing.assert_close(fields.mix(name, kept, dropped, share), linear)
    attention = fields.mix("attention:stage1:2x3", kept, dropped, share)
    torch.testing.assert_close(attention, linear / linear.norm(dim=1, keepdim=True))
    assert torch.equal(fields.mix("boundary:images", kept, dropped, share), kept)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("fields")
    knowledge = SimpleNamespace(path=None)
    return SimpleNamespace(root=root, teacher=saved_teacher(root / "teacher", digits(200, 60)), knowledge=knowledge)


def precompute(place, name, **changes):
    given = {"data": f"digits?train={COUNT}", "augment": "crop", "padding": 2, "min_accuracy": 0}
    return command(place, "precompute", store=place.root / name, **given | changes)


def test_a_store_of_every_field_reads_back_and_grows(place):
    told = precompute(place, "every", fields=("logits", "penultimate"))
    assert told["fields"] == {"logits": "float16", "penultimate": "float16"}
    told = precompute(place, "every", fields=("attention", "fsp", "maps:stage3", "rotations", "boundary"), views=2)
    assert (told["views"], told["fields"]["boundary:images"]) == (2, "uint8")
    held = reader.open(place.root / "every")
    names = list(held.fields)
    assert len(names) == 2 + 3 + 3 + 1 + 2 + 2
    rows = held.load(1, np.arange(COUNT), names)
    assert (rows["boundary-images"].dtype, rows["boundary-images"].shape) == (np.uint8, (COUNT, 3, 16, 16))
    assert precompute(place, "again", fields=names, views=2)["knowledge_id"] == told["knowledge_id"]
    again = reader.open(place.root / "again").load(1, np.arange(COUNT), names)
    assert all(np.array_equal(rows[name], again[name]) for name in rows)


def test_for_a_method_and_a_student_the_fields_are_worked_out(place, caplog):
    caplog.set_level("INFO")
    told = precompute(place, "for", for_="at+kd", student="resnet20")
    assert set(told["fields"]) == {
        "logits", "attention:stage1:16x16", "attention:stage2:8x8", "attention:stage3:4x4",
    }  # fmt: skip
    assert "at+kd with resnet20 reads logits, attention:stage1:16x16" in caplog.text
    for changes, message in (
        ({"for_": "kd"}, "--for METHOD and --student NETWORK go together"),
        ({"student": "resnet8"}, "--for METHOD and --student NETWORK go together"),
        ({"for_": "kd", "student": "resnet8", "fields": ("logits",)}, "--for works out the fields; leave --fields out"),
        ({"for_": "ce", "student": "resnet8"}, "this method uses no teacher outputs"),
        ({"for_": "att", "student": "resnet8"}, "unknown method 'att'; did you mean 'at'"),
    ):
        with pytest.raises(SettingsError, match=message):
            precompute(place, "refused", **changes)
    assert not (place.root / "refused").exists()


def test_recipes_write_for_as_the_command_line_does(tmp_path):
    step = 'name = "store"\nrun = "precompute"\nteacher = "t"\nfor = "at"\nstudent = "resnet8"\n'
    (tmp_path / "it.toml").write_text(f'title = "it"\ndata = "digits"\n[[step]]\n{step}')
    assert recipe.load(tmp_path / "it.toml").step[0].settings["for"] == "at"
    values = {"data": "digits", "store": tmp_path, "for": "at"}
    assert settings.make(settings.PrecomputeCommand, values).for_ == "at"
    with pytest.raises(SettingsError, match="unknown setting 'fo' in the command line; did you mean 'for'"):
        settings.make(settings.PrecomputeCommand, {"data": "digits", "store": tmp_path, "fo": "at"})


def test_a_store_beyond_the_budget_is_refused_before_anything_is_written(place, caplog):
    caplog.set_level("INFO")
    # 64 channels of 4x4 in float16, 20 samples, 10 views: 409,600 bytes
    with pytest.raises(SettingsError, match=r"the store would take 0\.0 GB .*maps:stage3 2,048.*--budget-gb 0\.0004"):
        precompute(place, "large", fields=("maps:stage3",), views=10, budget_gb=0.0004)
    assert not (place.root / "large").exists()
    assert "bytes a sample and view: maps:stage3 2,048" in caplog.text
    assert precompute(place, "large", fields=("maps:stage3",), views=10, budget_gb=0.00042)["views"] == 10


def test_the_listing_counts_what_a_store_takes(place):
    told = executed("methods", {"teacher": "resnet8", "student": "resnet8", "classes": 10, "size": 16})
    by_name = {row["method"]: row for row in told["methods"]}
    names = by_name["at"]["reads"]
    held = precomputed(place.root / "listed", digits(), teacher_of(digits()), views=1, fields=names, encoding="float16")
    assert held.row_bytes(names) == by_name["at"]["bytes"] == 2 * (256 + 64 + 16)
    assert by_name["kd"]["bytes"] == 2 * 10 + 4
    assert by_name["ce"]["reads"] == []
    lines = told["table"].split("\n")
    assert [line.split()[0] for line in lines[1:]] == list(by_name)
