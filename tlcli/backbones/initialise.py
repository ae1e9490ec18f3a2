"""Random weights by the rules that text books compare: He, Xavier, and the plain normal distribution.

- `he` (He et al. 2015): normal, variance 2 / fan_out for convolutions (as in the reference ResNets of
  torchvision and timm; it keeps the variance of gradients) and 2 / fan_in for linear layers.
- `xavier` (Glorot & Bengio 2010): normal, variance 2 / (fan_in + fan_out); suits tanh and sigmoid.
- `normal`: N(0, 1) whatever the fan, which is what the two others were made against.

Fans count the connections of a group, so that a depthwise convolution has the fans of its k x k kernel.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS = (*BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)
STATISTICS = ("running_mean", "running_var")


def reinitialise(model: nn.Module, init: str, seed: int) -> None:
    """Draw the weights of a network anew, in place, for `--scenario scratch`.

    Convolutions and linear layers follow `init`, with biases at zero. Norms get weight 1 and bias 0, and
    BatchNorm forgets its statistics. What is neither (position embeddings, class tokens, layer scales,
    relative position tables) has no rule here, and stays: load the network with `random_init`, so that it is
    the architecture's own.

    A weight that is zero throughout stays zero. In a network with fresh weights that is the architecture's
    will: timm's ResNets start the last norm of every residual block at zero, so that blocks begin as the
    identity (Goyal et al. 2017). The variance rules know nothing of the additions, which would otherwise
    double the variance from block to block.

    A `classic/` network whose initialisation was chosen in --model-kwargs keeps to that one.

    Args:
        model: The network; may lie on any device.
        init: "he", "xavier", "normal", "default" (torch's own: uniform, variance 1 / (3 fan_in)) or "paper"
            (LeCun et al. 1998: uniform within 2.4 / fan_in).
        seed: The weights are a function of it; the global random state is neither used nor moved.
    """
    chosen = getattr(model, "chosen_init", "auto")
    init = init if chosen == "auto" else chosen
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NORMS):
                _reset_norm(module)
        for module, fan_in, fan_out in _layers(model):
            if not module.weight.any():
                continue
            _draw(module.weight, init, fan_in, fan_out, generator)
            if module.bias is not None and init == "default":
                _draw(module.bias, init, fan_in, fan_out, generator)
            elif module.bias is not None:
                module.bias.zero_()


def varied(model: nn.Module) -> nn.Module:
    """Return a copy of a network with other parameters and normalisation statistics, always the same ones.

    What is true of an untrained network by accident, such as a norm that changes nothing, is not true of it.
    """
    model = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(0)
    statistics = ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(STATISTICS))
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *statistics):
            noise = torch.rand(value.shape, generator=draw)
            value.mul_(0.8 + 0.4 * noise)  # variances stay positive
            if not name.endswith("running_var"):
                value.add_(0.1 * (noise - 0.5))
    return model


def _layers(model: nn.Module) -> Iterator[tuple[Any, float, float]]:
    """Yield the layers whose weights are drawn, each with fan_in, and fan_out as He's rule wants it."""
    for module in model.modules():
        if isinstance(module, CONVOLUTIONS):
            outputs, inputs, *kernel = module.weight.shape
            area = math.prod(kernel)
            yield module, inputs * area, outputs // module.groups * area
        elif isinstance(module, nn.Linear):
            outputs, inputs = module.weight.shape
            yield module, inputs, outputs
        elif fans := getattr(module, "fans", None):  # the layers of LeNet-5 that torch does not have
            yield module, *fans()


def _draw(weight: torch.Tensor, init: str, fan_in: float, fan_out: float, generator: torch.Generator) -> None:
    values = torch.empty(weight.shape)  # drawn on the CPU, so that a seed means the same on every device
    if init in {"paper", "default"}:
        bound = 2.4 / fan_in if init == "paper" else 1 / math.sqrt(fan_in)
        values.uniform_(-bound, bound, generator=generator)
    else:
        he_fan = fan_in if weight.ndim == 2 else fan_out
        variance = {"he": 2 / he_fan, "xavier": 2 / (fan_in + fan_out), "normal": 1.0}[init]
        values.normal_(0.0, math.sqrt(variance), generator=generator)
    weight.copy_(values)


def _reset_norm(module: Any) -> None:
    if isinstance(module, BATCH_NORMS):
        module.reset_running_stats()
    if module.weight is not None and module.weight.any():
        module.weight.fill_(1.0)
    if module.bias is not None:
        module.bias.zero_()
