"""Random weights: their variance by rule, what they leave alone, and that a seed settles them."""

import pytest
import timm
import torch
from torch import nn

from tlcli.backbones import classic
from tlcli.backbones.backbone import state_sha256
from tlcli.backbones.initialise import reinitialise
from tlcli.backbones.zoo import load_backbone
from tlcli.config.backbone import BackboneOptions


class Layers(nn.Module):
    """One of each kind."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 64, 3)
        self.grouped = nn.Conv2d(64, 128, 3, groups=4)
        self.depthwise = nn.Conv2d(2048, 2048, 3, groups=2048)
        self.linear = nn.Linear(200, 100)
        self.norm = nn.BatchNorm2d(8)
        self.layer_norm = nn.LayerNorm(8)
        self.token = nn.Parameter(torch.full((4,), 0.3))


@pytest.mark.parametrize(
    ("init", "variances"),
    [
        ("he", {"conv": 2 / (64 * 9), "grouped": 2 / (32 * 9), "depthwise": 2 / 9, "linear": 2 / 200}),
        (
            "xavier",
            {"conv": 2 / (96 * 9), "grouped": 2 / (48 * 9), "depthwise": 2 / 18, "linear": 2 / 300},
        ),
        ("normal", {"conv": 1.0, "grouped": 1.0, "depthwise": 1.0, "linear": 1.0}),
        (
            "default",
            {"conv": 1 / (3 * 288), "grouped": 1 / (3 * 144), "depthwise": 1 / 27, "linear": 1 / 600},
        ),
        ("paper", {"linear": 2.4**2 / (3 * 200**2)}),
    ],
)
def test_variances(init, variances):
    model = Layers()
    reinitialise(model, init, 0)
    for name, variance in variances.items():
        layer = model.get_submodule(name)
        assert float(layer.weight.detach().var()) == pytest.approx(variance, rel=0.05), name
        assert float(layer.weight.detach().mean().abs()) < 4 * (variance / layer.weight.numel()) ** 0.5
        assert bool(layer.bias.any()) == (init == "default")


def test_norms_are_reset_and_other_parameters_stay():
    model = Layers()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
        model.norm.running_mean += 3
        model.norm.running_var += 3
        model.norm.num_batches_tracked += 3
        token = model.token.clone()
    reinitialise(model, "he", 0)
    for norm in (model.norm, model.layer_norm):
        assert torch.equal(norm.weight, torch.ones(8))
        assert torch.equal(norm.bias, torch.zeros(8))
    assert torch.equal(model.norm.running_mean, torch.zeros(8))
    assert torch.equal(model.norm.running_var, torch.ones(8))
    assert int(model.norm.num_batches_tracked) == 0
    assert torch.equal(model.token, token)


def test_a_seed_settles_everything_without_the_global_random_state():
    models = [Layers() for _ in range(3)]
    state = torch.get_rng_state()
    for model, seed in zip(models, (5, 5, 6), strict=True):
        reinitialise(model, "he", seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert state_sha256(models[0]) == state_sha256(models[1]) != state_sha256(models[2])


def test_residual_blocks_still_begin_as_the_identity():
    model = load_backbone(BackboneOptions(backbone="resnet10t", random_init=True)).model
    before = model.layer1[0].conv1.weight.clone()
    reinitialise(model, "he", 1)
    assert not model.layer1[0].bn2.weight.any()
    assert torch.equal(model.layer1[0].bn1.weight, torch.ones(64))
    assert not torch.equal(model.layer1[0].conv1.weight, before)


def test_position_embeddings_are_the_architecture_s_own():
    model = timm.create_model("test_vit", num_classes=0, img_size=32)
    kept = model.pos_embed.clone()
    weight = model.blocks[0].attn.qkv.weight.clone()
    reinitialise(model, "xavier", 1)
    assert torch.equal(model.pos_embed, kept)
    assert not torch.equal(model.blocks[0].attn.qkv.weight, weight)


def test_a_choice_in_the_network_s_arguments_wins():
    def spread(text, init):
        options = BackboneOptions(backbone="classic/mlp", random_init=True, model_kwargs=text)
        model = load_backbone(options).model
        reinitialise(model, init, 3)
        return float(model.hidden2.linear.weight.detach().std())

    assert spread("width=256", "normal") == pytest.approx(1, rel=0.02)
    assert spread("width=256,init=normal", "he") == pytest.approx(1, rel=0.02)
    assert spread("width=256", "xavier") == pytest.approx(256**-0.5, rel=0.02)


def test_lenet5_keeps_the_range_of_its_paper():
    model = classic.headless("lenet5-1998")
    reinitialise(model, "he", 2)
    for layer, fan_in in ((model.c1[0], 25), (model.c5[0], 400), (model.f6[0], 120)):
        assert 0.9 * 2.4 / fan_in < float(layer.weight.detach().abs().max()) <= 2.4 / fan_in
    assert float(model.s2[0].weight.detach().abs().max()) <= 0.6


def test_deep_sigmoid_networks_vanish_and_he_s_do_not():
    """What the experiment on initialisation shows: the gradient of the first of ten layers."""

    def first_to_last(activation, init):
        model = classic.headless(
            "mlp",
            {"image_size": 16, **classic.resolve_options(
                "mlp", {"activation": activation, "init": init, "width": 64, "depth": 10}
            )},
        )  # fmt: skip
        images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        model(images).square().mean().backward()
        norms = [step.linear.weight.grad.norm() for name, step in model.named_children() if name != "pixels"]
        return float(norms[0] / norms[-1])

    assert first_to_last("sigmoid", "xavier") < 1e-4
    assert 0.1 < first_to_last("relu", "he") < 100
