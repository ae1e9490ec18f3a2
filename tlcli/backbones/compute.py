"""What the trained part of a network computes in: number type and memory format, tried before training.

A network that mixes number types itself can fail under autocast, and one that views its maps as other shapes
in channels-last memory. One forward and one backward pass on a copy show it, before any work is done.
"""

import copy
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tlcli.backbones.cut import Cut
from tlcli.backbones.memory_format import (
    has_convolutions,
    in_memory_format,
    is_broken_in_channels_last,
    to_channels_last,
)
from tlcli.errors import BackboneError
from tlcli.machine.memory import is_out_of_memory
from tlcli.wording import first_line

logger = logging.getLogger(__name__)

Amp = Literal["none", "bf16", "fp16"]
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """How the trained part computes.

    Attributes:
        amp: Number type under automatic mixed precision; "none" is fp32.
        channels_last: Whether its maps and weights are in channels-last memory.
        note: What it cannot compute in, and why; "" where it computes as was asked.
    """

    amp: Amp = "none"
    channels_last: bool = True
    note: str = ""

    def precision(self, device: torch.device) -> "torch.autocast | nullcontext[None]":
        """Return the context that forward passes run in."""
        return nullcontext() if self.amp == "none" else torch.autocast(device.type, dtype=TYPES[self.amp])


def choose_compute(cut: Cut, image_size: tuple[int, int], amp: Amp, device: torch.device) -> Compute:
    """Return the first way in which the part after a cut can be trained; the cut stays as it was.

    Tried in order: the number type asked for, then fp32; each in channels-last memory, then in contiguous.

    Args:
        cut: Where the network is divided.
        image_size: Height and width of the images, in pixels.
        amp: The number type asked for.
        device: Where it will be trained.

    Raises:
        BackboneError: It can be trained in none of these ways.
    """
    if not cut.trained_parameters():
        return Compute(amp)
    with torch.no_grad():
        images = torch.randn(2, 3, *image_size, generator=torch.Generator().manual_seed(0))
        rows = cut.prefix(images).to(device)
    wanted, problem = has_convolutions(cut.suffix), Exception()
    formats = (True, False) if wanted else (False,)
    if wanted and is_broken_in_channels_last(cut.suffix, device):
        formats, problem = (False,), Exception("a convolution of it is broken there on CPUs")
    types: tuple[Amp, ...] = (amp, "none") if amp != "none" else ("none",)
    for tried in types:
        for channels_last in formats:
            note = _note(problem, amp if tried != amp else "channels-last memory" if wanted else "")
            found = Compute(tried, channels_last, "" if (tried, channels_last) == (amp, wanted) else note)
            try:
                _step(cut, rows, found, device)
            except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
                if is_out_of_memory(error):
                    raise
                logger.debug("training with %s fails: %s", found, error)
                problem = error
            else:
                return found
    after = f" after its first {cut.num_frozen_units} units" if cut.num_frozen_units else ""
    raise BackboneError(
        f"This network cannot be trained{after}: {first_line(problem)}",
        hint="Use --freeze all to train a head on its features.",
    ) from problem


def _note(problem: Exception, what: str) -> str:
    """Return what does not run, and what is used instead."""
    instead = "contiguous memory" if "memory" in what else "fp32"
    return f"{what} does not suit this network ({first_line(problem)}), so it is trained in {instead}"


def _step(cut: Cut, rows: Tensor, compute: Compute, device: torch.device) -> None:
    """Pass forward and backward once, on a copy, so that no statistic, gradient or random state changes."""
    suffix = copy.deepcopy(cut.suffix).to(device)
    if compute.channels_last:
        to_channels_last(suffix)
    trained = _trained(suffix, cut)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        suffix.train()
        with torch.enable_grad(), compute.precision(device):
            value = suffix(in_memory_format(rows, compute.channels_last)).float().square().mean()
            torch.autograd.grad(value, trained, allow_unused=True)
        suffix.eval()
        with torch.no_grad():
            suffix(in_memory_format(rows, compute.channels_last))


def _trained(suffix: nn.Module, cut: Cut) -> list[nn.Parameter]:
    frozen = set(cut.frozen_parameters)
    trained = [value for name, value in suffix.named_parameters() if name not in frozen]
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained
