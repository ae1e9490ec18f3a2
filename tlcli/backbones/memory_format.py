"""Channels-last memory: what convolutions are fastest on, where a network takes it.

A network that views its maps as other shapes can fail on it, and one without convolutions gains nothing. So
it is set tensor by tensor, and whoever uses it tries the network once and falls back to contiguous memory.
"""

import torch
from torch import Tensor, nn

FEW_CHANNELS = 16  # a block of oneDNN's kernels for AVX-512


def to_channels_last(module: nn.Module) -> nn.Module:
    """Put the module's tensors of rank 4 into channels-last memory, and return it.

    `Module.to(memory_format=...)` fails at a tensor of rank 5, such as the masks of shifted windows.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return module


def in_memory_format(inputs: Tensor, channels_last: bool) -> Tensor:
    """Return inputs [B, ...] in contiguous memory; maps in channels-last memory where that is wanted."""
    wanted = torch.channels_last if channels_last and inputs.ndim == 4 else torch.contiguous_format
    return inputs.contiguous(memory_format=wanted)


def has_convolutions(module: nn.Module) -> bool:
    """Return whether a module has weights of two-dimensional convolutions, which alone gain by the format."""
    return any(parameter.dim() == 4 for parameter in module.parameters())


def is_broken_in_channels_last(module: nn.Module, device: torch.device) -> bool:
    """Return whether training a module in channels-last memory would end the process or be wrong.

    On a CPU oneDNN's backward pass of a 1x1 convolution with a stride and fewer than `FEW_CHANNELS` inputs
    writes past its memory there (uxlfoundation/oneDNN issue 6035, open in November 2026).
    """
    return device.type == "cpu" and any(
        isinstance(layer, nn.Conv2d)
        and max(layer.kernel_size) == 1
        and max(layer.stride) > 1
        and layer.in_channels // layer.groups < FEW_CHANNELS
        for layer in module.modules()
    )
