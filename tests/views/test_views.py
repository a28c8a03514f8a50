from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import CenterCrop, Resize
from torchvision.transforms.functional import resized_crop

from kcdcache import rng
from kcdcache.errors import MismatchError, SettingsError
from kcdcache.settings import ViewSettings
from kcdcache.views import rules as rules_
from kcdcache.views.rules import ViewRule, _boxes, apply, parameters, plain, rule_from

RULES = ("none", "crop", "crop-flip", "resized-crop-flip")
rule_names = st.sampled_from(RULES)


def make_rule(name: str = "crop-flip", padding: int = 2, fill: str = "zero", size: int = 6, seed: int = 1) -> ViewRule:
    return ViewRule(rule=name, padding=padding, fill=fill, size=(size, size), seed=seed)


def make_images(count: int, height: int = 6, width: int = 6, channels: int = 3, seed: int = 0) -> torch.Tensor:
    shape = (count, height, width, channels)
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def reference_crop(image: np.ndarray, row: list[int], padding: int, fill: str) -> np.ndarray:
    """One crop, pixel by pixel: where does output (y, x) come from in the unpadded image?"""
    dy, dx, flip = [*row, 0][:3]
    high, wide, channels = image.shape
    out = np.zeros((channels, high, wide), np.float32)
    for y, x in product(range(high), range(wide)):
        from_y, from_x = y + dy - padding, (wide - 1 - x if flip else x) + dx - padding
        if fill == "reflect":
            from_y = -from_y if from_y < 0 else 2 * (high - 1) - from_y if from_y >= high else from_y
            from_x = -from_x if from_x < 0 else 2 * (wide - 1) - from_x if from_x >= wide else from_x
        if 0 <= from_y < high and 0 <= from_x < wide:
            out[:, y, x] = image[from_y, from_x].astype(np.float32) * np.float32(1 / 255)
    return out


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["crop", "crop-flip"]), st.sampled_from(["zero", "reflect"]),
    st.integers(0, 3), st.integers(4, 7), st.integers(4, 7), st.sampled_from([1, 3]), st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_apply_equals_a_reference_pixel_by_pixel(name, fill, padding, high, wide, channels, seed):
    rule = ViewRule(rule=name, padding=padding, fill=fill, size=(high, wide), seed=seed)
    images = make_images(3, high, wide, channels)
    chosen = parameters(rule, np.arange(3), seed % rules_.count(rule))
    expected = [reference_crop(i.numpy(), row.tolist(), padding, fill) for i, row in zip(images, chosen, strict=True)]
    assert np.array_equal(apply(rule, images, chosen).numpy(), np.stack(expected))


@settings(max_examples=12, deadline=None)
@given(rule_names, st.permutations(range(8)), st.integers(1, 7))
def test_views_replay_in_any_order_and_batch_split(name, order, cut):
    rule, images = make_rule(name), make_images(8)
    view = 0 if name == "none" else 7
    whole = apply(rule, images, parameters(rule, np.arange(8), view))
    for part in (np.array(order[:cut]), np.array(order[cut:])):
        again = apply(rule, images[torch.from_numpy(part)], parameters(rule, part, view))
        assert torch.equal(again, whole[torch.from_numpy(part)])


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2), st.sampled_from(["crop", "crop-flip"]))
def test_views_of_a_sample_never_repeat_before_the_set_is_used_up(index, seed, padding, name):
    rule = make_rule(name, padding, seed=seed)
    rows = [parameters(rule, np.array([index]), view)[0].tolist() for view in range(rules_.count(rule))]
    side = range(2 * padding + 1)
    expected = product(side, side, (0, 1)) if name == "crop-flip" else product(side, side)
    assert sorted(rows) == [list(row) for row in expected]


def test_views_are_as_many_as_the_rule_has_and_others_are_refused():
    assert [rules_.count(make_rule(name)) for name in RULES] == [1, 25, 50, None]
    assert parameters(make_rule("resized-crop-flip"), np.arange(2), 10**9).shape == (2, 4)
    with pytest.raises(SettingsError, match=r"view 50 does not exist: 'crop-flip' with padding 2 has 50 views"):
        parameters(make_rule(), np.arange(3), 50)
    with pytest.raises(SettingsError, match="view -1 does not exist"):
        parameters(make_rule("resized-crop-flip"), np.arange(3), -1)


@settings(max_examples=12, deadline=None)
@given(rule_names, st.sampled_from(["zero", "reflect"]))
def test_views_are_in_range_in_channels_last_memory(name, fill):
    rule, images = make_rule(name, fill=fill), make_images(4)
    chosen = parameters(rule, np.arange(4), 0)
    out = apply(rule, images, chosen)
    assert torch.equal(out, apply(rule, images, torch.from_numpy(chosen)))
    assert out.shape == (4, 3, 6, 6)
    assert apply(rule, images[:0], chosen[:0]).shape == (0, 3, 6, 6)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert 0 <= out.min() <= out.max() <= 1
    if not name.startswith("crop"):
        assert apply(rule, [make_images(1, 9, 20)[0], make_images(1, 31, 8)[0]], chosen[:2]).shape == (2, 3, 6, 6)


def test_none_keeps_every_level_and_resizes_other_sizes_as_imagenet_is_evaluated():
    levels, rule = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1), make_rule("none", size=16)
    shown = apply(rule, levels, parameters(rule, np.arange(1), 0)).numpy().ravel()
    assert np.array_equal(shown, np.arange(256, dtype=np.float32) * np.float32(1 / 255))
    image, rule = make_images(1, 40, 50)[0], make_rule("none", size=28)
    out = apply(rule, [image], np.zeros((1, 0), np.int64))[0]
    pixels = image.permute(2, 0, 1).to(torch.float32) / 255
    expected = CenterCrop(28)(Resize(32, antialias=True)(pixels))
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.equal(out, apply(rule, image[None], np.zeros((1, 0), np.int64))[0])


def reference_box(words: list[int], high: int, wide: int) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params of torchvision, its draws replaced by addressed ones."""
    for attempt in range(10):
        area, aspect, top, left = (word / 2**32 for word in rng.philox(tuple(words), (attempt, rng.CROP)))
        target = high * wide * (0.08 + 0.92 * area)
        ratio = np.exp(np.log(3 / 4) + (np.log(4 / 3) - np.log(3 / 4)) * aspect)
        w, h = round((target * ratio) ** 0.5), round((target / ratio) ** 0.5)
        if 0 < w <= wide and 0 < h <= high:
            return int(top * (high - h + 1)), int(left * (wide - w + 1)), h, w
    h, w = (high, round(high * 4 / 3)) if wide / high > 4 / 3 else (round(wide / 0.75), wide)
    h, w = (high, wide) if 3 / 4 <= wide / high <= 4 / 3 else (h, w)
    return (high - h) // 2, (wide - w) // 2, h, w


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(3, 60), st.integers(3, 60))
def test_resized_crops_equal_those_of_torchvision(seed, high, wide):
    rule, images = make_rule("resized-crop-flip", size=12, seed=seed), make_images(2, high, wide)
    chosen = parameters(rule, np.arange(2), 5)
    out = apply(rule, list(images), chosen)
    for image, view, words in zip(images, out, chosen.tolist(), strict=True):
        pixels = image.permute(2, 0, 1).to(torch.float32) / 255
        expected = resized_crop(pixels, *reference_box(words, high, wide), [12, 12], antialias=True)
        flip = rng.philox(tuple(words), (10, rng.CROP))[0] >= 2**31
        assert torch.allclose(view, expected.flip(2) if flip else expected, atol=1e-5)


def test_resized_crops_flip_half_cover_the_scales_and_fall_back_to_the_centre():
    chosen = parameters(make_rule("resized-crop-flip"), np.arange(4000), 0)
    boxes, flips = _boxes(chosen, np.full(4000, 100.0), np.full(4000, 100.0))
    area = boxes[:, 2] * boxes[:, 3] / 1e4
    assert abs(flips.mean() - 0.5) < 0.04
    assert 0.075 < area.min() < 0.1
    assert 0.9 < area.max() <= 1
    boxes, _ = _boxes(chosen[:200], np.full(200, 4.0), np.full(200, 400.0))
    assert boxes.tolist() == [list(reference_box(words, 4, 400)) for words in chosen[:200].tolist()]
    assert [0, 197, 4, 5] in boxes.tolist()


def test_what_a_rule_cannot_be_applied_to_is_refused():
    with pytest.raises(MismatchError, match="'crop' was made for 6x6 images; found 5x6"):
        apply(make_rule("crop"), make_images(1, 5), np.zeros((1, 2), np.int64))
    with pytest.raises(MismatchError, match="found a list"):
        apply(make_rule("crop"), [make_images(1)[0]], np.zeros((1, 2), np.int64))
    with pytest.raises(MismatchError, match="2 images came with parameters for 1"):
        apply(make_rule("none"), list(make_images(2)), np.zeros((1, 0), np.int64))
    with pytest.raises(SettingsError, match="unknown view rule 'crop-flop'; did you mean 'crop-flip'"):
        rules_.count(make_rule("crop-flop"))


def test_a_rule_takes_the_size_of_the_images():
    rule = rule_from(ViewSettings(padding=4, fill="reflect", view_seed=3), (32, 24))
    assert rule == ViewRule(rule="crop-flip", padding=4, fill="reflect", size=(32, 24), seed=3)
    assert plain(rule) == ViewRule(rule="none", padding=0, fill="zero", size=(32, 24), seed=0)
    unused = {"augment": "none", "padding": 4, "fill": "reflect", "view_seed": 9}  # leave the store's identity alone
    assert rule_from(ViewSettings(**unused), (32, 24)) == plain(rule)


@pytest.mark.parametrize(
    ("given", "size", "said"),
    [
        ({"augment": "crop"}, None, "need --size, for example --augment resized-crop-flip --size 224"),
        ({"augment": "crop", "size": 32}, None, "images differ in size; use --augment resized-crop-flip --size 224"),
        ({"augment": "crop", "size": 32}, (16, 16), "images are 16x16; use --augment resized-crop-flip"),
        ({"fill": "reflect"}, (4, 9), "reflected padding is at most 3 on these images; found padding 4"),
    ],
)
def test_rules_that_cannot_work_say_what_would(given, size, said):
    with pytest.raises(SettingsError, match=said):
        rule_from(ViewSettings(**given), size)
