"""How much of the frozen work a cut saves, against FLOPs counted on the parts themselves."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tlcli.backbones.costs import unit_costs
from tlcli.backbones.cut import cut_at, cut_points
from tlcli.backbones.units import units
from tlcli.backbones.work import SavedWork, flop_counter, saved_text

SIZE = (64, 64)


class Skipping(nn.Module):
    """Hands the rows of its first unit to its fourth, round the two between: they cannot be divided."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.three, self.four = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, images):
        rows = self.one(images)
        return self.four(torch.cat([self.three(self.two(rows)), rows], 1)).mean((2, 3))


def test_what_is_behind_the_cut_counts_as_not_saved():
    one, two = 3 * 4, 4 * 4  # multiplications a pixel
    assert [unit.name for unit in units(Skipping())] == ["one", "two", "three", "four"]
    found = [cut_at(Skipping(), k, (8, 8)).saved for k in (1, 2, 3)]
    assert found == [SavedWork(1.0, 1), SavedWork(one / (one + two), 1), SavedWork(1.0, 3)]
    assert [point.saved_share for point in cut_points(Skipping(), (8, 8))] == [1, one / (one + two), 1, 1]


def flops_of(part, images):
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        part(images)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["hrnet_w18_small", "resnet10t", "mobilenetv2_035"])
def test_the_share_is_the_prefix_s_of_the_frozen_units_flops(name):
    model = timm.create_model(name, num_classes=0)
    costs = unit_costs(model, SIZE)
    images = torch.randn(1, 3, *SIZE)
    for row in costs[: -1 : max(1, len(costs) // 4)]:
        k = row.unit.index
        cut = cut_at(model, k, SIZE)
        cut.prefix.requires_grad_(False)
        share = flops_of(cut.prefix, images) / sum(item.flops for item in costs[:k])
        assert cut.saved.share == pytest.approx(share)
        assert row.saved_share == pytest.approx(share)


def test_all_of_a_transformer_s_work_is_saved():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, depth=2)
    assert [point.saved_share for point in cut_points(model, SIZE)] == [1, 1, 1]


def test_counting_leaves_what_asks_for_gradients():
    model = Skipping()
    model.two.weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with flop_counter(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (SavedWork(0.97, 5), None),
        (SavedWork(0.74, 6), "after unit 6, of 8 frozen units: 74% of the frozen work is cached"),
        (SavedWork(0.2, 0), "within unit 1, of 8"),
        (SavedWork(0.0, 0), "at the image, of 8 frozen units: 0%"),
    ],
)
def test_people_are_told_where_it_matters(saved, words):
    text = saved_text(saved, 8)
    assert (text is None) if words is None else text.startswith(words)
