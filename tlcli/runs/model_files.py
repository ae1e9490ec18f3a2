"""The network and the head as files of a run, compared with what was trained before the run is published."""

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tlcli.backbones.backbone import Backbone
from tlcli.backbones.initialise import varied
from tlcli.backbones.timm_zoo import (
    build_classifier,
    classifier_name,
    silence_norms,
    timm_config,
)
from tlcli.backbones.zoo import load_stored
from tlcli.errors import BackboneError
from tlcli.heads.head import Head
from tlcli.heads.linear import LinearHead
from tlcli.runs.directory import RunDirectory

MAX_LOGIT_DIFFERENCE = 1e-4
# Architecture and arguments -> name of the classifier that a head can become.
_PLACES: dict[str, str | None] = {}


def save_model(
    directory: RunDirectory, backbone: Backbone, head: Head, class_names: tuple[str, ...]
) -> dict[str, Any]:
    """Write the network and its head, after comparing what was written with what was trained.

    A linear head of a timm backbone whose classifier is one linear layer becomes that layer. Otherwise
    the network is stored without a classifier, and the head in head.safetensors.

    Args:
        directory: Of the run.
        backbone: Its model holds the trained weights; mode, device and type do not matter, and stay.
        head: The classifier of its pooled features, on the CPU.
        class_names: In the order of the head's outputs.

    Returns:
        Where the head is, for run.json.

    Raises:
        BackboneError: The stored network does not give the logits of the trained one.
    """
    if not directory.writes:
        return {"facts": head.document(), "file": None, "classifier": None}
    trained = _settled(copy.deepcopy(backbone.model).cpu().float())
    place = None
    if backbone.is_timm:
        network, place = _empty(backbone, head, len(class_names))
        _fill(network, trained, place, head)
        _write_tensors(directory, "model.safetensors", network.state_dict())
        config = timm_config(backbone, len(class_names) if place else 0, class_names)
    else:
        _write_tensors(directory, "model.safetensors", trained.state_dict())
        stored = str(directory.path / "model.safetensors")
        network = load_stored(backbone.architecture, backbone.arguments, stored).model
        config = {  # timm cannot build it; kept in the same file so that every run looks alike
            "architecture": backbone.architecture,
            "num_classes": 0,
            "label_names": list(class_names),
        }
    try:
        _check_agrees(network, place, trained, head, backbone.preprocess.image_size)
    except BackboneError:
        (directory.path / "model.safetensors").unlink()
        raise
    if place is None:
        _write_tensors(directory, "head.safetensors", head.state())
    directory.write_json("config.json", config)
    return {"facts": head.document(), "file": "head.safetensors" if place is None else "model.safetensors",
            "classifier": place}  # fmt: skip


def check_saving(backbone: Backbone, num_classes: int, *, linear: bool) -> None:
    """Refuse a network that could not be saved once it is trained: tried on a copy with other values.

    Args:
        backbone: Before training; stays as it is.
        num_classes: Number of classes.
        linear: Whether the head is one linear layer, which becomes the classifier where it can.

    Raises:
        BackboneError: A fresh network does not take its tensors, or gives other logits with them.
    """
    trained = _settled(varied(backbone.model).cpu().float())
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(num_classes, backbone.num_features, generator=draw) / backbone.num_features**0.5
    head = LinearHead(weight, torch.randn(num_classes, generator=draw), not linear)
    place = None
    try:
        if backbone.is_timm:
            network, place = _empty(backbone, head, num_classes)
        else:
            network = load_stored(backbone.architecture, backbone.arguments, None).model
        _fill(network, trained, place, head)
        _check_agrees(network, place, trained, head, backbone.preprocess.image_size)
    except (RuntimeError, BackboneError) as error:
        raise BackboneError(
            f"{backbone.name} could not be saved once it is trained: {' '.join(str(error).split())}",
            hint="Use another backbone; `tlcli extract` works with this one.",
        ) from error


def _settled(model: nn.Module) -> nn.Module:
    """Return a network in eval mode without what some attention layers keep between two evaluations."""
    return model.train().eval()


def _empty(backbone: Backbone, head: Head, num_classes: int) -> tuple[nn.Module, str | None]:
    """Return an untrained timm network for a head, and the name of the classifier that the head becomes."""
    if isinstance(head, LinearHead) and not head.normalise:
        network = build_classifier(backbone.architecture, backbone.arguments, num_classes)
        key = json.dumps([backbone.architecture, backbone.arguments], sort_keys=True, default=str)
        if key not in _PLACES:  # asked before training, and again when the run is written
            _PLACES[key] = classifier_name(network)
        if place := _PLACES[key]:
            return network, place
    return build_classifier(backbone.architecture, backbone.arguments, 0), None


def _write_tensors(directory: RunDirectory, name: str, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save

    plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    directory.write_bytes(name, save(plain, {"format": "pt"}))


def _fill(network: nn.Module, trained: nn.Module, place: str | None, head: Head) -> None:
    """Load the trained tensors, and those of a head that becomes the classifier, into a fresh network."""
    state = trained.state_dict()  # with the format versions that some modules ask for
    if place is not None and isinstance(head, LinearHead):
        state |= silence_norms(network, trained)
        state |= {f"{place}.weight": head.weight, f"{place}.bias": head.bias}
    network.load_state_dict(state, strict=True)


def _check_agrees(
    network: nn.Module, place: str | None, trained: nn.Module, head: Head, image_size: tuple[int, int]
) -> None:
    """Compare logits on random images, on the CPU in float32, where no device rounds on its own account."""
    images = torch.randn(2, 3, *image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = head.logits(trained(images)).cpu()
        stored = network.eval()(images)
        if place is None:
            stored = head.logits(stored).cpu()
    scale = max(1.0, float(expected.abs().max()))
    difference = float((stored - expected).abs().max())
    if not difference <= MAX_LOGIT_DIFFERENCE * scale:
        raise BackboneError(
            f"The network as stored differs from the trained one by {difference:.2g} in its logits; "
            "the run is not published.",
            hint="This is a bug in tlcli or in this architecture; please report it.",
        )
