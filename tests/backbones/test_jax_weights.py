"""Weights in `.npz` files: the original ones of JAX, a network's own names, and files that lie."""

import zipfile

import numpy as np
import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnetv2 import ResNetV2

from tlcli.backbones import foreign
from tlcli.backbones.weights import load_weights
from tlcli.backbones.weights_file import read_checkpoint
from tlcli.errors import BackboneError


def vit_to_jax(model):
    """Return a timm ViT under the names and shapes of the original repository."""
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    heads, width = model.blocks[0].attn.num_heads, model.embed_dim
    found = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": np.ones((width, 3), np.float32),
        "head/bias": np.ones(3, np.float32),
    }
    for number in range(len(model.blocks)):
        own, theirs = f"blocks.{number}.", f"Transformer/encoderblock_{number}/"
        for place, norm in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            found[f"{theirs}{place}/scale"] = state[f"{own}{norm}.weight"]
            found[f"{theirs}{place}/bias"] = state[f"{own}{norm}.bias"]
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        joined = np.split(state[f"{own}attn.qkv.weight"], 3), np.split(state[f"{own}attn.qkv.bias"], 3)
        for which, weight, bias in zip(("query", "key", "value"), *joined, strict=True):
            found[f"{attention}{which}/kernel"] = weight.T.reshape(width, heads, -1)
            found[f"{attention}{which}/bias"] = bias.reshape(heads, -1)
        found[f"{attention}out/kernel"] = state[f"{own}attn.proj.weight"].T.reshape(heads, -1, width)
        found[f"{attention}out/bias"] = state[f"{own}attn.proj.bias"]
        for layer in (0, 1):
            dense = f"{theirs}MlpBlock_3/Dense_{layer}/"
            found[f"{dense}kernel"] = state[f"{own}mlp.fc{layer + 1}.weight"].T
            found[f"{dense}bias"] = state[f"{own}mlp.fc{layer + 1}.bias"]
    return found


def bit_to_jax(model):
    """Return a timm ResNetV2 under the names and shapes of BiT."""
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    found = {
        "resnet/root_block/standardized_conv2d/kernel": state["stem.conv.weight"].transpose(2, 3, 1, 0),
        "resnet/group_norm/gamma": state["norm.weight"],
        "resnet/group_norm/beta": state["norm.bias"],
        "resnet/head/conv2d/kernel": np.ones((1, 1, 64, 3), np.float32),
    }
    for stage, part in enumerate(model.stages):
        for number, block in enumerate(part.blocks):
            own, theirs = f"stages.{stage}.blocks.{number}.", f"resnet/block{stage + 1}/unit{number + 1:02d}/"
            for place, layer in zip("abc", (1, 2, 3), strict=True):
                kernel = state[f"{own}conv{layer}.weight"].transpose(2, 3, 1, 0)
                found[f"{theirs}{place}/standardized_conv2d/kernel"] = kernel
                found[f"{theirs}{place}/group_norm/gamma"] = state[f"{own}norm{layer}.weight"]
                found[f"{theirs}{place}/group_norm/beta"] = state[f"{own}norm{layer}.bias"]
            if block.downsample is not None:
                kernel = state[f"{own}downsample.conv.weight"].transpose(2, 3, 1, 0)
                found[f"{theirs}a/proj/standardized_conv2d/kernel"] = kernel
    return found


def mixer_to_jax(model):
    """Return a timm MLP-Mixer under the names and shapes of the original repository."""
    places = {
        "stem.proj": "stem", "norm1": "LayerNorm_0", "norm2": "LayerNorm_1", "norm": "pre_head_layer_norm",
        "mlp_tokens.fc1": "token_mixing/Dense_0", "mlp_tokens.fc2": "token_mixing/Dense_1",
        "mlp_channels.fc1": "channel_mixing/Dense_0", "mlp_channels.fc2": "channel_mixing/Dense_1",
    }  # fmt: skip
    found = {}
    for name, value in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        start = ""
        if module.startswith("blocks."):
            _, number, module = module.split(".", 2)
            start = f"MixerBlock_{number}/"
        array = value.numpy()
        if leaf == "weight" and array.ndim > 1:
            array, leaf = (array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T), "kernel"
        found[f"{start}{places[module]}/{'scale' if leaf == 'weight' else leaf}"] = array
    return found


def vit(depth=2, seed=1, **arguments):
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", depth=depth, img_size=64, num_classes=0, **arguments)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0, 0.1)
    return model


def bit(layers=(1, 2), seed=1):
    torch.manual_seed(seed)
    return ResNetV2(layers=layers, channels=(128, 256), num_classes=0, stem_type="fixed")


def mixer(num_blocks=2, seed=1):
    torch.manual_seed(seed)
    return MlpMixer(num_blocks=num_blocks, patch_size=32, img_size=64, embed_dim=32, num_classes=0)


KINDS = {
    "vit": (vit, vit_to_jax, "vit_tiny_patch16_224"),
    "bit": (bit, bit_to_jax, "resnetv2_50x1_bit"),
    "mixer": (mixer, mixer_to_jax, "mixer_s32_224"),
}


def load(model, path, name):
    load_weights(model, path, name, foreign.conversions(model, name, path))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_original_weights_of_jax(tmp_path, kind):
    build, convert, name = KINDS[kind]
    expected = build()
    np.savez(tmp_path / "weights.npz", **convert(expected))
    found = load(build(seed=2), tmp_path / "weights.npz", name).state_dict()
    assert all(torch.equal(value, found[key]) for key, value in expected.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "deep", "shallow"), [("vit", 3, 2), ("bit", (1, 3), (1, 2)), ("mixer", 3, 2)]
)
def test_deeper_and_shallower_files_of_jax_are_refused(tmp_path, kind, deep, shallow):
    build, convert, name = KINDS[kind]
    np.savez(tmp_path / "deep.npz", **convert(build(deep)))
    np.savez(tmp_path / "shallow.npz", **convert(build(shallow)))
    with pytest.raises(BackboneError, match="deeper network"):
        load(build(shallow), tmp_path / "deep.npz", name)
    with pytest.raises(BackboneError, match="fit only"):
        load(build(deep), tmp_path / "shallow.npz", name)


def test_position_embeddings_of_jax_are_resampled(tmp_path):
    np.savez(tmp_path / "weights.npz", **vit_to_jax(vit()))
    torch.manual_seed(2)
    target = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=96, num_classes=0)
    found = load(target, tmp_path / "weights.npz", "vit_tiny_patch16_224")
    assert torch.equal(found.blocks[1].mlp.fc1.weight, vit().blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_network_s_own_names(tmp_path, save):
    torch.manual_seed(1)
    expected = timm.create_model("test_resnet", num_classes=0)
    save(tmp_path / "x.npz", **{f"net.{key}": value.numpy() for key, value in expected.state_dict().items()})
    torch.manual_seed(2)
    found = load(
        timm.create_model("test_resnet", num_classes=0), tmp_path / "x.npz", "test_resnet"
    ).state_dict()
    assert all(torch.equal(value, found[key]) for key, value in expected.state_dict().items())


def test_objects_in_arrays_are_left_out_and_never_loaded(tmp_path):
    np.savez(tmp_path / "x.npz", weight=np.ones(3), hidden=np.array([print], dtype=object))
    assert list(read_checkpoint(tmp_path / "x.npz")) == ["weight"]


def test_sizes_that_are_not_there_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "bomb.npz", weight=np.zeros(10_000_000, np.float32))
    with pytest.raises(BackboneError, match="arrays claim 40,000,"):
        read_checkpoint(tmp_path / "bomb.npz")
    np.savez(tmp_path / "plain.npz", weight=np.zeros(100, np.float32))
    with zipfile.ZipFile(tmp_path / "plain.npz") as plain, zipfile.ZipFile(tmp_path / "lie.npz", "w") as lie:
        data = plain.read("weight.npy").replace(b"(100,)", b"(999,)")
        lie.writestr("weight.npy", data)
    with pytest.raises(BackboneError, match=r"claims the shape \[999\]"):
        read_checkpoint(tmp_path / "lie.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "plain.npz").read_bytes()[:300])
    with pytest.raises(BackboneError, match="damaged"):
        read_checkpoint(tmp_path / "cut.npz")
