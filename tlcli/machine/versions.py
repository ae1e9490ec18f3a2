"""Versions of the libraries whose numbers depend on them, and what they compute on."""

import platform
from typing import TYPE_CHECKING

from tlcli import __version__

if TYPE_CHECKING:
    import torch


def versions() -> dict[str, str]:
    """Return the versions of what a run depends on, for run.json."""
    import timm
    import torch
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "timm": str(timm.__version__),
    }


def environment(device: "torch.device") -> dict[str, str]:
    """Return what computed rows of features: recorded with the rows, but not part of their key."""
    import PIL
    import torch

    kind = device.type  # not its number: equal GPUs compute alike
    if kind == "cuda":
        kind += f" {torch.cuda.get_device_name(device)}"
    elif kind == "cpu":
        kind += f" {torch.backends.cpu.get_cpu_capability()}"
    found = versions()
    return {
        "tlcli": __version__,
        "torch": found["torch"],
        "torchvision": found["torchvision"],
        "timm": found["timm"],
        "pillow": PIL.__version__,
        "device": kind,
    }
