"""Checkpoints as training scripts write them: wrapped, prefixed, numbered, several networks in one file."""

import argparse
import random
import time
from collections import OrderedDict

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from tlcli.backbones import foreign
from tlcli.backbones.checkpoint import flatten
from tlcli.backbones.guess import build_on_meta, guess
from tlcli.backbones.matching import Target, candidates, colours
from tlcli.backbones.weights import load_weights
from tlcli.backbones.zoo import load_backbone
from tlcli.config.backbone import BackboneOptions
from tlcli.errors import BackboneError

SIZES = {
    "vit_tiny_patch16_224": {"depth": 3, "img_size": 64},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24},
}
ARCHITECTURES = ("resnet10t", "mobilenetv2_035", "convnext_atto", *SIZES)


def network(name, seed=1, num_classes=7, **arguments):
    torch.manual_seed(seed)
    if name.startswith("torchvision/"):
        return models.get_model(name.removeprefix("torchvision/"), weights=None)
    return timm.create_model(name, num_classes=num_classes, **{**SIZES.get(name, {}), **arguments})


@pytest.fixture(scope="module", params=ARCHITECTURES)
def source(request):
    """Return an architecture's name and a network of it, with a classifier."""
    return request.param, network(request.param)


@pytest.fixture
def load(tmp_path):
    """Return `load(name, content, key) -> network`, which loads a checkpoint into a fresh network."""

    def run(name, content, key=None, **arguments):
        path = tmp_path / "weights.pth"
        torch.save(content, path)
        torch.manual_seed(2)
        target = timm.create_model(name, num_classes=0, **{**SIZES.get(name, {}), **arguments})
        load_weights(target, path, name, foreign.conversions(target, name, path), key)
        return target

    return run


def assert_same(found, source):
    expected = source.state_dict()
    assert {
        name for name, value in found.state_dict().items() if not torch.equal(value, expected[name])
    } == set()


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


# ---- every wrapping ---------------------------------------------------------------------------------------

PREFIXES = (
    "", "net.", "feature_extractor.", "student.backbone.", "module.model.encoder.", "teacher.",
    "module.encoder_q.", "model._orig_mod.", "0.", "0.model.", "a.b.c.d.e.f.", "layer1.", "blocks.0.",
)  # fmt: skip
BESIDE = {
    "epoch": 3,
    "optimizer": {
        "state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(1.0)}},
        "param_groups": [{"lr": 1}],
    },
    "args": argparse.Namespace(lr=0.1, weight=torch.ones(2)),
    "loss": [torch.tensor(0.1), None, "text"],
    "projector": {"0.weight": torch.zeros(4, 4), "1.running_mean": torch.zeros(4)},
}


def nested(draw, content):
    """Return `content` inside up to four containers of any kind, with what scripts store beside it."""
    for _ in range(draw.randrange(5)):
        kind = draw.choice(["dict", "ordered", "list", "tuple", "namespace", "beside"])
        key = draw.choice(["state_dict", "model", "net", "params", "weights", "ema", "x y", 5])
        content = {
            "dict": {key: content},
            "ordered": OrderedDict({key: content}),
            "list": [None, content, 3],
            "tuple": ("resnet", content),
            "namespace": argparse.Namespace(model=content),
            "beside": {**BESIDE, key: content},
        }[kind]
    return content


@pytest.mark.parametrize("seed", range(6))
def test_any_nesting_and_any_prefix(load, source, seed):
    name, expected = source
    draw = random.Random(f"{name} {seed}")
    prefix = draw.choice(PREFIXES)
    state = prefixed(prefix, expected.state_dict())
    state |= {"head.projector.0.weight": torch.ones(3, 3), "fc.2.weight": torch.ones(2, 2)}
    items = list(state.items())
    if draw.random() < 0.5:
        draw.shuffle(items)
    assert_same(load(name, nested(draw, dict(items))), expected)


@pytest.mark.parametrize("word", ["module", "_orig_mod", "_fsdp_wrapped_module", "inner.wrapped"])
def test_words_in_the_middle_of_names(load, source, word):
    name, expected = source
    part = next(key for key, child in expected.named_children() if len(list(child.children())) > 1)
    state = {
        key.replace(f"{part}.", f"{part}.{word}.", 1) if key.startswith(f"{part}.") else key: value
        for key, value in expected.state_dict().items()
    }
    assert_same(load(name, prefixed("net.", state)), expected)


def flat(children):
    """Return the parts of a network with its rows of parts laid out in one row."""
    return [part for child in children for part in (child if isinstance(child, nn.Sequential) else [child])]


@pytest.mark.parametrize("kind", ["children", "fastai", "lightly", "flat"])
@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_035", "convnext_atto"])
def test_numbered_children(load, name, kind):
    expected = network(name)
    children = list(expected.children())
    if kind == "children":
        state = nn.Sequential(*children).state_dict()
    elif kind == "flat":
        state = nn.Sequential(*flat(children)).state_dict()
    elif kind == "fastai":
        state = nn.Sequential(
            nn.Sequential(*children[:-1]), nn.Sequential(nn.BatchNorm1d(9), nn.Linear(9, 2))
        )
        state = {"model": state.state_dict(), "opt": {"state": []}}
    else:
        state = prefixed("backbone.", nn.Sequential(*children[:-1]).state_dict())
        state = {"state_dict": state | {"projection_head.layers.0.weight": torch.ones(2, 3)}}
    found = load(name, state)
    if name == "convnext_atto" and kind in {"fastai", "lightly"}:  # its last part holds a norm as well
        found.head.norm = expected.head.norm
    assert_same(found, expected)


def test_numbered_children_in_a_file_that_sorts_its_names(tmp_path):
    expected = network("convnext_atto")
    parts = [nn.Identity() for _ in range(9)]  # so that there is a part 10, which text sorts before part 9
    save_file(nn.Sequential(*parts, *expected.children()).state_dict(), tmp_path / "weights.safetensors")
    found = network("convnext_atto", seed=2, num_classes=0)
    load_weights(found, tmp_path / "weights.safetensors", "convnext_atto")
    assert_same(found, expected)


def test_containers_that_hold_themselves_or_each_other_end():
    inner = [torch.ones(1)]
    inner.append(inner)
    for _ in range(60):
        inner = [inner, inner, {"x": inner}]
    start = time.perf_counter()
    assert len(flatten({"a": inner, "numbers": list(range(100_000))}).tensors) <= 1
    assert time.perf_counter() - start < 2


TORCHVISION = ("mobilenet_v3_small", "squeezenet1_1", "mnasnet0_5")


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_s_networks_in_any_wrapping(name, tmp_path):
    source = network(f"torchvision/{name}")
    draw = random.Random(name)
    for kind in ("plain", "numbered"):
        state = source.state_dict() if kind == "plain" else nn.Sequential(*source.children()).state_dict()
        content = nested(draw, prefixed(draw.choice(PREFIXES), state))
        torch.save(content, tmp_path / "weights.pth")
        options = BackboneOptions(backbone=f"torchvision/{name}", weights=str(tmp_path / "weights.pth"))
        assert_same(load_backbone(options).model, source)


@pytest.mark.parametrize(
    ("given", "asked"),
    [("resnet34", "resnet18"), ("efficientnet_b1", "efficientnet_b0"), ("convnext_small", "convnext_tiny"),
     ("vgg13", "vgg11"), ("densenet169", "densenet121")],
)  # fmt: skip
def test_siblings_among_torchvision_s_networks_are_refused_and_named(given, asked):
    with torch.device("meta"):
        state = models.get_model(given, weights=None).state_dict()
    asked = f"torchvision/{asked}"
    assert not candidates(state, Target.of(build_on_meta(asked)))[0].accepted
    assert guess(state, near=asked) == f"torchvision/{given}"


# ---- deeper and other networks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("resnet34", "resnet18"),
        ("resnet18", "resnet34"),
        ("efficientnet_b1", "efficientnet_b0"),
        ("convnext_small", "convnext_tiny"),
        ("swin_small_patch4_window7_224", "swin_tiny_patch4_window7_224"),
        ("poolformer_s24", "poolformer_s12"),
        ("resnet101", "resnet50"),
        ("seresnet18", "resnet18"),
        ("vit_small_patch16_224", "vit_tiny_patch16_224"),
        ("mobilenetv2_100", "mobilenetv2_050"),
        ("resnet50", "resnet18"),
    ],
)
def test_siblings_are_refused_and_named(given, asked, tmp_path):
    with torch.device("meta"):
        state, target = timm.create_model(given).state_dict(), timm.create_model(asked, num_classes=0)
    found = candidates(prefixed("model.", state), Target.of(target))[0]
    assert not found.accepted
    start = time.perf_counter()
    assert guess(prefixed("model.", state), near=asked) == given
    assert time.perf_counter() - start < 5


def test_a_deeper_network_is_refused_with_the_command_for_it(load, tmp_path):
    with pytest.raises(
        BackboneError, match=r"deeper network than resnet10t.*layer1\.1\.conv1.*of resnet18"
    ) as caught:
        load("resnet10t", {"model": network("resnet18").state_dict()})
    assert f"--backbone resnet18 --weights {tmp_path}/weights.pth" in caught.value.hint


def test_a_deeper_network_with_numbers_for_names_is_refused(load):
    with pytest.raises(BackboneError):
        load("resnet18", nn.Sequential(*network("resnet34").children()).state_dict())
    with pytest.raises(BackboneError):
        load("resnet18", nn.Sequential(*flat(network("resnet34").children())).state_dict())


def test_heads_decoders_and_counters_are_no_surplus(load):
    expected = network("resnet10t")
    more = {
        "fc.1.weight": torch.ones(2, 2), "aux.conv.weight": torch.ones(2, 2, 1, 1),
        "bn2.weight": torch.ones(5),
        "decoder.layer1.0.conv1.weight": torch.ones(4, 4, 3, 3), "layer1.0.total_ops": torch.zeros(1),
        "layer1.0.index": torch.arange(7),
    }  # fmt: skip
    assert_same(load("resnet10t", expected.state_dict() | more), expected)


def test_the_right_architecture_under_unknown_names_is_not_blamed(load, monkeypatch):
    monkeypatch.setattr("tlcli.backbones.guess.MOST_SECONDS", 0.3)
    state = {f"{number}": value for number, value in enumerate(network("resnet10t").state_dict().values())}
    with pytest.raises(BackboneError) as caught:
        load("resnet10t", state)
    assert "shapes of resnet10t under other names" in caught.value.hint


# ---- two networks in one file -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("student.", "teacher."),
        ("online_network.backbone.", "target_network.backbone."),
        ("module.encoder_q.", "module.encoder_k."),
        ("", "copy.inner."),
        ("a b.", "c.d._orig_mod."),
    ],
)
def test_two_that_fit_are_refused_and_chosen_with_the_key_as_printed(load, one, other):
    name, expected = "convnext_atto", network("convnext_atto")
    rival = network(name, seed=5)
    state = {"state_dict": prefixed(one, expected.state_dict()) | prefixed(other, rival.state_dict())}
    with pytest.raises(BackboneError, match="hold 2 networks that fit") as caught:
        load(name, state)
    keys = caught.value.message.partition("differ: ")[2].rstrip(".").split(", ")
    assert len(keys) == 2
    for key in keys:
        wanted = expected if key == f"state_dict.{one}".rstrip(".") else rival
        assert_same(load(name, state, key), wanted)


def test_the_top_of_a_file_has_a_key_too(load):
    one, other = network("test_resnet"), network("test_resnet", seed=5)
    state = one.state_dict() | prefixed("teacher.", other.state_dict())
    with pytest.raises(BackboneError, match=r"differ: \., teacher\.") as caught:
        load("test_resnet", state)
    assert "--weights-key . or --weights-key teacher" in caught.value.hint
    assert_same(load("test_resnet", state, "."), one)
    assert_same(load("test_resnet", state, "teacher"), other)


def test_equal_copies_are_no_choice(load):
    one = network("test_resnet")
    copy = {name: value.clone() for name, value in one.state_dict().items()}
    assert_same(load("test_resnet", {"student": one.state_dict(), "teacher": copy}), one)


@pytest.mark.parametrize(
    ("averaged", "raw", "used"),
    [
        ("state_dict_ema", "state_dict", "averaged"),
        ("model_ema", "model", "averaged"),
        ("ema", "model", "raw"),  # as before; timm does not know this name
        ("ema", "net", "averaged"),
    ],
)
def test_averaged_and_raw_weights(load, caplog, averaged, raw, used):
    one, other = network("test_resnet"), network("test_resnet", seed=5)
    state = {raw: other.state_dict(), averaged: prefixed("module.", one.state_dict()), "epoch": 1}
    assert_same(load("test_resnet", state), one if used == "averaged" else other)
    assert f"the {used} ones are used" in caplog.text
    left = raw if used == "averaged" else f"{averaged}.module"
    assert f"--weights-key {left} takes" in caplog.text
    assert_same(load("test_resnet", state, left), other if used == "averaged" else one)
    assert_same(load("test_resnet", state, averaged), one)


def test_averaged_parameters_without_the_rest_are_said_to_be_left_out(load, caplog):
    net = network("test_resnet")
    shadow = [value.detach() + 1 for value in net.parameters()]
    assert_same(load("test_resnet", {"model": net.state_dict(), "ema": {"shadow": shadow}}), net)
    assert "also holds averaged (EMA) weights (ema.shadow.0" in caplog.text
    parameters = {name: value.detach() + 1 for name, value in net.named_parameters()}
    caplog.clear()
    assert_same(load("test_resnet", {"model": net.state_dict(), "model_ema": parameters}), net)
    assert "averaged (EMA)" in caplog.text
    caplog.clear()
    assert_same(load("test_resnet", {"model": net.state_dict(), "ema": dict(net.state_dict())}), net)
    assert "EMA" not in caplog.text  # an equal copy


def test_a_key_that_is_not_there(load):
    with pytest.raises(BackboneError, match="under the key 'teacher'") as caught:
        load("test_resnet", {"student": network("test_resnet").state_dict()}, "teacher")
    assert "student" in caught.value.hint


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_odd_tensors_in_two_sets_are_refused(load, kind):
    state = dict(network("test_resnet").state_dict())
    weight = state["conv1.0.weight"]
    state["conv1.0.weight"] = weight.to_sparse() if kind == "sparse" else weight.to("meta")
    with pytest.raises(BackboneError, match=kind):
        load("test_resnet", {"student": state, "teacher": dict(state)})
    state["conv1.0.weight"] = torch.ones(weight.shape[0], 1, *weight.shape[2:]).to_sparse()
    with pytest.raises(BackboneError):
        load("test_resnet", state)


# ---- first layers for other images, other image sizes -----------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_first_layers_of_other_channels_are_adapted_as_timm_does(load, channels, caplog):
    torch.manual_seed(1)
    expected = timm.create_model("resnet10t", in_chans=channels)
    found = load("resnet10t", expected.state_dict())
    assert f"of {channels} channel" in caplog.text
    weight = expected.conv1[0].weight
    assert torch.equal(found.conv1[0].weight, timm.models.adapt_input_conv(3, weight, base_chans=channels))
    assert torch.equal(found.layer1[0].conv1.weight, expected.layer1[0].conv1.weight)


def test_a_grey_image_gives_what_it_gave():
    weight, image = torch.randn(4, 1, 3, 3), torch.randn(2, 1, 8, 8)
    expected = nn.functional.conv2d(image, weight)
    found = nn.functional.conv2d(image.expand(2, 3, 8, 8), colours(weight))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "model.backbone."])
def test_position_embeddings_are_resampled(load, prefix, caplog):
    expected = network("vit_tiny_patch16_224")
    found = load("vit_tiny_patch16_224", {"state_dict": prefixed(prefix, expected.state_dict())}, img_size=96)
    resampled = timm.layers.resample_abs_pos_embed(expected.pos_embed, [6, 6], num_prefix_tokens=1)
    assert torch.allclose(found.pos_embed, resampled)
    assert torch.equal(found.blocks[2].mlp.fc1.weight, expected.blocks[2].mlp.fc1.weight)
    assert "pos_embed was resampled from [1, 17, 192] to [1, 37, 192]" in caplog.text


def test_a_vision_transformer_of_other_tokens_or_patches_is_refused(load):
    """All but a few tensors fit, or a conversion would make them fit."""
    whole = {"depth": 12, "img_size": 224}
    for given, asked in (
        ("deit_tiny_distilled_patch16_224", "vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
        ("vit_small_patch32_224", "vit_small_patch16_224"),
    ):
        with pytest.raises(BackboneError, match=f"look like the weights of {given}"):
            load(asked, network(given, **whole).state_dict(), **whole)


# ---- other libraries --------------------------------------------------------------------------------------


def from_timm_to_transformers(state, kind):
    """Return a timm ViT under the names of transformers."""
    found = {}
    for name, value in state.items():
        name = name.replace("blocks.", "encoder.layer.").replace(
            "patch_embed.proj", "embeddings.patch_embeddings.projection"
        )
        name = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
                "dist_token": "embeddings.distillation_token"}.get(name, name)  # fmt: skip
        name = name.replace("attn.proj", "attention.output.dense")
        if name.startswith("norm."):
            name = "layernorm." + name.removeprefix("norm.")
        if kind == "dinov2":
            name = name.replace("ls1.gamma", "layer_scale1.lambda1").replace(
                "ls2.gamma", "layer_scale2.lambda1"
            )
        else:
            name = name.replace("norm1", "layernorm_before").replace("norm2", "layernorm_after")
            name = name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        if "attn.qkv" in name:
            for part, which in zip(value.chunk(3), ("query", "key", "value"), strict=True):
                found[name.replace("attn.qkv", f"attention.attention.{which}")] = part.clone()
        else:
            found[name] = value
    return found


@pytest.mark.parametrize(
    ("name", "kind", "prefix"),
    [
        ("vit_tiny_patch16_224", "vit", "vit."),
        ("vit_tiny_patch16_224", "vit", ""),
        ("deit_tiny_distilled_patch16_224", "deit", "model.deit."),
        ("vit_small_patch14_dinov2", "dinov2", "dinov2."),
    ],
)
def test_names_of_transformers(load, name, kind, prefix):
    arguments = {"depth": 2, "img_size": 56 if kind == "dinov2" else 64}
    torch.manual_seed(1)
    expected = timm.create_model(name, num_classes=0, **arguments)
    state = prefixed(prefix, from_timm_to_transformers(expected.state_dict(), kind))
    state |= {"classifier.weight": torch.ones(2, 192), "mask_token": torch.zeros(1, 1)}
    assert_same(load(name, {"state_dict": state}, **arguments), expected)


def settled(model):
    """Give every norm and bias other values than those they begin with, so that a mistake shows."""
    torch.manual_seed(4)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var") or "layer_scale" in name:
                value.uniform_(0.5, 1.5)
            elif name.endswith(("bias", "running_mean")):
                value.normal_(0, 0.1)
    return model.eval()


@pytest.mark.parametrize(
    ("theirs", "name", "place"),
    [
        ("mobilenet_v2", "mobilenetv2_100", "classifier.1"),
        ("efficientnet_b0", "efficientnet_b0", "classifier.1"),
        ("mobilenet_v3_small", "mobilenetv3_small_100", "classifier.3"),
        ("resnet18", "resnet18", "fc"),
        ("mnasnet0_5", "mnasnet_050", "classifier.1"),
        ("regnet_y_400mf", "regnety_004", "fc"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("convnext_tiny", "convnext_tiny", "classifier.2"),
                ("swin_t", "swin_tiny_patch4_window7_224", "head"),
                ("vit_b_32", "vit_base_patch32_224", "heads.head"),
                ("densenet121", "densenet121", "classifier"),
            )
        ),
    ],
)
def test_names_of_torchvision(load, theirs, name, place):
    original = settled(models.get_model(theirs, weights=None))
    whole = {"embed_dim": 96} if name in SIZES else {}  # not the small network of the other tests
    found = load(name, {"model": prefixed("module.", original.state_dict())}, **whole).eval()
    original.set_submodule(place, nn.Identity())
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = original(images)
        assert torch.allclose(found(images), expected, atol=1e-3 * float(expected.abs().max()))


def test_a_network_that_computes_something_else_from_the_same_tensors_is_refused(load):
    state = settled(models.get_model("efficientnet_b0", weights=None)).state_dict()
    with pytest.raises(BackboneError, match="torchvision/efficientnet_b0") as caught:
        load("tf_efficientnet_b0", state)  # pads another way
    assert "--backbone torchvision/efficientnet_b0 --weights" in caught.value.hint


# ---- cost -------------------------------------------------------------------------------------------------


def test_names_of_a_large_network_are_matched_at_once():
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224", num_classes=0)
    state = {"a": 0}
    state = prefixed("state_dict.module.model.student.backbone._orig_mod.", model.state_dict())
    state |= prefixed("optimizer.state.", {f"{n}.exp_avg": torch.zeros(1) for n in range(2000)})
    start = time.perf_counter()
    target = Target.of(model)
    assert candidates(state, target)[0].complete
    assert time.perf_counter() - start < 1
