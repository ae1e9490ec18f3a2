"""Sizes of images as constants of a graph: more places to divide it at, the same values and gradients."""

import pytest
import timm
import torch
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import nn

from tests.backbones.test_suffix_gradients import build, check_every_cut, stirred
from tlcli.backbones import graph
from tlcli.backbones.cut import cut_at, cut_points
from tlcli.backbones.folding import fold
from tlcli.backbones.units import units

SIZE = 64
TWINS = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}
PIT = {"depth": (1, 2, 1), "heads": (1, 2, 2), "base_dims": (16, 16, 16)}
NARROW = {"depth": 2, "embed_dim": 48, "num_heads": 3}
# (architecture, further arguments, units, places to cut before sizes were constants, the image included)
FAMILIES = [
    ("twins_svt_small", {"img_size": SIZE, **TWINS}, 5, 2),
    ("pit_ti_224", {"img_size": SIZE, **PIT}, 6, 2),
    ("vit_tiny_patch16_dinov3_qkvb", {"img_size": SIZE, **NARROW, "depth": 3}, 4, 2),
    ("xcit_nano_12_p16_224", {"img_size": SIZE, **NARROW}, 5, 3),
    ("naflexvit_base_patch16_parfac_gap", NARROW, 4, 3),
    ("densenet121", {"block_config": (2, 3, 2, 2), "growth_rate": 8}, 11, 6),
]


def chosen(model, k):
    """The name of the place where a training would cut, which checks that both modes agree there."""
    return cut_at(model, k, (SIZE, SIZE)).node


def num_places(model):
    return len({point.node for point in cut_points(model, (SIZE, SIZE))})


@pytest.mark.parametrize(("name", "arguments", "count", "before"), FAMILIES, ids=[row[0] for row in FAMILIES])
def test_networks_that_hand_sizes_on_are_cut_after_each_unit(name, arguments, count, before):
    model = build(name, arguments)
    assert num_places(model) == len(units(model)) == count > before
    for point in cut_points(model, (SIZE, SIZE))[1:-1:2]:
        assert chosen(model, point.num_frozen_units) == point.node
    check_every_cut(model, SIZE, batches=(1, 2, 5), least=1e-5)


def test_a_function_that_returns_a_tensor_and_its_size_is_no_obstacle():
    torch.manual_seed(0)
    config = MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=16, num_heads=1)
    model = stirred(MultiScaleVit(config, img_size=SIZE, num_classes=0, drop_path_rate=0.2))
    assert num_places(model) == len(units(model)) == 5
    check_every_cut(model, SIZE, batches=(1, 2, 5), least=1e-5)


def test_constants_are_the_same_in_both_modes_though_their_names_differ():
    """Swin makes the masks of its shifted windows where images have another size than it was made for."""
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=0, img_size=56, embed_dim=24, depths=(2, 2, 2, 2)
    )
    points = cut_points(model, (56, 56))
    assert len({point.node for point in points}) == len(units(model))
    assert cut_at(model, 4, (56, 56)).node == points[3].node


# Names are in the keys of cached rows: where they stay, the rows of earlier releases are used again.
NAMES = {
    "resnet18": "maxpool layer1.0.act2 layer1.1.act2 layer2.0.act2 layer2.1.act2 layer3.0.act2 layer3.1.act2 "
    "layer4.0.act2 all",
    "mobilenetv2_100": "bn1 blocks.0.0.bn2 blocks.1.0.bn3 blocks.1.1.add blocks.2.0.bn3 blocks.2.1.add "
    "blocks.2.2.add blocks.3.0.bn3 blocks.3.1.add blocks.3.2.add blocks.3.3.add blocks.4.0.bn3 "
    "blocks.4.1.add blocks.4.2.add blocks.5.0.bn3 blocks.5.1.add blocks.5.2.add all",
    "vit_tiny_patch16_224": "norm_pre blocks.0.add_1 blocks.1.add_1 blocks.2.add_1 blocks.3.add_1 "
    "blocks.4.add_1 blocks.5.add_1 blocks.6.add_1 blocks.7.add_1 blocks.8.add_1 blocks.9.add_1 "
    "blocks.10.add_1 all",
}


@pytest.mark.parametrize("name", NAMES)
def test_networks_that_could_be_cut_anywhere_keep_the_names_of_their_cuts(name):
    size = 224 if name.endswith("224") else SIZE
    points = cut_points(timm.create_model(name, num_classes=0), (size, size))
    assert [point.node for point in points] == NAMES[name].split()


def test_a_view_of_an_earlier_place_is_not_taken_instead_of_it():
    """Rows of an earlier release, cached there, are used again."""
    points = cut_points(timm.create_model("pvt_v2_b0", num_classes=0), (SIZE, SIZE))
    assert (points[0].node, points[0].row_shape) == ("patch_embed.norm", (16, 16, 32))


class Reader(nn.Module):
    """Uses sizes, batches, random numbers and values of tensors, each beside the rows."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images):
        batch, _, height, width = images.shape
        rows = self.two(self.one(images))
        wide = rows.reshape(batch * 2, 2, (height - 2) * (width - 2))
        wide = wide / (images.numel() // batch) ** 0.5
        noise = torch.rand(height, device=images.device).mean() if self.training else 0.0
        return self.three(wide.mean(2).view(batch, -1) * self.scale + noise)


def folded(model, training=False):
    traced = graph.trace(model, frozenset(), training=training)
    return fold(traced, model, (8, 8))


def targets(traced):
    return [getattr(node.target, "__name__", str(node.target)) for node in traced.graph.nodes]


def test_sizes_become_constants_and_the_batch_size_does_not():
    traced = folded(Reader())
    assert "getattr" not in targets(traced)
    assert "numel" not in targets(traced)
    assert targets(traced).count("batch_size") == 1
    shapes = [node.args[1:] for node in traced.graph.nodes if node.target in {"reshape", "view"}]
    assert [shape[1:] for shape in shapes] == [(2, 36), (-1,)]
    assert all(isinstance(shape[0], torch.fx.Node) for shape in shapes)


def test_random_numbers_and_values_of_tensors_stay_what_they_are():
    traced = folded(Reader(), training=True)
    assert {"rand", "mean", "scale"} <= set(targets(traced))
    model = Reader()
    cut = cut_at(model, 1, (8, 8))
    cut.suffix.train()
    rows = cut.prefix(torch.randn(2, 3, 8, 8))
    assert not torch.equal(cut.suffix(rows), cut.suffix(rows))
    with torch.no_grad():
        before = cut.suffix.eval()(rows)
        model.scale.mul_(2)
        assert not torch.equal(cut.suffix(rows), before)


def test_a_graph_that_reads_no_size_is_returned_itself():
    model = timm.create_model("resnet10t", num_classes=0)
    traced = graph.trace(model, frozenset(), training=False)
    assert fold(traced, model, (SIZE, SIZE)) is traced


class OddBatch(Reader):
    """Adds a number that is neither constant nor a multiple of the batch."""

    def forward(self, images):
        rows = self.two(self.one(images)).mean((2, 3))
        return self.three(rows + 1 / (images.shape[0] + 1))


def test_what_depends_on_the_batch_in_another_way_is_no_constant():
    model = OddBatch().eval()
    assert "getattr" not in targets(folded(model))
    assert "truediv" in targets(folded(model))
    cut = cut_at(model, 1, (8, 8))
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            assert torch.equal(cut.suffix(cut.prefix(images)), model(images))


class Asking(Reader):
    """Cannot run on the meta device, which has no values."""

    def forward(self, images):
        return super().forward(images) + self.scale.item()


def test_where_sizes_cannot_be_found_the_graph_stays():
    model = Asking().eval()
    traced = graph.trace(model, frozenset(), training=False)
    assert fold(traced, model, (8, 8)) is traced
    images = torch.randn(5, 3, 8, 8)
    cut = cut_at(model, 1, (8, 8))
    with torch.no_grad():
        assert torch.equal(cut.suffix(cut.prefix(images)), model(images))


class Dense(nn.Module):
    """A dense block whose first concatenation may be overwritten."""

    def __init__(self, inplace):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)
        self.act = nn.ReLU(inplace=inplace)

    def forward(self, images):
        first = self.one(images)
        second = self.two(first)
        third = self.three(self.act(torch.cat([first, second], 1)))
        return torch.cat([first, second, third], 1).mean((2, 3))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_concatenation_that_is_overwritten_is_not_taken_for_a_part(inplace):
    model = Dense(inplace)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(images)
        cut = cut_at(model, 2, (8, 8))
        assert torch.equal(cut.suffix(cut.prefix(images)), expected)
    assert (cut.node == "cat") is not inplace
