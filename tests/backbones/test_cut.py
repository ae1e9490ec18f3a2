"""The property every cut must have, over many architectures with random weights."""

import copy

import pytest
import timm
import torch

from tlcli.backbones.backbone import state_sha256
from tlcli.backbones.cut import cut_at, cut_points, freeze_parameters
from tlcli.backbones.units import frozen_modules, units
from tlcli.errors import BackboneError, UsageError

# (architecture, image size, further arguments); kept small: what counts is the kind of graph, not its size
QUICK = [
    ("resnet10t", 32, {}),
    ("resnet18", 32, {}),
    ("vgg11_bn", 32, {"mlp_ratio": 0.02}),
    ("mobilenetv2_035", 32, {}),
    ("mobilenetv3_small_050", 32, {}),
    ("mobilenetv4_conv_small_035", 32, {}),
    ("efficientnet_lite0", 32, {}),
    ("regnetx_002", 32, {}),
    ("regnety_002", 32, {}),
    ("convnext_atto", 32, {}),
    ("repvgg_a0", 32, {}),
    ("vit_tiny_patch16_224", 32, {"img_size": 32}),
    ("deit_tiny_patch16_224", 32, {"img_size": 32}),
    ("deit_tiny_distilled_patch16_224", 32, {"img_size": 32}),
    ("eva02_tiny_patch14_224", 28, {"img_size": 28}),
    ("vit_small_patch16_dinov3", 64, {"img_size": 64, "depth": 3}),
    ("vit_small_patch14_dinov2", 28, {"img_size": 28, "depth": 3}),
    ("beit_base_patch16_224", 32, {"img_size": 32, "depth": 3, "embed_dim": 192, "num_heads": 3}),
    ("cait_xxs24_224", 32, {"img_size": 32, "depth": 4}),
    ("mixer_s32_224", 64, {"img_size": 64}),
    ("resmlp_12_224", 32, {"img_size": 32}),
    ("mobilevit_xxs", 64, {}),
    ("ghostnet_050", 32, {}),
    ("fastvit_t8", 64, {}),
    ("nfnet_l0", 32, {}),
    ("poolformer_s12", 64, {}),
    ("edgenext_xx_small", 64, {}),
    ("levit_128s", 64, {"img_size": 64}),
    ("pit_ti_224", 64, {"img_size": 64}),
    ("starnet_s1", 32, {}),
    ("rexnet_100", 32, {}),
    ("mnasnet_small", 32, {}),
    ("vovnet39a", 32, {}),
]
SLOW = [
    ("resnet50", 64, {}),
    ("densenet121", 64, {}),
    ("inception_v3", 96, {}),
    ("inception_v4", 96, {}),
    ("inception_resnet_v2", 96, {}),
    ("xception41", 64, {}),
    ("legacy_xception", 96, {}),
    ("hrnet_w18_small", 64, {}),
    ("coatnet_pico_rw_224", 64, {"img_size": 64}),
    ("maxvit_pico_rw_256", 64, {"img_size": 64}),
    ("swin_tiny_patch4_window7_224", 56, {"img_size": 56}),
    ("naflexvit_base_patch16_gap", 64, {"depth": 3, "embed_dim": 64, "num_heads": 2}),
    ("swinv2_tiny_window8_256", 64, {"img_size": 64, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32}),
    ("swinv2_tiny_window8_256", 64, {"img_size": 64}),
    ("dm_nfnet_f0", 32, {}),
    ("nf_resnet50", 32, {}),
    ("dla34", 64, {}),
    ("dpn68", 64, {}),
    ("res2net50_14w_8s", 64, {}),
    ("pvt_v2_b0", 64, {}),
    ("xcit_nano_12_p16_224", 64, {}),
    ("convmixer_768_32", 32, {}),
    ("gmlp_ti16_224", 32, {"img_size": 32}),
    ("tiny_vit_5m_224", 64, {}),
    ("volo_d1_224", 64, {"img_size": 64}),
    ("twins_pcpvt_small", 64, {"img_size": 64}),
    ("mvitv2_tiny", 64, {"img_size": 64}),
    ("davit_tiny", 64, {}),
    ("focalnet_tiny_srf", 64, {}),
    ("nest_tiny", 64, {"img_size": 64}),
    ("sequencer2d_s", 56, {"img_size": 56}),
    ("cspresnet50", 64, {}),
    ("selecsls42", 64, {}),
    ("mobileone_s0", 32, {}),
    ("tresnet_m", 64, {}),
    ("crossvit_tiny_240", 240, {}),
    ("visformer_tiny", 64, {"img_size": 64}),
    ("hiera_tiny_224", 64, {"img_size": 64}),
    ("efficientformer_l1", 224, {}),
    ("tnt_s_legacy_patch16_224", 64, {"img_size": 64}),
]


def build(name, arguments):
    """A headless network whose dropout and drop-path rates are 0.2 wherever it has them."""
    torch.manual_seed(0)
    for rates in ({"drop_rate": 0.2, "drop_path_rate": 0.2}, {"drop_rate": 0.2}, {}):
        try:
            return timm.create_model(name, num_classes=0, **arguments, **rates)
        except TypeError:
            continue
    raise AssertionError(name)


def same(found, expected):
    """Equal but for the last bits: torch multiplies by a weight that needs a gradient in another way."""
    return torch.allclose(found, expected, rtol=1e-6, atol=1e-7)


def eager_train(model, frozen, images):
    """The network in train mode with its frozen units in eval mode: what a suffix must reproduce."""
    model.train()
    for name, module in model.named_modules():
        if name in frozen:
            module.training = False
    torch.manual_seed(7)
    return model(images)


def check(name, size, arguments, fractions=(0.34, 0.75)):
    model = build(name, arguments)
    count = len(units(model))
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    parameters = {key for key, _ in model.named_parameters()}
    for k in sorted({max(1, min(count - 1, round(count * fraction))) for fraction in fractions}):
        eager = copy.deepcopy(model)
        for unit in units(eager)[:k]:  # torch multiplies by a weight that needs a gradient in another way
            for key in unit.parameters:
                eager.get_parameter(key).requires_grad_(False)
        with torch.no_grad():
            expected = eager.eval()(images)
        cut = cut_at(copy.deepcopy(model), k, (size, size))
        freeze_parameters(cut)
        with torch.no_grad():
            rows = cut.prefix(images)
            kept = rows.clone()
            assert isinstance(rows, torch.Tensor)
            assert tuple(rows.shape) == (2, *cut.row_shape)
            assert torch.equal(cut.suffix.eval()(rows), expected), f"{k}: eval"
            assert torch.equal(rows, kept), f"{k}: the row was overwritten in eval mode"
            reference = eager_train(eager, frozen_modules(units(eager), k), images)
            cut.suffix.train()
            torch.manual_seed(7)
            assert torch.equal(cut.suffix(rows), reference), f"{k}: train"
            assert torch.equal(rows, kept), f"{k}: the row was overwritten in train mode"
            for part, inputs in ((cut.prefix, images), (cut.suffix, rows)):  # as they would on a GPU
                moved = copy.deepcopy(part).to("meta")
                assert moved(inputs.to("meta")).device.type == "meta", f"{k}: not where it was moved"
        statistics = dict(eager.named_buffers())
        assert cut.suffix.state_dict().keys() | cut.prefix.state_dict().keys() == model.state_dict().keys()
        for key, buffer in cut.suffix.named_buffers():
            if key not in statistics:
                assert key.startswith("_tensor_constant")
                continue
            assert torch.equal(buffer, statistics[key]), f"{k}: {key}"
        before = {key for key, _ in cut.prefix.named_parameters()}
        after = {key for key, _ in cut.suffix.named_parameters()}
        assert before | after == parameters, f"{k}: a parameter is lost"
        assert not before & after, f"{k}: a parameter is on both sides"
        frozen = {key for unit in units(model)[:k] for key in unit.parameters}
        assert before <= frozen
        assert set(cut.frozen_parameters) == frozen - before
        assert {
            key for key, value in cut.suffix.named_parameters() if not value.requires_grad
        } == frozen - before
    return model


@pytest.mark.parametrize(("name", "size", "arguments"), QUICK, ids=[row[0] for row in QUICK])
def test_suffix_of_prefix_is_the_network(name, size, arguments):
    check(name, size, arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "arguments"), SLOW, ids=[row[0] for row in SLOW])
def test_suffix_of_prefix_is_the_network_slow(name, size, arguments):
    check(name, size, arguments, (0.2, 0.5, 0.9))


def test_nothing_and_everything_frozen_need_no_trace():
    model = build("resnet10t", {})
    count = len(units(model))
    everything = cut_at(model, count, (32, 32))
    assert everything.prefix is model
    assert isinstance(everything.suffix, torch.nn.Identity)
    assert (everything.node, everything.row_shape) == ("all", (512,))
    nothing = cut_at(model, 0, (32, 32))
    assert nothing.suffix is model
    assert (nothing.node, nothing.row_shape) == ("input", (3, 32, 32))
    for cut, trained in ((everything, 0), (nothing, len(list(model.parameters())))):
        freeze_parameters(cut)
        assert sum(parameter.requires_grad for parameter in model.parameters()) == trained
    with pytest.raises(UsageError, match=f"{count} units"):
        cut_at(model, count + 1, (32, 32))


LEFT_ALONE = [
    ("levit_128s", 64, {"img_size": 64}),  # keeps biases between evaluations
    ("eva02_tiny_patch14_224", 28, {"img_size": 28}),  # makes constants
    ("mobilenetv3_small_050", 32, {}),
    ("densenet121", 32, {}),
    ("convnext_atto", 32, {}),
]


@pytest.mark.parametrize(("name", "size", "arguments"), LEFT_ALONE, ids=[row[0] for row in LEFT_ALONE])
def test_the_network_is_left_as_it_was(name, size, arguments):
    """Dividing leaves nothing on the network and changes nothing of it, whatever its modes are."""
    model = build(name, arguments)
    count = len(units(model))
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model.eval()(images)
    for place, module in enumerate(model.modules()):
        module.training = place % 3 == 0
    for place, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(place % 2 == 0)

    def state():
        return (
            state_sha256(model),
            set(vars(model)),
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
            torch.get_rng_state().tolist(),
        )

    before = state()
    for k in (0, 1, count // 2, count - 1, count):
        cut = cut_at(model, k, (size, size))
        assert state() == before, k
        if 0 < k < count:  # the parts have modes of their own
            assert not any(module.training for module in cut.prefix.train().modules())
            cut.suffix.train()
            assert state() == before, k
            with torch.no_grad():
                assert torch.equal(cut.suffix.eval()(cut.prefix(images)), expected)
    cut_points(model, (size, size))
    assert state() == before
    with torch.no_grad():
        assert torch.equal(model.eval()(images), expected)


def test_what_moves_a_part_moves_the_network():
    """A tensor that is replaced, as a buffer is on its way to a GPU, is replaced in both."""
    model = build("resnet10t", {}).eval()
    cut = cut_at(model, 3, (32, 32))
    cut.suffix.double()
    cut.prefix.double()
    assert {
        tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()
    } == {torch.float64}
    with torch.no_grad():
        next(cut.suffix.parameters()).zero_()
        dict(cut.suffix.named_buffers())["layer4.0.bn1.running_mean"].fill_(7.0)
    assert float(model.layer4[0].bn1.running_mean[0]) == 7.0
    names = [name for name, _ in cut.suffix.named_parameters()]
    assert not model.get_parameter(names[0]).any()


def test_frozen_means_frozen_after_every_train_and_step():
    model = build("mobilenetv3_small_050", {})
    cut = cut_at(model, 5, (32, 32))
    freeze_parameters(cut)
    frozen = {name for unit in units(model)[:5] for name in (*unit.parameters, *unit.buffers)}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        cut.prefix.train()
        cut.suffix.train()
        cut.suffix(cut.prefix(torch.randn(4, 3, 32, 32))).square().mean().backward()
        optimizer.step()
    after = model.state_dict()
    for name, tensor in before.items():
        if name in frozen:
            assert torch.equal(after[name], tensor), name
    assert not torch.equal(after["conv_head.weight"], before["conv_head.weight"])


def test_a_copy_of_a_suffix_keeps_its_modes_and_shares_nothing():
    cut = cut_at(build("resnet18", {}), 3, (32, 32))
    cut.suffix.train()
    other = copy.deepcopy(cut.suffix)
    assert other.training
    rows = torch.randn(2, *cut.row_shape)
    torch.manual_seed(0)
    expected = cut.suffix(rows)
    torch.manual_seed(0)
    assert torch.equal(other(rows), expected)
    other.get_parameter("layer4.0.downsample.0.weight").data.zero_()
    assert not torch.equal(other.eval()(rows), cut.suffix.eval()(rows))
    assert other.state_dict().keys() == cut.suffix.state_dict().keys()


def test_cut_points_agree_with_the_cuts():
    model = build("mobilenetv2_035", {})
    points = cut_points(model, (32, 32))
    assert [point.num_frozen_units for point in points] == list(range(1, len(units(model)) + 1))
    for point in points[::5]:
        cut = cut_at(copy.deepcopy(model), point.num_frozen_units, (32, 32))
        assert (cut.node, cut.row_shape) == (point.node, point.row_shape)


STEPS = [
    ("resnet10t", 32, {}),
    ("mobilenetv3_small_050", 32, {}),
    ("densenet121", 32, {"block_config": (2, 2, 2, 2)}),
    ("vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 4}),
    ("convnext_atto", 32, {"depths": (1, 1, 2, 1)}),
    ("regnetx_002", 32, {}),
]


@pytest.mark.parametrize(("name", "size", "arguments"), STEPS, ids=[row[0] for row in STEPS])
def test_a_step_from_stored_rows_has_the_gradients_of_the_whole_network(name, size, arguments):
    """At every unit: the suffix trained from rows, against the eager network with its first units frozen."""
    model = build(name, arguments)
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        target = torch.randn(model.eval()(images).shape, generator=torch.Generator().manual_seed(2))
    parts = units(model)
    for k in range(1, len(parts)):
        frozen = {parameter for unit in parts[:k] for parameter in unit.parameters}
        eager = copy.deepcopy(model)
        for key, parameter in eager.named_parameters():
            parameter.requires_grad_(key not in frozen)
        (eager_train(eager, frozen_modules(parts, k), images) * target).sum().backward()
        expected = {key: p.grad for key, p in eager.named_parameters() if p.grad is not None}
        cut = cut_at(copy.deepcopy(model), k, (size, size))
        freeze_parameters(cut)
        with torch.no_grad():
            rows = cut.prefix(images).clone(memory_format=torch.contiguous_format)
        cut.suffix.train()
        torch.manual_seed(7)
        (cut.suffix(rows) * target).sum().backward()
        found = {key: p.grad for key, p in cut.suffix.named_parameters() if p.grad is not None}
        assert found.keys() == expected.keys(), k
        for key, gradient in expected.items():
            torch.testing.assert_close(
                found[key], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max())
            )


class Untraceable(torch.nn.Module):
    """Its path depends on the values of the image."""

    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3)

    def forward(self, images):
        rows = self.one(images)
        if rows.sum() > 0:
            rows = self.two(rows)
        return rows.mean((2, 3))


def test_a_network_that_cannot_be_traced_can_still_be_frozen_whole():
    assert cut_at(Untraceable(), 2, (8, 8)).node == "all"
    with pytest.raises(BackboneError, match="Untraceable cannot be traced") as caught:
        cut_at(Untraceable(), 1, (8, 8))
    assert "--freeze all" in caught.value.hint


class Guarded(torch.nn.Module):
    """Looks at the values of its input in train mode."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(4, 4, 1)
        self.act = torch.nn.ReLU()

    def forward(self, rows):
        if self.training and rows.isnan().any():
            raise ValueError("not a number")
        return self.act(self.layer(rows))


class Chain(torch.nn.Module):
    """Three units, of which the second cannot be traced while it trains."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = torch.nn.Conv2d(3, 4, 1), Guarded(), torch.nn.Conv2d(4, 4, 1)

    def forward(self, images):
        return self.three(self.two(self.one(images))).mean((2, 3))


def test_where_a_unit_must_be_frozen_to_be_traced_the_hint_says_how_many():
    assert len(units(Chain())) == 3
    with pytest.raises(BackboneError, match="for training with 1 units frozen") as caught:
        cut_at(Chain(), 1, (8, 8))
    assert "--freeze 2" in caught.value.hint
    model, images = Chain().eval(), torch.randn(3, 3, 8, 8)
    cut = cut_at(model, 2, (8, 8))
    with torch.no_grad():
        assert torch.equal(cut.suffix(cut.prefix(images)), model(images))


class Overwriting(torch.nn.Module):
    """Writes into its own intermediate values, directly and through views."""

    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 1)
        self.act = torch.nn.ReLU(inplace=True)

    def forward(self, images):
        rows = self.one(images)
        shortcut = rows.view(rows.shape)
        rows = self.act(self.two(rows)) + shortcut.flatten(2).mul_(2).view_as(rows)
        rows += 1
        return rows.mean((2, 3))


def test_the_row_survives_writes_through_a_view():
    model = Overwriting()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(images)
        cut = cut_at(model, 1, (8, 8))
        rows = cut.prefix(images)
        kept = rows.clone()
        for _ in range(2):
            assert torch.equal(cut.suffix(rows), expected)
            assert torch.equal(rows, kept)
