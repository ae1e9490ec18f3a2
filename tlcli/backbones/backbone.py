"""A loaded backbone: the network without its classifier, and how images are prepared for it."""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tlcli.config.backbone import Origin, Preprocess
from tlcli.errors import UsageError
from tlcli.warned import Warned

INIT_SEED = 0
"""Seed of --random-init, so that the baseline is the same each time."""
UNKNOWN_LICENSES = ("", "unknown", "other")
NON_COMMERCIAL = re.compile(r"\bnc\b|non-?commercial|research")


@dataclass(kw_only=True)
class Backbone:
    """A loaded backbone and how images are prepared for it.

    Attributes:
        name: As the user wrote it.
        architecture: timm's name without a tag, "torchvision/NAME" or "classic/NAME".
        model: Headless, in eval mode, float32: maps [B, 3, H, W] to pooled features [B, D].
        preprocess: The evaluation transform, with the user's overrides.
        num_features: D.
        arguments: What `timm.create_model` (or `load_stored`) needs besides `num_classes` to build the same
            network. Drop-path is not among them: it changes training alone.
        license: Licence of the weights where known, such as "apache-2.0".
        origin: Where the weights came from.
        pretrained: False with --random-init.
        pretrained_cfg: timm's configuration of the weights without their location; {} for other networks.
    """

    name: str
    architecture: str
    model: nn.Module
    preprocess: Preprocess
    num_features: int
    arguments: dict[str, Any] = field(default_factory=dict)
    license: str | None = None
    origin: Origin = "timm"
    pretrained: bool = True
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)

    @property
    def license_warning(self) -> Warned | None:
        """Return what to know about the licence of pretrained weights, if anything."""
        if not self.pretrained:
            return None
        license = (self.license or "").lower()
        if license in UNKNOWN_LICENSES:
            text = f"The licence of the weights of {self.name} is not known; ask their publisher."
            return Warned("licence_unknown", text)
        if NON_COMMERCIAL.search(license):
            text = f"The weights of {self.name} are under {self.license}, which excludes commercial use."
            return Warned("licence_non_commercial", text)
        return None

    @property
    def is_timm(self) -> bool:
        """Return whether timm can build the network, so that its format can describe it."""
        return self.origin not in ("torchvision", "classic")


def state_sha256(module: nn.Module) -> str:
    """Return SHA-256 (hex) over name|dtype|shape|bytes of every parameter and buffer, sorted by name."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{shape}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def no_drop_path(name: str) -> UsageError:
    """Return the error of a network that has no drop-path."""
    return UsageError(f"{name} has no drop-path.", hint="Leave --drop-path out; --dropout always works.")
