"""Side branches of GoogLeNet and Inception v3, which training may attach and no run stores."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from tlcli.backbones.classic import INIT_SEED
from tlcli.backbones.initialise import reinitialise

# ---- side branches ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SideBranch:
    """A classifier beside the network, whose loss is added in training and which is dropped afterwards.

    Attributes:
        module_name: The module of the headless network whose output the branch takes.
        build: Number of classes -> the branch: maps [B, C, H, W] to logits [B, num_classes].
    """

    module_name: str
    build: Callable[[int], nn.Module]


def side_branches(model: nn.Module) -> list[SideBranch]:
    """Return the side branches of GoogLeNet and Inception v3; other networks have none.

    The maps are averaged to a fixed size, so that images of any size are taken. A branch hangs on a module
    of the whole network; a traced suffix has no such modules.

    Args:
        model: Headless, of torchvision (`googlenet`, `inception_v3`) or timm (`inception_v3`).
    """
    from torchvision.models import GoogLeNet, Inception3

    if isinstance(model, GoogLeNet):
        return [
            SideBranch("inception4a", partial(_googlenet_branch, 512)),
            SideBranch("inception4d", partial(_googlenet_branch, 528)),
        ]
    if isinstance(model, Inception3) or type(model).__name__ == "InceptionV3":
        return [SideBranch("Mixed_6e", _inception_branch)]
    return []


def _googlenet_branch(channels: int, num_classes: int) -> nn.Module:
    """The branch of Szegedy et al. 2014: averages 4x4, 1x1 convolution, 1024 units, dropout 0.7."""
    from torchvision.models.googlenet import InceptionAux

    return _seeded(lambda: InceptionAux(channels, num_classes, dropout=0.7))


def _inception_branch(num_classes: int) -> nn.Module:
    """The branch of Szegedy et al. 2015: averages 5x5, two convolutions with batch norm, a linear layer."""
    from torchvision.models.inception import BasicConv2d

    return _seeded(
        lambda: nn.Sequential(
            nn.AdaptiveAvgPool2d(5),
            BasicConv2d(768, 128, kernel_size=1),
            BasicConv2d(128, 768, kernel_size=5),
            nn.Flatten(),
            nn.Linear(768, num_classes),
        )
    )


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a branch with He's weights; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        branch = make()
    reinitialise(branch, "he", INIT_SEED)
    return branch
