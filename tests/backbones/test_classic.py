"""The networks of the text books: what they are, what their options change, and that they can be cut."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tlcli.backbones import classic
from tlcli.backbones.backbone import state_sha256
from tlcli.backbones.costs import unit_costs
from tlcli.backbones.cut import cut_at
from tlcli.backbones.side_branches import side_branches
from tlcli.backbones.units import units
from tlcli.backbones.zoo import load_backbone, load_stored
from tlcli.config.backbone import BackboneOptions
from tlcli.errors import BackboneError, UsageError

SIZES = {"lenet5-1998": 32, "lenet5": 32, "small-cnn": 16, "mlp": 16, "xception-small": 16}
OPTIONS = [
    ("lenet5-1998", "init=xavier"),
    ("lenet5", "norm=first,norm_place=after,activation=leaky-relu"),
    ("lenet5", "norm=every,activation=elu,separable=true,width=2"),
    ("small-cnn", "norm=every,separable=true,activation=gelu,width=8,depth=4"),
    ("small-cnn", "norm=first,norm_place=after,activation=tanh,width=8"),
    ("mlp", "hidden=[24,16,8],norm=every"),
    ("mlp", "width=16,depth=10,activation=sigmoid,init=normal"),
    ("xception-small", "width=8,depth=2,activation=elu"),
]


def load(name, **options):
    return load_backbone(BackboneOptions(backbone=f"classic/{name}", random_init=True, **options))


def test_lenet5_has_the_numbers_of_the_paper():
    costs = unit_costs(classic.headless("lenet5-1998"), (32, 32))
    assert [row.unit.name for row in costs] == ["c1", "s2", "c3", "s4", "c5", "f6"]
    assert [row.unit.num_parameters for row in costs] == [156, 12, 1516, 32, 48_120, 10_164]
    assert [row.output_shape for row in costs] == [
        (6, 28, 28), (6, 14, 14), (16, 10, 10), (16, 5, 5), (120,), (84,),
    ]  # fmt: skip


def test_lenet5_s_c3_sees_only_its_maps():
    layer = classic.headless("lenet5-1998").c3[0]
    maps = torch.zeros(1, 6, 14, 14)
    base = layer(maps)
    for number in range(6):
        one = maps.clone()
        one[0, number] = torch.randn(14, 14, generator=torch.Generator().manual_seed(number))
        moved = ((layer(one) - base).abs().amax((0, 2, 3)) > 0).nonzero().flatten().tolist()
        assert moved == [out for out, seen in enumerate(classic.C3_INPUTS) if number in seen]
    assert [sum(number in seen for seen in classic.C3_INPUTS) for number in range(6)] == [10] * 6


def test_lenet5_looks_at_grey_and_squashes():
    model = classic.headless("lenet5-1998")
    images = torch.rand(3, 3, 32, 32)
    luminance = (images * torch.tensor(classic.GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)
    with torch.no_grad():
        torch.testing.assert_close(model(images), model(luminance.expand(-1, 3, -1, -1)))
        assert model(100 * images).abs().max() <= 1.7159
    squash = classic.ScaledTanh()
    torch.testing.assert_close(
        squash(torch.tensor([-1.0, 1.0])), torch.tensor([-1.0, 1.0]), atol=1e-3, rtol=0
    )


def test_subsampling_sums_scales_and_shifts():
    layer = classic.Subsampling(2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -1.0]))
        layer.bias.copy_(torch.tensor([0.0, 3.0]))
    maps = torch.ones(1, 2, 4, 4)
    assert layer(maps).flatten(2).amax(2).tolist() == [[2.0, -1.0]]


@pytest.mark.parametrize(("name", "text"), [*((name, None) for name in SIZES), *OPTIONS])
def test_every_cut_is_exact(name, text):
    size = SIZES[name]
    backbone = load(name, model_kwargs=text, image_size=size)
    parts = units(backbone.model)
    assert len(parts) > 1
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        expected = backbone.model(images)
        assert expected.shape == (3, backbone.num_features)
        for k in range(1, len(parts)):
            cut = cut_at(backbone.model, k, (size, size))
            assert cut.node != "input"
            assert torch.equal(cut.suffix.eval()(cut.prefix(images)), expected)


@pytest.mark.parametrize("size", [16, 28, 33, 64, 96])
@pytest.mark.parametrize("name", list(SIZES))
def test_other_image_sizes(name, size):
    backbone = load(name, image_size=size, model_kwargs="width=8" if name == "mlp" else None)
    assert backbone.preprocess.image_size == (size, size)
    assert backbone.arguments["image_size"] == size
    assert backbone.model(torch.zeros(2, 3, size, size)).shape == (2, backbone.num_features)


def test_options_do_what_they_say():
    def parts(text, kind, name="lenet5"):
        model = load(name, model_kwargs=text).model
        return [key for key, module in model.named_modules() if isinstance(module, kind)]

    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    assert parts(None, norms) == []
    assert parts("norm=first", norms) == ["c1.norm"]
    assert parts("norm=every", norms) == ["c1.norm", "c3.norm", "c5.norm", "f6.norm"]
    names = [key for key, _ in load("lenet5", model_kwargs="norm=first").model.c1.named_children()]
    assert names == ["conv", "norm", "act"]
    names = [
        key for key, _ in load("lenet5", model_kwargs="norm=first,norm_place=after").model.c1.named_children()
    ]
    assert names == ["conv", "act", "norm"]
    assert len(parts("activation=leaky-relu", nn.LeakyReLU)) == 4
    assert len(parts("depth=10,width=8", nn.Linear, "mlp")) == 10
    plain, separable = (
        load("small-cnn", model_kwargs=f"separable={value}").model for value in ("false", "true")
    )
    count = [sum(parameter.numel() for parameter in model.parameters()) for model in (plain, separable)]
    assert count[1] < count[0] / 5


def test_arguments_say_everything_and_build_the_same_network(tmp_path):
    backbone = load("small-cnn", model_kwargs="norm=every,depth=2,width=4", image_size=24)
    assert backbone.arguments == {
        "image_size": 24, "norm": "every", "norm_place": "before", "activation": "relu", "init": "auto",
        "separable": False, "width": 4, "depth": 2,
    }  # fmt: skip
    assert (backbone.architecture, backbone.origin, backbone.is_timm) == (
        "classic/small-cnn",
        "classic",
        False,
    )
    with torch.no_grad():
        backbone.model.conv1.conv.weight += 1
    path = tmp_path / "model.safetensors"
    save_file(backbone.model.state_dict(), path)
    again = load_stored(backbone.architecture, backbone.arguments, str(path))
    assert state_sha256(again.model) == state_sha256(backbone.model)
    assert (again.arguments, again.origin) == (backbone.arguments, "classic")


def test_norm_none_is_what_it_says():
    assert load("lenet5", model_kwargs="norm=none").arguments == load("lenet5").arguments


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("lenet5", "nrm=every", "Did you mean norm"),
        ("lenet5", "norm=evry", "none, first, every"),
        ("lenet5", "depth=3", "norm_place"),
        ("lenet5", "width=0", "1 to 64"),
        ("lenet5", "width=1.5", "1 to 64"),
        ("lenet5", "width=true", "1 to 64"),
        ("lenet5", "separable=1", "false, true"),
        ("lenet5-1998", "norm=every", "init"),
        ("mlp", "hidden=[0]", "hidden sizes"),
        ("mlp", "hidden=wide", "hidden sizes"),
        ("mlp", "hidden=[8],depth=2", "one way"),
        ("small-cnn", "activation=swish", "leaky-relu"),
    ],
)
def test_wrong_options_are_usage_errors(name, text, words):
    with pytest.raises(UsageError) as caught:
        load(name, model_kwargs=text)
    assert words in caught.value.hint


def test_there_are_no_weights_and_the_way_on_is_named(tmp_path):
    with pytest.raises(BackboneError, match="no pretrained weights") as caught:
        load_backbone(BackboneOptions(backbone="classic/lenet5"))
    for words in ("--scenario scratch", "--random-init", "--weights"):
        assert words in caught.value.hint
    with pytest.raises(UsageError) as usage:
        load("lnet5")
    assert "classic/lenet5" in usage.value.hint
    save_file(load("lenet5", model_kwargs="width=2").model.state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(BackboneError, match="another shape"):
        load_backbone(BackboneOptions(backbone="classic/lenet5", weights=str(tmp_path / "x.safetensors")))


@pytest.mark.parametrize(("name", "text", "smallest"), [("lenet5", None, 16), ("small-cnn", "depth=5", 32)])
def test_images_that_are_too_small_are_refused(name, text, smallest):
    with pytest.raises(BackboneError, match="too small") as caught:
        load(name, model_kwargs=text, image_size=smallest - 1)
    assert f"--image-size {smallest}" in caught.value.hint
    load(name, model_kwargs=text, image_size=smallest)


def test_weights_are_the_same_each_time_and_the_random_state_stays():
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    one, other = classic.headless("small-cnn"), classic.headless("small-cnn")
    assert torch.equal(torch.rand(2), expected)
    assert state_sha256(one) == state_sha256(other)


@pytest.mark.parametrize(
    ("name", "size", "places"),
    [
        ("torchvision/googlenet", 64, ["inception4a", "inception4d"]),
        ("torchvision/inception_v3", 96, ["Mixed_6e"]),
        ("inception_v3", 96, ["Mixed_6e"]),
        ("torchvision/resnet18", 32, []),
    ],
)
def test_side_branches_classify_what_their_module_gives(name, size, places):
    model = load_backbone(BackboneOptions(backbone=name, random_init=True, image_size=size)).model
    branches = side_branches(model)
    assert [branch.module_name for branch in branches] == places
    state = torch.get_rng_state()
    built = [branch.build(5).train() for branch in branches]
    assert torch.equal(torch.get_rng_state(), state)
    outputs = {}
    for branch, network in zip(branches, built, strict=True):
        model.get_submodule(branch.module_name).register_forward_hook(
            lambda _module, _inputs, maps, key=branch.module_name, network=network: outputs.update(
                {key: network(maps)}
            )
        )
    model.train()(torch.randn(2, 3, size, size))
    assert {key: tuple(logits.shape) for key, logits in outputs.items()} == dict.fromkeys(places, (2, 5))
    for logits, network in zip(outputs.values(), built, strict=True):
        logits.sum().backward(retain_graph=True)
        assert all(parameter.grad is not None for parameter in network.parameters())
    if places:
        assert next(model.parameters()).grad is not None
