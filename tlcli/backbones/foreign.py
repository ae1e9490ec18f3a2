"""Checkpoints of other libraries under the names of timm's networks.

timm's own filters come first; they know the original repositories of its networks, and resample position
embeddings. transformers' names of ViT, DeiT and DINOv2 are put back to the original ones, which those filters
take. torchvision's tensors are matched by order and shape; that is believed only where both networks then
give the same features.
"""

import copy
import importlib
import inspect
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from tlcli.backbones import torchvision_zoo
from tlcli.backbones.guess import guess
from tlcli.backbones.jax_weights import from_jax
from tlcli.backbones.matching import Target, candidates
from tlcli.backbones.weights import Conversion
from tlcli.backbones.weights_file import StateDict
from tlcli.errors import TlcliError
from tlcli.machine.memory import is_out_of_memory
from tlcli.warned import warn
from tlcli.wording import counted

logger = logging.getLogger(__name__)

FILTERS = (
    "checkpoint_filter_fn",
    "checkpoint_filter_fn_encoder",
    "_filter_fn",
    "_filter_torchvision_pretrained",
)
"""How timm's modules call their filters of foreign checkpoints; not every module has one."""

SAME_FEATURES = 1e-3
"""Largest difference between the features of two networks that compute the same; a share of their size."""

Converter = Callable[[StateDict], StateDict]


def conversions(model: nn.Module, architecture: str, path: str | os.PathLike[str]) -> list[Conversion]:
    """Return what to try on a checkpoint whose names are not timm's.

    Args:
        model: The headless network, whose weights are not set.
        architecture: timm's name.
        path: The checkpoint, which timm's loaders of JAX weights read themselves.
    """
    filters = [_filtered(function, model) for function in _filters(model, architecture)]
    found = [Conversion("timm's own conversion", one) for one in filters]
    for one in filters or [dict]:
        found.append(Conversion("the names of transformers", partial(_from_transformers, one)))
    found.append(Conversion("the names of JAX", partial(from_jax, model, Path(path))))
    matched = "the order of torchvision's network, whose features it gives"
    return [*found, Conversion(matched, partial(_from_torchvision, model), whole=True)]


def _filters(model: nn.Module, architecture: str) -> Iterator[Callable[..., Any]]:
    modules = {type(model).__module__: None}
    if timm.is_model(architecture):
        modules = {timm.model_entrypoint(architecture).__module__: None} | modules
    found: dict[Callable[..., Any], None] = {}
    for module in modules:
        for name in FILTERS:
            if function := getattr(importlib.import_module(module), name, None):
                found[function] = None
    yield from found


def _filtered(function: Callable[..., Any], model: nn.Module) -> Converter:
    """Return one of timm's filters as a function of the tensors alone."""
    parameters = inspect.signature(function).parameters
    given: dict[str, Any] = {"model": model} if "model" in parameters else {}
    if "adapt_layer_scale" in parameters:  # of DeiT-3, whose names no other network has
        given["adapt_layer_scale"] = True
    return lambda state: dict(function(dict(state), **given))


# ---- transformers -----------------------------------------------------------------------------------------

LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias|lambda1)$")
INSIDE = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
}
OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}


def _from_transformers(then: Converter, state: StateDict) -> StateDict | None:
    """Return a ViT, DeiT or DINOv2 of transformers under the original names; q, k and v are joined."""
    if "embeddings.patch_embeddings.projection.weight" not in state:
        return None
    found: StateDict = {}
    joined: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, value in state.items():
        layer = LAYER.match(name)
        if name in OUTSIDE:
            found[OUTSIDE[name]] = value
        elif layer and (which := layer[2].removeprefix("attention.attention.")) in ("query", "key", "value"):
            joined[f"blocks.{layer[1]}.attn.qkv.{layer[3]}"][which] = value
        elif layer and layer[2] in INSIDE:
            leaf = "gamma" if layer[3] == "lambda1" else layer[3]
            found[f"blocks.{layer[1]}.{INSIDE[layer[2]]}.{leaf}"] = value
        else:
            found[f"blocks.{layer[1]}.{layer[2]}.{layer[3]}" if layer else name] = value
    for name, parts in joined.items():
        found[name] = torch.cat([parts["query"], parts["key"], parts["value"]])
    if "register_tokens" in found:  # timm's filter knows DINOv2 by its mask token
        found.setdefault("mask_token", torch.zeros(1))
    return then(found)


# ---- torchvision ------------------------------------------------------------------------------------------


def _from_torchvision(model: nn.Module, state: StateDict) -> StateDict | None:
    """Return the tensors of a torchvision network under a timm network's names, which stays as it is.

    Believed only where both networks give the same features of a random image.
    """
    name = guess(state, torchvision_zoo.PREFIX, only=torchvision_zoo.PREFIX)
    if name is None:
        return None
    try:
        original = torchvision_zoo.headless(name.removeprefix(torchvision_zoo.PREFIX), {}).eval()
        found = candidates(state, Target.of(original))[0]
        for layer, channels in found.channels.items():
            warn(
                "adapted_channels",
                f"The first layer ({layer}) is for images of {counted(channels, 'channel')}; it was adapted "
                "to three, as timm does.",
            )
        values = original.state_dict()  # carries the format versions that some networks ask for
        values.update(found.tensors)
        original.load_state_dict(values)
        for late in (False, True):
            tensors = _by_shape(original, model, shortcuts_late=late)
            if tensors and _agree(original, model, tensors):
                return tensors
    except (RuntimeError, TlcliError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        logger.debug("%s: not comparable with timm's network: %s", name, error)
    return None


def _by_shape(original: nn.Module, model: nn.Module, *, shortcuts_late: bool) -> StateDict | None:
    """Return the tensors of `original` under the names of `model`: the k-th of a shape is the k-th there."""
    given: dict[tuple[str, tuple[int, ...]], list[torch.Tensor]] = defaultdict(list)
    entries = list(original.state_dict().items())
    if shortcuts_late:
        entries = _shortcuts_last(entries)
    for name, value in entries:
        given[_kind(name, value)].append(value)
    found: StateDict = {}
    for name, wanted in model.state_dict().items():
        alike = given.get(_kind(name, wanted))
        if not alike:
            return None
        found[name] = alike.pop(0).reshape(wanted.shape)
    left = [value for values in given.values() for value in values if value.is_floating_point()]
    return None if left else found


def _kind(name: str, value: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    leaf = name.rpartition(".")[2]
    ends = ("bias", "running_mean", "running_var", "num_batches_tracked", "table", "index")
    kind = next((end for end in ends if leaf.endswith(end)), "weight")
    return kind, tuple(size for size in value.shape if size != 1)


def _shortcuts_last(entries: list[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors of a network with the shortcut of each block behind the block, where timm has it."""
    found: list[tuple[str, torch.Tensor]] = []
    held: list[tuple[str, torch.Tensor]] = []
    for name, value in entries:
        if held and not name.startswith(held[0][0].partition(".proj.")[0] + "."):
            found, held = found + held, []
        (held if ".proj." in name else found).append((name, value))
    return found + held


def _agree(original: nn.Module, model: nn.Module, tensors: StateDict) -> bool:
    """Return whether `model` with `tensors` gives the features that `original` gives."""
    loaded = copy.deepcopy(model).eval()
    loaded.load_state_dict(tensors)
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    images = torch.randn((1, *size), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = original(images), loaded(images)
    if expected.shape != found.shape:
        return False
    scale = float(expected.abs().max())
    return bool(float((expected - found).abs().max()) <= SAME_FEATURES * scale)
