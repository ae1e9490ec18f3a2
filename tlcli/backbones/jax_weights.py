"""Original weights of JAX in `.npz` files: ViT and BiT as timm's own loaders read them, and MLP-Mixer.

What timm's loaders do not look at, they cannot miss: a file of a deeper network would pass. So the network is
filled with NaN first, which shows what was not read, and blocks that the network lacks are named here.
"""

import copy
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tlcli.backbones.weights_file import StateDict

BLOCKS = (
    (re.compile(r"(?:.*/)?Transformer/encoderblock_(\d+)/"), "blocks.{}.norm1.weight", 0),
    (re.compile(r"(?:.*/)?block(\d+)/unit(\d+)/"), "stages.{}.blocks.{}.norm1.weight", 1),
)
"""How blocks are named in JAX, how a tensor of theirs is named in timm, and the number of the first block."""


def from_jax(model: nn.Module, path: Path, state: StateDict) -> StateDict | None:
    """Return the tensors of an `.npz` file under timm's names, or None where its names are not those of JAX.

    Args:
        model: The headless network of timm, which stays as it is.
        path: The file.
        state: Its arrays by name, already checked and read.
    """
    if not any("/" in name for name in state):
        return None
    if any(name.startswith("MixerBlock_0/") for name in state):
        return _mixer(state)
    loader: Any = getattr(model, "load_pretrained", None)
    if loader is None:
        return None
    read: Any = copy.deepcopy(model)
    with torch.no_grad():
        for value in read.parameters():
            value.fill_(torch.nan)
    read.load_pretrained(str(path))
    found = {name: value for name, value in read.state_dict().items() if not value.isnan().any()}
    wanted = read.state_dict().keys()
    return found | {name: value for name, value in _blocks(state) if name not in wanted}


def _blocks(state: StateDict) -> list[tuple[str, torch.Tensor]]:
    """Return a tensor of each block in the file, under timm's name."""
    found = []
    for name, value in state.items():
        if name.endswith("Transformer/encoderblock/LayerNorm_0/scale"):  # all blocks in one array
            found += [(f"blocks.{place}.norm1.weight", layer) for place, layer in enumerate(value)]
        for pattern, wanted, first in BLOCKS:
            if block := pattern.match(name):
                found.append((wanted.format(*(int(number) - first for number in block.groups())), value))
    return found


MIXER = {
    "stem": "stem.proj",
    "pre_head_layer_norm": "norm",
    "LayerNorm_0": "norm1",
    "LayerNorm_1": "norm2",
    "token_mixing/Dense_0": "mlp_tokens.fc1",
    "token_mixing/Dense_1": "mlp_tokens.fc2",
    "channel_mixing/Dense_0": "mlp_channels.fc1",
    "channel_mixing/Dense_1": "mlp_channels.fc2",
}


def _mixer(state: StateDict) -> StateDict:
    found: StateDict = {}
    for name, value in state.items():
        module, _, leaf = name.rpartition("/")
        block = re.match(r"MixerBlock_(\d+)/(.+)", module)
        place = MIXER.get(block[2] if block else module)
        if place is None:
            continue
        if leaf == "kernel":
            value = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
        start = f"blocks.{block[1]}." if block else ""
        found[f"{start}{place}.{'bias' if leaf == 'bias' else 'weight'}"] = value.contiguous()
    return found
