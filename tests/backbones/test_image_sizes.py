"""Sizes of images: what is advised was tried, and what a network does not look at is said."""

import re

import pytest
import torch

from tlcli.backbones.image_sizes import ImageSizeError, size_advice
from tlcli.backbones.zoo import load_backbone
from tlcli.config.backbone import BackboneOptions
from tlcli.warned import collected


def load(name, size=None, **options):
    return load_backbone(BackboneOptions(backbone=name, random_init=True, image_size=size, **options))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("crossvit_tiny_240", 96),
        ("efficientformer_l1", 96),
        ("halonet26t", 100),
        ("maxvit_rmlp_pico_rw_256", 100),
        ("torchvision/vit_b_32", 100),
        ("classic/lenet5", "32x64"),
    ],
)
def test_advice_on_sizes_works(name, size):
    with pytest.raises(ImageSizeError, match=r"does not take|cannot be built") as caught:
        load(name, size)
    hint = caught.value.hint
    named = re.match(r"--image-size (\S+) works", hint)
    assert named or hint == "Leave --image-size out: its own size works."
    load(name, named[1] if named else None)


@pytest.mark.parametrize(
    ("name", "size", "seen", "advised"),
    [
        ("vit_tiny_patch16_224", 100, (96, 96), ("96", "112")),
        ("vit_tiny_patch16_224", "100x64", (96, 64), ("96x64", "112x64")),
        ("mixer_s32_224", 100, (96, 96), ("96",)),
        ("convnext_atto", 98, (96, 96), ("96",)),
        ("torchvision/swin_t", 50, (48, 48), ("48",)),
    ],
)
def test_what_patches_do_not_cover_is_said_with_sizes_that_they_do(name, size, seen, advised):
    with collected() as warnings:
        backbone = load(name, size)
    ((code, note),) = (warning.values() for warning in warnings)
    assert code == "unseen_pixels"
    height, width = seen
    assert f"looks at {height}x{width} pixels" in note
    for other in advised:
        assert other in note
        with collected() as warnings:
            load(name, other)
        assert not warnings
    images = torch.rand(1, 3, *backbone.preprocess.image_size)
    blank = images.clone()
    blank[..., height:, :] = 0
    blank[..., width:] = 0
    with torch.no_grad():
        assert torch.equal(backbone.model(images), backbone.model(blank))


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", "97x130"), ("mobilenetv2_035", 75), ("swin_s3_tiny_224", 100)]
)
def test_networks_that_look_at_everything_have_no_note(name, size):
    with collected() as warnings:
        load(name, size)
    assert not warnings


def test_where_nothing_works_nothing_is_advised():
    assert size_advice((96, 96), lambda size: False) is None
    assert size_advice(None, lambda size: True) is None


@pytest.mark.parametrize("text", ["96x160", "96X160", " 96x160 ", "96×160"])
def test_height_comes_first(text):
    assert load("resnet18", text).preprocess.image_size == (96, 160)


def test_a_square_is_kept_as_a_number():
    for size in ("64", 64, " 64 "):
        options = BackboneOptions(image_size=size)
        assert options.image_size == 64
        assert options.height_width == (64, 64)
