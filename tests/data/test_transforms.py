"""The evaluation transform agrees with timm's own on Pillow images: exact in geometry, close in values."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tlcli.config.backbone import Preprocess
from tlcli.data.decode import decode
from tlcli.data.transforms import EvalTransform

SIZES = [(375, 500), (500, 333), (64, 64), (301, 97), (224, 224), (31, 47), (1, 1), (7, 90)]


def photograph(height: int, width: int) -> torch.Tensor:
    """Return a smooth image with some noise, as photographs are."""
    generator = np.random.default_rng(height * 10_000 + width)
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [128 + 90 * np.sin(rows / (9 + 4 * k) + columns / (17 - 3 * k)) for k in range(3)]
    noisy = np.stack(planes) + generator.normal(0, 10, (3, height, width))
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8))


def by_timm(image: Image.Image, preprocess: Preprocess) -> torch.Tensor:
    from timm.data import create_transform

    transform = create_transform(
        (3, *preprocess.image_size),
        crop_pct=preprocess.crop_pct,
        crop_mode=preprocess.crop_mode,
        interpolation=preprocess.interpolation,
        mean=preprocess.mean,
        normalize=False,
    )
    return transform(image)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize(("image_size", "crop_pct"), [((56, 56), 0.875), ((48, 64), 0.9), ((40, 40), 1.0)])
def test_agrees_with_timm(
    size: tuple[int, int], interpolation: str, mode: str, image_size: tuple[int, int], crop_pct: float
) -> None:
    preprocess = Preprocess(
        image_size=image_size, crop_pct=crop_pct, crop_mode=mode, interpolation=interpolation
    )
    image = photograph(*size)
    ours = EvalTransform(preprocess)(image)
    theirs = by_timm(Image.fromarray(image.permute(1, 2, 0).numpy()), preprocess)
    assert ours.shape == theirs.shape == (3, *image_size)
    difference = (ours.int() - theirs.int()).abs().float()
    if interpolation == "lanczos":
        assert difference.max() == 0
    elif interpolation == "nearest":  # a pixel beside the other where the position is half-way
        assert (difference > 0).float().mean() < 0.4
    else:  # Pillow rounds between its two passes, in an order that depends on the size
        assert difference.mean() < 0.35
        assert difference.max() <= 10


@pytest.mark.parametrize(("height", "width"), [(1, 5000), (20_000, 1), (3, 900), (900, 3)])
def test_extreme_sides_take_no_memory_and_keep_the_centre(height: int, width: int) -> None:
    transform = EvalTransform(Preprocess(image_size=(32, 32), crop_pct=0.875))
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, height // 2 :, width // 2 :] = 255
    result = transform(image)
    assert result.shape == (3, 32, 32)
    # The edge between black and white is in the middle, within the size of a source pixel.
    profile = result[0].float().mean(dim=0 if width > height else 1)
    assert profile[0] < profile[-1] or min(height, width) == 1
    assert transform._trim_extreme(image).numel() <= 3 * 50 * min(height, width) * max(1, min(height, width))


def test_a_trimmed_image_gives_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = EvalTransform(Preprocess(image_size=(56, 56), crop_pct=0.875))
    image = photograph(64, 64 * 20)
    trimmed = transform(image)
    monkeypatch.setattr("tlcli.data.transforms.EXTREME_ASPECT", 10**9)
    assert (trimmed.int() - transform(image).int()).abs().float().mean() < 1


def test_memory_layout_of_the_input_does_not_matter() -> None:
    transform = EvalTransform(Preprocess(image_size=(56, 56), crop_pct=0.875))
    image = photograph(90, 120)
    channels_last = image.unsqueeze(0).contiguous(memory_format=torch.channels_last)[0]
    assert torch.equal(transform(image), transform(channels_last))
    assert transform(channels_last).is_contiguous()


def test_an_image_of_the_right_size_is_unchanged_and_the_input_never() -> None:
    image = photograph(40, 40)
    before = image.clone()
    for interpolation in ("bicubic", "lanczos"):
        transform = EvalTransform(Preprocess(image_size=(40, 40), crop_pct=1.0, interpolation=interpolation))
        assert torch.equal(transform(image), before)
    EvalTransform(Preprocess(image_size=(32, 32), crop_pct=0.9))(image)
    assert torch.equal(image, before)


def test_border_mode_pads_with_the_mean() -> None:
    transform = EvalTransform(
        Preprocess(image_size=(32, 32), crop_pct=1.0, crop_mode="border", mean=(0.0, 0.5, 1.0))
    )
    result = transform(torch.full((3, 10, 40), 7, dtype=torch.uint8))
    assert result[:, 0, 0].tolist() == [0, 128, 255]
    assert result[:, 16, 16].tolist() == [7, 7, 7]


def test_facts_are_json_without_floats_and_tell_transforms_apart() -> None:
    base = Preprocess(image_size=(56, 56), crop_pct=0.875)
    facts = EvalTransform(base).key_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert "float" not in str({type(value) for value in facts.values()})
    others = [
        Preprocess(image_size=(56, 64), crop_pct=0.875),
        Preprocess(image_size=(56, 56), crop_pct=0.9),
        Preprocess(image_size=(56, 56), crop_pct=0.875, crop_mode="squash"),
        Preprocess(image_size=(56, 56), crop_pct=0.875, interpolation="bilinear"),
        Preprocess(image_size=(56, 56), crop_pct=0.875, interpolation="lanczos"),
        Preprocess(image_size=(56, 56), crop_pct=0.875, mean=(0.5, 0.5, 0.5)),
        Preprocess(image_size=(56, 56), crop_pct=0.875, std=(0.5, 0.5, 0.5)),
    ]
    assert all(EvalTransform(other).key_facts() != facts for other in others)


@pytest.mark.real
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_agrees_with_timm_on_real_photographs(real_assets: Path, mode: str) -> None:
    preprocess = Preprocess(image_size=(224, 224), crop_pct=0.875, crop_mode=mode)
    transform = EvalTransform(preprocess)
    means = []
    for path in sorted((real_assets / "imagenet_sample").iterdir())[::10]:
        data = path.read_bytes()
        ours = transform(decode(data))
        theirs = by_timm(Image.open(io.BytesIO(data)).convert("RGB"), preprocess)
        means.append((ours.int() - theirs.int()).abs().float().mean().item())
    assert np.mean(means) < 0.1
