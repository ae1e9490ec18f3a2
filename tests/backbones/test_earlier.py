"""Places before the cut: what is kept there gives the very rows at the cut, in whatever number type."""

import pytest
import torch
from torch import nn

from tlcli.backbones.cut import cut_at
from tlcli.backbones.earlier import EarlierParts, earlier_parts
from tlcli.backbones.inference import Autocast, prepare
from tlcli.backbones.units import units
from tlcli.backbones.work import SavedWork
from tlcli.backbones.zoo import load_backbone
from tlcli.config.backbone import BackboneOptions
from tlcli.features.extractor import TYPES

CASES = [  # in fp32 rows of early layers are larger than bf16 rows at the cut, but for the image
    ("mobilenetv2_035", 1, 64, ["input"], ["input"]),
    ("mobilenetv2_035", 13, 64, [], ["blocks.3.3.add"]),
    ("resnet50", 3, 64, ["maxpool", "input"], ["maxpool", "input"]),
    ("resnet10t", 3, 32, [], []),
]


def prepared(name, k, size, dtype):
    """Return the prefix, ready for inference, and images for it."""
    backbone = load_backbone(BackboneOptions(backbone=name, random_init=True, image_size=size))
    cut = cut_at(backbone.model, k, (size, size))
    fast = prepare(cut.prefix, (size, size), dtype, torch.device("cpu"))
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return backbone, cut, fast.module.eval(), images.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize(("name", "k", "size", "in_fp32", "in_bf16"), CASES, ids=[row[0] for row in CASES])
def test_the_parts_give_the_bits_of_the_whole(name, k, size, in_fp32, in_bf16, dtype):
    backbone, cut, module, images = prepared(name, k, size, TYPES["bf16" if dtype == "bf16" else "fp32"])
    if dtype == "autocast":  # what networks run under that do not bear single layers in bf16
        module = Autocast(module).eval()
    row_bytes = 2 * torch.Size(cut.row_shape).numel()
    with torch.no_grad():
        expected = module(images)
    found = earlier_parts(module, images, row_bytes, units(backbone.model)[:k])
    assert [parts.where for parts in found] == (in_fp32 if dtype == "fp32" else in_bf16)
    for parts in found:
        assert parts.row_bytes < row_bytes
        row_bytes = parts.row_bytes
        with torch.no_grad():
            rows = parts.first(images)
            assert rows.shape == (2, *parts.row_shape)
            if parts.where != "input":
                assert rows.dtype == parts.dtype
            before = rows.clone()
            stored = rows.contiguous().clone().to(memory_format=torch.channels_last)
            assert torch.equal(parts.rest(stored), expected)
        assert torch.equal(rows, before)
        assert not any(layer.training for part in (parts.first, parts.rest) for layer in part.modules())
        assert 0 <= parts.saved.share < 1
        assert (parts.saved.share == 0) == (parts.where == "input")


class Narrow(nn.Module):
    """Narrow after its first unit, wide after the others."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 1, 1), nn.Conv2d(1, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, images):
        return self.three(self.two(self.one(images)).relu()).mean((2, 3))


def test_less_of_the_frozen_work_is_saved():
    model = Narrow().eval()
    cut = cut_at(model, 2, (8, 8))
    (parts,) = earlier_parts(cut.prefix, torch.randn(2, 3, 8, 8), 32 * 8 * 8, units(model)[:2])
    assert isinstance(parts, EarlierParts)
    assert (parts.where, parts.row_shape, parts.dtype) == ("one", (1, 8, 8), torch.float32)
    assert parts.saved == SavedWork(3 / 11, 1)


def test_an_untraced_prefix_has_no_earlier_place():
    model = Narrow()
    for k in (0, 3):
        prefix = cut_at(model, k, (8, 8)).prefix
        assert earlier_parts(prefix, torch.randn(2, 3, 8, 8), 1 << 30, units(model)[:k]) == []
