"""Units: complete, disjoint, in forward order."""

import pytest
import timm
import torch

from tlcli.backbones.torchvision_zoo import headless
from tlcli.backbones.units import frozen_modules, num_frozen_units, units
from tlcli.errors import BackboneError, UsageError

NETWORKS = [
    "resnet18", "mobilenetv2_035", "convnext_atto", "densenet121", "efficientnet_lite0", "hrnet_w18_small",
    "vit_tiny_patch16_224", "eva02_tiny_patch14_224", "poolformer_s12", "pit_ti_224", "inception_v3",
    "torchvision/resnet18", "torchvision/mobilenet_v3_small", "torchvision/swin_t", "torchvision/densenet121",
    "torchvision/squeezenet1_1", "torchvision/efficientnet_b0", "torchvision/googlenet",
]  # fmt: skip


def build(name):
    with torch.device("meta"):
        if name.startswith("torchvision/"):
            return headless(name.removeprefix("torchvision/"), {})
        return timm.create_model(name, num_classes=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_everything_belongs_to_exactly_one_unit(name):
    model = build(name)
    parts = units(model)
    assert len(parts) > 3
    assert [unit.index for unit in parts] == list(range(1, len(parts) + 1))
    for kind, names in (("parameters", model.named_parameters()), ("buffers", model.named_buffers())):
        owned = [key for unit in parts for key in getattr(unit, kind)]
        assert sorted(owned) == sorted(key for key, _ in names)
    modules = [key for unit in parts for key in unit.modules]
    assert len(modules) == len(set(modules))
    leaves = {key for key, module in model.named_modules() if key and not list(module.children())}
    assert leaves <= set(modules)
    assert len({unit.name for unit in parts}) == len(parts)
    assert sum(unit.num_parameters for unit in parts) == sum(p.numel() for p in model.parameters())
    assert frozen_modules(parts, 0) == frozenset()
    assert frozen_modules(parts, len(parts)) == set(modules)


def test_timm_and_torchvision_count_the_same_steps():
    assert len(units(build("resnet18"))) == len(units(build("torchvision/resnet18"))) == 9


def test_the_branches_of_a_block_are_one_unit():
    names = [unit.name for unit in units(build("torchvision/googlenet"))]
    assert names[:5] == ["conv1", "conv2", "conv3", "inception3a", "inception3b"]
    assert len(names) == 12


@pytest.mark.parametrize(
    ("text", "expected"), [(None, 9), ("all", 9), ("ALL", 9), ("none", 0), ("0", 0), ("4", 4), ("9", 9)]
)
def test_freeze_is_read(text, expected):
    assert num_frozen_units(text, 9) == expected


@pytest.mark.parametrize("text", ["-1", "1.5", "some", "", "auto", "²", "banana"])
def test_a_freeze_that_is_not_a_number_is_refused(text):
    with pytest.raises(UsageError, match="--freeze takes all, none, or a number of units"):
        num_frozen_units(text, 9)


def test_a_freeze_of_more_units_than_there_are_names_the_count():
    with pytest.raises(UsageError, match="9 units"):
        num_frozen_units("10", 9)


def test_a_network_without_parameters_is_no_backbone():
    with pytest.raises(BackboneError):
        units(torch.nn.ReLU())
